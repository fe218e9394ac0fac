"""Preference losses for a whole training step: gather, pair epilogue and scatter in one call.

    gather    logits -> logps[token] -> sums[sequence]          token_logps
    epilogue  a few vectors of length B -> loss, coefficients   losses
    scatter   coefficient * (onehot - softmax) -> logits        token_logps' backward

Only the middle step knows which loss it is. For the rating-aware logistic family (`losses.Logistic`: DPO, conservative
and robust DPO, RDPO, RIPO, ML-RDPO, DDPO, IPO on sums) all three run in one native call forward and one backward; any
other loss, a user's own included, runs as torch on vectors between the same two kernels, with the same results.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref import _autograd, _checks, _library, _native, losses, operators
from fastpref._logps.pairs import (
    Gathered,
    Loss,
    PairData,
    PreferenceOutput,
    Reduction,
    check_pairs,
    check_reference,
    host_numbers,
    pair_losses,
    preference_output,
    wanted_stats,
)
from fastpref._logps.sequences import Sequences, check_layout, targets
from fastpref._logps.token_logps import (
    STATS,
    as_rows,
    check_call,
    logits_gradient,
    native_backward,
    native_forward,
    token_logps,
)
from fastpref._logps.transform import Transform, checked_transform

# ---- the fused family: one native call forward, one backward ----


def _fwd(
    logits, labels, ref_logits, ref_token_logps, ref_logps, cu_seqlens, rating_gap, temperature, softcap, scale,
    ignore_index, stats, family, drop_square,
):  # fmt: skip
    core = _native._core
    transform = Transform(temperature, softcap, scale, ignore_index)
    rows = as_rows(logits)
    shape = rows.shape[:2]
    flat = labels.reshape(shape).contiguous()
    (token_logps, lse, values), policy = native_forward(rows, flat, transform, stats)
    reference = ref_rows = _ref_outputs = None  # named: the call below only holds their addresses
    if ref_logits is not None:
        ref_rows = as_rows(ref_logits)
        _ref_outputs, reference = native_forward(ref_rows, flat, transform, False)
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
        core.LogisticFamily(*family.tolist(), drop_square),
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


def _write_gradient(out, grad_losses, coefficients, logits, labels, cu_seqlens, token_logps, lse, transform):
    rows = as_rows(logits)
    shape = rows.shape[:2]
    flat = labels.reshape(shape).contiguous()
    token_grad = torch.empty(shape, dtype=torch.float32)
    grad_losses, cu_seqlens = grad_losses.contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous()
    saved = token_logps.reshape(shape), lse.reshape(2, *shape)
    tokens = native_backward(token_grad, rows, flat, *saved, transform, as_rows(out))
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


def _bwd(
    grad_losses, coefficients, logits, labels, cu_seqlens, token_logps, lse, temperature, softcap, scale, ignore_index
):
    out = _native.empty(logits.shape, logits.dtype, logits.device)
    transform = Transform(temperature, softcap, scale, ignore_index)
    _write_gradient(out, grad_losses, coefficients, logits, labels, cu_seqlens, token_logps, lse, transform)
    return out


def _bwd_fake(
    grad_losses, coefficients, logits, labels, cu_seqlens, token_logps, lse, temperature, softcap, scale, ignore_index
):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _bwd_inplace(
    grad_losses, coefficients, logits, labels, cu_seqlens, token_logps, lse, temperature, softcap, scale, ignore_index
):
    transform = Transform(temperature, softcap, scale, ignore_index)
    _write_gradient(logits, grad_losses, coefficients, logits, labels, cu_seqlens, token_logps, lse, transform)


preference_fwd, preference_bwd = operators.preference_fwd, operators.preference_bwd
preference_bwd_ = operators.preference_bwd_


def _epilogue_reason(device: str) -> str | None:
    if device != "cpu":
        return "the fused epilogue runs on the CPU; elsewhere the loss is torch on vectors between token_logps' kernels"
    return _native.cpu_missing()


_library.OPS["preference_loss"] = {"native": _epilogue_reason, "torch": _library.reference_reason}


@_autograd.cache_signature
class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(
        logits, labels, ref_logits, ref_token_logps, ref_logps, cu_seqlens, rating_gap, transform, stats, family,
        drop_square, inplace,
    ):  # fmt: skip
        references = ref_logits, ref_token_logps, ref_logps
        return preference_fwd(
            logits, labels, *references, cu_seqlens, rating_gap, *transform, stats, family, drop_square
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, _, _, _, cu_seqlens, _, ctx.transform, _stats, _family, _drop_square, ctx.inplace = inputs
        _losses, *others = output
        _logps, _logratios, _lengths, coefficients, tokens, lse, _values = others
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, cu_seqlens, tokens, lse, coefficients)

    @staticmethod
    def backward(ctx, grad_losses, *_):
        if grad_losses is None:
            return _autograd.pad_gradients(ctx)

        def run(op, logits, labels, cu_seqlens, tokens, lse, coefficients):
            return op(grad_losses, coefficients, logits, labels, cu_seqlens, tokens, lse, *ctx.transform)

        return _autograd.pad_gradients(ctx, logits_gradient(ctx, grad_losses, preference_bwd, preference_bwd_, run))


def _family(loss: Loss, has_reference: bool) -> tuple[list[float], bool] | None:
    """Coefficients for the native epilogue, or None for a loss (or reference) it does not know."""
    if loss.is_list():
        return None
    options = dict(loss.options or {})
    if bool(options.get("reference_free")) == has_reference:
        return None
    logistic = getattr(losses.get_loss(loss.loss), "logistic", None)
    record = logistic(**{"beta": loss.beta, **options}) if logistic else None
    if record is None:
        return None
    *coefficients, drop_square = record
    return [loss.reward_scale(), *coefficients], drop_square


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
    transform = checked_transform(temperature, softcap, scale, ignore_index)
    check_call(logits, inplace_backward, stats, backend)
    check_layout(labels, cu_seqlens, "logits")
    objective = Loss(loss, loss_weights, loss_options, beta)
    reducing = Reduction(reduction, pair_weights, num_items)
    data = PairData(ref_token_logps, ref_logps, rating_gap, scores)
    count = check_pairs("logits", logits, labels, objective, reducing, data, cu_seqlens, lengths)
    check_reference("logits", labels, count, data, "ref_logits", ref_logits)
    if ref_logits is not None:
        _checks.logits("ref_logits", ref_logits)
        _checks.shaped_like("ref_logits", ref_logits, "logits", logits)
    _autograd.refuse_transforms("preference_loss", logits)

    if lengths is not None:
        _checks.same_device("lengths", lengths, "logits", logits)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.long()
    labels = targets(labels, cu_seqlens, lengths, ignore_index, shift)
    has_reference = not (ref_logits is None and ref_token_logps is None and ref_logps is None)
    family = _family(objective, has_reference) if _can_fuse(logits, ref_logits, backend) else None
    if family is not None and not (rating_gap is None and "rating_gap" in losses.get_loss(loss).needs):
        options = family, transform, inplace_backward, bool(stats)
        gathered = _fused(logits, labels, ref_logits, cu_seqlens, data, *options)
    else:
        gathered = _vectors(
            logits, labels, ref_logits, cu_seqlens, data, objective, transform, inplace_backward, stats, backend
        )
    sequences = Sequences(labels, ignore_index, cu_seqlens)
    reduced = reducing.reduce(gathered.losses)
    return preference_output(reduced, gathered, sequences, rating_gap, objective.reward_scale(), stats)


def _can_fuse(logits: Tensor, ref_logits: Tensor | None, backend: str | None) -> bool:
    return (
        _epilogue_reason(_native.device_kind(logits)) is None
        and logits.dtype in _native.DTYPE_CODES
        and (ref_logits is None or ref_logits.dtype in _native.DTYPE_CODES)
        and backend in (None, "native")
    )


def _fused(logits, labels, ref_logits, cu_seqlens, data: PairData, family, transform, inplace, stats) -> Gathered:
    ref_token_logps, ref_logps, rating_gap = (
        None if v is None else v.detach().float() for v in (data.ref_token_logps, data.ref_logps, data.rating_gap)
    )
    ref_logits = None if ref_logits is None else ref_logits.detach()
    numbers, drop_square = family
    pair_losses, logps, logratios, lengths, _coefficients, _tokens, _lse, values = _Preference.apply(
        logits, labels, ref_logits, ref_token_logps, ref_logps, cu_seqlens, rating_gap, transform, stats,
        host_numbers(numbers), drop_square, inplace,
    )  # fmt: skip
    return Gathered(pair_losses, logps, logratios, lengths, values)


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
