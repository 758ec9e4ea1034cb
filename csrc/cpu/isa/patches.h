// What patch_embed and its backward share: gathering patches as float rows, and one product.
#pragma once

#include "cpu/isa/vec.h"
#include "cpu/patch_embed.h"

namespace fastdit::FASTDIT_ISA {

// A product's tile: R rows of V vectors of sums. With 16 registers the 4·2 sums, 2 vectors and a
// number fit; AVX-512 has 32 registers, and its 8·2 sums need less than one load an addition.
#if defined(__AVX512F__) && FASTDIT_LANES == 16
constexpr int R = 8;
#else
constexpr int R = 4;
#endif
constexpr int V = 2;
constexpr int64_t kPanel = V * L;
static_assert(kWidth % kPanel == 0 && kTokens % R == 0);

// Products that are added in one chain; a longer sum adds the sums of its chains. With chains of 64
// the largest error was up to 2.4 times eager's.
constexpr int64_t kChain = 16;

// sums[r][v] = Σ_i a[r·a_row + i·a_step] · b[i·b_row + v·L], i in order from 0 to count.
template <int vectors>
INLINE void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                    int64_t count, Vec (&sums)[R][vectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sums[r][v] = Vec{};
  for (int64_t i = 0; i < count; ++i) {
    Vec row[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) row[v] = load(b + i * b_row + v * L, Full{});
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec number = all(a[r * a_row + i * a_step]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[r][v] = muladd(number, row[v], sums[r][v]);
    }
  }
}

// The first element of a token's patch.
template <class T>
INLINE T* patch_at(const Patches& p, int64_t token) {
  const int64_t sample = token / p.tokens(), n = token % p.tokens();
  return static_cast<T*>(p.data) + sample * p.batch +
         n / p.grid_columns * p.patch_rows * p.row + n % p.grid_columns * p.patch_columns * p.column;
}

// f(element, k) over the elements of a patch that starts at `first`.
template <class T, class F>
INLINE void for_patch(const Patches& p, T* first, F f) {
  int64_t k = 0;
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t i = 0; i < p.patch_rows; ++i) {
      T* line = first + c * p.channel + i * p.row;
      for (int64_t j = 0; j < p.patch_columns; ++j) f(line[j * p.column], k++);
    }
}

// A token's patch as K floats, converted a vector at a time.
template <class T>
INLINE void gather(const Patches& p, int64_t token, float* to) {
  T lanes[L] = {};
  for_patch(p, patch_at<const T>(p, token), [&](T element, int64_t k) __attribute__((always_inline)) {
    if constexpr (sizeof(T) == sizeof(float)) {
      to[k] = element;
    } else {
      lanes[k % L] = element;
      if (k % L == L - 1) store(to + k - (L - 1), load(lanes, Full{}), Full{});
    }
  });
  const int64_t size = p.size(), left = size % L;
  if (sizeof(T) < sizeof(float) && left)
    store(to + size - left, load(lanes, Full{}), Tail{int(left)});
}

// Rows [begin, end) of a (rows, width) matrix as floats, `stride` apart, zeros behind each.
template <class T>
INLINE void widen_rows(const T* from, int64_t begin, int64_t end, int64_t width, int64_t stride,
                       float* to) {
  for (int64_t row = begin; row < end; ++row) {
    const T* source = from + row * width;
    float* target = to + row * stride;
    sweep(width, [&](int64_t k, auto part, int) { store(target + k, load(source + k, part), part); });
    for (int64_t k = width; k < stride; ++k) target[k] = 0;
  }
}

}  // namespace fastdit::FASTDIT_ISA
