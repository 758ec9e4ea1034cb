// The backward of adaln and gated_adaln: x, dout (, dh, y) in once from memory, dx (, dy) out once.
//
//   u = x − mean,  g = dout·m,  m = (plus + scale)·weight
//   dx = rstd·(g − mean(g) − rstd²·u·mean(g·u)) + dh,  dy = gate·dx
//
// A group of rows is read twice, the second time from cache: row by row for the two means, then in
// columns of a few vectors, whose sums over the group, which are the gradients of the modulation,
// stay in registers. Both readings row by row, these sums in memory, were measured at 1.3 times the
// time: x, dout, dx and the sums do not fit the first cache together. With one modulation for all
// tokens of a sample the gradients of weight and bias follow from the same sums.
#include "cpu/adaln_backward.h"

#include "cpu/isa/modulation.h"

namespace fastdit::FASTDIT_ISA {
namespace {

// Rows of a group and vectors of a column, by what caches and registers hold. (Rows 2, 4, 8 and 32, and
// vectors 1, 2, 4 and 8 were measured: up to twice the time.)
constexpr int64_t kGroup = 8, kGatedGroup = 4;
constexpr int kColumns = L == 16 ? 8 : 4, kGatedColumns = L == 16 ? 2 : 1;

struct NoGate {};

// The gated part of rows of one sample; Y is NoGate without a gate. Y is how y is read and dy written:
// as they are stored, which is as X, or as floats that are converted before and after.
template <class Y>
struct Branch {
  const float* gate = nullptr;
  float* sums = nullptr;
  const Y* y = nullptr;
  Y* dy = nullptr;
};

// dx = dout·rstd·m + u·slope + constant, for each row of a group.
struct Scalars {
  float mean[kGroup], rstd[kGroup], slope[kGroup], constant[kGroup];
};

// The first reading of a row.
template <class X>
INLINE void read_row(const AdalnBackward& a, int64_t row, const float* mul, Scalars& s, int i) {
  const int64_t b = row / a.tokens, n = row - b * a.tokens;
  const X *x = row_of<X>(a.x, b, n), *dout = row_of<X>(a.dout, b, n);
  const Vec mean = all(a.rms ? 0 : a.mean[row]);
  Vec gs[4] = {}, gus[4] = {};
  sweep(a.width, [&](int64_t d, auto part, int slot) {
    const Vec g = load(dout + d, part) * load(mul + d, part);
    gs[slot] += g;
    gus[slot] = muladd(g, load(x + d, part) - mean, gus[slot]);
  });
  const double rstd = a.rstd[row], mean_gu = double(total(gus)) / a.width;
  s.mean[i] = mean[0], s.rstd[i] = a.rstd[row];
  s.slope[i] = float(-rstd * rstd * rstd * mean_gu);
  s.constant[i] = a.rms ? 0 : float(-rstd * total(gs) / a.width);
}

// The second reading: T vectors at column d of `count` rows.
template <int T, class X, class Y, class Part>
INLINE void columns(const AdalnBackward& a, int64_t row, int64_t count, int64_t d, Part part,
                    const float* mul, const Scalars& s, const AdalnSums& sums,
                    const Branch<Y>& branch) {
  constexpr bool gated = !__is_same(Y, NoGate);
  const int64_t b = row / a.tokens, n = row - b * a.tokens;
  Vec m[T], plain[T] = {}, plain_unit[T] = {}, gate[T], gate_sum[T] = {};
  for (int t = 0; t < T; ++t) {
    m[t] = load(mul + d + t * L, part);
    if (gated) gate[t] = load(branch.gate + d + t * L, part);
  }
  for (int64_t i = 0; i < count; ++i) {
    const X *x = row_of<X>(a.x, b, n + i) + d, *dout = row_of<X>(a.dout, b, n + i) + d;
    X* dx = static_cast<X*>(a.dx) + (row + i) * a.width + d;
    const Vec mean = all(s.mean[i]), rstd = all(s.rstd[i]);
    const Vec slope = all(s.slope[i]), constant = all(s.constant[i]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Vec incoming = load(dout + t * L, part), scaled = incoming * rstd;
      const Vec u = load(x + t * L, part) - mean;
      plain[t] += incoming;
      plain_unit[t] = muladd(scaled, u, plain_unit[t]);
      Vec dx_t = muladd(scaled, m[t], muladd(u, slope, constant));
      if constexpr (gated) {
        dx_t += load(row_of<X>(a.dh, b, n + i) + d + t * L, part);
        store(branch.dy + i * a.width + d + t * L, gate[t] * dx_t, part);
        const Vec y = load(branch.y + i * a.y.token + d + t * L, part);
        gate_sum[t] = muladd(dx_t, y, gate_sum[t]);
      }
      store(dx + t * L, dx_t, part);
    }
  }
  const auto add = [&](float* to, Vec sum) { store(to, load(to, part) + sum, part); };
  for (int t = 0; t < T; ++t) {
    add(sums.plain + d + t * L, plain[t]), add(sums.plain_unit + d + t * L, plain_unit[t]);
    if (gated) add(branch.sums + d + t * L, gate_sum[t]);
  }
}

// `count` rows of one sample, at most a group, that share their modulation.
template <class X, class Y>
INLINE void group(const AdalnBackward& a, int64_t row, int64_t count, const float* mul,
                  const AdalnSums& sums, const Branch<Y>& branch) {
  constexpr int T = __is_same(Y, NoGate) ? kColumns : kGatedColumns;
  Scalars s;
  for (int64_t i = 0; i < count; ++i) read_row<X>(a, row + i, mul, s, int(i));
  int64_t d = 0;
  for (; d + T * L <= a.width; d += T * L)
    columns<T, X>(a, row, count, d, Full{}, mul, s, sums, branch);
  for (; d + L <= a.width; d += L) columns<1, X>(a, row, count, d, Full{}, mul, s, sums, branch);
  if (d < a.width)
    columns<1, X>(a, row, count, d, Tail{int(a.width - d)}, mul, s, sums, branch);
}

// The gradients of modulation per token, and the sums of weight and bias with a scale per token.
template <class X>
NOINLINE void token_gradients(const AdalnBackward& a, int64_t row, const AdalnSums& sums,
                              float* spare) {
  const int64_t b = row / a.tokens, n = row - b * a.tokens, stride = scratch_row(a.width);
  const float* w = a.weight ? floats(a.weight, 0, 0, a.width, spare) : nullptr;
  const float* c = a.bias ? floats(a.bias, 0, 0, a.width, spare + stride) : nullptr;
  const float* scale = a.scale ? floats(a.scale, b, n, a.width, spare + 2 * stride) : nullptr;
  float *incoming = spare + 3 * stride, *product = spare + 4 * stride;
  const X *x = row_of<X>(a.x, b, n), *dout = row_of<X>(a.dout, b, n);
  const Vec mean = all(a.rms ? 0 : a.mean[row]), rstd = all(a.rstd[row]), plus = all(a.plus);
  sweep<1>(a.width, [&](int64_t d, auto part, int) {
    const Vec g = load(dout + d, part), unit = (load(x + d, part) - mean) * rstd;
    const Vec normed = muladd(unit, w ? load(w + d, part) : all(1), c ? load(c + d, part) : Vec{});
    store(incoming + d, g, part);
    store(product + d, g * normed, part);
    if (!sums.scaled) return;
    const Vec scaled = scale ? g * (plus + load(scale + d, part)) : g;
    store(sums.scaled + d, load(sums.scaled + d, part) + scaled, part);
    store(sums.scaled_unit + d, muladd(scaled, unit, load(sums.scaled_unit + d, part)), part);
  });
  if (a.dshift) store_row(incoming, a.width, a.dshift, row, a.shift.type);
  if (a.dscale) store_row(product, a.width, a.dscale, row, a.scale.type);
}

template <class X, class Y>
FLATTEN void backward_rows(const AdalnBackward& a, int64_t begin, int64_t end, const AdalnSums& sums,
                           float* scratch) {
  constexpr bool gated = !__is_same(Y, NoGate);
  const int64_t stride = scratch_row(a.width), b = begin / a.tokens;
  const Affine affine{scratch, scratch + stride};
  float *spare = scratch + 2 * stride, *buffer = spare + 5 * stride, *line = buffer + stride;
  const bool per_token = a.scale.token || a.shift.token || a.gate.token;
  const bool converted = __is_same(Y, float) && a.y.type != Type::f32;
  const int64_t step = per_token || converted ? 1 : gated ? kGatedGroup : kGroup;
  Branch<Y> branch;
  for (int64_t row = begin; row < end; row += step) {
    const int64_t n = row - b * a.tokens, count = step < end - row ? step : end - row;
    if (row == begin || per_token) {
      fold(a, b, n, affine, spare);
      if (gated) branch.gate = floats(a.gate, b, n, a.width, buffer);
    }
    if constexpr (gated) {
      branch.sums = a.dgate ? line : sums.gate;
      branch.y = row_of<Y>(a.y, b, n), branch.dy = static_cast<Y*>(a.dy) + row * a.width;
    }
    if constexpr (__is_same(Y, float)) {
      if (converted)
        branch.y = floats(modulation(a.y), b, n, a.width, spare), branch.dy = spare + stride;
    }
    if (a.dgate) __builtin_memset(line, 0, a.width * sizeof(float));
    group<X, Y>(a, row, count, affine.mul, sums, branch);
    if (a.dgate) store_row(line, a.width, a.dgate, row, a.gate.type);
    if constexpr (__is_same(Y, float))
      if (converted) store_row(branch.dy, a.width, a.dy, row, a.y.type);
    if (a.dscale || a.dshift) token_gradients<X>(a, row, sums, spare);
  }
}

}  // namespace

void adaln_backward_rows(const AdalnBackward& a, int64_t begin, int64_t end, const AdalnSums& sums,
                         float* scratch) {
  with_type(a.x.type, [&](auto x) {
    using X = decltype(x);
    if (!a.gate) return backward_rows<X, NoGate>(a, begin, end, sums, scratch);
    if (a.y.type == a.x.type) return backward_rows<X, X>(a, begin, end, sums, scratch);
    backward_rows<X, float>(a, begin, end, sums, scratch);
  });
}

}  // namespace fastdit::FASTDIT_ISA
