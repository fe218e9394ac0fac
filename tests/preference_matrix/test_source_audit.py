"""The audit of sources: planted ones, leave-one-out against plain SVDs, invariance, and what it refuses."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpref.preference_matrix import NothingToClean, audit_sources, denoise_scores
from fastpref.preference_matrix import _sources as source_audit

EXAMPLE = Path(__file__).parents[2] / "examples" / "source_audit.py"
NAN = float("nan")


def sources_matrix(prompts=300, sources=40, planted=(5, 17), rank=3, noise=0.8, seed=0):
    """[prompts, sources] float64: rank-3 structure with noise, and planted columns of their own."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(prompts, rank, generator=g, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.7][:rank])
    loadings = torch.randn(rank, sources, generator=g, dtype=torch.float64)
    loadings[0] = 1 + 0.3 * loadings[0]  # all sources have something in common
    x = x @ loadings
    x += noise * torch.randn(prompts, sources, generator=g, dtype=torch.float64)
    for column in planted:
        x[:, column] = 2 * torch.randn(prompts, generator=g, dtype=torch.float64) + 3
    return x


def one_by_one(x, rank):
    """The definition: an SVD without each column."""
    x = x - x.mean(0)
    shares = []
    for s in range(x.shape[1]):
        others = torch.cat([x[:, :s], x[:, s + 1 :]], 1)
        basis = torch.linalg.svd(others, full_matrices=False).U[:, :rank]
        left = x[:, s] - basis @ (basis.mT @ x[:, s])
        shares.append(left.square().sum() / x[:, s].square().sum())
    return torch.stack(shares)


@pytest.mark.parametrize("seed", range(5))
def test_planted_sources_are_first(seed):
    audit = audit_sources(sources_matrix(seed=seed))
    assert set(audit.order[:2].tolist()) == {5, 17}
    assert set(audit.flagged.nonzero().flatten().tolist()) >= {5, 17}
    assert audit.flagged.sum() <= 8
    assert (audit.low <= audit.outlyingness).all()
    assert (audit.outlyingness <= audit.high).all()
    assert audit.rank == 3
    assert (audit.outlyingness[audit.order].diff() <= 0).all()
    z = (audit.outlyingness - audit.outlyingness.median()) / audit.z
    assert z[audit.z != 0].std() < 1e-9  # one scale for all


@pytest.mark.cuda
@pytest.mark.numerics
def test_an_audit_on_a_gpu_is_the_cpus():
    scores = sources_matrix()
    expected, found = (audit_sources(scores.to(place)) for place in ("cpu", "cuda"))
    assert (torch.as_tensor(found.flagged).cpu() == torch.as_tensor(expected.flagged)).all()
    torch.testing.assert_close(torch.as_tensor(found.outlyingness).cpu(), torch.as_tensor(expected.outlyingness))


@pytest.mark.parametrize(
    ("prompts", "sources", "rank"), [(200, 30, 1), (200, 30, 3), (60, 75, 3), (130, 12, 10), (60, 60, 5)]
)
def test_downdates_equal_one_svd_per_source(prompts, sources, rank):
    x = sources_matrix(prompts, sources, planted=(3,), seed=int(torch.randint(1 << 30, ())))
    share, low, _ = source_audit._outlyingness(x, rank, 0, 0.9, 0)
    torch.testing.assert_close(share, one_by_one(x, rank), rtol=1e-9, atol=1e-9)
    assert low.isnan().all()


def test_downdates_of_tied_and_missing_directions():
    """Twice the same block, columns twice, and a column outside all others: eigenvalues that coincide, and c = 0."""
    block = torch.linalg.qr(torch.randn(100, 8, dtype=torch.float64)).Q
    block = block - block.mean(0)
    zero = torch.zeros_like(block)
    x = torch.cat([torch.cat([block, zero]), torch.cat([zero, 1.0 * block])], 1)
    x = torch.cat([x, x[:, :3], x[:, 8:11]], 1)
    x = torch.cat([x, torch.cat([torch.ones(100), -torch.ones(100)]).double().unsqueeze(1)], 1)
    share = source_audit._outlyingness(x, 3, 0, 0.9, 0)[0]
    assert share.isfinite().all()
    assert ((share > -1e-9) & (share < 1 + 1e-9)).all()
    assert share[-1] > 1 - 1e-9  # orthogonal to every other column
    # five equal directions: only two of the other four are in the structure, and none is like the column
    equal = source_audit._outlyingness(block[:, :5], 2, 0, 0.9, 0)[0]
    torch.testing.assert_close(equal, one_by_one(block[:, :5], 2))


def test_distinct_small_case_by_hand():
    """Others all along one direction: the share left is the sine squared of the angle to it."""
    t = torch.randn(200, dtype=torch.float64)
    u = torch.randn(200, dtype=torch.float64)
    t, u = t - t.mean(), u - u.mean()
    u = u - t * (t @ u) / (t @ t)
    t, u = t / t.norm(), u / u.norm()
    x = torch.stack([t, 2 * t, 3 * t, 0.6 * t + 0.8 * u], 1)
    audit = audit_sources(x, 1, resamples=0)
    torch.testing.assert_close(audit.outlyingness[3], torch.tensor(0.64, dtype=torch.float64))
    assert int(audit.order[0]) == 3


def test_invariance():
    x = sources_matrix()
    audit = audit_sources(x)
    columns = torch.randperm(40)
    permuted = audit_sources(x[:, columns])
    for field in ("outlyingness", "z", "low", "high"):
        torch.testing.assert_close(getattr(permuted, field), getattr(audit, field)[columns])
    rows = audit_sources(x[torch.randperm(300)])
    torch.testing.assert_close(rows.outlyingness, audit.outlyingness)
    moved = audit_sources(3 * x + torch.randn(40, dtype=torch.float64))
    torch.testing.assert_close(moved.outlyingness, audit.outlyingness)
    again = audit_sources(x.numpy())
    assert torch.equal(again.low, audit.low)
    single = audit_sources(x.float())
    torch.testing.assert_close(single.outlyingness, audit.outlyingness, rtol=1e-4, atol=1e-4)


def test_interval_covers_the_sampling_of_prompts():
    """Of 40 audits of fresh prompts, the 90 % interval holds the value of very many prompts most of the time."""
    big = sources_matrix(8000, 20, seed=1)
    truth = audit_sources(big, resamples=0).outlyingness
    inside = []
    for k in range(40):
        part = audit_sources(big[k * 200 : (k + 1) * 200], seed=k)
        inside.append(((part.low <= truth) & (truth <= part.high)).double())
    assert 0.75 < torch.stack(inside).mean() < 0.97


def test_intervals_are_shares():
    audit = audit_sources(torch.cat([sources_matrix(100, 20), torch.randn(100, 4, dtype=torch.float64)], 1))
    assert (audit.low >= 0).all() and (audit.high <= 1).all() and audit.high.max() > 0.9


def test_constant_columns_are_set_apart():
    x = sources_matrix()
    x[:, 9] = 0.5
    x[:100, 9] = NAN
    x[:, 11] = NAN
    x[5:, 12] = NAN
    audit = audit_sources(x)
    assert audit.reference.nonzero().flatten().tolist() == [9]
    assert audit.outlyingness.isnan().nonzero().flatten().tolist() == [9, 11, 12]
    assert audit.order[-3:].tolist() == [9, 11, 12]
    assert audit.observed[[9, 11, 12]].tolist() == [200, 0, 5]
    assert not audit.flagged[[9, 11, 12]].any()
    others = [s for s in range(40) if s not in (9, 11, 12)]
    torch.testing.assert_close(audit.outlyingness[others], audit_sources(x[:, others]).outlyingness)


@pytest.mark.parametrize("missing", [0.02, 0.2])
def test_missing_entries(missing):
    x = sources_matrix()
    complete = audit_sources(x)
    holed = x.masked_fill(torch.rand(x.shape) < missing, NAN)
    audit = audit_sources(holed)
    assert set(audit.order[:2].tolist()) == {5, 17}
    assert (audit.outlyingness - complete.outlyingness).abs().max() < 0.5 * missing**0.5 + 0.02
    assert torch.equal(audit.observed, (~holed.isnan()).sum(0))


def test_thousands_of_sources_take_one_decomposition(monkeypatch):
    calls = []
    for name in ("eigh", "svd", "svdvals", "eigvalsh"):
        plain = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *a, plain=plain, name=name, **k: calls.append(name) or plain(*a, **k)
        )
    audit = audit_sources(sources_matrix(150, 2500, planted=(7, 2100)), resamples=20)
    assert set(audit.order[:2].tolist()) == {7, 2100}
    assert calls == ["eigh"]


def test_few_prompts_warn():
    with pytest.warns(RuntimeWarning, match="scores has 60 prompts"):
        audit_sources(sources_matrix(60))


def test_exchangeable_columns_are_refused():
    refused = 0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(200, 1, generator=g) + torch.randn(200, 16, generator=g) * torch.rand(200, 1, generator=g)
        try:
            audit_sources(x)
        except NothingToClean as reason:
            refused += 1
            assert "scores has exchangeable sources" in str(reason)
            assert "samples of one policy" in str(reason)
    assert refused >= 17
    x[:, 0] += 1  # one policy of another quality is reason enough
    audit_sources(x)


@pytest.mark.parametrize("columns", [0, 1])
def test_one_column_is_refused(columns):
    x = torch.zeros(200, 3)
    x[:, :columns] = torch.randn(200, columns)
    for call in (audit_sources, denoise_scores):
        with pytest.raises(NothingToClean, match=rf"scores has {columns} column\(s\) that vary of 3"):
            call(x)


@pytest.mark.parametrize("call", [audit_sources, denoise_scores])
def test_bad_input(call):
    x = sources_matrix()
    with pytest.raises(ValueError, match=r"scores must have shape \[prompts, sources\], got \[2, 3, 4\]"):
        call(torch.zeros(2, 3, 4))
    for value in (None, "scores", [["a", "b"]]):
        with pytest.raises(TypeError, match="scores must be a tensor or an array of numbers"):
            call(value)
    x[3, 4] = -torch.inf
    with pytest.raises(ValueError, match=r"scores must be finite \(NaN: missing\), got -inf at \[3, 4\]"):
        call(x)
    with pytest.raises(ValueError, match="threshold must be positive"):
        call(sources_matrix(), threshold=-1.0)
    with pytest.raises(NothingToClean):
        call(torch.zeros(0, 5))
    with pytest.raises(NothingToClean):
        call(torch.zeros(5, 0))


def test_bad_options():
    x = sources_matrix()
    with pytest.raises(ValueError, match="rank must be at most the number of audited sources - 2, got rank=39 for 40"):
        audit_sources(x, 39)
    with pytest.raises(TypeError, match="rank must be a positive int"):
        audit_sources(x, 2.0)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 1"):
        audit_sources(x, confidence=1)
    for option in ("confidence", "seed"):
        with pytest.raises(TypeError, match=f"{option} must be a.* got str"):
            audit_sources(x, **{option: "a"})
    with pytest.raises(ValueError, match="resamples must be >= 0, got -1"):
        audit_sources(x, resamples=-1)
    with pytest.raises(ValueError, match="rank must be at most"):
        audit_sources(torch.randn(200, 2) + torch.tensor([0.0, 5.0]))
    with pytest.raises(ValueError, match="action must be one of"):
        denoise_scores(x, action="overwrite")
    with pytest.raises(TypeError, match="rank must be a positive int, got float"):
        denoise_scores(x, rank=2.0)


@pytest.mark.parametrize("call", [audit_sources, denoise_scores])
def test_ratings_are_scores(call):
    x = (2 * sources_matrix(noise=0.3)).round()
    for ours, theirs in zip(call(x.int().numpy()), call(x), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


# ---- single wrong scores ----


def flipped(seed):
    x = sources_matrix(400, 40, planted=(), noise=0.25, seed=seed) - 6  # most are bad: a flip makes the best
    g = torch.Generator().manual_seed(seed + 100)
    wrong = torch.rand(x.shape, generator=g) < 0.05
    return x, torch.where(wrong, -x, x), wrong


@pytest.mark.parametrize("seed", range(3))
def test_masking_keeps_the_best_response_where_the_fit_does_not(seed):
    clean, dirty, wrong = flipped(seed)
    best = clean.argmax(1)
    masked = denoise_scores(dirty)
    fit = denoise_scores(dirty, action="low_rank").scores
    raw = (dirty.argmax(1) == best).double().mean()
    kept = (masked.scores.nan_to_num(nan=-torch.inf).argmax(1) == best).double().mean()
    of_fit = (fit.argmax(1) == best).double().mean()
    assert kept > raw + 0.1
    assert kept > of_fit
    flagged = torch.zeros_like(wrong)
    flagged[masked.corrupted[:, 0], masked.corrupted[:, 1]] = True
    assert torch.equal(flagged, masked.scores.isnan())
    assert torch.equal(masked.scores[~flagged], dirty[~flagged])
    visible = wrong & (clean.abs() > 2)  # a small number with the other sign is the same number
    assert flagged[visible].double().mean() > 0.9
    assert wrong[flagged].double().mean() > 0.9
    assert (masked.residual.abs() > 5).all()
    assert (masked.residual.abs().diff() <= 0).all()
    replaced = denoise_scores(dirty, action="replace").scores
    assert torch.equal(replaced[~flagged], dirty[~flagged])
    torch.testing.assert_close(replaced[flagged], fit[flagged])


def test_low_noise_is_not_flagged_by_the_column():
    flagged, false = [], []
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(120, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 8, generator=g, dtype=torch.float64)
        x = x + torch.randn(8, generator=g) + 0.01 * torch.randn(x.shape, generator=g)
        x[5, 1] += 50
        found = denoise_scores(x).corrupted.tolist()
        flagged.append(found[0] == [5, 1])
        false.append(len(found) - 1)
    assert all(flagged)
    assert max(false) < 30  # half a column where the offsets stay those of the medians


def test_masking_beside_missing_and_constant_columns():
    _, dirty, _ = flipped(0)
    dirty = dirty.float()
    dirty[:, 3] = 0.5
    dirty[torch.rand(dirty.shape) < 0.1] = NAN
    found = denoise_scores(dirty)
    assert found.scores.dtype == torch.float32
    assert (found.corrupted[:, 1] != 3).all()
    at = found.corrupted[:, 0], found.corrupted[:, 1]
    assert not dirty[at].isnan().any()
    assert torch.equal(found.scores.isnan().sum(), dirty.isnan().sum() + len(found.corrupted))


@pytest.mark.parametrize("columns", [3, 4, 5])
def test_the_rank_leaves_something_to_compare(columns):
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(120, 1, generator=g) * torch.tensor([1.0, -2.0, 1.5, 3.0, -1.0])[:columns]
    x += 0.1 * torch.randn(x.shape, generator=g)
    x[7, 1] += 50
    x = torch.cat([x, torch.full((120, 1), 0.5)], 1)  # a constant one does not count
    for rank in (columns - 1, columns):
        message = f"rank must be at most {columns - 2}, .* got {rank} for 120 prompts and {columns} such sources"
        with pytest.raises(ValueError, match=message):
            denoise_scores(x, rank=rank)
    assert [7, 1] in denoise_scores(x).corrupted.tolist()
    with pytest.raises(ValueError, match=r"rank must be at most 0, .* got 1 for 120 prompts and 2 such sources"):
        denoise_scores(x[:, [0, 1, -1]])


# ---- the example ----


def run_example(path, *options):
    return subprocess.run(
        [sys.executable, str(EXAMPLE), str(path), *options], cwd=path.parent, capture_output=True, text=True
    )


def ranked(output):
    """Names in the table, by place."""
    return re.findall(r"^ +\d+ (\S+)", output, re.MULTILINE)


def test_example(tmp_path):
    x = sources_matrix(150, 20, planted=(4, 11)).numpy()
    p = 1 / (1 + np.exp(-x))
    p[:, 2] = 0.5
    names = [f"model-{s:02}" for s in range(20)]
    path = tmp_path / "samples.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for number, row in enumerate(p):
            kept = [s for s in range(20) if (number + s) % 17]
            line = {"prompt": "?", "models": [names[s] for s in kept], "win_prob": [float(row[s]) for s in kept]}
            file.write(json.dumps(line) + "\n")
    result = run_example(path)
    assert result.returncode == 0, result.stderr
    assert "150 prompts, 20 sources, structure of rank 3" in result.stdout
    assert "set apart, the same score everywhere: model-02" in result.stdout
    table = ranked(result.stdout)
    assert set(table[:2]) == {"model-04", "model-11"}
    assert len(table) == 8


@pytest.mark.skipif("FASTPREF_SCORED_SAMPLES" not in os.environ, reason="FASTPREF_SCORED_SAMPLES names no file")
def test_real_scores():
    """On AlpacaEval's development scores, the two sources known to game the judge are first and second."""
    result = run_example(Path(os.environ["FASTPREF_SCORED_SAMPLES"]).resolve())
    assert result.returncode == 0, result.stderr
    assert ranked(result.stdout)[:2] == ["NullModel", "gpt4_gamed"]
