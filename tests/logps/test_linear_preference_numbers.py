"""linear_preference_loss against preference_loss on materialised logits."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import TRANSFORMS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from linear_preference_cases import (
    BUDGETS,
    HEAD,
    PLANS,
    Batch,
    assert_gradients_no_worse,
    assert_same,
    budgets,
    chosen_plan,
    coupled,
    head_options,
    leaves,
    make,
    pack,
    plain,
    plans,
    references,
    run,
    separable,
    shared_batch,
    uncoupled,
)
from tolerance import assert_no_worse

import fastpref
from fastpref import losses
from fastpref._logps.token_logps import STATS

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


@pytest.mark.numerics
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


@pytest.mark.numerics
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


@pytest.mark.numerics
@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute", "frozen_weight-head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend(backend, dtype, which, thin):
    thin(unless=not backend.interpreted or which == "pair_resident")
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


@pytest.mark.numerics
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


@pytest.mark.numerics
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


# ---- a prefix both sequences share ----


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
