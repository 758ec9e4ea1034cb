"""The simulator's arithmetic against Python's integers and PyTorch's numbers."""

import ptx_programs as ptx
import pytest
import torch

MASK = 2**32 - 1
EDGES = [0, 1, -1, 2**31 - 1, -(2**31), 7, -7, 31, 0x12345678, -0x12345678]


def integers():
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        random = torch.randint(-(2**31), 2**31, (22,), generator=generator)
        edges = torch.tensor(EDGES)[torch.randperm(10, generator=generator)]
        yield torch.cat([edges, random]).to(torch.int32)


def signed(x):
    return (x & MASK) - ((x & 2**31) << 1)


def truncating(a, b):
    return -1 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def permuted(a, b, selector):
    octets = (a & MASK).to_bytes(4, "little") + (b & MASK).to_bytes(4, "little")
    return int.from_bytes(
        bytes(octets[selector >> 4 * i & 7] for i in range(4)),
        "little",
    )


INTEGER = {
    "add.s32 OUT, A, B;": lambda a, b, c: a + b,
    "sub.s32 OUT, A, B;": lambda a, b, c: a - b,
    "mul.lo.s32 OUT, A, B;": lambda a, b, c: a * b,
    "mul.hi.s32 OUT, A, B;": lambda a, b, c: a * b >> 32,
    "mul.hi.u32 OUT, A, B;": lambda a, b, c: (a & MASK) * (b & MASK) >> 32,
    "mad.lo.s32 OUT, A, B, C;": lambda a, b, c: a * b + c,
    "mul.wide.s32 %d9, A, B; mov.b64 {%r9, OUT}, %d9;": lambda a, b, c: a * b >> 32,
    "mad.wide.u32 %d9, A, B, 5; shr.u64 %d9, %d9, 32; cvt.u32.u64 OUT, %d9;": (
        lambda a, b, c: (a & MASK) * (b & MASK) + 5 >> 32
    ),
    "div.s32 OUT, A, B;": lambda a, b, c: truncating(a, b),
    "div.u32 OUT, A, B;": lambda a, b, c: (a & MASK) // (b & MASK) if b else MASK,
    "rem.s32 OUT, A, B;": lambda a, b, c: a - truncating(a, b) * b if b else a,
    "min.s32 OUT, A, B;": lambda a, b, c: min(a, b),
    "max.u32 OUT, A, B;": lambda a, b, c: max(a & MASK, b & MASK),
    "abs.s32 OUT, A;": lambda a, b, c: abs(a),
    "neg.s32 OUT, A;": lambda a, b, c: -a,
    "and.b32 %r9, A, B; xor.b32 OUT, %r9, C;": lambda a, b, c: (a & b) ^ c,
    "not.b32 %r9, A; or.b32 OUT, %r9, B;": lambda a, b, c: ~a | b,
    "shl.b32 OUT, A, B;": lambda a, b, c: a << (b & MASK) if b & MASK < 32 else 0,
    "shr.u32 OUT, A, 5;": lambda a, b, c: (a & MASK) >> 5,
    "shr.s32 OUT, A, 40;": lambda a, b, c: a >> 31,
    "shf.l.wrap.b32 OUT, A, B, 7;": lambda a, b, c: b << 7 | (a & MASK) >> 25,
    "shf.r.wrap.b32 OUT, A, B, C;": lambda a, b, c: ((b & MASK) << 32 | (a & MASK)) >> (c & 31),
    "bfe.u32 OUT, A, 5, 7;": lambda a, b, c: a >> 5 & 127,
    "bfe.s32 OUT, A, 5, 7;": lambda a, b, c: (a >> 5 & 127) - (a >> 4 & 128),
    "bfi.b32 OUT, A, B, 8, 4;": lambda a, b, c: b & ~0xF00 | (a & 15) << 8,
    "prmt.b32 OUT, A, B, 0x5410;": lambda a, b, c: permuted(a, b, 0x5410),
    "prmt.b32 OUT, A, B, 0x7531;": lambda a, b, c: permuted(a, b, 0x7531),
    "lop3.b32 OUT, A, B, C, 0xE8;": lambda a, b, c: a & b | a & c | b & c,
    "popc.b32 OUT, A;": lambda a, b, c: (a & MASK).bit_count(),
    "clz.b32 OUT, A;": lambda a, b, c: 32 - (a & MASK).bit_length(),
    "brev.b32 OUT, A;": lambda a, b, c: int(f"{a & MASK:032b}"[::-1], 2),
    "add.cc.u32 %r9, A, B; addc.u32 OUT, C, 0;": (
        lambda a, b, c: c + ((a & MASK) + (b & MASK) >> 32)
    ),
    "mad.lo.cc.u32 %r9, A, B, C; madc.hi.u32 OUT, A, B, 0;": (
        lambda a, b, c: (a & MASK) * (b & MASK) + (c & MASK) >> 32
    ),
    "setp.lt.u32 %p1, A, B; selp.b32 OUT, A, B, %p1;": (
        lambda a, b, c: a if a & MASK < b & MASK else b
    ),
    "setp.ge.s32 %p1|%p2, A, B; selp.b32 OUT, A, C, %p2;": lambda a, b, c: a if a < b else c,
    "setp.ne.s32 %p1, A, 0; setp.gt.and.s32 %p2, B, C, %p1; selp.u32 OUT, 1, 0, %p2;": (
        lambda a, b, c: int(a != 0 and b > c)
    ),
    "mov.u32 OUT, 3; setp.gt.s32 %p1, A, 0; @!%p1 mov.u32 OUT, 4;": (
        lambda a, b, c: 3 if a > 0 else 4
    ),
    "cvt.s32.s8 OUT, A;": lambda a, b, c: (a & 255) - ((a & 128) << 1),
    "cvt.u16.u32 %h1, A; cvt.s32.s16 OUT, %h1;": lambda a, b, c: (a & 0xFFFF) - ((a & 0x8000) << 1),
    "cvt.s64.s32 %d9, A; shr.s64 %d9, %d9, 1; cvt.u32.u64 OUT, %d9;": lambda a, b, c: a >> 1,
    "{.reg .b16 low, high; mov.b32 {low, high}, A; mov.b32 OUT, {high, low};}": (
        lambda a, b, c: (a & 0xFFFF) << 16 | (a >> 16 & 0xFFFF)
    ),
}


@pytest.mark.parametrize("body", INTEGER)
def test_integer_instructions(body):
    inputs = list(integers())
    out = ptx.operation(body, *inputs)
    rows = zip(*(x.tolist() for x in inputs), strict=True)
    assert out.tolist() == [signed(INTEGER[body](*row)) for row in rows]


def test_64_bit_products():
    a, b = (torch.randint(-(2**63), 2**63 - 1, (32,)) for _ in range(2))
    high = [(x * y) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert ptx.operation("mul.hi.s64 OUT, A, B;", a, b, bits=64).tolist() == high
    assert torch.equal(ptx.operation("mad.lo.s64 OUT, A, B, A;", a, b, bits=64), a * b + a)


NAN, INF = float("nan"), float("inf")
FLOAT = {
    "add.f32 OUT, A, B;": lambda a, b, c: a + b,
    "sub.f32 OUT, A, B;": lambda a, b, c: a - b,
    "mul.f32 OUT, A, B;": lambda a, b, c: a * b,
    "div.full.f32 OUT, A, B;": lambda a, b, c: a / b,
    "fma.rn.f32 OUT, A, B, C;": lambda a, b, c: (a.double() * b + c).float(),
    "min.f32 OUT, A, B;": lambda a, b, c: torch.fmin(a, b),
    "max.NaN.f32 OUT, A, B;": lambda a, b, c: torch.maximum(a, b),
    "neg.f32 %r9, A; abs.f32 OUT, %r9;": lambda a, b, c: a.abs(),
    "copysign.f32 OUT, A, B;": lambda a, b, c: torch.copysign(b, a),
    "sqrt.rn.f32 OUT, A;": lambda a, b, c: a.double().sqrt().float(),
    "add.sat.f32 OUT, A, B;": lambda a, b, c: (a + b).nan_to_num(0.0, INF, -INF).clamp(0, 1),
    "add.ftz.f32 OUT, A, 0f00000000;": lambda a, b, c: torch.where(a.abs() < 2.0**-126, a * 0, a),
    "setp.ltu.f32 %p1, A, B; selp.f32 OUT, A, B, %p1;": lambda a, b, c: torch.where(a >= b, b, a),
    "setp.neu.f32 %p1, A, B; selp.f32 OUT, A, C, %p1;": lambda a, b, c: torch.where(a == b, c, a),
    "setp.nan.f32 %p1, A, B; selp.f32 OUT, C, A, %p1;": lambda a, b, c: torch.where(
        a.isnan() | b.isnan(), c, a
    ),
    "cvt.rni.f32.f32 OUT, A;": lambda a, b, c: a.round(),
    "cvt.rzi.s32.f32 %r9, A; cvt.rn.f32.s32 OUT, %r9;": lambda a, b, c: (
        a.nan_to_num(0.0).clamp(-(2.0**31), 2.0**31).trunc()
    ),
}


def floats():
    generator = torch.Generator().manual_seed(1)
    for scale in (1, 1, 1e3):
        special = torch.tensor([0.0, -0.0, 1.5, -2.5, 1e-40, -1e-40, 3e38, 1e10, INF, -INF, NAN])
        special = special[torch.randperm(11, generator=generator)]
        yield torch.cat([special, scale * torch.randn(21, generator=generator)])


@pytest.mark.parametrize("body", FLOAT)
def test_floating_point_instructions(body):
    inputs = list(floats())
    out, expected = ptx.operation(body, *inputs), FLOAT[body](*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("ex2.approx.ftz.f32", torch.exp2),
        ("lg2.approx.f32", torch.log2),
        ("rsqrt.approx.f32", torch.rsqrt),
        ("rcp.approx.f32", torch.reciprocal),
        ("sin.approx.f32", torch.sin),
        ("cos.approx.f32", torch.cos),
        ("tanh.approx.f32", torch.tanh),
    ],
)
def test_approximate_functions_are_computed_to_the_last_bit(name, function):
    x = torch.rand(32) + 0.1
    out = ptx.operation(f"{name} OUT, A;", x)
    torch.testing.assert_close(out, function(x.double()).float(), rtol=0, atol=0)


def test_conversion_to_tf32_rounds_to_nearest():
    x = torch.tensor([1 + 2**-11, 1 + 2**-12, -1 - 2**-11 - 2**-20] + [2.0] * 29)
    out = ptx.operation("cvt.rna.tf32.f32 OUT, A;", x)
    assert out[:3].tolist() == [1 + 2**-10, 1.0, -1 - 2**-10]


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_packed_16_bit_arithmetic(name, dtype):
    a, b, c = (torch.randn(32, 2).to(dtype) for _ in range(3))
    words = [x.view(torch.int32)[:, 0] for x in (a, b, c)]
    out = ptx.operation(f"fma.rn.{name}x2 OUT, A, B, C;", *words)
    expected = (a.double() * b.double() + c.double()).to(dtype)
    assert torch.equal(out.view(dtype).reshape(32, 2), expected)
    packed = ptx.operation(f"cvt.rn.{name}x2.f32 OUT, A, B;", a[:, 1].float(), b[:, 0].float())
    expected = torch.stack([b[:, 0], a[:, 1]], 1)
    assert torch.equal(packed.view(dtype).reshape(32, 2), expected)


def test_blackwell_pairs_and_mixed_precision():
    a, b, c = (torch.randn(32, 2) for _ in range(3))
    wide = [x.view(torch.int64)[:, 0] for x in (a, b, c)]
    out = ptx.operation("fma.rn.f32x2 OUT, A, B, C;", *wide, bits=64, target="sm_100")
    expected = (a.double() * b + c).float()
    assert torch.equal(out.view(torch.float32).reshape(32, 2), expected)
    halves = torch.randn(32).bfloat16()
    words = halves.view(torch.int16).to(torch.int32).view(torch.float32)
    body = "cvt.u16.u32 %h1, A; sub.rn.f32.bf16 OUT, %h1, B;"
    out = ptx.operation(body, words, b[:, 0].contiguous(), target="sm_100")
    assert torch.equal(out, halves.float() - b[:, 0])
