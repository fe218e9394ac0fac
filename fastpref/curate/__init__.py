"""Preference data: numpy arrays in, numpy arrays out. Importing this imports no torch: what needs a model is lazy."""

from importlib import import_module
from typing import TYPE_CHECKING

from fastpref.curate.files import Coded, read_metadata, write_pairs
from fastpref.curate.pairs import DropReason, PairSelection, select_pairs
from fastpref.curate.samples import (
    InputError,
    RowProblem,
    Samples,
    ScoredSamples,
    read_samples,
    read_scored_samples,
    texts,
    to_logit,
)

if TYPE_CHECKING:
    from fastpref.curate.influence import (
        Kept,
        PairLogps,
        PairScores,
        intersection,
        irm,
        keep_rate,
        loss_diff,
        pair_batches,
        pair_influence,
        pair_logps,
        truncated,
    )
    from fastpref.curate.rewards import ImplicitRewards, ResponseLogps, implicit_rewards, response_logps

# name -> module that imports torch
_WITH_TORCH = {
    "ImplicitRewards": "fastpref.curate.rewards",
    "ResponseLogps": "fastpref.curate.rewards",
    "implicit_rewards": "fastpref.curate.rewards",
    "response_logps": "fastpref.curate.rewards",
    "Kept": "fastpref.curate.influence",
    "PairLogps": "fastpref.curate.influence",
    "PairScores": "fastpref.curate.influence",
    "intersection": "fastpref.curate.influence",
    "irm": "fastpref.curate.influence",
    "keep_rate": "fastpref.curate.influence",
    "loss_diff": "fastpref.curate.influence",
    "pair_batches": "fastpref.curate.influence",
    "pair_influence": "fastpref.curate.influence",
    "pair_logps": "fastpref.curate.influence",
    "truncated": "fastpref.curate.influence",
}
__all__ = [
    "Coded",
    "DropReason",
    "ImplicitRewards",
    "InputError",
    "Kept",
    "PairLogps",
    "PairScores",
    "PairSelection",
    "ResponseLogps",
    "RowProblem",
    "Samples",
    "ScoredSamples",
    "implicit_rewards",
    "intersection",
    "irm",
    "keep_rate",
    "loss_diff",
    "pair_batches",
    "pair_influence",
    "pair_logps",
    "read_metadata",
    "read_samples",
    "read_scored_samples",
    "response_logps",
    "select_pairs",
    "texts",
    "to_logit",
    "truncated",
    "write_pairs",
]


def __getattr__(name):
    if name not in _WITH_TORCH:
        raise AttributeError(f"module 'fastpref.curate' has no attribute {name!r}")
    value = getattr(import_module(_WITH_TORCH[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
