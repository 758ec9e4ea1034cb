// Compiles the body of a CUDA kernel with a host compiler and runs its grid as plain loops, so that
// sanitizers see every access. For kernels whose threads do not cooperate.
#pragma once

#include <cstdint>

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
inline Place3 threadIdx, blockIdx, blockDim, gridDim;

// Blocks `first` to `end` of a one-dimensional grid of `blocks`.
template <class Kernel, class... Arguments>
void run_blocks(unsigned first, unsigned end, unsigned blocks, unsigned threads, Kernel kernel,
                const Arguments&... arguments) {
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  for (blockIdx.x = first; blockIdx.x < end; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
  }
}
