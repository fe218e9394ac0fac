"""Pairs of small margin: into DPO, dropped, or into SFT (MixDPO, Pang et al., arXiv 2602.00954)."""

import numpy as np
from task import Claim, draw_pool, evaluate, gain, gaussian_judge, rng, train

from fastpref.curate import Route, easy_to_hard, route_by_margin

TITLE = "Pairs of small margin: kept, dropped, or trained by SFT"
ERROR = 1.0  # σ of the judge that labels and rates
SHARE = 0.12  # of the pairs that go to SFT, as in the paper
SOURCE = "Pang et al. 2026"

CLAIMS = [
    Claim("MixDPO (easy to hard) beats DPO on all pairs", SOURCE, gain("MixDPO", "DPO")),
    Claim("MixDPO (easy to hard) beats dropping the same pairs", SOURCE, gain("MixDPO", "dropped")),
    Claim("MixDPO beats DPO in the same order", SOURCE, gain("MixDPO", "DPO easy to hard")),
    Claim("MixDPO without the order beats DPO", SOURCE, gain("MixDPO shuffled", "DPO")),
    Claim("MixDPO without the order beats dropping", SOURCE, gain("MixDPO shuffled", "dropped")),
]


def arms(setting) -> dict:
    size = setting.size
    pool = draw_pool(setting, size.steps * size.batch, 2)  # one epoch, as the order wants it
    scores = gaussian_judge(pool.reward, ERROR, rng(setting.seed, "judge"))
    rejected = (scores[:, 0] >= scores[:, 1]).astype(int)
    pairs = pool.pairs(1 - rejected, rejected, scores)
    margin = pairs.gap.numpy()
    routes = route_by_margin(margin, f"quantile:{SHARE}")
    preferred = np.flatnonzero(routes.route == Route.PREF)
    order = easy_to_hard(margin).reshape(size.steps, size.batch)
    mixed = {"loss": "mixdpo", "options": {"tau": routes.tau}}
    return {
        "DPO": evaluate(setting, train(setting, pairs)),
        "DPO easy to hard": evaluate(setting, train(setting, pairs, order=order)),
        "dropped": evaluate(setting, train(setting, pairs.take(preferred))),
        "MixDPO": evaluate(setting, train(setting, pairs, order=order, **mixed)),
        "MixDPO shuffled": evaluate(setting, train(setting, pairs, **mixed)),
    }
