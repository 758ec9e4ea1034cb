// The tanh form of GELU and its derivative, within two ulp of float everywhere.
//
//   gelu(z) = z·σ(t) = z / (1 + 2^−s),   t = 2·√(2/π)·(z + 0.044715·z³),   s = t·log₂e
//
// s is rounded to n + j/2^J; what is left, g, is small enough for a polynomial of two to six terms,
// and 2^(−n−j/2^J) is an entry of a table that fits a register or two, less the bits of s in the
// exponent's place: the entries' bits make up for those of j. With AVX-512 g is kept as g/4 and the
// table as four times itself: 2^g is then 4·(¼ + g/4·((g/4 + m)² + κ)) to a seventeenth of an ulp, and
// the one term in g³ that costs no multiplication is the right one.
//
// An error of s is a relative error of 2^−s, and s reaches −150 before gelu ends in subnormal
// numbers, so g is computed to twice float's precision, by fused multiply-adds of what rounding
// lost. Where a reciprocal is estimated (AVX-512) one step of Newton corrects the quotient itself:
// 2^−28 beside its rounding. Beyond ±10 a branch, hardly taken, leaves the vectors.
//
// Multiplications bound it, 15 of 25 instructions with AVX-512. Three vectors go through each step
// together, and are asked together whether any number is beyond: a seventh of the time.
#pragma once

#include "cpu/isa/vec.h"

namespace fastdit::FASTDIT_ISA {

// a·b + c in one rounding, also where the instruction set has no such instruction.
INLINE Vec fused(Vec a, Vec b, Vec c) {
#ifdef FASTDIT_HAS_FMA
  return muladd(a, b, c);
#else
  for (int i = 0; i < L; ++i) c[i] = float(double(a[i]) * b[i] + c[i]);  // exact but for c
  return c;
#endif
}

// c − a·b in one rounding.
INLINE Vec fused_submul(Vec c, Vec a, Vec b) {
#ifdef FASTDIT_HAS_FMA
  return submul(c, a, b);
#else
  return fused(-a, b, c);
#endif
}

INLINE Vec magnitude(Vec z) { return (Vec)((Bits)z & 0x7fffffffu); }

// f(0), …, f(K − 1), without a loop.
template <int K, class F>
INLINE void each(F f) {
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) f(i);
}

// ---- 2^(−j/2^J), its bits plus j/2^J of an exponent, and the polynomial for what is left ------------

#if defined(__AVX512F__) && FASTDIT_LANES == 16
constexpr int kFraction = 5;  // J
constexpr float kUnit = 4;    // of the table; g is counted in its inverse
INLINE Bits root(Bits bits) {
  const Bits first = {0x40800000u, 0x407e83b3u, 0x407d257du, 0x407be4bau, 0x407ac0c7u, 0x4079b907u, 0x4078ccdfu, 0x4077fbb8u,
                      0x407744fdu, 0x4076a81eu, 0x4076248cu, 0x4075b9beu, 0x4075672au, 0x40752c4du, 0x407508a4u, 0x4074fbafu};
  const Bits second = {0x407504f3u, 0x407523f6u, 0x4075583fu, 0x4075a15bu, 0x4075fed7u, 0x40767043u, 0x4076f532u, 0x40778d3au,
                      0x407837f0u, 0x4078f4f0u, 0x4079c3d3u, 0x407aa43au, 0x407b95c2u, 0x407c980fu, 0x407daac3u, 0x407ecd87u};
  return (Bits)_mm512_permutex2var_epi32((__m512i)first, (__m512i)bits, (__m512i)second);
}
INLINE Vec quotient(Vec a, Vec d) {
  const Vec inverse = (Vec)_mm512_rcp14_ps((__m512)d), q = a * inverse;
  return muladd(submul(a, d, q), inverse, q);
}
#elif defined(__AVX2__) && FASTDIT_LANES == 8
constexpr int kFraction = 3;
constexpr float kUnit = 1;
INLINE Bits root(Bits bits) {
  const Bits table = {0x3f800000u, 0x3f7ac0c7u, 0x3f7744fdu, 0x3f75672au, 0x3f7504f3u, 0x3f75fed7u,
                      0x3f7837f0u, 0x3f7b95c2u};
  return (Bits)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)bits);
}
INLINE Vec quotient(Vec a, Vec d) { return a / d; }
#else
constexpr int kFraction = 0;
constexpr float kUnit = 1;
INLINE Bits root(Bits) { return Bits{} + 0x3f800000u; }
INLINE Vec quotient(Vec a, Vec d) { return a / d; }
#endif

// (2^g − 1)/g of g/kUnit in ±2^−(J+1)/kUnit, minimax to a seventeenth of an ulp of 2^g.
INLINE Vec exponential_rest(Vec g) {
  if constexpr (kFraction == 5) {
    const Vec sum = g + all(0x1.ebfce6p-2f);
    return muladd(sum, sum, all(0x1.d96704p-2f));
  } else if constexpr (kFraction == 3) {
    Vec m = muladd(all(0x1.3b2ea2p-7f), g, all(0x1.c6b8a4p-5f));
    m = muladd(m, g, all(0x1.ebfbep-3f));
    return muladd(m, g, all(0x1.62e43p-1f));
  } else {
    Vec m = muladd(all(0x1.441e12p-13f), g, all(0x1.5f027cp-10f));
    m = muladd(m, g, all(0x1.3b2a4ep-7f));
    m = muladd(m, g, all(0x1.c6af86p-5f));
    m = muladd(m, g, all(0x1.ebfbep-3f));
    return muladd(m, g, all(0x1.62e43p-1f));
  }
}

// A power of two in two factors.
struct Power {
  Vec fraction, whole;
  INLINE Vec value() const { return fraction * whole; }
  INLINE Vec plus_one() const { return muladd(fraction, whole, all(1)); }
};

// Added to a number that is in units of kUnit, it rounds to multiples of 2^−J: the last bits.
constexpr float kShifter = 0x1.8p23f / (1 << kFraction) / kUnit;

// 2^(g − n) of the rounded sum with kShifter, whose bits n is, and of g/kUnit.
INLINE Power power(Vec shifted, Vec g) {
  const Bits bits = (Bits)shifted;
  return {muladd(exponential_rest(g), g, all(1 / kUnit)),
          (Vec)(root(bits) - (bits << (23 - kFraction)))};
}

constexpr float kLimit = 10;  // s is 125.96: kUnit·2^−s and 2^s are normal numbers up to there

// 2^−s for |z| ≤ kLimit. k0 = 2·√(2/π)·log₂e is split at 2^−19, so that p − k0 is exact.
template <bool twice, int K>
INLINE void exponential(const Vec (&z)[K], Power (&e)[K]) {
  const Vec k0 = all(0x1.26aecp+1f / kUnit), k1 = all(0x1.a5a7dp-4f / kUnit);  // 0.044715 of k0
  const Vec k0_rest = all(0x1.0de73ap-22f / kUnit), k1_rest = all(-0x1.151aaep-29f / kUnit);
  Vec q[K], p[K], shifted[K], g[K];
  each<K>([&](int i) { q[i] = z[i] * z[i]; });
  each<K>([&](int i) { p[i] = muladd(k1, q[i], k0); });
  each<K>([&](int i) { shifted[i] = muladd(z[i], p[i], all(kShifter)); });
  each<K>([&](int i) { g[i] = fused_submul(shifted[i] - all(kShifter), z[i], p[i]); });
  if constexpr (twice) {
    Vec p_rest[K];
    each<K>([&](int i) { p_rest[i] = fused(k1, q[i], k0 - p[i]); });
    each<K>([&](int i) { p_rest[i] = muladd(k1, fused(z[i], z[i], -q[i]), p_rest[i]); });
    each<K>([&](int i) { p_rest[i] += muladd(k1_rest, q[i], k0_rest); });
    each<K>([&](int i) { g[i] = submul(g[i], z[i], p_rest[i]); });
  }
  each<K>([&](int i) { e[i] = power(shifted[i], g[i]); });
}
template <bool twice>
INLINE Power exponential(Vec z) {
  Power e[1];
  exponential<twice>({z}, e);
  return e[0];
}

// Whether any number is beyond ±limit.
INLINE bool any_beyond(Vec z, float limit) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return _mm512_cmp_ps_mask((__m512)magnitude(z), _mm512_set1_ps(limit), _CMP_GT_OQ);
#elif defined(__AVX2__) && FASTDIT_LANES == 8
  return _mm256_movemask_ps((__m256)(magnitude(z) > limit));
#else
  const Ints beyond = magnitude(z) > limit;
  int32_t any = 0;
  for (int i = 0; i < L; ++i) any |= beyond[i];
  return any;
#endif
}

// Numbers beyond kLimit: above it themselves; below it in double, a lane at a time, rounded once to
// what may be a subnormal number; below −12 zero, and at −∞, where eager PyTorch has 0·∞, NaN.
NOINLINE inline void gelu_beyond(const Vec* z, Vec* value, int count) {
  for (int i = 0; i < count * L; ++i) {
    const double x = z[i / L][i % L], p = 0x1.26aec21bce759p+1 + 0x1.a5a7cf7572a98p-4 * x * x;
    float& to = reinterpret_cast<float*>(value)[i];
    if (x > kLimit) to = float(x);
    if (x < -kLimit) to = x > -12 ? float(x / (1 + __builtin_exp2(-x * p))) : -0.f;
    if (x < -__FLT_MAX__) to = __builtin_nanf("");
  }
}

// The magnitudes of two vectors, the greater ones; of a number and NaN the number's.
INLINE Vec greater_magnitude(Vec a, Vec b) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Vec)_mm512_range_ps((__m512)a, (__m512)b, 0b1011);
#else
  return magnitude(a) > magnitude(b) ? magnitude(a) : magnitude(b);
#endif
}

// z := gelu(z). A result that is stored in 16 bits does not need s to twice float's precision.
template <bool twice, int K>
INLINE void gelu(Vec (&z)[K]) {
  Power e[K];
  Vec value[K], greatest = z[0];
  exponential<twice>(z, e);
  each<K>([&](int i) { value[i] = quotient(z[i], e[i].plus_one()); });
  each<K - 1>([&](int i) { greatest = greater_magnitude(greatest, z[i + 1]); });
  if (any_beyond(greatest, kLimit)) {
    Vec inputs[K], results[K];  // copies, lest every vector be written to memory
    each<K>([&](int i) { inputs[i] = z[i], results[i] = value[i]; });
    gelu_beyond(inputs, results, K);
    each<K>([&](int i) { value[i] = results[i]; });
  }
  each<K>([&](int i) { z[i] = value[i]; });
}
template <bool twice>
INLINE Vec gelu(Vec z) {
  Vec one[1] = {z};
  gelu<twice>(one);
  return one[0];
}

// σ + z·t'·σ·(1 − σ),  t' = 2·√(2/π)·(1 + 3·0.044715·z²); beyond ±kLimit it is 0 or 1. Its error is
// absolute, so s needs no more than float's precision. At ±∞ eager PyTorch has 0·∞, NaN; so has this.
INLINE Vec gelu_derivative(Vec z) {
  const Power power = exponential<false>(z);
  const Vec q = z * z, e = power.value(), sigma = quotient(all(1), power.plus_one());
  const Vec slope = z * muladd(q, all(0.21406444f), all(1.5957691f));
  const Vec value = muladd(slope * (e * sigma), sigma, sigma);
  if (!any_beyond(z, kLimit)) return value;
  const Vec limit = magnitude(z) > __FLT_MAX__ ? all(__builtin_nanf("")) : z < 0 ? Vec{} : all(1);
  return magnitude(z) > kLimit ? limit : value;
}

}  // namespace fastdit::FASTDIT_ISA
