// A convolution whose outputs are normalized by fixed statistics, as one differentiable operator.
//
// The mathematics is that of scaled.py, whose names are used here:
//
//     z = (a W) x + a (b - mean) + beta        a = gamma r        r = 1 / sqrt(var + eps)
//     dJ/dW = a V    dJ/db = a S    dJ/dbeta = S    dJ/dgamma = r (<V, W> + (b - mean) S)    dJ/dx = (a W)^T G
//
// What it spares is what the interpreter does between two convolutions, and passes over the weights: <V, W>, the size
// of its terms and a V are made in one.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "channel_loops.h"
#include "convolution_pair.h"
#include "kept_factors.h"

namespace normfuse {

using Optional = std::optional<Tensor>;
using Pair = c10::intrusive_ptr<KeptConvolution>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether to scale the output: where it is the smaller one and no scale is too near zero to divide by.
template <typename T>
bool prefers_output(const Geometry& geometry, const Tensor& x, const Tensor& weight, const Tensor& scale) {
  if (geometry.outputs(x, weight) >= weight.numel()) return false;
  const T limit = std::sqrt(std::numeric_limits<T>::min()), *a = scale.const_data_ptr<T>();
  return std::all_of(a, a + scale.numel(), [=](T one) { return std::abs(one) > limit; });
}

enum Input { X, WEIGHT, BIAS, GAIN, SHIFT, MEAN, VAR };
constexpr size_t kInputs = 9;  // of the autograd function
using Needed = std::array<bool, 5>;

// Return dJ/dgamma as eval mode takes it.
inline Tensor gain_gradient_from_output(
    const Geometry& geometry, const Norm& norm, const Tensor& grad, const Tensor& x, const Tensor& weight) {
  const Tensor y = geometry.run(x, weight, norm.bias);
  return std::get<1>(at::native_batch_norm_backward(
      grad, y, norm.gain, norm.mean, norm.var, Tensor(), Tensor(), false, norm.eps, {false, true, false}));
}

template <typename T>
variable_list first_gradients(
    const Geometry& geometry, const Norm& norm, const Tensor& grad, const Tensor& x, const Tensor& weight, bool on_output,
    Needed needed) {
  const Tensor scale = norm.scale<T>(), none;
  const bool for_v = needed[WEIGHT] || needed[GAIN], for_total = needed[BIAS] || needed[GAIN] || needed[SHIFT];
  const Tensor total = for_total ? geometry.total(grad) : none;
  Tensor given = grad, factor = weight;
  if (on_output) {
    given = scratch(grad);
    affine<T>(given, grad, scale, none);
  } else if (needed[X]) {
    factor = scaled<T>(weight, scale);
  }
  auto [dx, v] = geometry.gradients(given, x, factor, needed[X], for_v);
  if (for_v && v.strides() != weight.strides()) v = at::empty_like(weight).copy_(v);
  variable_list made(kInputs);
  if (needed[GAIN]) {
    Tensor sums = dots<T>(v, weight, on_output || !needed[WEIGHT] ? none : scale);
    const bool cancels = norm.finish<T>(sums, total, on_output ? scale : none);
    made[GAIN] = cancels ? gain_gradient_from_output(geometry, norm, grad, x, weight) : sums[0];
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
inline variable_list differentiable_gradients(
    const Geometry& geometry, const Norm& norm, const Tensor& grad, const Tensor& x, const Tensor& weight,
    Needed needed) {
  const Tensor rstd = at::rsqrt(norm.var + norm.eps), scale = norm.gain.defined() ? rstd * norm.gain : rstd;
  const Tensor column = per_channel(scale, geometry.stride.size() + 1), total = geometry.total(grad);
  const auto [dx, v] = geometry.gradients(grad, x, weight * column, needed[X], true);
  variable_list made(kInputs);
  if (needed[X]) made[X] = dx;
  if (needed[WEIGHT]) made[WEIGHT] = v * column;
  if (needed[BIAS]) made[BIAS] = scale * total;
  if (needed[GAIN]) {
    const Tensor y = geometry.run(x, weight, norm.bias) - per_channel(norm.mean, x.dim() - 2);
    made[GAIN] = rstd * geometry.total(grad * y);
  }
  if (needed[SHIFT]) made[SHIFT] = total;
  return made;
}

struct ScaledConvolution : public torch::autograd::Function<ScaledConvolution> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& gain,
      const Optional& shift, const Tensor& mean, const Tensor& var, double eps, const Pair& pair) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Norm norm{gain.value_or(Tensor()), shift.value_or(Tensor()), bias.value_or(Tensor()), mean, var, eps};
    ctx->save_for_backward({x, weight, norm.bias, norm.gain, norm.shift, mean, var});
    Tensor z;
    bool on_output = false;
    AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "scaled_convolution", [&] {
      const Tensor scale = norm.scale<scalar_t>(), offset = norm.offset<scalar_t>(scale);
      on_output = prefers_output<scalar_t>(pair->geometry, x, weight, scale);
      if (on_output) {
        z = pair->geometry.run(x, weight, Tensor());
        affine<scalar_t>(z, z, scale, offset);
      } else {
        z = pair->geometry.run(x, scaled<scalar_t>(weight, scale), offset);
      }
    });
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["pair"] = pair;
    ctx->saved_data["on_output"] = on_output;
    return z;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const Pair pair = data["pair"].toCustomClass<KeptConvolution>();
    const Norm norm{saved[GAIN], saved[SHIFT], saved[BIAS], saved[MEAN], saved[VAR], data["eps"].toDouble()};
    Needed needed;
    for (size_t i = 0, edge = 0; i < needed.size(); ++i)  // what is missing has no edge
      needed[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    if (at::GradMode::is_enabled())
      return differentiable_gradients(pair->geometry, norm, grads[0], saved[X], saved[WEIGHT], needed);
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list made;
    AT_DISPATCH_FLOATING_TYPES(saved[WEIGHT].scalar_type(), "scaled_convolution_backward", [&] {
      made = first_gradients<scalar_t>(
          pair->geometry, norm, grads[0], saved[X], saved[WEIGHT], data["on_output"].toBool(), needed);
    });
    return made;
  }
};

}  // namespace normfuse
