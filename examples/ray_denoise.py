"""Many prompts' votes denoised on as many machines as Ray has: a plain function on batches under map_batches.

    pip install "fastpref[ray]"
    python examples/ray_denoise.py

`fit_scores` and `low_rank` take and return a dict of NumPy arrays with one row per prompt, and know nothing of Ray:
`datasets.Dataset.with_format("numpy").map(fit_scores, batched=True)` calls them as well. Prompts do not share anything,
so batches of any size give the same rows; inside one, the matrices are solved in parallel on the cores it is given.
"""

import sys

import numpy as np
import torch

import fastpref


def fit_scores(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Robust Bradley-Terry scores of wins [B, N, N], how often the row's item beat the column's.

    Adds scores [B, N] (mean 0 among the items compared with each other, NaN: never compared), rejected [B, N], the
    share of an item's pairs that disagree with the scores, and converged [B].
    """
    fit = fastpref.bradley_terry(wins=torch.from_numpy(np.stack(batch["wins"]).astype(np.float64)))
    return batch | {
        "scores": fit.scores.numpy(),
        "rejected": fit.rejected.numpy(),
        "converged": fit.info.converged.numpy(),
    }


def low_rank(batch: dict[str, np.ndarray], rank: int = 2) -> dict[str, np.ndarray]:
    """Robust PCA of matrix [B, m, n], NaN missing: adds low_rank [B, m, n], outlier_rate [B] and converged [B]."""
    fit = fastpref.rpca(torch.from_numpy(np.stack(batch["matrix"])), rank=rank)
    return batch | {
        "low_rank": fit.low_rank().numpy(),
        "outlier_rate": fit.info.outlier_rate.numpy(),
        "converged": fit.info.converged.numpy(),
    }


def corrupted_votes(prompts: int, items: int = 12, votes: int = 100, share: float = 0.1, seed: int = 0) -> dict:
    """wins [prompts, items, items] of random Bradley-Terry scores [prompts, items], a share of the pairs reversed."""
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((prompts, items))
    scores -= scores.mean(1, keepdims=True)
    wins = np.zeros((prompts, items, items))
    i, j = np.triu_indices(items, 1)
    won = generator.binomial(votes, 1 / (1 + np.exp(scores[:, j] - scores[:, i])))
    won = np.where(generator.random(won.shape) < share, votes - won, won)
    wins[:, i, j], wins[:, j, i] = won, votes - won
    return {"prompt": np.arange(prompts), "wins": wins, "truth": scores}


def main() -> None:
    try:
        import ray
    except ImportError:
        sys.exit('this example needs Ray: pip install "fastpref[ray]"')
    ray.init(include_dashboard=False, log_to_driver=False)
    votes = corrupted_votes(2000)
    rows = [dict(zip(votes, row, strict=True)) for row in zip(*votes.values(), strict=True)]
    dataset = ray.data.from_items(rows).map_batches(fit_scores, batch_size=500)
    found = dataset.take_all()
    error = np.stack([row["scores"] - row["truth"] for row in found])
    print(f"{len(found)} prompts, {np.mean([row['converged'] for row in found]):.1%} converged")
    print(f"error of a score: {np.sqrt(np.mean(error**2)):.3f} rms, with a tenth of the pairs reversed")
    print(f"share of an item's pairs found corrupted: {np.mean([row['rejected'] for row in found]):.1%}")


if __name__ == "__main__":
    main()
