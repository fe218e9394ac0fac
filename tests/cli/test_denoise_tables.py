"""`fastpref denoise` on tables as people have them: nothing read wrongly, dropped or invented without a word."""

import contextlib
import csv
import gzip
import io
import json
import os
import random
import sys
import types

import numpy as np
import pytest
import torch

from fastpref.cli.main import main

pytest.importorskip("pyarrow", reason="fastpref[cli] is not installed")

import pyarrow
import pyarrow.feather
from pyarrow import parquet

from fastpref.cli.denoise.inputs import open_input
from fastpref.cli.denoise.options import DenoiseOptions


@pytest.fixture(autouse=True)
def _fresh_names(_fresh_inputs):
    random.seed(torch.randint(2**31, ()).item())


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs `fastpref denoise IN out.csv --json ...` in tmp_path: (exit code, summary, stderr, rows of OUT)."""
    monkeypatch.chdir(tmp_path)

    def denoise(*arguments, out="out.csv"):
        (tmp_path / out).unlink(missing_ok=True)
        inputs = [one for one in arguments if not isinstance(one, list)]
        flags = [flag for one in arguments if isinstance(one, list) for flag in one]
        code = main(["denoise", *map(str, inputs), out, "--json", *flags])
        printed, err = capsys.readouterr()
        rows = None
        if (tmp_path / out).exists():
            with open(tmp_path / out, newline="") as file:
                rows = list(csv.DictReader(file))
        return code, json.loads(printed) if printed else None, err, rows

    return denoise


def scores_of(rows):
    return {row["item"]: float(row["score"]) if row["score"] else None for row in rows}


def as_csv(rows, **options):
    text = io.StringIO()
    csv.writer(text, **options).writerows(rows)
    return text.getvalue()


# ---- rows of any length, in any container


def long_rows():
    """Four votes; a line break within quotes, and records of several megabytes on both sides of it."""
    return [
        ["winner", "loser", "comment"],
        ["a", "b", "y" * 300_000],
        ["b", "a", "I liked\nred,green,blue " + "x" * 1_900_000],
        ["a", "b", "fine"],
        ["b", "a", "fine"],
    ]


def packed(path, content: bytes):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as stream:
            stream.write(content)
        return
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["in.csv", "in.csv.gz", "in.csv.zst", "in.jsonl", "in.jsonl.gz", "in.json", "in.tsv"])
def test_rows_of_any_length_are_rows(tmp_path, run, name):
    header, *rows = long_rows()
    objects = [dict(zip(header, row, strict=True)) for row in rows]
    text = {
        "csv": as_csv([header, *rows]),
        "tsv": as_csv([header, *rows], delimiter="\t"),
        "jsonl": "".join(json.dumps(row) + "\n" for row in objects),
        "json": json.dumps(objects, indent=1),
    }[name.split(".")[1]]
    packed(tmp_path / name, text.encode())
    code, summary, _, out = run(name)
    assert code == 0 and scores_of(out) == {"a": pytest.approx(0, abs=1e-9), "b": pytest.approx(0, abs=1e-9)}
    assert (summary["comparisons"], summary["items"], summary["unused"]) == (4, 2, 0)


def test_triples_between_long_lines(tmp_path, run):
    rows = [["row", "column", "note", "value"]]
    rows += [
        [f"r{i}", f"c{j}", "line\nbreak, " * random.randint(0, 30_000), (i + 1) * (j + 1)]
        for i in range(8)
        for j in range(7)
    ]
    (tmp_path / "in.csv").write_text(as_csv(rows))
    code, _, _, out = run("in.csv", ["--rank", "1"])
    assert code == 0 and len(out) == 56
    for row in out:
        assert float(row["value"]) == pytest.approx((int(row["row"][1:]) + 1) * (int(row["column"][1:]) + 1), rel=1e-5)


@pytest.mark.parametrize(
    "text",
    ["i;j;value\na;b;0,5\nb;c;-2,75\n", "i\tj\tvalue\na\tb\t0.5\nb\tc\t-2.75\n", "i|j|value\na|b|0.5\nb|c|-2.75\n"],
)
def test_other_delimiters_and_decimal_commas(tmp_path, run, text):
    (tmp_path / "in.csv").write_text(text)
    code, summary, _, out = run("in.csv")
    found = scores_of(out)
    assert code == 0 and "(CSV with " in summary["read_as"]
    assert found["a"] - found["b"] == pytest.approx(0.5, abs=1e-5) and found["b"] - found["c"] == pytest.approx(
        -2.75, abs=1e-5
    )


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_thousands_are_not_taken_for_decimals(tmp_path, run, delimiter):
    (tmp_path / "in.csv").write_text("i;j;wins_i;wins_j\na;b;3;1\nb;c;6,000;2\n".replace(";", delimiter))
    code, _, err, _ = run("in.csv")
    assert code == 2 and "in.csv:3: wins_i m" in err and "got '6,000'" in err


def test_a_dot_beside_decimal_commas_is_not_taken_for_a_decimal_one(tmp_path, run):
    (tmp_path / "in.csv").write_text("i;j;wins_i;wins_j\na;b;6.000;2,5\nb;c;5;3\n")
    code, _, err, _ = run("in.csv")
    assert code == 2 and "in.csv:2: wins_i may be 6.000 or 6000, got '6.000'" in err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_by_their_marks(tmp_path, run, encoding):
    text = ("\ufeff" if encoding.endswith("le") else "") + "winner,loser\r\nÅsa,Øyvind\r\nØyvind,Åsa\r\n"
    (tmp_path / "in.csv").write_bytes(text.encode(encoding))
    code, _, _, out = run("in.csv")
    assert code == 0 and [row["item"] for row in out] == ["Åsa", "Øyvind"]


def test_several_files_a_glob_a_folder_and_stdin_are_one_table(tmp_path, run, monkeypatch):
    whole = [["winner", "loser"], *([random.choice(["ab", "ba", "bc", "cb", "ca", "ac"])] for _ in range(60))]
    whole = [whole[0], *([pair[0][0], pair[0][1]] for pair in whole[1:])]
    (tmp_path / "all.csv").write_text(as_csv(whole))
    (tmp_path / "parts").mkdir()
    for k in range(3):
        (tmp_path / "parts" / f"{k}.csv").write_text(as_csv([whole[0], *whole[1 + 20 * k : 21 + 20 * k]]))
    expected = scores_of(run("all.csv")[3])
    for inputs in (["parts/0.csv", "parts/1.csv", "parts/2.csv"], ["parts/*.csv"], ["parts"]):
        code, summary, _, out = run(*inputs)
        assert code == 0 and summary["comparisons"] == 60
        assert scores_of(out) == pytest.approx(expected, abs=1e-6)
    with open(tmp_path / "all.csv", "rb") as file:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=file))
        assert run("-")[1]["comparisons"] == 60
    assert main(["denoise", "parts", "parts/1.csv"]) == 2 and main(["denoise", "parts/?.csv", "parts/1.csv"]) == 2
    (tmp_path / "parts" / "2.csv").write_text("winner,looser\na,b\n")
    code, _, err, _ = run("parts/0.csv", "parts/2.csv")
    assert code == 2 and "parts/2.csv has no column loser" in err


def test_names_in_columns_that_are_not_asked_for_change_nothing(tmp_path, run):
    rows = [{"winner": "a", "loser": "b", "meta": {"x": 1}}, {"winner": "b", "loser": "a", "meta": "none"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("in.jsonl")[1]["comparisons"] == 2


@pytest.mark.parametrize("container", ["parquet", "feather"])
def test_types_of_arrow(tmp_path, run, container):
    names = {"i": ["x", "y", "x"], "j": ["y", "z", "z"]}
    kinds = {
        "dictionary": lambda values: pyarrow.array(values).dictionary_encode(),
        "large": lambda values: pyarrow.array(values, pyarrow.large_string()),
        "view": lambda values: pyarrow.array(values, pyarrow.string_view()),
        "integers": lambda values: pyarrow.array([ord(value) for value in values], pyarrow.uint8()),
    }
    numbers = {
        "decimal": pyarrow.array([5, 2, 4], pyarrow.int64()).cast(pyarrow.decimal128(22, 2)),
        "boolean": pyarrow.array([True, False, True]),
        "half": pyarrow.array(np.array([5, 2, 4], np.float16)),
        "large": pyarrow.array([5, 2, 4], pyarrow.uint64()),
    }
    back = pyarrow.array([1, 3, 2])
    for make in kinds.values():
        for wins in numbers.values():
            table = pyarrow.table(
                {name: make(values) for name, values in names.items()} | {"wins_i": wins, "wins_j": back}
            )
            write = parquet.write_table if container == "parquet" else pyarrow.feather.write_feather
            write(table, tmp_path / f"in.{container}")
            code, summary, _, out = run(f"in.{container}")
            assert code == 0 and (summary["comparisons"], summary["items"]) == (3, 3) and len(out) == 3


# ---- what was written is what is read


def votes_with_names():
    """Rows of random votes between items with awkward names, none of them empty."""
    awkward = [
        '"',
        "a,b",
        "line\nbreak",
        "crlf\r\nend",
        "tab\t",
        " space ",
        "ünïcödé",
        "=1+1",
        "'",
        "null",
        "NA",
        "1",
        "007",
        "\u2028",
        "x" * 70_000,
        "{}",
        "#",
    ]
    names = random.sample(awkward, 6)
    rows = []
    for _ in range(random.randint(4, 30)):
        i, j = random.sample(names, 2)
        rows.append(
            {
                "i": i,
                "j": j,
                "wins_i": random.randint(0, 9),
                "wins_j": random.choice([0, 0.5, 2, 1e6]),
                "note": random.choice([None, "", "a\nb", '"q"']),
            }
        )
    return rows


def write_python(rows, path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        options = {
            "lineterminator": random.choice(["\n", "\r\n"]),
            "quoting": random.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
        }
        writer = csv.DictWriter(file, rows[0], delimiter=random.choice(",;\t"), **options)
        writer.writeheader()
        writer.writerows(rows)


def write_pandas(rows, path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=random.random() < 0.5)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif path.suffix == ".json":
        frame.to_json(path, orient="records", indent=random.choice([0, 2]))
    else:
        frame.astype({"i": "category"}).to_parquet(path)


def write_arrow(rows, path):
    table = pyarrow.Table.from_pylist([row | {"wins_j": float(row["wins_j"])} for row in rows])
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)


def write_polars(rows, path):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame([row | {"wins_j": float(row["wins_j"])} for row in rows], infer_schema_length=None)
    {".csv": frame.write_csv, ".jsonl": frame.write_ndjson, ".json": frame.write_json, ".parquet": frame.write_parquet}[
        path.suffix
    ](path)


WRITERS = [(write_python, ".csv"), (write_arrow, ".csv"), (write_arrow, ".parquet")]
WRITERS += [
    (write, ending) for write in (write_pandas, write_polars) for ending in (".csv", ".jsonl", ".json", ".parquet")
]


@pytest.mark.parametrize(("write", "ending"), WRITERS, ids=lambda value: getattr(value, "__name__", value))
def test_what_a_writer_wrote_is_what_is_read(tmp_path, write, ending):
    for _ in range(6):
        rows = votes_with_names()
        path = tmp_path / f"in{ending}"
        write(rows, path)
        found = open_input(DenoiseOptions([str(path)], "out.csv")).comparisons
        names = found.names.to_pylist()
        read = [
            (names[i], names[j], a, b) for i, j, a, b in zip(found.i, found.j, found.value, found.back, strict=True)
        ]
        assert read == [(row["i"], row["j"], float(row["wins_i"]), float(row["wins_j"])) for row in rows]
        assert found.unused == sum(row["wins_i"] == row["wins_j"] == 0 for row in rows)


# ---- votes, ties, labels


def kaggle_rows(number=300):
    """Battles as one column per outcome, with a text column called prompt; and the votes that each pair has."""
    header = [
        "id",
        "model_a",
        "model_b",
        "prompt",
        "response_a",
        "response_b",
        "winner_model_a",
        "winner_model_b",
        "winner_tie",
    ]
    rows, shares = [], []
    for k in range(number):
        a, b = random.sample(["alpha", "beta", "gamma", "delta"], 2)
        share = random.choice([1.0, 0.0, 0.5])
        rows.append(
            [k, a, b, f'["question {k}"]', '["x"]', '["y"]', int(share == 1), int(share == 0), int(share == 0.5)]
        )
        shares.append((a, b, share))
    return [header, *rows], shares


BY_HAND = "i=model_a,j=model_b,wins_i=winner_model_a,wins_j=winner_model_b"


def fitted(shares, with_ties):
    from fastpref import Edges, bradley_terry

    names = list(dict.fromkeys(name for a, b, _ in shares for name in (a, b)))
    used = [(names.index(a), names.index(b), share) for a, b, share in shares if with_ties or share != 0.5]
    i, j, won = (torch.tensor(column) for column in zip(*used, strict=True))
    scores = bradley_terry(edges=Edges(i, j, won, 1 - won, num_items=len(names))).scores
    return dict(zip(names, scores.tolist(), strict=True))


def test_no_vote_for_either_side_is_a_tie_only_where_a_column_says_so(tmp_path, run):
    rows, shares = kaggle_rows()
    (tmp_path / "in.csv").write_text(as_csv(rows))
    ties = sum(share == 0.5 for *_, share in shares)
    code, summary, err, out = run("in.csv", ["--columns", BY_HAND])
    assert code == 0 and (summary["graphs"], summary["items"]) == (1, 4)
    assert (summary["unused"], summary["ties"], summary["comparisons"]) == (ties, 0, 300 - ties)
    assert f"{ties} of 300 rows have no vote for either item" in err and "--columns ties=winner_tie" in err
    assert scores_of(out) == pytest.approx(fitted(shares, with_ties=False), abs=1e-5)
    for flags in (
        [],
        ["--columns", f"{BY_HAND},ties=winner_tie"],
        ["--columns", BY_HAND, "--columns", "ties=winner_tie"],
    ):
        code, summary, err, out = run("in.csv", flags)
        assert code == 0 and (summary["unused"], summary["ties"], summary["comparisons"]) == (0, ties, 300)
        assert "ties=winner_tie" in summary["read_as"] and "warning" not in err
        assert scores_of(out) == pytest.approx(fitted(shares, with_ties=True), abs=1e-5)
    assert "note: all prompts are ranked together" in err


@pytest.mark.parametrize(
    "words",
    [("model_a", "model_b", "tie"), ("A", "B", "tie (bothbad)"), ("a", "b", "both_bad"), ("Model_A", "Model_B", "Tie")],
)
def test_battles_by_labels_and_judges(tmp_path, run, words):
    _, shares = kaggle_rows()
    label = {1.0: words[0], 0.0: words[1], 0.5: words[2]}
    battles = [["model_a", "model_b", "winner", "judge", "turn", "language", "prompt"]]
    battles += [
        [a, b, label[share], f"user{k % 7}", 1, "English", f"question {k}"] for k, (a, b, share) in enumerate(shares)
    ]
    (tmp_path / "in.csv.gz").write_bytes(gzip.compress(as_csv(battles).encode()))
    code, summary, _, out = run("in.csv.gz")
    assert code == 0 and summary["read_as"].startswith(
        "read as battles: i=model_a, j=model_b, winner=winner, judge=judge"
    )
    assert summary["ties"] == sum(share == 0.5 for *_, share in shares) and summary["judges"]["number"] == 7
    assert scores_of(out) == pytest.approx(fitted(shares, with_ties=True), abs=1e-5)
    renamed = as_csv([["left", "right", "verdict"], *(row[:3] for row in battles[1:])])
    (tmp_path / "renamed.csv").write_text(renamed)
    _, _, _, same = run("renamed.csv", ["--columns", "i=left,j=right,winner=verdict"])
    assert scores_of(same) == pytest.approx(scores_of(out), abs=1e-9)


def test_judges_who_favour_an_order_are_named(tmp_path, run):
    rows = [["model_a", "model_b", "winner", "judge"]]
    for _ in range(120):
        a, b = random.sample("abcd", 2)
        rows.append([a, b, random.choice(["model_a", "model_b"]), "fair"])
        rows.append([a, b, "model_a" if random.random() < 0.97 else "model_b", "first\x1b[31m"])
    (tmp_path / "in.csv").write_text(as_csv(rows))
    _, summary, err, _ = run("in.csv")
    assert r"judge first\x1b[31m favours the item shown first by " in err and "\x1b" not in err
    assert not any(text.startswith("judge fair") for text in summary["warnings"]) and summary["judges"]["z"]["max"] > 3


def test_a_prompt_groups_only_where_it_is_asked_for(tmp_path, run):
    (tmp_path / "in.csv").write_text("prompt,winner,loser\np1,a,b\np2,b,c\np3,a,c\np4,c,b\n")
    code, summary, err, out = run("in.csv")
    assert code == 0 and summary["graphs"] == 1 and len(out) == 3
    assert "note: all prompts are ranked together; --columns prompt=prompt gives every prompt scores of its own" in err
    code, summary, err, out = run("in.csv", ["--columns", "prompt=prompt"])
    assert code == 0 and summary["graphs"] == 4 and len(out) == 8
    assert "every prompt compares a single pair, so no ranking across pairs is possible; leave out prompt=" in err


def test_unused_votes_are_counted_and_said(tmp_path, run):
    (tmp_path / "in.csv").write_text("i,j,wins_i,wins_j\na,b,0,0\nb,c,0,0\na,c,3,1\n")
    code, summary, err, out = run("in.csv")
    assert code == 0 and (summary["comparisons"], summary["unused"]) == (1, 2)
    assert "2 of 3 rows have no vote for either item, and are not used" in err
    found = scores_of(out)
    assert found["b"] is None and found["a"] - found["c"] == pytest.approx(np.log(3), abs=0.1)
    (tmp_path / "in.csv").write_text("i,j,wins_i,wins_j,ties\na,b,0,0,4\nb,c,0,0,1\na,c,3,1,0\n")
    code, summary, err, out = run("in.csv")
    assert (summary["comparisons"], summary["unused"], summary["ties"]) == (3, 0, 5)
    assert None not in scores_of(out).values() and "not used" not in err


@pytest.mark.parametrize("name", ["count", "weight"])
def test_a_column_of_counts_is_used(tmp_path, run, name):
    (tmp_path / "in.csv").write_text(f"winner,loser,{name}\na,b,30\nb,a,10\nb,c,5\nc,b,5\na,c,0\n")
    code, summary, _, out = run("in.csv")
    found = scores_of(out)
    assert code == 0 and summary["unused"] == 1 and f"count={name}" in summary["read_as"]
    assert found["a"] - found["b"] == pytest.approx(np.log(3), abs=0.02) and found["b"] == pytest.approx(
        found["c"], abs=0.02
    )
    (tmp_path / "in.csv").write_text(f"model_a,model_b,winner,{name}\na,b,A,30\na,b,B,10\nb,c,tie,10\n")
    code, summary, _, out = run("in.csv")
    assert scores_of(out) == pytest.approx(found, abs=0.02) and summary["ties"] == 10
    assert run("in.csv", ["--columns", f"count={name}"])[1]["read_as"] == summary["read_as"]


@pytest.mark.parametrize("name", ["tie", "ties", "is_tie"])
def test_a_column_of_ties_beside_winners_is_used(tmp_path, run, name):
    (tmp_path / "in.csv").write_text(f"winner,loser,{name}\na,b,True\na,b,True\nb,c,False\nc,b,False\n")
    code, summary, _, out = run("in.csv")
    assert code == 0 and summary["ties"] == 2 and list(scores_of(out).values()) == pytest.approx([0, 0, 0], abs=1e-6)
    (tmp_path / "in.csv").write_text(f"winner,loser,{name}\na,b,3\n")
    assert f"in.csv:2: {name} must be true or false, 1 or 0, got 3" in run("in.csv")[2]


@pytest.mark.parametrize("header", ["winner,loser", "i,j,wins_i,wins_j", "row,column,value"])
def test_a_header_that_stands_again_is_refused(tmp_path, run, header):
    row = {2: "a,b", 4: "a,b,1,2", 3: "a,b,1"}[header.count(",") + 1]
    (tmp_path / "in.csv").write_text(f"{header}\n{row}\n{header}\n{row}\n")
    assert run("in.csv")[2] == "fastpref denoise: in.csv:3: this row repeats the header\n"


def test_half_wins_are_votes(tmp_path, run):
    (tmp_path / "in.csv").write_text("i,j,wins_i,wins_j\na,b,0.5,0.5\nb,c,1.5,0.5\na,c,3,1\n")
    code, summary, err, out = run("in.csv")
    found = scores_of(out)
    assert (code, err, summary["unused"]) == (0, "", 0)
    assert found["a"] == pytest.approx(found["b"], abs=0.01) and found["a"] > found["c"]


@pytest.mark.parametrize("text", ["a,b,5,0\na,c,7,0\nb,c,3,2\n", "a,b,1,0\n"])
@pytest.mark.parametrize("flags", [[], ["--no-robust"]])
def test_scores_that_only_the_ridge_keeps_finite_are_said(tmp_path, run, text, flags):
    (tmp_path / "in.csv").write_text("i,j,wins_i,wins_j\n" + text)
    code, summary, err, _ = run("in.csv", flags)
    assert code == 0 and summary["separated"] == 1
    assert "the maximum-likelihood scores of 1 of 1 graphs do not exist" in err


def test_the_ridge_is_said_once_of_all_prompts(tmp_path, run):
    rows = [["prompt", "winner", "loser"]]
    rows += [[f"q{q}", f"{i}", f"{j}"] for q in range(40) for i in range(2 + q % 9) for j in range(i)]
    (tmp_path / "in.csv").write_text(as_csv(rows))
    _, summary, _, _ = run("in.csv", ["--columns", "prompt=prompt"])
    (only,) = summary["warnings"]
    assert only.startswith("the maximum-likelihood scores of 40 of 40 graphs do not exist")


def test_names_that_differ_in_white_space_are_said(tmp_path, run):
    (tmp_path / "in.csv").write_text("winner,loser\na,b\nb,a \nb,a\n")
    _, summary, err, _ = run("in.csv")
    assert summary["items"] == 3 and "the items 'a ' and 'a' differ only in white space" in err.replace(
        "'a' and 'a '", "'a ' and 'a'"
    )


def test_columns_with_commas(tmp_path, run):
    (tmp_path / "in.csv").write_text('"model, a","model, b"\nx,y\ny,x\n')
    assert run("in.csv", ["--columns", "winner=model, a,loser=model, b"])[1]["comparisons"] == 2
    assert "its columns 'model, a', 'model, b' fit no layout" in run("in.csv")[2]


def test_a_column_twice_is_refused_only_where_it_is_read(tmp_path, run):
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(column) for column in (["a"], ["b"], ["x"], ["y"])], names=["winner", "loser", "note", "note"]
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    assert run("in.parquet")[0] == 0
    parquet.write_table(table.rename_columns(["winner", "loser", "winner", "note"]), tmp_path / "in.parquet")
    code, _, err, _ = run("in.parquet")
    assert code == 2 and "in.parquet has more than one column winner" in err


# ---- matrices of triples


@pytest.mark.parametrize("form", ["null", "NaN"])
def test_a_row_with_nothing_observed_has_no_value(tmp_path, run, form):
    cells = {
        ("r1", "c1"): "1",
        ("r1", "c2"): "2",
        ("r2", "c1"): "2",
        ("r2", "c2"): "4",
        ("r3", "c1"): form,
        ("r3", "c2"): form,
    }
    (tmp_path / "in.jsonl").write_text(
        "".join(f'{{"row":"{r}","column":"{c}","value":{v}}}\n' for (r, c), v in cells.items())
    )
    code, summary, err, out = run("in.jsonl", ["--rank", "1"])
    found = {(row["row"], row["column"]): row["value"] for row in out}
    assert code == 0 and found["r3", "c1"] == found["r3", "c2"] == ""
    for cell in list(cells)[:4]:
        assert float(found[cell]) == pytest.approx(float(cells[cell]), abs=1e-5)
    assert summary["undetermined"] == 2 and "2 of 6 cells of L have no value" in err


def test_blocks_that_share_nothing_have_no_values_between_them(tmp_path, run):
    n = 8
    left, right = torch.randn(2 * n).tolist(), torch.randn(2 * n).tolist()
    rows = [["row", "column", "value"]]
    rows += [[i, j, left[i] * right[j]] for i in range(2 * n) for j in range(2 * n) if (i < n) == (j < n)]
    (tmp_path / "in.csv").write_text(as_csv(rows))
    _, summary, err, out = run("in.csv", ["--rank", "1"])
    empty = {(int(row["row"]), int(row["column"])) for row in out if not row["value"]}
    assert empty >= {(i, j) for i in range(2 * n) for j in range(2 * n) if (i < n) != (j < n)}
    assert summary["undetermined"] == len(empty) >= 2 * n * n and "the observed entries do not determine them" in err


def test_numbers_that_stand_for_missing_ones(tmp_path, run):
    rows = [["row", "column", "value"]] + [[i, j, (i + 1) * (j + 1)] for i in range(9) for j in range(9)]
    rows[5][2], rows[30][2], rows[31][2] = -3.4028235e38, "inf", "1e30"
    (tmp_path / "in.csv").write_text(as_csv(rows))
    code, _, err, out = run("in.csv", ["--rank", "1"])
    assert code == 0 and "3 values of a size of 1e30 or more are taken as missing" in err
    for row in out:
        assert float(row["value"]) == pytest.approx((int(row["row"]) + 1) * (int(row["column"]) + 1), rel=1e-4)


def test_counts_that_stand_for_missing_ones(tmp_path, run):
    (tmp_path / "in.csv").write_text("i,j,wins_i,wins_j,ties\na,b,30,10,0\nb,c,1e30,2,3\nb,c,5,5,0\na,c,0,0,0\n")
    code, summary, err, out = run("in.csv")
    found = scores_of(out)
    assert code == 0 and (summary["comparisons"], summary["unused"], summary["ties"]) == (2, 2, 0)
    assert "1 of 4 rows have a count of 1e30 or more, which is missing" in err and "1 of 4 rows have no vote" in err
    assert found["a"] - found["b"] == pytest.approx(np.log(3), abs=0.02)
    assert found["b"] == pytest.approx(found["c"], abs=0.02)
    (tmp_path / "in.csv").write_text("winner,loser,count\na,b,3.4e38\na,b,3\nb,a,3\n")
    code, summary, err, out = run("in.csv")
    assert summary["unused"] == 1 and scores_of(out) == pytest.approx({"a": 0, "b": 0}, abs=1e-6)


# ---- what is printed and written


NASTY = "\x1b[31mred\x07\u202e\x9b"


def test_escape_codes_of_names_are_shown_not_obeyed(tmp_path, run, capsys):
    rows = [[f"winner{NASTY}", "loser", f"prompt{NASTY}"], [f"a{NASTY}", "b", "p"], ["b", f"a{NASTY}", "p"]]
    name = f"in{NASTY}.csv"
    (tmp_path / name).write_text(as_csv(rows))
    columns = f"winner=winner{NASTY},loser=loser"
    seen = ""
    for arguments in (
        [name, f"out{NASTY}.csv", "--columns", columns],
        [name, f"out{NASTY}.csv", "--columns", columns, "--json"],
        [name, "out.csv"],
        [name, "out.csv", "--columns", f"winner=no{NASTY}"],
        [name, "out.csv", "--columns", f"no{NASTY}=loser"],
        [name, f"out{NASTY}.txt", "--columns", columns],
        [f"no{NASTY}.csv", "out.csv"],
        [f"no{NASTY}.npy", "out.npy"],
        [name, "out.csv", f"--no{NASTY}"],
        [name, "out.csv", "--layout", NASTY],
        [name, "out.csv", "--columns", NASTY],
    ):
        with contextlib.suppress(SystemExit):
            main(["denoise", *arguments])
        out, err = capsys.readouterr()
        assert out or err
        seen += out + err
    assert all(character == "\n" or character.isprintable() for character in seen)
    assert r"\x1b[31mred\x07\u202e\x9b" in seen and r"\u001b[31mred" in seen  # in words, and in JSON
    with open(tmp_path / f"out{NASTY}.csv", newline="") as file:  # data stay as they are
        assert {row["item"] for row in csv.DictReader(file)} == {f"a{NASTY}", "b"}


def test_formulas_are_disarmed_on_request(tmp_path, run):
    names = ["=1+1", "+x", "-y", "@z", "\tq", "plain", "a=b", "'quoted"]
    rows = [["winner", "loser"], *([a, b] for a in names for b in names if a != b)]
    (tmp_path / "in.csv").write_text(as_csv(rows))
    _, _, _, out = run("in.csv")
    assert [row["item"] for row in out] == names
    _, _, _, out = run("in.csv", ["--csv-safe"])
    assert [row["item"] for row in out] == ["'=1+1", "'+x", "'-y", "'@z", "'\tq", "plain", "a=b", "'quoted"]
    assert any(float(row["score"]) <= 0 for row in out)  # numbers stay numbers
    cells = [["=row", "column", "value"], *([f"={i}", j, -i * j] for i in range(4) for j in range(4))]
    (tmp_path / "in.csv").write_text(as_csv(cells))
    _, _, _, out = run("in.csv", ["--columns", "row==row", "--rank", "1", "--csv-safe"])
    assert list(out[0]) == ["'=row", "column", "value"] and out[-1]["'=row"] == "'=3"


# ---- the header first


REFUSED = {
    "no file": (None, []),
    "no layout": ("a,b\n1,2\n", []),
    "no column": ("winner,loser\na,b\n", ["--columns", "winner=wnner"]),
    "a flag of matrices": ("winner,loser\na,b\n", ["--rank", "2"]),
    "an ending": ("winner,loser\na,b\n", ["--flagged", "x.npy"]),
    "a label": ("model_a,model_b,winner\na,b,draw\n", []),
    "a row": ("winner,loser\na\n", []),
    "a number": ("i,j,wins_i,wins_j\na,b,x,1\n", []),
    "itself": ("winner,loser\na,a\n", []),
    "over itself": ("winner,loser\na,b\n", ["--flagged", "in.csv"]),
}


def test_a_refusal_imports_no_torch(tmp_path, python):
    np.save(tmp_path / "vector.npy", np.ones(3))
    np.save(tmp_path / "in.npy", np.ones((3, 3)))
    commands = {
        "a vector": ["vector.npy", "out.npy"],
        "an ending of a matrix": ["in.npy", "out.csv"],
        "a flag of tables": ["in.npy", "out.npy", "--layout", "votes"],
    }
    for number, (name, (text, flags)) in enumerate(REFUSED.items()):
        if text is not None:
            (tmp_path / f"{number}.csv").write_text(text)
        commands[name] = [f"{number}.csv", "out.csv", *(flag.replace("in.csv", f"{number}.csv") for flag in flags)]
    code = (
        "import sys; from fastpref.cli.main import main\n"
        f"for name, command in {commands!r}.items():\n"
        "    print(name, main(['denoise', *command]), 'torch' in sys.modules)"
    )
    done = python(code)
    assert done.stdout.splitlines() == [f"{name} 2 False" for name in commands], done.stderr
    assert done.stderr.count("\n") == len(commands)


def test_a_pipe_that_nobody_writes_to_is_refused_before_it_is_opened(tmp_path, run):
    for ending, out in ((".csv", "out.csv"), (".npy", "out.npy"), (".npz", "out.npy"), (".jsonl.gz", "out.csv")):
        os.mkfifo(tmp_path / f"in{ending}")
        code, _, err, _ = run(f"in{ending}", out=out)  # to open it would wait for ever
        assert code == 2 and f"cannot read in{ending}: it is " in err


def test_the_folder_of_an_output_is_made(tmp_path, run):
    (tmp_path / "in.csv").write_text("winner,loser\na,b\nb,a\n")
    code, _, _, out = run("in.csv", ["--flagged", "x/y/flagged.jsonl"], out="new/folder/out.csv")
    assert code == 0 and len(out) == 2 and (tmp_path / "x" / "y" / "flagged.jsonl").exists()
    assert run("in.csv", ["--tol", "-1"], out="other/out.csv")[0] == 2 and not (tmp_path / "other").exists()


def test_a_private_output_stays_private(tmp_path, run):
    (tmp_path / "in.csv").write_text("winner,loser\na,b\nb,a\n")
    (tmp_path / "private.csv").touch(0o600)
    main(["denoise", "in.csv", "private.csv"])
    assert (tmp_path / "private.csv").stat().st_mode & 0o777 == 0o600 and (tmp_path / "private.csv").stat().st_size


@pytest.mark.parametrize(
    ("header", "first", "name", "value"),
    [
        ("winner,loser", "a,b", "tie", True),
        ("winner,loser", "a,b", "count", 3),
        ("winner,loser", "a,b", "weight", 3),
        ("i,j,wins_i,wins_j", "a,b,1,2", "ties", 4),
        ("model_a,model_b,winner", "a,b,a", "weight", 3),
        ("model_a,model_b,winner_model_a,winner_model_b", "a,b,1,0", "winner_tie", 0),
    ],
)
def test_a_column_that_only_later_rows_have_is_never_passed_over(tmp_path, run, header, first, name, value):
    rows = [header.split(","), first.split(",")]
    row = {key: int(text) if text.isdigit() else text for key, text in zip(*rows, strict=True)}
    (tmp_path / "a.csv").write_text(as_csv(rows))
    (tmp_path / "b.csv").write_text(as_csv([[*rows[0], name], [*rows[1], value]]))
    assert f"a.csv has no column {name}, found {', '.join(rows[0])}" in run("a.csv", "b.csv")[2]
    assert f"a.csv has no column {name}" in run("b.csv", "a.csv")[2]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [row] * 5000 + [row | {name: value}]))
    code, _, err, out = run("in.jsonl")
    assert (code, out) == (2, None)
    assert f"in.jsonl:5001: {name} is a column of this row and of none of the first: have such a row at the top" in err
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [row] * 5000 + [row | {name: None}]))
    assert run("in.jsonl")[0] == 0
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row | {name: value}) + "\n" for _ in range(2)))
    assert f"{name}" in run("in.jsonl")[1]["read_as"]


def test_formulas_are_disarmed_in_long_strings(tmp_path, run):
    names = ["=1+1", "+x", "plain"]
    rows = [{"winner": a, "loser": b} for a in names for b in names if a != b]
    schema = pyarrow.schema([("winner", pyarrow.large_string()), ("loser", pyarrow.large_string())])
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "in.parquet")
    _, _, _, out = run("in.parquet", ["--csv-safe"])
    assert sorted(row["item"] for row in out) == ["'+x", "'=1+1", "plain"]
