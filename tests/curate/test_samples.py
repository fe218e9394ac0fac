"""curate.read_samples, read_scored_samples: every malformed row is reported with its line, none is lost or mended."""

import gzip
import json
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.curate import (
    InputError,
    read_samples,
    read_scored_samples,
    text_hashes,
    texts,
    to_logit,
)
from fastpref.curate.files import processes, reading

GOOD = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0.5]}


USER = [{"role": "user", "content": "hello"}]
CLEVER = [{"role": "assistant", "content": "naïve"}]


def write_lines(path, rows):
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


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


@pytest.mark.parametrize(("row", "reason"), MALFORMED)
def test_a_malformed_row_is_reported_with_its_line(tmp_path, row, reason):
    path = write_lines(tmp_path / "samples.jsonl", [GOOD, b"", row, GOOD])
    samples = read_scored_samples(path)
    assert samples.prompts == ["p", "p"] and samples.responses == [["a", "b"]] * 2
    assert [problem.row for problem in samples.problems] == [3]
    assert str(samples.problems[0]).startswith(f"{path}:3: {reason}")
    columns = read_samples(path)
    assert columns.row.tolist() == [1, 4] and columns.problems == samples.problems


def test_a_text_needs_a_score_where_the_texts_are_held(tmp_path):
    nan, null = GOOD | {"scores": [float("nan"), 1.0]}, GOOD | {"scores": [2.0, None]}
    path = write_lines(tmp_path / "samples.jsonl", [nan, null])
    assert [problem.reason for problem in read_scored_samples(path).problems] == [
        "scores[0] must be a number, got none",
        "scores[1] must be a number, got none",
    ]
    np.testing.assert_array_equal(read_samples(path).scores["scores"], [np.nan, 1, 2, np.nan])


def test_ragged_pools_become_a_matrix_padded_with_nan(tmp_path):
    rows = [GOOD, {"prompt": "q", "responses": [], "scores": []}, {"prompt": "r", "responses": ["c"], "scores": [7]}]
    samples = read_scored_samples(write_lines(tmp_path / "samples.jsonl", rows))
    np.testing.assert_array_equal(samples.score_matrix(), [[1, 0.5], [np.nan, np.nan], [7, np.nan]])
    assert samples.problems == [] and samples.head(1).prompts == ["p"]


def test_the_file_type_is_read_from_its_bytes(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    import pyarrow

    rows = [GOOD, GOOD | {"scores": [1.0, None]}, GOOD | {"prompt": "q"}]
    for name, write in {
        "zipped": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
        "plain": lambda path: path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, rows)).encode()),
        "table": lambda path: parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    }.items():
        path = tmp_path / name
        write(path)
        samples = read_scored_samples(path)
        assert samples.prompts == ["p", "q"], name
        assert list(map(str, samples.problems)) == [f"{path}:2: scores[1] must be a number, got none"]


def test_the_first_row_decides_which_field_holds_the_scores(tmp_path):
    probability = {"prompt": "p", "responses": ["a"], "win_prob": [0.5]}
    path = write_lines(tmp_path / "samples.jsonl", [probability, GOOD, probability | {"scores": [3.0]}])
    samples = read_scored_samples(path)
    assert samples.score_field == "win_prob" and [s.tolist() for s in samples.scores] == [[0.5], [0.5]]
    assert [problem.row for problem in samples.problems] == [2]
    assert read_scored_samples(path, "scores").scores[1].tolist() == [3.0]


@pytest.mark.parametrize(
    "content",
    [gzip.compress(json.dumps(GOOD).encode() * 1000)[:-12], b"\x1f\x8b but not gzip", b"PAR1 but not Parquet"],
    ids=["cut gzip", "not gzip", "not Parquet"],
)
def test_an_unreadable_file_is_one_input_error(tmp_path, content):
    path = tmp_path / "samples"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot read") as caught:
        read_scored_samples(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*: No such file or directory"):
        read_scored_samples(tmp_path / "nothing.jsonl")


def test_to_logit():
    np.testing.assert_allclose(to_logit([0.5, 0.75, np.nan]), [0, np.log(3), np.nan], atol=1e-15)
    np.testing.assert_allclose(to_logit([0, 1, 1e-12]), [-np.log(1e8 - 1), np.log(1e8 - 1), -np.log(1e8 - 1)])
    for outside in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            to_logit([outside, 0.5])


# ---- columns


def equal_samples(a, b, but=()):
    for name, column in vars(a).items():
        other = getattr(b, name)
        if isinstance(column, np.ndarray) and name not in but:
            np.testing.assert_array_equal(column, other, err_msg=name)
            assert column.dtype == other.dtype, name
    assert list(a.scores) == list(b.scores)
    for name, scores in a.scores.items():
        np.testing.assert_array_equal(scores, b.scores[name], err_msg=name)
    assert (a.source_names, a.fields) == (b.source_names, b.fields)
    assert [(p.row, p.reason) for p in a.problems] == [(p.row, p.reason) for p in b.problems]


def test_the_columns_of_a_small_file(tmp_path):
    rows = [
        {"prompt": "p", "responses": ["a", "naïve", " \n"], "scores": [1, None, 0.5], "sources": ["m", "n", None]},
        {"prompt": "q", "responses": [], "scores": []},
        {"prompt": "p", "responses": ["naïve"], "scores": [float("nan")], "truncated": [True], "extra": 1},
    ]
    path = write_lines(tmp_path / "samples.jsonl", rows)
    samples = read_samples(path)
    assert (samples.prompts, samples.responses, samples.problems) == (3, 4, [])
    assert samples.offsets.tolist() == [0, 3, 3, 4] and samples.offsets.dtype == np.int64
    np.testing.assert_array_equal(samples.scores["scores"], [1, np.nan, 0.5, np.nan])
    assert samples.lengths.tolist() == [1, 5, 2, 5] and samples.lengths.dtype == np.int32
    assert samples.blank.tolist() == [False, False, True, False]
    assert samples.sources.tolist() == [0, 1, -1, -1] and samples.source_names == ["m", "n"]
    assert samples.truncated.tolist() == [False, False, False, True]
    assert samples.row.tolist() == [1, 2, 3] and samples.position[0] == 0
    assert samples.text_hash[1] == samples.text_hash[3] and len(set(samples.text_hash.tolist())) == 3
    assert samples.prompt_hash[0] == samples.prompt_hash[2] != samples.prompt_hash[1]
    assert not samples.conversational.any()


def test_named_fields_must_be_in_every_row(tmp_path):
    rows = [
        GOOD | {"models": ["x", "y"], "tokens": [3, 4], "help": [0.1, None], "finish_reason": ["stop", "length"]},
        GOOD,
    ]
    path = write_lines(tmp_path / "samples.jsonl", rows)
    samples = read_samples(path, score_fields=["help", "scores"], source_field="models", length_field="tokens")
    assert list(samples.scores) == ["help", "scores"] and samples.prompts == 1
    np.testing.assert_array_equal(samples.scores["help"], [0.1, np.nan])
    assert samples.lengths.tolist() == [3, 4] and samples.source_names == ["x", "y"]
    assert samples.truncated.tolist() == [False, True]
    assert [(p.row, p.reason) for p in samples.problems] == [(2, "no field 'help'")]
    assert read_samples(path, source_field="models").problems[0].reason == "no field 'models'"
    assert read_samples(path, length_field="tokens").problems[0].reason == "no field 'tokens'"
    with pytest.raises(TypeError, match="score_fields must be a sequence of names"):
        read_samples(path, score_fields="help")


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


# ---- files in parts


def many_rows(count=300, seed=0):
    draw = random.Random(seed)
    rows = []
    for k in range(count):
        responses = [
            "".join(draw.choice("ab é\n") for _ in range(draw.randint(0, 9))) for _ in range(draw.randint(0, 5))
        ]
        row = {
            "prompt": f"p{k % 97}",
            "responses": responses,
            "scores": [draw.choice([None, 0.5, 2]) for _ in responses],
        }
        if draw.random() < 0.5:
            row["sources"] = [draw.choice("mnopq") for _ in responses]
        if draw.random() < 0.2:
            row["lengths"] = [7 for _ in responses]
        rows.append(row if draw.random() < 0.9 else row | {"prompt": None})
    return rows


def write_parquet(path, rows, **options):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    names = dict.fromkeys(name for row in rows for name in row)
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path, **options)
    return path


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("part", [1, 500, 1 << 23])
def test_neither_the_kind_of_file_nor_its_parts_change_the_columns(tmp_path, monkeypatch, part, workers):
    rows = many_rows()
    one = read_samples(write_lines(tmp_path / "whole.jsonl", rows), workers=1)
    assert one.problems and one.prompts + len(one.problems) == len(rows)
    monkeypatch.setattr(reading, "PART", part)
    plain = write_lines(tmp_path / "samples.jsonl", rows)
    zipped = tmp_path / "samples.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    table = write_parquet(tmp_path / "samples.parquet", rows, row_group_size=max(1, part // 50))
    seen = []
    for path in (plain, zipped, table):
        samples = read_samples(path, workers=workers, progress=lambda *at: seen.append(at))
        equal_samples(one, samples, but=() if path != table else ("position",))
        assert seen[-1] == (reading.extent(path),) * 2 and seen == sorted(seen)
        seen.clear()
        for prompts in (np.arange(one.prompts), np.arange(3, one.prompts, 7), np.arange(0)):
            chosen = [rows[k - 1] for k in samples.row[prompts].tolist()]
            assert list(texts(samples, prompts)) == [(row["prompt"], row["responses"]) for row in chosen]


def test_blank_lines_other_line_ends_and_a_byte_order_mark(tmp_path, monkeypatch):
    good = json.dumps(GOOD).encode()
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n \r\n\n" + good + b"\n\n{\r\n" + good)
    for part in (1, 1 << 20):
        monkeypatch.setattr(reading, "PART", part)
        samples = read_samples(path)
        assert samples.row.tolist() == [1, 4, 7] and [problem.row for problem in samples.problems] == [6]
        assert [prompt for prompt, _ in texts(samples)] == ["p"] * 3
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\xef\xbb\xbf" + good)
    assert [(p.row, p.reason[:8]) for p in read_samples(path).problems] == [(2, "not JSON")]


@pytest.mark.parametrize("rows", [[], [[]], [{"prompt": "p"}]])
def test_a_file_without_a_usable_row(tmp_path, rows):
    samples = read_samples(write_lines(tmp_path / "samples.jsonl", rows))
    assert (samples.prompts, samples.responses, len(samples.problems)) == (0, 0, len(rows))
    assert samples.offsets.tolist() == [0] and samples.text_hash.dtype == np.uint64
    assert list(texts(samples)) == []


def test_text_of_parquet_that_is_not_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    binary = pyarrow.array([b"p", b"a\xff", b"q"])
    prompt = pyarrow.StringArray.from_buffers(3, binary.buffers()[1], binary.buffers()[2])
    path = tmp_path / "samples.parquet"
    parquet.write_table(pyarrow.table({"prompt": prompt, "responses": [["a"]] * 3, "scores": [[1.0]] * 3}), path)
    samples = read_samples(path)
    assert samples.row.tolist() == [1, 3]
    assert [(p.row, p.reason) for p in samples.problems] == [(2, "not UTF-8 at byte 1 of a string")]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(json.dumps(GOOD).encode() * 1000)[:-12],
        gzip.compress(json.dumps(GOOD).encode() * 1000)[:40] + b"\x00" * 40,
        b"PAR1 but not Parquet",
    ],
    ids=["cut gzip", "broken gzip", "not Parquet"],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_file_is_an_input_error_for_columns_too(tmp_path, content, workers):
    path = tmp_path / "samples"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot read") as caught:
        read_samples(path, workers=workers)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        read_samples(tmp_path / "nothing")


def test_a_file_that_changes_between_the_passes(tmp_path):
    path = write_lines(tmp_path / "samples.jsonl", [GOOD, GOOD | {"prompt": "q"}])
    samples = read_samples(path)
    status = os.stat(path)
    assert len(list(texts(samples))) == 2
    for row in (
        GOOD | {"prompt": "x"},
        GOOD | {"responses": ["a", "c"]},
        GOOD | {"responses": ["abcd"], "scores": [1]},
    ):
        line = json.dumps(row)
        line = line[:-1] + " " * (len(json.dumps(GOOD)) - len(line)) + "}"
        write_lines(path, [line.encode(), GOOD | {"prompt": "q"}])
        with pytest.raises(InputError, match="changed after its scores were read"):  # by size or time
            list(texts(samples))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert reading.stamp(path) == samples.stamp
        with pytest.raises(InputError, match="changed after its scores were read"):  # by its texts
            list(texts(samples))


def test_texts_wants_ascending_prompts(tmp_path):
    samples = read_samples(write_lines(tmp_path / "samples.jsonl", [GOOD] * 3))
    with pytest.raises(ValueError, match="must be strictly increasing"):
        list(texts(samples, [1, 1]))
    with pytest.raises(ValueError, match=r"must lie in \[0, 3\), got 1 to 3"):
        list(texts(samples, [1, 3]))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "prompt": st.text(st.characters(exclude_categories=["Cs"])),
                "pool": st.lists(
                    st.tuples(
                        st.text(st.characters(exclude_categories=["Cs"])),
                        st.none() | st.floats(allow_infinity=False) | st.integers(-(2**70), 2**70),
                    )
                ),
            }
        )
    )
)
def test_what_is_read_is_what_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "samples.jsonl"
    lines = [
        {"prompt": row["prompt"], "responses": [t for t, _ in row["pool"]], "scores": [s for _, s in row["pool"]]}
        for row in rows
    ]
    samples = read_samples(write_lines(path, lines))
    assert samples.problems == []
    assert list(texts(samples)) == [(line["prompt"], line["responses"]) for line in lines]
    everything = [text for line in lines for text in line["responses"]]
    assert samples.lengths.tolist() == list(map(len, everything))
    assert samples.blank.tolist() == [not text.strip() for text in everything]
    if lines:
        scores = [np.nan if score is None else score for line in lines for score in line["scores"]]
        np.testing.assert_array_equal(samples.scores["scores"], np.array(scores, float))


def test_a_response_takes_at_most_64_bytes(tmp_path):
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "truncated": [True, False], "sources": ["m", "n"]}
    samples = read_samples(
        write_lines(tmp_path / "samples.jsonl", [row | {"x": [1, 2]}] * 1000), score_fields=["scores", "x"]
    )
    arrays = [column for column in vars(samples).values() if isinstance(column, np.ndarray)]
    assert sum(array.nbytes for array in [*arrays, *samples.scores.values()]) <= 64 * samples.responses


def test_sources_are_numbered_by_name(tmp_path):
    rows = [GOOD | {"sources": ["c", "b"]}, GOOD | {"sources": [None, "a"]}]
    samples = read_samples(write_lines(tmp_path / "samples.jsonl", rows))
    assert samples.source_names == ["a", "b", "c"] and samples.sources.tolist() == [2, 1, -1, 0]


# ---- processes


def test_processes_give_results_in_order_and_errors_as_they_are():
    assert list(processes.in_processes(divmod, ((k, 7) for k in range(50)), 2)) == [divmod(k, 7) for k in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(processes.in_processes(divmod, [(1, 1), (1, 0)], 2))
    with pytest.raises(RuntimeError, match="a process ended with exit code 3"):
        list(processes.in_processes(os._exit, [(3,)], 2))
    with pytest.raises(RuntimeError, match="a process ended with exit code 3"):  # rather than of the pipe to it
        list(processes.in_processes(os._exit, [(3,), *[(b"x" * (1 << 23),)] * 6], 2))
    with pytest.raises(RuntimeError, match="E: all of 7"):  # an error that pickle cannot carry
        list(processes.in_processes(exec, [("class E(Exception): pass\nraise E('all of 7')",)], 2))
    running = processes.in_processes(divmod, ((k, 7) for k in range(50)), 2)
    assert next(running) == (0, 0)
    running.close()


def test_a_script_without_a_main_guard_may_use_processes(tmp_path, python):
    path = write_lines(tmp_path / "samples.jsonl", [GOOD] * 50)
    code = f"from fastpref.curate import read_samples\nprint(read_samples({str(path)!r}, workers=2).prompts)"
    script = tmp_path / "script.py"
    script.write_text(code)
    done = python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert (done.stdout, done.stderr) == ("50\n", "")


def test_hashes_of_what_is_held_out(tmp_path):
    rows = [{"question": "p", "answers": ["x", "y"], "n": 3}, {"messages": USER + CLEVER}, "free text"]
    held = text_hashes(write_lines(tmp_path / "held.jsonl", rows))
    assert (np.diff(held) > 0).all() and held.dtype == np.uint64
    pools = [
        {"prompt": "p", "responses": ["x", "z", "hello", "free text"], "scores": [1, 2, 3, 4]},
        {"prompt": USER, "responses": ["naïve", "p"], "scores": [1, 2]},
        {"prompt": USER + CLEVER, "responses": ["q"], "scores": [1]},
    ]
    samples = read_samples(write_lines(tmp_path / "samples.jsonl", pools))
    assert np.isin(samples.prompt_hash, held).tolist() == [True, True, True]
    assert np.isin(samples.text_hash, held).tolist() == [True, False, True, True, True, True, False]
    with pytest.raises(InputError, match=r"held.jsonl:2: not JSON"):
        text_hashes(write_lines(tmp_path / "held.jsonl", [rows[0], b"{"]))
    assert len(text_hashes(write_lines(tmp_path / "held.jsonl", []))) == 0
