"""Which backends serve an op on a device, and the choice of one on real tensors."""

import os
import warnings
from collections.abc import Callable

import torch

from fastpref import _native

# op -> backend -> (device type -> reason why it cannot serve there, or None)
OPS: dict[str, dict[str, Callable[[str], str | None]]] = {}

# Fastest first; on CUDA by counted instructions and bytes in flight, not yet by a measurement.
_ORDER = ("native", "triton", "reference")


def choose_backend(op: str, backend: str, device: str) -> str:
    """The backend asked for, or for "" the fastest that serves `device`.

    Raises ValueError for an unknown backend and RuntimeError, with the recorded reason, for one that cannot serve.
    """
    backends = OPS[op]
    if backend:
        check_backend(op, backend)
        if reason := backends[backend](device):
            raise RuntimeError(f"backend={backend!r} of {op} cannot serve {device} tensors: {reason}")
        return backend
    for name in _ORDER:
        if name in backends and backends[name](device) is None:
            break
    if name == "reference":
        _warn_once(op, device)
    return name


def check_backend(op: str, backend: str | None) -> None:
    if backend is not None and backend not in OPS[op]:
        raise ValueError(f"backend must be None or one of {sorted(OPS[op])}, got {backend!r}")


_warned: set[tuple[str, str]] = set()


def _warn_once(op: str, device: str) -> None:
    if (op, device) in _warned:
        return
    _warned.add((op, device))
    reasons = "; ".join(f"{name}: {reason(device)}" for name, reason in OPS[op].items() if name != "reference")
    warnings.warn(
        f"{op} runs its slow reference on {device} tensors ({reasons}). backend='reference' silences this.",
        RuntimeWarning,
        stacklevel=2,
    )


def native_reason(device: str) -> str | None:
    if device == "cpu":
        return _native.cpu_missing()
    if device == "cuda":
        if torch.version.hip:
            return "the native CUDA kernels do not run on AMD; Triton serves it"
        return _native.cuda_missing()
    return f"there is no native kernel for {device}"


def native_cpu_reason(device: str) -> str | None:
    """Of ops without a CUDA kernel of their own."""
    return _native.cpu_missing() if device == "cpu" else f"there is no native kernel for {device}"


def triton_reason(device: str) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton has no CPU target; set TRITON_INTERPRET=1 before importing it to run the interpreter"
    return None


def reference_reason(device: str) -> None:
    return None
