"""attention and its backward: softmax(QKᵀ/√d)V of one packed projection.

    pytest benchmarks/bench_attention.py --benchmark-only
    python benchmarks/bench_attention.py [--threads 1] [--subset full] [--only backward]

On GPUs, PyTorch's backends of SDPA one by one, and the flash-attn package, have columns of their
own for the forward pass. fastdit's `auto` chooses among these and its own kernel by a table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness.op_benchmark import OpBenchmark, random
from harness.problem import absent
from harness.running import main, tests
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLASH = "flash-attn"


def inputs(size, dtype, device):
    shape = (size.batch, size.tokens, 3 * size.width)
    return [random(*shape, dtype=dtype, device=device), size.heads]


def further(args, device):
    """The libraries' kernels by name; on a CPU there are none to choose from."""
    if device != "cuda":
        return {}
    qkv, heads = args
    batch, tokens, width = qkv.shape
    packed = qkv.detach().view(batch, tokens, 3, heads, width // 3 // heads)
    q, k, v = packed.permute(2, 0, 3, 1, 4)

    def sdpa(backend):
        def run():
            with sdpa_kernel(backend), torch.no_grad():
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        return run

    def flash_attn():
        from flash_attn import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(packed).flatten(2)

    found = {name: sdpa(backend) for name, backend in BACKENDS.items()}
    return found | {FLASH: absent(FLASH) or flash_attn}


def flops(size):
    return 4 * size.batch * size.tokens**2 * size.width


cases = OpBenchmark("attention", inputs, flops=flops, further=further).cases
test_attention = tests(cases, *BACKENDS, FLASH)

if __name__ == "__main__":
    main(cases)
