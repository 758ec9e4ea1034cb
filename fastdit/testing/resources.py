"""What a compiled kernel needs of the GPU: registers, spills, access widths, occupancy.

NVIDIA: `cuobjdump -res-usage` and `nvdisasm`, both part of Triton's wheel, read the cubin. AMD:
Triton's assembly text tells the same.

A spill shows as a stack frame with local loads and stores (LDL, STL). Functions such as `tl.sin`
and `tl.randn` have a stack without spilling: their slow path indexes a table kept in local memory.
"""

from __future__ import annotations

import collections
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from triton import knobs

from fastdit.testing.gpus import Occupancy, gpu_of, occupancy

_TENSOR_CORE = re.compile(r"(HMMA|IMMA|QMMA|OMMA|DMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)(\.|$)")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_RES_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Resources:
    """A compiled kernel's use of one GPU; counts of instructions are static, bytes are bytes.

    A global access of 128 bits or more a thread is *wide*, anything less *narrow*: `loads_wide`
    counts LDG.128 and 16-byte asynchronous copies (LDGSTS, TMA), `stores_wide` STG.128. On AMD
    they are the dwordx4 forms, `registers` are vector registers (with accumulation registers), and
    `spill_loads`, `spill_stores` are scratch accesses.
    """

    name: str
    arch: str
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    spill_loads: int
    spill_stores: int
    loads_wide: int
    loads_narrow: int
    stores_wide: int
    stores_narrow: int
    tensor_core: int
    instructions: int

    @property
    def spills(self) -> int:
        """Local loads and stores together: 0 in a healthy kernel."""
        return self.spill_loads + self.spill_stores

    @property
    def occupancy(self) -> Occupancy:
        """Theoretical occupancy on this architecture."""
        return occupancy(self.arch, self.registers, self.shared_bytes, self.num_warps)


def inspect(compiled: Any) -> Resources:
    """Read the resources of what a launch under `VirtualGPU` or `kernel.warmup` returned.

    Args:
        compiled: Triton's `CompiledKernel`, or a `Launch` that holds one.

    Raises:
        ValueError: there is no compiled kernel in it.
    """
    compiled = getattr(compiled, "compiled", compiled)
    if not hasattr(compiled, "asm"):
        raise ValueError(
            f"compiled: got {compiled!r}, allowed is a compiled kernel; an interpreted launch has "
            "none, use VirtualGPU(arch, mode='compile')"
        )
    arch = compiled.metadata.target.arch
    gpu = gpu_of(arch)
    read = _nvidia if gpu.vendor == "cuda" else _amd
    return Resources(
        name=compiled.metadata.name,
        arch=gpu.arch,
        num_warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        **read(compiled.asm),
    )


def sass_opcodes(cubin: bytes) -> collections.Counter[str]:
    """How often each SASS opcode, with its modifiers, stands in the cubin."""
    return collections.Counter(_SASS.findall(_tool(cubin, "nvdisasm", "-c")))


@functools.lru_cache(maxsize=512)
def _tool(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _nvidia(asm: Any) -> dict[str, int]:
    usage = _RES_USAGE.search(_tool(asm["cubin"], "cuobjdump", "-res-usage"))
    if usage is None:
        raise RuntimeError("cuobjdump -res-usage printed no resource line")
    registers, stack, _, local = map(int, usage.groups())
    opcodes = sass_opcodes(asm["cubin"])

    def count(*names: str, wide: bool | None = None) -> int:
        return sum(
            n
            for opcode, n in opcodes.items()
            if opcode.split(".")[0] in names and (wide is None or is_wide(opcode) == wide)
        )

    return {
        "registers": registers,
        "stack_bytes": stack + local,
        "spill_loads": count("LDL"),
        "spill_stores": count("STL"),
        "loads_wide": count("LDG", "LDGSTS", wide=True) + count("UBLKCP", "UTMALDG"),
        "loads_narrow": count("LDG", "LDGSTS", wide=False),
        "stores_wide": count("STG", wide=True) + count("UTMASTG"),
        "stores_narrow": count("STG", wide=False),
        "tensor_core": sum(n for opcode, n in opcodes.items() if _TENSOR_CORE.match(opcode)),
        "instructions": sum(opcodes.values()),
    }


def is_wide(opcode: str) -> bool:
    """Whether a SASS access is of 128 bits or more; the LTC128B of some is a prefetch size."""
    return not {"128", "256"}.isdisjoint(opcode.split("."))


def _amd(asm: Any) -> dict[str, int]:
    text = asm["amdgcn"]

    def metadata(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s*(\d+)", text, re.M)
        return int(found.group(1)) if found else 0

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+(?:{pattern})\b", text, re.M))

    loads = count(r"(?:global|buffer)_load_\w+")
    stores = count(r"(?:global|buffer)_store_\w+")
    loads_wide = count(r"(?:global|buffer)_load_(?:lds_)?dwordx4")
    stores_wide = count(r"(?:global|buffer)_store_dwordx4")
    return {
        # The unified register file: vgpr_count already includes the accumulation registers.
        "registers": metadata("vgpr_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "spill_loads": count(r"scratch_load_\w+"),
        "spill_stores": count(r"scratch_store_\w+"),
        "loads_wide": loads_wide,
        "loads_narrow": loads - loads_wide,
        "stores_wide": stores_wide,
        "stores_narrow": stores - stores_wide,
        "tensor_core": count(r"v_mfma_\w+|v_wmma_\w+|v_smfmac_\w+"),
        "instructions": count(r"[svdg][a-z]*_\w+|buffer_\w+|scratch_\w+|flat_\w+"),
    }
