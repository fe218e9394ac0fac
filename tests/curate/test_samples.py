"""curate.read_samples, read_scored_samples: every malformed row is reported with its line, none is lost or mended."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples_cases import GOOD, write_lines

from fastpref.curate import (
    InputError,
    read_samples,
    read_scored_samples,
    texts,
    to_logit,
)
from fastpref.curate.files import processes, reading


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


def test_the_first_row_decides_which_field_holds_the_scores(tmp_path):
    probability = {"prompt": "p", "responses": ["a"], "win_prob": [0.5]}
    path = write_lines(tmp_path / "samples.jsonl", [probability, GOOD, probability | {"scores": [3.0]}])
    samples = read_scored_samples(path)
    assert samples.score_field == "win_prob" and [s.tolist() for s in samples.scores] == [[0.5], [0.5]]
    assert [problem.row for problem in samples.problems] == [2]
    assert read_scored_samples(path, "scores").scores[1].tolist() == [3.0]


def test_to_logit():
    np.testing.assert_allclose(to_logit([0.5, 0.75, np.nan]), [0, np.log(3), np.nan], atol=1e-15)
    np.testing.assert_allclose(to_logit([0, 1, 1e-12]), [-np.log(1e8 - 1), np.log(1e8 - 1), -np.log(1e8 - 1)])
    for outside in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            to_logit([outside, 0.5])


# ---- columns


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
        assert reading.stamp(samples.inputs) == samples.stamp
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
                        st.none() | st.floats(-9e29, 9e29) | st.just(float("nan")) | st.integers(-(2**70), 2**70),
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
