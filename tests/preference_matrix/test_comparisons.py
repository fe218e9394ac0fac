"""from_comparisons: both orders of a pair, order effects of judges, and what is refused."""

import math

import numpy as np
import pytest
import torch
from cases import quietly, scores_of

from fastpref.preference_matrix import (
    NothingToClean,
    denoise,
    from_comparisons,
)

NAN = math.nan
LINKS = ("logit", "probit", "identity")
METHODS = ("bradley_terry", "rpca", "curatron")


def test_comparisons_by_hand():
    table = from_comparisons(
        i=[0, 1, 2, 0, 1], j=[1, 0, 1, 2, 2], wins=[3, 1, 1, NAN, 2], votes=[4, 2, 1, 1, 2], prompt=[0, 0, 0, 0, 1]
    )
    # 0 against 1: 3 of 4 when shown first, 1 of 2 when shown second: (0.75 + 0.5) / 2 of 4 * 4 * 2 / (4 + 2) votes
    assert table.prompt.tolist() == [0, 0, 1]
    assert table.i.tolist() == [0, 1, 1]
    assert table.j.tolist() == [1, 2, 2]
    assert table.wins_i.tolist() == pytest.approx([0.625 * 16 / 3, 0, 2])
    assert table.wins_j.tolist() == pytest.approx([0.375 * 16 / 3, 1, 0])
    assert table.judges.votes.tolist() == [9]  # as cast
    assert (table.num_prompts, table.num_items) == (2, 3)
    assert table.probabilities().tolist() == pytest.approx([0.625, 0, 1])
    assert table.probabilities(0.5).tolist() == pytest.approx([(10 / 3 + 0.5) / (16 / 3 + 1), 0.25, 2.5 / 3])
    dense = table.dense()
    expected = torch.full((2, 3, 3), NAN, dtype=torch.float64)
    expected[0] = torch.tensor([[0.5, 0.625, NAN], [0.375, 0.5, 0.0], [NAN, 1.0, 0.5]])
    expected[1] = torch.tensor([[0.5, NAN, NAN], [NAN, 0.5, 1.0], [NAN, 0.0, 0.5]])
    torch.testing.assert_close(dense, expected, equal_nan=True)


def test_rows_may_come_in_any_order_and_in_arrays():
    rng = np.random.default_rng(0)
    i = rng.integers(0, 10, 400)
    j = (i + rng.integers(1, 10, 400)) % 10
    wins, prompt, judge = rng.integers(0, 3, 400), rng.integers(0, 5, 400), rng.integers(0, 3, 400)
    one = quietly(from_comparisons, i, j, wins, votes=2, prompt=prompt, judge=judge)
    shuffled = rng.permutation(400)
    two = quietly(
        from_comparisons,
        *(torch.from_numpy(a[shuffled]) for a in (i, j, wins)),
        votes=torch.full((400,), 2.0),
        prompt=prompt[shuffled],
        judge=judge[shuffled],
    )
    for a, b in zip(one[:5] + one.judges, two[:5] + two.judges, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert torch.equal(one.prompt, one.prompt.sort().values)
    assert (one.i < one.j).all()
    assert one.judges.votes.sum() == 800


def judged(effects, both, votes=1, items=12, prompts=60, seed=0):
    """Comparisons by judges with order effects in logits; a share of the pairs in both orders."""
    g = torch.Generator().manual_seed(seed)
    w = scores_of(prompts, items, seed)
    columns = []
    for judge, effect in enumerate(effects):
        i, j = torch.triu_indices(items, items, 1)
        prompt = torch.arange(prompts).repeat_interleave(len(i))
        i, j = i.repeat(prompts), j.repeat(prompts)
        again = torch.rand(len(i), generator=g) < both
        for first, second, kept in ((i, j, torch.ones_like(again)), (j, i, again)):
            p = (w[prompt, first] - w[prompt, second] + effect).sigmoid()
            wins = torch.binomial(votes * torch.ones_like(p), p, generator=g)
            columns.append(torch.stack([first, second, wins, prompt, torch.full_like(first, judge)])[:, kept])
    i, j, wins, prompt, judge = torch.cat(columns, 1)
    return w, (i.long(), j.long(), wins.double()), {"votes": votes, "prompt": prompt.long(), "judge": judge.long()}


@pytest.mark.parametrize("votes", [1, 4])
def test_order_effects_per_judge(votes):
    effects = [0.0, 0.8, -0.5, 2.0]
    _, rows, options = judged(effects, 1.0, votes)
    report = from_comparisons(*rows, **options).judges
    assert (report.order_effect - torch.tensor(effects)).abs().max() < 0.15
    assert report.z[0].abs() < 4
    assert report.z[1] > 5
    assert report.z[2] < -5
    assert report.first_advantage[1] > 0 > report.first_advantage[2]
    assert report.inconsistency[3] > report.inconsistency[0]
    assert report.pairs.tolist() == report.both_orders.tolist() == [60 * 66] * 4
    assert report.votes.tolist() == [60 * 66 * 2 * votes] * 4


def test_order_report_by_hand():
    # judge 0: consistent, then inconsistent in favour of the first; judge 1: one order only
    table = from_comparisons([0, 1, 2, 3, 0], [1, 0, 3, 2, 1], [1, 0, 1, 1, 1], judge=[0, 0, 0, 0, 1])
    report = table.judges
    assert report.pairs.tolist() == [2, 1]
    assert report.both_orders.tolist() == [2, 0]
    assert report.inconsistency[0] == 0.5
    assert report.first_advantage[0] == 0.25  # gains of 0 and 1/2
    assert report.order_effect[0] == pytest.approx(math.log(1.5 / 0.5) / 2)
    assert report.z[0] == pytest.approx(0.25 / (0.25 / 1**0.5))
    for column in (report.inconsistency, report.first_advantage, report.order_effect, report.z):
        assert column[1].isnan()


def test_both_orders_cancel_the_effect():
    w, rows, options = judged([1.5], 1.0, votes=4)
    table = from_comparisons(*rows, **options)
    upper = w[table.prompt, table.i] - w[table.prompt, table.j]
    # the lower item is as often first as second: no bias towards it
    assert (table.probabilities() - upper.sigmoid()).mean().abs() < 0.01
    one_way = options | {"prompt": options["prompt"][: len(upper)], "judge": options["judge"][: len(upper)]}
    biased = from_comparisons(*(column[: len(upper)] for column in rows), **one_way)
    assert (biased.probabilities() - upper.sigmoid()).mean() > 0.1


@pytest.mark.parametrize("uneven", [0.2, 1.0])
def test_pairs_shown_unevenly_are_not_taken_for_corrupted(uneven):
    flagged = 0
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        i, j = torch.triu_indices(16, 16, 1)
        p = scores_of(1, 16, seed)[0]
        p = (p[i] - p[j]).sigmoid()
        first = torch.where(torch.rand(len(i), generator=g) < uneven, 99.0, 50.0).double()
        votes = torch.cat([first, 100 - first])
        wins = torch.binomial(votes, torch.cat([p, 1 - p]), generator=g)
        found = denoise(from_comparisons(torch.cat([i, j]), torch.cat([j, i]), wins, votes=votes))
        flagged += len(found.corrupted.residual)
    assert flagged <= 1  # of 600; 17 and 29 where 99 + 1 votes count as 100


def test_orders_shown_alike_keep_their_votes():
    # shares times votes are not whole numbers in floating point
    table = from_comparisons([0, 1], [1, 0], [7, 12], votes=49)
    assert (table.wins_i.tolist(), table.wins_j.tolist()) == ([7 + 37], [42 + 12])


def test_one_sided_judges_are_named():
    _, rows, options = judged([0.0, 1.0, -1.0], 0.3)
    with pytest.warns(RuntimeWarning) as seen:
        from_comparisons(*rows, **options)
    messages = [str(w.message) for w in seen]
    assert len(messages) == 2
    assert "judge 1 favours the item shown first by 1." in messages[0] or "by 0.9" in messages[0]
    assert "judge 2 favours the item shown second" in messages[1]
    assert "70 % of its pairs" in messages[0] or "of its pairs were shown in one order only" in messages[0]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0, 1], [1], [1, 1]), {}, r"j must have shape \[2\], got \[1\]"),
        (([0], [0], [1]), {}, "i and j must be different items, got 0 against itself at 0"),
        (([0, -1], [1, 2], [1, 1]), {}, "i must be >= 0, got -1 at 1"),
        (([0], [1], [2]), {}, "wins must lie between 0 and votes, got 2.0 of 1.0 at 0"),
        (([0], [1], [-1]), {}, "wins must lie between 0 and votes"),
        (([0], [1], [math.inf]), {"votes": 3}, "wins must lie between 0 and votes, got inf"),
        (([0], [1], [0]), {"votes": [0]}, "votes must be positive and finite, got 0.0 at 0"),
        (([0], [1], [0]), {"votes": math.inf}, "votes must be positive and finite, got inf at 0"),
        (([0], [1], [0, 1]), {}, r"wins must have shape \[1\] like i, got \[2\]"),
        (([0], [1], [0]), {"prompt": [0, 1]}, r"prompt must have shape \[1\], got \[2\]"),
        (([0], [5], [0]), {"num_items": 5}, "num_items must be at least 6"),
        (([0], [1], [0]), {"prompt": [3], "num_prompts": 2}, "num_prompts must be at least 4"),
        (([[0]], [[1]], [[0]]), {}, r"i must have shape \[C\], got \[1, 1\]"),
        (([2**40], [2**40 + 1], [1]), {}, "must fit 62 bits"),
    ],
)
def test_bad_comparisons(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        from_comparisons(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.5], [1], [1]), {}, "i must be integers, got torch.float32"),
        (([True], [1], [1]), {}, "i must be integers, got torch.bool"),
        ((["a"], ["b"], [1]), {}, "i must be a tensor or an array of numbers, got list: .*'str'"),
        (([0], np.array(["b"]), [1]), {}, "j must be a tensor or an array of numbers, got ndarray"),
        (([0], [1], None), {}, "wins must be a tensor or an array of numbers, got NoneType"),
        (([0], [1], [1j]), {}, "wins must be real numbers, got torch.complex64"),
        (([0], [1], [1]), {"votes": "2"}, "votes must be a tensor or an array of numbers, got str"),
        (([0], [1], [1]), {"judge": ["gpt4"]}, "judge must be a tensor or an array of numbers, got list"),
    ],
)
def test_types_of_comparisons(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        from_comparisons(*arguments, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.uint64])
def test_integers_of_any_width(dtype):
    i, j, wins = (np.array(column, dtype) for column in ([0, 1, 2], [1, 2, 0], [3, 0, 1]))
    table = from_comparisons(i, j, wins, votes=3, prompt=i, judge=i)
    expected = from_comparisons(i.tolist(), j.tolist(), wins.tolist(), votes=3, prompt=i.tolist(), judge=i.tolist())
    for found, wanted in zip(table[:5], expected[:5], strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_booleans_are_wins():
    assert from_comparisons([0, 1], [1, 2], [True, False]).wins_i.tolist() == [1, 0]


def test_sizes_of_comparisons():
    with pytest.raises(TypeError, match="num_items must be an int >= 0, got float"):
        from_comparisons([0], [1], [1], num_items=3.0)


def test_no_comparisons():
    table = from_comparisons([], [], [], num_items=3, num_prompts=2)
    assert table.dense().shape == (2, 3, 3)
    assert len(table.judges.votes) == 0
    with pytest.raises(NothingToClean, match="no cycle of comparisons"):
        denoise(table)
    assert from_comparisons([], [], []).dense().shape == (0, 0, 0)
