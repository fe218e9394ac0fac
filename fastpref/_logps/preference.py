"""Preference losses for a whole training step: gather, pair epilogue and scatter in one call.

    gather    logits -> logps[token] -> sums[sequence]          token_logps
    epilogue  a few vectors of length B -> loss, coefficients   losses
    scatter   coefficient * (onehot - softmax) -> logits        token_logps' backward

Only the middle step knows which loss it is. For the rating-aware logistic family (`losses.Logistic`: DPO, conservative
and robust DPO, RDPO, RIPO, ML-RDPO, DDPO, IPO on sums) all three run in one native call forward and one backward; any
other loss, a user's own included, runs as torch on vectors between the same two kernels, with the same results.
Where Triton takes the place of the native core, the forward is three launches. A loss on part of the completion takes
one more, and coefficients of that part.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import _autograd, _checks, _library, _native, operators
from fastpref._logps import preference_triton
from fastpref._logps.pairs import (
    FUSED_BACKENDS,
    Family,
    Gathered,
    Loss,
    PairData,
    PreferenceOutput,
    PreferenceStats,
    Reduction,
    SequenceSums,
    check_pairs,
    check_reference,
    fused_backend,
    host_numbers,
    logistic_family,
    pair_losses,
    preference_output,
    serving_backend,
    stat_means,
    wanted_stats,
    wpo_log_weights,
)
from fastpref._logps.sequences import Sequences, check_layout, targets
from fastpref._logps.token_logps import (
    STATS,
    Coefficients,
    RowLabels,
    as_rows,
    check_call,
    launch_backward,
    logits_gradient,
    native_backward,
    native_rows,
    token_logps,
)
from fastpref._logps.transform import Transform, checked_transform

# ---- the fused family: one call forward, one backward ----


class _Layout(NamedTuple):
    """The labels as the caller has them. The GPU's kernels read them so; the CPU's take `aligned` ones."""

    labels: Tensor
    cu_seqlens: Tensor | None
    lengths: Tensor | None
    shift: bool

    def aligned(self, ignore_index: int) -> "_Layout":
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.long().contiguous()
        labels = targets(self.labels, cu_seqlens, self.lengths, ignore_index, self.shift)
        return _Layout(labels.contiguous(), cu_seqlens, None, False)

    def contiguous(self) -> "_Layout":
        return _Layout(*(t.contiguous() if isinstance(t, Tensor) else t for t in self))

    def sequences(self) -> int:
        return self.labels.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def of_rows(self) -> RowLabels:
        return RowLabels(self.labels, self.sequences(), self.cu_seqlens, self.lengths, self.shift)

    def native(self, ignore_index: int):
        """Holds addresses: this value must have a name until the call."""
        integers = [
            _native._core.Integers(_native.address(t), t is not None and t.dtype == torch.int32)
            for t in (self.labels, self.cu_seqlens, self.lengths)
        ]
        return _native._core.TokenLabels(*integers, ignore_index, self.sequences(), self.labels.shape[-1], self.shift)


class _Outputs(NamedTuple):
    """Of the forward operator."""

    loss: Tensor  # [], or [B] with reduction="none"
    losses: Tensor  # [B] before weights
    logps: Tensor  # [2B]
    rewards: Tensor  # [2B]
    margins: Tensor  # [B]
    lengths: Tensor  # [2B] int64
    metrics: Tensor  # [7]: accuracy, then the means of METRICS
    counts: Tensor  # [3] int64: ties, unrated, invalid labels
    stat_sums: Tensor  # [2B, 4] float64, of STATS over the tokens; [0, 4] without stats
    tail: Tensor  # [2B] sums of policy - reference beyond as many tokens as the pair's shorter sequence has, or [0]
    tail_begin: Tensor  # [2B] int64, the first of those tokens in its sequence, or [0]
    coefficients: Tensor  # [2B]: derivative of the loss, of the pair's with reduction="none"
    token_logps: Tensor  # of labels' shape
    lse: Tensor  # [2, *labels.shape]

    @staticmethod
    def empty(logits: Tensor, layout: _Layout, reduction: str, stats: bool, tail: bool) -> "_Outputs":
        sequences, tokens = layout.sequences(), layout.labels.shape
        pairs = sequences // 2

        def empty(*shape, dtype=torch.float32):
            return logits.new_empty(shape, dtype=dtype)

        return _Outputs(
            loss=empty(pairs) if reduction == "none" else empty(),
            losses=empty(pairs),
            logps=empty(sequences),
            rewards=empty(sequences),
            margins=empty(pairs),
            lengths=empty(sequences, dtype=torch.int64),
            metrics=empty(1 + len(METRICS)),
            counts=empty(3, dtype=torch.int64),
            stat_sums=empty(sequences if stats else 0, len(STATS), dtype=torch.float64),
            tail=empty(sequences if tail else 0),
            tail_begin=empty(sequences if tail else 0, dtype=torch.int64),
            coefficients=empty(sequences),
            token_logps=empty(*tokens),
            lse=empty(2, *tokens),
        )


METRICS = ("entropy", "log_sum_p2", "top1", "chosen_mean_logit", "rejected_mean_logit", "chosen_top1")


class _PairInputs(NamedTuple):
    """Of the forward operator, contiguous float32 where they are no logits."""

    ref_logits: Tensor | None  # of the logits' shape
    ref_token_logps: Tensor | None  # of labels' shape
    ref_logps: Tensor | None  # [2B]
    rating_gap: Tensor | None  # [B]
    pair_weights: Tensor | None  # [B]
    num_items: Tensor | None  # []

    def floats(self) -> "_PairInputs":
        logits, *rest = self
        return _PairInputs(logits, *(None if t is None else t.float().contiguous() for t in rest))


class _LogisticFamily(NamedTuple):
    """csrc/preference.h's LogisticFamily, and the number that replaces the mean's divisor, or 0."""

    beta: float
    a: float
    b: float
    c: float
    m0: float
    m1: float
    offset: float
    num_items: float
    drop_square: bool


# ---- native ----


def _native_fwd(
    logits,
    layout: _Layout,
    pairs: _PairInputs,
    reduction,
    transform: Transform,
    stats,
    family: _LogisticFamily,
    out: _Outputs,
) -> None:
    core = _native._core
    rows = as_rows(logits)
    *numbers, items, drop_square = family
    args = core.PreferenceForward(
        native_rows(rows),
        core.LogitTransform(*transform.multiplier_and_tanh_scale()),
        layout.native(transform.ignore_index),
        stats,
        getattr(core.Reduction, reduction),
        items,
        core.LogisticFamily(*numbers, drop_square),
    )
    ref_logits, *_ = pairs = pairs.floats()
    if ref_logits is not None:
        ref_rows = as_rows(ref_logits)
        args.ref_logits = native_rows(ref_rows)
    tensors = {name: t for name, t in pairs._asdict().items() if t is not None and name != "ref_logits"}
    tensors |= out._asdict()
    on_cuda = _native.device_kind(logits) == "cuda"
    if stats and not on_cuda:
        tensors["token_stats"] = rows.new_empty((4, *layout.labels.shape), dtype=torch.float32)
    _native.set_addresses(args, tensors)
    if on_cuda:
        workspace = rows.new_empty(core.preference_workspace_cuda(args), dtype=torch.uint8)
        with _native.guard(logits):
            core.preference_fwd_cuda(args, workspace.data_ptr(), _native.stream(logits))
    else:
        core.preference_fwd_cpu(args, torch.get_num_threads())


def _native_bwd(
    out, grad_loss, coefficients: Coefficients, logits, layout: _Layout, token_logps, lse, transform: Transform
) -> None:
    core = _native._core
    addresses = [_native.address(t) for t in (*coefficients, grad_loss)]
    rows, out_rows = as_rows(logits), as_rows(out)
    per_pair = grad_loss.dim() == 1
    if _native.device_kind(logits) == "cuda":
        args = core.LogitsGradient(
            native_rows(rows),
            core.LogitTransform(*transform.multiplier_and_tanh_scale()),
            layout.native(transform.ignore_index),
            token_logps.data_ptr(),
            lse.data_ptr(),
            *addresses,
            per_pair,
            native_rows(out_rows),
        )
        with _native.guard(logits):
            core.logits_gradient_cuda(args, _native.stream(logits))
        return
    shape = rows.shape[:2]
    labels, token_grad = layout.labels.view(shape), torch.empty(shape, dtype=torch.float32)
    saved = token_logps.view(shape), lse.view(2, *shape)
    core.preference_bwd_cpu(
        native_backward(token_grad, rows, labels, *saved, transform, out_rows),
        token_grad.data_ptr(),
        _native.address(layout.cu_seqlens),
        layout.sequences() // 2,
        layout.labels.shape[-1],
        *addresses,
        per_pair,
        torch.get_num_threads(),
    )


# ---- operators: the backend is chosen here, on real tensors ----

_library.OPS["preference_loss"] = {**FUSED_BACKENDS, "torch": _library.reference_reason}


class _Chosen(NamedTuple):
    """A backend, and the labels as it reads them."""

    name: str
    layout: _Layout


def _choose(logits: Tensor, layout: _Layout, ignore_index: int, backend: str) -> _Chosen:
    device = _native.device_kind(logits)
    name = serving_backend("preference_loss", device, backend)
    reads_aligned = name == "native" and device == "cpu"
    return _Chosen(name, layout.aligned(ignore_index) if reads_aligned else layout.contiguous())


def _fwd(
    logits, labels, cu_seqlens, lengths, shift, ref_logits, ref_token_logps, ref_logps, rating_gap, pair_weights,
    num_items, reduction, temperature, softcap, scale, ignore_index, stats, tail, numbers, drop_square, backend,
):  # fmt: skip
    if tail and ref_logps is not None:
        raise ValueError("tail needs the reference per token, got ref_logps")
    transform = Transform(temperature, softcap, scale, ignore_index)
    chosen, layout = _choose(logits, _Layout(labels, cu_seqlens, lengths, shift), ignore_index, backend)
    on_cpu = chosen == "native" and _native.device_kind(logits) == "cpu"
    out = _Outputs.empty(logits, layout, reduction, stats, tail)
    if layout.sequences() == 0 and not on_cpu:
        return tuple(t.zero_() for t in out)
    if ref_logits is not None and ref_logits.dtype != logits.dtype and not on_cpu:  # one launch reads one dtype
        aligned = layout.aligned(ignore_index).labels
        ref_token_logps, _, _ = operators.token_logps_fwd(ref_logits, aligned, *transform, False, chosen)
        ref_logits = None
    *family, items = numbers.tolist()
    if num_items is not None and num_items.device != logits.device:
        num_items, items = None, float(num_items) or math.nan  # 0 says that there is none
    pairs = _PairInputs(ref_logits, ref_token_logps, ref_logps, rating_gap, pair_weights, num_items)
    run = {"native": _native_fwd, "triton": preference_triton.forward}[chosen]
    run(logits, layout, pairs, reduction, transform, stats, _LogisticFamily(*family, items, drop_square), out)
    return tuple(out)


def _fwd_fake(
    logits, labels, cu_seqlens, lengths, shift, ref_logits, ref_token_logps, ref_logps, rating_gap, pair_weights,
    num_items, reduction, temperature, softcap, scale, ignore_index, stats, tail, numbers, drop_square, backend,
):  # fmt: skip
    return tuple(_Outputs.empty(logits, _Layout(labels, cu_seqlens, lengths, shift), reduction, stats, tail))


def _write_gradient(
    out, grad_loss, coefficients: Coefficients, logits, layout: _Layout, saved, transform: Transform, backend
):
    chosen, layout = _choose(logits, layout, transform.ignore_index, backend)
    token_logps, lse = (t.contiguous() for t in saved)
    grad_loss, coefficients = grad_loss.contiguous(), coefficients.contiguous()
    if chosen == "native":
        _native_bwd(out, grad_loss, coefficients, logits, layout, token_logps, lse, transform)
    elif layout.sequences() == 0:
        out.zero_()
    elif logits.numel():
        rows, labels = as_rows(logits), layout.of_rows()
        launch_backward(grad_loss, coefficients, rows, labels, token_logps, lse, transform, as_rows(out))


def _bwd(
    grad_loss, coefficients, tail_coefficients, tail_begin, logits, labels, cu_seqlens, lengths, shift, token_logps,
    lse, temperature, softcap, scale, ignore_index, backend,
):  # fmt: skip
    out = _native.empty(logits.shape, logits.dtype, logits.device)
    coefficients = Coefficients(coefficients, tail_coefficients, tail_begin)
    layout, transform = (
        _Layout(labels, cu_seqlens, lengths, shift),
        Transform(temperature, softcap, scale, ignore_index),
    )
    _write_gradient(out, grad_loss, coefficients, logits, layout, (token_logps, lse), transform, backend)
    return out


def _bwd_fake(
    grad_loss, coefficients, tail_coefficients, tail_begin, logits, labels, cu_seqlens, lengths, shift, token_logps,
    lse, temperature, softcap, scale, ignore_index, backend,
):  # fmt: skip
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _bwd_inplace(
    grad_loss, coefficients, tail_coefficients, tail_begin, logits, labels, cu_seqlens, lengths, shift, token_logps,
    lse, temperature, softcap, scale, ignore_index, backend,
):  # fmt: skip
    coefficients = Coefficients(coefficients, tail_coefficients, tail_begin)
    layout, transform = (
        _Layout(labels, cu_seqlens, lengths, shift),
        Transform(temperature, softcap, scale, ignore_index),
    )
    _write_gradient(logits, grad_loss, coefficients, logits, layout, (token_logps, lse), transform, backend)


preference_fwd, preference_bwd = operators.preference_fwd, operators.preference_bwd
preference_bwd_ = operators.preference_bwd_


# ---- autograd ----


class _Options(NamedTuple):
    """What autograd has no gradient of, and no tensor in."""

    shift: bool
    reduction: str
    transform: Transform
    stats: bool
    tail: bool
    drop_square: bool
    inplace: bool
    backend: str


def _save(ctx, inputs, output, differentiable: tuple[str, ...]) -> None:
    logits, labels, cu_seqlens, lengths, *_, options = inputs
    out = _Outputs(*output)
    ctx.mark_non_differentiable(*(t for name, t in out._asdict().items() if name not in differentiable))
    ctx.set_materialize_grads(False)
    ctx.shift, ctx.transform, ctx.inplace = options.shift, options.transform, options.inplace
    ctx.backend, ctx.tail = options.backend, options.tail
    saved = out.token_logps, out.lse, out.coefficients, out.tail_begin if options.tail else None
    ctx.save_for_backward(logits, labels, cu_seqlens, lengths, *saved)


def _gradient(ctx, upstream: Tensor, grad_loss: Tensor, coefficients: Tensor | None = None, of_tails=None):
    """Of the logits, from a loss's gradient and its coefficients, or others than those that the forward formed."""

    def run(op, logits, labels, cu_seqlens, lengths, tokens, lse, formed, tail_begin):
        saved = labels, cu_seqlens, lengths, ctx.shift, tokens, lse
        own = formed if coefficients is None else coefficients
        tail = (None, None) if of_tails is None else (of_tails, tail_begin)
        return op(grad_loss, own, *tail, logits, *saved, *ctx.transform, ctx.backend)

    return _autograd.pad_gradients(ctx, logits_gradient(ctx, upstream, preference_bwd, preference_bwd_, run))


@_autograd.cache_signature
class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(
        logits, labels, cu_seqlens, lengths, ref_logits, ref_token_logps, ref_logps, rating_gap, pair_weights,
        num_items, numbers, options,
    ):  # fmt: skip
        layout, references = (labels, cu_seqlens, lengths, options.shift), (ref_logits, ref_token_logps, ref_logps)
        pair_data = rating_gap, pair_weights, num_items, options.reduction
        rest = *options.transform, options.stats, options.tail, numbers, options.drop_square, options.backend
        return preference_fwd(logits, *layout, *references, *pair_data, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output, ("loss",))

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return _autograd.pad_gradients(ctx)
        return _gradient(ctx, grad_loss, grad_loss)


@_autograd.cache_signature
class _PairSums(torch.autograd.Function):
    """The sums of any loss by the same kernels: differentiable in logps, in rewards (log-ratios here) and in tail."""

    forward = _Preference.forward

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output, ("logps", "rewards", "tail"))

    @staticmethod
    def backward(ctx, *gradients):
        of = _Outputs(*gradients)
        given, tail = [g for g in (of.logps, of.rewards) if g is not None], of.tail if ctx.tail else None
        if not given and tail is None:
            return _autograd.pad_gradients(ctx)
        coefficients = sum(given[1:], start=given[0]) if given else torch.zeros_like(tail)
        upstream = coefficients if tail is None else tail
        return _gradient(ctx, upstream, coefficients.new_ones(()), coefficients, tail)


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
        beta: the scale of the implicit reward, beta * (policy - reference). Under torch.compile(dynamic=True) it is an
            input of the graph, as loss_weights and the numbers among loss_options are: new values do not compile anew.
            Without dynamic=True the second value compiles once more. The transform is a constant of the graph.
        rating_gap: [B], rating of the chosen minus rating of the rejected response; NaN = not rated.
        scores: [2B], absolute scores or win probabilities, for the losses that need both.
        pair_weights: [B]; the mean is normalised by their sum. Like ratings and scores they are data: no gradient.
        reduction: "mean" over pairs, "sum", or "none" for [B].
        num_items: replaces the mean's divisor: the pairs (or weights) of all accumulated micro-batches and ranks.
        cu_seqlens: [2B + 1], int32 or int64, offsets of packed sequences, rising from 0 to the number of tokens. On a
            GPU nothing looks at them: where they fall, results have no meaning, but no read is out of bounds.
        lengths: [2B], positions of each padded sequence that are real; later ones are ignored whatever their label.
        shift, temperature, softcap, scale, ignore_index, inplace_backward, stats, backend: as in token_logps; shift
            respects packed boundaries, and stats has no "lse".

    Returns:
        PreferenceOutput; nothing in it is read on the host. A sequence with no token that counts has log-prob 0 and no
        gradient, and a batch without pairs a differentiable loss of 0.

    Raises:
        TypeError, ValueError: as token_logps; for a missing input of the loss; for an unknown loss, with the nearest.
    """
    _checks.logits("logits", logits)
    _checks.labels(labels, logits)
    transform = checked_transform(temperature, softcap, scale, ignore_index)
    check_call(logits, inplace_backward, stats, backend)
    check_layout(labels, cu_seqlens, "logits")
    objective = Loss(loss, loss_weights, loss_options, beta)
    reducing = Reduction(reduction, pair_weights, num_items)
    data = PairData(ref_token_logps, ref_logps, rating_gap, scores)
    count = check_pairs("logits", logits, labels, objective, reducing, data, cu_seqlens, lengths)
    check_reference("logits", labels, count, objective, data, "ref_logits", ref_logits)
    if ref_logits is not None:
        _checks.logits("ref_logits", ref_logits)
        _checks.shaped_like("ref_logits", ref_logits, "logits", logits)
    _autograd.refuse_transforms("preference_loss", logits)

    if lengths is not None:
        _checks.same_device("lengths", lengths, "logits", logits)
    has_reference = not (ref_logits is None and ref_token_logps is None and ref_logps is None)
    if _can_fuse(logits, ref_logits, backend):
        layout = _Layout(labels, cu_seqlens, lengths, shift)
        forms = bool(wanted_stats(stats, objective)), "tail" in objective.traits().needs
        gather = _Gather(logits, layout, ref_logits, data, transform, *forms, inplace_backward, backend or "")
        family = logistic_family(objective, has_reference, rating_gap is not None)
        if family is not None:
            return _fused(gather, family, reducing, stats)
        return _on_sums(gather, has_reference, objective, reducing, stats)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.long()
    labels = targets(labels, cu_seqlens, lengths, ignore_index, shift)
    gathered = _vectors(
        logits, labels, ref_logits, cu_seqlens, data, objective, transform, inplace_backward, stats, backend
    )
    sequences = Sequences(labels, ignore_index, cu_seqlens)
    reduced = reducing.reduce(gathered.losses)
    means = stat_means(gathered.values, sequences, gathered.lengths, stats)
    return preference_output(reduced, gathered, rating_gap, objective.reward_scale(), means)


def _can_fuse(logits: Tensor, ref_logits: Tensor | None, backend: str | None) -> bool:
    return (
        fused_backend(_native.device_kind(logits), backend or "") is not None
        and logits.dtype in _native.DTYPE_CODES
        and (ref_logits is None or ref_logits.dtype in _native.DTYPE_CODES)
    )


class _Gather(NamedTuple):
    """One call of the forward operator, but for the loss."""

    logits: Tensor
    layout: _Layout
    ref_logits: Tensor | None
    data: PairData
    transform: Transform
    stats: bool
    tail: bool
    inplace: bool
    backend: str

    def run(self, function, family: Family, reducing: Reduction) -> _Outputs:
        data, items = self.data, reducing.num_items
        of_tensor = isinstance(items, Tensor)
        numbers = host_numbers([*family.numbers, 0.0 if items is None or of_tensor else items])
        inputs = self.ref_logits, data.ref_token_logps, data.ref_logps, data.rating_gap, reducing.pair_weights
        inputs = [None if t is None else t.detach() for t in (*inputs, items if of_tensor else None)]
        labels, cu_seqlens, lengths, shift = self.layout
        rest = self.transform, self.stats, self.tail, family.drop_square, self.inplace, self.backend
        options = _Options(shift, reducing.kind, *rest)
        return _Outputs(*function.apply(self.logits, labels, cu_seqlens, lengths, *inputs, numbers, options))


def _named_means(out: _Outputs, stats: tuple[str, ...]) -> dict[str, Tensor]:
    _accuracy, *means = out.metrics.unbind()
    several = {"top1": ("top1", "chosen_top1"), "mean_logit": ("chosen_mean_logit", "rejected_mean_logit")}
    names = [name for stat in stats for name in several.get(stat, (stat,))]
    return {name: mean for name, mean in zip(METRICS, means, strict=True) if name in names}


def _on_sums(gather: _Gather, has_reference: bool, loss: Loss, reducing: Reduction, stats) -> PreferenceOutput:
    """Any other loss: the same kernels, and torch on vectors of the length of the batch."""
    nothing = Family([1.0] + [0.0] * 6, False)
    out = gather.run(_PairSums, nothing, Reduction("none", None, None))
    weights = None
    if "wpo" in loss.traits().needs:
        weights = wpo_log_weights(out.logps, out.stat_sums[:, STATS.index("log_sum_p2")], out.lengths)
    logratios, tail = out.rewards if has_reference else None, out.tail if gather.tail else None
    sums = SequenceSums(out.logps, logratios, out.lengths, tail, weights)
    per_pair = sums.losses(gather.data, loss)
    gathered = Gathered(per_pair, out.logps, out.rewards, out.lengths, out.metrics)
    counted = _named_means(out, stats) | {"invalid_labels": out.counts[2]}
    rating_gap, beta = gather.data.rating_gap, loss.reward_scale()
    return preference_output(reducing.reduce(per_pair), gathered, rating_gap, beta, counted)


def _fused(gather: _Gather, family: Family, reducing: Reduction, stats) -> PreferenceOutput:
    out = gather.run(_Preference, family, reducing)
    pairs = out.losses.shape[0]
    ties, unrated, invalid_labels = out.counts.unbind()
    return PreferenceOutput(
        loss=out.loss,
        chosen_logps=out.logps[:pairs],
        rejected_logps=out.logps[pairs:],
        chosen_rewards=out.rewards[:pairs],
        rejected_rewards=out.rewards[pairs:],
        margins=out.margins,
        accuracy=out.metrics[0],
        stats=PreferenceStats(
            losses=out.losses,
            chosen_lengths=out.lengths[:pairs],
            rejected_lengths=out.lengths[pairs:],
            ties=ties,
            unrated=unrated,
            invalid_labels=invalid_labels,
            **_named_means(out, stats),
        ),
    )


def _vectors(
    logits, labels, ref_logits, cu_seqlens, data: PairData, loss: Loss, transform: Transform, inplace, stats, backend
) -> Gathered:
    temperature, softcap, scale, ignore_index = transform
    options = {"temperature": temperature, "softcap": softcap, "scale": scale, "ignore_index": ignore_index}
    wanted = wanted_stats(stats, loss)
    tokens = token_logps(logits, labels, inplace_backward=inplace, stats=wanted, backend=backend, **options)
    tokens, token_stats = tokens if wanted else (tokens, None)
    ref_tokens = data.ref_token_logps
    if ref_logits is not None:
        with torch.no_grad():
            ref_tokens = token_logps(ref_logits, labels, backend=backend, **options)
    values = tokens.new_empty((0, *tokens.shape), dtype=torch.float32)
    if token_stats is not None:
        missing = torch.zeros_like(tokens, dtype=torch.float32)
        values = [getattr(token_stats, name) for name in STATS]
        values = torch.stack([missing if value is None else value for value in values])
    data = PairData(ref_tokens, data.ref_logps, data.rating_gap, data.scores)
    return pair_losses(tokens, values, Sequences(labels, ignore_index, cu_seqlens), data, loss)
