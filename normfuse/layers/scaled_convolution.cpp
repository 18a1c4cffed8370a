// A convolution whose outputs are normalized by fixed statistics, as one differentiable operator.
//
// The mathematics is that of scaled.py, whose names are used here:
//
//     z = (a W) x + a (b - mean) + beta        a = gamma r        r = 1 / sqrt(var + eps)
//     dJ/dW = a V    dJ/db = a S    dJ/dbeta = S    dJ/dgamma = r (<V, W> + (b - mean) S)    dJ/dx = (a W)^T G
//
// What it spares is what the interpreter does between two convolutions, and a pass over the weights: <V, W> and a V are
// made in one.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "channel_loops.h"

namespace normfuse {
namespace {

using at::IntArrayRef;
using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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

// Whether to scale the output: where it is the smaller one and no scale is too near zero to divide by.
template <typename T>
bool prefers_output(const Geometry& geometry, const Tensor& x, const Tensor& weight, const Tensor& scale) {
  if (geometry.outputs(x, weight) >= weight.numel()) return false;
  const T limit = std::sqrt(std::numeric_limits<T>::min()), *a = scale.const_data_ptr<T>();
  return std::all_of(a, a + scale.numel(), [=](T one) { return std::abs(one) > limit; });
}

enum Input { X, WEIGHT, BIAS, GAIN, SHIFT, MEAN, VAR };
constexpr size_t kInputs = 12;  // of the operator
using Needed = std::array<bool, 5>;

template <typename T>
variable_list first_gradients(
    const Geometry& geometry, const Norm& norm, const Tensor& grad, const Tensor& x, const Tensor& weight, bool on_output,
    Needed needed) {
  const Tensor scale = norm.scale<T>();
  const bool for_v = needed[WEIGHT] || needed[GAIN], for_total = needed[BIAS] || needed[GAIN] || needed[SHIFT];
  Tensor given = grad, factor = weight;
  if (on_output) {
    given = scratch(grad);
    affine<T>(given, grad, scale, Tensor());
  } else if (needed[X]) {
    factor = scaled<T>(weight, scale);
  }
  auto [dx, v, total] = geometry.gradients(given, x, factor, {needed[X], for_v, for_total});
  if (for_v && v.strides() != weight.strides()) v = at::empty_like(weight).copy_(v);
  if (for_total && on_output) total.div_(scale);
  variable_list made(kInputs);
  if (needed[GAIN]) {
    made[GAIN] = dots<T>(v, weight, on_output || !needed[WEIGHT] ? Tensor() : scale);
    if (on_output) made[GAIN].div_(scale);
    norm.finish<T>(made[GAIN], total);
  } else if (for_v && !on_output) {
    v.mul_(per_channel(scale, geometry.stride.size() + 1));
  }
  if (needed[X]) made[X] = dx;
  if (needed[WEIGHT]) made[WEIGHT] = v;
  if (needed[BIAS]) made[BIAS] = scale * total;
  if (needed[SHIFT]) made[SHIFT] = total;
  return made;
}

// The same by operations that have gradients of their own.
variable_list differentiable_gradients(
    const Geometry& geometry, const Norm& norm, const Tensor& grad, const Tensor& x, const Tensor& weight,
    Needed needed) {
  const Tensor rstd = at::rsqrt(norm.var + norm.eps), scale = norm.gain.defined() ? rstd * norm.gain : rstd;
  const Tensor column = per_channel(scale, geometry.stride.size() + 1);
  const auto [dx, v, total] = geometry.gradients(grad, x, weight * column, {needed[X], true, true});
  const Tensor centre = norm.bias.defined() ? norm.bias - norm.mean : -norm.mean;
  variable_list made(kInputs);
  if (needed[X]) made[X] = dx;
  if (needed[WEIGHT]) made[WEIGHT] = v * column;
  if (needed[BIAS]) made[BIAS] = scale * total;
  if (needed[GAIN]) made[GAIN] = rstd * ((v * weight).flatten(1).sum(1) + centre * total);
  if (needed[SHIFT]) made[SHIFT] = total;
  return made;
}

struct ScaledConvolution : public torch::autograd::Function<ScaledConvolution> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& gain,
      const Optional& shift, const Tensor& mean, const Tensor& var, double eps, IntArrayRef stride, IntArrayRef padding,
      IntArrayRef dilation, int64_t groups) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Geometry geometry{stride.vec(), padding.vec(), dilation.vec(), groups};
    const Norm norm{gain.value_or(Tensor()), shift.value_or(Tensor()), bias.value_or(Tensor()), mean, var, eps};
    ctx->save_for_backward({x, weight, norm.bias, norm.gain, norm.shift, mean, var});
    Tensor z;
    bool on_output = false;
    AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "scaled_convolution", [&] {
      const Tensor scale = norm.scale<scalar_t>(), offset = norm.offset<scalar_t>(scale);
      on_output = prefers_output<scalar_t>(geometry, x, weight, scale);
      if (on_output) {
        z = geometry.run(x, weight, Tensor());
        affine<scalar_t>(z, z, scale, offset);
      } else {
        z = geometry.run(x, scaled<scalar_t>(weight, scale), offset);
      }
    });
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["on_output"] = on_output;
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    return z;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const Geometry geometry{
        data["stride"].toIntVector(), data["padding"].toIntVector(), data["dilation"].toIntVector(),
        data["groups"].toInt()};
    const Norm norm{saved[GAIN], saved[SHIFT], saved[BIAS], saved[MEAN], saved[VAR], data["eps"].toDouble()};
    Needed needed;
    for (size_t i = 0, edge = 0; i < needed.size(); ++i)  // what is missing has no edge
      needed[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    if (at::GradMode::is_enabled())
      return differentiable_gradients(geometry, norm, grads[0], saved[X], saved[WEIGHT], needed);
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list made;
    AT_DISPATCH_FLOATING_TYPES(saved[WEIGHT].scalar_type(), "scaled_convolution_backward", [&] {
      made = first_gradients<scalar_t>(
          geometry, norm, grads[0], saved[X], saved[WEIGHT], data["on_output"].toBool(), needed);
    });
    return made;
  }
};

void require(const Tensor& tensor, const Tensor& weight, bool rows) {
  TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == weight.scalar_type(), "every tensor must be like the weight");
  TORCH_CHECK(!rows || (tensor.is_contiguous() && tensor.sizes() == weight.sizes().slice(0, 1)), "(C,) expected");
}

Tensor scaled_convolution(
    const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& gain, const Optional& shift,
    const Tensor& mean, const Tensor& var, double eps, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t groups) {
  TORCH_CHECK(weight.is_non_overlapping_and_dense(), "the weight must be dense");
  TORCH_CHECK(weight.numel() > 0 && weight.stride(0) * weight.size(0) == weight.numel(), "its channels must be rows");
  require(x, weight, false);
  for (const Optional& vector : {bias, gain, shift, Optional(mean), Optional(var)}) {
    if (vector) require(*vector, weight, true);
  }
  return ScaledConvolution::apply(x, weight, bias, gain, shift, mean, var, eps, stride, padding, dilation, groups);
}

}  // namespace
}  // namespace normfuse

TORCH_LIBRARY_FRAGMENT(normfuse, library) {
  library.def(
      "scaled_convolution(Tensor x, Tensor weight, Tensor? bias, Tensor? gain, Tensor? shift, Tensor mean, Tensor var, "
      "float eps, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
}

TORCH_LIBRARY_IMPL(normfuse, Autograd, library) { library.impl("scaled_convolution", normfuse::scaled_convolution); }
