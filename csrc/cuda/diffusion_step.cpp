// diffusion_step on CUDA, as an op: on x's device and its current stream, with nothing read on the
// host, so that it can be captured in a graph.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/diffusion_step_launch.h"
#include "diffusion_step_call.h"

namespace fastdit {
namespace {

// `results` says where they go, of the step that is otherwise ready.
template <class Results>
Step launch(
    const Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& index,
    const std::optional<Tensor>& noise, const std::optional<Tensor>& x0_previous,
    std::optional<double> clip, bool learned_range, int64_t guided_channels,
    const std::optional<Tensor>& seed, const std::optional<Sizes>& patch,
    const Results& results) {
  const auto device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Step step = prepare(x, model_output, table, index, noise, x0_previous, clip, learned_range,
                      guided_channels, seed, patch);
  const Storage stored = step.call.x_storage;
  if (stored != Storage::kFloat && stored != step.call.output_storage) {
    fail("model_output", text(model_output), std::string("x's dtype, ") + text(x.scalar_type()));
  }
  results(step);
  const auto stream = torch::stable::accelerator::getCurrentStream(device);
  const char* error = launch_diffusion_step(step.call, stream.nativeHandle());
  if (error != nullptr) throw std::runtime_error(std::string("diffusion_step: ") + error);
  return step;
}

std::tuple<Tensor, Tensor> diffusion_step_cuda(
    const Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& index,
    const std::optional<Tensor>& noise, const std::optional<Tensor>& x0_previous,
    std::optional<double> clip, bool learned_range, int64_t guided_channels,
    const std::optional<Tensor>& seed, const std::optional<Sizes>& patch) {
  const Step step = launch(x, model_output, table, index, noise, x0_previous, clip, learned_range,
                           guided_channels, seed, patch, make_results);
  return {*step.next, *step.x0};
}

void diffusion_step_into_cuda(
    const Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& index,
    const std::optional<Tensor>& noise, const std::optional<Tensor>& x0_previous,
    std::optional<double> clip, bool learned_range, int64_t guided_channels,
    const std::optional<Tensor>& seed, const std::optional<Sizes>& patch,
    Tensor next, std::optional<Tensor> x0) {
  launch(x, model_output, table, index, noise, x0_previous, clip, learned_range, guided_channels,
         seed, patch, [&](Step& step) { take_results(step, next, x0); });
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CUDA, m) {
  m.impl("diffusion_step", TORCH_BOX(&fastdit::diffusion_step_cuda));
  m.impl("diffusion_step_into", TORCH_BOX(&fastdit::diffusion_step_into_cuda));
}
