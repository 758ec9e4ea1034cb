// diffusion_step on CUDA: the launch. On the current stream, with nothing read on the host, so that
// it can be captured in a graph.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/diffusion_step.cuh"
#include "diffusion_step_call.h"

namespace fastdit {
namespace {

using Kernel = void (*)(StepCall);

template <class X, class M>
Kernel kernel_of(const StepCall& call) {
  return call.tokens() ? diffusion_step_tokens<X, M> : diffusion_step_image<X, M>;
}

// x and the model's output in one dtype, or a float32 x with an output of lower precision.
Kernel choose(const StepCall& call, const Step& step) {
  const bool same = call.x_storage == call.output_storage;
  if (same && call.x_storage == Storage::kFloat) return kernel_of<float, float>(call);
  if (same && call.x_storage == Storage::kBFloat16) return kernel_of<bfloat16, bfloat16>(call);
  if (same) return kernel_of<half, half>(call);
  if (call.x_storage != Storage::kFloat) {
    fail("model_output", text(step.output), std::string(text(step.x.scalar_type())) + ", x's dtype");
  }
  return call.output_storage == Storage::kBFloat16 ? kernel_of<float, bfloat16>(call)
                                                   : kernel_of<float, half>(call);
}

int64_t blocks(const StepCall& call) {
  if (call.tokens()) return blocks_for<kPixels>(call.plane);
  const int64_t size = call.sample_size();
  return call.x_storage == Storage::kFloat ? blocks_for<kBytes / 4>(size)
                                           : blocks_for<kBytes / 2>(size);
}

std::tuple<Tensor, Tensor> diffusion_step_cuda(
    const Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& index,
    const std::optional<Tensor>& noise, const std::optional<Tensor>& x0_previous,
    std::optional<double> clip, bool learned_range, int64_t guided_channels,
    const std::optional<Tensor>& seed, const std::optional<Sizes>& patch) {
  const auto device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Step step = prepare(x, model_output, table, index, noise, x0_previous, clip, learned_range,
                            guided_channels, seed, patch);
  const Kernel kernel = choose(step.call, step);
  const int64_t grid = step.call.batch * blocks(step.call);
  if (grid > std::numeric_limits<int32_t>::max()) fail("x", text(x), "at most 2^31 - 1 blocks");
  if (grid > 0) {
    const auto stream = torch::stable::accelerator::getCurrentStream(device).nativeHandle();
    kernel<<<unsigned(grid), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(step.call);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string("diffusion_step: ") + cudaGetErrorString(error));
    }
  }
  return {step.next, step.x0};
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CUDA, m) {
  m.impl("diffusion_step", TORCH_BOX(&fastdit::diffusion_step_cuda));
}
