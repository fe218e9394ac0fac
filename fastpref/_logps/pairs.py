"""What both preference losses share: checks of a batch of pairs, losses as torch on vectors, reduction, output."""

import ast
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import _autograd, _checks, _library, losses
from fastpref._logps.sequences import Sequences
from fastpref._logps.token_logps import STATS


class PreferenceStats(NamedTuple):
    """Beside the loss; all detached, no value is read on the host."""

    losses: Tensor  # [B] before weights and reduction
    chosen_lengths: Tensor  # [B] int64, tokens that count
    rejected_lengths: Tensor
    ties: Tensor  # how many margins are exactly 0: neither right nor wrong
    unrated: Tensor  # how many rating gaps are NaN
    invalid_labels: Tensor | None = None  # how many, of a loss in one launch; the CPU refuses them
    entropy: Tensor | None = None  # means over all tokens that count, where asked for by stats=
    log_sum_p2: Tensor | None = None
    top1: Tensor | None = None
    chosen_mean_logit: Tensor | None = None
    rejected_mean_logit: Tensor | None = None
    chosen_top1: Tensor | None = None  # over the chosen tokens alone


class PreferenceOutput(NamedTuple):
    """All but `loss` is detached."""

    __module__ = "fastpref"

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


# ---- options that travel together ----


class Loss(NamedTuple):
    """`loss`, `loss_weights`, `loss_options` and `beta` of a preference loss."""

    loss: str | Callable[..., Tensor] | Sequence  # of losses.LOSSES, or callables of losses.Pairs
    weights: Sequence[float] | None
    options: Mapping[str, Any] | Sequence | None
    beta: float

    def is_list(self) -> bool:
        return isinstance(self.loss, (list, tuple))

    def is_named(self) -> bool:
        """Whether it is made of losses.LOSSES alone."""
        return all(isinstance(part, str) for part in (self.loss if self.is_list() else [self.loss]))

    def traits(self) -> losses.LossTraits:
        return losses.traits(self.loss, self.options)

    def per_pair(self, pairs: losses.Pairs) -> Tensor:
        if self.is_list():
            return losses.mixture(pairs, self.loss, self.weights, self.options, self.beta)
        return losses.pair_loss(pairs, self.loss, beta=self.beta, options=self.options)

    def reward_scale(self) -> float:
        """The rewards are those of the loss, whose options may override beta."""
        return self.options.get("beta", self.beta) if self.options and not self.is_list() else self.beta


class EncodedLoss(NamedTuple):
    """A Loss in an operator's schema, which has no room for mappings, and takes a float for a constant of the graph."""

    losses: list[str]
    loss_options: list[str]  # "0.max_weight=None": of the first loss; "1.label_smoothing": the next of the numbers
    numbers: Tensor  # float64 on the host: beta, a weight per loss, and the options that are numbers


def encode_loss(loss: Loss) -> EncodedLoss | None:
    """None unless its losses are names, and their options numbers, strings, booleans or None."""
    names = list(loss.loss) if loss.is_list() else [loss.loss]
    options = losses._per_loss("loss_options", loss.options if loss.is_list() else [loss.options], names, None)
    weights = losses._per_loss("loss_weights", loss.weights, names, 1.0)
    numbers, words = [loss.beta, *weights], []
    for index, own in enumerate(options):
        for key, value in (own or {}).items():
            if value is None or isinstance(value, (bool, str)):
                words.append(f"{index}.{key}={value!r}")
            else:
                words.append(f"{index}.{key}")
                numbers.append(value)
    if all(isinstance(name, str) for name in names) and all(isinstance(value, (int, float)) for value in numbers):
        return EncodedLoss(names, words, host_numbers(numbers))
    return None


def decode_loss(encoded: EncodedLoss) -> Loss:
    names = encoded.losses
    beta, *numbers = encoded.numbers.tolist()
    weights, numbers = numbers[: len(names)], iter(numbers[len(names) :])
    options = [{} for _ in names]
    for word in encoded.loss_options:
        index, _, option = word.partition(".")
        key, is_literal, literal = option.partition("=")
        options[int(index)][key] = ast.literal_eval(literal) if is_literal else next(numbers)
    if weights == [1.0]:
        return Loss(names[0], None, options[0], beta)
    return Loss(names, weights, options, beta)


class Family(NamedTuple):
    """A loss of the fused family, as the native epilogue takes it."""

    numbers: list[float]  # beta of the rewards, and the numbers of losses.Logistic
    drop_square: bool


def logistic_family(loss: Loss, has_reference: bool, has_rating: bool) -> Family | None:
    """None for a loss, or one without what it needs, of which torch on vectors knows more."""
    if loss.is_list():
        if len(loss.loss) != 1 or loss.weights not in (None, [1.0]):
            return None
        loss = Loss(loss.loss[0], None, loss.options[0] if loss.options else None, loss.beta)
    options = dict(loss.options or {})
    if bool(options.get("reference_free")) == has_reference:
        return None
    known = losses.get_loss(loss.loss)
    logistic = getattr(known, "logistic", None)
    record = logistic(**{"beta": loss.beta, **options}) if logistic else None
    if record is None or ("rating_gap" in known.needs and not has_rating):
        return None
    *numbers, drop_square = record
    return Family([loss.reward_scale(), *numbers], drop_square)


FUSED_BACKENDS = {"native": _library.native_reason, "triton": _library.triton_reason}


def fused_backend(device: str, backend: str) -> str | None:
    """The one asked for, or for "" the fastest, of those that run the fused family; None: no such one serves here."""
    serving = (name for name, reason in FUSED_BACKENDS.items() if backend in ("", name) and reason(device) is None)
    return next(serving, None)


def serving_backend(op: str, device: str, backend: str) -> str:
    """fused_backend, inside an operator: none serves a saved program on a machine that lacks what its own had."""
    name = fused_backend(device, backend)
    if name is None:
        reasons = {name: reason(device) for name, reason in FUSED_BACKENDS.items() if backend in ("", name)}
        raise RuntimeError(f"no backend of {op} serves {device} tensors here: {reasons}")
    return name


def host_numbers(values: Sequence[float]) -> Tensor:
    """Float64 on the host.

    torch.compile makes an input of the graph of a number that is multiplied, and a constant of one in torch.tensor,
    where every new value would compile anew.
    """
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in values])


class Reduction(NamedTuple):
    """`reduction`, `pair_weights` and `num_items` of a preference loss."""

    kind: str
    pair_weights: Tensor | None
    num_items: float | Tensor | None

    def scale_of_pair(self, like: Tensor) -> Tensor:
        """What each pair's loss is multiplied by before they are added up: [B] of like's shape, dtype and device."""
        if self.pair_weights is None:
            divisor = self._divisor(like)
            if isinstance(divisor, Tensor):
                return torch.ones_like(like) / divisor
            return torch.full_like(like, 1 / divisor)
        scale = self.pair_weights.detach().to(like.dtype)
        return scale if self.kind != "mean" else scale / self._divisor(like)

    def _divisor(self, like: Tensor) -> float | Tensor:
        """Known on the host but where the caller's data are what it is made of."""
        if self.kind != "mean":
            return 1
        if self.num_items is not None:
            return self.num_items
        if self.pair_weights is None:
            return max(like.shape[0], 1)
        total = self.pair_weights.detach().to(like.dtype).sum()
        return torch.where(total == 0, 1.0, total)

    def reduce(self, per_pair: Tensor) -> Tensor:
        if self.pair_weights is None:
            reduced = per_pair if self.kind == "none" else per_pair.sum()
            return reduced / self._divisor(per_pair) if self.kind == "mean" else reduced
        weighted = per_pair * self.scale_of_pair(per_pair)
        return weighted if self.kind == "none" else weighted.sum()


class PairData(NamedTuple):
    """What a loss may read beside the policy's log-probs. No gradient flows into it."""

    ref_token_logps: Tensor | None  # of labels' shape
    ref_logps: Tensor | None  # [2B]
    rating_gap: Tensor | None  # [B]
    scores: Tensor | None  # [2B]


# ---- checks ----


def check_pairs(
    like_name: str, like: Tensor, labels: Tensor, loss: Loss, reduction: Reduction, data: PairData, cu_seqlens, lengths
) -> int:
    """What every call on pairs takes, beside its tensors of tokens; returns the number of sequences."""
    _checks.positive("beta", loss.beta)
    losses.check_reduction(reduction.kind)
    num_items = reduction.num_items
    if num_items is not None and reduction.kind != "mean":
        raise ValueError(f"num_items replaces the divisor of reduction='mean', got reduction={reduction.kind!r}")
    if not loss.is_list() and loss.weights is not None:
        raise ValueError(f"loss_weights needs a list of losses, got loss={loss.loss!r}")
    if not loss.is_list() and not isinstance(loss.options, (Mapping, NoneType)):
        raise TypeError(f"loss_options must be a mapping for a single loss, got {type(loss.options).__name__}")
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
    for name, value, length, what in (
        ("rating_gap", data.rating_gap, sequences // 2, "one per pair"),
        ("pair_weights", reduction.pair_weights, sequences // 2, "one per pair"),
        ("scores", data.scores, sequences, "one per sequence"),
    ):
        if value is not None:
            _checks.vector(name, value, length, what, like_name, like)
    if lengths is not None:
        if cu_seqlens is not None:
            raise ValueError("lengths belongs to padded batches; packed ones have cu_seqlens, got both")
        _checks.integers("lengths", lengths)
        if list(lengths.shape) != [sequences]:
            raise ValueError(f"lengths must have shape [{sequences}] (one per sequence), got {list(lengths.shape)}")
    return sequences


def check_reference(
    like_name: str, labels: Tensor, sequences: int, loss: Loss, data: PairData, name: str, value
) -> None:
    """At most one form of the reference; per token it has labels' shape, as sums [2B], which not every loss can use.

    name, value: the third form, the reference's logits or hidden states.
    """
    given = {name: value, "ref_token_logps": data.ref_token_logps, "ref_logps": data.ref_logps}
    present = [form for form, value in given.items() if value is not None]
    if len(present) > 1:
        raise ValueError(f"the reference must be given in one form, got {' and '.join(present)}")
    if data.ref_token_logps is not None:
        _checks.floats("ref_token_logps", data.ref_token_logps)
        _checks.shaped_like("ref_token_logps", data.ref_token_logps, "labels", labels)
    if data.ref_logps is not None:
        _checks.vector("ref_logps", data.ref_logps, sequences, "one per sequence", like_name, labels)
        if "tail" in loss.traits().needs:
            raise ValueError(
                "a loss on part of the completion needs the reference per token (ref_token_logps or the "
                "reference's logits or hidden states), got ref_logps"
            )


# ---- losses and output ----


class Gathered(NamedTuple):
    losses: Tensor  # [B], unweighted; with the gradient, unless that went into a reduced loss already
    logps: Tensor  # [2B]
    logratios: Tensor  # [2B]
    lengths: Tensor  # [2B]
    values: Tensor  # [4, *labels.shape] or empty


def wanted_stats(stats: tuple[str, ...], loss: Loss) -> tuple[str, ...]:
    """The by-products to ask the gather for: the caller's, and those the loss is made of."""
    wpo = "wpo" in loss.traits().needs
    return tuple(name for name in STATS if name in stats or (wpo and name == "log_sum_p2"))


def _halves(vector: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """[2B] -> [B] and [B]. The gradient of the two is one stack."""
    return (None, None) if vector is None else vector.reshape(2, vector.shape[0] // 2).unbind(0)


class SequenceSums(NamedTuple):
    """What a loss is made of, per sequence; differentiable but for the lengths and weights."""

    logps: Tensor  # [2B]
    logratios: Tensor | None  # [2B]; None without a reference
    lengths: Tensor  # [2B] int64
    tail: Tensor | None = None  # [2B] log-ratios beyond the shorter of the pair
    weights: Tensor | None = None  # [2B] WPO's

    @classmethod
    def of(cls, tokens: Tensor, values: Tensor, sequences: Sequences, data: PairData, needs) -> "SequenceSums":
        """Of the log-probs of labels' shape, in their dtype; values: [4, *labels.shape], STATS."""
        ref_sums = None if data.ref_logps is None else data.ref_logps.detach().double()
        if ref_sums is None and data.ref_token_logps is not None:
            ref_sums = sequences.sum(data.ref_token_logps.detach())
        logps, logratios = sequences.sum_logps(tokens, ref_sums)
        lengths = sequences.lengths()
        tail = weights = None
        if "tail" in needs:
            ratios = tokens.double()
            if data.ref_token_logps is not None:
                ratios = ratios - data.ref_token_logps.detach()
            tail = sequences.sum(torch.where(_beyond_the_shorter(sequences, lengths), ratios, 0.0)).to(tokens.dtype)
        if "wpo" in needs:
            weights = wpo_log_weights(logps, sequences.sum(values[STATS.index("log_sum_p2")]), lengths)
        return cls(logps, logratios, lengths, tail, weights)

    def losses(self, data: PairData, loss: Loss) -> Tensor:
        """[B]"""
        dtype, ref_logps = self.logps.dtype, None
        if self.logratios is not None and not loss.is_named():  # no loss of losses.LOSSES reads them
            ref_logps = (self.logps - self.logratios).detach()
        pairs = losses.Pairs(
            *_halves(self.logps),
            *_halves(ref_logps),
            *_halves(self.lengths),
            None if data.rating_gap is None else data.rating_gap.detach().to(dtype),
            *_halves(self.logratios),
            *_halves(self.tail),
            *_halves(self.weights),
            *_halves(None if data.scores is None else data.scores.detach().to(dtype)),
        )
        return loss.per_pair(pairs)


def wpo_log_weights(logps: Tensor, log_sum_p2: Tensor, lengths: Tensor) -> Tensor:
    """[2B] WPO's, the mean over tokens of log-prob - log sum p^2, from the sums of both."""
    return ((logps.detach() - log_sum_p2) / lengths.clamp(min=1)).to(logps.dtype)


def _beyond_the_shorter(sequences: Sequences, lengths: Tensor) -> Tensor:
    """Which tokens come after as many as the shorter sequence of the pair has."""
    return sequences.beyond(torch.minimum(*_halves(lengths)).repeat(2))


def pair_losses(tokens: Tensor, values: Tensor, sequences: Sequences, data: PairData, loss: Loss) -> Gathered:
    """Any loss as torch on vectors, differentiable in `tokens`, the log-probs of labels' shape.

    values: [4, *labels.shape], STATS.
    """
    sums = SequenceSums.of(tokens, values, sequences, data, loss.traits().needs)
    logratios = sums.logps if sums.logratios is None else sums.logratios
    return Gathered(sums.losses(data, loss), sums.logps, logratios, sums.lengths, values)


def pair_gradients(
    tokens: Tensor, values: Tensor, sequences: Sequences, data: PairData, loss: Loss, scale: Tensor
) -> tuple[Gathered, Tensor]:
    """The same, detached, and the gradient by every token of the sum of `scale` [B] times the losses.

    data.ref_logps may stand beside data.ref_token_logps: their sums, which need not be formed again.
    """
    sums = SequenceSums.of(tokens, values, sequences, data, loss.traits().needs)
    with _autograd.grad_inside_an_operator():
        leaves = {
            name: getattr(sums, name).detach().requires_grad_()
            for name in ("logps", "logratios", "tail")
            if getattr(sums, name) is not None
        }
        per_pair, found = sums._replace(**leaves).losses(data, loss), {}
        if per_pair.requires_grad:
            gradients = torch.autograd.grad(
                per_pair, list(leaves.values()), scale.to(per_pair.dtype), allow_unused=True
            )
            found = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    by_tail = found.pop("tail", None)
    if found:
        first, *rest = found.values()
        by_token = sequences.per_token(sum(rest, first))
    else:
        by_token = torch.zeros_like(tokens)  # of a loss that does not depend on them
    if by_tail is not None:
        beyond = _beyond_the_shorter(sequences, sums.lengths)
        by_token = by_token + torch.where(beyond, sequences.per_token(by_tail), 0.0)
    logratios = sums.logps if sums.logratios is None else sums.logratios
    per_pair = per_pair.detach() if loss.is_named() else per_pair.detach().clone()  # a user's may be one of its inputs
    return Gathered(per_pair, sums.logps, logratios, sums.lengths, values), by_token


def stat_means(values: Tensor, sequences: Sequences, lengths: Tensor, stats: tuple[str, ...]) -> dict[str, Tensor]:
    """Of PreferenceStats, those asked for. values: [4, *labels.shape], STATS; or empty."""
    means = {}
    pairs = lengths.shape[0] // 2
    if stats:
        chosen, rejected = lengths[:pairs].sum().clamp(min=1), lengths[pairs:].sum().clamp(min=1)
        for name, value in zip(STATS, values, strict=True):
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
    return means


def preference_output(loss: Tensor, gathered: Gathered, rating_gap, beta: float, counted: dict) -> PreferenceOutput:
    """counted: the other fields of PreferenceStats, stat_means among them."""
    logps, lengths = gathered.logps.detach(), gathered.lengths
    pairs = gathered.losses.shape[0]
    rewards = beta * gathered.logratios.detach()
    margins = rewards[:pairs] - rewards[pairs:]
    return PreferenceOutput(
        loss=loss,
        chosen_logps=logps[:pairs],
        rejected_logps=logps[pairs:],
        chosen_rewards=rewards[:pairs],
        rejected_rewards=rewards[pairs:],
        margins=margins,
        accuracy=_mean(margins > 0),
        stats=PreferenceStats(
            losses=gathered.losses.detach(),
            chosen_lengths=lengths[:pairs],
            rejected_lengths=lengths[pairs:],
            ties=(margins == 0).sum(),
            unrated=lengths.new_zeros(()) if rating_gap is None else rating_gap.isnan().sum(),
            **counted,
        ),
    )
