// Loops over the output channels of weights and activations, in one pass each, over tensors in the memory of a CPU.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>

#include <algorithm>
#include <vector>

namespace normfuse {

using at::Tensor;

constexpr int64_t kLarge = 1 << 15;  // elements; above, an allocation comes as fresh pages, which the system must clear

template <typename T>
const T* pointer(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// Return a tensor of the same shape and strides whose memory every call in this thread shares, for what is dense.
inline Tensor scratch(const Tensor& like) {
  if (like.numel() < kLarge || !like.is_non_overlapping_and_dense()) return at::empty_like(like);
  thread_local Tensor held[2];
  Tensor& room = held[like.scalar_type() == at::kDouble];
  if (!room.defined() || room.numel() < like.numel()) room = at::empty({like.numel()}, like.options());
  return room.as_strided(like.sizes(), like.strides());
}

// Run f(first, last) over the output channels of a weight, on torch's threads where that pays.
template <typename T, typename F>
void over_channels(const Tensor& vector, int64_t width, F f) {
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, width));
  if (vector.numel() <= grain) return f(0, vector.numel());
  const char* start = static_cast<const char*>(vector.const_data_ptr());
  auto channels = at::TensorIteratorConfig().check_all_same_dtype(false).resize_outputs(false).add_output(vector).build();
  channels.for_each(
      [&](char** data, const int64_t*, int64_t count) {
        const int64_t first = (data[0] - start) / static_cast<int64_t>(sizeof(T));
        f(first, first + count);
      },
      grain);
}

template <typename T>
void multiply(T* __restrict out, const T* __restrict in, T factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = factor * in[i];
}

// The sum of some products, and of their squares.
template <typename T>
struct Sums {
  T products = 0, squares = 0;
};

template <typename T>
Sums<T> dot(const T* one, const T* other, int64_t count) {
  T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
  for (int64_t i = 0; i < count; ++i) {
    const T product = one[i] * other[i];
    sum += product;
    squares += product * product;
  }
  return {sum, squares};
}

// Multiply one by a factor; return its dot product as it was.
template <typename T>
Sums<T> dot_and_multiply(T* __restrict one, const T* __restrict other, T factor, int64_t count) {
  T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
  for (int64_t i = 0; i < count; ++i) {
    const T product = one[i] * other[i];
    sum += product;
    squares += product * product;
    one[i] *= factor;
  }
  return {sum, squares};
}

// Write a W to out.
template <typename T>
void multiply_channels(const Tensor& out, const Tensor& weight, const Tensor& scale) {
  const int64_t width = weight.numel() / weight.size(0);
  const T *w = weight.const_data_ptr<T>(), *a = scale.const_data_ptr<T>();
  T* made = out.data_ptr<T>();
  over_channels<T>(scale, width, [=](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) multiply<T>(made + c * width, w + c * width, a[c], width);
  });
}

// Return a W, in scratch memory where it is large.
template <typename T>
Tensor scaled(const Tensor& weight, const Tensor& scale) {
  const Tensor made = scratch(weight);
  multiply_channels<T>(made, weight, scale);
  return made;
}

// Return <V, W> and the sums of the squared products, (2, C), and multiply V by a vector, if there is one, on the way.
template <typename T>
Tensor dots(const Tensor& gradient, const Tensor& weight, const Tensor& scale) {
  const int64_t channels = weight.size(0), width = weight.numel() / channels;
  Tensor sums = at::empty({2, channels}, weight.options());
  const T *w = weight.const_data_ptr<T>(), *a = pointer<T>(scale);
  T *v = gradient.data_ptr<T>(), *out = sums.data_ptr<T>();
  over_channels<T>(sums[0], width, [=](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t at = c * width;
      const Sums<T> sum = a ? dot_and_multiply<T>(v + at, w + at, a[c], width) : dot<T>(v + at, w + at, width);
      out[c] = sum.products;
      out[channels + c] = sum.squares;
    }
  });
  return sums;
}

inline Tensor per_channel(const Tensor& vector, size_t dims) {
  std::vector<int64_t> shape(dims + 1, 1);
  shape[0] = -1;
  return vector.view(shape);
}

// Return factor y + addend, each a value per channel, (N, C, *); no addend is 0.
template <typename T>
void affine(Tensor& out, const Tensor& y, const Tensor& factor, const Tensor& addend) {
  const int64_t channels = y.size(1), rows = y.size(0) * channels, width = rows > 0 ? y.numel() / rows : 0;
  if (!y.is_contiguous() || !out.is_contiguous() || at::get_num_threads() > 1) {
    at::mul_out(out, y, per_channel(factor, y.dim() - 2));  // addcmul has no fast loop for strides of 0
    if (addend.defined()) out.add_(per_channel(addend, y.dim() - 2));
    return;
  }
  const T *in = pointer<T>(y), *a = pointer<T>(factor), *o = pointer<T>(addend);
  T* to = out.data_ptr<T>();
  for (int64_t image = 0; image < y.size(0); ++image) {
    for (int64_t c = 0; c < channels; ++c, in += width, to += width) {
      const T scale = a[c], offset = o ? o[c] : 0;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = scale * in[i] + offset;
    }
  }
}

}  // namespace normfuse
