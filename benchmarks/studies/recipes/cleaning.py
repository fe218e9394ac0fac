"""Cleaning flipped pairwise judgements before pairs are built (Nguyen et al., arXiv 2403.02745)."""

import numpy as np

from fastpref import preference_matrix
from fastpref.curate import select_pairs
from studies.recipes.task import Claim, draw_pool, evaluate, gain, rng, train

TITLE = "Flipped judgements, cleaned or not"
PROMPTS, FLIP_RATE = 512, 0.2
SIZES = (8, 24)
METHODS = {"none": None, "Bradley-Terry": "bradley_terry", "RPCA": "rpca"}
SOURCE = "Nguyen et al. 2024"

CLAIMS = [
    *(
        Claim(
            f"n = {n}: pairs from matrices cleaned by {method} beat pairs from the raw ones",
            SOURCE,
            gain(f"n={n} {method}", f"n={n} none"),
        )
        for n in SIZES
        for method in ("Bradley-Terry", "RPCA")
    ),
    *(
        Claim(
            f"n = {n}: the chosen response has a higher true reward after {method}",
            SOURCE,
            lambda arms, n=n, method=method: arms[f"n={n} {method} chosen"] - arms[f"n={n} none chosen"],
        )
        for n in SIZES
        for method in ("Bradley-Terry", "RPCA")
    ),
]


def arms(setting) -> dict:
    found = {}
    for n in SIZES:
        pool = draw_pool(setting, setting.size.scaled(PROMPTS), n, f"pool of {n}")
        judged = judgements(pool.reward, rng(setting.seed, f"flips {n}"))
        for name, method in METHODS.items():
            pairs = select_pairs(scores_of(judged, method), "max", "mean-2std")
            trained = train(setting, pool.pairs(pairs.chosen, pairs.rejected, keep=pairs.keep))
            found[f"n={n} {name}"] = evaluate(setting, trained)
            found[f"n={n} {name} chosen"] = float(
                pool.reward[np.arange(len(pool.reward)), pairs.chosen][pairs.keep].mean()
            )
    return found


def judgements(reward, generator) -> np.ndarray:
    """[prompts, n, n] of P(i beats j), the true Bradley-Terry one but for the flipped pairs."""
    prompts, n = reward.shape
    logit = reward[:, :, None] - reward[:, None, :]
    wrong = np.triu(generator.random((prompts, n, n)) < FLIP_RATE, 1)
    return 1 / (1 + np.exp(-np.where(wrong | wrong.transpose(0, 2, 1), -logit, logit)))


def scores_of(judged, method) -> np.ndarray:
    """[prompts, n]: mean logits of the raw matrices, or the scores that denoise finds without the flipped pairs."""
    if method is None:
        return np.log(judged / (1 - judged)).mean(2)
    return np.asarray(preference_matrix.denoise(judged, method=method).scores)
