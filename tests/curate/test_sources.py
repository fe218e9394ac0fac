"""Where data come from: files, globs, folders, stdin, addresses; and what is refused before it is opened."""

import gc
import gzip
import io
import json
import os
import pickle
import sys
import threading
import time

import pytest
from samples_cases import GOOD, write_lines

from fastpref.curate import InputError, read_samples, texts
from fastpref.curate.files import lines, sources
from fastpref.curate.files.containers import column_names, read_table
from fastpref.curate.files.sources import find_sources


def rows(begin, count=3):
    return [GOOD | {"prompt": f"p{k}"} for k in range(begin, begin + count)]


def prompts(samples):
    return [prompt for prompt, _ in texts(samples)]


def test_several_files_a_glob_and_a_folder_are_read_in_order(tmp_path):
    for k in range(3):
        write_lines(tmp_path / f"part-{k}.jsonl", [*rows(3 * k), b"{"])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "part-0.jsonl.meta.json").write_text("{}")
    files = [tmp_path / f"part-{k}.jsonl" for k in range(3)]
    for names in (files, str(tmp_path / "part-*.jsonl"), tmp_path, [tmp_path / "part-[01].jsonl", files[2]]):
        for workers in (1, 2):
            samples = read_samples(names, workers=workers)
            assert prompts(samples) == [f"p{k}" for k in range(9)]
            assert samples.row.tolist() == [1, 2, 3] * 3
            assert [(problem.path, problem.row) for problem in samples.problems] == [(str(path), 4) for path in files]
    assert read_samples(files[::-1]).path == f"{files[2]} and 2 more"
    files[1].write_text(files[1].read_text() + "\n")
    with pytest.raises(InputError, match="changed after its scores were read"):
        prompts(samples)


def test_a_folder_must_leave_no_doubt(tmp_path):
    with pytest.raises(InputError, match=r"the folder .* holds no data"):
        find_sources(tmp_path)
    write_lines(tmp_path / "train-0.jsonl", rows(0))
    write_lines(tmp_path / "test-0.jsonl", rows(3))
    with pytest.raises(InputError, match=r"holds several splits, test, train: name the files"):
        find_sources(tmp_path)
    (tmp_path / "test-0.jsonl").rename(tmp_path / "train-1.csv")
    with pytest.raises(InputError, match=r"holds files of several kinds, .csv, .jsonl"):
        find_sources(tmp_path)
    with pytest.raises(InputError, match="no file matches"):
        find_sources(str(tmp_path / "*.parquet"))


def test_datasets_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (the extra [trl])")
    whole = datasets.Dataset.from_list(rows(0, 20))
    whole.save_to_disk(tmp_path / "whole", num_shards=3)
    assert prompts(read_samples(tmp_path / "whole")) == [f"p{k}" for k in range(20)]
    split = datasets.DatasetDict({"train": whole, "test": whole.select(range(2))})
    split.save_to_disk(tmp_path / "split")
    with pytest.raises(InputError, match=r"holds the splits train, test: name one, as .*split/train"):
        read_samples(tmp_path / "split")
    assert prompts(read_samples(tmp_path / "split" / "test")) == ["p0", "p1"]
    (tmp_path / "whole" / "state.json").write_text('{"_data_files": [{"filename": "../split/train/x.arrow"}]}')
    with pytest.raises(InputError, match="names a file outside its folder"):
        read_samples(tmp_path / "whole")


def test_stdin_is_read_twice_though_it_comes_once(tmp_path, monkeypatch):
    content = write_lines(tmp_path / "samples.jsonl", rows(0)).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(content))))
    samples = read_samples("-")
    assert prompts(samples) == ["p0", "p1", "p2"] and samples.path == "-"
    with pytest.raises(InputError, match="- stands for stdin, which can be read once"):
        read_samples(["-", "-"])


def test_addresses_are_opened_by_fsspec(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for k in range(2):
        memory.pipe(f"/runs/{k}.jsonl.gz", gzip.compress("\n".join(map(json.dumps, rows(3 * k))).encode()))
    assert prompts(read_samples("memory://runs/1.jsonl.gz")) == ["p3", "p4", "p5"]
    assert len(prompts(read_samples("memory://runs/*.jsonl.gz"))) == 6
    with pytest.raises(InputError, match=r"cannot read memory://runs/2.jsonl: "):
        read_samples("memory://runs/2.jsonl")
    with pytest.raises(InputError, match="cannot read nowhere://x: "):
        read_samples("nowhere://x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match="needs fsspec: pip install fsspec"):
        read_samples("memory://runs/1.jsonl.gz")


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=refused, args=(tmp_path / "pipe", "it is a pipe"), daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive()  # a pipe without a writer would be waited for
    refused("/dev/null", "it is a device")
    refused(tmp_path / "none", "No such file or directory")
    refused("a\0b", "embedded null")
    with pytest.raises(InputError, match="no input is given"):
        find_sources([])


def refused(path, reason):
    with pytest.raises(InputError, match=reason):
        find_sources(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04rest", "a zip archive"),
        (b"BZh91AY", "packed by bzip2"),
        (b"\xfd7zXZ\0", "packed by xz"),
        (b"\x93NUMPY", "an array of NumPy"),
        (gzip.compress(b"PAR1" + b"\0" * 100), "Parquet inside of gzip: unpack it first"),
        (gzip.compress(gzip.compress(b"{}")), "not JSON|not UTF-8"),
        ('{"prompt": "p"}'.encode("utf-16-le"), "UTF-16 without a byte-order mark"),
    ],
    ids=["zip", "bzip2", "xz", "numpy", "parquet-in-gzip", "gzip-in-gzip", "utf-16"],  # gzip writes the time
)
def test_other_containers_are_named(tmp_path, content, what):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(content)
    try:
        problems = read_samples(path).problems
    except InputError as error:
        problems = [error]
    assert len(problems) >= 1
    with pytest.raises(AssertionError, match=what):
        raise AssertionError(str(problems[0]))


# ---- what a file is


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("packed", [None, "gz", "zst"])
def test_encodings_and_packings(tmp_path, encoding, packed):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in [GOOD | {"prompt": "naïve 😀"}, GOOD])
    content = text.encode(encoding)
    if encoding == "utf-16-be":
        content = b"\xfe\xff" + content
    path = tmp_path / "samples"
    path.write_bytes(pack(content, packed))
    assert prompts(read_samples(path)) == ["naïve 😀", "p"]
    (source,) = find_sources(path)
    assert source.container == "json-lines" and source.packing == {None: None, "gz": "gzip", "zst": "zstd"}[packed]


def pack(content, how):
    if how == "gz":
        return gzip.compress(content)
    if how == "zst":
        pyarrow = pytest.importorskip("pyarrow")
        return pyarrow.Codec("zstd").compress(content, asbytes=True)
    return content


@pytest.mark.parametrize("how", ["gz", "zst"])
def test_a_cut_or_damaged_packed_file_is_an_input_error(tmp_path, how):
    content = pack("".join(json.dumps(GOOD | {"prompt": f"{k}"}) + "\n" for k in range(3000)).encode(), how)
    path = tmp_path / f"samples.jsonl.{how}"
    cut = [content[: len(content) // 2], content[:-3], content + content[:40]]
    damaged = [content[:50] + b"\0\0\0\0" + content[54:]] if how == "gz" else []  # zstd need not have a checksum
    for broken in cut + damaged:
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"cannot read .*samples.jsonl") as caught:
            read_samples(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["gz", "zst"])
def test_bombs_are_bounded(tmp_path, monkeypatch, how):
    path = tmp_path / "bomb"
    monkeypatch.setattr(sources, "MOST_UNPACKED", 1 << 20)
    path.write_bytes(pack(b"\n" * (1 << 24), how))
    with pytest.raises(InputError, match="it unpacks to more than 500 times its size"):
        read_samples(path)
    monkeypatch.setattr(lines, "LONGEST_ROW", 1 << 16)
    path.write_bytes(pack(b'{"prompt": "' + b"x" * (1 << 22), how))
    with pytest.raises(InputError, match=r"bomb:1: a line of more than 0 MiB|more than 500 times"):
        read_samples(path)


@pytest.mark.parametrize(
    ("name", "content", "container", "delimiter"),
    [
        ("x.jsonl", '{"a": 1}\n', "json-lines", None),
        ("x", ' \n[{"a": 1}]', "json-array", None),
        ("x.json", '[\n  {\n    "a": 1\n  }\n]\n', "json-array", None),
        ("x", "a,b\n1,2\n", "csv", ","),
        ("x.tsv", "a\tb\n1\t2\n", "csv", "\t"),
        ("x.csv", "a\tb\n1, x\t2\n", "csv", "\t"),
        ("x.csv", "a;b\n0,5;0,7\n", "csv", ";"),
        ("x.csv", 'a,b\n"1;2;3",x\n', "csv", ","),
        ("x.csv", '"a, b","c"\nx,y\n', "csv", ","),
        ("x", '"a","b"\n"x","y"\n', "csv", ","),
        ("x.csv", "single\nx\n", "csv", ","),
        ("x", '"free text"\n"more"\n', "json-lines", None),
        ("x.csv", '{"a": 1}\n', "json-lines", None),
        ("x", "", "json-lines", None),
    ],
)
def test_what_a_file_is(tmp_path, name, content, container, delimiter):
    (tmp_path / name).write_text(content)
    (source,) = find_sources(tmp_path / name)
    assert (source.container, source.delimiter) == (container, delimiter)
    if container == "csv":
        assert source.description == f"CSV with {'tabs' if delimiter == chr(9) else repr(delimiter)}"


def test_a_table_of_any_container_is_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    table = pyarrow.table({"i": ["a", "b\nc", None], "n": [1.5, None, -2.0]})
    records = table.to_pylist()
    parquet.write_table(table, tmp_path / "t.parquet")
    feather.write_feather(table, str(tmp_path / "t.feather"))
    with pyarrow.ipc.new_stream(tmp_path / "t.arrow", table.schema) as stream:
        stream.write_table(table)
    write_lines(tmp_path / "t.jsonl", records)
    (tmp_path / "t.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "t.csv").write_text('i,n\na,1.5\n"b\nc",\n,-2.0\n')
    for path in tmp_path.iterdir():
        (source,) = find_sources(path)
        assert column_names(source) == ["i", "n"]
        found = read_table([source], ["n", "i"])
        assert list(found.columns) == ["n", "i"] and found.columns["i"].to_pylist() == ["a", "b\nc", None]
        assert found.numbers.tolist() == ([2, 3, 5] if path.suffix == ".csv" else [1, 2, 3])
        assert found.place(1) == f"{path}:{found.numbers[1]}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"splits": []}, "at least one of its splits"),
        ([], "must be an object"),
        (["train"], "must be an object"),
        ({}, "at least one of its splits"),
        ({"splits": "train"}, "at least one of its splits"),
        ({"splits": [1]}, "an entry of its splits is no name"),
        ({"splits": ["../.."]}, r"names a file outside its folder: \.\./\.\."),
        ({"splits": [".."]}, "names a file outside its folder"),
        ({"splits": ["a\0b"]}, "an entry of its splits is no name"),
    ],
    ids=str,
)
def test_a_list_of_splits_is_checked(tmp_path, content, said):
    (tmp_path / "dataset_dict.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        find_sources(tmp_path)


@pytest.mark.parametrize(
    "files", [[], None, 7, ["data.arrow"], [{"name": "x"}], [{"filename": 3}], [{"filename": ".."}]]
)
def test_a_list_of_data_files_is_checked(tmp_path, files):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    with pytest.raises(InputError, match=r"state\.json"):
        find_sources(tmp_path)
    for broken in ("[" * 100_000, "{"):
        (tmp_path / "state.json").write_text(broken)
        with pytest.raises(InputError, match=r"cannot read .*state\.json"):
            find_sources(tmp_path)


def test_copies_and_groups_are_there_as_long_as_the_samples(tmp_path, monkeypatch):
    def files():
        return sorted(os.listdir(sources.temporary_folder()))

    gc.collect()
    before = files()
    content = write_lines(tmp_path / "s.jsonl", [{"prompt": "p", "response": "x", "score": 1}] * 2).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    samples = read_samples("-")
    assert len(files()) == len(before) + 2 and prompts(samples) == ["p"]
    assert all(type(pickle.loads(pickle.dumps(source.path))) is str for source in samples.inputs)  # as workers have it
    assert prompts(samples) == ["p"]
    del samples
    gc.collect()
    assert files() == before


@pytest.mark.parametrize("blanks", [1, 2, 100, 1 << 22])
def test_blanks_before_a_colon_hide_no_repeat_and_take_no_time(tmp_path, blanks):
    line = json.dumps(GOOD).encode()[:-1] + b', "scores"' + b" " * blanks + b": [2, 3]}"
    begun = time.process_time()
    samples = read_samples(write_lines(tmp_path / "s.jsonl", [GOOD, line, GOOD]), workers=1)
    assert [(p.row, "'scores'" in p.reason) for p in samples.problems] == [(2, True)] and samples.prompts == 2
    assert time.process_time() - begun < 5  # a step per blank took minutes
