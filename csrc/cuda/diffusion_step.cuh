// diffusion_step on CUDA: the kernels, without torch, so that a host compiler can run them too.
//
// The image kernel gives a thread 16 bytes of x: 4 floats or 8 halves, neighbours in one sample.
// The token kernel gives it 4 neighbouring pixels in pairs of channels, so that a pixel's
// channels, which are neighbours in the model's rows, are read once and together. x, noise and both
// results are then still accessed along the image. Both read each byte once, and both loop over
// whatever the grid does not cover.
#pragma once

#include "diffusion_step.h"

namespace fastdit {

constexpr int kBytes = 16;  // a thread's share of x
constexpr int kThreads = 128, kBlocks = 8;  // 8 blocks a multiprocessor: at most 64 registers

// ---- loads and stores: one wide access, or scalars at a tail or a misaligned address ------------

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// What a pack is stored as, by an intrinsic: nvcc 13.0 for sm_80 and sm_90 merges an ordinary wide
// store with the scalar ones of the other branch, into scalars for both.
template <int kSize>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};

template <class T, int N>
__device__ __forceinline__ bool is_wide(const T* place, int count) {
  return count == N && reinterpret_cast<uintptr_t>(place) % sizeof(Pack<T, N>) == 0;
}

template <class T, int N>
__device__ __forceinline__ void load(const T* __restrict__ from, int count, float (&to)[N]) {
  if (is_wide<T, N>(from, count)) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = to_float(pack.values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = j < count ? to_float(from[j]) : 0.0f;
  }
}

template <class T, int N>
__device__ __forceinline__ void store(const float (&from)[N], int count, T* __restrict__ to) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) from_float(from[j], pack.values[j]);
  if (is_wide<T, N>(to, count)) {
    using Wide = typename Word<sizeof pack>::type;
    Wide word;
    memcpy(&word, &pack, sizeof word);
    __stcs(reinterpret_cast<Wide*>(to), word);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < count) to[j] = pack.values[j];
    }
  }
}

// ---- what the elements of one sample share ------------------------------------------------------

// A thread's run of up to N neighbours among `size`: blocks of one sample follow each other.
struct Place {
  int64_t sample, first;
  int count;  // 0 or less beyond the sample's end
};

template <int N>
FASTDIT_HD int64_t blocks_for(int64_t size) {
  return (size + kThreads * N - 1) / (kThreads * N);
}

template <int N>
__device__ __forceinline__ Place place_of(int64_t size) {
  const uint32_t blocks = uint32_t(blocks_for<N>(size)), sample = blockIdx.x / blocks;
  const int64_t first = (int64_t(blockIdx.x - sample * blocks) * kThreads + threadIdx.x) * N;
  const int64_t left = size - first;
  return {int64_t(sample), first, int(left < N ? left : N)};
}

struct Sample {
  StepRow row;
  NoiseKey key;
};

// The host cannot look at the index: one outside the table makes the whole sample NaN.
__device__ __forceinline__ Sample sample_of(const StepCall& call, int64_t sample) {
  const int64_t step = call.step_of(sample);
  if (step < 0 || step >= call.rows) {
    const float nan = as_float(0x7FC00000u);
    return {{nan, nan, nan, nan, nan, nan, nan, nan, nan}, noise_key(call, sample)};
  }
  return {call.table[step], noise_key(call, sample)};
}

// N normals from `element` on, a multiple of 4 where `kAligned`.
template <bool kAligned, int N>
__device__ __forceinline__ void draw(const NoiseKey& key, int64_t element, float (&z)[N]) {
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    const int64_t group = element / 4 + j / 4;
    const Normals first = key.at(group);
    float run[8] = {first.z0, first.z1, first.z2, first.z3};
    const int skipped = kAligned ? 0 : int(element % 4);
    if (skipped != 0) {
      const Normals second = key.at(group + 1);
      run[4] = second.z0, run[5] = second.z1, run[6] = second.z2;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      z[j + i] = skipped < 2 ? (skipped == 0 ? run[i] : run[i + 1])
                             : (skipped == 2 ? run[i + 2] : run[i + 3]);
    }
  }
}

// N neighbouring elements of one sample, the first of them its element number `element`.
template <class X, bool kAligned, int N>
__device__ __forceinline__ void update(const StepCall& call, const Sample& sample, int64_t start,
                                       int64_t element, int count, const float (&e)[N],
                                       const float (&v)[N]) {
  const int64_t at = start + element;
  float x[N], extra[N], next[N], x0[N];
  load(static_cast<const X*>(call.x) + at, count, x);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    x0[j] = predicted_x0(sample.row, x[j], e[j], call.clip);
    next[j] = next_mean(sample.row, x[j], x0[j]);
  }
  if (call.previous != nullptr) {
    load(static_cast<const X*>(call.previous) + at, count, extra);
#pragma unroll
    for (int j = 0; j < N; ++j) next[j] += sample.row.cp * extra[j];
  }
  if (call.noisy()) {
    if (call.noise != nullptr) {
      load(static_cast<const X*>(call.noise) + at, count, extra);
    } else {
      draw<kAligned>(sample.key, element, extra);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float sigma = call.learned ? learned_sigma(sample.row, v[j]) : sample.row.sigma;
      next[j] += sigma * extra[j];
    }
  }
  // Last: a result may be any of the tensors read above.
  if (call.x0 != nullptr) store(x0, count, static_cast<X*>(call.x0) + at);
  store(next, count, static_cast<X*>(call.next) + at);
}

// ---- the model's output as an image (B or 2B, channels, ...) ------------------------------------

// Elements `from` on of one sample's output. The first `limit` of them are guided; `null` is the
// distance to the same element of the null half.
template <class M, int N>
__device__ __forceinline__ void load_guided(const M* cond, int64_t null, float guidance,
                                            int64_t limit, int count, float (&to)[N]) {
  load(cond, count, to);
  if (limit > 0) {
    float other[N];
    load(cond + null, count, other);
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = j < limit ? guided(to[j], other[j], guidance) : to[j];
  }
}

template <class X, class M>
__global__ void __launch_bounds__(kThreads, kBlocks) diffusion_step_image(StepCall call) {
  constexpr int N = kBytes / sizeof(X);
  const Place place = place_of<N>(call.sample_size());
  if (place.count <= 0) return;
  const int64_t size = call.sample_size(), element = place.first;
  const Sample sample = sample_of(call, place.sample);
  const M* cond = static_cast<const M*>(call.output) + place.sample * call.output_size() + element;
  const int64_t null = call.batch * call.output_size(), limit = call.guided * call.plane - element;
  float e[N], v[N];
  load_guided(cond, null, sample.row.guidance, limit, place.count, e);
  if (call.learned && call.noisy()) {
    load_guided(cond + size, null, sample.row.guidance, limit - size, place.count, v);
  }
  update<X, true>(call, sample, place.sample * size, element, place.count, e, v);
}

// ---- the model's output as token rows (B or 2B, T, patch_h·patch_w·channels) --------------------

constexpr int kPixels = 4, kChannels = 2;

// Channels `channel` on of each pixel, transposed: to[c][pixel].
template <class M>
__device__ __forceinline__ void load_pixels(const M* tokens, const int32_t (&place)[kPixels],
                                            int pixels, int64_t null, float guidance,
                                            int64_t guided_channels, int channel, int channels,
                                            float (&to)[kChannels][kPixels]) {
#pragma unroll
  for (int j = 0; j < kPixels; ++j) {
    float values[kChannels] = {};
    if (j < pixels) {
      const M* cond = tokens + place[j] + channel;
      load_guided(cond, null, guidance, guided_channels - channel, channels, values);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) to[c][j] = values[c];
  }
}

template <class X, class M>
__global__ void __launch_bounds__(kThreads, kBlocks) diffusion_step_tokens(StepCall call) {
  const Place run = place_of<kPixels>(call.plane);
  if (run.count <= 0) return;
  const Sample sample = sample_of(call, run.sample);
  const M* tokens = static_cast<const M*>(call.output) + run.sample * call.output_size();
  const int64_t null = call.batch * call.output_size();
  const int32_t channels = int32_t(call.channels);
  int32_t place[kPixels];
  TokenCursor cursor(call, int32_t(run.first));
#pragma unroll
  for (int j = 0; j < kPixels; ++j, cursor.advance()) place[j] = cursor.offset();
  for (int32_t channel = 0; channel < channels; channel += kChannels) {
    const int count = channels - channel < kChannels ? channels - channel : kChannels;
    float e[kChannels][kPixels], v[kChannels][kPixels];
    load_pixels(tokens, place, run.count, null, sample.row.guidance, call.guided, channel, count,
                e);
    if (call.learned && call.noisy()) {
      load_pixels(tokens, place, run.count, null, sample.row.guidance, call.guided,
                  channels + channel, count, v);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c < count) {
        const int64_t element = int64_t(channel + c) * call.plane + run.first;
        update<X, false>(call, sample, run.sample * call.sample_size(), element, run.count, e[c],
                         v[c]);
      }
    }
  }
}

}  // namespace fastdit
