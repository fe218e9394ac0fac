"""The native core, or the reason why there is none; and the one place that looks at a device.

Tests run CUDA's code paths without a GPU by replacing what stands under "devices", so nothing else asks for a
tensor's device type, a stream or a guard, or launches a Triton kernel.
"""

import contextlib
import os

import torch
from torch import Tensor

try:
    import fastpref._core as _core

    _missing = None
except ImportError as error:
    _core = None
    _missing = str(error)
    if os.environ.get("FASTPREF_EXPECT_NATIVE") == "1":
        raise

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/dtype.h
HUGE_OUTPUT_BYTES = 4 << 20


def cpu_missing() -> str | None:
    """Why native CPU kernels cannot be used, or None."""
    if _core is None:
        return f"this installation has no native core ({_missing}); reinstall fastpref with a C++ compiler"
    return None


def cuda_missing() -> str | None:
    """Why native CUDA kernels cannot be used, or None."""
    if _core is None:
        return cpu_missing()
    if not hasattr(_core, "token_logps_fwd_cuda"):
        return "the native core was built without CUDA; reinstall with a CUDA compiler and FASTPREF_CUDA=ON"
    return None


# ---- devices ----


def device_kind(place: Tensor | torch.device) -> str:
    """ "cpu", "cuda" (AMD's too) or another of torch's device types."""
    return (place.device if isinstance(place, Tensor) else place).type


def stream(tensor: Tensor) -> int:
    """The stream that torch's own kernels on this tensor would go to."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The tensor's GPU is the current one; nothing for a tensor on the CPU."""
    return torch.cuda.device_of(tensor)


def warp_size(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).warp_size if torch.version.hip else 32


def total_memory(device: torch.device) -> int:
    """Bytes of that GPU's memory, whoever holds them: the same in every step, on every rank and in every run."""
    try:
        return torch.cuda.get_device_properties(device).total_memory
    except (AssertionError, RuntimeError) as error:  # no such GPU, or a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the memory of {device} is not known here ({reason}): give max_tile_bytes=") from error


def launch_triton(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """kernel[grid](*args, **options) on the GPU of the first argument, which is a tensor."""
    with guard(args[0]):
        kernel[grid](*args, **options)


# ---- memory ----


def empty(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous, uninitialised memory, on huge pages where it is large."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if device_kind(out) == "cpu" and _core is not None and out.nbytes >= HUGE_OUTPUT_BYTES:
        _core.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def set_addresses(args, tensors: dict[str, Tensor]) -> None:
    """args.<name> of the core becomes the tensor's address: `tensors` must have a name until the call."""
    for name, tensor in tensors.items():
        setattr(args, name, tensor.data_ptr())


def padded_rows(rows: int) -> int:
    """Columns of a native tile of so many rows: whole 32-token blocks."""
    return -(-rows // 32) * 32


def set_simd_level(level: str) -> None:
    """Forces the instruction set of the CPU kernels: "baseline", "avx2", "avx512", or "auto" for the best there is.

    The environment variable FASTPREF_SIMD does the same at import. Raises ValueError for a level that this build or
    this processor does not have.
    """
    if _core is None:
        raise RuntimeError(cpu_missing())
    _core.set_simd_level(level)


if _core is not None and "FASTPREF_SIMD" in os.environ:
    set_simd_level(os.environ["FASTPREF_SIMD"])
