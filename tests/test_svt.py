"""svt against a float64 SVD, and its derivative where singular values are tied, absent or thresholded away."""

import pytest
import torch

import fastpref
from fastpref.svt import _operator, svt_ref

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (12, 7), (7, 12), (32, 32), (33, 33), (40, 64), (64, 40), (3, 100)]


def of_rank(batch, m, n, rank, dtype=torch.float32):
    return torch.randn(batch, m, rank).to(dtype) @ torch.randn(batch, rank, n).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype):
    matrix = torch.randn(6, *shape, dtype=dtype)
    matrix[4] = of_rank(1, *shape, 1, dtype)[0]
    matrix[5] = 0
    top = torch.linalg.matrix_norm(matrix, 2)
    for share in (0.0, 1e-3, 0.3, 0.9, 2.0):
        threshold = share * top
        found = fastpref.svt(matrix, threshold)
        low, rank = svt_ref(matrix, threshold)
        assert found.low_rank.dtype == dtype
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        same = (u * (s - threshold[:, None]).clamp(min=0).unsqueeze(-2)) @ vh
        own = (found.low_rank - low).norm(dim=(-2, -1))
        allowed = 1.5 * (same - low).norm(dim=(-2, -1)) + 2 * torch.finfo(dtype).eps * top.double()
        assert (own <= allowed).all()
        if share >= 0.3:
            assert torch.equal(found.rank[:4], rank[:4])
    assert found.rank[5] == 0


def test_thresholds_per_matrix_and_batch_shapes():
    matrix = torch.randn(2, 3, 8, 6)
    threshold = torch.rand(2, 3) * 3
    found = fastpref.svt(matrix, threshold)
    for i in range(2):
        for j in range(3):
            one = fastpref.svt(matrix[i, j], threshold[i, j].item())
            torch.testing.assert_close(found.low_rank[i, j], one.low_rank)
            assert found.rank[i, j] == one.rank
    assert fastpref.svt(torch.zeros(0, 3, 4), 1.0).low_rank.shape == (0, 3, 4)
    assert fastpref.svt(torch.zeros(2, 0, 4), 1.0).rank.tolist() == [0, 0]
    strided = torch.randn(4, 6, 5, 2).mT[..., 0, :]
    torch.testing.assert_close(fastpref.svt(strided, 0.5).low_rank, fastpref.svt(strided.contiguous(), 0.5).low_rank)


def test_half_precision_is_rounded_once():
    for dtype in (torch.bfloat16, torch.float16):
        matrix = torch.randn(3, 20, 15).to(dtype)
        found = fastpref.svt(matrix, 1.5)
        assert found.low_rank.dtype == dtype
        assert torch.equal(found.low_rank, fastpref.svt(matrix.float(), 1.5).low_rank.to(dtype))


@pytest.mark.parametrize("items", [6, 15, 48])
def test_skew_stays_skew(items):
    upper = torch.randn(4, items, items).triu(1)
    low = fastpref.svt(upper - upper.mT, 1.0).low_rank
    assert (low + low.mT).abs().max() < 1e-4


def gap_to_threshold(matrix, threshold):
    s = torch.linalg.svdvals(matrix)
    return (s - threshold.unsqueeze(-1)).abs().min()


@pytest.mark.parametrize("kind", ["general", "tall", "wide", "skew", "low-rank", "zero", "identity"])
def test_gradients(kind):
    shape = {"tall": (7, 4), "wide": (4, 7)}.get(kind, (5, 5))
    for _ in range(50):
        matrix = torch.randn(2, *shape, dtype=torch.float64)
        if kind == "skew":
            matrix = matrix - matrix.mT
        elif kind == "low-rank":
            matrix = of_rank(2, 5, 5, 2, torch.float64)
        elif kind == "zero":
            matrix = torch.zeros(2, 5, 5, dtype=torch.float64)
        elif kind == "identity":
            matrix = 2 * torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)
        threshold = torch.tensor([0.7, 1.3], dtype=torch.float64)
        if gap_to_threshold(matrix, threshold) > 0.02:
            break
    matrix.requires_grad_()
    threshold.requires_grad_()
    assert torch.autograd.gradcheck(lambda m, t: fastpref.svt(m, t).low_rank, (matrix, threshold))


def test_without_a_threshold_the_gradient_passes_through():
    matrix = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 6, 4, dtype=torch.float64)
    fastpref.svt(matrix, 0.0).low_rank.backward(grad)
    torch.testing.assert_close(matrix.grad, grad)
    zero = torch.zeros(2, 4, 4, dtype=torch.float64, requires_grad=True)
    fastpref.svt(zero, 0.0).low_rank.backward(grad[:2, :4])
    torch.testing.assert_close(zero.grad, grad[:2, :4])


def test_citizenship():
    matrix = torch.randn(2, 5, 4, requires_grad=True)
    torch.library.opcheck(_operator, (matrix.detach(), torch.tensor([0.5, 0.1]), True))
    torch.library.opcheck(_operator, (matrix.detach(), torch.tensor([0.5, 0.1]), False))
    compiled = torch.compile(
        lambda m: fastpref.svt(m, 0.5).low_rank.square().sum(), fullgraph=True, backend="aot_eager"
    )
    compiled(matrix).backward()
    same = matrix.detach().clone().requires_grad_()
    fastpref.svt(same, 0.5).low_rank.square().sum().backward()
    torch.testing.assert_close(matrix.grad, same.grad)
    (gradient,) = torch.autograd.grad(fastpref.svt(same, 0.5).low_rank.sum(), same, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_bad_input():
    good = torch.randn(2, 4, 3)
    broken = good.clone()
    broken[1, 2, 0] = torch.nan
    cases = [
        (TypeError, ("matrix", "int64"), good.long(), 1.0),
        (TypeError, ("matrix", "list"), [1.0], 1.0),
        (ValueError, ("matrix", "[3]"), torch.zeros(3), 1.0),
        (ValueError, ("matrix", "nan", "[1, 2, 0]"), broken, 1.0),
        (ValueError, ("threshold", "-1"), good, -1.0),
        (ValueError, ("threshold", "negative"), good, torch.tensor([1.0, -2.0])),
        (ValueError, ("threshold", "[2]", "[3]"), good, torch.zeros(3)),
        (TypeError, ("threshold", "str"), good, "1"),
    ]
    for kind, words, matrix, threshold in cases:
        with pytest.raises(kind) as raised:
            fastpref.svt(matrix, threshold)
        assert all(word in str(raised.value) for word in words)
    with pytest.raises(ValueError, match="backend"):
        fastpref.svt(good, 1.0, backend="native")
