// The arguments of the backward kernels of adaln and gated_adaln.
#pragma once

#include "cpu/isa.h"

namespace fastdit {

// One sample's sums over its tokens, a row of floats each. `plain` sums weigh a token by dout,
// `scaled` ones by dout·(plus + scale); `unit` is the normalised row.
struct AdalnSums {
  float *plain = nullptr, *plain_unit = nullptr;    // Σ dout, Σ dout·unit: always
  float *scaled = nullptr, *scaled_unit = nullptr;  // with a scale per token and weight or bias
  float* gate = nullptr;                            // Σ dx·y, with a gate
};

struct AdalnBackward {
  Rows dout, x;  // x is h where there is a gate
  Rows dh, y;    // with a gate
  const float* mean = nullptr;
  const float* rstd = nullptr;
  Modulation gate, shift, scale, weight, bias;
  void *dx = nullptr, *dy = nullptr;                             // dense, in x's and y's dtype
  void *dgate = nullptr, *dshift = nullptr, *dscale = nullptr;  // dense, where they are per token
  int64_t tokens = 0, width = 0;
  float plus = 1;
  bool rms = false;
};

// Rows: mul, add, five for conversions and gradients per token, gate, one gradient of the gate.
constexpr int64_t kAdalnBackwardScratch = 9;

}  // namespace fastdit

// Rows [begin, end) of one sample, whose sums are added to.
FASTDIT_KERNEL(adaln_backward_rows,
               (const AdalnBackward& a, int64_t begin, int64_t end, const AdalnSums& sums,
                float* scratch),
               (a, begin, end, sums, scratch))
