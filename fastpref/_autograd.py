"""What the autograd functions of both halves share, and all that torch keeps private."""

import torch


class Once(torch.autograd.Function):
    """A gradient whose own backward raises. Left detached, it would drop a gradient penalty without a word."""

    @staticmethod
    def forward(gradient, logits):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "double backward is not supported: the log-probs and losses of fastpref have no second derivative"
        )


def once(ctx) -> None:
    """The first backward may use up what the forward left; whichever plan was taken, a second one raises."""
    if torch.compiler.is_compiling():
        return
    if ctx.done:
        raise RuntimeError(
            "a second backward through a linear head is not possible: the first one used its gradients up, in place"
        )
    ctx.done = True


def differentiable_once(gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Under create_graph=True: gradients that refuse to be differentiated, instead of dropping a penalty on them."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    anchor = torch.zeros((), requires_grad=True)
    return [None if gradient is None else Once.apply(gradient, anchor) for gradient in gradients]
