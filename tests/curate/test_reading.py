"""Files of samples: their kinds, their parts, the processes that read them, and files that cannot be read."""

import gzip
import json
import random

import numpy as np
import pytest
import torch
from samples_cases import CLEVER, GOOD, USER, write_lines

from fastpref.curate import (
    InputError,
    read_samples,
    read_scored_samples,
    text_hashes,
    texts,
)
from fastpref.curate.files import reading
from fastpref.curate.files.containers import json_rows, key_counts
from fastpref.curate.files.sources import find_sources


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


def equal_samples(a, b, but=()):
    for name, column in vars(a).items():
        other = getattr(b, name)
        if isinstance(column, np.ndarray) and name not in but:
            np.testing.assert_array_equal(column, other, err_msg=name)
            assert column.dtype == other.dtype, name
    assert list(a.scores) == list(b.scores)
    for name, scores in a.scores.items():
        np.testing.assert_array_equal(scores, b.scores[name], err_msg=name)
    assert (a.source_names, a.fields._replace(known=())) == (b.source_names, b.fields._replace(known=()))
    assert [(p.row, p.reason) for p in a.problems] == [(p.row, p.reason) for p in b.problems]


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
        assert seen[-1] == (reading.extent(*find_sources(path)),) * 2 and seen == sorted(seen)
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


@pytest.mark.parametrize("rows", [[], [[]], [3], [b"{"]])
def test_a_file_without_a_usable_row(tmp_path, rows):
    samples = read_samples(write_lines(tmp_path / "samples.jsonl", rows))
    assert (samples.prompts, samples.responses, len(samples.problems)) == (0, 0, len(rows) and rows != [[]])
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


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("part", [1, 100, 1 << 23])
def test_parts_are_the_whole_file_in_order(tmp_path, monkeypatch, part, packed):
    monkeypatch.setattr(reading, "PART", part)
    rows = [GOOD | {"prompt": f"p{k}"} for k in range(20)]
    path = write_lines(tmp_path / "samples.jsonl", [*rows[:7], b"", *rows[7:], b"{"])
    lines = path.read_bytes()
    if packed:
        path.write_bytes(gzip.compress(lines))
    (source,) = find_sources(path)
    cut = list(reading.parts([source], None))
    assert [p.begin for p in cut] == [0, *(p.end for p in cut[:-1])] and cut[-1].end == len(lines)
    assert cut[-1].done == reading.extent(source)
    assert all(lines[p.end - 1 : p.end] == b"\n" for p in cut)
    found = [row for p in cut for row in reading.part_rows(source, p, None)]
    assert [position for position, _ in found] == [0, *(k + 1 for k, c in enumerate(lines[:-1]) if c == ord("\n"))]
    assert [row for _, row in found if isinstance(row, dict)] == rows
    assert found[7][1] is None and isinstance(found[-1][1], ValueError)
    assert [number for _, number, _ in reading.placed_rows([source], None)] == [*range(1, 8), *range(9, 23)]
    second = next(p for p in cut if p.end > found[1][0])
    assert list(reading.part_rows(source, second, None, [found[1][0]])) == [found[1]]


PIECES = ["a", "b", ":", '":', '\\":', " : ", "\\", '"', "é", '{"a": 1}', "\t"]


def random_value(depth=3):
    kind = random.choice("tnld" if depth else "tn")
    if kind == "d":
        return {random_text(): random_value(depth - 1) for _ in range(random.randint(0, 4))}
    if kind == "l":
        return [random_value(depth - 1) for _ in range(random.randint(0, 4))]
    return random_text() if kind == "t" else random.choice([None, True, 1, 2.5, -3])


def random_text():
    return "".join(random.choices(PIECES, k=random.randint(0, 4)))


def spelled(value, repeated: list, share: float) -> str:
    """As JSON, with white space and escapes as they come; keys that stand there twice go to the list."""
    if isinstance(value, dict):
        pairs, blank = list(value.items()), " \t"[random.random() < 0.2] * random.choice([0, 0, 1, 3, 9])
        if pairs and random.random() < share:
            pairs.insert(random.randint(0, len(pairs)), random.choice(pairs))
            repeated.append(pairs)
        return "{{{}}}".format(", ".join(f"{spelled(k, [], 0)}{blank}:{spelled(v, repeated, share)}" for k, v in pairs))
    if isinstance(value, list):
        return "[{}]".format(", ".join(spelled(item, repeated, share) for item in value))
    if isinstance(value, str) and random.random() < 0.3:
        return '"{}"'.format("".join(f"\\u{ord(character):04x}" for character in value))
    return json.dumps(value, ensure_ascii=random.random() < 0.5)


@pytest.mark.parametrize("kind", ["lines", "array"])
def test_a_key_that_stands_twice_in_any_object_makes_a_bad_row(tmp_path, kind):
    random.seed(torch.randint(2**31, ()).item())
    rows = [{"row": k, "value": random_value()} for k in range(600)]
    found = [[] for _ in rows]
    lines = [spelled(row, repeated, 0.1) for row, repeated in zip(rows, found, strict=True)]
    assert 0 < sum(map(bool, found)) < len(rows)
    text = "\n".join(lines) if kind == "lines" else "[{}]".format(",\n".join(lines))
    (tmp_path / "s.json").write_text(text, encoding="utf-8")
    (source,) = find_sources(tmp_path / "s.json")
    read = list(json_rows(source))
    assert [number for number, _ in read] == list(range(1, len(rows) + 1))
    for (_, value), row, repeated in zip(read, rows, found, strict=True):
        assert isinstance(value, ValueError) and "more than once" in str(value) if repeated else value == row


def test_the_keys_of_a_line_are_counted_without_its_texts():
    rows = [{"prompt": 'say {"a": 1} : "b":', "n": {"x": 1}}, {}, {"é : ": [{"role": "user", "content": "\\"}]}]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    assert key_counts(b"".join(lines), lines) == [3, 0, 3]
    assert key_counts(b'{"a" \t : 1}', [b'{"a" \t : 1}']) == [1]
