"""What the diffusion object refuses, naming the argument, its value and what is allowed."""

from __future__ import annotations

import pytest
import torch
from plain_diffusion import toy

from fastdit.diffusion import GaussianDiffusion, create_diffusion


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"timestep_respacing": "ddim400"}, r"timestep_respacing: got 'ddim400'.*of 1000"),
        ({"timestep_respacing": "ddim"}, "timestep_respacing: got 'ddim'"),
        ({"timestep_respacing": "ddim-5"}, "timestep_respacing: got 'ddim-5'"),
        ({"timestep_respacing": "1001"}, r"got '1001'.*0 to 1000 in section 0"),
        ({"timestep_respacing": "10,501"}, r"got '10,501'.*0 to 500 in section 1"),
        ({"timestep_respacing": [-1]}, r"timestep_respacing: got \[-1\]"),
        ({"timestep_respacing": "0"}, "at least one step"),
        ({"timestep_respacing": "fast"}, r"got 'fast'.*'10,10,5'"),
        ({"timestep_respacing": [2.5]}, r"got \[2.5\]"),
        ({"timestep_respacing": "", "noise_schedule": "sqrt"}, "noise_schedule: got 'sqrt'.*'cos"),
        ({"timestep_respacing": "", "diffusion_steps": 20}, "diffusion_steps: got 20.*> 20"),
        ({"timestep_respacing": "", "diffusion_steps": 0}, "diffusion_steps: got 0"),
    ],
)
def test_impossible_schedules_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_diffusion(**kwargs)


def test_a_respacing_that_is_no_string_or_list_is_a_type_error():
    with pytest.raises(TypeError, match="timestep_respacing: got 250"):
        create_diffusion(250)


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.1, 0.0], [0.1, 1.0], [float("nan")]])
def test_betas_outside_their_range_are_named(betas):
    with pytest.raises(ValueError, match="betas: got"):
        GaussianDiffusion(betas)


@pytest.mark.parametrize("kept", [[], [0, 3], [-1]])
def test_timesteps_that_are_not_there_are_named(kept):
    with pytest.raises(ValueError, match="use_timesteps: got"):
        GaussianDiffusion([0.1, 0.2, 0.3], kept)


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (torch.tensor([0, 10]), ValueError, "t: got 0 to 10, allowed is .* from 0 to 9"),
        (torch.tensor([-1, 3]), ValueError, "t: got -1 to 3"),
        (torch.tensor([3]), ValueError, r"t: got \(1,\) int64"),
        (torch.tensor(3), ValueError, r"t: got \(\) int64"),
        (torch.tensor([3, 4], dtype=torch.int32), ValueError, r"t: got \(2,\) int32"),
        (3, TypeError, "t: got int"),
    ],
)
def test_wrong_timesteps_are_named_everywhere(t, error, message):
    diffusion, x, model = create_diffusion("10"), torch.zeros(2, 4, 3, 3), toy()
    for call in (
        lambda: diffusion.p_sample(model, x, t),
        lambda: diffusion.p_mean_variance(model, x, t),
        lambda: diffusion.ddim_sample(model, x, t),
        lambda: diffusion.ddim_reverse_sample(model, x, t),
        lambda: diffusion.dpm_solver_sample(model, x, t),
        lambda: diffusion.q_sample(x, t),
        lambda: diffusion.q_mean_variance(x, t),
        lambda: diffusion.q_posterior_mean_variance(x, x, t),
        lambda: diffusion.training_losses(model, x, t),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("learn_sigma", "channels", "allowed"),
    [
        (True, 4, r"allowed is \(2, 8, 3, 3\), as learn_sigma is True"),
        (False, 8, r"allowed is \(2, 4, 3, 3\), as learn_sigma is False"),
        (False, 5, r"allowed is \(2, 4, 3, 3\)"),
    ],
)
def test_wrong_model_channels_are_named(learn_sigma, channels, allowed):
    diffusion, x = create_diffusion("10", learn_sigma=learn_sigma), torch.zeros(2, 4, 3, 3)
    t = torch.tensor([1, 2])

    def model(x, t):
        return torch.zeros(2, channels, 3, 3)

    for run in (diffusion.p_sample, diffusion.ddim_sample, diffusion.training_losses):
        with pytest.raises(ValueError, match=rf"model's output: got \(2, {channels}, .*{allowed}"):
            run(model, x, t)
    for run in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        with pytest.raises(ValueError, match=rf"model's output: got \(2, {channels}, .*{allowed}"):
            run(model, x.shape, x)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"model": "DiT-XL/2"}, TypeError, "model: got str, allowed is one called as model"),
        ({"denoised_fn": 3}, TypeError, "denoised_fn: got int, allowed is None or a function"),
        ({"cond_fn": 3}, TypeError, "cond_fn: got int"),
        ({"noise_fn": torch.zeros(2)}, TypeError, "noise_fn: got Tensor"),
        ({"model_kwargs": [1]}, TypeError, "model_kwargs: got list, allowed is None or a dict"),
        ({"graph": "on"}, ValueError, "graph: got 'on', allowed is None, True or False"),
        (
            {"graph": True},
            ValueError,
            "graph: got True, allowed is None or False: the model is a f",
        ),
    ],
)
def test_wrong_arguments_of_a_loop_are_named(wrong, error, message):
    given = {"model": toy(), "shape": (2, 2, 3, 3), "device": "cpu", **wrong}
    with pytest.raises(error, match=message):
        create_diffusion("2").p_sample_loop(**given)


def test_other_wrong_arguments_are_named():
    diffusion, model, x = create_diffusion("10"), toy(), torch.zeros(2, 4, 3, 3)
    t, half = torch.tensor([1, 2]), torch.zeros(1, 4, 3, 3)
    ddim, loop = diffusion.ddim_sample, diffusion.p_sample_loop
    for wrong, message in (
        (lambda: diffusion.p_sample(model, x, t, noise=half), r"noise: got \(1, 4"),
        (lambda: diffusion.q_sample(x, t, half), r"noise: got \(1, 4"),
        (lambda: ddim(model, x, t, eta=-0.1), "eta: got -0.1"),
        (lambda: ddim(model, x, t, eta=2.0), "eta: got 2.0, allowed is a number from 0 to 1.00035"),
        (lambda: ddim(model, x, t, eta=float("nan")), "eta: got nan"),
        (lambda: diffusion.ddim_reverse_sample(model, x, t, eta=0.5), "eta: got 0.5"),
        (
            lambda: diffusion.dpm_solver_sample(model, x, t, order=3),
            "order: got 3, allowed .* 1 or",
        ),
        (lambda: diffusion.dpm_solver_sample(model, x, t, x0_previous=half), "x0_previous: got"),
        (lambda: ddim(model, x, t, denoised_fn=lambda x0: x0[:1]), "denoised_fn's result: got"),
        (lambda: ddim(model, x, t, cond_fn=lambda x, t: x[:1]), "cond_fn's result: got"),
        (lambda: loop(model, (2, 4, 3, 3)), "device: got None"),
        (lambda: loop(model, 5, device="cpu"), "shape: got 5"),
        (lambda: loop(model, (1, 4, 3, 3), noise=x), r"noise: got \(2, 4, 3, 3\)"),
        (lambda: loop(model, x.shape, noise=x, device="meta"), "noise: got .* on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
