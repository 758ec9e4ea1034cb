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
  float *keys, *values, *scores, *products, *out;

  Scratch(const Attention& a, float* memory)
      : keys(memory),
        values(keys + up(a.tokens, kPanel) * a.head_dim),
        scores(values + a.tokens * up(a.head_dim, L)),
        products(scores + kTile * kKeys),
        out(products + kTile * kPanel) {}
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

// Kᵀ as panels (head_dim, kPanel), or (head_dim, L) where L keys are left, zeros behind the last.
FLATTEN void pack_keys(const Attention& a, const float* keys, float* to) {
  const int64_t d = a.head_dim;
  for (int64_t n = 0; n < up(a.tokens, L); n += L)
    for (int64_t j = 0; j < d; j += L) {
      const int64_t first = n / kPanel * kPanel, width = key_panel(a, first);
      float* panel = to + first * d + n - first + j * width;
      Vec square[L] = {};
      for (int i = 0; i < L && n + i < a.tokens; ++i) {
        const float* key = keys + (n + i) * a.qkv_stride + j;
        square[i] = j + L <= d ? load(key, Full{}) : load(key, Tail{int(d - j)});
      }
      transpose(square);
      for (int i = 0; i < L && j + i < d; ++i) store(panel + i * width, square[i], Full{});
    }
}

// V as panels (tokens, kPanel), or (tokens, L) where L columns are left, zeros behind the last.
FLATTEN void pack_values(const Attention& a, const float* values, float* to) {
  for (int64_t j = 0; j < a.head_dim; j += kPanel) {
    const int64_t left = up(a.head_dim - j, L), width = left < kPanel ? left : kPanel;
    for (int64_t n = 0; n < a.tokens; ++n, to += width)
      for (int64_t c = 0; c < width; c += L) {
        const float* value = values + n * a.qkv_stride + j + c;
        const int64_t rest = a.head_dim - j - c;
        store(to + c, rest >= L ? load(value, Full{}) : load(value, Tail{int(rest)}), Full{});
      }
  }
}

struct Running {
  float most[kTile], sum[kTile];
};

// Turns a row's scores into weights; returns what the sums so far are to be scaled by.
INLINE float weigh(float* scores, int64_t keys, float scale, float& most, float& sum) {
  const int64_t width = up(keys, L);
  for (int64_t n = keys; n < width; ++n) scores[n] = -__builtin_inff();
  Vec tops = load(scores, Full{});
  for (int64_t n = L; n < width; n += L) tops = max(tops, load(scores + n, Full{}));
  float top = tops[0];
  for (int i = 1; i < L; ++i) top = top < tops[i] ? tops[i] : top;
  const float now = most < top * scale ? top * scale : most;
  Vec sums = {};
  for (int64_t n = 0; n < width; n += L) {
    const Vec weight = exponential(muladd(load(scores + n, Full{}), all(scale), all(-now)));
    store(scores + n, weight, Full{});
    sums += weight;
  }
  const float correction = exponential(all(most - now))[0];
  sum = sum * correction + total(sums);
  most = now;
  return correction;
}

// `rows` queries against all keys of their head.
INLINE void query_tile(const Attention& a, const float* queries, int rows, const Scratch& s,
                       float* out) {
  const float scale = float(1 / __builtin_sqrt(double(a.head_dim)));
  const int64_t d = a.head_dim, width = up(d, L);
  Running running;
  for (int r = 0; r < rows; ++r) running.most[r] = -__builtin_inff(), running.sum[r] = 0;
  for (int64_t key = 0; key < a.tokens; key += kKeys) {
    const int64_t keys = key + kKeys < a.tokens ? kKeys : a.tokens - key;
    for (int64_t n = 0; n < keys; n += kPanel) {
      const float* panel = s.keys + (key + n) * d;
      const int64_t columns = key_panel(a, key + n);
      const Ahead ahead{reinterpret_cast<const char*>(panel)};
      if (columns > L)
        any_tile<2>(rows, queries, a.qkv_stride, panel, d, s.products, false, ahead);
      else
        any_tile<1>(rows, queries, a.qkv_stride, panel, d, s.products, false, ahead);
      for (int r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; c += L)
          store(s.scores + r * kKeys + n + c, load(s.products + r * kPanel + c, Full{}), Full{});
    }
    float corrections[kTile];
    for (int r = 0; r < rows; ++r)
      corrections[r] =
          weigh(s.scores + r * kKeys, keys, scale, running.most[r], running.sum[r]);
    for (int64_t j = 0; j < d; j += kPanel) {
      float* sums = s.out + j * kTile;
      if (key > 0)
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < kPanel; c += L) {
            float* at = sums + r * kPanel + c;
            store(at, load(at, Full{}) * corrections[r], Full{});
          }
      const float* panel = s.values + j * a.tokens;
      const Ahead ahead{reinterpret_cast<const char*>(panel)};
      if (width - j > L)
        any_tile<2>(rows, s.scores, kKeys, panel + key * kPanel, keys, sums, key > 0, ahead);
      else
        any_tile<1>(rows, s.scores, kKeys, panel + key * L, keys, sums, key > 0, ahead);
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
