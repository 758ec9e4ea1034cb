// From stable-ABI tensors to what the kernels take, with the checks that keep memory safe. The
// friendly error messages are those of fastdit/ops; these guard the ops of this library alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "cpu/types.h"

namespace fastdit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  name, ": got ", torch::headeronly::toString(type),
                  ", the CPU kernels take float32, bfloat16 and float16");
  STD_TORCH_CHECK(t.is_cpu(), name, ": is not on the CPU");
  return type == ScalarType::Float ? Type::f32 : type == ScalarType::Half ? Type::f16 : Type::bf16;
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  bool fits = t.dim() == int64_t(shape.size());
  for (int64_t axis = 0; fits && axis < t.dim(); ++axis)
    fits = t.sizes()[axis] == shape.begin()[axis];
  STD_TORCH_CHECK(fits, name, ": wrong shape");
}

// A new dense tensor on the CPU; through the shim, in a quarter of the dispatcher's time.
inline Tensor empty(const int64_t* shape, int64_t dims, ScalarType type) {
  int64_t strides[64], stride = 1;
  for (int64_t axis = dims; axis-- > 0; stride *= shape[axis] ? shape[axis] : 1)
    strides[axis] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, shape, strides, int32_t(type), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  return empty(shape.begin(), int64_t(shape.size()), type);
}
inline Tensor dense_like(const Tensor& t) {
  return empty(t.sizes().data(), t.dim(), t.scalar_type());
}

// `t` if its last axis is dense, else a dense copy.
inline Tensor dense_rows(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// (B, N, D) with a dense last axis.
inline Rows rows_of(const Tensor& t, const char* name) {
  return {t.data_ptr(), type_of(t, name), t.stride(0), t.stride(1)};
}

// (B, D) or (B, N, D), any strides; `like` is the (B, N, D) tensor it modulates.
inline Modulation modulation_of(const MaybeTensor& t, const Tensor& like, const char* name) {
  if (!t) return {};
  const auto shape = like.sizes();
  if (t->dim() == 2) {
    check_shape(*t, {shape[0], shape[2]}, name);
    return {t->data_ptr(), type_of(*t, name), t->stride(0), 0, t->stride(1)};
  }
  check_shape(*t, {shape[0], shape[1], shape[2]}, name);
  return {t->data_ptr(), type_of(*t, name), t->stride(0), t->stride(1), t->stride(2)};
}

// What the ops that normalise `x` allow of their options, as fastdit/ops/_checks.py does.
inline void check_norm(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                       const std::string& norm, double eps) {
  STD_TORCH_CHECK(x.dim() == 3, "x: wrong shape");
  STD_TORCH_CHECK(norm == "layer" || norm == "rms", "norm: got ", norm);
  STD_TORCH_CHECK(eps >= 0, "eps: must not be negative");
  STD_TORCH_CHECK(!bias || (weight && norm == "layer"), "bias: needs weight and norm='layer'");
  for (const MaybeTensor* t : {&weight, &bias})
    STD_TORCH_CHECK(!*t || (*t)->scalar_type() == x.scalar_type(), "weight, bias: wrong dtype");
}

// A parameter (D,).
inline Modulation parameter_of(const MaybeTensor& t, int64_t width, const char* name) {
  if (!t) return {};
  check_shape(*t, {width}, name);
  return {t->data_ptr(), type_of(*t, name), 0, 0, t->stride(0)};
}

}  // namespace fastdit
