"""Run the PTX of CUDA C++ and Triton kernels on the CPU, with checks. README.md tells what is found and what is not."""

import contextlib
import ctypes
import itertools
import json
import os
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

DEFAULTS = {
    "seed": 0,
    "race": 1,
    "init": 1,
    "ulp": 0,
    "quantum": 0,
    "collide": 1,
    "resident": 1,
    "ledger": 0,
    "max_findings": 20,
    "max_steps": 200_000_000,
    "mma_bits": 0,
    "sms": 132,
    "shared_limit": 227 << 10,
}
SHARED_LIMITS = (99 << 10, 163 << 10, 227 << 10)  # of a block: sm_86, 89 and 120; sm_80; sm_90 and 100
_options = dict(DEFAULTS)


class Findings(RuntimeError):
    """What the simulator found, one finding a line."""


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("cooperative", ctypes.c_int),
    ]


@cache
def library():
    """src/ptxsim.h. It must be the library that a native module is linked to."""
    lib = ctypes.CDLL(os.environ["PTXSIM_LIBRARY"])  # ptxsim_build.py makes it
    text, module = ctypes.c_char_p, ctypes.c_void_p
    lib.ptxsim_load.restype, lib.ptxsim_load.argtypes = module, [text]
    lib.ptxsim_register.argtypes = [ctypes.c_void_p, ctypes.c_uint64, text, ctypes.c_int]
    lib.ptxsim_launch.argtypes = [module, text, ctypes.POINTER(_Launch), ctypes.POINTER(ctypes.c_void_p)]
    lib.ptxsim_report.restype = lib.ptxsim_ledger.restype = text
    lib.ptxsim_option.argtypes = [text, ctypes.c_long]
    lib.ptxsim_kernel_info.restype, lib.ptxsim_kernel_info.argtypes = ctypes.c_long, [module, text, text]
    if hasattr(lib, "ptxsim_replace"):  # with the CUDA runtime
        lib.ptxsim_replace.argtypes = [module]
        lib.ptxsim_runtime_launches.restype = lib.ptxsim_runtime_memsets.restype = ctypes.c_long
    return lib


# ---- options ----


def option(**values):
    """Sets options, until they are set again."""
    for name, value in values.items():
        if not library().ptxsim_option(name.encode(), int(value)):
            raise ValueError(f"no option {name!r}; there are {', '.join(DEFAULTS)}")
        _options[name] = value


@contextlib.contextmanager
def options(**values):
    """with options(race=0): ..."""
    before = dict(_options)
    option(**values)
    try:
        yield
    finally:
        option(**before)


# ---- findings and memory ----


def report() -> str:
    """The findings since the last reset(), one a line."""
    return library().ptxsim_report().decode()


def reset():
    library().ptxsim_reset()


class Range(NamedTuple):
    address: int
    size: int  # bytes, the gaps of strides included


def range_of(x) -> Range:
    """Of a tensor (torch, CPU) or array (numpy)."""
    if hasattr(x, "data_ptr"):
        address, item, strides = x.data_ptr(), x.element_size(), [s * x.element_size() for s in x.stride()]
    else:
        address, item, strides = x.ctypes.data, x.itemsize, list(x.strides)
    if 0 in x.shape:
        return Range(address, 0)
    return Range(address, sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + item)


def pointer(x):
    return ctypes.c_void_p(None if x is None else range_of(x).address)


def register(name: str, x, readonly: bool = False):
    """Let kernels touch a tensor or array. Rows registered one by one are bounded one by one."""
    place = range_of(x)
    if not library().ptxsim_register(place.address, place.size, name.encode(), int(readonly)):
        raise ValueError(f"{name} overlaps another registered range: register their common storage instead")


def by_row(name: str, x, readonly: bool = False) -> dict:
    """For launch(): each row of [..., columns] by itself, so that an access beside a row is out of bounds."""
    rows = itertools.product(*map(range, x.shape[:-1]))
    return {f"{name}[{', '.join(map(str, row))}]": (x[row], readonly) for row in rows}


def clear():
    """Forget what is registered."""
    library().ptxsim_clear()


def launch(launcher, tensors: dict):
    """Call launcher(), which launches kernels through the simulated CUDA runtime, and return what it returns.

    Args:
        tensors: what the kernels may touch: {name: tensor}, or {name: (tensor, True)} for what they may only read.

    Raises:
        Findings: whatever else the launcher raised.
    """
    reset()
    clear()
    for name, x in tensors.items():
        x, readonly = x if isinstance(x, tuple) else (x, False)
        if x is not None:
            register(name, x, readonly)
    try:
        result = launcher()
    except Exception as error:
        if report():
            raise Findings(report()) from error
        raise
    finally:
        clear()
    if report():
        raise Findings(report())
    return result


# ---- kernels ----


class Module:
    """The kernels of a PTX text."""

    def __init__(self, ptx: str):
        reset()
        self.handle = library().ptxsim_load(ptx.encode())
        if not self.handle:
            raise Findings(report())
        self.entries = re.findall(r"\.entry\s+([\w$]+)", ptx)

    def entry(self, *parts: str) -> str:
        """The one entry whose name holds every part."""
        found = [e for e in self.entries if all(p in e for p in parts)]
        if len(found) != 1:
            raise LookupError(f"{len(found)} entries with {parts} among {self.entries}")
        return found[0]

    def info(self, entry: str, what: str) -> int:
        return library().ptxsim_kernel_info(self.handle, entry.encode(), what.encode())

    def launch(self, entry, grid, block, args, tensors=None, shared=0, cluster=0, cooperative=False):
        """args: ctypes values in the kernel's order (pointer(x) for an address); tensors as in launch().

        tensors=None: the kernel may touch what is registered.
        """

        def three(x):
            return (ctypes.c_uint * 3)(*((x if isinstance(x, tuple) else (x,)) + (1, 1, 1))[:3])

        shape = _Launch(three(grid), three(block), shared, cluster, int(cooperative))
        pointers = (ctypes.c_void_p * max(1, len(args)))(
            *[ctypes.cast(ctypes.pointer(a), ctypes.c_void_p) for a in args]
        )

        def run():
            library().ptxsim_launch(self.handle, entry.encode(), ctypes.byref(shape), pointers)

        if tensors is not None:
            launch(run, tensors)
            return
        reset()
        run()
        if report():
            raise Findings(report())


@contextlib.contextmanager
def replaced(module: Module):
    """Launches through the CUDA runtime run these kernels in place of those of the same name."""
    if not library().ptxsim_replace(module.handle):
        raise LookupError(f"none of {module.entries} stands for a kernel of a loaded library")
    try:
        yield
    finally:
        library().ptxsim_replace(None)


def runtime_calls() -> Counter:
    """Launches and memsets through the CUDA runtime, so far."""
    lib = library()
    return Counter(launch=lib.ptxsim_runtime_launches(), memset=lib.ptxsim_runtime_memsets())


def nvcc_ptx(source: Path, output: Path, *flags: str, arch: str = "sm_90") -> str:
    """PTX of a .cu file, which is written to `output` too."""
    command = ["nvcc", "-ptx", f"-arch={arch}", "-std=c++17", "-O3", "-lineinfo", *flags, source, "-o", output]
    subprocess.run(command, check=True)
    return output.read_text()


# ---- speed, estimated ----

H200 = {"sms": 132, "clock": 1.75e9, "bandwidth": 4.3e12, "matrix_flops": 989e12}
# warp instructions of a class that an SM starts in a clock
_RATES = dict(
    fp32=4, half2=4, integer=2, compare=2, convert=2, fp64=2, mufu=0.5, shuffle=1, atomic=1, **{"global": 1, "local": 1}
)


def ledger() -> dict:
    """What the last launch did; needs option(ledger=1)."""
    return json.loads(library().ptxsim_ledger().decode())


def roofline(counts: dict | None = None, device: dict = H200) -> dict:
    """An ESTIMATE of a launch's time from its ledger: the largest of the times that each resource alone would take.

    The real time is longer: latencies, occupancy, tails and ptxas's own choices are not in it. `slots` are the issue
    slots that the PTX may take; SASS was counted to lie near it for simple kernels, not for all (README.md).
    """
    c = counts or ledger()
    per_second = device["sms"] * device["clock"]
    slots, moved = c["slots"], c["unique_read"] + c["unique_written"]
    times = {name: slots[name] / rate / per_second for name, rate in _RATES.items()}
    times["mufu"] = c["instructions"]["mufu"] / _RATES["mufu"] / per_second  # one of an instruction's slots
    times["issue"] = sum(slots.values()) / 4 / per_second
    times["integer"] = (slots["integer"] + slots["compare"]) / 2 / per_second
    times["shared"] = c["wavefronts"] / per_second
    times["l1"] = c["sectors"] / 4 / per_second
    times["matrix"] = c["mma_flops"] / device["matrix_flops"]
    times["bandwidth"] = moved / device["bandwidth"]
    limit = max(times, key=times.get)
    return {"seconds": times[limit], "limit": limit, "of_bandwidth": times["bandwidth"] / times[limit], "times": times}


def summary(counts: dict | None = None, elements: int | None = None) -> dict:
    """The ledger's ratios; elements: of the work, for counts per element."""
    c = counts or ledger()
    accesses = max(1, c["global_loads"] + c["global_stores"])
    out = {
        "active_lanes": c["thread_instructions"] / max(1, c["warp_instructions"]),
        "sectors_per_request": c["sectors"] / accesses,
        "excess_sectors": c["sectors"] / max(1, c["ideal_sectors"]),
        "traffic_ratio": 32 * c["sectors"] / max(1, c["unique_read"] + c["unique_written"]),  # 1: every byte moves once
        "bank_conflicts": c["wavefronts"] - c["ideal_wavefronts"],
        "barriers_per_block": c["barriers"] / max(1, c["blocks"]),
    }
    if elements:
        out["slots_per_element"] = sum(c["slots"].values()) * 32 / elements
        out["ptx_per_element"] = c["thread_instructions"] / elements
        out["mufu_per_element"] = c["instructions"]["mufu"] * 32 / elements
        out["bytes_per_element"] = (c["unique_read"] + c["unique_written"]) / elements
    return out
