"""linear_preference_loss against preference_loss on materialised logits; what each plan costs; citizenship of torch."""

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import TRANSFORMS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerance import assert_no_worse, unit_roundoff
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastpref
from fastpref import losses
from fastpref._logps import linear_logps
from fastpref._logps.preference import PreferenceOutput, PreferenceStats
from fastpref._logps.token_logps import STATS


class Batch(NamedTuple):
    hidden: Tensor  # [2B, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [2B, T]
    ref_hidden: Tensor
    ref_weight: Tensor
    bias: Tensor  # [V]
    adapter_a: Tensor  # [r, H]
    adapter_b: Tensor  # [V, r]
    gap: Tensor  # [B]
    scores: Tensor  # [2B]

    def to(self, dtype):
        return Batch(*(t.to(dtype) if t.is_floating_point() else t for t in self))

    @property
    def reference(self):
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}


def make(pairs=3, tokens=9, width=16, vocab=37, dtype=torch.float64, ignored=0.3) -> Batch:
    labels = torch.randint(0, vocab, (2 * pairs, tokens))
    labels[torch.rand(labels.shape) < ignored] = -100
    gap = torch.randn(pairs)
    if pairs > 1:
        gap[1] = torch.nan
    hidden, ref_hidden = torch.randn(2, 2 * pairs, tokens, width)
    weight, ref_weight = torch.randn(2, vocab, width) * 2 / width**0.5
    adapter = torch.randn(2, width) / width**0.5, torch.randn(vocab, 2)
    return Batch(
        hidden, weight, labels, ref_hidden, ref_weight, torch.randn(vocab), *adapter, gap, torch.rand(2 * pairs)
    ).to(dtype)


HEAD = ("bias", "adapter_a", "adapter_b")


def leaves(batch, trained, used=()):
    """Copies of the inputs a call gets; those in `trained` want a gradient."""
    names = dict.fromkeys(("hidden", "weight", *used, *trained))
    return {name: getattr(batch, name).detach().clone().requires_grad_(name in trained) for name in names}


def head_options(leaf):
    adapter = (leaf["adapter_a"], leaf["adapter_b"]) if "adapter_a" in leaf else None
    return {"bias": leaf.get("bias"), "adapter": adapter}


def run(batch, trained=("hidden", "weight"), used=(), upstream=1.0, **options):
    leaf = leaves(batch, trained, used)
    out = fastpref.linear_preference_loss(leaf["hidden"], leaf["weight"], batch.labels, **head_options(leaf), **options)
    (out.loss * upstream).sum().backward()
    return out, {name: leaf[name].grad for name in trained}


def project(hidden, weight, bias=None, adapter=None):
    logits = F.linear(hidden, weight, bias)
    return logits if adapter is None else logits + hidden @ adapter[0].mT @ adapter[1].mT


def plain(batch, trained=("hidden", "weight"), used=(), upstream=1.0, max_tile_bytes=None, **options):
    """The same by way of the logits. The reference has its own head, or the policy's, and never an adapter."""
    leaf = leaves(batch, trained, used)
    logits = project(leaf["hidden"], leaf["weight"], **head_options(leaf))
    ref_hidden, ref_weight, ref_bias = (options.pop(f"ref_{name}", None) for name in ("hidden", "weight", "bias"))
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = leaf["weight"], leaf.get("bias")
        options["ref_logits"] = project(ref_hidden, ref_weight, ref_bias).detach()
    out = fastpref.preference_loss(logits, batch.labels, **options)
    (out.loss * upstream).sum().backward()
    return out, {name: leaf[name].grad for name in trained}


def assert_same(got, expected, tolerance=1e-10):
    (out, gradients), (true, true_gradients) = got, expected

    def close(name, value, truth, size=1.0):
        # statistics of tokens are float32 in any case
        allowed = max(tolerance, 2e-6) if truth.dtype == torch.float32 else tolerance
        torch.testing.assert_close(
            value / size, truth / size, rtol=allowed, atol=allowed, msg=lambda text: f"{name}: {text}"
        )

    assert type(out) is PreferenceOutput
    assert type(out.stats) is PreferenceStats
    for name, value, truth in zip(PreferenceOutput._fields[:-1], out[:-1], true[:-1], strict=True):
        close(name, value, truth)
    for name, value, truth in zip(PreferenceStats._fields, out.stats, true.stats, strict=True):
        assert (value is None) == (truth is None), name
        if truth is not None:
            close(name, value, truth)
    assert gradients.keys() == true_gradients.keys()
    for name, truth in true_gradients.items():
        size = truth.abs().max().clamp(min=1) if truth.numel() else 1.0
        close(f"gradient of {name}", gradients[name], truth, size)


def assert_gradients_no_worse(gradients, same, truth, dtype):
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        if name in ("hidden", "weight"):
            rows = [g.reshape(-1, g.shape[-1]) for g in (gradient, same[name], truth[name])]
            assert_no_worse(*rows, dtype, f"gradient of {name}")
        else:  # too few rows for PyTorch's own error to be a statistic
            error, same_error = ((g.cpu().double() - truth[name]).abs().max() for g in (gradient, same[name]))
            assert error <= 2 * same_error + 16 * unit_roundoff(dtype) * truth[name].abs().max(), name


def references(batch, **options):
    """The same reference in each of its forms."""
    tokens = fastpref.token_logps(project(batch.ref_hidden, batch.ref_weight), batch.labels, **options)
    sums = fastpref.sequence_logps(tokens, batch.labels, **options).sums
    return {
        "ref_hidden": batch.reference,
        "ref_token_logps": {"ref_token_logps": tokens},
        "ref_logps": {"ref_logps": sums},
        "none": {},
    }


def uncoupled(pairs, scale=0.3):
    """A user's loss; unmarked, it must see the whole batch at once."""
    return F.softplus(-scale * (pairs.chosen_logratios - pairs.rejected_logratios))


def coupled(pairs):
    delta = pairs.chosen_logratios - pairs.rejected_logratios
    return F.softplus(-0.1 * (delta - delta.mean()))


@losses.pair_separable
def separable(pairs, scale=0.3):
    return uncoupled(pairs, scale)


# What is trained, and the reduction, decide the plan.
PLANS = {
    "pair_resident": (("hidden", "weight"), "mean"),
    "pair_resident-head": (("hidden", "weight", *HEAD), "mean"),
    "pair_resident-no_hidden": (("weight",), "sum"),
    "unit": (("hidden",), "mean"),
    "unit-none": (("hidden",), "none"),
    "recompute": (("hidden", "weight"), "none"),
    "recompute-head": (("hidden", "weight", *HEAD), "none"),
    "frozen_weight-head": (("hidden", *HEAD), "mean"),
    "frozen_weight-head-none": (("hidden", *HEAD), "none"),
    "bias_only": (("bias",), "mean"),
    "adapter_only": (("adapter_a", "adapter_b"), "mean"),
    "adapter_b_only": (("hidden", "adapter_b"), "mean"),
}
plans = pytest.mark.parametrize("which", PLANS)
# Bytes, against 54 rows of 37 logits: one row at a time; a part of a sequence; about a pair; all of it.
BUDGETS = (1, 1500, 6000, None)
budgets = pytest.mark.parametrize("budget", BUDGETS)


def chosen_plan(which):
    trained, reduction = PLANS[which]
    used = HEAD if set(HEAD) & set(trained) else ()
    return {"trained": trained, "used": used, "reduction": reduction}


# ---- against materialised logits ----


@pytest.mark.parametrize("budget", [1500, None])
@pytest.mark.parametrize("trained", [("hidden", "weight", *HEAD), ("hidden",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_every_loss(loss, trained, budget):
    batch = make(pairs=5)

    def options():
        draw = {"generator": torch.Generator().manual_seed(11), "keep": 0.6}
        return {
            "loss": loss, "loss_options": draw if loss == "beta_dpo" else None, "rating_gap": batch.gap,
            "scores": batch.scores, "stats": STATS, "trained": trained, **batch.reference,
        }  # fmt: skip

    assert_same(run(batch, max_tile_bytes=budget, **options()), plain(batch, **options()))


@budgets
@plans
def test_every_plan(which, budget):
    """Upstream gradients, transforms, ratings and weights reach every plan, whatever the groups."""
    batch = make(pairs=4)
    options = {
        **chosen_plan(which), **TRANSFORMS["softcap"], **batch.reference, "loss": "rdpo", "rating_gap": batch.gap,
        "pair_weights": torch.tensor([1.0, 0.0, 2.5, 0.5]), "stats": ("entropy", "mean_logit"), "beta": 0.4,
    }  # fmt: skip
    upstream = torch.randn(4, dtype=torch.float64) if options["reduction"] == "none" else 3.0
    assert_same(
        run(batch, upstream=upstream, max_tile_bytes=budget, **options), plain(batch, upstream=upstream, **options)
    )


@pytest.mark.parametrize("reference", ["ref_hidden", "ref_token_logps", "ref_logps", "none"])
@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_every_form_of_the_reference(which, reference):
    batch = make()
    options = {**chosen_plan(which), **references(batch)[reference], "max_tile_bytes": 1500}
    if reference == "none":
        options["loss"] = "simpo"
    assert_same(run(batch, **options), plain(batch, **options))


@plans
def test_the_reference_shares_the_head_by_default(which):
    batch = make()
    options = {**chosen_plan(which), "ref_hidden": batch.ref_hidden, "max_tile_bytes": 1500}
    assert_same(run(batch, **options), plain(batch, **options))
    # a head of its own takes no bias from the policy's
    for ref_bias in (None, torch.randn(37, dtype=torch.float64)):
        own = {**options, "ref_weight": batch.ref_weight, "ref_bias": ref_bias}
        assert_same(run(batch, **own), plain(batch, **own))


def test_no_gradient_reaches_the_reference_or_the_ratings():
    batch = make()
    others = {
        "ref_hidden": batch.ref_hidden, "ref_weight": batch.ref_weight, "ref_bias": batch.bias.clone(),
        "rating_gap": batch.gap, "pair_weights": torch.rand(3, dtype=torch.float64),
    }  # fmt: skip
    for value in others.values():
        value.requires_grad_()
    for which in ("pair_resident", "unit", "recompute"):
        run(batch, **chosen_plan(which), loss="rdpo", **others)
        assert all(value.grad is None for value in others.values())


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_a_reference_of_another_size_and_precision(which):
    """Another model: its hidden size is its own, only the vocabulary is the same."""
    batch = make(dtype=torch.float32)
    ref_hidden, ref_weight = torch.randn(6, 9, 24), torch.randn(37, 24) / 3
    plan_ = chosen_plan(which)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 2e-3)):
        reference = {"ref_hidden": ref_hidden.to(dtype), "ref_weight": ref_weight.to(dtype)}
        exact = {name: t.double() for name, t in reference.items()}
        expected, true_gradients = plain(batch.to(torch.float64), **plan_, **exact)
        out, gradients = run(batch, max_tile_bytes=1500, **plan_, **reference)
        torch.testing.assert_close(out.margins.double(), expected.margins, rtol=0, atol=max(1e-5, 10 * bound))
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient.double(), true_gradients[name], rtol=1e-3, atol=2 * bound)


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute", "frozen_weight-head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend(backend, dtype, which):
    on = backend.device
    batch = Batch(*(t.to(on) for t in make(pairs=2, tokens=5, vocab=21, dtype=dtype)))
    exact = batch.to(torch.float64)
    options = {**chosen_plan(which), "loss": "rdpo"}
    truth, true_gradients = plain(exact, **options, rating_gap=exact.gap, **exact.reference)
    for budget in (300, None):
        out, gradients = run(
            batch,
            backend=backend.name,
            max_tile_bytes=budget,
            **options,
            rating_gap=batch.gap.double(),
            **batch.reference,
        )
        torch.testing.assert_close(out.loss.double(), truth.loss, rtol=0, atol=1e-5)
        for name, gradient in gradients.items():
            size = true_gradients[name].abs().max()
            rounding = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(gradient.double() / size, true_gradients[name] / size, rtol=0, atol=rounding)


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute", "frozen_weight-head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(dtype, which):
    batch = make(pairs=4, tokens=40, width=64, vocab=503).to(dtype)
    # a small beta: the few coefficients of the pairs, which all rows share, are no statistic
    options = {**chosen_plan(which), "loss": "rdpo", "rating_gap": batch.gap.double(), "beta": 0.02}
    exact = batch.to(torch.float64)
    truth, true_gradients = plain(exact, **options, **exact.reference)
    _, same_gradients = plain(batch, **options, **batch.reference)
    for budget in (40_000, None):
        out, gradients = run(batch, max_tile_bytes=budget, **options, **batch.reference)
        assert out.loss.dtype == torch.float32
        # log-probs are exact products whatever the inputs' dtype
        torch.testing.assert_close(out.loss.double(), truth.loss, rtol=0, atol=1e-5)
        for name in ("chosen_logps", "rejected_logps", "margins"):
            torch.testing.assert_close(getattr(out, name).double(), getattr(truth, name), rtol=1e-6, atol=5e-5)
        assert_gradients_no_worse(gradients, same_gradients, true_gradients, dtype)


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_logits_are_what_a_rounding_head_gives(dtype, which):
    batch = make(pairs=8, tokens=40, width=64, vocab=503).to(dtype)
    exact = batch.to(torch.float64)
    options = {**chosen_plan(which), "beta": 0.3}
    truth, true_gradients = plain(exact, **options, **exact.reference)
    same, same_gradients = plain(batch, **options, **batch.reference)
    out, gradients = run(batch, logits_dtype=dtype, **options, **batch.reference)
    rewards = [torch.cat([o.chosen_rewards, o.rejected_rewards])[None] for o in (out, same, truth)]
    assert_no_worse(*rewards, torch.float32, "rewards")
    assert_gradients_no_worse(gradients, same_gradients, true_gradients, dtype)


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_keep_their_gradient(dtype, which):
    """Logits beyond the largest float16: tokens are certain or impossible, their gradients exact but for rounding."""
    batch = make(pairs=2, tokens=20, width=64, vocab=203).to(dtype)
    batch = batch._replace(hidden=batch.hidden * 2.0**17, ref_hidden=batch.ref_hidden * 2.0**17)
    options = {**chosen_plan(which), "beta": 1e-6}
    exact = batch.to(torch.float64)
    truth, true_gradients = plain(exact, **options, **exact.reference)
    out, gradients = run(batch, **options, **batch.reference)
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)
    top = F.linear(exact.hidden, exact.weight).topk(2, -1).values
    certain = top[..., 0] - top[..., 1] > 30
    got, expected = gradients["hidden"].double()[certain], true_gradients["hidden"][certain]
    worst = (got - expected).abs().max() / expected.abs().max()
    assert worst <= 0.01
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name


# ---- equal everywhere ----


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute", "frozen_weight-head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_policy_and_reference_cost_ln_2(dtype, which):
    """Whatever the plan and budget, and whatever those of the pass that scored the reference."""
    batch = make(pairs=3, tokens=160, width=32, vocab=1009).to(dtype)
    options = chosen_plan(which)
    own = {"bias": batch.bias, "adapter": (batch.adapter_a, batch.adapter_b)} if options["used"] else {}
    row = 4 * 1009
    scored = []
    if not options["used"]:  # the reference has no adapter
        scored.append({"ref_hidden": batch.hidden})
        scored.append({"ref_hidden": batch.hidden, "ref_weight": batch.weight})
    for budget in (7 * row, 100 * row, None):
        with torch.no_grad():
            score = fastpref.linear_preference_loss(
                batch.hidden, batch.weight, batch.labels, loss="simpo", max_tile_bytes=budget, **own
            )
            tokens = fastpref.linear_token_logps(batch.hidden, batch.weight, batch.labels, max_tile_bytes=budget, **own)
        scored.append({"ref_logps": torch.cat([score.chosen_logps, score.rejected_logps])})
        scored.append({"ref_token_logps": tokens})
    for reference in scored:
        for budget in (11 * row, 300 * row, None):
            out, _ = run(batch, max_tile_bytes=budget, **options, **reference)
            torch.testing.assert_close(
                out.loss.double(), torch.full_like(out.loss, math.log(2)).double(), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scoring_and_every_plan_give_one_log_prob(dtype):
    batch = make(pairs=3, tokens=60, width=32, vocab=1009).to(dtype)
    sums = []
    for budget in (20_000, 400_000, None):
        with torch.no_grad():
            out = fastpref.linear_preference_loss(
                batch.hidden, batch.weight, batch.labels, loss="simpo", max_tile_bytes=budget
            )
            assert not out.loss.requires_grad
        sums.append(torch.cat([out.chosen_logps, out.rejected_logps]))
        for which in ("pair_resident", "unit", "recompute", "pair_resident-no_hidden"):
            out, _ = run(batch, **chosen_plan(which), loss="simpo", max_tile_bytes=budget)
            sums.append(torch.cat([out.chosen_logps, out.rejected_logps]))
    for other in sums[1:]:
        torch.testing.assert_close(other, sums[0], rtol=1e-7, atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=4).map(lambda half: half + half[::-1])
    | st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=4).map(lambda both: sum(both, ())),
    budget=st.integers(1, 30_000),
    loss=st.sampled_from(["rdpo", "ipo", "sft", "orpo", "aot", "wpo", "ld_dpo"]),
    which=st.sampled_from(sorted(PLANS)),
    shift=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(lengths=(0, 0), budget=1, loss="rdpo", which="pair_resident", shift=False, seed=0)
@example(lengths=(0, 9, 1, 0), budget=900, loss="ld_dpo", which="recompute", shift=True, seed=0)
def test_any_budget_is_one_group(lengths, budget, loss, which, shift, seed):
    torch.manual_seed(seed)
    batch, cu_seqlens = pack(make(pairs=len(lengths) // 2, tokens=12), lengths)
    options = {
        **chosen_plan(which), **batch.reference, "loss": loss, "rating_gap": batch.gap, "shift": shift,
        "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    expected = plain(batch, **options)
    for bytes_ in (budget, 1 << 30):
        assert_same(run(batch, max_tile_bytes=bytes_, **options), expected)


# ---- layouts ----


def pack(batch, lengths) -> tuple[Batch, Tensor]:
    """The first lengths[s] tokens of each sequence behind one another, and cu_seqlens."""

    def packed(padded):
        return torch.cat([padded[:0, 0], *(row[:n] for row, n in zip(padded, lengths, strict=True))])

    cu_seqlens = F.pad(torch.tensor(lengths, dtype=torch.long).cumsum(0), (1, 0))
    rows = {name: packed(getattr(batch, name)) for name in ("hidden", "ref_hidden", "labels")}
    return batch._replace(**rows), cu_seqlens


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("loss", ["rdpo", "ld_dpo", "ipo", "wpo", "aot"])
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
def test_packed_is_padded(trained, loss, shift):
    batch = make()
    lengths = [9, 4, 1, 7, 0, 9]  # one token, none at all
    options = {"loss": loss, "rating_gap": batch.gap, "shift": shift, "stats": STATS, "trained": trained}
    padded = {**options, **batch.reference, "lengths": torch.tensor(lengths)}
    expected = plain(batch, **padded)
    packed, cu_seqlens = pack(batch, lengths)
    for budget in (1500, None):
        assert_same(run(batch, max_tile_bytes=budget, **padded), expected)
        for dtype in (torch.int32, torch.int64):
            out, gradients = run(
                packed, cu_seqlens=cu_seqlens.to(dtype), max_tile_bytes=budget, **options, **packed.reference
            )
            back = torch.zeros_like(batch.hidden)
            for row, gradient in zip(back, gradients["hidden"].split(lengths), strict=True):
                row[: len(gradient)] = gradient
            assert_same((out, {**gradients, "hidden": back}), expected)


@pytest.mark.parametrize(
    "lengths",
    [
        [200, 3, 1, 2, 150, 1],
        [1, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 1],
        [0, 0, 90, 0, 0, 0],
        [90, 0, 60, 0],  # a pair larger than the tile, then one of nothing
        [0, 90, 0, 0, 60, 0],
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_very_unequal_lengths(which, lengths):
    batch, cu_seqlens = pack(make(pairs=len(lengths) // 2, tokens=200, ignored=0), lengths)
    for loss in ("sigmoid", "ipo", "ld_dpo"):
        options = {**chosen_plan(which), **batch.reference, "loss": loss, "cu_seqlens": cu_seqlens, "stats": STATS}
        expected = plain(batch, **options)
        for budget in BUDGETS:
            assert_same(run(batch, max_tile_bytes=budget, **options), expected)


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_ignored_positions_are_not_read(which):
    batch = make()
    ignored = (batch.labels == -100).unsqueeze(-1)
    bad = batch._replace(
        hidden=batch.hidden.masked_fill(ignored, torch.nan), ref_hidden=batch.ref_hidden.masked_fill(ignored, torch.inf)
    )
    options = {**chosen_plan(which), "stats": STATS}
    got = run(bad, **options, **bad.reference)
    assert_same(got, plain(batch, **options, **batch.reference))
    if "hidden" in got[1]:
        assert (got[1]["hidden"].masked_select(ignored) == 0).all()


@pytest.mark.parametrize("ignore_index", [-1, 0, 36])
def test_any_index_may_be_ignored(ignore_index):
    """A token of the vocabulary too."""
    batch = make()
    batch = batch._replace(labels=batch.labels.masked_fill(batch.labels == -100, ignore_index).int())
    options = {**batch.reference, "ignore_index": ignore_index}
    assert_same(run(batch, **options), plain(batch, **options))


@plans
@pytest.mark.parametrize("loss", ["rdpo", "aot", "ipo"])
def test_nothing_to_score(which, loss):
    """All positions ignored, then no pairs at all: a differentiable loss, and gradients of zero."""
    batch = make()
    batch = batch._replace(labels=torch.full_like(batch.labels, -100), gap=batch.gap.nan_to_num(0.0) * 0)
    options = {**chosen_plan(which), "loss": loss, "stats": STATS}
    out, gradients = run(batch, rating_gap=batch.gap, **options, **batch.reference)
    assert_same((out, gradients), plain(batch, rating_gap=batch.gap, **options, **batch.reference))
    assert out.loss.requires_grad
    assert all((gradient == 0).all() for gradient in gradients.values())

    empty = make(pairs=0)
    assert_same(
        run(empty, rating_gap=empty.gap, **options, **empty.reference),
        plain(empty, rating_gap=empty.gap, **options, **empty.reference),
    )


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_no_pairs(loss):
    empty = make(pairs=0)
    out, gradients = run(empty, loss=loss, rating_gap=empty.gap, scores=empty.scores, **empty.reference)
    assert out.loss == 0
    assert (gradients["weight"] == 0).all()
    packed, cu_seqlens = pack(empty, [])
    out, _ = run(
        packed, cu_seqlens=cu_seqlens, loss=loss, rating_gap=empty.gap, scores=empty.scores, **packed.reference
    )
    assert out.loss == 0


def test_strides_are_taken_as_they_are():
    batch = make(pairs=2, tokens=6)
    expected = plain(batch, **batch.reference)
    wide = torch.randn(4, 8, 20, dtype=torch.float64)
    wide[:, 1:7, 2:18] = batch.hidden
    hiddens = [
        wide[:, 1:7, 2:18],
        batch.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        batch.hidden.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ]
    big = torch.randn(74, 40, dtype=torch.float64)
    big[::2, 3:19] = batch.weight
    weights = [batch.weight.t().contiguous().t(), big[::2, 3:19]]
    for hidden in hiddens:
        for weight in weights:
            for trained in (("hidden", "weight"), ("hidden",)):
                x = hidden.detach().requires_grad_()
                w = weight.detach().requires_grad_("weight" in trained)
                out = fastpref.linear_preference_loss(x, w, batch.labels, max_tile_bytes=1500, **batch.reference)
                out.loss.backward()
                gradients = {"hidden": x.grad, "weight": w.grad} if w.requires_grad else {"hidden": x.grad}
                assert_same((out, gradients), (expected[0], {name: expected[1][name] for name in trained}))


def test_inputs_are_left_alone():
    batch = make()
    before = [t.clone() for t in batch]
    versions = [t._version for t in batch]
    for which in PLANS:
        options = chosen_plan(which)
        leaf = {
            name: getattr(batch, name).detach().requires_grad_(name in options["trained"])
            for name in batch._fields[:8]
            if name != "labels"
        }
        used = {"bias": leaf["bias"], "adapter": (leaf["adapter_a"], leaf["adapter_b"])} if options["used"] else {}
        out = fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, reduction=options["reduction"], loss="rdpo",
            rating_gap=batch.gap, max_tile_bytes=1500, **used, **batch.reference,
        )  # fmt: skip
        out.loss.sum().backward()
    assert versions == [t._version for t in batch]
    for value, copy in zip(batch, before, strict=True):
        torch.testing.assert_close(value, copy, rtol=0, atol=0, equal_nan=True)


# ---- losses of a user, mixtures, options that couple pairs ----


def test_mixtures():
    batch = make()
    options = {"rating_gap": batch.gap, "stats": ("entropy",), **batch.reference}
    mixtures = [
        {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss": ["rdpo", "aot"], "loss_weights": [0.8, 0.2]},  # one coupled loss couples them all
        {"loss": ["ipo", separable], "loss_options": [{"beta": 0.3}, {"scale": 0.2}]},
        {"loss": ["sigmoid", coupled]},
        {"loss": ["wpo", "ld_dpo"]},
    ]
    for mixture in mixtures:
        for trained in (("hidden", "weight"), ("hidden",)):
            for budget in (1500, None):
                assert_same(
                    run(batch, trained, max_tile_bytes=budget, **mixture, **options),
                    plain(batch, trained, **mixture, **options),
                )


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("loss", [uncoupled, coupled, separable, losses.rdpo], ids=lambda f: f.__name__)
def test_callables(loss, trained):
    batch = make(pairs=4)
    seen = []

    def spy(pairs, **options):
        seen.append(pairs.chosen_logps.shape[0])
        return loss(pairs, **options)

    spy.separable = losses.traits(loss).separable
    spy.needs = losses.traits(loss).needs
    options = {"rating_gap": batch.gap, "loss_options": None if loss is coupled else {}, **batch.reference}
    for budget in (1, 1500, None):
        seen.clear()
        got = run(batch, trained, loss=spy, max_tile_bytes=budget, **options)
        if not spy.separable:
            assert set(seen) == {4}
        assert_same(got, plain(batch, trained, loss=loss, **options))
    scaled = {**options, "loss_options": {"scale": 0.7}}
    if loss in (uncoupled, separable):
        assert_same(run(batch, trained, loss=spy, **scaled), plain(batch, trained, loss=loss, **scaled))


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
def test_options_that_couple_pairs_are_not_sliced(trained):
    batch = make(pairs=4)
    vector = torch.randn(4, dtype=torch.float64)
    for loss, loss_options in (
        ("kto", {"z0": vector}),
        ("kto", {"z0": None}),
        ("kto", {"z0": 0.2}),
        ("modpo", {"margins": [vector]}),
        ("bco_pair", {"delta": "batch_mean"}),
        ("bco_pair", {"delta": vector}),
        ("wpo", {"base": "aot"}),
        ("sigmoid", {"f_divergence": "js_divergence"}),
        ("ipo", {"length_normalize": False}),
    ):
        options = {"loss": loss, "loss_options": loss_options, "trained": trained, **batch.reference}
        assert_same(run(batch, max_tile_bytes=1500, **options), plain(batch, **options))


@pytest.mark.parametrize("loss", [lambda pairs: pairs.chosen_logps.mean(), losses.pair_separable(lambda pairs: 1.0)])
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
def test_a_callable_must_return_one_loss_per_pair(loss, trained):
    batch = make()
    with pytest.raises(ValueError, match="must return one loss per pair"):
        run(batch, trained, loss=loss, max_tile_bytes=1500, **batch.reference)


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
def test_a_callable_without_a_gradient(trained):
    """It has nothing to train: told so by autograd, or zeros."""
    batch = make()
    constant = losses.pair_separable(lambda pairs: (pairs.chosen_logps * pairs.rejected_logps).detach())
    leaf = leaves(batch, trained)
    out = fastpref.linear_preference_loss(
        leaf["hidden"], leaf["weight"], batch.labels, loss=constant, max_tile_bytes=1500
    )
    torch.testing.assert_close(out.stats.losses, out.chosen_logps * out.rejected_logps)
    torch.testing.assert_close(out.loss.detach(), out.stats.losses.mean())
    if out.loss.requires_grad:
        out.loss.backward()
        assert all((leaf[name].grad == 0).all() for name in trained)


def test_a_callable_that_raises_leaves_nothing_behind():
    batch = make()

    @losses.pair_separable
    def broken(pairs):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run(batch, loss=broken, **batch.reference)
    assert_same(run(batch, **batch.reference), plain(batch, **batch.reference))


def test_rewards_are_those_of_the_loss():
    batch = make()
    for loss in ("sigmoid", "ipo", losses.sigmoid):
        own = {"loss": loss, "loss_options": {"beta": 0.5}, **batch.reference}
        assert_same(run(batch, **own), plain(batch, **own))


# ---- reductions, weights, accumulation ----


@pytest.mark.parametrize("budget", [1500, None])
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ("weight",)], ids="-".join)
def test_reductions_and_weights(trained, budget):
    batch = make(pairs=4)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    for loss in ("rdpo", "aot"):
        for options in (
            {"reduction": "sum"},
            {"reduction": "none"},
            {"pair_weights": weights},
            {"pair_weights": weights, "reduction": "sum"},
            {"pair_weights": weights.half(), "reduction": "none"},
            {"pair_weights": torch.zeros(4)},
            {"num_items": 7},
            {"num_items": torch.tensor(7.0), "pair_weights": weights},
        ):
            call = {"loss": loss, "rating_gap": batch.gap, "trained": trained, **options, **batch.reference}
            got = run(batch, max_tile_bytes=budget, **call)
            assert_same(got, plain(batch, **call))
            assert all(gradient.isfinite().all() for gradient in got[1].values())


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_upstream_gradients(which):
    """Any factor, and a loss mixed with others that use the same tensors."""
    batch = make()
    options = {**chosen_plan(which), **batch.reference}
    for upstream in (3.0, 0.0, -0.5, torch.tensor(2.0)):
        assert_same(run(batch, upstream=upstream, **options), plain(batch, upstream=upstream, **options))
    trained, reduction = PLANS[which]
    results = []
    for f in (fastpref.linear_preference_loss, materialised):
        leaf = leaves(batch, trained)
        out = f(leaf["hidden"], leaf["weight"], batch.labels, reduction=reduction, **batch.reference)
        total = (out.loss * 3).sum() + leaf["hidden"].square().mean() + leaf["weight"].pow(3).sum()
        total.backward()
        results.append({name: leaf[name].grad for name in trained})
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def materialised(hidden, weight, labels, ref_hidden, ref_weight, **options):
    return fastpref.preference_loss(
        F.linear(hidden, weight), labels, ref_logits=F.linear(ref_hidden, ref_weight), **options
    )


def test_a_gradient_asked_for_alone():
    batch = make()
    _, expected = plain(batch, ("hidden", "weight", *HEAD), **batch.reference)
    for which in ("hidden", "weight", *HEAD):
        leaf = leaves(batch, ("hidden", "weight", *HEAD))
        out = fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, **head_options(leaf), **batch.reference
        )
        (gradient,) = torch.autograd.grad(out.loss, leaf[which])
        torch.testing.assert_close(gradient, expected[which], rtol=1e-10, atol=1e-10)


def test_a_tied_embedding_adds_its_gradients():
    batch = make()
    tokens = torch.randint(0, 37, batch.labels.shape)
    gradients = []
    for f in (fastpref.linear_preference_loss, materialised):
        embedding = batch.weight.clone().requires_grad_()
        f(F.embedding(tokens, embedding), embedding, batch.labels, **batch.reference).loss.backward()
        gradients.append(embedding.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", ["pair_resident", "unit"])
def test_micro_batches_add_up_to_the_batch(which):
    batch = make(pairs=5)
    trained, _ = PLANS[which]
    whole, expected = run(batch, trained, loss="rdpo", rating_gap=batch.gap, **batch.reference)
    leaf = leaves(batch, trained)
    total = 0.0
    for pairs in ([0], [1, 2, 3], [4]):  # unequal
        rows = pairs + [5 + i for i in pairs]
        out = fastpref.linear_preference_loss(
            leaf["hidden"][rows], leaf["weight"], batch.labels[rows], ref_hidden=batch.ref_hidden[rows],
            ref_weight=batch.ref_weight, loss="rdpo", rating_gap=batch.gap[pairs], num_items=torch.tensor(5),
        )  # fmt: skip
        out.loss.backward()
        total = total + out.loss.detach()
    torch.testing.assert_close(total, whole.loss.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close({name: leaf[name].grad for name in trained}, expected, rtol=1e-10, atol=1e-10)


def test_mixed_gradients_add_in_one_parameter():
    """Two losses on one head before one backward, and the same head twice over two calls."""
    batch, other = make(), make()
    gradients = []
    for f in (fastpref.linear_preference_loss, materialised):
        weight = batch.weight.clone().requires_grad_()
        losses_ = [
            f(b.hidden, weight, b.labels, loss=loss, **b.reference).loss
            for b, loss in ((batch, "sigmoid"), (other, "ipo"), (batch, "aot"))
        ]
        (losses_[0] + 2 * losses_[1] - losses_[2]).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


# ---- what a call may not do ----


@plans
def test_a_second_backward_is_refused(which):
    batch = make()
    options = chosen_plan(which)
    for retain in (False, True):
        leaf = leaves(batch, options["trained"], options["used"])
        out = fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, reduction=options["reduction"], **head_options(leaf),
            **batch.reference,
        )  # fmt: skip
        out.loss.sum().backward(retain_graph=retain)
        with pytest.raises(RuntimeError):
            out.loss.sum().backward()


@plans
def test_double_backward_is_refused(which):
    batch = make()
    options = chosen_plan(which)
    leaf = leaves(batch, options["trained"], options["used"])
    out = fastpref.linear_preference_loss(
        leaf["hidden"], leaf["weight"], batch.labels, reduction=options["reduction"], **head_options(leaf),
        **batch.reference,
    )  # fmt: skip
    name = options["trained"][0]
    (gradient,) = torch.autograd.grad(out.loss.sum(), leaf[name], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


# ---- bounds: memory, products, host copies ----

_FIRST_OPERAND = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1,
                  "aten::baddbmm_": 1}  # fmt: skip


class Cost:
    """FLOPs of the matrix products inside a block, and the largest sum of bytes allocated in it and not yet freed."""

    def __enter__(self):
        self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *raised):
        self._profile.__exit__(*raised)
        self.flops = 0
        for event in self._profile.events():
            if event.name in _FIRST_OPERAND:
                first, second = event.input_shapes[_FIRST_OPERAND[event.name] :][:2]
                self.flops += 2 * math.prod(first) * second[-1]
        held = self.peak = 0
        for event in _in_order(self._profile.profiler.kineto_results.experimental_event_tree()):
            held += getattr(event.typed[1], "alloc_size", 0)
            self.peak = max(self.peak, held)


def _in_order(events):
    for event in events:
        yield event
        yield from _in_order(event.children)


TOKENS, WIDTH, VOCAB = 128, 128, 8000


def cost_batch(pairs=4, tokens=TOKENS, width=WIDTH, vocab=VOCAB, dtype=torch.float32):
    """Half of the positions are masked, as a prompt is."""
    batch = make(pairs, tokens, width, vocab, dtype, ignored=0)
    batch.labels[:, : tokens // 2] = -100
    batch.labels[:pairs, -tokens // 8 :] = -100  # and the chosen answers are shorter
    return batch, (batch.labels != -100).sum(-1).tolist()


def measure(batch, trained, **options):
    leaf = leaves(batch, trained)
    reference = {"ref_logps": torch.zeros(batch.labels.shape[0]), "beta": 1e-3}  # no saturated pair: denormals are slow
    with Cost() as cost:
        out = fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, **reference, **head_options(leaf), **options
        )
        if trained:
            out.loss.sum().backward()
    return cost


def predict(batch, lengths, trained, max_tile_bytes=None, loss="sigmoid", reduction="mean"):
    return fastpref.plan(
        lengths, batch.weight.shape[1], batch.weight.shape[0], dtype=batch.hidden.dtype, loss=loss,
        reduction=reduction, hidden_grad="hidden" in trained, weight_grad="weight" in trained,
        bias_grad="bias" in trained, total_tokens=batch.labels.numel(), max_tile_bytes=max_tile_bytes,
    )  # fmt: skip


# trained, options -> kind, passes over hidden x weight
COSTS = {
    "pair_resident": (("hidden", "weight"), {}, "pair_resident", 3),
    "pair_resident-groups": (("hidden", "weight"), {"max_tile_bytes": 6 << 20}, "pair_resident", 3),
    "pairs-recomputed": (("hidden", "weight"), {"max_tile_bytes": 1 << 20}, None, 4),
    "unit": (("hidden",), {}, "unit", 2),
    "unit-tiles": (("hidden",), {"max_tile_bytes": 1 << 20}, "unit", 2),
    "unit-coupled": (("hidden",), {"loss": "aot"}, "unit", 2),
    "unit-none": (("hidden",), {"reduction": "none"}, "unit", 2),
    "recompute-coupled": (("hidden", "weight"), {"loss": "aot"}, "recompute", 4),
    "recompute-none": (("hidden", "weight"), {"reduction": "none"}, "recompute", 4),
    "recompute-tiles": (("hidden", "weight"), {"loss": "aot", "max_tile_bytes": 1 << 20}, "recompute", 4),
    "weight-only": (("weight",), {}, "pair_resident", 2),
    "score": ((), {}, "score", 1),
    "score-tiles": ((), {"max_tile_bytes": 1 << 20}, "score", 1),
}
costs = pytest.mark.parametrize("case", COSTS)


@costs
def test_products_and_memory_are_those_of_the_plan(case):
    trained, options, kind, passes = COSTS[case]
    batch, lengths = cost_batch()
    plan = predict(batch, lengths, trained, **options)
    assert kind in (None, plan.kind)
    assert plan.gemm_passes == passes
    cost = measure(batch, trained, **options)
    active = sum(lengths)
    assert cost.flops / (2 * active * WIDTH * VOCAB) == pytest.approx(passes, rel=0.05)  # and no ignored token
    assert abs(cost.peak - plan.predicted_bytes) <= 0.1 * plan.predicted_bytes + (1 << 19), (cost.peak, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["pair_resident", "unit", "recompute-coupled", "score"])
def test_memory_of_half_precision(case, dtype):
    trained, options, _, _ = COSTS[case]
    batch, lengths = cost_batch(dtype=dtype)
    plan = predict(batch, lengths, trained, **options)
    cost = measure(batch, trained, **options)
    assert abs(cost.peak - plan.predicted_bytes) <= 0.1 * plan.predicted_bytes + (1 << 19), (cost.peak, plan)


def test_a_reference_costs_one_pass_more():
    batch, lengths = cost_batch()
    for trained, passes in ((("hidden", "weight"), 3), (("hidden",), 2)):
        leaf = leaves(batch, trained)
        with Cost() as cost:
            out = fastpref.linear_preference_loss(leaf["hidden"], leaf["weight"], batch.labels, **batch.reference)
            out.loss.backward()
        assert cost.flops / (2 * sum(lengths) * WIDTH * VOCAB) == pytest.approx(passes + 1, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_takes_little_beyond_the_gradient(dtype, trained):
    """32,000 x 512 in fp32 are 65.5 MB; the logits of the active tokens alone would be 118 MB."""
    batch, _ = cost_batch(4, 256, 512, 32000, dtype)
    cost = measure(batch, trained)
    gradient = batch.weight.nbytes if "weight" in trained else 0
    assert cost.peak - gradient <= 100e6


def test_nothing_is_held_after_the_backward():
    batch, _ = cost_batch()
    for trained, options in ((("hidden", "weight"), {}), (("hidden",), {}), (("hidden", "weight"), {"loss": "aot"})):
        leaf = leaves(batch, trained)
        reference = -torch.rand(8)
        with Cost() as cost:
            out = fastpref.linear_preference_loss(
                leaf["hidden"], leaf["weight"], batch.labels, ref_logps=reference, **options
            )
            out.loss.backward()
            for x in leaf.values():
                x.grad = None
        held = sum(getattr(e.typed[1], "alloc_size", 0) for e in _in_order(
            cost._profile.profiler.kineto_results.experimental_event_tree()
        ))  # fmt: skip
        assert held <= 1 << 16, "the output keeps a large tensor alive"


@pytest.fixture
def host_copies(monkeypatch):
    """How many integers each device-to-host copy had."""
    copies, original = [], linear_logps._to_host

    def counted(tensor):
        copies.append((tensor.numel(), tensor.dtype))
        return original(tensor)

    monkeypatch.setattr(linear_logps, "_to_host", counted)
    for module in (fastpref.linear_preference_loss, fastpref.linear_token_logps):
        names = module.__globals__
        if names.get("_to_host") is original:
            monkeypatch.setitem(names, "_to_host", counted)
    return copies


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_one_host_copy_of_2b_plus_1_integers(which, host_copies):
    batch = make()
    run(batch, **chosen_plan(which), loss="rdpo", rating_gap=batch.gap, stats=STATS, **batch.reference)
    if not host_copies:
        pytest.skip("tensors on the CPU are read where they lie")
    assert host_copies == [(7, torch.int64)]


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_a_fixed_capacity_needs_no_host_copy(which, host_copies):
    batch = make()
    options = {**chosen_plan(which), "loss": "rdpo", "rating_gap": batch.gap, "stats": STATS, **batch.reference}
    active = int((batch.labels != -100).sum())
    expected = plain(batch, **options)
    for capacity in (active, active + 1, 54, 1000):
        for budget in (1500, None):
            assert_same(run(batch, max_active_tokens=capacity, max_tile_bytes=budget, **options), expected)
    assert not host_copies
    # too small: NaN, rather than the loss, and the gradients, of some of the tokens
    out, gradients = run(batch, max_active_tokens=active - 1, **options)
    assert out.loss.isnan().all()
    assert not any(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_a_fixed_capacity_of_packed_sequences(which, host_copies):
    batch, cu_seqlens = pack(make(), [9, 4, 0, 7, 0, 1])
    for shift in (False, True):
        for loss in ("rdpo", "ld_dpo"):
            options = {
                **chosen_plan(which), **batch.reference, "cu_seqlens": cu_seqlens, "shift": shift, "loss": loss,
                "rating_gap": batch.gap, "stats": STATS,
            }  # fmt: skip
            assert_same(run(batch, max_active_tokens=30, **options), plain(batch, **options))
    assert not host_copies


# ---- a prefix both sequences share ----


def shared_batch(prefixes, tokens=9, **shape):
    """Both sequences of pair i start with the same prefixes[i] tokens, and so with the same hidden states."""
    batch = make(pairs=len(prefixes), tokens=tokens, ignored=0, **shape)
    pairs = len(prefixes)
    for i, n in enumerate(prefixes):
        batch.labels[pairs + i, :n] = batch.labels[i, :n]
        for hidden in (batch.hidden, batch.ref_hidden):
            hidden[pairs + i, :n] = hidden[i, :n]
    batch.labels[0, 0] = batch.labels[pairs, 0] = -100  # a prompt
    batch.labels[-1, -2:] = -100
    return batch


DELTA_ONLY = sorted(name for name, loss in losses.LOSSES.items() if loss.delta_only)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("loss", DELTA_ONLY)
def test_a_shared_prefix_changes_no_parameter_gradient(loss, shift):
    prefixes = [4, 0, 7]
    batch = shared_batch(prefixes)
    trained = ("hidden", "weight", *HEAD)

    def options():
        draw = {"generator": torch.Generator().manual_seed(11)}
        return {
            "loss": loss, "loss_options": draw if loss == "beta_dpo" else None, "rating_gap": batch.gap,
            "scores": batch.scores, "shift": shift, "trained": trained, **batch.reference,
        }  # fmt: skip

    whole, expected = run(batch, **options())
    for dtype in (torch.int64, torch.int32):
        prefix = torch.tensor(prefixes, dtype=dtype)
        out, gradients = run(batch, shared_prefix=prefix, max_tile_bytes=1500, **options())
        close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
        close(out.loss, whole.loss)
        close(out.margins, whole.margins)
        close(out.stats.losses, whole.stats.losses)
        for name in trained[1:]:
            close(gradients[name], expected[name])
        # in the prefix the two gradients of one hidden state cancel, and are now both zero
        for i, n in enumerate(prefixes):
            skipped = max(n - 1, 0) if shift else n
            for row in (i, 3 + i):
                assert (gradients["hidden"][row, :skipped] == 0).all()
                close(gradients["hidden"][row, skipped:], expected["hidden"][row, skipped:])


def test_a_shared_prefix_is_not_projected():
    batch = shared_batch([64, 64, 64, 64], TOKENS, width=WIDTH, vocab=VOCAB, dtype=torch.float32)
    active = (batch.labels[:, 64:] != -100).sum()
    cost = measure(batch, ("hidden", "weight"), shared_prefix=torch.tensor([64] * 4))
    assert cost.flops / (2 * active * WIDTH * VOCAB) == pytest.approx(3, rel=0.05)


def test_a_shared_prefix_of_packed_sequences():
    batch, cu_seqlens = pack(shared_batch([4, 0, 7]), [9, 3, 8, 6, 5, 9])
    options = {"cu_seqlens": cu_seqlens, "trained": ("weight",), **batch.reference}
    for shift in (False, True):
        whole, expected = run(batch, shift=shift, **options)
        out, gradients = run(batch, shift=shift, shared_prefix=torch.tensor([4, 0, 7]), **options)
        torch.testing.assert_close(out.loss, whole.loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)


def test_a_shared_prefix_is_refused_where_it_counts():
    batch = shared_batch([4, 0, 7])
    options = {
        "rating_gap": batch.gap, "scores": batch.scores, "shared_prefix": torch.tensor([4, 0, 7]), **batch.reference
    }  # fmt: skip
    for loss in sorted(set(losses.LOSSES) - set(DELTA_ONLY)):
        with pytest.raises(ValueError, match="shared_prefix"):
            run(batch, loss=loss, **options)
    for loss, loss_options in (
        (["sigmoid", "sft"], None),
        (uncoupled, None),
        ("sigmoid", {"f_divergence": "js_divergence"}),
        ("ipo", {"length_normalize": True}),
    ):
        with pytest.raises(ValueError, match="shared_prefix"):
            run(batch, loss=loss, loss_options=loss_options, **options)
    run(batch, loss="ipo", loss_options={"length_normalize": False}, **options)
    uncoupled_delta_only = partial(uncoupled)
    uncoupled_delta_only.delta_only = True
    run(batch, loss=uncoupled_delta_only, **options)


# ---- outputs ----


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_outputs_are_those_of_preference_loss(which):
    batch = make()
    options = {**chosen_plan(which), **batch.reference, "stats": STATS, "loss": "rdpo", "rating_gap": batch.gap}
    out, _ = run(batch, max_tile_bytes=1500, **options)
    expected, _ = plain(batch, **options)
    assert set(out.as_trl()) == set(expected.as_trl())
    for name, value in out.as_trl().items():
        assert value.shape == ()
        torch.testing.assert_close(value, expected.as_trl()[name], rtol=2e-6, atol=2e-6, msg=name)
    assert out.stats.unrated == 1
    assert not any(t.requires_grad for t in (*out[1:-1], *filter(torch.is_tensor, out.stats)))
    for name in STATS:
        some, _ = run(batch, **{**options, "stats": (name,)})
        one, _ = plain(batch, **{**options, "stats": (name,)})
        assert_same((some, {}), (one, {}))
    bare, _ = run(batch, **{**options, "stats": ()})
    assert not {"entropy", "logits/chosen", "mean_token_accuracy"} & set(bare.as_trl())


def test_without_a_gradient():
    batch = make()
    expected, _ = plain(batch, **batch.reference, stats=STATS)
    call = partial(fastpref.linear_preference_loss, batch.hidden, batch.weight, batch.labels, **batch.reference)
    assert not call().loss.requires_grad  # nothing wants one
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for budget in BUDGETS:
                out = call(max_tile_bytes=budget, stats=STATS)
                assert_same((out, {}), (expected._replace(loss=expected.loss.detach()), {}))


# ---- plan ----


def test_plans():
    sizes = {"hidden_size": 64, "vocab_size": 1000}
    plan = partial(fastpref.plan, [100, 80, 100, 80], **sizes, loss="sigmoid")
    assert plan().kind == "pair_resident"
    assert plan().gemm_passes == 3
    assert plan().groups == 1
    grouped = plan(max_tile_bytes=200 * 1000 * 4)
    assert grouped.kind == "pair_resident"
    assert grouped.groups == 2
    assert grouped.predicted_bytes < plan().predicted_bytes
    assert plan(weight_grad=False).kind == "unit"
    assert plan(weight_grad=False, loss="aot").kind == "unit"
    assert plan(loss="aot").kind == "recompute"
    assert plan(reduction="none").kind == "recompute"
    assert plan(loss=["sigmoid", "sft"]).kind == "pair_resident"
    assert plan(loss=["sigmoid", coupled]).kind == "recompute"
    assert plan(loss=uncoupled).kind == "recompute"
    assert plan(loss=separable).kind == "pair_resident"
    assert plan(loss="kto").kind == "recompute"
    assert plan(loss="kto", loss_options={"z0": 0.0}).kind == "pair_resident"
    assert plan(hidden_grad=False, weight_grad=False).kind == "score"
    assert plan(hidden_grad=False, weight_grad=False).gemm_passes == 1
    assert plan(dtype=torch.float16).kind == "recompute"  # a loss scale arrives with the backward
    assert plan(dtype=torch.float16, weight_grad=False).gemm_passes == 3
    primitive = partial(fastpref.plan, 360, **sizes)
    assert primitive().kind == "recompute"
    assert primitive(weight_grad=False).kind == "unit"
    assert primitive(hidden_grad=False, weight_grad=False).kind == "score"
    for found in (plan(), primitive(), plan(dtype=torch.bfloat16)):
        assert isinstance(found.product, str)
        assert found.product
        assert isinstance(found.predicted_bytes, int)
        assert 1 <= found.tile_rows <= 360
    # a tile never holds more than it may, but for the one row without which nothing goes on
    for bytes_ in (1, 4000, 10_000, 400_000):
        for call in (plan, primitive):
            assert call(max_tile_bytes=bytes_).tile_rows <= max(1, bytes_ // 4000)
    for nothing in ([], [0, 0]):
        found = fastpref.plan(nothing, **sizes, loss="sigmoid")
        assert found.gemm_passes <= 3
        assert found.tile_rows == 0


def test_plan_errors():
    def message(kind, text, *args, **kwargs):
        with pytest.raises(kind) as caught:
            fastpref.plan(*args, **kwargs)
        assert text in str(caught.value), str(caught.value)

    good = ([3, 4, 5, 6], 16, 100)
    message(ValueError, "lengths", [3, 4, 5], 16, 100, loss="sigmoid")
    message(ValueError, "lengths", [3, -4], 16, 100, loss="sigmoid")
    message(ValueError, "lengths", -1, 16, 100)
    message((TypeError, ValueError), "lengths", [3.5, 4], 16, 100, loss="sigmoid")
    message((TypeError, ValueError), "hidden_size", [3, 4], 0, 100, loss="sigmoid")
    message((TypeError, ValueError), "vocab_size", [3, 4], 16, 0, loss="sigmoid")
    message((TypeError, ValueError), "dtype", *good, loss="sigmoid", dtype=torch.int64)
    message(ValueError, "got 'sigmod'; nearest names: 'sigmoid'", *good, loss="sigmod")
    message(ValueError, "reduction must be one of ('mean', 'sum', 'none'), got 'avg'", *good, loss="sigmoid",
            reduction="avg")  # fmt: skip
    message(ValueError, "max_tile_bytes", *good, loss="sigmoid", max_tile_bytes=0)
    message(TypeError, "max_tile_bytes", *good, loss="sigmoid", max_tile_bytes=1.5)
    message((TypeError, ValueError), "adapter_rank", *good, loss="sigmoid", adapter_rank=-1)
    message(ValueError, "logits_dtype", *good, loss="sigmoid", logits_dtype=torch.int8)
    message(ValueError, "total_tokens", *good, loss="sigmoid", total_tokens=3)


# ---- bad input ----


def test_errors_say_what_came():
    batch = make(dtype=torch.float32)
    hidden, weight, labels = batch.hidden, batch.weight, batch.labels
    a, b = batch.adapter_a, batch.adapter_b

    def message(kind, *texts, hidden=hidden, weight=weight, labels=labels, **options):
        for leaf in ((), ("hidden", "weight")):  # whatever the plan
            given = {"hidden": hidden, "weight": weight}
            for name in leaf:
                if torch.is_tensor(given[name]) and given[name].is_floating_point():
                    given[name] = given[name].detach().requires_grad_()
            with pytest.raises(kind) as caught:
                fastpref.linear_preference_loss(given["hidden"], given["weight"], labels, **options)
            for text in texts:
                assert text in str(caught.value), str(caught.value)

    good = {"ref_logps": torch.ones(6)}
    # tensors
    message(TypeError, "hidden", "list", hidden=[1.0], **good)
    message(TypeError, "weight", "NoneType", weight=None, **good)
    message(TypeError, "hidden", "torch.int64", hidden=hidden.long(), **good)
    message(TypeError, "weight", "torch.bfloat16", weight=weight.bfloat16(), **good)
    message(TypeError, "hidden", "torch.float16", hidden=hidden.half(), weight=weight.bfloat16(), **good)
    message(ValueError, "weight", "[37, 15]", weight=weight[:, :15], **good)
    message(ValueError, "weight", "[37]", weight=weight[:, 0], **good)
    message(ValueError, "labels must have shape [6, 9]", "[6, 8]", labels=labels[:, :8], **good)
    message(TypeError, "labels", "torch.float32", labels=labels.float(), **good)
    message(ValueError, "labels must lie in [0, 37)", labels=labels.clamp(min=37), **good)
    message(ValueError, "labels must lie in [0, 37)", labels=labels.masked_fill(labels == -100, -1), **good)
    message(ValueError, "bias", "[37]", "[36]", bias=batch.bias[:36], **good)
    message(TypeError, "bias", "torch.float64", bias=batch.bias.double(), **good)
    message((TypeError, ValueError), "adapter", adapter=a, **good)
    message(ValueError, "adapter", "[2, 15]", adapter=(a[:, :15], b), **good)
    message(ValueError, "adapter", "[37, 1]", adapter=(a, b[:, :1]), **good)
    message(ValueError, "adapter", "[36, 2]", adapter=(a, b[:36]), **good)
    message(TypeError, "adapter", "torch.float64", adapter=(a.double(), b.double()), **good)
    # the reference
    message(ValueError, "ref_hidden", "[6, 8, 16]", ref_hidden=hidden[:, :8])
    message(ValueError, "ref_weight", ref_weight=weight, **good)  # without ref_hidden it would do nothing
    message(ValueError, "ref_bias", ref_bias=batch.bias, **good)
    message(ValueError, "ref_weight", "[37, 15]", ref_hidden=hidden, ref_weight=weight[:, :15])
    message(ValueError, "ref_weight", "37", "36", ref_hidden=hidden, ref_weight=weight[:36])
    message(ValueError, "ref_bias", "[36]", ref_hidden=hidden, ref_weight=weight, ref_bias=batch.bias[:36])
    message(ValueError, "ref_bias", "ref_weight", ref_hidden=hidden, ref_bias=batch.bias)
    message(ValueError, "the reference must be given in one form, got ref_hidden and ref_logps", ref_hidden=hidden,
            **good)  # fmt: skip
    message(ValueError, "ref_logps must have shape [6] (one per sequence), got [3]", ref_logps=torch.ones(3))
    message(ValueError, "ref_token_logps must have shape [6, 9] like labels, got [6, 10]",
            ref_token_logps=torch.ones(6, 10))  # fmt: skip
    message(ValueError, "sigmoid needs ref_chosen_logps")
    message(ValueError, "a loss on part of the completion needs the reference per token", loss="ld_dpo", **good)
    # the loss
    message(ValueError, "got 'sigmod'; nearest names: 'sigmoid'", loss="sigmod", **good)
    message(ValueError, "rdpo needs rating_gap (one float per pair); got None", loss="rdpo", **good)
    message(ValueError, "rating_gap must have shape [3] (one per pair), got [4]", rating_gap=torch.ones(4), **good)
    message(ValueError, "scores must have shape [6] (one per sequence), got [3]", scores=torch.ones(3), **good)
    message(TypeError, "pair_weights must be a floating-point tensor, got torch.int64",
            pair_weights=torch.ones(3, dtype=torch.long), **good)  # fmt: skip
    message(ValueError, "reduction must be one of ('mean', 'sum', 'none'), got 'avg'", reduction="avg", **good)
    message(ValueError, "num_items replaces the divisor", reduction="sum", num_items=3, **good)
    message(ValueError, "num_items must be positive and finite, got -3", num_items=-3, **good)
    message(ValueError, "loss_weights needs a list of losses", loss_weights=[1.0], **good)
    message(ValueError, "loss_weights must be a list with one entry per loss (2)", loss=["sigmoid", "sft"],
            loss_weights=[1.0], **good)  # fmt: skip
    message(TypeError, "loss_options must be a mapping for a single loss, got list", loss_options=[{}], **good)
    message(TypeError, "label_smooth", loss_options={"label_smooth": 0.1}, **good)
    message(ValueError, "beta must be positive and finite, got -0.1", beta=-0.1, **good)
    # the layout
    message(ValueError, "an even number, got 5 sequences", hidden=hidden[:5], labels=labels[:5])
    message(ValueError, "labels must have shape [sequences, tokens], or [tokens] with cu_seqlens, got [54]",
            hidden=hidden.view(54, 16), labels=labels.view(54), **good)  # fmt: skip
    packed = {"hidden": hidden.view(54, 16), "labels": labels.view(54), **good}
    for bad in ([0, 9, 18], [1, 54], [0, 30, 20, 54, 54], [0, 60, 54]):
        message(ValueError, f"cu_seqlens must rise from 0 to the number of tokens 54, got {bad}",
                cu_seqlens=torch.tensor(bad), **packed)  # fmt: skip
    message(ValueError, "lengths must have shape [6] (one per sequence), got [3]",
            lengths=torch.ones(3, dtype=torch.long), **good)  # fmt: skip
    message(ValueError, "lengths belongs to padded batches", lengths=torch.ones(6, dtype=torch.long),
            cu_seqlens=torch.arange(0, 55, 9), **packed)  # fmt: skip
    message(ValueError, "shared_prefix", "[3]", "[2]", shared_prefix=torch.tensor([1, 2]), **good)
    message(ValueError, "shared_prefix", "10", shared_prefix=torch.tensor([1, 2, 10]), **good)
    message(ValueError, "shared_prefix", "-1", shared_prefix=torch.tensor([1, 2, -1]), **good)
    message(TypeError, "shared_prefix", "torch.float32", shared_prefix=torch.ones(3), **good)
    # options
    message(ValueError, "temperature must be positive and finite, got 0", temperature=0, **good)
    message(ValueError, "stats must be a tuple of names out of", stats=("entropie",), **good)
    message(ValueError, "backend must be None or one of", backend="cuda", **good)
    message(TypeError, "ignore_index must be an int", ignore_index=0.5, **good)
    message(ValueError, "max_tile_bytes", "0", max_tile_bytes=0, **good)
    message(TypeError, "max_tile_bytes", "float", max_tile_bytes=1e6, **good)
    message(ValueError, "max_active_tokens", "-1", max_active_tokens=-1, **good)
    message(TypeError, "max_active_tokens", "float", max_active_tokens=3.5, **good)
    message(ValueError, "logits_dtype", "torch.bfloat16", logits_dtype=torch.bfloat16, **good)  # of float32
    message(ValueError, "logits_dtype", logits_dtype=torch.int32, **good)
    message((TypeError, ValueError), "group", group="world", **good)
    message((TypeError, ValueError), "sequence_group", sequence_group="world", **good)


# ---- torch citizenship ----


COMPILED = ("sigmoid", "rdpo", "ml_rdpo", "ipo", "kto", "aot", "wpo", "ld_dpo", coupled, separable)


@pytest.mark.parametrize(
    ("loss", "which"),
    # the plan is chosen behind the operator: for the others the losses need not be repeated
    [(loss, "pair_resident") for loss in COMPILED] + [("sigmoid", "unit"), ("aot", "unit"), ("sigmoid", "recompute")],
    ids=str,
)
def test_compiles_without_graph_breaks(loss, which):
    torch._dynamo.reset()
    batch = make(dtype=torch.float32)
    trained, reduction = PLANS[which]

    def step(leaf):
        out = fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, loss=loss, rating_gap=batch.gap, shift=True,
            stats=("entropy",), reduction=reduction, **batch.reference,
        )  # fmt: skip
        return out.loss.sum(), out.as_trl()

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = leaves(batch, trained)
        value, metrics = f(leaf)
        (3 * value).backward()
        results.append((value.detach(), metrics, {name: leaf[name].grad for name in trained}))
    torch.testing.assert_close(*results)


def test_compiles_packed_with_a_prefix_and_a_head():
    torch._dynamo.reset()
    batch, cu_seqlens = pack(shared_batch([4, 0, 7], dtype=torch.float32), [9, 3, 8, 6, 5, 9])
    names = ("hidden", "weight", *HEAD)

    def step(leaf, prefix):
        return fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, cu_seqlens=cu_seqlens, shared_prefix=prefix,
            **head_options(leaf), **batch.reference,
        ).loss  # fmt: skip

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = leaves(batch, names)
        value = f(leaf, torch.tensor([4, 0, 7]))
        value.backward()
        results.append((value.detach(), {name: leaf[name].grad for name in names}))
    torch.testing.assert_close(*results)


def test_new_lengths_do_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(hidden, weight, labels, ref_hidden):
        return fastpref.linear_preference_loss(hidden, weight, labels, ref_hidden=ref_hidden).loss

    for tokens in (5, 6, 7, 11, 30):
        batch = make(tokens=tokens, dtype=torch.float32)
        step(batch.hidden.requires_grad_(), batch.weight.requires_grad_(), batch.labels, batch.ref_hidden).backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_checkpointing(which):
    from torch.utils.checkpoint import checkpoint

    batch = make()
    trained, reduction = PLANS[which]

    def step(hidden, weight):
        return fastpref.linear_preference_loss(
            hidden, weight, batch.labels, reduction=reduction, **batch.reference
        ).loss.sum()

    leaf = leaves(batch, trained)
    checkpoint(step, leaf["hidden"], leaf["weight"], use_reentrant=False).backward()
    _, expected = plain(batch, **chosen_plan(which), **batch.reference)
    torch.testing.assert_close({name: leaf[name].grad for name in trained}, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute", "frozen_weight-head"])
@pytest.mark.parametrize("mixed", ["hidden", "weight", "none"])
def test_autocast(which, mixed):
    """As F.linear would: everything in bf16, and each gradient in the dtype of its own tensor."""
    batch = make(tokens=30, dtype=torch.float32)
    options = chosen_plan(which)
    half = batch.to(torch.bfloat16)
    if mixed != "none":
        batch = batch._replace(**{mixed: getattr(half, mixed)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradients = run(batch, **options, **batch.reference)
    expected, true_gradients = run(half, **options, **half.reference)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=1e-6)
    for name, gradient in gradients.items():
        assert gradient.dtype == getattr(batch, name).dtype, name
        torch.testing.assert_close(gradient.bfloat16(), true_gradients[name], rtol=2e-2, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_forward_mode_is_refused(loss):
    batch = make()

    def step(hidden):
        return fastpref.linear_preference_loss(hidden, batch.weight, batch.labels, loss=loss, **batch.reference).loss

    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(step, (batch.hidden,), (batch.hidden,))


class _Opcheck(torch.utils._python_dispatch.TorchDispatchMode):
    """Checks the operators at every call of them, with the arguments of that call."""

    seen = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpref" and "linear" in func.name():
            self.seen = (*self.seen, func.name().removeprefix("fastpref::"))
            # below autograd, which lies outside the operators
            plain_args = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, args)
            torch.library.opcheck(func, plain_args, test_utils=("test_schema", "test_faketensor"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", ["pair_resident-head", "unit", "recompute-head", "bias_only"])
@pytest.mark.parametrize("options", [{}, {"max_active_tokens": 50}], ids=["exact", "capacity"])
def test_opcheck(which, options):
    batch = make(dtype=torch.float32)
    with _Opcheck() as mode:
        run(batch, **chosen_plan(which), loss="rdpo", rating_gap=batch.gap, stats=STATS, **options, **batch.reference)
        with torch.no_grad():
            fastpref.linear_preference_loss(batch.hidden, batch.weight, batch.labels, loss="simpo")
    assert "linear_logps_fwd" in mode.seen
    assert ("linear_preference_fwd" in mode.seen) == (which in ("pair_resident-head", "bias_only"))
    assert ("linear_logps_bwd" in mode.seen) == (which == "recompute-head")


def test_hooks_and_anomaly_mode():
    batch = make()
    _, expected = plain(batch, **batch.reference)
    seen = []
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly(check_nan=True):
        leaf = leaves(batch, ("hidden", "weight"))
        hidden = leaf["hidden"] * 1.0
        hidden.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
        fastpref.linear_preference_loss(hidden, leaf["weight"], batch.labels, **batch.reference).loss.backward()
    torch.testing.assert_close(seen, [expected["hidden"]], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(leaf["hidden"].grad, 2 * expected["hidden"], rtol=1e-10, atol=1e-10)


# ---- two ranks ----

NAMES = ("hidden", "weight", *HEAD)
# columns of rank 0, what is trained, options
VOCAB_SHARDS = {
    "uneven": (23, NAMES, {}),
    "uneven-groups": (23, NAMES, {"max_tile_bytes": 900}),
    "one-column": (1, ("hidden", "weight"), {"loss": "ipo"}),
    "empty": (37, NAMES, {}),
    "empty-groups": (0, ("hidden", "weight"), {"max_tile_bytes": 900}),
    "unit": (23, ("hidden",), {}),
    "unit-tiles": (5, ("hidden",), {"max_tile_bytes": 900}),
    "unit-empty": (37, ("hidden",), {"max_tile_bytes": 900}),
    "recompute": (23, NAMES, {"loss": "aot"}),
    "recompute-empty": (0, NAMES, {"loss": "aot", "max_tile_bytes": 900}),
    "recompute-none": (23, ("hidden", "weight"), {"reduction": "none"}),
    "wpo": (23, ("hidden", "weight"), {"loss": "wpo"}),
    "head": (23, HEAD, {}),
    "softcap": (23, NAMES, {"softcap": 5.0, "temperature": 1.3}),
}


def save(batch, path):
    torch.save(batch._asdict(), path / "batch.pt")
    return batch


def unpack(result):
    """What the ranks sent, as run() returns it."""
    out, gradients = result
    fields = dict(zip(PreferenceOutput._fields, out, strict=True))
    return PreferenceOutput(**{**fields, "stats": PreferenceStats(*fields["stats"])}), dict(gradients)


SEND = """
def send(out, leaf, trained):
    plain = tuple(None if t is None else t.detach() for t in out.stats)
    return (*(t.detach() for t in out[:-1]), plain), {name: leaf[name].grad for name in trained}
"""


def test_vocabulary_shards(two_ranks, tmp_path):
    batch = save(make(pairs=4), tmp_path)
    by_rank = two_ranks(
        f"""
batch = torch.load(f"{{folder}}/batch.pt")
result = {{}}
{SEND}
for case, (first, trained, options) in {VOCAB_SHARDS!r}.items():
    mine = slice(0, first) if rank == 0 else slice(first, None)
    leaf = {{name: batch[name].clone() for name in ("hidden", "weight", "bias", "adapter_a", "adapter_b")}}
    for name in ("weight", "bias", "adapter_b"):
        leaf[name] = leaf[name][mine]
    for name in trained:
        leaf[name].requires_grad_()
    out = fastpref.linear_preference_loss(
        leaf["hidden"], leaf["weight"], batch["labels"], bias=leaf["bias"],
        adapter=(leaf["adapter_a"], leaf["adapter_b"]), ref_hidden=batch["ref_hidden"],
        ref_weight=batch["ref_weight"][mine], rating_gap=batch["gap"], group=dist.group.WORLD,
        stats=("entropy", "log_sum_p2", "mean_logit", "top1"), **{{"loss": "rdpo", **options}},
    )
    (3 * out.loss).sum().backward()
    result[case] = send(out, leaf, trained)
"""
    )
    for case, (_, trained, options) in VOCAB_SHARDS.items():
        call = {"loss": "rdpo", **options, **batch.reference, "rating_gap": batch.gap, "stats": STATS, "used": HEAD}
        out, expected = plain(batch, trained, upstream=3.0, **call)
        parts = [by_rank[rank][case][1] for rank in range(2)]
        for rank in range(2):
            got, gradients = unpack(by_rank[rank][case])
            for name in set(trained) & {"weight", "bias", "adapter_b"}:
                gradients[name] = torch.cat([part[name] for part in parts])
            try:
                assert_same((got, gradients), (out._replace(loss=out.loss.detach()), expected))
            except AssertionError as error:
                raise AssertionError(f"{case}, rank {rank}: {error}") from error


# positions of rank 0 in each padded sequence, what is trained, options
SEQUENCE_SLICES = {
    "uneven": (3, NAMES, {}),
    "uneven-groups": (3, NAMES, {"max_tile_bytes": 900}),
    "all-on-one": (9, ("hidden", "weight"), {}),
    "unit": (5, ("hidden",), {"max_tile_bytes": 900}),
    "coupled": (5, ("hidden", "weight"), {"loss": "aot"}),
    "none": (5, ("hidden", "weight"), {"reduction": "none"}),
    "lengths": (4, ("hidden", "weight"), {"loss": "ipo"}),
    "wpo": (4, ("hidden", "weight"), {"loss": "wpo"}),
}


def test_sequence_slices(two_ranks, tmp_path):
    batch = save(make(pairs=4), tmp_path)
    by_rank = two_ranks(
        f"""
batch = torch.load(f"{{folder}}/batch.pt")
result = {{}}
{SEND}
for case, (first, trained, options) in {SEQUENCE_SLICES!r}.items():
    mine = slice(0, first) if rank == 0 else slice(first, None)
    leaf = {{name: batch[name].clone() for name in ("hidden", "weight", "bias", "adapter_a", "adapter_b")}}
    leaf["hidden"] = leaf["hidden"][:, mine].clone()
    for name in trained:
        leaf[name].requires_grad_()
    out = fastpref.linear_preference_loss(
        leaf["hidden"], leaf["weight"], batch["labels"][:, mine], bias=leaf["bias"],
        adapter=(leaf["adapter_a"], leaf["adapter_b"]), ref_hidden=batch["ref_hidden"][:, mine],
        ref_weight=batch["ref_weight"], rating_gap=batch["gap"], sequence_group=dist.group.WORLD,
        stats=("entropy", "log_sum_p2", "mean_logit", "top1"), **{{"loss": "rdpo", **options}},
    )
    (3 * out.loss).sum().backward()
    result[case] = send(out, leaf, trained)
"""
    )
    for case, (_, trained, options) in SEQUENCE_SLICES.items():
        call = {"loss": "rdpo", **options, **batch.reference, "rating_gap": batch.gap, "stats": STATS, "used": HEAD}
        out, expected = plain(batch, trained, upstream=3.0, **call)
        parts = [by_rank[rank][case][1] for rank in range(2)]
        for rank in range(2):
            got, gradients = unpack(by_rank[rank][case])
            for name in trained:
                if name == "hidden":
                    gradients[name] = torch.cat([part[name] for part in parts], 1)
                else:
                    gradients[name] = parts[0][name] + parts[1][name]
            try:
                assert_same((got, gradients), (out._replace(loss=out.loss.detach()), expected))
            except AssertionError as error:
                raise AssertionError(f"{case}, rank {rank}: {error}") from error


def test_a_sharded_weight_is_gathered(two_ranks, tmp_path):
    """A DTensor weight, as FSDP2 keeps it: each rank has pairs of its own, and the gradient is averaged."""
    batch = save(make(pairs=4, dtype=torch.float32), tmp_path)
    by_rank = two_ranks(
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        batch = torch.load(f"{folder}/batch.pt")
        mesh = init_device_mesh("cpu", (2,))
        rows = [2 * rank, 2 * rank + 1, 4 + 2 * rank, 5 + 2 * rank]
        result = []
        for loss in ("sigmoid", "aot"):
            weight = torch.nn.Parameter(distribute_tensor(batch["weight"], mesh, [Shard(0)]))
            out = fastpref.linear_preference_loss(
                batch["hidden"][rows], weight, batch["labels"][rows], ref_hidden=batch["ref_hidden"][rows],
                ref_weight=batch["ref_weight"], loss=loss,
            )
            out.loss.backward()
            result.append((type(weight.grad).__name__, weight.grad.full_tensor()))
        """
    )
    for i, loss in enumerate(("sigmoid", "aot")):
        gradients = []
        for rank in range(2):
            rows = [2 * rank, 2 * rank + 1, 4 + 2 * rank, 5 + 2 * rank]
            part = batch._replace(**{k: getattr(batch, k)[rows] for k in ("hidden", "ref_hidden", "labels")})
            gradients.append(plain(part, ("weight",), loss=loss, **batch.reference | part.reference)[1]["weight"])
        for result in by_rank:
            assert result[i][0] == "DTensor"
            torch.testing.assert_close(result[i][1], sum(gradients) / 2, rtol=1e-5, atol=1e-6)


# ---- on a GPU ----


def on_gpu(batch):
    return Batch(*(t.cuda() for t in batch))


@pytest.mark.cuda
@pytest.mark.parametrize("which", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_is_float64(dtype, which):
    batch = make(pairs=4, tokens=40, width=64, vocab=503).to(dtype)
    options = {**chosen_plan(which), "loss": "rdpo", "beta": 0.02, "stats": STATS}
    exact, gpu = batch.to(torch.float64), on_gpu(batch)
    truth, true_gradients = plain(exact, **options, rating_gap=exact.gap, **exact.reference)
    _, same_gradients = plain(gpu, **options, rating_gap=gpu.gap, **gpu.reference)
    for budget in (40_000, None):
        out, gradients = run(gpu, max_tile_bytes=budget, **options, rating_gap=gpu.gap, **gpu.reference)
        torch.testing.assert_close(out.loss.cpu().double(), truth.loss, rtol=0, atol=1e-5)
        assert_gradients_no_worse(gradients, same_gradients, true_gradients, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_host_copies_on_a_gpu(which, host_copies):
    batch = make(dtype=torch.float32)
    gpu = on_gpu(batch)
    options = {**chosen_plan(which), "loss": "rdpo", "rating_gap": gpu.gap, **gpu.reference}
    expected, _ = run(gpu, **options)
    assert host_copies == [(7, torch.int64)]
    host_copies.clear()
    lengths = torch.tensor([9, 4, 1, 7, 0, 9])
    by_device, _ = run(gpu, lengths=lengths.cuda(), **options)
    assert len(host_copies) == 1
    host_copies.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fixed, _ = run(gpu, max_active_tokens=54, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    by_host, _ = run(gpu, lengths=lengths, **options)
    assert not host_copies
    torch.testing.assert_close(fixed.loss, expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_host.loss, by_device.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_a_step_is_captured_in_a_cuda_graph(which):
    batch = on_gpu(make(dtype=torch.float32))
    trained, reduction = PLANS[which]
    leaf = leaves(batch, trained)

    def step():
        out = fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, max_active_tokens=54, reduction=reduction, **batch.reference
        )
        return out.loss.detach(), *torch.autograd.grad(out.loss.sum(), [leaf[name] for name in trained])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf["hidden"].copy_(torch.randn_like(leaf["hidden"]))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, step(), rtol=1e-5, atol=1e-6)
