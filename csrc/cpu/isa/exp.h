// The exponential of numbers up to about zero, to an ulp or two of 1: softmax and SiLU.
#pragma once

#include "cpu/isa/vec.h"

namespace fastdit::FASTDIT_ISA {

// eˣ = 2ⁿ·2^g, n the integer nearest x·log₂e and g the rest, in [−1/2, 1/2], log₂e in two parts so
// that g loses nothing where n is large. Below −87 it is 0, above 88 infinity; NaN stays.
INLINE Vec exponential(Vec x) {
  const Vec high = all(0x1.715476p+0f), low = all(0x1.4ae0cp-26f), shifter = all(0x1.8p23f);
  const Vec bounded = max(min(x, all(88)), all(-87));
  const Vec shifted = muladd(bounded, high, shifter), n = shifted - shifter;
  const Vec g = muladd(bounded, low, muladd(bounded, high, -n));
  Vec m = all(0x1.4174aap-13f);  // 2^g = 1 + g·m, minimax
  m = muladd(m, g, all(0x1.5f096cp-10f));
  m = muladd(m, g, all(0x1.3b2dd8p-7f));
  m = muladd(m, g, all(0x1.c6af7ap-5f));
  m = muladd(m, g, all(0x1.ebfbdcp-3f));
  m = muladd(m, g, all(0x1.62e43p-1f));
  const Vec power = (Vec)((Bits)muladd(m, g, all(1)) + ((Bits)shifted << 23));
  const Vec upper = x > 88 ? all(__builtin_inff()) : power;
  const Vec value = x < -87 ? Vec{} : upper;
  return x == x ? value : x;
}

}  // namespace fastdit::FASTDIT_ISA
