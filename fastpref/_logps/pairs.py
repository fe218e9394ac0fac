"""What both preference losses share: checks of a batch of pairs, losses as torch on vectors, reduction, output."""

from collections.abc import Mapping
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks, losses
from fastpref._logps.sequences import Sequences
from fastpref._logps.token_logps import STATS


class PreferenceStats(NamedTuple):
    """Beside the loss; all detached, no value is read on the host."""

    losses: Tensor  # [B] before weights and reduction
    chosen_lengths: Tensor  # [B] int64, tokens that count
    rejected_lengths: Tensor
    ties: Tensor  # how many margins are exactly 0: neither right nor wrong
    unrated: Tensor  # how many rating gaps are NaN
    entropy: Tensor | None = None  # means over all tokens that count, where asked for by stats=
    log_sum_p2: Tensor | None = None
    top1: Tensor | None = None
    chosen_mean_logit: Tensor | None = None
    rejected_mean_logit: Tensor | None = None
    chosen_top1: Tensor | None = None  # over the chosen tokens alone


class PreferenceOutput(NamedTuple):
    """All but `loss` is detached."""

    loss: Tensor  # scalar, or [B] with reduction="none"
    chosen_logps: Tensor  # [B] sums of log-probs
    rejected_logps: Tensor
    chosen_rewards: Tensor  # [B] beta * (policy - reference), or beta * logps where there is no reference
    rejected_rewards: Tensor
    margins: Tensor  # [B] chosen_rewards - rejected_rewards
    accuracy: Tensor  # share of margins > 0, strictly
    stats: PreferenceStats

    def as_trl(self) -> dict[str, Tensor]:
        """The metrics under the names TRL's DPOTrainer logs, as scalar tensors."""
        stats = self.stats
        metrics = {
            "logps/chosen": _mean(self.chosen_logps),
            "logps/rejected": _mean(self.rejected_logps),
            "rewards/chosen": _mean(self.chosen_rewards),
            "rewards/rejected": _mean(self.rejected_rewards),
            "rewards/margins": _mean(self.margins),
            "rewards/accuracies": self.accuracy,
            "num_tokens": stats.chosen_lengths.sum() + stats.rejected_lengths.sum(),
            "logits/chosen": stats.chosen_mean_logit,
            "logits/rejected": stats.rejected_mean_logit,
            "entropy": stats.entropy,
            "mean_token_accuracy": stats.chosen_top1,  # of the chosen completions, as TRL has it
        }
        return {name: value for name, value in metrics.items() if value is not None}


def _mean(vector: Tensor) -> Tensor:
    return vector.sum() / max(vector.shape[0], 1)


# ---- checks ----


def check_pairs(
    like_name, like, labels, loss, loss_weights, loss_options, beta, reduction, num_items, cu_seqlens, lengths, vectors
) -> int:
    """What every call on pairs takes, beside its tensors of tokens; returns the number of sequences."""
    _checks.positive("beta", beta)
    losses.check_reduction(reduction)
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items replaces the divisor of reduction='mean', got reduction={reduction!r}")
    single = not isinstance(loss, (list, tuple))
    if single and loss_weights is not None:
        raise ValueError(f"loss_weights needs a list of losses, got loss={loss!r}")
    if single and not isinstance(loss_options, (Mapping, NoneType)):
        raise TypeError(f"loss_options must be a mapping for a single loss, got {type(loss_options).__name__}")
    if isinstance(num_items, Tensor):
        if num_items.dim():
            raise ValueError(f"num_items must be a number or a scalar tensor, got shape {list(num_items.shape)}")
    elif num_items is not None:
        _checks.positive("num_items", num_items)
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if sequences % 2:
        raise ValueError(
            f"the batch must hold B chosen and then B rejected sequences, an even number, got {sequences} sequences"
        )
    for name, value in vectors.items():
        if value is None:
            continue
        length, what = (sequences, "one per sequence") if name == "scores" else (sequences // 2, "one per pair")
        _checks.vector(name, value, length, what, like_name, like)
    if lengths is not None:
        if cu_seqlens is not None:
            raise ValueError("lengths belongs to padded batches; packed ones have cu_seqlens, got both")
        _checks.integers("lengths", lengths)
        if list(lengths.shape) != [sequences]:
            raise ValueError(f"lengths must have shape [{sequences}] (one per sequence), got {list(lengths.shape)}")
    return sequences


def check_reference(like_name, labels, sequences, given: dict) -> None:
    """At most one form of the reference; per token it has labels' shape, as sums [2B]."""
    present = [name for name, value in given.items() if value is not None]
    if len(present) > 1:
        raise ValueError(f"the reference must be given in one form, got {' and '.join(present)}")
    if (per_token := given["ref_token_logps"]) is not None:
        _checks.floats("ref_token_logps", per_token)
        _checks.shaped_like("ref_token_logps", per_token, "labels", labels)
    if given["ref_logps"] is not None:
        _checks.vector("ref_logps", given["ref_logps"], sequences, "one per sequence", like_name, labels)


# ---- losses, reduction, output ----


class Gathered(NamedTuple):
    losses: Tensor  # [B], unweighted; with the gradient, unless that went into a reduced loss already
    logps: Tensor  # [2B]
    logratios: Tensor  # [2B]
    lengths: Tensor  # [2B]
    values: Tensor  # [4, *labels.shape] or empty


def wanted_stats(stats, loss, loss_options) -> tuple[str, ...]:
    """The by-products to ask the gather for: the caller's, and those the loss is made of."""
    wpo = "wpo" in losses.traits(loss, loss_options).needs
    return tuple(name for name in STATS if name in stats or (wpo and name == "log_sum_p2"))


def pair_losses(
    tokens, values, sequences, ref_tokens, ref_logps, rating_gap, scores, loss, loss_weights, loss_options, beta
) -> Gathered:
    """Any loss as torch on vectors, differentiable in `tokens`, the log-probs of labels' shape.

    values: [4, *labels.shape], STATS; ref_tokens: labels' shape, ref_logps: [2B], or None.
    """
    needs = losses.traits(loss, loss_options).needs
    sums = sequences.sum(tokens)
    token_ratios, logratios = tokens.double(), None
    if ref_tokens is not None:
        token_ratios = token_ratios - ref_tokens.detach().double()
        logratios = sequences.sum(token_ratios)
    elif ref_logps is not None:
        token_ratios = None  # only their sums are known
        logratios = sums - ref_logps.detach().double()

    def halves(vector):
        if vector is None:
            return None, None
        vector = vector.to(tokens.dtype) if vector.dtype.is_floating_point else vector
        return vector[: vector.shape[0] // 2], vector[vector.shape[0] // 2 :]

    lengths = sequences.lengths()
    tail = weights = None
    if "tail" in needs:
        if token_ratios is None:
            raise ValueError(
                "a loss on part of the completion needs the reference per token (ref_token_logps or the reference's "
                "logits or hidden states), got ref_logps"
            )
        shorter = torch.minimum(*halves(lengths)).repeat(2)
        tail = sequences.sum(torch.where(sequences.beyond(shorter), token_ratios, 0.0))
    if "wpo" in needs:
        weights = sequences.sum(tokens.detach() - values[STATS.index("log_sum_p2")]) / lengths.clamp(min=1)
    ref_sums = None if logratios is None else (sums - logratios).detach()
    pairs = losses.Pairs(
        *halves(sums),
        *halves(ref_sums),
        *halves(lengths),
        None if rating_gap is None else rating_gap.detach().to(tokens.dtype),
        *halves(logratios),
        *halves(tail),
        *halves(weights),
        *halves(None if scores is None else scores.detach()),
    )
    if isinstance(loss, (list, tuple)):
        per_pair = losses.mixture(pairs, loss, loss_weights, loss_options, beta)
    else:
        per_pair = losses.pair_loss(pairs, loss, beta=beta, options=loss_options)
    ratios = sums if logratios is None else logratios
    return Gathered(per_pair, sums.to(tokens.dtype), ratios.to(tokens.dtype), lengths, values)


def pair_scale(like: Tensor, pair_weights, reduction, num_items) -> Tensor:
    """What each pair's loss is multiplied by before they are added up: [B] of like's shape, dtype and device."""
    scale = torch.ones_like(like) if pair_weights is None else pair_weights.detach().to(like.dtype)
    if reduction != "mean":
        return scale
    if num_items is not None:
        return scale / num_items
    total = scale.sum()
    return scale / torch.where(total == 0, 1.0, total)


def reduce(gathered: Gathered, pair_weights, reduction, num_items) -> Tensor:
    weighted = gathered.losses * pair_scale(gathered.losses, pair_weights, reduction, num_items)
    return weighted if reduction == "none" else weighted.sum()


def output(loss: Tensor, gathered: Gathered, sequences: Sequences, rating_gap, beta, stats) -> PreferenceOutput:
    logps, lengths = gathered.logps.detach(), gathered.lengths
    pairs = gathered.losses.shape[0]
    rewards = beta * gathered.logratios.detach()
    margins = rewards[:pairs] - rewards[pairs:]
    means = {}
    if stats:
        chosen, rejected = lengths[:pairs].sum().clamp(min=1), lengths[pairs:].sum().clamp(min=1)
        for name, value in zip(STATS, gathered.values, strict=True):
            if name not in stats:
                continue
            sums = sequences.sum(value).float()
            if name == "mean_logit":
                means["chosen_mean_logit"] = sums[:pairs].sum() / chosen
                means["rejected_mean_logit"] = sums[pairs:].sum() / rejected
            else:
                means[name] = sums.sum() / lengths.sum().clamp(min=1)
            if name == "top1":
                means["chosen_top1"] = sums[:pairs].sum() / chosen
    return PreferenceOutput(
        loss=loss,
        chosen_logps=logps[:pairs],
        rejected_logps=logps[pairs:],
        chosen_rewards=rewards[:pairs],
        rejected_rewards=rewards[pairs:],
        margins=margins,
        accuracy=_mean((margins > 0).float()),
        stats=PreferenceStats(
            losses=gathered.losses.detach(),
            chosen_lengths=lengths[:pairs],
            rejected_lengths=lengths[pairs:],
            ties=(margins == 0).sum(),
            unrated=lengths.new_zeros(()) if rating_gap is None else rating_gap.isnan().sum(),
            **means,
        ),
    )
