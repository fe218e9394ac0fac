"""Sums of per-token log-probs over sequences, padded or packed, and the layout of their labels."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _autograd, _checks, _native
from fastpref._logps.token_logps import shifted


class SequenceLogps(NamedTuple):
    __module__ = "fastpref"

    sums: Tensor  # [sequences] sum of the log-probs of the tokens that count
    lengths: Tensor  # [sequences] int64, how many they are


class Sequences:
    """Where the sequences lie in labels: rows of [sequences, T], or segments of [tokens] between cu_seqlens."""

    def __init__(self, labels: Tensor, ignore_index: int, cu_seqlens: Tensor | None, group=None):
        self.ignored = labels == ignore_index
        self.cu_seqlens = None if cu_seqlens is None else rising(cu_seqlens, labels.shape[0])
        self.shape, self.positions = labels.shape, None
        self.group = group  # over which the tokens of each sequence are spread

    @classmethod
    def compacted(cls, positions: Tensor, bounds: Tensor, ignored: Tensor | None) -> "Sequences":
        """Of rows that all count, but those that are `ignored` where rows were kept without counting.

        positions: [rows], 0, 1, ...
        """
        found = cls.__new__(cls)
        found.ignored, found.cu_seqlens, found.group = ignored, bounds, None
        found.shape, found.positions = positions.shape, positions
        return found

    def sum(self, values: Tensor) -> Tensor:
        """Tokens that count, added up per sequence in float64; the others are selected out, NaN or not."""
        return _add(values, self.ignored, self.cu_seqlens, self.group)

    def sum_logps(self, tokens: Tensor, ref_sums: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[sequences] in tokens' dtype: their sums, and the sums less ref_sums (float64) where there is a reference.

        Differentiable in tokens; the gradient of a token that does not count is not 0 but its sequence's.
        """
        found = _AddedTokens.apply(tokens, ref_sums, self.ignored, self.cu_seqlens, self.group)
        return (found, None) if ref_sums is None else found

    def lengths(self) -> Tensor:
        """[sequences] int64, how many tokens count."""
        if self.ignored is None:
            return self.cu_seqlens[1:] - self.cu_seqlens[:-1]
        if self.cu_seqlens is None and self.group is None:
            return (~self.ignored).sum(-1)
        return self.sum(~self.ignored).long()

    def per_token(self, values: Tensor) -> Tensor:
        """[sequences] -> the shape of labels."""
        return _per_token(values, self.shape, self.cu_seqlens, self.positions)

    def beyond(self, length: Tensor) -> Tensor:
        """Which tokens come after the first `length[sequence]` that count."""
        if self.group is not None:
            raise ValueError("sequence_group must be None for a loss on part of the completion: no rank sees it whole")
        if self.ignored is None:
            counted = torch.ones(self.shape, dtype=torch.bool, device=length.device)
        else:
            counted = ~self.ignored
        rank = counted.cumsum(-1)
        if self.cu_seqlens is not None:
            before = torch.nn.functional.pad(rank, (1, 0))[self.cu_seqlens[:-1]]
            rank = rank - self.per_token(before)
        return counted & (rank > self.per_token(length))


def rising(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Only the CPU in eager mode has checked them: nothing may be read out of bounds elsewhere."""
    return cu_seqlens.clamp(0, tokens).cummax(0).values


def _add(values: Tensor, ignored: Tensor | None, cu_seqlens: Tensor | None, group) -> Tensor:
    wide = values.double()
    if ignored is not None:
        wide = wide.masked_fill(ignored, 0.0) if wide is values else wide.masked_fill_(ignored, 0.0)
    if cu_seqlens is None:
        sums = wide.sum(-1)
    else:
        sums = torch.segment_reduce(wide, "sum", offsets=cu_seqlens, initial=0.0)
    return sums if group is None else _SumOverRanks.apply(sums, group)


def _per_token(values: Tensor, shape: torch.Size, cu_seqlens: Tensor | None, positions: Tensor | None = None) -> Tensor:
    if cu_seqlens is None:
        return values.unsqueeze(-1).expand(shape)
    if positions is None:
        positions = torch.arange(shape[0], device=values.device)
    return values.index_select(0, torch.searchsorted(cu_seqlens[1:-1].contiguous(), positions, right=True))


@_autograd.cache_signature
class _AddedTokens(torch.autograd.Function):
    """A loss reads its tokens through these sums alone, so its gradient is one number per sequence."""

    @staticmethod
    def forward(tokens, ref_sums, ignored, cu_seqlens, group):
        sums = _add(tokens, ignored, cu_seqlens, group)
        if ref_sums is None:
            return sums.to(tokens.dtype)
        return sums.to(tokens.dtype), (sums - ref_sums).to(tokens.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tokens, _ref_sums, _ignored, cu_seqlens, _group = inputs
        ctx.shape = tokens.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cu_seqlens)

    @staticmethod
    def backward(ctx, *gradients):
        (cu_seqlens,) = ctx.saved_tensors
        given = [g for g in gradients if g is not None]
        # every rank computes the same loss of the sum over ranks, so each addend's gradient is the sum's
        gradient = _per_token(sum(given[1:], given[0]), ctx.shape, cu_seqlens) if given else None
        return _autograd.pad_gradients(ctx, gradient)


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
    if _native.device_kind(cu_seqlens) != "cpu" or like != "hidden":  # which may be elsewhere than the host's counts
        _checks.same_device("cu_seqlens", cu_seqlens, like, labels)
    if _native.device_kind(cu_seqlens) == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != labels.shape[0] or ends != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {labels.shape[0]}, got {ends}")
