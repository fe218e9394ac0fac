"""A gradient that was formed before its factor was known, times that factor, in the gradient's own memory.

A plan that forms gradients in the forward multiplies them by what backward() is handed, which is 1 nearly always, and
on a GPU known to the GPU alone. There the kernel looks first: for a factor of 1 no entry is read or written.

Floor, in bytes per entry of size s: 0 for a factor of 1, else 2 s.
"""

import torch
from torch import Tensor

from fastpref import _autograd, _library, _native

try:
    import triton
    import triton.language as tl
except ImportError:  # _library.triton_reason says why
    triton = None

if triton is not None:

    @triton.jit(do_not_specialize=["size"])
    def _scale_kernel(
        x_ptr,  # [size] fp32, bf16 or fp16
        factor_ptr,  # [] fp32
        size,  # int64: a weight's gradient has more than 2^31 entries
        BLOCK: tl.constexpr,
    ):
        factor = tl.load(factor_ptr)
        if factor != 1.0:
            blocks = size.to(tl.int64) // BLOCK
            cols = tl.arange(0, BLOCK)
            for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
                at = x_ptr + tl.cast(block, tl.int64) * BLOCK + cols
                tl.store(at, (tl.load(at).to(tl.float32) * factor).to(x_ptr.dtype.element_ty))
            if tl.program_id(0) == blocks % tl.num_programs(0):
                at = x_ptr + blocks * BLOCK + cols
                mask = cols < size - blocks * BLOCK
                tl.store(at, (tl.load(at, mask=mask).to(tl.float32) * factor).to(x_ptr.dtype.element_ty), mask=mask)


_PROGRAMS = 1024  # as many as a large GPU has room for; each takes every 1024th block
_WARPS = 8
_THREAD_BYTES = 64


def _triton_scale(gradient: Tensor, factor: Tensor) -> None:
    block = _WARPS * 32 * _THREAD_BYTES // gradient.element_size()
    programs = min(_PROGRAMS, -(-gradient.numel() // block))
    _native.launch_triton(
        _scale_kernel, (programs,), gradient, factor.float(), gradient.numel(), BLOCK=block, num_warps=_WARPS
    )


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor in gradient's dtype; written over the gradient, but in a graph or under torch.func.

    factor: a scalar, or one per row as [rows, 1].
    """
    if torch.compiler.is_compiling() or _autograd.is_mapped():
        return (gradient * factor).to(gradient.dtype)
    if factor.dim() == 0 and _native.device_kind(factor) == "cpu" and factor == 1:
        return gradient.detach()  # a tensor of its own, which .grad can take over without a copy
    gradient = gradient.detach()
    if factor.dim() == 0 and gradient.numel() and _looks_first(gradient):
        _triton_scale(gradient, factor)
        return gradient
    return gradient.mul_(factor)


def _looks_first(gradient: Tensor) -> bool:
    kernel = _native.device_kind(gradient) == "cuda" and _library.triton_reason("cuda") is None
    return kernel and gradient.dtype in _native.DTYPE_CODES and gradient.is_contiguous()
