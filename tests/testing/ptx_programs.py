"""Hand-written PTX: one kernel around a few instructions, checked by ptxas before it is run."""

import functools
import subprocess
import tempfile

import torch
from triton import knobs

from fastdit.testing import run_ptx

_TEMPLATE = """
.version 8.7
.target {target}
.address_size 64
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pout)
{{
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %d<20>;
  .shared .align 16 .b8 tile[16384];
  ld.param.u64 %d1, [pa];
  ld.param.u64 %d2, [pb];
  ld.param.u64 %d3, [pc];
  ld.param.u64 %d4, [pout];
  mov.u32 %r0, %tid.x;
  mul.wide.u32 %d0, %r0, {width};
  add.s64 %d1, %d1, %d0;
  add.s64 %d2, %d2, %d0;
  add.s64 %d3, %d3, %d0;
  add.s64 %d4, %d4, %d0;
  {body}
  ret;
}}
"""
_OPERATION = """
  ld.global.b{bits} {a}, [%d1];
  ld.global.b{bits} {b}, [%d2];
  ld.global.b{bits} {c}, [%d3];
  {body}
  st.global.b{bits} [%d4], {out};
"""


@functools.lru_cache(maxsize=256)
def assembled(body, target="sm_80", width=4):
    """The program's text, once ptxas has accepted it."""
    ptx = _TEMPLATE.format(body=body, target=target, width=width)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [knobs.nvidia.ptxas_blackwell.path, f"-arch={target}", file.name]
        subprocess.run([*command, "-o", "/dev/null"], check=True, capture_output=True)
    return ptx


def run(body, *tensors, threads=32, blocks=1, target="sm_80", width=4):
    """Run `body` with `%r0` the thread and `%d1` to `%d4` its places in the four tensors."""
    return run_ptx(assembled(body, target, width), (blocks,), (threads,), tensors)


def operation(body, *inputs, bits=32, target="sm_80"):
    """`body` applied to three inputs of 32 lanes: A, B, C to OUT in its text."""
    names = {
        32: {"a": "%r1", "b": "%r2", "c": "%r3", "out": "%r4"},
        64: {"a": "%d11", "b": "%d12", "c": "%d13", "out": "%d14"},
    }[bits]
    for name, register in names.items():
        body = body.replace(name.upper(), register)
    text = _OPERATION.format(body=body, bits=bits, **names)
    padded = [*inputs, *[torch.zeros_like(inputs[0])] * (3 - len(inputs))]
    out = torch.zeros_like(inputs[0])
    run(text, *padded, out, threads=inputs[0].numel(), target=target, width=bits // 8)
    return out
