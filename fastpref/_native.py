"""The native core, or the reason why there is none."""

import os

import torch

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


def empty(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Contiguous, uninitialised memory, on huge pages where it is large."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.device.type == "cpu" and _core is not None and out.nbytes >= HUGE_OUTPUT_BYTES:
        _core.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
