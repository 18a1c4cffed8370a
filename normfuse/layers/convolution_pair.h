// A convolution and the norm behind it, as what they compute by: the names are those of scaled.py.

#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "channel_loops.h"

namespace normfuse {

struct Geometry {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;

  std::vector<int64_t> zeros() const { return std::vector<int64_t>(stride.size(), 0); }

  Tensor run(const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    return at::convolution(x, weight, bias, stride, padding, dilation, false, zeros(), groups);
  }

  std::tuple<Tensor, Tensor, Tensor> gradients(
      const Tensor& grad, const Tensor& x, const Tensor& weight, std::array<bool, 3> needed) const {
    const std::vector<int64_t> sizes{weight.size(0)};
    return at::convolution_backward(
        grad, x, weight, at::OptionalIntArrayRef(sizes), stride, padding, dilation, false, zeros(), groups, needed);
  }

  // Return the number of elements of the output.
  int64_t outputs(const Tensor& x, const Tensor& weight) const {
    int64_t count = x.size(0) * weight.size(0);
    for (size_t i = 0; i < stride.size(); ++i) {
      const int64_t axis = static_cast<int64_t>(i) + 2, reach = dilation[i] * (weight.size(axis) - 1);
      count *= (x.size(axis) + 2 * padding[i] - reach - 1) / stride[i] + 1;
    }
    return count;
  }
};

// The vectors of a norm, (C,); gain, shift and bias may be undefined.
struct Norm {
  Tensor gain, shift, bias, mean, var;
  double eps;

  // Return a.
  template <typename T>
  Tensor scale() const {
    Tensor made = at::empty_like(mean);
    const T *v = pointer<T>(var), *g = pointer<T>(gain), e = static_cast<T>(eps);
    T* a = made.data_ptr<T>();
#pragma omp simd
    for (int64_t c = 0; c < made.numel(); ++c) a[c] = (g ? g[c] : 1) / std::sqrt(v[c] + e);
    return made;
  }

  // Return a (b - mean) + beta.
  template <typename T>
  Tensor offset(const Tensor& scale) const {
    Tensor made = at::empty_like(mean);
    const T *a = pointer<T>(scale), *m = pointer<T>(mean), *b = pointer<T>(bias), *s = pointer<T>(shift);
    T* o = made.data_ptr<T>();
#pragma omp simd
    for (int64_t c = 0; c < made.numel(); ++c) o[c] = (s ? s[c] : 0) + a[c] * ((b ? b[c] : 0) - m[c]);
    return made;
  }

  // The same by operations that have gradients, for a bias or a shift that is trained.
  Tensor differentiable_offset(const Tensor& scale) const {
    const Tensor centred = scale * (bias.defined() ? bias - mean : -mean);
    return shift.defined() ? shift + centred : centred;
  }

  // Turn <V, W> into dJ/dgamma, in place.
  template <typename T>
  void finish(Tensor& dots, const Tensor& total) const {
    const T *t = pointer<T>(total), *m = pointer<T>(mean), *b = pointer<T>(bias), *v = pointer<T>(var);
    const T e = static_cast<T>(eps);
    T* d = dots.data_ptr<T>();
#pragma omp simd
    for (int64_t c = 0; c < dots.numel(); ++c) d[c] = (d[c] + ((b ? b[c] : 0) - m[c]) * t[c]) / std::sqrt(v[c] + e);
  }
};

}  // namespace normfuse
