"""The sampling engine: whole denoise steps, hoisted conditioning, CUDA graphs.

`sampler.py` is the public class, `options.py` its arguments, `conditions.py` what it is asked for,
`plan.py` and `flow.py` a solver as the rows of a table, `presets.py` solvers by quality,
`conditioning.py` what is computed before the first step, `run.py` the step, `graphs.py` its
capture, `noise.py` the draws, `denoiser.py` the place where another forward replaces the model's,
and `ahead.py` brings both to the published loops.
"""

from __future__ import annotations

from fastdit.sampler.flow import FLOW_SOLVERS, flow_plan
from fastdit.sampler.plan import DIFFUSION_SOLVERS, Plan, diffusion_plan
from fastdit.sampler.presets import PRESETS
from fastdit.sampler.sampler import Preview, Sampler

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
