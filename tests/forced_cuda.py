"""fastpref's CUDA paths on tensors of the CPU: what a machine without a GPU can run of them for real.

`_native` is the one place that looks at a device, so replacing it there sends the public functions down their CUDA
paths. The operators hide what they call from torch's dispatch modes; here they are opened, so that a mode sees every
allocation and every op inside them too.
"""

import ast
import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref import _native, operators

TOTAL_MEMORY = 141 << 30  # of an H200


@cache
def implementation(name: str) -> Callable:
    """The Python function behind torch.ops.fastpref.<name>."""
    for node in ast.walk(ast.parse(inspect.getsource(operators))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_define":
            schema, path = node.args
            schema = schema.values[0] if isinstance(schema, ast.JoinedStr) else schema
            if schema.value.partition("(")[0] == name:
                module, _, function = path.value.partition(":")
                return getattr(importlib.import_module(module), function)
    raise LookupError(name)


def on_cpu(op, args, kwargs):
    """An aten op on tensors of the CPU, which lacks the products of 16 bits that write float32."""
    if not str(op).startswith(("aten.mm.dtype", "aten.addmm.dtype")):
        return op(*args, **kwargs)
    *operands, dtype = args
    *added, a, b = (t.to(dtype) for t in operands)
    product = a @ b
    if added:
        beta = kwargs.get("beta", 1)  # of 0: whatever was there before is not read, NaN or not
        product = kwargs.get("alpha", 1) * product + (beta * added[0] if beta else 0)
    return kwargs["out"].copy_(product) if "out" in kwargs else product


class OpenOperators(TorchDispatchMode):
    """A dispatch mode that sees what operators do: each of torch's that is not made of others goes to `run`."""

    def run(self, op, args, kwargs):
        raise NotImplementedError

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fastpref":
            with self, torch.no_grad():
                return implementation(op._schema.name.partition("::")[2])(*args, **kwargs or {})
        with self:  # below autograd a composite op arrives whole
            parts = op.decompose(*args, **kwargs or {})
        return self.run(op, args, kwargs or {}) if parts is NotImplemented else parts


@contextlib.contextmanager
def devices(kind: Callable, launch_triton: Callable, native: bool = False) -> Iterator[None]:
    """kind: device_kind's answer; launch_triton: what is called in its place; native: whether the core's CUDA kernels
    serve, which takes a core that is linked to ptxsim."""
    why = None if native else "no GPU is here"
    with mock.patch.multiple(
        _native,
        cuda_missing=lambda: why,
        device_kind=kind,
        stream=lambda tensor: 0,
        guard=lambda tensor: contextlib.nullcontext(),
        total_memory=lambda device: TOTAL_MEMORY,
        launch_triton=launch_triton,
    ):
        yield


class _Allocations(OpenOperators):
    def __init__(self, register):
        super().__init__()
        self.register, self.held = register, {}

    def run(self, op, args, kwargs):
        made = on_cpu(op, args, kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.note(tensor, str(op))
        return made

    def note(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self.held:
            self.held[storage.data_ptr()] = tensor  # alive until the end: no address is used twice
            self.register(tensor, f"{name} {list(tensor.shape)}")


@contextlib.contextmanager
def forced_cuda(
    register: Callable[[Tensor, str], None], launch_triton: Callable | None = None, native: bool = False
) -> Iterator[None]:
    """Every tensor, and every device, is taken for CUDA's.

    register(tensor, name) is called for each tensor that is allocated meanwhile, operators' own included, before
    anything else happens to it; all stay alive until the end. launch_triton(kernel, grid, *args, **options) is called
    in place of Triton's launch; by default it is Triton's own, which the interpreter serves. native: as in devices.
    """
    launch = launch_triton or (lambda kernel, grid, *args, **options: kernel[grid](*args, **options))
    with devices(lambda place: "cuda", launch, native), _Allocations(register):
        yield
