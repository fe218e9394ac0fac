"""Outputs that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastpref.curate.samples import InputError


def format_of(path) -> str:
    """The ending of the name, without .gz: ".npy", ".npz", ".parquet", ".csv", ".jsonl", ..."""
    return Path(os.fspath(path).removesuffix(".gz")).suffix


@contextlib.contextmanager
def whole_file(path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end; an error or Ctrl-C leaves nothing of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory")
    try:
        with open(temporary, "xb"):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
