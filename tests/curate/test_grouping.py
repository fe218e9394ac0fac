"""Rows per response become pools, wherever they stand, in bounded memory, and again when a run is resumed."""

import json
import os
import random

import numpy as np
import pytest
from samples_cases import write_lines

from fastpref.curate import CurateConfig, read_samples, run, select_pairs, texts, write_pairs
from fastpref.curate.files import grouping, reading
from fastpref.curate.files.sources import find_sources


def scattered(prompts=40, seed=0):
    """Rows of prompts of 1 to 6 responses each, in random order, and the pools in the order of their first rows."""
    draw = random.Random(seed)
    rows = [
        {"prompt": f"p{p}", "response": f"{p}.{k}", "reward": draw.choice([None, 0.5, 2]), "model": draw.choice("mn")}
        for p in range(prompts)
        for k in range(draw.randint(1, 6))
    ]
    draw.shuffle(rows)
    pools = {}
    for number, row in enumerate(rows, start=1):
        pools.setdefault(row["prompt"], []).append((number, row))
    return rows, pools


@pytest.mark.parametrize("partition", [200, 1 << 27], ids=["many partitions", "one"])
def test_scattered_rows_are_grouped_in_the_order_of_their_prompts(tmp_path, monkeypatch, partition):
    monkeypatch.setattr(grouping, "PARTITION", partition)
    rows, pools = scattered()
    half = len(rows) // 2
    files = [write_lines(tmp_path / "a.jsonl", rows[:half]), write_lines(tmp_path / "b.jsonl", rows[half:])]
    samples = read_samples(files)
    assert list(texts(samples)) == [(p, [row["response"] for _, row in pool]) for p, pool in pools.items()]
    np.testing.assert_array_equal(
        samples.scores["reward"], np.array([row["reward"] for pool in pools.values() for _, row in pool], float)
    )
    sources = [samples.source_names[code] for code in samples.sources]
    assert sources == [row["model"] for pool in pools.values() for _, row in pool]
    first = [pool[0][0] for pool in pools.values()]
    assert samples.row.tolist() == [number if number <= half else number - half for number in first]
    assert samples.path == f"{files[0]} and 1 more" and samples.layout == "responses"


def test_the_key_is_the_prompt_with_all_that_it_means(tmp_path):
    row = {"prompt": "p", "response": "x", "score": 1}
    rows = [
        row,
        row | {"tools": [{"name": "t"}]},
        row | {"system": "s"},
        row | {"images": ["a"]},
        row | {"response": "y"},
    ]
    samples = read_samples(write_lines(tmp_path / "rows.jsonl", rows))
    assert np.diff(samples.offsets).tolist() == [2, 1, 1, 1] and samples.row.tolist() == [1, 2, 3, 4]
    rows = [row | {"prompt_id": "a"}, row | {"prompt_id": "b"}, row | {"prompt_id": "a", "prompt": "q"}]
    samples = read_samples(write_lines(tmp_path / "rows.jsonl", [*rows, row | {"prompt_id": "a"}]))
    assert np.diff(samples.offsets).tolist() == [2, 1]
    assert [str(p) for p in samples.problems] == [f"{samples.path}:3: another prompt than the first row of prompt_id a"]


def test_bad_rows_are_counted_with_their_lines(tmp_path):
    good = {"prompt": "p", "response": "x", "score": 1}
    rows = [good, b"{", good | {"response": None}, b"", good | {"score": "high"}, good | {"response": "y"}]
    samples = read_samples(write_lines(tmp_path / "rows.jsonl", rows))
    assert [(p.row, p.reason[:20]) for p in samples.problems] == [
        (2, "not JSON: Expecting "), (3, "responses[0] is null"), (5, "score[0] must be a n")
    ]  # fmt: skip
    assert list(texts(samples)) == [("p", ["x", "y"])]


def test_pairs_of_rows_per_response(tmp_path):
    rows, pools = scattered()
    samples = read_samples(write_lines(tmp_path / "rows.jsonl", rows))
    selection = select_pairs(samples.scores["reward"], offsets=samples.offsets, rejected="min")
    write_pairs(samples, selection.table(), tmp_path / "pairs.jsonl")
    found = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(found) > 5
    for pair in found:
        of = {row["response"]: row["reward"] for _, row in pools[pair["prompt"]]}
        known = [reward for reward in of.values() if reward is not None]
        assert (of[pair["chosen"]], of[pair["rejected"]]) == (max(known), min(known))


def test_a_resumed_run_groups_again(tmp_path):
    rows, _ = scattered()
    path = str(write_lines(tmp_path / "rows.jsonl", rows))
    outputs = [str(tmp_path / name) for name in ("whole.jsonl", "again.jsonl")]
    options = {"input": path, "work": str(tmp_path / "work"), "construct": {"rejected": "min"}}
    run(CurateConfig(**options, output=outputs[0]))
    run(CurateConfig(**options, output=outputs[1]), begin="select")
    assert len({(tmp_path / name).read_bytes() for name in ("whole.jsonl", "again.jsonl")}) == 1


def test_the_groups_of_a_changed_file_are_not_read(tmp_path):
    rows, _ = scattered()
    path = write_lines(tmp_path / "rows.jsonl", rows)
    samples = read_samples(path)
    write_lines(path, rows[1:])
    with pytest.raises(reading.InputError, match="changed after its scores were read"):
        list(texts(samples))


def test_columns_of_single_responses_do_not_part_a_prompt(tmp_path):
    rows = [{"prompt": "p", "response": f"{k}", "score": k, "id": k, "prompt_id": None} for k in range(3)]
    samples = read_samples(write_lines(tmp_path / "rows.jsonl", rows))
    assert np.diff(samples.offsets).tolist() == [3] and samples.problems == []
    rows = [row | {"prompt_id": float(k // 2)} for k, row in enumerate(rows)]  # of pandas
    samples = read_samples(write_lines(tmp_path / "rows.jsonl", rows))
    assert np.diff(samples.offsets).tolist() == [2, 1]
    line = b'{"prompt": "p", "response": "a", "score": 1, "score": 2}'
    samples = read_samples(write_lines(tmp_path / "rows.jsonl", [*rows, line]))
    assert [problem.reason for problem in samples.problems] == ["the key 'score' stands there more than once"]


def test_values_of_parquet_that_json_cannot_hold(tmp_path):
    from decimal import Decimal

    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {"prompt": "p", "response": "x", "score": 1.0}
    parquet.write_table(
        pyarrow.Table.from_pylist([row | {"prompt_id": Decimal(7), "id": Decimal(3)}] * 2), tmp_path / "d.parquet"
    )
    assert list(texts(read_samples(tmp_path / "d.parquet"))) == [("p", ["x", "x"])]
    image = {"bytes": b"\x89PNG", "path": None}
    parquet.write_table(pyarrow.Table.from_pylist([row | {"image": image}]), tmp_path / "i.parquet")
    assert "holds bytes" in read_samples(tmp_path / "i.parquet").problems[0].reason
    pair = {"prompt": "p", "chosen": "x", "rejected": "y", "image": image}
    parquet.write_table(pyarrow.Table.from_pylist([pair]), tmp_path / "p.parquet")
    assert read_samples(tmp_path / "p.parquet").fields.carried == ("image",)


def test_values_that_differ_within_a_prompt_are_counted(tmp_path):
    row = {"score": 1, "kind": "a", "tools": None}
    rows = [row | {"prompt": f"p{k // 3}", "response": f"{k}", "id": k, "note": k // 2} for k in range(6)]
    samples = read_samples(write_lines(tmp_path / "rows.jsonl", rows), keep=["kind", "note"])
    end = "that are not that of their prompt's first row"
    assert samples.counts == {f"values of id {end}": 4, f"values of note {end}": 3} and samples.rows == 6


@pytest.mark.parametrize("partition", [300, 5000])
def test_partitions_that_come_out_too_large_are_split(tmp_path, monkeypatch, partition):
    rows, pools = scattered(60)
    rows += [{"prompt": "long", "response": f"{k}", "reward": 1, "model": "m"} for k in range(200)]  # in one partition
    path = write_lines(tmp_path / "rows.jsonl", rows)
    want = list(texts(read_samples(path)))
    monkeypatch.setattr(grouping, "PARTITION", partition)
    monkeypatch.setattr(grouping, "MOST_PARTITIONS", 3)
    in_memory, names = grouping._pools_in_memory, []

    def pools_in_memory(path, *rest):
        names.append(os.path.basename(path))
        return in_memory(path, *rest)

    monkeypatch.setattr(grouping, "_pools_in_memory", pools_in_memory)
    assert list(texts(read_samples(path))) == want and len(want) == len(pools) + 1
    assert len(names) > 3 and max(name.count(".") for name in names) == grouping.MOST_SPLITS


def test_partitions_of_parquet_go_by_what_it_unpacks_to(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": f"p{k}", "response": "x" * 10_000 + str(k), "score": 1.0} for k in range(200)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", compression="zstd")
    (source,) = find_sources(tmp_path / "rows.parquet")
    assert os.path.getsize(source.path) < 1e6 < grouping._unpacked_size(source) < 4e6


def test_names_of_columns_that_are_no_unicode(tmp_path):
    row = {"prompt": "p", "response": "x", "score": 1}
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{json.dumps(row)[:-1]}, "\\ud800quality": 3}}\n')
    assert list(texts(read_samples(path))) == [("p", ["x"])]
    path.write_text(f'{json.dumps(row)[:-1]}, "image\\ud800": "x.png"}}\n')
    with pytest.raises(reading.InputError, match="holds a lone surrogate"):
        read_samples(path)
