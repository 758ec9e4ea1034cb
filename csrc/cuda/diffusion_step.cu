// diffusion_step on CUDA: the kernels' instances and their launch.
#include "cuda/diffusion_step.cuh"

#include <limits>

#include "cuda/diffusion_step_launch.h"

namespace fastdit {
namespace {

using Kernel = void (*)(StepCall);

template <class X, class M>
Kernel kernel_of(const StepCall& call) {
  return call.tokens() ? diffusion_step_tokens<X, M> : diffusion_step_image<X, M>;
}

Kernel choose(const StepCall& call) {
  if (call.x_storage == Storage::kBFloat16) return kernel_of<bfloat16, bfloat16>(call);
  if (call.x_storage == Storage::kHalf) return kernel_of<half, half>(call);
  if (call.output_storage == Storage::kBFloat16) return kernel_of<float, bfloat16>(call);
  if (call.output_storage == Storage::kHalf) return kernel_of<float, half>(call);
  return kernel_of<float, float>(call);
}

int64_t blocks(const StepCall& call) {
  if (call.tokens()) return blocks_for<kPixels>(call.plane);
  const int64_t size = call.sample_size();
  return call.x_storage == Storage::kFloat ? blocks_for<kBytes / 4>(size)
                                           : blocks_for<kBytes / 2>(size);
}

}  // namespace

const char* launch_diffusion_step(const StepCall& call, void* stream) {
  const int64_t grid = call.batch * blocks(call);
  if (grid == 0) return nullptr;
  if (grid > std::numeric_limits<int32_t>::max()) return "more than 2^31 - 1 blocks of elements";
  choose(call)<<<unsigned(grid), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastdit
