"""Preference losses straight from hidden states and the LM head: a whole step without `[tokens, vocab]`.

A pair's coefficients exist as soon as its two sequences are summed. So, with a trained head and a loss whose pairs
stand alone, a group of whole pairs is projected into one tile, summed, its loss and coefficients computed, the logits
turned into their gradient in place, both gradients taken, and the tile dropped: 3 products, the floor, where
recomputing in the backward takes 4. A pair that does not fit the tile is recomputed, alone. Frozen heads (2 products)
and losses that couple the batch (4) go through linear_logps' two passes instead, with the same results; `plan` says
which.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import _checks, _library, losses
from fastpref._autograd import differentiable_once, once
from fastpref._logps.linear_logps import (
    BUDGET,
    HEAD,
    ROWS,
    budget_of,
    cast_for_autocast,
    check_budget,
    check_head,
    gather,
    scaled,
    whole,
)
from fastpref._logps.pairs import (
    Gathered,
    PreferenceOutput,
    check_pairs,
    check_reference,
    output,
    pair_losses,
    pair_scale,
    reduce,
    wanted_stats,
)
from fastpref._logps.plan import choose_kind, even_chunks, is_resident, pair_groups
from fastpref._logps.sequences import Sequences, check_layout, targets
from fastpref._logps.tile import Gradients, Head, Rows, Shard, active_rows, joined, no_autocast, take
from fastpref._logps.token_logps import SCHEMA_OPTIONS, check_options, valid_labels


class _Spec(NamedTuple):
    """A loss on its way into an operator, whose schema has no room for callables and mappings."""

    loss: str | Callable[..., Tensor] | Sequence
    weights: Sequence[float] | None
    options: Mapping[str, Any] | Sequence | None
    beta: float


_SPECS: dict[str, _Spec] = {}
_numbers = itertools.count()


@torch.compiler.assume_constant_result
def _constant_spec(loss, weights, options, beta) -> str:
    """The key of a spec that stays, for compiled graphs: names and numbers only."""
    spec = _Spec(loss, weights, options, beta)
    _SPECS[repr(spec)] = spec
    return repr(spec)


def _is_constant(loss, options) -> bool:
    if isinstance(loss, (list, tuple)):
        return all(_is_constant(*part) for part in zip(loss, options or [None] * len(loss), strict=False))
    plain = (str, int, float, bool, type(None))
    return isinstance(loss, str) and all(isinstance(value, plain) for value in (options or {}).values())


# ---- the operator: whole pairs, forward and backward, in one tile ----


@contextlib.contextmanager
def _autograd():
    """Autograd for the epilogue, inside an operator that a compiled graph calls below autograd."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        yield


class _Group(NamedTuple):
    begin: int  # of the pairs
    end: int
    where: slice | Tensor  # rows of hidden: all chosen, then all rejected ones
    labels: Tensor
    bounds: Tensor  # [2 pairs + 1] where their sequences begin among these rows


def _groups(rows: Rows, ends: Tensor, pairs: int, tile_rows: int) -> list[_Group]:
    if rows.padded:  # nobody here knows where a pair ends
        return [_Group(0, pairs, rows.index[: rows.count], rows.labels, ends.clamp(max=rows.count))]
    groups = []
    for begin, end in pair_groups(rows.bounds, tile_rows):
        halves = [slice(rows.bounds[s + begin], rows.bounds[s + end]) for s in (0, pairs)]
        lengths = torch.cat([ends[s + begin + 1 : s + end + 1] - ends[s + begin : s + end] for s in (0, pairs)])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        if end - begin == pairs:
            groups.append(_Group(begin, end, rows.where(0, rows.count), rows.labels, bounds))
        else:
            where = torch.cat([rows.index[half] for half in halves])
            groups.append(_Group(begin, end, where, torch.cat([rows.labels[half] for half in halves]), bounds))
    return groups


def _halves_of(vector: Tensor | None, begin: int, end: int) -> Tensor | None:
    """[2B] -> those of the pairs [begin, end), chosen and then rejected."""
    if vector is None:
        return None
    pairs = vector.shape[0] // 2
    return torch.cat([vector[begin:end], vector[pairs + begin : pairs + end]])


def _fwd(
    hidden, weight, bias, adapter_a, adapter_b, labels, cu_seqlens, spans, ref_hidden, ref_weight, ref_bias,
    ref_token_logps, ref_logps, rating_gap, scores, scale_of_pair, temperature, softcap, scale, ignore_index, stats,
    needs, spec, max_active_tokens, max_tile_bytes, logits_dtype, group, backend,
):  # fmt: skip
    options = (temperature, softcap, scale, ignore_index)
    loss, loss_weights, loss_options, beta = _SPECS[spec]
    pairs = scale_of_pair.shape[0]
    with no_autocast(hidden.device):
        shard = Shard.of(group, weight)
        valid_labels(labels, weight.shape[0] if shard is None else sum(shard.sizes), ignore_index)
        index, bounds, ends = active_rows(labels, ignore_index, cu_seqlens, spans, max_active_tokens)
        rows = Rows(index, bounds, labels, ignore_index, max_active_tokens, spans is not None)
        head = Head(weight, bias, adapter_a, adapter_b, options, stats, logits_dtype, shard, backend)
        ref = None if ref_hidden is None else head.like(ref_weight, ref_bias)
        tile_rows = head.tile_rows(max_tile_bytes)
        groups = _groups(rows, ends, pairs, tile_rows)
        pieces = [even_chunks(group.labels.shape[0], tile_rows) for group in groups]
        gradients = Gradients(head, hidden, needs, rows, sum(map(len, pieces)))
        out = _outputs(hidden, labels, scale_of_pair, stats)

        def project(group: _Group, parts: list[tuple[int, int]]) -> None:
            begin, end, where, y, bounds = group
            x = rows.take(hidden, where, y)
            ref_tokens = None if ref_token_logps is None else take(ref_token_logps, where)
            if ref is not None:  # before the policy, whose tile must stay
                ref_x = rows.take(ref_hidden, where, y)
                ref_tokens = joined([ref.fold(ref_x[i:j], y[i:j], keep=False) for i, j in parts], ref_x, y)[0]
            resident = len(parts) == 1
            folded = [head.fold(x[i:j], y[i:j], keep=resident) for i, j in parts]
            logps, lse, values = joined(folded, x, y, stats)
            with _autograd():
                tokens = logps.detach().requires_grad_()
                gathered = pair_losses(
                    tokens, values, Sequences(y, ignore_index, bounds), ref_tokens,
                    _halves_of(ref_logps, begin, end), None if rating_gap is None else rating_gap[begin:end],
                    _halves_of(scores, begin, end), loss, loss_weights, loss_options, beta,
                )  # fmt: skip
                total = (gathered.losses * scale_of_pair[begin:end]).sum()
                coefficients = torch.zeros_like(tokens)  # of a loss that does not depend on them
                if total.requires_grad:
                    (coefficients,) = torch.autograd.grad(total, tokens)
            if rows.padded:
                coefficients.masked_fill_(rows.overflow, torch.nan)
            for i, j in parts:
                fit = logps[i:j], lse[:, i:j]
                if not resident:
                    fit = head.form(x[i:j], y[i:j], *fit)
                dz = head.turn(coefficients[i:j], y[i:j], *fit)
                part = slice(where.start + i, where.start + j) if isinstance(where, slice) else where[i:j]
                gradients.add(dz, x[i:j], part)
            out.put(rows, group, total, gathered)

        for group, parts in zip(groups, pieces, strict=True):
            project(group, parts)
        if rows.padded:
            out.loss.masked_fill_(rows.overflow, torch.nan)
        return *out, *gradients.finish()


class _Outputs(NamedTuple):
    loss: Tensor  # []
    losses: Tensor  # [B]
    logps: Tensor  # [2B]
    logratios: Tensor  # [2B]
    lengths: Tensor  # [2B]
    values: Tensor  # [4 or 0, tokens]

    def put(self, rows: Rows, group: _Group, total: Tensor, gathered: Gathered) -> None:
        begin, end = group.begin, group.end
        pairs = self.losses.shape[0]
        self.loss.add_(total.detach())
        self.losses[begin:end] = gathered.losses.detach()
        rows.put(self.values, group.where, gathered.values, 1)
        for out, own in (
            (self.logps, gathered.logps),
            (self.logratios, gathered.logratios),
            (self.lengths, gathered.lengths),
        ):
            out[begin:end], out[pairs + begin : pairs + end] = own.detach().chunk(2)


def _outputs(hidden, labels, scale_of_pair, stats) -> _Outputs:
    """Zeros: what a batch without pairs gives."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    pairs = scale_of_pair.shape[0]
    vectors = [hidden.new_zeros(shape, dtype=dtype) for shape in ((), pairs, 2 * pairs, 2 * pairs)]
    values = hidden.new_zeros((4 if stats else 0, labels.shape[0]), dtype=torch.float32)
    return _Outputs(*vectors, labels.new_zeros(2 * pairs), values)


def _fwd_fake(hidden, weight, bias, adapter_a, adapter_b, labels, *rest):
    scale_of_pair, stats, needs = rest[9], rest[14], rest[15]
    inputs = (hidden, weight, bias, adapter_a, adapter_b)
    gradients = [hidden.new_empty(t.shape if needed else 0) for t, needed in zip(inputs, needs, strict=True)]
    return *_outputs(hidden, labels, scale_of_pair, stats), *gradients


linear_preference_fwd = _library.define(
    f"linear_preference_fwd(Tensor hidden, {HEAD}, {ROWS}, Tensor? ref_token_logps, Tensor? ref_logps, "
    f"Tensor? rating_gap, Tensor? scores, Tensor scale_of_pair, {SCHEMA_OPTIONS}, bool stats, bool[] needs, str spec, "
    f"{BUDGET}) -> ({', '.join(['Tensor'] * 11)})",
    _fwd,
    _fwd_fake,
)
_library.OPS["linear_preference_loss"] = _library.OPS["linear_token_logps"]


class _LinearPreference(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return linear_preference_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[6:])
        ctx.done = False

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 28
        once(ctx)
        needed = ctx.needs_input_grad[:5]
        gradients = [scaled(g, grad) if n else None for g, n in zip(ctx.saved_tensors, needed, strict=True)]
        gradients = differentiable_once(gradients)
        return *gradients, *(None,) * 23


_library.cache_signature(_LinearPreference)


# ---- public ----


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
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
    shared_prefix: Tensor | None = None,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    max_active_tokens: int | None = None,
    max_tile_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    stats: tuple[str, ...] = (),
    group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> PreferenceOutput:
    """preference_loss of the logits hidden @ weight.T (+ bias), which are never stored.

    Args:
        hidden: [2B, T, H], the B chosen sequences first, then the B rejected ones in the same order; or packed,
            [tokens, H] with cu_seqlens. weight: [V, H]. bias, adapter, temperature, softcap, scale, ignore_index,
            max_tile_bytes, logits_dtype, group, backend: as in linear_token_logps.
        labels: [2B, T] or [tokens]; prompt and padding carry ignore_index and are left out before the first product.
        ref_hidden: the reference model's hidden states, of hidden's shape; ref_weight and ref_bias are its head, by
            default this one's, without its adapter. Or ref_token_logps, of labels' shape, or ref_logps, sums [2B]. No
            gradient flows into any of them.
        loss, loss_weights, loss_options, beta, rating_gap, scores, pair_weights, reduction, num_items: as in
            preference_loss. A callable is taken to couple the pairs of the batch, unless marked
            @losses.pair_separable; only separable losses reduced to a scalar get the plan of 3 products.
        cu_seqlens, lengths: as in preference_loss. With hidden on a GPU they may be on the host: then no token count is
            read from the device, and ignored tokens inside the sequences are projected too.
        shared_prefix: [B], how many leading labels the two sequences of a pair share. They add nothing to the gradient
            of a loss of the difference alone, and are left out, of log-probs, rewards and lengths too.
        max_active_tokens: capacity for the tokens that count; without it 2B + 1 integers are read from the device. If
            more tokens count, the loss is NaN.
        stats: as in token_logps.
        sequence_group: process group over which the tokens of every sequence are spread: sums are all-reduced, loss and
            metrics are the same on all ranks, gradients are those of the rank's own tokens. Labels must be aligned.

    Returns:
        PreferenceOutput, as preference_loss; it can go backward once.

    Raises:
        TypeError, ValueError: as linear_token_logps and preference_loss; shared_prefix for a loss that depends on more
            than the difference of the two log-ratios, or on labels that differ (on CPU).
        RuntimeError: for a backend that cannot serve, and for a second backward.
    """
    weight, bias, ref_weight, ref_bias = whole(weight), whole(bias), whole(ref_weight), whole(ref_bias)
    _checks.logits("hidden", hidden)
    _checks.labels(labels, hidden, "hidden")
    a, b = (None, None) if adapter is None or len(adapter) != 2 else adapter
    hidden, weight, bias, a, b = cast_for_autocast(hidden, weight, bias, a, b)
    check_head(hidden, weight, bias, adapter if a is None else (a, b))
    check_options(hidden, temperature, softcap, scale, ignore_index, False, stats, backend)
    name = check_budget(weight, max_active_tokens, max_tile_bytes, logits_dtype, group, backend, hidden.dtype)
    check_layout(labels, cu_seqlens, "hidden")
    vectors = {"rating_gap": rating_gap, "pair_weights": pair_weights, "scores": scores}
    sequences = check_pairs(
        "hidden", hidden, labels, loss, loss_weights, loss_options, beta, reduction, num_items, cu_seqlens, lengths,
        vectors,
    )  # fmt: skip
    references = {"ref_hidden": ref_hidden, "ref_token_logps": ref_token_logps, "ref_logps": ref_logps}
    check_reference("hidden", labels, sequences, references)
    ref_hidden, ref_weight, ref_bias = _reference(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    if sequence_group is not None and not isinstance(sequence_group, dist.ProcessGroup):
        raise TypeError(
            f"sequence_group must be a torch.distributed process group, got {type(sequence_group).__name__}"
        )
    if sequence_group is not None and shift:
        raise ValueError("shift must be False with sequence_group: the label after a rank's last token is on the next")

    spans = _spans(labels, cu_seqlens, lengths, hidden.device)
    cu_seqlens, lengths = (None if t is None else t.to(hidden.device).long() for t in (cu_seqlens, lengths))
    if shared_prefix is not None:
        labels = _without_prefix(labels, shared_prefix, cu_seqlens, sequences, loss, loss_options, ignore_index)
    labels = targets(labels, cu_seqlens, lengths, ignore_index, shift)
    options = (float(temperature), None if softcap is None else float(softcap), float(scale), ignore_index)
    budget = budget_of(max_active_tokens, max_tile_bytes, logits_dtype, name, backend)
    flat, flat_hidden = labels.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    if cu_seqlens is None:
        tokens = labels.shape[1]
        cu_seqlens_flat = torch.arange(sequences + 1, device=hidden.device) * tokens
    else:
        cu_seqlens_flat = cu_seqlens
    if ref_hidden is not None:
        ref_hidden = ref_hidden.reshape(-1, ref_hidden.shape[-1])
    wanted = wanted_stats(stats, loss, loss_options)
    rows = (cu_seqlens_flat, spans, ref_hidden, ref_weight, ref_bias)
    layout = Sequences(labels, ignore_index, cu_seqlens, sequence_group)

    head_grad = any(t is not None and t.requires_grad for t in (weight, bias, a, b))
    resident = is_resident(loss, loss_options, reduction) and sequence_group is None
    if torch.compiler.is_compiling():
        resident = resident and _is_constant(loss, loss_options)
    kind = choose_kind(hidden.requires_grad, head_grad, resident, hidden.dtype)
    if torch.is_grad_enabled() and kind == "pair_resident":
        like = torch.empty(sequences // 2, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        weights = pair_scale(like, pair_weights, reduction, num_items)
        data = [None if t is None else t.detach() for t in (ref_token_logps, ref_logps, rating_gap, scores)]
        data[0] = None if data[0] is None else data[0].reshape(-1)
        needs = [t is not None and t.requires_grad for t in (flat_hidden, weight, bias, a, b)]
        spec = (
            _constant_spec(loss, loss_weights, loss_options, beta)
            if torch.compiler.is_compiling()
            else _lend(_Spec(loss, loss_weights, loss_options, beta))
        )
        try:
            found = _LinearPreference.apply(
                flat_hidden,
                weight,
                bias,
                a,
                b,
                flat,
                *rows,
                *data,
                weights,
                *options,
                bool(wanted),
                needs,
                spec,
                *budget,
            )
        finally:
            if not torch.compiler.is_compiling():
                del _SPECS[spec]
        reduced, *found = found[:6]
        gathered = Gathered(*found[:4], found[4].view(found[4].shape[0], *labels.shape))
    else:
        tokens, values, ref_tokens = gather(flat_hidden, weight, bias, a, b, flat, options, bool(wanted), budget, *rows)
        values = values.view(values.shape[0], *labels.shape)
        if ref_tokens is not None:
            ref_token_logps = ref_tokens.view(labels.shape)
        gathered = pair_losses(
            tokens.view(labels.shape), values, layout, ref_token_logps, ref_logps, rating_gap,
            scores, loss, loss_weights, loss_options, beta,
        )  # fmt: skip
        reduced = reduce(gathered, pair_weights, reduction, num_items)
    if loss_options and not isinstance(loss, (list, tuple)):
        beta = loss_options.get("beta", beta)  # the rewards are those of the loss
    return output(reduced, gathered, layout, rating_gap, beta, stats)


def _lend(spec: _Spec) -> str:
    key = str(next(_numbers))
    _SPECS[key] = spec
    return key


def _reference(hidden, weight, bias, ref_hidden, ref_weight, ref_bias):
    """The reference's head, checked: by default the policy's; no gradient flows."""
    if ref_hidden is None:
        given = {"ref_weight": ref_weight, "ref_bias": ref_bias}
        if present := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{present[0]} is the head of ref_hidden, which is None")
        return None, None, None
    if ref_weight is None:
        if ref_bias is not None:
            raise ValueError("ref_bias belongs to ref_weight, which is None")
        ref_weight, ref_bias = weight, bias
    ref_hidden, ref_weight, ref_bias = cast_for_autocast(ref_hidden, ref_weight, ref_bias)
    _checks.logits("ref_hidden", ref_hidden)
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden must have shape {[*hidden.shape[:-1], 'H_ref']} to match hidden, got {list(ref_hidden.shape)}"
        )
    _checks.same_device("ref_hidden", ref_hidden, "hidden", hidden)
    check_head(ref_hidden, ref_weight, ref_bias, None, "ref_weight", "ref_hidden", "ref_bias")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"ref_weight must have the {weight.shape[0]} rows of weight, got {ref_weight.shape[0]}")
    return ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach()


def _spans(labels, cu_seqlens, lengths, device) -> Tensor | None:
    """[sequences, 2] begins and ends on the host, where the caller had them there and the work is elsewhere."""
    if device.type == "cpu":
        return None
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        return torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], 1).long()
    if lengths is not None and lengths.device.type == "cpu":
        begin = torch.arange(labels.shape[0]) * labels.shape[1]
        return torch.stack([begin, begin + lengths.clamp(0, labels.shape[1])], 1)
    return None


def _without_prefix(labels, shared_prefix, cu_seqlens, sequences, loss, loss_options, ignore_index) -> Tensor:
    """Labels with the first shared_prefix[pair] of both its sequences ignored."""
    if not losses.traits(loss, loss_options).delta_only:
        raise ValueError(
            f"shared_prefix must be None for loss={loss!r}, which depends on more than the difference of the log-ratios"
        )
    _checks.integers("shared_prefix", shared_prefix)
    if list(shared_prefix.shape) != [sequences // 2]:
        raise ValueError(
            f"shared_prefix must have shape [{sequences // 2}] (one per pair), got {list(shared_prefix.shape)}"
        )
    _checks.same_device("shared_prefix", shared_prefix, "hidden", labels)
    counts = shared_prefix.long().repeat(2)
    if cu_seqlens is None:
        prefix = torch.arange(labels.shape[1], device=labels.device) < counts.unsqueeze(1)
    else:
        layout = Sequences(labels, ignore_index, cu_seqlens)
        positions = torch.arange(labels.shape[0], device=labels.device) - layout.per_token(layout.cu_seqlens[:-1])
        prefix = positions < layout.per_token(counts)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        half = labels.shape[0] // 2 if cu_seqlens is None else cu_seqlens[sequences // 2]
        chosen, rejected = labels[:half][prefix[:half]], labels[half:][prefix[half:]]
        if (counts < 0).any() or not torch.equal(chosen, rejected):
            raise ValueError(
                "shared_prefix must be numbers of leading labels that chosen and rejected share, "
                f"got {shared_prefix.tolist()}, whose labels differ or are missing"
            )
    return labels.masked_fill(prefix, ignore_index)
