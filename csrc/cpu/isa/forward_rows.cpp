// The row-wise parts of the native forward: LayerNorm with modulation, SiLU, and products with few
// rows, which read each weight once, as it lies in its parameter.
#include "cpu/isa/exp.h"
#include "cpu/isa/gemm.h"

namespace fastdit::FASTDIT_ISA {
namespace {

INLINE Vec silu(Vec x) {
  const Vec e = exponential(x < 0 ? x : -x);  // e^−|x|
  return x / (1 + e) * (x < 0 ? e : all(1));
}

// One row, about its mean: a row of up to 8 KB is still in the first-level cache at each pass.
INLINE void norm_row(const Norm& n, const float* x, const float* mul, const float* add,
                     float* out) {
  Vec sums[4] = {}, rests[4] = {}, squares[4] = {};
  sweep(n.width, [&](int64_t d, auto part, int slot) { sums[slot] += load(x + d, part); });
  const float centre = float(double(total(sums)) / n.width);
  sweep(n.width, [&](int64_t d, auto part, int slot) {
    const Vec v = covered(load(x + d, part) - centre, part);
    rests[slot] += v;
    squares[slot] = muladd(v, v, squares[slot]);
  });
  const double rest = double(total(rests)) / n.width;
  const double variance = double(total(squares)) / n.width - rest * rest;
  const double scale = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + n.eps);
  const Vec rstd = all(float(scale)), offset = all(float(-rest * scale));
  sweep(n.width, [&](int64_t d, auto part, int) {
    const Vec unit = muladd(load(x + d, part) - centre, rstd, offset);
    store(out + d, muladd(unit, load(mul + d, part), load(add + d, part)), part);
  });
}

// Weights ahead, 8 KB: memory's latency at its bandwidth.
constexpr int64_t kAhead = 2048;

// Of two vectors of sums in blocks of 2W lanes, halved, side by side: blocks of W lanes.
template <int W>
INLINE Vec halve(Vec a, Vec b) {
  Ints low, high;
  for (int i = 0; i < L; ++i) {
    const int lane = i % (L / 2);
    low[i] = (i < L / 2 ? 0 : L) + lane / W * 2 * W + lane % W;
    high[i] = low[i] + W;
  }
#if defined(__clang__)
  Vec left, right;
  for (int i = 0; i < L; ++i) {
    left[i] = low[i] < L ? a[low[i]] : b[low[i] - L];
    right[i] = high[i] < L ? a[high[i]] : b[high[i] - L];
  }
  return left + right;
#else
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// The `total` of each of N vectors, in the same order of additions, in the first N lanes.
template <int N, int W = L / 2>
INLINE Vec totals(const Vec* v) {
  static_assert(N <= L);
  if constexpr (W == 0) return v[0];
  else if constexpr (N == 1) {
    const Vec half = halve<W>(v[0], v[0]);
    return totals<1, W / 2>(&half);
  } else {
    Vec halves[N / 2];
    for (int i = 0; i < N / 2; ++i) halves[i] = halve<W>(v[2 * i], v[2 * i + 1]);
    return totals<N / 2, W / 2>(halves);
  }
}

// An R×C square of dot products; each is one chain of vectors, whatever R and C.
template <int R, int C, bool far>
INLINE void dots_square(const Dots& d, int64_t m, int64_t n) {
  Vec sums[R][C] = {};
  const float* a = d.a + m * d.depth;
  const float* w = d.w + n * d.depth;
  sweep<1>(d.depth, [&](int64_t k, auto part, int) {
    Vec row[C];
    for (int c = 0; c < C; ++c) {
      if constexpr (far) prefetch(w + C * k + c * L, kAhead);
      row[c] = load(w + c * d.depth + k, part);
    }
    for (int r = 0; r < R; ++r) {
      const Vec v = load(a + r * d.depth + k, part);
      for (int c = 0; c < C; ++c) sums[r][c] = muladd(v, row[c], sums[r][c]);
    }
  });
  constexpr int kSums = R * C, kAtOnce = kSums < L ? kSums : L;
  float values[kSums < L ? L : kSums];
  for (int i = 0; i < kSums; i += kAtOnce)
    store(values + i, totals<kAtOnce>(&sums[0][0] + i), Full{});
  int64_t vector = d.group ? n / d.group : 0, next = d.group ? (vector + 1) * d.group : n + C;
  float* out = d.out + m * d.out_stride + vector * (d.group_stride - d.group);
  for (int64_t c = 0; c < C; ++c) {
    const int64_t column = n + c;
    if (column == next) ++vector, next += d.group, out += d.group_stride - d.group;
    for (int r = 0; r < R; ++r) {
      const float value = values[r * C + c] + d.bias[column];
      out[r * d.out_stride + column] =
          d.silu ? silu(all(value))[0] : vector % 3 == 1 ? value + 1 : value;
    }
  }
}

template <int C, bool far>
FLATTEN void dots_rows(const Dots& d, int64_t n) {
  int64_t m = 0;
  if (far && d.rows >= 4) dots_square<4, C, far>(d, m, n), m += 4;
  for (; m + 4 <= d.rows; m += 4) dots_square<4, C, false>(d, m, n);
  for (; m + 2 <= d.rows; m += 2) dots_square<2, C, far>(d, m, n);
  if (m < d.rows) dots_square<1, C, far>(d, m, n);
}

template <bool far>
FLATTEN void dots(const Dots& d, int64_t begin, int64_t end) {
  int64_t n = begin;
  if (d.rows == 1)
    for (; n + 8 <= end; n += 8) dots_square<1, 8, far>(d, 0, n);
  for (; n + 4 <= end; n += 4) dots_rows<4, far>(d, n);
  for (; n < end; ++n) dots_rows<1, far>(d, n);
}

}  // namespace

FLATTEN void norm_rows(const Norm& n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t step = row / n.tokens * n.mul_step;
    norm_row(n, n.x + row * n.stride, n.mul + step, n.add + step, n.out + row * n.stride);
  }
}

void dots_columns(const Dots& d, int64_t begin, int64_t end) { dots<true>(d, begin, end); }
void dots_near(const Dots& d, int64_t begin, int64_t end) { dots<false>(d, begin, end); }

FLATTEN void silu_floats(float* values, int64_t count) {
  sweep<1>(count, [&](int64_t d, auto part, int) {
    store(values + d, silu(load(values + d, part)), part);
  });
}

// The machine's ceiling: twelve chains of multiply-adds in registers, enough to hide their latency.
void fma_chains(int64_t steps, int64_t& flop) {
  constexpr int kChains = 12;
  Vec sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = all(float(i));
  const Vec factor = all(0.5f), term = all(1);
  for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = muladd(sums[i], factor, term);
  float rest = 0;
  for (int i = 0; i < kChains; ++i) rest += total(sums[i]);
  flop = rest == rest ? 2 * kChains * L * steps : 0;
}

}  // namespace fastdit::FASTDIT_ISA
