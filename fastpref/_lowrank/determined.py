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

    blocks: Callable[[], Iterator[tuple[slice, Tensor]]]  # slices of rows, bool or 0 and 1 [B, rows of the slice, n]
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

    def observed(seen: Tensor) -> Observed:
        return Observed(lambda: iter([(slice(0, seen.shape[1]), seen)]), tuple(seen.shape), matrix.device)

    for some in torch.arange(len(matrix), device=matrix.device).split(max(1, CHUNK // max(matrix[0].numel(), 1))):
        seen = (~matrix[some].isnan()).to(torch.float32)
        (rows[some], columns[some]), settled = one_part(observed(seen), rank[some], skew)
        if not settled.all():
            left = some[~settled]
            rows[left], columns[left] = find_parts(observed(seen[~settled] > 0), rank[left], skew)
    return Parts(rows, columns)


def one_part(observed: Observed, rank: Tensor, skew: bool) -> tuple[Parts, Tensor]:
    """The parts of B matrices, right where [B] is true: where all that has entries is one part, and has enough.

    That is the usual case, and a few products with vectors tell.
    """
    batch, m, n = observed.shape
    numbers = {"dtype": torch.float32, "device": observed.device}

    def blocks():
        for block, seen in observed.blocks():
            seen = seen.to(torch.float32)
            if skew:
                seen.diagonal(block.start, 1, 2).zero_()
            yield block, seen

    row_counts, column_counts = torch.zeros(batch, m, **numbers), torch.zeros(batch, n, **numbers).double()
    for block, seen in blocks():
        row_counts[:, block] = seen.sum(2)
        column_counts += seen.sum(1)
    observed.total(column_counts)
    row_there, column_there = row_counts > 0, column_counts > 0
    rows, columns, before = torch.zeros(batch, m, **numbers), torch.zeros(batch, n, **numbers), -1.0
    columns.scatter_(1, column_counts.argmax(1, keepdim=True), 1.0)  # what hangs together with this column
    while (reached := float(columns.sum())) > before:
        before = reached
        for block, seen in blocks():
            rows[:, block] = ((seen @ columns.unsqueeze(2)).squeeze(2) > 0).float()
            columns = torch.maximum(columns, ((rows[:, block].unsqueeze(1) @ seen).squeeze(1) > 0).float())
        columns = observed.total(columns).clamp(max=1)
        if skew:  # a row and its column are one item
            columns = torch.maximum(columns, rows)
    totals = torch.stack([row_there, row_counts, row_there & (rows == 0)]).double().sum(2)
    part_rows, entries, apart = observed.total(totals).long()
    part_columns = column_there.sum(1)
    own, fixing = _ranks_of(rank, torch.minimum(part_rows, part_columns), skew)
    few = observed.total((row_there & (row_counts < fixing.unsqueeze(1))).sum(1))
    few = few + (column_there & ((column_counts < fixing.unsqueeze(1)) | (columns == 0))).sum(1)
    settled = (apart == 0) & (few == 0) & (entries >= _freedom(own, part_rows, part_columns, skew))
    label = column_there.int().argmax(1, keepdim=True)
    return Parts(torch.where(row_there, label, NO_ROW), torch.where(column_there, label, NO_COLUMN)), settled


def _ranks_of(rank: Tensor, most: Tensor, skew: bool) -> tuple[Tensor, Tensor]:
    """The rank that parts with `most` rows or columns have, and how many entries fix a line of theirs."""
    if not skew:
        return torch.minimum(rank, most), torch.minimum(rank, most)
    own = torch.minimum(rank, most - most % 2)
    return own, torch.minimum(own, most - 1)  # an item is not compared with itself


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
                seen.diagonal(block.start, 1, 2).fill_(False)
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
        own, fixing = _ranks_of(rank.unsqueeze(1), torch.minimum(part_rows, part_columns), skew)
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
