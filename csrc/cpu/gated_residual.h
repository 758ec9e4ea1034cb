// The arguments of the gated_residual kernels.
#pragma once

#include "cpu/isa.h"

namespace fastdit {

// Forward: out = x + gate·y, dense. Backward: x is dout, out is dy = gate·dout in y's dtype, and
// the gradient of the gate goes, row by row, to `dgate` (per token) or is summed (per sample).
struct GatedResidual {
  Rows x, y;
  Modulation gate;
  void* out = nullptr;
  void* dgate = nullptr;
  int64_t tokens = 0, width = 0;
};

}  // namespace fastdit

// Rows [begin, end) of the B·N rows.
FASTDIT_KERNEL(gated_residual_rows,
               (const GatedResidual& a, int64_t begin, int64_t end, float* scratch),
               (a, begin, end, scratch))
// Rows of one sample; where `dgate` is null the gate's gradient is added to `sums`.
FASTDIT_KERNEL(gated_residual_backward_rows,
               (const GatedResidual& a, int64_t begin, int64_t end, float* sums, float* scratch),
               (a, begin, end, sums, scratch))

namespace fastdit {

constexpr int64_t kResidualScratch = 3;  // rows

// The forward of `batch` samples, in parallel.
void gated_residual_all(const GatedResidual& a, int64_t batch);

}  // namespace fastdit
