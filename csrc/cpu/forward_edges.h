// The edges of the native forward: how a batch is shared among threads, what becomes of x and of the
// modulation rows before the first layer, and of the pixels behind the last.
#pragma once

#include "cpu/forward_shared.h"

namespace fastdit {

// Samples [begin, end) of a call.
struct Samples {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// x (B, C, H, W) as rows of patches, channel by channel as a convolution's weight lies.
inline void gather_patches(const Dit& d, const Tensor& x, Samples samples, float* to, int64_t stride) {
  const int64_t sb = x.stride(0), sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  const float* image = static_cast<const float*>(x.data_ptr()) + samples.begin * sb;
  const int64_t lines = samples.count() * d.grid_rows();
  shared(lines, double(lines) * d.grid_columns() * d.patch_size(), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const float* from = image + line / d.grid_rows() * sb + line % d.grid_rows() * d.patch_rows * sh;
      for (int64_t column = 0; column < d.grid_columns(); ++column) {
        float* row = to + (line * d.grid_columns() + column) * stride;
        for (int64_t c = 0; c < d.channels; ++c)
          for (int64_t i = 0; i < d.patch_rows; ++i)
            for (int64_t j = 0; j < d.patch_columns; ++j)
              *row++ = from[c * sc + i * sh + (column * d.patch_columns + j) * sw];
      }
    }
  });
}

// Rows of pixels (patch, patch, C) as the image (B, C, H, W).
inline void scatter_pixels(const Dit& d, const float* rows, int64_t stride, int64_t batch, float* image) {
  const int64_t lines = batch * d.grid_rows(), plane = d.height * d.width;
  shared(lines, double(batch) * d.out_channels * plane, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t sample = line / d.grid_rows();
      float* to = image + sample * d.out_channels * plane +
                  line % d.grid_rows() * d.patch_rows * d.width;
      const float* from = rows + line * d.grid_columns() * stride;
      for (int64_t c = 0; c < d.out_channels; ++c)
        for (int64_t i = 0; i < d.patch_rows; ++i)
          for (int64_t w = 0; w < d.width; ++w) {
            const int64_t pixel = i * d.patch_columns + w % d.patch_columns;
            to[c * plane + i * d.width + w] =
                from[w / d.patch_columns * stride + pixel * d.out_channels + c];
          }
    }
  });
}

// The modulation rows as padded vectors, each scale as 1 + scale.
inline void spread_modulations(const Dit& d, const Tensor& conditioning, Samples samples, float* to) {
  const int64_t batch = samples.count(), width = padded(d.hidden), count = 6 * d.depth + 2;
  const int64_t step = conditioning.stride(0);
  const float* from = static_cast<const float*>(conditioning.data_ptr()) + samples.begin * step;
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
// own cache. The rest is shared within each layer. A job reads all the weights, so it needs
// rows enough for them, or weights that all threads find in the last cache.
struct Shares {
  int64_t jobs, alone, together, slots, most;  // samples alone and together; in the largest job

  Shares(const Dit& d, int64_t batch, int64_t group) {
    constexpr int64_t kRows = 256;  // of a job, whose wide rows stay in the second-level cache
    constexpr int64_t kFewRows = 64, kCached = 4 << 20;  // floats
    const int64_t workers = threads(), each = batch / workers;
    const bool few = each * d.tokens() < kFewRows && PackedLayout(d, group).floats > kCached;
    alone = few ? 0 : each * workers;
    together = batch - alone;
    const int64_t samples = std::max<int64_t>(1, kRows / d.tokens());
    jobs = alone ? workers * ((each + samples - 1) / samples) : 0;
    slots = std::max<int64_t>(1, std::min(workers, jobs));
    most = alone ? (alone + jobs - 1) / jobs : 0;
  }

  // Workspaces: one for each thread's job, or one for what is shared, after one another.
  int64_t slot(const Dit& d, int64_t group) const {
    return (Workspace(d, most, group).floats + 15) / 16 * 16;
  }
  int64_t floats(const Dit& d, int64_t group) const {
    return std::max(slots * slot(d, group), Workspace(d, together, group).floats);
  }
  Samples job(int64_t index) const {
    return {alone * index / jobs, alone * (index + 1) / jobs};
  }
};

}  // namespace fastdit
