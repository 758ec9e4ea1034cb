// The tanh form of GELU and its derivative, within two ulp of float everywhere.
//
//   gelu(−a) = −a·σ(−t) = −a·2^−s / (2^−s + 1),   t = 2·√(2/π)·(a + 0.044715·a³),   s = t·log₂e
//   gelu(z) = max(z, 0) + gelu(−|z|)
//
// s is rounded to n + j/2^J; what is left, g, is small enough for a polynomial of two to five
// terms, 2^(j/2^J) comes from a table that fits a register, and w = 2^−n scales the quotient. w and
// the table share a factor c_j: the bits of s, subtracted from those of a constant, are then c_j·w,
// in one instruction.
//
// An error of s is a relative error of 2^−s, and s reaches 150 before gelu ends in subnormal
// numbers, so g is computed to twice float's precision, by fused multiply-adds of what rounding
// lost. Where the quotient's reciprocal is estimated (AVX-512) one step of Newton corrects the
// quotient itself: 2^−28 beside its rounding.
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

// ---- c_j·2^(j/2^J) and the polynomial for what is left -------------------------------------------
// kUnit has the bits of c_0; c_j are its successors at steps of 2^(23−J), rescaled to a binade, and
// chosen so that table entries lie just below 2, where a rounding is half as large.

#if defined(__AVX512F__) && FASTDIT_LANES == 16
constexpr int kFraction = 4;  // J
constexpr uint32_t kUnit = 0x3fef5000u;
INLINE Vec scaled_root(Bits bits) {
  const Vec table = {0x1.deap+0f,    0x1.e31b6ep+0f, 0x1.e70c4ap+0f, 0x1.ea641p+0f,
                     0x1.ed1334p+0f, 0x1.ef091cp+0f, 0x1.f03408p+0f, 0x1.f08102p+0f,
                     0x1.efdbdp+0f,  0x1.ee2ed6p+0f, 0x1.eb630ep+0f, 0x1.e75fe8p+0f,
                     0x1.e20b3cp+0f, 0x1.db4926p+0f, 0x1.d43ec4p+0f, 0x1.d9a78ep+0f};
  return (Vec)_mm512_permutexvar_ps((__m512i)bits, (__m512)table);
}
INLINE Vec quotient(Vec a, Vec d) {
  const Vec inverse = (Vec)_mm512_rcp14_ps((__m512)d), q = a * inverse;
  return muladd((Vec)_mm512_fnmadd_ps((__m512)d, (__m512)q, (__m512)a), inverse, q);
}
#elif defined(__AVX2__) && FASTDIT_LANES == 8
constexpr int kFraction = 3;
constexpr uint32_t kUnit = 0x3fe8f000u;
INLINE Vec scaled_root(Bits bits) {
  const Vec table = {0x1.d1ep+0f,    0x1.d924ep+0f,  0x1.dde9ap+0f,  0x1.dfab24p+0f,
                     0x1.ddd3dp+0f,  0x1.d7b946p+0f, 0x1.cc99dcp+0f, 0x1.c88daap+0f};
  return (Vec)_mm256_permutevar8x32_ps((__m256)table, (__m256i)bits);
}
INLINE Vec quotient(Vec a, Vec d) { return a / d; }
#else
constexpr int kFraction = 0;
constexpr uint32_t kUnit = 0x3fb40000u;  // 1.40625: times 2^g it is between 0.99 and 1.99
INLINE Vec scaled_root(Bits) { return all(1.40625f); }
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

constexpr float kLargest = 0x1.40feaep+3f;  // where s is 127: above it w's bits would wrap
constexpr float kTail = 0x1.40089p+3f;      // where s is 126: w is normal up to there

// σ(−t) = w/sum for t ≥ 0, up to a = kLargest; w is then 2^−127 or less, but not zero.
struct Sigmoid {
  Vec w, sum;
};

// k0 = 2·√(2/π)·log₂e is split at 2^−19, so that p − k0 is exact for every a.
template <bool twice>
INLINE Sigmoid sigmoid(Vec a, Vec q) {
  const Vec k0 = all(0x1.26aecp+1f), k1 = all(0x1.a5a7dp-4f);  // 0.044715 of k0
  const Vec k0_rest = all(0x1.0de73ap-22f), k1_rest = all(-0x1.151aaep-29f);
  const Vec p = muladd(k1, q, k0), shifter = all(0x1.8p23f / (1 << kFraction));
  const Vec shifted = muladd(a, p, shifter), n = shifted - shifter;
  Vec g = fused(a, p, -n);
  if constexpr (twice) {
    Vec p_rest = fused(k1, q, k0 - p);
    p_rest = muladd(k1, fused(a, a, -q), p_rest) + muladd(k1_rest, q, k0_rest);
    g = muladd(a, p_rest, g);
  }
  const Bits bits = (Bits)shifted;
  const Vec root = scaled_root(bits), w = (Vec)(kUnit - (bits << (23 - kFraction)));
  return {w, muladd(root * g, exponential_rest(g), root) + w};
}

// Beyond kTail: in double, a lane at a time, rounded once to what may be a subnormal number; below −12
// zero, and at −∞, where eager PyTorch has 0·∞, NaN.
NOINLINE inline Vec gelu_tail(Vec z, Vec value) {
  for (int i = 0; i < L; ++i) {
    const double x = z[i], p = 0x1.26aec21bce759p+1 + 0x1.a5a7cf7572a98p-4 * x * x;
    if (x < -kTail) value[i] = x > -12 ? float(x / (1 + __builtin_exp2(-x * p))) : -0.f;
    if (x < -__FLT_MAX__) value[i] = __builtin_nanf("");
  }
  return value;
}

// Whether any lane is below the limit. A branch that data hardly takes costs less than its work.
INLINE bool any_below(Vec z, float limit) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return _mm512_cmp_ps_mask((__m512)z, _mm512_set1_ps(limit), _CMP_LT_OQ);
#elif defined(__AVX2__) && FASTDIT_LANES == 8
  return _mm256_movemask_ps((__m256)(z < limit));
#else
  const Ints below = z < limit;
  int32_t any = 0;
  for (int i = 0; i < L; ++i) any |= below[i];
  return any;
#endif
}

// A result that is stored in 16 bits does not need s to twice float's precision.
template <bool twice>
INLINE Vec gelu(Vec z) {
  const Vec a = min(magnitude(z), all(kLargest));
  const Sigmoid s = sigmoid<twice>(a, a * a);
  const Vec value = muladd(-quotient(a, s.sum), s.w, max(z, Vec{}));
  return any_below(z, -kTail) ? gelu_tail(z, value) : value;
}

// σ + z·t'·σ·(1 − σ),  t' = 2·√(2/π)·(1 + 3·0.044715·z²); beyond kLargest it is 0 or 1. Its error is
// absolute, so s needs no more than float's precision. At ±∞ eager PyTorch has 0·∞, NaN; so has this.
INLINE Vec gelu_derivative(Vec z) {
  const Vec size = magnitude(z), a = min(size, all(kLargest)), q = a * a;
  const Sigmoid s = sigmoid<false>(a, q);
  const Vec below = quotient(s.w, s.sum), sigma = z < 0 ? below : 1 - below;
  const Vec slope = z * muladd(q, all(0.21406444f), all(1.5957691f));
  const Vec value = muladd(slope, muladd(-below, below, below), sigma);
  if (!any_below(-size, -kLargest)) return value;
  const Vec limit = size > __FLT_MAX__ ? all(__builtin_nanf("")) : z < 0 ? Vec{} : all(1);
  return size > kLargest ? limit : value;
}

}  // namespace fastdit::FASTDIT_ISA
