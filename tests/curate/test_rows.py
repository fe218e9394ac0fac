"""Rows of samples in every shape that is read: pools, completions, pairs; and what a malformed one is told."""

import random

import numpy as np
import pytest
from samples_cases import CLEVER, GOOD, USER, write_lines

from fastpref.curate import (
    InputError,
    read_samples,
    read_scored_samples,
    texts,
)
from fastpref.curate.files.layouts import LAYOUTS
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
    (GOOD | {"prompt": None}, "prompt is null"),
    (GOOD | {"prompt": 3}, "prompt must be a string, got int"),
    (GOOD | {"responses": "ab"}, "responses must be a list, got str"),
    (GOOD | {"scores": 1.0}, "scores must be a list, got float"),
    (GOOD | {"scores": [1.0]}, "scores must have one entry per response, got 1 for 2"),
    (GOOD | {"responses": [None, 3]}, "responses[0] is null"),
    (GOOD | {"prompt": "\ud800"}, "prompt holds a lone surrogate"),
    (
        b'{"prompt": "p", "responses": ["a"], "scores": [1], "scores": [2]}',
        "the key 'scores' stands there more than once",
    ),
    (
        b'{"prompt": [{"role": "user", "content": "a", "content": "b"}], "responses": ["a"], "scores": [1]}',
        "the key 'content' stands there more than once",
    ),
    (
        b'{"prompt": "p", "responses": ["a"], "scores": [1], "s\\u0063ores": [2]}',
        "the key 'scores' stands there more than once",
    ),
    (GOOD | {"scores": [1.0, "1,234"]}, "scores[1] must be a number, got '1,234'"),
    (GOOD | {"scores": [1.0, "high"]}, "scores[1] must be a number, got 'high'"),
    (GOOD | {"scores": [1.0, True]}, "scores[1] must be a number, got True"),
    (GOOD | {"scores": [float("inf"), 1.0]}, "scores[0] must be finite, got inf"),
    (GOOD | {"scores": [10**400, 1.0]}, "scores[0] must be finite, got an integer beyond float64"),
    (GOOD | {"responses": ["a", USER]}, "responses must be all strings or all lists of messages, got both"),
    (GOOD | {"responses": [USER, USER]}, "prompt must be a list of messages, as the responses are, got str"),
    (GOOD | {"prompt": []}, "prompt must hold a message, got an empty list"),
    (GOOD | {"prompt": ["x"]}, "prompt[0] must be a message, got str"),
    (GOOD | {"prompt": [{"role": "user"}]}, "prompt[0] must have a content that is a string, got none"),
    (GOOD | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "a message has an image, and the row no"),
    (GOOD | {"prompt": [{"role": "user", "content": "\ud800"}]}, "prompt holds a lone surrogate"),
    (GOOD | {"lengths": [1, -1]}, "lengths must lie in [0, 2^31), got -1"),
    (GOOD | {"lengths": [1, 2.5]}, "lengths[1] must be an integer, got float"),
    (GOOD | {"lengths": [1]}, "lengths must have one entry per response, got 1 for 2"),
    (GOOD | {"sources": ["m", 7]}, "sources[1] must be a string, got int"),
    (GOOD | {"truncated": ["yes", None]}, "truncated[0] must be true or false, got str"),
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


PAIR = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c", "score_chosen": 2}
PAIR |= {"score_rejected": 1}
COMPLETIONS = {"instruction": "p", "completions": [{"response": "r", "overall_score": 1}]}


@pytest.mark.parametrize(
    ("good", "row", "reason"),
    [
        (COMPLETIONS, {"completions": "r"}, "completions must be a list, got str"),
        (COMPLETIONS, {"completions": [{"text": "r"}]}, "completions[0] must be an object with a response"),
        (COMPLETIONS, {"instruction": None}, "prompt is null"),
        (PAIR, {"chosen": "abc", "rejected": "abd"}, "no field 'prompt', and chosen and rejected have no turn of an"),
        (
            PAIR,
            {"chosen": "Assistant: a", "rejected": "Assistant: b"},
            "no field 'prompt', and chosen and rejected have",
        ),
        (PAIR, {"rejected": 3}, "rejected must be a string or a list of messages"),
        (PAIR, {"rejected": None}, "rejected must be a string or a list of messages"),
        (PAIR | {"prompt": "p"}, {"rejected": None}, "rejected is null"),
        (PAIR | {"prompt": "p"}, {"rejected": "\ud800"}, "responses[1] holds a lone surrogate"),
    ],
)
def test_a_malformed_row_of_another_layout(tmp_path, good, row, reason):
    samples = read_samples(write_lines(tmp_path / "samples.jsonl", [good, good | row, good]))
    assert samples.row.tolist() == [1, 3]
    assert [problem.row for problem in samples.problems] == [2]
    assert samples.problems[0].reason.startswith(reason)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "responses[1] is null"),
        (3, "responses[1] must be a string, got int"),
        ("half \ud83d", "responses[1] holds a lone surrogate, which is not Unicode text"),
    ],
)
def test_a_bad_response_leaves_its_pool(tmp_path, bad, reason):
    row = {"prompt": "p", "responses": ["a", bad, "c"], "scores": [1, 9, 2]}
    samples = read_samples(write_lines(tmp_path / "samples.jsonl", [row]))
    assert samples.problems == [] and [str(p) for p in samples.bad_responses] == [f"{samples.path}:1: {reason}"]
    np.testing.assert_array_equal(samples.scores["scores"], [1, np.nan, 2])
    assert samples.blank.tolist() == [False, True, False]
    assert list(texts(samples)) == [("p", ["a", "", "c"])]


@pytest.mark.parametrize("further", [{"tools": "\ud800"}, {"id": "\ud800"}, {"images": [{"path": "\ud800"}]}])
def test_what_stands_beside_a_prompt_is_text_too(tmp_path, further):
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    samples = read_samples(write_lines(tmp_path / "samples.jsonl", [row | further, row]))
    assert samples.row.tolist() == [2] or list(further) == ["id"]
    assert all("lone surrogate" in problem.reason for problem in samples.problems)


def test_messages_keep_what_they_hold(tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    chosen = [
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "look it up"},
        {"role": "tool", "content": "4 C", "name": "weather"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 4 degrees."}], "language": "English"},
    ]
    rejected = [{"role": "assistant", "content": "Warm."}]
    prompt = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Oslo?", "toxic": False}]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": [call]}
    path = write_lines(tmp_path / "samples.jsonl", [row, row | {"tools": None}])
    samples = read_samples(path)
    assert list(texts(samples)) == [(prompt, [chosen, rejected])] * 2
    assert samples.fields.carried == ("tools",) and not samples.blank.any() and not samples.scored
    assert samples.prompt_hash[0] != samples.prompt_hash[1]  # other tools, another question


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
    assert read_samples(path, score_fields=["honesty"]).problems[0].reason == "honesty[1] must be a number, got 'good'"


def test_preference_rows_are_pools_of_two(tmp_path):
    both = {"score_chosen": 8, "score_rejected": None, "source_chosen": "m", "source_rejected": "n", "prompt_id": "77"}
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "bb"} | both,
        {"chosen": "\n\nHuman: Go\n\nAssistant: yes", "rejected": "\n\nHuman: Go\n\nAssistant: yo"} | both,
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
        ("\n\nHuman: Go\n\nAssistant:", [" yes", " yo"]),
        (USER, [CLEVER, CLEVER * 2]),
        (USER, [CLEVER, CLEVER * 2]),
        (USER, [CLEVER, [{"role": "assistant", "content": "x"}]]),
    ]


def test_an_implicit_prompt_is_the_one_trl_finds(tmp_path):
    """Of conversations; strings are cut by TRL wherever they differ first, also within a word."""
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL is not installed (the extra [trl])")
    draw = random.Random(0)
    rows = []
    for _ in range(200):
        turns = [{"role": r, "content": draw.choice("ab")} for r in ("user", "assistant") * draw.randint(1, 3)]
        replies = [[{"role": "assistant", "content": side + draw.choice("ab")}] for side in "xy"]
        chosen, rejected = (turns[:-1] + reply for reply in replies)
        rows.append({"chosen": chosen, "rejected": rejected, "score_chosen": 1, "score_rejected": 0})
    samples = read_samples(write_lines(tmp_path / "pairs.jsonl", rows))
    found = [(row["prompt"], [row["chosen"], row["rejected"]]) for row in map(data_utils.extract_prompt, rows)]
    assert samples.problems == [] and list(texts(samples)) == found


@pytest.mark.parametrize(
    "turn",
    [
        "\n\nAssistant:",
        "<|im_start|>assistant\n",
        " [/INST]",
        "<start_of_turn>model\n",
        "\n### Response:",
        "\nASSISTANT:",
    ],
)
def test_strings_are_split_behind_the_last_turn_that_both_have(tmp_path, turn):
    prompt = f"ask{turn} well{turn}"
    rows = [
        {
            "chosen": prompt + "The tall",
            "rejected": prompt + f"The tall one{turn} x",
            "score_chosen": 1,
            "score_rejected": 0,
        }
    ]
    samples = read_samples(write_lines(tmp_path / "pairs.jsonl", rows))
    assert list(texts(samples)) == [(prompt, ["The tall", f"The tall one{turn} x"])]


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
    with pytest.raises(ValueError, match="the file has no scores under a usual name, and none are named"):
        parse_row(row, Fields(None, None, None))


@pytest.mark.parametrize(
    ("layout", "row", "fields"),
    [
        ("pools", GOOD, ("scores",)),
        ("pools", {"prompt": "p", "responses": ["a"]}, None),
        (
            "ultrafeedback",
            {"instruction": "p", "completions": [{"response": "a", "overall_score": 3}]},
            ("overall_score",),
        ),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 0}, ("score",)),
        (
            "pairs",
            {
                "chosen": "a",
                "rejected": "b",
                "chosen-rating": 1,
                "rejected-rating": 0,
                "tokens_chosen": 3,
                "tokens_rejected": 2,
            },
            ("rating",),
        ),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": None, "score_rejected": None}, None),
        ("pools", [1], None),
    ],
)
def test_the_score_fields_of_a_row(layout, row, fields):
    assert score_fields(row, Fields(layout=layout, roles=dict(LAYOUTS[layout].roles))) == fields


def test_several_scores_of_the_sides_must_be_named(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "tokens_chosen": 3, "tokens_rejected": 5}
    scores = {"a_score_chosen": 1, "a_score_rejected": 0, "b_score_chosen": 1, "b_score_rejected": 0}
    path = write_lines(tmp_path / "pairs.jsonl", [row | scores])
    with pytest.raises(InputError, match="scores of the sides are a_score, b_score: name those to use"):
        read_samples(path)
    assert read_samples(path, score_fields=["b_score"]).scores["b_score"].tolist() == [1, 0]
    path = write_lines(tmp_path / "pairs.jsonl", [row])
    assert not read_samples(path).scored  # a number of tokens is no score
    assert read_samples(path, score_fields=["tokens"]).scores["tokens"].tolist() == [3, 5]
