"""What keeps the native forward from the machine's ceiling: one thread, processor time.

    python benchmarks/forward_gap.py [--cases tiny64,S/2b1,B/2,XL/2] [--rounds 5]

For each case: the GFLOP/s of the whole, of each of its four products and of attention, as a share
of the peak of fused multiply-adds (`multiply_adds`: nothing else, in registers), MKL's rate for the
same four products, and what share of the time each part takes. "gelu" is how much longer fc1 takes
than qkv, which reads the same rows, would for as many operations. Rows of conditioning are given.
"waiting" is what more threads add: 1 - processor time of one / (threads x wall time), taken with
`--threads` on an idle machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from bench_forward import CASES, model_of
from timing import interleaved
from torch import Tensor
from torch.nn import functional as F

import fastdit
from fastdit.native_forward import PARTS


def seconds_of(function, count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        function()
    return (time.process_time() - start) / count


def peak() -> float:
    """GFLOP/s of multiply-adds in registers."""
    steps, best = 2_000_000, 0.0
    for _ in range(5):
        start = time.process_time()
        flop = torch.ops.fastdit_native.multiply_adds(steps)
        best = max(best, flop / (time.process_time() - start) / 1e9)
    return best


def operations(model: fastdit.DiT, batch: int) -> dict[str, float]:
    """Of each part that has products, in a whole forward."""
    width, tokens, depth = model.hidden_size, math.prod(model.grid), len(model.blocks)
    mlp = model.blocks[0].mlp.fc1.out_features
    rows = 2.0 * batch * tokens * depth
    found = {
        "qkv": 3 * width * width,
        "proj": width * width,
        "fc1": width * mlp,
        "fc2": mlp * width,
    }
    return {name: rows * each for name, each in found.items()} | {
        "attention": rows * 2 * tokens * width
    }


def mkl(model: fastdit.DiT, batch: int, rounds: int) -> float:
    """GFLOP/s of PyTorch's own products in the shapes of the four Linears, without more."""
    block, rows = model.blocks[0], batch * math.prod(model.grid)
    linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    pairs = [(torch.randn(rows, each.in_features), each.weight) for each in linears]
    flop = sum(2.0 * rows * w.numel() for _, w in pairs)

    def products() -> list[Tensor]:
        return [F.linear(x, w) for x, w in pairs]

    products()
    count = max(1, int(2e9 / flop))
    return flop / statistics.median(seconds_of(products, count) for _ in range(rounds)) / 1e9


def measure(case: str, rounds: int, threads: int) -> None:
    name, batch = CASES[case]
    model = model_of(name)
    run = fastdit.NativeForward(model)
    x = torch.randn(batch, model.in_channels, *model.input_size)
    rows = run.conditioning(torch.arange(batch) * 10, torch.zeros(batch, dtype=torch.long))
    flop = operations(model, batch)
    whole = 2.0 * model.flops() * batch
    count = max(1, int(2e9 / whole))
    run.parts(x, rows)
    found: dict[str, list[float]] = {part: [] for part in (*PARTS, "all")}
    for _ in range(rounds):
        total = dict.fromkeys(PARTS, 0.0)
        found["all"].append(seconds_of(lambda: run(x, None, None, conditioning=rows), count))
        for _ in range(count):
            for part, seconds in run.parts(x, rows)[1].items():
                total[part] += seconds / count
        for part, seconds in total.items():
            found[part].append(seconds)
    spent = {part: statistics.median(seconds) for part, seconds in found.items()}
    top, everything = peak(), spent["all"]
    products = [spent[part] for part in ("qkv", "proj", "fc1", "fc2")]
    print(f"\n{name}, batch {batch}: {1e3 * everything:.2f} ms", flush=True)
    lines = {"all": whole / everything, "products": sum(flop.values()) - flop["attention"]}
    lines["products"] /= sum(products)
    lines |= {part: flop[part] / spent[part] for part in flop}
    print(f"  {'peak':10} {top:6.1f} GFLOP/s")
    for part, rate in lines.items():
        share = 100 * spent.get(part, sum(products)) / everything
        line = f"  {part:10} {rate / 1e9:6.1f} GFLOP/s, {rate / top / 1e7:3.0f} % of the peak"
        print(f"{line}; {share:5.1f} % of the time")
    print(f"  {'MKL':10} {mkl(model, batch, rounds):6.1f} GFLOP/s for the four products")
    gelu = spent["fc1"] - flop["fc1"] * spent["qkv"] / flop["qkv"]
    rest = {"gelu": gelu} | {part: spent[part] for part in PARTS if part not in flop}
    rest["call"] = everything - sum(spent[part] for part in PARTS)
    print("  " + ", ".join(f"{n} {100 * s / everything:.1f} %" for n, s in rest.items()))
    if threads > 1:
        torch.set_num_threads(threads)
        timing = interleaved({"": lambda: run(x, None, None, conditioning=rows)}, rounds)
        torch.set_num_threads(1)
        wall = statistics.median(timing.seconds[""])
        waiting = 100 * (1 - everything / (threads * wall))
        print(f"  {threads} threads: {1e3 * wall:.2f} ms, waiting {waiting:.0f} %", end="")
        print(f" ({timing.disturbed} turns beside other processes)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", default="tiny64,S/2b1,S/2,B/2,XL/2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="tell also how long so many wait")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for case in options.cases.split(","):
        measure(case, options.rounds, options.threads)


if __name__ == "__main__":
    main()
