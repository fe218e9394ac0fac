"""sequence_logps and preference_loss: the fused family against torch on vectors against plain float64 PyTorch."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref
from fastpref import losses
from fastpref._logps.preference import _Outputs, preference_bwd, preference_bwd_, preference_fwd
from fastpref._logps.token_logps import STATS

FUSED = ["sigmoid", "robust", "rdpo", "ripo", "ml_rdpo", "ddpo"]


def make(pairs=3, tokens=9, vocab=40, dtype=torch.float32):
    logits, ref_logits = (torch.randn(2 * pairs, tokens, vocab, dtype=dtype) * 2 for _ in range(2))
    labels = torch.randint(0, vocab, (2 * pairs, tokens))
    labels[torch.rand(labels.shape) < 0.3] = -100
    gap = torch.randn(pairs, dtype=dtype)
    if pairs > 1:
        gap[1] = torch.nan
    return logits, labels, ref_logits, gap


def run(logits, labels, upstream=1.0, **options):
    logits = logits.detach().clone().requires_grad_()
    out = fastpref.preference_loss(logits, labels, **options)
    (out.loss.sum() * upstream).backward()
    return out, logits.grad


def plain_token_logps(logits, labels, shift=True):
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(kept, logps, 0.0)


def references(ref_logits, labels, shift=True):
    """The same reference in its three forms."""
    tokens = fastpref.token_logps(ref_logits, labels, shift=shift)
    sums = fastpref.sequence_logps(tokens, labels, shift=shift).sums
    return {"ref_logits": ref_logits, "ref_token_logps": tokens, "ref_logps": sums}


# ---- against plain PyTorch ----


@pytest.mark.numerics
@pytest.mark.parametrize("form", ["ref_logits", "ref_token_logps", "ref_logps"])
@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_dpo_is_what_everyone_writes(backend, form):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    logits, labels, ref_logits, _ = make()
    reference = {form: references(ref_logits, labels)[form]}
    out, gradient = run(logits, labels, shift=True, beta=0.3, backend=backend, **reference)

    plain = logits.double().requires_grad_()
    policy = plain_token_logps(plain, labels).sum(-1)
    ratios = policy - plain_token_logps(ref_logits.double(), labels).sum(-1)
    loss = -F.logsigmoid(0.3 * (ratios[:3] - ratios[3:])).mean()
    loss.backward()
    torch.testing.assert_close(out.loss.double(), loss, rtol=0, atol=2e-6)
    torch.testing.assert_close(gradient.double(), plain.grad, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.chosen_logps.double(), policy[:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.rejected_logps.double(), policy[3:], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.chosen_rewards.double(), 0.3 * ratios[:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(out.margins, out.chosen_rewards - out.rejected_rewards)
    assert out.accuracy == (out.margins > 0).float().mean()
    assert not any(t.requires_grad for t in (*out[1:-1], *filter(torch.is_tensor, out.stats)))


@pytest.mark.sanitize
@pytest.mark.numerics
@pytest.mark.parametrize("form", ["ref_logits", "ref_token_logps", "ref_logps"])
@pytest.mark.parametrize("loss", FUSED)
def test_native_epilogue_is_the_torch_loss(loss, form):
    logits, labels, ref_logits, gap = make()
    options = {
        "loss": loss, "rating_gap": gap, "shift": True, "beta": 0.4, "pair_weights": torch.rand(3),
        form: references(ref_logits, labels)[form],
    }  # fmt: skip
    fused, gradient = run(logits, labels, upstream=3.0, **options)
    vectors, vectors_gradient = run(logits, labels, upstream=3.0, backend="reference", **options)
    torch.testing.assert_close(fused.loss, vectors.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, vectors_gradient, rtol=1e-5, atol=2e-6)
    for name in ("chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "margins"):
        torch.testing.assert_close(getattr(fused, name), getattr(vectors, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.stats.losses, vectors.stats.losses, rtol=1e-5, atol=1e-5)
    for name in ("chosen_lengths", "rejected_lengths", "ties", "unrated"):
        assert torch.equal(getattr(fused.stats, name), getattr(vectors.stats, name))
    assert fused.stats.unrated == 1


FUSED_OPTIONS = [
    ("sigmoid", {"label_smoothing": 0.2}),
    ("robust", {"label_smoothing": 0.1}),
    ("ipo", {"length_normalize": False}),
    ("rpo", {"mode": "sq", "eta": 0.5}),
    ("rdpo", {"beta_rating": 0.05}),
    ("ml_rdpo", {"variance": 0.2}),
    ("sigmoid", {"reference_free": True}),
]


@pytest.mark.sanitize
@pytest.mark.parametrize(("loss", "loss_options"), FUSED_OPTIONS, ids=[f"{n}-{'-'.join(o)}" for n, o in FUSED_OPTIONS])
def test_options_reach_the_native_epilogue(loss, loss_options, monkeypatch):
    logits, labels, ref_logits, gap = make()
    options = {"loss": loss, "loss_options": loss_options, "rating_gap": gap, "beta": 0.4}
    if "reference_free" not in loss_options:
        options["ref_logits"] = ref_logits
    vectors, expected = run(logits, labels, backend="reference", **options)
    monkeypatch.setattr("fastpref._logps.preference._vectors", None)  # it must not be needed
    fused, gradient = run(logits, labels, **options)
    torch.testing.assert_close(fused.loss, vectors.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=2e-6)


def packed_of(tensor, keep):
    """The first keep[s] tokens of each sequence."""
    return tensor[torch.arange(tensor.shape[1]) < keep[:, None]]


TRITON = {
    "dpo": {"loss": "sigmoid"},
    "rdpo-packed": {"loss": "rdpo", "keep": [9, 0, 4, 9, 8, 2], "shift": True},
    "ml_rdpo-lengths": {"loss": "ml_rdpo", "lengths": [3, 9, 0, 1, 9, 8]},
    "robust-none": {"loss": "robust", "loss_options": {"label_smoothing": 0.1}, "reduction": "none", "shift": True},
    "ddpo-sum": {"loss": "ddpo", "reduction": "sum", "softcap": 3.0},
    "ripo-items": {"loss": "ripo", "num_items": 7.5, "shift": True},
}


@pytest.mark.triton
@pytest.mark.numerics
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("form", ["ref_logits", "ref_token_logps", "ref_logps"])
@pytest.mark.parametrize("case", TRITON)
def test_triton_is_the_native_call(case, form, monkeypatch, thin):
    """Under the interpreter; compiled: ptxsim/test_preference.py."""
    thin(unless=form != "ref_logits" or list(TRITON).index(case) % 4 == 0)
    logits, labels, ref_logits, gap = make()
    options = {"rating_gap": gap, "beta": 0.4, "pair_weights": torch.rand(3), "stats": STATS} | TRITON[case]
    reference = references(ref_logits, labels, options.get("shift", False))[form]
    if "lengths" in options:
        options["lengths"] = torch.tensor(options["lengths"], dtype=torch.int32)
    if "keep" in options:
        keep = torch.tensor(options.pop("keep"))
        logits, labels = packed_of(logits, keep), packed_of(labels, keep)
        reference = reference if form == "ref_logps" else packed_of(reference, keep)
        options["cu_seqlens"] = F.pad(keep.cumsum(0), (1, 0))
    options[form] = reference
    native, expected = run(logits, labels, upstream=3.0, **options)
    monkeypatch.setattr("fastpref._logps.preference._vectors", None)  # it must not be needed
    triton, gradient = run(logits, labels.int(), upstream=3.0, backend="triton", **options)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    for name, value in triton._asdict().items():
        if name != "stats":
            torch.testing.assert_close(value, getattr(native, name), rtol=1e-5, atol=1e-5, msg=name)
    for name, value in triton.stats._asdict().items():
        if value is not None:
            torch.testing.assert_close(value, getattr(native.stats, name), rtol=1e-5, atol=1e-5, msg=name)


def of_parts(pairs):
    return -(pairs.chosen_tail_logratios - 2 * pairs.rejected_tail_logratios) - pairs.chosen_wpo_log_weight


of_parts.needs = frozenset({"tail", "wpo"})

# Of sums over a part of a sequence, or of a stat: the kernels form what the loss is made of.
PARTS = {
    "wpo": {"loss": "wpo"},
    "wpo-packed": {"loss": "wpo", "loss_options": {"base": "ipo"}, "keep": [9, 0, 4, 9, 8, 2]},
    "ld_dpo": {"loss": "ld_dpo"},
    "ld_dpo-none": {"loss": "ld_dpo", "loss_options": {"ld_alpha": 0.0}, "reduction": "none"},
    "ld_dpo-lengths": {"loss": "ld_dpo", "lengths": [3, 9, 0, 1, 9, 8]},
    "ld_dpo-packed": {"loss": "ld_dpo", "keep": [9, 0, 4, 9, 8, 2]},
    "ld_dpo-free": {"loss": "ld_dpo", "loss_options": {"reference_free": True}},
    "mixture": {"loss": ["sigmoid", "wpo", "ld_dpo"], "loss_weights": [0.5, 1.0, 2.0], "softcap": 3.0},
    "own": {"loss": of_parts, "keep": [2, 9, 9, 0, 9, 4]},
}


def layout_of(options, *tensors):
    """`options` with `lengths` as a tensor, or cu_seqlens in place of `keep`, and the tensors of tokens as they say."""
    options = dict(options)
    if "lengths" in options:
        options["lengths"] = torch.tensor(options["lengths"], dtype=torch.int32)
    if "keep" in options:
        keep = torch.tensor(options.pop("keep"))
        options["cu_seqlens"] = F.pad(keep.cumsum(0), (1, 0))
        tensors = [packed_of(t, keep) for t in tensors]
    return options, *tensors


backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("native", marks=pytest.mark.sanitize),
        pytest.param(
            "triton",
            marks=[
                pytest.mark.triton,
                pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"),
            ],
        ),
    ],
)


@backends
@pytest.mark.numerics
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("form", ["ref_logits", "ref_token_logps"])
@pytest.mark.parametrize("case", PARTS)
def test_losses_of_parts_and_stats_are_those_of_the_reference(case, form, shift, backend, monkeypatch, thin):
    thin(unless=backend != "triton" or (form, shift) == ("ref_logits", True))
    logits, labels, ref_logits, _ = make()
    reference = references(ref_logits, labels, shift)[form]
    options, logits, labels, reference = layout_of(PARTS[case], logits, labels, reference)
    options |= {"beta": 0.4, "pair_weights": torch.rand(3), "shift": shift}
    if not case.endswith("free"):
        options[form] = reference
    expected, expected_gradient = run(logits, labels, upstream=3.0, backend="reference", **options)
    monkeypatch.setattr("fastpref._logps.preference._vectors", None)  # it must not be needed
    found, gradient = run(logits, labels, upstream=3.0, backend=backend, **options)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=2e-6)
    for name, value in found._asdict().items():
        if name != "stats":
            torch.testing.assert_close(value, getattr(expected, name), rtol=1e-5, atol=1e-5, msg=name)
    assert found.stats.entropy is None and found.stats.log_sum_p2 is None  # unless they are asked for
    for name, value in expected.stats._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(found.stats, name), value, rtol=1e-5, atol=1e-5, msg=name)


@backends
@pytest.mark.sanitize
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("layout", [{}, {"lengths": [3, 9, 0, 1, 9, 8]}, {"keep": [9, 0, 4, 9, 8, 2]}], ids=str)
def test_tails_and_sums_of_stats_are_those_of_their_definition(layout, reference, backend, thin):
    thin(unless=backend != "triton" or reference)
    logits, labels, ref_logits, _ = make()
    options, logits, labels, ref_logits = layout_of(layout, logits, labels, ref_logits)
    cu_seqlens, lengths = options.get("cu_seqlens"), options.get("lengths")
    numbers = torch.tensor([1.0, *[0.0] * 7], dtype=torch.float64)
    out = _Outputs(
        *preference_fwd(
            logits, labels, cu_seqlens, lengths, False, ref_logits if reference else None, *[None] * 5, "none",
            1.0, None, 1.0, -100, True, True, numbers, False, backend,
        )
    )  # fmt: skip
    tokens, stats = fastpref.token_logps(logits, labels, stats=STATS)
    ratios = tokens.double()
    if reference:
        ratios = ratios - fastpref.token_logps(ref_logits, labels).double()
    bounds = range(0, 55, 9) if cu_seqlens is None else cu_seqlens.tolist()
    counted = []  # of each sequence, rows of its tokens that count
    for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
        last = end if lengths is None else min(end, begin + int(lengths[s]))
        counted.append([row for row in range(begin, last) if labels.flatten()[row] != -100])
    for s, rows in enumerate(counted):
        tail = rows[min(len(rows), len(counted[(s + 3) % 6])) :]
        expected = ratios.flatten()[tail].sum().float()
        torch.testing.assert_close(out.tail[s], expected, rtol=1e-5, atol=1e-6)
        assert out.tail_begin[s] == (tail[0] if tail else bounds[s + 1]) - bounds[s]
        sums = torch.stack([getattr(stats, name).double().flatten()[rows].sum() for name in STATS])
        torch.testing.assert_close(out.stat_sums[s], sums, rtol=1e-5, atol=1e-5)


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_triton_counts_invalid_labels():
    logits, labels, ref_logits, _ = make()
    labels[:, :4] = torch.tensor([0, 1, 2, -100])
    labels[0, 0], labels[4, 1], labels[4, 2] = 40, -1, 41
    out, gradient = run(logits, labels, backend="triton", ref_logits=ref_logits)
    assert out.stats.invalid_labels == 3
    assert out.chosen_logps.isnan().tolist() == [True, False, False]
    assert out.rejected_logps.isnan().tolist() == [False, True, False]
    gone = torch.tensor([True, True, False]).repeat(2).unsqueeze(-1) & (labels != -100)
    assert gradient[gone].isnan().all() and gradient[~gone].isfinite().all() and not gradient[labels == -100].any()


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_triton_takes_a_batch_without_tokens(shape):
    pairs, tokens = shape
    logits, labels, ref_logits, _ = make(pairs, tokens)
    out, gradient = run(logits, labels, backend="triton", ref_logits=ref_logits)
    assert out.loss.item() == pytest.approx(math.log(2) if pairs else 0)
    assert gradient.shape == logits.shape and not gradient.any()


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_every_loss_trains_through_the_kernels(loss):
    """The gradient by autograd through plain float64 PyTorch, for each name in the table."""
    logits, labels, ref_logits, gap = make(pairs=4)
    gap = gap.nan_to_num(0.7)
    scores = torch.rand(8)
    options = {"loss": loss, "rating_gap": gap, "scores": scores, "ref_logits": ref_logits}
    if loss == "beta_dpo":  # it draws which pairs to keep
        options["loss_options"] = {"keep": 1.0}
    out, gradient = run(logits, labels, **options)

    z = logits.double().requires_grad_()
    tokens = plain_token_logps(z, labels, shift=False)
    counted = labels != -100
    ratios = tokens - plain_token_logps(ref_logits.double(), labels, shift=False)
    lengths = counted.sum(-1)
    rank = counted.cumsum(-1)
    shorter = torch.minimum(lengths[:4], lengths[4:]).repeat(2)
    tail = torch.where(rank > shorter.unsqueeze(-1), ratios, 0.0).sum(-1)
    log_p = torch.log_softmax(z.detach(), -1)
    weight = torch.where(counted, tokens.detach() - (2 * log_p).logsumexp(-1), 0.0).sum(-1) / lengths.clamp(min=1)

    def halves(x):
        return x[:4], x[4:]

    sums, ratios = tokens.sum(-1), ratios.sum(-1)
    pairs = losses.Pairs(
        *halves(sums), *halves((sums - ratios).detach()), *halves(lengths), gap.double(), *halves(ratios),
        *halves(tail), *halves(weight), *halves(scores.double()),
    )  # fmt: skip
    expected = losses.pair_loss(pairs, loss, beta=0.1, options=options.get("loss_options")).mean()
    expected.backward()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-5)
    scale = z.grad.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(gradient.double() / scale, z.grad / scale, rtol=0, atol=2e-5)


@pytest.mark.numerics
def test_equal_policy_and_reference_cost_ln_2():
    exact, labels, _, _ = make(tokens=300)
    for logits in (exact, exact.bfloat16(), exact.half()):
        for form, reference in references(logits, labels).items():
            out = fastpref.preference_loss(logits, labels, shift=True, **{form: reference})
            assert abs(out.loss.item() - math.log(2)) < 1e-5
            if form != "ref_logps":
                assert out.stats.ties == 3


def test_long_sequences_keep_the_margin():
    """4096 tokens of about -8 nats each, policy and reference nearly equal: fp32 sums alone would lose the margin."""
    logits = torch.randn(2, 4096, 64) * 4
    ref_logits = logits + torch.randn(2, 4096, 64) * 0.01
    labels = torch.randint(0, 64, (2, 4096))
    truth = [plain_token_logps(x.double(), labels, shift=False).sum(-1) for x in (logits, ref_logits)]
    margin = (truth[0] - truth[1])[0] - (truth[0] - truth[1])[1]
    tokens = fastpref.token_logps(ref_logits, labels)
    for backend in (None, "reference"):
        for reference in ({"ref_logits": ref_logits}, {"ref_token_logps": tokens}):
            out = fastpref.preference_loss(logits, labels, beta=1.0, backend=backend, **reference)
            assert abs(out.margins.double() - margin) < 2e-4  # the fp32 grid of one sum is 4e-3 there


# ---- layouts ----


def pack(logits, labels, lengths):
    rows = [slice(0, n) for n in lengths]
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    return (
        torch.cat([x[r] for x, r in zip(logits, rows, strict=True)]),
        torch.cat([y[r] for y, r in zip(labels, rows, strict=True)]),
        cu_seqlens,
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("loss", ["rdpo", "ld_dpo", "ipo", "wpo"])
@pytest.mark.parametrize("shift", [False, True])
def test_packed_is_padded(loss, shift, backend):
    logits, labels, ref_logits, gap = make()
    lengths = [9, 4, 1, 7, 0, 9]  # one token, none at all
    options = {"loss": loss, "rating_gap": gap, "shift": shift, "backend": backend, "stats": STATS}
    packed_logits, packed_labels, cu_seqlens = pack(logits, labels, lengths)
    packed_ref, _, _ = pack(ref_logits, labels, lengths)
    padded, _ = run(logits, labels, ref_logits=ref_logits, lengths=torch.tensor(lengths), **options)
    for dtype in (torch.int32, torch.int64):
        packed, _ = run(packed_logits, packed_labels, ref_logits=packed_ref, cu_seqlens=cu_seqlens.to(dtype), **options)
        for a, b in zip(padded[:-1], packed[:-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(padded.stats, packed.stats, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_shift_needs_the_right_convention_and_respects_boundaries():
    # a model that is sure of the next token of its own sequence, and of nothing else
    tokens = torch.randint(0, 30, (4, 6))
    logits = torch.zeros(4, 6, 30)
    logits[:, :-1].scatter_(-1, tokens[:, 1:].unsqueeze(-1), 40.0)
    out = fastpref.preference_loss(logits, tokens, shift=True, loss="cpo")
    torch.testing.assert_close(out.chosen_logps, torch.zeros(2), rtol=0, atol=1e-5)
    wrong = fastpref.preference_loss(logits, tokens, loss="cpo")
    assert (wrong.chosen_logps < -50).all()
    cu_seqlens = torch.arange(0, 25, 6)
    packed = fastpref.preference_loss(
        logits.view(-1, 30), tokens.view(-1), shift=True, cu_seqlens=cu_seqlens, loss="cpo"
    )
    torch.testing.assert_close(packed.chosen_logps, out.chosen_logps)
    torch.testing.assert_close(packed.rejected_logps, out.rejected_logps)
    assert torch.equal(packed.stats.chosen_lengths, torch.tensor([5, 5]))


def test_an_empty_first_sequence_keeps_the_first_token():
    logits, labels = torch.randn(6, 20), torch.randint(0, 20, (6,))
    out = fastpref.preference_loss(
        logits, labels, cu_seqlens=torch.tensor([0, 0, 6]), shift=True, loss_options={"reference_free": True}
    )
    assert torch.equal(out.stats.rejected_lengths, torch.tensor([5]))
    assert torch.equal(out.stats.chosen_lengths, torch.tensor([0]))


def test_sequence_logps():
    tokens = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (4, 7))
    labels[0] = -100
    labels[1, 3] = -100
    got = fastpref.sequence_logps(tokens, labels)
    kept = labels != -100
    torch.testing.assert_close(got.sums, (tokens * kept).sum(-1))
    assert torch.equal(got.lengths, kept.sum(-1))
    assert torch.autograd.gradcheck(lambda t: fastpref.sequence_logps(t, labels).sums, (tokens,))
    cu_seqlens = torch.tensor([0, 7, 14, 21, 28])
    packed = fastpref.sequence_logps(tokens.view(-1), labels.view(-1), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed.sums, got.sums)
    assert torch.autograd.gradcheck(
        lambda t: fastpref.sequence_logps(t, labels.view(-1), cu_seqlens=cu_seqlens).sums,
        (tokens.detach().view(-1).requires_grad_(),),
    )


def test_a_bad_token_stays_in_its_sequence():
    tokens, labels = torch.zeros(8), torch.zeros(8, dtype=torch.long)
    tokens[1], tokens[5] = torch.nan, torch.nan
    labels[5] = -100  # not counted: its NaN does not matter
    sums, _ = fastpref.sequence_logps(tokens, labels, cu_seqlens=torch.tensor([0, 3, 8]))
    assert sums[0].isnan()
    assert sums[1] == 0


# ---- reductions, weights, corners ----


@pytest.mark.parametrize("backend", [None, "reference"])
def test_reductions(backend):
    logits, labels, ref_logits, gap = make(pairs=4)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    options = {"ref_logits": ref_logits, "loss": "rdpo", "rating_gap": gap, "backend": backend}
    each, _ = run(logits, labels, reduction="none", **options)
    assert each.loss.shape == (4,)
    torch.testing.assert_close(run(logits, labels, reduction="sum", **options)[0].loss, each.loss.sum())
    torch.testing.assert_close(run(logits, labels, **options)[0].loss, each.loss.mean())
    weighted = run(logits, labels, pair_weights=weights, **options)[0].loss
    torch.testing.assert_close(weighted, (each.loss * weights).sum() / weights.sum())
    assert run(logits, labels, pair_weights=torch.zeros(4), **options)[0].loss == 0
    torch.testing.assert_close(
        run(logits, labels, pair_weights=weights, reduction="none", **options)[0].loss, each.loss * weights
    )
    # micro-batches of unequal size, divided by the global count, add up to the whole batch
    whole, whole_gradient = run(logits, labels, **options)
    total, parts = 0.0, []
    for kept in ([0], [1, 2, 3]):
        rows = kept + [4 + i for i in kept]
        part, gradient = run(
            logits[rows], labels[rows], num_items=torch.tensor(4.0), loss="rdpo", backend=backend,
            ref_logits=ref_logits[rows], rating_gap=gap[kept],
        )  # fmt: skip
        total = total + part.loss.detach()
        parts.append((rows, gradient))
    torch.testing.assert_close(total, whole.loss.detach())
    for rows, gradient in parts:
        torch.testing.assert_close(gradient, whole_gradient[rows], rtol=1e-5, atol=1e-7)


@pytest.mark.sanitize
@pytest.mark.parametrize("backend", [None, "reference"])
def test_corners(backend):
    options = {"backend": backend, "stats": STATS}
    # all ignored: no gradient
    logits, labels, ref_logits, _ = make()
    out, gradient = run(logits * torch.nan, labels.fill_(-100), ref_logits=ref_logits * torch.nan, **options)
    assert abs(out.loss.item() - math.log(2)) < 1e-6
    assert (gradient == 0).all()
    assert out.stats.entropy == 0
    assert out.stats.ties == 3
    # no pairs
    empty = torch.empty(0, 5, 20)
    out, gradient = run(empty, torch.empty(0, 5, dtype=torch.long), ref_logits=empty, **options)
    assert out.loss == 0
    assert out.accuracy == 0
    assert gradient.shape == empty.shape
    for loss in losses.LOSSES:
        out, _ = run(
            empty, torch.empty(0, 5, dtype=torch.long), ref_logits=empty, loss=loss, rating_gap=torch.empty(0),
            scores=torch.empty(0), backend=backend,
        )  # fmt: skip
        assert out.loss == 0, loss
    out, _ = run(
        torch.empty(0, 20), torch.empty(0, dtype=torch.long), cu_seqlens=torch.zeros(1, dtype=torch.long),
        ref_logits=torch.empty(0, 20), **options,
    )  # fmt: skip
    assert out.loss == 0


def test_unrated_pairs_are_plain_dpo():
    logits, labels, ref_logits, _ = make()
    unrated = torch.full((3,), torch.nan)
    for backend in (None, "reference"):
        options = {"ref_logits": ref_logits, "backend": backend}
        dpo, gradient = run(logits, labels, **options)
        for loss in ("rdpo", "ml_rdpo"):
            rated, rated_gradient = run(logits, labels, loss=loss, rating_gap=unrated, **options)
            torch.testing.assert_close(rated.loss, dpo.loss)
            torch.testing.assert_close(rated_gradient, gradient)
            assert rated.stats.unrated == 3
        nothing, no_gradient = run(logits, labels, loss="ddpo", rating_gap=unrated, **options)
        assert nothing.loss == 0
        assert (no_gradient == 0).all()


def test_an_infinite_rating_stays_out_of_losses_without_one():
    logits, labels, ref_logits, _ = make()
    gap = torch.tensor([torch.inf, 0.0, -torch.inf])
    for backend in (None, "reference"):
        out, _ = run(logits, labels, ref_logits=ref_logits, rating_gap=gap, backend=backend)
        assert out.loss.isfinite()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_ratings_and_weights_are_data(backend):
    logits, labels, ref_logits, _ = make()
    gap, weights = torch.randn(3, requires_grad=True), torch.rand(3, requires_grad=True)
    options = {"ref_logits": ref_logits, "loss": "rdpo", "backend": backend}
    _, gradient = run(logits, labels, rating_gap=gap, pair_weights=weights, **options)
    assert gap.grad is None
    assert weights.grad is None
    # whatever their dtype
    double, same = run(logits, labels, rating_gap=gap.double(), pair_weights=weights.double(), **options)
    assert double.loss.dtype == torch.float32
    torch.testing.assert_close(same, gradient)
    half, _ = run(logits, labels, rating_gap=gap, pair_weights=torch.full((3,), 6e4, dtype=torch.float16), **options)
    plain, _ = run(logits, labels, rating_gap=gap, **options)
    torch.testing.assert_close(half.loss, plain.loss)


def test_a_reference_in_another_precision():
    logits, labels, ref_logits, _ = make()
    expected, _ = run(logits, labels, ref_logits=ref_logits)
    for dtype, bound in ((torch.float64, 1e-6), (torch.bfloat16, 2e-2)):
        out, _ = run(logits, labels, ref_logits=ref_logits.to(dtype))
        torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=bound)


def test_rewards_are_those_of_the_loss():
    logits, labels, ref_logits, _ = make()
    for loss in ("sigmoid", "ipo", losses.sigmoid):
        own, _ = run(logits, labels, ref_logits=ref_logits, loss=loss, loss_options={"beta": 0.5})
        expected, _ = run(logits, labels, ref_logits=ref_logits, loss=loss, beta=0.5)
        torch.testing.assert_close(own.loss, expected.loss)
        torch.testing.assert_close(own.margins, expected.margins)


@pytest.mark.parametrize("loss, backend", [("ipo", None), ("wpo", None), ("ld_dpo", None), ("wpo", "reference")])
def test_wrong_offsets_read_nothing_out_of_bounds_when_compiled(loss, backend):
    torch._dynamo.reset()
    logits, labels, ref_logits = torch.randn(20, 30), torch.randint(0, 30, (20,)), torch.randn(20, 30)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(cu_seqlens):
        options = {"ref_logits": ref_logits, "loss": loss, "cu_seqlens": cu_seqlens, "backend": backend}
        return fastpref.preference_loss(logits, labels, **options).loss

    for wrong in ([0, 5, 10_000], [0, -7, 20], [3, 50, 4]):
        if backend == "reference":  # torch on vectors, which looks at no value
            assert step(torch.tensor(wrong)).isfinite()
        else:  # the native core
            with pytest.raises(ValueError, match="cu_seqlens must"):
                step(torch.tensor(wrong))


def test_lengths_hide_padding_whatever_its_label():
    logits, labels, ref_logits, _ = make()
    labels.clamp_(min=0)
    lengths = torch.tensor([9, 3, 0, 5, 9, 1])
    out, gradient = run(logits, labels, ref_logits=ref_logits, lengths=lengths)
    masked = labels.masked_fill(torch.arange(9) >= lengths.unsqueeze(-1), -100)
    expected, expected_gradient = run(logits, masked, ref_logits=ref_logits)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_users_own_loss():
    logits, labels, ref_logits, _ = make()

    def mine(pairs, power=1.0):
        return F.softplus(-(pairs.chosen_logratios - pairs.rejected_logratios)) ** power

    out, gradient = run(logits, labels, ref_logits=ref_logits, loss=mine)
    expected, expected_gradient = run(logits, labels, ref_logits=ref_logits, beta=1.0)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    out, _ = run(logits, labels, ref_logits=ref_logits, loss=mine, loss_options={"power": 2.0}, reduction="none")
    single, _ = run(logits, labels, ref_logits=ref_logits, loss=mine, reduction="none")
    torch.testing.assert_close(out.loss, single.loss**2)
    with pytest.raises(ValueError, match="must return one loss per pair"):
        run(logits, labels, ref_logits=ref_logits, loss=lambda pairs: pairs.chosen_logps.mean())


def test_mixtures():
    logits, labels, ref_logits, gap = make()
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    options = {"ref_logits": ref_logits, "rating_gap": gap}
    mixed, gradient = run(logits, labels, loss=names, loss_weights=weights, **options)
    parts = [run(logits, labels, loss=name, **options) for name in names]
    torch.testing.assert_close(mixed.loss, sum(w * p.loss for w, (p, _) in zip(weights, parts, strict=True)))
    torch.testing.assert_close(gradient, sum(w * g for w, (_, g) in zip(weights, parts, strict=True)))
    smoothed, _ = run(logits, labels, loss=["sigmoid"], loss_options=[{"label_smoothing": 0.1}], **options)
    alone, _ = run(logits, labels, loss="sigmoid", loss_options={"label_smoothing": 0.1}, **options)
    torch.testing.assert_close(smoothed.loss, alone.loss)


def test_stats_and_trl_names():
    logits, labels, ref_logits, _ = make()
    out = fastpref.preference_loss(logits, labels, ref_logits=ref_logits, stats=STATS, shift=True)
    metrics = out.as_trl()
    assert set(metrics) == {
        "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins",
        "rewards/accuracies", "num_tokens", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy",
    }  # fmt: skip
    assert all(value.shape == () for value in metrics.values())
    kept = labels[:, 1:] != -100
    z = logits[:, :-1].double()
    log_p = torch.log_softmax(z, -1)
    expected = {
        "entropy": -(log_p.exp() * log_p).sum(-1)[kept].mean(),
        "logits/chosen": z.mean(-1)[:3][kept[:3]].mean(),
        "logits/rejected": z.mean(-1)[3:][kept[3:]].mean(),
        "mean_token_accuracy": (z.argmax(-1) == labels[:, 1:])[:3][kept[:3]].double().mean(),
        "num_tokens": kept.sum().double(),
        "rewards/margins": out.margins.mean().double(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)
    bare = fastpref.preference_loss(logits, labels, ref_logits=ref_logits).as_trl()
    assert not {"entropy", "logits/chosen", "mean_token_accuracy"} & set(bare)


@pytest.mark.numerics
def test_inplace_backward():
    leaf, labels, ref_logits, gap = make()
    leaf.requires_grad_()
    gradients = []
    for backend in (None, "reference"):
        for inplace in (False, True):
            leaf.grad = None
            logits = leaf * 1.0
            out = fastpref.preference_loss(
                logits,
                labels,
                ref_logits=ref_logits,
                rating_gap=gap,
                loss="rdpo",
                inplace_backward=inplace,
                backend=backend,
            )
            out.loss.backward(retain_graph=True)
            gradients.append(leaf.grad.clone())
            assert (logits._version > 0) == inplace
            if inplace:
                with pytest.raises(RuntimeError, match="inplace_backward=True has overwritten"):
                    out.loss.backward()
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=1e-6)


# ---- bad input ----


def test_errors_say_what_came():
    logits, labels, ref_logits, _ = make()

    def message(kind, text, *args, **kwargs):
        with pytest.raises(kind) as caught:
            fastpref.preference_loss(*args, **kwargs)
        assert text in str(caught.value), str(caught.value)

    good = {"ref_logits": ref_logits}
    message(ValueError, "got 'sigmod'; nearest names: 'sigmoid'", logits, labels, loss="sigmod", **good)
    message(ValueError, "sigmoid needs ref_chosen_logps", logits, labels)
    message(ValueError, "rdpo needs rating_gap (one float per pair); got None", logits, labels, loss="rdpo", **good)
    message(
        ValueError,
        "rating_gap must have shape [3] (one per pair), got [4]",
        logits,
        labels,
        rating_gap=torch.ones(4),
        **good,
    )
    message(TypeError, "pair_weights must be a floating-point tensor, got torch.int64", logits, labels,
            pair_weights=torch.ones(3, dtype=torch.long), **good)  # fmt: skip
    message(ValueError, "an even number, got 5 sequences", logits[:5], labels[:5], ref_logits=ref_logits[:5])
    message(ValueError, "the reference must be given in one form, got ref_logits and ref_logps", logits, labels,
            ref_logps=torch.ones(6), **good)  # fmt: skip
    message(ValueError, "ref_logits must have shape [6, 9, 40] like logits, got [6, 8, 40]", logits, labels,
            ref_logits=ref_logits[:, 1:])  # fmt: skip
    message(
        ValueError, "ref_logps must have shape [6] (one per sequence), got [3]", logits, labels, ref_logps=torch.ones(3)
    )
    message(ValueError, "ref_token_logps must have shape [6, 9] like labels, got [6, 10]", logits, labels,
            ref_token_logps=torch.ones(6, 10))  # fmt: skip
    message(
        ValueError,
        "reduction must be one of ('mean', 'sum', 'none'), got 'avg'",
        logits,
        labels,
        reduction="avg",
        **good,
    )
    message(ValueError, "num_items replaces the divisor", logits, labels, reduction="sum", num_items=3, **good)
    message(ValueError, "loss_weights needs a list of losses", logits, labels, loss_weights=[1.0], **good)
    message(ValueError, "loss_weights must be a list with one entry per loss (2)", logits, labels,
            loss=["sigmoid", "sft"], loss_weights=[1.0], **good)  # fmt: skip
    message(ValueError, "beta must be positive and finite, got -0.1", logits, labels, beta=-0.1, **good)
    message(ValueError, "num_items must be positive and finite, got -3", logits, labels, num_items=-3, **good)
    message(ValueError, "num_items must be a number or a scalar tensor, got shape [3]", logits, labels,
            num_items=torch.ones(3), **good)  # fmt: skip
    message(TypeError, "loss_options must be a mapping for a single loss, got list", logits, labels, loss_options=[{}],
            **good)  # fmt: skip
    message(ValueError, "labels must have shape [sequences, tokens], or [tokens] with cu_seqlens, got [54]",
            logits.view(-1, 40), labels.view(-1), ref_logits=ref_logits.view(-1, 40))  # fmt: skip
    packed = {"ref_logits": ref_logits.view(-1, 40)}
    for bad in ([0, 9, 18], [1, 54], [0, 30, 20, 54, 54], [0, 60, 54]):
        message(ValueError, f"cu_seqlens must rise from 0 to the number of tokens 54, got {bad}",
                logits.view(-1, 40), labels.view(-1), cu_seqlens=torch.tensor(bad), **packed)  # fmt: skip
    message(TypeError, "cu_seqlens must be int64 or int32, got torch.float32", logits.view(-1, 40), labels.view(-1),
            cu_seqlens=torch.tensor([0.0, 54.0]), **packed)  # fmt: skip
    message(ValueError, "lengths must have shape [6] (one per sequence), got [3]", logits, labels,
            lengths=torch.ones(3, dtype=torch.long), **good)  # fmt: skip
    message(ValueError, "a loss on part of the completion needs the reference per token", logits, labels, loss="ld_dpo",
            ref_logps=torch.ones(6))  # fmt: skip
    message(ValueError, "labels must lie in [0, 40)", logits, labels.clamp(min=40), **good)


# ---- torch citizenship ----


@pytest.mark.parametrize(
    "packed, backend", [(False, "native"), (True, "native"), pytest.param(True, "triton", marks=pytest.mark.triton)]
)
def test_opcheck(packed, backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    logits, labels, ref_logits, gap = make()
    cu_seqlens = torch.arange(0, 55, 9) if packed else None
    if packed:
        logits, labels, ref_logits = logits.view(-1, 40), labels.view(-1), ref_logits.view(-1, 40)
    else:
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)  # a permuted layout
    lengths = None if packed else torch.tensor([9, 0, 4, 9, 8, 2])
    layout, transform = (labels, cu_seqlens, lengths, not packed), (0.7, None, 1.0, -100)
    reduction = "none" if packed else "mean"
    weights, items = (None, torch.tensor(7.0)) if packed else (torch.rand(3), None)
    numbers = torch.tensor([0.1, 1.0, 0.0, 0.5, 0.0, 1.0, 0.3, 0.0], dtype=torch.float64)
    references, pair_data = (ref_logits, None, None), (gap, weights, items, reduction)
    args = (logits, *layout, *references, *pair_data, *transform, True, packed, numbers, True, backend)
    torch.library.opcheck(preference_fwd, args)
    out = _Outputs(*preference_fwd(*args))
    assert (out.tail.shape == out.tail_begin.shape == out.logps.shape) == packed
    tail = (torch.randn(6), out.tail_begin) if packed else (None, None)
    by_sequence = (torch.randn_like(out.loss), out.coefficients, *tail)
    saved = (*layout, out.token_logps, out.lse, *transform, backend)
    torch.library.opcheck(preference_bwd, (*by_sequence, logits, *saved))
    torch.library.opcheck(preference_bwd_, (*by_sequence, logits.contiguous(), *saved))


def test_the_operator_has_no_tails_of_a_reference_by_sums():
    logits, labels, _, _ = make()
    numbers = torch.tensor([1.0, *[0.0] * 7], dtype=torch.float64)
    layout, references, pair_data = (labels, None, None, False), (None, None, torch.rand(6)), (None, None, None, "none")
    with pytest.raises(ValueError, match="tail needs the reference per token, got ref_logps"):
        preference_fwd(logits, *layout, *references, *pair_data, 1.0, None, 1.0, -100, False, True, numbers, False, "")


@pytest.mark.parametrize("loss", ["sigmoid", "rdpo", "ipo", "wpo", "ld_dpo", "aot", "kto", "orpo"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_breaks(loss, packed):
    torch._dynamo.reset()
    logits, labels, ref_logits, gap = make()
    cu_seqlens = torch.arange(0, 55, 9) if packed else None
    if packed:
        logits, labels, ref_logits = logits.view(-1, 40), labels.view(-1), ref_logits.view(-1, 40)

    def step(x):
        out = fastpref.preference_loss(
            x, labels, ref_logits=ref_logits, loss=loss, rating_gap=gap, shift=True, cu_seqlens=cu_seqlens,
            stats=("entropy",),
        )  # fmt: skip
        return out.loss, out.as_trl()

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = logits.detach().clone().requires_grad_()
        loss_value, metrics = f(x)
        loss_value.backward()
        results.append((loss_value.detach(), metrics, x.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("loss", ["wpo", "ld_dpo"])
def test_compiles_with_dynamic_shapes(loss):
    torch._dynamo.reset()

    def step(logits, labels, ref_logits):
        return fastpref.preference_loss(logits, labels, ref_logits=ref_logits, loss=loss, shift=True).loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for pairs, tokens in ((3, 9), (2, 5), (4, 17)):
        logits, labels, ref_logits, _ = make(pairs, tokens)
        results = []
        for f in (step, compiled):
            x = logits.clone().requires_grad_()
            value = f(x, labels, ref_logits)
            value.backward()
            results.append((value.detach(), x.grad))
        torch.testing.assert_close(*results)


def test_new_lengths_do_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(logits, labels, ref_logits, gap):
        return fastpref.preference_loss(logits, labels, ref_logits=ref_logits, loss="rdpo", rating_gap=gap).loss

    for tokens in (5, 6, 7, 11, 30):
        logits, labels, ref_logits, gap = make(tokens=tokens)
        step(logits.requires_grad_(), labels, ref_logits, gap).backward()
    assert counter.frame_count <= 2


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_no_value_is_read_on_the_host(loss):
    logits, labels, ref_logits, gap = make()
    logits.requires_grad_()
    with _NoHostReads():
        out = fastpref.preference_loss(
            logits, labels, ref_logits=ref_logits, loss=loss, rating_gap=gap, scores=torch.rand(6), stats=STATS,
            num_items=torch.tensor(3.0), shift=True,
        )  # fmt: skip
        out.as_trl()
        out.loss.backward()


def test_double_backward_is_refused():
    logits, labels, ref_logits, _ = make()
    logits.requires_grad_()
    out = fastpref.preference_loss(logits, labels, ref_logits=ref_logits)
    (gradient,) = torch.autograd.grad(out.loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_no_gradient_reaches_the_reference():
    logits, labels, ref_logits, _ = make()
    ref_logits.requires_grad_()
    for backend in (None, "reference"):
        out = fastpref.preference_loss(logits.detach().requires_grad_(), labels, ref_logits=ref_logits, backend=backend)
        out.loss.backward()
        assert ref_logits.grad is None


def test_autocast_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    _, labels, ref_logits, gap = make()
    hidden, weight = torch.randn(6, 9, 16), torch.randn(16, 40, requires_grad=True)

    def step(w):
        return fastpref.preference_loss(hidden @ w, labels, ref_logits=ref_logits, loss="rdpo", rating_gap=gap).loss

    gradients = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (step(weight), checkpoint(step, weight, use_reentrant=False)):
            assert loss.dtype == torch.float32
            gradients.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_two_ranks_equal_one(two_ranks):
    body = """
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 30)
        hidden, labels = torch.randn(8, 6, 8), torch.randint(0, 30, (8, 6))
        reference = -torch.rand(8) * 20
    """
    by_rank = two_ranks(
        body
        + """
        model = torch.nn.parallel.DistributedDataParallel(model)
        mine = [2 * rank, 2 * rank + 1, 4 + 2 * rank, 5 + 2 * rank]
        # the global number of pairs divides; DDP averages over ranks
        out = fastpref.preference_loss(model(hidden[mine]), labels[mine], ref_logps=reference[mine], num_items=4)
        (2 * out.loss).backward()
        result = [p.grad for p in model.parameters()]
    """
    )
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 30)
    hidden, labels = torch.randn(8, 6, 8), torch.randint(0, 30, (8, 6))
    reference = -torch.rand(8) * 20
    fastpref.preference_loss(model(hidden), labels, ref_logps=reference).loss.backward()
    for gradients in by_rank:
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.sanitize
@settings(deadline=None, max_examples=40)
@given(
    pairs=st.integers(0, 4),
    tokens=st.integers(1, 8),
    loss=st.sampled_from([*FUSED, "wpo", "ld_dpo"]),
    seed=st.integers(0, 2**31),
    masked=st.floats(0, 1),
)
def test_any_batch(pairs, tokens, loss, seed, masked):
    torch.manual_seed(seed)
    logits, labels, ref_logits, gap = make(pairs, tokens)
    labels[torch.rand(labels.shape) < masked] = -100
    options = {"loss": loss, "rating_gap": gap, "ref_logits": ref_logits}
    fused, gradient = run(logits, labels, **options)
    vectors, expected = run(logits, labels, backend="reference", **options)
    torch.testing.assert_close(fused.loss, vectors.loss, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    # swapping the sides of every pair and the sign of its gap flips margins and leaves rewards in place
    order = torch.arange(2 * pairs).roll(pairs)
    swapped, _ = run(logits[order], labels[order], **{**options, "ref_logits": ref_logits[order], "rating_gap": -gap})
    torch.testing.assert_close(swapped.margins, -fused.margins)


# ---- on a GPU ----


def on(device, *tensors):
    return [t.to(device) for t in tensors]


@pytest.mark.cuda
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_cuda_is_cpu(loss, packed):
    logits, labels, ref_logits, gap = make()
    gap = gap.nan_to_num(0.3)
    cu_seqlens = None
    if packed:
        cu_seqlens = torch.arange(0, 55, 9)
        logits, labels, ref_logits = logits.view(-1, 40), labels.view(-1), ref_logits.view(-1, 40)
    options = {"loss": loss, "shift": True, "stats": STATS}
    if loss == "beta_dpo":
        options["loss_options"] = {"keep": 1.0}
    results = []
    for device in ("cpu", "cuda"):
        x, y, r, g, s = on(device, logits, labels, ref_logits, gap, torch.linspace(0, 1, 6))
        cu = None if cu_seqlens is None else cu_seqlens.to(device)
        out, gradient = run(x, y, ref_logits=r, rating_gap=g, scores=s, cu_seqlens=cu, **options)
        results.append((out.loss.detach().cpu(), gradient.cpu(), {k: v.cpu() for k, v in out.as_trl().items()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


gpu_backends = pytest.mark.parametrize("backend", ["native", "triton"])


@pytest.mark.cuda
@gpu_backends
@pytest.mark.parametrize("loss", ["sigmoid", "rdpo", "ipo", "simpo", "ld_dpo", "wpo"])
def test_a_step_is_captured_in_a_cuda_graph(loss, backend):
    """Which also proves that no value is read on the host: a capture refuses that."""
    x, labels, ref_logits, gap = on("cuda", *make())
    x.requires_grad_()

    def step():
        out = fastpref.preference_loss(
            x, labels, ref_logits=None if loss == "simpo" else ref_logits, loss=loss, rating_gap=gap, shift=True,
            stats=STATS, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss, x)
        return out.loss.detach(), gradient, out.as_trl()["rewards/margins"]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):  # the second time the tickets are not those of a fresh allocation
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        gap.copy_(torch.randn_like(gap))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, step(), rtol=1e-5, atol=1e-6)


def large_batch(device):
    """Whose step takes long enough to overlap with another."""
    labels = torch.randint(0, 32000, (8, 256), device=device)
    return torch.randn(8, 256, 32000, device=device, dtype=torch.bfloat16), labels


def whole_step(logits, labels, backend):
    x = logits.detach().requires_grad_()
    out = fastpref.preference_loss(x, labels, ref_logps=-torch.ones(8, device=x.device), backend=backend)
    return out.loss.detach(), torch.autograd.grad(out.loss, x)[0]


@pytest.mark.cuda
@gpu_backends
def test_two_streams_at_once(backend):
    batches = [large_batch("cuda") for _ in range(2)]
    alone = [whole_step(*batch, backend) for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    for _ in range(3):
        found = []
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(whole_step(*batch, backend))
        torch.cuda.synchronize()
        for a, b in zip(found, alone, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@gpu_backends
def test_a_device_that_is_not_the_current_one(backend):
    batch = large_batch("cuda:0")
    expected = whole_step(*batch, backend)
    found = whole_step(*(t.to("cuda:1") for t in batch), backend)
    assert torch.equal(found[0].cpu(), expected[0].cpu()) and torch.equal(found[1].cpu(), expected[1].cpu())


@pytest.mark.cuda
def test_no_host_sync_on_cuda():
    x, labels, ref_logits, gap = on("cuda", *make())
    x.requires_grad_()
    options = {"ref_logits": ref_logits, "rating_gap": gap, "shift": True, "stats": STATS}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss in ("sigmoid", "rdpo", "ipo"):
            out = fastpref.preference_loss(x, labels, loss=loss, **options)
            out.as_trl()
            out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
