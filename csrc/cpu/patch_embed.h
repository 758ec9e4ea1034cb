// The arguments of the patch_embed kernel.
#pragma once

#include "cpu/isa.h"

namespace fastdit {

constexpr int64_t kBlock = 6;  // tokens that a block multiplies together

// tokens[b, t] = weight·patch(b, t) + bias + pos[t]. The image is dense, (B, C, rows·p, columns·q).
struct PatchEmbed {
  const void* image = nullptr;
  const float* weight = nullptr;  // packed: a row of `stride()` floats for each tap, then bias
  void* out = nullptr;            // dense
  Type type = Type::f32, out_type = Type::f32;
  Modulation pos;  // by token
  int64_t channels = 0, p = 1, q = 1, rows = 0, columns = 0, width = 0;

  int64_t tokens() const { return rows * columns; }
  int64_t taps() const { return channels * p * q; }
  int64_t stride() const { return (width + 31) / 32 * 32; }
  // Floats: a block's patches and its rows of pos.
  int64_t scratch() const { return scratch_row(kBlock * taps()) + kBlock * stride(); }
};

}  // namespace fastdit

// Blocks [begin, end) of kBlock tokens of the B·tokens; the last block may have fewer.
FASTDIT_KERNEL(patch_embed_blocks,
               (const PatchEmbed& a, int64_t begin, int64_t end, int64_t count, float* scratch),
               (a, begin, end, count, scratch))
// weight (width, taps), dense, and bias packed as PatchEmbed wants them.
FASTDIT_KERNEL(pack_weight,
               (const PatchEmbed& a, const void* weight, const Modulation& bias, float* to),
               (a, weight, bias, to))
