"""curate.goals: methods.md section 3, rule by rule."""

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.curate import Coded, add_goal, goal_records, goal_reward, goal_rewrite, goal_text, rescale_scores

NAN = np.nan
OFFICIAL = (
    "You are an assistant that generates responses for the instruction while implicitly achieving the following target "
    "scores (on a scale of 1-10, where 1 is lowest and 10 is highest):\nOverall score: 8."
)


def pairs_of(score_chosen, score_rejected, **more):
    n = len(score_chosen)
    return {
        "prompt": np.arange(n) + 100,
        "chosen": np.arange(n) * 2,
        "rejected": np.arange(n) * 2 + 1,
        "score_chosen": np.asarray(score_chosen, float),
        "score_rejected": np.asarray(score_rejected, float),
        **more,
    }


def by_pair(records):
    """(pair, swapped) -> the record as a dict of plain numbers, whatever the shuffle."""
    rows = {}
    for i in range(len(records["pair"])):
        row = {name: column[i].tolist() for name, column in records.items()}
        rows[row["pair"], row["goal_swapped"]] = row
    assert len(rows) == len(records["pair"])
    return rows


# ---- records


def test_two_records_per_pair_with_the_responses_really_swapped():
    pairs = pairs_of([9, 7.5, 3], [4, 2, 6.25], id=np.array(["a", "b", "c"]))
    records = by_pair(goal_records(pairs))
    assert len(records) == 6
    for pair, (r_w, r_l) in enumerate([(9, 4), (7.5, 2), (3, 6.25)]):
        as_labelled, swapped = records[pair, False], records[pair, True]
        assert (as_labelled["chosen"], as_labelled["rejected"], as_labelled["goal"]) == (2 * pair, 2 * pair + 1, r_w)
        assert (swapped["chosen"], swapped["rejected"], swapped["goal"]) == (2 * pair + 1, 2 * pair, r_l)
        assert (as_labelled["score_chosen"], as_labelled["score_rejected"]) == (r_w, r_l)
        assert (swapped["score_chosen"], swapped["score_rejected"]) == (r_l, r_w)
        assert as_labelled["prompt"] == swapped["prompt"] == 100 + pair
        assert as_labelled["id"] == swapped["id"] == "abc"[pair]


SCORES = st.lists(st.tuples(*[st.sampled_from([1.0, 2.5, 4.0, 10.0, NAN])] * 2), max_size=30)


@settings(max_examples=200, deadline=None)
@given(SCORES, st.sampled_from(["positive", "drop"]), st.booleans(), st.integers(0, 9))
@pytest.mark.filterwarnings("ignore:.*have no finite score")
def test_every_record_prefers_by_the_goal_conditioned_reward(scores, on_tie, half, seed):
    pairs = pairs_of([w for w, _ in scores], [l for _, l in scores])
    records = goal_records(pairs, on_tie=on_tie, half=half, seed=seed)
    reward = {
        side: goal_reward(records[f"score_{side}"][:, None], records["goal"][:, None])
        for side in ("chosen", "rejected")
    }
    assert (reward["chosen"] == 0).all() and (reward["chosen"] >= reward["rejected"]).all()
    whole = [(w, l) for w, l in scores if w == w and l == l]
    tied = sum(w == l for w, l in whole)
    every = 2 * (len(whole) - tied) + (tied if on_tie == "positive" else 0)
    assert len(records["pair"]) == (min(len(whole), every) if half else every)
    assert len(by_pair(records)) == len(records["pair"])
    # no record contradicts another: nothing with a tie is swapped
    assert not (records["goal_swapped"] & (records["score_chosen"] == records["score_rejected"])).any()


def test_ties():
    pairs = pairs_of([5, 8], [5, 2])
    assert sorted(by_pair(goal_records(pairs))) == [(0, False), (1, False), (1, True)]
    assert sorted(by_pair(goal_records(pairs, on_tie="drop"))) == [(1, False), (1, True)]


def test_pairs_without_a_score_are_left_out_and_counted():
    with pytest.warns(UserWarning, match="2 of 3 pairs have no finite score and no goal; they are left out"):
        records = goal_records(pairs_of([NAN, 8, 3], [5, 2, np.inf]))
    assert sorted(by_pair(records)) == [(1, False), (1, True)]


def test_half_draws_from_both_kinds():
    pairs = pairs_of(np.full(400, 9), np.full(400, 2))
    records = goal_records(pairs, half=True, seed=1)
    assert len(records["pair"]) == 400
    assert 140 < records["goal_swapped"].sum() < 260
    assert 230 < len(np.unique(records["pair"])) < 370  # single records are drawn, not pairs


def test_shuffled_by_seed():
    pairs = pairs_of(np.arange(2, 202), np.zeros(200))
    first, again, other = (goal_records(pairs, seed=seed) for seed in (3, 3, 4))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert (first["pair"] != other["pair"]).any()
    early = first["goal_swapped"][:200].mean()
    assert 0.3 < early < 0.7  # not first one kind, then the other


def test_twin_columns_are_swapped_and_others_kept():
    more = {
        "z_chosen": [1.0],
        "z_rejected": [-2.0],
        "source_chosen": ["a"],
        "source_rejected": ["a much longer name"],
        "embedding_chosen": np.ones((1, 3)),
        "embedding_rejected": np.zeros((1, 3)),
        "was_chosen_by": ["a judge"],
        "rule": "max",
    }
    assert goal_records(pairs_of([9], [2], **more))["rule"] == "max"
    del more["rule"]
    swapped = by_pair(goal_records(pairs_of([9], [2], **more)))[0, True]
    assert swapped["z_chosen"] == -2 and swapped["z_rejected"] == 1
    assert swapped["source_chosen"] == "a much longer name" and swapped["source_rejected"] == "a"
    assert swapped["was_chosen_by"] == "a judge"
    assert swapped["embedding_chosen"] == [0, 0, 0] and swapped["embedding_rejected"] == [1, 1, 1]


def test_numbers_of_one_side_alone_are_not_those_of_the_other():
    more = {"rank_rejected": np.array([4, 2]), "quality_chosen": np.array([0.5, 1.5], np.float32), "rule_chosen": "max"}
    found = goal_records(pairs_of([9, 8], [2, 3], **more))
    assert found["rank_rejected"].dtype == np.int64 and found["quality_chosen"].dtype == np.float32
    records = by_pair({name: column for name, column in found.items() if name != "rule_chosen"})
    for pair in (0, 1):
        assert records[pair, False]["rank_rejected"] == (4, 2)[pair] and records[pair, True]["rank_rejected"] == -1
        assert records[pair, False]["quality_chosen"] == (0.5, 1.5)[pair]
        assert np.isnan(records[pair, True]["quality_chosen"])


@pytest.mark.parametrize("second", ["b", "bc"])
def test_columns_of_names_and_of_messages(second):
    """What `write_pairs` takes: names by code, -1 for none; and texts as lists of messages of any length."""
    one, two = ([{"role": "assistant", "content": part} for part in parts] for parts in ("a", second))
    pairs = {
        "prompt": ["p", "q"],
        "chosen": [one, two],
        "rejected": [two, one],
        "score_chosen": [5, 6],
        "score_rejected": [1, 2],
        "source_chosen": Coded(np.array([0, -1]), ["m", "n"]),
        "source_rejected": Coded(np.array([1, 1]), ["m", "n"]),
    }
    found = goal_records(pairs)
    for i, (pair, swapped) in enumerate(zip(found["pair"], found["goal_swapped"], strict=True)):
        assert found["chosen"][i] == pairs["rejected" if swapped else "chosen"][pair]
        assert found["rejected"][i] == pairs["chosen" if swapped else "rejected"][pair]
        names = ["m", None][pair], "n"
        assert (found["source_chosen"][i], found["source_rejected"][i]) == (names[::-1] if swapped else names)
    assert found["chosen"].shape == (4,)


def test_several_attributes():
    pairs = {
        "chosen": [0, 0, 0],
        "rejected": [1, 1, 1],
        "score_chosen_helpfulness": [5, 4, 4],
        "score_rejected_helpfulness": [2, 4, 4],
        "score_chosen_honesty": [3.5, 1, 2],
        "score_rejected_honesty": [4, 1, 1],
    }
    records = by_pair(goal_records(pairs, attributes=["helpfulness", "honesty"]))
    # only the second pair ties in every attribute
    assert sorted(records) == [(0, False), (0, True), (1, False), (2, False), (2, True)]
    assert records[0, False]["goal_helpfulness"] == 5 and records[0, False]["goal_honesty"] == 3.5
    assert records[0, True]["goal_helpfulness"] == 2 and records[0, True]["goal_honesty"] == 4
    assert records[0, True]["score_chosen_honesty"] == 4 and records[0, True]["chosen"] == 1
    assert "goal" not in records[0, False]


def test_goal_reward():
    assert goal_reward([[7.0]], [[9.0]]).tolist() == [-4]
    np.testing.assert_array_equal(goal_reward([[5, 3.5], [2, 4]], [5, 3.5]), [0, -9.25])


def test_no_pairs():
    records = goal_records(pairs_of([], []))
    assert all(len(column) == 0 for column in records.values()) and "goal" in records


@pytest.mark.parametrize(
    ("pairs", "options", "error", "message"),
    [
        (
            {"chosen": [1]},
            {},
            ValueError,
            r"have the columns \['rejected', 'score_chosen', 'score_rejected'\]",
        ),
        (
            pairs_of([1], [2]),
            {"attributes": "tone"},
            ValueError,
            r"\['score_chosen_tone', 'score_rejected_tone'\]",
        ),
        (pairs_of([1], [2]) | {"x": [1, 2]}, {}, ValueError, "pairs must hold arrays of one length, got .*'x': 2"),
        (pairs_of([1], [2]) | {"chosen": 3}, {}, ValueError, r"pairs must have the columns \['chosen'\]"),
        (
            pairs_of([1], [2]) | {"goal": [3]},
            {},
            ValueError,
            r"not have the columns that goals add, got \['goal'\]",
        ),
        (
            pairs_of([1], [2]),
            {"on_tie": "keep"},
            ValueError,
            r"on_tie must be one of .*, got 'keep'",
        ),
        (pairs_of([1], [2]), {"attributes": []}, ValueError, r"attributes must be different names, got \[\]"),
        (pairs_of([1], [2]), {"attributes": ["a", "a"]}, ValueError, "attributes must be different names"),
        ([1, 2], {}, TypeError, "pairs must map names to arrays, got list"),
        (pairs_of([1], [2]) | {"score_chosen": ["high"]}, {}, TypeError, "score_chosen must be numbers"),
    ],
)
def test_wrong_arguments(pairs, options, error, message):
    with pytest.raises(error, match=message):
        goal_records(pairs, **options)


# ---- scores


def test_rescaled_scores():
    np.testing.assert_allclose(rescale_scores([0, 0.5, 1], (0, 1)), [1, 5.5, 10])
    np.testing.assert_allclose(rescale_scores([-3.0, NAN, 5.0]), [1, NAN, 10])
    np.testing.assert_allclose(rescale_scores([[1, 5]], (1, 5), (0, 100)), [[0, 100]])
    assert rescale_scores([NAN]).shape == (1,) and np.isnan(rescale_scores([NAN])).all()
    scores = np.random.default_rng(0).normal(size=1000)
    moved = rescale_scores(scores)
    assert moved.min() == 1 and moved.max() == 10
    near = rescale_scores(np.linspace(0, 1e-15, 20_000), (0, 1), (5, 7.7))
    assert near.min() == 5  # rounding leaves none outside, where it would be no goal
    np.testing.assert_array_equal(np.argsort(moved), np.argsort(scores))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 2], (0, 1)), r"scores must lie in source_range \[0, 1\], got 1 outside it, from 0 to 2"),
        (([1, 1],), "source_range must be .lowest, highest., finite and different"),
        (([0, 1], (0, 1), (10, 1)), "target_range must be"),
        (([0, 1], (0, np.inf)), "source_range must be"),
    ],
)
def test_ranges_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        rescale_scores(*arguments)


# ---- texts


def test_the_official_wording():
    assert goal_text(8) == goal_text(8.0) == goal_text(np.float64(8)) == goal_text({"Overall": 8}) == OFFICIAL


@pytest.mark.parametrize(
    ("goal", "printed"),
    [
        (10.0, "10"),
        (7.25, "7.25"),
        (0, "0"),
        (-3.0, "-3"),
        (25 / 3, "8.33333"),
        (1e-7, "0.0000001"),
        (1234567.0, "1234567"),
    ],
)
def test_printed_scores(goal, printed):
    assert goal_text(goal, (-10, 1e7)).endswith(f"\nOverall score: {printed}.")


def test_the_scale_and_the_attributes_are_stated():
    text = goal_text({"Helpfulness": 0.5, "Honesty": 1}, score_range=(0, 1))
    assert "(on a scale of 0-1, where 0 is lowest and 1 is highest):" in text
    assert text.endswith(":\nHelpfulness score: 0.5.\nHonesty score: 1.")


@pytest.mark.parametrize("goal", [NAN, np.inf, 0.5, 10.5, -7.0])
def test_a_goal_is_on_the_scale_that_is_stated(goal):
    with pytest.raises(ValueError, match=rf"goals must lie in score_range \[1, 10\], got {goal} for 'Honesty'"):
        goal_text({"Helpfulness": 3, "Honesty": goal})
    with pytest.raises(ValueError, match=rf"score_range \[1, 10\], got {goal} for 'Overall'"):
        goal_rewrite()({"prompt": "Why?", "goal": goal})


USER = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("prompt", "system_role", "expected"),
    [
        ("Why?", True, "GOAL\n\nWhy?"),
        ("Why?", False, "GOAL\n\nWhy?"),
        ([USER], True, [{"role": "system", "content": "GOAL"}, USER]),
        ([USER], False, [{"role": "user", "content": "GOAL\n\nWhy?"}]),
        ([SYSTEM, USER], True, [{"role": "system", "content": "GOAL\n\nBe brief."}, USER]),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER],
            False,
            [{"role": "user", "content": "GOAL\n\nHi"}, {"role": "assistant", "content": "Hello"}, USER],
        ),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            False,
            [{"role": "user", "content": [{"type": "text", "text": "GOAL\n\n"}, {"type": "image"}]}],
        ),
    ],
)
def test_where_the_goal_goes(prompt, system_role, expected):
    before = copy.deepcopy(prompt)
    assert add_goal(prompt, "GOAL", system_role=system_role) == expected
    assert prompt == before


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([{"role": "assistant", "content": "Hello"}], ValueError, "prompt must have a user turn"),
        ([], ValueError, "prompt must have a user turn to put the goal into, got 0 messages"),
        (7, TypeError, "prompt must be a string or a list of messages, got int"),
        (["Why?"], TypeError, "prompt must be a string or a list of messages, got list"),
    ],
)
def test_prompts_without_a_place_for_the_goal(prompt, error, message):
    with pytest.raises(error, match=message):
        add_goal(prompt, "GOAL", system_role=False)


@pytest.mark.parametrize("system_role", [True, False])
@pytest.mark.parametrize("conversational", [True, False])
def test_rows_from_arrays_to_texts(system_role, conversational):
    """The whole way: the prompt of each record names the score of its own chosen response."""
    texts = [["good", "fair"], ["fine", "bad"]]
    scores = np.array([[8.0, 6.0], [7.0, 1.5]])
    pairs = {
        "prompt": [0, 1],
        "chosen": [0, 0],
        "rejected": [1, 1],
        "score_chosen": scores[:, 0],
        "score_rejected": scores[:, 1],
    }
    records = goal_records(pairs)
    rewrite = goal_rewrite(system_role=system_role)
    seen = set()
    for i in range(4):
        prompt = int(records["prompt"][i])
        row = {name: column[i] for name, column in records.items()} | {
            "prompt": [{"role": "user", "content": "Why?"}] if conversational else "Why?",
            "chosen": texts[prompt][records["chosen"][i]],
            "rejected": texts[prompt][records["rejected"][i]],
        }
        (written,) = rewrite(row)
        if conversational:
            assert [message["role"] for message in written["prompt"]] == (["system"] if system_role else []) + ["user"]
        content = (
            "\n\n".join(message["content"] for message in written["prompt"]) if conversational else written["prompt"]
        )
        goal = scores[prompt, texts[prompt].index(written["chosen"])]
        assert content == goal_text(goal) + "\n\nWhy?"
        assert written["score_chosen"] == goal and written["goal"] == goal
        assert written.keys() == row.keys() and row["prompt"] != written["prompt"]
        seen.add((written["chosen"], written["rejected"]))
    assert seen == set(itertools.chain(itertools.permutations(texts[0]), itertools.permutations(texts[1])))


def test_rows_of_several_attributes():
    rewrite = goal_rewrite(attributes=["instruction_following", "honesty"], score_range=(1, 5))
    (row,) = rewrite({"prompt": "Why?", "goal_instruction_following": 5.0, "goal_honesty": 2.5})
    assert row["prompt"] == (goal_text({"Instruction following": 5, "Honesty": 2.5}, score_range=(1, 5)) + "\n\nWhy?")
    assert "\nInstruction following score: 5.\nHonesty score: 2.5.\n\nWhy?" in row["prompt"]
