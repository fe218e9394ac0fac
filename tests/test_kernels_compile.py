"""Ahead-of-time gates for the GPU kernels, without a GPU: no spills, bounded registers, 16-byte accesses, one read.

Run as a script, `test_kernels_compile.py MODULE [--full]`, it compiles Triton kernels and prints a JSON line for each.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"

# Half of an SM's 64 warps (48 on sm_120) fit in these; half hide the latency of the memory these kernels wait for.
# A softcap makes them wait for arithmetic instead, where ptxas buys independent instructions with registers.
MAX_REGISTERS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "sm_120": 80, "gfx942": 128}
MAX_REGISTERS_SOFTCAP = 128

KINDS = ("fwd", "fwd+stats", "bwd")
NARROWING = "bwd to bf16"  # of the float32 tile that bf16 hidden states and weights give


def cases(full: bool):
    """(target, dtype, rung, kind, softcap).

    Rungs differ in threads, not in the code of a thread, and fp16 from bf16 in a conversion: one target takes every
    rung and dtype, the others the last rung. The full product would take four times as long. Without --full a rung
    takes one dtype, another target bf16, and what is beside them (a softcap, a narrowing) NVIDIA's and AMD's target.
    """
    dtypes = ("fp32", "bf16", "fp16")
    beside = MAX_REGISTERS if full else ("sm_90", "gfx942")
    for kind in KINDS:
        for rung in range(3):
            for dtype in dtypes if full else dtypes[rung : rung + 1]:
                yield "sm_90", dtype, rung, kind, False
        for target in ("sm_80", "sm_100", "sm_120", "gfx942"):
            for dtype in ("fp32", "bf16") if full else ("bf16",):
                yield target, dtype, -1, kind, False
        for target in beside:
            yield target, "bf16", -1, kind, True
    for target in beside:
        yield target, "fp32", -1, NARROWING, False


def find_cuobjdump() -> str:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return str(bundled) if bundled and bundled.exists() else shutil.which("cuobjdump")


def cubin_usage(compiled) -> tuple[dict, str]:
    """Registers, spills and stack of a kernel compiled for an NVIDIA GPU, and its SASS."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.check_output([find_cuobjdump(), "--dump-resource-usage", cubin], text=True)
        sass = subprocess.check_output([find_cuobjdump(), "--dump-sass", cubin], text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {"registers": int(registers), "spills": spills, "stack": int(stack)}, sass


def compile_triton(op, target, dtype, rung, kind, softcap):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    item_bytes = 4 if dtype == "fp32" else 2
    limit = op._LADDER[rung][0]
    options = op._launch_options(limit // item_bytes if limit else 1 << 17, item_bytes, 64 if amd else 32)
    constants = {"HAS_SOFTCAP": softcap, "BLOCK_V": options.pop("BLOCK_V")}
    backward = kind in ("bwd", NARROWING)
    constants |= {"SAME_PHASE": True} if backward else {"HAS_STATS": kind == "fwd+stats"}
    kernel = op._token_logps_bwd_kernel if backward else op._token_logps_fwd_kernel

    def type_of(name):
        if name in constants:
            return "constexpr"
        if name == "out_ptr" and kind == NARROWING:
            return "*bf16"
        if name in ("x_ptr", "out_ptr"):
            return f"*{dtype}"
        if name == "labels_ptr":
            return "*i64"
        if name.endswith("_ptr"):
            return "*fp32"
        return "fp32" if name in ("multiplier", "tanh_scale") else "i32"

    source = ASTSource(
        kernel,
        {name: type_of(name) for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    compiled = triton.compile(source, target=gpu, options=options)
    result = {"target": target, "dtype": dtype, "kind": kind, "softcap": softcap, "num_warps": options["num_warps"]}
    if amd:
        asm = compiled.asm["amdgcn"]
        number = {
            key: int(re.search(rf"\.{key}:\s+(\d+)", asm).group(1))
            for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        }
        result |= {
            "registers": number["vgpr_count"],
            "spills": number["vgpr_spill_count"] + number["sgpr_spill_count"],
            "stack": number["private_segment_fixed_size"],
            "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
            "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", asm)),
        }
    else:
        usage, sass = cubin_usage(compiled)
        # PTX: ptxas may unroll a loop and so repeat its loads
        ptx = compiled.asm["ptx"]
        result |= usage | {
            "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
            "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        }
        result["wide_loads"] *= bool(re.search(r"LDG\.E\S*\.128", sass))
        result["wide_stores"] *= bool(re.search(r"STG\.E\S*\.128", sass))
    return result


def residual_pass_cases(full: bool):
    """(target, dtype, columns of the factors, psi, everything else on); the widest factors need the most registers.

    Without --full one target takes all of them, the others the widest factors of bf16.
    """
    for target in ("sm_80", "sm_90", "sm_100"):
        whole = full or target == "sm_90"
        for dtype in ("fp32", "bf16", "i8") if whole else ("bf16",):
            for columns in (10, 64) if whole else (64,):
                yield target, dtype, columns, "cauchy", columns == 64
        for psi in ("hard", "soft", "identity") if whole else ():
            yield target, "fp16", 64, psi, True


def compile_residual_pass(op, target, dtype, columns, psi, everything):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, block = op._residual_pass_kernel, op._factor_block(columns)
    constants = dict.fromkeys(("UPPER", "WEIGHTED", "SQUARES"), everything) | {"PSI": op._PSI[psi], "STATS": True}
    constants |= {"BLOCK_M": op._BLOCK_M, "BLOCK_N": op._BLOCK_N, "BLOCK_K": block, "BLOCK_Q": block}

    def type_of(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return {"matrix_ptr": f"*{dtype}", "counts_ptr": "*i32", "histogram_ptr": "*i32"}.get(name, "*fp32")
        return "fp32" if name in ("scale", "zeta", "inverse_zeta") else "i32"

    source = ASTSource(
        kernel,
        {name: type_of(name) for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options=dict(op._LAUNCH))
    usage, _ = cubin_usage(compiled)
    return {"target": target, "dtype": dtype, "columns": columns, "psi": psi} | usage


def scaled_cases(full: bool):
    """(target, dtype)"""
    for target in ("sm_80", "sm_90", "sm_100") if full else ("sm_90",):
        for dtype in ("fp32", "bf16", "fp16") if full else ("bf16",):
            yield target, dtype


def compile_scaled(op, target, dtype):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    block = op._WARPS * 32 * op._THREAD_BYTES // (4 if dtype == "fp32" else 2)
    source = ASTSource(
        op._scale_kernel,
        {"x_ptr": f"*{dtype}", "factor_ptr": "*fp32", "size": "i64", "BLOCK": "constexpr"},
        constexprs={(3,): block},
        attrs={(0,): [["tt.divisibility", 16]]},  # as a gradient's address is
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", int(target[3:]), 32), options={"num_warps": op._WARPS})
    usage, _ = cubin_usage(compiled)
    ptx = compiled.asm["ptx"]
    wide = {name: len(re.findall(rf"{name}\.global\S*\.v4\.b32", ptx)) for name in ("ld", "st")}
    return {"target": target, "dtype": dtype} | usage | wide


def compiled_ahead_of_time(module, full) -> list[dict]:
    """What this file prints as a script: Triton reads TRITON_INTERPRET when it is imported, perhaps here already."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 3):
        pytest.skip(f"Triton {version} compiles ahead of time by another interface; 3.3 and later are checked")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, module, *["--full"] * full], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_residual_pass_kernels(pytestconfig):
    full = pytestconfig.getoption("full")
    results = compiled_ahead_of_time("fastpref._lowrank.residual_pass", full)
    assert len(results) == len(list(residual_pass_cases(full)))
    for result in results:
        assert result["stack"] == 0, result
        assert result["spills"] == 0, result


@pytest.mark.slow
def test_scaled_kernel(pytestconfig):
    full = pytestconfig.getoption("full")
    results = compiled_ahead_of_time("fastpref._logps.scaled", full)
    assert len(results) == len(list(scaled_cases(full)))
    for result in results:
        assert result["stack"] == result["spills"] == 0, result
        assert result["registers"] <= 64, result
        assert result["ld"] == result["st"] == 4, result  # 64 bytes per thread and step, 16 at a time


@pytest.mark.slow
def test_triton_kernels(pytestconfig):
    full = pytestconfig.getoption("full")
    results = compiled_ahead_of_time("fastpref._logps.token_logps", full)
    assert len(results) == len(list(cases(full)))
    for result in results:
        assert result["stack"] == 0, result
        assert result["spills"] == 0, result
        limit = MAX_REGISTERS_SOFTCAP if result["softcap"] else MAX_REGISTERS[result["target"]]
        assert result["registers"] <= limit, result
        # Two loads of 16 bytes in the loop over whole blocks and two in the ragged block after it: one read of the row.
        assert result["wide_loads"] == 4, result
        # The same for the gradient, and two for the rows that are only zeroed.
        if result["kind"] != NARROWING:  # half as wide there
            assert result["wide_stores"] == (6 if result["kind"] == "bwd" else 0), result


@pytest.mark.slow
def test_cuda_kernels(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    if not CSRC.is_dir():
        pytest.skip(f"the sources are not beside the tests: {CSRC}")
    architectures = ("80", "90", "100", "120")
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    architectures = [a for a in architectures if f"sm_{a}" in known]  # sm_100 and sm_120 need CUDA 12.8
    cubins = {a: tmp_path / f"sm_{a}.cubin" for a in architectures}
    for architecture, cubin in cubins.items():
        command = [nvcc, "-std=c++17", "-O3", "-I", CSRC, "-cubin", f"-arch=sm_{architecture}", "-Werror=all-warnings"]
        command += ["-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error"]
        done = subprocess.run([*command, CSRC / "cuda/token_logps.cu", "-o", cubin], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
        assert len(registers) == 18, done.stderr  # 3 dtypes x (forward: softcap x stats, backward: softcap)
        assert max(registers) <= 64, done.stderr
        stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert set(stacks) == {("0", "0", "0")}, done.stderr
    if find_cuobjdump() is None:
        pytest.skip("compiled without spills, but there is no cuobjdump to show the width of the loads")
    for cubin in cubins.values():
        sass = subprocess.check_output([find_cuobjdump(), "--dump-sass", cubin], text=True)
        functions = re.split(r"Function : ", sass)[1:]
        assert len(functions) == 18
        for function in functions:
            name = function.split()[0]
            assert re.search(r"LDG\.E\S*\.128", function), name
            assert bool(re.search(r"STG\.E\S*\.128", function)) == ("bwd" in name), name


if __name__ == "__main__":
    full = "--full" in sys.argv
    op = importlib.import_module(sys.argv[1])
    if sys.argv[1].endswith("residual_pass"):
        for case in residual_pass_cases(full):
            print(json.dumps(compile_residual_pass(op, *case)), flush=True)
    elif sys.argv[1].endswith("scaled"):
        for case in scaled_cases(full):
            print(json.dumps(compile_scaled(op, *case)), flush=True)
    else:
        assert len(op._LADDER) == 3, "cases() names the rungs"
        for case in cases(full):
            print(json.dumps(compile_triton(op, *case)), flush=True)
