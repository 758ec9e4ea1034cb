// Powers of 2 and the exponential, to an ulp or two: softmax and SiLU, a step's learned deviation.
#pragma once

#include "cpu/isa/vec.h"

namespace fastdit::FASTDIT_ISA {

// 2^g for g in [−1/2, 1/2]: 1 + g·m, minimax.
INLINE Vec power_of_fraction(Vec g) {
  Vec m = all(0x1.4174aap-13f);
  m = muladd(m, g, all(0x1.5f096cp-10f));
  m = muladd(m, g, all(0x1.3b2dd8p-7f));
  m = muladd(m, g, all(0x1.c6af7ap-5f));
  m = muladd(m, g, all(0x1.ebfbdcp-3f));
  m = muladd(m, g, all(0x1.62e43p-1f));
  return muladd(m, g, all(1));
}

// 2^y for every y, with infinity, subnormal results, zero and NaN.
INLINE Vec any_power_of_two(Vec y) {
  const Vec bounded = max(min(y, all(160)), all(-160));
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  const __m512 whole = _mm512_roundscale_ps((__m512)bounded, _MM_FROUND_TO_NEAREST_INT);
  return (Vec)_mm512_scalef_ps((__m512)power_of_fraction(bounded - (Vec)whole), whole);
#else
  const Vec shifter = all(0x1.8p23f), shifted = bounded + shifter;
  // In two factors: whole runs from -160 to 160 and a float's exponent from -126 to 127.
  const Ints whole = (Ints)shifted - (Ints)shifter, part = whole >> 1;
  const Vec power = power_of_fraction(bounded - (shifted - shifter));
  return power * (Vec)((part + 127) << 23) * (Vec)((whole - part + 127) << 23);
#endif
}

// eˣ = 2ⁿ·2^g, n the integer nearest x·log₂e and g the rest, in [−1/2, 1/2], log₂e in two parts so
// that g loses nothing where n is large. Below −87 it is 0, above 88 infinity; NaN stays.
INLINE Vec exponential(Vec x) {
  const Vec high = all(0x1.715476p+0f), low = all(0x1.4ae0cp-26f), shifter = all(0x1.8p23f);
  const Vec bounded = max(min(x, all(88)), all(-87));
  const Vec shifted = muladd(bounded, high, shifter), n = shifted - shifter;
  const Vec g = muladd(bounded, low, muladd(bounded, high, -n));
  const Vec power = (Vec)((Bits)power_of_fraction(g) + ((Bits)shifted << 23));
  const Vec upper = x > 88 ? all(__builtin_inff()) : power;
  const Vec value = x < -87 ? Vec{} : upper;
  return x == x ? value : x;
}

// 2^y of y ≤ 0, for a softmax: no weight needs y to more than float's precision, since 2^y is small
// where y is large. Below 2^−126 it is 0 or next to it; NaN stays.
INLINE Vec power_of_two(Vec y) {
  const Vec shifter = all(0x1.8p23f), bounded = max(y, all(-200));
  const Vec shifted = bounded + shifter, n = shifted - shifter, g = bounded - n;
  const Vec power = power_of_fraction(g);
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Vec)_mm512_scalef_ps((__m512)power, (__m512)n);
#else
  const Vec value = y < -126 ? Vec{} : (Vec)((Bits)power + ((Bits)shifted << 23));
  return y == y ? value : y;
#endif
}

}  // namespace fastdit::FASTDIT_ISA
