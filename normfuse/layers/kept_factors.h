// The vectors by which a convolution that is not trained scales and shifts, kept while right: see fixed_factors.py.

#pragma once

#include <c10/core/InferenceMode.h>
#include <torch/custom_class.h>

#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "convolution_pair.h"

namespace normfuse {

constexpr int64_t kWorth = 4;  // as in fixed_factors.py

// Where a vector was and what it held there, bit for bit; or that there was none.
class Look {
 public:
  Look() = default;

  explicit Look(const Tensor& vector) {
    if (!vector.defined()) return;
    place_ = static_cast<const char*>(vector.const_data_ptr());
    seen_.assign(place_, vector.nbytes());
  }

  bool is_that_of(const Tensor& vector) const {
    if (!vector.defined() || vector.const_data_ptr() != place_) return !vector.defined() && !place_;
    return vector.nbytes() == seen_.size() && std::memcmp(place_, seen_.data(), seen_.size()) == 0;
  }

 private:
  const char* place_ = nullptr;
  std::string seen_;
};

// a and a (b - mean) + beta; beside the look of what they were made from.
class Factors {
 public:
  template <typename T>
  explicit Factors(const Norm& norm, T) : eps_(norm.eps), dtype_(norm.mean.scalar_type()) {
    const c10::InferenceMode normal(false);
    scale = norm.scale<T>();
    offset = norm.offset<T>(scale);
  }

  void look_at(const Norm& norm) {
    const auto from = vectors(norm);
    for (size_t i = 0; i < from.size(); ++i) looks_[i] = Look(*from[i]);
  }

  bool are_of(const Norm& norm) const {
    if (eps_ != norm.eps || dtype_ != norm.mean.scalar_type()) return false;
    const auto from = vectors(norm);
    for (size_t i = 0; i < from.size(); ++i)
      if (!looks_[i].is_that_of(*from[i])) return false;
    return true;
  }

  Tensor scale, offset;

 private:
  static std::array<const Tensor*, 5> vectors(const Norm& norm) {
    return {&norm.bias, &norm.gain, &norm.shift, &norm.mean, &norm.var};
  }

  double eps_;
  at::ScalarType dtype_;
  std::array<Look, 5> looks_;
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
  std::shared_ptr<const Factors> factors(const Norm& norm, bool keeps) {
    if (!keeps) return std::make_shared<Factors>(norm, T());
    const std::lock_guard<std::mutex> lock(mutex_);  // several threads may run one model
    if (!kept_ || !kept_->are_of(norm)) {
      auto made = std::make_shared<Factors>(norm, T());
      made->look_at(norm);
      kept_ = made;
    }
    return kept_;
  }

  // Return what is kept: a and the offset.
  std::vector<Tensor> held() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_ ? std::vector<Tensor>{kept_->scale, kept_->offset} : std::vector<Tensor>();
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<const Factors> kept_;
};

}  // namespace normfuse
