// Compiles the body of a CUDA kernel with a host compiler and runs its grid as plain loops, so that
// sanitizers see every access. For kernels whose threads do not cooperate: under ThreadSanitizer every
// fourth block is another thread's, and two that write one element are a race.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
template <class T>
void __stcs(T* place, T value) {
  *place = value;
}

struct Place3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Place3 threadIdx, blockIdx, blockDim, gridDim;

// Blocks `first` to `end` of a one-dimensional grid of `blocks`.
template <class Kernel, class... Arguments>
void run_blocks(unsigned first, unsigned end, unsigned blocks, unsigned threads, Kernel kernel,
                const Arguments&... arguments) {
#ifdef __SANITIZE_THREAD__
  constexpr unsigned workers = 4;
#else
  constexpr unsigned workers = 1;
#endif
  const auto work = [&](unsigned worker) {
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    for (blockIdx.x = first + worker; blockIdx.x < end; blockIdx.x += workers) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
    }
  };
  if (workers == 1) return work(0);
  std::vector<std::thread> others;
  for (unsigned worker = 0; worker < workers; ++worker) others.emplace_back(work, worker);
  for (std::thread& other : others) other.join();
}
