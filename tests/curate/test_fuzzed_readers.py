"""Damaged files of every container: each is read, or refused in one line with its name; nothing else comes out.

`--fuzz N` gives the number of files in all.
"""

import csv
import gzip
import io
import json
import random
import time

import pytest
import torch
from samples_cases import CLEVER, USER

from fastpref.curate import InputError, read_samples, text_hashes, texts
from fastpref.curate.files import lines, sources
from fastpref.curate.files.containers import read_table
from fastpref.curate.files.sources import find_sources

pyarrow = pytest.importorskip("pyarrow")

SLOWEST = 20  # seconds for one small file, on a busy machine


def rows_of(kind):
    if kind == "pools":
        return [
            {
                "prompt": f"p{k}",
                "responses": ["a, b", 'c "d"\n', "é"],
                "scores": [1.5, None, -2],
                "sources": ["m", "n", "m"],
            }
            for k in range(6)
        ]
    if kind == "messages":
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
        return [
            {
                "prompt": USER,
                "chosen": CLEVER,
                "rejected": [call],
                "score_chosen": 2,
                "score_rejected": 1,
                "tools": "[]",
            }
        ] * 4
    return [{"prompt": f"p{k % 2}", "response": f'r{k}, "x"\ny', "score": k, "prompt_id": None} for k in range(8)]


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(
        {name: value if isinstance(value, str | int) else json.dumps(value) for name, value in row.items()}
        for row in rows
    )
    return out.getvalue().encode()


def as_parquet(rows, **options):
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def as_arrow(rows, make):
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(rows)
    with make(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CONTAINERS = {
    "lines": as_lines,
    "lines utf-16": lambda rows: as_lines(rows).decode().encode("utf-16"),
    "array": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": as_csv,
    "gz": lambda rows: gzip.compress(as_lines(rows)),
    "zst": lambda rows: pyarrow.Codec("zstd").compress(as_lines(rows), asbytes=True),
    "csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "parquet": as_parquet,
    "parquet dictionary": lambda rows: as_parquet(rows, compression="none", row_group_size=2),
    "arrow": lambda rows: as_arrow(rows, pyarrow.ipc.new_file),
    "arrow stream": lambda rows: as_arrow(rows, pyarrow.ipc.new_stream),
}
TOKENS = [
    b'"',
    b"\n",
    b"\r",
    b",",
    b"{",
    b"[",
    b"]",
    b"}",
    b"\\ud800",
    b"\xff",
    b"\0",
    b"1e999",
    b"NaN",
    b"null",
    b"[" * 2000,
]
TOKENS += [
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"PAR1",
    b"\x1f\x8b",
    b"ARROW1",
    b'"prompt":',
    b"-",
    b"9" * 400,
    b"true",
    b"\x80",
]


def damaged(content, draw):
    """One to four changes: flipped bits, cuts, other bytes, pieces repeated or taken out, tokens put in."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.choice([1, 2, 8, 64]))
        match draw.randrange(7):
            case 0 if at < len(content):
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                del content[at:]
            case 2:
                content[at:end] = draw.randbytes(end - at)
            case 3:
                del content[at:end]
            case 4:
                content[at:at] = content[at:end] * draw.choice([1, 3])
            case 5:
                content[at:at] = draw.choice(TOKENS)
            case 6 if at < len(content):
                content[at] = draw.choice([0, 1, 127, 128, 255])
    return bytes(content)


@pytest.mark.parametrize("kind", ["pools", "messages", "responses"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_damaged_files_are_read_or_refused_in_a_line(tmp_path, monkeypatch, request, container, kind):
    monkeypatch.setattr(sources, "MOST_UNPACKED", 1 << 22)
    monkeypatch.setattr(lines, "LONGEST_ROW", 1 << 22)
    draw = random.Random(torch.initial_seed())
    whole = CONTAINERS[container](rows_of(kind))
    path = tmp_path / f"samples.{container.split()[0]}"
    read = 0
    for count in range(max(1, request.config.getoption("fuzz") // (3 * len(CONTAINERS)))):
        content = damaged(whole, draw)
        path.write_bytes(content)
        started = time.monotonic()
        for reader in (_columns_and_texts, _hashes, _table)[count % 3 :: 3]:
            try:
                read += reader(path)
            except InputError as error:
                assert "\n" not in str(error) and path.name in str(error), content
            except BaseException as error:
                raise AssertionError(f"{reader.__name__} of {content!r}") from error
        assert time.monotonic() - started < SLOWEST, content
    assert read or container not in ("lines", "csv")  # some damage does no harm


def _columns_and_texts(path):
    samples = read_samples(path, workers=1)
    assert len(list(texts(samples))) == samples.prompts
    assert all("\n" not in problem.reason for problem in samples.problems)
    return samples.prompts


def _hashes(path):
    return len(text_hashes(path))


def _table(path):
    return len(read_table(find_sources(path)).numbers)
