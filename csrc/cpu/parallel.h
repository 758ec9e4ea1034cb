// Work in parallel on PyTorch's own threads, each with scratch memory of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastdit {

// Elements that are worth a second thread: 10 µs of work beside 2 to 5 µs to wake one.
constexpr int64_t kGrain = 32768;

// `count` floats of this thread, aligned to a cache line and kept for the next call.
inline float* scratch_floats(int64_t count) {
  thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < count + 16) memory.resize(count + 16);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// f(begin, end) over `count` items of `width` elements each.
template <class F>
void parallel_items(int64_t count, int64_t width, const F& f) {
  if (count <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  if (count <= grain) return f(int64_t{0}, count);
  torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace fastdit
