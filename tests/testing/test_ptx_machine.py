"""The simulator's warps, barriers, memories and errors, in hand-written PTX."""

import numpy as np
import ptx_programs as ptx
import pytest
import torch

from fastdit.testing import MemoryFault, SimulationError, run_ptx

LANES = torch.arange(32, dtype=torch.int32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shfl.sync.bfly.b32 OUT, A, 3, 0x1f, -1;", LANES ^ 3),
        ("shfl.sync.idx.b32 OUT, A, 5, 0x1f, -1;", LANES * 0 + 5),
        ("shfl.sync.up.b32 OUT, A, 4, 0, -1;", torch.where(LANES < 4, LANES, LANES - 4)),
        ("shfl.sync.down.b32 OUT, A, 4, 0x1f, -1;", torch.where(LANES > 27, LANES, LANES + 4)),
        # Segments of 8 lanes: the mask is 0b11000.
        ("shfl.sync.idx.b32 OUT, A, 2, 0x181f, -1;", LANES // 8 * 8 + 2),
        ("shfl.sync.down.b32 OUT, A, 1, 0x181f, -1;", LANES + (LANES % 8 < 7).int()),
        (
            "shfl.sync.up.b32 %r9|%p1, A, 4, 0, -1; selp.u32 OUT, 1, 0, %p1;",
            (LANES >= 4).int(),
        ),
        ("redux.sync.add.s32 OUT, A, -1;", LANES * 0 + 496),
        (
            "setp.gt.u32 %p1, A, 29; vote.sync.ballot.b32 OUT, %p1, -1;",
            LANES * 0 - 2**30,
        ),
        (
            "setp.gt.u32 %p1, A, 29; vote.sync.any.pred %p2, %p1, -1; selp.u32 OUT, 1, 0, %p2;",
            LANES * 0 + 1,
        ),
    ],
)
def test_lanes_meet(body, expected):
    assert torch.equal(ptx.operation(body.replace("-1;", "0xffffffff;"), LANES), expected)


def test_a_shuffle_from_an_inactive_lane_is_an_error():
    body = "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 OUT, A, 16, 0x1f, 0xffffffff;"
    with pytest.raises(SimulationError, match="inactive lane"):
        ptx.operation(body, LANES)


@pytest.mark.parametrize(
    ("stride", "access", "wavefronts", "least"),
    [
        (4, "st.shared.b32 [%r7], %r0;", 1, 1),
        (8, "st.shared.b32 [%r7], %r0;", 2, 1),
        (128, "st.shared.b32 [%r7], %r0;", 32, 1),
        (132, "st.shared.b32 [%r7], %r0;", 1, 1),
        (0, "ld.shared.b32 %r9, [%r7];", 1, 1),
        (2, "ld.shared.b16 %h1, [%r7];", 1, 1),
        (8, "ld.shared.v2.b32 {%r9, %r10}, [%r7];", 2, 2),
        (16, "ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r7];", 4, 4),
        (128, "ld.shared.v4.b32 {%r9, %r10, %r11, %r12}, [%r7];", 32, 4),
    ],
)
def test_bank_conflicts(stride, access, wavefronts, least):
    body = f"mov.u32 %r6, tile; mad.lo.u32 %r7, %r0, {stride}, %r6; {access}"
    unused = torch.zeros(64)
    found = ptx.run(body, unused, unused, unused, unused, threads=64).shared
    expected = (2, 2 * wavefronts, 2 * least)
    assert (found.requests, found.wavefronts, found.least_wavefronts) == expected
    assert found.conflict_ratio == wavefronts / least


def test_the_halves_of_a_64_bit_access_conflict_separately():
    # Lanes 0 to 15 meet in banks 0 and 1, lanes 16 to 31 in banks 2 and 3: 16 wavefronts each.
    body = (
        "mov.u32 %r6, tile; shr.u32 %r5, %r0, 4; mad.lo.u32 %r7, %r5, 8, %r6;"
        "mad.lo.u32 %r7, %r0, 128, %r7; ld.shared.v2.b32 {%r9, %r10}, [%r7];"
    )
    unused = torch.zeros(32)
    found = ptx.run(body, unused, unused, unused, unused).shared
    assert (found.wavefronts, found.least_wavefronts) == (32, 2)


@pytest.mark.parametrize(
    ("threads", "limit", "divergent"),
    [(64, 32, 0), (64, 48, 1), (32, 0, 0)],
)
def test_divergent_branches(threads, limit, divergent):
    body = (
        f"setp.lt.u32 %p1, %r0, {limit}; @%p1 bra LOW; mov.u32 %r5, 7; bra END;"
        "LOW: mov.u32 %r5, 9; END: st.global.b32 [%d4], %r5;"
    )
    out = torch.zeros(threads, dtype=torch.int32)
    found = ptx.run(body, out, out, out, out, threads=threads)
    assert out.tolist() == [9 if t < limit else 7 for t in range(threads)]
    assert found.divergent_branches == divergent
    # Each warp: 10 of the prologue, setp, bra, then 2 (high) or 1 (low) or both, st and ret.
    sides = {(64, 32): 1 + 2, (64, 48): 1 + 3, (32, 0): 2}[threads, limit]
    assert found.warp_instructions == threads // 32 * 14 + sides


def test_loops_end_when_every_lane_has_left():
    body = (
        "mov.u32 %r5, 0; LOOP: add.s32 %r5, %r5, 1; setp.le.u32 %p1, %r5, %r0; @%p1 bra LOOP;"
        "st.global.b32 [%d4], %r5;"
    )
    out = torch.zeros(32, dtype=torch.int32)
    found = ptx.run(body, out, out, out, out)
    assert torch.equal(out, LANES + 1)
    assert found.divergent_branches == 31


def test_barriers_order_the_warps():
    body = (
        "mov.u32 %r6, tile; shl.b32 %r7, %r0, 2; add.u32 %r7, %r7, %r6;"
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra SKIP; st.shared.b32 [%r7], %r0; SKIP: bar.sync 0;"
        "@!%p1 bra END; ld.shared.b32 %r8, [%r7+128]; st.global.b32 [%d4], %r8; END:"
    )
    out = torch.zeros(64, dtype=torch.int32)
    ptx.run(body, out, out, out, out, threads=64)
    assert out.tolist() == [*range(32, 64), *[0] * 32]


def test_two_barriers_at_once_are_an_error():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra LOW; bar.sync 0; bra END; LOW: bar.sync 0; END:"
    unused = torch.zeros(64)
    with pytest.raises(SimulationError, match="two barriers"):
        ptx.run(body, unused, unused, unused, unused, threads=64)


@pytest.mark.parametrize(("wait", "arrived"), [("cp.async.wait_group 0;", True), ("", False)])
def test_an_asynchronous_copy_is_there_only_after_its_wait(wait, arrived):
    body = (
        "mov.u32 %r6, tile; shl.b32 %r7, %r0, 2; add.u32 %r7, %r7, %r6;"
        f"cp.async.ca.shared.global [%r7], [%d1], 4; cp.async.commit_group; {wait}"
        "ld.shared.b32 %r8, [%r7]; st.global.b32 [%d4], %r8;"
    )
    x, out = torch.randn(32), torch.zeros(32)
    ptx.run(body, x, x, x, out)
    assert torch.equal(out, x) == arrived
    assert out.isnan().all() == (not arrived)


def test_waiting_for_all_but_the_newest_group():
    body = (
        "mov.u32 %r6, tile; shl.b32 %r7, %r0, 2; add.u32 %r7, %r7, %r6;"
        "cp.async.ca.shared.global [%r7], [%d1], 4; cp.async.commit_group;"
        "cp.async.ca.shared.global [%r7+128], [%d2], 4; cp.async.commit_group;"
        "cp.async.wait_group 1; ld.shared.b32 %r8, [%r7]; st.global.b32 [%d4], %r8;"
        "ld.shared.b32 %r9, [%r7+128]; st.global.b32 [%d3], %r9;"
    )
    x, y, z, out = (torch.randn(32) for _ in range(4))
    ptx.run(body, x, y, z, out)
    assert torch.equal(out, x)
    assert z.isnan().all()


def test_registers_and_shared_memory_start_as_nan():
    out = torch.zeros(32)
    ptx.run("st.global.b32 [%d4], %r20;", out, out, out, out)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r5, [%d1+128];", "load out of bounds: 32 lanes"),
        ("st.global.b32 [%d4+-4], %r0;", "store out of bounds: 1 lanes"),
        (
            "setp.lt.u32 %p1, %r0, 9; @%p1 ld.global.v2.b32 {%r5, %r6}, [%d1];",
            "load of 8 bytes is not aligned",
        ),
        ("ld.shared.b32 %r5, [tile+16384];", "shared load out of bounds"),
    ],
)
def test_bad_accesses_fault(body, message):
    x = torch.zeros(32)
    with pytest.raises(MemoryFault, match=message):
        ptx.run(body, x, x.clone(), x.clone(), x.clone())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("nanosleep.u32 5;", "instruction nanosleep"),
        ("add.rz.f32 %r5, %r6, %r7;", "modifiers .'rz'"),
        ("mov.u32 %r5, %clock;", "special register %clock"),
        ("bar.sync 1, 32;", "named or partial barriers"),
    ],
)
def test_the_unknown_raises_with_its_text(body, message):
    x = torch.zeros(32)
    with pytest.raises(NotImplementedError, match=message):
        ptx.run(body, x, x, x, x)


def test_arguments_are_checked():
    program, x = ptx.assembled("ret;"), torch.zeros(32)
    with pytest.raises(ValueError, match="got 3, k has 4 parameters"):
        run_ptx(program, (1,), (32,), [x, x, x])
    with pytest.raises(ValueError, match="got 'x' for parameter pout"):
        run_ptx(program, (1,), (32,), [x, x, x, "x"])
    with pytest.raises(ValueError, match="tensor on meta"):
        run_ptx(program, (1,), (32,), [x, x, x, torch.zeros(4, device="meta")])
    with pytest.raises(ValueError, match="kernel: got 'other', the PTX has k"):
        run_ptx(program, (1,), (32,), [x, x, x, x], kernel="other")


STRUCT = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .align 8 .b8 call[32])
{
  .reg .b32 %r<4>; .reg .b64 %d<4>;
  mov.b64 %d1, call;
  ld.param.b32 %r1, [%d1+OFFSET];
  ld.param.u64 %d2, [call+8];
  st.global.b32 [%d2], %r1;
  ret;
}
"""


def test_a_struct_is_laid_out_as_in_c_and_read_through_its_address():
    out = torch.zeros(1, dtype=torch.int32)
    members = [np.int32(3), out, None, np.int16(1), np.int32(7)]
    run_ptx(STRUCT.replace("OFFSET", "28"), (1,), (1,), [members])
    assert out.item() == 7
    with pytest.raises(MemoryFault, match="outside the kernel's parameters"):
        run_ptx(STRUCT.replace("OFFSET", "30"), (1,), (1,), [members])
    with pytest.raises(ValueError, match="arguments: got"):
        run_ptx(STRUCT.replace("OFFSET", "28"), (1,), (1,), [members[:2]])
