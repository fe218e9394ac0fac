"""bradley_terry: recovery tables, against truths and an exact reference, and every door it has."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastpref
from fastpref import Edges
from fastpref.bradley_terry import bradley_terry_fit

SIMD = ["baseline", "avx2", "avx512"]


@pytest.fixture(params=SIMD)
def simd(request):
    try:
        fastpref.set_simd_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    fastpref.set_simd_level("auto")


def symmetric(rng, shape):
    """Uniform numbers, the same for a pair and its mirror image."""
    upper = torch.rand(shape, generator=rng, dtype=torch.float64).triu(1)
    return upper + upper.mT + torch.eye(shape[-1], dtype=torch.float64)


def skew(rng, shape, draw=torch.randn):
    upper = draw(shape, generator=rng, dtype=torch.float64).triu(1)
    return upper - upper.mT


def matrices(batch, items, corrupted=0.0, observed=1.0, kind="uniform", noise=0.0, seed=0):
    """True scores [batch, items] and logits, some of them corrupted, missing, noisy."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(batch, items, generator=rng, dtype=torch.float64)
    w -= w.mean(-1, keepdim=True)
    clean = w.unsqueeze(-1) - w.unsqueeze(-2)
    size = clean.abs().mean((-2, -1), keepdim=True)
    shape = clean.shape
    wrong = -clean if kind == "flip" else clean + 10 * size * skew(rng, shape, torch.rand)
    logits = torch.where(symmetric(rng, shape) < corrupted, wrong, clean) + noise * size * skew(rng, shape)
    return w, logits.masked_fill(symmetric(rng, shape) > observed + (observed == 1), torch.nan)


def votes(batch, items, k, flipped, seed=0):
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(batch, items, generator=rng, dtype=torch.float64)
    w -= w.mean(-1, keepdim=True)
    p = torch.sigmoid(w.unsqueeze(-1) - w.unsqueeze(-2))
    p = torch.where(symmetric(rng, p.shape) < flipped, 1 - p, p)
    wins = torch.binomial(torch.full_like(p, k), p, generator=rng).triu(1)
    return w, wins + (k - wins.mT).tril(-1)


def error(result, w):
    return (result.scores.double() - w).norm(dim=-1) / w.norm(dim=-1)


# ---- recovery (fixed seeds) ----


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("items", "corrupted", "observed", "kind", "at_least"),
    [
        (16, 0.1, 1.0, "uniform", 0.98),
        (16, 0.2, 1.0, "uniform", 0.95),
        (32, 0.2, 1.0, "flip", 0.95),
        (64, 0.2, 1.0, "uniform", 0.98),
        (64, 0.3, 1.0, "flip", 0.98),
        (64, 0.2, 0.5, "uniform", 0.98),
        (128, 0.3, 0.3, "uniform", 0.95),
    ],
)
def test_recovers_corrupted_logits(backend, items, corrupted, observed, kind, at_least):
    w, logits = matrices(40 if items < 100 else 12, items, corrupted, observed, kind)
    found = fastpref.bradley_terry(logits.float(), backend=backend)
    assert (error(found, w) < 1e-3).double().mean() >= at_least
    assert found.info.converged.all()
    assert (found.info.outlier_rate - corrupted).abs().max() < 0.15


@pytest.mark.parametrize("seed", range(3))
def test_noise_costs_little(seed):
    w, logits = matrices(20, 64, 0.2, noise=0.1, seed=seed)
    found = fastpref.bradley_terry(logits)
    assert error(found, w).median() < 0.03
    _, clean = matrices(20, 64, 0.0, noise=0.1, seed=seed)
    least_squares = fastpref.bradley_terry(clean, robust=False)
    assert error(found, w).median() < 2 * error(least_squares, w).median()
    true_scale = 0.1 * (w.unsqueeze(-1) - w.unsqueeze(-2)).abs().mean((-2, -1))
    assert ((found.info.scale / true_scale - 1.25).abs() < 0.25).all()  # a fifth is corrupted: the median moves up


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("items", "k", "flipped", "at_most"),
    [(64, 50, 0.0, 0.05), (64, 50, 0.1, 0.08), (64, 50, 0.2, 0.12), (64, 50, 0.3, 0.18), (64, 5, 0.1, 0.25)],
)
def test_recovers_flipped_votes(backend, items, k, flipped, at_most):
    w, wins = votes(12, items, k, flipped)
    found = fastpref.bradley_terry(wins=wins, backend=backend)
    assert error(found, w).median() < at_most
    assert found.info.converged.all()
    if flipped:
        plain = fastpref.bradley_terry(wins=wins, robust=False)
        assert error(plain, w).median() > 1.5 * error(found, w).median()


def test_flips_are_listed():
    w, logits = matrices(6, 40, 0.1, kind="flip", seed=5)
    clean = w.unsqueeze(-1) - w.unsqueeze(-2)
    found = fastpref.bradley_terry(logits, outliers="pairs").outliers
    flipped = ((logits - clean).abs() > 1e-3 * clean.abs().mean()).triu(1)
    listed = torch.zeros_like(flipped)
    listed[found.batch, found.i, found.j] = True
    assert torch.equal(listed, flipped)
    torch.testing.assert_close(found.residual, (logits - clean)[flipped], rtol=0, atol=1e-6)


# ---- truth ----


def test_maximum_likelihood_is_a_stationary_point():
    _, wins = votes(8, 12, 20, 0.0, seed=2)
    found = fastpref.bradley_terry(wins=wins, robust=False)
    s = torch.sigmoid(found.scores.unsqueeze(-1) - found.scores.unsqueeze(-2))
    slope = (wins - (wins + wins.mT) * s).sum(-1)
    assert slope.abs().max() < 1e-6 * 20 * 12


def test_least_squares_of_a_complete_graph_are_row_means():
    _, logits = matrices(5, 17, noise=0.5, corrupted=0.3)
    found = fastpref.bradley_terry(logits, robust=False, tol=1e-12)
    torch.testing.assert_close(found.scores, logits.nan_to_num(0.0).mean(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("items", [1, 2, 3, 7, 15, 16, 17, 33, 61, 64, 65])
def test_agrees_with_the_reference(simd, items, dtype):
    _, logits = matrices(5, items, 0.1, 1.0 if items % 2 else 0.7, seed=items)
    bound = 2e-5 if dtype == torch.float32 else 1e-8
    for data in ({"logits": logits.to(dtype)}, {"wins": votes(5, items, 20, 0.1, seed=items)[1].to(dtype)}):
        for robust in (True, False):
            found = fastpref.bradley_terry(**data, robust=robust, backend="native")
            same = fastpref.bradley_terry(
                **{name: value.double() for name, value in data.items()}, robust=robust, backend="reference"
            )
            assert found.scores.dtype == dtype
            assert torch.equal(found.components, same.components)
            atol = bound * max(1.0, logits.nan_to_num(0.0).abs().max().item())
            if "wins" in data:
                atol = max(atol, 1e-3 if dtype == torch.float32 else 1e-5)
            torch.testing.assert_close(found.scores.double(), same.scores, rtol=0, atol=atol, equal_nan=True)
            assert torch.equal(found.info.converged, same.info.converged)


@pytest.mark.parametrize("backend", ["native", "reference", "edges"])
@pytest.mark.parametrize("kind", ["star", "chain", "bipartite"])
def test_sparse_graphs_converge(kind, backend):
    items = 41
    i, j = {
        "star": (torch.zeros(items - 1).long(), torch.arange(1, items)),
        "chain": (torch.arange(items - 1), torch.arange(1, items)),
        "bipartite": tuple(torch.cartesian_prod(torch.arange(20), torch.arange(20, items)).T),
    }[kind]
    w = torch.randn(items, dtype=torch.float64)
    w -= w.mean()
    gap = w[i] - w[j]
    if backend == "edges":
        found = fastpref.bradley_terry(edges=Edges(i, j, logits=gap))
    else:
        logits = torch.full((items, items), torch.nan, dtype=torch.float64)
        logits[i, j], logits[j, i] = gap, -gap
        found = fastpref.bradley_terry(logits, backend=backend)
    torch.testing.assert_close(found.scores, w, rtol=0, atol=1e-9)
    assert found.info.converged
    assert found.info.outlier_rate == 0


# ---- structure ----


def test_components_and_items_without_comparisons():
    w, logits = matrices(1, 12)
    logits = logits[0]
    logits[:5, 5:] = logits[5:, :5] = torch.nan
    logits[8] = logits[:, 8] = torch.nan
    for backend in ("native", "reference"):
        found = fastpref.bradley_terry(logits, backend=backend)
        assert found.components.tolist() == [0] * 5 + [1] * 3 + [2] + [1] * 3
        assert found.scores.isnan().nonzero().flatten().tolist() == [8]
        second = torch.tensor([5, 6, 7, 9, 10, 11])
        for part in (torch.arange(5), second):
            torch.testing.assert_close(found.scores[part], w[0, part] - w[0, part].mean(), rtol=0, atol=1e-8)
            assert abs(found.scores[part].sum()) < 1e-9


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nothing_compared(backend):
    found = fastpref.bradley_terry(torch.full((3, 4, 4), torch.nan), backend=backend)
    assert found.scores.isnan().all()
    assert not found.info.converged.any()
    assert found.components.tolist() == [[0, 1, 2, 3]] * 3
    assert fastpref.bradley_terry(torch.zeros(0, 5, 5), backend=backend).scores.shape == (0, 5)
    assert fastpref.bradley_terry(torch.zeros(2, 0, 0), backend=backend).scores.shape == (2, 0)
    equal = fastpref.bradley_terry(torch.zeros(6, 6), backend=backend)
    assert (equal.scores == 0).all()
    assert equal.info.converged


def test_a_batch_is_its_matrices_whatever_the_threads():
    _, logits = matrices(9, 23, 0.2, 0.8, noise=0.05)
    _, wins = votes(9, 23, 7, 0.1)
    threads = torch.get_num_threads()
    for name, data in (("logits", logits.float()), ("wins", wins.float())):
        together = fastpref.bradley_terry(**{name: data})
        try:
            torch.set_num_threads(1)
            alone = [fastpref.bradley_terry(**{name: matrix}) for matrix in data]
        finally:
            torch.set_num_threads(threads)
        for field in ("scores", "components", "rejected"):
            assert torch.equal(getattr(together, field), torch.stack([getattr(one, field) for one in alone]))
        assert torch.equal(together.info.iterations, torch.stack([one.info.iterations for one in alone]))


@settings(deadline=None, max_examples=25)
@given(items=st.integers(2, 20), seed=st.integers(0, 2**31 - 1), counts=st.booleans())
def test_permutations_scale_and_mirror(items, seed, counts):
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    if counts:
        _, data = votes(1, items, 9, 0.1, seed)
        fit, other, atol = (lambda m: fastpref.bradley_terry(wins=m)), data[0].mT.contiguous(), 1e-4
    else:
        _, data = matrices(1, items, 0.1, noise=0.1, seed=seed)
        fit, other, atol = fastpref.bradley_terry, -data[0], 1e-4
    data = data[0]
    found = fit(data)
    if not found.info.converged:  # two halves that contradict each other have more than one answer
        return
    scale = max(1.0, data.abs().max().item()) if not counts else 1.0
    permuted = fit(data[order][:, order].contiguous())
    torch.testing.assert_close(permuted.scores, found.scores[order], rtol=0, atol=atol * scale)
    torch.testing.assert_close(fit(other).scores, -found.scores, rtol=0, atol=atol * scale)
    if not counts:
        torch.testing.assert_close(fit(4 * data).scores, 4 * found.scores, rtol=0, atol=4 * atol * scale)


# ---- edges ----


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("robust", [True, False])
def test_edges_are_the_matrix(counts, robust):
    items = 30
    _, logits = matrices(1, items, 0.1, noise=0.05, observed=0.6)
    wins = votes(1, items, 12, 0.1)[1][0]
    logits = logits[0]
    i, j = torch.triu_indices(items, items, 1)
    swap = torch.rand(len(i)) < 0.5
    i, j = torch.where(swap, j, i), torch.where(swap, i, j)
    if counts:
        half = (wins[i, j] / 2).floor()  # a pair may be listed twice
        edges = Edges(
            torch.cat([i, j]),
            torch.cat([j, i]),
            torch.cat([half, wins[j, i]]),
            torch.cat([0 * half, wins[i, j] - half]),
        )
        dense = fastpref.bradley_terry(wins=wins, robust=robust, stderr=True, outliers="pairs")
    else:
        edges = Edges(i, j, logits=logits[i, j])
        dense = fastpref.bradley_terry(logits, robust=robust, stderr=True, outliers="pairs")
    found = fastpref.bradley_terry(edges=edges, robust=robust, stderr=True, outliers="pairs")
    torch.testing.assert_close(found.scores, dense.scores, rtol=0, atol=1e-3)  # medians to 1 %
    torch.testing.assert_close(found.stderr, dense.stderr, rtol=1e-2, atol=1e-7)
    assert torch.equal(found.components, dense.components)
    torch.testing.assert_close(found.rejected, dense.rejected)
    pairs = [
        {tuple(sorted(pair)) for pair in zip(o.i.tolist(), o.j.tolist(), strict=True)}
        for o in (found.outliers, dense.outliers)
    ]
    assert pairs[0] == pairs[1]


def test_a_hundred_thousand_items():
    items, comparisons = 100_000, 400_000
    w = torch.randn(items, dtype=torch.float64)
    i, j = torch.randint(0, items, (2, comparisons))
    wrong = torch.rand(comparisons) < 0.05
    gap = torch.where(wrong, -3 * (w[i] - w[j]), w[i] - w[j])
    found = fastpref.bradley_terry(edges=Edges(i, j, logits=gap, num_items=items), max_iter=60)
    main = found.components == found.components.mode().values
    assert main.double().mean() > 0.99
    shift = (found.scores - w)[main].median()
    assert ((found.scores - w - shift)[main].abs() < 1e-3).double().mean() > 0.98
    assert (
        found.scores.isnan().sum()
        == (torch.bincount(torch.cat([i, j])[torch.cat([i != j] * 2)], minlength=items) == 0).sum()
    )


# ---- standard errors ----


@pytest.mark.parametrize("kind", ["logits", "wins"])
@pytest.mark.parametrize("robust", [True, False])
def test_standard_errors_are_those_of_repetition(kind, robust):
    items, repeats = 12, 400
    rng = torch.Generator().manual_seed(3)
    w = torch.linspace(-1, 1, items, dtype=torch.float64).expand(repeats, items)
    clean = w.unsqueeze(-1) - w.unsqueeze(-2)
    if kind == "logits":
        data = clean + 0.3 * skew(rng, clean.shape)
    else:
        wins = torch.binomial(torch.full_like(clean, 40), torch.sigmoid(clean), generator=rng).triu(1)
        data = wins + (40 - wins.mT).tril(-1)
    found = fastpref.bradley_terry(**{kind: data}, robust=robust, stderr=True)
    seen = found.scores.std(0)
    ratio = found.stderr.median(0).values / seen
    assert (ratio - 1).abs().max() < 0.25


# ---- doors ----


def test_bad_input():
    good = torch.zeros(3, 3)

    def message(kind, *words, **arguments):
        with pytest.raises(kind) as raised:
            fastpref.bradley_terry(**arguments)
        for word in words:
            assert word in str(raised.value)

    message(ValueError, "exactly one", "none")
    message(ValueError, "exactly one", "logits", "wins", logits=good, wins=good)
    message(TypeError, "logits", "list", logits=[[0.0]])
    message(TypeError, "logits", "int64", logits=good.long())
    message(ValueError, "logits", "[3, 4]", logits=torch.zeros(3, 4))
    message(ValueError, "logits", "finite", "[0, 1]", logits=torch.tensor([[0.0, math.inf], [-math.inf, 0.0]]))
    crooked = torch.zeros(2, 3, 3)
    crooked[1, 2, 0] = 1.0
    message(ValueError, "skew", "[2, 0]", "matrix 1", logits=crooked)
    one_sided = torch.zeros(3, 3)
    one_sided[0, 1] = torch.nan
    message(ValueError, "skew", "[1, 0]", logits=one_sided)
    message(ValueError, "wins", "negative", "-1", wins=-torch.ones(3, 3))
    message(ValueError, "outliers", "'all'", logits=good, outliers="all")
    message(ValueError, "tol", "-1", logits=good, tol=-1.0)
    message(ValueError, "max_iter", "0", logits=good, max_iter=0)
    message(ValueError, "backend", "'cuda'", logits=good, backend="cuda")
    i, j = torch.tensor([0, 1]), torch.tensor([1, 2])
    message(TypeError, "edges", "tuple", edges=(i, j))
    message(ValueError, "edges", "either", edges=Edges(i, j))
    message(ValueError, "edges.j", "[1]", edges=Edges(i, j[:1], logits=torch.zeros(2)))
    message(ValueError, "edges", "[0, 2)", "2", edges=Edges(i, j, logits=torch.zeros(2), num_items=2))
    message(ValueError, "edges.wins_i", edges=Edges(i, j, -torch.ones(2), torch.ones(2)))
    message(ValueError, "stderr", "4096", edges=Edges(i, j, logits=torch.zeros(2), num_items=5000), stderr=True)


def test_no_maximum_of_the_likelihood_warns():
    wins = torch.tensor([[0.0, 3, 3], [0, 0, 1], [0, 2, 0]])
    batch = torch.stack([wins, torch.ones(3, 3)])
    with pytest.warns(RuntimeWarning, match="1 matrices"):
        found = fastpref.bradley_terry(wins=batch, robust=False)
    assert found.scores.isfinite().all()
    assert found.scores[0].argmax() == 0
    assert found.scores[1].abs().max() < 1e-5
    with pytest.warns(RuntimeWarning, match="no maximum"):
        fastpref.bradley_terry(
            edges=Edges(torch.tensor([0]), torch.tensor([1]), torch.ones(1), torch.zeros(1)), robust=False
        )


def test_not_enough_iterations_is_said():
    _, logits = matrices(4, 20, 0.2)
    found = fastpref.bradley_terry(logits, max_iter=3)
    assert (found.info.iterations == 3).all()
    assert not found.info.converged.any()


def test_opcheck():
    data = matrices(2, 6, 0.1)[1].float()
    torch.library.opcheck(bradley_terry_fit, (data, False, True, 50, 1e-6, 0.01, ""))


def test_strides_and_half_precision():
    _, logits = matrices(4, 10, 0.1)
    wide = torch.randn(4, 10, 20, dtype=torch.float64)
    wide[..., ::2] = logits
    torch.testing.assert_close(fastpref.bradley_terry(wide[..., ::2]).scores, fastpref.bradley_terry(logits).scores)
    half = fastpref.bradley_terry(logits.bfloat16())
    assert half.scores.dtype == torch.float32
    torch.testing.assert_close(half.scores, fastpref.bradley_terry(logits.bfloat16().float()).scores)
    assert fastpref.bradley_terry(logits.view(2, 2, 10, 10)).info.scale.shape == (2, 2)
