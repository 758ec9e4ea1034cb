// What the ops of the native forward share: threads, checks, and the numbers of a DiT.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "cpu/forward_layout.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace fastdit {

// While one is alive this thread works alone: others run the same code on other samples.
struct Alone {
  static inline thread_local int64_t alive = 0;
  Alone() { ++alive; }
  ~Alone() { --alive; }
};

inline int64_t threads() { return Alone::alive ? 1 : torch::stable::get_num_threads(); }

inline void pause() {  // a few dozen cycles
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// f(begin, end) over `count` items on as many threads as there are, if the work is worth them. A
// thread takes a quarter of its share of what is left, again and again: where equal shares would
// wait for the thread that something else held up, here the others take its items.
template <class F>
void shared(int64_t count, double work, const F& f) {
  constexpr double kWorth = 2e4;  // multiplications: 1 µs, half of what waking a thread takes
  if (count <= 0) return;
  const int64_t workers = threads();
  if (count == 1 || work < kWorth || workers == 1) return f(int64_t{0}, count);
  const int64_t least = std::max<int64_t>(1, int64_t(count * std::min(1.0, 10 * kWorth / work)));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < count) {
      const int64_t share = std::max(least, (count - begin) / (4 * workers));
      const int64_t end = std::min(count, begin + share);
      if (!next.compare_exchange_weak(begin, end)) continue;
      f(begin, end);
      begin = next.load(std::memory_order_relaxed);
    }
  });
}

// f(stage, item, slot) for `items` items of each of `stages` stages; none begins before all of the
// stage before have ended. A thread takes the same items in every stage, whose rows it has in its
// cache, and others only where nobody has begun them: who waits, waits for one that runs. So it ends
// with any number of threads, even where there is but one. Work between two waits is milliseconds,
// a wait spins for microseconds and then yields its processor.
template <class F>
void in_stages(int64_t stages, int64_t items, const F& f) {
  std::vector<std::atomic<bool>> taken(stages * items);
  std::atomic<int64_t> ended{0};
  const int64_t workers = threads();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t slot, int64_t) {
    const Alone alone;
    for (int64_t stage = 0; stage < stages; ++stage) {
      for (int spins = 0; ended.load(std::memory_order_acquire) < stage * items; ++spins)
        spins < 10000 ? pause() : std::this_thread::yield();
      for (int64_t i = 0; i < items; ++i) {
        const int64_t item = (items * slot / workers + i) % items;
        if (taken[stage * items + item].exchange(true)) continue;
        f(stage, item, slot);
        ended.fetch_add(1, std::memory_order_release);
      }
    }
  });
}

inline int64_t panel() {
  int64_t width;
  panel_width(width);
  return width;
}

// Numbers in a word of packed weights: 0 is float.
inline int64_t group_of(bool int8) {
  int64_t group = 0;
  if (int8) int8_group(group);
  return group;
}

inline const float* floats_of(const Tensor& t, std::initializer_list<int64_t> shape,
                              const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_cpu() && t.is_contiguous(), name,
                  ": must be a contiguous float32 CPU tensor");
  check_shape(t, shape, name);
  return static_cast<const float*>(t.data_ptr());
}

inline Dit dit_of(const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(int64_t(numbers.size()) == Dit::kNumbers, "dit: wrong length");
  Dit d{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
        numbers[5], numbers[6], numbers[7], numbers[8], numbers[9]};
  for (size_t i = 0; i < numbers.size(); ++i)
    STD_TORCH_CHECK(numbers[i] > 0 || (i == 6 && numbers[i] == 0), "dit: got ", numbers[i]);
  STD_TORCH_CHECK(d.height % d.patch_rows == 0 && d.width % d.patch_columns == 0, "dit: patch");
  STD_TORCH_CHECK(d.hidden % d.heads == 0, "dit: heads");
  return d;
}

}  // namespace fastdit
