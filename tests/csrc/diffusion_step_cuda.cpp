// The CUDA kernels of diffusion_step, run on the CPU under sanitizers.
#include <sys/mman.h>

#include "cuda_on_cpu.h"
#include "cuda/diffusion_step.cuh"
#include "step_problem.h"

using namespace fastdit;

template <class X, class M>
void run_as(const StepCall& call, unsigned first, unsigned end) {
  const unsigned blocks =
      unsigned(call.batch * (call.tokens() ? blocks_for<kPixels>(call.plane)
                                           : blocks_for<kBytes / sizeof(X)>(call.sample_size())));
  run_blocks(first, end < blocks ? end : blocks, blocks, kThreads,
             call.tokens() ? diffusion_step_tokens<X, M> : diffusion_step_image<X, M>, call);
}

void run(const StepCall& call, unsigned first, unsigned end) {
  if (call.x_storage == Storage::kBFloat16) return run_as<bfloat16, bfloat16>(call, first, end);
  if (call.x_storage == Storage::kHalf) return run_as<half, half>(call, first, end);
  if (call.output_storage == Storage::kBFloat16) return run_as<float, bfloat16>(call, first, end);
  if (call.output_storage == Storage::kHalf) return run_as<float, half>(call, first, end);
  run_as<float, float>(call, first, end);
}

// A tensor of more elements than an int counts: address space that nobody fills but where touched.
template <class T>
T* reserve(int64_t count) {
  void* place = mmap(nullptr, size_t(count) * sizeof(T), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (place == MAP_FAILED) std::perror("mmap"), std::exit(2);
  return static_cast<T*>(place);
}

// The last block of a batch whose every offset is beyond 2^31: x' and x0 of its last element.
int far_failures(bool tokens) {
  StepCall call = {};
  call.batch = 3, call.channels = 4, call.output_channels = 8, call.guided = 3, call.learned = 1;
  call.plane = tokens ? int64_t(1) << 27 : (int64_t(1) << 29) + 6;
  call.width = 1 << 13;
  call.patch_h = call.patch_w = tokens ? 2 : 0;
  call.clip = INFINITY;
  const StepRow row = {0.5f, 0.25f, 2.0f, 4.0f, 0.5f, 1.0f, 0.0f, 0.0f, 3.0f};
  const int64_t step = 0, size = call.sample_size(), last = size - 1;
  call.table = &row, call.rows = 1, call.step = &step;
  float *x = reserve<float>(3 * size), *noise = reserve<float>(3 * size);
  float *previous = reserve<float>(3 * size), *output = reserve<float>(6 * call.output_size());
  float *next = reserve<float>(3 * size), *x0 = reserve<float>(3 * size);
  call.x = x, call.noise = noise, call.previous = previous, call.output = output;
  call.next = next, call.x0 = x0;
  const int64_t at = 2 * size + last;
  // Channel 3 of the last pixel, which is not guided, and its null half, which must not be read.
  const int64_t e = tokens ? call.output_size() - 5 : last;
  x[at] = 1, noise[at] = 7, previous[at] = 10;
  output[2 * call.output_size() + e] = 6, output[5 * call.output_size() + e] = NAN;
  // Channel 2 of the last pixel is guided.
  const int64_t before = at - call.plane, e2 = tokens ? e - 1 : e - call.plane;
  output[2 * call.output_size() + e2] = 5, output[5 * call.output_size() + e2] = 1;
  const unsigned blocks = unsigned(tokens ? blocks_for<kPixels>(call.plane) : blocks_for<4>(size));
  const unsigned plane_blocks = unsigned(call.plane / (4 * kThreads));
  run(call, 3 * blocks - 1, 3 * blocks);
  if (!tokens) run(call, 3 * blocks - 2 - plane_blocks, 3 * blocks - plane_blocks + 1);
  const bool good = x0[at] == 2 && next[at] == 2 + 8 + 5 + 7 && x0[before] == 3.25f;
  if (!good) std::printf("far, tokens %d: %g %g %g\n", tokens, x0[at], next[at], x0[before]);
  return !good;
}

int main() {
  int failures = count_failures([](const StepCall& call) { run(call, 0, ~0u); });
  failures += far_failures(false) + far_failures(true);
  // An index outside the table cannot be told to the host: its sample is NaN, the others are not.
  Options options;
  options.step_per_sample = true;
  Problem problem(options);
  const int64_t steps[] = {5, 1};
  problem.call.step = steps;
  run(problem.call, 0, ~0u);
  const int64_t size = problem.call.sample_size();
  failures += !std::isnan(read(problem.call.next, options.x, size - 1));
  failures += std::isnan(read(problem.call.next, options.x, size));
  std::printf("%d failures\n", failures);
  return failures != 0;
}
