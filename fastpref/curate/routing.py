"""Which loss a pair trains with, and when: small margins to SFT, and an order from easy to hard.

Pang et al., "Small Margin Preferences Still Matter If You Train Them Right" (MixDPO), arXiv 2602.00954: pairs whose
difficulty d lies below tau train with the likelihood of the chosen response, the others with DPO, and the data runs
from easy to hard. `fastpref.preference_loss(..., loss="mixdpo", rating_gap=d, loss_options={"tau": tau})` is that loss.
SelectiveDPO is the source of the learning order: the validation losses of models that did not see the pair.
"""

import enum
import math
import warnings
from typing import NamedTuple

import numpy as np

from fastpref.curate.margins import as_vector
from fastpref.curate.notices import DataWarning
from fastpref.curate.pools import share_of

JUDGE_TAU = 0.5  # of scores from 1 to 10; 12 % of the authors' pairs lie below it
DEFAULT_TAU = "quantile:0.12"  # the same share on any scale
HARD_LOSS = 0.7623  # learning order: pairs with at least this validation loss are the authors' hard ones
ROUTED_OFF = 0.02  # of the share that a quantile asks for, before ties are spoken of
MISSING_DIFFICULTY = 1.0  # the authors' default scores are 1 for chosen and 0 for rejected


class Route(enum.IntEnum):
    PREF = 0  # trains with the preference loss
    SFT = 1  # trains with the likelihood of the chosen response


class Routes(NamedTuple):
    route: np.ndarray  # int8 [pairs], a Route
    tau: float  # the margin that divides them
    share_sft: float  # of all pairs; NaN without pairs
    inclusive: bool  # whether a margin of exactly tau goes to SFT
    at_tau: int  # pairs with exactly this margin
    missing: int  # pairs without a margin; they stay with the preference loss
    negative_pref: int  # pairs whose margin contradicts their label and that still train with the preference loss


def route_by_margin(margin, tau=DEFAULT_TAU, *, inclusive=False) -> Routes:
    """Sends the pairs with a small margin to SFT.

    margin: [pairs], large = easy (see `difficulty`). A pair without one (NaN) stays with the preference loss, as the
        authors' default scores imply; a negative one goes to SFT on the *labelled* chosen response wherever it is
        below tau.
    tau: a number in units of the margin (0.5 belongs to judge scores from 1 to 10), or "quantile:<share>", the margin
        that so many of the pairs with a margin lie below.
    inclusive: False: margin < tau, as the loss does it; True: margin <= tau.

    Warns when ties at a quantile keep the routed share more than two points away from what was asked for. Raises
    ValueError for another tau.
    """
    margin = as_vector("margin", margin)
    rated = ~np.isnan(margin)
    share = _quantile(tau)
    threshold = float(tau) if share is None else _threshold(margin[rated], share, inclusive)
    small = margin <= threshold if inclusive else margin < threshold
    at_tau = int(np.count_nonzero(margin == threshold))
    routed = share_of(small[rated])
    if share is not None and abs(routed - share) > ROUTED_OFF and at_tau > 1:
        text = (
            f"tau={tau!r} routes {100 * routed:.1f} % of the pairs to SFT, since {at_tau} of {len(margin)} margins are "
            f"exactly {threshold:g}; give tau as a number, or turn inclusive {'off' if inclusive else 'on'}"
        )
        warnings.warn(DataWarning("routing-ties", text), stacklevel=2)
    return Routes(
        np.where(small, Route.SFT, Route.PREF).astype(np.int8),
        threshold,
        share_of(small),
        bool(inclusive),
        at_tau,
        int(np.count_nonzero(~rated)),
        int(np.count_nonzero(~small & (margin < 0))),
    )


def difficulty(signal, chosen, rejected=None) -> np.ndarray:
    """[pairs] float64 difficulty of each pair by one of the known signals; large = easy, NaN = unknown.

    signal:
        "score": judge scores or ratings [pairs] of both responses; d = chosen - rejected.
        "reward_margin": rewards [pairs] of both, of a reward model or implicit ones; d = chosen - rejected.
        "nll", "perplexity": mean negative log-likelihood per response token [pairs], in nats, of both; d = rejected -
            chosen, of the perplexities exp(nll) for the latter: easy where the model finds the chosen response more
            likely by itself.
        "embedding": embeddings [pairs, width] of both; d = 1 - cosine similarity: easy where the two say different
            things.
        "learning_order": `chosen` is the validation loss [pairs] (see `learning_order`); d = -loss. The authors' hard
            pairs, a loss of at least 0.7623, are `route_by_margin(d, -HARD_LOSS, inclusive=True)`.

    A tau belongs to one signal; the quantile of the default routes the same share with each. Raises ValueError for
    another signal and for shapes that do not match.
    """
    if signal not in _SIGNALS:
        raise ValueError(f"signal must be one of {list(_SIGNALS)}, got {signal!r}")
    if signal == "learning_order":
        if rejected is not None:
            raise ValueError("rejected must be None for the learning order, which is one loss per pair")
        return -as_vector("chosen", chosen)
    if rejected is None:
        raise ValueError(f"rejected must be given for {signal!r}, got None")
    read = _matrix if signal == "embedding" else as_vector
    chosen, rejected = read("chosen", chosen), read("rejected", rejected)
    if chosen.shape != rejected.shape:
        raise ValueError(f"rejected must have shape {list(chosen.shape)} to match chosen, got {list(rejected.shape)}")
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # what is not a number is unknown
        d = _SIGNALS[signal](chosen, rejected)
    return np.where(np.isfinite(d), d, np.nan)


def easy_to_hard(difficulty, *, missing=MISSING_DIFFICULTY) -> np.ndarray:
    """int64 [pairs] permutation, largest difficulty (easiest) first; equal ones keep their order.

    missing: the difficulty of pairs without one; 1 is what the authors' default scores come to.

    A DataLoader takes the order as it is: `DataLoader(dataset, sampler=easy_to_hard(d).tolist())`, without shuffling.
    """
    d = as_vector("difficulty", difficulty)
    return np.argsort(-np.where(np.isnan(d), missing, d), kind="stable")


def distributed_order(order, rank, world_size, *, drop_last=False) -> np.ndarray:
    """int64, what rank k of W ranks takes of an order: the elements k, k + W, ..., so that all follow it together.

    Every rank gets equally many, or they would wait for each other: the last elements are repeated to fill the last
    round, or with drop_last that round is left out.
    """
    order = np.asarray(order)
    if order.ndim != 1 or order.dtype.kind not in "iu":
        raise ValueError(f"order must be [pairs] integers, got {order.dtype} {list(order.shape)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
    over = len(order) % world_size
    if over and drop_last:
        order = order[: len(order) - over]
    elif over:
        wanted = world_size - over
        order = np.concatenate([order, np.resize(order[-wanted:], wanted)])
    return order[rank::world_size].astype(np.int64)


class LearningOrder(NamedTuple):
    loss: np.ndarray  # float64 [pairs], mean over the models that did not see the pair; NaN where all did
    models: np.ndarray  # int64 [pairs], how many these are


def learning_order(losses, seen) -> LearningOrder:
    """Mean validation loss of every pair, over the reference models that were not trained on it (SelectiveDPO).

    losses: [models, pairs] DPO loss of each pair under each model; NaN and infinite: not known. seen: [models, pairs]
    bool, the pair was in the model's training data. The authors train six models, three seeds on each half of the data.
    """
    losses, seen = _matrix("losses", losses), np.asarray(seen)
    if seen.dtype != bool or seen.shape != losses.shape:
        raise ValueError(
            f"seen must be bool with shape {list(losses.shape)} to match losses, got {seen.dtype} {list(seen.shape)}"
        )
    counts = ~seen & np.isfinite(losses)
    models = counts.sum(axis=0)
    total = np.where(counts, losses, 0).sum(axis=0)
    loss = np.where(models > 0, total / np.maximum(models, 1), np.nan)
    if unseen := int(np.count_nonzero(models == 0)):
        warnings.warn(
            f"{unseen} of {len(loss)} pairs have no loss of a model that did not see them: their difficulty is unknown",
            UserWarning,
            stacklevel=2,
        )
    return LearningOrder(loss, models)


def keep_easiest(difficulty, fraction=0.5) -> np.ndarray:
    """int64 indices of the easiest pairs, easiest first: round(fraction * pairs) of them, at most those with a number.

    SelectiveDPO keeps the easiest half by learning order, and trains on it in this order.
    """
    d = as_vector("difficulty", difficulty)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction!r}")
    order = easy_to_hard(np.where(np.isnan(d), -math.inf, d))
    return order[: min(round(fraction * len(d)), np.count_nonzero(~np.isnan(d)))]


# ---- signals, taus


def _cosine_distance(chosen, rejected) -> np.ndarray:
    # the length of either vector must not overflow
    chosen, rejected = (v / np.abs(v).max(axis=1, keepdims=True, initial=0) for v in (chosen, rejected))
    lengths = np.linalg.norm(chosen, axis=1) * np.linalg.norm(rejected, axis=1)
    return 1 - np.clip((chosen * rejected).sum(axis=1) / lengths, -1, 1)


_SIGNALS = {
    "score": np.subtract,
    "reward_margin": np.subtract,
    "nll": lambda chosen, rejected: rejected - chosen,
    "perplexity": lambda chosen, rejected: np.exp(rejected) - np.exp(chosen),
    "embedding": _cosine_distance,
    "learning_order": None,
}


def _quantile(tau) -> float | None:
    """The share of "quantile:<share>"; None for a number."""
    if isinstance(tau, str):
        name, _, number = tau.partition(":")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if name == "quantile" and 0 <= share <= 1:
            return share
    elif not isinstance(tau, bool) and isinstance(tau, int | float | np.number) and not math.isnan(tau):
        return None
    raise ValueError(f'tau must be a number or "quantile:<share from 0 to 1>", got {tau!r}')


def _threshold(margin, share, inclusive) -> float:
    """The margin that round(share * pairs) lie below (inclusive: at or below), where no two are equal."""
    wanted = round(share * len(margin))
    at = wanted - 1 if inclusive else wanted
    if at < 0:
        return -math.inf
    if at >= len(margin):
        return math.inf
    return float(np.partition(margin, at)[at])


def _matrix(name, values) -> np.ndarray:
    try:
        values = np.asarray(values, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{name} must be a matrix of numbers") from error
    if values.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {list(values.shape)}")
    return values
