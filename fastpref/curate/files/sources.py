"""Where data come from: the names that a user gives, as regular files whose container is known from their bytes.

A name is a file, a glob, a folder (of data files, or one that `datasets` has saved), "-" for stdin, or an address with
"://" that fsspec can open. What cannot be read twice is copied to a temporary file first, which goes with its Source.
"""

import codecs
import contextlib
import csv
import functools
import glob
import gzip
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from fastpref.errors import InputError

# Of a file in a folder; one that is named is read whatever its name.
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
PACKINGS = (".gz", ".zst")
# JSON beside the data of a folder, which is none
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLITS = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")
DELIMITERS = ",\t;|"
_WRAPPED = re.compile(r'\{\s*"([^"\\]+)"\s*:\s*\[\s*\n\s*\{\s*\n')  # indented
HEAD = 1 << 16  # bytes that decide what a file is
MOST_UNPACKED = 1 << 30  # bytes; a packed file may hold more only if
MOST_RATIO = 500  # it does not unpack to so many times its size, as no text does
MARKS = (  # of encodings; that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
BINARY = ((b"PAR1", "parquet"), (b"ARROW1\0\0", "arrow"), (b"\xff\xff\xff\xff", "arrow-stream"))
REFUSED = (
    (b"PK\x03\x04", "a zip archive, as .npz and .xlsx are"),
    (b"BZh", "packed by bzip2"),
    (b"\xfd7zXZ", "packed by xz"),
    (b"\x89HDF", "HDF5"),
    (b"SQLite format 3", "an SQLite database"),
    (b"FEA1", "Feather of version 1"),
    (b"ORC", "ORC"),
    (b"Obj\x01", "Avro"),
    (b"\x93NUMPY", "an array of NumPy"),
)
CONTAINERS = {
    "json-lines": "JSON Lines",
    "json-array": "a JSON array",
    "csv": "CSV",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "arrow-stream": "an Arrow stream",
}


class Source(NamedTuple):
    """One file of data."""

    name: str  # what messages call it
    path: str  # a regular file: itself, or its copy
    container: str  # a key of CONTAINERS
    packing: str | None = None  # "gzip" or "zstd"
    encoding: str = "utf-8"  # of text
    delimiter: str | None = None  # of CSV

    @property
    def seekable(self) -> bool:
        """Whether its lines can be read from any byte on."""
        return self.packing is None and self.encoding in ("utf-8", "utf-8-sig")

    @property
    def description(self) -> str:
        """Its container in words, such as "CSV with ';', gzip"."""
        text = CONTAINERS[self.container]
        if self.container == "csv":
            text += f" with {'tabs' if self.delimiter == chr(9) else repr(self.delimiter)}"
        further = [part for part in (self.packing, self.encoding) if part not in (None, "utf-8", "utf-8-sig")]
        return ", ".join([text, *further])


def find_sources(names: str | os.PathLike | Sequence) -> list[Source]:
    """Finds the files that names stand for, in order, and looks at the first bytes of each.

    Args:
        names: One name or several.

    Returns:
        At least one source.

    Raises:
        InputError: Nothing is there, it is no regular file, or its bytes are of no container that is read.
    """
    names = [names] if isinstance(names, str | os.PathLike) else list(names)
    if not names:
        raise InputError("no input is given")
    if [os.fspath(name) for name in names].count("-") > 1:
        raise InputError("- stands for stdin, which can be read once")
    return [_examined(*file) for name in names for file in _files(os.fspath(name))]


def local_files(name: str | os.PathLike) -> list[str]:
    """Returns the paths of the files that a name stands for, but for those that are copied before they are read.

    Raises:
        InputError: A glob or a folder holds none.
    """
    name = os.fspath(name)
    return [] if is_copied(name) else [path for _, path in _files(name)]


def is_copied(name: str | os.PathLike) -> bool:
    """Whether what the name stands for is copied before it is read, so that a later run cannot find it again."""
    return os.fspath(name) == "-" or "://" in os.fspath(name)


def source_stamp(source: Source) -> tuple[int, int]:
    """Returns the size in bytes and the time of change in ns of a source's file. Raises InputError if it is gone."""
    status = _regular(source.path, source.name)
    return status.st_size, status.st_mtime_ns


# gzip: EOFError for a cut file, zlib.error, and BadGzipFile, an OSError; Arrow: ArrowInvalid, a ValueError, and others
# that are OSError, NotImplementedError, KeyError or, where a damaged file asks for terabytes, MemoryError
_READING_ERRORS = (OSError, EOFError, ValueError, zlib.error, OverflowError, NotImplementedError, KeyError, MemoryError)


@contextlib.contextmanager
def reading_errors(name: str, line: int | None = None) -> Iterator[None]:
    """Turns what goes wrong in a reader into one line: InputError with the source's name, and the line if known."""
    try:
        yield
    except InputError:
        raise
    except _READING_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        at = "" if line is None else f":{line}"
        raise InputError(f"cannot read {name}{at}: {' '.join(reason.split())}") from error


# ---- names


def _files(name: str) -> Iterator[tuple[str, str]]:
    """Name and path of every file that a name stands for."""
    if name == "-":
        yield name, _copied(name, sys.stdin.buffer)
    elif "://" in name:
        yield from _remote_files(name)
    elif os.path.isdir(name):
        yield from ((path, path) for path in _files_of_folder(name))
    elif glob.has_magic(name) and not os.path.lexists(name):
        found = [path for path in sorted(glob.glob(name, recursive=True)) if not os.path.isdir(path)]
        if not found:
            raise InputError(f"no file matches {name}")
        yield from ((path, path) for path in found)
    else:
        yield name, name


def _regular(path: str, name: str) -> os.stat_result:
    """The status of a regular file; opening another kind may wait for ever."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a folder")
        raise InputError(f"cannot read {name}: it is {kind}, must be a regular file, or - for stdin")
    return status


def _files_of_folder(folder: str) -> list[str]:
    """The data files of a folder: those that `datasets` lists, else all below it by their endings."""
    splits = os.path.join(folder, "dataset_dict.json")
    if os.path.isfile(splits):
        names = _listed_names(splits, "splits")
        if len(names) != 1:
            raise InputError(f"{folder} holds the splits {', '.join(names)}: name one, as {folder}/{names[0]}")
        folder = os.path.join(folder, names[0])
    state = os.path.join(folder, "state.json")
    if os.path.isfile(state):
        return [os.path.join(folder, name) for name in _listed_names(state, "_data_files", "filename")]
    found = sorted(
        os.path.join(parent, name)
        for parent, folders, names in os.walk(folder)
        if folders.sort() is None
        for name in names
        if _kind(name) and not name.startswith(".") and name not in NOT_DATA and not name.endswith(".meta.json")
    )
    if not found:
        raise InputError(f"the folder {folder} holds no data: no {', '.join(ENDINGS)}, also with .gz or .zst behind it")
    for what, kinds in (
        ("files of several kinds", {_kind(path) for path in found}),
        ("several splits", {match[1] for path in found if (match := SPLITS.match(os.path.basename(path)))}),
    ):
        if len(kinds) > 1:
            raise InputError(f"{folder} holds {what}, {', '.join(sorted(kinds))}: name the files, or a glob in quotes")
    return found


def _listed_names(path: str, key: str, entry: str | None = None) -> list[str]:
    """The names in the folder of a JSON file that it lists under a key, each of them the `entry` of an object or alone.

    Raises InputError where it lists none, or something else.
    """
    with reading_errors(path), open(path, "rb") as file:
        try:
            held = json.load(file)
        except RecursionError as error:
            raise InputError(f"cannot read {path}: it is too deeply nested") from error
    names = held.get(key) if isinstance(held, dict) else None
    if not isinstance(names, list) or not names:
        raise InputError(f"cannot read {path}: it must be an object that lists at least one of its {key}")
    if entry is not None:
        names = [name.get(entry) if isinstance(name, dict) else None for name in names]
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            raise InputError(f"cannot read {path}: an entry of its {key} is no name")
        if os.path.basename(name) != name or name in (os.curdir, os.pardir):
            raise InputError(f"{path} names a file outside its folder: {name}")
    return names


def _kind(name: str) -> str | None:
    """The ending of a data file's name, without that of its packing."""
    for packing in PACKINGS:
        name = name.removesuffix(packing)
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def _remote_files(name: str) -> Iterator[tuple[str, str]]:
    try:
        import fsspec
    except ImportError as error:
        raise InputError(f"{name} needs fsspec: pip install fsspec") from error
    try:
        filesystem, path = fsspec.core.url_to_fs(name)
        paths = sorted(filesystem.glob(path)) if glob.has_magic(path) else [path]
        if not paths:
            raise InputError(f"no file matches {name}")
        protocol = name.partition("://")[0]
        for path in paths:
            if filesystem.isdir(path):
                raise InputError(f"{name} is a folder: name its files, or a glob in quotes")
            address = name if len(paths) == 1 else f"{protocol}://{path}"
            with filesystem.open(path, "rb") as file:
                yield address, _copied(address, file)
    except InputError:
        raise
    except ImportError as error:  # of the protocol, such as s3fs
        raise InputError(f"cannot read {name}: {error}; pip install what it names") from error
    except Exception as error:  # every protocol has its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"cannot read {name}: {' '.join(str(reason).split())}") from error


@functools.cache
def temporary_folder() -> str:
    """The folder of this process for copies and groups; it is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="fastpref-")
    _FOLDERS.append(folder)  # removed when it is collected
    return folder.name


_FOLDERS: list[tempfile.TemporaryDirectory] = []


class TemporaryPath(str):
    """The path of a file that is removed when nothing refers to this object any more, or the process ends.

    In a worker's process it is a plain string, and the file is there as long as the parent needs it.
    """

    def __new__(cls, path: str):
        self = super().__new__(cls, path)
        weakref.finalize(self, _remove, path)
        return self

    def __reduce__(self):
        return str, (str(self),)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def temporary_file(suffix: str) -> tuple[BinaryIO, TemporaryPath]:
    """Returns a new file, open for writing, and its path."""
    handle, path = tempfile.mkstemp(dir=temporary_folder(), suffix=suffix)
    return open(handle, "wb"), TemporaryPath(path)


def _copied(name: str, file: BinaryIO) -> str:
    with reading_errors(name):
        copy, path = temporary_file((_kind(name) or "") if name != "-" else "")
        with copy:
            shutil.copyfileobj(file, copy, 1 << 20)
    return path


# ---- what a file is


def _examined(name: str, path: str) -> Source:
    _regular(path, name)
    with reading_errors(name):
        with open(path, "rb") as file:
            head = file.read(4)
        packing = "gzip" if head[:2] == b"\x1f\x8b" else "zstd" if head == b"\x28\xb5\x2f\xfd" else None
        with open_unpacked(Source(name, path, "json-lines", packing)) as stream:
            head = stream.read(HEAD)
            while len(head) < HEAD and (more := stream.read(HEAD - len(head))):  # a stream may give less than is asked
                head += more
    for magic, container in BINARY:
        if head.startswith(magic):
            if packing is not None:
                raise InputError(f"cannot read {name}: {CONTAINERS[container]} inside of {packing}: unpack it first")
            return Source(name, path, container)
    for magic, what in REFUSED:
        if head.startswith(magic):
            raise InputError(f"cannot read {name}: it is {what}")
    encoding = next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8")
    # A cut character at the end of the head, or a byte that is no text at all, is left for the reader to report.
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    if encoding == "utf-8" and text.count("\0") > len(text) // 4:
        raise InputError(f"cannot read {name}: it seems to be UTF-16 without a byte-order mark; make it UTF-8")
    container = _container_of_text(name, text)
    delimiter = _delimiter(name, text) if container == "csv" else None
    return Source(name, path, container, packing, encoding, delimiter)


def _container_of_text(name: str, text: str) -> str:
    text = text.lstrip()
    kind = _kind(name)
    first = text[:1]
    line = text.partition("\n")[0]
    if kind in (".csv", ".tsv"):
        return "json-lines" if first == "{" and _is_json(line) else "csv"
    if first == "[":
        return "json-array"
    if match := _WRAPPED.match(text):
        raise InputError(
            f"cannot read {name}: it is one JSON object that holds the array {match[1]!r}; make that a file of its "
            f"own, as jq .{match[1]} does"
        )
    if first in ("", "{") or kind in (".jsonl", ".ndjson", ".json") or _is_json(line):
        return "json-lines"
    return "csv" if any(delimiter in line for delimiter in DELIMITERS) and "\0" not in line else "json-lines"


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _delimiter(name: str, text: str) -> str:
    """The one that cuts the first records into as many fields as the header has; by the name's ending where two do."""
    widths = {delimiter: _widths(text, delimiter) for delimiter in DELIMITERS}
    candidates = [delimiter for delimiter, found in widths.items() if found and found[0] > 1]
    if not candidates:
        return "\t" if _kind(name) == ".tsv" else ","
    even = [delimiter for delimiter in candidates if len(set(widths[delimiter])) == 1] or candidates
    usual = "\t" if _kind(name) == ".tsv" else ","
    return max(even, key=lambda delimiter: (widths[delimiter][0], delimiter == usual))


def _widths(text: str, delimiter: str) -> list[int]:
    """The number of fields of the first records, but for a last one that the head may have cut."""
    whole = text[: text.rfind("\n") + 1] if len(text.encode(errors="replace")) >= HEAD else text
    widths = []
    with contextlib.suppress(csv.Error):
        for record in csv.reader(io.StringIO(whole or text, newline=""), delimiter=delimiter):
            if record:
                widths.append(len(record))
            if len(widths) == 50:
                break
    # the last record may end within quotes that close after the head
    return widths[:-1] if len(widths) > 2 and len(whole) < len(text) else widths


# ---- bytes


class _Bounded(io.RawIOBase):
    """A stream of unpacked bytes that ends with an InputError where it is no text but a bomb."""

    def __init__(self, stream, packed: BinaryIO, name: str):
        self.stream, self.packed, self.name, self.size = stream, packed, name, 0

    def readable(self) -> bool:
        return True

    def read(self, size=-1) -> bytes:
        block = self.stream.read(size)
        self.size += len(block)
        if self.size > MOST_UNPACKED and self.size > MOST_RATIO * max(1, self.packed.tell()):
            raise InputError(
                f"cannot read {self.name}: it unpacks to more than {MOST_RATIO} times its size, which no text does; "
                "unpack it yourself if it is meant to"
            )
        return block


@contextlib.contextmanager
def open_unpacked(source: Source) -> Iterator:
    """Opens a source for `read(size)` of its bytes, unpacked; `packed.tell()` is the place in the file."""
    with open(source.path, "rb") as packed:
        if source.packing is None:
            yield _Bounded(packed, packed, source.name)
        elif source.packing == "gzip":
            with gzip.open(packed) as stream:
                yield _Bounded(stream, packed, source.name)
        else:
            try:
                import pyarrow
            except ImportError as error:
                raise InputError(
                    f'{source.name} is packed by zstd, which needs pyarrow: pip install "fastpref[cli]"'
                ) from error
            with pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd") as stream:
                yield _Bounded(stream, packed, source.name)
