"""curate.pair_rows: the rows of the command from batches, however they are cut and whatever holds them."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.curate import pair_rows, read_samples, select_pairs, write_pairs

pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OPTIONS = {"rejected": "mean-1std", "scale": "mad", "min_gap": 0.2, "pairs_per_prompt": 2}


def pools(prompts=40, messages=False, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(prompts):
        count = int(rng.integers(1, 9))
        texts = [f"{p}.{k} é" for k in range(count)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"prompt {p}"}] if messages else f"prompt {p}",
                "responses": [[{"role": "assistant", "content": text}] for text in texts] if messages else texts,
                "scores": [None if rng.random() < 0.1 else float(x) for x in rng.normal(size=count).round(2)],
                "models": [None if rng.random() < 0.1 else str(x) for x in rng.choice(["m", "n"], count)],
                "tokens": rng.integers(1, 99, count).tolist(),
            }
        )
    return rows


def command(tmp_path, rows, read=None, format="trl", score_field="scores", **options):
    """What the functions of the command write for a file of these rows."""
    path, out = tmp_path / "samples.jsonl", tmp_path / "pairs.parquet"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read_samples(path, score_fields=[score_field], **(read or {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        selection = select_pairs(samples.scores[score_field], offsets=samples.offsets, **options)
    write_pairs(samples, selection.table() | {"rule": selection.rule, "scale": selection.scale}, out, format=format)
    return pyarrow.parquet.read_table(out) if hasattr(pyarrow, "parquet") else _read(out)


def _read(path):
    from pyarrow import parquet

    return parquet.read_table(path)


def columns_of(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def numpy_columns(rows):
    """As Ray and datasets give them: arrays of objects that are arrays."""
    columns = {}
    for name, values in columns_of(rows).items():
        column = np.empty(len(values), object)
        column[:] = [
            np.array(value) if name in ("scores", "tokens") and None not in value else value for value in values
        ]
        columns[name] = column
    return columns


READ = {"source_field": "models", "length_field": "tokens"}


@pytest.mark.parametrize("format", ["trl", "trl-conversational", "axolotl"])
@pytest.mark.parametrize("messages", [False, True], ids=["strings", "messages"])
def test_batches_give_the_rows_of_the_command(tmp_path, messages, format):
    rows = pools(messages=messages)
    want = command(tmp_path, rows, READ, format, **OPTIONS)
    options = {**READ, **OPTIONS, "format": format}
    assert 20 < want.num_rows < 80 and want["source_chosen"].null_count
    table = pyarrow.Table.from_pylist(rows)
    assert pair_rows(table, **options).equals(want)
    batch = pair_rows(table.to_batches()[0], **options)
    assert isinstance(batch, pyarrow.RecordBatch) and batch.to_pydict() == want.to_pydict()
    assert pair_rows(columns_of(rows), **options) == want.to_pydict()
    assert pair_rows(numpy_columns(rows), **options) == want.to_pydict()


def test_the_other_shapes_of_rows(tmp_path):
    judged = [
        {"instruction": row["prompt"], "completions": [
            {"model": m, "response": r, "overall_score": s}
            for m, r, s in zip(row["models"], row["responses"], row["scores"], strict=True)
        ]}
        for row in pools()
    ]  # fmt: skip
    rated = [
        {"prompt": f"{k}", "chosen": "a", "rejected": "b", "score_chosen": 2.0 + k, "score_rejected": 1.5}
        for k in range(5)
    ]
    for rows, score in ((judged, "overall_score"), (rated, "score")):
        want = command(tmp_path, rows, score_field=score, rejected="min")
        if rows is rated:  # sides are as they were published, and there is no pool
            want = want.drop_columns(["z_chosen", "z_rejected", "rank_rejected"])
            place = want.column_names.index("rule")
            want = want.set_column(place, want.schema.field("rule"), pyarrow.array(["published"] * want.num_rows))
        table = pyarrow.Table.from_pylist(rows)
        assert want.num_rows >= 5
        assert pair_rows(table, score_field=score, rejected="min").equals(want)
        assert pair_rows(columns_of(rows), score_field=score, rejected="min") == want.to_pydict()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=6), st.booleans())
def test_how_the_rows_are_cut_changes_nothing(cuts, messages):
    table = pyarrow.Table.from_pylist(pools(messages=messages))
    options = {**READ, **OPTIONS}
    bounds = sorted({0, 40, *cuts})
    parts = [pair_rows(table.slice(begin, end - begin), **options) for begin, end in itertools.pairwise(bounds)]
    assert pyarrow.concat_tables([*parts, pair_rows(table.slice(0, 0), **options)]).equals(pair_rows(table, **options))


def test_a_batch_in_which_no_row_names_its_sources_has_their_columns():
    rows = pools(3)
    table = pyarrow.Table.from_pylist([row | {"models": [None] * len(row["models"])} for row in rows])
    table = table.cast(pyarrow.Table.from_pylist(rows).schema)
    named = pair_rows(pyarrow.Table.from_pylist(rows), **READ, rejected="min")
    found = pair_rows(table, **READ, rejected="min")
    assert found.schema.equals(named.schema) and found["source_chosen"].null_count == found.num_rows > 0
    assert "source_chosen" not in pair_rows(columns_of(rows), rejected="min")


def test_under_datasets_map(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (the extra [trl])")
    rows = pools()
    want = command(tmp_path, rows, READ, **OPTIONS)
    dataset = datasets.Dataset.from_list(rows)
    for batch_size in (1, 7, 1000):
        found = dataset.map(
            pair_rows,
            batched=True,
            batch_size=batch_size,
            remove_columns=dataset.column_names,
            fn_kwargs={**READ, **OPTIONS},
            load_from_cache_file=False,
        )
        assert found.to_list() == want.to_pylist() and set(found.column_names) == set(want.column_names)
    arrow = dataset.with_format("arrow").map(
        pair_rows, batched=True, batch_size=7, remove_columns=dataset.column_names, fn_kwargs={**READ, **OPTIONS}
    )
    assert arrow.with_format(None).to_list() == want.to_pylist()


def test_the_real_samples(tmp_path):
    path = os.environ.get("FASTPREF_SCORED_SAMPLES")
    if path is None or not os.path.exists(path):
        pytest.skip("no real data: set FASTPREF_SCORED_SAMPLES to alpaca_eval_dev.jsonl.gz")
    import gzip

    with gzip.open(path) as lines:
        rows = [json.loads(line) for line in lines]
    options = {"rejected": "quantile:0.10", "scale": "logit"}
    want = command(tmp_path, rows, {"source_field": "models"}, score_field="win_prob", **options)
    assert want.num_rows == 403
    found = pair_rows(pyarrow.Table.from_pylist(rows), score_field="win_prob", source_field="models", **options)
    assert found.equals(want)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rejected": "min_of_5"}, "draws by the index of a prompt in the whole dataset"),
        ({"on_degenerate": "drop"}, "on_degenerate='drop' goes by the share of all prompts"),
        ({"on_degenerate": "min_of_5"}, "on_degenerate='min_of_5' goes by the share of all prompts"),
        ({"format": "dpo"}, "format must be one of"),
        ({"on_bad_row": "skip"}, "on_bad_row must be 'error' or 'drop', got 'skip'"),
        ({"valid": [True]}, "options must not hold valid"),
        ({"rejected": "worst"}, "rejected must be"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pair_rows(columns_of(pools(3)), **options)


def test_a_degenerate_rule_is_not_replaced_in_a_batch():
    rows = [{"prompt": "p", "responses": list("abcdefg"), "scores": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 9.0]}]
    with pytest.warns(UserWarning, match="lies below every reward"):
        warned = pair_rows(columns_of(rows), on_degenerate="warn")
    assert warned == pair_rows(columns_of(rows)) and warned["rule"] == ["max vs mean-2std"]


def test_malformed_rows():
    rows = [*pools(3), {"prompt": None, "responses": [], "scores": [], "models": [], "tokens": []}]
    with pytest.raises(ValueError, match=r"1 of 4 rows are malformed, the first: batch:4: prompt is null"):
        pair_rows(columns_of(rows), rejected="min")
    with pytest.warns(UserWarning, match=r"1 of 4 rows are malformed, .*; they are left out"):
        found = pair_rows(columns_of(rows), rejected="min", on_bad_row="drop")
    assert found == pair_rows(columns_of(rows[:3]), rejected="min")
    with pytest.raises(ValueError, match="no field 'reward'"):
        pair_rows(columns_of(rows[:3]), score_field="reward")
    with pytest.raises(
        ValueError, match="batch: its columns question fit no layout; nearest is pools, which lacks prompt, responses"
    ):
        pair_rows({"question": ["p", "q"]})
    with pytest.raises(
        ValueError, match="batch: its columns question fit no layout; nearest is pools, which lacks prompt, responses"
    ):
        pair_rows(pyarrow.table({"question": ["p", "q"]}))
    with pytest.raises(TypeError, match="batch must be a dict of columns, a pyarrow Table or RecordBatch, got list"):
        pair_rows(rows)
    mixed = [row | {"models": [], "tokens": []} for row in (pools(2)[1], pools(2, messages=True)[1])]
    with pytest.raises(ValueError, match="batch holds strings and lists of messages"):
        pair_rows(columns_of(mixed), rejected="min")
    assert len(pair_rows(columns_of(mixed), rejected="min", format="trl-conversational")["prompt"]) == 2


# ---- Spark


def test_the_spark_example_maps_batches(tmp_path):
    spec = importlib.util.spec_from_file_location("spark_pairs", EXAMPLES / "spark_pairs.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = pools()
    table = pyarrow.Table.from_pylist(rows)
    found = list(example.pairs_of(iter(table.to_batches(max_chunksize=7)), **example.OPTIONS))
    schema = example.schema_of(table.schema, **example.OPTIONS)
    assert all(batch.schema.equals(schema) for batch in found) and len(found) == 6
    assert pyarrow.Table.from_batches(found).equals(command(tmp_path, rows, rejected="quantile:0.10"))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("pyspark") is None,
    reason="Spark is not installed: pip install pyspark, and Java, run this",
)
def test_spark_gives_what_one_call_gives(tmp_path):
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(pools(100))
    parquet.write_table(table, tmp_path / "samples.parquet", row_group_size=10)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "spark_pairs.py", tmp_path / "samples.parquet", tmp_path / "pairs.parquet"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = parquet.read_table(tmp_path / "pairs.parquet").sort_by("prompt_id").to_pydict()
    want = pair_rows(table, score_field="scores", rejected="quantile:0.10").sort_by("prompt_id").to_pydict()
    assert len(want["prompt"]) > 50 and found == want


def test_published_pairs_keep_their_sides_and_what_is_left_out_is_counted():
    rows = [{"prompt": f"p{k}", "response_a": "x", "response_b": "y", "label": label, "score_a": a, "score_b": b}
            for k, (label, a, b) in enumerate([("a", 1, 3), ("b", 1, 3), ("tie", 2, 2), ("a", 1e30, 0)])]  # fmt: skip
    for batch in (columns_of(rows), pyarrow.Table.from_pylist(rows)):
        with pytest.warns(UserWarning, match=r"^left out: 1 ties; 1 score of a size of 1e\+30 or more$"):
            found = pair_rows(batch, score_field="score")
        found = found if isinstance(found, dict) else found.to_pydict()
        assert (found["chosen"], found["rejected"]) == (["x", "y", "x"], ["y", "x", "y"])
        assert found["margin"] == [-2, 2, None] and set(found["rule"]) == {"published"}
        assert not {"z_chosen", "rank_rejected"} & found.keys()
    with pytest.warns(UserWarning):
        assert pair_rows(columns_of(rows), score_field="score", min_gap=0)["chosen"] == ["y", "x"]
    with pytest.raises(ValueError, match="rejected must be"):
        pair_rows(columns_of(rows[:2]), score_field="score", rejected="worst")
    pool = {"prompt": "p", "responses": ["x", None, "y"], "scores": [1.0, 2.0, 3.0]}
    with pytest.warns(UserWarning, match=r"1 responses that cannot be read, the first: batch:1: resp.* is null"):
        assert pair_rows(columns_of([pool]), rejected="min")["chosen"] == ["y"]
