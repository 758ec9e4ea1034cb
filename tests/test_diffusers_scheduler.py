"""fastdit.diffusers.Scheduler beside diffusers' own, and the checks that diffusers makes of one."""

from __future__ import annotations

import inspect
import json

import diffusers
import pytest
import torch

import fastdit
from fastdit.diffusers import Scheduler

SHAPE = (2, 3, 8, 8)
CLIPPED = {"clip_sample": True}
PLAIN = {"clip_sample": False}


def model(x, t):
    """A deterministic stand-in for a model."""
    return x * 0.7 * (t + 1) / (t + 11) + 0.1 * x.flip(-1)


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def loop(scheduler, steps, predict=model, **step):
    """A sampling loop as every pipeline writes it."""
    scheduler.set_timesteps(steps)
    x = start() * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        x = scheduler.step(
            predict(scheduler.scale_model_input(x, t), t), t, x, **step, generator=generator
        ).prev_sample
    return x


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


DDIM = [
    {},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"set_alpha_to_one": False, "steps_offset": 1},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("config", DDIM)
def test_ddim_is_diffusers(config, steps):
    theirs = diffusers.DDIMScheduler(**PLAIN, **config)
    ours = Scheduler.from_config(theirs.config)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    if config.get("timestep_spacing") == "linspace":
        return  # theirs takes the spacing for even, though it rounds
    assert relative(loop(ours, steps), loop(theirs, steps)) < 2e-4


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("rederived", [False, True])
def test_ddim_with_noise_and_clipping_is_diffusers(eta, rederived):
    theirs = diffusers.DDIMScheduler()  # clips, by its default
    step = {"eta": eta, "use_clipped_model_output": rederived}
    expected = loop(theirs, 10, **step)
    assert relative(loop(Scheduler.from_config(theirs.config), 10, **step), expected) < 2e-4
    assert (
        relative(loop(Scheduler.from_config(theirs.config, clip_sample=False), 10), expected) > 0.1
    )


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_a_configs_defaults_are_its_own_classs(name):
    theirs = getattr(diffusers, name)()
    ours = Scheduler.from_config(theirs.config)
    shared = [key for key in theirs.config if key in ours.config and key[0] != "_"]
    for key in shared:
        assert ours.config[key] == theirs.config[key] or theirs.config[key] is None


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("settings", [CLIPPED, PLAIN])
def test_ddpm_is_diffusers(variance, settings):
    def predict(x, t):
        out = model(x, t)
        return torch.cat([out, out.sin()], 1) if variance == "learned_range" else out

    theirs = diffusers.DDPMScheduler(variance_type=variance, **settings)
    ours = Scheduler.from_config(theirs.config, solver="ddpm")
    assert relative(loop(ours, 20, predict), loop(theirs, 20, predict)) < 2e-4


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_is_diffusers(order, spacing):
    theirs = diffusers.DPMSolverMultistepScheduler(solver_order=order, timestep_spacing=spacing)
    ours = Scheduler.from_config(theirs.config, solver="dpm++")
    theirs.set_timesteps(20)
    ours.set_timesteps(20)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert relative(loop(ours, 20), loop(theirs, 20)) < 2e-4


def test_a_run_that_starts_in_the_middle_begins_with_order_one():
    theirs = diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing")
    ours = Scheduler.from_config(theirs.config, solver="dpm++")
    found = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        x = start()
        for t in scheduler.timesteps[4:]:
            x = scheduler.step(model(x, t), t, x).prev_sample
        found.append(x)
    assert relative(found[1], found[0]) < 2e-4
    ours.set_timesteps(10)
    assert ours._previous is None


def test_published_spacing_gives_the_published_samples():
    scheduler = Scheduler(timestep_spacing="published", solver="ddim")
    diffusion = fastdit.create_diffusion("25")
    scheduler.set_timesteps(25)
    assert scheduler.timesteps.tolist() == diffusion.timestep_map[::-1]

    def wrapped(x, t):
        out = model(x, t.reshape(-1, 1, 1, 1))
        return torch.cat([out, out], 1)

    expected = diffusion.ddim_sample_loop(
        wrapped, SHAPE, start(), clip_denoised=False, progress=False
    )
    assert relative(loop(scheduler, 25), expected) < 1e-5


# ---- what diffusers checks of every scheduler ---------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++"])
def test_a_saved_and_loaded_scheduler_steps_alike(solver, tmp_path):
    scheduler = Scheduler(solver=solver, beta_end=0.03, timestep_spacing="trailing")
    expected = loop(scheduler, 10)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["solver"] == solver
    loaded = Scheduler.from_pretrained(tmp_path)
    settings = [{k: v for k, v in s.config.items() if k[0] != "_"} for s in (loaded, scheduler)]
    assert settings[0] == settings[1]
    assert torch.equal(loop(loaded, 10), expected)


def test_configs_go_back_and_forth():
    theirs = diffusers.DDIMScheduler(beta_end=0.03, steps_offset=1, clip_sample=False)
    ours = Scheduler.from_config(theirs.config)
    assert diffusers.DDIMScheduler in ours.compatibles
    back = diffusers.DDIMScheduler.from_config(ours.config)
    for name in ("beta_end", "steps_offset", "clip_sample", "timestep_spacing"):
        assert back.config[name] == theirs.config[name]


def test_the_public_interface():
    scheduler = Scheduler()
    assert scheduler.init_noise_sigma == 1.0
    assert len(scheduler) == 1000
    assert scheduler.order == 1
    x = start()
    assert scheduler.scale_model_input(x, 3) is x
    accepted = set(inspect.signature(scheduler.step).parameters)
    assert {"model_output", "timestep", "sample", "eta", "generator", "return_dict"} <= accepted
    assert {"num_inference_steps", "device", "timesteps"} <= set(
        inspect.signature(scheduler.set_timesteps).parameters
    )


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++"])
def test_step_shapes_and_tuple_outputs(solver):
    x = start()
    outputs = []
    for return_dict in (True, False):
        scheduler = Scheduler(solver=solver)
        scheduler.set_timesteps(10)
        generator = torch.Generator().manual_seed(0)
        first, second = scheduler.timesteps[:2]
        out = scheduler.step(0.1 * x, first, x, generator=generator, return_dict=return_dict)
        out = out.to_tuple() if return_dict else out
        assert out[0].shape == out[1].shape == x.shape
        after = scheduler.step(0.1 * x, int(second), x, generator=generator)
        outputs.append((*out, *after.to_tuple()))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("kind", ["add_noise", "get_velocity"])
def test_mixtures_are_diffusers(kind):
    x, noise, t = start(), start().flip(0), torch.tensor([3, 999])
    theirs = getattr(diffusers.DDIMScheduler(), kind)(x, noise, t)
    assert relative(getattr(Scheduler(), kind)(x, noise, t), theirs) < 1e-5
    assert getattr(Scheduler(), kind)(x.half(), noise.half(), t).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_samples_keep_their_dtype(dtype):
    scheduler = Scheduler()
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[0]
    out = scheduler.step(start().to(dtype), t, start().to(dtype))
    assert out.prev_sample.dtype == dtype


def test_custom_timesteps_and_trained_betas():
    scheduler = Scheduler(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3])
    scheduler.set_timesteps(timesteps=[2, 0])
    assert scheduler.timesteps.tolist() == [2, 0]
    assert scheduler.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.504])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="solver: got 'euler'"):
        Scheduler(solver="euler")
    with pytest.raises(ValueError, match="thresholding: got True, allowed is False"):
        Scheduler.from_config(diffusers.DDPMScheduler(thresholding=True).config)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr: got True"):
        Scheduler(rescale_betas_zero_snr=True)
    scheduler = Scheduler()
    with pytest.raises(ValueError, match="trained_betas: got 1 of them, allowed is 1000"):
        Scheduler(trained_betas=[0.1])
    with pytest.raises(ValueError, match="num_inference_steps: got 1001, allowed is 1 to 1000"):
        scheduler.set_timesteps(1001)
    with pytest.raises(ValueError, match="one of it and timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="falling ints"):
        scheduler.set_timesteps(timesteps=[0, 5])
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep: got 1, allowed is one of"):
        scheduler.step(start(), 1, start())
    with pytest.raises(ValueError, match="model_output"):
        scheduler.step(start()[:, :1], 0, start())
    with pytest.raises(ValueError, match="eta"):
        scheduler.step(start(), 0, start(), eta=-1.0)


class TinyVAE(torch.nn.Module):
    """As much of an autoencoder as DiTPipeline asks for."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"scaling_factor": 0.5})()

    def decode(self, latents):
        return type("Out", (), {"sample": latents[:, :3]})()


def test_inside_ditpipeline_with_a_patched_transformer():
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8,
        num_layers=1, sample_size=8, patch_size=2,
    ).eval()  # fmt: skip
    theirs = diffusers.DDIMScheduler()

    def images(scheduler):
        pipe = diffusers.DiTPipeline(transformer, TinyVAE(), scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            [1, 2], num_inference_steps=5, generator=torch.manual_seed(0), output_type="np"
        ).images

    expected = images(theirs)
    with fastdit.patched(transformer, "fast"):
        ours = images(Scheduler.from_config(theirs.config))
    assert ours.shape == expected.shape
    assert abs(ours - expected).max() < 1e-4
