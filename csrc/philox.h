// Normal numbers from a counter: Philox4x32-10 (Salmon et al. 2011) and Box-Muller.
//
// Element e of a sample's noise, in the order of the sample's own layout (C, ...), is
//
//     counter = (low 32 bits of e/4, high 32 bits of e/4, sample, step)     key = seed
//     (w0, w1, w2, w3) = Philox4x32-10(counter, key)
//     u = (w0 + 1/2)·2^-32 rounded to float32          θ = 2π·w1·2^-32
//     normals 0, 1 = sqrt(-2·log u)·(cos θ, sin θ)     and normals 2, 3 likewise of w2, w3
//
// and e's is number e mod 4. With curand's names: offset e/4, subsequence step·2^32 + sample.
// It depends on nothing else: not on the batch size, the number of threads or the device.
// fastdit/philox.py is the definition in PyTorch.
#pragma once

#include <cmath>

#include "scalar.h"

namespace fastdit {

struct Words {
  uint32_t w0, w1, w2, w3;
};

struct Normals {
  float z0, z1, z2, z3;
};

FASTDIT_HD uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return uint32_t((uint64_t(a) * b) >> 32);
#endif
}

FASTDIT_HD Words philox4x32_10(Words counter, uint32_t key0, uint32_t key1) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(0xD2511F53u, counter.w0), low0 = 0xD2511F53u * counter.w0;
    const uint32_t high1 = high_product(0xCD9E8D57u, counter.w2), low1 = 0xCD9E8D57u * counter.w2;
    counter = {high1 ^ counter.w1 ^ key0, low1, high0 ^ counter.w3 ^ key1, low0};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// (w + 1/2)·2^-32 rounded once: both halves of w, and their scaled values, are exact floats.
FASTDIT_HD float uniform(uint32_t w) {
  const float high = float(int32_t(w >> 16)), low = float(int32_t(w & 0xFFFFu));
  return high * 0x1p-16f + (low * 0x1p-32f + 0x1p-33f);
}

FASTDIT_HD void box_muller(uint32_t radius, uint32_t angle, float& z0, float& z1) {
  const float length = sqrtf(-2.0f * log_unit(uniform(radius)));
  // The angle as the nearest quarter turn and the rest of it, in [-1/2, 1/2) quarters.
  const uint32_t quarter = (angle + 0x20000000u) >> 30;
  const float rest = float(int32_t(angle - (quarter << 30))) * 0x1p-30f;
  float cosine, sine;
  cos_sin_quarter(rest, cosine, sine);
  const bool odd = quarter & 1u;
  const uint32_t cosine_sign = ((quarter + 1u) & 2u) << 30, sine_sign = (quarter & 2u) << 30;
  z0 = length * as_float(as_bits(odd ? sine : cosine) ^ cosine_sign);
  z1 = length * as_float(as_bits(odd ? cosine : sine) ^ sine_sign);
}

FASTDIT_HD Normals normals(Words words) {
  Normals z;
  box_muller(words.w0, words.w1, z.z0, z.z1);
  box_muller(words.w2, words.w3, z.z2, z.z3);
  return z;
}

// Normals 4·group to 4·group + 3 of one sample at one step.
FASTDIT_HD Normals normals_at(uint64_t seed, uint32_t sample, uint32_t step, uint64_t group) {
  const Words counter = {uint32_t(group), uint32_t(group >> 32), sample, step};
  return normals(philox4x32_10(counter, uint32_t(seed), uint32_t(seed >> 32)));
}

}  // namespace fastdit
