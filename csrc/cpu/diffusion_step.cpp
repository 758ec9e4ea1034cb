// diffusion_step on the CPU, and the op's schema: that of torch.ops.fastdit.diffusion_step.
#include "cpu/diffusion_step_chunks.h"

#include "diffusion_step_call.h"

namespace fastdit {
namespace {

using Chunks = void (*)(const StepCall&, int64_t, int64_t);

Chunks fastest() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512::diffusion_step;
  }
  if (avx2) return avx2::diffusion_step;
#endif
  return baseline::diffusion_step;
}

const Chunks kChunks = fastest();

// A thread should have some microseconds of work: it takes about two to wake one.
constexpr int64_t kGrain = 32, kGrainPhilox = 8;

}  // namespace

bool steps_fit(const StepCall& call) {
  for (int64_t sample = 0; sample < (call.step_per_sample ? call.batch : 1); ++sample)
    if (call.step_of(sample) < 0 || call.step_of(sample) >= call.rows) return false;
  return true;
}

void diffusion_step_all(const StepCall& call) {
  const int64_t chunks = call.batch * chunks_of(call), grain = call.seed ? kGrainPhilox : kGrain;
  if (chunks <= grain) return kChunks(call, 0, chunks);
  torch::stable::parallel_for(
      0, chunks, grain, [&](int64_t begin, int64_t end) { kChunks(call, begin, end); });
}

namespace {

void check_steps(const StepCall& call) {
  if (steps_fit(call)) return;
  int64_t sample = 0;
  while (call.step_of(sample) >= 0 && call.step_of(sample) < call.rows) ++sample;
  fail("step", std::to_string(call.step_of(sample)), "0 to " + std::to_string(call.rows - 1));
}

std::tuple<Tensor, Tensor> diffusion_step_cpu(
    const Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& index,
    const std::optional<Tensor>& noise, const std::optional<Tensor>& x0_previous,
    std::optional<double> clip, bool learned_range, int64_t guided_channels,
    const std::optional<Tensor>& seed, const std::optional<Sizes>& patch) {
  Step step = prepare(x, model_output, table, index, noise, x0_previous, clip, learned_range,
                      guided_channels, seed, patch);
  check_steps(step.call);
  make_results(step);
  diffusion_step_all(step.call);
  return {*step.next, *step.x0};
}

void diffusion_step_into_cpu(
    const Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& index,
    const std::optional<Tensor>& noise, const std::optional<Tensor>& x0_previous,
    std::optional<double> clip, bool learned_range, int64_t guided_channels,
    const std::optional<Tensor>& seed, const std::optional<Sizes>& patch,
    Tensor next, std::optional<Tensor> x0) {
  Step step = prepare(x, model_output, table, index, noise, x0_previous, clip, learned_range,
                      guided_channels, seed, patch);
  check_steps(step.call);
  take_results(step, next, x0);
  diffusion_step_all(step.call);
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def(
      "diffusion_step(Tensor x, Tensor model_output, Tensor table, Tensor step, Tensor? noise, "
      "Tensor? x0_previous, float? clip, bool learned_range, int guided_channels, Tensor? seed, "
      "int[]? patch) -> (Tensor, Tensor)");
  m.def(
      "diffusion_step_into(Tensor x, Tensor model_output, Tensor table, Tensor step, "
      "Tensor? noise, Tensor? x0_previous, float? clip, bool learned_range, int guided_channels, "
      "Tensor? seed, int[]? patch, Tensor(a!) next, Tensor(b!)? x0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("diffusion_step", TORCH_BOX(&fastdit::diffusion_step_cpu));
  m.impl("diffusion_step_into", TORCH_BOX(&fastdit::diffusion_step_into_cpu));
}
