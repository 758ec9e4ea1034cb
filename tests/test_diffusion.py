"""The diffusion object against the published one's vectors; schedules, respacing, errors."""

from __future__ import annotations

import inspect

import golden
import numpy as np
import pytest
import torch
from plain_diffusion import toy

from fastdit import backends
from fastdit.diffusion import (
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


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native" and not backends.kernels_for("diffusion_step", "cpu"):
        pytest.skip("no kernel of diffusion_step is registered for CPUs")
    with backends.backend(request.param):
        yield


@pytest.fixture(params=FILES)
def oracle(request) -> Oracle:
    return Oracle(request.param)


def test_schedule_is_exactly_the_published_one(oracle):
    assert np.array_equal(oracle.diffusion.betas, oracle.want["betas"].numpy())
    assert oracle.diffusion.timestep_map == oracle.want["timestep_map"].tolist()
    assert oracle.diffusion.num_timesteps == len(oracle.want["betas"])


@pytest.mark.parametrize("clip", [False, True])
def test_every_vector_of_a_single_step(oracle, clip, backend):
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


def test_every_vector_of_training(oracle, backend):
    oracle.check("q_sample", oracle.diffusion.q_sample(oracle.x_start, oracle.t, oracle.noise))
    losses = oracle.diffusion.training_losses(
        oracle.model, oracle.x_start, oracle.t, noise=oracle.noise
    )
    assert {f"loss_{name}" for name in losses} == {n for n in oracle.want if n.startswith("loss_")}
    for name, loss in losses.items():
        oracle.check(f"loss_{name}", loss)


def test_every_vector_of_a_loop(backend):
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
