"""curate.write_pairs: the texts of the pairs in the order given, in whole files that the trainers read."""

import contextlib
import gzip
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref._whole_file import whole_file
from fastpref.curate import (
    Coded,
    InputError,
    goal_records,
    goal_rewrite,
    goal_text,
    read_metadata,
    read_samples,
    rescale_scores,
    select_pairs,
    write_pairs,
)
from fastpref.curate.files import reading
from fastpref.curate.files import writing as files

USER = [{"role": "user", "content": "hello"}]

ONE_ROW = ("trl", "trl-conversational", "axolotl")  # formats with a row a pair; test_formats.py has the others


def reply(text):
    return [{"role": "assistant", "content": text}]


def pools(prompts=60, messages=False, seed=0):
    """Rows of ragged pools with scores, sources and tokens; texts say where they are from."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(prompts):
        count = int(rng.integers(2, 7))
        texts = [f"{p}.{k} " + "é" * int(rng.integers(0, 9)) for k in range(count)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"prompt {p}"}] if messages else f"prompt {p}",
                "responses": [reply(text) for text in texts] if messages else texts,
                "scores": rng.normal(size=count).round(3).tolist(),
                "sources": rng.choice(["m", "n", "o"], count).tolist(),
                "lengths": rng.integers(1, 99, count).tolist(),
            }
        )
    return rows


def write_samples(path, rows):
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        return path
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def read_rows(path):
    path = str(path)
    if path.endswith(".parquet"):
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def samples(tmp_path):
    return read_samples(write_samples(tmp_path / "samples.jsonl", pools()))


def best_against_worst(samples, order=None):
    """Pairs of all prompts in a given order."""
    selection = select_pairs(samples.scores["scores"], offsets=samples.offsets, rejected="min")
    pairs = selection.table()
    if order is not None:
        pairs = {name: column[order] for name, column in pairs.items()}
    return pairs | {"rule": selection.rule}


def expected_rows(rows, pairs):
    for k, (p, chosen, rejected) in enumerate(zip(*(pairs[n] for n in ("prompt", "chosen", "rejected")), strict=True)):
        row = rows[p]
        yield {
            "prompt": row["prompt"],
            "chosen": row["responses"][chosen],
            "rejected": row["responses"][rejected],
            "score_chosen": row["scores"][chosen],
            "score_rejected": row["scores"][rejected],
            "margin": pytest.approx(row["scores"][chosen] - row["scores"][rejected]),
            "source_chosen": row["sources"][chosen],
            "source_rejected": row["sources"][rejected],
            "len_chosen": row["lengths"][chosen],
            "len_rejected": row["lengths"][rejected],
            "chosen_id": chosen,
            "rejected_id": rejected,
            "rank_rejected": 0,
            "z_chosen": pytest.approx(pairs["z_chosen"][k]),
            "z_rejected": pytest.approx(pairs["z_rejected"][k]),
            "n_pool": len(row["responses"]),
            "rule": "max vs min",
        }


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("ending", files.ENDINGS)
@pytest.mark.parametrize("source", files.ENDINGS)
def test_rows_come_in_the_order_given(tmp_path, monkeypatch, source, ending, shuffled):
    monkeypatch.setattr(reading, "PART", 3000)
    monkeypatch.setattr(files, "BLOCK", 7)
    monkeypatch.setattr(files, "ROW_GROUP", 2000)
    rows = pools()
    samples = read_samples(write_samples(tmp_path / f"samples{source}", rows))
    order = np.random.default_rng(1).permutation(60) if shuffled else None
    pairs = best_against_worst(samples, order)
    out = tmp_path / f"pairs{ending}"
    seen = []
    written = write_pairs(samples, pairs, out, progress=lambda *at: seen.append(at))
    assert written == (60, 0) and seen[-1][0] == seen[-1][1] and len(seen) > 2
    found = read_rows(out)
    identities = [row.pop("prompt_id") for row in found]
    assert found == list(expected_rows(rows, pairs))
    assert list(found[0]) == list(next(expected_rows(rows, pairs)))
    assert identities == [f"{samples.prompt_hash[p]:016x}" for p in pairs["prompt"]]
    assert os.listdir(tmp_path).count(out.name) == 1 and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("source", files.ENDINGS)
def test_processes_write_the_same_file(tmp_path, monkeypatch, source):
    monkeypatch.setattr(reading, "PART", 1000)
    samples = read_samples(write_samples(tmp_path / f"samples{source}", pools()), workers=2)
    pairs = best_against_worst(samples, np.random.default_rng(1).permutation(60))
    contents = []
    for workers in (1, 2):
        write_pairs(samples, pairs, tmp_path / "pairs.jsonl", workers=workers)
        contents.append((tmp_path / "pairs.jsonl").read_bytes())
    assert contents[0] == contents[1] and contents[0].count(b"\n") == 60


def test_several_pairs_of_a_prompt_and_prompts_without_one(tmp_path, samples):
    pairs = {"prompt": [5, 2, 5, 5], "chosen": [0, 1, 1, 0], "rejected": [1, 0, 0, 1]}
    out = tmp_path / "pairs.jsonl"
    assert write_pairs(samples, pairs, out).rows == 4
    found = read_rows(out)
    texts = [row["responses"] for row in pools()]
    assert [(row["chosen"], row["rejected"]) for row in found] == [
        (texts[5][0], texts[5][1]),
        (texts[2][1], texts[2][0]),
        (texts[5][1], texts[5][0]),
        (texts[5][0], texts[5][1]),
    ]
    assert found[0] == found[3] and "score_chosen" not in found[0] and "margin" not in found[0]


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_columns_of_all_kinds(tmp_path, samples, ending):
    pairs = {
        "prompt": [1, 0],
        "chosen": [0, 0],
        "rejected": [1, 1],
        "number": np.array([1.5, np.nan]),
        "infinite": np.array([-np.inf, 2.0], np.float32),
        "whole": np.array([3, 4], np.int8),
        "flag": np.array([True, False]),
        "name": ["x", None],
        "coded": Coded(np.array([1, -1]), ["a", "b"]),
        "constant": "quantile:0.10",
        "tau": 0.25,
        "none": None,
        "prompt_id": ["one", "two"],
    }
    out = tmp_path / f"pairs{ending}"
    write_pairs(samples, pairs, out)
    found = read_rows(out)
    wanted = {
        "prompt_id": ["one", "two"],
        "number": [1.5, None],
        "infinite": [None, 2.0],
        "whole": [3, 4],
        "flag": [True, False],
        "name": ["x", None],
        "coded": ["b", None],
        "constant": ["quantile:0.10"] * 2,
        "tau": [0.25] * 2,
        "none": [None] * 2,
    }
    assert {name: [row[name] for row in found] for name in wanted} == wanted
    if ending == ".parquet":
        from pyarrow import parquet

        types = {field.name: str(field.type) for field in parquet.read_schema(out)}
        assert (types["number"], types["infinite"], types["whole"]) == ("double", "float", "int8")
        assert (types["flag"], types["coded"], types["none"], types["chosen"]) == ("bool", "string", "null", "string")


def test_an_identity_of_the_row_is_kept(tmp_path):
    rows = [row | {"prompt_id": f"id {k}"} for k, row in enumerate(pools(3))]
    samples = read_samples(write_samples(tmp_path / "samples.jsonl", rows))
    write_pairs(samples, best_against_worst(samples), tmp_path / "pairs.jsonl")
    assert [row["prompt_id"] for row in read_rows(tmp_path / "pairs.jsonl")] == ["id 0", "id 1", "id 2"]


# ---- formats


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("messages", [False, True], ids=["strings", "messages"])
def test_formats(tmp_path, messages, ending):
    samples = read_samples(write_samples(tmp_path / "samples.jsonl", pools(4, messages)))
    pairs = {"prompt": [3, 1], "chosen": [0, 0], "rejected": [1, 1]}
    strings = [row["responses"] for row in pools(4)]

    def written(format, **sft):
        out = tmp_path / f"{format}{ending}"
        write_pairs(samples, pairs, out, format=format, **sft)
        columns = ("messages", "prompt", "chosen", "rejected", "completion")
        return [{name: row[name] for name in columns if name in row} for row in read_rows(out)]

    asked = [[{"role": "user", "content": f"prompt {p}"}] for p in (3, 1)]
    chosen, rejected = ([reply(strings[p][k]) for p in (3, 1)] for k in (0, 1))
    conversational = [
        {"prompt": a, "chosen": c, "rejected": r} for a, c, r in zip(asked, chosen, rejected, strict=True)
    ]
    plain = [{"prompt": f"prompt {p}", "chosen": strings[p][0], "rejected": strings[p][1]} for p in (3, 1)]
    assert written("trl") == (conversational if messages else plain)
    assert written("trl-conversational") == conversational
    assert written("axolotl") == [
        {"messages": row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]}
        for row in conversational
    ]
    sft = tmp_path / f"sft{ending}"
    own = conversational if messages else plain
    for format, wanted in {
        "trl": {"prompt": own[1]["prompt"], "completion": own[1]["chosen"]},
        "trl-conversational": {"prompt": asked[1], "completion": chosen[1]},
        "axolotl": {"messages": asked[1] + chosen[1]},
    }.items():
        assert len(written(format, sft=sft, to_sft=np.array([False, True]))) == 1
        (row,) = read_rows(sft)
        assert {name: row[name] for name in wanted} == wanted and not {"chosen", "rejected"} & row.keys()
    assert write_pairs(samples, pairs, tmp_path / "out.jsonl", sft=sft, to_sft=np.array([True, True])) == (0, 2)


def test_a_file_holds_strings_or_messages(tmp_path):
    samples = read_samples(write_samples(tmp_path / "samples.jsonl", pools(2) + pools(2, messages=True)))
    pairs = best_against_worst(samples)
    with pytest.raises(InputError, match="holds strings and lists of messages"):
        write_pairs(samples, pairs, tmp_path / "pairs.jsonl")
    half = {name: column if isinstance(column, str) else column[:2] for name, column in pairs.items()}
    assert write_pairs(samples, half, tmp_path / "pairs.jsonl").rows == 2
    write_pairs(samples, pairs, tmp_path / "pairs.jsonl", format="trl-conversational")
    found = read_rows(tmp_path / "pairs.jsonl")
    assert found[0]["prompt"] == found[2]["prompt"] == [{"role": "user", "content": "prompt 0"}]


def test_axolotl_takes_one_message_per_response(tmp_path):
    row = {
        "prompt": USER,
        "responses": [reply("a") + USER + reply("b"), reply("c")],
        "scores": [1, 0],
        "prompt_id": "7",
    }
    samples = read_samples(write_samples(tmp_path / "samples.jsonl", [row]))
    pairs = {"prompt": [0], "chosen": [0], "rejected": [1]}
    with pytest.raises(
        InputError, match="one message per response, got 3 as chosen, in prompt 7: write --format trl-conv"
    ):
        write_pairs(samples, pairs, tmp_path / "pairs.jsonl", format="axolotl")
    assert not (tmp_path / "pairs.jsonl").exists()
    assert write_pairs(samples, pairs, tmp_path / "pairs.jsonl").rows == 1


@pytest.mark.parametrize("messages", [False, True], ids=["strings", "messages"])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_what_is_written_is_read_again(tmp_path, messages, ending):
    """As pools of two, and with every stage's columns in place."""
    rows = pools(20, messages)
    samples = read_samples(write_samples(tmp_path / "samples.jsonl", rows))
    pairs = best_against_worst(samples)
    write_pairs(samples, pairs, tmp_path / f"pairs{ending}")
    again = read_samples(tmp_path / f"pairs{ending}")
    assert again.problems == [] and again.prompts == 20 and again.source_names
    np.testing.assert_array_equal(again.prompt_hash, samples.prompt_hash)
    flat = samples.offsets[:-1, None] + np.stack([pairs["chosen"], pairs["rejected"]], 1)
    np.testing.assert_array_equal(again.text_hash, samples.text_hash[flat].ravel())
    np.testing.assert_array_equal(again.lengths, samples.lengths[flat].ravel())
    np.testing.assert_array_equal(again.scores["score"], samples.scores["scores"][flat].ravel())


# ---- rewriting, metadata


@pytest.mark.parametrize("ending", files.ENDINGS)
@pytest.mark.parametrize("format", ONE_ROW)
def test_rewriting(tmp_path, samples, ending, format):
    def twice(row):
        prefix = "goal: " if isinstance(row["prompt"], str) else [{"role": "system", "content": "goal"}]
        return [row, row | {"prompt": prefix + row["prompt"], "goal": 1.5}]

    def rewrite(row):
        first, second = twice(row)
        return [first | {"goal": None}, second] if row["chosen_id"] else []

    pairs = best_against_worst(samples, np.random.default_rng(0).permutation(60))
    out = tmp_path / f"pairs{ending}"
    kept = np.flatnonzero(pairs["chosen"])
    assert write_pairs(samples, pairs, out, format=format, rewrite=rewrite).rows == 2 * len(kept)
    found = read_rows(out)
    assert [row["goal"] for row in found] == [None, 1.5] * len(kept)
    prompts = [f"prompt {p}" for p in pairs["prompt"][kept]]
    if format == "trl":
        assert [row["prompt"] for row in found[1::2]] == [f"goal: {prompt}" for prompt in prompts]
    else:
        name = "messages" if format == "axolotl" else "prompt"
        assert [[m["content"] for m in row[name]] for row in found[1::2]] == [["goal", prompt] for prompt in prompts]


@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("ending", files.ENDINGS)
@pytest.mark.parametrize("format", ONE_ROW)
def test_goal_rows(tmp_path, ending, format, messages):
    """Both rows of every pair: responses swapped with all that is known of them, and the goal in the prompt."""
    rows = pools(messages=messages)
    samples = read_samples(write_samples(tmp_path / "samples.jsonl", rows))
    pairs = best_against_worst(samples)
    scores = samples.scores["scores"]
    records = goal_records(pairs, seed=3)
    records["goal"] = rescale_scores(records["goal"], (scores.min(), scores.max()))
    out = tmp_path / f"pairs{ending}"
    rewrite = goal_rewrite(system_role=not messages)
    assert write_pairs(samples, records, out, format=format, rewrite=rewrite).rows == 2 * len(pairs["prompt"])
    found = read_rows(out)
    side_of = {}
    for row, k, goal in zip(found, records["pair"], records["goal"], strict=True):
        pool, swapped = rows[pairs["prompt"][k]], row["goal_swapped"]
        best, worst = pairs["chosen"][k], pairs["rejected"][k]
        chosen, rejected = (worst, best) if swapped else (best, worst)
        assert (row["chosen_id"], row["rejected_id"], row["pair"], row["goal"]) == (chosen, rejected, k, goal)
        for side, at in (("chosen", chosen), ("rejected", rejected)):
            text = row[side] if format == "axolotl" else row[side][0] if format != "trl" or messages else row[side]
            text = text if isinstance(text, str) else text["content"]
            assert text == (pool["responses"][at][0]["content"] if messages else pool["responses"][at])
            assert row[f"score_{side}"] == pool["scores"][at] and row[f"len_{side}"] == pool["lengths"][at]
            assert row[f"source_{side}"] == pool["sources"][at]
        assert row["margin"] == row["score_chosen"] - row["score_rejected"]
        assert (row["margin"] < 0) == (row["z_chosen"] < row["z_rejected"]) == swapped
        prompt = row["messages" if format == "axolotl" else "prompt"]
        if format == "trl" and not messages:
            assert prompt == f"{goal_text(goal)}\n\n{pool['prompt']}"
        elif messages:  # no system role
            assert prompt == [{"role": "user", "content": f"{goal_text(goal)}\n\n{pool['prompt'][0]['content']}"}]
        else:
            user = {"role": "user", "content": pool["prompt"]}
            assert prompt == [{"role": "system", "content": goal_text(goal)}, user]
        side_of.setdefault(int(k), set()).add(swapped)
    assert side_of == {k: {False, True} for k in range(len(pairs["prompt"]))}
    if format != "axolotl":
        again = read_samples(out)  # as pools of two, the chosen response first
        assert again.problems == [] and again.prompts == len(found)
        np.testing.assert_array_equal(again.scores["score"].reshape(-1, 2)[:, 0], records["score_chosen"])


def test_rewritten_rows_of_a_parquet_file_have_the_same_columns(tmp_path, samples):
    def rewrite(row):
        return [row | {f"column {row['chosen_id']}": 1}]

    with pytest.raises(ValueError, match="every row of a Parquet file must have the columns"):
        write_pairs(samples, best_against_worst(samples), tmp_path / "pairs.parquet", rewrite=rewrite)
    assert os.listdir(tmp_path) == ["samples.jsonl"]


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_metadata(tmp_path, samples, ending):
    metadata = {"rating_scale": {"median": 2.5}, "rule": "max – min"}
    out = tmp_path / f"pairs{ending}"
    write_pairs(samples, best_against_worst(samples), out, metadata=metadata)
    assert read_metadata(out) == metadata
    assert (tmp_path / f"pairs{ending}.meta.json").exists() == (ending != ".parquet")
    assert read_metadata(tmp_path / "samples.jsonl") is None
    write_pairs(samples, best_against_worst(samples), out)
    assert read_metadata(out) is None and not (tmp_path / f"pairs{ending}.meta.json").exists()


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_no_pairs_make_an_empty_file(tmp_path, samples, ending):
    pairs = {"prompt": [], "chosen": [], "rejected": [], "score_chosen": np.empty(0), "score_rejected": np.empty(0)}
    out = tmp_path / f"pairs{ending}"
    assert write_pairs(samples, pairs, out) == (0, 0)
    assert read_rows(out) == []
    if ending == ".parquet":
        from pyarrow import parquet

        assert {"prompt", "chosen", "rejected", "margin", "len_chosen"} <= set(parquet.read_schema(out).names)


def test_equal_pairs_make_equal_files(tmp_path, samples):
    for ending in files.ENDINGS:
        contents = []
        for name in ("a", "b"):
            write_pairs(samples, best_against_worst(samples), tmp_path / f"{name}{ending}", metadata={"x": 1})
            contents.append((tmp_path / f"{name}{ending}").read_bytes())
        assert contents[0] == contents[1], ending


# ---- what is refused


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"prompt": [0], "chosen": [0]}, "pairs must have prompt, chosen, rejected, got prompt, chosen"),
        ({"prompt": [60], "chosen": [0], "rejected": [1]}, r"pairs\['prompt'\]\[0\] must lie in \[0, 60\), got 60"),
        ({"prompt": [0, -1], "chosen": [0, 0], "rejected": [1, 1]}, r"pairs\['prompt'\]\[1\] must lie in"),
        ({"prompt": [0], "chosen": [0], "rejected": [-1]}, r"pairs\['rejected'\]\[0\] must lie in \[0, \d\), got -1"),
        ({"prompt": [0], "chosen": [9], "rejected": [1]}, r"pairs\['chosen'\]\[0\] must lie in \[0, \d\), got 9"),
        ({"prompt": [0], "chosen": [0.0], "rejected": [1]}, r"pairs\['chosen'\] must be integers \[1\], got float64"),
        (
            {"prompt": [0], "chosen": [0, 1], "rejected": [1]},
            r"pairs\['chosen'\] must be integers \[1\], got int64 \[2",
        ),
        (
            {"prompt": [0], "chosen": [0], "rejected": [1], "x": [1, 2]},
            r"pairs\['x'\] must have shape \[1\], got \[2\]",
        ),
    ],
)
def test_pairs_that_are_not_of_these_samples(tmp_path, samples, pairs, message):
    with pytest.raises(ValueError, match=message):
        write_pairs(samples, pairs, tmp_path / "pairs.jsonl")
    assert os.listdir(tmp_path) == ["samples.jsonl"]


def test_other_arguments_that_are_refused(tmp_path, samples):
    pairs, out = best_against_worst(samples), tmp_path / "pairs.jsonl"
    with pytest.raises(ValueError, match=r"format must be one of trl, .*, kto, got 'dpo'"):
        write_pairs(samples, pairs, out, format="dpo")
    with pytest.raises(InputError, match=r"must end in .jsonl, .jsonl.gz, .parquet, got .*pairs.csv"):
        write_pairs(samples, pairs, tmp_path / "pairs.csv")
    with pytest.raises(InputError, match=r"would overwrite the samples"):
        write_pairs(samples, pairs, tmp_path / "x" / ".." / "samples.jsonl")
    with pytest.raises(ValueError, match="sft and to_sft must be given together"):
        write_pairs(samples, pairs, out, sft=tmp_path / "sft.jsonl")
    with pytest.raises(ValueError, match=r"to_sft must be bool \[60\], got int64 \[1\]"):
        write_pairs(samples, pairs, out, sft=tmp_path / "sft.jsonl", to_sft=[1])
    with pytest.raises(InputError, match=r"would overwrite another output"):
        write_pairs(samples, pairs, out, sft=out, to_sft=np.ones(60, bool))
    with pytest.raises(InputError, match=r"cannot write .*: Not a directory"):
        write_pairs(samples, pairs, tmp_path / "samples.jsonl" / "pairs.jsonl")
    assert os.listdir(tmp_path) == ["samples.jsonl"]


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_a_full_disk_is_an_input_error_and_leaves_nothing(tmp_path, samples, monkeypatch, ending):
    def full(*_):
        raise OSError(28, "No space left on device")

    if ending == ".parquet":
        from pyarrow import parquet

        monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    else:
        monkeypatch.setattr(files, "_lines", lambda *_: contextlib.nullcontext(full))
    with pytest.raises(InputError, match=r"cannot write .*pairs.*: No space left on device"):
        write_pairs(samples, best_against_worst(samples), tmp_path / f"pairs{ending}")
    assert os.listdir(tmp_path) == ["samples.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_changed_is_refused_and_nothing_is_written(tmp_path, samples, workers):
    path, out, status = tmp_path / "samples.jsonl", tmp_path / "pairs.jsonl", os.stat(tmp_path / "samples.jsonl")
    out.write_text("as before")
    content = path.read_bytes()
    pairs = best_against_worst(samples)
    at = pools()[30]["responses"][pairs["rejected"][30]].encode()
    path.write_bytes(content.replace(b'"' + at[:5], b'"X' + at[1:5]))
    with pytest.raises(InputError, match="changed after its scores were read"):
        write_pairs(samples, pairs, out, workers=workers)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert reading.stamp(samples.inputs) == samples.stamp
    with pytest.raises(InputError, match="changed after its scores were read"):
        write_pairs(samples, pairs, out, workers=workers)
    assert out.read_text() == "as before" and sorted(os.listdir(tmp_path)) == ["pairs.jsonl", "samples.jsonl"]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_pairs_in_any_order(tmp_path_factory, data):
    rows = pools(12, seed=3)
    folder = tmp_path_factory.mktemp("any")
    samples = read_samples(write_samples(folder / f"samples{data.draw(st.sampled_from(files.ENDINGS))}", rows))
    drawn = data.draw(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 1), st.integers(0, 1))))
    pairs = {name: [row[k] for row in drawn] for k, name in enumerate(("prompt", "chosen", "rejected"))}
    out = folder / f"pairs{data.draw(st.sampled_from(files.ENDINGS))}"
    write_pairs(samples, pairs, out)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in read_rows(out)] == [
        (rows[p]["prompt"], rows[p]["responses"][c], rows[p]["responses"][r]) for p, c, r in drawn
    ]


# ---- the trainers


@pytest.fixture
def load(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (the extra [trl])")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def load(path, kind):
        return datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))

    return load


@pytest.mark.parametrize("format", ONE_ROW)
@pytest.mark.parametrize("ending", files.ENDINGS)
def test_datasets_load_what_was_written(tmp_path, samples, load, ending, format):
    pairs = best_against_worst(samples, np.random.default_rng(0).permutation(60))
    pairs["half"] = np.where(pairs["prompt"] % 2, np.nan, pairs["score_chosen"])
    out = tmp_path / f"pairs{ending}"
    write_pairs(samples, pairs, out, format=format, metadata={"a": 1})
    loaded = load(out, "parquet" if ending == ".parquet" else "json")
    assert loaded.to_list() == read_rows(out)
    assert loaded.features["half"].dtype == "float64" and loaded.features["chosen_id"].dtype == "int64"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")  # as in test_trl.py
@pytest.mark.parametrize("messages", [False, True], ids=["strings", "messages"])
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_trl_takes_the_rows_with_their_ratings(tmp_path, load, ending, messages):
    """Tokenised as TRL does, and with the margins that RDPO needs."""
    pytest.importorskip("trl", reason="TRL is not installed (the extra [trl])")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from fastpref.integrations.trl import FastPrefDPOConfig, FastPrefDPOTrainer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
        "{% endif %}"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(vocabulary), **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    samples = read_samples(write_samples(tmp_path / "samples.jsonl", pools(8, messages)))
    out = tmp_path / f"pairs{ending}"
    write_pairs(samples, best_against_worst(samples), out)
    rows = load(out, "parquet" if ending == ".parquet" else "json")
    options = {"report_to": "none", "bf16": False, "use_cpu": True, "per_device_train_batch_size": 8}
    config = FastPrefDPOConfig(str(tmp_path / "trainer"), loss_type=["rdpo"], gradient_checkpointing=False, **options)
    trainer = FastPrefDPOTrainer(str(tmp_path / "model"), args=config, train_dataset=rows, processing_class=tokenizer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    scores = [row["scores"] for row in pools(8)]
    assert batch["margin"].tolist() == pytest.approx([max(s) - min(s) for s in scores], rel=1e-6)
    texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    best = [row["responses"][int(np.argmax(row["scores"]))] for row in pools(8)]
    asked = "[user]prompt {}[assistant]{}" if messages else "prompt {}{}"
    assert texts[:8] == [asked.format(k, text) for k, text in enumerate(best)]


# ---- whole files


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there" / "rows.jsonl")
    for content in ("first", "second"):
        with whole_file(tmp_path / "link.jsonl") as temporary:
            temporary.write_text(content)
        assert (tmp_path / "link.jsonl").is_symlink()
        assert (tmp_path / "there" / "rows.jsonl").read_text() == content
    assert os.listdir(tmp_path / "there") == ["rows.jsonl"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=r"cannot write .*pipe: it is not a regular file"), whole_file(pipe):
        pass
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_pipe_cannot_be_read_twice(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: it is a pipe, must be a regular file, or - for stdin"):
        read_samples(tmp_path / "pipe")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_large_row_group_is_read_in_parts(tmp_path, monkeypatch, workers):
    samples = read_samples(write_samples(tmp_path / "whole.parquet", pools()), workers=1)
    first = np.flatnonzero(np.diff(samples.offsets) > 1)
    pairs = {"prompt": first[::-1], "chosen": np.zeros(len(first), int), "rejected": np.ones(len(first), int)}
    write_pairs(samples, pairs, tmp_path / "whole.jsonl")
    for name, value in (("ROW_GROUP", 0), ("PART", 1), ("OBJECT_ROWS", 2)):
        monkeypatch.setattr(reading, name, value)
    parts = list(reading.parts(samples.files, None))
    assert len(parts) > 2 and all(part.table for part in parts)
    again = read_samples(samples.path, workers=workers)
    for name in ("offsets", "text_hash", "prompt_hash", "row", "position"):
        assert np.array_equal(getattr(again, name), getattr(samples, name)), name
    assert again.problems == samples.problems
    write_pairs(again, pairs, tmp_path / "parts.jsonl", workers=workers)
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes() != b""
