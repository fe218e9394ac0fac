"""Inputs of linear_token_logps, the logits path they are compared with, and what counts as near."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_no_worse

import fastpref
from fastpref._logps.linear_logps import linear_token_logps_ref
from fastpref._logps.token_logps import shifted, token_logps_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

SHAPES = {  # leading dimensions, hidden size, vocabulary
    "one-of-each": ((1,), 1, 1),
    "one-token": ((1,), 33, 101),
    "one-column": ((13,), 8, 1),
    "one-feature": ((29,), 1, 67),
    "odd": ((61,), 33, 1009),
    "llama-2-and-three": ((9,), 17, 32003),
    "batch": ((4, 9), 64, 130),
    "deep": ((2, 3, 2, 5), 7, 67),
}
EXTRAS = {"bare": {}, "bias": {"bias": True}, "adapter": {"rank": 3}, "both": {"bias": True, "rank": 5}}
# which inputs are trained; "hidden" alone is the frozen head, none at all is scoring
TRAINED = {
    "score": (),
    "hidden": ("hidden",),
    "hidden-weight": ("hidden", "weight"),
    "hidden-bias": ("hidden", "bias"),
    "hidden-adapter": ("hidden", "A", "B"),
    "weight": ("weight",),
    "bias": ("bias",),
    "adapter": ("A", "B"),
    "A": ("A",),
    "B": ("B",),
    "all": ("hidden", "weight", "bias", "A", "B"),
}


def make(
    lead=(29,),
    hidden_size=33,
    vocab=101,
    dtype=torch.float32,
    device="cpu",
    *,
    bias=False,
    rank=0,
    spread=3.0,
    ignored=0.2,
):
    """Inputs by name, with logits of standard deviation `spread` (before bias and adapter), and labels."""
    tensors = {
        "hidden": torch.randn(*lead, hidden_size),
        "weight": torch.randn(vocab, hidden_size) * (spread / math.sqrt(hidden_size)),
    }
    if bias:
        tensors["bias"] = torch.randn(vocab)
    if rank:
        tensors["A"] = torch.randn(rank, hidden_size) / math.sqrt(hidden_size)
        tensors["B"] = torch.randn(vocab, rank) / math.sqrt(rank)
    labels = torch.randint(0, vocab, lead)
    labels[torch.rand(lead) < ignored] = -100
    return {name: t.to(device, dtype) for name, t in tensors.items()}, labels.to(device)


@contextmanager
def at(*where):
    """Says which round of a loop it was."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"at {where}: {error}") from error


def cast(tensors, dtype):
    return {name: t.to(dtype) for name, t in tensors.items()}


def head(tensors):
    adapter = (tensors["A"], tensors["B"]) if "A" in tensors else None
    return {"bias": tensors.get("bias"), "adapter": adapter}


def fused(tensors, labels, **options):
    return fastpref.linear_token_logps(tensors["hidden"], tensors["weight"], labels, **head(tensors), **options)


def project(tensors):
    logits = F.linear(tensors["hidden"], tensors["weight"], tensors.get("bias"))
    if "A" in tensors:
        logits = logits + F.linear(F.linear(tensors["hidden"], tensors["A"]), tensors["B"])
    return logits


def exact(tensors, labels, shift=False, ignore_index=-100, **transform):
    """The specification, in float64."""
    if shift:
        labels = shifted(labels, ignore_index)
    hidden, weight = tensors["hidden"], tensors["weight"]
    return linear_token_logps_ref(hidden, weight, labels, ignore_index=ignore_index, **head(tensors), **transform)


def plain(tensors, labels, temperature=1.0, softcap=None, scale=1.0):
    """What a user writes, in the dtype of the inputs."""
    z = project(tensors) * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    ignored = labels == -100
    logps = torch.log_softmax(z / temperature, -1).gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(ignored, 0.0, logps)


def run(f, tensors, labels, grad, trained=TRAINED["all"], **options):
    """The log-probs of f, and the gradients of the inputs named in `trained`."""
    leaves = {name: t.detach().requires_grad_(name in trained) for name, t in tensors.items()}
    logps = f(leaves, labels, **options)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    if not names:
        assert logps.grad_fn is None
        return logps, {}
    gradients = torch.autograd.grad(logps, [leaves[name] for name in names], grad.to(logps.dtype))
    return logps.detach(), dict(zip(names, gradients, strict=True))


def terms(tensors, labels, grad, transform):
    """For each gradient the sum of its terms' sizes: what rounding each of them costs, however they cancel."""
    t = {name: value.detach().double() for name, value in tensors.items()}
    logits = project(t).requires_grad_()
    (dz,) = torch.autograd.grad(token_logps_ref(logits, labels, **transform), logits, grad.double())
    dz = dz.abs().reshape(-1, dz.shape[-1])
    x = t["hidden"].abs().reshape(-1, t["hidden"].shape[-1])
    x = x.masked_fill(labels.reshape(-1, 1) == -100, 0.0)
    weight = t["weight"].abs()
    sizes = {"weight": dz.t() @ x, "bias": dz.sum(0)}
    if "A" in t:
        A, B = t["A"].abs(), t["B"].abs()
        weight = weight + B @ A
        sizes |= {"A": (dz @ B).t() @ x, "B": dz.t() @ (x @ A.t())}
    return {"hidden": (dz @ weight).view(t["hidden"].shape), **sizes}


def rms(value, true):
    return (value.double() - true).square().mean().sqrt().item()


def check(tensors, labels, trained=TRAINED["all"], backend=None, transform=None, **options):
    """No worse than plain PyTorch, gradients than in the same dtype, log-probs than in float32; and near the truth."""
    transform, dtype = transform or {}, tensors["hidden"].dtype
    grad = torch.randn(labels.shape, device=labels.device)
    logps, gradients = run(fused, tensors, labels, grad, trained, backend=backend, **transform, **options)
    truth, true_gradients = run(exact, cast(tensors, torch.float64), labels, grad, trained, **transform)
    assert logps.dtype == torch.float32
    assert logps.shape == labels.shape
    assert (logps <= 0).all()
    # hidden A^T is an activation of the model's dtype: its rounding is the model's, not the op's
    rounded = "A" in tensors and dtype != torch.float32
    error, size = (logps - truth).abs(), truth.abs().clamp(min=1.0)
    assert (error <= (4 * torch.finfo(dtype).eps if rounded else 3e-6) * size).all(), f"logps off by {error.max():.2e}"
    sizes = terms(tensors, labels, grad, transform)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype, name
        assert gradient.shape == tensors[name].shape, name
        error = (gradient - true_gradients[name]).abs()
        assert error.isfinite().all(), f"gradient of {name} has {(~error.isfinite()).sum()} entries that are not finite"
        worst = (error - bound * sizes[name]).max()
        assert worst <= torch.finfo(dtype).smallest_normal, f"gradient of {name} off by {worst:.2e} more than rounding"
    if labels.numel() < 29:
        return  # too few for PyTorch's own error to show its usual size
    same, _ = run(plain, tensors if rounded else cast(tensors, torch.float32), labels, grad, trained, **transform)
    _, same_gradients = run(plain, tensors, labels, grad, trained, **transform)
    assert_no_worse(logps.reshape(1, -1), same.reshape(1, -1), truth.reshape(1, -1), torch.float32, "logps")
    for name, gradient in gradients.items():
        # Each entry is bounded above; against PyTorch all are one row, for what is left where terms cancel is chance.
        # So is which of two float32 sums meets the worst rounding: there the usual error is compared.
        three = (gradient, same_gradients[name], true_gradients[name])
        if dtype == torch.float32:
            ours, theirs = (rms(g, true_gradients[name]) for g in three[:2])
            allowed = 1.5 * theirs + torch.finfo(dtype).eps * rms(true_gradients[name], 0.0)
            assert ours <= allowed, f"gradient of {name} off by {ours:.2e} rms, PyTorch by {theirs:.2e}"
        else:
            assert_no_worse(*(g.reshape(1, -1) for g in three), dtype, f"gradient of {name}")


def close(got, expected, rtol=0.0, atol=1e-10):
    """(log-probs, gradients) against the same; float32 log-probs may be off by a few units in the last place."""
    few = rtol if got[0].dtype == torch.float64 else max(rtol, 1e-6)
    torch.testing.assert_close(got[0].double(), expected[0].double(), rtol=few, atol=atol)
    assert got[1].keys() == expected[1].keys()
    for name in got[1]:
        size = expected[1][name].abs().max().item() if expected[1][name].numel() else 0.0
        torch.testing.assert_close(
            got[1][name].double(), expected[1][name].double(), rtol=rtol, atol=atol * max(size, 1.0),
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )  # fmt: skip


def loosely(dtype):
    return 1e-5 if dtype == torch.float32 else 2**-6


COSTS = {"score": (), "unit": ("hidden",), "recompute": ("hidden", "weight")}
PASSES = {"score": 1, "unit": 2, "recompute": 4}


def planned(active, hidden_size, vocab, trained, **options):
    return fastpref.plan(
        active, hidden_size, vocab, hidden_grad="hidden" in trained, weight_grad="weight" in trained,
        bias_grad="bias" in trained, **options,
    )  # fmt: skip
