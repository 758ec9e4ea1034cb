"""The diffusion object against the published one's vectors; schedules, respacing, errors."""

from __future__ import annotations

import inspect

import golden
import numpy as np
import pytest
import torch
from plain_diffusion import toy

from fastdit.diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    create_diffusion,
    named_betas,
    space_timesteps,
)

FILES = [f"diffusion_{i}" for i in range(4)]
LOOPS = "diffusion_3"
TOLERANCE = 2e-5


class Oracle:
    """One file: its tensors, the diffusion and the model it was made with."""

    def __init__(self, name: str) -> None:
        data = golden.load(name)
        kwargs = golden.config(data, "kwargs")
        self.diffusion = create_diffusion(str(data["respacing"]), **kwargs)
        self.model = toy(kwargs.get("learn_sigma", True))
        self.want = {k: torch.from_numpy(v) for k, v in data.items() if v.ndim}
        self.x, self.t, self.noise, self.x_start = (
            self.want[k] for k in ("x", "t", "noise", "x_start")
        )

    def check(self, name: str, got: torch.Tensor) -> None:
        """Within 2e-5 of each element; of 1, or of the largest if that is smaller, near zero."""
        want = self.want.pop(name).double()
        assert got.shape == want.shape
        scale = want.abs().clamp(min=min(1.0, float(want.abs().max())))
        error = float(((got.double() - want).abs() / scale).max())
        assert error <= TOLERANCE, f"{name}: {error:.1e}"

    def draws(self):
        noise = iter(self.want["loop_noise"])
        return lambda _x: next(noise)


@pytest.fixture(params=FILES)
def oracle(request) -> Oracle:
    return Oracle(request.param)


def test_schedule_is_exactly_the_published_one(oracle):
    assert np.array_equal(oracle.diffusion.betas, oracle.want["betas"].numpy())
    assert oracle.diffusion.timestep_map == oracle.want["timestep_map"].tolist()
    assert oracle.diffusion.num_timesteps == len(oracle.want["betas"])


@pytest.mark.parametrize("clip", [False, True])
def test_every_vector_of_a_single_step(oracle, clip):
    """All entries ending in `_clip`, or all without it: none may be left over."""
    diffusion, model, x, t, noise = (
        oracle.diffusion,
        oracle.model,
        oracle.x,
        oracle.t,
        oracle.noise,
    )
    end = "_clip" if clip else ""
    for name in list(oracle.want):
        if name.endswith("_clip") != clip or name.startswith(("loss", "bpd", "q_", "loop", "p_l")):
            del oracle.want[name]
    out = diffusion.p_sample(model, x, t, clip_denoised=clip, noise=noise)
    oracle.check("p_sample" + end, out["sample"])
    oracle.check("pred_xstart" + end, out["pred_xstart"])
    moments = diffusion.p_mean_variance(model, x, t, clip_denoised=clip)
    oracle.check("mean" + end, moments["mean"])
    assert torch.equal(moments["pred_xstart"], out["pred_xstart"])
    torch.testing.assert_close(moments["variance"], moments["log_variance"].exp())
    if not clip:
        oracle.check("log_variance", moments["log_variance"])
    for eta in (0.0, 0.5, 1.0):
        step = diffusion.ddim_sample(model, x, t, clip_denoised=clip, eta=eta, noise=noise)
        oracle.check(f"ddim_eta{eta}{end}", step["sample"])
    reverse = diffusion.ddim_reverse_sample(model, x, t, clip_denoised=clip)
    oracle.check("ddim_reverse" + end, reverse["sample"])
    inputs = {"x", "t", "noise", "x_start", "betas", "timestep_map", "model_output", "ddim_loop"}
    assert set(oracle.want) <= inputs


def test_every_vector_of_training(oracle):
    oracle.check("q_sample", oracle.diffusion.q_sample(oracle.x_start, oracle.t, oracle.noise))
    losses = oracle.diffusion.training_losses(
        oracle.model, oracle.x_start, oracle.t, noise=oracle.noise
    )
    assert {f"loss_{name}" for name in losses} == {n for n in oracle.want if n.startswith("loss_")}
    for name, loss in losses.items():
        oracle.check(f"loss_{name}", loss)


def test_every_vector_of_a_loop():
    oracle = Oracle(LOOPS)
    diffusion, model, x = oracle.diffusion, oracle.model, oracle.x
    given = {"noise": x, "clip_denoised": False}
    oracle.check(
        "p_loop", diffusion.p_sample_loop(model, x.shape, noise_fn=oracle.draws(), **given)
    )
    oracle.check(
        "ddim_loop", diffusion.ddim_sample_loop(model, x.shape, noise_fn=oracle.draws(), **given)
    )
    image = oracle.x_start.clamp(-1, 1)
    bpd = diffusion.calc_bpd_loop(model, image, noise_fn=oracle.draws())
    assert set(bpd) == {"total_bpd", "vb", "prior_bpd", "xstart_mse", "mse"}
    for name in ("total_bpd", "vb", "prior_bpd", "mse"):
        oracle.check("bpd_" + name.removesuffix("_bpd"), bpd[name])
    assert not {n for n in oracle.want if n.startswith("bpd") or n.endswith("_loop")}


# ---- schedules ------------------------------------------------------------------------------


def test_named_schedules():
    linear = named_betas("linear", 1000)
    assert (linear[0], linear[-1]) == (1e-4, 0.02)
    assert np.allclose(np.diff(linear), np.diff(linear)[0])
    assert (named_betas("linear", 250)[[0, -1]] == [4e-4, 0.08]).all()
    cosine = named_betas("cosine", 1000)
    assert (cosine == named_betas("squaredcos_cap_v2", 1000)).all()
    assert cosine[-1] == 0.999
    steps = np.arange(1, 1000) / 1000
    signal = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2
    start = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - cosine)[:-1], signal / start, rtol=1e-9)


def test_cosine_schedule_is_that_of_diffusers():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_schedule="squaredcos_cap_v2").betas
    np.testing.assert_allclose(named_betas("cosine", 1000), theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("respacing", "expected"),
    [
        ("", range(1000)),
        (None, range(1000)),
        ([], range(1000)),
        ([1000], range(1000)),
        ("1", [0]),
        ("4", [0, 333, 666, 999]),
        ("ddim4", [0, 250, 500, 750]),
        ("ddim50", range(0, 1000, 20)),
        ("ddim1000", range(1000)),
        ("2,3", [0, 499, 500, 750, 999]),
        ([2, 3], [0, 499, 500, 750, 999]),
        ((2, 0, 1), [0, 333, 667]),
    ],
)
def test_respacing(respacing, expected):
    diffusion = create_diffusion(respacing)
    assert diffusion.timestep_map == list(expected)
    assert diffusion.use_timesteps == set(expected)
    assert diffusion.original_num_steps == 1000


def test_sections_of_unequal_length_and_rounding():
    kept = sorted(space_timesteps(1000, "10,10,5"))
    assert len(kept) == 25
    assert (kept[0], kept[9], kept[10], kept[19], kept[20], kept[-1]) == (
        0,
        333,
        334,
        666,
        667,
        999,
    )
    assert sorted(space_timesteps(11, "3,3")) == [0, 2, 5, 6, 8, 10]  # strides 2.5 and 2: 2.5 is 2


def test_a_respaced_schedule_keeps_the_signal_level():
    full, short = create_diffusion(""), create_diffusion("10,10,5")
    np.testing.assert_allclose(
        short.alphas_cumprod, full.alphas_cumprod[short.timestep_map], rtol=1e-12
    )


PUBLISHED_TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def test_published_attributes():
    diffusion = create_diffusion("ddim50", sigma_small=True, learn_sigma=False)
    for name in PUBLISHED_TABLES:
        table = getattr(diffusion, name)
        assert table.shape == (50,)
        assert table.dtype == np.float64
    assert diffusion.model_var_type is ModelVarType.FIXED_SMALL
    assert create_diffusion("", learn_sigma=False).model_var_type is ModelVarType.FIXED_LARGE
    assert create_diffusion("").model_var_type is ModelVarType.LEARNED_RANGE
    assert create_diffusion("").model_mean_type is ModelMeanType.EPSILON
    assert create_diffusion("", predict_xstart=True).model_mean_type is ModelMeanType.START_X
    assert create_diffusion("").loss_type is LossType.MSE
    assert create_diffusion("", rescale_learned_sigmas=True).loss_type is LossType.RESCALED_MSE
    kl = create_diffusion("", use_kl=True, rescale_learned_sigmas=True).loss_type
    assert kl is LossType.RESCALED_KL


SAMPLE = "clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None"
LOOP = f"model, shape, noise=None, {SAMPLE}, device=None, progress=False"


@pytest.mark.parametrize(
    ("method", "published"),
    [
        ("q_mean_variance", "x_start, t"),
        ("q_sample", "x_start, t, noise=None"),
        ("q_posterior_mean_variance", "x_start, x_t, t"),
        ("p_mean_variance", f"model, x, t, {SAMPLE.replace(' cond_fn=None,', '')}"),
        ("p_sample", f"model, x, t, {SAMPLE}"),
        ("p_sample_loop", LOOP),
        ("p_sample_loop_progressive", LOOP),
        ("ddim_sample", f"model, x, t, {SAMPLE}, eta=0.0"),
        ("ddim_reverse_sample", f"model, x, t, {SAMPLE}, eta=0.0"),
        ("ddim_sample_loop", f"{LOOP}, eta=0.0"),
        ("ddim_sample_loop_progressive", f"{LOOP}, eta=0.0"),
        ("training_losses", "model, x_start, t, model_kwargs=None, noise=None"),
        ("calc_bpd_loop", "model, x_start, clip_denoised=True, model_kwargs=None"),
    ],
)
def test_published_arguments_in_their_order(method, published):
    """What fastdit adds is keyword-only, behind them."""
    parameters = inspect.signature(getattr(create_diffusion("4"), method)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    written = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional]
    assert ", ".join(written) == published


# ---- errors ---------------------------------------------------------------------------------


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
