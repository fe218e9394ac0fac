"""The theory behind selection, in the linear model: see shrinkage.py (Deng et al., arXiv 2502.14560)."""

from studies.recipes.shrinkage import shrinkage
from studies.recipes.task import Claim

TITLE = "Noisy labels shrink the fitted reward, selection by margin inflates it"
NOISE = 2.0
SOURCE = "Deng et al. 2025"


def longer(text, one, other) -> Claim:
    return Claim(text, SOURCE, lambda arms: arms[one] - arms[other], unit="of length, the true one 2")


CLAIMS = [
    longer("noise in the margins shrinks the reward that is fitted to all pairs", "all, noise 0", "all, noise 2"),
    longer("the 10 % of largest margins give a longer one", "top, noise 2", "all, noise 2"),
    longer("more so than a random 10 %", "top, noise 2", "random, noise 2"),
]


def arms(setting) -> dict:
    rows = shrinkage(setting.seed, noise=(0.0, NOISE))
    return {f"{name}, noise {row['noise']:g}": row[name] for row in rows for name in ("all", "top", "random")}
