// The row-wise parts of the native forward: LayerNorm with modulation, SiLU, and products with few
// rows, which read each weight once, as it lies in its parameter.
#include "cpu/forward.h"
#include "cpu/isa/exp.h"

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

// An R×C square of dot products; each is one chain of vectors, whatever R and C.
template <int R, int C>
INLINE void dots_square(const Dots& d, int64_t m, int64_t n) {
  Vec sums[R][C] = {};
  const float* a = d.a + m * d.depth;
  const float* w = d.w + n * d.depth;
  sweep<1>(d.depth, [&](int64_t k, auto part, int) {
    Vec row[C];
    for (int c = 0; c < C; ++c) {
      if constexpr (C == 1) prefetch(w + k, kAhead);
      row[c] = load(w + c * d.depth + k, part);
    }
    for (int r = 0; r < R; ++r) {
      const Vec v = load(a + r * d.depth + k, part);
      for (int c = 0; c < C; ++c) sums[r][c] = muladd(v, row[c], sums[r][c]);
    }
  });
  for (int c = 0; c < C; ++c) {
    const int64_t column = n + c, vector = d.group ? column / d.group : 0;
    const int64_t at = vector * d.group_stride + column - vector * d.group;
    for (int r = 0; r < R; ++r) {
      const float value = total(sums[r][c]) + d.bias[column];
      d.out[(m + r) * d.out_stride + at] =
          d.silu ? silu(all(value))[0] : vector % 3 == 1 ? value + 1 : value;
    }
  }
}

// With few rows each weight is used at once, and memory is read in one straight line: at 30 GB/s,
// where four columns side by side have 12. More rows take squares of 4 × 4, which are arithmetic.
FLATTEN void dots_of_few(const Dots& d, int64_t n) {
  switch (d.rows) {
    case 1: return dots_square<1, 1>(d, 0, n);
    case 2: return dots_square<2, 1>(d, 0, n);
    case 3: return dots_square<3, 1>(d, 0, n);
    case 4: return dots_square<4, 1>(d, 0, n);
  }
}

template <int C>
FLATTEN void dots_rows(const Dots& d, int64_t n) {
  int64_t m = 0;
  for (; m + 4 <= d.rows; m += 4) dots_square<4, C>(d, m, n);
  for (; m + 2 <= d.rows; m += 2) dots_square<2, C>(d, m, n);
  if (m < d.rows) dots_square<1, C>(d, m, n);
}

}  // namespace

FLATTEN void norm_rows(const Norm& n, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t step = row / n.tokens * n.mul_step;
    norm_row(n, n.x + row * n.stride, n.mul + step, n.add + step, n.out + row * n.stride);
  }
}

// Columns [begin, end) of all rows.
void dots_columns(const Dots& d, int64_t begin, int64_t end) {
  int64_t n = begin;
  if (d.rows <= 4)
    for (; n < end; ++n) dots_of_few(d, n);
  for (; n + 4 <= end; n += 4) dots_rows<4>(d, n);
  for (; n < end; ++n) dots_rows<1>(d, n);
}

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
