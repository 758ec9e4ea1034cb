// The tanh form of GELU and its derivative, within two ulp of float everywhere.
//
//   gelu(z) = z·σ(t) = z / (1 + 2^−s),   t = 2·√(2/π)·(z + 0.044715·z³),   s = t·log₂e
//
// s is rounded to n + j/2^J; what is left, g, is small enough for a polynomial of three to six
// terms, and 2^(−n−j/2^J) is an entry of a table that fits a register, less the bits of s in the
// exponent's place: the entries' bits make up for those of j.
//
// An error of s is a relative error of 2^−s, and s reaches −150 before gelu ends in subnormal
// numbers, so g is computed to twice float's precision, by fused multiply-adds of what rounding
// lost. Where a reciprocal is estimated (AVX-512) one step of Newton corrects the quotient itself:
// 2^−28 beside its rounding. Beyond ±10 a branch, hardly taken, leaves the vectors.
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

INLINE Vec magnitude(Vec z) { return (Vec)((Bits)z & 0x7fffffffu); }

// ---- 2^(−j/2^J), its bits plus j/2^J of an exponent, and the polynomial for what is left ------------

#if defined(__AVX512F__) && FASTDIT_LANES == 16
constexpr int kFraction = 4;  // J
INLINE Bits root(Bits bits) {
  const Bits table = {0x3f800000u, 0x3f7d257du, 0x3f7ac0c7u, 0x3f78ccdfu, 0x3f7744fdu, 0x3f76248cu,
                      0x3f75672au, 0x3f7508a4u, 0x3f7504f3u, 0x3f75583fu, 0x3f75fed7u, 0x3f76f532u,
                      0x3f7837f0u, 0x3f79c3d3u, 0x3f7b95c2u, 0x3f7daac3u};
  return (Bits)_mm512_permutexvar_epi32((__m512i)bits, (__m512i)table);
}
INLINE Vec quotient(Vec a, Vec d) {
  const Vec inverse = (Vec)_mm512_rcp14_ps((__m512)d), q = a * inverse;
  return muladd((Vec)_mm512_fnmadd_ps((__m512)d, (__m512)q, (__m512)a), inverse, q);
}
#elif defined(__AVX2__) && FASTDIT_LANES == 8
constexpr int kFraction = 3;
INLINE Bits root(Bits bits) {
  const Bits table = {0x3f800000u, 0x3f7ac0c7u, 0x3f7744fdu, 0x3f75672au, 0x3f7504f3u, 0x3f75fed7u,
                      0x3f7837f0u, 0x3f7b95c2u};
  return (Bits)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)bits);
}
INLINE Vec quotient(Vec a, Vec d) { return a / d; }
#else
constexpr int kFraction = 0;
INLINE Bits root(Bits) { return Bits{} + 0x3f800000u; }
INLINE Vec quotient(Vec a, Vec d) { return a / d; }
#endif

// (2^g − 1)/g on ±2^−(J+1), minimax to a twenty-fifth of an ulp of 2^g.
INLINE Vec exponential_rest(Vec g) {
  if constexpr (kFraction == 4) {
    const Vec m = muladd(all(0x1.c6adc8p-5f), g, all(0x1.ebffdp-3f));
    return muladd(m, g, all(0x1.62e43p-1f));
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

constexpr float kLimit = 0x1.40089p+3f;  // where s is 126: 2^−s and 2^s are normal up to there

// 2^−s for |z| ≤ kLimit. k0 = 2·√(2/π)·log₂e is split at 2^−19, so that p − k0 is exact.
template <bool twice>
INLINE Vec exponential(Vec z, Vec q) {
  const Vec k0 = all(0x1.26aecp+1f), k1 = all(0x1.a5a7dp-4f);  // 0.044715 of k0
  const Vec k0_rest = all(0x1.0de73ap-22f), k1_rest = all(-0x1.151aaep-29f);
  const Vec p = muladd(k1, q, k0), shifter = all(0x1.8p23f / (1 << kFraction));
  const Vec shifted = muladd(z, p, shifter), n = shifted - shifter;
  Vec g = fused(-z, p, n);
  if constexpr (twice) {
    Vec p_rest = fused(k1, q, k0 - p);
    p_rest = muladd(k1, fused(z, z, -q), p_rest) + muladd(k1_rest, q, k0_rest);
    g = muladd(-z, p_rest, g);
  }
  const Bits bits = (Bits)shifted;
  const Vec power = (Vec)(root(bits) - (bits << (23 - kFraction)));
  return muladd(power * g, exponential_rest(g), power);
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
NOINLINE inline Vec gelu_beyond(Vec z, Vec value) {
  for (int i = 0; i < L; ++i) {
    const double x = z[i], p = 0x1.26aec21bce759p+1 + 0x1.a5a7cf7572a98p-4 * x * x;
    if (x > kLimit) value[i] = z[i];
    if (x < -kLimit) value[i] = x > -12 ? float(x / (1 + __builtin_exp2(-x * p))) : -0.f;
    if (x < -__FLT_MAX__) value[i] = __builtin_nanf("");
  }
  return value;
}

// A result that is stored in 16 bits does not need s to twice float's precision.
template <bool twice>
INLINE Vec gelu(Vec z) {
  const Vec value = quotient(z, exponential<twice>(z, z * z) + 1);
  return any_beyond(z, kLimit) ? gelu_beyond(z, value) : value;
}

// σ + z·t'·σ·(1 − σ),  t' = 2·√(2/π)·(1 + 3·0.044715·z²); beyond ±kLimit it is 0 or 1. Its error is
// absolute, so s needs no more than float's precision. At ±∞ eager PyTorch has 0·∞, NaN; so has this.
INLINE Vec gelu_derivative(Vec z) {
  const Vec q = z * z, e = exponential<false>(z, q), sigma = quotient(all(1), e + 1);
  const Vec slope = z * muladd(q, all(0.21406444f), all(1.5957691f));
  const Vec value = muladd(slope * (e * sigma), sigma, sigma);
  if (!any_beyond(z, kLimit)) return value;
  const Vec limit = magnitude(z) > __FLT_MAX__ ? all(__builtin_nanf("")) : z < 0 ? Vec{} : all(1);
  return magnitude(z) > kLimit ? limit : value;
}

}  // namespace fastdit::FASTDIT_ISA
