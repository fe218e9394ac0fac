"""A tenth of the pairs, picked by aggregated margins, against all of them (Deng et al., arXiv 2502.14560)."""

import numpy as np

from fastpref.curate import compare_selections, external_margins
from studies.recipes.task import (
    Claim,
    draw_pool,
    evaluate,
    flipped,
    gain,
    gaussian_judge,
    implicit,
    rng,
    train,
    warm_up,
)

TITLE = "A selected tenth of the pairs against all"
PROMPTS, SHARE = 20480, 0.1
ERROR = 0.7  # σ of the reward model of the external margins
FLIP_RATES = (0.0, 0.2)  # share of the labels
SELECTIONS = ("mul", "external", "implicit", "add", "random")
SOURCE = "Deng et al. 2025"


def claims_at(rate) -> list[Claim]:
    noise = f"{100 * rate:.0f} % of the labels flipped"
    at = f"{100 * rate:.0f} % "
    return [
        Claim(f"BeeS's 10 % beat all pairs, {noise}", SOURCE, gain(at + "mul", at + "all")),
        Claim(f"BeeS's 10 % beat a random 10 %, {noise}", SOURCE, gain(at + "mul", at + "random")),
        Claim(f"BeeS's 10 % beat the external margin's, {noise}", SOURCE, gain(at + "mul", at + "external")),
        Claim(f"BeeS's 10 % beat the implicit margin's, {noise}", SOURCE, gain(at + "mul", at + "implicit")),
        Claim(f"BeeS's 10 % beat those of the raw sum, {noise}", SOURCE, gain(at + "mul", at + "add")),
    ]


CLAIMS = [claim for rate in FLIP_RATES[::-1] for claim in claims_at(rate)]


def arms(setting) -> dict:
    pool = draw_pool(setting, setting.size.scaled(PROMPTS), 2)
    first = pool.reward[:, 0] > pool.reward[:, 1]
    rated = gaussian_judge(pool.reward, ERROR, rng(setting.seed, "reward model"))
    rows = np.arange(len(first))
    found = {}
    for rate in FLIP_RATES:
        label = flipped(first, rate, rng(setting.seed, "flips"))
        chosen, rejected = (~label).astype(int), label.astype(int)
        pairs = pool.pairs(chosen, rejected)
        margins = {
            "external": external_margins(rated[rows, chosen], rated[rows, rejected]),
            "implicit": implicit(pairs, warm_up(setting, pairs), setting.reference),
        }
        kept = compare_selections(margins, round(SHARE * len(rows)), seed=setting.seed).selected
        at = f"{100 * rate:.0f} % "
        found[at + "all"] = evaluate(setting, train(setting, pairs))
        for name in SELECTIONS:
            found[at + name] = evaluate(setting, train(setting, pairs.take(kept[name])))
            found[at + name + " mislabelled"] = float((label != first)[kept[name]].mean())
    return found
