// Partial sums of rows in chunks, `kinds` sums for each sample, and their totals.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/reduce.h"
#include "cpu/tensors.h"

namespace fastdit {

class ChunkedSums {
 public:
  ChunkedSums(int64_t samples, int64_t tokens, int64_t width, int64_t kinds)
      : samples_(samples), tokens_(tokens), width_(width), kinds_(kinds), stride_(scratch_row(width)),
        chunks_(chunks_of(tokens)),
        memory_(empty({samples * (chunks_ + 1) * kinds * stride_}, ScalarType::Float)),
        partial_(static_cast<float*>(memory_.data_ptr())),
        totals_(partial_ + samples * chunks_ * kinds * stride_) {}

  // f(first row, end row, sums) for each chunk, where sums are `kinds` zeroed rows `stride` apart;
  // then the totals.
  template <class F>
  void run(const F& f) {
    parallel_items(samples_ * chunks_, kChunk * width_, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        float* sums = partial_ + item * kinds_ * stride_;
        std::memset(sums, 0, kinds_ * stride_ * sizeof(float));
        const int64_t b = item / chunks_, first = (item % chunks_) * kChunk;
        f(b * tokens_ + first, b * tokens_ + std::min(first + kChunk, tokens_), sums);
      }
    });
    parallel_items(samples_ * kinds_, chunks_ * width_, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / kinds_, kind = item % kinds_;
        const float* first = partial_ + (b * chunks_ * kinds_ + kind) * stride_;
        sum_partials({first, chunks_, kinds_ * stride_}, width_, totals_ + item * stride_);
      }
    });
  }

  int64_t stride() const { return stride_; }
  float* total(int64_t sample, int64_t kind) const {
    return totals_ + (sample * kinds_ + kind) * stride_;
  }

 private:
  int64_t samples_, tokens_, width_, kinds_, stride_, chunks_;
  Tensor memory_;
  float *partial_, *totals_;
};

// Room for the gradient of `t`, dense, or nothing where the input is absent.
inline Tensor gradient_of(const MaybeTensor& t, const Tensor& like) {
  return t ? dense_like(*t) : empty({0}, like.scalar_type());
}

}  // namespace fastdit
