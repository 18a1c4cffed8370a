// The convolution of a pair in Tune mode, by the way that costs least for what is trained: as tuned.py chooses.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/library.h>

#include "scaled_convolution.h"

namespace normfuse {
namespace {

// Whether the kernels take a tensor: one whose numbers lie in the memory of a CPU, and if it is a vector, one by one.
bool takes(const Tensor& tensor, const Tensor& weight, bool is_vector) {
  if (!tensor.defined()) return true;
  if (!tensor.is_cpu() || tensor.layout() != at::kStrided || tensor.scalar_type() != weight.scalar_type()) return false;
  if (tensor.key_set().has(c10::DispatchKey::Python) || tensor._fw_grad(0).defined()) return false;
  return !is_vector || (tensor.is_contiguous() && tensor.sizes() == weight.sizes().slice(0, 1));
}

bool takes_all(const Tensor& x, const Tensor& weight, const Norm& norm) {
  if (weight.scalar_type() != at::kFloat && weight.scalar_type() != at::kDouble) return false;
  if (!takes(x, weight, false) || !takes(weight, weight, false) || x.dim() != weight.dim()) return false;
  if (weight.numel() == 0 || !weight.is_non_overlapping_and_dense()) return false;
  if (weight.stride(0) * weight.size(0) != weight.numel()) return false;  // its output channels must be rows
  for (const Tensor& vector : {norm.bias, norm.gain, norm.shift, norm.mean, norm.var})
    if (!takes(vector, weight, true)) return false;
  return true;
}

// Whether somebody has to see each operation: a function transform, a dispatch mode, autocast.
bool is_watched() {
  return c10::impl::dispatch_mode_enabled() || at::autocast::is_autocast_enabled(at::kCPU) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool is_trained(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad() && at::GradMode::is_enabled(); }

// Return z where neither the weight nor the gain is trained.
template <typename T>
Tensor fixed(const Tensor& x, const Tensor& weight, const Norm& norm, KeptConvolution& pair, bool keeps) {
  const auto factors = pair.factors<T>(norm, keeps);
  const bool trains_offset = is_trained(norm.bias) || is_trained(norm.shift);
  const bool has_gradient = trains_offset || is_trained(x);  // then autograd keeps the weight that multiplies
  const Tensor offset = trains_offset ? norm.differentiable_offset(factors->scale) : factors->offset;
  if (pair.geometry.outputs(x, weight) >= (has_gradient ? kWorth : 1) * weight.numel()) {
    const Tensor factor = has_gradient ? at::empty_like(weight) : scratch(weight);
    multiply_channels<T>(factor, weight, factors->scale);
    return pair.geometry.run(x, factor, offset);
  }
  Tensor z = pair.geometry.run(x, weight, Tensor());
  if (has_gradient)
    return z.mul_(per_channel(factors->scale, z.dim() - 2)).add_(per_channel(offset, z.dim() - 2));
  affine<T>(z, z, factors->scale, offset);
  return z;
}

Optional normalized(
    const Pair& pair, const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& gain,
    const Optional& shift, const Tensor& mean, const Tensor& var, double eps, bool keeps) {
  const Norm norm{gain.value_or(Tensor()), shift.value_or(Tensor()), bias.value_or(Tensor()), mean, var, eps};
  if (is_watched() || !takes_all(x, weight, norm)) return std::nullopt;
  if (is_trained(weight)) return ScaledConvolution::apply(x, weight, bias, gain, shift, mean, var, eps, pair);
  if (is_trained(norm.gain)) {  // its gradient costs less from the output than from a weight gradient nobody needs
    const Tensor y = pair->geometry.run(x, weight, norm.bias);
    return at::batch_norm(y, norm.gain, norm.shift, mean, var, false, 0.0, eps, false);
  }
  return AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "fixed_convolution", [&] {
    return Optional(fixed<scalar_t>(x, weight, norm, *pair, keeps));
  });
}

}  // namespace
}  // namespace normfuse

// A method, since torch looks for __torch_function__ on every argument of an operator, and on an object such as this one
// finds by two exceptions that there is none.
TORCH_LIBRARY_FRAGMENT(normfuse, library) {
  library.class_<normfuse::KeptConvolution>("KeptConvolution")
      .def(torch::init<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, int64_t>())
      .def("normalized", normfuse::normalized)
      .def("held", &normfuse::KeptConvolution::held);
}
