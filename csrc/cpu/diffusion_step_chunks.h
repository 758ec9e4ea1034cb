// diffusion_step on the CPU: the work is cut into chunks of one sample, in cpu/isa/.
#pragma once

#include "diffusion_step.h"

namespace fastdit {

// Elements of a chunk: nine operands of 2 KB fit a first-level cache of 32 KB. A multiple of 4.
constexpr int kChunk = 512;

inline int64_t chunks_of(const StepCall& call) {
  return (call.sample_size() + kChunk - 1) / kChunk;
}

// Chunks `begin` to `end` of all samples' chunks.
namespace baseline {
void diffusion_step(const StepCall& call, int64_t begin, int64_t end);
}
#if defined(__x86_64__)
namespace avx2 {
void diffusion_step(const StepCall& call, int64_t begin, int64_t end);
}
namespace avx512 {
void diffusion_step(const StepCall& call, int64_t begin, int64_t end);
}
#endif

// Whether every sample's step is a row of the table.
bool steps_fit(const StepCall& call);
// All of it, with the machine's best instruction set, on PyTorch's threads.
void diffusion_step_all(const StepCall& call);

}  // namespace fastdit
