"""curate.read_scored_samples: every malformed row is reported with its line, none is dropped silently."""

import gzip
import json

import numpy as np
import pytest

from fastpref.curate import InputError, read_scored_samples, to_logit

GOOD = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0.5]}


def write_lines(path, rows):
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
        (b"[" * 100_000, "not JSON"),
        (b'{"x": 1' + b"0" * 5000 + b"}", "not JSON"),
        ([1, 2], "a row must be an object, got list"),
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
        (GOOD | {"scores": [float("nan"), 1.0]}, "scores[0] must be a number, got none"),
        (GOOD | {"scores": [float("inf"), 1.0]}, "scores[0] must be finite, got inf"),
        (GOOD | {"scores": [10**400, 1.0]}, "scores[0] must be finite, got an integer beyond float64"),
    ],
)
def test_a_malformed_row_is_reported_with_its_line(tmp_path, row, reason):
    path = write_lines(tmp_path / "samples.jsonl", [GOOD, b"", row, GOOD])
    samples = read_scored_samples(path)
    assert samples.prompts == ["p", "p"] and samples.responses == [["a", "b"]] * 2
    assert [problem.row for problem in samples.problems] == [3]
    assert str(samples.problems[0]).startswith(f"{path}:3: {reason}")


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
