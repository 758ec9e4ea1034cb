// What a CPU kernel is told about its tensors: addresses, storage types and strides, nothing of
// PyTorch, so that kernels can be compiled and tested alone.
#pragma once

#include <cstdint>

namespace fastdit {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

enum class Type : int8_t { f32, bf16, f16 };

// The (B, N, D) rows of a tensor whose last axis is dense; strides in elements.
struct Rows {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t batch = 0, token = 0;
};

// A modulation (B, D) or (B, N, D), or a parameter (D,), wherever it lies: token and batch are 0
// where it does not vary. Without data it is absent.
struct Modulation {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t batch = 0, token = 0, inner = 1;

  explicit operator bool() const { return data != nullptr; }
};

// Floats from one row of scratch memory to the next: whole cache lines.
inline __attribute__((always_inline)) int64_t scratch_row(int64_t width) {
  return (width + 15) / 16 * 16;
}

// f(T{}) with the storage type T that `type` names.
template <class F>
inline __attribute__((always_inline)) void with_type(Type type, F f) {
  switch (type) {
    case Type::f32: return f(float{});
    case Type::bf16: return f(bf16{});
    case Type::f16: return f(fp16{});
  }
}

}  // namespace fastdit
