// The arguments of the glu kernels: rows of gate and up, wherever they lie, of one dtype.
#pragma once

#include "cpu/isa.h"

namespace fastdit {

enum class Activation : int8_t { silu, gelu, gelu_tanh };

// Rows `stride` elements apart, dense along the row.
struct Strided {
  void* data = nullptr;
  int64_t stride = 0;
};

struct Glu {
  Strided gate, up;
  const void* dout = nullptr;  // of the backward, dense
  void* out = nullptr;         // of the forward, dense
  Strided dgate, dup;
  Type type = Type::f32;
  Modulation gate_bias, up_bias;  // of any dtype, or absent
  Activation activation = Activation::silu;
  int64_t width = 0;
};

constexpr int64_t kGluScratch = 2;  // rows: both biases as floats

}  // namespace fastdit

// Rows [begin, end).
FASTDIT_KERNEL(glu_rows, (const Glu& a, int64_t begin, int64_t end, float* scratch),
               (a, begin, end, scratch))
// The same; where `sums` is there, the sums of the gradients of gate and up are added to its two
// rows, `scratch_row` apart.
FASTDIT_KERNEL(glu_backward_rows,
               (const Glu& a, int64_t begin, int64_t end, float* sums, float* scratch),
               (a, begin, end, sums, scratch))
