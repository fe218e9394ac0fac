"""What this installation can do. Imports the module of every op, which enters itself in `_library.OPS`."""

import torch

from fastpref import _library, _native
from fastpref._build import version
from fastpref._logps import linear_logps, linear_preference, preference, token_logps  # noqa: F401
from fastpref._lowrank import (  # noqa: F401
    batched_ialm,
    batched_rpca,
    batched_verdict,
    bradley_terry,
    ialm_pass,
    outliers,
    residual_pass,
    rpca,
    svt,
)


def build_info() -> dict:
    """What was built, what was found, and which backend serves which op on which device, or why none does."""
    core = _native._core
    try:
        import triton

        triton_version = triton.__version__
    except ImportError as error:
        triton_version = f"not available: {error}"
    return {
        "version": version,
        "torch": torch.__version__,
        "triton": triton_version,
        "native": core.build_info() if core is not None else _native.cpu_missing(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible to torch",
        "backends": {
            op: {
                device: {backend: reason(device) or "available" for backend, reason in backends.items()}
                for device in ("cpu", "cuda")
            }
            for op, backends in _library.OPS.items()
        },
    }
