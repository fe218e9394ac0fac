"""Whatever csv, pandas, pyarrow and polars write is read as it was written, or refused with the line."""

import csv
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastpref.curate import InputError, read_samples, texts
from fastpref.curate.files.containers import as_numbers, numbered_rows, read_table
from fastpref.curate.files.sources import find_sources

pyarrow = pytest.importorskip("pyarrow")
pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")

WORDS = st.text(
    st.sampled_from(list(" ,;|\t\"'\n\r\\aé😀\x00[{\x7f\u2028")) | st.characters(codec="utf-8"), max_size=12
)
CELLS = st.none() | WORDS | st.integers(1, 300_000).map(lambda size: "y" * (size if size % 5 == 0 else size % 50))
LARGEST = 1.7e308  # pandas writes 15 digits of a number in JSON, which make the largest of all infinite
NUMBERS = st.none() | st.floats(-LARGEST, LARGEST) | st.integers(-(2**53), 2**53).map(float)
NAMES = st.text(st.sampled_from(list(' ,;\t"abé')), min_size=1, max_size=6)


@st.composite
def tables(draw):
    """Names of columns, and rows of text cells with a number at the end."""
    names = draw(st.lists(NAMES, min_size=2, max_size=4, unique=True))
    rows = draw(st.lists(st.tuples(*[CELLS] * (len(names) - 1), NUMBERS), min_size=1, max_size=6))
    return names, [dict(zip(names, row, strict=True)) for row in rows]


def write_csv(path, names, rows, delimiter):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def as_columns(names, rows):
    return {name: [row[name] for row in rows] for name in names}


def frame(names, rows):
    types = dict.fromkeys(names[:-1], polars.String) | {names[-1]: polars.Float64}
    return polars.DataFrame(as_columns(names, rows), schema=types)


def arrow(names, rows):
    types = [(name, pyarrow.string()) for name in names[:-1]] + [(names[-1], pyarrow.float64())]
    return pyarrow.table(as_columns(names, rows), schema=pyarrow.schema(types))


def write_arrow_csv(path, names, rows):
    from pyarrow import csv as arrow_csv

    arrow_csv.write_csv(arrow(names, rows), path)


def write_parquet(path, names, rows):
    from pyarrow import parquet

    parquet.write_table(arrow(names, rows), path)


def write_feather(path, names, rows):
    from pyarrow import feather

    feather.write_feather(arrow(names, rows), str(path))


WRITERS = {
    "csv": lambda path, names, rows: write_csv(path, names, rows, ","),
    "csv ;": lambda path, names, rows: write_csv(path, names, rows, ";"),
    "csv tab": lambda path, names, rows: write_csv(path, names, rows, "\t"),
    "pandas csv": lambda path, names, rows: pandas.DataFrame(rows, columns=names).to_csv(path, index=False),
    "pandas csv.gz": lambda path, names, rows: pandas.DataFrame(rows, columns=names).to_csv(
        path, index=False, compression="gzip"
    ),
    "pandas jsonl": lambda path, names, rows: pandas.DataFrame(rows, columns=names).to_json(
        path, orient="records", lines=True, double_precision=15
    ),
    "pyarrow csv": write_arrow_csv,
    "pyarrow parquet": write_parquet,
    "pyarrow feather": write_feather,
    "polars csv": lambda path, names, rows: frame(names, rows).write_csv(path),
    "polars parquet": lambda path, names, rows: frame(names, rows).write_parquet(path),
    "polars ipc": lambda path, names, rows: frame(names, rows).write_ipc(path),
    "polars jsonl": lambda path, names, rows: frame(names, rows).write_ndjson(path),
    "json": lambda path, names, rows: path.write_text(json.dumps(rows, indent=1)),
}


@pytest.mark.parametrize("writer", WRITERS)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tables())
def test_what_is_written_is_read_or_refused_with_its_line(tmp_path_factory, writer, table):
    names, rows = table
    ending = {"csv ;": "csv", "csv tab": "tsv"}.get(writer, writer.rpartition(" ")[2])
    path = tmp_path_factory.mktemp("any") / f"table.{ending}"
    WRITERS[writer](path, names, rows)
    is_csv = "csv" in writer
    try:
        (source,) = find_sources(path)
        if source.delimiter is not None and source.delimiter != {"csv ;": ";", "csv tab": "\t"}.get(writer, ","):
            return  # another delimiter cuts this table as evenly; it is said, and its columns are not there
        found = read_table([source], names)
    except InputError as error:
        # a bare carriage return, which pandas and polars do not quote, could end a row or not
        bare = any("\r" in (cell or "") for row in rows for cell in [row[name] for name in names[:-1]])
        assert is_csv and bare and str(error).startswith(f"{path}:"), error
        return
    # of CSV an empty field is a missing one
    texts_of = [[row[name] or None if is_csv else row[name] for row in rows] for name in names[:-1]]
    assert [found.columns[name].to_pylist() for name in names[:-1]] == texts_of
    numbers = np.array([row[names[-1]] for row in rows], float)
    np.testing.assert_allclose(as_numbers(found, names[-1]), numbers, rtol=1e-14)
    for (number, row), known in zip(numbered_rows(source), found.numbers, strict=True):
        assert number == known and (not is_csv or list(row) == names)


@pytest.mark.parametrize(
    "writer", ["csv", "csv ;", "csv tab", "pyarrow csv", "pyarrow parquet", "polars parquet", "json"]
)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(st.tuples(CELLS, CELLS, CELLS, NUMBERS), min_size=1, max_size=5))
def test_pairs_are_the_ones_that_were_written_and_none_is_lost(tmp_path_factory, writer, rows):
    names = ["prompt", "chosen", "rejected", "score_chosen"]
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    # what both sides go on from is cut from them
    assume(not any(row["prompt"] and all((row[n] or "").startswith(row["prompt"]) for n in names[1:3]) for row in rows))
    path = tmp_path_factory.mktemp(
        "pairs"
    ) / f"pairs.{ {'csv tab': 'tsv'}.get(writer, writer.rpartition(' ')[2]) }".replace(" ;", "")
    WRITERS[writer](path, names, rows)
    samples = read_samples(path)
    is_csv = "csv" in writer
    whole = [row for row in rows if all(row[name] or (not is_csv and row[name] == "") for name in names[:3])]
    assert [(p, *r) for p, r in texts(samples)] == [tuple(row[name] for name in names[:3]) for row in whole]
    assert len(samples.problems) == len(rows) - len(whole)
