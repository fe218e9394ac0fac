"""Quality of the chosen response against contrast (Pan et al., arXiv 2508.18312)."""

from fastpref.curate.diagnostics import bucket_pairs
from studies.recipes.task import Claim, draw_pool, evaluate, gain, gaussian_judge, rng, train

TITLE = "Quality of the chosen response, or distance to the rejected one"
PROMPTS, POOL, ERROR = 1024, 20, 0.25
SOURCE = "Pan et al. 2025"


def compared(text, better, worse, above=0.0) -> Claim:
    return Claim(f"{text}: {better} against {worse}", SOURCE, gain(better, worse), above)


CLAIMS = [
    compared("a better chosen response helps", "best-vs-worst", "low-vs-worst"),
    compared("a wider gap helps at one chosen quality", "best-vs-worst", "best-vs-high"),
    compared("a better chosen response helps more than a wider gap", "best-vs-high", "low-vs-worst"),
    compared("the rejected side hardly matters (not worse by 0.1 σ)", "best-vs-low", "best-vs-worst", -0.1),
]


def arms(setting) -> dict:
    pool = draw_pool(setting, setting.size.scaled(PROMPTS), POOL)
    scores = gaussian_judge(pool.reward, ERROR, rng(setting.seed, "judge"))
    return {
        name: evaluate(setting, train(setting, pool.pairs(pairs["chosen"], pairs["rejected"])))
        for name, pairs in bucket_pairs(scores).items()
    }
