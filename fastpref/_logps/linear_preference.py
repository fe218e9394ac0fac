"""Preference losses straight from hidden states and the LM head: a whole step without `[tokens, vocab]`.

A pair's coefficients exist as soon as its two sequences are summed. So, with a trained head and a loss whose pairs
stand alone, a group of whole pairs is projected into one tile, summed, its loss and coefficients computed, the logits
turned into their gradient in place, both gradients taken, and the tile dropped: 3 products, the floor, where
recomputing in the backward takes 4. A pair that does not fit the tile is recomputed, alone. Frozen heads (2 products)
and losses that couple the batch (4) go through linear_logps' two passes instead, with the same results; `plan` says
which.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import _autograd, _checks, _library, _native, operators
from fastpref._logps.linear_logps import (
    LinearLogps,
    Tokens,
    cast_for_autocast,
    check_head,
    checked_budget,
    empty_gradients,
    gather_logps,
    whole_weight,
)
from fastpref._logps.pair_epilogue import PairResults, fused_family, pair_epilogue, write_pairs
from fastpref._logps.pairs import (
    EncodedLoss,
    Family,
    Gathered,
    Loss,
    PairData,
    PreferenceOutput,
    Reduction,
    check_pairs,
    check_reference,
    decode_loss,
    encode_loss,
    pair_gradients,
    pair_losses,
    preference_output,
    stat_means,
    wanted_stats,
)
from fastpref._logps.plan import choose_kind, even_chunks, is_resident, pair_groups, rows_of_pairs
from fastpref._logps.scaled import scaled
from fastpref._logps.sequences import Sequences, check_layout, rising, targets
from fastpref._logps.tile import (
    Budget,
    Gradients,
    Head,
    Projection,
    Rows,
    Shard,
    active_rows,
    join_folds,
    no_autocast,
    refuse_invalid,
    smaller_tile_advised,
    stable_partition,
    take_rows,
)
from fastpref._logps.token_logps import check_call
from fastpref._logps.transform import Transform, checked_transform

# ---- the operator: whole pairs, forward and backward, in one tile ----


class _Ordered(NamedTuple):
    """The rows that count and their sequences, group after group, and within a group all chosen sequences first."""

    groups: list[tuple[int, int]]  # of pairs
    sizes: list[int]  # rows of each group
    where: slice | Tensor  # [rows] of hidden
    labels: Tensor  # [rows]
    bounds: Tensor  # [2B + 1] where the sequences begin among these rows

    def bounds_of(self, group: int) -> Tensor:
        """Where the sequences of a group begin among its rows."""
        begin, end = self.groups[group]
        bounds = self.bounds[2 * begin : 2 * end + 1]
        return bounds - bounds[0] if group else bounds


def _in_groups(rows: Rows, ends: Tensor, pairs: int, tile_rows: int) -> _Ordered:
    if rows.padded:  # where a pair ends is known on the device alone
        groups, bounds = [(0, pairs)][:pairs], ends.clamp(max=rows.count)
        return _Ordered(groups, [rows.count] * len(groups), rows.index[: rows.count], rows.labels, bounds)
    groups = pair_groups(rows.bounds, tile_rows)
    if len(groups) <= 1:
        return _Ordered(groups, [rows.count] * len(groups), rows.where(0, rows.count), rows.labels, ends)
    spans = [slice(rows.bounds[s + begin], rows.bounds[s + end]) for begin, end in groups for s in (0, pairs)]
    sizes = [rows_of_pairs(rows.bounds, *group) for group in groups]
    bounds = torch.zeros_like(ends)
    torch.cumsum(_group_after_group(ends[1:] - ends[:-1], groups), 0, out=bounds[1:])
    where, labels = (torch.cat([vector[span] for span in spans]) for vector in (rows.index, rows.labels))
    return _Ordered(groups, sizes, where, labels, bounds)


def _group_after_group(vector: Tensor | None, groups: list[tuple[int, int]]) -> Tensor | None:
    """[2B], all chosen sequences first -> all chosen ones of a group first."""
    if vector is None or len(groups) <= 1:
        return vector
    pairs = vector.shape[0] // 2
    return torch.cat([vector[s + begin : s + end] for begin, end in groups for s in (0, pairs)])


def _chosen_first(parts: list[Tensor]) -> Tensor:
    """The other way round, from the parts of the groups."""
    if len(parts) == 1:
        return parts[0]
    halves = [part.view(2, part.shape[0] // 2) for part in parts]
    return torch.cat([half[side] for side in (0, 1) for half in halves])


class Wanted(NamedTuple):
    stats: bool
    gradients: list[bool]  # of which parts of the projection


class LinearPreference(NamedTuple):
    loss: Tensor  # []
    losses: Tensor  # [B]
    logps: Tensor  # [2B]
    logratios: Tensor  # [2B]
    lengths: Tensor  # [2B]
    values: Tensor  # [4 or 0, tokens]


def _zeros(hidden: Tensor, labels: Tensor, scale_of_pair: Tensor, stats: bool) -> LinearPreference:
    """What a batch without pairs gives."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    pairs = scale_of_pair.shape[0]
    vectors = [hidden.new_zeros(shape, dtype=dtype) for shape in ((), pairs, 2 * pairs, 2 * pairs)]
    return LinearPreference(*vectors, labels.new_zeros(2 * pairs), _zero_values(labels, stats))


def _zero_values(labels: Tensor, stats: bool) -> Tensor:
    return labels.new_zeros((4 if stats else 0, labels.shape[0]), dtype=torch.float32)


# The epilogue of a group: called with its number, its rows among all ordered ones and their log-probs, it returns the
# gradient of each; `results` are of all groups, as LinearPreference has them.


class _EpilogueOnVectors:
    """Any loss, as torch on vectors."""

    def __init__(self, ordered: _Ordered, data: PairData, ends: Tensor, ignored: Tensor | None, scale: Tensor, loss):
        self.ordered, self.ends, self.ignored, self.scale, self.loss = ordered, ends, ignored, scale, loss
        self.positions = torch.arange(ordered.labels.shape[0], device=ends.device)
        ref_tokens, ref_sums, gap, scores = data
        if ref_tokens is not None:
            ref_sums = Sequences.compacted(self.positions, ordered.bounds, ignored).sum(ref_tokens)
        elif ref_sums is not None:
            ref_sums = _group_after_group(ref_sums.double(), ordered.groups)
        scores = None if scores is None else _group_after_group(scores.to(scale.dtype), ordered.groups)
        self.data = PairData(ref_tokens, ref_sums, None if gap is None else gap.to(scale.dtype), scores)
        self.gathered = []

    def __call__(self, group: int, rows: slice, logps: Tensor, values: Tensor, ref_tokens: Tensor | None) -> Tensor:
        begin, end = self.ordered.groups[group]
        ref_sums, gap, scores = self.data[1:]
        both = slice(2 * begin, 2 * end)
        data = PairData(
            ref_tokens,
            None if ref_sums is None else ref_sums[both],
            None if gap is None else gap[begin:end],
            None if scores is None else scores[both],
        )
        ignored = None if self.ignored is None else self.ignored[rows]
        bounds = self.ordered.bounds_of(group)
        sequences = Sequences.compacted(self.positions[: rows.stop - rows.start], bounds, ignored)
        gathered, gradient = pair_gradients(logps, values, sequences, data, self.loss, self.scale[begin:end])
        self.gathered.append(gathered)
        return gradient

    def results(self) -> PairResults:
        per_pair = [group.losses for group in self.gathered]
        per_pair = per_pair[0] if len(per_pair) == 1 else torch.cat(per_pair)
        logps = _chosen_first([group.logps for group in self.gathered])
        logratios = _chosen_first([group.logratios for group in self.gathered])
        if logratios is logps:
            logratios = logps.clone()  # an operator returns no tensor twice
        if self.ignored is None:
            lengths = self.ends[1:] - self.ends[:-1]
        else:
            lengths = _chosen_first([group.lengths for group in self.gathered])
        return PairResults(per_pair, logps, logratios, lengths)


class _FusedEpilogue:
    """The fused family, in one launch or call."""

    def __init__(
        self, ordered: _Ordered, data: PairData, ignore_index: int, scale: Tensor, family: Family, backend: str
    ):
        self.ordered, self.ignore_index, self.family, self.backend = ordered, ignore_index, family, backend
        *inputs, _scores = data
        self.data = PairData(*(None if t is None else t.float() for t in inputs), None)
        self.scale, self.out = scale.contiguous(), PairResults.empty(scale)

    def __call__(self, group: int, rows: slice, logps: Tensor, values: Tensor, ref_tokens: Tensor | None) -> Tensor:
        ref_tokens = None if ref_tokens is None else ref_tokens.float()  # of a float64 reference model
        data, labels = self.data._replace(ref_token_logps=ref_tokens), self.ordered.labels[rows]
        pairs, bounds = self.ordered.groups[group], self.ordered.bounds_of(group)
        options = self.ignore_index, self.family, self.backend
        return write_pairs(self.out, pairs, logps, labels, bounds, data, self.scale, *options)

    def results(self) -> PairResults:
        return self.out


def _pair_resident(
    projection: Projection,
    tokens: Tokens,
    data: PairData,
    scale_of_pair: Tensor,
    transform: Transform,
    wanted: Wanted,
    loss: Loss,
    budget: Budget,
) -> tuple[Tensor, ...]:
    """LinearPreference, and the gradients of its loss by those parts of the projection that `wanted` names."""
    hidden, labels = projection.hidden, tokens.labels
    pairs, capacity, ignore_index = scale_of_pair.shape[0], budget.max_active_tokens, transform.ignore_index
    with no_autocast(hidden.device), smaller_tile_advised(budget.max_tile_bytes):
        shard = Shard.of(budget.group, projection.weight)
        refuse_invalid(labels, projection.weight, shard, ignore_index)
        _, cu_seqlens, kept, kept_bounds, *_ = tokens
        index, bounds, ends = active_rows(labels, ignore_index, cu_seqlens, kept, kept_bounds, capacity)
        rows = Rows(index, bounds, labels, ignore_index, capacity, kept is not None)
        head = Head(projection, transform, wanted.stats, budget, shard)
        ref = None
        if tokens.ref_hidden is not None:
            ref = head.like(tokens.ref_hidden, tokens.ref_weight, tokens.ref_bias)
        tile_rows = head.tile_rows()
        ordered = _in_groups(rows, ends, pairs, tile_rows)
        pieces = [even_chunks(size, tile_rows) for size in ordered.sizes]
        gradients = Gradients(head, hidden, wanted.gradients, rows, sum(map(len, pieces)))
        if not ordered.groups:
            return *_zeros(hidden, labels, scale_of_pair, wanted.stats), *gradients.finish()
        if data.ref_token_logps is not None:
            data = data._replace(ref_token_logps=take_rows(data.ref_token_logps, ordered.where))
        has_reference = any(t is not None for t in (ref, data.ref_token_logps, data.ref_logps))
        family = fused_family(loss, has_reference, data.rating_gap is not None, scale_of_pair, budget.backend)
        if family is None:
            ignored = ordered.labels == ignore_index if rows.unchecked else None
            epilogue = _EpilogueOnVectors(ordered, data, ends, ignored, scale_of_pair, loss)
        else:
            epilogue = _FusedEpilogue(ordered, data, ignore_index, scale_of_pair, family, budget.backend)
        values_out = _zero_values(labels, wanted.stats)

        def project(group: int, of_group: slice) -> None:
            parts, y = pieces[group], ordered.labels[of_group]
            where = ordered.where if len(ordered.groups) == 1 else ordered.where[of_group]
            x = rows.take(hidden, where, y)
            ref_tokens = None if data.ref_token_logps is None else epilogue.data.ref_token_logps[of_group]
            if ref is not None:  # before the policy, whose tile must stay
                ref_x = rows.take(tokens.ref_hidden, where, y)
                ref_tokens = join_folds([ref.fold(ref_x[i:j], y[i:j], keep=False) for i, j in parts], ref_x, y)[0]
                del ref_x
            resident = len(parts) == 1
            folded = [head.fold(x[i:j], y[i:j], keep=resident) for i, j in parts]
            logps, lse, values = join_folds(folded, x, y, wanted.stats)
            coefficients = epilogue(group, of_group, logps, values, ref_tokens)
            if rows.padded:
                coefficients = coefficients.masked_fill_(rows.overflow, torch.nan)
            for i, j in parts:
                fit = logps[i:j], lse[:, i:j]
                if not resident:
                    fit = head.form(x[i:j], y[i:j], *fit)
                part = slice(where.start + i, where.start + j) if isinstance(where, slice) else where[i:j]
                gradients.add(head.turn(coefficients[i:j], y[i:j], *fit), x[i:j], part)  # one such tile at a time
            if wanted.stats:
                rows.put(values_out, where, values, 1)

        for group, (first, last) in enumerate(itertools.pairwise(itertools.accumulate(ordered.sizes, initial=0))):
            project(group, slice(first, last))
        found = epilogue.results()
        out = LinearPreference((found.losses * scale_of_pair).sum(), *found, values_out)
        if rows.padded:
            out.loss.masked_fill_(rows.overflow, torch.nan)
        return *out, *gradients.finish()


def _fwd(
    hidden, weight, bias, adapter_a, adapter_b, labels, cu_seqlens, kept, kept_bounds, ref_hidden, ref_weight, ref_bias,
    ref_token_logps, ref_logps, rating_gap, scores, scale_of_pair, temperature, softcap, scale, ignore_index, stats,
    needs, losses, loss_options, numbers, max_active_tokens, max_tile_bytes, logits_dtype, group, backend,
):  # fmt: skip
    return _pair_resident(
        Projection(hidden, weight, bias, adapter_a, adapter_b),
        Tokens(labels, cu_seqlens, kept, kept_bounds, ref_hidden, ref_weight, ref_bias),
        PairData(ref_token_logps, ref_logps, rating_gap, scores),
        scale_of_pair,
        Transform(temperature, softcap, scale, ignore_index),
        Wanted(stats, needs),
        decode_loss(EncodedLoss(losses, loss_options, numbers)),
        Budget(max_active_tokens, max_tile_bytes, logits_dtype, group, backend),
    )


def _fwd_fake(
    hidden, weight, bias, adapter_a, adapter_b, labels, cu_seqlens, kept, kept_bounds, ref_hidden, ref_weight, ref_bias,
    ref_token_logps, ref_logps, rating_gap, scores, scale_of_pair, temperature, softcap, scale, ignore_index, stats,
    needs, losses, loss_options, numbers, max_active_tokens, max_tile_bytes, logits_dtype, group, backend,
):  # fmt: skip
    gradients = empty_gradients(Projection(hidden, weight, bias, adapter_a, adapter_b), needs)
    return *_zeros(hidden, labels, scale_of_pair, stats), *gradients


linear_preference_fwd = operators.linear_preference_fwd
_library.OPS["linear_preference_loss"] = _library.OPS["linear_token_logps"]


@_autograd.cache_signature
class _LinearPreference(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden, weight, bias, adapter_a, adapter_b, tokens, data, scale_of_pair, transform, wanted, loss, budget
    ):
        projection = Projection(hidden, weight, bias, adapter_a, adapter_b)
        if isinstance(loss, Loss):
            found = _pair_resident(projection, tokens, data, scale_of_pair, transform, wanted, loss, budget)
        else:
            options = *transform, *wanted, *loss, *budget
            found = linear_preference_fwd(*projection, *tokens, *data, scale_of_pair, *options)
        return *found, _autograd.anchor(hidden)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _loss, *others, anchor = output
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(anchor, *others[len(LinearPreference._fields) - 1 :])
        ctx.done = False

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return _autograd.pad_gradients(ctx)
        _autograd.refuse_second_backward(ctx)
        anchor, *formed = ctx.saved_tensors
        found = zip(formed, ctx.needs_input_grad, strict=False)
        gradients = [scaled(gradient, grad) if needed else None for gradient, needed in found]
        return _autograd.pad_gradients(ctx, *_autograd.differentiable_once(gradients, grad, anchor))


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
            @losses.pair_separable; only separable losses reduced to a scalar get the plan of 3 products. A program of
            torch.compile or torch.export has room for losses by name and options that are numbers, strings, booleans
            or None; any other is traced as torch on vectors, between the two passes of 4 products.
        cu_seqlens, lengths: as in preference_loss. With hidden on a GPU they may be on the host: then no token count is
            read from the device, and ignored tokens inside the sequences are projected too.
        shared_prefix: [B], how many leading labels the two sequences of a pair share. They add nothing to the gradient
            of a loss of the difference alone, and are left out, of log-probs, rewards and lengths too.
        max_active_tokens: capacity for the tokens that count; without it at most 2B + 1 integers are read from the
            device. With it nothing is, and the call can be captured in a CUDA graph, where lengths and cu_seqlens must
            be on the device: a copy from the host cannot be captured. If more tokens count, the loss is NaN.
        stats: as in token_logps, but for "lse".
        sequence_group: process group over which the tokens of every sequence are spread: sums are all-reduced, loss and
            metrics are the same on all ranks, gradients are those of the rank's own tokens. Labels must be aligned.

    Returns:
        PreferenceOutput, as preference_loss; it can go backward once.

    Raises:
        TypeError, ValueError: as linear_token_logps and preference_loss; shared_prefix for a loss that depends on more
            than the difference of the two log-ratios, or on labels that differ (on CPU).
        RuntimeError: for a backend that cannot serve, and for a second backward.
    """
    weight, bias, ref_weight, ref_bias = (whole_weight(t) for t in (weight, bias, ref_weight, ref_bias))
    _checks.logits("hidden", hidden)
    _checks.labels(labels, hidden, "hidden")
    a, b = (None, None) if adapter is None or len(adapter) != 2 else adapter
    hidden, weight, bias, a, b = cast_for_autocast(hidden, weight, bias, a, b)
    check_head(hidden, weight, bias, adapter if a is None else (a, b))
    transform = checked_transform(temperature, softcap, scale, ignore_index)
    check_call(hidden, False, stats, backend)
    budget = checked_budget(weight, max_active_tokens, max_tile_bytes, logits_dtype, group, backend, hidden.dtype)
    check_layout(labels, cu_seqlens, "hidden")
    objective = Loss(loss, loss_weights, loss_options, beta)
    reducing = Reduction(reduction, pair_weights, num_items)
    data = PairData(ref_token_logps, ref_logps, rating_gap, scores)
    sequences = check_pairs("hidden", hidden, labels, objective, reducing, data, cu_seqlens, lengths)
    if lengths is not None and _native.device_kind(lengths) != "cpu":
        _checks.same_device("lengths", lengths, "hidden", labels)
    check_reference("hidden", labels, sequences, objective, data, "ref_hidden", ref_hidden)
    ref_hidden, ref_weight, ref_bias = _reference(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    _check_sequence_group(sequence_group, shift)
    _autograd.refuse_transforms("linear_preference_loss", hidden, weight, bias, a, b)

    layout = _upload_layout(labels, cu_seqlens, lengths, may_keep=max_active_tokens is None)
    cu_seqlens, lengths, *kept, kept_bounds_there = layout
    if shared_prefix is not None:
        labels = _without_prefix(labels, shared_prefix, cu_seqlens, sequences, objective, ignore_index)
    labels = targets(labels, cu_seqlens, lengths, ignore_index, shift)
    if ref_hidden is not None:
        ref_hidden = ref_hidden.reshape(-1, ref_hidden.shape[-1])
    projection = Projection(hidden.reshape(-1, hidden.shape[-1]), weight, bias, a, b)
    tokens = Tokens(labels.reshape(-1), None, *kept, ref_hidden, ref_weight, ref_bias)
    values_wanted = bool(wanted_stats(stats, objective))
    if sequence_group is None and _is_pair_resident(projection, objective, reduction):
        bounds = _bounds(labels, cu_seqlens) if kept_bounds_there is None else kept_bounds_there
        tokens = tokens._replace(cu_seqlens=bounds)
        reduced, gathered = _in_one_pass(
            projection, tokens, data, transform, values_wanted, objective, reducing, budget
        )
        values = gathered.values
        gathered = gathered._replace(values=values.view(values.shape[0], *labels.shape))
    else:
        found = gather_logps(projection, tokens, transform, values_wanted, budget)
        if ref_hidden is not None:
            data = PairData(found.ref_logps.view(labels.shape), ref_logps, rating_gap, scores)
        given = _Labels(labels, cu_seqlens, ignore_index, sequence_group)
        reduced, gathered = _in_two_passes(found, data, given, objective, reducing, budget.backend)
    means = {}
    if stats:
        sequences = Sequences(labels, ignore_index, cu_seqlens, sequence_group)
        means = stat_means(gathered.values, sequences, gathered.lengths, stats)
    return preference_output(reduced, gathered, rating_gap, objective.reward_scale(), means)


def _bounds(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[2B + 1] where the sequences begin among all tokens."""
    return _offsets(labels) if cu_seqlens is None else rising(cu_seqlens, labels.shape[0])


class _Labels(NamedTuple):
    labels: Tensor
    cu_seqlens: Tensor | None
    ignore_index: int
    group: dist.ProcessGroup | None


def _in_two_passes(
    found: LinearLogps, data: PairData, given: _Labels, loss: Loss, reduction: Reduction, backend: str
) -> tuple[Tensor, Gathered]:
    """The reduced loss, or [B], differentiable in the log-probs, and what it is made of."""
    labels, cu_seqlens, ignore_index, group = given
    values, family = found.values.view(found.values.shape[0], *labels.shape), None
    if group is None and reduction.kind != "none":
        has_reference = data.ref_token_logps is not None or data.ref_logps is not None
        family = fused_family(loss, has_reference, data.rating_gap is not None, found.logps, backend)
    if family is None:
        sequences = Sequences(labels, ignore_index, cu_seqlens, group)
        gathered = pair_losses(found.logps.view(labels.shape), values, sequences, data, loss)
        return reduction.reduce(gathered.losses), gathered
    if data.ref_token_logps is not None:
        data = data._replace(ref_token_logps=data.ref_token_logps.reshape(-1))
    bounds = _bounds(labels, cu_seqlens)
    like = found.logps.new_empty((bounds.shape[0] - 1) // 2)
    reduced, results = pair_epilogue(
        found.logps, labels.reshape(-1), bounds, data, reduction.scale_of_pair(like), ignore_index, family, backend
    )
    return reduced, Gathered(*results, values)


def _offsets(labels: Tensor) -> Tensor:
    """cu_seqlens of padded labels."""
    sequences, length = labels.shape
    if not length:
        return torch.zeros(sequences + 1, dtype=torch.int64, device=labels.device)
    return torch.arange(0, sequences * length + 1, length, device=labels.device)


def _is_pair_resident(projection: Projection, loss: Loss, reduction: str) -> bool:
    """Whether the loss is computed with the tile. A compiled graph has room for named losses there; others, traced as
    torch on vectors, take the two passes."""
    hidden, *head = projection
    head_grad = any(t is not None and t.requires_grad for t in head)
    resident = is_resident(loss.loss, loss.options, reduction)
    if torch.compiler.is_compiling():
        resident = resident and encode_loss(loss) is not None
    kind = choose_kind(hidden.requires_grad, head_grad, resident, hidden.dtype)
    return torch.is_grad_enabled() and kind == "pair_resident"


def _in_one_pass(
    projection: Projection,
    tokens: Tokens,
    data: PairData,
    transform: Transform,
    stats: bool,
    loss: Loss,
    reduction: Reduction,
    budget: Budget,
) -> tuple[Tensor, Gathered]:
    """The reduced loss, whose gradients are formed already, and what it is made of, detached."""
    hidden, pairs = projection.hidden, (tokens.cu_seqlens.shape[0] - 1) // 2
    like = torch.empty(pairs, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    ref_token_logps, *others = (None if t is None else t.detach() for t in data)
    data = PairData(None if ref_token_logps is None else ref_token_logps.reshape(-1), *others)
    wanted = Wanted(stats, [t is not None and t.requires_grad for t in projection])
    loss = encode_loss(loss) or loss  # a callable is called, and cannot be in a graph
    found = _LinearPreference.apply(
        *projection, tokens, data, reduction.scale_of_pair(like), transform, wanted, loss, budget
    )
    reduced, *rest = found[: len(LinearPreference._fields)]
    return reduced, Gathered(*rest)


def _check_sequence_group(sequence_group, shift: bool) -> None:
    if sequence_group is None:
        return
    if not isinstance(sequence_group, dist.ProcessGroup):
        raise TypeError(
            f"sequence_group must be a torch.distributed process group, got {type(sequence_group).__name__}"
        )
    if shift:
        raise ValueError("shift must be False with sequence_group: the label after a rank's last token is on the next")


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


class _UploadedLayout(NamedTuple):
    """Integers where the labels are."""

    cu_seqlens: Tensor | None  # [sequences + 1]
    lengths: Tensor | None  # [sequences]
    kept: Tensor | None = None  # as Tokens has them
    kept_bounds: Tensor | None = None
    kept_bounds_there: Tensor | None = None  # the same, where the labels are


def _upload_layout(labels, cu_seqlens, lengths, may_keep: bool) -> _UploadedLayout:
    """The caller's cu_seqlens or lengths; and, where it was on the host and the labels are not, the rows between, which
    may be kept whether they count or not: all in one upload, which the host does not wait for."""
    given = lengths if cu_seqlens is None else cu_seqlens
    if given is None:
        return _UploadedLayout(None, None)
    keeps = may_keep and _native.device_kind(given) == "cpu" and _native.device_kind(labels) != "cpu"
    given = given.long()
    if not keeps:
        there, kept = given.to(labels.device, non_blocking=True), ()
    elif cu_seqlens is None:
        inside = torch.arange(labels.shape[1], device=given.device) < given.unsqueeze(1)
        index, _ = stable_partition(inside.flatten())
        bounds = torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0))
        parts = index, bounds, given
        uploaded = torch.cat(parts).to(labels.device, non_blocking=True)
        index, bounds_there, there = uploaded.split([part.shape[0] for part in parts])
        kept = index, bounds, bounds_there
    else:
        bounds = rising(given, labels.shape[0])
        there = bounds.to(labels.device, non_blocking=True)
        kept = torch.arange(labels.shape[0], device=labels.device), bounds, there
    return _UploadedLayout(None, there, *kept) if cu_seqlens is None else _UploadedLayout(there, None, *kept)


def _without_prefix(labels, shared_prefix, cu_seqlens, sequences, loss: Loss, ignore_index) -> Tensor:
    """Labels with the first shared_prefix[pair] of both its sequences ignored."""
    if not loss.traits().delta_only:
        raise ValueError(
            f"shared_prefix must be None for loss={loss.loss!r}, "
            "which depends on more than the difference of the log-ratios"
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
    if _native.device_kind(labels) == "cpu" and not torch.compiler.is_compiling():
        half = labels.shape[0] // 2 if cu_seqlens is None else cu_seqlens[sequences // 2]
        chosen, rejected = labels[:half][prefix[:half]], labels[half:][prefix[half:]]
        if (counts < 0).any() or not torch.equal(chosen, rejected):
            raise ValueError(
                "shared_prefix must be numbers of leading labels that chosen and rejected share, "
                f"got {shared_prefix.tolist()}, whose labels differ or are missing"
            )
    return labels.masked_fill(prefix, ignore_index)
