"""The whole pipeline, and the same with each stage left out.

Pools come from sources of different quality, one of them a cheat: one text, which the judge overrates. The judge also
errs on every response, favours length, and now and then returns a gross error.
"""

import contextlib
from typing import NamedTuple

import numpy as np
import torch

from fastpref import losses
from fastpref.curate import (
    bees,
    remove_length,
    route_by_margin,
    select_pairs,
    select_top,
)
from fastpref.curate.clean import audit, denoise_scores, exclude
from fastpref.curate.hygiene import hygiene
from fastpref.preference_matrix import NothingToClean
from studies.recipes.task import (
    BETA,
    LENGTH,
    NOTHING,
    VOCAB,
    Claim,
    Pool,
    draw_prompts,
    evaluate,
    gain,
    gumbel,
    implicit,
    lengths,
    rng,
    sample,
    stronger,
    train,
    true_reward,
    warm_up,
)

TITLE = "The whole pipeline, and each stage left out"
PROMPTS, HONEST = 2048, 20  # sources that do not cheat
STRENGTH = (0.0, 0.2)  # of their policies, see task.stronger: bad to fair
ERROR, LENGTH_BIAS = 0.5, 0.2  # of the judge, in σ, and σ per token
GROSS, GROSS_SIZE = 0.02, 6.0  # share of the scores that are moved up or down by so many σ
CHEAT_SCORE = 3.0  # σ above the mean of the others, at every prompt
SELECTED = 0.25  # share of the pairs
STAGES = ("hygiene", "audit", "clean", "length", "construct", "select", "route", "ratings")

CLAIMS = [
    Claim("the whole pipeline beats max vs min of the raw scores with DPO", "the pipeline", gain("whole", "nothing")),
    *(
        Claim(
            f"the stage '{stage}' helps: the pipeline is worse without it", "the pipeline", gain("whole", f"no {stage}")
        )
        for stage in STAGES
    ),
    Claim(
        "hygiene or audit, whichever finds the cheat, helps",
        "the pipeline",
        gain("whole", "no hygiene, audit"),
    ),
]
REMOVED = ((), *((stage,) for stage in STAGES), ("hygiene", "audit"), STAGES)


class Judged(NamedTuple):
    pool: Pool
    scores: np.ndarray  # [P, sources]
    sources: np.ndarray


def arms(setting) -> dict:
    judged = judge(setting)
    found = {}
    for removed in REMOVED:
        name = "whole" if not removed else "nothing" if removed == STAGES else "no " + ", ".join(removed)
        found[name] = evaluate(setting, pipeline(setting, judged, frozenset(STAGES) - frozenset(removed)))
    return found


def pipeline(setting, judged, stages):
    """The policy that comes of these stages; the others are passed over."""
    pool, scores, sources = judged
    shape = scores.shape
    offsets = np.arange(shape[0] + 1) * shape[1]
    valid = np.ones(shape, bool)
    length = lengths(pool.responses.flatten(0, 1)).numpy()
    if "hygiene" in stages:
        # With few tokens short texts recur by chance: only what stands under half of the prompts is canned.
        clean = hygiene(
            scores.reshape(-1),
            offsets=offsets,
            text_hash=text_hash(pool.responses),
            blank=length == 0,
            prompt_hash=np.arange(shape[0], dtype=np.uint64),
            repeated_share=0.5,
        )
        valid, scores = clean.valid.reshape(shape), clean.scores.reshape(shape)
    if "audit" in stages:
        with contextlib.suppress(NothingToClean):  # few prompts tell no source from another; nothing is flagged then
            valid = valid & exclude(sources, audit(scores, sources, seed=setting.seed).flagged).valid
    scores = np.where(valid, scores, np.nan)
    if "clean" in stages:
        with contextlib.suppress(NothingToClean):
            scores = denoise_scores(scores, sources).scores
    if "length" in stages:
        scores = remove_length(scores, length.reshape(shape), sources=sources).scores
    selection = select_pairs(scores, "max", "mean-2std" if "construct" in stages else "min")
    pairs = pool.pairs(selection.chosen, selection.rejected, scores, selection.keep)
    if "select" in stages:
        margins = {
            "external": pairs.gap.numpy(),
            "implicit": implicit(pairs, warm_up(setting, pairs), setting.reference),
        }
        pairs = pairs.take(select_top(bees(margins), fraction=SELECTED).indices)
    return train(setting, pairs, **loss(pairs.gap, stages))


def loss(gap, stages) -> dict:
    """Small margins to SFT, the others to DPO, or to RDPO with the β₁ that the package suggests."""
    tau = route_by_margin(gap.numpy()).tau if "route" in stages else -np.inf
    if "ratings" not in stages:
        return {"loss": "mixdpo", "options": {"tau": tau}}
    beta_rating = losses.rating_scale(gap, BETA).suggested_beta_rating

    @losses.pair_separable
    def routed(pairs):
        return torch.where(
            pairs.rating_gap < tau, losses.sft(pairs), losses.rdpo(pairs, beta=BETA, beta_rating=beta_rating)
        )

    routed.needs = losses.mixdpo.needs
    return {"loss": routed}


# ---- what the pipeline is given ----


def judge(setting) -> Judged:
    count, draw = setting.size.scaled(PROMPTS), rng(setting.seed, "judge")
    prompts = draw_prompts(setting.seed, "pipeline", count)
    noise = gumbel(rng(setting.seed, "sources"), HONEST, count, LENGTH, VOCAB)
    responses = [
        sample(stronger(setting, by), prompts, noise[source])
        for source, by in enumerate(np.linspace(*STRENGTH, HONEST).tolist())
    ]
    cheat = torch.full((LENGTH,), NOTHING)
    cheat[:4] = torch.tensor([1, 2, 3, 0])
    responses.append(cheat.expand(count, -1))
    responses = torch.stack(responses, 1)  # [P, sources, LENGTH]
    sources = HONEST + 1
    reward = true_reward(setting.world, prompts.repeat_interleave(sources, 0), responses.flatten(0, 1))
    reward = reward.double().numpy().reshape(count, sources)
    length = lengths(responses.flatten(0, 1)).numpy().reshape(count, sources)
    # Judged against the reward of one baseline response per prompt, as win rates are.
    baseline = reward[np.arange(count), draw.integers(0, HONEST, count)]
    scores = reward + LENGTH_BIAS * length - baseline[:, None]
    scores[:, -1] = scores[:, :-1].mean() + CHEAT_SCORE
    scores += ERROR * draw.standard_normal(scores.shape)
    gross = draw.random(scores.shape) < GROSS
    scores += gross * GROSS_SIZE * draw.choice([-1.0, 1.0], scores.shape)
    return Judged(Pool(prompts, responses, reward), scores, np.broadcast_to(np.arange(sources), scores.shape))


def text_hash(responses) -> np.ndarray:
    """[responses] uint64: the tokens as the digits of a number, so that equal texts have equal hashes."""
    digits = (responses.flatten(0, 1).clamp(min=0) + 1).masked_fill(responses.flatten(0, 1) == NOTHING, 0)
    return (digits.numpy().astype(np.uint64) * np.uint64(VOCAB + 1) ** np.arange(LENGTH, dtype=np.uint64)).sum(
        1, dtype=np.uint64
    )
