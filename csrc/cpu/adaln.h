// The arguments of the adaln and gated_adaln kernels.
#pragma once

#include "cpu/isa.h"

namespace fastdit {

// out = LN(h)·(plus + scale)·... + shift with h = x, or h = x + gate·y where there is a gate.
// `out` and `h` are dense; `mean` and `rstd` hold one float a row, either may be null.
struct Adaln {
  Rows x, y;
  void* h = nullptr;
  void* out = nullptr;
  float* mean = nullptr;
  float* rstd = nullptr;
  Modulation gate, shift, scale, weight, bias;
  int64_t tokens = 0, width = 0;
  float eps = 0, plus = 1;
  bool rms = false;
};

constexpr int64_t kAdalnScratch = 7;  // rows: mul, add, weight, bias, gate, two of y

}  // namespace fastdit

// Rows [begin, end) of the B·N rows.
FASTDIT_KERNEL(adaln_rows, (const Adaln& a, int64_t begin, int64_t end, float* scratch),
               (a, begin, end, scratch))

namespace fastdit {

// All rows of `batch` samples, in parallel.
void adaln_all(const Adaln& a, int64_t batch);

}  // namespace fastdit
