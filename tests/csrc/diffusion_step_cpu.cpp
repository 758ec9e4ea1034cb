// One instruction set's loops of diffusion_step, under sanitizers: whole, and cut as by threads.
#include "cpu/isa/diffusion_step.cpp"

#include "step_problem.h"

using namespace fastdit;

int main() {
  const int failures = count_failures([](const StepCall& call) {
    const int64_t chunks = call.batch * chunks_of(call), middle = chunks / 2;
    FASTDIT_ISA::diffusion_step(call, middle, chunks);
    FASTDIT_ISA::diffusion_step(call, 0, middle);
  });
  std::printf("%d failures\n", failures);
  return failures != 0;
}
