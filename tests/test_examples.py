"""The examples: their functions called as they are, and each run as a user runs it."""

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastpref

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- ray_denoise


@pytest.fixture(scope="module")
def ray_denoise():
    return load("ray_denoise")


def test_scores_of_a_batch_are_those_of_its_parts(ray_denoise):
    votes = ray_denoise.corrupted_votes(30, items=9)
    whole = ray_denoise.fit_scores(votes)
    assert whole["wins"] is votes["wins"] and whole["converged"].all()
    assert np.sqrt(np.mean((whole["scores"] - votes["truth"]) ** 2)) < 0.2
    for begin in (0, 7, 29):
        rows = {name: column[begin : begin + 5] for name, column in votes.items()}
        # columns of tensors arrive as arrays of arrays where their shapes may differ
        listed = np.empty(len(rows["wins"]), object)
        listed[:] = list(rows["wins"])
        for wins in (rows["wins"], listed):
            part = ray_denoise.fit_scores(rows | {"wins": wins})
            for name in ("scores", "rejected", "converged"):
                np.testing.assert_allclose(part[name], whole[name][begin : begin + 5], atol=1e-9)


def test_low_rank_of_a_batch(ray_denoise):
    low = (torch.randn(6, 40, 2) @ torch.randn(6, 2, 30)).numpy()
    where = torch.rand(low.shape).numpy() < 0.03
    found = ray_denoise.low_rank({"matrix": np.where(where, low + 9, low), "prompt": np.arange(6)}, rank=2)
    assert list(found) == ["matrix", "prompt", "low_rank", "outlier_rate", "converged"]
    np.testing.assert_allclose(found["low_rank"], low, atol=1e-3)
    np.testing.assert_allclose(found["outlier_rate"], where.mean((1, 2)), atol=2e-3)


def test_what_ray_sends_to_its_workers_can_be_sent():
    """cloudpickle writes a function of __main__ by value, with the modules that it names by their names."""
    assert pickle.loads(pickle.dumps(fastpref)) is fastpref


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install "fastpref[ray]" runs this'
)
def test_ray_gives_what_the_plain_function_gives(ray_denoise, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "ray_denoise.py"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = ray_denoise.fit_scores(ray_denoise.corrupted_votes(2000))
    error = np.sqrt(np.mean((found["scores"] - found["truth"]) ** 2))
    assert done.stdout.splitlines() == [
        "2000 prompts, 100.0% converged",
        f"error of a score: {error:.3f} rms, with a tenth of the pairs reversed",
        f"share of an item's pairs found corrupted: {found['rejected'].mean():.1%}",
    ]
