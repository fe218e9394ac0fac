"""`fastpref denoise`: every format in and out, what it refuses, and what it leaves behind: whole files or none."""

import contextlib
import csv
import gzip
import json
import os
import pty
import signal
import stat
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

import fastpref
from fastpref.cli.main import main

pytest.importorskip("pyarrow", reason="fastpref[cli] is not installed")
pytest.importorskip("matplotlib", reason="fastpref[cli] is not installed")

import pyarrow
from pyarrow import parquet

from fastpref.cli.denoise import comparisons, inputs, matrices, plots


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys):
    """Runs `fastpref denoise ... --json`: (exit code, summary, stderr)."""

    def denoise(*arguments):
        code = main(["denoise", *map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return denoise


def corrupted(m, n, rank, share=0.03, missing=0.0, batch=(), size=5.0):
    """L [..., m, n] float64, L with a share of the entries moved by 1 to 2 times `size`, and where they are."""
    low = torch.randn(*batch, m, rank, dtype=torch.float64) @ torch.randn(*batch, rank, n, dtype=torch.float64)
    where = torch.rand(low.shape) < share
    shift = torch.empty_like(low).uniform_(size, 2 * size) * torch.randn_like(low).sign()
    data = torch.where(where, low + shift, low)
    data[torch.rand(low.shape) < missing] = torch.nan
    return low.numpy(), data.numpy(), where.numpy() & ~data.isnan().numpy()


def error(found, truth) -> float:
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


def write_table(path, rows):
    """Rows as .parquet, .csv[.gz] or .jsonl[.gz]."""
    opener = gzip.open if path.suffix == ".gz" else open
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ".csv" in path.suffixes:
        with opener(path, "wt", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        with opener(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read_table(path):
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- one matrix


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ">f8", np.int32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_matrix_becomes_its_low_rank_part(tmp_path, run, dtype, order):
    low, data, _ = corrupted(90, 70, 3)
    if dtype == np.int32:
        low, data = np.round(low * 1e6), np.round(data * 1e6)
    np.save(tmp_path / "in.npy", np.asarray(data, dtype, order=order))
    code, summary, err = run(tmp_path / "in.npy", tmp_path / "out.npy", "--rank", 3)
    found = np.load(tmp_path / "out.npy")
    assert (code, err) == (0, "")
    assert found.dtype == (np.float64 if np.dtype(dtype).itemsize > 4 or dtype == np.int32 else np.float32)
    assert error(found, low) < (1e-3 if dtype == np.float16 else 1e-5)
    assert summary["converged"] and summary["rank"] == 3 and summary["shape"] == [90, 70]
    assert sorted(os.listdir(tmp_path)) == ["in.npy", "out.npy"]


def test_without_a_rank_it_is_found(tmp_path, run):
    low, data, _ = corrupted(80, 60, 2, share=0.02)
    np.save(tmp_path / "in.npy", data)
    code, summary, _ = run(tmp_path / "in.npy", tmp_path / "out.npy")
    assert code == 0 and summary["rank"] == 2 and summary["gap"] < 2e-3
    assert error(np.load(tmp_path / "out.npy"), low) < 1e-3


@pytest.mark.parametrize("order", ["C", "F"])
def test_masked_is_the_input_without_its_corrupted_entries(tmp_path, run, order):
    _, data, where = corrupted(120, 80, 3, missing=0.2)
    np.save(tmp_path / "in.npy", np.asarray(data, order=order))
    code, summary, _ = run(tmp_path / "in.npy", tmp_path / "out.npy", "--rank", 3, "--output", "masked")
    assert code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), np.where(where, np.nan, data))
    assert summary["outlier_rate"] == pytest.approx(where.sum() / (~np.isnan(data)).sum())


def test_int8_counts_with_a_scale(tmp_path, run):
    left, right = torch.randint(-4, 5, (100, 2)), torch.randint(-4, 5, (60, 2))
    low = (left @ right.T).numpy()
    data = low.astype(np.int8)
    where = torch.rand(low.shape).numpy() < 0.03
    data[where] = np.where(low[where] > 0, -100, 100)
    data[torch.rand(low.shape).numpy() < 0.1] = -128
    np.save(tmp_path / "in.npy", data)
    rank = ["--rank", 2, "--scale", 0.25]
    assert run(tmp_path / "in.npy", tmp_path / "out.npy", *rank)[0] == 0
    assert error(np.load(tmp_path / "out.npy"), 0.25 * low) < 1e-4
    assert run(tmp_path / "in.npy", tmp_path / "masked.npy", *rank, "--output", "masked")[0] == 0
    masked = np.load(tmp_path / "masked.npy")
    assert masked.dtype == np.int8
    np.testing.assert_array_equal(masked, np.where(where, -128, data))


@pytest.mark.parametrize("order", ["C", "F"])
def test_factors_of_a_matrix_with_corrupted_rows(tmp_path, run, order):
    low, data, _ = corrupted(80, 60, 2, share=0.0)
    rows = np.array([3, 41])
    data[rows] += 5 * torch.randn(2, 60).numpy()
    np.save(tmp_path / "in.npy", np.asarray(data, order=order))
    flags = ["--rank", 2, "--corruption", "rows", "--output", "factors"]
    assert run(tmp_path / "in.npy", tmp_path / "out.npz", *flags)[0] == 0
    found = np.load(tmp_path / "out.npz")
    clean = np.setdiff1d(np.arange(80), rows)
    low_rank = found["U"] * found["S"] @ found["Vh"]
    assert error(low_rank[clean], low[clean]) < 1e-5
    assert np.flatnonzero(found["row_outlier_rate"] > 0.5).tolist() == rows.tolist()
    sparse = np.zeros_like(low)
    sparse[tuple(found["sparse_indices"].T)] = found["sparse_values"]
    assert error(low_rank + sparse, data) < 1e-5
    assert np.flatnonzero(sparse.any(1)).tolist() == rows.tolist()


def test_an_array_of_an_archive(tmp_path, run):
    low, data, _ = corrupted(60, 50, 2)
    np.savez(tmp_path / "in.npz", other=low, scores=data)
    code, _, err = run(tmp_path / "in.npz", tmp_path / "out.npy", "--rank", 2)
    assert code == 2 and "--array must name one of its arrays, found other, scores" in err
    assert run(tmp_path / "in.npz", tmp_path / "out.npy", "--rank", 2, "--array", "scores")[0] == 0
    assert error(np.load(tmp_path / "out.npy"), low) < 1e-5


def test_an_output_has_the_permissions_of_a_new_file(tmp_path, run):
    np.save(tmp_path / "in.npy", corrupted(30, 30, 1)[1])
    run(tmp_path / "in.npy", tmp_path / "out.npy", "--rank", 1)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("in.npy", "out.npy")}
    assert len(modes) == 1


def test_what_did_not_converge_is_written_and_said(tmp_path, run):
    np.save(tmp_path / "in.npy", torch.randn(50, 40).numpy())
    code, summary, err = run(tmp_path / "in.npy", tmp_path / "out.npy", "--rank", 3, "--max-iter", 2)
    assert code == 1 and not summary["converged"]
    assert err.startswith("fastpref denoise: warning: did not converge") and len(summary["warnings"]) == err.count("\n")
    assert np.load(tmp_path / "out.npy").shape == (50, 40)


# ---- a batch


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int8])
@pytest.mark.parametrize("output", ["low-rank", "masked", "factors"])
def test_a_batch_is_solved_in_pieces(tmp_path, run, monkeypatch, dtype, output):
    _, data, _ = corrupted(40, 30, 2, missing=0.05, batch=(7,))
    if dtype == np.int8:
        data = np.where(np.isnan(data), -128, np.round(data * 8).clip(-127, 127))
    data = data.astype(dtype)
    np.save(tmp_path / "in.npy", data)
    monkeypatch.setattr(inputs, "BATCH_ENTRIES", 3 * 40 * 30)
    out = tmp_path / ("out.npz" if output == "factors" else "out.npy")
    code, summary, _ = run(tmp_path / "in.npy", out, "--rank", 2, "--output", output, "--scale", 0.5)

    exact = np.float64 if dtype == np.float64 else np.float32
    missing = data == -128 if dtype == np.int8 else np.isnan(data)
    whole = fastpref.rpca(torch.from_numpy(np.where(missing, np.nan, data.astype(exact) / 2)), rank=2, sparse="coo")
    assert summary["kind"] == "batch" and summary["not_converged"] == 7 - whole.info.converged.sum()
    assert code == int(summary["not_converged"] > 0)
    found = np.load(out)
    if output == "low-rank":
        assert found.dtype == exact and error(found, whole.low_rank().numpy()) < 1e-5
    elif output == "factors":
        assert error(found["U"] * found["S"][:, None] @ found["Vh"], whole.low_rank().numpy()) < 1e-5
        np.testing.assert_array_equal(found["sparse_indices"], whole.sparse.indices)
        np.testing.assert_allclose(found["sparse_values"], whole.sparse.values, atol=1e-4)
        np.testing.assert_array_equal(found["iterations"], whole.info.iterations)
    else:
        data[tuple(whole.sparse.indices.T)] = -128 if dtype == np.int8 else np.nan
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, data)


def test_a_batch_without_a_rank_has_ranks_of_its_own(tmp_path, run, monkeypatch):
    data = np.stack([corrupted(40, 30, rank)[1] for rank in (1, 3, 2)])
    np.save(tmp_path / "in.npy", data)
    monkeypatch.setattr(inputs, "BATCH_ENTRIES", 40 * 30)
    _, summary, _ = run(tmp_path / "in.npy", tmp_path / "out.npz", "--output", "factors")
    alone = [fastpref.rpca(torch.from_numpy(data[k : k + 1])) for k in range(3)]
    ranks = [int(fit.info.rank) for fit in alone]
    assert summary["rank"] == {"min": min(ranks), "median": np.median(ranks), "max": max(ranks)}
    found = np.load(tmp_path / "out.npz")
    assert found["rank"].tolist() == ranks and len(set(ranks)) > 1
    for k, fit in enumerate(alone):
        assert error(found["U"][k] * found["S"][k] @ found["Vh"][k], fit.low_rank()[0].numpy()) < 1e-9


# ---- triples


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_triples(tmp_path, run, format):
    low, data, where = corrupted(60, 50, 2, missing=0.1)
    cells = [(i, j) for i, j in np.ndindex(data.shape) if not np.isnan(data[i, j])]
    rows = [{"user": f"{i:03}", "score": data[i, j].item(), "item": f"item {j}, x"} for i, j in cells]
    source = write_table(tmp_path / f"in.{format}", rows)
    flags = ["--rank", 2, "--columns", "row=user,column=item,value=score"]

    assert run(source, tmp_path / f"out.{format}", *flags)[0] == 0
    found = {(row["user"], row["item"]): float(row["score"]) for row in read_table(tmp_path / f"out.{format}")}
    assert len(found) == data.size
    dense = [[found[f"{i:03}", f"item {j}, x"] for j in range(50)] for i in range(60)]
    assert error(np.array(dense), low) < 1e-5

    assert run(source, tmp_path / f"masked.{format}", *flags, "--output", "masked")[0] == 0
    masked = read_table(tmp_path / f"masked.{format}")
    assert [(row["user"], row["item"]) for row in masked] == [(row["user"], row["item"]) for row in rows]
    for row, before, cell in zip(masked, rows, cells, strict=True):
        assert row["score"] is None if where[cell] else float(row["score"]) == before["score"]

    assert run(source, tmp_path / "out.npz", *flags, "--output", "factors")[0] == 0
    factors = np.load(tmp_path / "out.npz")
    i, j = factors["row_names"].tolist().index("007"), factors["column_names"].tolist().index("item 4, x")
    assert factors["U"][i] * factors["S"] @ factors["Vh"][:, j] == pytest.approx(low[7, 4], abs=1e-4)


def test_skew_triples_stand_for_their_mirror_images(tmp_path, run):
    w = torch.randn(12, dtype=torch.float64).numpy()
    rows = [{"row": a, "column": b, "value": w[a] - w[b]} for a in range(12) for b in range(a)]
    source = write_table(tmp_path / "in.parquet", rows)
    flags = ["--structure", "skew", "--rank", 2]
    assert run(source, tmp_path / "out.parquet", *flags)[0] == 0
    for row in read_table(tmp_path / "out.parquet"):
        assert row["value"] == pytest.approx(w[row["row"]] - w[row["column"]], abs=1e-5)
    write_table(source, [*rows, {"row": 0, "column": 5, "value": 9.0}])
    code, _, err = run(source, tmp_path / "out.parquet", *flags)
    assert code == 2 and "is not skew-symmetric" in err


# ---- comparisons


def votes(items=8, votes=60, prompts=1, reversed_pair=None):
    """Complete votes as rows, and the scores [prompts, items] behind them; of one pair per prompt they are reversed."""
    scores = torch.randn(prompts, items, dtype=torch.float64)
    scores = (scores - scores.mean(1, keepdim=True)).sort(1, descending=True).values
    rows = []
    for q in range(prompts):
        for i in range(items):
            for j in range(i):
                share = torch.sigmoid(scores[q, i] - scores[q, j]).item()
                won = round(votes * (1 - share if (j, i) == reversed_pair else share))
                names = {"prompt": f"q{q}", "i": f"{i:02}", "j": f"{j:02}"}
                rows.append(names | {"wins_i": won, "wins_j": votes - won})
    return rows, scores.numpy()


def direct(rows, items, **keywords):
    column = {name: torch.tensor([int(row[name]) for row in rows]) for name in ("i", "j", "wins_i", "wins_j")}
    return fastpref.bradley_terry(edges=fastpref.Edges(**column, num_items=items), **keywords)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl", "csv.gz", "jsonl.gz"])
def test_votes_of_many_prompts(tmp_path, run, ending):
    rows, _ = votes(prompts=3, votes=400, reversed_pair=(0, 6))
    order = torch.randperm(len(rows)).tolist()
    source = write_table(tmp_path / f"in.{ending}", [rows[k] for k in order])
    format = ending.removesuffix(".gz")
    out, flagged = tmp_path / f"out.{format}", tmp_path / f"flagged.{format}"
    code, summary, _ = run(source, out, "--flagged", flagged, "--stderr", "--columns", "prompt=prompt")
    assert code == 0 and (summary["graphs"], summary["items"], summary["comparisons"]) == (3, 24, len(rows))
    found = read_table(out)
    assert list(found[0]) == ["prompt", "item", "score", "stderr", "component", "rejected"]
    assert list(dict.fromkeys(row["prompt"] for row in found)) == list(dict.fromkeys(rows[k]["prompt"] for k in order))
    for q in range(3):
        own = [row for row in rows if row["prompt"] == f"q{q}"]
        fit = direct(own, 8, stderr=True, outliers="pairs")
        mine = {row["item"]: row for row in found if row["prompt"] == f"q{q}"}
        for i in range(8):
            assert float(mine[f"{i:02}"]["score"]) == pytest.approx(fit.scores[i].item(), abs=1e-6)
            assert float(mine[f"{i:02}"]["stderr"]) == pytest.approx(fit.stderr[i].item(), rel=1e-4)
            assert float(mine[f"{i:02}"]["rejected"]) == pytest.approx(fit.rejected[i].item())
        pairs = [{row["i"], row["j"]} for row in read_table(flagged) if row["prompt"] == f"q{q}"]
        assert pairs == [{f"{i:02}", f"{j:02}"} for i, j in fit.outliers.indices.tolist()]
    assert summary["flagged"] == len(read_table(flagged)) > 0


@pytest.mark.parametrize("items", [comparisons.SMALL, comparisons.SMALL + 1])
def test_one_graph_small_and_large(tmp_path, run, items):
    rows, scores = votes(items, 1000)
    rows = [{name: row[name] for name in ("i", "j", "wins_i", "wins_j")} for row in rows]
    code, summary, _ = run(write_table(tmp_path / "in.csv", rows), tmp_path / "out.csv")
    found = {row["item"]: float(row["score"]) for row in read_table(tmp_path / "out.csv")}
    assert code == 0 and summary["converged"] and isinstance(summary["iterations"], int)
    np.testing.assert_allclose([found[f"{i:02}"] for i in range(items)], scores[0], atol=0.05)


def test_winners_are_votes(tmp_path, run):
    rows, _ = votes(6, 40)
    ballots = [
        {"winner": row[a], "loser": row[b], "prompt": "same"}
        for row in rows
        for a, b in (("i", "j"), ("j", "i"))
        for _ in range(row[f"wins_{a}"])
    ]
    out = tmp_path / "out.jsonl"
    assert run(write_table(tmp_path / "in.jsonl", ballots), out, "--no-robust")[0] == 0
    expected = direct(rows, 6, robust=False).scores
    for row in read_table(out):
        assert row["score"] == pytest.approx(expected[int(row["item"])].item(), abs=1e-6)


def test_logits_with_integer_names_and_repeated_pairs(tmp_path, run):
    w = torch.randn(6, dtype=torch.float64).numpy()
    rows = [{"i": 10 * i, "j": 10 * j, "value": w[i] - w[j]} for i in range(6) for j in range(i)]
    rows[4]["value"] += 30
    more = [{"i": 0, "j": 50, "value": w[0] - w[5]}, {"i": 50, "j": 0, "value": None}]
    for extra in ([], more):
        source = write_table(tmp_path / "in.parquet", rows + extra)
        code, summary, _ = run(source, tmp_path / "out.parquet", "--flagged", tmp_path / "flagged.csv")
        unused = f"1 of {len(rows + extra)} rows have no value, and are not used"
        assert code == 0 and summary["warnings"] == [unused] * bool(extra)
        assert summary["comparisons"] == len(rows) + bool(extra) and summary["unused"] == bool(extra)
        for row in read_table(tmp_path / "out.parquet"):
            assert row["score"] == pytest.approx(w[row["item"] // 10] - w.mean(), abs=1e-5)
        flagged = read_table(tmp_path / "flagged.csv")
        assert [{int(row["i"]), int(row["j"])} for row in flagged] == [{rows[4]["i"], rows[4]["j"]}]


def test_small_logits_need_the_layout(tmp_path, run):
    source = write_table(tmp_path / "in.csv", [{"i": "a", "j": "b", "value": 0.6}, {"i": "b", "j": "c", "value": 0.2}])
    assert run(source, tmp_path / "out.csv")[0] == 2
    assert run(source, tmp_path / "out.csv", "--layout", "logits")[0] == 0
    rows = [{name: row[name] for name in ("item", "score")} for row in read_table(tmp_path / "out.csv")]
    assert [row["item"] for row in rows] == ["a", "b", "c"]
    assert [float(row["score"]) for row in rows] == pytest.approx([1.4 / 3, -0.4 / 3, -1 / 3], abs=1e-5)


def test_unconnected_items_are_said(tmp_path, run):
    rows = [{"winner": "a", "loser": "b"}, {"winner": "b", "loser": "a"}, {"winner": "c", "loser": "d"}]
    _, summary, err = run(write_table(tmp_path / "in.csv", rows), tmp_path / "out.csv")
    assert summary["components"] == 2 and "unconnected parts" in err
    assert [row["component"] for row in read_table(tmp_path / "out.csv")] == ["0", "0", "1", "1"]


# ---- errors


MATRIX = np.eye(6)
VOTES = "i,j,wins_i,wins_j\na,b,3,1\n"
WINNERS = "winner,loser\n"
BATTLES = "model_a,model_b,winner\n"
LOGITS = "i,j,value\n"
TRIPLES = "row,column,value\n"
DENSE = ["--max-dense", "1e-9"]
# what IN holds (None: there is none), flags, part of the message
REFUSED_MATRICES = {
    "no input": (None, [], "cannot read in.npy: No such file or directory"),
    "no npy": (b"hello", [], "cannot read in.npy: it holds no array of numbers"),
    "a cut npy": (b"\x93NUMPY\x01\x00", [], "cannot read in.npy: "),
    "a vector": (np.ones(3), [], "in.npy must hold a matrix [m, n] or a batch [batch, m, n], got shape [3]"),
    "complex": (np.eye(2) + 0j, [], "in.npy must hold real numbers of at most 64 bits, got complex128"),
    "strings": (np.array([["a"]]), [], "in.npy must hold real numbers of at most 64 bits, got <U1"),
    "objects": (np.array([[None]]), [], "cannot read in.npy: "),
    "empty": (np.ones((0, 4)), [], "in.npy is empty: shape [0, 4]"),
    "inf": (np.where(MATRIX, np.inf, 1), ["--rank", "1"], "inf"),
    "rank": (MATRIX, ["--rank", "9"], "rank must be between 0 and min(m, n) = 6, got 9"),
    "skew": (np.ones((2, 3)), ["--rank", "2", "--structure", "skew"], "structure='skew' needs"),
    "tol": (MATRIX, ["--tol", "-1"], "tol must be"),
    "method": (MATRIX, ["--method", "annealed"], "method='annealed' needs a rank, got None"),
    "rows of a batch": (np.ones((2, 3, 3)), ["--rank", "1", "--corruption", "rows"], "corruption is for one matrix"),
    "stderr": (MATRIX, ["--stderr"], "--stderr is not for a matrix"),
    "layout": (MATRIX, ["--layout", "votes"], "--layout is not for a matrix"),
    "columns": (MATRIX, ["--columns", "row=i"], "--columns is not for a matrix"),
    "factors": (MATRIX, ["--rank", "1", "--output", "factors"], "OUT must end in .npz for --output factors, got out"),
    "memory": (
        MATRIX,
        DENSE,
        "without --rank the convex program takes about 5.36e-07 GiB, more than --max-dense 1e-09",
    ),
    "memory of a batch": (
        np.ones((3, 6, 6)),
        DENSE,
        "without --rank the convex program takes about 1.61e-06 GiB, more than --max-dense 1e-09",
    ),
    "memory, converted": (np.ones((9, 9), np.uint8), DENSE, "as float32 in.npy takes 3.02e-07 GiB, more than"),
    "plot": (MATRIX, ["--rank", "1", "--plot", "plot.txt"], "--plot must end in .pdf, .png, .svg, got plot.txt"),
    "plot over IN": (MATRIX, ["--rank", "1", "--plot", "in.npy"], "in.npy would overwrite IN"),
    "a folder for a plot": (MATRIX, ["--rank", "1", "--plot", "in.npy/plot.png"], "cannot write in.npy/plot.png: "),
}
REFUSED_CSV = {
    "no bytes": ("", [], "in.csv is empty: it has no column"),
    "columns": ("a,b\n1,2\n", [], "in.csv: its columns a, b fit no layout (triples: row, column, value; votes: i, j"),
    "ambiguous": ("i,j,wins_i,wins_j,value\n", [], "fit several layouts, choose with --layout: votes, logits"),
    "two that name items": ("winner,loser,model_a,model_b\n", [], "choose with --layout: winners, battles"),
    "no such column": ("i,j,w\n", ["--layout", "votes"], "no column wins_i, wins_j for votes, found i, j, w"),
    "no such column of any": (VOTES, ["--columns", "i=nope"], "in.csv has no column nope, found i, j, wins_i, wins_j"),
    "the nearest column": (
        VOTES,
        ["--columns", "wins_i=win_i"],
        "has no column win_i, found i, j, wins_i, wins_j; the nearest is wins_i",
    ),
    "the nearest role": (VOTES, ["--columns", "win_i=wins_i"], "no layout has a role win_i, only column, count, "),
    "no such role of any": (
        VOTES,
        ["--columns", "foo=i"],
        "--columns: no layout has a role foo, only column, count, i, j, ",
    ),
    "a column twice": ("winner,loser,winner\na,b,c\n", [], "in.csv has more than one column winner"),
    "no such role": (VOTES, ["--layout", "votes", "--columns", "row=i"], "votes has no role row, only i, j"),
    "one column twice": (VOTES, ["--columns", "j=i"], "--columns must name a column for each role, got one twice"),
    "no rows": (WINNERS, [], "in.csv holds no comparisons"),
    "a short line": (WINNERS + "a\n", [], "in.csv:2: 1 fields, where the header has 2"),
    "open quotes": (WINNERS + 'a,b\n"a,b\n', [], "in.csv:3: not CSV: the quotes that begin here do not end"),
    "text for numbers": (VOTES + "a,b,x,1\n", [], "in.csv:3: wins_i must be a number, got 'x'"),
    "no name": (WINNERS + "a,b\n,b\n", [], "in.csv:3: winner must hold a name, got none"),
    "itself": (WINNERS + "a,b\nb,b\n", [], "in.csv:3: compares an item with itself: b"),
    "negative": (VOTES + "a,b,-1,1\n", [], "in.csv:3: wins_i must be a finite count >= 0, got -1"),
    "no count": (VOTES + "a,b,,1\n", [], "in.csv:3: wins_i must be a finite count >= 0, got nan"),
    "infinite count": (VOTES + "a,b,inf,1\n", [], "in.csv:3: wins_i must be a finite count >= 0, got inf"),
    "another label": (BATTLES + "a,b,tie\na,b,both\n", [], "in.csv:3: winner must be one of a, model_a, "),
    "a model for a label": (BATTLES + "gpt,llm,gpt\n", [], "in.csv:2: winner must be one of a, model_a, "),
    "no label": (BATTLES + "a,b,\n", [], "in.csv:2: winner must hold a name, got none"),
    "labels for items": (
        BATTLES + "x,y,model_b\nx,y,tie\n",
        ["--columns", "winner=winner,loser=model_b"],
        "in.csv:2: winner holds 'model_b', which is a label, no item: name the columns of the two items, as in",
    ),
    "rank": (VOTES, ["--rank", "2"], "--rank is not for comparisons, which in.csv holds (votes)"),
    "array": (VOTES, ["--array", "a"], "--array is not for a table"),
    "robust": (LOGITS + "a,b,2\n", ["--no-robust"], "--no-robust is for votes: it is maximum likelihood"),
    "probabilities": (LOGITS + "a,b,0.7\nb,a,0.3\na,c,\n", [], "the values of in.csv all lie in [0, 1], as probabilit"),
    "OUT": (VOTES, [], "OUT must end in .parquet, .csv, .jsonl for comparisons, got out.npy"),
    "flagged": (VOTES, ["--flagged", "x.npy"], "--flagged must end in .parquet, .csv, .jsonl, got x.npy"),
    "a cell twice": (TRIPLES + "a,b,1\nc,b,1\na,b,2\n", [], "in.csv:4: has another value for (a, b) than in.csv:2"),
    "dense": (TRIPLES + "a,b,1\n", ["--max-dense", "1e-12"], "1 rows by 1 columns, dense, take 7.45e-09 GiB, more"),
    "stderr": (TRIPLES + "a,b,1\n", ["--stderr"], "--stderr is not for triples"),
}
REFUSED_JSONL = {
    "no JSON": ('{"winner": "a"\n', [], "in.jsonl"),
    "a list": ('{"winner": ["a"], "loser": "b"}\n', [], "column winner of in.jsonl must hold strings or integers, got"),
    "text": (
        '{"i": 1, "j": 2, "wins_i": "1", "wins_j": 2}\n{"i": 1, "j": 2, "wins_i": "one", "wins_j": 2}',
        [],
        "in.jsonl:2: wins_i must be a number, got 'one'",
    ),
    "two kinds": ('{"winner": "a", "loser": "b"}\n{"winner": "a", "loser": 3}', [], "in.jsonl:2: loser holds numbers"),
}
REFUSED = [
    *(("in.npy", "out.npy", *case) for case in REFUSED_MATRICES.values()),
    *(("in.csv", "out.npy" if name == "OUT" else "out.csv", *case) for name, case in REFUSED_CSV.items()),
    *(("in.jsonl", "out.csv", *case) for case in REFUSED_JSONL.values()),
    ("in.txt", "out.npy", b"", [], "in.txt is empty: it has no column"),
    ("in.parquet", "out.csv", b"PAR1", [], "cannot read in.parquet: "),
    ("in.npz", "out.npy", b"PK", [], "cannot read in.npz: "),
    ("in.npy", "in.npy", MATRIX, [], "in.npy would overwrite IN"),
    ("in.npy", ".", MATRIX, ["--rank", "1"], "OUT must end in .npy for --output low-rank, got ."),
]


@pytest.mark.parametrize(("source", "out", "content", "flags", "message"), REFUSED)
def test_what_is_refused_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, run, source, out, content, flags, message
):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, np.ndarray):
        np.save(source, content, allow_pickle=True)
    elif content is not None:
        (tmp_path / source).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = os.listdir()
    code, _, err = run(source, out, *flags)
    assert code == 2 and err.startswith("fastpref denoise: ") and message in err and err.count("\n") == 1
    assert os.listdir() == before


@pytest.mark.parametrize(("error", "code"), [(torch.linalg.LinAlgError, 2), (AssertionError, 3)])
def test_no_failure_looks_like_success(tmp_path, monkeypatch, run, error, code):
    def failing(*arguments, **keywords):
        raise error("the algorithm failed to converge\nmore")

    monkeypatch.setattr(matrices, "rpca", failing)
    np.save(tmp_path / "in.npy", MATRIX)
    found, _, err = run(tmp_path / "in.npy", tmp_path / "out.npy", "--rank", 1)
    assert found == code and "the algorithm failed to converge" in err
    assert ("Traceback" in err) == (code == 3)
    assert os.listdir(tmp_path) == ["in.npy"]


def test_an_old_output_survives_an_error_and_is_replaced_by_success(tmp_path, run):
    np.save(tmp_path / "bad.npy", np.full((4, 4), np.inf))
    np.save(tmp_path / "good.npy", np.ones((4, 4)))
    out = tmp_path / "out.npy"
    out.write_text("old")
    assert run(tmp_path / "bad.npy", out, "--rank", 1)[0] == 2 and out.read_text() == "old"
    assert run(tmp_path / "good.npy", out, "--rank", 1)[0] == 0
    np.testing.assert_allclose(np.load(out), 1, rtol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["bad.npy", "good.npy", "out.npy"]


@pytest.mark.parametrize(("package", "flags"), [("matplotlib", ["--plot", "p.png"]), ("pyarrow", [])])
def test_a_missing_package_is_named(tmp_path, python, package, flags):
    source = ["in.npy", "out.npy"] if flags else ["in.csv", "out.csv"]
    np.save(tmp_path / "in.npy", np.ones((4, 4)))
    (tmp_path / "in.csv").write_text(VOTES)
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from fastpref.cli.main import main; sys.exit(main(['denoise', *{source + flags!r}]))"
    )
    done = python(code)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f'need {package}: pip install "fastpref[cli]"' in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["in.csv", "in.npy"]


# ---- what the user sees


def test_what_nothing_is_observed_of(tmp_path, run, capsys):
    nothing, matrix = np.full((1, 6, 5), np.nan), corrupted(6, 5, 1, batch=(2,))[1]
    for data, warning in (
        (nothing[0], "nothing is observed"),
        (np.concatenate([matrix, nothing]), "nothing is observed in 1 of 3 matrices"),
    ):
        np.save(tmp_path / "in.npy", data)
        code, summary, err = run(tmp_path / "in.npy", tmp_path / "out.npy", "--rank", 1)
        assert (code, err) == (1, f"fastpref denoise: warning: {warning}\n")
        assert summary["undetermined"] == 30 and np.isnan(np.load(tmp_path / "out.npy")).sum() == 30
    assert summary["not_converged"] == 1
    np.save(tmp_path / "in.npy", nothing[0])
    assert main(["denoise", str(tmp_path / "in.npy"), str(tmp_path / "out.npy"), "--rank", "1"]) == 1
    assert "6 x 5, rank 1, 30 cells without a value, nothing observed, 0 iterations" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--scale", "--max-dense"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_factors_and_sizes_are_positive(capsys, flag, value):
    with pytest.raises(SystemExit) as caught:
        main(["denoise", "in.npy", "out.npy", f"{flag}={value}"])
    assert caught.value.code == 2
    assert f"argument {flag}: must be positive and finite, got {value}" in capsys.readouterr().err


def test_a_summary_in_a_line_or_as_json(tmp_path, capsys):
    _, data, _ = corrupted(50, 40, 2)
    np.save(tmp_path / "in.npy", data)
    command = ["denoise", str(tmp_path / "in.npy"), str(tmp_path / "out.npy"), "--rank", "2"]
    assert main(command) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{tmp_path}/out.npy: 50 x 40, rank 2, ") and line.count("\n") == 1
    assert main([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    fit = fastpref.rpca(torch.from_numpy(data), rank=2).info
    for name, value in {
        "iterations": fit.iterations, "residual": fit.residual, "outlier_rate": fit.outlier_rate,
        "noise_scale": fit.scale, "condition": fit.condition,
    }.items():  # fmt: skip
        assert summary[name] == pytest.approx(value.item()), name
    assert summary["gap"] is None and summary["warnings"] == [] and summary["seconds"] > 0


def test_the_warnings_of_the_library_are_in_the_summary(tmp_path, run, monkeypatch):
    def doubtful(*arguments, **keywords):
        warnings.warn("rank=2 looks over-stated", RuntimeWarning, stacklevel=2)
        return fastpref.rpca(*arguments, **keywords)

    monkeypatch.setattr(matrices, "rpca", doubtful)
    np.save(tmp_path / "in.npy", corrupted(60, 50, 2)[1])
    code, summary, err = run(tmp_path / "in.npy", tmp_path / "out.npy", "--rank", 2)
    assert code == 0 and summary["warnings"] == ["rank=2 looks over-stated"]
    assert err == "fastpref denoise: warning: rank=2 looks over-stated\n"


@pytest.mark.parametrize("format", ["png", "pdf", "svg"])
def test_plots(tmp_path, run, format):
    np.save(tmp_path / "in.npy", corrupted(700, 30, 2)[1])
    np.save(tmp_path / "batch.npy", corrupted(40, 30, 2, batch=(3,))[1])
    votes_file = write_table(tmp_path / "in.csv", votes(prompts=2, reversed_pair=(0, 6))[0])
    by_prompt = ["--stderr", "--columns", "prompt=prompt"]
    for source, out, flags in (
        (tmp_path / "in.npy", "out.npy", ["--rank", 2]),
        (tmp_path / "batch.npy", "out.npy", ["--rank", 2, "--output", "masked"]),
        (votes_file, "out.csv", by_prompt),
    ):
        plot = tmp_path / f"{source.stem}.{format}"
        assert run(source, tmp_path / out, *flags, "--plot", plot)[0] == 0
        assert {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[format] == plot.read_bytes()[:5][
            : 5 - (format != "svg")
        ]


def test_a_large_matrix_is_drawn_small():
    """No more pixels than an image has, and none of the corrupted entries lost."""
    m, n = 5 * plots.PIXELS, 7
    indices = torch.tensor([[17, 3], [18, 3], [m - 1, 6]])
    image = plots._largest(indices, torch.tensor([1.0, -9.0, 2.0]), (m, n))
    assert image.shape == (plots.PIXELS, n)
    assert {tuple(where): image[tuple(where)] for where in np.argwhere(image).tolist()} == {
        (3, 3): -9.0,
        (plots.PIXELS - 1, 6): 2.0,
    }


def test_progress_is_for_terminals(tmp_path):
    np.save(tmp_path / "in.npy", corrupted(3000, 400, 5)[1])
    limits = ["--rank", "5", "--method", "annealed", "--tol", "1e-300", "--max-iter", "100", "--threads", "1"]
    command = [sys.executable, "-m", "fastpref", "denoise", "in.npy", "out.npy", *limits]
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert piped.stdout.count("\n") == 1 and piped.stderr.startswith("fastpref denoise: warning: did not converge")
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while part := os.read(ours, 1 << 16):
                shown += part
        os.close(ours)
        assert process.stdout.read().count(b"\n") == 1
    assert b"\riteration: 0it" in shown and b"residual=" in shown


# ---- interrupted, out of room, out of memory


ENDLESS = ["--rank", "8", "--method", "annealed", "--tol", "1e-300", "--max-iter", "1000000", "--threads", "1"]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path, sign):
    torch.manual_seed(0)
    np.save(tmp_path / "in.npy", torch.randn(6000, 500).numpy())
    command = [sys.executable, "-m", "fastpref", "denoise", "in.npy", "out.npy", *ENDLESS]

    def heed_interrupts():  # which a shell has its background jobs ignore, and their children with them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while len(os.listdir(tmp_path)) == 1 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert len(os.listdir(tmp_path)) == 2, process.poll()  # the temporary file: it is under way
            process.send_signal(sign)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "fastpref denoise: interrupted\n")
    assert os.listdir(tmp_path) == ["in.npy"]


def test_a_full_disk_leaves_nothing(tmp_path, python):
    np.save(tmp_path / "in.npy", np.ones((500, 400)))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from fastpref.cli.main import main; sys.exit(main(['denoise', 'in.npy', 'out.npy', '--rank', '1']))"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (2, "fastpref denoise: cannot write: File too large\n")
    assert os.listdir(tmp_path) == ["in.npy"]


MEMORY = """
import resource, sys
import numpy as np
from fastpref.cli.main import main

def private():  # writable memory of this process; pages of a file mapped for reading are not in it
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))

for order in "CF":
    assert main(["denoise", f"small{order}.npy", "out.npy", "--rank", "4"]) == 0  # what is loaded and allocated once
limit = private() + BUDGET
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.load("bigC.npy")
except MemoryError:
    print("does not fit")
for order in "CF":
    for flags in FLAGS:
        assert main(["denoise", f"big{order}.npy", "out.npy", "--rank", "4", *flags]) == 0, (order, flags)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what it has to on Linux only")
def test_a_large_matrix_needs_no_memory_of_its_size(tmp_path, python):
    """120 MB on disk, 40 MB of memory: a few blocks and the factors."""
    m, n = 5000, 6000
    left, right = torch.randn(m, 4), torch.randn(4, n)
    for name, rows in (("small", 200), ("big", m)):
        for order in "CF":
            path, shape = tmp_path / f"{name}{order}.npy", (rows, n if name == "big" else 150)
            file = np.lib.format.open_memmap(path, "w+", np.float32, shape, order == "F")
            low = (left[:rows] @ right[:, : shape[1]]).numpy()
            low.reshape(-1)[::97] += 15
            file[...] = low
            file.flush()
    flags = [["--method", "altproj"], ["--method", "annealed", "--corruption", "rows", "--max-iter", "100"]]
    code = MEMORY.replace("BUDGET", str(40 << 20)).replace("FLAGS", repr(flags))
    # the threshold: glibc otherwise keeps up to 64 MB of freed blocks for later, whatever the size of the matrix
    done = python(code, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="1048576")
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.count("does not fit") == 1
