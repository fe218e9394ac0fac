"""torch.func and forward mode: which transforms work, and which raise an error of fastpref's own, in both halves."""

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
    assert not jacobian.requires_grad


def of_head(loss=None, **options):
    def function(weight):
        hidden = hidden_of(torch.linspace(-2, 2, 84).reshape(4, 3, 7))
        if loss is None:
            return fastpref.linear_token_logps(hidden, weight, LABELS).sum()
        return fastpref.linear_preference_loss(hidden, weight, LABELS, loss=loss, **options).loss

    return function


# in each plan: the gradient may be formed in the forward, and be constant or linear in what backward() is handed
TWICE = {name: (function, (4, 3, 7)) for name, function in FUNCTIONS.items()} | {
    "recompute": (of_head(), (7, 5)),
    "pair-resident": (of_head("sigmoid", **REFERENCE), (7, 5)),
    "coupled": (of_head("aot", **REFERENCE), (7, 5)),
}
SECOND = {
    "hessian": torch.autograd.functional.hessian,
    "jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).sum())(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("second", SECOND)
def test_second_derivatives(name, second):
    function, shape = TWICE[name]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        SECOND[second](function, torch.randn(shape))


def test_outputs_may_be_written_over():
    """As `loss /= steps` does: no output that the caller has is needed by a backward whose gradients are formed."""
    weight = HEAD.clone().requires_grad_()
    loss = TWICE["pair-resident"][0](weight)
    (expected,) = torch.autograd.grad(loss / 2, weight)
    loss = TWICE["pair-resident"][0](weight)
    loss /= 2
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected)
    hidden = hidden_of(logits()).requires_grad_()
    logps = fastpref.linear_token_logps(hidden, HEAD, LABELS)
    (expected,) = torch.autograd.grad(logps.sum() / 2, hidden)
    logps = fastpref.linear_token_logps(hidden, HEAD, LABELS)
    logps /= 2
    torch.testing.assert_close(torch.autograd.grad(logps.sum(), hidden)[0], expected)


def test_second_derivatives_by_the_other_part_of_the_projection():
    def by_head(hidden, weight):
        return fastpref.linear_preference_loss(hidden, weight, LABELS, **REFERENCE).loss

    hidden, weight = hidden_of(logits()).requires_grad_(), HEAD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(by_head(hidden, weight), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(gradient.sum(), hidden)
    hidden = hidden.detach()
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.func.grad(lambda h: torch.func.grad(by_head, 1)(h, HEAD).sum())(hidden)
