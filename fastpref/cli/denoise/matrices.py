"""Solves matrices by rpca: a single one is read from disk as it goes, batches and triples are held in memory."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastpref import RPCAInfo, RPCAResult, SparseCOO, rpca
from fastpref._checks import as_tensor
from fastpref._whole_file import format_of
from fastpref.cli.denoise import files
from fastpref.cli.denoise.inputs import Input, Names, at_a_time
from fastpref.cli.denoise.options import DenoiseOptions, spread_of

BLOCK_BYTES = 4 << 20  # of an output


def denoise_matrix(given: Input, options: DenoiseOptions, temporary, progress) -> dict:
    """Solves a matrix, or a batch, and writes what --output says and the plot; returns the summary."""
    wanted = options.output or "low-rank"
    if given.matrix.ndim == 3:
        return _denoise_batch(given.matrix, options, wanted, temporary, progress)
    return _denoise_one(given.matrix, given.names, options, wanted, temporary, progress)


# ---- one matrix ----


def _denoise_one(matrix, names, options, wanted, temporary, progress) -> dict:
    # A matrix that lies column by column is solved as its transpose, or every block of rows would touch all of it.
    by_columns = matrix.flags.f_contiguous and not matrix.flags.c_contiguous
    if by_columns:
        matrix = matrix.T
    result = _solve(matrix, by_columns, options, wanted != "low-rank" or options.plot is not None, progress)
    out, unknown = temporary[options.output_file], _Unknown()
    progress.begin_stage("writing")
    if wanted == "factors":
        _write_factors(out, _transposed(result) if by_columns else result, names)
    elif names is not None:
        _write_triples(out, matrix, result, names, options, unknown)
    else:
        blocks = unknown.counted(_low_rank_blocks(result))
        if wanted == "masked":
            blocks = _masked_blocks(matrix, result.sparse.indices)
        dtype = _numpy_dtype(result.U) if wanted == "low-rank" else matrix.dtype
        shape = matrix.shape[::-1] if by_columns else matrix.shape
        files.write_npy(out, shape, dtype, blocks, fortran_order=by_columns)
    if options.plot is not None:
        _plot_result(_transposed(result) if by_columns else result, options, temporary)
    shape = list(matrix.shape[::-1] if by_columns else matrix.shape)
    return _summary(result.info, shape, matrix.dtype, unknown.cells if wanted == "low-rank" else None)


def _solve(matrix: np.ndarray, by_columns: bool, options: DenoiseOptions, with_outliers: bool, progress) -> RPCAResult:
    keywords = options.given("rank", "structure", "corruption", "method", "lam", "scale", "tol", "max_iter")
    if by_columns and "corruption" in keywords:
        swapped = {"rows": "columns", "columns": "rows"}
        keywords["corruption"] = swapped.get(options.corruption, options.corruption)
    progress.begin_stage("iteration")

    def report(state):
        progress.advance(residual=f"{state.residual:.1e}", rank=state.rank)

    sparse = "coo" if with_outliers else "none"
    return rpca(as_tensor(matrix), **keywords, sparse=sparse, callback=report)


def _transposed(result: RPCAResult) -> RPCAResult:
    sparse, info = result.sparse, result.info
    if sparse is not None:
        sparse = SparseCOO(sparse.indices.flip(1), sparse.values)
    info = info._replace(
        row_outlier_rate=info.column_outlier_rate,
        column_outlier_rate=info.row_outlier_rate,
        row_part=info.column_part,
        column_part=info.row_part,
    )
    return RPCAResult(result.Vh.mT, result.S, result.U.mT, sparse, info)


def _numpy_dtype(tensor: Tensor) -> np.dtype:
    return np.dtype(str(tensor.dtype).removeprefix("torch."))


def _row_blocks(rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // max(row_bytes, 1))
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _low_rank_blocks(result: RPCAResult) -> Iterator[np.ndarray]:
    for block in _row_blocks(len(result.U), result.Vh.shape[1] * result.Vh.element_size()):
        yield result.low_rank(block).numpy()


class _Unknown:
    """Cells of L without a value, counted as they are written."""

    def __init__(self):
        self.cells = 0

    def counted(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            self.cells += int(np.isnan(block).sum())
            yield block


def _masked_blocks(matrix: np.ndarray, indices: Tensor) -> Iterator[np.ndarray]:
    """Yields blocks of the matrix, missing (NaN, int8: -128) at indices [K, 2], which are sorted by row."""
    rows, columns = indices.numpy().T
    missing = -128 if matrix.dtype == np.int8 else np.nan
    for block in _row_blocks(*matrix.shape[:1], matrix.shape[1] * matrix.itemsize):
        inside = slice(*np.searchsorted(rows, (block.start, block.stop)))
        copy = matrix[block].copy()
        copy[rows[inside] - block.start, columns[inside]] = missing
        yield copy


def _write_factors(path, result: RPCAResult, names: Names | None = None) -> None:
    arrays = {"U": result.U, "S": result.S, "Vh": result.Vh}
    arrays |= {"sparse_indices": result.sparse.indices, "sparse_values": result.sparse.values}
    arrays |= result.info._asdict()
    arrays = {name: tensor.numpy() for name, tensor in arrays.items()}
    if names is not None:
        for name, labels in (("row_names", names.rows), ("column_names", names.columns)):
            arrays[name] = np.array(labels.to_pylist(), dtype=None if len(labels) else "U1")
    with open(path, "wb") as file:  # a path that does not end in .npz would get that ending
        np.savez(file, **arrays)


def _write_triples(path, matrix, result, names: Names, options, unknown: _Unknown) -> None:
    from fastpref.cli.denoise import tables

    columns = [names.roles[role] for role in ("row", "column", "value")]

    def cells():
        if options.output == "masked":
            matrix[tuple(result.sparse.indices.numpy().T)] = np.nan
            yield names.row, names.column, matrix[names.row, names.column]
            return
        every = np.arange(matrix.shape[1])
        first = 0
        for block in unknown.counted(_low_rank_blocks(result)):
            yield np.repeat(np.arange(first, first + len(block)), len(every)), np.tile(every, len(block)), block.ravel()
            first += len(block)

    parts = (
        tables.to_table(dict(zip(columns, (names.rows.take(row), names.columns.take(column), value), strict=True)))
        for row, column, value in cells()
    )
    tables.write_table(path, format_of(options.output_file), parts, options.csv_safe)


def _plot_result(result: RPCAResult, options, temporary) -> None:
    from fastpref.cli.denoise.plots import plot_low_rank

    plot_low_rank(temporary[options.plot], result, format_of(options.plot)[1:])


# ---- a batch ----


def _denoise_batch(array, options, wanted, temporary, progress) -> dict:
    keywords = options.given("rank", "structure", "corruption", "method", "lam", "tol", "max_iter")
    sparse = "none" if wanted == "low-rank" and options.plot is None else "coo"
    scale = 1.0 if options.scale is None else options.scale
    step = at_a_time(array)
    results, infos = [], []
    out_dtype = np.dtype(np.float64 if array.dtype == np.float64 else np.float32)

    def solve():
        progress.begin_stage("matrices", len(array))
        for begin in range(0, len(array), step):
            part = np.array(array[begin : begin + step])
            data = as_tensor(part) if out_dtype == np.float64 else as_tensor(part).float()
            if part.dtype == np.int8:
                data = data.masked_fill(data == -128, torch.nan)
            result = rpca(data * scale if scale != 1.0 else data, **keywords, sparse=sparse)
            if begin == 0 and options.plot is not None:
                _plot_result(_first(result), options, temporary)
            infos.append(result.info)
            if wanted == "factors":
                results.append(result)
            progress.advance(len(part))
            yield part, result

    out, unknown = temporary[options.output_file], _Unknown()
    if wanted == "low-rank":
        blocks = unknown.counted(result.low_rank().numpy() for _, result in solve())
        files.write_npy(out, array.shape, out_dtype, blocks)
    elif wanted == "masked":
        files.write_npy(out, array.shape, array.dtype, (_masked(*found) for found in solve()))
    else:
        for _ in solve():
            pass
        _write_factors(out, _joined(results, step))
    info = RPCAInfo(*(torch.cat(parts) for parts in zip(*infos, strict=True)))
    return _summary(info, list(array.shape), array.dtype, unknown.cells if wanted == "low-rank" else None)


def _masked(part: np.ndarray, result: RPCAResult) -> np.ndarray:
    part[tuple(result.sparse.indices.numpy().T)] = -128 if part.dtype == np.int8 else np.nan
    return part


def _first(result: RPCAResult) -> RPCAResult:
    U, S, Vh, (indices, values), info = result
    inside = indices[:, 0] == 0
    sparse = SparseCOO(indices[inside, 1:], values[inside])
    return RPCAResult(U[0], S[0], Vh[0], sparse, RPCAInfo(*(number[0] for number in info)))


def _joined(results: list[RPCAResult], step: int) -> RPCAResult:
    """Joins consecutive parts of a batch, `step` matrices each; ranks are padded with zeros to the largest."""
    most = max(result.S.shape[-1] for result in results)

    def padded(tensor: Tensor, *sides) -> Tensor:
        return torch.nn.functional.pad(tensor, sides)

    missing = [most - result.S.shape[-1] for result in results]
    return RPCAResult(
        torch.cat([padded(result.U, 0, more) for result, more in zip(results, missing, strict=True)]),
        torch.cat([padded(result.S, 0, more) for result, more in zip(results, missing, strict=True)]),
        torch.cat([padded(result.Vh, 0, 0, 0, more) for result, more in zip(results, missing, strict=True)]),
        SparseCOO(
            torch.cat([result.sparse.indices + torch.tensor([k * step, 0, 0]) for k, result in enumerate(results)]),
            torch.cat([result.sparse.values for result in results]),
        ),
        RPCAInfo(*(torch.cat(parts) for parts in zip(*(result.info for result in results), strict=True))),
    )


def _count(which: Tensor, text: str) -> str:
    return text.format(int(which.sum()), len(which)) if which.dim() else ""


def _summary(info: RPCAInfo, shape: list[int], dtype: np.dtype, unknown: int | None) -> dict:
    """Returns the summary for JSON; of a batch's numbers the smallest, median and largest.

    unknown: cells of L that were written as missing; None where L was not written.
    """
    converged = info.converged
    empty = ~converged & (info.iterations == 0)
    messages = []
    if empty.any():
        messages.append("nothing is observed" + _count(empty, " in {} of {} matrices"))
    if (~converged & ~empty).any():
        messages.append(
            _count(~converged & ~empty, "{} of {} matrices ")
            + "did not converge: raise --max-iter, or look whether a low rank is there at all"
        )
    if unknown and unknown > math.prod(shape[-2:]) * int(empty.sum()):
        beyond = ", or the fit, which did not converge, lies beyond those" * bool((~converged & ~empty).any())
        messages.append(
            f"{unknown} of {math.prod(shape)} cells of L have no value (NaN, in a table null): the observed entries do "
            f"not determine them{beyond}"
        )
    return {
        "kind": "matrix" if converged.dim() == 0 else "batch",
        "shape": shape,
        "dtype": str(dtype),
        "converged": bool(converged.all()),
        "not_converged": int((~converged).sum()),
        "rank": spread_of(info.rank),
        "iterations": spread_of(info.iterations),
        "residual": spread_of(info.residual),
        "gap": spread_of(info.gap),
        "outlier_rate": spread_of(info.outlier_rate.masked_fill(empty, torch.nan)),
        "noise_scale": spread_of(info.scale),
        "condition": spread_of(info.condition),
        "undetermined": unknown,
        "warnings": messages,
    }
