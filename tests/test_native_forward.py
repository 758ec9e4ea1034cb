"""The native forward of a whole DiT on a CPU: exact, on every instruction set, in any batch."""

from __future__ import annotations

import copy
import functools

import golden
import pytest
import torch
from forward_models import Inputs, error, inputs, load_library, small
from torch import Tensor, nn

import fastdit
from fastdit.native_forward import NativeForward

ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture(autouse=True)
def inference():
    load_library()
    with torch.no_grad():
        yield


@pytest.fixture(params=ISAS)
def isa(request, inference):
    library = torch.ops.fastdit_native
    try:
        library.set_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    library.set_cpu_isa("")


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


def test_many_small_samples_have_the_same_bits_in_jobs_of_any_size():
    model = small()
    run, (x, t, y), threads = NativeForward(model), inputs(model, 131), torch.get_num_threads()
    alone = torch.cat([run(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in (0, 64, 65, 130)])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(x, t, y)[[0, 64, 65, 130]], alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [None, "int8"])
def test_the_time_of_each_part_is_told_and_changes_nothing(kind):
    model = small()
    run, (x, t, y), threads = NativeForward(model, kind), inputs(model, 5), torch.get_num_threads()
    rows = run.conditioning(t, y)
    try:
        torch.set_num_threads(2)
        got, seconds = run.parts(x, rows)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got, run(x, None, None, conditioning=rows))
    assert tuple(seconds) == fastdit.native_forward.PARTS
    assert all(0 < value < 10 for value in seconds.values())


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
