// Numbers, the same on both sides: float, bfloat16 and half as they lie in memory, and the few
// functions that a compiler can neither vectorise nor carry over to the other side.
//
// All of it is branch-free, so that a plain loop around it becomes vector code.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTDIT_HD __host__ __device__ __forceinline__
#else
#define FASTDIT_HD inline __attribute__((always_inline))
#endif

namespace fastdit {

FASTDIT_HD float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FASTDIT_HD uint32_t as_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// ---- storage ------------------------------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};

struct half {
  uint16_t bits;
};

FASTDIT_HD float to_float(float value) { return value; }

FASTDIT_HD float to_float(bfloat16 value) { return as_float(uint32_t(value.bits) << 16); }

// A half's exponent and fraction shifted into a float's place are the value over 2^112, subnormals
// included; infinities and NaNs need the rest of the exponent.
FASTDIT_HD float to_float(half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t magnitude = uint32_t(value.bits & 0x7FFF) << 13;
  const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7F800000u;
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  return as_float((magnitude >= 0x0F800000u ? special : scaled) | sign);
#endif
}

FASTDIT_HD void from_float(float value, float& stored) { stored = value; }

// Both round to nearest, ties to even, and keep NaN a NaN.
FASTDIT_HD void from_float(float value, bfloat16& stored) {
#ifdef __CUDA_ARCH__
  stored.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  stored.bits = uint16_t((nan ? bits | 0x00400000u : rounded) >> 16);
#endif
}

FASTDIT_HD void from_float(float value, half& stored) {
#ifdef __CUDA_ARCH__
  stored.bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7FFFFFFFu;
  // Normal halves: rebias the exponent by 2^-112 and round off 13 bits. 65520 and more become
  // infinite. Subnormal ones: adding 1/2 leaves a float whose last bit is 2^-24, half's own.
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t result = magnitude >= 0x477FF000u ? special : finite;
  stored.bits = uint16_t(result | ((bits >> 16) & 0x8000u));
#endif
}

// ---- functions ----------------------------------------------------------------------------------
//
// Polynomials fitted for the least relative error on their interval. The errors in the comments are
// bounds on the whole function in float32; tests/csrc/philox.cpp holds it to them at every
// thirteenth float of its domain, or closer.

// The nearest integer, ties to even, for |x| < 2^22: adding 1.5·2^23 leaves no bits for a fraction.
constexpr float kRounding = 12582912.0f;

// log(u) for 0 < u <= 1 and u >= 2^-126; 0 at 1; relative error < 1.5e-7.
FASTDIT_HD float log_unit(float u) {
  // u = m·2^k with m in [sqrt(1/2), sqrt(2)).
  const uint32_t offset = as_bits(u) - 0x3F3504F3u;
  const int32_t k = int32_t(offset) >> 23;
  const float r = as_float(as_bits(u) - (uint32_t(k) << 23)) - 1.0f;
  float p = 0.08700361f;
  p = p * r - 0.14267477f;
  p = p * r + 0.14914787f;
  p = p * r - 0.16577587f;
  p = p * r + 0.19963062f;
  p = p * r - 0.25001338f;
  p = p * r + 0.3333391f;
  p = p * r - 0.5f;
  return float(k) * 0.6931472f + (p * r * r + r);
}

// exp(x) for every x, with infinity, zero, subnormal results and NaN; relative error < 2e-7.
FASTDIT_HD float exp_any(float x) {
  x = x > 128.0f ? 128.0f : x;
  x = x < -128.0f ? -128.0f : x;
  const float shifted = x * 1.44269504f + kRounding;
  const float k = shifted - kRounding;
  const float r = (x - k * 0.693145752f) - k * 1.42860677e-6f;
  float p = 0.0013814596f;
  p = p * r + 0.0083687175f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * r * r + r + 1.0f;
  // 2^k in two factors, as k runs from -185 to 185 and a float's exponent from -126 to 127.
  const int32_t whole = int32_t(as_bits(shifted) - as_bits(kRounding)), part = whole >> 1;
  return p * as_float(uint32_t(part + 127) << 23) * as_float(uint32_t(whole - part + 127) << 23);
}

// cos and sin of r·pi/2 for |r| <= 1/2; error < 1e-7.
FASTDIT_HD void cos_sin_quarter(float r, float& cosine, float& sine) {
  const float t = r * r;
  float c = 0.0009037665f;
  c = c * t - 0.020860165f;
  c = c * t + 0.25366923f;
  c = c * t - 1.2337005f;
  cosine = c * t + 1.0f;
  float s = -0.004601658f;
  s = s * t + 0.07968003f;
  s = s * t - 0.6459635f;
  s = s * t + 1.5707964f;
  sine = s * r;
}

}  // namespace fastdit
