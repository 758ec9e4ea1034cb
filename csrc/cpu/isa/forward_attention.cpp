// Attention of the native forward, on packed rows [Q | K | V].
//
// Of one head Kᵀ and V are packed into panels once; then each tile of queries takes the keys in
// blocks of kKeys: scores into the first-level cache, softmax with a running maximum, and their
// product with V. Up to kKeys tokens that is the plain softmax; beyond, the sums so far are scaled
// down whenever the maximum grows (FlashAttention, Dao et al. 2022).
#include "cpu/isa/exp.h"
#include "cpu/isa/gemm.h"

namespace fastdit::FASTDIT_ISA {
namespace {

constexpr int64_t kKeys = 256;
static_assert(kKeys % kPanel == 0);

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where each part of the scratch memory lies.
struct Scratch {
  float *keys, *values, *scores, *out;

  Scratch(const Attention& a, float* memory)
      : keys(memory),
        values(keys + up(a.tokens, kPanel) * a.head_dim),
        scores(values + a.tokens * up(a.head_dim, L)),
        out(scores + kTile * kKeys) {}
  const float* end(const Attention& a) const { return out + kTile * up(a.head_dim, kPanel); }
};

// An L×L square of rows `stride` apart, transposed: step s exchanges bit s of row and column.
INLINE void transpose(Vec (&rows)[L]) {
  for (int step = 1; step < L; step *= 2)
    for (int i = 0; i < L; ++i)
      if (!(i & step)) {
        const Vec a = rows[i], b = rows[i + step];
        Ints low, high;
        for (int c = 0; c < L; ++c) {
          low[c] = c & step ? L + (c - step) : c;
          high[c] = c & step ? L + c : c + step;
        }
#if defined(__clang__)
        for (int c = 0; c < L; ++c) {
          rows[i][c] = low[c] < L ? a[low[c]] : b[low[c] - L];
          rows[i + step][c] = high[c] < L ? a[high[c]] : b[high[c] - L];
        }
#else
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + step] = __builtin_shuffle(a, b, high);
#endif
      }
}

// Columns of the panel that begins with key n: one vector where no more are left.
INLINE int64_t key_panel(const Attention& a, int64_t n) { return a.tokens - n > L ? kPanel : L; }

// The first `count` of L numbers, zeros for the others; any count from L up is all.
INLINE Vec load_some(const float* from, int64_t count) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  const __mmask16 mask = count < L ? (1u << count) - 1 : 0xffffu;
  return (Vec)_mm512_maskz_loadu_ps(mask, from);
#else
  return count < L ? load(from, Tail{int(count)}) : load(from, Full{});
#endif
}

// A square of keys [n, n + L) and columns [j, j + L), of which `keys` and `columns` are there.
INLINE void pack_square(const float* from, int64_t stride, int64_t keys, int64_t columns, float* to,
                        int64_t width) {
  Vec square[L];
  if (keys >= L && columns >= L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = load(from + i * stride, Full{});
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(to + i * width, square[i], Full{});
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) square[i] = i < keys ? load_some(from + i * stride, columns) : Vec{};
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (i < columns) store(to + i * width, square[i], Full{});
}

// Kᵀ as panels (head_dim, kPanel), or (head_dim, L) where L keys are left, zeros behind the last.
FLATTEN void pack_keys(const Attention& a, const float* keys, float* to) {
  const int64_t d = a.head_dim;
  for (int64_t n = 0; n < up(a.tokens, L); n += L) {
    const int64_t first = n / kPanel * kPanel, width = key_panel(a, first);
    float* panel = to + first * d + n - first;
    for (int64_t j = 0; j < d; j += L)
      pack_square(keys + n * a.qkv_stride + j, a.qkv_stride, a.tokens - n, d - j,
                  panel + j * width, width);
  }
}

// V as panels (tokens, kPanel), or (tokens, L) where L columns are left, zeros behind the last.
FLATTEN void pack_values(const Attention& a, const float* values, float* to) {
  for (int64_t j = 0; j < a.head_dim; j += kPanel) {
    const int64_t left = up(a.head_dim - j, L), width = left < kPanel ? left : kPanel;
    for (int64_t n = 0; n < a.tokens; ++n, to += width)
      for (int64_t c = 0; c < width; c += L) {
        const float* value = values + n * a.qkv_stride + j + c;
        store(to + c, load_some(value, a.head_dim - j - c), Full{});
      }
  }
}

constexpr int kRowLanes = (kTile + L - 1) / L * L;  // of a number for each row of a tile

// Of each row the largest score so far, in powers of two, the sum of its weights, and what its sums
// so far are to be scaled by.
struct Running {
  alignas(64) float most[kRowLanes], sum[kRowLanes], correction[kRowLanes];
};

INLINE float largest(Vec v) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return _mm512_reduce_max_ps((__m512)v);
#else
  float top = v[0];
  for (int i = 1; i < L; ++i) top = top < v[i] ? v[i] : top;
  return top;
#endif
}

// Turns the scores of a block of keys into weights 2^(scale·score − most), scale in powers of two. One
// pass over all rows at a time: within a row each step would wait for the last.
INLINE void weigh(float* scores, int rows, int64_t keys, float scale, bool first, Running& running) {
  const int64_t width = up(keys, L);
  alignas(64) float tops[kRowLanes] = {};
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kKeys;
    for (int64_t n = keys; n < width; ++n) row[n] = -__builtin_inff();
    Vec top = load(row, Full{});
    for (int64_t n = L; n < width; n += L) top = max(top, load(row + n, Full{}));
    tops[r] = largest(top) * scale;
  }
  for (int r = 0; r < kRowLanes; r += L) {
    const Vec top = load(tops + r, Full{}), most = load(running.most + r, Full{});
    const Vec now = first ? top : max(most, top);
    if (!first) store(running.correction + r, power_of_two(most - now), Full{});
    store(running.most + r, now, Full{});
  }
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kKeys;
    const Vec most = all(-running.most[r]);
    Vec sums = {};
    for (int64_t n = 0; n < width; n += L) {
      const Vec weight = power_of_two(muladd(load(row + n, Full{}), all(scale), most));
      store(row + n, weight, Full{});
      sums += weight;
    }
    running.sum[r] = (first ? 0 : running.sum[r] * running.correction[r]) + total(sums);
  }
}

// `rows` queries against all keys of their head.
INLINE void query_tile(const Attention& a, const float* queries, int rows, const Scratch& s,
                       float* out) {
  const float scale = float(0x1.71547652b82fep+0 / __builtin_sqrt(double(a.head_dim)));  // log₂e/√d
  const int64_t d = a.head_dim, width = up(d, L);
  Running running;
  for (int64_t key = 0; key < a.tokens; key += kKeys) {
    const int64_t keys = key + kKeys < a.tokens ? kKeys : a.tokens - key;
    for (int64_t n = 0; n < keys; n += kPanel) {
      const float* panel = s.keys + (key + n) * d;
      const Ahead ahead{reinterpret_cast<const char*>(panel)};
      if (key_panel(a, key + n) > L)
        any_tile<2>(rows, queries, a.qkv_stride, panel, d, s.scores + n, kKeys, false, ahead, ahead);
      else
        any_tile<1>(rows, queries, a.qkv_stride, panel, d, s.scores + n, kKeys, false, ahead, ahead);
    }
    weigh(s.scores, rows, keys, scale, key == 0, running);
    for (int64_t j = 0; j < d; j += kPanel) {
      float* sums = s.out + j * kTile;
      if (key > 0)
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < kPanel; c += L) {
            float* at = sums + r * kPanel + c;
            store(at, load(at, Full{}) * running.correction[r], Full{});
          }
      const float* panel = s.values + j * a.tokens;
      const Ahead ahead{reinterpret_cast<const char*>(panel)};
      if (width - j > L)
        any_tile<2>(rows, s.scores, kKeys, panel + key * kPanel, keys, sums, kPanel, key > 0, ahead, ahead);
      else
        any_tile<1>(rows, s.scores, kKeys, panel + key * L, keys, sums, kPanel, key > 0, ahead, ahead);
    }
  }
  for (int r = 0; r < rows; ++r) {
    const Vec inverse = all(1 / running.sum[r]);
    for (int64_t j = 0; j < d; j += L) {
      const Vec v = load(s.out + j / kPanel * kPanel * kTile + r * kPanel + j % kPanel, Full{});
      float* to = out + r * a.out_stride + j;
      if (j + L <= d)
        store(to, v * inverse, Full{});
      else
        store(to, v * inverse, Tail{int(d - j)});
    }
  }
}

FLATTEN void part_of_head(const Attention& a, const float* head, int64_t begin, int64_t end,
                          const Scratch& s, float* out) {
  for_tiles(begin, end, [&](int64_t first, int64_t rows) {
    query_tile(a, head + first * a.qkv_stride, int(rows), s, out + first * a.out_stride);
  });
}

}  // namespace

void attention_scratch(const Attention& a, int64_t& floats) {
  floats = Scratch(a, nullptr).end(a) - static_cast<const float*>(nullptr);
}

// Items [begin, end) of batch × heads × parts.
void attention_items(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  const Scratch s(a, scratch);
  const int64_t width = a.heads * a.head_dim;
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / a.parts, part = item % a.parts;
    const int64_t sample = head / a.heads, column = head % a.heads * a.head_dim;
    const float* rows = a.qkv + sample * a.tokens * a.qkv_stride + column;
    if (head != packed) {
      pack_keys(a, rows + width, s.keys);
      pack_values(a, rows + 2 * width, s.values);
      packed = head;
    }
    part_of_head(a, rows + a.query * a.qkv_stride, a.queries * part / a.parts,
                 a.queries * (part + 1) / a.parts, s,
                 a.out + sample * a.queries * a.out_stride + column);
  }
}

}  // namespace fastdit::FASTDIT_ISA
