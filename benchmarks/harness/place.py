"""Where the GPU command's children work: on the GPU, or in a dry run on the CPU taken for one.

In a dry run fastpref's own functions go down their CUDA paths (tests/forced_cuda.py), and its kernels, compiled as for
a GPU, run on the simulator of tests/ptxsim, which checks every access. All else is the code that runs on a GPU.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from fastpref import _native

TESTS = Path(__file__).resolve().parents[2] / "tests"
CORE = "FASTPREF_SIMULATED_CORE"  # its path; PTXSIM_LIBRARY has the simulator's


def is_dry_run() -> bool:
    return CORE in os.environ


@contextlib.contextmanager
def working_place() -> Iterator[torch.device]:
    """The device that tensors are made on inside."""
    if not is_dry_run():
        yield torch.device("cuda")
        return
    with _simulated():
        yield torch.device("cpu")


@contextlib.contextmanager
def _simulated() -> Iterator[None]:
    sys.path[:0] = [str(TESTS), str(TESTS / "ptxsim")]
    import ptxsim
    import ptxsim_build
    import ptxsim_triton
    from forced_cuda import forced_cuda
    from simulated import register_poisoned

    compiler = ptxsim_triton.Compiler()

    def launch_triton(kernel, grid, *args, **options):
        ptxsim_triton.Kernel(compiler, kernel)[grid](*args, **options)

    def launch(launcher, tensors):  # whatever is allocated is registered, and stays so
        ptxsim.reset()
        launcher()
        if ptxsim.report():
            raise ptxsim.Findings(ptxsim.report())

    core = ptxsim_build.load_core(Path(os.environ[CORE]))
    try:
        with (
            mock.patch.object(ptxsim, "launch", launch),
            mock.patch.object(_native, "_core", core),
            forced_cuda(register_poisoned, launch_triton, native=True),
        ):
            yield
    finally:
        compiler.close()
