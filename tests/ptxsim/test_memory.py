# ruff: noqa: E501  (PTX)
"""Memory, barriers, asynchronous copies, matrices, calls; and that their misuse is found."""

import ctypes

import numpy as np
import ptxsim
import pytest
from ptx_cases import kernel, lanes


def found(code, match, **keywords):
    with pytest.raises(ptxsim.Findings, match=match):
        lanes(code, **keywords)


# ----------------------------------------------------------------------------------------------------------------------
# Loads and stores


@pytest.mark.parametrize("ty,width", [("u8", 1), ("s8", 1), ("u16", 2), ("s16", 2), ("u32", 4), ("s32", 4)])
def test_loads_extend_to_their_register(ty, width):
    data = np.array([0x80, 0xFF, 0x7F, 1] * 32, np.uint8)[: 32 * width].view(
        {1: np.uint8, 2: np.uint16, 4: np.uint32}[width]
    )
    out = lanes(f"ld.global.{ty} %r2, [%rd0]; st.global.u32 [%rd1], %r2;", data=data)
    signed = data.view({1: np.int8, 2: np.int16, 4: np.int32}[width]) if ty[0] == "s" else data
    assert out.tolist() == (signed.astype(np.int64) & 0xFFFFFFFF).tolist()


def test_vectors():
    data = np.random.default_rng(0).integers(0, 2**32, (32, 4)).astype(np.uint32)
    code = """mad.wide.u32 %rd4, %r0, 16, %rd2; ld.global.nc.v4.u32 {%r2, %r3, %r4, %r5}, [%rd4]; st.global.v4.u32 [%rd1], {%r5, %r4, %r3, %r2};"""
    assert (lanes(code, 4, data) == data[:, ::-1]).all()
    hints = """createpolicy.fractional.L2::evict_first.b64 %rd9; createpolicy.fractional.L2::evict_last.b64 %rd9, 0.5;
      mad.wide.u32 %rd4, %r0, 16, %rd2;
      ld.global.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%r2, %r3, %r4, %r5}, [%rd4], %rd9;
      st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%rd1], {%r5, %r4, %r3, %r2}, %rd9;"""
    assert (lanes(hints, 4, data) == data[:, ::-1]).all()
    code = """mad.wide.u32 %rd4, %r0, 16, %rd2; ld.global.v2.u64 {%rd5, %rd6}, [%rd4]; st.global.v2.b64 [%rd1], {%rd6, %rd5};"""
    assert (lanes(code, 4, data) == data[:, [2, 3, 0, 1]]).all()
    code = """mad.wide.u32 %rd4, %r0, 16, %rd2; ld.global.v4.u8 {%h1, %h2, %h3, %h4}, [%rd4+4]; mov.b32 %r2, {%h1, %h4};
      ld.global.v2.u16 {%h5, %h6}, [%rd4]; mov.b32 %r3, {%h6, %h5}; mov.u32 %r4, 0; st.global.v4.u32 [%rd1], {%r2, %r3, %r4, %r4};"""
    out = lanes(code, 4, data)
    raw = data.view(np.uint8).reshape(32, 16)
    assert (out[:, 0] == raw[:, 4].astype(np.uint32) + (raw[:, 7].astype(np.uint32) << 16)).all()
    assert (out[:, 1] == (data[:, 0] >> 16 | data[:, 0] << 16)).all()


def test_spaces():
    code = """.local .align 8 .b8 depot[8]; .shared .align 4 .u32 cell[32];
      mov.u64 %rd5, depot; cvta.local.u64 %rd6, %rd5; st.u32 [%rd6+4], %r0; ld.local.u32 %r2, [depot+4];
      mov.u32 %r3, cell; mad.lo.u32 %r3, %r0, 4, %r3; st.shared.u32 [%r3], %r2; cvt.u64.u32 %rd7, %r3; cvta.shared.u64 %rd8, %rd7; ld.u32 %r4, [%rd8];
      mov.u64 %rd9, table; cvta.const.u64 %rd9, %rd9; ld.u32 %r5, [%rd9+8]; ld.const.u32 %r6, [table];
      isspacep.shared %p1, %rd8; isspacep.local %p2, %rd8; isspacep.local %p3, %rd6; isspacep.global %p4, %rd1;
      selp.u32 %r7, 1, 0, %p1; selp.u32 %r8, 2, 0, %p2; selp.u32 %r9, 4, 0, %p3; selp.u32 %r10, 8, 0, %p4;
      add.u32 %r7, %r7, %r8; add.u32 %r7, %r7, %r9; add.u32 %r7, %r7, %r10;
      st.global.v4.u32 [%rd1], {%r4, %r5, %r6, %r7};"""
    out = lanes(code, 4, outside=".const .align 4 .u32 table[3] = {10, 20, 30};")
    assert out.tolist() == [[lane, 30, 10, 13] for lane in range(32)]


def test_bounds_alignment_and_access():
    found(
        "ld.global.u32 %r2, [%rd0+4];",
        "OUT OF BOUNDS global read: 4 bytes .* block .0,0,0. thread 31 .* 128 bytes into 'data' of 128",
    )
    found("ld.global.u32 %r2, [%rd0-4];", "OUT OF BOUNDS global read")
    found("st.global.u32 [%rd1+4], %r0;", "OUT OF BOUNDS global write")
    found("ld.global.u32 %r2, [%rd0+2];", "MISALIGNED global read")
    found("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd2+4];", "MISALIGNED global read: 16 bytes")
    found("ld.global.u32 %r2, [0];", "OUT OF BOUNDS")
    found(".shared .u32 a; .shared .u32 b; st.shared.u32 [a+4], %r0;", "OUT OF BOUNDS shared write", threads=1)
    found(".local .b8 a[8]; st.local.u32 [a+8], %r0;", "OUT OF BOUNDS local")
    data = np.zeros(1, np.uint32)
    m = kernel("ld.param.u64 %rd0, [q]; st.global.u32 [%rd0], 0;", ".param .u64 q")
    with pytest.raises(ptxsim.Findings, match="WRITE TO READ-ONLY 'x'"):
        m.launch("k", 1, 1, [ptxsim.pointer(data)], {"x": (data, True)})


def test_registered_ranges():
    data = np.zeros(8, np.uint32)
    m = kernel("ld.param.u64 %rd0, [q]; st.global.u32 [%rd0+28], 3;", ".param .u64 q")
    m.launch("k", 1, 1, [ptxsim.pointer(data)], {"short": (data[:4], True), "whole": data})
    assert data[7] == 3
    with pytest.raises(ValueError, match="overlaps"):
        m.launch("k", 1, 1, [ptxsim.pointer(data)], {"a": data[:4], "b": data[3:]})
    strided = np.zeros((4, 8), np.uint32)[:, :2]
    m.launch("k", 1, 1, [ptxsim.pointer(strided)], {"x": strided})  # 28 is in the gap of the strides: part of the range


def test_parameters():
    out = np.zeros(2, np.uint32)
    code = """ld.param.u64 %rd1, [q]; mov.b64 %rd5, q; cvta.param.u64 %rd6, %rd5; ld.u32 %r2, [%rd6+8]; ld.param.u32 %r3, [q+12];
      st.global.v2.u32 [%rd1], {%r2, %r3};"""

    class Struct(ctypes.Structure):
        _fields_ = [("out", ctypes.c_void_p), ("a", ctypes.c_uint), ("b", ctypes.c_uint)]

    params = ".param .align 8 .b8 q[16]"
    kernel(code, params).launch("k", 1, 1, [Struct(out.ctypes.data, 5, 6)], {"out": out})
    assert out.tolist() == [5, 6]
    with pytest.raises(ptxsim.Findings, match="OUT OF BOUNDS parameter read"):
        kernel("ld.param.u32 %r3, [q+16];", params).launch("k", 1, 1, [Struct(0, 0, 0)], {})


def test_races():
    cell = ".shared .u32 cell; "
    found(cell + "st.shared.u32 [cell], %r0;", "RACE in shared memory: write", threads=2)
    lanes(cell + "st.shared.u32 [cell], 7; bar.sync 0; ld.shared.u32 %r2, [cell]; st.global.u32 [%rd1], %r2;")
    first = "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [cell], 7; "
    found(cell + first + "ld.shared.u32 %r2, [cell];", "RACE in shared memory: read", threads=2)
    found(
        cell + first + "bar.sync 0; ld.shared.u32 %r2, [cell]; @%p1 st.shared.u32 [cell], 8;",
        "write .* not ordered after a read",
        threads=2,
    )
    lanes(
        cell + first + "bar.warp.sync -1; ld.shared.u32 %r2, [cell]; bar.warp.sync -1; @%p1 st.shared.u32 [cell], 8;",
        threads=32,
    )
    found(cell + first + "bar.warp.sync -1; ld.shared.u32 %r2, [cell];", "RACE|UNINIT", threads=64)
    found("ld.param.u64 %rd3, [q1]; st.global.u32 [%rd3], %r1;", "another block's thread", threads=1, blocks=2)
    found(cell + "ld.shared.u32 %r2, [cell];", "UNINITIALISED shared read")
    with ptxsim.options(init=0, race=0):
        assert lanes(cell + "ld.shared.u32 %r2, [cell]; st.global.u32 [%rd1], %r2;")[0] == 0xFFFFFFFF
    later = (
        "bar.sync 0; @%p1 st.shared.u32 [cell], 8; bar.sync 0; @%p1 st.shared.u32 [cell], 9; ld.shared.u32 %r2, [cell];"
    )
    found(cell + first + later, "RACE in shared memory: read", threads=64)
    lanes(cell + first + "bar.sync 0; atom.shared.add.u32 %r2, [cell], 1;", threads=64)


def test_non_coherent_read_of_what_was_written():
    found("st.global.u32 [%rd1], 1; ld.global.nc.u32 %r2, [%rd1];", "NON-COHERENT")


# ----------------------------------------------------------------------------------------------------------------------
# Control


def test_loops_and_divergence():
    code = """mov.u32 %r2, 0; mov.u32 %r3, 0; setp.eq.u32 %p1, %r0, 0; @%p1 bra DONE;
      LOOP: add.u32 %r2, %r2, %r3; add.u32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, %r0; @%p1 bra LOOP;
      DONE: st.global.u32 [%rd1], %r2;"""
    assert lanes(code).tolist() == [n * (n - 1) // 2 for n in range(32)]
    code = """and.b32 %r2, %r0, 3; ts: .branchtargets A, B, C, A; brx.idx %r2, ts; A: mov.u32 %r3, 1; bra E; B: mov.u32 %r3, 2; bra E; C: mov.u32 %r3, 3;
      E: st.global.u32 [%rd1], %r3;"""
    assert lanes(code).tolist() == [[1, 2, 3, 1][n % 4] for n in range(32)]
    code = "setp.lt.u32 %p1, %r0, 5; @%p1 exit; st.global.u32 [%rd1], 9;"
    assert lanes(code).tolist() == [0] * 5 + [9] * 27


def test_no_end_is_a_hang():
    with ptxsim.options(max_steps=1000):
        found("L: bra L;", "HANG")


def test_calls():
    function = """.func (.param .b32 out) twice(.param .b32 x) { .reg .b32 %r<4>; .reg .pred %p<2>; ld.param.u32 %r0, [x];
      setp.lt.u32 %p1, %r0, 4; @%p1 bra S; shl.b32 %r1, %r0, 1; st.param.b32 [out], %r1; ret; S: mov.u32 %r1, 0; st.param.b32 [out], %r1; ret; }
      .func (.param .b32 out) four(.param .b32 x) { .reg .b32 %r<4>; ld.param.u32 %r0, [x]; { .param .b32 param0; .param .b32 retval0;
      st.param.b32 [param0], %r0; call.uni (retval0), twice, (param0); ld.param.b32 %r1, [retval0]; st.param.b32 [param0], %r1;
      call.uni (retval0), twice, (param0); ld.param.b32 %r2, [retval0]; st.param.b32 [out], %r2; } ret; }"""
    code = """{ .param .b32 param0; .param .b32 retval0; st.param.b32 [param0], %r0; call.uni (retval0), four, (param0); ld.param.b32 %r5, [retval0]; }
      st.global.u32 [%rd1], %r5;"""
    assert lanes(code, outside=function).tolist() == [0 if n < 4 else 4 * n for n in range(32)]
    recursive = ".func f() { call.uni f; ret; }"
    found("call.uni f;", "UNSUPPORTED: recursion", outside=recursive)
    found("trap;", "TRAP by block .0,0,0. thread 0")


@pytest.mark.parametrize("instruction", ["wgmma.fence.sync.aligned;", "min.xorsign.abs.f32 %f1, %f2, %f3;", "tcgen05.fence::before_thread_sync;",
                                         "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2}], [%r3];"])  # fmt: skip
def test_unsupported_is_said(instruction):
    found(instruction, "UNSUPPORTED")


# ----------------------------------------------------------------------------------------------------------------------
# Barriers


@pytest.mark.parametrize("threads", [32, 96, 100])
def test_bar_red(threads):
    code = """setp.lt.u32 %p1, %r0, 40; bar.red.popc.u32 %r2, 0, %p1; bar.red.and.pred %p2, 0, %p1; bar.red.or.pred %p3, 0, !%p1;
      selp.u32 %r3, 1, 0, %p2; selp.u32 %r4, 2, 0, %p3; or.b32 %r3, %r3, %r4; st.global.v2.u32 [%rd1], {%r2, %r3};"""
    out = lanes(code, 2, threads=threads)
    assert (out == [min(threads, 40), 1 if threads <= 40 else 2]).all()


def test_named_barriers():
    # warps 0 and 1 hand over by barrier 1, warps 2 and 3 by barrier 2
    code = """.shared .u32 cell[128]; mov.u32 %r3, cell; shl.b32 %r4, %r0, 2; add.u32 %r5, %r3, %r4; st.shared.u32 [%r5], %r0;
      shr.u32 %r6, %r0, 6; add.u32 %r6, %r6, 1; bar.sync %r6, 64; xor.b32 %r7, %r4, OTHER; add.u32 %r7, %r7, %r3; ld.shared.u32 %r8, [%r7];
      st.global.u32 [%rd1], %r8;"""
    out = lanes(code.replace("OTHER", "128"), threads=128)  # 32 threads away
    assert out.tolist() == [n ^ 32 for n in range(128)]
    found(code.replace("OTHER", "256"), "RACE|UNINIT", threads=128)  # 64 away: of the other pair


def test_bar_arrive():
    code = """.shared .u32 cell; setp.ge.u32 %p1, %r0, 32; @%p1 bra CONSUMER; setp.eq.u32 %p2, %r0, 0; @%p2 st.shared.u32 [cell], 5;
      bar.warp.sync -1; bar.arrive 1, 64; bra END; CONSUMER: bar.sync 1, 64; ld.shared.u32 %r2, [cell]; st.global.u32 [%rd1], %r2; END:"""
    assert lanes(code, threads=64).tolist() == [0] * 32 + [5] * 32
    found(code.replace("bar.arrive 1, 64;", ""), "DEADLOCK", threads=64)


def test_misused_barriers():
    found("setp.lt.u32 %p1, %r0, 7; @%p1 bar.sync 0; @!%p1 bar.sync 0;", "DIVERGENT BARRIER")
    found(
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra A; bar.sync 0; bra E; A: bar.sync 0; E:",
        "meet at different barriers",
        threads=64,
    )
    found("setp.lt.u32 %p1, %r0, 7; @%p1 exit; bar.sync 0;", "BARRIER after some threads")
    found("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1; @!%p1 bar.sync 2;", "DEADLOCK|DIVERGENT", threads=64)


def test_clusters_and_distributed_shared_memory():
    code = """.shared .u32 cell; mov.u32 %r2, %cluster_ctarank; st.shared.u32 [cell], %r2; SYNC
      xor.b32 %r3, %r2, 1; mov.u32 %r4, cell; mapa.shared::cluster.u32 %r5, %r4, %r3; ld.shared::cluster.u32 %r6, [%r5]; LAST
      st.global.u32 [%rd1], %r6;"""
    sync = "barrier.cluster.arrive; barrier.cluster.wait;"
    out = lanes(code.replace("SYNC", sync).replace("LAST", sync), threads=1, blocks=4, cluster=2)
    assert out.tolist() == [1, 0, 1, 0]
    found(code.replace("SYNC", "").replace("LAST", sync), "RACE|UNINIT", threads=1, blocks=4, cluster=2)
    found(code.replace("SYNC", sync).replace("LAST", ""), "has ended", threads=1, blocks=4, cluster=2)


def test_message_between_blocks():
    code = """setp.eq.u32 %p1, %r1, 0; mov.u64 %rd9, flag; mov.u64 %rd8, word; @!%p1 bra WAIT; st.global.u32 [%rd8], 42; FENCE
      atom.global.exch.b32 %r2, [%rd9], 1; bra END; WAIT: LOAD %r2, [%rd9]; setp.eq.u32 %p2, %r2, 0; @%p2 bra WAIT; ld.global.u32 %r3, [%rd8];
      st.global.u32 [%rd1], %r3; END:"""
    outside = ".global .u32 flag = 0; .global .u32 word = 0;"
    for load in ("ld.acquire.gpu.global.u32", "ld.volatile.global.u32"):
        good = code.replace("FENCE", "membar.gl;").replace("LOAD", load)
        with ptxsim.options(resident=2, quantum=2):
            assert lanes(good, threads=1, blocks=2, outside=outside).tolist() == [0, 42]
            found(code.replace("FENCE", "").replace("LOAD", load), "RACE", threads=1, blocks=2, outside=outside)
        too_early = good.replace("membar.gl;", "").replace("st.global.u32 [%rd8]", "membar.gl; st.global.u32 [%rd8]")
        with ptxsim.options(resident=2, quantum=2):
            found(too_early, "RACE", threads=1, blocks=2, outside=outside)
        other_way = good.replace("setp.eq.u32 %p1, %r1, 0;", "setp.eq.u32 %p1, %r1, 1;")  # block 0 waits for block 1
        with ptxsim.options(max_steps=1000):
            found(other_way, "HANG", threads=1, blocks=2, outside=outside)
        assert lanes(other_way, threads=1, blocks=2, outside=outside, cooperative=True).tolist() == [42, 0]
        assert lanes(good, threads=1, blocks=2, outside=outside, cooperative=True).tolist() == [0, 42]


# Two warps write, and count up a ticket; the second reads what the first has written.
TICKET = """.shared .u32 tickets; .shared .u32 cells[64]; setp.eq.u32 %p4, %r0, 0; @%p4 st.shared.u32 [tickets], 0; bar.sync 0;
  mov.u32 %r20, cells; mad.lo.u32 %r21, %r0, 4, %r20; and.b32 %r22, %r0, 32; xor.b32 %r22, %r22, 32; mad.lo.u32 %r23, %r22, 4, %r20;
  st.global.u32 [%rd1], %r0; and.b32 %r5, %r0, 31; setp.ne.u32 %p1, %r5, 0; BEFORE mov.u32 %r6, 0; @%p1 bra MEET; FENCE
  atom.SPACE.add.u32 %r6, [WORD], 1; MEET: AFTER shfl.sync.idx.b32 %r7, %r6, 0, 31, -1; setp.eq.u32 %p2, %r7, 0; @%p2 bra END;
  xor.b32 %r8, %r0, 32; mad.wide.u32 %rd10, %r8, 4, %rd3; READ add.u32 %r9, %r9, %r0; st.global.u32 [%rd1], %r9; END:"""
WARP = "bar.warp.sync -1;"


def ticket(space="global", before=WARP, fence="membar.gl;", after=WARP, read="ld.global.u32 %r9, [%rd10];"):
    code = TICKET.replace("SPACE", space).replace("WORD", "tickets" if space == "shared" else "ticket")
    return code.replace("BEFORE", before).replace("FENCE", fence).replace("AFTER", after).replace("READ", read)


@pytest.mark.parametrize("space", ["global", "shared"])
def test_warps_of_a_block_synchronise_by_a_ticket(space):
    arguments = {"threads": 64, "outside": ".global .u32 ticket = 0;"}
    for seed in range(4):
        with ptxsim.options(seed=seed):
            out = lanes(ticket(space), **arguments).reshape(2, 32)
            first, second = np.arange(64).reshape(2, 32), np.arange(64).reshape(2, 32) * 2 + [[32], [-32]]
            assert [(o == f).all() for o, f in zip(out, first, strict=True)].count(True) == 1
            assert [(o == s).all() for o, s in zip(out, second, strict=True)].count(True) == 1
            of_other_lanes = "@%p1 ld.global.u32 %r9, [%rd10];"
            for broken in ({"before": ""}, {"fence": ""}, {"fence": "", "read": of_other_lanes}, {"after": ""}):
                found(ticket(space, **broken), "RACE in global memory: read", **arguments)


def test_a_fence_covers_what_its_thread_wrote_before_it():
    write, read = "st.shared.u32 [%r21], %r0;", "ld.shared.u32 %r9, [%r23];"
    arguments = {"threads": 64, "outside": ".global .u32 ticket = 0;"}
    for space in ("global", "shared"):
        lanes(ticket(space, fence=f"{write} membar.cta;", read=read), **arguments)
        found(ticket(space, fence=f"membar.cta; {write}", read=read), "RACE in shared memory: read", **arguments)


# Block 0 writes a word and sets a flag; lane 0 of block 1 waits for the flag, and every lane of it reads the word.
ACQUIRE = """setp.ge.u32 %p1, %r1, THREADS; mov.u64 %rd9, flag; mov.u64 %rd8, word; @%p1 bra READ; setp.eq.u32 %p2, %r0, 0; @!%p2 bra END;
  st.global.u32 [%rd8], 42; membar.gl; atom.global.exch.b32 %r2, [%rd9], 1; bra END;
  READ: setp.ne.u32 %p3, %r0, 0; @%p3 bra MEET; SPIN: ld.acquire.gpu.global.u32 %r3, [%rd9]; setp.eq.u32 %p4, %r3, 0; @%p4 bra SPIN;
  MEET: SYNC ld.global.u32 %r4, [%rd8]; st.global.u32 [%rd1], %r4; END:"""


def test_a_lane_acquires_for_itself_alone():
    def code(sync, threads):
        return ACQUIRE.replace("SYNC", sync).replace("THREADS", str(threads))

    arguments = {"blocks": 2, "outside": ".global .u32 flag = 0; .global .u32 word = 0;"}
    for seed in range(4):
        with ptxsim.options(seed=seed, resident=2, quantum=2):
            for sync, threads in (("bar.warp.sync -1;", 32), ("bar.sync 0;", 64)):
                out = lanes(code(sync, threads), threads=threads, **arguments)
                assert out[threads:].tolist() == [42] * threads
            for sync, threads in (("", 32), ("shfl.sync.idx.b32 %r3, %r3, 0, 31, -1;", 32), ("bar.warp.sync -1;", 64)):
                found(
                    code(sync, threads),
                    "RACE in global memory: read .* another block's thread 0",
                    threads=threads,
                    **arguments,
                )


# ----------------------------------------------------------------------------------------------------------------------
# Asynchronous copies


CP_ASYNC = """.shared .align 16 .u32 cell[32]; mov.u32 %r3, cell; shl.b32 %r4, %r0, 2; add.u32 %r5, %r3, %r4;
  cp.async.ca.shared.global [%r5], [%rd0], 4; cp.async.commit_group; WAIT ld.shared.u32 %r6, [ADDRESS]; st.global.u32 [%rd1], %r6;"""


def test_cp_async():
    own = CP_ASYNC.replace("ADDRESS", "%r5")
    assert lanes(own.replace("WAIT", "cp.async.wait_group 0;")).tolist() == list(range(32))
    found(own.replace("WAIT", ""), "asynchronous copy has not been waited for")
    found(own.replace("WAIT", "cp.async.wait_group 1;"), "asynchronous copy has not been waited for")
    other = CP_ASYNC.replace("ADDRESS", "%r7").replace(
        "WAIT", "cp.async.wait_all; xor.b32 %r7, %r4, 4; add.u32 %r7, %r7, %r3; WAIT"
    )
    assert lanes(other.replace("WAIT", "bar.sync 0;")).tolist() == [n ^ 1 for n in range(32)]
    found(other.replace("WAIT", ""), "RACE")
    short = (
        own.replace("WAIT", "cp.async.wait_all;")
        .replace("[%rd0], 4;", "[%rd0], 4, %r8;")
        .replace("cp.async.ca", "and.b32 %r8, %r0, 1; shl.b32 %r8, %r8, 2; cp.async.ca")
    )
    assert lanes(short).tolist() == [n if n % 2 else 0 for n in range(32)]


BULK = """.shared .align 16 .b8 tile[256]; .shared .align 8 .b64 full; mov.u32 %r10, tile; mov.u32 %r11, full; setp.eq.u32 %p1, %r0, 0;
  @%p1 mbarrier.init.shared::cta.b64 [%r11], 1; @%p1 fence.mbarrier_init.release.cluster; bar.sync 0;
  @!%p1 bra WAIT; mbarrier.arrive.expect_tx.shared::cta.b64 %rd9, [%r11], BYTES;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r10], [%rd2], 256, [%r11];
  WAIT: SPIN mad.lo.u32 %r12, %r0, 4, %r10; ld.shared.u32 %r13, [%r12]; st.global.u32 [%rd1], %r13;"""
SPIN = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r11], 0; @!%p2 bra WAIT;"


def test_bulk_copies_and_mbarriers():
    good = BULK.replace("BYTES", "256").replace("SPIN", SPIN)
    for seed in range(4):
        ptxsim.option(seed=seed)
        assert lanes(good, threads=64).tolist() == list(range(64))
    found(BULK.replace("BYTES", "256").replace("SPIN", ""), "asynchronous copy has not been waited for", threads=64)
    found(BULK.replace("BYTES", "512").replace("SPIN", SPIN), "HANG", threads=64)
    found(
        good.replace("mbarrier.init.shared::cta.b64 [%r11], 1;", "mov.u32 %r20, 0;"),
        "MBARRIER that has not been",
        threads=64,
    )
    found(good.replace("[%rd2], 256,", "[%rd2], 248,"), "MISALIGNED cp.async.bulk", threads=64)
    found(good, "OUT OF BOUNDS global read", threads=32)


# A ring of two tiles: warp 0 fills, warp 1 reads and gives back.
RING = """.shared .align 16 .b8 tile[256]; .shared .align 8 .b64 bars[4]; mov.u32 %r10, tile; mov.u32 %r11, bars; setp.eq.u32 %p1, %r0, 0;
  @!%p1 bra READY; mbarrier.init.shared::cta.b64 [%r11], 1; mbarrier.init.shared::cta.b64 [%r11+8], 1;
  mbarrier.init.shared::cta.b64 [%r11+16], 32; mbarrier.init.shared::cta.b64 [%r11+24], 32; READY: bar.sync 0;
  mov.u32 %r20, 0; setp.ge.u32 %p2, %r0, 32; @%p2 bra CONSUME; @!%p1 bra END;
  PRODUCE: and.b32 %r21, %r20, 1; shl.b32 %r22, %r21, 3; add.u32 %r23, %r11, %r22; shr.u32 %r24, %r20, 1; and.b32 %r24, %r24, 1; xor.b32 %r25, %r24, 1;
  EMPTY: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r23+16], %r25; @!%p3 bra EMPTY;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r23], 128; shl.b32 %r26, %r21, 7; add.u32 %r26, %r26, %r10; mad.wide.u32 %rd10, %r20, 128, %rd2;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r26], [%rd10], 128, [%r23];
  add.u32 %r20, %r20, 1; setp.lt.u32 %p4, %r20, 6; @%p4 bra PRODUCE; bra END;
  CONSUME: mov.u32 %r30, 0; NEXT: and.b32 %r21, %r20, 1; shl.b32 %r22, %r21, 3; add.u32 %r23, %r11, %r22; shr.u32 %r24, %r20, 1; and.b32 %r24, %r24, 1;
  FULL: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r23], %r24; @!%p3 bra FULL;
  shl.b32 %r26, %r21, 7; add.u32 %r26, %r26, %r10; sub.u32 %r27, %r0, 32; mad.lo.u32 %r26, %r27, 4, %r26; ld.shared.u32 %r28, [%r26]; add.u32 %r30, %r30, %r28;
  GIVE add.u32 %r20, %r20, 1; setp.lt.u32 %p4, %r20, 6; @%p4 bra NEXT; st.global.u32 [%rd1], %r30; END:"""


def test_a_pipeline_of_bulk_copies():
    data = np.arange(192, dtype=np.uint32)
    good = RING.replace("GIVE", "mbarrier.arrive.shared::cta.b64 _, [%r23+16];")
    for seed in range(4):
        with ptxsim.options(seed=seed):
            assert lanes(good, threads=64, data=data)[32:].tolist() == data.reshape(6, 32).sum(0).tolist()
    early = good.replace("mbarrier.arrive.shared::cta.b64 _, [%r23+16];", "").replace(
        "ld.shared.u32 %r28", "mbarrier.arrive.shared::cta.b64 _, [%r23+16]; ld.shared.u32 %r28"
    )
    found(early, "RACE in shared memory|asynchronous copy", threads=64, data=data)
    found(good.replace("mbarrier.arrive.shared::cta.b64 _, [%r23+16];", ""), "HANG", threads=64, data=data)
    found(
        good.replace("EMPTY: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r23+16], %r25; @!%p3 bra EMPTY;", ""),
        "RACE|MBARRIER|HANG|copy",
        threads=64,
        data=data,
    )


def test_bulk_store():
    code = """.shared .align 16 .b8 tile[128]; mov.u32 %r10, tile; mad.lo.u32 %r11, %r0, 4, %r10; st.shared.u32 [%r11], %r0; fence.proxy.async.shared::cta; SYNC
      setp.eq.u32 %p1, %r0, 0; @!%p1 bra END; ld.param.u64 %rd3, [q1]; cp.async.bulk.global.shared::cta.bulk_group [%rd3], [%r10], 128;
      cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"""
    assert lanes(code.replace("SYNC", "bar.sync 0;")).tolist() == list(range(32))
    found(code.replace("SYNC", ""), "RACE in shared memory")


# ----------------------------------------------------------------------------------------------------------------------
# Matrices. Fragments as the manual lays them out.


def to_half(x, ty):
    return (
        x.astype(np.float16).view(np.uint16).astype(np.uint32)
        if ty == "f16"
        else x.astype(np.float32).view(np.uint32) >> 16
    )


@pytest.mark.parametrize("ty,k", [("bf16", 16), ("f16", 16), ("bf16", 8), ("f16", 8), ("tf32", 8), ("tf32", 4)])
def test_mma(ty, k):
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-8, 9, s).astype(np.float32) for s in ((16, k), (k, 8), (16, 8)))
    fragments = []
    for lane in range(32):
        g, t = lane // 4, lane % 4
        if ty == "tf32":
            af = [a[g + 8 * (i % 2), t + 4 * (i // 2)].view(np.uint32) for i in range(k // 2)]
            bf = [b[t + 4 * i, g].view(np.uint32) for i in range(k // 4)]
        else:
            ah, bh = to_half(a, ty), to_half(b, ty)
            af = [
                ah[g + 8 * (i % 2), 2 * t + 8 * (i // 2)] | ah[g + 8 * (i % 2), 2 * t + 8 * (i // 2) + 1] << 16
                for i in range(k // 4)
            ]
            bf = [bh[2 * t + 8 * i, g] | bh[2 * t + 8 * i + 1, g] << 16 for i in range(k // 8)]
        cf = [c[g + 8 * (i // 2), 2 * t + i % 2].view(np.uint32) for i in range(4)]
        fragments.append([*af, *bf, *cf])
    data = np.array(fragments, np.uint32)
    na, nb = (k // 2, k // 4) if ty == "tf32" else (k // 4, k // 8)
    n = na + nb + 4
    loads = f"mad.wide.u32 %rd4, %r0, {4 * n}, %rd2;" + "".join(
        f"ld.global.u32 %r{10 + i}, [%rd4+{4 * i}];" for i in range(n)
    )
    listing = lambda start, count: "{" + ", ".join(f"%r{10 + start + i}" for i in range(count)) + "}"  # noqa: E731
    code = (
        loads
        + f"mma.sync.aligned.m16n8k{k}.row.col.f32.{ty}.{ty}.f32 {{%r40, %r41, %r42, %r43}}, {listing(0, na)}, {listing(na, nb)}, {listing(na + nb, 4)};"
    )
    out = lanes(code + "st.global.v4.u32 [%rd1], {%r40, %r41, %r42, %r43};", 4, data).view(np.float32)
    expected = a @ b + c
    for lane in range(32):
        g, t = lane // 4, lane % 4
        assert out[lane].tolist() == [expected[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)]


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, trans):
    data = np.arange(count * 64, dtype=np.uint16).view(np.uint32)  # matrices of 8 x 8, one after the other
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    fill = ".shared .align 16 .b8 m[512]; .shared .align 16 .b8 o[512]; mov.u32 %r10, m; mov.u32 %r15, o;" + "".join(
        f"ld.global.u32 %r11, [%rd0+{128 * i}]; mad.lo.u32 %r12, %r0, 4, %r10; st.shared.u32 [%r12+{128 * i}], %r11;" for i in range(count))  # fmt: skip
    code = (
        fill
        + f"bar.sync 0; and.b32 %r13, %r0, {8 * count - 1}; mad.lo.u32 %r14, %r13, 16, %r10; mad.lo.u32 %r16, %r13, 16, %r15;"
    )
    code += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r14];"
    store = "".join(f"st.global.u32 [%rd1+{4 * i}], %r{20 + i};" for i in range(count))
    out = lanes(code + store, count, data).reshape(32, count)
    matrices = data.view(np.uint16).reshape(count, 8, 8)
    for lane in range(32):
        for i in range(count):
            r, c = lane // 4, 2 * (lane % 4)
            two = (matrices[i, c, r], matrices[i, c + 1, r]) if trans else (matrices[i, r, c], matrices[i, r, c + 1])
            assert out[lane, i] == int(two[0]) | int(two[1]) << 16
    code += f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r16], {{{registers}}}; bar.sync 0;" + "".join(
        f"mad.lo.u32 %r12, %r0, 4, %r15; ld.shared.u32 %r11, [%r12+{128 * i}]; st.global.u32 [%rd1+{4 * i}], %r11;" for i in range(count))  # fmt: skip
    back = lanes(code, count, data).reshape(32, count)
    assert (back.T.ravel() == data).all()


def test_mma_that_cuts_addends_off():
    """1 + 2^-24 + ... is lost below the largest addend, as tensor cores were measured to do."""
    a, b = to_half(np.full((16, 16), 2.0**-12), "f16"), to_half(np.full((16, 8), 2.0**-13), "f16")
    pair_a, pair_b = int(a[0, 0]) * 0x10001, int(b[0, 0]) * 0x10001
    code = f"""mov.b32 %r10, {pair_a}; mov.b32 %r11, {pair_b}; mov.f32 %f1, 0f3F800000;
      mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f2, %f3, %f4, %f5}}, {{%r10, %r10, %r10, %r10}}, {{%r11, %r11}}, {{%f1, %f1, %f1, %f1}};
      st.global.f32 [%rd1], %f2;"""
    exact = 1 + 16 * 2.0**-25
    assert set(lanes(code).view(np.float32)) == {np.float32(exact)}
    with ptxsim.options(mma_bits=24):
        assert set(lanes(code).view(np.float32)) == {np.float32(1)}
    with ptxsim.options(mma_bits=26):
        assert set(lanes(code).view(np.float32)) == {np.float32(exact)}


# ----------------------------------------------------------------------------------------------------------------------
# The ledger


def ledger_of(code, **keywords):
    with ptxsim.options(ledger=1):
        lanes(code, **keywords)
        return ptxsim.ledger()


def test_ledger():
    data = np.zeros(32 * 64, np.uint32)
    c = ledger_of("ld.global.u32 %r2, [%rd0]; st.global.u32 [%rd1], %r2;", data=data)
    assert (c["global_loads"], c["global_stores"], c["sectors"]) == (1, 1, 8) and c["unique_read"] == c[
        "unique_written"
    ] == 128
    c = ledger_of("mad.wide.u32 %rd4, %r0, 256, %rd2; ld.global.u32 %r2, [%rd4];", data=data)
    assert c["sectors"] == 32 and c["ideal_sectors"] == 4
    c = ledger_of("ld.global.u32 %r2, [%rd2]; ld.global.u32 %r3, [%rd2];", data=data)
    assert c["sectors"] == 2 and c["bytes_read"] == 256 and c["unique_read"] == 4
    cells = ".shared .align 16 .b8 cells[8192]; mov.u32 %r3, cells; mad.lo.u32 %r4, %r0, STRIDE, %r3; "
    for stride, ways in ((4, 1), (8, 2), (128, 32), (132, 1), (0, 1)):
        code = cells.replace("STRIDE", str(stride)) + "ld.shared.u32 %r5, [%r4];"
        with ptxsim.options(init=0):
            c = ledger_of(code)
        assert c["wavefronts"] == ways and c["ideal_wavefronts"] == 1, stride
    with ptxsim.options(init=0):
        c = ledger_of(cells.replace("STRIDE", "16") + "ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r4];")
    assert c["wavefronts"] == c["ideal_wavefronts"] == 4
    c = ledger_of(
        "setp.lt.u32 %p1, %r0, 8; @%p1 add.f32 %f1, %f2, %f3; bar.sync 0; bar.sync 0; ex2.approx.ftz.f32 %f1, %f2;",
        threads=64,
    )
    assert c["instructions"]["fp32"] == 2 and c["barriers"] == 2 and c["instructions"]["mufu"] == 2 and c["blocks"] == 1
    estimate = ptxsim.roofline(c)
    assert estimate["limit"] in estimate["times"] and estimate["seconds"] == max(estimate["times"].values())


def test_what_one_kernel_lacks_does_not_stop_the_others():
    outside = """.global .u32 x; .global .u64 table[1] = {x}; .visible .entry bad() { .reg .f32 %f<2>; wgmma.fence.sync.aligned; }
      .visible .entry uses() { .reg .b64 %rd<2>; ld.global.u64 %rd1, [table]; ret; }"""
    assert lanes("st.global.u32 [%rd1], 1;", outside=outside).all()
    m = ptxsim.Module(f".version 8.3\n.target sm_90a\n.address_size 64\n{outside}")
    for entry, said in (("bad", "UNSUPPORTED: .*wgmma.fence.sync.aligned at PTX line 4"), ("uses", "table")):
        with pytest.raises(ptxsim.Findings, match=said):
            m.launch(entry, 1, 32, [], {})


def test_the_device_is_what_the_options_say():
    dynamic = ".extern .shared .align 16 .b8 buffer[];"
    code = "mov.u32 %r2, buffer; add.u32 %r2, %r2, BYTES; st.shared.u32 [%r2-4], 7; ld.shared.u32 %r3, [%r2-4]; st.global.u32 [%rd1], %r3;"
    for limit in ptxsim.SHARED_LIMITS:
        with ptxsim.options(shared_limit=limit, sms=limit >> 10):
            assert lanes(code.replace("BYTES", str(limit)), outside=dynamic, shared=limit, threads=1)[0] == 7
            found(code.replace("BYTES", str(limit)), f"more than {limit} bytes", outside=dynamic, shared=limit + 1)
            assert set(lanes("mov.u32 %r2, %nsmid; st.global.u32 [%rd1], %r2;")) == {limit >> 10}
            assert (
                lanes("mov.u32 %r2, %smid; st.global.u32 [%rd1], %r2;", threads=1, blocks=300).max()
                == (limit >> 10) - 1
            )


def test_launch_checks():
    m = kernel("", "")
    with pytest.raises(ptxsim.Findings, match="LAUNCH"):
        m.launch("k", 1, 2048, [], {})
    m = ptxsim.Module(".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k() .maxntid 64, 1, 1 { ret; }")
    assert m.info("k", "max_threads") == 64
    with pytest.raises(ptxsim.Findings, match="made for 64"):
        m.launch("k", 1, 96, [], {})
    with pytest.raises(ValueError, match="no option"):
        ptxsim.option(speed=1)
