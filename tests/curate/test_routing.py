"""curate.routing: methods.md section 7, rule by rule."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastpref
from fastpref.curate import (
    Route,
    difficulty,
    distributed_order,
    easy_to_hard,
    keep_easiest,
    learning_order,
    route_by_margin,
)
from fastpref.curate.routing import HARD_LOSS, JUDGE_TAU

NAN, INF = np.nan, np.inf


# ---- the router


def test_strictly_below_tau_goes_to_sft():
    routes = route_by_margin([2, 0.5, 0.4999, 0, -1, NAN], JUDGE_TAU)
    assert routes.route.tolist() == [Route.PREF, Route.PREF, Route.SFT, Route.SFT, Route.SFT, Route.PREF]
    assert routes.route.dtype == np.int8
    assert (routes.tau, routes.share_sft, routes.at_tau, routes.missing) == (0.5, 0.5, 1, 1)
    inclusive = route_by_margin([2, 0.5, 0.4999, 0, -1, NAN], JUDGE_TAU, inclusive=True)
    assert inclusive.route.tolist() == [0, 1, 1, 1, 1, 0] and inclusive.inclusive


def test_a_negative_margin_follows_the_same_rule():
    # below tau: SFT on the response that was labelled chosen; at or above it: counted
    assert route_by_margin([-3.0, 1.0], 0.5).route.tolist() == [1, 0]
    routes = route_by_margin([-3.0, -1.0, 1.0], -2.0)
    assert routes.route.tolist() == [1, 0, 0] and routes.negative_pref == 1


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize(("pairs", "routed"), [(1000, 120), (100, 12), (8, 1), (3, 0), (1, 0)])
def test_the_default_routes_twelve_per_cent(pairs, routed, inclusive):
    margin = np.random.default_rng(pairs).normal(5, 100, pairs)
    routes = route_by_margin(margin, inclusive=inclusive)
    assert (routes.route == Route.SFT).sum() == routed
    assert set(np.flatnonzero(routes.route == Route.SFT)) == set(np.argsort(margin)[:routed])
    # the router and the loss agree on what tau says
    if not inclusive:
        np.testing.assert_array_equal(routes.route == Route.SFT, margin < routes.tau)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(0, 60), elements=st.floats(-5, 5) | st.just(NAN), unique=True),
    st.floats(0, 1),
    st.booleans(),
)
def test_quantiles_of_different_margins_are_exact(margin, share, inclusive):
    routes = route_by_margin(margin, f"quantile:{share}", inclusive=inclusive)
    rated = margin[~np.isnan(margin)]
    assert (routes.route == Route.SFT).sum() == round(share * len(rated))
    if 0 < round(share * len(rated)) < len(rated):
        sft = rated[(routes.route == Route.SFT)[~np.isnan(margin)]]
        assert sft.max() < np.setdiff1d(rated, sft).min()
    assert routes.missing == np.isnan(margin).sum()


def test_ties_at_the_quantile_are_spoken_of():
    margin = np.concatenate([np.zeros(30), np.arange(1, 71)])
    with pytest.warns(UserWarning, match=r"routes 0\.0 % of the pairs to SFT, since 30 of 100 margins are exactly 0"):
        assert route_by_margin(margin).share_sft == 0
    with pytest.warns(UserWarning, match=r"routes 30\.0 % .* turn inclusive off"):
        assert route_by_margin(margin, inclusive=True).share_sft == 0.3
    assert route_by_margin(margin, 0.5).share_sft == 0.3
    few = np.arange(100.0)
    few[12] = 11  # two equal ones at the cut: 11 % are near enough to 12
    assert route_by_margin(few).share_sft == 0.11


def test_no_pairs():
    routes = route_by_margin([])
    assert routes.route.shape == (0,) and math.isnan(routes.share_sft)
    assert route_by_margin([NAN, NAN]).route.tolist() == [0, 0]


@pytest.mark.parametrize(
    "tau", ["0.5", "quantile", "quantile:", "quantile:1.2", "quantile:nan", "share:0.1", None, NAN, True]
)
def test_other_taus(tau):
    with pytest.raises(ValueError, match='tau must be a number or "quantile:<share from 0 to 1>"'):
        route_by_margin([1.0], tau)


@pytest.mark.parametrize(
    ("margin", "error", "message"),
    [([[1]], ValueError, r"margin must have shape \[pairs\]"), (["a"], TypeError, "margin must be numbers")],
)
def test_other_margins(margin, error, message):
    with pytest.raises(error, match=message):
        route_by_margin(margin)


# ---- the loss it is for


def training_batch(seed=0):
    """Four pairs of seven tokens, and the reference's log-probs."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 7, 19, generator=rng, dtype=torch.float64)
    labels = torch.randint(19, (8, 7), generator=rng)
    labels[:, :2] = -100
    labels[3, 5:] = -100
    ref_logps = -15 + torch.randn(8, generator=rng, dtype=torch.float64)
    return logits, labels, ref_logps


def test_the_mixdpo_loss_trains_as_the_routes_say():
    logits, labels, ref_logps = training_batch()
    margin = np.array([2.0, 0.1, 0.5, -3.0])
    routes = route_by_margin(margin, 0.5)
    assert routes.route.tolist() == [Route.PREF, Route.SFT, Route.PREF, Route.SFT]

    def gradient(loss, **options):
        x = logits.clone().requires_grad_()
        out = fastpref.preference_loss(x, labels, ref_logps=ref_logps, loss=loss, reduction="none", **options)
        out.loss.sum().backward()
        return out.loss.detach(), x.grad.view(2, 4, 7, 19)  # chosen, rejected

    mixed, mixed_gradient = gradient("mixdpo", rating_gap=torch.tensor(margin), loss_options={"tau": routes.tau})
    for name, route in (("sigmoid", Route.PREF), ("sft", Route.SFT)):
        plain, plain_gradient = gradient(name)
        here = torch.tensor(routes.route == route)
        torch.testing.assert_close(mixed[here], plain[here])
        torch.testing.assert_close(mixed_gradient[:, here], plain_gradient[:, here])
    sft = torch.tensor(routes.route == Route.SFT)
    assert (mixed_gradient[1, sft] == 0).all()  # the rejected response of such a pair is not touched
    assert (mixed_gradient[1, ~sft] != 0).any(-1).any(-1).all()


def test_mixdpo_training_lowers_the_loss_of_both_routes():
    """A table of logits trained for a few steps, the pairs from easy to hard, one at a time."""
    logits, labels, ref_logps = training_batch(1)
    margin = np.array([2.0, 0.1, 1.5, -3.0])
    routes = route_by_margin(margin, 0.5)
    table = logits.clone().requires_grad_()
    optimiser = torch.optim.SGD([table], lr=2.0)

    def loss_of(pairs):
        rows = [*pairs, *(p + 4 for p in pairs)]
        return fastpref.preference_loss(
            table[rows], labels[rows], ref_logps=ref_logps[rows], loss="mixdpo", beta=0.5, reduction="none",
            rating_gap=torch.tensor(margin)[list(pairs)], loss_options={"tau": routes.tau},
        ).loss  # fmt: skip

    before = loss_of(range(4)).detach()
    order = easy_to_hard(margin)
    assert order.tolist() == [0, 2, 1, 3]
    for _ in range(5):
        for pair in order.tolist():
            optimiser.zero_grad()
            loss_of([pair]).sum().backward()
            optimiser.step()
    assert (loss_of(range(4)) < before - 0.05).all()


# ---- order


def test_easy_to_hard():
    assert easy_to_hard([0.5, 3, -1, 3, NAN, 2]).tolist() == [1, 3, 5, 4, 0, 2]  # a missing score counts as 1
    assert easy_to_hard([0.5, NAN], missing=0).tolist() == [0, 1]
    assert easy_to_hard([]).shape == (0,)
    easy = np.arange(1000) % 3 == 0
    np.testing.assert_array_equal(easy_to_hard(easy), [*np.flatnonzero(easy), *np.flatnonzero(~easy)])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(1, 7), st.booleans())
def test_distributed_ranks_follow_the_order_together(pairs, world_size, drop_last):
    order = np.random.default_rng(pairs).permutation(pairs)
    ranks = [distributed_order(order, rank, world_size, drop_last=drop_last) for rank in range(world_size)]
    assert len({len(taken) for taken in ranks}) == 1
    together = np.stack(ranks, axis=1).ravel()  # step by step, rank by rank
    whole = pairs - pairs % world_size
    if drop_last:
        np.testing.assert_array_equal(together, order[:whole])
    else:
        np.testing.assert_array_equal(together[:pairs], order)
        assert len(together) - pairs < world_size and set(together[pairs:]) <= set(order)


def test_repeated_elements_are_the_last_ones():
    order = np.arange(10)[::-1]
    assert [distributed_order(order, rank, 4).tolist() for rank in range(4)] == [
        [9, 5, 1],
        [8, 4, 0],
        [7, 3, 1],
        [6, 2, 0],
    ]
    assert distributed_order([5], 2, 4).tolist() == [5]


def test_a_data_loader_takes_the_order_as_it_is():
    margin = np.random.default_rng(0).normal(size=23)
    order = easy_to_hard(margin)
    data = torch.utils.data.TensorDataset(torch.tensor(margin))
    loader = torch.utils.data.DataLoader(data, sampler=distributed_order(order, 1, 2).tolist(), batch_size=4)
    seen = torch.cat([batch[0] for batch in loader])
    assert len(seen) == 12 and (seen.diff() <= 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], 0, 2), r"order must be \[pairs\] integers, got float64 \[2\]"),
        (([[1]], 0, 2), r"order must be \[pairs\] integers"),
        (([1], 2, 2), r"rank must be in \[0, world_size=2\), got 2"),
        (([1], 0, 0), r"rank must be in \[0, world_size=0\), got 0"),
    ],
)
def test_wrong_ranks(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed_order(*arguments)


# ---- difficulty


def test_differences_of_scores_and_likelihoods():
    np.testing.assert_array_equal(difficulty("score", [9, 4, NAN], [2, 6, 1]), [7, -2, NAN])
    np.testing.assert_array_equal(difficulty("reward_margin", [0.5, INF], [-1.5, INF]), [2, NAN])
    np.testing.assert_allclose(difficulty("nll", [0.5, 3.0], [2.0, 1.0]), [1.5, -2])  # likely chosen: easy
    np.testing.assert_allclose(difficulty("perplexity", np.log([2.0, 9.0]), np.log([5.0, 3.0])), [3, -6])
    np.testing.assert_array_equal(difficulty("learning_order", [0.3, 0.9, NAN]), [-0.3, -0.9, NAN])


def test_distance_of_embeddings():
    chosen = [[1.0, 0.0], [3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [1e200, 0.0]]
    rejected = [[5.0, 0.0], [-3.0, -4.0], [1.0, -1.0], [1.0, 0.0], [1e200, 1e200]]
    found = difficulty("embedding", chosen, rejected)
    np.testing.assert_allclose(found, [0, 2, 1, NAN, 1 - 0.5**0.5], atol=1e-12)


def test_the_authors_hard_pairs_of_the_learning_order():
    d = difficulty("learning_order", [0.1, HARD_LOSS, 0.8, 0.7])
    assert route_by_margin(d, -HARD_LOSS, inclusive=True).route.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("signal", ["score", "reward_margin", "nll", "perplexity"])
def test_every_signal_orders_and_routes(signal):
    rng = np.random.default_rng(0)
    d = difficulty(signal, rng.random(500), rng.random(500))
    assert route_by_margin(d).share_sft == 0.12
    assert (np.diff(d[easy_to_hard(d)]) <= 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("length", [1], [2]), r"signal must be one of \['score', .*'learning_order'\], got 'length'"),
        (("score", [1]), "rejected must be given for 'score', got None"),
        (("score", [1], [1, 2]), r"rejected must have shape \[1\] to match chosen, got \[2\]"),
        (("embedding", [1, 2], [1, 2]), r"chosen must have two dimensions, got shape \[2\]"),
        (("embedding", [[1, 2]], [[1, 2, 3]]), r"rejected must have shape \[1, 2\] to match chosen, got \[1, 3\]"),
        (("learning_order", [1], [2]), "rejected must be None for the learning order"),
    ],
)
def test_wrong_signals(arguments, message):
    with pytest.raises(ValueError, match=message):
        difficulty(*arguments)


# ---- learning order


def test_learning_order_asks_the_models_that_did_not_see_the_pair():
    losses = [[1.0, 2.0, 3.0, 9.0], [5.0, 6.0, NAN, 9.0], [9.0, 10.0, 11.0, 9.0]]
    seen = np.array([[0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 0, 1]], bool)
    with pytest.warns(UserWarning, match="1 of 4 pairs have no loss of a model that did not see them"):
        order = learning_order(losses, seen)
    np.testing.assert_array_equal(order.loss, [3, 6, 7, NAN])
    assert order.models.tolist() == [2, 1, 2, 0]


def test_six_models_on_two_halves():
    rng = np.random.default_rng(0)
    hardness = rng.random(1000)
    half = rng.permutation(1000) < 500
    seen = np.stack([half, half, half, ~half, ~half, ~half])
    # a model that saw the pair tells nothing about it
    losses = np.where(seen, rng.random((6, 1000)), hardness + 0.01 * rng.normal(size=(6, 1000)))
    order = learning_order(losses, seen)
    assert (order.models == 3).all()
    np.testing.assert_allclose(order.loss, hardness, atol=0.05)
    kept = keep_easiest(difficulty("learning_order", order.loss))
    assert len(kept) == 500
    np.testing.assert_array_equal(kept, np.argsort(order.loss)[:500])  # easy to hard


def test_keep_easiest():
    assert keep_easiest([3, NAN, 1, 3, 2]).tolist() == [0, 3]
    assert keep_easiest([3, NAN, 1, 3, 2], 1).tolist() == [0, 3, 4, 2]
    assert keep_easiest([3, 1], 0).shape == (0,)
    for fraction in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\]"):
            keep_easiest([1, 2], fraction)


@pytest.mark.parametrize(
    ("losses", "seen", "message"),
    [
        ([1, 2], np.zeros(2, bool), r"losses must have two dimensions, got shape \[2\]"),
        ([[1, 2]], np.zeros((2, 1), bool), r"seen must be bool with shape \[1, 2\] to match losses, got bool \[2, 1\]"),
        ([[1, 2]], [[0, 1]], r"seen must be bool with shape \[1, 2\] to match losses, got int64"),
    ],
)
def test_wrong_losses(losses, seen, message):
    with pytest.raises(ValueError, match=message):
        learning_order(losses, seen)


def test_no_torch(python):
    code = "import sys; from fastpref.curate import easy_to_hard; print(easy_to_hard([1, 2]), 'torch' in sys.modules)"
    assert python(code).stdout.strip() == "[1 0] False"
