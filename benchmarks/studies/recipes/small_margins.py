"""Pairs of small margin: into DPO, dropped, or into SFT (MixDPO, Pang et al., arXiv 2602.00954)."""

import numpy as np
import torch

from fastpref.curate import Route, easy_to_hard, route_by_margin
from studies.recipes.task import Claim, draw_pool, evaluate, gain, gaussian_judge, rng, stronger, train

TITLE = "Pairs of small margin: kept, dropped, or trained by SFT"
ERROR = 1.0  # σ of the judge that labels and rates
SHARE = 0.12  # of the pairs that go to SFT, as in the paper
SOURCE = "Pang et al. 2026"
WRITERS = {"own responses": 0.0, "responses of a stronger model": 0.2}  # see task.stronger


def claims_of(whose) -> list[Claim]:
    def claim(text, better, worse):
        return Claim(f"{text}, {whose}", SOURCE, gain(f"{better}, {whose}", f"{worse}, {whose}"))

    return [
        claim("MixDPO (easy to hard) beats DPO on all pairs", "MixDPO", "DPO"),
        claim("MixDPO (easy to hard) beats dropping the same pairs", "MixDPO", "dropped"),
        claim("MixDPO beats DPO in the same order", "MixDPO", "DPO easy to hard"),
        claim("MixDPO without the order beats DPO", "MixDPO shuffled", "DPO"),
        claim("MixDPO without the order beats dropping", "MixDPO shuffled", "dropped"),
    ]


CLAIMS = [claim for whose in WRITERS for claim in claims_of(whose)]


def arms(setting) -> dict:
    found = {}
    for whose, by in WRITERS.items():
        # one epoch, as the order wants it
        pool = draw_pool(setting, setting.size.steps * setting.size.batch, 2, whose, stronger(setting, by))
        found |= {f"{arm}, {whose}": evaluate(setting, policy) for arm, policy in policies(setting, pool).items()}
    return found


def policies(setting, pool) -> dict:
    size = setting.size
    scores = gaussian_judge(pool.reward, ERROR, rng(setting.seed, "judge"))
    rejected = (scores[:, 0] >= scores[:, 1]).astype(int)
    pairs = pool.pairs(1 - rejected, rejected, scores)
    margin = pairs.gap.numpy()
    routes = route_by_margin(margin, f"quantile:{SHARE}")
    preferred = np.flatnonzero(routes.route == Route.PREF)
    order = torch.from_numpy(easy_to_hard(margin).reshape(size.steps, size.batch))
    mixed = {"loss": "mixdpo", "options": {"tau": routes.tau}}
    return {
        "DPO": train(setting, pairs),
        "DPO easy to hard": train(setting, pairs, order=order),
        "dropped": train(setting, pairs.take(preferred)),
        "MixDPO": train(setting, pairs, order=order, **mixed),
        "MixDPO shuffled": train(setting, pairs, **mixed),
    }
