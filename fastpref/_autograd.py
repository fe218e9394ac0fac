"""What the autograd functions of both halves share, and all that torch keeps private.

Private names of torch are used here alone: `_C._SetExcludeDispatchKeyGuard`, `_C.DispatchKey`,
`_C._are_functorch_transforms_active`, `_C._functorch.TransformType`, `_functorch.pyfunctorch`,
`autograd.forward_ad._current_level` and `distributed_c10d._resolve_process_group`; and `Function.forward.__signature__`
is set for torch to read. Tested on torch 2.6, 2.11 and 2.13.
"""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad


def cache_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Saves apply() from inspecting forward's signature at every call, half of the op's overhead on small inputs."""
    function.forward.__signature__ = inspect.signature(function.forward)
    return function


def pad_gradients(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """One per argument of apply(): these of the first arguments, None of the others."""
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - len(gradients))


def refuse_transforms(function: str, *tensors: Tensor | None) -> None:
    """Raises under torch.func.vmap and in forward mode, for which the public function of that name has no rule.

    Torch's own errors would name an internal class, and a bare operator would silently drop tangents.
    """
    if torch.compiler.is_compiling():
        return
    forward_mode = vmap = False
    if torch._C._are_functorch_transforms_active():
        from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

        kinds = {interpreter.key() for interpreter in retrieve_all_functorch_interpreters()}
        forward_mode = torch._C._functorch.TransformType.Jvp in kinds
        vmap = torch._C._functorch.TransformType.Vmap in kinds
    elif forward_ad._current_level >= 0:
        forward_mode = any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if forward_mode:
        raise RuntimeError(
            f"{function} has no forward-mode derivative, which jvp, jacfwd and hessian need; "
            "it is differentiated once, in reverse: by backward(), torch.autograd.grad or torch.func.grad"
        )
    if vmap:
        raise RuntimeError(
            f"{function} cannot be called under torch.func.vmap; call it on the whole batch: "
            "its results are separate per token, pair or matrix already"
        )


class Once(torch.autograd.Function):
    """A gradient whose own backward raises. Left detached, it would silently drop a gradient penalty.

    sources: what it depends on, one of which requires a gradient.
    """

    generate_vmap_rule = True  # for torch.func.jacrev, which maps the backward over unit vectors

    @staticmethod
    def forward(gradient, *sources):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "double backward is not supported: the log-probs and losses of fastpref have no second derivative"
        )


def anchor(hidden: Tensor) -> Tensor:
    """An output that a function differentiates and keeps: a gradient that it forms in its forward depends on it.

    It is a source for `differentiable_once`. The other outputs may be written over by the caller before the backward.
    """
    return hidden.new_empty(0)


def differentiable_once(gradients: list[Tensor | None], *sources: Tensor | None) -> list[Tensor | None]:
    """Under create_graph=True: gradients that refuse to be differentiated, instead of dropping a penalty on them.

    sources: what they depend on: what backward() was handed, and the inputs that are at hand.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return [None if gradient is None else Once.apply(gradient, *sources) for gradient in gradients]


def is_mapped() -> bool:
    """Whether a transform of torch.func is at work, under which no tensor of ours may be written over."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def refuse_second_backward(ctx) -> None:
    """The first backward may use up what the forward left; whichever plan was taken, a second one raises."""
    if torch.compiler.is_compiling():
        return
    if ctx.done:
        raise RuntimeError(
            "a second backward through a linear head is not possible: the first one used its gradients up, in place"
        )
    ctx.done = True


@contextlib.contextmanager
def grad_inside_an_operator() -> Iterator[None]:
    """Autograd for a formula inside an operator, which a compiled graph calls below autograd."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        yield


def process_group(name: str) -> "torch.distributed.ProcessGroup":
    """The group of that name, which is what an operator's schema has room for."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)
