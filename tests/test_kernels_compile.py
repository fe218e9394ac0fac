"""Ahead-of-time gates for the GPU kernels, without a GPU: no spills, bounded registers, 16-byte accesses, one read.

Triton's kernels are compiled as real calls have them: the calls are made, and noted in place of the launch. The
installed Triton compiles, and each that FASTPREF_TRITON_PATHS names, folders as `pip install --target FOLDER
triton==3.3.1` makes them, separated as in PATH. Without --full, grids are thinned to what differs.
"""

import importlib.metadata
import importlib.util
import os
import queue
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from ahead_of_time import Compiler, bound, request, spills_in_loops
from forced_cuda import devices

import fastpref
from fastpref import _native
from fastpref._logps import scaled, token_logps
from fastpref._logps.pair_epilogue import PairResults, write_pairs
from fastpref._logps.pairs import Family, PairData
from fastpref._logps.transform import Transform
from fastpref._lowrank import residual_pass

CSRC = Path(__file__).resolve().parents[1] / "csrc"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i8": torch.int8}

pytestmark = pytest.mark.slow


# ---- Triton ----


class Case(NamedTuple):
    target: str
    dtype: str
    name: str
    call: Callable[[], object]  # launches what is compiled


class Gate(NamedTuple):
    case: Case
    kernel: str
    request: dict


def gates_of(case: Case) -> list[Gate]:
    gates, warp_size = [], 64 if case.target.startswith("gfx") else 32

    def launch(kernel, grid, *args, **keywords):
        asked = request(kernel, *bound(kernel, args, keywords), case.target, "usage")
        gates.append(Gate(case, kernel.fn.__name__, asked))

    with devices(lambda place: "cuda", launch), mock.patch.object(_native, "warp_size", lambda tensor: warp_size):
        case.call()
    return gates


def different(cases: Iterable[Case]) -> list[Gate]:
    """Of these calls, what is to be compiled, once."""
    return list({str(gate.request): gate for case in cases for gate in gates_of(case)}.values())


def tritons() -> list[str | None]:
    return [None, *filter(None, os.environ.get("FASTPREF_TRITON_PATHS", "").split(os.pathsep))]


@pytest.fixture(scope="module", params=tritons(), ids=lambda folder: Path(folder).name if folder else "installed")
def compiled(request) -> Callable[[list[Gate]], list[dict]]:
    """By one process a CPU."""
    if request.param is None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        version = importlib.metadata.version("triton")
        if tuple(map(int, version.split(".")[:2])) < (3, 3):
            pytest.skip(f"Triton {version} compiles ahead of time by another interface; 3.3 and later are checked")
    compilers = [Compiler(request.param) for _ in range(os.cpu_count())]
    idle = queue.SimpleQueue()
    for compiler in compilers:
        idle.put(compiler)

    def usage(gate: Gate) -> dict:
        compiler = idle.get()
        try:
            return compiler(gate.request)
        finally:
            idle.put(compiler)

    def run(gates: list[Gate]) -> list[dict]:
        with ThreadPoolExecutor(len(compilers)) as threads:
            return list(threads.map(usage, gates))

    yield run
    for compiler in compilers:
        compiler.close()


def told(gate: Gate, usage: dict) -> str:
    return f"{gate.case.target} {gate.case.dtype} {gate.case.name} {gate.kernel}: {usage}"


# Half of an SM's 64 warps (48 on sm_120) fit in these; half hide the latency of the memory these kernels wait for.
# The backward of a softcap waits for arithmetic, where ptxas buys independent instructions with registers.
STREAMING = {"_token_logps_fwd_kernel", "_token_logps_bwd_kernel"}
# Of vectors of length B, or of tokens, nothing need be in flight.
MOST_REGISTERS = {"stream": 64, "stats": 72, "softcap stats": 80, "softcap backward": 104, "vectors": 128}
MOST_REGISTERS_OF_AMD = 128
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a")
KINDS = ("forward", "stats", "backward")
NARROWING = "backward to bf16"  # of the float32 tile that bf16 hidden states and weights give


def token_call(dtype: torch.dtype, rung: int, kind: str, softcap: float | None) -> None:
    limit, transform = token_logps._LADDER[rung][0], Transform(softcap=softcap)
    rows = torch.empty(1, 2, limit // dtype.itemsize if limit else 1 << 17, dtype=dtype)
    labels, logps, lse = torch.zeros(1, 2, dtype=torch.long), torch.empty(1, 2), torch.empty(2, 1, 2)
    if kind in ("forward", "stats"):
        token_logps._triton_fwd(rows, labels, transform, kind == "stats")
    else:
        out = torch.empty_like(rows, dtype=torch.bfloat16 if kind == NARROWING else dtype)
        token_logps._triton_bwd(logps, rows, labels, logps, lse, transform, out)


def preference_call(dtype: torch.dtype, packed: bool, softcap: float | None, loss: str = "rdpo") -> None:
    """With everything that a call can have, padded or packed. ld_dpo has kernels for a part of the completion."""
    logits = torch.empty(2, 3, 1 << 17, dtype=dtype)
    labels, given = torch.zeros(2, 3, dtype=torch.int32), {"lengths": torch.tensor([3, 2])}
    if packed:
        logits, labels, given = logits[0], labels[0], {"cu_seqlens": torch.tensor([0, 2, 3])}
    reference = torch.empty_like(logits)
    logits = logits.requires_grad_()
    out = fastpref.preference_loss(
        logits, labels, ref_logits=reference, loss=loss, rating_gap=torch.ones(1), pair_weights=torch.ones(1),
        shift=True, softcap=softcap, stats=("entropy",), backend="triton", **given,
    )  # fmt: skip
    torch.autograd.grad(out.loss, logits, torch.ones(()))


def pairs_call() -> None:
    """The epilogue of the linear half, with everything that a call can have."""
    scale, tokens, labels = torch.ones(1), torch.empty(3), torch.zeros(3, dtype=torch.long)
    data = PairData(torch.empty(3), torch.empty(2), torch.ones(1), None)
    family = Family([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], True)
    bounds = torch.tensor([0, 2, 3])
    write_pairs(PairResults.empty(scale), (0, 1), tokens, labels, bounds, data, scale, -100, family, "triton")


def stream_cases(full: bool) -> Iterator[Case]:
    """Rungs differ in threads, not in the code of a thread, and fp16 from bf16 in a conversion: one target takes every
    rung and dtype, the others the last rung. Without --full a rung takes one dtype, another target bf16, and what is
    beside them (a softcap, a narrowing) NVIDIA's and AMD's target."""
    beside = TARGETS if full else ("sm_90", "gfx942")

    def of_tokens(target, dtype, rung, kind, softcap=None):
        name = f"{kind}, rung {rung}" + (", softcap" if softcap else "")
        return Case(target, dtype, name, lambda: token_call(DTYPES[dtype], rung, kind, softcap))

    for kind in KINDS:
        for rung in range(len(token_logps._LADDER)):
            names = ("fp32", "bf16", "fp16")
            for dtype in names if full else names[rung : rung + 1]:
                yield of_tokens("sm_90", dtype, rung, kind)
        for target in TARGETS:
            for dtype in ("fp32", "bf16") if full else ("bf16",):
                yield of_tokens(target, dtype, -1, kind)
        for target in beside:
            yield of_tokens(target, "bf16", -1, kind, 30.0)
    for target in beside:
        yield of_tokens(target, "fp32", -1, NARROWING)
    for target in TARGETS:
        for packed in (True, False) if full or target in beside else (True,):
            for softcap in (None, 30.0) if full else (None,):
                for dtype in ("fp32", "bf16") if full else ("bf16",):
                    name = f"preference{', packed' * packed}{', softcap' * bool(softcap)}"

                    def call(dtype=dtype, packed=packed, softcap=softcap):
                        preference_call(DTYPES[dtype], packed, softcap)

                    yield Case(target, dtype, name, call)
        for packed in (True, False) if full else (True,):

            def call(packed=packed):
                preference_call(torch.bfloat16, packed, None, "ld_dpo")

            yield Case(target, "bf16", f"tail{', packed' * packed}", call)
    for target in beside:
        yield Case(target, "fp32", "pairs", pairs_call)
    yield Case("sm_90", "bf16", "scaled", lambda: scaled._triton_scale(torch.empty(1 << 20).bfloat16(), torch.ones(())))


def most_registers(gate: Gate) -> int:
    if gate.case.target.startswith("gfx"):
        return MOST_REGISTERS_OF_AMD
    backward = gate.kernel == "_token_logps_bwd_kernel"
    if gate.kernel not in STREAMING:
        return MOST_REGISTERS["vectors"]
    softcap = "softcap" in gate.case.name
    if backward:
        return MOST_REGISTERS["softcap backward" if softcap else "stream"]
    if "constant" in gate.request["arguments"]["stats_ptr"]:
        return MOST_REGISTERS["stream"]
    return MOST_REGISTERS["softcap stats" if softcap else "stats"]


# With stats of packed sequences, ptxas of some Tritons keeps two numbers of a row in memory, where a register more
# would cost a block; and ptxas of Triton 3.3 two numbers of the one program that reduces the batch.
MAY_SPILL = ("sm_100", "sm_120")
MOST_STACK = 32  # bytes, never in a loop over columns


def is_in_registers(gate: Gate, usage: dict) -> bool:
    may_spill = gate.kernel in ("_token_logps_fwd_kernel", "_batch_kernel") and "packed" in gate.case.name
    if gate.case.target in MAY_SPILL and may_spill:
        return usage["stack"] <= MOST_STACK and not usage["spills_in_loops"]
    return usage["stack"] == 0 and usage["spills"] == 0


def test_streaming_kernels(compiled, pytestconfig):
    gates = different(stream_cases(pytestconfig.getoption("full")))
    wrong = []
    for gate, usage in zip(gates, compiled(gates), strict=True):
        fine = is_in_registers(gate, usage) and usage["registers"] <= most_registers(gate)
        if gate.kernel in STREAMING:
            # two loads of 16 bytes in the loop over whole blocks, two in the ragged block after it: one read of the
            # row; AMD may read both ends of a packed sequence at once, too
            both_ends = gate.case.target.startswith("gfx") and "packed" in gate.case.name
            fine = fine and usage["wide_loads"] in (4, 4 + both_ends) and not usage.get("scalar_spills")
            # the same for the gradient, and two for the rows that are only zeroed; a narrow one is half as wide
            if NARROWING not in gate.case.name:
                fine = fine and usage["wide_stores"] == (6 if gate.kernel == "_token_logps_bwd_kernel" else 0)
        if not fine:
            wrong.append(told(gate, usage))
    assert not wrong, "\n".join(wrong)


def residual_pass_call(dtype: torch.dtype, columns: int, psi: str, everything: bool) -> None:
    matrix, factor = torch.empty(1024, 1024).to(dtype), torch.empty(1024, columns)
    weights = torch.empty(1024) if everything else None
    terms = residual_pass._Terms(psi, 0.7, 1.0, everything, weights, weights, everything)
    residual_pass._triton_pass(matrix, factor, factor, terms)


def residual_pass_cases(full: bool) -> Iterator[Case]:
    """The widest factors need the most registers. Without --full one target takes all of them, the others bf16."""
    for target in ("sm_80", "sm_90", "sm_100"):
        whole = full or target == "sm_90"
        variants = [
            (dtype, columns, "cauchy", columns == 64)
            for dtype in (("fp32", "bf16", "i8") if whole else ("bf16",))
            for columns in ((10, 64) if whole else (64,))
        ]
        variants += [("fp16", 64, psi, True) for psi in ("hard", "soft", "identity")] if whole else []
        for dtype, columns, psi, everything in variants:

            def call(dtype=dtype, columns=columns, psi=psi, everything=everything):
                residual_pass_call(DTYPES[dtype], columns, psi, everything)

            yield Case(target, dtype, f"{columns} columns, {psi}", call)


# What ptxas spills at the 128 registers of two blocks to a multiprocessor. A turn of the loop is a tile, some thousand
# instructions of a warp: three accesses to memory, by Triton 3.6 for sm_100, are few.
MOST_SPILLS_OF_RESIDUAL_PASS = 3  # in the loop


def test_residual_pass_kernels(compiled, pytestconfig):
    gates = different(residual_pass_cases(pytestconfig.getoption("full")))
    wrong = [
        told(gate, usage)
        for gate, usage in zip(gates, compiled(gates), strict=True)
        if usage["stack"] > MOST_STACK or usage["spills_in_loops"] > MOST_SPILLS_OF_RESIDUAL_PASS
    ]
    assert not wrong, "\n".join(wrong)


# ---- CUDA C++ ----

# sm_90 is compiled by the build as well, where what spills is an error in CI. The others, with --full, have the
# instructions of one of these.
ARCHITECTURES = ("90", "100")
MORE_ARCHITECTURES = ("80", "86", "89", "120")
# 3 dtypes x softcap x stats; 5 pairs of dtypes x softcap; the epilogue of pairs and the tail
KERNELS = {"token_logps": 12 + 10, "preference": 12 + 2}
OF_TOKENS = ("pair_kernel", "tail_kernel")  # which read no column


class Cubin(NamedTuple):
    op: str
    architecture: str
    said: str  # by ptxas
    sass: str


def most_registers_of_cuda(name: str, architecture: str) -> int:
    """What the blocks of its __launch_bounds__ leave each thread. A softcap is bound by arithmetic."""
    if any(kernel in name for kernel in OF_TOKENS):
        return 64
    flags = [int(flag) for flag in re.findall(r"Lb([01])E", name)]
    if "scatter_kernel" in name:
        (softcap,) = flags
        return 80 if softcap else 64
    softcap, stats = flags
    with_stats = 128 if softcap else 72 if int(architecture) < 100 else 96
    return with_stats if stats else 64


def spilled(said: str) -> dict[str, int]:
    """Bytes of stack and of spills by function, of those that have any."""
    parts = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    found = {name: max(map(int, counts)) for name, *counts in re.findall(parts, said)}
    return {name: most for name, most in found.items() if most}


def find_cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return str(bundled) if bundled and bundled.exists() else shutil.which("cuobjdump")


LOAD = re.compile(r"(LDG\.E\S*\.128\S*) R\d+, (?:desc\[(UR\d+)\])?")
STORE = re.compile(r"(STG\.E\S*\.128\S*|STG\.E\S*\.64\S*) (?:desc\[(UR\d+)\])?")


def assert_cache_hints(name: str, sass: str) -> None:
    """Logits pass by the first cache (NA), in lines of 128 bytes. The forward's are read-only; the backward's have a
    descriptor of their own, which says that they leave the second cache first, and its gradient is streamed (EF)."""
    loads = {load for load in LOAD.findall(sass) if "STRONG" not in load[0]}  # the others read what other warps wrote
    hint = "LDG.E.NA.LTC128B.128"
    if "gather_kernel" in name:
        assert {kind for kind, _ in loads} == {hint + ".CONSTANT"}, (name, loads)
        return
    stores = set(STORE.findall(sass))
    assert {kind for kind, _ in loads} == {hint}, (name, loads)
    assert {kind.rpartition(".")[0] for kind, _ in stores} == {"STG.E.EF"}, (name, stores)
    assert all(policy for _, policy in loads), (name, loads)
    assert not {policy for _, policy in loads} & {policy for _, policy in stores}, (name, loads, stores)


def test_cuda_kernels(tmp_path, pytestconfig):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    if not CSRC.is_dir():
        pytest.skip(f"the sources are not beside the tests: {CSRC}")
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    wanted = ARCHITECTURES + MORE_ARCHITECTURES * pytestconfig.getoption("full")
    architectures = [a for a in wanted if f"sm_{a}" in known]  # sm_100 and sm_120 need CUDA 12.8
    cuobjdump = find_cuobjdump()

    def compile_one(op, architecture):
        path = tmp_path / f"{op}.sm_{architecture}.cubin"
        command = [nvcc, "-std=c++17", "-O3", "-I", CSRC, "-cubin", f"-arch=sm_{architecture}", "-Werror=all-warnings"]
        done = subprocess.run(
            [*command, "-Xptxas=-v", CSRC / f"cuda/{op}.cu", "-o", path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        sass = subprocess.check_output([cuobjdump, "--dump-sass", path], text=True) if cuobjdump else ""
        return Cubin(op, architecture, done.stderr, sass)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        cubins = list(threads.map(compile_one, *zip(*((o, a) for a in architectures for o in KERNELS), strict=True)))
    for cubin in cubins:
        used = re.findall(r"Compiling entry function '(\S+)'.*?Used (\d+) registers", cubin.said, re.DOTALL)
        assert len(used) == KERNELS[cubin.op], cubin.said
        for name, registers in used:
            most = most_registers_of_cuda(name, cubin.architecture)
            assert int(registers) <= most, (cubin.architecture, name, registers)
        assert not spilled(cubin.said), (cubin.op, cubin.architecture, spilled(cubin.said))
    if cuobjdump is None:
        pytest.skip("compiled without spills, but there is no cuobjdump to show the width of the loads")
    for cubin in cubins:
        functions = {text.split()[0]: text for text in re.split(r"Function : ", cubin.sass)[1:]}
        kernels = {name: text for name, text in functions.items() if "_kernel" in name}
        assert len(kernels) == KERNELS[cubin.op]
        for name, text in kernels.items():
            assert spills_in_loops(text) == 0, (cubin.architecture, name)
            of_tokens = any(kernel in name for kernel in OF_TOKENS)
            assert of_tokens or re.search(r"LDG\.E\S*\.128", text), (cubin.architecture, name)
            assert "scatter" not in name or re.search(r"STG\.E\S*\.128", text), (cubin.architecture, name)
            if not of_tokens:
                assert_cache_hints(name, text)
