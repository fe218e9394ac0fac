"""Outputs that are whole or not there."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from fastpref.errors import InputError


def format_of(path) -> str:
    """The ending of the name, without .gz: ".npy", ".npz", ".parquet", ".csv", ".jsonl", ..."""
    return Path(os.fspath(path).removesuffix(".gz")).suffix


@contextlib.contextmanager
def whole_file(path, like=None) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end; an error or Ctrl-C leaves nothing of it.

    A link stays one, to the new file. A file that is replaced hands on its mode and, as far as the user may give files
    away, its owner and group; no one whom it kept out reads the temporary file either. Folders that are not there are
    made, and taken away again after an error.

    Args:
        path: of the output.
        like: a file whose mode, owner and group it takes, where there is one, instead of those of the file it replaces.

    Yields:
        Path of the temporary file, which is there and empty.

    Raises:
        InputError: where the output cannot be written.
    """
    made, temporary = [], None
    try:
        try:
            target = Path(os.path.realpath(path))
            if target.is_dir():
                raise InputError(f"cannot write {path}: it is a directory")
            if target.exists() and not target.is_file():  # /dev/null, which must not be replaced
                raise InputError(f"cannot write {path}: it is not a regular file")
            pattern = target if like is None or not os.path.exists(like) else Path(like)
            _make_folder(target.parent, made)
            # another name for every one: a process that was killed leaves its own behind
            name = os.fsdecode(os.fsencode(target.name)[:200])  # of the 255 bytes that a name may have
            temporary = target.with_name(f".{name}.{secrets.token_hex(4)}.part")
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _mode_while_writing(pattern)))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        yield temporary
        with open(temporary, "rb+") as file:
            _take_after(pattern, file.fileno())
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another output may be in it by now
                folder.rmdir()
        raise


def _make_folder(folder: Path, made: list[Path]) -> None:
    """Makes it and those above it; `made` lists what was not there, the outermost first."""
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    for above in reversed(missing):
        with contextlib.suppress(FileExistsError):  # made by another writer meanwhile
            above.mkdir()
            made.append(above)


def _mode_while_writing(path: Path) -> int:
    """That of the file which will be replaced, as far as it can be written; of a new one the umask's."""
    try:
        return stat.S_IMODE(path.stat().st_mode) & 0o777 | stat.S_IRUSR | stat.S_IWUSR
    except FileNotFoundError:
        return 0o666


def _take_after(path: Path, descriptor: int) -> None:
    """Gives an open file the owner, group and mode of the file at `path`, where there is one."""
    try:
        old = path.stat()
    except FileNotFoundError:
        return
    new, mode = os.fstat(descriptor), stat.S_IMODE(old.st_mode)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):
            with contextlib.suppress(PermissionError):  # only root gives files away; to a group of theirs all may
                os.fchown(descriptor, owner, group)
        if os.fstat(descriptor).st_gid != old.st_gid:
            mode &= ~stat.S_IRWXG  # it was meant for another group
    os.fchmod(descriptor, mode)  # last: a change of the owner clears bits of the mode
