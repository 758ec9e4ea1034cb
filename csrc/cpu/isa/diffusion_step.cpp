// diffusion_step on the CPU, compiled once for each instruction set: plain loops that the compiler
// vectorises, on chunks of one sample that fit the first-level cache.
//
// Every operand of a chunk is brought to float32: a pointer into a float tensor, or a buffer filled
// from half precision, from token rows or from Philox. One loop then does all the arithmetic. The
// chunks are the same for any number of threads, and so are the results' bits.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/diffusion_step_chunks.h"

#include "cpu/isa/exp.h"

namespace fastdit::FASTDIT_ISA {
namespace {

// ---- to and from float32 ------------------------------------------------------------------------

template <class T>
void widen(const T* from, int count, float* __restrict to) {
  for (int i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

// `count` elements of a tensor from `at` on, in place if they are floats, else in the buffer.
const float* fetch(const void* tensor, Storage storage, int64_t at, int count, float* buffer) {
  if (storage == Storage::kFloat) return static_cast<const float*>(tensor) + at;
  if (storage == Storage::kBFloat16) {
    widen(static_cast<const bfloat16*>(tensor) + at, count, buffer);
  } else {
    widen(static_cast<const half*>(tensor) + at, count, buffer);
  }
  return buffer;
}

template <class T>
void narrow(const float* from, int count, T* __restrict to) {
  for (int i = 0; i < count; ++i) from_float(from[i], to[i]);
}

// Where a chunk's results go: the tensor itself, or a buffer that `finish` rounds.
float* results(void* tensor, Storage storage, int64_t at, float* buffer) {
  return storage == Storage::kFloat ? static_cast<float*>(tensor) + at : buffer;
}

void finish(void* tensor, Storage storage, int64_t at, int count, const float* buffer) {
  if (storage == Storage::kBFloat16) narrow(buffer, count, static_cast<bfloat16*>(tensor) + at);
  if (storage == Storage::kHalf) narrow(buffer, count, static_cast<half*>(tensor) + at);
}

// ---- the model's output -------------------------------------------------------------------------

// `count` neighbours of one row of pixels in one channel, the first of them number `inside` of its
// token. Every patch_w-th of them is one token further on: patch_w loops without a branch.
template <class T>
void gather_row(const T* from, int64_t inside, int64_t patch_w, int64_t pixel, int64_t token,
                int count, float* __restrict to) {
  for (int64_t i = 0; i < patch_w && i < count; ++i) {
    const int64_t place = inside + i, wraps = place / patch_w;
    const T* start = from + i * pixel + wraps * (token - patch_w * pixel);
    const int steps = int((count - i + patch_w - 1) / patch_w);
    for (int step = 0; step < steps; ++step) {
      to[i + step * patch_w] = to_float(start[step * token]);
    }
  }
}

// Elements `first` on of a sample's output, in the image's order, gathered from token rows.
template <class T>
void gather(const StepCall& call, const T* tokens, int64_t first, int count, float* __restrict to) {
  const int64_t pixel_size = call.output_channels;
  const int64_t token_size = call.patch_h * call.patch_w * pixel_size;
  int64_t channel = first / call.plane, pixel = first - channel * call.plane;
  for (int done = 0; done < count;) {
    const int64_t x = pixel % call.width, rest = call.width - x;
    const int length = rest < count - done ? int(rest) : count - done;
    const T* from = tokens + TokenCursor(call, int32_t(pixel)).offset() + channel;
    gather_row(from, x % call.patch_w, call.patch_w, pixel_size, token_size, length, to + done);
    done += length;
    pixel += length;
    if (pixel == call.plane) pixel = 0, ++channel;
  }
}

const float* fetch_output(const StepCall& call, int64_t sample, int64_t first, int count,
                          float* buffer) {
  const int64_t at = sample * call.output_size();
  if (!call.tokens()) return fetch(call.output, call.output_storage, at + first, count, buffer);
  if (call.output_storage == Storage::kFloat) {
    gather(call, static_cast<const float*>(call.output) + at, first, count, buffer);
  } else if (call.output_storage == Storage::kBFloat16) {
    gather(call, static_cast<const bfloat16*>(call.output) + at, first, count, buffer);
  } else {
    gather(call, static_cast<const half*>(call.output) + at, first, count, buffer);
  }
  return buffer;
}

// The same, guided where the channels are: `null` is another buffer.
const float* fetch_guided(const StepCall& call, int64_t sample, float guidance, int64_t first,
                          int count, float* buffer, float* null) {
  const float* cond = fetch_output(call, sample, first, count, buffer);
  const int64_t limit = call.guided * call.plane - first;
  if (limit <= 0) return cond;
  const float* other = fetch_output(call, call.batch + sample, first, count, null);
  const int guided_count = limit < count ? int(limit) : count;
  for (int i = 0; i < guided_count; ++i) buffer[i] = guided(cond[i], other[i], guidance);
  for (int i = guided_count; i < count; ++i) buffer[i] = cond[i];
  return buffer;
}

// ---- noise --------------------------------------------------------------------------------------

constexpr int kGroups = kChunk / 4;
static_assert(kGroups % 8 == 0);

#if defined(__AVX2__)
// Eight groups at a time, four in each register, a word in each 64-bit lane: the product of two low
// halves is one instruction, and what it leaves in a high half the next product ignores. A compiler
// that is given the loop below spends its time on moving halves about: noise then costs
// 1.3 ns an element in all, not 1.0.
void draw_words(const NoiseKey& key, uint64_t first, int groups, uint32_t (&words)[4][kGroups]) {
  const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53);
  const __m256i multiplier1 = _mm256_set1_epi64x(0xCD9E8D57);
  for (int i = 0; i < groups; i += 8) {
    __m256i c[2][4];
    for (int part = 0; part < 2; ++part) {
      const __m256i group = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(first) + i + 4 * part),
                                             _mm256_setr_epi64x(0, 1, 2, 3));
      c[part][0] = group, c[part][1] = _mm256_srli_epi64(group, 32);
      c[part][2] = _mm256_set1_epi64x(key.sample), c[part][3] = _mm256_set1_epi64x(key.step);
    }
    uint32_t key0 = uint32_t(key.seed), key1 = uint32_t(key.seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
      const __m256i k0 = _mm256_set1_epi64x(key0), k1 = _mm256_set1_epi64x(key1);
      for (auto& [c0, c1, c2, c3] : c) {
        const __m256i product0 = _mm256_mul_epu32(c0, multiplier0);
        const __m256i product1 = _mm256_mul_epu32(c2, multiplier1);
        c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1), k0);
        c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3), k1);
        c1 = product1, c3 = product0;
      }
    }
    for (int word = 0; word < 4; ++word) {
      const __m256i even = _mm256_shuffle_epi32(c[0][word], 0x08);
      const __m256i odd = _mm256_shuffle_epi32(c[1][word], 0x08);
      const __m256i low = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(even, odd), 0xD8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[word] + i), low);
    }
  }
}
#else
void draw_words(const NoiseKey& key, uint64_t first, int groups, uint32_t (&words)[4][kGroups]) {
  for (int i = 0; i < groups; ++i) {
    const uint64_t group = first + uint64_t(i);
    const Words counter = {uint32_t(group), uint32_t(group >> 32), key.sample, key.step};
    const Words drawn = philox4x32_10(counter, uint32_t(key.seed), uint32_t(key.seed >> 32));
    words[0][i] = drawn.w0, words[1][i] = drawn.w1, words[2][i] = drawn.w2, words[3][i] = drawn.w3;
  }
}
#endif

// Normals `first`, a multiple of 4, on; the buffer has room for a multiple of 4.
void draw(const NoiseKey& key, int64_t first, int count, float* __restrict to) {
  uint32_t words[4][kGroups];
  const int groups = (count + 3) / 4;
  draw_words(key, uint64_t(first) / 4, groups, words);
  for (int i = 0; i < groups; ++i) {
    const Normals z = normals({words[0][i], words[1][i], words[2][i], words[3][i]});
    to[4 * i] = z.z0, to[4 * i + 1] = z.z1, to[4 * i + 2] = z.z2, to[4 * i + 3] = z.z3;
  }
}

// ---- the update ---------------------------------------------------------------------------------

enum Sigma { kNone, kFixed, kLearned };

// One chunk, in vectors. A result may be x, z or previous: each is read before it is written there.
// The learned deviation sigma·exp(½(f·max_log + (1 − f)·min_log)) with f = (v + 1)/2 is
// sigma·2^(slope·v + centre), half of the instructions.
template <Sigma kSigma, bool kPrevious>
FLATTEN void update(const StepRow& row, float clip, int count, const float* x, const float* e,
                    const float* v, const float* z, const float* previous, float* next,
                    float* x0) {
  constexpr double kQuarter = 0.25 * 1.4426950408889634;
  const Vec slope = all(float(kQuarter * (double(row.max_log) - row.min_log)));
  const Vec centre = all(float(kQuarter * (double(row.max_log) + row.min_log)));
  const Vec sigma = all(row.sigma), limit = all(clip);
  sweep<2>(count, [&](int64_t i, auto part, int) {
    const Vec at = load(x + i, part);
    const Vec predicted = max(min(unclamped_x0(row, at, load(e + i, part)), limit), -limit);
    Vec value = next_mean(row, at, predicted);
    if constexpr (kPrevious) value = muladd(all(row.cp), load(previous + i, part), value);
    if constexpr (kSigma == kFixed) value = muladd(sigma, load(z + i, part), value);
    if constexpr (kSigma == kLearned) {
      const Vec power = any_power_of_two(muladd(slope, load(v + i, part), centre));
      value = muladd(sigma * power, load(z + i, part), value);
    }
    store(x0 + i, predicted, part);
    store(next + i, value, part);
  });
}

template <Sigma kSigma, bool kPrevious>
void step_chunk(const StepCall& call, int64_t sample, int64_t first, int count) {
  alignas(64) float buffer[9][kChunk];
  const int64_t at = sample * call.sample_size() + first;
  const StepRow row = call.table[call.step_of(sample)];
  const Storage storage = call.x_storage;
  const float* x = fetch(call.x, storage, at, count, buffer[0]);
  const float* e =
      fetch_guided(call, sample, row.guidance, first, count, buffer[1], buffer[2]);
  const float *v = nullptr, *z = nullptr, *previous = nullptr;
  if constexpr (kSigma == kLearned) {
    const int64_t second = call.sample_size() + first;
    v = fetch_guided(call, sample, row.guidance, second, count, buffer[3], buffer[4]);
  }
  if constexpr (kSigma != kNone) {
    if (call.noise == nullptr) draw(noise_key(call, sample), first, count, buffer[5]);
    z = call.noise ? fetch(call.noise, storage, at, count, buffer[5]) : buffer[5];
  }
  if constexpr (kPrevious) previous = fetch(call.previous, storage, at, count, buffer[6]);
  float* next = results(call.next, storage, at, buffer[7]);
  float* x0 = call.x0 ? results(call.x0, storage, at, buffer[8]) : buffer[8];
  update<kSigma, kPrevious>(row, call.clip, count, x, e, v, z, previous, next, x0);
  finish(call.next, storage, at, count, next);
  if (call.x0) finish(call.x0, storage, at, count, x0);
}

template <Sigma kSigma, bool kPrevious>
void step_chunks(const StepCall& call, int64_t begin, int64_t end) {
  const int64_t size = call.sample_size(), chunks = chunks_of(call);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t sample = chunk / chunks, first = (chunk - sample * chunks) * kChunk;
    const int64_t left = size - first;
    step_chunk<kSigma, kPrevious>(call, sample, first, left < kChunk ? int(left) : kChunk);
  }
}

}  // namespace

void diffusion_step(const StepCall& call, int64_t begin, int64_t end) {
  const bool previous = call.previous != nullptr;
  if (!call.noisy()) {
    (previous ? step_chunks<kNone, true> : step_chunks<kNone, false>)(call, begin, end);
  } else if (call.learned) {
    (previous ? step_chunks<kLearned, true> : step_chunks<kLearned, false>)(call, begin, end);
  } else {
    (previous ? step_chunks<kFixed, true> : step_chunks<kFixed, false>)(call, begin, end);
  }
}

}  // namespace fastdit::FASTDIT_ISA
