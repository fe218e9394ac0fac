"""What observed entries determine of a low-rank fit: no value elsewhere, none beyond the data without convergence."""

import numpy as np
import pytest
import torch
from cases import corrupted

import fastpref
from fastpref._lowrank.determined import NO_COLUMN, NO_ROW, batch_parts

QUIET = pytest.mark.filterwarnings("ignore:rank=:RuntimeWarning")
NAN = float("nan")


def parts_by_search(seen: np.ndarray, rank: int):
    """Part of every row and column of one pattern: a graph search, and lines with too few entries taken out by one."""
    m, n = seen.shape
    rows, columns = set(range(m)), set(range(n))
    while True:
        row_part, column_part = [NO_ROW] * m, [NO_COLUMN] * n
        lost = set()
        for root in sorted(columns):
            if column_part[root] != NO_COLUMN:
                continue
            own_rows, own_columns, todo = set(), {root}, [("column", root)]
            while todo:
                kind, k = todo.pop()
                if kind == "column":
                    new = {i for i in rows if seen[i, k]} - own_rows
                    own_rows |= new
                    todo += [("row", i) for i in new]
                else:
                    new = {j for j in columns if seen[k, j]} - own_columns
                    own_columns |= new
                    todo += [("column", j) for j in new]
            r = min(rank, len(own_rows), len(own_columns))
            entries = sum(seen[i, j] for i in own_rows for j in own_columns)
            short = entries < r * (len(own_rows) + len(own_columns) - r) or not own_rows
            for i in own_rows:
                row_part[i] = root
                if short or sum(seen[i, j] for j in own_columns) < r:
                    lost.add(("row", i))
            for j in own_columns:
                column_part[j] = root
                if short or sum(seen[i, j] for i in own_rows) < r:
                    lost.add(("column", j))
        lost |= {("row", i) for i in rows if row_part[i] == NO_ROW}
        if not lost:
            return row_part, column_part
        rows -= {k for kind, k in lost if kind == "row"}
        columns -= {k for kind, k in lost if kind == "column"}


def test_parts_of_random_patterns_are_those_of_a_search():
    batch, m, n = 60, 7, 9
    share = torch.rand(batch, 1, 1)
    rank = torch.randint(1, 4, (batch,))
    data = torch.where(torch.rand(batch, m, n) < share, torch.randn(batch, m, n), torch.nan)
    found = batch_parts(data, rank, skew=False)
    for b in range(batch):
        rows, columns = parts_by_search(~data[b].isnan().numpy(), int(rank[b]))
        cells = np.equal.outer(np.array(rows), np.array(columns))
        assert (found.rows[b, :, None] == found.columns[b]).numpy().tolist() == cells.tolist(), b


@QUIET
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("rank", [1, None])
def test_blocks_that_share_nothing(in_batch, rank):
    n = 10
    low = (0.5 + torch.rand(2 * n, 1, dtype=torch.float64)) @ (0.5 + torch.rand(1, 2 * n, dtype=torch.float64))
    data = torch.full_like(low, NAN)
    data[:n, :n], data[n:, n:] = low[:n, :n], low[n:, n:]
    found = fastpref.rpca(data.unsqueeze(0) if in_batch else data, rank=rank)
    dense = found.low_rank().view_as(data)
    assert dense[data.isnan()].isnan().all()
    if rank is None:  # what is small beside the rest may be corruption to the convex program
        return
    if found.info.converged.all():
        torch.testing.assert_close(dense[~data.isnan()], data[~data.isnan()], rtol=0, atol=1e-3)
    one = low.clone()  # but one block missing: the others hold it together
    one[:n, n:] = NAN
    found = fastpref.rpca(one.unsqueeze(0) if in_batch else one, rank=1)
    torch.testing.assert_close(found.low_rank().view_as(low), low, rtol=0, atol=1e-3)


@QUIET
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int8])
@pytest.mark.parametrize("rank", [2, None])
def test_an_empty_row_and_column_have_no_value(dtype, rank):
    low = (torch.randint(-3, 4, (30, 2)) @ torch.randint(-3, 4, (2, 25))).to(torch.float64)
    data = low.clone()
    data[4], data[:, 7] = NAN, NAN
    data = torch.where(data.isnan(), -128, data).to(torch.int8) if dtype == torch.int8 else data.to(dtype)
    dense = fastpref.rpca(data, rank=rank).low_rank()
    assert dense[4].isnan().all() and dense[:, 7].isnan().all()
    rest = dense[torch.arange(30) != 4][:, torch.arange(25) != 7]
    assert rest.isfinite().all()


@QUIET
def test_a_row_with_fewer_entries_than_the_rank_has_no_value():
    low, data = corrupted(40, 30, 3, share=0.0)
    data[11, 2:] = NAN
    dense = fastpref.rpca(data, rank=3).low_rank()
    assert dense[11].isnan().all() and dense[torch.arange(40) != 11].isfinite().all()
    rows = dense.new_tensor([k for k in range(40) if k != 11]).long()
    torch.testing.assert_close(dense[rows], low[rows], rtol=0, atol=1e-4)
    parts = fastpref.rpca(data, rank=3).low_rank(slice(10, 13))
    assert parts.isnan().all(1).tolist() == [False, True, False]


@QUIET
def test_items_of_a_skew_matrix_hang_together_by_comparisons():
    w = torch.randn(24, dtype=torch.float64)
    skew = w.unsqueeze(1) - w
    apart = skew.clone()
    apart[:12, 12:], apart[12:, :12] = NAN, NAN
    halves = [0] * 12 + [12] * 12
    info = fastpref.rpca(apart, rank=2, structure="skew").info
    assert info.row_part.tolist() == info.column_part.tolist() == halves
    between = skew.clone()  # each of one half with each of the other, none with its own: the diagonal is no comparison
    between[:12, :12], between[12:, 12:] = NAN, NAN
    between.fill_diagonal_(0)
    info = fastpref.rpca(between, rank=2, structure="skew").info
    assert not info.row_part.any() and not info.column_part.any()
    batch = fastpref.rpca(torch.stack([skew, apart, between]), rank=2, structure="skew")
    assert batch.info.row_part.tolist() == batch.info.column_part.tolist() == [[0] * 24, halves, [0] * 24]
    assert batch.low_rank()[1][apart.isnan()].isnan().all() and batch.low_rank()[0].isfinite().all()


@QUIET
@pytest.mark.parametrize("in_batch", [False, True])
def test_nothing_is_larger_than_the_data_without_convergence(in_batch):
    """Few observed entries, all ones, where scaled steps lead far away."""
    unconverged = 0
    for n in (8, 20, 40):
        data = torch.full((n, n), NAN, dtype=torch.float64)
        data[torch.rand(n, n) < 0.08] = 1.0
        data[0, 0] = 1.0
        for rank in (None, 1, 2):
            found = fastpref.rpca(data.unsqueeze(0) if in_batch else data, rank=rank, max_iter=40)
            dense = found.low_rank()
            if not found.info.converged.all():
                unconverged += 1
                assert not (dense.abs() > 1).any()
    assert unconverged
