"""fastpref's public functions on the simulator: their CUDA paths, on tensors of the CPU, every access checked."""

import contextlib
from collections.abc import Callable, Iterator

import ptxsim
import torch
from forced_cuda import forced_cuda
from ptxsim_triton import Kernel
from torch import Tensor

POISON = {torch.int64: -7_777_777_777, torch.int32: -77_777, torch.uint8: 0xA7}


def poison(tensor: Tensor) -> None:
    tensor.fill_(torch.nan if tensor.dtype.is_floating_point else POISON[tensor.dtype])


def register_poisoned(tensor: Tensor, name: str) -> None:
    """What an op has allocated, for kernels to write; its contents are poison if the op gave it none."""
    if "empty" in name:
        poison(tensor)
    ptxsim.register(name, tensor)


@contextlib.contextmanager
def simulated(inputs: dict, by_row: dict | None = None, compiler: Callable | None = None) -> Iterator[None]:
    """What runs inside goes to the simulator.

    Args:
        inputs: {name: tensor} that kernels may read, {name: (tensor, False)} that they may write too.
        by_row: the same of [..., columns], each of whose rows is bounded by itself.
        compiler: of Triton's kernels, in place of the core's; without one, what is Triton's alone is interpreted.

    Every tensor that is allocated inside is poisoned and may be written. Raises ptxsim.Findings.
    """
    ptxsim.reset()
    ptxsim.clear()
    for name, x in inputs.items():
        x, readonly = x if isinstance(x, tuple) else (x, True)
        if x is not None:
            ptxsim.register(name, x, readonly)
    for name, x in (by_row or {}).items():
        x, readonly = x if isinstance(x, tuple) else (x, True)
        for row, (columns, _) in ({} if x is None else ptxsim.by_row(name, x)).items():
            ptxsim.register(row, columns, readonly)

    def launch_triton(kernel, grid, *args, **options):
        Kernel(compiler, kernel, registered=True)[grid](*args, **options)

    try:
        with forced_cuda(register_poisoned, launch_triton if compiler else None, native=compiler is None):
            yield
    except Exception as error:
        if ptxsim.report():
            raise ptxsim.Findings(ptxsim.report()) from error
        raise
    finally:
        ptxsim.clear()
    if ptxsim.report():
        raise ptxsim.Findings(ptxsim.report())
