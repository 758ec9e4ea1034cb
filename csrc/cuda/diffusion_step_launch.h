// The launch of diffusion_step on CUDA, without torch.
#pragma once

#include "diffusion_step.h"

namespace fastdit {

// On a stream of the current device. The dtypes are the same, or x's is float32. Returns null, or
// what went wrong.
const char* launch_diffusion_step(const StepCall& call, void* stream);

}  // namespace fastdit
