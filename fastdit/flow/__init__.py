"""Flow matching: interpolants, losses, ODE and SDE samplers, with SiT's API (Ma et al. 2024).

    transport = fastdit.create_transport("Linear", "velocity")
    loss = transport.training_losses(model, x1, {"y": labels})["loss"].mean()
    sample = fastdit.flow.Sampler(transport).sample_ode(sampling_method="heun", num_steps=26)
    images = sample(torch.randn(16, 4, 32, 32), model, y=labels)[-1]

Time runs from noise, t = 0, to data, t = 1. The fixed-step solvers are tables of
`fastdit.ops.diffusion_step`, which `fastdit.Sampler` runs as well: `ODE` and `SDE` are its solvers.
"""

from __future__ import annotations

from fastdit.flow.checkpoint import load_transport, transport_metadata
from fastdit.flow.guidance import Guidance
from fastdit.flow.kinds import ModelType, PathType, WeightType
from fastdit.flow.sampler import Sampler
from fastdit.flow.solvers import ODE, SDE
from fastdit.flow.transport import Transport, create_transport

__all__ = [
    "ODE",
    "SDE",
    "Guidance",
    "ModelType",
    "PathType",
    "Sampler",
    "Transport",
    "WeightType",
    "create_transport",
    "load_transport",
    "transport_metadata",
]
