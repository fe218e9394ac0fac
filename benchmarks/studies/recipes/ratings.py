"""Ratings beside the labels: RDPO and ML-RDPO against DPO (Viano et al., arXiv 2602.00603)."""

import numpy as np

from fastpref.losses import rating_scale
from studies.recipes.task import BETA, Claim, draw_pool, evaluate, gain, gaussian_judge, rng, train

TITLE = "Losses that know ratings, against DPO"
PROMPTS = 1024
ACCURATE, NOISY = 0.1, 3.0  # σ of the error of a rating
SWAPPED = 0.3  # share of the pairs whose two accurate ratings are swapped
RATINGS = ("accurate", "noisy", "swapped")
LOSSES = {"RDPO": "rdpo", "ML-RDPO": "ml_rdpo"}
SOURCE = "Viano et al. 2026"

CLAIMS = [
    # With r and a rating of the same thing both rewarded, RDPO's optimum is further from the reference than DPO's.
    Claim(
        "RDPO with accurate ratings beats DPO at RDPO's effective β",
        "control",
        gain("RDPO accurate", "DPO effective β"),
    ),
    *(Claim(f"{name} with accurate ratings beats DPO", SOURCE, gain(f"{name} accurate", "DPO")) for name in LOSSES),
    *(
        Claim(f"{name} with {kind} ratings is not worse than DPO by 0.1 σ", SOURCE, gain(f"{name} {kind}", "DPO"), -0.1)
        for name in LOSSES
        for kind in RATINGS[1:]
    ),
]


def arms(setting) -> dict:
    pool = draw_pool(setting, setting.size.scaled(PROMPTS), 2)
    draw = rng(setting.seed, "labels and ratings")
    difference = pool.reward[:, 0] - pool.reward[:, 1]
    first = draw.random(len(difference)) < 1 / (1 + np.exp(-difference))  # Bradley-Terry of the true reward
    accurate = gaussian_judge(pool.reward, ACCURATE, draw)
    noisy = gaussian_judge(pool.reward, NOISY, draw)
    swap = draw.random((len(difference), 1)) < SWAPPED
    scores = {"accurate": accurate, "noisy": noisy, "swapped": np.where(swap, accurate[:, ::-1], accurate)}
    chosen, rejected = (~first).astype(int), first.astype(int)
    found = {"DPO": evaluate(setting, train(setting, pool.pairs(chosen, rejected)))}
    for kind in RATINGS:
        pairs = pool.pairs(chosen, rejected, scores[kind])
        scale = rating_scale(pairs.gap, BETA)  # what the package suggests; nothing is tuned
        if kind == "accurate":
            effective = 1 / (1 / BETA + 1 / scale.suggested_beta_rating)
            found["DPO effective β"] = evaluate(setting, train(setting, pairs, beta=effective))
        options = {
            "rdpo": {"beta_rating": scale.suggested_beta_rating},
            "ml_rdpo": {"variance": scale.suggested_variance},
        }
        for name, loss in LOSSES.items():
            found[f"{name} {kind}"] = evaluate(setting, train(setting, pairs, loss=loss, options=options[loss]))
    return found
