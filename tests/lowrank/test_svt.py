"""svt against a float64 SVD, and its derivative where singular values are tied, absent or thresholded away."""

import numpy as np
import pytest
import torch

import fastpref
from fastpref import _library, operators
from fastpref._lowrank.svt import JACOBI_LANES, jacobi_is_faster, svt_ref

pytestmark = pytest.mark.sanitize

SHAPES = [(1, 1), (2, 2), (1, 7), (7, 1), (5, 5), (12, 7), (7, 12), (32, 32), (33, 33), (40, 64), (64, 40), (3, 100)]


def of_rank(batch, m, n, rank, dtype=torch.float32):
    return torch.randn(batch, m, rank).to(dtype) @ torch.randn(batch, rank, n).to(dtype)


def extended(matrix, threshold):
    """svt of one float64 matrix in the longest floating-point type there is: two-sided truth for float64."""
    a = matrix.numpy().astype(np.longdouble)
    x, v = a.copy(), np.eye(a.shape[1], dtype=np.longdouble)
    if a.shape[0] < a.shape[1]:
        return extended(matrix.mT, threshold).T
    for _ in range(30):
        turned = False
        for p in range(x.shape[1]):
            for q in range(p + 1, x.shape[1]):
                alpha, beta, c = x[:, p] @ x[:, p], x[:, q] @ x[:, q], x[:, p] @ x[:, q]
                if abs(c) <= 1e-18 * np.sqrt(alpha * beta) or alpha * beta == 0:
                    continue
                turned = True
                angle = np.arctan2(2 * c, alpha - beta) / 2
                cos, sin = np.cos(angle), np.sin(angle)
                turn = np.array([[cos, -sin], [sin, cos]])
                x[:, [p, q]], v[:, [p, q]] = x[:, [p, q]] @ turn, v[:, [p, q]] @ turn
        if not turned:
            break
    s = np.sqrt((x * x).sum(0))
    return (x * np.maximum(1 - np.longdouble(threshold) / np.where(s > 0, s, 1), 0)) @ v.T


def thresholded(matrix, threshold):
    """In the dtype of the matrix, as a user writes it."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u * (s - threshold[:, None]).clamp(min=0).unsqueeze(-2)) @ vh


@pytest.mark.numerics
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(cpu_backend, shape):
    matrix = torch.randn(19, *shape)  # neither whole vectors nor less than one
    matrix[4] = of_rank(1, *shape, 1)[0]
    matrix[5] = 0
    matrix[6] *= 1e-30
    matrix[7] *= 1e30
    matrix[8] *= torch.logspace(0, -12, shape[1])
    top = torch.linalg.matrix_norm(matrix, 2)
    for share in (0.0, 1e-3, 0.3, 0.9, 2.0):
        threshold = share * top
        found = fastpref.svt(matrix, threshold, backend=cpu_backend)
        low, rank = svt_ref(matrix, threshold)
        size = top.double().clamp(min=1e-300)
        own = torch.linalg.matrix_norm(found.low_rank - low) / size
        same = (torch.linalg.matrix_norm(thresholded(matrix, threshold) - low) / size).max()
        assert (own <= 1.5 * same + 2 * torch.finfo(torch.float32).eps).all()
        s = torch.linalg.svdvals(matrix.double())
        clear = ((s - threshold.double()[:, None]).abs() > 1e-5 * top.double()[:, None]).all(-1)
        assert torch.equal(found.rank[clear], rank[clear])
        assert found.rank[5] == 0


@pytest.mark.numerics
@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="long double is no longer than double here")
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (12, 7), (7, 12), (16, 16)], ids=str)
def test_float64_matches_extended_precision(cpu_backend, shape):
    matrix = torch.randn(5, *shape, dtype=torch.float64)
    matrix[3] = of_rank(1, *shape, 1, torch.float64)[0]
    matrix[4] *= 1e-300
    threshold = 0.4 * torch.linalg.matrix_norm(matrix, 2)
    found, same = fastpref.svt(matrix, threshold, backend=cpu_backend).low_rank, thresholded(matrix, threshold)
    for i in range(5):
        truth, norm = extended(matrix[i], threshold[i].item()), matrix[i].abs().max().item()
        own, peer = (float(np.abs(t[i].numpy() - truth).max() / norm) for t in (found, same))
        assert own <= 1.5 * peer + 8 * torch.finfo(torch.float64).eps


@pytest.mark.numerics
def test_the_result_does_not_depend_on_neighbours_or_threads():
    matrix, threshold = torch.randn(70, 9, 6), torch.rand(70) * 3
    whole = fastpref.svt(matrix, threshold, backend="native")
    torch.set_num_threads(3)
    assert torch.equal(fastpref.svt(matrix, threshold, backend="native").low_rank, whole.low_rank)
    order = torch.randperm(70)
    shuffled = fastpref.svt(matrix[order], threshold[order], backend="native")
    torch.testing.assert_close(shuffled.low_rank, whole.low_rank[order], rtol=1e-5, atol=1e-5)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", JACOBI_LANES, ids=str)
def test_both_routes_are_taken(dtype):
    for shape, faster in (((64, 8, 8), True), ((1, 64, 64), False), ((16, 140, 140), False)):
        matrix = torch.randn(shape, dtype=dtype)
        assert jacobi_is_faster(matrix) == faster
        named = fastpref.svt(matrix, 1.0, backend="native" if faster else "reference")
        assert torch.equal(fastpref.svt(matrix, 1.0).low_rank, named.low_rank)
    assert "no native kernel" in _library.OPS["svt"]["native"]("cuda")


@pytest.mark.numerics
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


@pytest.mark.numerics
def test_half_precision_is_rounded_once():
    for dtype in (torch.bfloat16, torch.float16):
        matrix = torch.randn(3, 20, 15).to(dtype)
        found = fastpref.svt(matrix, 1.5)
        assert found.low_rank.dtype == dtype
        assert torch.equal(found.low_rank, fastpref.svt(matrix.float(), 1.5).low_rank.to(dtype))


@pytest.mark.numerics
@pytest.mark.parametrize("items", [6, 15, 48])
def test_skew_stays_skew(cpu_backend, items):
    upper = torch.randn(4, items, items).triu(1)
    found = fastpref.svt(upper - upper.mT, 1.0, backend=cpu_backend)
    low = found.low_rank
    assert (low + low.mT).abs().max() < 1e-5 * low.abs().max() * items**0.5
    assert (found.rank % 2 == 0).all()


def gap_to_threshold(matrix, threshold):
    s = torch.linalg.svdvals(matrix)
    return (s - threshold.unsqueeze(-1)).abs().min()


@pytest.mark.numerics
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


@pytest.mark.numerics
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
    torch.library.opcheck(operators.svt, (matrix.detach(), torch.tensor([0.5, 0.1]), ""))
    torch.library.opcheck(operators.svt, (matrix.detach(), torch.tensor([0.5, 0.1]), "native"))
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
        fastpref.svt(good, 1.0, backend="triton")
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken[1, 2, 0] = bad
        for backend in ("native", "reference"):
            with pytest.raises(ValueError, match=rf"{bad} at \[1, 2, 0\]"):
                fastpref.svt(broken, 1.0, backend=backend)
