"""Goal-conditioned pairs, once for the score of each response, against DPO (Zhang et al., arXiv 2410.08067)."""

import numpy as np
import torch

from fastpref.curate import goal_records, rescale_scores
from studies.recipes.task import Claim, Pairs, draw_pool, evaluate, gain, gaussian_judge, rng, train

TITLE = "Reward-augmented pairs against DPO"
PROMPTS, POOL, ERROR = 1024, 4, 0.25
BEST, MIDDLE, SPREAD = 10.0, 5.5, 2.25  # of scores from 1 to 10; the policy reads (goal - MIDDLE) / SPREAD
SOURCE = "Zhang et al. 2025"

CLAIMS = [
    Claim("reward-augmented pairs, asked for the best score, beat DPO", SOURCE, gain("augmented", "DPO")),
    Claim("half of them, as many as DPO has, beat DPO too", SOURCE, gain("half", "DPO")),
    Claim(
        "the goal is heeded: asked for 10 the policy does better than asked for 5.5",
        SOURCE,
        gain("augmented", "augmented, asked for 5.5"),
    ),
]


def arms(setting) -> dict:
    pool = draw_pool(setting, setting.size.scaled(PROMPTS), POOL)
    draw = rng(setting.seed, "judge")
    scores = marks(gaussian_judge(pool.reward, ERROR, draw))
    rows = np.arange(len(scores))
    chosen = scores.argmax(1)  # a rejected response of the same mark stays, as in the paper
    rejected = (chosen + draw.integers(1, POOL, len(rows))) % POOL  # any other
    pairs = {
        "prompt": rows,
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": scores[rows, chosen],
        "score_rejected": scores[rows, rejected],
    }
    found = {"DPO": evaluate(setting, train(setting, pool.pairs(chosen, rejected)))}
    for name, half in (("augmented", False), ("half", True)):
        records = goal_records(pairs, half=half, seed=setting.seed)
        prompt = records["prompt"]
        policy = train(
            setting,
            Pairs(
                pool.prompts[prompt],
                pool.responses[prompt, records["chosen"]],
                pool.responses[prompt, records["rejected"]],
                goal=torch.from_numpy(as_input(records["goal"])).float(),
            ),
        )
        found[name] = evaluate(setting, policy, goal=float(as_input(BEST)))
        found[f"{name}, asked for 5.5"] = evaluate(setting, policy, goal=float(as_input(MIDDLE)))
    return found


def marks(scores) -> np.ndarray:
    """Whole marks from 1 to 10, the highest and the lowest for a twentieth of the responses each."""
    low, high = np.quantile(scores, [0.05, 0.95])
    return rescale_scores(scores.clip(low, high), (low, high)).round()


def as_input(goal):
    return (goal - MIDDLE) / SPREAD
