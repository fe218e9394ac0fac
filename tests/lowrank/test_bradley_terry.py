"""Robust Bradley-Terry fits: recovery, agreement of every backend and form of input, and what is refused."""

import math
import warnings

import numpy as np
import pytest
import torch

from fastpref import Edges, bradley_terry
from fastpref._lowrank.bradley_terry import bradley_terry_dense

pytestmark = pytest.mark.sanitize

NAN = math.nan


def logit_matrices(batch, items, corrupted=0.0, kind="uniform", observed=1.0, noise=0.0, seed=None, sd=1.0):
    """Scores [batch, items] and float64 skew logits; a share of the pairs replaced (uniform), or inverted (flip)."""
    g = torch.Generator().manual_seed(torch.randint(2**31, ()).item() if seed is None else seed)
    shape = (batch, items, items)
    w = sd * torch.randn(batch, items, generator=g, dtype=torch.float64)
    w -= w.mean(-1, keepdim=True)
    m = w[:, :, None] - w[:, None] + noise * torch.randn(shape, generator=g, dtype=torch.float64)
    p = 0.01 + 0.98 * torch.rand(shape, generator=g, dtype=torch.float64)
    m = torch.where(torch.rand(shape, generator=g) < corrupted, p.logit() if kind == "uniform" else -m, m)
    m = m.triu(1)
    m = torch.where(torch.rand(shape, generator=g).triu(1) < 1 - observed, NAN, m) if observed < 1 else m
    missing = m.triu(1).isnan()
    m = m.nan_to_num(0).triu(1)
    m = m - m.mT
    return w, m.masked_fill(missing | missing.mT, NAN)


def few_wrong(batch, items, observed):
    """Logits of which a tenth is wrong, as many of each item's: where chance leaves an item one right comparison among
    wrong ones, as it does in a draw of some thousands, rounding decides between two answers."""
    _, m = logit_matrices(batch, items, observed=observed)
    for _ in range(round((items - 1) / 10)):
        order, half = torch.randperm(items), items // 2
        i, j = order[:half], order[-half:]
        wrong = (0.01 + 0.98 * torch.rand(batch, half, dtype=torch.float64)).logit()
        m[:, i, j] = torch.where(m[:, i, j].isnan(), NAN, wrong)
        m[:, j, i] = -m[:, i, j]
    return m


def win_matrices(batch, items, votes, inverted=0.0, seed=0, sd=1.0):
    g = torch.Generator().manual_seed(seed)
    w = sd * torch.randn(batch, items, generator=g, dtype=torch.float64)
    w -= w.mean(-1, keepdim=True)
    d = w[:, :, None] - w[:, None]
    d = torch.where(torch.rand(d.shape, generator=g) < inverted, -d, d)
    won = torch.binomial(torch.full_like(d, votes), d.sigmoid(), generator=g).triu(1)
    return w, won + (votes - won).triu(1).mT


def errors(result, w):
    return (result.scores.double() - w).norm(dim=-1) / w.norm(dim=-1)


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("items", "corrupted", "kind", "observed"),
    [
        (16, 0.2, "uniform", 1.0),
        (32, 0.2, "flip", 1.0),
        (64, 0.3, "flip", 1.0),
        (64, 0.2, "uniform", 0.5),
        (128, 0.3, "uniform", 0.3),
        (256, 0.3, "uniform", 0.2),
        (10, 0.1, "uniform", 1.0),
        (20, 0.1, "flip", 1.0),
        (50, 0.2, "flip", 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recovers_corrupted_logits(items, corrupted, kind, observed, dtype):
    w, m = logit_matrices(20, items, corrupted, kind, observed, seed=items)
    result = bradley_terry(m.to(dtype), outliers="pairs")
    exact = errors(result, w) < 1e-3
    assert exact.float().mean() >= 0.9
    assert result.info.converged.float().mean() >= 0.9
    assert (result.info.outlier_rate[exact] - corrupted).abs().max() < 0.2
    if kind == "uniform" and exact.all():
        truth = w[:, :, None] - w[:, None]
        wrong = ((m - truth).abs() > 1e-2).triu(1)
        found = torch.zeros_like(wrong)
        found[tuple(result.outliers.indices.T)] = True
        assert found[wrong].all()
        residual = (m - truth)[tuple(result.outliers.indices.T)]
        torch.testing.assert_close(result.outliers.residuals, residual, atol=1e-3, rtol=1e-3)


def test_noise():
    w, m = logit_matrices(20, 64, 0.2, noise=0.1, seed=1)
    result = bradley_terry(m)
    assert errors(result, w).median() < 0.04
    assert result.info.converged.all()
    assert ((result.info.scale > 0.07) & (result.info.scale < 0.2)).all()


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("items", "votes", "inverted", "bound"),
    [(64, 50, 0.0, 0.06), (64, 50, 0.2, 0.14), (64, 5, 0.1, 0.3), (256, 20, 0.2, 0.18), (256, 1, 0.1, 0.45)],
)
def test_recovers_inverted_votes(items, votes, inverted, bound):
    w, wins = win_matrices(4, items, votes, inverted, seed=items + votes)
    robust, plain = bradley_terry(wins=wins), bradley_terry(wins=wins, robust=False)
    assert robust.info.converged.all()
    assert errors(robust, w).mean() < bound
    if inverted:
        assert errors(plain, w).mean() > 1.15 * errors(robust, w).mean()
    else:
        torch.testing.assert_close(errors(robust, w), errors(plain, w), rtol=0.25, atol=0)


@pytest.mark.numerics
def test_maximum_likelihood():
    """The score equations: expected wins equal wins."""
    _, wins = win_matrices(3, 17, 9, seed=3)
    result = bradley_terry(wins=wins, robust=False)
    s = torch.sigmoid(result.scores[:, :, None] - result.scores[:, None])
    torch.testing.assert_close((s * (wins + wins.mT)).sum(-1), wins.sum(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.numerics
@pytest.mark.parametrize("items", [1, 2, 3, 5, 7, 8, 9, 16, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_agree(cpu_backend, items, dtype):
    m = few_wrong(3, items, observed=0.9)
    got, truth = bradley_terry(m.to(dtype), backend=cpu_backend), bradley_terry(m, backend="reference")
    torch.testing.assert_close(got.scores.double(), truth.scores, atol=1e-5, rtol=0, equal_nan=True)
    assert torch.equal(got.components, truth.components)
    assert got.info.converged.all()
    assert got.scores.dtype == dtype


@pytest.mark.numerics
@pytest.mark.parametrize("robust", [True, False])
@pytest.mark.parametrize("items", [2, 7, 16, 33])
def test_backends_agree_on_votes(cpu_backend, items, robust):
    _, wins = win_matrices(3, items, 30, 0.05 if robust else 0.0, seed=items, sd=0.5)
    got = bradley_terry(wins=wins, robust=robust, backend=cpu_backend, stderr=True)
    truth = bradley_terry(wins=wins, robust=robust, backend="reference", stderr=True)
    torch.testing.assert_close(got.scores, truth.scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.stderr, truth.stderr, atol=1e-6, rtol=0)
    narrow = bradley_terry(wins=wins.float(), robust=robust, backend=cpu_backend)
    torch.testing.assert_close(narrow.scores.double(), truth.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.info.scale, truth.info.scale, rtol=1e-2, atol=0)


def as_edges(m):
    seen = (~m.isnan()).triu(1)
    i, j = seen.nonzero(as_tuple=True)
    return Edges(i, j, logits=m[i, j], num_items=len(m))


@pytest.mark.parametrize("backend", ["native", pytest.param("reference", marks=pytest.mark.reference)])
def test_edges_agree_with_dense(backend):
    w, m = logit_matrices(1, 40, 0.2, observed=0.5, seed=2)
    dense = bradley_terry(m[0], outliers="pairs", stderr=True)
    edges = bradley_terry(edges=as_edges(m[0]), outliers="pairs", stderr=True, backend=backend)
    torch.testing.assert_close(edges.scores, dense.scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(edges.stderr, dense.stderr, atol=1e-6, rtol=1e-2)
    assert torch.equal(edges.components, dense.components)
    assert torch.equal(edges.outliers.indices, dense.outliers.indices)
    torch.testing.assert_close(edges.rejected, dense.rejected)
    assert errors(edges, w[0]) < 1e-3

    _, wins = win_matrices(1, 30, 7, seed=4)
    i, j = torch.ones(30, 30).triu(1).nonzero(as_tuple=True)
    half = Edges(
        torch.cat([i, j]), torch.cat([j, i]), wins[0][i, j].repeat(2) / 2, wins[0][j, i].repeat(2) / 2, None, 30
    )
    half = half._replace(wins_i=torch.cat([wins[0][i, j], wins[0][j, i]]) / 2)
    half = half._replace(wins_j=torch.cat([wins[0][j, i], wins[0][i, j]]) / 2)  # each pair twice, once reversed
    for robust in (True, False):
        got = bradley_terry(edges=half, robust=robust, backend=backend)
        torch.testing.assert_close(got.scores, bradley_terry(wins=wins[0], robust=robust).scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["dense", "edges"])
@pytest.mark.parametrize("graph", ["star", "chain", "bipartite"])
@pytest.mark.parametrize("items", [6, 65, 200])
def test_sparse_graphs_converge(graph, items, form):
    """A Jacobi sweep crawls on the first two and oscillates on the third."""
    w = torch.randn(items, dtype=torch.float64)
    w -= w.mean()
    item = torch.arange(items)
    if graph == "star":
        seen = (item[:, None] == 0) ^ (item == 0)
    elif graph == "chain":
        seen = (item[:, None] - item).abs() == 1
    else:
        seen = (item[:, None] % 2) != (item % 2)
    m = torch.where(seen, w[:, None] - w, NAN)
    result = bradley_terry(m) if form == "dense" else bradley_terry(edges=as_edges(m))
    assert result.info.converged
    assert (result.components == 0).all()
    torch.testing.assert_close(result.scores, w, atol=1e-7, rtol=0)
    if form == "dense":
        torch.testing.assert_close(bradley_terry(m.float()).scores.double(), w, atol=2e-3, rtol=0)


def test_batch_equals_loop_and_threads_do_not_matter():
    _, m = logit_matrices(7, 24, 0.1, observed=0.8)
    m = m.float().view(7, 1, 24, 24).expand(7, 2, 24, 24)
    whole = bradley_terry(m)
    assert whole.scores.shape == (7, 2, 24)
    assert whole.info.iterations.shape == (7, 2)
    threads = torch.get_num_threads()
    edges = as_edges(logit_matrices(1, 1500, 0.1, observed=0.02)[1][0])
    many = bradley_terry(edges=edges)
    try:
        torch.set_num_threads(1)
        assert torch.equal(bradley_terry(edges=edges).scores, many.scores)
        for b in range(7):
            assert torch.equal(bradley_terry(m[b, 1]).scores, whole.scores[b, 1])
            assert torch.equal(bradley_terry(m[b, 1]).info.iterations, whole.info.iterations[b, 1])
    finally:
        torch.set_num_threads(threads)


def test_permutation_and_constant():
    m = few_wrong(2, 19, observed=0.8)
    w = torch.randn(2, 19, dtype=torch.float64)
    w -= w.mean(-1, keepdim=True)
    order = torch.randperm(19)
    plain, permuted = bradley_terry(m), bradley_terry(m[:, order][:, :, order])
    torch.testing.assert_close(permuted.scores, plain.scores[:, order], atol=1e-4, rtol=0)
    d = (w + 100)[:, :, None] - (w + 100)[:, None]
    torch.testing.assert_close(bradley_terry(d).scores, w, atol=1e-9, rtol=0)
    torch.testing.assert_close(bradley_terry(m * 1000).scores, plain.scores * 1000, atol=0.1, rtol=1e-5)


def test_missing_rows_components_and_nothing_at_all(cpu_backend):
    w, m = logit_matrices(1, 12)
    m = m[0]
    w = w[0]
    m[3] = m[:, 3] = NAN
    m[:6, 6:] = m[6:, :6] = NAN
    result = bradley_terry(m, backend=cpu_backend, stderr=True)
    assert result.components.tolist() == [0, 0, 0, 1, 0, 0] + [2] * 6
    assert result.scores.isnan().nonzero().tolist() == [[3]]
    assert result.stderr.isnan().nonzero().tolist() == [[3]]
    for part in ([0, 1, 2, 4, 5], list(range(6, 12))):
        torch.testing.assert_close(result.scores[part], w[part] - w[part].mean(), atol=1e-7, rtol=0)
    empty = bradley_terry(torch.full((2, 5, 5), NAN), backend=cpu_backend)
    assert empty.scores.isnan().all()
    assert empty.info.converged.all()
    assert empty.info.outlier_rate.isnan().all()
    assert empty.components.tolist() == [[0, 1, 2, 3, 4]] * 2
    zero = bradley_terry(torch.zeros(4, 4), backend=cpu_backend)
    assert (zero.scores == 0).all()
    assert zero.info.converged
    assert zero.info.outlier_rate == 0
    assert bradley_terry(torch.zeros(1, 1), backend=cpu_backend).scores.isnan().all()
    nothing = bradley_terry(torch.zeros(0, 3, 3), backend=cpu_backend, outliers="pairs", stderr=True)
    assert nothing.scores.shape == (0, 3)
    assert bradley_terry(wins=torch.zeros(2, 3, 3), backend=cpu_backend).scores.isnan().all()


def test_a_hopeless_matrix_says_so():
    _, m = logit_matrices(2, 24, 0.1, noise=0.3)
    result = bradley_terry(m, max_iter=2)
    assert not result.info.converged.any()
    assert (result.info.iterations == 2).all()
    assert result.scores.isfinite().all()
    assert (result.info.gradient > bradley_terry(m).info.gradient).all()


def test_large_dense_goes_by_edges():
    w, m = logit_matrices(1, 600, 0.2, observed=0.2, seed=5)
    result = bradley_terry(m, outliers="pairs")
    assert errors(result, w) < 1e-3
    wrong = m.clone()
    wrong[0, 550, 7] = 1e6
    with pytest.raises(ValueError, match=r"skew-symmetric.*at \[(550, 7|7, 550)\]"):
        bradley_terry(wrong)
    counts = win_matrices(1, 520, 3, seed=1)[1]
    assert bradley_terry(wins=counts).info.converged
    counts[0, 519, 519] = 1
    with pytest.raises(ValueError, match=r"wins must be 0 or NaN on the diagonal.*\[519, 519\]"):
        bradley_terry(wins=counts)


@pytest.mark.slow
def test_many_items():
    items, degree = 100_000, 8
    w = torch.randn(items, dtype=torch.float64)
    i = torch.arange(items).repeat(degree)
    j = (i + torch.randint(1, items, (items * degree,))) % items
    logits = w[i] - w[j]
    flipped = torch.rand(len(i)) < 0.1
    result = bradley_terry(edges=Edges(i, j, logits=torch.where(flipped, -logits, logits), num_items=items), tol=1e-6)
    w -= w.mean()
    assert result.info.converged
    assert (result.components == 0).all()
    assert ((result.scores - w).abs() < 1e-3).double().mean() > 0.98


def test_standard_errors_are_calibrated():
    w, m = logit_matrices(60, 24, noise=0.3, seed=9)
    result = bradley_terry(m, stderr=True)
    ratio = ((result.scores - w) / result.stderr).square().mean().sqrt()
    assert 0.8 < ratio < 1.25
    w, wins = win_matrices(60, 24, 20, seed=9)
    for robust in (True, False):
        result = bradley_terry(wins=wins, robust=robust, stderr=True)
        ratio = ((result.scores - w) / result.stderr).square().mean().sqrt()
        assert 0.8 < ratio < 1.25


@pytest.mark.numerics
@pytest.mark.parametrize("robust", [True, False])
def test_no_maximum_likelihood(cpu_backend, robust):
    """Robust or not: it is the ridge that keeps such scores finite, and it is said."""
    options = {"robust": robust, "backend": cpu_backend}
    wins = torch.tensor([[0.0, 3, 3], [0, 0, 2], [0, 1, 0]])
    with pytest.warns(RuntimeWarning, match="of 1 of 1 graphs do not exist"):
        result = bradley_terry(wins=wins, **options)
    assert result.scores.isfinite().all()
    assert result.info.converged and result.info.separated
    with pytest.warns(RuntimeWarning, match="do not exist"):
        edges = Edges(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), wins[[0, 0, 1], [1, 2, 2]],
                      wins[[1, 2, 2], [0, 0, 1]], None, 3)  # fmt: skip
        listed = bradley_terry(edges=edges, **options)
    torch.testing.assert_close(listed.scores, result.scores.double(), atol=1e-4, rtol=0)
    cycle = torch.tensor([[0.0, 9, 0], [0, 0, 9], [9, 0, 0]])
    parts = torch.zeros(4, 4)
    parts[0, 1] = parts[1, 0] = parts[2, 3] = parts[3, 2] = 9  # two components, each with its maximum
    for there in (cycle, parts):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = bradley_terry(wins=there, **options)
        torch.testing.assert_close(found.scores, torch.zeros(len(there)), atol=1e-6, rtol=0)
        assert not found.info.separated
    with pytest.warns(RuntimeWarning, match="of 1 of 3 graphs do not exist"):
        several = bradley_terry(wins=torch.stack([cycle, wins, cycle]), **options)
    assert several.info.separated.tolist() == [False, True, False]
    with pytest.warns(RuntimeWarning, match="do not exist"):
        bradley_terry(wins=torch.tensor([[0.0, 1], [0, 0]]), **options)


@pytest.mark.numerics
def test_a_large_graph_without_a_maximum_is_said():
    wins = torch.ones(520, 520, dtype=torch.float64).fill_diagonal_(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not bradley_terry(wins=wins).info.separated
    wins[:, 7] = 0  # nobody beats it
    with pytest.warns(RuntimeWarning, match="do not exist"):
        assert bradley_terry(wins=wins).info.separated


@pytest.mark.numerics
@pytest.mark.parametrize("as_edges", [True, False])
def test_small_weights_do_not_shrink_the_scores_in_silence(cpu_backend, as_edges):
    n = 8
    i, j = torch.triu_indices(n, n, 1)
    w = torch.linspace(1, -1, n, dtype=torch.float64)
    won = 50 * torch.sigmoid(w[i] - w[j])
    lost = 50 - won

    def fit(weight, **options):
        if as_edges:
            edges = Edges(i, j, weight * won, weight * lost, num_items=n)
            return bradley_terry(edges=edges, backend=cpu_backend, **options)
        wins = torch.zeros(n, n, dtype=torch.float64)
        wins[i, j], wins[j, i] = weight * won, weight * lost
        return bradley_terry(wins=wins, backend=cpu_backend, **options)

    silent, loud = [], []
    for weight in (100.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = fit(weight)
        (loud if any("rules the scores" in str(one.message) for one in seen) else silent).append(weight)
        shrunk = 1 - (found.scores @ w / (w @ w)).item()
        assert found.info.ridge_share.item() == pytest.approx(shrunk, abs=0.25 * shrunk + 1e-3)
        if weight in silent:
            assert shrunk < 0.06
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # without a ridge, weights change nothing
            torch.testing.assert_close(fit(weight, robust=False).scores, w, atol=1e-4, rtol=0)
    assert silent == [100.0, 1.0, 0.1, 1e-2] and loud == [1e-3, 1e-4, 1e-6]


def test_numpy_and_narrow_dtypes():
    w, m = logit_matrices(2, 16)
    torch.testing.assert_close(bradley_terry(m.numpy()).scores, bradley_terry(m).scores)
    counts = np.array([[0, 3], [1, 0]])
    torch.testing.assert_close(
        bradley_terry(wins=counts, robust=False).scores, torch.tensor([1, -1], dtype=torch.float64) * math.log(3) / 2
    )
    for dtype in (torch.bfloat16, torch.float16):
        result = bradley_terry(m.to(dtype))
        assert result.scores.dtype == torch.float32
        torch.testing.assert_close(result.scores.double(), w, atol=0.02, rtol=0)


def test_refuses(cpu_backend):
    def refused(error, match, *args, **kwargs):
        with pytest.raises(error, match=match):
            bradley_terry(*args, backend=cpu_backend, **kwargs)

    good = logit_matrices(2, 5)[1]
    skewed = good.clone()
    skewed[1, 3, 2] += 0.5
    refused(ValueError, r"skew-symmetric.*\[1, (3, 2|2, 3)\]", skewed)
    one_side = good.clone()
    one_side[0, 1, 4] = NAN
    refused(ValueError, r"skew-symmetric.*\[0, (1, 4|4, 1)\]", one_side)
    diagonal = good.clone()
    diagonal[0, 2, 2] = 1.0
    refused(ValueError, r"logits must be 0 or NaN on the diagonal.*got 1.0 at \[0, 2, 2\]", diagonal)
    infinite = good.clone()
    infinite[1, 0, 3], infinite[1, 3, 0] = math.inf, -math.inf
    refused(ValueError, r"finite or NaN, got inf at \[1, 0, 3\]", infinite)
    refused(ValueError, "exactly one of logits, wins and edges", good, wins=good)
    refused(ValueError, "exactly one of logits, wins and edges must be given, got none")
    refused(ValueError, r"\[\.\.\., N, N\], got \[3, 4\]", torch.zeros(3, 4))
    refused(TypeError, "logits must be real numbers", torch.zeros(3, 3, dtype=torch.int64))
    refused(ValueError, "robust=False needs wins", good, robust=False)
    refused(ValueError, "outliers must be 'none' or 'pairs'", good, outliers="all")
    for bad in (-1.0, math.inf):
        wins = torch.ones(3, 3).fill_diagonal_(0)
        wins[2, 1] = bad
        refused(ValueError, r"wins must be finite counts.* at \[2, 1\]", wins=wins)
    wins = torch.ones(3, 3)
    refused(
        ValueError, r"wins must be 0 or NaN on the diagonal, an item against itself, got 1.0 at \[0, 0\]", wins=wins
    )
    i, j = torch.tensor([0, 1]), torch.tensor([1, 2])
    one = torch.ones(2)
    refused(ValueError, r"edges.j must lie in \[0, 2\)", edges=Edges(i, j, logits=one, num_items=2))
    refused(ValueError, "item 1 with itself at 1", edges=Edges(i, i.flip(0) * 0 + 1, logits=one, num_items=3))
    refused(ValueError, "either wins_i and wins_j, or logits", edges=Edges(i, j, one, num_items=3))
    refused(ValueError, "edges.wins_j must be finite counts", edges=Edges(i, j, one, -one, num_items=3))
    refused(ValueError, r"edges.logits must have shape \[2\]", edges=Edges(i, j, logits=one[:1], num_items=3))
    refused(ValueError, "stderr=True takes at most 4096", edges=Edges(i, j, logits=one, num_items=5000), stderr=True)


def test_operator():
    m = logit_matrices(2, 9)[1]
    for backend in ("native", "reference"):
        torch.library.opcheck(bradley_terry_dense, (m, "logits", 1e-9, 100, backend))


def test_logits_beyond_float32_are_data_in_float64():
    w = torch.randn(8, dtype=torch.float64)
    logits = w.unsqueeze(1) - w
    logits[0, 1], logits[1, 0] = 1e39, -1e39
    found = bradley_terry(logits)
    assert found.info.iterations > 0
    assert found.scores.isfinite().all()
    assert found.components.eq(0).all()


def test_repeated_edges_are_not_a_complete_graph():
    w = torch.randn(16, dtype=torch.float64)
    i = torch.arange(15).repeat(8)  # a chain, 240 directed entries as the complete graph has
    edges = Edges(i, i + 1, logits=w[i] - w[i + 1], num_items=16)
    found = bradley_terry(edges=edges, tol=1e-9)
    torch.testing.assert_close(found.scores, w - w.mean(), rtol=0, atol=1e-7)
