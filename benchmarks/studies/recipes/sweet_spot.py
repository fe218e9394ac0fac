"""Rejected = min against rejected = mean - 2 std as the pool grows (Xiao et al., arXiv 2502.16825)."""

from fastpref.curate import select_pairs
from studies.recipes.task import Claim, draw_pool, evaluate, gain, gaussian_judge, heavy_tailed_judge, rng, train

TITLE = "Rejected response: the worst, or nearest to mean - 2 std, as the pool grows"
SIZES = (5, 20, 50, 200)
PROMPTS = 512
RULES = ("min", "mean-2std", "min_of_5")
ERROR = 0.5  # of the judges, in σ
JUDGES = {"Gaussian": gaussian_judge, "heavy-tailed": heavy_tailed_judge}


def claims_under(judge) -> list[Claim]:
    source, worst, spot = "Xiao et al. 2025", f"{judge} n={SIZES[-1]} min", f"{judge} n={SIZES[-1]} mean-2std"
    first = f"{judge} n={SIZES[0]} min"
    return [
        Claim(f"max vs min gets worse from n = 5 to n = 200, {judge} judge", source, gain(first, worst)),
        Claim(f"at n = 200 mean - 2 std beats min, {judge} judge", source, gain(spot, worst)),
        Claim(f"mean - 2 std gains from n = 5 to n = 200, {judge} judge", source, gain(spot, first)),
        Claim(f"at n = 200 min of 5 beats min, {judge} judge", source, gain(f"{judge} n=200 min_of_5", worst)),
    ]


CLAIMS = [claim for judge in JUDGES for claim in claims_under(judge)]


def arms(setting) -> dict:
    pool = draw_pool(setting, setting.size.scaled(PROMPTS), SIZES[-1])
    found = {}
    for judge, judged in JUDGES.items():
        scores = judged(pool.reward, ERROR, rng(setting.seed, judge))
        for n in SIZES:
            # Up to five responses all three are one.
            for rejected in RULES if n > 5 else RULES[:1]:
                pairs = select_pairs(scores[:, :n], "max", rejected)
                trained = train(setting, pool.pairs(pairs.chosen, pairs.rejected, keep=pairs.keep))
                found[f"{judge} n={n} {rejected}"] = evaluate(setting, trained)
    return found
