"""Reads and writes arrays on disk without holding them in memory."""

import os
import zipfile
from collections.abc import Iterable

import numpy as np

from fastpref._whole_file import format_of
from fastpref.errors import InputError


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
    """Maps a .npy, or reads one array of an .npz; [m, n] or [batch, m, n], of real numbers."""
    try:
        if format_of(path) == ".npz":
            array = _npz_member(path, name, max_dense)
        elif name is not None:
            raise InputError(f"--array is for .npz files, got {path}")
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        # numpy takes what is no array for pickled objects, and says how to load those
        reason = "it holds no array of numbers" if "pickle" in str(error) else str(error).partition("\n")[0]
        raise InputError(f"cannot read {path}: {reason}") from error
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3):
        found = f"shape {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise InputError(f"{path} must hold a matrix [m, n] or a batch [batch, m, n], got {found}")
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise InputError(f"{path} must hold real numbers of at most 64 bits, got {array.dtype}")
    return array


def _npz_member(path, name, max_dense) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        if name is None and len(arrays.files) == 1:
            name = arrays.files[0]
        if name not in arrays.files:
            wanted = "--array must name one of its arrays" if name is None else f"no array {name!r}"
            raise InputError(f"{path}: {wanted}, found {', '.join(arrays.files) or 'none'}")
        check_memory(arrays.zip.getinfo(name + ".npy").file_size, max_dense, f"{name} of {path} takes")
        return arrays[name]
