"""Preference losses for a whole training step: gather, pair epilogue and scatter in one call.

    gather    logits -> logps[token] -> sums[sequence]          token_logps
    epilogue  a few vectors of length B -> loss, coefficients   losses
    scatter   coefficient * (onehot - softmax) -> logits        token_logps' backward

Only the middle step knows which loss it is. For the rating-aware logistic family (`losses.Logistic`: DPO, conservative
and robust DPO, RDPO, RIPO, ML-RDPO, DDPO, IPO on sums) all three run in one native call forward and one backward; any
other loss, a user's own included, runs as torch on vectors between the same two kernels, with the same results.
"""

from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import _checks, _library, _native, losses
from fastpref._logps.token_logps import (
    SCHEMA_OPTIONS,
    STATS,
    _native_bwd_args,
    _native_fwd_args,
    as_rows,
    check_options,
    logits_gradient,
    shifted,
    token_logps,
)


class SequenceLogps(NamedTuple):
    sums: Tensor  # [sequences] sum of the log-probs of the tokens that count
    lengths: Tensor  # [sequences] int64, how many they are


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


# ---- sums over sequences ----


class Sequences:
    """Where the sequences lie in labels: rows of [sequences, T], or segments of [tokens] between cu_seqlens."""

    def __init__(self, labels: Tensor, ignore_index: int, cu_seqlens: Tensor | None, group=None):
        self.counted = labels != ignore_index
        # only the CPU in eager mode has checked them: nothing may be read out of bounds elsewhere
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.clamp(0, labels.shape[0]).cummax(0).values
        self.count = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.group = group  # over which the tokens of each sequence are spread

    def sum(self, values: Tensor) -> Tensor:
        """Tokens that count, added up per sequence in float64; the others are selected out, NaN or not."""
        values = torch.where(self.counted, values.double(), 0.0)
        if self.cu_seqlens is None:
            sums = values.sum(-1)
        else:
            sums = torch.segment_reduce(values, "sum", offsets=self.cu_seqlens, initial=0.0)
        return sums if self.group is None else _SumOverRanks.apply(sums, self.group)

    def lengths(self) -> Tensor:
        return self.sum(self.counted).long()

    def per_token(self, values: Tensor) -> Tensor:
        """[sequences] -> the shape of labels."""
        if self.cu_seqlens is None:
            return values.unsqueeze(-1).expand_as(self.counted)
        positions = torch.arange(self.counted.shape[0], device=values.device)
        return values[torch.searchsorted(self.cu_seqlens[1:-1].contiguous(), positions, right=True)]

    def beyond(self, length: Tensor) -> Tensor:
        """Which tokens come after the first `length[sequence]` that count."""
        if self.group is not None:
            raise ValueError("sequence_group must be None for a loss on part of the completion: no rank sees it whole")
        rank = self.counted.cumsum(-1)
        if self.cu_seqlens is not None:
            before = torch.nn.functional.pad(rank, (1, 0))[self.cu_seqlens[:-1]]
            rank = rank - self.per_token(before)
        return self.counted & (rank > self.per_token(length))


class _SumOverRanks(torch.autograd.Function):
    """Every rank computes the same loss of the sum, so each addend's gradient is the sum's."""

    @staticmethod
    def forward(ctx, addend, group):
        total = addend.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sequence_logps(
    token_logps: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> SequenceLogps:
    """Sums of per-token log-probs over each sequence, and how many tokens they cover.

    Args:
        token_logps: [sequences, T], or [tokens] with cu_seqlens; floating point. Differentiable.
        labels: the same shape, as given to token_logps; positions with ignore_index do not count.
        cu_seqlens: [sequences + 1], int32 or int64: sequence s is token_logps[cu_seqlens[s] : cu_seqlens[s + 1]].
        shift: labels are unshifted, as in token_logps.

    Returns:
        sums [sequences], accumulated in float64 and rounded to token_logps' dtype; lengths [sequences], int64.
    """
    _checks.floats("token_logps", token_logps)
    _checks.integers("labels", labels)
    _checks.ignore_index(ignore_index)
    if labels.shape != token_logps.shape:
        raise ValueError(
            f"labels must have shape {list(token_logps.shape)} to match token_logps, got {list(labels.shape)}"
        )
    _checks.same_device("labels", labels, "token_logps", token_logps)
    check_layout(labels, cu_seqlens, "token_logps")
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.long()
    labels = targets(labels, cu_seqlens, None, ignore_index, shift)
    sequences = Sequences(labels, ignore_index, cu_seqlens)
    return SequenceLogps(sequences.sum(token_logps).to(token_logps.dtype), sequences.lengths())


def targets(labels, cu_seqlens, lengths, ignore_index, shift) -> Tensor:
    """Labels aligned with the logits, int64: shifted within each sequence, padding ignored."""
    labels = labels.long()
    if lengths is not None:
        positions = torch.arange(labels.shape[1], device=labels.device)
        labels = labels.masked_fill(positions >= lengths.unsqueeze(-1), ignore_index)
    if not shift:
        return labels
    labels = shifted(labels, ignore_index)
    if cu_seqlens is None or labels.shape[0] == 0:
        return labels
    # the last token of a sequence must not predict the first of the next; an empty first sequence wraps to the end
    last = torch.remainder(cu_seqlens[1:] - 1, labels.shape[0])
    return labels.index_fill(0, last, ignore_index)


def check_layout(labels: Tensor, cu_seqlens: Tensor | None, like: str) -> None:
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise ValueError(
                f"labels must have shape [sequences, tokens], or [tokens] with cu_seqlens, got {list(labels.shape)}"
            )
        return
    _checks.integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [sequences + 1], got {list(cu_seqlens.shape)}")
    if labels.dim() != 1:
        raise ValueError(f"labels must have shape [tokens] with cu_seqlens, got {list(labels.shape)}")
    if cu_seqlens.device.type != "cpu" or like != "hidden":  # which may be elsewhere than the host's counts
        _checks.same_device("cu_seqlens", cu_seqlens, like, labels)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != labels.shape[0] or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {labels.shape[0]}, got {ends}")


# ---- the fused family: one native call forward, one backward ----


def _fwd(
    logits, labels, ref_logits, ref_token_logps, ref_logps, cu_seqlens, rating_gap, temperature, softcap, scale,
    ignore_index, stats, family, drop_square,
):  # fmt: skip
    core = _native._core
    options = (temperature, softcap, scale, ignore_index)
    rows = as_rows(logits)
    shape = rows.shape[:2]
    flat = labels.reshape(shape).contiguous()
    (token_logps, lse, values), policy = _native_fwd_args(rows, flat, *options, stats)
    reference = ref_rows = _ref_outputs = None  # named: the call below only holds their addresses
    if ref_logits is not None:
        ref_rows = as_rows(ref_logits)
        _ref_outputs, reference = _native_fwd_args(ref_rows, flat, *options, False)
    inputs = [None if t is None else t.contiguous() for t in (ref_token_logps, ref_logps, cu_seqlens, rating_gap)]
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    logps, logratios, coefficients = (torch.empty(sequences, dtype=torch.float32) for _ in range(3))
    lengths = torch.empty(sequences, dtype=torch.int64)
    pair_losses = torch.empty(sequences // 2, dtype=torch.float32)
    core.preference_fwd_cpu(
        policy,
        reference,
        _native.address(inputs[0]),
        _native.address(inputs[1]),
        _native.address(inputs[2]),
        sequences // 2,
        labels.shape[-1],
        _native.address(inputs[3]),
        core.LogisticFamily(*family, drop_square),
        logps.data_ptr(),
        logratios.data_ptr(),
        lengths.data_ptr(),
        pair_losses.data_ptr(),
        coefficients.data_ptr(),
        torch.get_num_threads(),
    )
    shape = labels.shape
    values = values.view(values.shape[0], *shape)
    return pair_losses, logps, logratios, lengths, coefficients, token_logps.view(shape), lse.view(2, *shape), values


def _fwd_fake(
    logits, labels, ref_logits, ref_token_logps, ref_logps, cu_seqlens, rating_gap, temperature, softcap, scale,
    ignore_index, stats, family, drop_square,
):  # fmt: skip
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    empty = logits.new_empty
    return (
        empty(sequences // 2, dtype=torch.float32),
        empty(sequences, dtype=torch.float32),
        empty(sequences, dtype=torch.float32),
        empty(sequences, dtype=torch.int64),
        empty(sequences, dtype=torch.float32),
        empty(labels.shape, dtype=torch.float32),
        empty((2, *labels.shape), dtype=torch.float32),
        empty((4 if stats else 0, *labels.shape), dtype=torch.float32),
    )


def _bwd_into(out, grad_losses, coefficients, logits, labels, cu_seqlens, token_logps, lse, *options):
    rows = as_rows(logits)
    shape = rows.shape[:2]
    flat = labels.reshape(shape).contiguous()
    token_grad = torch.empty(shape, dtype=torch.float32)
    grad_losses, cu_seqlens = grad_losses.contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous()
    tokens = _native_bwd_args(
        token_grad, rows, flat, token_logps.reshape(shape), lse.reshape(2, *shape), *options, as_rows(out)
    )
    _native._core.preference_bwd_cpu(
        tokens,
        token_grad.data_ptr(),
        _native.address(cu_seqlens),
        grad_losses.shape[0],
        labels.shape[-1],
        coefficients.data_ptr(),
        grad_losses.data_ptr(),
        torch.get_num_threads(),
    )


def _bwd(grad_losses, coefficients, logits, *args):
    out = _native.empty(logits.shape, logits.dtype, logits.device)
    _bwd_into(out, grad_losses, coefficients, logits, *args)
    return out


def _bwd_fake(grad_losses, coefficients, logits, *args):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _bwd_inplace(grad_losses, coefficients, logits, *args):
    _bwd_into(logits, grad_losses, coefficients, logits, *args)


_SAVED = f"Tensor labels, Tensor? cu_seqlens, Tensor token_logps, Tensor lse, {SCHEMA_OPTIONS}"
preference_fwd = _library.define(
    "preference_fwd(Tensor logits, Tensor labels, Tensor? ref_logits, Tensor? ref_token_logps, Tensor? ref_logps, "
    f"Tensor? cu_seqlens, Tensor? rating_gap, {SCHEMA_OPTIONS}, bool stats, float[] family, bool drop_square) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
preference_bwd = _library.define(
    f"preference_bwd(Tensor grad_losses, Tensor coefficients, Tensor logits, {_SAVED}) -> Tensor", _bwd, _bwd_fake
)
preference_bwd_ = _library.define(
    f"preference_bwd_(Tensor grad_losses, Tensor coefficients, Tensor(a!) logits, {_SAVED}) -> ()",
    _bwd_inplace,
    lambda *args: None,
)


def _epilogue_reason(device: str) -> str | None:
    if device != "cpu":
        return "the fused epilogue runs on the CPU; elsewhere the loss is torch on vectors between token_logps' kernels"
    return _native.cpu_missing()


_library.OPS["preference_loss"] = {"native": _epilogue_reason, "torch": _library.reference_reason}


class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return preference_fwd(*args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, _, _, _, cu_seqlens, _, *options, _stats, _family, _drop, ctx.inplace = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        coefficients, tokens, lse = output[4:7]
        ctx.save_for_backward(logits, labels, cu_seqlens, tokens, lse, coefficients)
        ctx.args = options

    @staticmethod
    def backward(ctx, grad_losses, *_):
        if grad_losses is None:
            return (None,) * 15

        def run(op, logits, *saved):
            return op(grad_losses, saved[-1], logits, *saved[:-1], *ctx.args)

        return logits_gradient(ctx, preference_bwd, preference_bwd_, run), *(None,) * 14


_library.cache_signature(_Preference)


def _family(loss, beta, loss_options, has_reference: bool) -> tuple[list[float], bool] | None:
    """Coefficients for the native epilogue, or None for a loss (or reference) it does not know."""
    if isinstance(loss, (list, tuple)):
        return None
    options = dict(loss_options or {})
    if bool(options.get("reference_free")) == has_reference:
        return None
    logistic = getattr(losses.get_loss(loss), "logistic", None)
    record = logistic(**{"beta": beta, **options}) if logistic else None
    if record is None:
        return None
    *coefficients, drop_square = record
    return [float(options.get("beta", beta)), *map(float, coefficients)], drop_square


# ---- public ----


def preference_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_logits: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_token_logps: Tensor | None = None,
    loss: str | Callable[..., Tensor] | Sequence = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    loss_options: Mapping[str, Any] | Sequence | None = None,
    beta: float = 0.1,
    rating_gap: Tensor | None = None,
    scores: Tensor | None = None,
    pair_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    stats: tuple[str, ...] = (),
    backend: str | None = None,
) -> PreferenceOutput:
    """A preference loss on a batch of pairs, from the policy's logits to a scalar with a gradient.

    Args:
        logits: [2B, T, V], the B chosen sequences first, then the B rejected ones in the same order; or packed,
            [tokens, V] with cu_seqlens, again the chosen sequences first. float32, bfloat16, float16 or float64.
        labels: [2B, T] or [tokens], int64 or int32; prompt and padding carry ignore_index, and are not read.
        ref_logits, ref_token_logps, ref_logps: the reference model, in one of three forms: its logits (same shape as
            logits; no gradient flows), its log-prob per token (labels' shape), or its sums [2B]. The first two are
            subtracted per token, which keeps the digits that a difference of two long sums loses.
        loss: a name in losses.LOSSES, a callable(losses.Pairs) -> [B], or a list of these, summed with loss_weights.
        loss_options: keyword options of the loss; for a list, a list of mappings (or None), one per loss.
        beta: the scale of the implicit reward, beta * (policy - reference). Under torch.compile it is a constant, as
            the transform is: a new value compiles anew.
        rating_gap: [B], rating of the chosen minus rating of the rejected response; NaN = not rated.
        scores: [2B], absolute scores or win probabilities, for the losses that need both.
        pair_weights: [B]; the mean is normalised by their sum. Like ratings and scores they are data: no gradient.
        reduction: "mean" over pairs, "sum", or "none" for [B].
        num_items: replaces the mean's divisor: the pairs (or weights) of all accumulated micro-batches and ranks.
        cu_seqlens: [2B + 1], int32 or int64, offsets of packed sequences.
        lengths: [2B], positions of each padded sequence that are real; later ones are ignored whatever their label.
        shift, temperature, softcap, scale, ignore_index, inplace_backward, stats, backend: as in token_logps; shift
            respects packed boundaries.

    Returns:
        PreferenceOutput; nothing in it is read on the host. A sequence with no token that counts has log-prob 0 and no
        gradient, and a batch without pairs a differentiable loss of 0.

    Raises:
        TypeError, ValueError: as token_logps; for a missing input of the loss; for an unknown loss, with the nearest.
    """
    _checks.logits("logits", logits)
    _checks.labels(labels, logits)
    check_options(logits, temperature, softcap, scale, ignore_index, inplace_backward, stats, backend)
    check_layout(labels, cu_seqlens, "logits")
    sequences = check_pairs(
        "logits", logits, labels, loss, loss_weights, loss_options, beta, reduction, num_items, cu_seqlens, lengths,
        {"rating_gap": rating_gap, "pair_weights": pair_weights, "scores": scores},
    )  # fmt: skip
    check_reference(
        "logits",
        labels,
        sequences,
        {"ref_logits": ref_logits, "ref_token_logps": ref_token_logps, "ref_logps": ref_logps},
    )
    if ref_logits is not None:
        _checks.logits("ref_logits", ref_logits)
        _checks.shaped_like("ref_logits", ref_logits, "logits", logits)

    if lengths is not None:
        _checks.same_device("lengths", lengths, "logits", logits)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.long()
    labels = targets(labels, cu_seqlens, lengths, ignore_index, shift)
    transform = {"temperature": float(temperature), "softcap": softcap, "scale": float(scale)}
    step = _Step(logits, labels, ref_logits, ref_token_logps, ref_logps, cu_seqlens, rating_gap, scores)
    has_reference = not (ref_logits is None and ref_token_logps is None and ref_logps is None)
    family = _family(loss, beta, loss_options, has_reference) if _can_fuse(logits, ref_logits, backend) else None
    if family is not None and not (rating_gap is None and "rating_gap" in losses.get_loss(loss).needs):
        gathered = _fused(step, family, transform, ignore_index, inplace_backward, bool(stats))
    else:
        gathered = _vectors(
            step, loss, loss_weights, loss_options, beta, transform, ignore_index, inplace_backward, stats, backend
        )
    if loss_options and not isinstance(loss, (list, tuple)):
        beta = loss_options.get("beta", beta)  # the rewards are those of the loss
    sequences = Sequences(labels, ignore_index, cu_seqlens)
    reduced = reduce(gathered, pair_weights, reduction, num_items)
    return output(reduced, gathered, sequences, rating_gap, beta, stats)


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


class _Step(NamedTuple):
    """The tensors of a step, checked, with labels aligned to the logits."""

    logits: Tensor
    labels: Tensor
    ref_logits: Tensor | None
    ref_token_logps: Tensor | None
    ref_logps: Tensor | None
    cu_seqlens: Tensor | None
    rating_gap: Tensor | None
    scores: Tensor | None


class Gathered(NamedTuple):
    losses: Tensor  # [B], unweighted; with the gradient, unless that went into a reduced loss already
    logps: Tensor  # [2B]
    logratios: Tensor  # [2B]
    lengths: Tensor  # [2B]
    values: Tensor  # [4, *labels.shape] or empty


def _can_fuse(logits: Tensor, ref_logits: Tensor | None, backend: str | None) -> bool:
    return (
        _epilogue_reason(logits.device.type) is None
        and logits.dtype in _native.DTYPE_CODES
        and (ref_logits is None or ref_logits.dtype in _native.DTYPE_CODES)
        and backend in (None, "native")
    )


def _fused(step: _Step, family, transform, ignore_index, inplace, stats) -> Gathered:
    vectors = [None if v is None else v.detach().float() for v in (step.ref_token_logps, step.ref_logps)]
    gap = None if step.rating_gap is None else step.rating_gap.detach().float()
    ref_logits = None if step.ref_logits is None else step.ref_logits.detach()
    args = (
        step.logits, step.labels, ref_logits, *vectors, step.cu_seqlens, gap, *transform.values(), ignore_index, stats,
        *family,
    )  # fmt: skip
    pair_losses, logps, logratios, lengths, _, _, _, values = _Preference.apply(*args, inplace)
    return Gathered(pair_losses, logps, logratios, lengths, values)


def _vectors(
    step: _Step, loss, loss_weights, loss_options, beta, transform, ignore_index, inplace, stats, backend
) -> Gathered:
    options = {**transform, "ignore_index": ignore_index, "backend": backend}
    wanted = wanted_stats(stats, loss, loss_options)
    tokens = token_logps(step.logits, step.labels, inplace_backward=inplace, stats=wanted, **options)
    tokens, token_stats = tokens if wanted else (tokens, None)
    ref_tokens = step.ref_token_logps
    if step.ref_logits is not None:
        with torch.no_grad():
            ref_tokens = token_logps(step.ref_logits, step.labels, **options)
    values = tokens.new_empty((0, *tokens.shape), dtype=torch.float32)
    if token_stats is not None:
        missing = torch.zeros_like(tokens, dtype=torch.float32)
        values = torch.stack([missing if value is None else value for value in token_stats])
    sequences = Sequences(step.labels, ignore_index, step.cu_seqlens)
    return pair_losses(
        tokens, values, sequences, ref_tokens, step.ref_logps, step.rating_gap, step.scores,
        loss, loss_weights, loss_options, beta,
    )  # fmt: skip


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
