"""Outputs that are whole or not there."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from fastpref.errors import InputError


def format_of(path) -> str:
    """The ending of the name, without .gz: ".npy", ".npz", ".parquet", ".csv", ".jsonl", ..."""
    return Path(os.fspath(path).removesuffix(".gz")).suffix


@contextlib.contextmanager
def whole_file(path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end; an error or Ctrl-C leaves nothing of it.

    A link stays one, to the new file.
    """
    named, path = path, Path(os.path.realpath(path))
    # another name for every one: a process that was killed leaves its own behind
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    if path.is_dir():
        raise InputError(f"cannot write {named}: it is a directory")
    if path.exists() and not path.is_file():  # /dev/null, which must not be replaced
        raise InputError(f"cannot write {named}: it is no regular file")
    try:
        try:
            with open(temporary, "xb"):
                pass
        except OSError as error:
            raise InputError(f"cannot write {named}: {error.strerror}") from error
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
