"""The sampling engine: whole denoise steps, hoisted conditioning, CUDA graphs.

`sampler.py` is the public class, `conditions.py` what it is asked for, `plan.py` a solver as the
rows of a table, `presets.py` solvers by quality, `conditioning.py` what is computed before the first
step, `run.py` the step, `graphs.py` its capture, `noise.py` the draws and `denoiser.py` the place
where another forward replaces the model's.
"""

from __future__ import annotations

from fastdit.sampler.plan import DIFFUSION_SOLVERS, Plan, diffusion_plan
from fastdit.sampler.sampler import Preview, Sampler

__all__ = ["DIFFUSION_SOLVERS", "Plan", "Preview", "Sampler", "diffusion_plan"]
