"""Launches, products, host reads and device mixes of fastpref's CUDA paths, counted without a GPU.

A tensor of `on_device` says that it is elsewhere, and holds data of the CPU. Inside `counting()` every op of torch runs
on that data; one that mixes the two places raises, as it would with a GPU. Triton's kernels run under the interpreter.

What counts: an op of torch that is no view and no bare allocation is a launch; one that is a copy and a change in one
call is two. What CUDA makes of it inside (cub's passes, a memset) is not seen. A read is a value of the device on the
host; an upload is a copy from there, for which the host waits unless it is non_blocking. The peak is the largest sum of
bytes that are held at a time, without the inputs and what a product takes for itself.
"""

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import torch
from forced_cuda import OpenOperators, devices, on_cpu
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastpref import _native

ELSEWHERE = torch.device("meta")  # torch has no other device whose guard is there without a GPU

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
# functional forms that are a copy, or a fill, and then the change
TWO_LAUNCHES = {
    "masked_fill", "index_fill", "index_add", "index_copy", "index_put", "scatter", "constant_pad_nd",
    "slice_backward", "select_backward", "_segment_reduce_backward",
}  # fmt: skip
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive"}
WORKSPACE_BYTES = 1 << 15  # as if a CUDA kernel of the core's took so many: enough to be seen among the others
NO_LAUNCH = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}


class Counted(NamedTuple):
    """Of one call."""

    kernels: int  # fastpref's own
    products: int
    others: int  # torch's other launches
    reads: int = 0
    uploads: int = 0
    waits: int = 0  # for uploads


@dataclass
class Counts:
    ops: Counter = field(default_factory=Counter)  # launches by name; fastpref's end with _kernel or _cuda
    widest: int = 0  # elements of the largest tensor that a launch of torch's reads or writes
    reads: list[str] = field(default_factory=list)  # where
    uploads: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)  # for those of the uploads that are not non_blocking
    holders: Counter = field(default_factory=Counter)  # tensors over each memory that was allocated meanwhile
    held: int = 0
    peak: int = 0

    def hold(self, tensor: "OnDevice", is_new: bool) -> None:
        storage = tensor.held.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not is_new and address not in self.holders:
            return  # an input's
        if not self.holders[address]:
            self.held += size
            self.peak = max(self.peak, self.held)
        self.holders[address] += 1
        weakref.finalize(tensor, self.release, address, size)

    def release(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.holders[address]
            self.held -= size

    def counted(self) -> Counted:
        kernels = sum(n for name, n in self.ops.items() if name.endswith(("_kernel", "_cuda")))
        products = sum(n for name, n in self.ops.items() if name in PRODUCTS)
        others = sum(self.ops.values()) - kernels - products
        return Counted(kernels, products, others, len(self.reads), len(self.uploads), len(self.waits))


class OnDevice(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # what leaves the device is a plain tensor

    @staticmethod
    def __new__(cls, held: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=ELSEWHERE, requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise RuntimeError(f"{op} on a tensor of on_device() outside counting()")

    def __repr__(self):
        return f"OnDevice({list(self.shape)}, {self.dtype})"

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.cpu().tolist()


def on_device(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else OnDevice(tensor.detach())


def kind(place: Tensor | torch.device) -> str:
    device = place.device if isinstance(place, Tensor) else place
    return "cuda" if device.type == ELSEWHERE.type else device.type


def place_of_call() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/fastpref/" in frame.filename:
            return f"{frame.filename.rpartition('/fastpref/')[2]}:{frame.lineno}"
    return "a test"


def is_view(op) -> bool:
    returns = op._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _Counting(OpenOperators):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def run(self, op, args, kwargs):
        name = op._schema.name.rpartition("::")[2]
        if name == "device":
            return ELSEWHERE if isinstance(args[0], OnDevice) else args[0].device
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        ours = [t for t in tensors if isinstance(t, OnDevice)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        result_is_ours = bool(ours) if target is None else target == ELSEWHERE.type
        if name in ("copy_", "index", "index_put_"):
            result_is_ours = isinstance(args[0], OnDevice)
        if target == ELSEWHERE.type:
            kwargs = {**kwargs, "device": "cpu"}
        plain_args, plain_kwargs = tree_map(_held, (args, kwargs))
        made = on_cpu(op, plain_args, plain_kwargs)
        made_nothing = all(isinstance(t, Tensor) and not t.numel() for t in tree_leaves(made))
        if (ours or result_is_ours) and not made_nothing:
            touched = [t.numel() for t in tree_leaves((plain_args, plain_kwargs, made)) if isinstance(t, Tensor)]
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and any(args[2:])))
            self._count(op, name, args, tensors, ours, result_is_ours, max(touched), waits)

        def back(value):
            if not isinstance(value, Tensor):
                return value
            same = [t for t in tensors if _held(t) is value]
            if same or not result_is_ours:
                return same[0] if same else value
            wrapped = OnDevice(value)
            memory = value.untyped_storage().data_ptr()
            self.counts.hold(wrapped, all(memory != t.held.untyped_storage().data_ptr() for t in ours))
            return wrapped

        return tree_map(back, made)

    def _count(self, op, name, args, tensors, ours, result_is_ours, width, waits) -> None:
        counts, host = self.counts, [t for t in tensors if not isinstance(t, OnDevice) and t.dim()]
        if name in ("_to_copy", "copy_") and (host or not result_is_ours or not ours):
            where = counts.uploads if result_is_ours else counts.reads
            where.append(f"{name} at {place_of_call()}")
            if result_is_ours and waits:
                counts.waits.append(where[-1])
            return
        if host:
            shapes = [list(t.shape) for t in host]
            raise RuntimeError(f"{op} mixes tensors of the device with others, {shapes}, at {place_of_call()}")
        if name in READS or _has_mask(name, args):
            counts.reads.append(f"{name} at {place_of_call()}")
        elif name not in NO_LAUNCH and not is_view(op):
            counts.ops[name] += 2 if name in TWO_LAUNCHES else 1
            counts.widest = max(counts.widest, width)


def _held(value):
    return value.held if isinstance(value, OnDevice) else value


def _has_mask(name: str, args) -> bool:
    """Whether an index is a boolean mask, whose number of hits is read."""
    index = args[1] if name in ("index", "index_put", "index_put_") else ()
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in index)


class _CountedCore:
    """The native core, whose CUDA kernels are counted and do nothing."""

    def __init__(self, core, counts: Counts):
        self.core, self.counts = core, counts

    def __getattr__(self, name: str):
        if not name.endswith("_cuda"):
            return getattr(self.core, name)
        if "workspace" in name:
            return lambda args: WORKSPACE_BYTES
        return lambda *args: self.counts.ops.update([name])


@contextlib.contextmanager
def counting(native: bool = False) -> Iterator[Counts]:
    """native: with the native core's CUDA kernels, which leave their outputs as they are; else with Triton's."""
    counts = Counts()

    def launch_triton(kernel, grid, *args, **options):
        assert all(isinstance(a, OnDevice) for a in args if isinstance(a, Tensor)), (
            f"{kernel.fn.__name__} of a host tensor"
        )
        counts.ops[kernel.fn.__name__] += 1
        kernel[grid](*map(_held, args), **options)

    core = _CountedCore(_native._core, counts) if native else _native._core
    with mock.patch.object(_native, "_core", core), devices(kind, launch_triton, native), _Counting(counts):
        yield counts


def counted(call: Callable, native: bool = False) -> tuple[Counted, object]:
    with counting(native) as counts:
        result = call()
    return counts.counted(), result
