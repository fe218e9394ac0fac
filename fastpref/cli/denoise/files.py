"""Reads and writes arrays on disk without holding them in memory. What a file says of itself is checked before it is
believed: no more is read than the header of an array has room for, and that only where it fits the memory."""

import contextlib
import math
import os
import stat
import warnings
import zipfile
from collections.abc import Iterable, Iterator

import numpy as np

from fastpref._whole_file import format_of
from fastpref.cli.denoise.layouts import hint
from fastpref.errors import InputError

AS_IT_LIES = (np.float16, np.float32, np.float64, np.int8)  # what is solved from the file as it is
# An archive of at least so many bytes, unpacked, that are so many times what they are packed, is read only where
# --max-dense allows it by number: 4 MB of zeros become 4 GB, and few arrays of measurements shrink a hundredfold.
BOMB_BYTES, BOMB_RATIO = 1 << 28, 100


def write_npy(path, shape, dtype: np.dtype, blocks: Iterable[np.ndarray], fortran_order=False) -> None:
    """Writes an array block by block in the order of the file; a mapping would kill the process on a full disk."""
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": fortran_order, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype))


def check_memory(needed: int, max_dense: float | None, what: str) -> None:
    """Raises InputError for more than `max_dense` GiB; None: half of the machine's memory. needed: bytes."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 if max_dense is None else max_dense * 2**30
    if needed > most:
        raise InputError(f"{what} {needed / 2**30:.3g} GiB, more than --max-dense {most / 2**30:.3g}")


def read_array(path, name: str | None, max_dense: float | None) -> np.ndarray:
    """Maps a .npy, or reads one array of an .npz; [m, n] or [batch, m, n], of real numbers.

    Args:
        path: a regular file; its ending says what it is.
        name: of the array in an .npz; None for the only one.
        max_dense: GiB that an array from an .npz may take; None: half of the memory, and no more than BOMB_RATIO times
            what it is packed.

    Returns:
        The array, a mapping for a .npy.

    Raises:
        InputError: naming the file, for one that cannot be read, is damaged or holds something else.
    """
    check_regular(path)
    with _readable(path):
        if format_of(path) == ".npz":
            return _npz_array(path, name, max_dense)
        if name is not None:
            raise InputError(f"--array is for .npz files, got {path}")
        with open(path, "rb") as file:
            _check_header(path, *_read_header(file))
        return np.lib.format.open_memmap(path, mode="r")


def check_regular(path) -> None:
    """Raises InputError for what is not a regular file: to open a FIFO that nothing writes to would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"cannot read {path}: it is a directory")
    if not stat.S_ISREG(mode):
        raise InputError(f"cannot read {path}: it is not a regular file")


@contextlib.contextmanager
def _readable(path) -> Iterator[None]:
    """Turns what the readers of numpy, zipfile and zlib raise of a damaged file into one line with its name.

    They raise whatever their parts do: zlib.error, BadZipFile, NotImplementedError for an unknown method, RuntimeError
    for an encrypted member, SyntaxError, RecursionError or TypeError for a header, EOFError, struct.error ...
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's parser, about a header that is refused anyway
            yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read {path}: {reason}") from error


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it lies by columns, and dtype of the .npy that begins here."""
    try:
        version = np.lib.format.read_magic(file)
    except ValueError as error:
        raise ValueError("it holds no array of numbers") from error
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {'.'.join(map(str, version))} of .npy, which no array of numbers needs")


def _check_header(what: str, shape, by_columns: bool, dtype: np.dtype) -> None:
    if dtype.hasobject:
        raise InputError(f"cannot read {what}: it holds pickled objects, no array of numbers")
    if any(side < 0 for side in shape):
        raise InputError(f"cannot read {what}: its header says shape {list(shape)}")
    if len(shape) not in (2, 3):
        raise InputError(f"{what} must hold a matrix [m, n] or a batch [batch, m, n], got shape {list(shape)}")
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise InputError(f"{what} must hold real numbers of at most 64 bits, got {dtype}")


def _npz_array(path, name: str | None, max_dense: float | None) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        names = [info.filename.removesuffix(".npy") for info in members]
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            wanted = "--array must name one of its arrays" if name is None else f"no array {name!r}"
            raise InputError(f"{path}: {wanted}, found {', '.join(names) or 'none'}{hint(name or '', names)}")
        if names.count(name) > 1:
            raise InputError(f"{path} has more than one array {name!r}")
        info = members[names.index(name)]
        with archive.open(info) as file:
            shape, by_columns, dtype = header = _read_header(file)
            _check_header(f"{name} of {path}", *header)
            size = math.prod(shape) * dtype.itemsize
            if file.tell() + size != info.file_size:
                raise InputError(
                    f"cannot read {path}: the header of {name} says {size} bytes, the archive has "
                    f"{info.file_size - file.tell()}"
                )
            check_memory(size, max_dense, f"{name} of {path} takes")
            if max_dense is None and size >= BOMB_BYTES and size > BOMB_RATIO * info.compress_size:
                raise InputError(
                    f"{name} of {path} is {info.compress_size} bytes and would unpack to {size}: if that is right, "
                    f"allow it with --max-dense {size / 2**30:.2g} or more"
                )
            array = np.empty(shape, dtype, order="F" if by_columns else "C")
            _fill(array.reshape(-1, order="F" if by_columns else "C"), file, f"{name} of {path}")
            return array


def _fill(flat: np.ndarray, file, what: str) -> None:
    """Reads a contiguous vector; to its last byte, where the archive's checksum is compared."""
    left = memoryview(flat.view(np.uint8))
    while len(left):
        count = file.readinto(left[: 1 << 24])
        if not count:
            raise InputError(f"cannot read {what}: it ends {len(left)} bytes too early")
        left = left[count:]
    if file.read(1):
        raise InputError(f"cannot read {what}: it goes on after its last entry")
