"""Preference matrices: building, both orders, links, cleaning by every method, refusals, ordering."""

import math
import warnings

import pytest
import torch
from cases import quietly, scores_of

from fastpref._lowrank.curatron import ncrpca, optspace
from fastpref.preference_matrix import (
    NothingToClean,
    _fits,
    _table,
    apply_link,
    denoise,
    from_comparisons,
    from_scores,
    invert_link,
    order,
)

NAN = math.nan
LINKS = ("logit", "probit", "identity")
METHODS = ("bradley_terry", "rpca", "curatron")


def matrices(prompts, items, link="logit", corrupted=0.1, missing=0.0, seed=0, sd=1.0):
    """Scores, P with pairs inverted and missing, and which were inverted (upper triangle)."""
    g = torch.Generator().manual_seed(seed + 1)
    w = scores_of(prompts, items, seed, sd)
    p = invert_link(w.unsqueeze(-1) - w.unsqueeze(-2), link)
    shape = (prompts, items, items)
    wrong = (torch.rand(shape, generator=g) < corrupted).triu(1)
    gone = (torch.rand(shape, generator=g) < missing).triu(1)
    p = torch.where(wrong | wrong.mT, 1 - p, p).masked_fill(gone | gone.mT, NAN)
    upper = p.triu(1)
    return w, upper + (1 - upper).mT.tril(-1) + 0.5 * torch.eye(items, dtype=torch.float64), wrong & ~gone


def edges(prompts, items, votes, inverted=0.0, seed=0, sd=1.0):
    """Scores, Preferences of 3 N pairs per prompt, and which of its pairs were inverted."""
    g = torch.Generator().manual_seed(seed + 2)
    w = scores_of(prompts, items, seed, sd)
    i = torch.arange(items).repeat(3)
    j = (i + torch.tensor([1, 3, 7]).repeat_interleave(items)) % items
    i, j, prompt = i.repeat(prompts), j.repeat(prompts), torch.arange(prompts).repeat_interleave(3 * items)
    difference = w[prompt, i] - w[prompt, j]
    wrong = torch.rand(len(i), generator=g) < inverted
    p = torch.where(wrong, -difference, difference).sigmoid()
    wins = torch.binomial(votes * torch.ones_like(p), p, generator=g)
    table = from_comparisons(i, j, wins / votes * votes, votes=votes, prompt=prompt)
    key = (prompt * items + torch.minimum(i, j)) * items + torch.maximum(i, j)
    return w, table, wrong[key.argsort()]


def discordant(scores, w):
    ours = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    return float((ours * (w.unsqueeze(-1) - w.unsqueeze(-2)) < 0).double().mean())


# ---- from_scores ----


def test_scores_by_hand():
    scores = torch.tensor([[3.0, 1.0, 5.0], [2.0, 1.0, 7.0], [1.0, NAN, 6.0]])
    table = quietly(from_scores, scores)
    assert list(zip(table.i.tolist(), table.j.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]
    assert table.wins_i.tolist() == [1.5, 1, 2]
    assert table.wins_j.tolist() == [1.5, 1, 0]
    graded = quietly(from_scores, scores, temperature=2.0)
    sigmoid = [1 / (1 + math.exp(-d / 2)) for d in (1, 0, -2)]
    assert float(graded.wins_i[0]) == pytest.approx(sum(sigmoid), rel=1e-6)
    assert torch.equal(graded.wins_i + graded.wins_j, table.wins_i + table.wins_j)


def test_prompts_of_scores():
    scores = torch.randn(7, 5, 4, dtype=torch.float64) + 2 * torch.randn(7, 5, 1, dtype=torch.float64)
    scores[3, 2] = NAN
    table = quietly(from_scores, scores)
    alone = quietly(from_scores, scores[3])
    inside = table.prompt == 3
    assert int(inside.sum()) == 6  # of four items
    assert torch.equal(table.wins_i[inside], alone.wins_i)
    monotone = torch.stack([3 * scores[..., 0] - 1, scores[..., 1].exp(), *scores.unbind(-1)[2:]], -1)
    assert torch.equal(quietly(from_scores, monotone).wins_i, table.wins_i)


def test_one_score_column_is_refused():
    w = torch.randn(9, 1)
    for scores in (w, torch.cat([w, torch.full_like(w, 0.5)], 1), torch.cat([w, torch.full_like(w, NAN)], 1)):
        with pytest.raises(NothingToClean, match=r"scores has 1 score column\(s\) that vary of"):
            from_scores(scores)


def test_exchangeable_items_are_refused():
    refused = 0
    for seed in range(20):
        noise = torch.randn(60, 8, 5, generator=torch.Generator().manual_seed(seed))
        try:
            from_scores(noise)
        except NothingToClean as reason:
            refused += 1
            assert "exchangeable items" in str(reason)
    assert refused >= 15
    from_scores(noise + torch.randn(60, 8, 1))
    pooled = torch.randn(16, 300)  # 16 samples of one policy, over 300 prompts
    with pytest.raises(NothingToClean, match="Samples of one policy"):
        from_scores(torch.cat([pooled, -pooled], 1))


@pytest.mark.parametrize(("prompts", "items", "judges"), [(1, 33, 2), (3, 12, 2)])
def test_few_scores_are_not_refused(prompts, items, judges):
    doubted = 0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randn(prompts, items, 1, generator=g) + torch.randn(prompts, items, judges, generator=g)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            from_scores(scores)
        doubted += any("but are too few to tell: ranks that correlate" in str(warning.message) for warning in seen)
    assert 0 < doubted < 15


def test_bad_scores():
    with pytest.raises(ValueError, match=r"scores must have shape \[N, J\] or \[prompts, N, J\], got \[3\]"):
        from_scores(torch.zeros(3))
    with pytest.raises(ValueError, match=r"scores must be finite .* got inf at \[1, 0\]"):
        from_scores(torch.tensor([[0.0, 1.0], [math.inf, 2.0]]))
    for value in (None, "scores", [["a", "b"]], [[1, 2], [3]]):
        with pytest.raises(TypeError, match="scores must be a tensor or an array of numbers"):
            from_scores(value)
    with pytest.raises(ValueError, match="temperature must be positive"):
        from_scores(torch.randn(3, 2), temperature=0.0)
    with pytest.raises(NothingToClean):
        from_scores(torch.zeros(0, 4, 3))


def test_ratings_are_scores():
    ratings = torch.randint(1, 6, (30, 12, 1)) + torch.randint(0, 2, (30, 12, 3))
    found = from_scores(ratings.numpy())
    for ours, theirs in zip(found[:5], from_scores(ratings.double())[:5], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(order(ratings).ranks, order(ratings.double()).ranks)


def test_read_only_arrays():
    x = (torch.randn(60, 3) + 3 * torch.randn(60, 1)).numpy()
    x.setflags(write=False)
    table = from_scores(x)
    order(x)
    columns = [column.numpy() for column in (table.i, table.j, table.wins_i, table.wins_i + table.wins_j, table.prompt)]
    for column in columns:
        column.setflags(write=False)
    i, j, wins, votes, prompt = columns
    assert torch.equal(from_comparisons(i, j, wins, votes=votes, prompt=prompt).wins_i, table.wins_i)


# ---- links ----


@pytest.mark.parametrize("link", LINKS)
def test_links(link):
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    m = apply_link(p, link)
    torch.testing.assert_close(invert_link(m, link), p)
    torch.testing.assert_close(m, -apply_link(1 - p, link))
    assert (m.diff() > 0).all()
    assert apply_link(torch.tensor(0.5), link) == 0


# ---- denoise ----


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverted_pairs_are_found_and_masked(link, dtype):
    sd = 0.1 if link == "identity" else 1.0
    w, p, wrong = matrices(20, 24, link, corrupted=0.15, missing=0.2, sd=sd)
    p = p.to(dtype)
    found = denoise(p, link=link)
    assert found.info.method == "bradley_terry"
    assert found.info.converged.all()
    assert ((found.scores - w).norm(dim=1) / w.norm(dim=1)).median() < 1e-3
    listed = torch.zeros_like(wrong)
    listed[tuple(found.corrupted.indices.T)] = True
    visible = wrong & ((w.unsqueeze(-1) - w.unsqueeze(-2)).abs() > 0.05 * sd)  # 0.5 inverted is 0.5
    assert listed[visible].double().mean() > 0.99
    assert not (listed & ~wrong).any()
    both = listed | listed.mT
    assert torch.equal(found.probabilities.isnan(), p.isnan() | both)
    assert torch.equal(found.probabilities[~found.probabilities.isnan()], p[~found.probabilities.isnan()])
    assert found.probabilities.dtype == dtype
    b, i, j = found.corrupted.indices.T
    torch.testing.assert_close(found.corrupted.observed, p[b, i, j].double())
    truth = invert_link(w.unsqueeze(-1) - w.unsqueeze(-2), link)
    torch.testing.assert_close(found.corrupted.fitted, truth[b, i, j], rtol=0.01, atol=0.01)
    assert (found.corrupted.residual.abs() > 5).all()
    assert (found.corrupted.residual.abs().diff() <= 0).all()
    compared = (~p.isnan()).sum((-2, -1)) - 24
    torch.testing.assert_close(found.info.outlier_rate, listed.sum((-2, -1)) * 2 / compared.double())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("action", ["mask", "replace", "low_rank"])
def test_p_plus_its_transpose_is_one(method, link, action):
    _, p, _ = matrices(3, 24, link, 0.1, 0.2, sd=0.1 if link == "identity" else 1.0)
    for dtype in (torch.float64, torch.float32):
        found = quietly(denoise, p.to(dtype), link=link, method=method, action=action)
        out = found.probabilities
        assert torch.equal(out.isnan(), out.mT.isnan())
        off = (out + out.mT - 1).nan_to_num(0).abs().max()
        assert off <= torch.finfo(dtype).eps
        assert torch.equal(out.diagonal(dim1=-2, dim2=-1), torch.full((3, 24), 0.5, dtype=dtype))
        if action == "low_rank":
            assert not out.isnan().any()
            middle = apply_link(out.double().clamp(1e-9, 1 - 1e-9), link)
            if link != "identity" and dtype == torch.float64:
                s = torch.linalg.svdvals(middle)
                assert (s[:, 2] < 1e-5 * s[:, 0]).all()
        elif action == "replace":
            assert torch.equal(out.isnan(), p.isnan())
            untouched = torch.ones_like(out, dtype=torch.bool)
            b, i, j = found.corrupted.indices.T
            untouched[b, i, j] = untouched[b, j, i] = False
            assert torch.equal(out[untouched].nan_to_num(2), p.to(dtype)[untouched].nan_to_num(2))
            torch.testing.assert_close(out[b, i, j].double(), found.corrupted.fitted, rtol=1e-5, atol=1e-6)


def test_curatron_is_the_papers_pipeline():
    _, p, _ = matrices(4, 30, corrupted=0.1, missing=0.3)
    m = p.logit()
    m = (m - m.mT) / 2
    completed = optspace(m, 2).low_rank
    filled = torch.where(m.isnan(), (completed - completed.mT) / 2, m)
    low_rank = ncrpca(filled, 2, skew=True).low_rank
    found = denoise(p, method="curatron", action="low_rank")
    torch.testing.assert_close(found.probabilities, low_rank.sigmoid(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.scores, low_rank.mean(-1), rtol=1e-6, atol=1e-8)
    copeland = denoise(p, method="curatron", ranking="copeland").scores
    beaten = (low_rank.sigmoid() > 0.5).double()
    beaten.diagonal(dim1=-2, dim2=-1).zero_()
    assert torch.equal(copeland, beaten.sum(-1))


# error of L under the logit and share of discordant pairs, medians and means over 20 draws of an independent
# implementation: inverted pairs, nothing missing
@pytest.mark.parametrize(
    ("items", "corrupted", "curatron", "discordance"), [(20, 0.1, 0.097, 0.0024), (50, 0.2, 0.068, 0.004)]
)
def test_methods_on_the_protocol(items, corrupted, curatron, discordance):
    w, p, _ = matrices(20, items, corrupted=corrupted, seed=3)
    m = w.unsqueeze(-1) - w.unsqueeze(-2)

    def error(method):
        found = denoise(p, method=method, action="low_rank")
        off = torch.linalg.matrix_norm(found.probabilities.logit() - m) / torch.linalg.matrix_norm(m)
        return float(off.median()), discordant(found.scores, w)

    paper = error("curatron")
    assert 0.3 * curatron < paper[0] < 2 * curatron
    assert paper[1] < 3 * discordance + 0.002
    one_score = error("bradley_terry")
    assert one_score[0] < 1e-5
    assert one_score[1] == 0
    assert error("auto") == one_score


@pytest.mark.parametrize("ranking", ["row_mean", "copeland"])
def test_copeland_and_row_means_agree_where_all_is_clear(ranking):
    w, p, _ = matrices(5, 20)
    found = denoise(p, ranking=ranking)
    assert torch.equal(order(found).indices, w.argsort(dim=-1, descending=True))
    if ranking == "copeland":
        assert torch.equal(found.scores.sort(dim=-1).values, torch.arange(20.0).double().expand(5, -1))


def test_intransitive_preferences_need_a_higher_rank():
    """Logits of rank 4: two dimensions of skill, the second of which goes in circles."""
    g = torch.Generator().manual_seed(5)
    a, b, c = (torch.randn(4, 48, 1, generator=g, dtype=torch.float64) for _ in range(3))
    m = a - a.mT + b @ c.mT - c @ b.mT
    wrong = (torch.rand(m.shape, generator=g) < 0.05).triu(1)
    m = torch.where(wrong | wrong.mT, -m, m)
    p = m.sigmoid().triu(1)
    p = p + (1 - p).mT.tril(-1)
    p.diagonal(dim1=-2, dim2=-1).fill_(NAN)
    found = denoise(p, rank=4)
    assert found.info.method == "rpca"
    assert found.info.converged.all()
    listed = torch.zeros_like(wrong)
    listed[tuple(found.corrupted.indices.T)] = True
    assert listed[wrong & (m.abs() > 0.5)].double().mean() > 0.95
    assert not (listed & ~wrong).any()
    assert found.probabilities.diagonal(dim1=-2, dim2=-1).isnan().all()


def permuted(p, items):
    return p[..., items, :][..., items]


@pytest.mark.parametrize("method", METHODS)
def test_permutation_of_items(method):
    _, p, _ = matrices(3, 24, missing=0.1)
    items = torch.randperm(24)
    one = quietly(denoise, p, method=method)
    two = quietly(denoise, permuted(p, items), method=method)
    # the fits stop at a residual, from starts that depend on the order of the items
    torch.testing.assert_close(two.scores, one.scores[:, items], rtol=1e-4, atol=1e-4)
    differ = two.probabilities.isnan() != permuted(one.probabilities, items).isnan()
    assert differ.double().mean() < 0.005


def test_swapping_the_sides_negates():
    _, p, _ = matrices(3, 24, missing=0.1)
    one, two = denoise(p), denoise(p.mT.contiguous())
    torch.testing.assert_close(two.scores, -one.scores, rtol=1e-6, atol=1e-6)
    assert torch.equal(two.probabilities.isnan(), one.probabilities.isnan())


def test_batches_and_single_matrices():
    _, p, _ = matrices(6, 20)
    shaped = p.view(2, 3, 20, 20)
    found = denoise(shaped)
    assert found.probabilities.shape == (2, 3, 20, 20)
    assert found.scores.shape == (2, 3, 20)
    assert found.info.reason.shape == found.info.converged.shape == found.info.scale.shape == (2, 3)
    assert found.info.components.shape == (2, 3, 20)
    assert found.corrupted.indices.shape[1] == 4
    a, b, i, j = found.corrupted.indices.T
    assert found.probabilities[a, b, i, j].isnan().all()
    one = denoise(p[4].numpy())
    assert one.info.reason.shape == ()
    assert one.corrupted.indices.shape[1] == 2
    torch.testing.assert_close(one.scores, found.scores[1, 1])
    assert torch.equal(one.probabilities.isnan(), found.probabilities[1, 1].isnan())


def test_given_matrices_are_left_alone():
    _, p, _ = matrices(2, 20)
    before = p.clone()
    denoise(p)
    denoise(p, action="low_rank")
    assert torch.equal(p, before)


# ---- denoise on comparisons ----


def test_three_comparisons_per_item():
    w, table, wrong = edges(100, 16, votes=50, inverted=0.1)
    assert len(table.i) == 100 * 48
    found = denoise(table)
    assert found.info.method == "bradley_terry"
    assert found.probabilities.shape == (4800,)
    assert found.scores.shape == (100, 16)
    masked = found.probabilities.isnan()
    assert int(masked.sum()) == len(found.corrupted.indices)
    far = (w[table.prompt, table.i] - w[table.prompt, table.j]).abs() > 1.5
    assert masked[wrong & far].double().mean() > 0.8
    assert masked[~wrong].double().mean() < 0.05
    assert torch.equal(found.probabilities[~masked], table.probabilities()[~masked])
    raw = from_plain(table)
    assert discordant(found.scores, w) < 0.75 * discordant(raw, w)
    pairs = torch.stack([table.prompt, table.i, table.j], 1)[masked]
    listed = found.corrupted.indices
    assert torch.equal(pairs, listed[(listed * torch.tensor([16 * 16, 16, 1])).sum(1).argsort()])


def from_plain(table):
    """Mean win share per item."""
    p = table.dense()
    p.diagonal(dim1=-2, dim2=-1).fill_(NAN)
    return p.nanmean(-1)


def complete(prompts, items, votes, inverted):
    """Preferences of all pairs."""
    g = torch.Generator().manual_seed(6)
    w = scores_of(prompts, items)
    i, j = (index.repeat(prompts) for index in torch.triu_indices(items, items, 1))
    prompt = torch.arange(prompts).repeat_interleave(items * (items - 1) // 2)
    difference = w[prompt, i] - w[prompt, j]
    p = torch.where(torch.rand(len(i), generator=g) < inverted, -difference, difference).sigmoid()
    return from_comparisons(
        i, j, torch.binomial(votes * torch.ones_like(p), p, generator=g), votes=votes, prompt=prompt
    )


@pytest.mark.parametrize("options", [{}, {"link": "probit"}, {"method": "rpca"}])
def test_large_prompts_are_solved_as_edges(monkeypatch, options):
    table = complete(3, 40, 200, 0.03) if "method" in options else edges(4, 40, votes=20, inverted=0.1)[1]
    dense = quietly(denoise, table, **options)
    monkeypatch.setattr(_table, "SMALL_ITEMS", 8)
    single = quietly(denoise, table, **options)
    tolerance = 0.05 if "method" in options else 1e-4  # rpca has a solver of its own for one large matrix
    torch.testing.assert_close(single.scores, dense.scores, rtol=0, atol=tolerance)
    if "method" not in options:
        assert torch.equal(single.probabilities.isnan(), dense.probabilities.isnan())
    for module in (_table, _fits):
        monkeypatch.setattr(module, "CHUNK", 1)
    again = quietly(denoise, table, **options, ranking="copeland")
    assert discordant(again.scores, single.scores) < 0.02


def test_many_items():
    w, table, wrong = edges(1, 3000, votes=30, inverted=0.05)
    found = denoise(table)
    far = (w[0, table.i] - w[0, table.j]).abs() > 2
    assert found.probabilities.isnan()[wrong & far].double().mean() > 0.8
    assert int(found.info.components.max()) == 0


@pytest.mark.parametrize("link", LINKS)
def test_links_on_votes(link):
    w, table, _ = edges(50, 16, votes=30, inverted=0.05, sd=0.7)
    found = denoise(table, link=link)
    assert discordant(found.scores, w) < 0.1
    replaced = denoise(table, link=link, action="replace")
    assert not replaced.probabilities.isnan().any()
    assert ((replaced.probabilities >= 0) & (replaced.probabilities <= 1)).all()
    whole = denoise(table, link=link, action="low_rank").probabilities
    difference = found.scores[table.prompt, table.i] - found.scores[table.prompt, table.j]
    torch.testing.assert_close(whole, invert_link(difference, link))


def test_smoothing_and_clamping():
    i, j = torch.triu_indices(24, 24, 1)
    w = scores_of(1, 24)[0]
    wins = torch.where(w[i] > w[j], 9.0, 1.0)
    wins[::7] = 0
    table = from_comparisons(i, j, wins, votes=10)
    for smoothing, clamp in ((0.5, None), (0.0, None), (0.0, 0.1), (2.0, None)):
        found = denoise(table, method="rpca", smoothing=smoothing, clamp=clamp)
        p = table.probabilities(smoothing)
        least = 1 / 22 if clamp is None else clamp
        m = p.clamp(least, 1 - least).logit()
        assert m.isfinite().all()
        fitted = denoise(table, method="rpca", smoothing=smoothing, clamp=clamp, action="low_rank").probabilities
        residual = (m - fitted.logit()).abs()
        edge = math.log((1 - least) / least) * (1 - 1e-9)
        residual[(m.abs() >= edge) & (fitted.logit() * m.sign() > m.abs())] = 0  # unanimous, and the fit says more
        scale = 1.4826 * residual.sort().values[(len(m) - 1) // 2]
        torch.testing.assert_close(found.info.scale[0], scale, rtol=1e-5, atol=1e-7)


def test_items_without_comparisons_and_components():
    _, table, _ = edges(1, 16, votes=50)
    i, j, won = torch.cat([table.i, table.i + 16]), torch.cat([table.j, table.j + 16]), table.wins_i.repeat(2)
    two = from_comparisons(i, j, won, votes=50, num_items=33)
    with pytest.warns(RuntimeWarning, match="1 of 1 comparison graphs fall into several components"):
        found = denoise(two)
    assert found.scores.isnan().nonzero().tolist() == [[0, 32]]
    assert len(found.info.components.unique()) == 3
    torch.testing.assert_close(found.scores[0, :16], found.scores[0, 16:32], rtol=1e-5, atol=1e-6)
    dense = quietly(denoise, two.dense(), action="low_rank").probabilities[0]
    assert dense[:16, 16:].isnan().all()
    assert dense[32, :32].isnan().all()
    assert not dense[:16, :16].isnan().any()
    copeland = quietly(denoise, two, ranking="copeland").scores[0]
    assert copeland[:32].max() == 15
    assert copeland[32].isnan()


# ---- refusals ----


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["auto", "rpca"])
def test_one_score_has_nothing_to_clean(link, dtype, method):
    w, p, _ = matrices(5, 24, link, corrupted=0.0, sd={"logit": 2.0, "probit": 1.0, "identity": 0.1}[link])
    with pytest.raises(NothingToClean, match="in any of its 5 matrices; 5 of them: one score column explains"):
        denoise(p.to(dtype), link=link, method=method)
    graded = from_scores(torch.stack([w[0], w[0] + 1], -1), temperature=1.0)
    with pytest.raises(NothingToClean, match="one score column explains"):
        denoise(graded)


def test_a_forest_has_nothing_to_clean():
    i = torch.arange(9)
    wins = torch.randint(0, 3, (9,))  # of 10: no draw of these looks like coin tosses, which would be warned of
    chain = from_comparisons(i, i + 1, wins, votes=10)
    with pytest.raises(NothingToClean, match="no cycle of comparisons"):
        denoise(chain)
    with pytest.raises(NothingToClean, match="no cycle of comparisons"):
        denoise(chain.dense())
    for shape in ((0, 5, 5), (3, 0, 0), (2, 1, 1)):
        empty = torch.full(shape, 0.5)
        if shape[0] == 0:
            assert denoise(empty).probabilities.shape == shape
        else:
            with pytest.raises(NothingToClean):
                denoise(empty)


@pytest.mark.filterwarnings("ignore:a ridge of .* rules the scores:RuntimeWarning")
def test_an_order_has_nothing_to_clean():
    i, j = torch.triu_indices(12, 12, 1)
    place = torch.randperm(12)
    wins = (place[i] < place[j]).long()
    with pytest.raises(NothingToClean, match="every pair is unanimous"):
        denoise(from_comparisons(i, j, wins))
    wins[int(torch.where((i == 0) & (j == 1))[0])] ^= 1
    far = int(torch.where((place[i] - place[j]).abs() == 11)[0])
    wins[far] ^= 1  # the last beats the first
    table = from_comparisons(i, j, wins)
    with pytest.warns(RuntimeWarning, match="so few votes that no outcome of theirs is 5 standard deviations off"):
        denoise(table)


def test_coin_tosses_are_refused():
    refused = 0
    for seed in range(20):
        _, table, _ = edges(20, 16, votes=3, sd=0.0, seed=seed)
        try:
            quietly(denoise, table)
        except NothingToClean as reason:
            refused += 1
            assert "do not differ from coin tosses" in str(reason)
    assert refused >= 15


@pytest.mark.parametrize(("prompts", "items", "sd"), [(3, 12, 1.0), (1, 33, 0.7), (10, 10, 0.5)])
def test_few_votes_are_not_refused(prompts, items, sd):
    doubted = 0
    for seed in range(10):
        _, table, _ = edges(prompts, items, votes=1, inverted=0.1, seed=seed, sd=sd)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            denoise(table)
        doubted += any("but are too few to tell: scores with" in str(warning.message) for warning in seen)
    assert 0 < doubted < 10


def test_mixed_batches_keep_what_has_nothing_to_clean():
    _, clean, _ = matrices(2, 20, corrupted=0.0)
    _, dirty, _ = matrices(2, 20)
    star = torch.full((20, 20), NAN, dtype=torch.float64)
    star[0, 1:], star[1:, 0] = 0.7, 0.3
    p = torch.stack([dirty[0], clean[0], star, dirty[1]])
    for action in ("mask", "replace", "low_rank"):
        found = denoise(p, action=action)
        assert found.info.reason.tolist() == [0, 2, 1, 0]
        for b in (1, 2):
            torch.testing.assert_close(found.probabilities[b], p[b], rtol=0, atol=0, equal_nan=True)
        assert set(found.corrupted.indices[:, 0].tolist()) == {0, 3}
        assert found.info.outlier_rate[1] == 0


def test_bad_matrices():
    _, p, _ = matrices(2, 8)
    with pytest.raises(
        ValueError, match=r"preferences must have shape \[..., N, N\], or be Preferences, got \[2, 8, 7\]"
    ):
        denoise(p[..., :7])
    for value in (None, "abc", [["a"]]):
        with pytest.raises(TypeError, match="preferences must be a tensor or an array of numbers"):
            denoise(value)
    for value in (1.5, -0.1, math.inf):
        wrong = p.clone()
        wrong[1, 2, 3] = value
        with pytest.raises(ValueError, match=rf"preferences must lie between 0 and 1 .* got {value} at \[1, 2, 3\]"):
            denoise(wrong)
    wrong = p.clone()
    wrong[1, 4, 4] = 1
    with pytest.raises(ValueError, match=r"preferences must have 1/2 or NaN on the diagonal, got 1.0 at \[1, 4, 4\]"):
        denoise(wrong)
    for i, j, value in ((2, 3, NAN), (2, 3, 0.987654)):
        wrong = p.clone()
        wrong[1, i, j] = value
        with pytest.raises(ValueError, match=r"P\[i, j\] \+ P\[j, i\] = 1.*two presentation orders, pass both to"):
            denoise(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"link": "log"}, "link must be one of"),
        ({"method": "svd"}, "method must be one of"),
        ({"action": "drop"}, "action must be one of"),
        ({"ranking": "borda"}, "ranking must be one of"),
        ({"rank": 3}, "rank must be even, and 2 for method='bradley_terry', got 3"),
        ({"rank": 4, "method": "bradley_terry"}, "rank must be even, and 2 for"),
        ({"rank": 12}, "rank must be at most the number of items, 8, got 12"),
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"smoothing": -1.0}, "smoothing must be >= 0 and finite, got -1.0"),
        ({"clamp": 0.5}, "clamp must lie between 0 and 0.5, got 0.5"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_options(options, message):
    _, p, _ = matrices(2, 8)
    with pytest.raises(ValueError, match=message):
        quietly(denoise, p, **options)


def test_preferences_put_together_by_hand():
    _, table, _ = edges(2, 16, votes=10)
    for wrong in (
        table._replace(prompt=table.prompt.flip(0)),
        table._replace(i=table.j, j=table.i),
        table._replace(j=table.j + 16),
        table._replace(num_prompts=1),
        type(table)(*(torch.cat([column, column[-1:]]) for column in table[:5]), 2, 16),
    ):
        with pytest.raises(ValueError, match="preferences must list every pair once"):
            denoise(wrong)
    for wins in (-table.wins_i, table.wins_i * NAN, table.wins_i + math.inf):
        with pytest.raises(ValueError, match="preferences must have finite wins_i and wins_j"):
            denoise(table._replace(wins_i=wins))


@pytest.mark.parametrize("option", ["threshold", "smoothing", "clamp"])
def test_options_are_numbers(option):
    with pytest.raises(TypeError, match=f"{option} must be a .*, got str"):
        denoise(torch.eye(3), **{option: "0.1"})


@pytest.mark.parametrize("convert", [torch.Tensor.float, torch.Tensor.int, torch.Tensor.numpy, torch.Tensor.tolist])
def test_preferences_in_other_types(convert):
    _, table, _ = edges(2, 16, votes=10)
    expected = denoise(table)
    found = denoise(table._replace(**{name: convert(getattr(table, name)) for name in ("wins_i", "wins_j")}))
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)
    places = torch.Tensor.int if convert is torch.Tensor.float else convert
    found = denoise(table._replace(**{name: places(getattr(table, name)) for name in ("prompt", "i", "j")}))
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)


def test_preferences_with_wrong_columns():
    _, table, _ = edges(2, 16, votes=10)
    for wrong, error, message in (
        ({"j": table.j[:-1]}, ValueError, r"preferences\.j must have shape \[96\], got \[95\]"),
        ({"wins_j": table.wins_j[1:]}, ValueError, r"preferences\.wins_j must have shape \[96\] like i, got \[95\]"),
        ({"prompt": None}, TypeError, r"preferences\.prompt must be a tensor or an array of numbers, got NoneType"),
        ({"i": table.i + 0.5}, TypeError, r"preferences\.i must be integers, got torch.float32"),
        ({"num_items": 16.0}, TypeError, r"preferences\.num_items must be an int >= 0, got float"),
    ):
        with pytest.raises(error, match=message):
            denoise(table._replace(**wrong))


def test_integers_are_probabilities():
    with pytest.raises(ValueError, match=r"preferences must have 1/2 or NaN on the diagonal, got 0.0 at \[0, 0\]"):
        denoise([[0, 1], [0, 0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_matrices(dtype):
    w, p, wrong = matrices(5, 24)
    p = p.to(dtype)
    found = denoise(p)
    assert found.probabilities.dtype == dtype
    listed = torch.zeros_like(wrong)
    listed[tuple(found.corrupted.indices.T)] = True
    assert listed[wrong & ((w.unsqueeze(-1) - w.unsqueeze(-2)).abs() > 1)].double().mean() > 0.9
    assert ((found.scores - w).norm(dim=1) / w.norm(dim=1)).max() < 0.02


def test_warnings_say_what_to_do():
    _, p, _ = matrices(4, 8)
    with pytest.warns(RuntimeWarning, match="hardly denoises 8 items.*method='bradley_terry'"):
        denoise(p, method="curatron")
    _, table, _ = edges(2, 30, votes=10)
    with pytest.warns(RuntimeWarning, match=r"has 3\.0 N pairs of N items, and needs some 8 N.*method='bradley_terry'"):
        denoise(table, method="rpca")
    i, j = torch.triu_indices(40, 40, 1)
    rock_paper_scissors = torch.where((j - i) % 3 == 0, 0.5, torch.where((j - i) % 3 == 1, 0.98, 0.02))
    rock_paper_scissors = torch.where(torch.rand(len(i)) < 0.5, 0.5, rock_paper_scissors)
    table = from_comparisons(i, j, (rock_paper_scissors * 60).round(), votes=60)
    with pytest.warns(RuntimeWarning, match="preferences may be intransitive; try rank=4"):
        denoise(table)


# ---- order ----


def test_order_and_ties():
    found = order(torch.tensor([0.3, NAN, 1.0, 0.3, -2.0, 1.0, 0.3]))
    assert found.indices.tolist() == [2, 5, 0, 3, 6, 4, 1]
    assert found.ranks.tolist() == [3, -1, 1, 3, 6, 1, 3]
    assert found.tied.tolist() == [True, False, True, True, False, True, True]


def test_order_of_several_components():
    i, j = [0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 5, 3]
    table = from_comparisons(i, j, [9, 8, 3, 9, 7, 2], votes=10, num_items=7)
    found = quietly(denoise, table)
    assert found.info.components[0, :6].tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.warns(RuntimeWarning, match="scores of 1 comparison graph.* several components"):
        order(found)
    order(quietly(denoise, from_comparisons(i[:3], j[:3], [9, 8, 3], votes=10, num_items=4)))  # an item without any


def test_types_of_order():
    with pytest.raises(TypeError, match="tolerance must be a number, got str"):
        order([1.0, 2.0], tolerance="a")
    with pytest.raises(TypeError, match="scores must be a tensor or an array of numbers, got list"):
        order(["a"])


def test_order_tolerance():
    scores = torch.tensor([1.0, 1.05, 2.0, 1.11])
    assert order(scores).tied.sum() == 0
    chain = order(scores, tolerance=0.07)
    assert chain.tied.tolist() == [True, True, False, True]
    assert chain.indices.tolist() == [2, 0, 1, 3]
    assert chain.ranks.tolist() == [2, 2, 1, 2]
    rounded = torch.tensor([1.0, 1.0 + 1e-12, 5.0], dtype=torch.float64)
    assert order(rounded).tied.tolist() == [True, True, False]
    assert order(rounded, tolerance=0.0).tied.tolist() == [False, False, False]


def test_order_of_batches_is_a_permutation():
    scores = torch.randint(0, 5, (4, 3, 17)).double().masked_fill(torch.rand(4, 3, 17) < 0.1, NAN)
    found = order(scores.numpy())
    assert torch.equal(found.indices.sort(-1).values, torch.arange(17).expand(4, 3, 17))
    along = scores.gather(-1, found.indices)
    assert ((along.diff(dim=-1) <= 0) | along[..., 1:].isnan()).all()
    for b in range(4):
        for c in range(3):
            row, one = scores[b, c], order(scores[b, c])
            for n in range(17):
                expected = -1 if row[n].isnan() else 1 + int((row > row[n]).sum())
                assert int(found.ranks[b, c, n]) == int(one.ranks[n]) == expected
                assert bool(found.tied[b, c, n]) == (int((row == row[n]).sum()) > 1)


def test_order_of_nothing():
    assert order(torch.zeros(3, 0)).indices.shape == (3, 0)
    assert order(torch.full((2,), NAN)).ranks.tolist() == [-1, -1]
    assert order(torch.tensor([4.0])).ranks.tolist() == [1]
    with pytest.raises(ValueError, match="scores must be finite"):
        order(torch.tensor([math.inf]))
    with pytest.raises(ValueError, match=r"scores must have shape \[..., N\], got \[\]"):
        order(torch.tensor(1.0))
    with pytest.raises(ValueError, match="tolerance must be >= 0"):
        order(torch.zeros(3), tolerance=-1.0)


def test_order_of_a_denoised_batch():
    w, p, _ = matrices(3, 20)
    assert torch.equal(order(denoise(p)).indices, w.argsort(dim=-1, descending=True))
