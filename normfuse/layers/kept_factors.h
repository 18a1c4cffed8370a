// What a convolution that is not trained multiplies by and adds, kept for as long as it is right: see fixed_factors.py.

#pragma once

#include <c10/core/InferenceMode.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "convolution_pair.h"

namespace normfuse {

constexpr int64_t kWorth = 4, kPieces = 8, kPieceBytes = 64;  // as in fixed_factors.py and kept.py

// Where a dense tensor was and what it held there, whole or in some pieces; or that there was none.
class Look {
 public:
  Look() = default;

  Look(const Tensor& tensor, int64_t pieces) {
    if (!tensor.defined()) return;
    place_ = static_cast<const char*>(tensor.const_data_ptr());
    sizes_ = tensor.sizes().vec();
    strides_ = tensor.strides().vec();
    extent_ = static_cast<int64_t>(tensor.nbytes());
    step_ = std::max<int64_t>(1, extent_ / pieces);
    width_ = pieces == 1 ? extent_ : kPieceBytes;
    for (int64_t at = 0; at < extent_; at += step_) seen_.append(place_ + at, width(at));
  }

  bool is_that_of(const Tensor& tensor) const {
    if (!tensor.defined() || tensor.const_data_ptr() != place_) return !tensor.defined() && !place_;
    if (tensor.sizes() != sizes_ || tensor.strides() != strides_) return false;
    const char* seen = seen_.data();
    for (int64_t at = 0; at < extent_; seen += width(at), at += step_)
      if (std::memcmp(place_ + at, seen, width(at)) != 0) return false;
    return true;
  }

 private:
  size_t width(int64_t at) const { return static_cast<size_t>(std::min(width_, extent_ - at)); }

  const char* place_ = nullptr;
  std::vector<int64_t> sizes_, strides_;
  int64_t extent_ = 0, step_ = 1, width_ = 0;
  std::string seen_;
};

// a W, or a where the output is scaled, and a (b - mean) + beta; beside the look of what they were made from.
class Factors {
 public:
  template <typename T>
  static std::shared_ptr<Factors> make(const Tensor& weight, const Norm& norm, bool on_output) {
    const c10::InferenceMode normal(false);
    auto made = std::make_shared<Factors>();
    const Tensor scale = norm.scale<T>();
    made->offset = norm.offset<T>(scale);
    made->factor = on_output ? scale : at::empty_like(weight);
    if (!on_output) multiply_channels<T>(made->factor, weight, scale);
    return made;
  }

  void look_at(const Tensor& weight, const Norm& norm, bool on_output) {
    eps_ = norm.eps;
    dtype_ = weight.scalar_type();
    if (!on_output) {
      version_ = weight._version();
      weight_ = Look(weight, kPieces);
    }
    const auto from = vectors(norm);
    for (size_t i = 0; i < from.size(); ++i) vectors_[i] = Look(*from[i], 1);
  }

  bool are_of(const Tensor& weight, const Norm& norm, bool on_output) const {
    if (eps_ != norm.eps || dtype_ != weight.scalar_type()) return false;
    if (!on_output && (version_ != weight._version() || !weight_.is_that_of(weight))) return false;
    const auto from = vectors(norm);
    for (size_t i = 0; i < from.size(); ++i)
      if (!vectors_[i].is_that_of(*from[i])) return false;
    return true;
  }

  Tensor factor, offset;

 private:
  static std::array<const Tensor*, 5> vectors(const Norm& norm) {
    return {&norm.bias, &norm.gain, &norm.shift, &norm.mean, &norm.var};
  }

  double eps_ = 0;
  at::ScalarType dtype_ = at::kFloat;
  uint32_t version_ = 0;
  Look weight_;
  std::array<Look, 5> vectors_;
};

// The geometry of a convolution, and what is kept for it from call to call.
class KeptConvolution : public torch::CustomClassHolder {
 public:
  const Geometry geometry;

  KeptConvolution(
      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups)
      : geometry{std::move(stride), std::move(padding), std::move(dilation), groups} {
    for (const int64_t step : geometry.stride) TORCH_CHECK(step > 0, "non-positive stride is not supported");
  }

  template <typename T>
  std::shared_ptr<const Factors> factors(const Tensor& weight, const Norm& norm, bool on_output, bool keeps) {
    if (!keeps) return Factors::make<T>(weight, norm, on_output);
    const std::lock_guard<std::mutex> lock(mutex_);  // several threads may run one model
    auto& kept = kept_[on_output];
    if (!kept || !kept->are_of(weight, norm, on_output)) {
      auto made = Factors::make<T>(weight, norm, on_output);
      made->look_at(weight, norm, on_output);
      kept = made;
    }
    return kept;
  }

  // Return what is kept: a W and its offset, then a and its offset.
  std::vector<Tensor> held() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Tensor> found;
    for (const auto& kept : kept_)
      if (kept) found.insert(found.end(), {kept->factor, kept->offset});
    return found;
  }

 private:
  std::mutex mutex_;
  std::array<std::shared_ptr<const Factors>, 2> kept_;
};

}  // namespace normfuse
