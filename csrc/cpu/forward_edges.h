// The edges of the native forward: how a batch is shared among threads, what becomes of x and of the
// modulation rows before the first layer, and of the pixels behind the last.
#pragma once

#include <numeric>

#include "cpu/forward_shared.h"

namespace fastdit {

// Span that run through the layers together: the tokens [token, token + tokens) of samples
// [begin, end) of a call; a part of the tokens is of one sample.
struct Span {
  int64_t begin, end, token, tokens;
  int64_t samples() const { return end - begin; }
  int64_t count() const { return samples() * tokens; }
};

// x (B, C, H, W) as rows of patches, channel by channel as a convolution's weight lies.
inline void gather_patches(const Dit& d, const Tensor& x, Span rows, float* to, int64_t stride) {
  const int64_t sb = x.stride(0), sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  const float* image = static_cast<const float*>(x.data_ptr()) + rows.begin * sb;
  const double work = double(rows.count()) * d.patch_size();
  shared(rows.count(), work, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t token = rows.token + n % rows.tokens;
      const float* from = image + n / rows.tokens * sb +
                          token / d.grid_columns() * d.patch_rows * sh +
                          token % d.grid_columns() * d.patch_columns * sw;
      float* row = to + n * stride;
      for (int64_t c = 0; c < d.channels; ++c)
        for (int64_t i = 0; i < d.patch_rows; ++i)
          for (int64_t j = 0; j < d.patch_columns; ++j) *row++ = from[c * sc + i * sh + j * sw];
    }
  });
}

// Span of pixels (patch, patch, C) as the image (B, C, H, W).
inline void scatter_pixels(const Dit& d, const float* from, int64_t stride, Span rows, float* image) {
  const int64_t plane = d.height * d.width, size = d.out_channels * plane;
  shared(rows.count(), double(rows.count()) * d.pixels(), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t token = rows.token + n % rows.tokens;
      float* to = image + (rows.begin + n / rows.tokens) * size +
                  token / d.grid_columns() * d.patch_rows * d.width +
                  token % d.grid_columns() * d.patch_columns;
      const float* pixel = from + n * stride;
      for (int64_t i = 0; i < d.patch_rows; ++i)
        for (int64_t j = 0; j < d.patch_columns; ++j, pixel += d.out_channels)
          for (int64_t c = 0; c < d.out_channels; ++c)
            to[c * plane + i * d.width + j] = pixel[c];
    }
  });
}

// The modulation rows as padded vectors, each scale as 1 + scale.
inline void spread_modulations(const Dit& d, const Tensor& conditioning, int64_t first, int64_t batch,
                               float* to) {
  const int64_t width = padded(d.hidden), count = 6 * d.depth + 2, step = conditioning.stride(0);
  const float* from = static_cast<const float*>(conditioning.data_ptr()) + first * step;
  shared(batch * count, double(batch) * count * d.hidden, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t which = item % count;
      const float* row = from + item / count * step + which * d.hidden;
      const bool scale = which == count - 1 || (which < count - 2 && which % 3 == 1);
      float* out = to + item * width;
      for (int64_t i = 0; i < d.hidden; ++i) out[i] = row[i] + (scale ? 1.f : 0.f);
      std::fill(out + d.hidden, out + width, 0.f);
    }
  });
}

// How a batch is shared. As many samples as there are for every thread alike run in jobs, each by
// one thread from the first layer to the last: nobody waits, and what a thread wrote it finds in its
// own cache. A job reads all the weights, so it needs rows enough for them, or weights that all
// threads find in the last cache. Of the samples that are left each is cut into parts of its tokens:
// a thread has the same part in every layer, and waits for the others once in each, for their keys
// and values. Parts that would be too short are left to sharing within each layer.
struct Shares {
  int64_t jobs, alone, together, slots, most;  // samples alone and together; in the largest job
  int64_t parts = 1;  // of each sample of those together

  Shares(const Dit& d, int64_t batch, int64_t group) {
    constexpr int64_t kRows = 256;  // of a job, whose wide rows stay in the second-level cache
    constexpr int64_t kFewRows = 64, kCached = 4 << 20;  // floats
    const int64_t workers = threads(), each = batch / workers, tokens = d.tokens();
    const bool few = each * tokens < kFewRows && PackedLayout(d, group).floats > kCached;
    alone = few ? 0 : each * workers;
    together = batch - alone;
    const int64_t samples = std::max<int64_t>(1, kRows / tokens);
    jobs = alone ? workers * ((each + samples - 1) / samples) : 0;
    slots = std::max<int64_t>(1, std::min(workers, jobs));
    most = alone ? (alone + jobs - 1) / jobs : 0;
    if (!together) return;
    const int64_t least = workers / std::gcd(workers, together);  // as many parts for every thread
    const int64_t wanted = (tokens + least * kRows - 1) / (least * kRows) * least;
    if (tokens / wanted >= kFewRows) parts = wanted;
  }

  // Workspaces: one for each thread's job, or one for what is shared, after one another.
  int64_t slot(const Dit& d, int64_t group) const {
    return (Workspace(d, most, group, 1).floats + 15) / 16 * 16;
  }
  int64_t floats(const Dit& d, int64_t group) const {
    return std::max(slots * slot(d, group), Workspace(d, together, group, parts).floats);
  }
  Span job(const Dit& d, int64_t index) const {
    return {alone * index / jobs, alone * (index + 1) / jobs, 0, d.tokens()};
  }
  Span part(const Dit& d, int64_t index) const {
    const int64_t sample = alone + index / parts, p = index % parts, n = d.tokens();
    return {sample, sample + 1, n * p / parts, n * (p + 1) / parts - n * p / parts};
  }
};

}  // namespace fastdit
