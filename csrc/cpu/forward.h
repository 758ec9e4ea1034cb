// The arguments of the kernels of the native forward: a whole DiT in inference, in float32.
//
// Activations are row-major matrices whose rows are `row_stride` floats apart; weights are packed in
// panels of the instruction set's width, each a dense (depth, panel) matrix, zeros behind the last
// column. Every element is summed in one order that depends on the layer's width alone, so neither
// the batch, nor the threads, nor a tile's place change its bits.
#pragma once

#include "cpu/isa.h"

namespace fastdit {

constexpr int64_t kWidest = 32;  // columns of the widest panel, AVX-512's

inline int64_t padded(int64_t width) { return (width + kWidest - 1) / kWidest * kWidest; }

// Floats from one row of activations to the next: an odd number of cache lines, so that the rows of
// a tile never meet in one set of the cache (1024 floats apart they all would).
inline int64_t row_stride(int64_t width) { return padded(width) + 16; }

// What becomes of an element v = (A·B)[row][column] + bias[column].
enum class Epilogue : int8_t {
  plain,  // c = v
  gelu,   // c = gelu(v)
  gate,   // c += row[column]·v, row: the sample's
  add,    // c = v + row[column], row: the token's
};

// out[m][n] = f(a[m]·w[n] + bias[n]), both rows dense: for few rows, at the speed of memory. Of a
// layer's modulations each vector of `group` columns is `group_stride` behind the last, and the
// scales, every second of three, are stored as 1 + scale.
struct Dots {
  const float *a = nullptr, *w = nullptr, *bias = nullptr;
  float* out = nullptr;
  int64_t out_stride = 0;
  int64_t rows = 0, depth = 0;
  bool silu = false;
  int64_t group = 0, group_stride = 0;  // 0: the columns are one vector
};

// Columns [begin, end) of a product with few rows.
struct DotsPart {
  const Dots* dots = nullptr;
  int64_t begin = 0, end = 0;

  DotsPart part(int64_t from, int64_t to, int64_t count) const {
    const int64_t size = end - begin;
    return {dots, begin + size * from / count, begin + size * to / count};
  }
};

struct Gemm {
  const float* a = nullptr;
  int64_t a_stride = 0;
  const float* b = nullptr;  // packed
  const float* bias = nullptr;  // padded with zeros to whole panels; null is none
  float* c = nullptr;
  int64_t c_stride = 0;
  int64_t rows = 0, columns = 0, depth = 0;
  Epilogue epilogue = Epilogue::plain;
  const float* row = nullptr;  // of the epilogue, padded as the bias
  int64_t row_step = 0, tokens = 1;
  DotsPart beside = {};  // what is computed at the same time
};

// A (rows, depth) weight as panels.
struct Pack {
  const float* weight = nullptr;
  int64_t rows = 0, depth = 0;
  float* to = nullptr;
};

// Rows of A in 8 bits, each with a scale and a zero point of its own: a = scale·(q − zero), q in 0 to
// 255. A word of 32 bits holds `group` of them: 4 as bytes for VNNI's products, else 2 of 16 bits.
struct Quantized {
  const float* x = nullptr;  // what is quantised
  int64_t x_stride = 0, width = 0;
  uint32_t* words = nullptr;
  int64_t stride = 0;  // words
  float* scale = nullptr;
  int32_t* zero = nullptr;
};

// A product in 8 bits: C = epilogue(scale·b_scale·(Σ q·w − zero·Σ w) + bias), the sums in integers.
struct GemmInt8 {
  Gemm g;  // without a and b
  Quantized a;
  const int32_t* b = nullptr;  // packed words of weights
  const float* b_scale = nullptr;
  const int32_t* b_sums = nullptr;
};

// A (rows, depth) weight as panels of words; scale and sums of each row, padded with zeros.
struct PackInt8 {
  const float* weight = nullptr;
  int64_t rows = 0, depth = 0;
  int32_t* to = nullptr;
  float* scale = nullptr;
  int32_t* sums = nullptr;
};

// out = (x − mean)·rstd·mul + add, a row each; mul and add are the sample's.
struct Norm {
  const float* x = nullptr;
  float* out = nullptr;
  int64_t stride = 0;  // of both
  const float *mul = nullptr, *add = nullptr;
  int64_t mul_step = 0;
  int64_t tokens = 1, width = 0;
  float eps = 0;
};

// softmax(QKᵀ/√d)·V of packed rows [Q | K | V], each head's columns side by side; of each sample the
// tokens [query, query + queries), whose rows are those of `out`.
struct Attention {
  const float* qkv = nullptr;
  int64_t qkv_stride = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
  int64_t tokens = 0, heads = 0, head_dim = 0, query = 0, queries = 0;
  int64_t parts = 1;  // of a head's queries: an item each
};

}  // namespace fastdit

FASTDIT_KERNEL(panel_width, (int64_t& width), (width))
FASTDIT_KERNEL(pack_panels, (const Pack& p, int64_t begin, int64_t end), (p, begin, end))
FASTDIT_KERNEL(gemm_block,
               (const Gemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end,
                DotsPart beside, float* scratch),
               (g, row, row_end, panel, panel_end, beside, scratch))
FASTDIT_KERNEL(gemm_scratch, (const Gemm& g, int64_t& floats), (g, floats))
FASTDIT_KERNEL(int8_group, (int64_t& group), (group))
FASTDIT_KERNEL(pack_int8_panels, (const PackInt8& p, int64_t begin, int64_t end), (p, begin, end))
FASTDIT_KERNEL(quantize_rows, (const Quantized& q, int64_t begin, int64_t end), (q, begin, end))
FASTDIT_KERNEL(gemm_int8_block,
               (const GemmInt8& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end,
                DotsPart beside),
               (g, row, row_end, panel, panel_end, beside))
FASTDIT_KERNEL(norm_rows, (const Norm& n, int64_t begin, int64_t end), (n, begin, end))
FASTDIT_KERNEL(attention_items, (const Attention& a, int64_t begin, int64_t end, float* scratch),
               (a, begin, end, scratch))
FASTDIT_KERNEL(attention_scratch, (const Attention& a, int64_t& floats), (a, floats))
FASTDIT_KERNEL(dots_columns, (const Dots& d, int64_t begin, int64_t end), (d, begin, end))
FASTDIT_KERNEL(silu_floats, (float* values, int64_t count), (values, count))
FASTDIT_KERNEL(fma_chains, (int64_t steps, int64_t& flop), (steps, flop))
