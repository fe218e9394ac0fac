"""Rows of samples in every shape that is read: pools, completions, pairs; and what a malformed one is told."""

import random

import numpy as np
import pytest
from samples_cases import CLEVER, GOOD, USER, write_lines

from fastpref.curate import (
    read_samples,
    read_scored_samples,
    texts,
)
from fastpref.curate.files.rows import Fields, parse_row, score_fields

MALFORMED = [
    (b"{", "not JSON: Expecting property name"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
    (b"[" * 100_000, "not JSON"),
    (b'{"x": 1' + b"0" * 5000 + b"}", "not JSON"),
    ([1, 2], "a row must be an object, got list"),
    (b"null", "a row must be an object, got null"),
    ({"responses": [], "scores": []}, "no field 'prompt'"),
    ({"prompt": "p", "scores": []}, "no field 'responses'"),
    ({"prompt": "p", "responses": ["a"]}, "no field 'scores'"),
    (GOOD | {"prompt": None}, "prompt must be a string, got NoneType"),
    (GOOD | {"responses": "ab"}, "responses must be a list, got str"),
    (GOOD | {"scores": 1.0}, "scores must be a list, got float"),
    (GOOD | {"scores": [1.0]}, "scores must have one entry per response, got 1 for 2"),
    (GOOD | {"responses": ["a", 3]}, "responses[1] must be a string, got int"),
    (GOOD | {"responses": ["a", "\ud800"]}, "responses[1] holds a lone surrogate"),
    (GOOD | {"scores": [1.0, "2"]}, "scores[1] must be a number, got str"),
    (GOOD | {"scores": [1.0, True]}, "scores[1] must be a number, got bool"),
    (GOOD | {"scores": [float("inf"), 1.0]}, "scores[0] must be finite, got inf"),
    (GOOD | {"scores": [10**400, 1.0]}, "scores[0] must be finite, got an integer beyond float64"),
    (GOOD | {"responses": ["a", USER]}, "responses must be all strings or all lists of messages, got both"),
    (GOOD | {"responses": [USER, USER]}, "prompt must be a list of messages, as the responses are, got str"),
    (GOOD | {"prompt": []}, "prompt must hold a message, got an empty list"),
    (GOOD | {"prompt": ["x"]}, "prompt[0] must be a message, got str"),
    (GOOD | {"prompt": [{"role": "user"}]}, "prompt[0] must have a content that is a string, got none"),
    (GOOD | {"prompt": [USER[0] | {"tool_calls": [1]}]}, "prompt[0] must hold role and content alone, got also"),
    (GOOD | {"prompt": [{"role": "user", "content": "\ud800"}]}, "prompt holds a lone surrogate"),
    (GOOD | {"lengths": [1, -1]}, "lengths must lie in [0, 2^31), got -1"),
    (GOOD | {"lengths": [1, 2.5]}, "lengths[1] must be an integer, got float"),
    (GOOD | {"lengths": [1]}, "lengths must have one entry per response, got 1 for 2"),
    (GOOD | {"sources": ["m", 7]}, "sources[1] must be a string, got int"),
    (GOOD | {"truncated": ["yes", None]}, "truncated[0] must be true or false, got str"),
    ({"instruction": "p", "completions": "r"}, "completions must be a list, got str"),
    ({"instruction": "p", "completions": [{"text": "r"}]}, "completions[0] must be an object with a response"),
    ({"completions": []}, "no field 'instruction'"),
    ({"chosen": "abc", "rejected": "xyz", "scores_chosen": 1, "scores_rejected": 0}, "no field 'prompt', and chosen"),
    ({"chosen": "abc", "rejected": "abc", "scores_chosen": 1, "scores_rejected": 0}, "no field 'prompt', and one"),
    ({"chosen": "abc", "rejected": 3, "scores_chosen": 1, "scores_rejected": 0}, "rejected must be a string or"),
]


@pytest.mark.parametrize(("row", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_a_malformed_row_is_reported_with_its_line(tmp_path, row, reason):
    path = write_lines(tmp_path / "samples.jsonl", [GOOD, b"", row, GOOD])
    samples = read_scored_samples(path)
    assert samples.prompts == ["p", "p"] and samples.responses == [["a", "b"]] * 2
    assert [problem.row for problem in samples.problems] == [3]
    assert str(samples.problems[0]).startswith(f"{path}:3: {reason}")
    columns = read_samples(path)
    assert columns.row.tolist() == [1, 4] and columns.problems == samples.problems


def test_ultrafeedback(tmp_path):
    completions = [
        {"model": "m", "response": "a", "overall_score": 7.5, "fine-grained_score": 4, "custom_system_prompt": "x",
         "annotations": {"helpfulness": {"Rating": "5", "Rationale": "."}, "honesty": {"Rating": "N/A"}}},
        {"model": "n", "response": "bb", "overall_score": 6.0, "fine-grained_score": None,
         "annotations": {"helpfulness": {"Rating": "2"}, "honesty": {"Rating": "3"}}},
    ]  # fmt: skip
    rows = [{"instruction": "p", "source": "evol", "completions": completions}]
    path = write_lines(tmp_path / "samples.jsonl", rows)
    samples = read_samples(path)
    assert {name: scores.tolist() for name, scores in samples.scores.items()} == {
        "overall_score": [7.5, 6.0],
        "fine-grained_score": [4.0, pytest.approx(np.nan, nan_ok=True)],
    }
    assert samples.source_names == ["m", "n"] and samples.sources.tolist() == [0, 1]
    samples = read_samples(path, score_fields=["helpfulness", "honesty"])
    np.testing.assert_array_equal(samples.scores["helpfulness"], [5, 2])
    np.testing.assert_array_equal(samples.scores["honesty"], [np.nan, 3])
    assert list(texts(samples)) == [("p", ["a", "bb"])]
    completions[1]["annotations"]["honesty"]["Rating"] = "good"
    path = write_lines(tmp_path / "samples.jsonl", rows)
    assert read_samples(path, score_fields=["honesty"]).problems[0].reason == "honesty[1] must be a number, got str"


def test_preference_rows_are_pools_of_two(tmp_path):
    both = {"score_chosen": 8, "score_rejected": None, "source_chosen": "m", "source_rejected": "n", "prompt_id": "77"}
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "bb"} | both,
        {"chosen": "Say so: yes", "rejected": "Say so: no"} | both,
        {"prompt": USER, "chosen": CLEVER, "rejected": CLEVER * 2} | both,
        {"prompt": "hello", "chosen": USER + CLEVER, "rejected": USER + CLEVER * 2} | both,
        {"chosen": USER + CLEVER, "rejected": [*USER, {"role": "assistant", "content": "x"}]} | both,
    ]
    samples = read_samples(write_lines(tmp_path / "pairs.jsonl", rows))
    assert samples.problems == [] and samples.offsets.tolist() == [0, 2, 4, 6, 8, 10]
    np.testing.assert_array_equal(samples.scores["score"], [8, np.nan] * 5)
    assert samples.sources.tolist() == [0, 1] * 5
    assert list(texts(samples)) == [
        ("p", ["a", "bb"]),
        ("Say so:", [" yes", " no"]),
        (USER, [CLEVER, CLEVER * 2]),
        (USER, [CLEVER, CLEVER * 2]),
        (USER, [CLEVER, [{"role": "assistant", "content": "x"}]]),
    ]


def test_an_implicit_prompt_is_the_one_trl_finds(tmp_path):
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed (the extra [trl])")
    draw = random.Random(0)

    def text(least):
        return "".join(draw.choice("ab ") for _ in range(draw.randint(least, 5)))

    rows = []
    for _ in range(200):
        prompt = "a" + text(0)
        chosen, rejected = prompt + "x" + text(0), prompt + "y" + text(0)
        rows.append({"chosen": chosen, "rejected": rejected, "score_chosen": 1, "score_rejected": 0})
    samples = read_samples(write_lines(tmp_path / "pairs.jsonl", rows))
    found = [(row["prompt"], [row["chosen"], row["rejected"]]) for row in map(data_utils.extract_prompt, rows)]
    assert samples.problems == [] and list(texts(samples)) == found


@pytest.mark.parametrize("name", ["{}_rating", "{}-rating", "rating_{}"])
def test_scores_of_pairs_by_other_names(tmp_path, name):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", name.format("chosen"): 2, name.format("rejected"): 1}
    samples = read_samples(write_lines(tmp_path / "pairs.jsonl", [row]), score_fields=["rating"])
    assert samples.scores["rating"].tolist() == [2, 1]


def test_replies_in_plain_text_to_a_conversation_are_the_assistants(tmp_path):
    rows = [{"prompt": USER, "responses": ["naïve", "b"], "scores": [1, 0]}]
    rows += [{"prompt": USER, "responses": [CLEVER, [{"role": "assistant", "content": "c"}]], "scores": [1, 0]}]
    samples = read_samples(write_lines(tmp_path / "samples.jsonl", rows))
    assert samples.conversational.all() and samples.lengths.tolist() == [5, 1, 5, 1]
    assert samples.text_hash[0] == samples.text_hash[2] and samples.text_hash[1] != samples.text_hash[3]
    assert next(texts(samples)) == (USER, [CLEVER, [{"role": "assistant", "content": "b"}]])


# ---- by themselves


def test_a_row_by_itself():
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, None], "models": ["m", None], "prompt_id": 7}
    found = parse_row(row | {"finish_reason": ["stop", "length"]}, Fields(("scores",), "models", None))
    assert (found.prompt, found.responses) == ("p", ["a", "b"])
    np.testing.assert_array_equal(found.scores["scores"], [1, np.nan])
    assert (found.sources, found.lengths, found.truncated) == (["m", None], None, [False, True])
    assert found.prompt_id == "7"
    with pytest.raises(ValueError, match=r"no field 'scores' \(or name it: score_field\)"):
        parse_row(row, Fields(None, None, None))


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (GOOD, ("scores",)),
        ({"prompt": "p", "responses": ["a"]}, None),
        ({"instruction": "p", "completions": [{"response": "a", "overall_score": 3}]}, ("overall_score",)),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 0}, ("score",)),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, None),
        ([1], None),
    ],
    ids=["pool", "pool without", "completions", "pair", "pair without", "no object"],
)
def test_the_score_fields_of_a_row(row, fields):
    assert score_fields(row) == fields
