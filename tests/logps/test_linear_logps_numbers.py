"""linear_token_logps against the logits it never stores, in float64; then what it promises as a citizen of torch."""

import gc
import inspect
import itertools
import math
import os
import re
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import TRANSFORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref
import fastpref._logps.linear_logps
from fastpref import _library, _native
from fastpref._logps.token_logps import STATS, shifted, token_logps_ref

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on a GPU need it

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


BACKENDS = [("reference", "cpu"), ("native", "cpu"), ("native", "cuda"), ("triton", "cuda")]


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of tiny products: two threads that get one core between them would wait for each other at each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Backend(NamedTuple):
    name: str
    device: torch.device


@pytest.fixture(params=[pytest.param(b, id="-".join(b), marks=[pytest.mark.cuda] * (b[1] == "cuda")) for b in BACKENDS])
def backend(request):
    """Kernels at every SIMD level and under the interpreter are test_token_logps'; here each has its place once."""
    name, device = request.param
    if reason := _library.OPS["token_logps"][name](device):
        pytest.skip(reason)
    return Backend(name, torch.device(device))


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
    """The logits path in float64."""
    if shift:
        labels = shifted(labels, ignore_index)
    return token_logps_ref(project(cast(tensors, torch.float64)), labels, ignore_index=ignore_index, **transform)


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


# ---- equality with the logits path ----


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_float64_equals_the_logits_path(transform):
    tensors, labels = make((3, 7), dtype=torch.float64, bias=True, rank=4)
    grad = torch.randn(labels.shape, dtype=torch.float64)
    for name, trained in TRAINED.items():
        for options in ({}, {"shift": True}):
            with at(name, options):
                got = run(fused, tensors, labels, grad, trained, **transform, **options)
                assert got[0].dtype == torch.float64
                close(got, run(exact, tensors, labels, grad, trained, **transform, **options))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float64_equals_the_logits_path_in_every_shape(shape):
    for extras in EXTRAS.values():
        tensors, labels = make(*shape, torch.float64, **extras)
        grad = torch.randn(labels.shape, dtype=torch.float64)
        with at(extras):
            close(run(fused, tensors, labels, grad), run(exact, tensors, labels, grad))


class _Fresh(torch.autograd.Function):
    """f with a new graph for every backward: gradcheck calls each one several times."""

    @staticmethod
    def forward(ctx, f, *inputs):
        ctx.f = f
        ctx.save_for_backward(*inputs)
        return f(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.f(*inputs), inputs, grad)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradcheck(transform):
    tensors, labels = make((2, 3), 4, 5, torch.float64, bias=True, rank=2)
    labels[1, 2] = -100
    names = list(tensors)

    def f(*values):
        return fused(dict(zip(names, values, strict=True)), labels, **transform)

    inputs = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *values: _Fresh.apply(f, *values), inputs)
    frozen = [tensors["weight"].detach(), labels]
    assert torch.autograd.gradcheck(
        lambda x: _Fresh.apply(lambda h: fastpref.linear_token_logps(h, *frozen, **transform), x), inputs[:1]
    )


@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(backend, shape, dtype):
    for extras in ("bare", "both"):
        tensors, labels = make(*shape, dtype, backend.device, **EXTRAS[extras])
        with at(extras):
            check(tensors, labels, backend=backend.name)


@dtypes
def test_matches_float64_through_every_transform(backend, dtype):
    for name, transform in TRANSFORMS.items():
        for trained in ("hidden", "all"):
            tensors, labels = make((37,), 33, 211, dtype, backend.device, bias=True)
            with at(name, trained):
                check(tensors, labels, TRAINED[trained], backend.name, transform)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_matches_float64_at_every_simd_level(level):
    try:
        fastpref.set_simd_level(level)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for dtype in DTYPES:
            for trained in ("hidden", "all"):
                tensors, labels = make((37,), 33, 211, dtype, bias=True)
                with at(dtype, trained):
                    check(tensors, labels, TRAINED[trained], "native", TRANSFORMS["softcap"])
    finally:
        fastpref.set_simd_level("auto")


@pytest.mark.triton
def test_matches_float64_under_the_interpreter():
    if reason := _library.triton_reason("cpu"):
        pytest.skip(reason)
    for dtype, (trained, options) in itertools.product(
        DTYPES, [("score", {}), ("hidden", {"max_tile_bytes": 3 * 67 * 4}), ("all", {"max_active_tokens": 6})]
    ):
        tensors, labels = make((2, 3), 12, 67, dtype, bias=True, rank=2)
        with at(dtype, trained, options):
            check(tensors, labels, TRAINED[trained], "triton", TRANSFORMS["softcap"], **options)


@dtypes
def test_a_saturated_softcap(backend, dtype):
    tensors, labels = make((37,), 33, 211, dtype, backend.device, spread=20.0)
    check(tensors, labels, backend=backend.name, transform={"softcap": 5.0})


@dtypes
def test_every_plan_matches_float64(backend, dtype):
    for name, trained in TRAINED.items():
        tensors, labels = make((31,), 24, 203, dtype, backend.device, bias=True, rank=4)
        with at(name):
            check(tensors, labels, trained, backend.name)


def test_bf16_log_probs_are_those_of_unrounded_logits(backend):
    tensors, labels = make((64,), 512, 4096, torch.bfloat16, backend.device, ignored=0)
    truth = exact(tensors, labels)
    rounded = torch.log_softmax(project(tensors).float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert (rounded.double() - truth).abs().max() >= 2e-3  # what it would be otherwise
    grad = torch.randn(labels.shape, device=backend.device)
    for trained in ("score", "hidden", "hidden-weight"):
        logps, _ = run(fused, tensors, labels, grad, TRAINED[trained], backend=backend.name)
        assert (logps.double() - truth).abs().max() <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("extras", ["bare", "both"])
def test_rounded_logits_are_no_worse_than_pytorchs(backend, dtype, extras):
    tensors, labels = make((128,), 48, 777, dtype, backend.device, **EXTRAS[extras])
    grad = torch.randn(labels.shape, device=backend.device)

    def peer(t, y):
        z = torch.log_softmax(project(t).float(), -1)
        return torch.where(y == -100, 0.0, z.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1))

    for trained in ("score", "hidden", "all"):
        options = {"logits_dtype": dtype, "backend": backend.name}
        logps, gradients = run(fused, tensors, labels, grad, TRAINED[trained], **options)
        same, same_gradients = run(peer, tensors, labels, grad, TRAINED[trained])
        truth, true_gradients = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
        assert logps.dtype == torch.float32
        # the noise of rounding, which hits two ways of computing at different tokens: its size is what can be compared
        assert rms(logps, truth) <= 1.5 * rms(same, truth)
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            assert rms(gradient, true_gradients[name]) <= 1.5 * rms(same_gradients[name], true_gradients[name]), name


def test_rounded_logits_are_rounded(backend):
    # H = 1 with powers of two: every product is exact, and half of them do not fit bfloat16 once the bias is added
    weight = torch.randn(300, 1).bfloat16().to(backend.device)
    hidden = 2.0 ** torch.randint(-2, 3, (20, 1)).to(backend.device, torch.bfloat16)
    bias = torch.randn(300).bfloat16().to(backend.device)
    labels = torch.randint(0, 300, (20,), device=backend.device)
    logits = F.linear(hidden.float(), weight.float(), bias.float())
    options = {"bias": bias, "backend": backend.name}
    got = fastpref.linear_token_logps(hidden, weight, labels, logits_dtype=torch.bfloat16, **options)
    torch.testing.assert_close(got.double(), token_logps_ref(logits.bfloat16(), labels), rtol=0, atol=1e-5)
    got = fastpref.linear_token_logps(hidden, weight, labels, **options)
    torch.testing.assert_close(got.double(), token_logps_ref(logits, labels), rtol=0, atol=1e-5)


@dtypes
@pytest.mark.parametrize("probability", [0.95, 0.995, 0.9999])
def test_confident_tokens_keep_their_gradient(backend, probability, dtype):
    # of one token, the bias gradient is that of the logits: 1 - p at the label
    tensors, labels = make((1,), 64, 500, dtype, backend.device, ignored=0, spread=1.0)
    tensors["bias"] = torch.zeros_like(tensors["weight"][:, 0])
    direction = torch.randn(64, device=backend.device)
    others = tensors["weight"].double()
    low, high = 0.0, 100.0
    for _ in range(60):  # how far the hidden state must lean towards the label's row
        middle = (low + high) / 2
        hidden = (direction + middle * others[labels[0]]).to(dtype)[None]
        p = exact({**tensors, "hidden": hidden}, labels).exp().item()
        low, high = (middle, high) if p < probability else (low, middle)
    tensors["hidden"] = hidden
    grad = torch.full((1,), 1024.0, device=backend.device)  # a loss scale: float16 has no small numbers
    bound = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-10}[dtype]
    for trained in ("hidden", "all"):
        logps, gradients = run(fused, tensors, labels, grad, TRAINED[trained], backend=backend.name)
        truth, true_gradients = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
        torch.testing.assert_close(logps.double(), truth, rtol=1e-4, atol=0)
        for name, gradient in gradients.items():
            error = (gradient.double() - true_gradients[name]).norm() / true_gradients[name].norm()
            assert error <= bound, f"{trained}, gradient of {name}: {error:.2e}"
        if "bias" in gradients:
            target, true_target = gradients["bias"][labels], true_gradients["bias"][labels]
            torch.testing.assert_close(target.double(), true_target, rtol=bound, atol=0)


def large_and_exact(size, dtype=torch.bfloat16, device="cpu"):
    """Logits that are integers times a power of two near `size`, exact in float32 however they are summed."""
    unit = 2.0 ** round(math.log2(size / 40))
    hidden = torch.randint(-4, 5, (40, 16)).to(device, dtype)
    weight = (torch.randint(-8, 9, (77, 16)) * unit).to(device, dtype)
    logits = hidden.double() @ weight.double().t()
    labels = logits.argmax(-1)
    labels[::2] = torch.randint(0, 77, (20,), device=device)
    labels[::5] = -100
    if size > 2.0**50:  # log 2 is lost there, in float64 too: nobody can tell a tie from certainty
        labels[(logits == logits.amax(-1, keepdim=True)).sum(-1) > 1] = -100
    return {"hidden": hidden, "weight": weight}, labels


@pytest.mark.parametrize("size", [1e5, 1e30], ids=["beyond-float16", "1e30"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_large_logits(backend, dtype, size):
    tensors, labels = large_and_exact(size, dtype, backend.device)
    grad = torch.randn(labels.shape, device=backend.device)
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    for trained in ("score", "hidden", "hidden-weight"):
        logps, gradients = run(fused, tensors, labels, grad, TRAINED[trained], backend=backend.name)
        truth, true_gradients = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
        torch.testing.assert_close(logps.double(), truth, rtol=1e-6, atol=1e-6)
        for name, gradient in gradients.items():
            atol = bound * true_gradients[name].abs().max().item()
            torch.testing.assert_close(gradient.double(), true_gradients[name], rtol=bound, atol=atol)


def test_float16_logits_beyond_float16(backend):
    # in float32 accumulators nothing overflows, though a float16 product would be inf
    tensors, labels = make((20,), 16, 77, torch.float16, backend.device, spread=1e3)
    tensors["hidden"] *= 100
    assert not project(tensors).isfinite().all()
    grad = torch.randn(labels.shape, device=backend.device)
    for trained in ("score", "hidden", "hidden-weight"):
        logps, gradients = run(fused, tensors, labels, grad, TRAINED[trained], backend=backend.name)
        truth, true_gradients = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
        torch.testing.assert_close(logps.double(), truth, rtol=1e-5, atol=2e-2)
        for name, gradient in gradients.items():
            atol = 2e-2 * true_gradients[name].abs().max().item()
            torch.testing.assert_close(gradient.double(), true_gradients[name], rtol=1e-2, atol=atol)


@dtypes
def test_small_logits_keep_their_gradient(backend, dtype):
    tensors, labels = make((20,), 16, 77, dtype, backend.device, spread=1e-6)
    check(tensors, labels, backend=backend.name)


@pytest.mark.parametrize("product", ["amx", "avx512_bf16", "none"])
class TestProducts:
    """What forms the bf16 logits on a CPU."""

    @pytest.fixture(autouse=True)
    def _product(self, product):
        choose = getattr(_native._core, "set_linear_product", None)
        if choose is None:
            pytest.skip("this build chooses no product")
        try:
            choose(product)
        except ValueError as error:
            pytest.skip(str(error))
        yield
        choose("auto")

    def test_tails(self):
        for rows, hidden_size, vocab in itertools.product([1, 31, 33], [1, 33, 512], [1, 17, 1000]):
            tensors, labels = make((rows,), hidden_size, vocab, torch.bfloat16, bias=True, ignored=0.1)
            with at(rows, hidden_size, vocab):
                check(tensors, labels, TRAINED["hidden"])
                check(tensors, labels)

    @pytest.mark.parametrize("transform", ["plain", "softcap"])
    def test_plans(self, transform):
        for trained in ("score", "hidden", "hidden-bias", "adapter", "all"):
            for budget in (None, 40 * 333 * 2):
                tensors, labels = make((65,), 40, 333, torch.bfloat16, bias=True, rank=3)
                with at(trained, budget):
                    check(tensors, labels, TRAINED[trained], transform=TRANSFORMS[transform], max_tile_bytes=budget)

    def test_large_small_and_masked_logits(self):
        tensors, labels = make((33,), 40, 333, torch.bfloat16, spread=1e-6)
        check(tensors, labels)
        check(tensors, labels, TRAINED["hidden"])
        tensors, labels = make((33,), 40, 333, torch.bfloat16, bias=True)
        tensors["bias"][torch.randperm(333)[:100]] = -torch.inf
        labels[(labels >= 0) & (tensors["bias"][labels] == -torch.inf)] = -100
        check(tensors, labels)
        for size in (1e3, 1e5, 1e30):
            tensors, labels = large_and_exact(size)
            grad = torch.randn(labels.shape)
            for trained in ("hidden", "hidden-weight"):
                got = run(fused, tensors, labels, grad, TRAINED[trained])
                expected = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
                with at(size, trained):
                    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=1e-6)
                    close((expected[0], got[1]), expected, atol=2**-7)

    def test_a_tile_that_does_not_fit_float16_after_one_that_does(self):
        tensors, labels = large_and_exact(1e5)
        grad = torch.randn(labels.shape)
        tensors["hidden"][:33] *= 2.0**-10
        for order in (torch.arange(40), torch.arange(39, -1, -1)):
            moved, y = {**tensors, "hidden": tensors["hidden"][order]}, labels[order]
            for trained in ("score", "hidden", "hidden-weight"):
                got = run(fused, moved, y, grad, TRAINED[trained], max_tile_bytes=11 * 77 * 2)
                expected = run(exact, cast(moved, torch.float64), y, grad, TRAINED[trained])
                with at(trained):
                    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=2e-6)
                    close((expected[0], got[1]), expected, atol=2**-6)

    def test_stats(self):
        tensors, labels = make((45,), 40, 1003, torch.bfloat16, bias=True)
        for transform in TRANSFORMS.values():
            _, values = fused(tensors, labels, stats=STATS, **transform)
            logits = project(cast(tensors, torch.float64))
            _, true_values = fastpref.token_logps(logits, labels, stats=STATS, **transform)
            for name in STATS:
                torch.testing.assert_close(
                    getattr(values, name), getattr(true_values, name), rtol=1e-5, atol=2e-5, msg=name
                )

    def test_rounded_logits(self):
        tensors, labels = make((45,), 40, 1003, torch.bfloat16)
        grad = torch.randn(45)
        for trained in ("score", "hidden", "hidden-weight"):
            got = run(fused, tensors, labels, grad, TRAINED[trained], logits_dtype=torch.bfloat16)
            same = run(plain, tensors, labels, grad, TRAINED[trained])  # rounds its log-probs too
            truth = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
            assert_no_worse(*(x[0].reshape(1, -1) for x in (got, same, truth)), torch.bfloat16, "logps")
            # and rounded they are: nearer to the rounded logits' log-probs than to the truth
            logits = project(cast(tensors, torch.float32)).bfloat16()
            assert (got[0] - token_logps_ref(logits, labels)).abs().median() <= 1e-5
            for name, gradient in got[1].items():
                assert_no_worse(gradient, same[1][name], truth[1][name], torch.bfloat16, name)

    def test_threads_and_repeats(self):
        tensors, labels = make((70,), 40, 5003, torch.bfloat16, bias=True, rank=2)
        grad, results = torch.randn(70), []
        for threads in (1, 2, 2, 5):  # the fixture of this module puts the number back
            torch.set_num_threads(threads)
            for budget in (None, 40 * 5003 * 2):
                results.append(run(fused, tensors, labels, grad, max_tile_bytes=budget))
            check(tensors, labels)
            check(tensors, labels, TRAINED["hidden"])
        torch.testing.assert_close(results[2:4], results[4:6], rtol=0, atol=0)
        for other in results[1:]:
            torch.testing.assert_close(other[0], results[0][0], rtol=0, atol=1e-6)
            close(other, results[0], atol=2**-6)


def test_products_agree():
    choose = getattr(_native._core, "set_linear_product", None)
    if choose is None:
        pytest.skip("this build chooses no product")
    tensors, labels = make((70,), 64, 2050, torch.bfloat16)
    grad, results = torch.randn(70), []
    try:
        for product in ("none", "avx512_bf16", "amx"):
            try:
                choose(product)
            except ValueError:
                continue
            results.append(run(fused, tensors, labels, grad))
    finally:
        choose("auto")
    for other in results[1:]:
        torch.testing.assert_close(other[0], results[0][0], rtol=1e-6, atol=4e-6)
        close(other, results[0], rtol=2**-7, atol=2**-7)
    with pytest.raises(ValueError, match="amx9"):
        choose("amx9")


# ---- stats ----


@dtypes
@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
@pytest.mark.parametrize("transform", ["plain", "softcap"])
def test_stats(backend, dtype, trained, transform):
    tensors, labels = make((3, 7), 33, 777, dtype, backend.device, bias=True, rank=2, ignored=0.3)
    if dtype != torch.float32:
        del tensors["A"], tensors["B"]  # hidden A^T would be rounded
    labels[0, 0] = project(cast(tensors, torch.float64))[0, 0].argmax()
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    options = {"backend": backend.name, **TRANSFORMS[transform]}
    logps, values = fused(leaves, labels, stats=STATS, **options)
    _, true_values = fastpref.token_logps(
        project(cast(tensors, torch.float64)).detach(), labels, stats=STATS, **TRANSFORMS[transform]
    )
    torch.testing.assert_close(logps, fused(leaves, labels, **options), rtol=0, atol=1e-6)
    assert logps.requires_grad == bool(TRAINED[trained])
    assert values.top1[0, 0] == 1
    for name in STATS:
        got = getattr(values, name)
        assert not got.requires_grad
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, getattr(true_values, name), rtol=1e-5, atol=2e-5, msg=name)
    _, only = fused(leaves, labels, stats=("top1",), **options)
    assert only.entropy is None
    assert only.log_sum_p2 is None
    torch.testing.assert_close(only.top1, values.top1)


def test_stats_do_not_change_the_gradient(backend):
    tensors, labels = make((21,), device=backend.device, bias=True)
    grad = torch.randn(21, device=backend.device)
    for trained in ("hidden", "all"):
        with_stats = run(
            lambda t, y: fused(t, y, stats=STATS, backend=backend.name)[0], tensors, labels, grad, TRAINED[trained]
        )
        without = run(fused, tensors, labels, grad, TRAINED[trained], backend=backend.name)
        close(with_stats, without, atol=1e-6)


# ---- which tokens count ----


@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (2, 3, 5), (2, 3, 2, 2)], ids=len)
def test_leading_dimensions(backend, lead):
    tensors, labels = make(lead, 16, 50, device=backend.device, bias=True, ignored=0)
    grad = torch.randn(lead, device=backend.device)
    got = run(fused, tensors, labels, grad, backend=backend.name)
    assert got[0].shape == lead
    close(got, run(exact, cast(tensors, torch.float64), labels, grad), atol=3e-6)


def test_shift_is_hugging_faces_convention(backend):
    tensors, labels = make((3, 9), 16, 50, device=backend.device, ignored=0.2)
    grad = torch.randn(3, 9, device=backend.device)
    logps, gradients = run(fused, tensors, labels, grad, shift=True, backend=backend.name)
    by_hand = {**tensors, "hidden": tensors["hidden"][:, :-1]}
    expected, expected_gradients = run(fused, by_hand, labels[:, 1:], grad[:, :-1], backend=backend.name)
    torch.testing.assert_close(logps[:, :-1], expected, rtol=1e-6, atol=2e-6)
    assert (logps[:, -1] == 0).all()
    assert (gradients["hidden"][:, -1] == 0).all()
    torch.testing.assert_close(gradients["hidden"][:, :-1], expected_gradients["hidden"])
    torch.testing.assert_close(gradients["weight"], expected_gradients["weight"], rtol=1e-5, atol=1e-5)
    one_sequence = fused({**tensors, "hidden": tensors["hidden"][0]}, labels[0], shift=True, backend=backend.name)
    torch.testing.assert_close(one_sequence, logps[0], rtol=1e-6, atol=2e-6)
    one_token = fused({**tensors, "hidden": tensors["hidden"][:, :1]}, labels[:, :1], shift=True, backend=backend.name)
    assert (one_token == 0).all()


@pytest.mark.parametrize("ignore_index", [0, 7, -1, 2**40])
@pytest.mark.parametrize("shift", [False, True])
def test_ignore_index(backend, ignore_index, shift):
    tensors, labels = make((3, 9), 16, 50, device=backend.device, ignored=0)
    labels[:, ::3] = ignore_index
    grad = torch.randn(3, 9, device=backend.device)
    options = {"ignore_index": ignore_index, "shift": shift}
    got = run(fused, tensors, labels, grad, backend=backend.name, **options)
    counted = (shifted(labels, ignore_index) if shift else labels) != ignore_index
    assert (got[0][~counted] == 0).all()
    assert (got[0][counted] != 0).all()
    close(got, run(exact, cast(tensors, torch.float64), labels, grad, **options), atol=3e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
@pytest.mark.parametrize("capacity", [None, 40], ids=["exact", "capacity"])
@dtypes
def test_ignored_tokens_are_not_read(backend, dtype, capacity, trained, value):
    tensors, labels = make((4, 10), 16, 50, dtype, backend.device, bias=True, rank=2, ignored=0.5)
    labels[0, 0], labels[1, 1] = -100, 3
    clean = tensors["hidden"].clone()
    tensors["hidden"][labels == -100] = value
    grad = torch.randn(labels.shape, device=backend.device)
    grad[labels == -100] = torch.nan  # nor is their upstream gradient
    options = {"backend": backend.name, "max_active_tokens": capacity}
    got = run(fused, tensors, labels, grad, TRAINED[trained], **options)
    assert (got[0][labels == -100] == 0).all()
    assert got[0].isfinite().all()
    for gradient in got[1].values():
        assert gradient.isfinite().all()
    if "hidden" in got[1]:
        assert (got[1]["hidden"][labels == -100] == 0).all()
    expected = run(fused, {**tensors, "hidden": clean}, labels, grad.nan_to_num(), TRAINED[trained], **options)
    close(got, expected, atol=1e-6 if dtype == torch.float32 else 2**-7)
    _, values = fused(tensors, labels, stats=STATS, **options)
    for stat in values:
        assert (stat[labels == -100] == 0).all()
        assert stat.isfinite().all()


@dtypes
@pytest.mark.parametrize("capacity", [None, 5], ids=["exact", "capacity"])
def test_all_ignored_is_a_differentiable_zero(backend, capacity, dtype):
    tensors, labels = make((2, 3), 8, 40, dtype, backend.device, bias=True, rank=2)
    tensors["hidden"].fill_(torch.nan)
    labels.fill_(7)
    grad = torch.ones(2, 3, device=backend.device)
    options = {"ignore_index": 7, "backend": backend.name, "max_active_tokens": capacity}
    for plan, trained in TRAINED.items():
        logps, gradients = run(fused, tensors, labels, grad, trained, **options)
        assert (logps == 0).all()
        for name, gradient in gradients.items():
            assert gradient.shape == tensors[name].shape
            assert (gradient == 0).all(), f"{plan}: {name}"
    _, values = fused(tensors, labels, stats=STATS, **options)
    assert all((value == 0).all() for value in values)


@dtypes
@pytest.mark.parametrize("lead", [(0,), (0, 4), (3, 0)], ids=str)
def test_no_tokens(backend, lead, dtype):
    tensors, labels = make(lead, 8, 40, dtype, backend.device, bias=True, rank=2)
    grad = torch.ones(lead, device=backend.device)
    for plan, trained in TRAINED.items():
        logps, gradients = run(fused, tensors, labels, grad, trained, backend=backend.name)
        assert logps.shape == lead
        for name, gradient in gradients.items():
            assert gradient.shape == tensors[name].shape
            assert (gradient == 0).all(), f"{plan}: {name}"
    _, values = fused(tensors, labels, stats=STATS, shift=True, backend=backend.name)
    assert values.entropy.shape == lead


def test_a_masked_column_has_no_probability_and_no_gradient(backend):
    for dtype in DTYPES:
        tensors, labels = make((20,), 16, 60, dtype, backend.device, bias=True, ignored=0)
        labels %= 40
        tensors["bias"][40:] = -torch.inf
        grad = torch.randn(20, device=backend.device)
        kept = {**tensors, "weight": tensors["weight"][:40], "bias": tensors["bias"][:40]}
        for trained in (TRAINED["hidden"], TRAINED["all"]):
            logps, gradients = run(fused, tensors, labels, grad, trained, backend=backend.name)
            expected, expected_gradients = run(fused, kept, labels, grad, trained, backend=backend.name)
            torch.testing.assert_close(logps, expected, rtol=1e-6, atol=2e-6)
            atol = 1e-5 if dtype == torch.float32 else 2**-6
            torch.testing.assert_close(gradients["hidden"], expected_gradients["hidden"], rtol=atol, atol=atol)
            for name in trained[1:]:
                if name in gradients:
                    assert (gradients[name][40:] == 0).all()
                    torch.testing.assert_close(gradients[name][:40], expected_gradients[name], rtol=atol, atol=atol)
        _, values = fused(tensors, labels, stats=("entropy", "log_sum_p2", "top1"), backend=backend.name)
        _, kept_values = fused(kept, labels, stats=("entropy", "log_sum_p2", "top1"), backend=backend.name)
        for name in ("entropy", "log_sum_p2", "top1"):
            torch.testing.assert_close(getattr(values, name), getattr(kept_values, name), rtol=0, atol=1e-5)


@dtypes
def test_a_label_without_a_probability(backend, dtype):
    tensors, labels = make((6,), 16, 60, dtype, backend.device, bias=True, ignored=0)
    labels[:] = torch.arange(6)
    tensors["bias"][2] = -torch.inf
    logps = fused(tensors, labels, backend=backend.name)
    assert logps[2] == -torch.inf
    assert logps[labels != 2].isfinite().all()
    tensors["bias"][:] = -torch.inf  # one column left, the label's: certain
    tensors["bias"][5] = 0.0
    grad = torch.ones(6, device=backend.device)
    logps, gradients = run(fused, tensors, torch.full_like(labels, 5), grad, backend=backend.name)
    assert (logps == 0).all()
    for gradient in gradients.values():
        assert (gradient == 0).all()


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_a_bad_token_stays_in_its_row(backend, dtype, value):
    tensors, labels = make((33,), 16, 60, dtype, backend.device, ignored=0)
    grad = torch.randn(33, device=backend.device)
    expected = run(fused, tensors, labels, grad, TRAINED["hidden"], backend=backend.name)
    tensors["hidden"][5, 3] = value
    for trained in (TRAINED["hidden"], TRAINED["hidden-weight"]):
        logps, gradients = run(fused, tensors, labels, grad, trained, backend=backend.name)
        assert logps[5].isnan()
        good = torch.arange(33, device=backend.device) != 5
        torch.testing.assert_close(logps[good], expected[0][good], rtol=1e-6, atol=2e-6)
        bound = 1e-5 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(gradients["hidden"][good], expected[1]["hidden"][good], rtol=bound, atol=bound)
        assert gradients["hidden"][5].isnan().all()


@pytest.mark.parametrize("bad", [50, -1, -101, 2**40])
@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
def test_label_out_of_range(backend, bad, trained):
    tensors, labels = make((4, 3), 8, 50, device=backend.device, ignored=0)
    labels[2, 1] = bad
    labels[0] = -100
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    if backend.device.type == "cpu" and backend.name != "triton":
        text = f"labels must lie in \\[0, 50\\) or equal ignore_index=-100, got {bad} at position 7"
        with pytest.raises(ValueError, match=text):
            fused(leaves, labels, backend=backend.name)
        return
    try:
        logps = fused(leaves, labels, backend=backend.name)
    except ValueError as error:
        assert backend.device.type == "cpu"
        assert f"got {bad} at position 7" in str(error)
        return
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[2, 1] = True
    assert torch.equal(logps.isnan().cpu(), expected)
    if leaves["hidden"].requires_grad:
        (gradient,) = torch.autograd.grad(logps.sum(), leaves["hidden"])
        assert torch.equal(gradient.isnan().all(-1).cpu(), expected)


# ---- layouts ----

HIDDEN_LAYOUTS = {
    "every-other-token": lambda x: x[::2, 1::2],
    "sliced-tokens": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "every-other-feature": lambda x: x[..., ::2],
    "sliced-features": lambda x: x[..., 3:-2],
    "features-first": lambda x: x.transpose(1, 2),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "four-dimensions": lambda x: x.unflatten(0, (2, 2)).transpose(0, 2),
    "reversed-storage": lambda x: x.flip(0).contiguous(),
}


@dtypes
@pytest.mark.parametrize("layout", HIDDEN_LAYOUTS.values(), ids=HIDDEN_LAYOUTS)
def test_hidden_layouts(backend, layout, dtype):
    hidden = layout(torch.randn(4, 6, 18, device=backend.device).to(dtype))
    tensors, _ = make((1,), hidden.shape[-1], 70, dtype, backend.device)
    labels = torch.randint(0, 70, hidden.shape[:-1], device=backend.device)
    labels[0] = -100
    grad = torch.randn(labels.shape, device=backend.device)
    contiguous = {**tensors, "hidden": hidden.contiguous()}
    for trained in ("hidden", "all"):
        got = run(fused, {**tensors, "hidden": hidden}, labels, grad, TRAINED[trained], backend=backend.name)
        expected = run(fused, contiguous, labels, grad, TRAINED[trained], backend=backend.name)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=2e-6)
        close(got, expected, atol=1e-5 if dtype == torch.float32 else 2**-7)


WEIGHT_LAYOUTS = {  # views of a [V', H'] or [H', V'] leaf
    "transposed": ((20, 70), lambda w: w.t()),
    "sliced-columns": ((70, 33), lambda w: w[:, :20]),
    "sliced-columns-unaligned": ((70, 33), lambda w: w[:, 7:27]),
    "every-other-row": ((140, 20), lambda w: w[::2]),
    "every-other-column": ((70, 40), lambda w: w[:, ::2]),
    "last-rows": ((100, 20), lambda w: w[30:]),
    "expanded": ((1, 20), lambda w: w.expand(70, -1)),
    "permuted": ((7, 20, 10), lambda w: w.permute(0, 2, 1).reshape(70, 20)),
}


@dtypes
@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS.values(), ids=WEIGHT_LAYOUTS)
def test_weight_views(backend, layout, dtype):
    shape, view = layout
    tensors, labels = make((13,), 20, 70, dtype, backend.device)
    tensors["weight"] = torch.randn(shape, device=backend.device).to(dtype)
    grad = torch.randn(13, device=backend.device)

    def viewed(f):
        return lambda t, y, **options: f({**t, "weight": view(t["weight"])}, y, **options)

    bound = {torch.float32: 2e-5, torch.bfloat16: 2**-4, torch.float16: 2**-7}[dtype]
    for trained in (("hidden",), ("hidden", "weight"), ("weight",)):
        got = run(viewed(fused), tensors, labels, grad, trained, backend=backend.name)
        assert all(gradient.shape == tensors[name].shape for name, gradient in got[1].items())
        expected = run(viewed(exact), cast(tensors, torch.float64), labels, grad, trained)
        torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=2e-5)
        close(got, expected, rtol=0, atol=bound)


def test_small_input_layouts(backend):
    tensors, labels = make((40, 30), 8, 50, device=backend.device, bias=True, rank=3)
    grad = torch.randn(40, 30, device=backend.device)
    expected = run(fused, tensors, labels, grad, backend=backend.name)
    strided = {
        **tensors,
        "bias": tensors["bias"].repeat_interleave(2)[::2],
        "A": tensors["A"].t().contiguous().t(),
        "B": torch.cat([tensors["B"], tensors["B"]], 1)[:, :3],
    }
    close(run(fused, strided, labels, grad, backend=backend.name), expected, atol=1e-5)
    for same in (labels.int(), labels.t().contiguous().t(), labels.repeat(1, 2)[:, :30]):
        close(run(fused, tensors, same, grad, backend=backend.name), expected, atol=1e-6)
    # an upstream gradient without memory of its own, as sum() sends it
    ones = torch.ones((), device=backend.device).expand(40, 30)
    close(
        run(fused, tensors, labels, ones, backend=backend.name),
        run(fused, tensors, labels, ones.contiguous(), backend=backend.name),
        atol=1e-6,
    )
    transposed = grad.t().contiguous().t()
    close(run(fused, tensors, labels, transposed, backend=backend.name), expected, atol=1e-6)


def test_expanded_labels(backend):
    tensors, _ = make((5, 30), 8, 50, device=backend.device)
    labels = torch.randint(0, 50, (1, 30), device=backend.device).expand(5, -1)
    grad = torch.randn(5, 30, device=backend.device)
    close(
        run(fused, tensors, labels, grad, backend=backend.name),
        run(fused, tensors, labels.contiguous(), grad, backend=backend.name),
        atol=1e-6,
    )


def test_a_tied_embedding_gets_both_gradients():
    weight, ids = torch.randn(70, 20, dtype=torch.float64), torch.randint(0, 70, (4, 9))

    def embedded(f):
        def g(tensors, labels, **options):
            hidden = torch.tanh(F.embedding(labels, tensors["weight"]))
            return f({"hidden": hidden, "weight": tensors["weight"]}, labels, shift=True, **options)

        return g

    grad = torch.randn(4, 9, dtype=torch.float64)
    close(run(embedded(fused), {"weight": weight}, ids, grad), run(embedded(exact), {"weight": weight}, ids, grad))
    # and a hidden state that is the head itself
    labels = torch.arange(70)

    def itself(f):
        return lambda tensors, y: f({"hidden": tensors["weight"], "weight": tensors["weight"]}, y)

    grad = torch.randn(70, dtype=torch.float64)
    close(run(itself(fused), {"weight": weight}, labels, grad), run(itself(exact), {"weight": weight}, labels, grad))


# ---- plans ----


def loosely(dtype):
    return 1e-5 if dtype == torch.float32 else 2**-6


@dtypes
def test_every_plan_gives_the_same(backend, dtype):
    tensors, labels = make((41,), 24, 203, dtype, backend.device, bias=True, rank=4)
    grad = torch.randn(41, device=backend.device)
    full = run(fused, tensors, labels, grad, backend=backend.name)
    for name, trained in TRAINED.items():
        logps, gradients = run(fused, tensors, labels, grad, trained, backend=backend.name)
        torch.testing.assert_close(logps, full[0], rtol=1e-6, atol=1e-6, msg=name)
        close((logps, gradients), (logps, {key: full[1][key] for key in gradients}), atol=loosely(dtype))


@dtypes
@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight", "hidden-adapter", "all"])
def test_every_budget_gives_the_same(backend, dtype, trained):
    tensors, labels = make((23,), 24, 203, dtype, backend.device, bias=True, rank=4)
    grad = torch.randn(23, device=backend.device)
    expected = run(fused, tensors, labels, grad, TRAINED[trained], backend=backend.name)
    for rows in (1, 2, 7, 22, 23, 10**6):
        got = run(fused, tensors, labels, grad, TRAINED[trained], backend=backend.name, max_tile_bytes=rows * 203 * 4)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=2e-6)
        close(got, expected, atol=loosely(dtype))


def test_a_budget_below_one_row_is_one_row():
    tensors, labels = make((5,))
    torch.testing.assert_close(fused(tensors, labels, max_tile_bytes=1), fused(tensors, labels), rtol=1e-6, atol=2e-6)


@dtypes
def test_scoring_and_training_agree_with_another_number_of_tokens(backend, dtype):
    # the reference pass has other micro-batches: a policy equal to it must start at a margin of nothing
    tensors, labels = make((64,), 48, 1009, dtype, backend.device, ignored=0)
    whole = fused(tensors, labels, backend=backend.name)
    for rows in (slice(0, 1), slice(5, 22), slice(31, 64)):
        part = {**tensors, "hidden": tensors["hidden"][rows].requires_grad_()}
        torch.testing.assert_close(
            fused(part, labels[rows], backend=backend.name).detach(), whole[rows], rtol=1e-6, atol=4e-6
        )


@pytest.mark.parametrize("trained", ["hidden", "hidden-weight", "all"])
@dtypes
def test_upstream_gradients(backend, dtype, trained):
    tensors, labels = make((30,), 24, 203, dtype, backend.device, bias=True, rank=2)
    ones = torch.ones(30, device=backend.device)

    def gradients(grad):
        return run(fused, tensors, labels, grad, TRAINED[trained], backend=backend.name)[1]

    unit = gradients(ones)
    for name, gradient in gradients(torch.zeros_like(ones)).items():
        assert (gradient == 0).all(), name
    exponents = (-10, 4) if dtype == torch.float16 else (-30, -10, 10, 30)
    for exponent in exponents:
        factor = 2.0**exponent
        for name, gradient in gradients(ones * factor).items():
            expected = unit[name].double() * factor
            size = expected.abs().max().item()
            torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=2 * loosely(dtype) * size + 1e-7)
    check_grad = torch.randn(30, device=backend.device)
    check_grad[::3] = 0  # tokens that do not count in this loss
    got = run(fused, tensors, labels, check_grad, TRAINED[trained], backend=backend.name)
    if "hidden" in got[1]:
        assert (got[1]["hidden"][::3] == 0).all()
    expected = run(exact, cast(tensors, torch.float64), labels, check_grad, TRAINED[trained])
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]
    close((expected[0], got[1]), expected, atol=bound)
    three = run(fused, tensors, labels, 3.0 * ones, TRAINED[trained], backend=backend.name)[1]
    leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    (3.0 * fused(leaves, labels, backend=backend.name)).sum().backward()
    for name, gradient in three.items():
        torch.testing.assert_close(leaves[name].grad, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("trained", [t for t in TRAINED if t != "score"])
def test_a_second_backward_is_refused(trained):
    tensors, labels = make((7,), bias=True, rank=2)
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    loss = fused(leaves, labels).sum()
    loss.backward(retain_graph=True)
    kept = {name: t.grad.clone() for name, t in leaves.items() if t.grad is not None}
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward(retain_graph=True)
    for name, gradient in kept.items():
        torch.testing.assert_close(leaves[name].grad, gradient, rtol=0, atol=0)
    loss = fused(leaves, labels).sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("trained", [t for t in TRAINED if t != "score"])
def test_double_backward_is_refused(trained):
    tensors, labels = make((7,), bias=True, rank=2)
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    gradients = torch.autograd.grad(fused(leaves, labels).sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        sum(gradient.square().sum() for gradient in gradients).backward()


@dtypes
def test_inputs_are_left_as_they_are(backend, dtype):
    tensors, labels = make((17,), 12, 90, dtype, backend.device, bias=True, rank=2)
    grad = torch.randn(17, device=backend.device)
    inputs = [*tensors.values(), labels, grad]
    before, versions = [t.clone() for t in inputs], [t._version for t in inputs]
    for trained in TRAINED.values():
        leaves = {name: t.requires_grad_(name in trained) for name, t in tensors.items()}
        logps, _ = fused(leaves, labels, stats=STATS, backend=backend.name)
        if trained:
            logps.backward(grad)
        for now, then, version in zip(inputs, before, versions, strict=True):
            assert torch.equal(now, then)
            assert now._version == version


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "A", "B", "labels"])
@pytest.mark.parametrize("trained", ["hidden", "all"])
def test_inputs_changed_before_the_backward_do_not_pass_unseen(name, trained):
    tensors, labels = make((17,), bias=True, rank=2)
    grad = torch.randn(17)
    expected = run(fused, tensors, labels, grad, TRAINED[trained])[1]
    leaves = {key: t.clone().requires_grad_(key in TRAINED[trained]) for key, t in tensors.items()}
    labels = labels.clone()
    logps = fused(leaves, labels)
    with torch.no_grad():
        if name == "labels":
            labels.copy_(labels.flip(0))
        else:
            leaves[name].mul_(2.0)
    wanted = {key: t for key, t in leaves.items() if t.requires_grad}
    try:
        gradients = torch.autograd.grad(logps, list(wanted.values()), grad)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    for key, gradient in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-5)


def test_no_grad_and_inference_mode_keep_nothing():
    tensors, labels = make((7,), bias=True, rank=2)
    expected = fused(tensors, labels)
    for t in tensors.values():
        t.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            logps = fused(tensors, labels)
        assert logps.grad_fn is None
        with torch.inference_mode():
            inferred = fused(tensors, labels)
        assert not saved
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(inferred.clone(), expected, rtol=0, atol=1e-6)
    with torch.inference_mode():
        frozen = {name: t.detach().clone() for name, t in tensors.items()}
    torch.testing.assert_close(fused(frozen, labels), expected, rtol=0, atol=1e-6)


def test_the_same_call_gives_the_same_bits(backend):
    for dtype in DTYPES:
        tensors, labels = make((50,), 40, 1009, dtype, backend.device, bias=True, rank=3)
        grad = torch.randn(50, device=backend.device)
        for trained in ("hidden", "all"):
            first, second = (
                run(fused, tensors, labels, grad, TRAINED[trained], backend=backend.name) for _ in range(2)
            )
            torch.testing.assert_close(first, second, rtol=0, atol=0)


# ---- fixed capacity ----


@dtypes
@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight", "all"])
def test_a_fixed_capacity_changes_nothing(backend, dtype, trained):
    tensors, labels = make((4, 10), 24, 203, dtype, backend.device, bias=True, rank=2, ignored=0.6)
    labels[0, 0] = 3
    grad = torch.randn(4, 10, device=backend.device)
    active = int((labels != -100).sum())
    expected = run(fused, tensors, labels, grad, TRAINED[trained], backend=backend.name)
    for capacity in (active, active + 1, 40, 1000):
        options = {"max_active_tokens": capacity, "backend": backend.name}
        got = run(fused, tensors, labels, grad, TRAINED[trained], **options)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=2e-6)
        close(got, expected, atol=loosely(dtype))
        tiled = run(fused, tensors, labels, grad, TRAINED[trained], max_tile_bytes=3 * 203 * 4, **options)
        close(tiled, expected, atol=loosely(dtype))
        _, values = fused(tensors, labels, stats=STATS, **options)
        _, true_values = fused(tensors, labels, stats=STATS, backend=backend.name)
        torch.testing.assert_close(values, true_values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
def test_more_tokens_than_the_capacity_are_nan(backend, trained):
    tensors, labels = make((4, 10), 24, 203, device=backend.device, bias=True, ignored=0.5)
    labels[0, :2] = 3
    active = int((labels != -100).sum())
    grad = torch.ones(4, 10, device=backend.device)
    for capacity in (1, active - 1):
        logps, gradients = run(
            fused, tensors, labels, grad, TRAINED[trained], max_active_tokens=capacity, backend=backend.name
        )
        assert logps.shape == labels.shape
        assert logps.isnan().all()
        assert all(gradient.shape == tensors[name].shape for name, gradient in gradients.items())
    # shifted, the first column of labels is no target
    labels[:, 1:] = -100
    shifted_out = fused(tensors, labels, shift=True, max_active_tokens=1, backend=backend.name)
    assert (shifted_out == 0).all()


READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "nonzero_static", "unique")


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, func
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight", "all"])
@pytest.mark.parametrize("capacity", [None, 40], ids=["exact", "capacity"])
def test_what_is_read_on_the_host(monkeypatch, trained, capacity):
    tensors, labels = make((4, 10), bias=True, rank=2, ignored=0.5)
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    calls = []
    to_host = fastpref.linear_logps._to_host
    monkeypatch.setattr(fastpref.linear_logps, "_to_host", lambda *args: calls.append(args) or to_host(*args))
    for shift in (False, True):
        calls.clear()
        with _NoHostReads():  # operators of this package are opaque to it; what surrounds them is not
            logps, _ = fused(leaves, labels, shift=shift, stats=STATS, max_active_tokens=capacity)
            if trained != "score":
                logps.sum().backward()
        assert len(calls) <= (1 if capacity is None else 0)
        assert all(tensor.numel() <= 2 for tensor, *_ in calls)


# ---- cost ----


def profiled(f):
    """f's result, the peak and the remainder of what torch's allocator handed out, and the FLOPs of its GEMMs."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, with_flops=True, record_shapes=True
    ) as profile:
        result = f()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    gemms = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
    flops = sum(event.flops for event in profile.key_averages() if event.key in gemms)
    return result, peak, total, flops


def test_the_tracker_sees_what_is_allocated():
    def f():
        logits = torch.ones(100, 50) @ torch.ones(50, 1000)
        return torch.log_softmax(logits, -1).sum()

    _, peak, held, flops = profiled(f)
    assert 0.8e6 <= peak <= 0.9e6
    assert held <= 1000
    assert flops == 2 * 100 * 50 * 1000


COSTS = {"score": (), "unit": ("hidden",), "recompute": ("hidden", "weight")}
PASSES = {"score": 1, "unit": 2, "recompute": 4}


def planned(active, hidden_size, vocab, trained, **options):
    return fastpref.plan(
        active, hidden_size, vocab, hidden_grad="hidden" in trained, weight_grad="weight" in trained,
        bias_grad="bias" in trained, **options,
    )  # fmt: skip


def scratch(rows, weight):
    """What the matrix products of torch take for themselves: oneDNN's packed blocks, of each thread."""
    dz, out = torch.zeros(weight.shape[0], rows, dtype=weight.dtype), weight.new_empty(rows, weight.shape[1])
    return max(
        profiled(lambda: torch.mm(dz.t(), weight, out=out))[1],
        profiled(lambda: torch.mm(dz.t().contiguous(), weight, out=out))[1] - dz.nbytes,
        profiled(lambda: torch.mm(dz, out))[1] - weight.nbytes,
    )


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("budget", [None, 1 << 20], ids=["default", "1-mib"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory_is_what_the_plan_says(dtype, budget, kind):
    tokens, hidden_size, vocab = 512, 128, 8000
    tensors, labels = make((tokens,), hidden_size, vocab, dtype, ignored=0)
    labels[::2] = -100
    active, trained = tokens // 2, COSTS[kind]
    plan = planned(active, hidden_size, vocab, trained, dtype=dtype, total_tokens=tokens, max_tile_bytes=budget)
    assert plan.kind == kind
    assert plan.gemm_passes == PASSES[kind]
    grad = torch.ones(tokens)
    run(fused, tensors, labels, grad, trained, max_tile_bytes=budget)  # what is cached once is not a call's
    _, peak, _, _ = profiled(lambda: run(fused, tensors, labels, grad, trained, max_tile_bytes=budget))
    allowed = 1.1 * plan.predicted_bytes + (64 << 10) + scratch(plan.tile_rows, tensors["weight"])
    assert peak <= allowed, f"{peak:,} bytes, predicted {plan.predicted_bytes:,}"
    if budget is not None:
        outputs = sum(tensors[name].nbytes for name in trained)
        assert peak < active * vocab * 4 + outputs  # not even one tensor of the active tokens' logits


@pytest.mark.parametrize("kind", COSTS)
def test_gemm_passes(kind):
    tokens, hidden_size, vocab = 96, 32, 1009
    tensors, labels = make((tokens,), hidden_size, vocab, ignored=0)
    labels[::3] = -100  # not projected
    grad = torch.randn(tokens)
    for budget in (None, 10 * vocab * 4):
        _, _, _, flops = profiled(lambda b=budget: run(fused, tensors, labels, grad, COSTS[kind], max_tile_bytes=b))
        passes = flops / (2 * (tokens - tokens // 3) * hidden_size * vocab)
        assert passes == pytest.approx(PASSES[kind], rel=0.05)


@pytest.mark.parametrize("trained", ["hidden", "hidden-weight", "all"])
def test_nothing_of_the_logits_size_lives_until_the_backward(trained):
    tensors, labels = make((64,), 16, 8000, bias=True, rank=2)
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    logps, _, held, _ = profiled(lambda: fused(leaves, labels))
    assert held <= 64 * 16 * 4 * 4 + 64 * 64
    del logps


@pytest.mark.slow
def test_beyond_two_billion_logits():
    tokens, vocab = 70_000, 32_003
    assert tokens * vocab > 2**31
    hidden, weight = torch.randn(tokens, 2), torch.randn(vocab, 2)
    labels = torch.randint(0, vocab, (tokens,))
    logps = fastpref.linear_token_logps(hidden, weight, labels)
    for rows in (slice(0, 50), slice(67_100, 67_110), slice(tokens - 50, tokens)):
        truth = token_logps_ref(hidden[rows].double() @ weight.double().t(), labels[rows])
        torch.testing.assert_close(logps[rows].double(), truth, rtol=1e-6, atol=4e-6)
    assert (logps < 0).all()


@pytest.mark.slow
def test_a_weight_beyond_two_billion_elements():
    # offsets of the last rows do not fit 32 bits
    torch.utils.deterministic.fill_uninitialized_memory = False  # gigabytes that nobody looks at
    try:
        base = torch.empty(2**31 + 40, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    weight = base.as_strided((3, 16), (2**30 + 3, 1))
    weight.copy_(torch.randn(3, 16))
    tensors = {"hidden": torch.randn(9, 16).bfloat16(), "weight": weight}
    labels, grad = torch.randint(0, 3, (9,)), torch.randn(9)
    got = run(fused, tensors, labels, grad, ("hidden",))
    expected = run(fused, {**tensors, "weight": weight.contiguous()}, labels, grad, ("hidden",))
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-5)


# ---- bad input ----


def test_errors_say_what_came():
    tensors, labels = make((4, 12), 32, 320, bias=True, rank=3, ignored=0)
    hidden, weight, bias, A, B = tensors.values()

    def message(kind, *parts, hidden=hidden, weight=weight, labels=labels, **options):
        with pytest.raises(kind) as caught:
            fastpref.linear_token_logps(hidden, weight, labels, **options)
        for part in parts:
            assert part in str(caught.value), str(caught.value)

    message(TypeError, "hidden must be a torch.Tensor, got list", hidden=[1.0])
    message(TypeError, "weight must be a torch.Tensor, got list", weight=[1.0])
    message(TypeError, "labels must be a torch.Tensor, got list", labels=[1])
    message(TypeError, "bias must be a torch.Tensor, got list", bias=[1.0])
    message(TypeError, "hidden must be", "torch.int64", hidden=hidden.long())
    message(TypeError, "hidden must be", "torch.complex64", hidden=hidden.to(torch.complex64))
    message(ValueError, "hidden must have shape", "scalar", hidden=torch.tensor(1.0))
    message(ValueError, "weight", "[320]", weight=weight[:, 0])
    message(ValueError, "weight", "[320, 32, 1]", weight=weight[..., None])
    message(ValueError, "weight", "[320, 31]", "32", weight=weight[:, :-1])
    message(ValueError, "weight", "[0, 32]", weight=weight[:0])
    message(ValueError, "labels must have shape [4, 12]", "[4, 11]", labels=labels[:, :-1])
    message(ValueError, "labels must have shape [4, 12]", "[4, 12, 1]", labels=labels[..., None])
    message(TypeError, "labels must be int64 or int32, got torch.float32", labels=labels.float())
    message(ValueError, "labels must be on cpu like hidden, got meta", labels=labels.to("meta"))
    message(ValueError, "weight must be on cpu like hidden, got meta", weight=weight.to("meta"))
    message(ValueError, "bias must be on cpu like", "got meta", bias=bias.to("meta"))
    message(ValueError, "adapter", "meta", adapter=(A.to("meta"), B))
    message(ValueError, "bias", "[320]", "[319]", bias=bias[:-1])
    message(ValueError, "bias", "[320]", "[320, 1]", bias=bias[:, None])
    message(TypeError, "adapter", "Tensor", adapter=A)
    message((TypeError, ValueError), "adapter", adapter=(A,))
    message((TypeError, ValueError), "adapter", adapter=(A, B, B))
    message(TypeError, "adapter", adapter=(A, None))
    message(ValueError, "adapter", "[3, 31]", "32", adapter=(A[:, :-1], B))
    message(ValueError, "adapter", "[319, 3]", "320", adapter=(A, B[:-1]))
    message(ValueError, "adapter", "2", "3", adapter=(A[:2], B))
    message(ValueError, "adapter", adapter=(A.t(), B.t()))
    message(ValueError, "adapter", adapter=(B, A))
    for mixed in ("hidden", "weight", "bias"):
        options = {mixed: tensors[mixed].bfloat16()}
        if mixed != "bias":
            options["bias"] = bias
        message(TypeError, "bfloat16", "float32", **options)
    message(TypeError, "adapter", "float64", "float32", adapter=(A.double(), B))
    message(TypeError, "adapter", "float64", "float32", adapter=(A, B.double()))
    message(TypeError, "weight", "torch.float64", "torch.float32", weight=weight.double())
    message(ValueError, "temperature must be positive and finite, got 0.0", temperature=0.0)
    message(ValueError, "softcap must be positive and finite, got -1", softcap=-1)
    message(TypeError, "scale must be a positive float, got str", scale="1")
    message(TypeError, "ignore_index must be an int, got float", ignore_index=-100.0)
    message(ValueError, "ignore_index must fit 64 bits", ignore_index=2**70)
    for bad in (0, -1):
        message(ValueError, "max_tile_bytes", str(bad), max_tile_bytes=bad)
        message(ValueError, "max_active_tokens", "-1", max_active_tokens=-1)
    for bad in (1.5, "1", True):
        message(TypeError, "max_tile_bytes", type(bad).__name__, max_tile_bytes=bad)
        message(TypeError, "max_active_tokens", type(bad).__name__, max_active_tokens=bad)
    for bad in (torch.bfloat16, torch.float16, torch.float64, torch.int8):
        message(ValueError, "logits_dtype", str(bad), logits_dtype=bad)
    half = {"hidden": hidden.bfloat16(), "weight": weight.bfloat16()}
    for bad in (torch.float16, torch.float64):
        message(ValueError, "logits_dtype", str(bad), logits_dtype=bad, **half)
    message(
        ValueError, "logits_dtype", "bfloat16", logits_dtype=torch.bfloat16, hidden=hidden.half(), weight=weight.half()
    )
    message((TypeError, ValueError), "logits_dtype", logits_dtype="bfloat16", **half)
    message(ValueError, "stats must be a tuple of names", stats="entropy")
    message(ValueError, "got ('entropie',)", stats=("entropie",))
    message(ValueError, "backend must be None or one of", "'cuda'", backend="cuda")
    message((TypeError, ValueError), "group", "str", group="world")
    message(TypeError, "backend='native'", "float64", backend="native", hidden=hidden.double(), weight=weight.double())
    message(ValueError, "shift=True needs labels of shape", shift=True, hidden=hidden[0, 0], labels=labels[0, 0])


def test_nothing_positional_after_the_tensors():
    tensors, labels = make()
    with pytest.raises(TypeError):
        fastpref.linear_token_logps(tensors["hidden"], tensors["weight"], labels, None)


def test_named_backend_that_is_missing_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors, labels = make()
    with pytest.raises(RuntimeError, match=r"backend='triton' of .* cannot serve cpu tensors: Triton has no"):
        fused(tensors, labels, backend="triton")
    monkeypatch.setattr("fastpref._native._core", None)
    with pytest.raises(RuntimeError, match="this installation has no native core"):
        fused(tensors, labels, backend="native")


def test_works_without_the_native_core(monkeypatch):
    tensors, labels = make(bias=True, rank=2)
    grad = torch.randn(labels.shape)
    expected = run(fused, tensors, labels, grad)
    monkeypatch.setattr("fastpref._native._core", None)
    close(run(fused, tensors, labels, grad, backend="reference"), expected, atol=1e-5)
    half = cast(tensors, torch.bfloat16)
    got = run(fused, half, labels, grad, backend="reference")[0]
    torch.testing.assert_close(got.double(), exact(half, labels), rtol=0, atol=2e-2)


def test_a_hidden_size_of_zero_is_the_bias_or_refused():
    bias, labels = torch.randn(20), torch.randint(0, 20, (5,))
    try:
        logps = fastpref.linear_token_logps(torch.empty(5, 0), torch.empty(20, 0), labels, bias=bias)
    except ValueError as error:
        assert "hidden" in str(error)
        return
    torch.testing.assert_close(logps.double(), token_logps_ref(bias.expand(5, -1), labels), rtol=0, atol=1e-6)


# ---- properties ----


@settings(deadline=None, max_examples=50)
@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    hidden_size=st.integers(1, 40),
    vocab=st.integers(1, 200),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    trained=st.sampled_from(sorted(TRAINED)),
    extras=st.sampled_from(sorted(EXTRAS)),
    rows=st.none() | st.integers(1, 9),
    slack=st.none() | st.integers(0, 3),
    shift=st.booleans(),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_shape_mask_and_plan(lead, hidden_size, vocab, dtype, trained, extras, rows, slack, shift, ignored, seed):
    torch.manual_seed(seed)
    tensors, labels = make(tuple(lead), hidden_size, vocab, dtype, ignored=ignored, **EXTRAS[extras])
    shift = shift and bool(lead)
    counted = int(((shifted(labels, -100) if shift else labels) != -100).sum())
    options = {
        "shift": shift,
        "max_tile_bytes": None if rows is None else rows * vocab * 8,
        "max_active_tokens": None if slack is None else max(1, counted + slack),
    }
    grad = torch.randn(lead)
    got = run(fused, tensors, labels, grad, TRAINED[trained], **options)
    expected = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained], shift=shift)
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]
    adapted = dtype in (torch.bfloat16, torch.float16) and "A" in tensors
    torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=bound if adapted else min(bound, 2e-5))
    # sums of 16-bit gradients are off by their largest terms, which cancel
    scale = sum(t.abs().max().item() for t in tensors.values() if t.numel()) * max(1.0, math.sqrt(counted))
    close((expected[0], got[1]), expected, atol=bound * max(scale, 1.0))


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 20), vocab=st.integers(2, 150), seed=st.integers(0, 2**31), frozen=st.booleans())
def test_permutations_and_offsets_change_nothing(rows, vocab, seed, frozen):
    torch.manual_seed(seed)
    tensors, labels = make((rows,), 16, vocab, bias=True)
    grad, trained = torch.randn(rows), TRAINED["hidden"] if frozen else TRAINED["all"]
    logps, gradients = run(fused, tensors, labels, grad, trained)
    # of the tokens
    order = torch.randperm(rows)
    permuted = {**tensors, "hidden": tensors["hidden"][order]}
    got = run(fused, permuted, labels[order], grad[order], trained)
    close(got, (logps[order], {**gradients, "hidden": gradients["hidden"][order]}), atol=1e-5)
    # of the vocabulary
    order = torch.randperm(vocab)
    permuted = {**tensors, "weight": tensors["weight"][order], "bias": tensors["bias"][order]}
    renamed = torch.where(labels == -100, -100, order.argsort()[labels.clamp(min=0)])
    got = run(fused, permuted, renamed, grad, trained)
    moved = {name: gradients[name] if name == "hidden" else gradients[name][order] for name in gradients}
    close(got, (logps, moved), atol=1e-5)
    # a constant added to every logit
    close(run(fused, {**tensors, "bias": tensors["bias"] + 8.0}, labels, grad, trained), (logps, gradients), atol=2e-5)
    # the gradient of the bias sums to zero over the vocabulary
    if not frozen:
        assert gradients["bias"].double().sum().abs() <= 1e-4


# ---- torch citizenship ----


@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight", "all"])
@pytest.mark.parametrize("capacity", [None, 30], ids=["exact", "capacity"])
def test_compiles_without_graph_breaks(trained, capacity):
    torch._dynamo.reset()
    tensors, labels = make((3, 10), bias=True, rank=2, ignored=0.4)
    options = {"shift": True, "softcap": 20.0, "stats": ("entropy",), "max_active_tokens": capacity}

    def step(leaves):
        logps, values = fused(leaves, labels, **options)
        return (logps * 2.0).sum(), values.entropy

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
        loss, entropy = f(leaves)
        if trained != "score":
            loss.backward()
        results.append((loss.detach(), entropy, [leaf.grad for leaf in leaves.values() if leaf.grad is not None]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_compiles_in_bf16_with_dynamic_shapes():
    torch._dynamo.reset()
    step = torch.compile(lambda t, y: fused(t, y, stats=("top1",)), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 8):
        tensors, labels = make((2, tokens), dtype=torch.bfloat16, bias=True, rank=2)
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        logps, _ = step(leaves, labels)
        logps.sum().backward()
        got = (logps.detach(), {name: t.grad for name, t in leaves.items()})
        close(got, run(fused, tensors, labels, torch.ones(2, tokens)), atol=2**-6)


@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
def test_new_lengths_do_not_recompile(trained):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda t, y: fused(t, y, shift=True).sum(), fullgraph=True, backend=counter)
    for length in (5, 6, 7, 11, 30):
        tensors, labels = make((2, length), bias=True)
        loss = step({name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}, labels)
        if trained != "score":
            loss.backward()
    assert counter.frame_count <= 2  # the first length, then any


class _Recorder(TorchDispatchMode):
    """Calls of this package's linear operators, their arguments copied as they came."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpref" and func.overloadpacket.__name__.startswith("linear"):
            copied = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs or {}))
            self.calls.append((func, *copied))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(backend, dtype):
    tensors, labels = make((3, 7), 12, 50, dtype, backend.device, bias=True, rank=2)
    with _Recorder() as recorder:
        for trained, capacity in (("score", None), ("hidden", 30), ("all", None), ("all", 30)):
            leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
            logps, _ = fused(leaves, labels, stats=STATS, max_active_tokens=capacity, backend=backend.name)
            if trained != "score":
                logps.sum().backward()
    assert recorder.calls
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trained", ["hidden", "all"])
def test_activation_checkpointing(reentrant, trained):
    from torch.utils.checkpoint import checkpoint

    tensors, labels = make(bias=True, rank=2)
    results = []
    for wrapped in (False, True):
        leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}

        def f(*values):
            return fused(dict(zip(tensors, values, strict=True)), labels)

        values = leaves.values()
        logps = checkpoint(f, *values, use_reentrant=reentrant) if wrapped else f(*values)
        logps.sum().backward()
        results.append((logps.detach(), [leaf.grad for leaf in values if leaf.requires_grad]))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("low", [("hidden",), ("weight",), ("hidden", "weight"), ("bias", "A"), ()], ids=repr)
@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
def test_autocast(low, trained):
    tensors, labels = make((13,), bias=True, rank=2)
    mixed = {name: t.bfloat16() if name in low else t for name, t in tensors.items()}
    leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in mixed.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, values = fused(leaves, labels, stats=("entropy",))
    assert logps.dtype == torch.float32
    assert values.entropy.dtype == torch.float32
    grad = torch.randn(13)
    if trained != "score":
        logps.backward(grad)
    expected, gradients = run(fused, cast(tensors, torch.bfloat16), labels, grad, TRAINED[trained])
    torch.testing.assert_close(logps.detach(), expected, rtol=1e-6, atol=2e-6)
    for name in TRAINED[trained]:
        assert leaves[name].grad.dtype == mixed[name].dtype
        torch.testing.assert_close(leaves[name].grad.bfloat16(), gradients[name], rtol=2**-6, atol=2**-6)


def test_autocast_leaves_float64_alone():
    tensors, labels = make(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = fused(tensors, labels)
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, exact(tensors, labels), rtol=0, atol=1e-10)


def test_autocast_off_refuses_mixed_dtypes():
    tensors, labels = make()
    with torch.autocast("cpu", enabled=False), pytest.raises(TypeError, match="weight"):
        fused({**tensors, "weight": tensors["weight"].bfloat16()}, labels)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_forward_mode_is_refused(name):
    tensors, labels = make(bias=True)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(
            lambda x: fused({**tensors, name: x}, labels).sum(), (tensors[name],), (torch.ones_like(tensors[name]),)
        )


def test_hooks_and_accumulation():
    tensors, labels = make((10,), bias=True)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    seen = []
    leaves["weight"].register_hook(lambda g: seen.append(g.shape))
    fused({**leaves, "hidden": leaves["hidden"][:4]}, labels[:4]).sum().backward()
    fused({**leaves, "hidden": leaves["hidden"][4:]}, labels[4:]).sum().backward()
    assert seen == [leaves["weight"].shape] * 2
    _, gradients = run(fused, tensors, labels, torch.ones(10))
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, gradients[name], rtol=1e-5, atol=1e-5)


def test_only_some_tokens_are_differentiated():
    tensors, labels = make((3, 8), bias=True, ignored=0)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    logps = fused(leaves, labels)
    logps[1, 2:5].sum().backward()
    grad = torch.zeros(3, 8)
    grad[1, 2:5] = 1
    expected = run(exact, cast(tensors, torch.float64), labels, grad)[1]
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_an_output_nobody_uses_costs_no_gradient():
    tensors, labels = make()
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    logps, values = fused(leaves, labels, stats=("entropy",))
    with pytest.raises(RuntimeError, match="does not require grad"):
        values.entropy.sum().backward()
    del logps


# ---- several ranks ----

VOCAB_SHARDS = """
    result = []
    for case in torch.load(f"{folder}/cases.pt"):
        bounds = [0, case["split"], case["tensors"]["weight"].shape[0]]
        mine = slice(*bounds[rank : rank + 2])
        leaves = {
            name: (t[mine] if name in ("weight", "bias", "B") else t).clone().requires_grad_(name in case["trained"])
            for name, t in case["tensors"].items()
        }
        adapter = (leaves["A"], leaves["B"]) if "A" in leaves else None
        try:
            out = fastpref.linear_token_logps(
                leaves["hidden"], leaves["weight"], case["labels"], bias=leaves.get("bias"), adapter=adapter,
                group=dist.group.WORLD, **case["options"],
            )
        except (ValueError, TypeError) as error:
            result.append(f"{type(error).__name__}: {error}")
            continue
        logps, values = out if case["options"].get("stats") else (out, None)
        if case["trained"]:
            logps.backward(case["grad"].to(logps.dtype))
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
        result.append((logps.detach(), None if values is None else tuple(values), gradients))
"""


CASE = ("tensors", "labels", "grad", "split", "trained", "transform", "options")


def _join(parts, name):
    gradients = [part[2][name] for part in parts]
    if name in ("weight", "bias", "B"):
        return torch.cat(gradients)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0, msg=f"{name} differs between ranks")
    return gradients[0]


def test_vocabulary_shards_equal_one_process(two_ranks, tmp_path):
    cases = []

    def case(split, trained=TRAINED["all"], dtype=torch.float64, transform=None, labels=None, **options):
        tensors, made = make((3, 7), 12, 101, dtype, bias=True, rank=2)
        made[0, 0], made[0, 1] = 100, 0  # the first and the last column
        if labels is not None:
            made = labels
        transform = transform or {}
        options = {**transform, **options}
        cases.append(
            dict(zip(CASE, (tensors, made, torch.randn(3, 7), split, trained, transform, options), strict=True))
        )

    for split in (50, 70, 1, 101, 0):
        for trained in ("score", "hidden", "hidden-weight", "hidden-bias", "adapter", "all"):
            case(split, TRAINED[trained], stats=STATS)
    for transform in TRANSFORMS.values():
        case(33, transform=transform)
    for split in (70, 101):
        for trained in ("score", "hidden", "all"):
            # by bytes the ranks would cut the tokens into different tiles
            case(split, TRAINED[trained], max_tile_bytes=101 * 8 * 2)
            case(split, TRAINED[trained], dtype=torch.float32, max_tile_bytes=31 * 4 * 3, shift=True)
            case(split, TRAINED[trained], dtype=torch.bfloat16)
            case(split, TRAINED[trained], max_active_tokens=21)
            case(split, TRAINED[trained], labels=torch.full((3, 7), -100), stats=STATS)
    too_few = len(cases)
    case(70, labels=torch.zeros(3, 7, dtype=torch.long), max_active_tokens=3)
    out_of_range = len(cases)
    case(70, labels=torch.full((3, 7), 101))
    case(101, TRAINED["hidden"], labels=torch.full((3, 7), -1))

    torch.save(cases, tmp_path / "cases.pt")
    both = two_ranks(VOCAB_SHARDS)
    for number, (c, *parts) in enumerate(zip(cases, *both, strict=True)):
        where = f"case {number}: split {c['split']}, {c['trained']}, {c['options']}"
        if number >= out_of_range:
            for part in parts:
                assert isinstance(part, str), where
                assert part.startswith("ValueError: labels must lie in [0, 101)"), part
            continue
        assert not any(isinstance(part, str) for part in parts), f"{where}: {parts}"
        assert torch.equal(parts[0][0].nan_to_num(7.0), parts[1][0].nan_to_num(7.0)), where
        if number == too_few:
            assert parts[0][0].isnan().all(), where
            continue
        dtype = c["tensors"]["hidden"].dtype
        options = {**c["transform"], "shift": c["options"].get("shift", False)}
        expected = run(exact, cast(c["tensors"], torch.float64), c["labels"], c["grad"], c["trained"], **options)
        got = (parts[0][0], {name: _join(parts, name) for name in c["trained"]})
        bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-5}[dtype]
        for name, gradient in got[1].items():
            assert gradient.dtype == dtype, f"{where}: {name}"
        try:
            close(got, expected, atol=bound)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from None
        if c["options"].get("stats"):
            logits = project(cast(c["tensors"], torch.float64))
            _, true_values = fastpref.token_logps(logits, c["labels"], stats=STATS, **c["transform"])
            for part in parts:
                for value, true_value in zip(part[1], true_values, strict=True):
                    torch.testing.assert_close(value, true_value, rtol=1e-5, atol=1e-5, msg=where)


def test_ddp_and_dtensor_weights(two_ranks, tmp_path):
    tensors, labels = make((2, 9), 12, 101, torch.float64, bias=True)
    grad = torch.randn(2, 9, dtype=torch.float64)
    torch.save((tensors, labels, grad), tmp_path / "inputs.pt")
    both = two_ranks("""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight, self.bias = (torch.nn.Parameter(tensors[name]) for name in ("weight", "bias"))

            def forward(self, hidden, labels):
                return fastpref.linear_token_logps(hidden, self.weight, labels, bias=self.bias)

        mesh = init_device_mesh("cpu", (2,))
        tensors, labels, grad = torch.load(f"{folder}/inputs.pt")
        result = []
        for placement in (Shard(0), Shard(1), Replicate()):
            for frozen in (False, True):
                hidden = tensors["hidden"][rank].clone().requires_grad_()
                weight = distribute_tensor(tensors["weight"], mesh, [placement])
                weight = weight.detach().requires_grad_(not frozen)
                logps = fastpref.linear_token_logps(hidden, weight, labels[rank], bias=tensors["bias"])
                logps.backward(grad[rank])
                result.append((logps.detach(), hidden.grad, None if frozen else weight.grad.full_tensor()))
        weight = distribute_tensor(tensors["weight"], mesh, [Shard(0)])
        with torch.no_grad():
            result.append(fastpref.linear_token_logps(tensors["hidden"][rank], weight, labels[rank]))
        model = torch.nn.parallel.DistributedDataParallel(Model())
        model(tensors["hidden"][rank], labels[rank]).backward(grad[rank])
        result.append([p.grad for p in model.parameters()])
    """)
    logps, gradients = run(exact, tensors, labels, grad)
    for rank, (*gathered, scored, by_ddp) in enumerate(both):
        for got, hidden_gradient, weight_gradient in gathered:
            torch.testing.assert_close(got, logps[rank], rtol=0, atol=1e-10)
            torch.testing.assert_close(hidden_gradient, gradients["hidden"][rank], rtol=0, atol=1e-10)
            if weight_gradient is not None:  # averaged, as FSDP does
                torch.testing.assert_close(weight_gradient, gradients["weight"] / 2, rtol=0, atol=1e-10)
        without_bias = {name: tensors[name] for name in ("hidden", "weight")}
        torch.testing.assert_close(scored, exact(without_bias, labels)[rank], rtol=0, atol=1e-10)
        for name, gradient in zip(("weight", "bias"), by_ddp, strict=True):
            torch.testing.assert_close(gradient, gradients[name] / 2, rtol=0, atol=1e-10)


# ---- on a GPU ----


@pytest.mark.cuda
@dtypes
@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
def test_cuda_is_cpu(dtype, trained):
    tensors, labels = make((40,), 64, 1009, dtype, bias=True, rank=4)
    grad = torch.randn(40)
    expected = run(fused, tensors, labels, grad, TRAINED[trained])
    on_gpu = {name: t.cuda() for name, t in tensors.items()}
    logps, gradients = run(fused, on_gpu, labels.cuda(), grad.cuda(), TRAINED[trained])
    close((logps.cpu(), {name: g.cpu() for name, g in gradients.items()}), expected, atol=loosely(dtype))
    check(on_gpu, labels.cuda(), TRAINED[trained])


@pytest.mark.cuda
@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight"])
def test_no_host_sync_with_a_capacity(backend, trained):
    if backend.device.type != "cuda" or backend.name == "reference":
        pytest.skip("only GPU kernels can avoid one")
    tensors, labels = make((64,), 64, 5003, torch.bfloat16, "cuda")
    grad = torch.randn(64, device="cuda")
    options = {"max_active_tokens": 64, "backend": backend.name}
    run(fused, tensors, labels, grad, TRAINED[trained], **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(fused, tensors, labels, grad, TRAINED[trained], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight"])
def test_a_step_is_captured_in_a_cuda_graph(backend, trained):
    if backend.device.type != "cuda" or backend.name == "reference":
        pytest.skip("graphs are CUDA's")
    tensors, labels = make((64,), 64, 5003, torch.bfloat16, "cuda")
    grad = torch.randn(64, device="cuda")
    options = {"max_active_tokens": 64, "backend": backend.name}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(fused, tensors, labels, grad, TRAINED[trained], **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(fused, tensors, labels, grad, TRAINED[trained], **options)
    tensors["hidden"].copy_(tensors["hidden"].flip(0))
    labels.copy_(labels.roll(5))  # other tokens are ignored now
    graph.replay()
    torch.cuda.synchronize()
    close(out, run(fused, tensors, labels, grad, TRAINED[trained], **options), atol=2**-6)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", COSTS)
def test_memory_on_a_gpu_is_what_the_plan_says(kind):
    tokens, hidden_size, vocab = 4096, 512, 32000
    tensors, labels = make((tokens,), hidden_size, vocab, torch.bfloat16, "cuda", ignored=0)
    labels[::2] = -100
    trained, grad, budget = COSTS[kind], torch.ones(tokens, device="cuda"), 64 << 20
    run(fused, tensors, labels, grad, trained, max_tile_bytes=budget)
    plan = planned(
        tokens // 2, hidden_size, vocab, trained, dtype=torch.bfloat16, device="cuda", total_tokens=tokens,
        max_tile_bytes=budget,
    )  # fmt: skip
    assert plan.kind == kind
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(fused, tensors, labels, grad, trained, max_tile_bytes=budget)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.1 * plan.predicted_bytes + (1 << 20), f"{peak:,} bytes, predicted {plan.predicted_bytes:,}"


def test_the_docstring_names_every_argument():
    text = fastpref.linear_token_logps.__doc__
    for name in inspect.signature(fastpref.linear_token_logps).parameters:
        assert re.search(rf"\b{name}\b", text), name
