// The micro-kernel of the native forward: a tile of R rows times a panel of V vectors, held in
// registers over the whole depth.
//
// Each step loads V vectors of B and broadcasts R numbers of A for R·V fused multiply-adds. AVX-512
// has 32 registers: 14 rows of 2 vectors, 2 of B and a number. AVX2 has 16: 6 rows. A tile of fewer
// rows computes each element in the same order.
#pragma once

#include "cpu/forward.h"
#include "cpu/isa/vec.h"

namespace fastdit::FASTDIT_ISA {

#if defined(__AVX512F__) && FASTDIT_LANES == 16
constexpr int kTile = 14, kShortTile = 10;  // 11 to 13 rows reach 94 % of the peak, others 98
#else
constexpr int kTile = 6, kShortTile = 6;
#endif
constexpr int kPanel = 2 * L;
static_assert(kWidest % kPanel == 0);

// One number from memory in all lanes. GCC makes of `all` an addition and a shuffle, which take the
// ports of the fused multiply-adds.
INLINE Vec broadcast(const float* from) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Vec)_mm512_set1_ps(*from);
#elif defined(__AVX2__) && FASTDIT_LANES == 8
  return (Vec)_mm256_broadcast_ss(from);
#else
  Vec value;
  for (int i = 0; i < L; ++i) value[i] = *from;
  return value;
#endif
}

// What a tile asks of memory in passing: the line at `at`, `step` bytes further on in each step of k.
// A step of 0 asks for one line again and again, which costs nothing.
struct Ahead {
  const char* at;
  int64_t step = 0;
};

// to[r][v] (+)= Σ_k a[r][k]·b[k][v], k in order from 0; rows of `to` are to_stride apart.
template <int R, int V>
NOINLINE void tile_product(const float* a, int64_t a_stride, const float* b, int64_t depth,
                           float* to, int64_t to_stride, bool add, Ahead ahead, Ahead next) {
  Vec sums[R][V] = {};
  for (int64_t k = 0; k < depth; ++k, b += V * L) {
    __builtin_prefetch(ahead.at + k * ahead.step);
    __builtin_prefetch(next.at + k * next.step);
    Vec row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = load(b + v * L, Full{});
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
      const Vec number = broadcast(a + r * a_stride + k);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = muladd(number, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* at = to + r * to_stride + v * L;
      store(at, add ? sums[r][v] + load(at, Full{}) : sums[r][v], Full{});
    }
}

// The same for `rows` up to kTile.
template <int V, int R = kTile>
INLINE void any_tile(int rows, const float* a, int64_t a_stride, const float* b, int64_t depth,
                     float* to, int64_t to_stride, bool add, Ahead ahead, Ahead next) {
  if (rows == R) return tile_product<R, V>(a, a_stride, b, depth, to, to_stride, add, ahead, next);
  if constexpr (R > 1)
    any_tile<V, R - 1>(rows, a, a_stride, b, depth, to, to_stride, add, ahead, next);
}

// f(begin, count) over tiles: whole ones, and the rest, up to two tiles less a row, in equal parts.
template <class F>
INLINE void for_tiles(int64_t begin, int64_t end, F f) {
  for (; end - begin >= 2 * kTile || end - begin == kTile; begin += kTile) f(begin, kTile);
  const int64_t rows = end - begin, tiles = (rows + kShortTile - 1) / kShortTile;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = begin + rows * t / tiles;
    f(first, begin + rows * (t + 1) / tiles - first);
  }
}

void dots_near(const Dots& d, int64_t begin, int64_t end);

// The product with few rows that a thread has beside `steps` tiles of another: a share of its weights
// is on its way from memory during each tile, and multiplied behind it.
class Beside {
 public:
  Beside(const DotsPart& share, int64_t row, int64_t row_end, int64_t others) : s(share) {
    if (s.begin == s.end) return;
    for_tiles(row, row_end, [&](int64_t, int64_t) { steps += others; });
    bytes = (s.end - s.begin) * s.dots->depth * int64_t(sizeof(float));
  }
  ~Beside() {
    if (s.begin < s.end) dots_near(*s.dots, s.begin, s.end);
  }

  // Before a tile of `depth` steps: what it is to ask for.
  Ahead next(const void* otherwise, int64_t depth) {
    if (!steps) return {static_cast<const char*>(otherwise)};
    const int64_t column = s.dots->depth * int64_t(sizeof(float));
    const int64_t come = first + asked / column, here = come - (come - first) % 8;
    if (s.begin < here) dots_near(*s.dots, s.begin, here), s.begin = here;
    const char* from = reinterpret_cast<const char*>(s.dots->w + first * s.dots->depth) + asked;
    const int64_t begun = asked;
    asked = bytes * ++step / steps;
    return {from, (asked - begun + depth - 1) / depth};
  }

 private:
  DotsPart s;
  const int64_t first = s.begin;
  int64_t steps = 0, step = 0, bytes = 0, asked = 0;
};

}  // namespace fastdit::FASTDIT_ISA
