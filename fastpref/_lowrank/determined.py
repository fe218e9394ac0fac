"""Which cells of a low-rank fit the observed entries determine, by counting: where other fits of the same rank explain
what was observed just as well, any value would be an invention.

Rows and columns hang together where they share observed entries. Cells between two parts that share none are free: the
factors of one part can be multiplied by anything that the other's are divided by. Within a part of m rows and n columns
a matrix of rank r has r (m + n - r) degrees of freedom, and each row, or column, r of them that only its own entries
fix: with fewer entries it is taken out, then what it held together is looked at again. A skew matrix is
its graph of items, with r (2 m - r - 1) / 2 degrees of freedom. Counting is necessary, not sufficient: parts that share
a row or a column, but fewer than r of them, pass.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NO_ROW, NO_COLUMN = -1, -2  # of lines that nothing determines: unequal, so that no cell of theirs counts
CHUNK = 1 << 21  # entries of a batch looked at together


class Parts(NamedTuple):
    """A cell is determined where its row and its column have the same number."""

    rows: Tensor  # [..., m] int64: the first column of the part, or NO_ROW
    columns: Tensor  # [..., n] int64, or NO_COLUMN


class Observed(NamedTuple):
    """Where B matrices have entries, read a few rows at a time."""

    blocks: Callable[[], Iterator[tuple[slice, Tensor]]]  # slices of rows, bool [B, rows of the slice, n]
    shape: tuple[int, int, int]  # B, m, n
    device: torch.device
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor  # over the ranks that hold other rows, in place
    least: Callable[[Tensor], Tensor] = lambda tensor: tensor


def everything(matrix: Tensor) -> Parts:
    """Of [..., m, n] without a missing entry."""
    rows = torch.zeros(matrix.shape[:-1], dtype=torch.int64, device=matrix.device)
    return Parts(rows, rows.new_zeros(*matrix.shape[:-2], matrix.shape[-1]))


def batch_parts(matrix: Tensor, rank: Tensor, skew: bool) -> Parts:
    """Of [B, m, n], NaN where missing, whose fits have these ranks [B]."""
    rows, columns = everything(matrix)
    seen = ~matrix.isnan()
    row_counts, column_counts = seen.sum(2), seen.sum(1)
    unclear = (~_plainly(row_counts, column_counts, rank, skew)).nonzero().flatten()
    for some in unclear.split(max(1, CHUNK // max(seen[0].numel(), 1))) if len(unclear) else ():
        these = seen[some]
        observed = Observed(lambda these=these: iter([(slice(None), these)]), tuple(these.shape), matrix.device)
        rows[some], columns[some] = find_parts(observed, rank[some], skew)
    return Parts(rows, columns)


def one_plainly(row_counts: Tensor, column_counts: Tensor, rank: int, skew: bool) -> bool:
    """Whether these counts of observed entries, of one whole matrix, already say that all of it is determined."""
    ranks = torch.tensor([rank], device=row_counts.device)
    return bool(_plainly(row_counts.unsqueeze(0), column_counts.unsqueeze(0), ranks, skew))


def _plainly(row_counts: Tensor, column_counts: Tensor, rank: Tensor, skew: bool) -> Tensor:
    """[B]: enough entries, and of every row more than half, so that any two share a column; or of every column."""
    m, n = row_counts.shape[1], column_counts.shape[1]
    if not m or not n:
        return torch.ones_like(rank, dtype=torch.bool)
    fewest = torch.minimum(row_counts.amin(1), column_counts.amin(1))
    joined = (2 * row_counts.amin(1) > n) | (2 * column_counts.amin(1) > m)
    # a skew matrix does not need its diagonal, which may be among the counted
    enough = fewest >= torch.clamp(rank + int(skew), min=1)
    return joined & enough & (row_counts.sum(1) - m * int(skew) >= _freedom(rank, m, n, skew))


def _freedom(rank, m, n, skew: bool):
    """Observed entries, those of a skew matrix on both sides of its diagonal, that a matrix of the rank needs."""
    return rank * (2 * m - rank - 1) if skew else rank * (m + n - rank)


def find_parts(observed: Observed, rank: Tensor, skew: bool) -> Parts:
    """The parts of B matrices whose fits have these ranks [B]; skew: of square matrices with a symmetric pattern."""
    batch, m, n = observed.shape
    ones = {"dtype": torch.bool, "device": observed.device}
    row_there, column_there = torch.ones(batch, m, **ones), torch.ones(batch, n, **ones)

    def seen_blocks():
        for block, seen in observed.blocks():
            seen = seen & row_there[:, block, None] & column_there[:, None]
            if skew:
                seen = seen.clone()
                seen.diagonal(block.start or 0, 1, 2).fill_(False)
            yield block, seen

    while True:
        rows, columns, row_counts, column_counts = _components(seen_blocks, observed, column_there, skew)
        # of the part to which a row, a column belongs: its rows, its columns, its entries; n: of no part
        part_rows, part_columns, part_entries = (rank.new_zeros(batch, n + 1) for _ in range(3))
        part_rows.scatter_add_(1, rows, (row_counts > 0).long())
        part_entries.scatter_add_(1, rows, row_counts)
        part_columns.scatter_add_(1, columns, (column_counts > 0).long())
        observed.total(part_rows)
        observed.total(part_entries)
        most = torch.minimum(part_rows, part_columns)
        own = torch.minimum(rank.unsqueeze(1), most - most % 2 if skew else most)  # rank that a part of its size has
        fixing = torch.minimum(own, most - 1) if skew else own
        short = part_entries < _freedom(own, part_rows, part_columns, skew)
        row_lost = row_there & ((row_counts == 0) | (row_counts < fixing.gather(1, rows)) | short.gather(1, rows))
        column_lost = (column_counts == 0) | (column_counts < fixing.gather(1, columns)) | short.gather(1, columns)
        column_lost &= column_there
        row_there &= ~row_lost
        column_there &= ~column_lost
        lost = observed.total(row_lost.sum(1, keepdim=True)) + column_lost.sum(1, keepdim=True)
        if not lost.any():
            return Parts(torch.where(row_there, rows, NO_ROW), torch.where(column_there, columns, NO_COLUMN))


def _components(seen_blocks, observed: Observed, column_there: Tensor, skew: bool):
    """Labels and counts of observed entries [B, m], [B, n]: the smallest column of a row's or column's component.

    Labels spread along rows and columns, and by jumps to the labels of labels; n: a row without entries, or a column
    that is not there.
    """
    batch, m, n = observed.shape
    none = torch.full((batch, 1), n, dtype=torch.int32, device=observed.device)
    label = torch.arange(n, dtype=torch.int32, device=observed.device).where(column_there, n)
    while True:
        rows, following = none.expand(batch, m).clone(), label.clone()
        row_counts, column_counts = (torch.zeros(batch, k, dtype=torch.int64, device=label.device) for k in (m, n))
        for block, seen in seen_blocks():
            rows[:, block] = torch.where(seen, following.unsqueeze(1), n).amin(2)
            following = torch.minimum(following, torch.where(seen, rows[:, block].unsqueeze(2), n).amin(1))
            row_counts[:, block] = seen.sum(2)
            column_counts += seen.sum(1)
        if skew:  # a row and its column are one item
            following = torch.minimum(following, rows)
        following = observed.least(following)
        following = torch.cat([following, none], 1).gather(1, following.long())
        if torch.equal(following, label):
            return rows.long(), label.long(), row_counts, observed.total(column_counts)
        label = following
