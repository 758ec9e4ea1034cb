"""The sampling engine: whole denoise steps, hoisted conditioning, CUDA graphs.

`sampler.py` is the public class, `options.py` its arguments, `conditions.py` what it is asked for,
`diffusion.py` and `flow.py` a solver as a `fastdit.plan.Plan`, `presets.py` solvers by quality,
`conditioning.py` what is computed before the first step, `run.py` the step, `graphs.py` its
capture, `noise.py` the draws, `preview.py` what is seen on the way, `denoiser.py` the place where
another forward replaces the model's. `published.py` runs the published loops, and `ahead.py` finds
the plain DiT in what they are called with.
"""

from __future__ import annotations

from fastdit.plan import Plan
from fastdit.sampler.diffusion import DIFFUSION_SOLVERS, diffusion_plan
from fastdit.sampler.flow import FLOW_SOLVERS, flow_plan
from fastdit.sampler.presets import PRESETS
from fastdit.sampler.preview import Preview
from fastdit.sampler.sampler import Sampler

__all__ = [
    "DIFFUSION_SOLVERS",
    "FLOW_SOLVERS",
    "PRESETS",
    "Plan",
    "Preview",
    "Sampler",
    "diffusion_plan",
    "flow_plan",
]
