"""The epilogue of the fused family behind log-probs of tokens: sums, losses and every token's gradient in one call.

The loss of a pair is known as soon as the log-probs of its tokens are, and so is their gradient: one number per
sequence (csrc/preference.h, PairEpilogue). preference_loss has it behind its gather; here it stands alone, for
log-probs that come from hidden states.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _autograd, _native, operators
from fastpref._logps import preference_triton
from fastpref._logps.pairs import (
    Family,
    Loss,
    PairData,
    fused_backend,
    host_numbers,
    logistic_family,
    serving_backend,
)


class PairResults(NamedTuple):
    losses: Tensor  # [B] before weights
    logps: Tensor  # [2B]
    logratios: Tensor  # [2B]
    lengths: Tensor  # [2B] int64

    @staticmethod
    def empty(scale: Tensor) -> "PairResults":
        pairs = scale.shape[0]
        vectors = (scale.new_empty(n) for n in (pairs, 2 * pairs, 2 * pairs))
        return PairResults(*vectors, scale.new_empty(2 * pairs, dtype=torch.int64))


def fused_family(loss: Loss, has_reference: bool, has_rating: bool, like: Tensor, backend: str) -> Family | None:
    """None where torch on vectors takes the epilogue of log-probs of like's dtype and device."""
    if like.dtype != torch.float32 or fused_backend(_native.device_kind(like), backend) is None:
        return None
    return logistic_family(loss, has_reference, has_rating)


def write_pairs(
    out: PairResults,
    pairs: tuple[int, int],
    token_logps: Tensor,
    labels: Tensor,
    bounds: Tensor,
    data: PairData,
    scale: Tensor,
    ignore_index: int,
    family: Family,
    backend: str,
) -> Tensor:
    """Writes the pairs [begin, end) of `out`, whose tokens are [rows]; returns the gradient by each of them of the sum
    of `scale` times the losses.

    bounds: [2 (end - begin) + 1] where the sequences begin among these rows, the chosen ones first. All floats are
    float32; data.ref_token_logps is of these rows, the rest of data and scale of all pairs.
    """
    device = _native.device_kind(token_logps)
    chosen = serving_backend("pair_epilogue", device, backend)
    gradient = torch.zeros_like(token_logps)  # of rows that are of no sequence
    tensors = {
        "token_logps": token_logps,
        "labels": labels,
        "bounds": bounds,
        "ref_token_logps": data.ref_token_logps,
        "ref_logps": data.ref_logps,
        "rating_gap": data.rating_gap,
        "scale_of_pair": scale,
        "token_grad": gradient,
    }
    tensors = {name: t.contiguous() for name, t in tensors.items() if t is not None} | out._asdict()
    if chosen == "triton":
        preference_triton.pair_epilogue(tensors, pairs, ignore_index, *family)
        return gradient
    core = _native._core
    numbers = core.LogisticFamily(*family.numbers, family.drop_square)
    args = core.PairEpilogue(ignore_index, token_logps.shape[0], *pairs, scale.shape[0], numbers)
    _native.set_addresses(args, tensors)
    if device == "cuda":
        with _native.guard(token_logps):
            core.preference_pairs_cuda(args, _native.stream(token_logps))
    else:
        core.preference_pairs_cpu(args)
    return gradient


# ---- of a whole batch, as an operator ----


def _fwd(
    token_logps, labels, bounds, ref_token_logps, ref_logps, rating_gap, scale_of_pair, ignore_index, numbers,
    drop_square, backend,
):  # fmt: skip
    out = PairResults.empty(scale_of_pair)
    floats = (None if t is None else t.float() for t in (ref_token_logps, ref_logps, rating_gap))
    data, family = PairData(*floats, None), Family(numbers.tolist(), drop_square)
    gradient = write_pairs(
        out,
        (0, scale_of_pair.shape[0]),
        token_logps,
        labels,
        bounds,
        data,
        scale_of_pair,
        ignore_index,
        family,
        backend,
    )
    return (out.losses * scale_of_pair).sum(), *out, gradient


def _fwd_fake(
    token_logps, labels, bounds, ref_token_logps, ref_logps, rating_gap, scale_of_pair, ignore_index, numbers,
    drop_square, backend,
):  # fmt: skip
    return scale_of_pair.new_empty(()), *PairResults.empty(scale_of_pair), torch.empty_like(token_logps)


@_autograd.cache_signature
class _PairEpilogue(torch.autograd.Function):
    @staticmethod
    def forward(token_logps, labels, bounds, data, scale, ignore_index, numbers, drop_square, backend):
        references = data[:3]
        return operators.pair_epilogue(
            token_logps, labels, bounds, *references, scale, ignore_index, numbers, drop_square, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        _loss, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(others[-1])

    @staticmethod
    def backward(ctx, grad, *_):
        (gradient,) = ctx.saved_tensors
        return _autograd.pad_gradients(ctx, None if grad is None else gradient * grad)


def pair_epilogue(
    token_logps: Tensor,
    labels: Tensor,
    bounds: Tensor,
    data: PairData,
    scale: Tensor,
    ignore_index: int,
    family: Family,
    backend: str,
) -> tuple[Tensor, PairResults]:
    """The sum of `scale` times the losses, differentiable in token_logps [tokens], and what it is made of."""
    data = PairData(*(None if t is None else t.detach() for t in data))
    numbers = host_numbers(family.numbers)
    found = _PairEpilogue.apply(
        token_logps, labels, bounds, data, scale, ignore_index, numbers, family.drop_square, backend
    )
    loss, *results, _gradient = found
    return loss, PairResults(*results)
