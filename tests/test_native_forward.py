"""The native forward of a whole DiT on a CPU: exact, aware of every change, and frank."""

from __future__ import annotations

import copy
import functools
import threading

import golden
import pytest
import torch
from torch import Tensor, nn

import fastdit
from fastdit import native
from fastdit.native_forward import NativeForward

ISAS = ("baseline", "avx2", "avx512")
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        native.load()
    except native.NativeError as error:
        pytest.skip(f"no compiled library: {error}")


@pytest.fixture(params=ISAS)
def isa(request):
    library = torch.ops.fastdit_native
    try:
        library.set_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    library.set_cpu_isa("")


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def small(**kwargs) -> fastdit.DiT:
    """A model whose every layer matters, and none amplifies rounding."""
    shape = {"input_size": 4, "hidden_size": 36, "depth": 2, "num_heads": 3, "num_classes": 5}
    torch.manual_seed(0)
    model = fastdit.DiT(**{**shape, **kwargs}).eval()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
            nn.init.normal_(parameter, std=fan_in**-0.5)
    return model


def inputs(model: fastdit.DiT, batch: int = 2) -> Inputs:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, model.in_channels, *model.input_size, generator=g)
    t = torch.randint(0, 1000, (batch,), generator=g)
    labels = torch.randint(0, max(1, model.num_classes), (batch,), generator=g)
    return x, t, labels if model.num_classes else None


def error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).abs().max() / true.abs().max())


SHAPES = {
    "narrow": {},
    "one token": {"input_size": 2},
    "oblong": {"input_size": (6, 10), "patch_size": 1, "in_channels": 3},
    "patch 3": {"input_size": 12, "patch_size": 3, "in_channels": 1, "learn_sigma": False},
    "less than a vector": {"hidden_size": 4, "num_heads": 1, "depth": 1},
    "heads of 2": {"hidden_size": 40, "num_heads": 20},
    "heads of 72": {"hidden_size": 72, "num_heads": 1, "mlp_ratio": 3.3},
    "two blocks of keys": {"input_size": (34, 32), "hidden_size": 36, "depth": 1},
    "two blocks of the depth": {"hidden_size": 448, "num_heads": 4, "depth": 1},
    "no blocks": {"depth": 0},
    "no null class": {"class_dropout_prob": 0},
    "a signal": {"input_size": 10, "patch_size": 2, "positions": "sincos_1d"},
    "oblong patches": {"input_size": (6, 8), "patch_size": (3, 2)},
    "no labels": {"num_classes": 0, "class_dropout_prob": 0},
    "another conditioning": {"condition_fusion": "concat", "modulation": "mlp"},
    "no positions": {"positions": "none"},
    "squeezed positions": {"base_size": 8},
}


@functools.cache
def case(name: str, batch: int) -> tuple[fastdit.DiT, Inputs, Tensor, float]:
    """A model, its inputs, the output in float64, and eager's error in float32."""
    model = small(**SHAPES[name])
    args = inputs(model, batch)
    true = copy.deepcopy(model).double()(args[0].double(), *args[1:])
    with fastdit.backend("reference"):
        return model, args, true, error(model(*args), true)


CASES = [(name, 2) for name in SHAPES] + [("narrow", batch) for batch in (1, 3, 8)]


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_as_exact_as_eager(isa, name, batch):
    model, args, true, eager = case(name, batch)
    run = NativeForward(model)
    got = run(*args)
    assert run.reason is None
    assert got.shape == true.shape
    assert got.is_contiguous()
    assert error(got, true) <= eager + 1e-6
    rows = run.conditioning(*args[1:])
    assert rows.shape == (batch, sum(model.rows_widths))
    assert error(rows, copy.deepcopy(model).double().conditioning(*args[1:])) <= 1e-6
    assert torch.equal(run(args[0], None, None, conditioning=rows), got)


@pytest.mark.parametrize("name", ["dit_hd72", "dit_patch4"])
def test_published_outputs(isa, name):
    data = golden.load(name)
    model = fastdit.DiT(**golden.config(data, "config")).eval()
    golden.set_reference_weights(model, int(data["weight_seed"]))
    x, t, y = (torch.from_numpy(data[key]) for key in ("x", "t", "y"))
    run = NativeForward(model)
    assert golden.relative_error(run(x, t, y), data["out"]) < 1e-6
    null = torch.full_like(y, model.num_classes)
    pairs = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])
    guided = run.forward_with_cfg(*pairs, float(data["cfg_scale"]))
    assert run.reason is None
    assert golden.relative_error(guided, data["cfg_out"]) < 3e-6


def regular(**kwargs) -> fastdit.DiT:
    """As initialised, with gates and a last layer that are not zero."""
    torch.manual_seed(0)
    shape = {"input_size": 8, "hidden_size": 132, "depth": 3, "num_heads": 4, "num_classes": 5}
    model = fastdit.DiT(**{**shape, **kwargs}).eval()
    for layer in (*model.blocks, model.final_layer):
        nn.init.normal_(layer.adaLN_modulation[1].weight, std=0.05)
        nn.init.normal_(layer.adaLN_modulation[1].bias, std=0.05)
    nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    return model


@pytest.mark.parametrize("shape", [{}, {"hidden_size": 36, "mlp_ratio": 2.1}], ids=str)
def test_int8_is_within_three_thousandths(isa, shape):
    model = regular(**shape)
    run, args = NativeForward(model, quantize="int8"), inputs(model)
    found = run.quantization_error(*args)
    assert run.reason is None
    assert "int8" in run.explain()
    assert 1e-5 < found <= 3e-3
    assert torch.equal(run(*args)[1:], run(*(a[1:] for a in args)))
    assert NativeForward(model).quantization_error(*args) < 1e-6


def test_int8_keeps_nan_to_its_sample(isa):
    model = regular()
    run, (x, t, y) = NativeForward(model, quantize="int8"), inputs(model)
    clean = run(x, t, y)
    x[0, 0, 3, 3] = float("nan")
    assert run(x, t, y)[0].isnan().all()
    assert torch.equal(run(x, t, y)[1], clean[1])
    model.blocks[0].mlp.fc2.weight[3, 3] = float("inf")
    assert run(x, t, y).isnan().all()


def test_quantize_has_two_values():
    with pytest.raises(ValueError, match=r"^quantize: got 'int4', allowed is None, 'int8'"):
        NativeForward(small(), quantize="int4")


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_sample_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(isa, kind):
    model = small(**SHAPES["two blocks of keys"])
    run, (x, t, y), threads = NativeForward(model, kind), inputs(model, 3), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = run(x, t, y)
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(run(x, t, y), whole)
            assert torch.equal(run(x[1:2], t[1:2], y[1:2]), whole[1:2])
    finally:
        torch.set_num_threads(threads)


def test_strided_and_negated_inputs_are_read_as_they_are():
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    whole, rows = run(x, t, y), run.conditioning(t, y)
    assert torch.equal(run(x.to(memory_format=torch.channels_last), t, y), whole)
    assert torch.equal(run(x.repeat_interleave(2, 3)[..., ::2], t, y), whole)
    apart = torch.cat([rows, rows], dim=1)[:, : rows.shape[1]]
    assert torch.equal(run(x, None, None, conditioning=apart), whole)
    assert torch.equal(run(x, None, None, conditioning=rows.t().contiguous().t()), whole)
    assert torch.equal(run(x, t.double(), y.int()), whole)
    assert run(x[:0], t[:0], y[:0]).shape == (0, *whole.shape[1:])
    assert run.reason is None


def test_nan_stays_in_its_sample(isa):
    model = small(**SHAPES["two blocks of keys"])
    run, (x, t, y) = NativeForward(model), inputs(model)
    clean = run(x, t, y)
    x[0, 0, 3, 3] = float("nan")
    found = run(x, t, y)
    assert found[0].isnan().all()
    assert torch.equal(found[1], clean[1])


CHANGES = {
    "in place": lambda m: m.blocks[0].attn.qkv.weight.mul_(2),
    "data": lambda m: setattr(m.blocks[1].mlp.fc2.weight, "data", torch.randn(36, 144)),
    "bias": lambda m: m.final_layer.linear.bias.add_(1),
    "positions": lambda m: m.pos_embed.mul_(2),
    "labels": lambda m: m.y_embedder.embedding_table.weight.add_(1),
    "modulation": lambda m: m.final_layer.adaLN_modulation[1].weight.add_(1),
    "load": lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict(
        {k: v + 0.1 for k, v in m.state_dict().items()}, assign=True
    ),
    "parameter": lambda m: setattr(m.blocks[0].mlp.fc1, "bias", nn.Parameter(torch.randn(144))),
    "module": lambda m: setattr(m.blocks[0].attn, "proj", nn.Linear(36, 36)),
    "order": lambda m: m.blocks.__setitem__(0, m.blocks[1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_packed_again(change):
    model = small()
    run, args = NativeForward(model), inputs(model)
    before = run(*args)
    CHANGES[change](model)
    assert error(run(*args), model(*args).double()) <= 1e-5
    assert run.reason is None
    assert not torch.allclose(run(*args), before, rtol=1e-2)


def test_another_input_size_is_packed_again():
    model = small()
    run = NativeForward(model)
    run(*inputs(model))
    model.set_input_size((2, 8))  # as many tokens, elsewhere
    args = inputs(model)
    assert error(run(*args), model(*args).double()) <= 1e-5
    assert run.reason is None


def test_refresh_sees_what_counts_no_change():
    model = small()
    run, args = NativeForward(model), inputs(model)
    run(*args)
    model.blocks[0].attn.qkv.weight.data.mul_(2)
    run.refresh()
    torch.testing.assert_close(run(*args), model(*args), rtol=1e-5, atol=1e-5)


def test_an_unchanged_model_is_packed_once():
    model = small()
    run, args = NativeForward(model), inputs(model)
    run(*args)
    packed = run._packed
    run(*args)
    assert run._packed is packed


class Lora(nn.Linear):
    pass


def _own_forward(m):
    m.blocks[0].mlp.forward = lambda x: x


UNFIT = {
    "hook": (lambda m: m.blocks[0].register_forward_hook(lambda *a: None), "hook"),
    "pre-hook": (lambda m: m.blocks[0].register_forward_pre_hook(lambda *a: None), "hook"),
    "LoRA": (lambda m: setattr(m.blocks[0].attn, "qkv", Lora(36, 108)), "attn.qkv is a Lora"),
    "own forward": (_own_forward, "has a forward of its own"),
    "float64": (lambda m: m.double(), "is torch.float64"),
    "bfloat16": (lambda m: m.bfloat16(), "is torch.bfloat16"),
    "training": (lambda m: m.train(), "training mode"),
    "no bias": (lambda m: setattr(m.blocks[0].attn.proj, "bias", None), "a layer has no bias"),
    "parametrised": (
        lambda m: nn.utils.parametrizations.weight_norm(m.blocks[0].mlp.fc1),
        "ParametrizedLinear",
    ),
}


@pytest.mark.parametrize("packed_before", [False, True])
@pytest.mark.parametrize("change", UNFIT)
def test_what_it_does_not_know_runs_the_model(change, packed_before):
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    if packed_before:
        run(x, t, y)
    UNFIT[change][0](model)
    x = x.to(next(model.parameters()).dtype)
    torch.manual_seed(1)
    got = run(x, t, y)
    assert UNFIT[change][1] in run.reason
    assert run.reason in run.explain(x)
    torch.manual_seed(1)
    assert torch.equal(got, model(x, t, y))


DESIGNS = [
    {"conditioning": "in_context"},
    {"conditioning": "cross_attention"},
    {"conditioning": "adaln"},
    {"rope": True},
    {"norm": "rms"},
    {"qk_norm": "layer"},
    {"mlp": "swiglu"},
    {"residual": "normed"},
    {"scale_plus_one": False},
    {"any_size": True},
]


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_other_designs_run_the_model(design):
    model = small(**design)
    run, args = NativeForward(model), inputs(model)
    assert torch.equal(run(*args), model(*args))
    assert next(iter(design)) in run.reason


def test_calls_that_others_must_see_run_the_model():
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    with torch.enable_grad():
        run(x, t, y).sum().backward()
        assert "gradients of the parameters" in run.reason
        assert model.final_layer.linear.weight.grad is not None
        model.requires_grad_(False)
        run(x, t, y)
        assert run.reason is None
        run(x.clone().requires_grad_(), t, y)
        assert "gradient of an argument" in run.reason
    with fastdit.backend("reference"):
        run(x, t, y)
        assert "reference" in run.reason
    with torch.autocast("cpu"):
        assert run(x, t, y).dtype == torch.bfloat16
        assert "autocast" in run.reason
    torch.func.vmap(lambda one: run(one[None], t[:1], y[:1]))(x)
    assert "torch.func" in run.reason
    assert "native" in run.explain()


def test_wrong_arguments_get_the_model_s_errors():
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    for args, name in (((x[:, :1], t, y), "x"), ((x, t[:1], y), "t"), ((x, None, y), "t")):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            run(*args)
    with pytest.raises(ValueError, match=r"^conditioning: got"):
        run(x, None, None, conditioning=torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"y: got 6, allowed is 0 to 5"):
        run(x, t, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="x: got 3 rows"):
        run.forward_with_cfg(*inputs(model, 3), 2.0)


def test_labels_are_dropped_as_asked():
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    drop = torch.tensor([1, 0])
    torch.testing.assert_close(run(x, t, y, drop), model(x, t, y, drop), rtol=1e-5, atol=1e-5)
    assert run.reason is None


def test_threads_share_one_forward():
    model = small()
    run, (x, t, y) = NativeForward(model), inputs(model)
    want, wrong = run(x, t, y), []

    def work():
        torch.set_grad_enabled(False)  # a setting of each thread
        for _ in range(20):
            if not torch.equal(run(x, t, y), want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_sampler_takes_it_where_it_fits():
    model = small(input_size=8, learn_sigma=True)
    options = {"steps": 3, "solver": "ddim", "cfg_scale": 2.0}
    plain = fastdit.Sampler(model, native=False, **options)([1, 3], seed=0)
    sampler = fastdit.Sampler(model, **options)
    assert error(sampler([1, 3], seed=0), plain.double()) < 2e-5
    assert sampler._forward.reason is None
    int8 = fastdit.Sampler(model, quantize="int8", **options)([1, 3], seed=0)
    assert 1e-5 < error(int8, plain.double()) < 0.1
    hook = model.blocks[0].register_forward_hook(lambda *_args: None)
    assert error(sampler([1, 3], seed=0), plain.double()) < 2e-5
    assert "hook" in sampler._forward.reason
    with pytest.raises(fastdit.BackendError, match=r"native=True: .* a module has a forward hook"):
        fastdit.Sampler(model, native=True, **options)([1])
    hook.remove()
    with pytest.raises(ValueError, match="native: got False with quantize='int8'"):
        fastdit.Sampler(model, native=False, quantize="int8")
