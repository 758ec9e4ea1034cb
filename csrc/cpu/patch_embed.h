// The arguments of the patch_embed kernels.
#pragma once

#include "cpu/isa.h"

namespace fastdit {

// The patches of an image (B, C, H, W) wherever it lies; strides in elements. A signal is an image
// of one row.
struct Patches {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t batch = 0, channel = 0, row = 0, column = 0;  // strides
  int64_t channels = 0, patch_rows = 1, patch_columns = 1, grid_rows = 1, grid_columns = 1;

  int64_t tokens() const { return grid_rows * grid_columns; }
  int64_t size() const { return channels * patch_rows * patch_columns; }
};

constexpr int64_t kWidth = 32;  // outputs at a time: whole panels of every instruction set
constexpr int64_t kTokens = 8;  // tokens at a time

// The backward's blocks: tokens of a sum over tokens, outputs of a sum over outputs, and the sums
// of dweight that are kept at a time, 64 KiB and as much for what they rounded off.
constexpr int64_t kBlock = 32, kInner = 64, kSums = 16384;

inline int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// tokens = patches·weightᵀ + bias + pos, in `type`, dense. weight is (D, K) and dense.
struct PatchEmbed {
  Patches x;
  const void* weight = nullptr;  // of x's type, as the bias
  const void* bias = nullptr;
  Modulation pos;  // rows (T, D), each dense
  void* tokens = nullptr;
  Type type = Type::f32;
  int64_t samples = 0, width = 0;
  float* panels = nullptr;  // the weight, kWidth outputs side by side: rounded_up(D, kWidth)·K
  float* biases = nullptr;  // rounded_up(D, kWidth)
};

// The gradients. Those of what is not asked for are null; all are dense.
struct PatchEmbedBackward {
  Rows dtokens;
  Patches x;   // data may be null unless dweight is asked for
  Patches dx;  // strides and data of the result
  const void* weight = nullptr;  // (D, K), of dx's type
  Type weight_type = Type::f32, bias_type = Type::f32, pos_type = Type::f32;
  void *dweight = nullptr, *dbias = nullptr, *dpos = nullptr;
  int64_t samples = 0, width = 0;
  float* patches = nullptr;      // (B·T, rounded_up(K, kTokens)), zeros behind a row
  float* weight_rows = nullptr;  // (D, rounded_up(K, kWidth)), zeros behind a row
};

// Floats of scratch memory that the backward's two kernels need, for patches of `size` elements.
inline int64_t image_scratch(int64_t size) {
  return kTokens * kInner + (2 * kTokens + 1) * rounded_up(size, kWidth);
}
inline int64_t parameter_scratch(int64_t size) {
  const int64_t rows = rounded_up(size, kWidth) + 1, panel = rows * kWidth;
  return 4 * kBlock * kWidth + rows + 2 * (panel > kSums ? panel : kSums);
}

}  // namespace fastdit

// Outputs [begin, end)·kWidth of the weight and the bias, as floats in panels.
FASTDIT_KERNEL(pack_panels, (const PatchEmbed& a, int64_t begin, int64_t end), (a, begin, end))
// Tokens [begin, end) of the B·T tokens; scratch: kTokens·K floats.
FASTDIT_KERNEL(embed_tokens, (const PatchEmbed& a, int64_t begin, int64_t end, float* scratch),
               (a, begin, end, scratch))
// Tokens [begin, end) of `patches`; rows [begin, end) of `weight_rows`.
FASTDIT_KERNEL(gather_patches, (const PatchEmbedBackward& a, int64_t begin, int64_t end),
               (a, begin, end))
FASTDIT_KERNEL(pack_weight_rows, (const PatchEmbedBackward& a, int64_t begin, int64_t end),
               (a, begin, end))
// dx of tokens [begin, end).
FASTDIT_KERNEL(embed_image_gradient,
               (const PatchEmbedBackward& a, int64_t begin, int64_t end, float* scratch),
               (a, begin, end, scratch))
// dweight, dbias and dpos of outputs [begin, end)·kWidth.
FASTDIT_KERNEL(embed_parameter_gradients,
               (const PatchEmbedBackward& a, int64_t begin, int64_t end, float* scratch),
               (a, begin, end, scratch))
