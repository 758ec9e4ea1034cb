// diffusion_step for the CPU and for CUDA: one call's arguments and the arithmetic of one element.
//
//     e  = null + guidance·(cond − null)       on the first `guided` channels, else cond
//     x0 = a·x + b·e                           clamped to ±clip
//     σ  = sigma, or sigma·exp(½(f·max_log + (1 − f)·min_log)) with f = (v + 1)/2
//     x' = cx·x + c0·x0 + cp·previous + σ·z
//
// Everything is float32 between one load and one store of each tensor. The table and the step's
// index are read where the kernel runs, so that a captured CUDA graph replays for every step.
#pragma once

#include "philox.h"

namespace fastdit {

enum class Storage : int32_t { kFloat, kBFloat16, kHalf };

// A row of the sampler's table, in its order of columns.
struct StepRow {
  float a, b, cx, c0, cp, sigma, min_log, max_log, guidance;
};
static_assert(sizeof(StepRow) == 9 * sizeof(float));

// All tensors are contiguous. `plane` is the product of the axes behind the channels. Absent
// tensors are null pointers, of the results x0 alone. A result may be x, noise or previous, whole.
struct StepCall {
  const void *x, *output, *noise, *previous;
  void *next, *x0;
  const StepRow* table;
  const int64_t *step, *seed;
  int64_t batch, channels, plane, output_channels, guided, rows;
  int32_t step_per_sample, seed_per_sample;  // strides: 0 where one serves all samples
  int32_t learned;
  float clip;  // infinity does not clamp
  // Token layout: patch_w is 0 for an image. A signal is an image of height 1.
  int32_t width, patch_h, patch_w;
  Storage x_storage, output_storage;

  FASTDIT_HD int64_t sample_size() const { return channels * plane; }
  FASTDIT_HD int64_t output_size() const { return output_channels * plane; }
  FASTDIT_HD bool tokens() const { return patch_w != 0; }
  FASTDIT_HD bool noisy() const { return noise != nullptr || seed != nullptr; }
  FASTDIT_HD int64_t step_of(int64_t sample) const { return step[sample * step_per_sample]; }
};

// What, beside the element's place, decides a sample's noise.
struct NoiseKey {
  uint64_t seed;
  uint32_t sample, step;

  FASTDIT_HD Normals at(uint64_t group) const { return normals_at(seed, sample, step, group); }
};

// With a seed for each sample, the sample's place in the batch counts for nothing.
FASTDIT_HD NoiseKey noise_key(const StepCall& call, int64_t sample) {
  if (call.seed == nullptr) return {};
  const uint64_t seed = uint64_t(call.seed[sample * call.seed_per_sample]);
  const uint32_t index = call.seed_per_sample ? 0u : uint32_t(sample);
  return {seed, index, uint32_t(call.step_of(sample))};
}

FASTDIT_HD float guided(float cond, float null, float guidance) {
  return null + guidance * (cond - null);
}

// Comparisons, not fmin and fmax, which would hide a NaN.
FASTDIT_HD float clamped(float value, float limit) {
  value = value > limit ? limit : value;
  return value < -limit ? -limit : value;
}

// F is float, or a vector of them.
template <class F>
FASTDIT_HD F unclamped_x0(const StepRow& row, F x, F e) {
  return row.a * x + row.b * e;
}

FASTDIT_HD float predicted_x0(const StepRow& row, float x, float e, float clip) {
  return clamped(unclamped_x0(row, x, e), clip);
}

FASTDIT_HD float learned_sigma(const StepRow& row, float v) {
  const float f = (v + 1.0f) * 0.5f;
  return row.sigma * exp_any(0.5f * (f * row.max_log + (1.0f - f) * row.min_log));
}

template <class F>
FASTDIT_HD F next_mean(const StepRow& row, F x, F x0) {
  return row.cx * x + row.c0 * x0;
}

// ---- token layout -------------------------------------------------------------------------------

// Walks a sample's pixels in the image's order and tells where each one's channels stand in the
// token rows: token (y / patch_h, x / patch_w), and in it the pixel (y % patch_h, x % patch_w).
class TokenCursor {
 public:
  FASTDIT_HD TokenCursor(const StepCall& call, int32_t pixel)
      : width_(call.width),
        patch_h_(call.patch_h),
        patch_w_(call.patch_w),
        channels_(int32_t(call.output_channels)),
        skip_((call.patch_h - 1) * call.patch_w * channels_) {
    const int32_t y = pixel / width_, row = y / patch_h_;
    x_ = pixel - y * width_;
    y_inside_ = y - row * patch_h_;
    const int32_t column = x_ / patch_w_;
    x_inside_ = x_ - column * patch_w_;
    row_start_ = (row * patch_h_ * width_ + y_inside_ * patch_w_) * channels_;
    offset_ = row_start_ + column * (skip_ + patch_w_ * channels_) + x_inside_ * channels_;
  }

  // Of the pixel's first channel, from the sample's first element.
  FASTDIT_HD int32_t offset() const { return offset_; }

  FASTDIT_HD void advance() {
    offset_ += channels_;
    if (++x_inside_ == patch_w_) {
      x_inside_ = 0;
      offset_ += skip_;
    }
    if (++x_ == width_) {
      x_ = 0;
      ++y_inside_;
      row_start_ += patch_w_ * channels_;
      if (y_inside_ == patch_h_) {
        y_inside_ = 0;
        row_start_ += patch_h_ * width_ * channels_ - skip_ - patch_w_ * channels_;
      }
      offset_ = row_start_;
    }
  }

 private:
  int32_t width_, patch_h_, patch_w_, channels_, skip_;
  int32_t x_, x_inside_, y_inside_, row_start_, offset_;
};

}  // namespace fastdit
