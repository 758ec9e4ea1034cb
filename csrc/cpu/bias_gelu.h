// The arguments of the bias_gelu kernels: dense rows of one dtype and a bias of any.
#pragma once

#include "cpu/isa.h"

namespace fastdit {

struct BiasGelu {
  const void* x = nullptr;
  const void* dout = nullptr;  // of the backward
  void* out = nullptr;         // the result, or the gradient of x
  Type type = Type::f32;
  Modulation bias;
  int64_t width = 0;
};

}  // namespace fastdit

// Rows [begin, end); `scratch` is one row of floats.
FASTDIT_KERNEL(bias_gelu_rows, (const BiasGelu& a, int64_t begin, int64_t end, float* scratch),
               (a, begin, end, scratch))
// The same, and the sum of the rows' gradients added to `sums`.
FASTDIT_KERNEL(bias_gelu_backward_rows,
               (const BiasGelu& a, int64_t begin, int64_t end, float* sums, float* scratch),
               (a, begin, end, sums, scratch))

namespace fastdit {

// The forward of `rows` rows, in parallel.
void bias_gelu_all(const BiasGelu& a, int64_t rows);

}  // namespace fastdit
