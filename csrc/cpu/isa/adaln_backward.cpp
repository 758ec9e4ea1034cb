// The backward of adaln and gated_adaln: x, dout (, dh, y) in once from memory, dx (, dy) out once.
//
//   unit = (x − mean)·rstd,  g = dout·(plus + scale)·weight
//   dx = rstd·(g − mean(g) − unit·mean(g·unit)) + dh,  dy = gate·dx
//
// A row is read twice, the second time from cache: once for the two means, once for dx. The sums
// over tokens, which are the gradients of the modulation, stay in cache as rows of float; two rows
// at a time halve the traffic on them. With one modulation for all tokens of a sample the gradients
// of weight and bias follow from the same sums.
#include "cpu/adaln_backward.h"

#include "cpu/isa/modulation.h"

namespace fastdit::FASTDIT_ISA {
namespace {

struct NoGate {};
template <int R>
struct Count {
  static constexpr int rows = R;
};

// The gated part of a block of rows of one sample; Y is NoGate without a gate. Y is how y is read and
// dy written: as they are stored, which is as X, or as floats that are converted before and after.
template <class Y, int R>
struct Branch {
  const float* gate;
  float* sums;
  const Y* y[R];
  Y* dy[R];
};

template <class X, class Y, int R>
INLINE void block(const AdalnBackward& a, int64_t row, const float* mul, const AdalnSums& sums,
                  const Branch<Y, R>& branch) {
  constexpr bool gated = !__is_same(Y, NoGate);
  constexpr int chains = 4 / R;
  const int64_t b = row / a.tokens, n = row - b * a.tokens;
  const X *x[R], *dout[R], *dh[R];
  Vec mean[R], rstd[R], gs[R][chains] = {}, gus[R][chains] = {}, mean_g[R], mean_gu[R];
  for (int r = 0; r < R; ++r) {
    x[r] = row_of<X>(a.x, b, n + r), dout[r] = row_of<X>(a.dout, b, n + r);
    dh[r] = gated ? row_of<X>(a.dh, b, n + r) : nullptr;
    mean[r] = all(a.rms ? 0 : a.mean[row + r]), rstd[r] = all(a.rstd[row + r]);
  }
  sweep<chains>(a.width, [&](int64_t d, auto part, int slot) {
    const Vec m = load(mul + d, part);
    for (int r = 0; r < R; ++r) {
      const Vec unit = (load(x[r] + d, part) - mean[r]) * rstd[r];
      const Vec g = load(dout[r] + d, part) * m;
      gs[r][slot] += g;
      gus[r][slot] = muladd(g, unit, gus[r][slot]);
    }
  });
  for (int r = 0; r < R; ++r) {
    mean_g[r] = all(a.rms ? 0 : total(gs[r]) / a.width);
    mean_gu[r] = all(-total(gus[r]) / a.width);
  }
  sweep<1>(a.width, [&](int64_t d, auto part, int) {
    const Vec m = load(mul + d, part), gate = gated ? load(branch.gate + d, part) : Vec{};
    Vec plain = load(sums.plain + d, part), plain_unit = load(sums.plain_unit + d, part);
    Vec gate_sum = gated ? load(branch.sums + d, part) : Vec{};
    for (int r = 0; r < R; ++r) {
      const Vec incoming = load(dout[r] + d, part);
      const Vec unit = (load(x[r] + d, part) - mean[r]) * rstd[r];
      plain += incoming;
      plain_unit = muladd(incoming, unit, plain_unit);
      const Vec centred = muladd(incoming, m, -mean_g[r]);
      Vec dx = muladd(unit, mean_gu[r], centred) * rstd[r];
      if constexpr (gated) {
        dx += load(dh[r] + d, part);
        store(branch.dy[r] + d, gate * dx, part);
        gate_sum = muladd(dx, load(branch.y[r] + d, part), gate_sum);
      }
      store(static_cast<X*>(a.dx) + (row + r) * a.width + d, dx, part);
    }
    store(sums.plain + d, plain, part);
    store(sums.plain_unit + d, plain_unit, part);
    if (gated) store(branch.sums + d, gate_sum, part);
  });
}

template <class X, class Y, int R>
INLINE void gated_block(const AdalnBackward& a, int64_t row, const float* mul,
                        const AdalnSums& sums, const float* gate, float* gate_sums,
                        float* spare) {
  const int64_t b = row / a.tokens, n = row - b * a.tokens, stride = scratch_row(a.width);
  const bool converted = __is_same(Y, float) && a.y.type != Type::f32;
  Branch<Y, R> branch{gate, gate_sums, {}, {}};
  for (int r = 0; r < R; ++r) {
    branch.y[r] = row_of<Y>(a.y, b, n + r);
    branch.dy[r] = static_cast<Y*>(a.dy) + (row + r) * a.width;
    if constexpr (__is_same(Y, float)) {
      branch.y[r] = floats(modulation(a.y), b, n + r, a.width, spare + r * stride);
      if (converted) branch.dy[r] = spare + (2 + r) * stride;
    }
  }
  block<X, Y, R>(a, row, mul, sums, branch);
  if constexpr (__is_same(Y, float)) {
    for (int r = 0; converted && r < R; ++r)
      store_row(branch.dy[r], a.width, a.dy, row + r, a.y.type);
  }
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
  const float* gate = nullptr;
  const auto run = [&](auto count, int64_t row, float* gate_sums) {
    constexpr int R = decltype(count)::rows;
    if constexpr (gated)
      gated_block<X, Y, R>(a, row, affine.mul, sums, gate, gate_sums, spare);
    else
      block<X, NoGate, R>(a, row, affine.mul, sums, {});
  };
  int64_t row = begin;
  if (!a.scale.token && !a.shift.token && !a.gate.token) {
    fold(a, b, 0, affine, spare);
    if (gated) gate = floats(a.gate, b, 0, a.width, buffer);
    for (; row + 2 <= end; row += 2) run(Count<2>{}, row, sums.gate);
    if (row < end) run(Count<1>{}, row, sums.gate);
    return;
  }
  for (; row < end; ++row) {
    fold(a, b, row - b * a.tokens, affine, spare);
    if (gated) gate = floats(a.gate, b, row - b * a.tokens, a.width, buffer);
    if (a.dgate) __builtin_memset(line, 0, a.width * sizeof(float));
    run(Count<1>{}, row, a.dgate ? line : sums.gate);
    if (a.dgate) store_row(line, a.width, a.dgate, row, a.gate.type);
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
