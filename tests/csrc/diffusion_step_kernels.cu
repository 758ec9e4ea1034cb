// The CUDA kernels of diffusion_step alone, for their cubins and their PTX.
#include "cuda/diffusion_step.cuh"

namespace fastdit {

#define FASTDIT_KERNELS(X, M)                                         \
  template __global__ void diffusion_step_image<X, M>(StepCall call); \
  template __global__ void diffusion_step_tokens<X, M>(StepCall call);

FASTDIT_KERNELS(float, float)
FASTDIT_KERNELS(bfloat16, bfloat16)
FASTDIT_KERNELS(half, half)
FASTDIT_KERNELS(float, bfloat16)
FASTDIT_KERNELS(float, half)

}  // namespace fastdit
