// The one vector type of the CPU kernels: as many floats as the instruction set holds.
//
// Compiler vector extensions (GCC, Clang) instead of intrinsics: the same source compiles for
// every width and machine, NEON included. FASTDIT_LANES overrides the width, so that 16 lanes can
// be tested on a machine that has 8. Storage is float, bf16 or fp16; arithmetic is float.
//
// Everything stands in the namespace of its instruction set: two copies of one inline function,
// compiled with different flags, would otherwise be merged by the linker.
#pragma once

#include <cstdint>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef FASTDIT_ISA
#define FASTDIT_ISA baseline
#endif
#ifndef FASTDIT_LANES
#if defined(__AVX512F__)
#define FASTDIT_LANES 16
#elif defined(__AVX2__)
#define FASTDIT_LANES 8
#else
#define FASTDIT_LANES 4
#endif
#endif
#if (defined(__AVX512F__) && FASTDIT_LANES == 16) || (defined(__FMA__) && FASTDIT_LANES == 8) || \
    (defined(__ARM_FEATURE_FMA) && FASTDIT_LANES == 4)
#define FASTDIT_HAS_FMA
#endif
// On the function around a kernel's loops FLATTEN: their bodies are lambdas, and a body left out of
// line keeps its sums in memory. Under a sanitizer that would take a minute to compile.
#ifdef __SANITIZE_ADDRESS__
#define INLINE inline
#define FLATTEN
#else
#define INLINE inline __attribute__((always_inline))
#define FLATTEN __attribute__((flatten))
#endif
#define NOINLINE __attribute__((noinline))

#include "cpu/types.h"

namespace fastdit::FASTDIT_ISA {

constexpr int L = FASTDIT_LANES;

typedef float Vec __attribute__((vector_size(4 * L)));
typedef int32_t Ints __attribute__((vector_size(4 * L)));
typedef uint32_t Bits __attribute__((vector_size(4 * L)));
typedef uint16_t Halves __attribute__((vector_size(2 * L)));

INLINE Vec all(float value) { return Vec{} + value; }
// A NaN in `a` stays. GCC 12 does not see the instruction in the comparison: three instead of one.
INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Vec)_mm512_max_ps((__m512)b, (__m512)a);
#elif defined(__AVX2__) && FASTDIT_LANES == 8
  return (Vec)_mm256_max_ps((__m256)b, (__m256)a);
#else
  return b > a ? b : a;
#endif
}
INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Vec)_mm512_min_ps((__m512)b, (__m512)a);
#elif defined(__AVX2__) && FASTDIT_LANES == 8
  return (Vec)_mm256_min_ps((__m256)b, (__m256)a);
#else
  return b < a ? b : a;
#endif
}

// a·b + c: in one rounding where the instruction set has it, in two elsewhere.
INLINE Vec muladd(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && FASTDIT_LANES == 8
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA) && FASTDIT_LANES == 4
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// c − a·b, rounded as muladd rounds. The compiler does not see that −a needs no instruction of its own.
INLINE Vec submul(Vec c, Vec a, Vec b) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Vec)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && FASTDIT_LANES == 8
  return (Vec)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return muladd(-a, b, c);
#endif
}

// `v`, which the compiler then keeps in a register instead of loading it again.
INLINE Vec in_register(Vec v) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  asm("" : "+v"(v));
#elif defined(__AVX2__) && FASTDIT_LANES == 8
  asm("" : "+x"(v));
#endif
  return v;
}

// The part of a row that one vector covers: all of its lanes, or the first `lanes` of them.
struct Full {
  static constexpr int lanes = L;
};
struct Tail {
  int lanes;
};

// ---- storage to float ------------------------------------------------------------------------

// 16-bit to 32-bit integers and back. GCC 12 splits the general form into halves: 2x the time.
INLINE Bits extend(Halves bits) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Bits)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__) && FASTDIT_LANES == 8
  return (Bits)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Bits);
#endif
}
INLINE Halves truncate(Bits bits) {  // of numbers below 2^16
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Halves)_mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(__AVX2__) && FASTDIT_LANES == 8
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
#else
  return __builtin_convertvector(bits, Halves);
#endif
}

INLINE Vec widen(Halves bits, bf16) { return (Vec)(extend(bits) << 16); }

INLINE Vec widen(Halves bits, fp16) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Vec)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__) && FASTDIT_LANES == 8
  return (Vec)_mm256_cvtph_ps((__m128i)bits);
#else
  // Exponent and fraction move into float's places; the multiplication rebiases the exponent, and
  // makes subnormal numbers normal. Infinity and NaN get the largest exponent.
  const Bits wide = extend(bits), sign = (wide & 0x8000u) << 16;
  const Bits body = (wide & 0x7fffu) << 13;
  const Vec finite = (Vec)body * 0x1p112f;
  const Bits special = body | 0x7f800000u;
  return (Vec)(sign | (body >= (0x7c00u << 13) ? special : (Bits)finite));
#endif
}

INLINE Vec load(const float* from, Full) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
INLINE Vec load(const T* from, Full) {
  Halves bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return widen(bits, T{});
}
template <class T>
INLINE Vec load(const T* from, Tail part) {  // the absent lanes are zero
  T lanes[L] = {};
  for (int i = 0; i < part.lanes; ++i) lanes[i] = from[i];
  return load(lanes, Full{});
}

// Brings the cache line `ahead` numbers further on; it may lie outside of the tensor.
template <class T>
INLINE void prefetch(const T* from, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(from) + ahead * sizeof(T)));
}

template <class T>
INLINE void prefetch_result(T* to, int64_t ahead) {  // to be written to
  __builtin_prefetch(reinterpret_cast<void*>(uintptr_t(to) + ahead * sizeof(T)), 1);
}

// ---- float to storage, to nearest even ---------------------------------------------------------

INLINE Halves narrow(Vec value, bf16) {
  const Bits bits = (Bits)value;
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits quiet = bits | 0x400000u;
  return truncate((value == value ? rounded : quiet) >> 16);
}

INLINE Halves narrow(Vec value, fp16) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && FASTDIT_LANES == 8
  return (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  // Below 2^-14 the last place is 2^-24, as in float at 1/2: adding 1/2 rounds there. Above it the
  // 13 lost bits round in integers, where a carry reaches the exponent; too large is infinity.
  const Bits sign = (Bits)value & 0x80000000u, size = (Bits)value ^ sign;
  const Bits subnormal = (Bits)((Vec)size + all(0.5f)) - 0x3f000000u;
  const Bits normal = ((size + 0xfffu + ((size >> 13) & 1u)) >> 13) - (112u << 10);
  const Bits finite = size < 0x38800000u ? subnormal : normal;
  const Bits large = size > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits half = size >= 0x47800000u ? large : finite;  // from 65536; 65520 carries by itself
  return truncate(half | (sign >> 16));
#endif
}

INLINE void store(float* to, Vec value, Full) { __builtin_memcpy(to, &value, sizeof value); }
template <class T>
INLINE void store(T* to, Vec value, Full) {
  const Halves bits = narrow(value, T{});
  __builtin_memcpy(to, &bits, sizeof bits);
}
template <class T>
INLINE void store(T* to, Vec value, Tail part) {
  T lanes[L];
  store(lanes, value, Full{});
  for (int i = 0; i < part.lanes; ++i) to[i] = lanes[i];
}

// Stores `value` and returns it as stored; the absent lanes of a tail stay as they are.
template <class Part>
INLINE Vec store_rounded(float* to, Vec value, Part part) {
  store(to, value, part);
  return value;
}
template <class T, class Part>
INLINE Vec store_rounded(T* to, Vec value, Part part) {
  store(to, value, part);
  return widen(narrow(value, T{}), T{});
}

// ---- rows ---------------------------------------------------------------------------------------

// `value` with zeros in the lanes that the part does not cover.
INLINE Vec covered(Vec value, Full) { return value; }
INLINE Vec covered(Vec value, Tail part) {
  Ints lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  return lane < part.lanes ? value : Vec{};
}

// body(d, part, slot) over a row of `width`, `chains` vectors at a time: `slot` names the one of as
// many independent sums that hide the latency of an addition.
template <int chains = 4, class Body>
INLINE void sweep(int64_t width, Body body) {
  int64_t d = 0;
  for (; d + chains * L <= width; d += chains * L) {
#pragma GCC unroll 4
    for (int slot = 0; slot < chains; ++slot) body(d + slot * L, Full{}, slot);
  }
  if constexpr (chains > 1)
    for (; d + L <= width; d += L) body(d, Full{}, 0);
  if (d < width) body(d, Tail{int(width - d)}, 0);
}

// The sum of all lanes, halved again and again: the same order on every machine of one width.
INLINE float total(Vec v) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  typedef float Half __attribute__((vector_size(32)));
  const Half half = (Half)_mm512_castps512_ps256((__m512)v) +
                    (Half)_mm512_extractf32x8_ps((__m512)v, 1);
#elif defined(__AVX2__) && FASTDIT_LANES == 8
  const __m256 half = (__m256)v;
#endif
#if defined(__AVX2__) && FASTDIT_LANES >= 8 && (FASTDIT_LANES == 8 || defined(__AVX512F__))
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)half),
                           _mm256_extractf128_ps((__m256)half, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  for (int width = L / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
#endif
}
INLINE float total(const Vec (&sums)[4]) {
  return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
INLINE float total(const Vec (&sums)[2]) { return total(sums[0] + sums[1]); }

}  // namespace fastdit::FASTDIT_ISA
