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
constexpr int64_t kGluWork = 10;    // elements of the other ops that one of this is worth

}  // namespace fastdit

// Rows [begin, end).
FASTDIT_KERNEL(glu_rows, (const Glu& a, int64_t begin, int64_t end, float* scratch),
               (a, begin, end, scratch))
// The same; where `sums` is there, the sums of the gradients of gate and up are added to its two
// rows, `scratch_row` apart.
FASTDIT_KERNEL(glu_backward_rows,
               (const Glu& a, int64_t begin, int64_t end, float* sums, float* scratch),
               (a, begin, end, sums, scratch))

namespace fastdit {

// The stride between the rows of a tensor, all axes but the last; −1 where it is not one number, or
// the rows are not dense.
int64_t stride_of_rows(const int64_t* sizes, const int64_t* strides, int64_t dims);
// Gate and up of rows that hold both side by side, as wide and of the type that `a` tells.
void split(const Glu& a, Strided rows, bool gate_first, Strided& gate, Strided& up);
// The halves of a packed projection's bias, likewise.
void split_bias(Glu& a, Modulation bias, bool gate_first);
// The forward of `rows` rows, in parallel.
void glu_all(const Glu& a, int64_t rows);

}  // namespace fastdit
