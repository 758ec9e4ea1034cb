// The tanh form of GELU and its derivative, within two ulp of float everywhere.
//
//   gelu(z) = z·σ(t) = z / (1 + 2^−s),  t = 2·√(2/π)·(z + 0.044715·z³),  s = t·log₂e
//
// An error of s is a relative error of 2^−s, and s reaches −150 before gelu ends in subnormal
// numbers, so s is computed to twice float's precision: a rounded part and, by fused multiply-adds,
// what rounding lost. Two further roundings remain, of the sum and of the quotient.
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

// 2^−s = mantissa·2^−n, the mantissa in [0.7, 1.42]; the lowest nine bits of `shifted` are n's.
struct Power {
  Vec mantissa;
  Bits shifted;

  // scale·2^−s, where scale is a power of two that keeps it a normal number.
  INLINE Vec times(Vec scale) const { return (Vec)((Bits)(mantissa * scale) - (shifted << 23)); }
};

// k0 = 2·√(2/π)·log₂e is split at 2^−19, so that p − k0 is exact for every z.
template <bool twice>
INLINE Power power(Vec z) {
  const Vec k0 = all(0x1.26aecp+1f), k0_rest = all(0x1.0de73ap-22f);
  const Vec k1 = all(0x1.a5a7dp-4f), k1_rest = all(-0x1.151aaep-29f);  // 0.044715 of k0
  const Vec q = z * z, p = muladd(k1, q, k0), s = z * p;
  const Vec shifter = all(0x1.8p23f), shifted = s + shifter;  // rounds s to an integer
  Vec g = (shifted - shifter) - s;                            // in [−1/2, 1/2]
  if constexpr (twice) {
    const Vec q_rest = fused(z, z, -q);
    const Vec lost = muladd(k1, q_rest, muladd(k1_rest, q, k0_rest));
    const Vec p_rest = fused(k1, q, k0 - p) + lost;
    g -= muladd(z, p_rest, fused(z, p, -s));
  }
  Vec m = all(0x1.4174aap-13f);  // 2^g = 1 + g·m, minimax, to a fortieth of an ulp
  m = muladd(m, g, all(0x1.5f096cp-10f));
  m = muladd(m, g, all(0x1.3b2dd8p-7f));
  m = muladd(m, g, all(0x1.c6af7ap-5f));
  m = muladd(m, g, all(0x1.ebfbdcp-3f));
  m = muladd(m, g, all(0x1.62e43p-1f));
  return {muladd(m, g, all(1)), (Bits)shifted};
}

// max(z, 0) + gelu(−|z|): exact to a rounding where z is large. Beyond 9.5 numerator and denominator
// are scaled by 2^−64: 2^s would overflow, and the quotient rounds once even where it is subnormal.
// At −∞ eager PyTorch has 0·∞, NaN; so has this. A result that is stored in 16 bits does not need s
// to twice float's precision, which is a third of the time.
template <bool twice>
INLINE Vec gelu(Vec z) {
  const Vec size = z < 0 ? -z : z, bounded = min(size, all(11.5f));  // gelu(−11.5) is −0
  const Vec one = size > 9.5f ? all(0x1p-64f) : all(1);
  const Vec below = bounded * one / (one + power<twice>(-bounded).times(one));
  const Vec value = max(z, Vec{}) - below;
  return z < -__FLT_MAX__ ? all(__builtin_nanf("")) : value;
}

// σ + z·t'·σ·(1 − σ),  t' = 2·√(2/π)·(1 + 3·0.044715·z²); beyond ±10 it is 1, or less than 1e−35.
// Its error is absolute, so s needs no more than float's precision. At ±∞ eager PyTorch has 0·∞,
// NaN; so has this.
INLINE Vec gelu_derivative(Vec z) {
  const Vec bounded = min(max(z, all(-10)), all(10));
  const Vec e = power<false>(bounded).times(all(1)), sigma = 1 / (1 + e);
  const Vec slope = muladd(bounded * bounded, all(0.21406444f), all(1.5957691f));
  const Vec value = muladd(bounded * slope * (e * sigma), sigma, sigma);
  return (z < 0 ? -z : z) > __FLT_MAX__ ? all(__builtin_nanf("")) : value;
}

}  // namespace fastdit::FASTDIT_ISA
