"""torch.func and forward mode: what the differentiable functions of both halves refuse, in words of their own."""

import pytest
import torch
from torch.autograd import forward_ad

import fastpref

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
    ),  # torch's own forward mode
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # jacrev maps over the backward
]

LABELS = torch.arange(12).reshape(4, 3) % 7
REFERENCE = {"ref_logps": torch.zeros(4)}


def hidden_of(logits):
    return logits @ torch.linspace(-1, 1, 35).reshape(7, 5)


HEAD = torch.linspace(-1, 2, 35).reshape(7, 5)
FUNCTIONS = {
    "token_logps": lambda x: fastpref.token_logps(x, LABELS).sum(),
    "linear_token_logps": lambda x: fastpref.linear_token_logps(hidden_of(x), HEAD, LABELS).sum(),
    "preference_loss": lambda x: fastpref.preference_loss(x, LABELS, **REFERENCE).loss,
    "linear_preference_loss": lambda x: fastpref.linear_preference_loss(hidden_of(x), HEAD, LABELS, **REFERENCE).loss,
    "svt": lambda x: fastpref.svt(x, 0.5).low_rank.sum(),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def logits():
    return torch.randn(4, 3, 7)


def dual(function, x, tangent):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, tangent))


FORWARD = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "dual": lambda f, x: dual(f, x, x),
}


@functions
@pytest.mark.parametrize("transform", FORWARD)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode(name, transform, grad):
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=f"^{name} has no forward-mode derivative"):
        FORWARD[transform](FUNCTIONS[name], logits())


@functions
def test_vmap(name):
    for function in (FUNCTIONS[name], torch.func.grad(FUNCTIONS[name])):
        with pytest.raises(RuntimeError, match=f"^{name} cannot be called under torch.func.vmap"):
            torch.func.vmap(function)(torch.stack([logits()] * 2))


@functions
def test_grad_and_jacrev_are_backward(name):
    x = logits()
    leaf = x.clone().requires_grad_()
    FUNCTIONS[name](leaf).backward()
    torch.testing.assert_close(torch.func.grad(FUNCTIONS[name])(x), leaf.grad, rtol=0, atol=1e-6)
    with torch.no_grad():
        jacobian = torch.func.jacrev(FUNCTIONS[name])(x)
    torch.testing.assert_close(jacobian, leaf.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["token_logps", "preference_loss", "svt"])
def test_second_derivatives(name):
    function, x = FUNCTIONS[name], logits()
    for second in (
        lambda: torch.autograd.functional.hessian(function, x),
        lambda: torch.autograd.functional.jvp(function, x, x),
        lambda: torch.func.grad(lambda y: torch.func.grad(function)(y).sum())(x),
    ):
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            second()
