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

  // Return the gradients of the input and of the weight.
  std::tuple<Tensor, Tensor> gradients(
      const Tensor& grad, const Tensor& x, const Tensor& weight, bool for_x, bool for_weight) const {
    auto [dx, dw, none] = at::convolution_backward(
        grad, x, weight, at::OptionalIntArrayRef(), stride, padding, dilation, false, zeros(), groups,
        {for_x, for_weight, false});
    return {dx, dw};
  }

  // Return S; oneDNN's, made one by one, is less precise.
  Tensor total(const Tensor& grad) const {
    std::vector<int64_t> axes{0};
    for (int64_t axis = 2; axis < grad.dim(); ++axis) axes.push_back(axis);
    return grad.sum(axes);
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

constexpr double kCancellation = 4;  // as in gain_gradient.py

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

  // Turn <V, W> into r (<V, W> + (b - mean) S), in place; both sums of dots are divided by a vector, if there is one.
  // Return whether the terms cancel so far that it is not precise: see gain_gradient.py.
  template <typename T>
  bool finish(Tensor& dots, const Tensor& total, const Tensor& by) const {
    const T *t = pointer<T>(total), *m = pointer<T>(mean), *b = pointer<T>(bias), *v = pointer<T>(var);
    const T *a = pointer<T>(by), e = static_cast<T>(eps);
    const int64_t channels = mean.numel();
    T *d = dots.data_ptr<T>(), *squares = d + channels;
    double made = 0, terms = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T one = a ? 1 / a[c] : 1, r = 1 / std::sqrt(v[c] + e), centred = ((b ? b[c] : 0) - m[c]) * t[c];
      d[c] = (d[c] * one + centred) * r;
      made += static_cast<double>(d[c]) * d[c];
      terms += (static_cast<double>(squares[c]) * one * one + static_cast<double>(centred) * centred) * r * r;
    }
    return terms > kCancellation * kCancellation * made;
  }
};

}  // namespace normfuse
