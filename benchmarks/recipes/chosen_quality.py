"""Quality of the chosen response against contrast (Pan et al., arXiv 2508.18312)."""

import numpy as np
from task import Claim, draw_pool, evaluate, gain, gaussian_judge, rng, train

TITLE = "Quality of the chosen response, or distance to the rejected one"
PROMPTS, POOL, ERROR = 1024, 20, 0.25
RANKS = {"best": 0.0, "high": 0.25, "medium": 0.5, "low": 0.75, "worst": 1.0}  # where in the pool, from the top
ARMS = ("best-worst", "best-low", "best-medium", "best-high", "high-worst", "medium-worst", "low-worst")
SOURCE = "Pan et al. 2025"

CLAIMS = [
    Claim("a better chosen response helps: best-worst beats low-worst", SOURCE, gain("best-worst", "low-worst")),
    Claim(
        "a wider gap helps at one chosen quality: best-worst beats best-high", SOURCE, gain("best-worst", "best-high")
    ),
    Claim(
        "raising the chosen response helps more than lowering the rejected one: best-high beats low-worst",
        SOURCE,
        gain("best-high", "low-worst"),
    ),
    Claim(
        "only the chosen side matters: best-low is not worse than best-worst by 0.1 σ",
        SOURCE,
        gain("best-low", "best-worst"),
        -0.1,
    ),
]


def arms(setting) -> dict:
    pool = draw_pool(setting, setting.size.scaled(PROMPTS), POOL)
    scores = gaussian_judge(pool.reward, ERROR, rng(setting.seed, "judge"))
    order = np.argsort(-scores, axis=1, kind="stable")
    column = {name: order[:, round(rank * (POOL - 1))] for name, rank in RANKS.items()}
    found = {}
    for arm in ARMS:
        chosen, rejected = (column[side] for side in arm.split("-"))
        found[arm] = evaluate(setting, train(setting, pool.pairs(chosen, rejected)))
    return found
