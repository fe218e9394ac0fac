"""token_logps against float64, on every backend; then what it promises as a citizen of torch."""

import math
import os
import signal
import time

import pytest
import torch
from cases import BIG_SHAPES, SHAPES, TRANSFORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_no_worse

import fastpref
from fastpref._logps.token_logps import (
    ALL_STATS,
    as_rows,
    token_logps_bwd,
    token_logps_bwd_,
    token_logps_fwd,
    token_logps_ref,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def make(shape, dtype=torch.float32, device="cpu", spread=3.0, ignored=0.2):
    logits = (torch.randn(shape, device=device) * spread).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], device=device)
    labels[torch.rand(shape[:-1], device=device) < ignored] = -100
    return logits, labels


def plain(logits, labels, temperature=1.0, softcap=None, scale=1.0):
    """What a user writes, in the dtype of the logits."""
    z = logits * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    ignored = labels == -100
    logps = torch.log_softmax(z / temperature, -1).gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(ignored, 0.0, logps)


def forward_backward(f, logits, labels, grad, **options):
    logits = logits.detach().clone().requires_grad_()
    logps = f(logits, labels, **options)
    logps.backward(grad.to(logps.dtype))
    return logps.detach(), logits.grad


def check(backend, shape, dtype, transform, spread=3.0):
    logits, labels = make(shape, dtype, backend.device, spread)
    grad = torch.randn(labels.shape, device=backend.device)
    logps, gradient = forward_backward(fastpref.token_logps, logits, labels, grad, backend=backend.name, **transform)
    assert logps.dtype == torch.float32
    assert gradient.dtype == dtype
    truth, true_gradient = forward_backward(token_logps_ref, logits.double(), labels, grad.double(), **transform)
    # log-probs are judged as fp32 whatever the input
    same, _ = forward_backward(plain, logits.float(), labels, grad, **transform)
    _, same_gradient = forward_backward(plain, logits, labels, grad, **transform)
    assert (logps <= 0).all()
    assert_no_worse(logps.reshape(1, -1), same.reshape(1, -1), truth.reshape(1, -1), torch.float32, "logps")
    vocab = shape[-1]
    target = torch.zeros(logits.shape, dtype=torch.bool, device=backend.device)
    target.scatter_(-1, labels.clamp(min=0).unsqueeze(-1), True)
    target = target.reshape(-1, vocab)
    gradients = [g.reshape(-1, vocab) for g in (gradient, same_gradient, true_gradient)]
    assert_no_worse(*(g[target].unsqueeze(-1) for g in gradients), dtype, "target gradient")
    assert_no_worse(*(torch.where(target, 0.0, g) for g in gradients), dtype, "other gradients")


@pytest.mark.sanitize
@pytest.mark.numerics
@dtypes
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(backend, shape, dtype, transform, thin):
    few = {torch.float32: TRANSFORMS["plain"], torch.bfloat16: TRANSFORMS["softcap"], torch.float16: None}
    thin(unless=not backend.interpreted or transform == few[dtype])
    check(backend, shape, dtype, transform)


@pytest.mark.sanitize
@pytest.mark.numerics
@dtypes
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, id=name, marks=[pytest.mark.slow] * (name != "llama-3"))
        for name, shape in BIG_SHAPES.items()
    ],
)
def test_matches_float64_at_scale(backend, shape, dtype, thin):
    thin(unless=not backend.interpreted or dtype == torch.float32)
    if backend.name == "triton" and backend.device.type == "cpu" and shape[0] > 65535:
        pytest.skip("70,001 programs take minutes under the interpreter; the grid is one-dimensional by construction")
    check(backend, shape, dtype, {})


@pytest.mark.sanitize
@pytest.mark.numerics
@dtypes
def test_bf16_accuracy_goal(backend, dtype):
    logits, labels = make((4, 128256), dtype, backend.device)
    logps = fastpref.token_logps(logits, labels, backend=backend.name)
    assert (logps.double() - token_logps_ref(logits, labels)).abs().max() <= 1e-5


@pytest.mark.sanitize
@pytest.mark.numerics
@pytest.mark.parametrize("probability", [0.95, 0.9999, 1 - 1e-7])
def test_confident_tokens_keep_their_gradient(backend, probability):
    # two columns and a tail of 1000: the rest of the mass is spread, the target has `probability`
    others = torch.randn(5, 1001, dtype=torch.float64)
    target = others.logsumexp(-1) + math.log(probability) - math.log1p(-probability)
    labels = torch.tensor([0, 1, 500, 999, 1001])
    logits = torch.empty(5, 1002, dtype=torch.float64)
    for row, label in enumerate(labels):
        logits[row] = torch.cat([others[row, :label], target[row, None], others[row, label:]])
    logits = logits.float().to(backend.device)
    labels = labels.to(backend.device)
    grad = torch.ones(5, device=backend.device)
    logps, gradient = forward_backward(fastpref.token_logps, logits, labels, grad, backend=backend.name)
    truth, true_gradient = forward_backward(token_logps_ref, logits.double(), labels, grad.double())
    assert (logps <= 0).all()
    torch.testing.assert_close(logps.double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=0)


@pytest.mark.parametrize("vocab", [1000, 1003])
@dtypes
def test_a_row_has_the_same_bits_in_any_batch(backend, dtype, vocab):
    """Where the row stride is a multiple of 16 bytes."""
    if backend.name == "reference":
        pytest.skip("torch chooses its own order of addition by the shape")
    stride = vocab + -vocab % 8
    store, labels = make((17, stride), dtype, backend.device, ignored=0)
    logits, labels = store[:, :vocab], labels.clamp(max=vocab - 1)
    grad = torch.randn(17, device=backend.device)
    options = {"temperature": 0.7, "stats": ALL_STATS, "backend": backend.name}
    whole = logits.detach().requires_grad_()
    logps, stats = fastpref.token_logps(whole, labels, **options)
    (gradient,) = torch.autograd.grad(logps, whole, grad)
    for rows in (slice(5, 6), slice(3, 16)):
        part = logits[rows].detach().requires_grad_()
        own, own_stats = fastpref.token_logps(part, labels[rows], **options)
        (own_gradient,) = torch.autograd.grad(own, part, grad[rows])
        assert torch.equal(own, logps[rows]) and torch.equal(own_gradient, gradient[rows])
        for name, value in own_stats._asdict().items():
            assert torch.equal(value, getattr(stats, name)[rows]), name


@pytest.mark.sanitize
def test_a_large_common_offset_cancels(backend):
    logits, labels = make((4, 1000), device=backend.device, ignored=0)
    logits = logits + 2.0**14  # exact sums: the fp32 grid there is 2^-9
    logps, gradient = forward_backward(
        fastpref.token_logps, logits, labels, torch.ones(4, device=backend.device), backend=backend.name
    )
    truth, true_gradient = forward_backward(token_logps_ref, logits.double(), labels, torch.ones(4).to(logits.device))
    torch.testing.assert_close(logps.double(), truth, rtol=0, atol=2e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=0, atol=1e-6)


@pytest.mark.sanitize
@pytest.mark.parametrize("spread", [1e4, 1e30], ids=["1e4", "1e30"])
def test_extreme_logits(backend, spread):
    if spread == 1e30 and backend.name == "reference":
        pytest.skip("the reference is the truth here")
    check(backend, (40, 777), torch.float32, {}, spread)


@pytest.mark.sanitize
def test_rising_rows_are_read_again(backend):
    # every block towers 1000 nats above the one before: the running reference must move each time
    logits = torch.linspace(-4000, 4000, 9000, device=backend.device).repeat(3, 1)
    labels = torch.tensor([0, 4500, 8999], device=backend.device)
    logps, values = fastpref.token_logps(logits, labels, stats=ALL_STATS, backend=backend.name)
    truth, true_values = fastpref.token_logps(logits.double(), labels, stats=ALL_STATS)
    torch.testing.assert_close(logps.double(), truth, rtol=1e-6, atol=1e-6)
    for value, true_value in zip(values, true_values, strict=True):
        torch.testing.assert_close(value, true_value, rtol=1e-5, atol=2e-4)


@pytest.mark.sanitize
@dtypes
def test_masked_columns_have_no_probability_and_no_gradient(backend, dtype):
    logits, labels = make((4, 3000), dtype, backend.device, ignored=0)
    logits[:, :2100] = -torch.inf  # whole blocks, before and after what is left
    logits[:, 2900:] = -torch.inf
    labels = labels % 800 + 2100
    grad = torch.randn(4, device=backend.device)
    stats = ("entropy", "log_sum_p2", "top1")
    logps, gradient = forward_backward(fastpref.token_logps, logits, labels, grad, backend=backend.name)
    kept, kept_gradient = forward_backward(
        fastpref.token_logps, logits[:, 2100:2900].contiguous(), labels - 2100, grad, backend=backend.name
    )
    torch.testing.assert_close(logps, kept, rtol=0, atol=2e-6)
    assert (gradient[:, :2100] == 0).all()
    assert (gradient[:, 2900:] == 0).all()
    torch.testing.assert_close(gradient[:, 2100:2900], kept_gradient)
    _, values = fastpref.token_logps(logits, labels, stats=stats, backend=backend.name)
    _, kept_values = fastpref.token_logps(logits[:, 2100:2900], labels - 2100, stats=stats, backend=backend.name)
    for name in stats:
        torch.testing.assert_close(getattr(values, name), getattr(kept_values, name), rtol=0, atol=1e-5)


@pytest.mark.sanitize
def test_rows_without_a_probability(backend):
    inf, nan = torch.inf, torch.nan
    logits = torch.randn(9, 300)
    logits[0] = -inf  # nothing to normalise
    logits[1, 7] = inf
    logits[2, 9] = nan
    logits[3] = -inf
    logits[3, 5] = 1.5  # one column left, the label's: certain
    logits[4, 5] = -inf  # the label has no probability
    logits[5, 5] = inf  # the label has all of it, and no softmax
    logits[6] = -inf
    logits[6, 5] = -1000.0  # certain, however low
    logits[7, :200] = torch.finfo(torch.float32).min
    labels = torch.full((9,), 5)
    expected = torch.tensor([nan, nan, nan, 0.0, -inf, nan, 0.0])
    logits, labels = logits.to(backend.device), labels.to(backend.device)
    logps, gradient = forward_backward(
        fastpref.token_logps, logits, labels, torch.ones(9, device=backend.device), backend=backend.name
    )
    same = torch.log_softmax(logits, -1)[:, 5].cpu()
    torch.testing.assert_close(logps.cpu()[:7], expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(logps.cpu(), same, rtol=1e-6, atol=1e-6, equal_nan=True)
    impossible = logps.isnan()
    assert gradient[impossible].isnan().all()
    assert gradient[~impossible].isfinite().all()
    certain = torch.tensor([3, 6])
    assert (gradient[certain] == 0).all()
    _, values = fastpref.token_logps(logits[certain], labels[certain], stats=ALL_STATS, backend=backend.name)
    for value, expected in ((values.entropy, 0.0), (values.log_sum_p2, 0.0), (values.top1, 1.0)):
        assert (value == expected).all()


@pytest.mark.sanitize
@pytest.mark.numerics
def test_ignored_rows_are_not_read(backend):
    logits, labels = make((4, 5, 90), device=backend.device, ignored=0.5)
    labels[0, 0], labels[1, 1] = -100, 3
    logits[labels == -100] = torch.nan
    logps, gradient = forward_backward(
        fastpref.token_logps, logits, labels, torch.ones(4, 5, device=backend.device), backend=backend.name
    )
    assert (logps[labels == -100] == 0).all()
    assert (gradient[labels == -100] == 0).all()
    assert logps.isfinite().all()
    assert gradient.isfinite().all()
    _, values = fastpref.token_logps(logits, labels, stats=ALL_STATS, backend=backend.name)
    for value in values:
        assert (value[labels == -100] == 0).all()
        assert value.isfinite().all()


@pytest.mark.sanitize
def test_all_ignored_is_a_differentiable_zero(backend):
    logits = torch.full((2, 3, 40), torch.nan, device=backend.device, requires_grad=True)
    logps = fastpref.token_logps(logits, torch.full((2, 3), 7).to(backend.device), ignore_index=7, backend=backend.name)
    logps.sum().backward()
    assert (logps == 0).all()
    assert (logits.grad == 0).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 5), (3, 0, 5)], ids=str)
def test_empty_batch(backend, shape):
    logits = torch.empty(shape, device=backend.device, requires_grad=True)
    labels = torch.empty(shape[:-1], dtype=torch.long, device=backend.device)
    logps, values = fastpref.token_logps(logits, labels, stats=ALL_STATS, backend=backend.name)
    logps.sum().backward()
    assert logps.shape == labels.shape
    assert values.entropy.shape == labels.shape
    assert logits.grad.shape == shape


@pytest.mark.sanitize
def test_one_row(backend):
    logits, label = torch.randn(50, device=backend.device), torch.tensor(4, device=backend.device)
    logps = fastpref.token_logps(logits, label, backend=backend.name)
    assert logps.shape == ()
    torch.testing.assert_close(logps.double(), token_logps_ref(logits, label), rtol=0, atol=1e-6)


@pytest.mark.sanitize
@dtypes
@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0])
def test_a_softcapped_tie_is_a_hit(backend, dtype, cap, thin):
    thin(unless=not backend.interpreted or cap == 5.0)
    logits, _ = make((40, 60), dtype, backend.device)
    labels = logits.float().argmax(-1)
    logits[:, 7] = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    _, values = fastpref.token_logps(logits, labels, softcap=cap, stats=("top1",), backend=backend.name)
    assert (values.top1 == 1).all()


@pytest.mark.sanitize
@dtypes
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_stats(backend, dtype, transform, thin):
    thin(unless=not backend.interpreted or dtype == torch.bfloat16)
    logits, labels = make((3, 7, 1234), dtype, backend.device)
    labels[0, 0] = logits[0, 0].argmax()
    plain_logps = fastpref.token_logps(logits, labels, backend=backend.name, **transform)
    logps, values = fastpref.token_logps(logits, labels, stats=ALL_STATS, backend=backend.name, **transform)
    torch.testing.assert_close(logps, plain_logps, rtol=0, atol=1e-6)
    z = logits.double() * transform.get("scale", 1.0)
    if cap := transform.get("softcap"):
        z = cap * torch.tanh(z / cap)
    log_p = torch.log_softmax(z / transform.get("temperature", 1.0), -1)
    kept = labels != -100
    expected = {
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_p2": (2 * log_p).logsumexp(-1),
        "mean_logit": z.mean(-1) / transform.get("temperature", 1.0),
        "top1": (z.argmax(-1) == labels).double(),
        "lse": (z / transform.get("temperature", 1.0)).logsumexp(-1),
    }
    assert expected.keys() == set(ALL_STATS)
    assert values.top1[0, 0] == 1
    for name, value in expected.items():
        if name == "top1" and dtype != torch.float32:  # a tie counts as a hit, argmax takes the first
            at_label = z.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            value = (at_label >= z.amax(-1)).double()
        got = getattr(values, name).double()
        torch.testing.assert_close(got, torch.where(kept, value, 0.0), rtol=0, atol=1e-5, msg=name)
    _, only = fastpref.token_logps(logits, labels, stats=("top1",), backend=backend.name, **transform)
    assert only.entropy is None
    torch.testing.assert_close(only.top1, values.top1)
    _, only = fastpref.token_logps(logits, labels, stats=("lse",), backend=backend.name, **transform)
    assert only._replace(lse=None) == (None,) * len(ALL_STATS)
    torch.testing.assert_close(only.lse, values.lse)


# ---- layouts ----

LAYOUTS = {
    "sliced-tokens": lambda x: x[:, :-1],
    "every-other-row": lambda x: x[::2, 1::2],
    "transposed-leading": lambda x: x.transpose(0, 1),
    "sliced-columns": lambda x: x[..., 3:-5],
    "transposed-columns": lambda x: x[..., :9].transpose(1, 2),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "four-dimensions": lambda x: x.unflatten(0, (2, 2)).transpose(0, 2),
}


@pytest.mark.sanitize
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(backend, layout, dtype, thin):
    thin(unless=not backend.interpreted or dtype == torch.float32)
    logits = layout(torch.randn(4, 6, 81, device=backend.device).to(dtype))
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1], device=backend.device)
    grad = torch.randn(labels.shape, device=backend.device)

    def run(x):
        x = x.detach().requires_grad_()
        logps = fastpref.token_logps(x, labels, backend=backend.name)
        return logps.detach(), torch.autograd.grad(logps, x, grad)[0]

    logps, gradient = run(logits)
    expected, expected_gradient = run(logits.contiguous())
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("layout", ["sliced-tokens", "every-other-row", "transposed-leading", "sliced-columns"])
def test_strided_rows_are_not_copied(layout):
    logits = LAYOUTS[layout](torch.randn(4, 6, 81))
    assert as_rows(logits).data_ptr() == logits.data_ptr()


@pytest.fixture
def untouched_memory():
    """torch.empty without the poison, which would fill gigabytes that a test never looks at."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_rows_beyond_two_billion_columns(backend, untouched_memory):
    memory = torch.empty(2**31 + 4000, dtype=torch.bfloat16, device=backend.device)
    far = memory.as_strided((3, 1000), (2**30 + 7, 1))
    logits, labels = make((3, 1000), torch.bfloat16, backend.device, ignored=0)
    far.copy_(logits)
    grad = torch.randn(3, device=backend.device)
    results = []
    for x in (far, logits):
        x = x.detach().requires_grad_()
        logps = fastpref.token_logps(x, labels, backend=backend.name)
        results.append((logps.detach(), *torch.autograd.grad(logps, x, grad)))
    # where a row begins decides how it is cut into vectors, and so the order of the sum
    torch.testing.assert_close(*results, rtol=1e-2, atol=2e-6)
    logps, lse, _ = token_logps_fwd(far, labels, 1.0, None, 1.0, -100, False, backend.name)
    token_logps_bwd_(grad, far, labels, logps, lse, 1.0, None, 1.0, -100, backend.name)
    torch.testing.assert_close(far, results[0][1], rtol=0, atol=0)


@pytest.mark.slow
def test_a_gradient_beyond_two_billion_columns(untouched_memory):
    row = torch.randn(1, 32768, dtype=torch.bfloat16)
    logits = row.expand(66000, -1).requires_grad_()
    labels = torch.full((66000,), -100)
    labels[-1] = 5
    logps = fastpref.token_logps(logits, labels)
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    assert gradient.numel() > 2**31
    _, expected = forward_backward(fastpref.token_logps, row, labels[-1:], torch.ones(1))
    torch.testing.assert_close(gradient[-1:], expected, rtol=0, atol=0)
    assert not gradient[::997][:-1].any()


def test_forward_allocates_nothing_of_the_logits_size(monkeypatch):
    logits, labels = make((8, 16, 4096))
    allocated = []
    empty = torch.empty

    def recording(*args, **kwargs):
        out = empty(*args, **kwargs)
        allocated.append(out.nbytes)
        return out

    monkeypatch.setattr(torch, "empty", recording)
    fastpref.token_logps(logits[:, :-1], labels[:, :-1], stats=ALL_STATS, backend="native")
    assert sum(allocated) == 8 * 15 * 4 * (1 + 2 + 4)
    allocated.clear()
    logits.requires_grad_()
    logps = fastpref.token_logps(logits, labels, backend="native").sum()
    assert sum(allocated) == 8 * 16 * 4 * (1 + 2)
    allocated.clear()
    logps.backward()
    assert sum(allocated) == logits.nbytes


def test_shift_is_hugging_faces_convention():
    # a model that is sure of the token after the one it sees: right under the shift, wrong without it
    tokens = torch.randint(0, 50, (3, 9))
    logits = torch.zeros(3, 9, 50)
    logits[:, :-1].scatter_(-1, tokens[:, 1:].unsqueeze(-1), 30.0)
    logps = fastpref.token_logps(logits, tokens, shift=True)
    torch.testing.assert_close(logps[:, :-1], torch.zeros(3, 8), rtol=0, atol=1e-6)
    assert (logps[:, -1] == 0).all()
    unshifted = fastpref.token_logps(logits, tokens)
    assert (unshifted[:, :-1][tokens[:, :-1] != tokens[:, 1:]] < -10).all()
    by_hand = fastpref.token_logps(logits[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(logps[:, :-1], by_hand, rtol=0, atol=0)


LABEL_LAYOUTS = {
    "sliced": lambda y: y[:, 1:],
    "transposed": lambda y: y.T,
    "expanded": lambda y: y[:1].expand(5, -1),
    "int32": lambda y: y.int(),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LABEL_LAYOUTS.values(), ids=LABEL_LAYOUTS)
def test_label_layouts(backend, layout, thin):
    thin(unless=not backend.interpreted or layout == LABEL_LAYOUTS["transposed"])
    labels = layout(torch.randint(0, 8, (12, 7), device=backend.device))
    logits = torch.randn(*labels.shape, 8, device=backend.device)
    grad = torch.randn(labels.shape, device=backend.device)
    got = forward_backward(fastpref.token_logps, logits, labels, grad, backend=backend.name)
    expected = forward_backward(fastpref.token_logps, logits, labels.long().contiguous(), grad, backend=backend.name)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


# ---- in place ----


@pytest.mark.sanitize
@pytest.mark.numerics
def test_inplace_backward_is_the_same_gradient_in_the_logits_memory(backend):
    leaf, labels = make((3, 7, 130), device=backend.device)
    leaf.requires_grad_()
    grad = torch.randn(labels.shape, device=backend.device)

    def run(inplace):
        leaf.grad = None
        logits = leaf * 1.0
        address, version = logits.data_ptr(), logits._version
        received = []
        logits.register_hook(lambda g: received.append(g.data_ptr()))
        fastpref.token_logps(logits, labels, inplace_backward=inplace, backend=backend.name).backward(grad)
        return leaf.grad.clone(), received[0] == address, logits._version - version

    fresh, shares, bumps = run(False)
    assert not shares
    assert bumps == 0
    inplace, shares, bumps = run(True)
    assert shares
    assert bumps > 0
    torch.testing.assert_close(inplace, fresh, rtol=0, atol=0)


@pytest.mark.sanitize
def test_inplace_backward_protects_readers(backend):
    leaf, labels = make((3, 40), device=backend.device, ignored=0)
    leaf.requires_grad_()
    logits = leaf * 1.0
    squares = (logits**2).sum()
    loss = fastpref.token_logps(logits, labels, inplace_backward=True, backend=backend.name).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=True has overwritten the logits with their gradient"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_inplace_backward_refuses_what_it_would_spoil():
    logits, labels = make((3, 40), ignored=0)
    logits.requires_grad_()
    for leaf in (logits, logits[:, 1:], logits.view(3, 1, 40)[:, 0]):
        with pytest.raises(ValueError, match="must not be a leaf that requires grad, nor a view of one"):
            fastpref.token_logps(leaf, labels.clamp(max=38), inplace_backward=True)
    expanded = (logits[:1] * 1.0).expand(3, -1)
    overlapping = (logits * 1.0).as_strided((3, 40), (2, 1))
    for shared in (expanded, overlapping):
        with pytest.raises(ValueError, match="no two places in one memory"):
            fastpref.token_logps(shared, labels, inplace_backward=True)
    transposed = (logits * 1.0).T
    with pytest.raises(ValueError, match="contiguous columns"):
        fastpref.token_logps(transposed, labels[0].expand(40), inplace_backward=True)
    deep = torch.randn(2, 2, 3, 8).requires_grad_().mul(1.0).transpose(0, 2)
    with pytest.raises(ValueError, match="inplace_backward=True needs"):
        fastpref.token_logps(deep, torch.zeros(deep.shape[:-1], dtype=torch.long), inplace_backward=True)


# ---- bad input ----


def test_errors_say_what_came():
    logits, labels = torch.randn(4, 128, 320), torch.zeros(4, 128, dtype=torch.long)
    call = fastpref.token_logps

    def message(kind, text, *args, **kwargs):
        with pytest.raises(kind) as caught:
            call(*args, **kwargs)
        assert text in str(caught.value)

    message(TypeError, "logits must be a torch.Tensor, got list", [1.0], labels)
    message(
        TypeError,
        "logits must be float32, bfloat16, float16 or float64, got torch.int64",
        labels[..., None],
        labels,
    )
    message(ValueError, "logits must have shape [..., vocab], got a scalar", torch.tensor(1.0), labels)
    message(ValueError, "logits must have at least one column, got shape [4, 128, 0]", logits[..., :0], labels)
    message(
        ValueError,
        "labels must have shape [4, 128] to match logits [4, 128, 320], got [4, 127]",
        logits,
        labels[:, :-1],
    )
    message(TypeError, "labels must be int64 or int32, got torch.float32", logits, labels.float())
    message(ValueError, "labels must be on cpu like logits, got meta", logits, labels.to("meta"))
    message(ValueError, "temperature must be positive and finite, got 0.0", logits, labels, temperature=0.0)
    message(ValueError, "temperature must be positive and finite, got nan", logits, labels, temperature=float("nan"))
    message(ValueError, "softcap must be positive and finite, got -1", logits, labels, softcap=-1)
    message(ValueError, "softcap / temperature must be a normal float32, got 1e+39", logits, labels, softcap=1e39)
    message(ValueError, "scale / temperature must be a normal float32, got 1e-46", logits, labels, scale=1e-46)
    message(ValueError, "ignore_index must fit 64 bits", logits, labels, ignore_index=2**70)
    message(TypeError, "scale must be a positive float, got str", logits, labels, scale="1")
    message(TypeError, "ignore_index must be an int, got float", logits, labels, ignore_index=-100.0)
    message(
        ValueError,
        "backend must be None or one of ['native', 'reference', 'triton'], got 'cuda'",
        logits,
        labels,
        backend="cuda",
    )
    message(ValueError, "stats must be a tuple of names", logits, labels, stats="entropy")
    message(ValueError, "got ('entropie',)", logits, labels, stats=("entropie",))
    message(
        TypeError,
        "backend='native' takes float32, bfloat16 or float16 logits, got torch.float64",
        logits.double(),
        labels,
        backend="native",
    )
    message(ValueError, "shift=True needs labels of shape", logits[0, 0], labels[0, 0], shift=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("bad", [320, -1, -101, 2**40])
def test_label_out_of_range(backend, bad):
    logits = torch.randn(4, 3, 320, device=backend.device)
    labels = torch.zeros(4, 3, dtype=torch.long, device=backend.device)
    labels[2, 1] = bad
    if backend.device.type == "cpu" and backend.name != "triton":
        text = f"labels must lie in \\[0, 320\\) or equal ignore_index=-100, got {bad} at position 7"
        with pytest.raises(ValueError, match=text):
            fastpref.token_logps(logits, labels, backend=backend.name)
        return
    logps, gradient = forward_backward(
        fastpref.token_logps, logits, labels, torch.ones(4, 3, device=backend.device), backend=backend.name
    )
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[2, 1] = True
    assert torch.equal(logps.isnan().cpu(), expected)
    assert torch.equal(gradient.isnan().all(-1).cpu(), expected)


def test_int32_labels():
    logits, labels = make((4, 50))
    torch.testing.assert_close(fastpref.token_logps(logits, labels.int()), fastpref.token_logps(logits, labels))


def test_unknown_simd_levels():
    with pytest.raises(ValueError, match="simd level must be 'auto', 'baseline', 'avx2' or 'avx512', got 'sse9'"):
        fastpref.set_simd_level("sse9")


def test_named_backend_that_is_missing_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, labels = make((4, 50))
    with pytest.raises(RuntimeError, match="backend='triton' of token_logps cannot serve cpu tensors: Triton has no"):
        fastpref.token_logps(logits, labels, backend="triton")
    monkeypatch.setattr("fastpref._native._core", None)
    with pytest.raises(RuntimeError, match="this installation has no native core"):
        fastpref.token_logps(logits, labels, backend="native")
    with pytest.warns(RuntimeWarning, match="token_logps runs its slow reference on cpu tensors"):
        fastpref.token_logps(logits, labels)


# ---- properties ----


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    ignored=st.floats(0, 1),
)
def test_any_shape_and_mask(rows, vocab, dtype, seed, ignored):
    torch.manual_seed(seed)
    logits, labels = make((rows, vocab), dtype, ignored=ignored)
    grad = torch.randn(rows)
    logps, gradient = forward_backward(fastpref.token_logps, logits, labels, grad)
    truth, true_gradient = forward_backward(token_logps_ref, logits.double(), labels, grad.double())
    torch.testing.assert_close(logps.double(), truth, rtol=1e-6, atol=2e-6)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=bound, atol=max(2e-6, 1e-8 * bound))
    # the gradient of a log-probability sums to zero over the vocabulary
    assert gradient.double().sum(-1).abs().max().item() < 4e-2 if rows else True


@settings(deadline=None, max_examples=20)
@given(vocab=st.integers(2, 200), offset=st.integers(-64, 64), seed=st.integers(0, 2**31))
def test_shift_and_permutation_invariance(vocab, offset, seed):
    torch.manual_seed(seed)
    logits = torch.randint(-32, 32, (3, vocab)).float() / 4  # exact sums with the offset
    labels = torch.randint(0, vocab, (3,))
    order = torch.randperm(vocab)
    logps = fastpref.token_logps(logits, labels)
    torch.testing.assert_close(fastpref.token_logps(logits + offset, labels), logps, rtol=0, atol=3e-6)
    inverse = order.argsort()
    torch.testing.assert_close(fastpref.token_logps(logits[:, order], inverse[labels]), logps, rtol=0, atol=3e-6)


# ---- torch citizenship ----


def test_gradcheck():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 3))
    labels[1, 2] = -100
    for transform in TRANSFORMS.values():
        assert torch.autograd.gradcheck(lambda x, t=transform: fastpref.token_logps(x, labels, **t), (logits,))
        assert torch.autograd.gradcheck(lambda x, t=transform: token_logps_ref(x, labels, **t), (logits,))


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["contiguous", "transposed-leading", "transposed-columns"])
def test_opcheck(backend, layout, thin):
    thin(unless=not backend.interpreted or layout == "contiguous")
    logits = torch.randn(4, 6, 81, device=backend.device)
    logits = LAYOUTS.get(layout, lambda x: x)(logits)
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1], device=backend.device)
    options = (0.7, None, 1.0, -100)
    torch.library.opcheck(token_logps_fwd, (logits, labels, *options, True, backend.name))
    logps, lse, _ = token_logps_fwd(logits, labels, *options, False, backend.name)
    saved = (labels, logps, lse, *options, backend.name)
    grad = torch.randn(labels.shape, device=backend.device)
    torch.library.opcheck(token_logps_bwd, (grad, logits, *saved))
    torch.library.opcheck(token_logps_bwd_, (grad, logits.contiguous(), *saved))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_compiles_without_graph_breaks(compiler, inplace, thin):
    thin(unless=compiler == "aot_eager")  # test_inductor of the whole step runs always
    torch._dynamo.reset()
    logits, labels = make((2, 5, 90))

    def step(weight):
        return fastpref.token_logps(
            logits * weight, labels, shift=True, softcap=20.0, stats=("entropy",), inplace_backward=inplace
        )

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        weight = torch.ones(90, requires_grad=True)
        logps, values = f(weight)
        logps.sum().backward()
        results.append((logps.detach(), weight.grad, values.entropy))
    torch.testing.assert_close(*results)


def test_new_lengths_do_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda x, y: fastpref.token_logps(x, y, shift=True).sum(), fullgraph=True, backend=counter)
    for length in (5, 6, 7, 11, 30):
        logits, labels = make((2, length, 90))
        step(logits.requires_grad_(), labels).backward()
    assert counter.frame_count <= 2  # the first length, then any


def test_no_grad_keeps_nothing():
    logits, labels = make((3, 40))
    logits.requires_grad_()
    with torch.no_grad():
        logps = fastpref.token_logps(logits, labels)
    assert logps.grad_fn is None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastpref.token_logps(logits.detach(), labels)
        assert not saved
        fastpref.token_logps(logits, labels)
    assert sum(t.nbytes for t in saved) == logits.nbytes + labels.nbytes + labels.numel() * 4 * 3


def test_stats_are_detached():
    logits, labels = make((3, 40))
    logps, values = fastpref.token_logps(logits.requires_grad_(), labels, stats=ALL_STATS)
    assert logps.requires_grad
    assert not any(value.requires_grad for value in values)
    assert all(value.dtype == torch.float32 for value in values)
    _, values = fastpref.token_logps(logits.double(), labels, stats=ALL_STATS)
    assert all(value.dtype == torch.float32 for value in values)


def test_double_backward_is_refused():
    logits, labels = make((3, 40), ignored=0)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(fastpref.token_logps(logits, labels).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
def test_forward_mode_is_refused():
    logits, labels = make((3, 40))
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: fastpref.token_logps(x, labels).sum(), (logits,), (logits,))


def test_torch_func_grad():
    logits, labels = make((3, 40))
    by_func = torch.func.grad(lambda x: fastpref.token_logps(x, labels).sum())(logits)
    _, gradient = forward_backward(fastpref.token_logps, logits, labels, torch.ones(3))
    torch.testing.assert_close(by_func, gradient)


def test_autocast():
    hidden, weight = torch.randn(6, 16), torch.randn(16, 50, requires_grad=True)
    labels = torch.randint(0, 50, (6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hidden @ weight
        logps = fastpref.token_logps(logits, labels)
    assert logits.dtype == torch.bfloat16
    assert logps.dtype == torch.float32
    logps.sum().backward()
    torch.testing.assert_close(logps.double(), token_logps_ref(logits, labels), rtol=0, atol=1e-5)
    assert weight.grad.isfinite().all()


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    hidden, labels = torch.randn(6, 16), torch.randint(0, 50, (6,))
    gradients = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(0)
        weight = torch.randn(16, 50, requires_grad=True)
        wrap(lambda w: fastpref.token_logps(hidden @ w, labels), weight).sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_thread_count_changes_no_bit():
    logits, labels = make((37, 4001), torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(forward_backward(fastpref.token_logps, logits, labels, torch.ones(37)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_a_forked_child():
    logits, labels = make((64, 4001))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = fastpref.token_logps(
            logits, labels
        )  # the parent's OpenMP threads are up, and do not survive the fork
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(fastpref.token_logps(logits, labels), expected) else 1)
    finally:
        torch.set_num_threads(threads)
    deadline = time.monotonic() + 60
    while (waited := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(waited[1]) == 0


def test_gradients_flow_under_ddp(two_ranks):
    by_rank = two_ranks("""
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 30))
        hidden, labels = torch.randn(4, 6, 8), torch.randint(0, 30, (4, 6))
        mine = slice(2 * rank, 2 * rank + 2)
        fastpref.token_logps(model(hidden[mine]), labels[mine]).mean().backward()
        result = [p.grad for p in model.parameters()]
    """)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 30)
    hidden, labels = torch.randn(4, 6, 8), torch.randint(0, 30, (4, 6))
    fastpref.token_logps(model(hidden), labels).mean().backward()
    for gradients in by_rank:
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.cuda
def test_side_stream_and_graph_capture(backend):
    if backend.device.type != "cuda":
        pytest.skip("streams and graphs are CUDA's")
    logits, labels = make((64, 5003), torch.bfloat16, "cuda", ignored=0)
    expected = fastpref.token_logps(logits, labels, backend=backend.name)
    torch.cuda.synchronize()
    graph, out = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        out = fastpref.token_logps(logits, labels, backend=backend.name)
    logits.copy_(logits.flip(0))
    labels.copy_(labels.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected.flip(0), rtol=0, atol=0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        fresh = (logits * 1.0).flip(0)
        on_side = fastpref.token_logps(fresh, labels.flip(0), backend=backend.name)
    stream.synchronize()
    torch.testing.assert_close(on_side, expected, rtol=0, atol=0)


@pytest.mark.cuda
def test_no_host_sync(backend):
    if backend.device.type != "cuda" or backend.name == "reference":
        pytest.skip("only GPU kernels can avoid one")
    logits, labels = make((64, 5003), torch.bfloat16, "cuda", ignored=0)
    logits.requires_grad_()
    fastpref.token_logps(logits, labels, backend=backend.name).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastpref.token_logps(logits, labels, backend=backend.name).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
