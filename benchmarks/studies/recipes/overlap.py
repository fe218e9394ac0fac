"""Do models of different size pick the same pairs by their implicit margins? (Deng et al., arXiv 2502.14560)"""

import numpy as np

from fastpref.curate import bees, select_top
from studies.recipes.task import Claim, clone, draw_pool, flipped, gaussian_judge, implicit, rng, warm_up

TITLE = "Pairs that models of two sizes select"
PROMPTS, SHARE = 4096, 0.1
FLIP_RATE, ERROR = 0.2, 0.7
WIDTHS = (8, 64)  # hidden units
SOURCE = "Deng et al. 2025"

CLAIMS = [
    Claim(
        f"the 10 % that widths {WIDTHS[0]} and {WIDTHS[1]} select overlap more than by chance",
        SOURCE,
        lambda arms: arms["overlap"],
        above=SHARE,
        unit="of the pairs",
    ),
    Claim(
        "implicit margins of two sizes agree more than implicit and external ones (rank correlations)",
        SOURCE,
        lambda arms: arms["correlation of sizes"] - arms["correlation with external"],
        unit="",
    ),
    Claim(
        "margins of two sizes correlate strongly (rank correlation above 0.8)",
        SOURCE,
        lambda arms: arms["correlation of sizes"],
        above=0.8,
        least=0.0,
        unit="",
    ),
]


def arms(setting) -> dict:
    pool = draw_pool(setting, setting.size.scaled(PROMPTS), 2)
    label = flipped(pool.reward[:, 0] > pool.reward[:, 1], FLIP_RATE, rng(setting.seed, "flips"))
    chosen, rejected = (~label).astype(int), label.astype(int)
    rated = gaussian_judge(pool.reward, ERROR, rng(setting.seed, "reward model"))
    pairs = pool.pairs(chosen, rejected, rated)
    margins = {"external": pairs.gap.numpy()}
    for width in WIDTHS:
        reference = clone(setting.world, setting.size, width, setting.seed)
        margins[f"width {width}"] = implicit(pairs, warm_up(setting, pairs, start=reference), reference)
    small, large = (select_top(margins[f"width {width}"], fraction=SHARE).indices for width in WIDTHS)
    spearman = bees(margins, kinds={f"width {width}": "implicit" for width in WIDTHS}).spearman
    return {
        "overlap": len(np.intersect1d(small, large)) / len(small),
        "correlation of sizes": float(spearman[1, 2]),
        "correlation with external": float(spearman[0, 1:].mean()),
    }
