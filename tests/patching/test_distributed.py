"""DDP and FSDP2, wrapped before and after patching, in one process and in two."""

from __future__ import annotations

import compare
import pytest
import research
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_research import GRADIENT_ULPS, make
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastdit


@pytest.fixture(scope="module", autouse=True)
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model, args):
    model.zero_grad()
    model(*args).square().mean().backward()
    named = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in named.items()}
    return {n: g for n, g in whole.items() if g is not None}


def shard(model):
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


@pytest.mark.parametrize("wrap", [DistributedDataParallel, shard])
@pytest.mark.parametrize("first", ["patch", "wrap"])
@pytest.mark.parametrize("level", ["exact", "fast"])
def test_gradients(wrap, first, level):
    model = make(class_dropout_prob=0.0).train()
    args = research.inputs(model, 64)
    theirs = gradients(model, args)
    handle = fastdit.patch(model, level) if first == "patch" else None
    wrapped = wrap(model)
    handle = handle or fastdit.patch(wrapped, level)
    assert not handle.report().skipped
    ours = gradients(wrapped, args)
    assert ours.keys() == theirs.keys()
    assert max(compare.ulps(ours[name], theirs[name]) for name in theirs) <= GRADIENT_ULPS
    handle.undo()
    restored = gradients(wrapped, args)
    assert all(torch.equal(restored[name], theirs[name]) for name in theirs)


WRAPPERS = {"DDP": DistributedDataParallel, "FSDP2": shard}


def two_processes(rank, folder):
    """Each with its own half of the batch: what every wrapper's gradients differ by, in ulp."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    worst = {}
    for name, wrap in WRAPPERS.items():
        for first in ("patch", "wrap"):
            model = make(class_dropout_prob=0.0).train()
            args = research.inputs(model, 64, seed=rank)
            alone = gradients(model, args)
            theirs = gradients(wrap(make(class_dropout_prob=0.0).train()), args)
            if first == "patch":
                fastdit.patch(model, "fast")
            model = wrap(model)
            if first == "wrap":
                fastdit.patch(model, "fast")
            ours = gradients(model, args)
            worst[name, first] = max(compare.ulps(ours[n], theirs[n]) for n in theirs)
            reduced = compare.ulps(ours["blocks.0.mlp.fc1.bias"], alone["blocks.0.mlp.fc1.bias"])
            assert reduced > 1e3  # the other process's half is in it
    dist.barrier()
    dist.destroy_process_group()
    torch.save(worst, f"{folder}/{rank}.pt")


def test_two_processes(tmp_path):
    torch.multiprocessing.start_processes(
        two_processes, (str(tmp_path),), nprocs=2, start_method="spawn"
    )
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert set(found[0]) == {(name, first) for name in WRAPPERS for first in ("patch", "wrap")}
    assert max(max(worst.values()) for worst in found) <= GRADIENT_ULPS
