"""Log-probabilities of given tokens from logits, forward and backward, without a second tensor of the logits' size.

Every preference loss needs one number per token, `log softmax(z)[label]`, and hands back one gradient per token. In
plain PyTorch that costs a log-softmax of the whole `[tokens, vocab]` tensor, kept for the backward. Here the forward
reads the logits once, and the backward reads them once and writes their gradient once, or overwrites them.

Floor, in bytes per logit of size s: forward s; backward 2 s.

The online sum leaves the target column out: with d = lse_{v != y} - z_y, logp = -softplus(d) is never positive, and the
target's gradient 1 - p = -expm1(logp) is exact for confident tokens, where 1 - exp(logp) would cancel.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _autograd, _checks, _library, _native, operators
from fastpref._logps import columns
from fastpref._logps.transform import Transform, checked_transform

try:
    import triton
    import triton.language as tl
except ImportError:  # _library.triton_reason says why
    triton = None

STATS = ("entropy", "log_sum_p2", "mean_logit", "top1")  # what the kernels form beside log-probs, when asked
ALL_STATS = (*STATS, "lse")  # and what they form in any case
_REFERENCE_BYTES = 64 << 20  # the reference works through the rows in float64 blocks of this size


class TokenStats(NamedTuple):
    """By-products of the same read, float32 [...] like labels, detached; None where not asked for, 0 at ignored tokens.

    All are of the transformed logits z: the entropy of softmax(z) in nats, log sum_v p_v^2, mean_v z_v, 1.0 where no
    other column is larger than the label's (a tie is a hit), and log sum_v exp(z_v).
    """

    __module__ = "fastpref"

    entropy: Tensor | None = None
    log_sum_p2: Tensor | None = None
    mean_logit: Tensor | None = None
    top1: Tensor | None = None
    lse: Tensor | None = None


# ---- reference: the specification ----


def token_logps_ref(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """What token_logps computes, in plain float64 PyTorch: [..., V] and [...] -> [...], 0 where ignored."""
    z, _ = Transform(temperature, softcap, scale).values_and_slopes(logits)
    ignored = labels == ignore_index
    target = labels.masked_fill(ignored, 0).unsqueeze(-1)
    others = z.scatter(-1, target, -torch.inf).logsumexp(-1)
    others = torch.where(z.amax(-1) == torch.inf, torch.nan, others)  # as log_softmax has it
    logps = torch.nn.functional.logsigmoid(z.gather(-1, target).squeeze(-1) - others)
    return torch.where(ignored, 0.0, logps)


def _reference_blocks(rows: Tensor):
    """Slices of [outer, inner, V] that fit _REFERENCE_BYTES in float64."""
    outer, inner, vocab = rows.shape
    step = max(1, _REFERENCE_BYTES // (8 * vocab))
    for i in range(outer):
        for begin in range(0, inner, step):
            yield i, slice(begin, min(begin + step, inner))


def invalid_labels(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Where they are neither columns nor ignored."""
    return ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)


def valid_labels(labels: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels safe to index with, and where they were neither valid nor ignored (raises there on CPU)."""
    invalid = invalid_labels(labels, vocab, ignore_index)
    if _native.device_kind(labels) == "cpu" and invalid.any():
        position = int(invalid.flatten().nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {vocab}) or equal ignore_index={ignore_index}, "
            f"got {int(labels.flatten()[position])} at position {position}"
        )
    return labels.masked_fill(invalid, 0), invalid


def _reference_fwd(rows, labels, transform: Transform, stats):
    labels, invalid = valid_labels(labels, rows.shape[-1], transform.ignore_index)
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    logps = torch.empty(labels.shape, dtype=dtype, device=rows.device)
    lse = torch.empty(2, *labels.shape, dtype=dtype, device=rows.device)
    values = torch.empty(4 if stats else 0, *labels.shape, dtype=torch.float32, device=rows.device)
    multiplier, _ = transform.multiplier_and_tanh_scale()
    for block in _reference_blocks(rows):
        y = labels[block]
        skip = y == transform.ignore_index
        logps[block] = token_logps_ref(rows[block], y, **transform._asdict()).to(dtype)
        z, _ = transform.values_and_slopes(rows[block])
        total = z.logsumexp(-1)
        hi = (total / multiplier).to(dtype)
        hi = torch.where(logps[block].isnan(), torch.nan, hi)  # as the kernels have it: no column has a gradient
        lo = torch.where(hi.isfinite(), total - multiplier * hi.double(), 0.0)
        lse[(0, *block)] = hi.masked_fill(skip, 0)
        lse[(1, *block)] = lo.to(dtype).masked_fill(skip, 0)
        if stats:
            log_p = z - total.unsqueeze(-1)
            p = log_p.exp()
            target = z.gather(-1, y.masked_fill(skip, 0).unsqueeze(-1)).squeeze(-1)
            entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
            found = (entropy, (2 * log_p).logsumexp(-1), z.mean(-1), (target >= z.amax(-1)).double())
            for i, value in enumerate(found):
                values[(i, *block)] = value.float().masked_fill(skip, 0)
    for out in (logps, lse, values):
        out.masked_fill_(invalid, torch.nan)
    return logps, lse, values


def _reference_bwd(grad, rows, labels, logps, lse, transform: Transform, out):
    labels, _ = valid_labels(labels, rows.shape[-1], transform.ignore_index)
    multiplier, _ = transform.multiplier_and_tanh_scale()
    for block in _reference_blocks(rows):
        y = labels[block]
        skip = (y == transform.ignore_index).unsqueeze(-1)
        z, slope = transform.values_and_slopes(rows[block])
        total = multiplier * lse[(0, *block)].double() + lse[(1, *block)].double()
        unit = -torch.exp(z - total.unsqueeze(-1))
        unit.scatter_(-1, y.unsqueeze(-1).masked_fill(skip, 0), -torch.expm1(logps[block].double()).unsqueeze(-1))
        gradient = grad[block].double().unsqueeze(-1) * unit * slope
        out[block] = torch.where(skip, 0.0, gradient).to(out.dtype)


# ---- Triton: NVIDIA and AMD, a program per row ----

if triton is not None:

    @triton.jit(
        do_not_specialize=[
            "inner",
            "outer_stride",
            "inner_stride",
            "ref_outer_stride",
            "ref_inner_stride",
            "V",
            "sequences",
            "shift",
            "ignore_index",
        ]
    )
    def _token_logps_fwd_kernel(
        x_ptr,  # [outer, inner, V], columns contiguous
        ref_ptr,  # the same, of a reference; or None
        labels_ptr,  # [rows] int64 or int32: rows = outer * inner
        cu_seqlens_ptr,  # [sequences + 1] int64 or int32; or None: `outer` sequences of `inner` rows
        lengths_ptr,  # [sequences] int64 or int32; or None
        logps_ptr,  # [rows] fp32
        ref_logps_ptr,  # [rows] fp32; or None
        lse_ptr,  # [2, rows] fp32: hi, lo
        stats_ptr,  # [4, rows] fp32; or None
        inner,
        outer_stride,
        inner_stride,
        ref_outer_stride,
        ref_inner_stride,
        V,
        sequences,
        shift,  # 1: a row's label is the next one of its sequence
        ignore_index,
        multiplier,
        tanh_scale,
        HAS_SOFTCAP: tl.constexpr,
        BLOCK_V: tl.constexpr,
    ):
        HAS_STATS: tl.constexpr = stats_ptr is not None
        row = tl.program_id(0)
        rows = tl.num_programs(0)
        multiplier = tl.cast(multiplier, tl.float32)  # fp64 under torch.compile before torch 2.15
        tanh_scale = tl.cast(tanh_scale, tl.float32)
        k = multiplier * columns.LOG2E
        sequence, token, length = columns.place(cu_seqlens_ptr, row, rows, inner, sequences)
        label = columns.label_at(labels_ptr, lengths_ptr, row, sequence, token, length, shift, ignore_index)
        ignored = label == ignore_index
        valid = (label >= 0) & (label < V) & (label != ignore_index)
        # a row that must not be read has no columns
        width = tl.where(valid, V, 0)
        target_col = tl.where(valid, label, 0).to(tl.int32)
        outer_index = (row // inner).to(tl.int64)
        inner_index = (row % inner).to(tl.int64)
        x_row = x_ptr + outer_index * outer_stride + inner_index * inner_stride
        is_ref = tl.program_id(1) == 1
        if ref_ptr is not None:
            x_row = tl.where(is_ref, ref_ptr + outer_index * ref_outer_stride + inner_index * ref_inner_stride, x_row)
        head, body, cols, edge_cols, edge_mask = columns.row_parts(x_row, width, BLOCK_V)
        x_body = tl.multiple_of(x_row + head, 16)

        target = columns.transform(tl.load(x_row + target_col, mask=valid, other=0.0), tanh_scale, HAS_SOFTCAP)
        x = columns.transform(tl.load(x_row + edge_cols, mask=edge_mask, other=0.0), tanh_scale, HAS_SOFTCAP)
        # each lane keeps its own maximum and sums, without the target column, to the end: no barrier in the loop
        top = tl.where(edge_mask & (edge_cols != target_col), x, -columns.INF)
        total = tl.exp2((top - columns.finite_or_zero(top)) * k)
        exp_t = tl.zeros_like(total)
        squared = total
        value = tl.where(edge_mask, x, 0.0)

        target_col -= head
        full = body // BLOCK_V * BLOCK_V
        for start in range(0, full, BLOCK_V):
            v = columns.transform(tl.load(x_body + (start + cols)), tanh_scale, HAS_SOFTCAP)
            if HAS_STATS:
                value += tl.sum(tl.sum(v, 2), 0)
            if (target_col >= start) & (target_col < start + BLOCK_V):  # one block per row pays for the comparison
                v = tl.where(cols == target_col - start, -columns.INF, v)
            top, total, exp_t, squared = columns.fold(v, top, total, exp_t, squared, k, HAS_STATS)
        if full < body:
            mask = cols < body - full
            v = columns.transform(tl.load(x_body + (full + cols), mask=mask, other=0.0), tanh_scale, HAS_SOFTCAP)
            if HAS_STATS:
                value += tl.sum(tl.sum(v, 2), 0)
            v = tl.where(mask & (cols != target_col - full), v, -columns.INF)
            top, total, exp_t, squared = columns.fold(v, top, total, exp_t, squared, k, HAS_STATS)

        row_top = tl.max(top, 0)  # over all columns but the target
        ref = columns.finite_or_zero(row_top)
        decay = tl.exp2((top - ref) * k)
        if HAS_STATS:
            moved = exp_t + total * (columns.finite_or_zero(top) - ref)
            exp_t = tl.sum(tl.where(decay > 0.0, decay * moved, 0.0), 0)
            squared = tl.sum(squared * decay * decay, 0)
            value = tl.sum(value, 0)
        total = tl.sum(total * decay, 0)

        # logp = -softplus(d), d = log sum_{v != y} exp(z_v) - z_y
        d = multiplier * (ref - target) + tl.log(total)
        d = tl.where(target == columns.INF, columns.NAN, d)
        logp = 0.0 - (tl.maximum(d, 0.0) + columns.log1p(tl.exp2(-tl.abs(d) * columns.LOG2E)))
        logp = tl.where(d == d, logp, columns.NAN)

        # all columns, relative to the maximum of all
        all_top = tl.maximum(row_top, target)
        all_ref = columns.finite_or_zero(all_top)
        decay = tl.exp2((row_top - all_ref) * k)
        t = target - all_ref
        e = tl.exp2(t * k)
        all_total = total * decay + e
        log_total = tl.log(all_total)
        # hi + error = all_top + quotient exactly (two-sum)
        quotient = log_total / multiplier
        hi = all_top + quotient
        back = hi - all_top
        error = (all_top - (hi - back)) + (quotient - back)
        lo = multiplier * error + (log_total - multiplier * quotient)
        lo = tl.where(tl.abs(hi) < columns.INF, lo, 0.0)

        blank = tl.where(ignored, 0.0, columns.NAN)
        logp = tl.where(valid, logp, blank)
        if ref_ptr is not None:  # log-probs are all that a loss wants of a reference
            tl.store(ref_logps_ptr + row, logp, mask=is_ref)
        is_policy = tl.program_id(1) == 0
        tl.store(logps_ptr + row, logp, mask=is_policy)
        tl.store(lse_ptr + row, tl.where(valid, hi, blank), mask=is_policy)
        tl.store(lse_ptr + rows.to(tl.int64) + row, tl.where(valid, lo, blank), mask=is_policy)
        if HAS_STATS:
            moved = exp_t + total * (ref - all_ref)
            exp_t = tl.where(decay > 0.0, decay * moved, 0.0) + tl.where(e > 0.0, e * t, 0.0)
            squared = squared * decay * decay + e * e
            entropy = log_total - multiplier * (exp_t / all_total)
            log_sum_p2 = tl.log(squared) - 2.0 * log_total
            mean = multiplier * (value / V)
            hit = tl.where(target >= row_top, 1.0, 0.0)
            stats_row = stats_ptr + row
            tl.store(stats_row, tl.where(valid, entropy, blank), mask=is_policy)
            tl.store(stats_row + rows.to(tl.int64), tl.where(valid, log_sum_p2, blank), mask=is_policy)
            tl.store(stats_row + 2 * rows.to(tl.int64), tl.where(valid, mean, blank), mask=is_policy)
            tl.store(stats_row + 3 * rows.to(tl.int64), tl.where(valid, hit, blank), mask=is_policy)

    @triton.jit(
        do_not_specialize=[
            "inner",
            "outer_stride",
            "inner_stride",
            "out_outer_stride",
            "out_inner_stride",
            "V",
            "sequences",
            "shift",
            "ignore_index",
        ]
    )
    def _token_logps_bwd_kernel(
        grad_ptr,  # [rows] fp32, of each log-prob; with coefficients [1], or [sequences / 2] if PER_PAIR, of the loss
        coefficients_ptr,  # [sequences] fp32: a row's gradient is its sequence's coefficient times the loss's; or None
        tail_coefficients_ptr,  # [sequences] fp32: added to them from the token tail_begin on; or None
        tail_begin_ptr,  # [sequences] int64; or None
        x_ptr,  # [outer, inner, V], columns contiguous
        labels_ptr,  # [rows] int64 or int32: rows = outer * inner
        cu_seqlens_ptr,  # [sequences + 1] int64 or int32; or None: `outer` sequences of `inner` rows
        lengths_ptr,  # [sequences] int64 or int32; or None
        logps_ptr,  # [rows] fp32
        lse_ptr,  # [2, rows] fp32: hi, lo
        out_ptr,  # [outer, inner, V], columns contiguous; may be x_ptr
        inner,
        outer_stride,
        inner_stride,
        out_outer_stride,
        out_inner_stride,
        V,
        sequences,
        shift,
        ignore_index,
        multiplier,
        tanh_scale,
        HAS_SOFTCAP: tl.constexpr,
        SAME_PHASE: tl.constexpr,  # rows of out lie as those of x do, modulo 16 bytes
        PER_PAIR: tl.constexpr,
        BLOCK_V: tl.constexpr,
    ):
        rows = tl.num_programs(0)
        row = rows - 1 - tl.program_id(0)  # last row first: the forward left it in L2
        multiplier = tl.cast(multiplier, tl.float32)
        tanh_scale = tl.cast(tanh_scale, tl.float32)
        k = multiplier * columns.LOG2E
        outer_index = (row // inner).to(tl.int64)
        inner_index = (row % inner).to(tl.int64)
        x_row = x_ptr + outer_index * outer_stride + inner_index * inner_stride
        out_row = out_ptr + outer_index * out_outer_stride + inner_index * out_inner_stride
        sequence, token, length = columns.place(cu_seqlens_ptr, row, rows, inner, sequences)
        label = columns.label_at(labels_ptr, lengths_ptr, row, sequence, token, length, shift, ignore_index)
        if coefficients_ptr is None:
            grad = tl.load(grad_ptr + row)
        else:
            pair = tl.where(sequence < sequences // 2, sequence, sequence - sequences // 2)
            grad = tl.load(coefficients_ptr + sequence)
            if tail_coefficients_ptr is not None:
                in_tail = token >= tl.load(tail_begin_ptr + sequence)
                grad += tl.load(tail_coefficients_ptr + sequence, mask=in_tail, other=0.0)
            grad *= tl.load(grad_ptr + (pair if PER_PAIR else 0))
        hi = tl.load(lse_ptr + row)
        head, body, cols, edge_cols, edge_mask = columns.row_parts(x_row, V, BLOCK_V)
        x_body = tl.multiple_of(x_row + head, 16)
        out_body = out_row + head
        if SAME_PHASE:
            out_body = tl.multiple_of(out_body, 16)

        # a zero gradient, and a finite sum says that no column is NaN: nothing to read
        if (label == ignore_index) | ((grad == 0.0) & (tl.abs(hi) < columns.INF)):
            zeros = tl.zeros(cols.shape, out_ptr.dtype.element_ty)
            for start in range(0, body, BLOCK_V):
                tl.store(out_body + (start + cols), zeros, mask=cols < body - start)
            tl.store(out_row + edge_cols, tl.zeros(edge_cols.shape, out_ptr.dtype.element_ty), mask=edge_mask)
        else:
            EXACT: tl.constexpr = tl.constexpr(out_ptr.dtype.element_ty.primitive_bitwidth) == 32
            lo = tl.load(lse_ptr + rows.to(tl.int64) + row)
            k_lo = (tl.fma(multiplier, columns.LOG2E, -k) + multiplier * columns.LOG2E_LO) * columns.LN2
            minus_grad = -grad * multiplier
            if HAS_SOFTCAP:
                minus_grad *= tanh_scale
            # lo is no small number where all logits share a large offset
            scale = minus_grad * tl.where(tl.abs(lo) < 0.25, 1.0 + columns.expm1(-lo), tl.exp2(-lo * columns.LOG2E))
            scale += hi - hi  # NaN where hi is not finite
            # -(1 - p) of the target, exact for confident tokens where the difference would cancel
            at_target = minus_grad * columns.expm1(tl.load(logps_ptr + row))
            target_col = (label - head).to(tl.int32)
            full = body // BLOCK_V * BLOCK_V
            for start in range(0, full, BLOCK_V):
                x = tl.load(x_body + (start + cols))
                here = (target_col >= start) & (target_col < start + BLOCK_V)
                y = columns.gradients(
                    x, cols, target_col - start, here, hi, k, k_lo, scale, at_target, tanh_scale, HAS_SOFTCAP, EXACT
                )
                tl.store(out_body + (start + cols), y.to(out_ptr.dtype.element_ty))
            if full < body:
                mask = cols < body - full
                x = tl.load(x_body + (full + cols), mask=mask, other=0.0)
                y = columns.gradients(
                    x, cols, target_col - full, True, hi, k, k_lo, scale, at_target, tanh_scale, HAS_SOFTCAP, EXACT
                )
                tl.store(out_body + (full + cols), y.to(out_ptr.dtype.element_ty), mask=mask)
            x = tl.load(x_row + edge_cols, mask=edge_mask, other=0.0)
            y = columns.gradients(
                x, edge_cols, label, True, hi, k, k_lo, scale, at_target, tanh_scale, HAS_SOFTCAP, EXACT
            )
            tl.store(out_row + edge_cols, y.to(out_ptr.dtype.element_ty), mask=edge_mask)


# (bytes up to which a rung serves rows, threads). A block is 32 bytes per thread, so short rows get few threads; every
# row is a program of its own, so more than 256 threads would gain nothing. Fewer rows than a GPU has room for, some 400
# on a large one, do not fill it: the native kernels divide rows.
_LADDER = ((2048, 32), (16384, 128), (None, 256))


def _launch_options(V: int, item_bytes: int, warp_size: int) -> dict:
    threads = max(next(t for limit, t in _LADDER if limit is None or V * item_bytes <= limit), warp_size)
    return {
        "BLOCK_V": threads * 16 * columns.LOADS.value // item_bytes,
        "num_warps": threads // warp_size,
        "num_stages": 1,
        "enable_fp_fusion": True,  # the default changes to off in Triton 3.10
    }


class RowLabels(NamedTuple):
    """Where kernels find the label of each row of [outer, inner, V]: columns.place and columns.label_at."""

    labels: Tensor  # [outer * inner] int64 or int32
    sequences: int  # `outer` of `inner` rows, or those between cu_seqlens
    cu_seqlens: Tensor | None = None  # [sequences + 1] int64 or int32
    lengths: Tensor | None = None  # [sequences] int64 or int32: rows whose labels count
    shift: bool = False  # a row's label is the next one of its sequence


class Coefficients(NamedTuple):
    """A row's gradient is that of its sequence, times the loss's."""

    of_sequences: Tensor  # [sequences] float32
    of_tails: Tensor | None = None  # [sequences] float32, added to them from the token tail_begin on
    tail_begin: Tensor | None = None  # [sequences] int64

    def contiguous(self) -> "Coefficients":
        return Coefficients(*(None if t is None else t.contiguous() for t in self))


def launch_forward(rows, labels: RowLabels, transform: Transform, outputs, reference=None, ref_logps=None):
    """outputs: of _fwd_outputs; reference, another tensor like rows, has its log-probs written to ref_logps."""
    logps, lse, values = outputs
    multiplier, tanh_scale = transform.multiplier_and_tanh_scale()
    _native.launch_triton(
        _token_logps_fwd_kernel,
        (logps.numel(), 1 if reference is None else 2),
        rows,
        reference,
        labels.labels,
        labels.cu_seqlens,
        labels.lengths,
        logps,
        ref_logps,
        lse,
        values if len(values) else None,
        rows.shape[1],
        rows.stride(0),
        rows.stride(1),
        0 if reference is None else reference.stride(0),
        0 if reference is None else reference.stride(1),
        rows.shape[2],
        labels.sequences,
        int(labels.shift),
        transform.ignore_index,
        multiplier,
        tanh_scale,
        HAS_SOFTCAP=tanh_scale != 0,
        **_launch_options(rows.shape[2], rows.element_size(), _native.warp_size(rows)),
    )


def launch_backward(
    grad, coefficients: Coefficients | None, rows, labels: RowLabels, logps, lse, transform: Transform, out
):
    """grad: of each log-prob; with coefficients of the loss [1], or of each pair's [sequences / 2]."""
    multiplier, tanh_scale = transform.multiplier_and_tanh_scale()
    item_bytes = rows.element_size()
    strided = [i for i in (0, 1) if rows.shape[i] > 1]
    if out.dtype == rows.dtype:
        distance = [out.data_ptr() - rows.data_ptr()]
        distance += [(out.stride(i) - rows.stride(i)) * item_bytes for i in strided]
    else:  # the 16-bit gradient of a float32 tile: the same phase where both rows are aligned
        distance = [out.data_ptr(), rows.data_ptr()]
        distance += [t.stride(i) * t.element_size() for t in (out, rows) for i in strided]
    _native.launch_triton(
        _token_logps_bwd_kernel,
        (logps.numel(),),
        grad,
        *(coefficients or (None, None, None)),
        rows,
        labels.labels,
        labels.cu_seqlens,
        labels.lengths,
        logps,
        lse,
        out,
        rows.shape[1],
        rows.stride(0),
        rows.stride(1),
        out.stride(0),
        out.stride(1),
        rows.shape[2],
        labels.sequences,
        int(labels.shift),
        transform.ignore_index,
        multiplier,
        tanh_scale,
        HAS_SOFTCAP=tanh_scale != 0,
        SAME_PHASE=all(d % 16 == 0 for d in distance),
        PER_PAIR=coefficients is not None and grad.dim() == 1,
        **_launch_options(rows.shape[2], item_bytes, _native.warp_size(rows)),
    )


def _triton_fwd(rows, labels, transform: Transform, stats):
    outputs = _fwd_outputs(rows, labels, stats)
    if rows.numel():
        launch_forward(rows, RowLabels(labels, rows.shape[0]), transform, outputs)
    return outputs


def _triton_bwd(grad, rows, labels, logps, lse, transform: Transform, out):
    if rows.numel():
        launch_backward(grad, None, rows, RowLabels(labels, rows.shape[0]), logps, lse, transform, out)


def _fwd_outputs(rows, labels, stats) -> tuple[Tensor, Tensor, Tensor]:
    """logps [...], lse [2, ...] and stats [4 or 0, ...] of labels' shape, float32."""
    return tuple(
        torch.empty(*lead, *labels.shape, dtype=torch.float32, device=rows.device)
        for lead in ((), (2,), (4 if stats else 0,))
    )


# ---- native ----


def native_rows(rows: Tensor):
    outer, inner, vocab = rows.shape
    return _native._core.LogitRows(
        rows.data_ptr(), _native.DTYPE_CODES[rows.dtype], outer, inner, rows.stride(0), rows.stride(1), vocab
    )


def native_forward(rows, labels, transform: Transform, stats):
    """Outputs, and the arguments of the call that fills them."""
    logps, lse, values = outputs = _fwd_outputs(rows, labels, stats)
    args = _native._core.TokenLogpsForward(
        native_rows(rows),
        _native._core.LogitTransform(*transform.multiplier_and_tanh_scale()),
        labels.data_ptr(),
        transform.ignore_index,
        logps.data_ptr(),
        lse.data_ptr(),
        values.data_ptr() if stats else 0,
    )
    return outputs, args


def _native_fwd(rows, labels, transform: Transform, stats):
    outputs, args = native_forward(rows, labels, transform, stats)
    if _native.device_kind(rows) == "cuda":
        with _native.guard(rows):
            workspace = rows.new_empty(_native._core.token_logps_workspace_cuda(args), dtype=torch.uint8)
            _native._core.token_logps_fwd_cuda(args, workspace.data_ptr(), _native.stream(rows))
    else:
        _native._core.token_logps_fwd_cpu(args, torch.get_num_threads())
    return outputs


def native_workspace(rows: int, vocab: int, dtype: torch.dtype, stats: bool) -> int:
    """Bytes that the forward of [rows, vocab] takes on a GPU beside its outputs."""
    core = _native._core
    logits = core.LogitRows(0, _native.DTYPE_CODES[dtype], 1, rows, rows * vocab, vocab, vocab)
    outputs = 0, 0, int(stats)  # no address is followed: one of stats says that there are some
    args = core.TokenLogpsForward(logits, core.LogitTransform(1.0, 0.0), 0, 0, *outputs)
    return core.token_logps_workspace_cuda(args)


def native_backward(grad, rows, labels, logps, lse, transform: Transform, out):
    """The arguments of the call that fills `out`. They hold addresses: every tensor must have a name until then."""
    return _native._core.TokenLogpsBackward(
        native_rows(rows),
        _native._core.LogitTransform(*transform.multiplier_and_tanh_scale()),
        labels.data_ptr(),
        transform.ignore_index,
        logps.data_ptr(),
        lse.data_ptr(),
        grad.data_ptr(),
        native_rows(out),
    )


def _native_bwd(grad, rows, labels, logps, lse, transform: Transform, out):
    args = native_backward(grad, rows, labels, logps, lse, transform, out)
    if _native.device_kind(rows) == "cuda":
        with _native.guard(rows):
            _native._core.token_logps_bwd_cuda(args, _native.stream(rows))
    else:
        _native._core.token_logps_bwd_cpu(args, torch.get_num_threads())


# ---- operators: the backend is chosen here, on real tensors ----

token_logps_fwd, token_logps_bwd = operators.token_logps_fwd, operators.token_logps_bwd
token_logps_bwd_ = operators.token_logps_bwd_

_library.OPS["token_logps"] = {
    "native": _library.native_reason,
    "triton": _library.triton_reason,
    "reference": _library.reference_reason,
}


def _choose(logits: Tensor, backend: str) -> str:
    if logits.dtype != torch.float64:
        return _library.choose_backend("token_logps", backend, _native.device_kind(logits))
    if backend not in ("", "reference"):
        raise TypeError(f"backend={backend!r} takes float32, bfloat16 or float16 logits, got {logits.dtype}")
    return "reference"


def as_rows(logits: Tensor) -> Tensor:
    """[..., V] -> [outer, inner, V] with contiguous columns: a view wherever the strides allow one."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() <= 3:
        return logits[(None,) * (3 - logits.dim())]
    return logits.flatten(0, -3)


def _fwd(logits, labels, temperature, softcap, scale, ignore_index, stats, backend):
    chosen = _choose(logits, backend)
    rows = as_rows(logits)
    flat = labels.reshape(rows.shape[:2]).contiguous()
    run = {"reference": _reference_fwd, "native": _native_fwd, "triton": _triton_fwd}[chosen]
    logps, lse, values = run(rows, flat, Transform(temperature, softcap, scale, ignore_index), stats)
    shape = labels.shape
    return logps.view(shape), lse.view(2, *shape), values.view(values.shape[0], *shape)


def _fwd_fake(logits, labels, temperature, softcap, scale, ignore_index, stats, backend):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = labels.shape
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty((2, *shape), dtype=dtype),
        logits.new_empty((4 if stats else 0, *shape), dtype=torch.float32),
    )


def write_gradient(out, grad, logits, labels, logps, lse, transform: Transform, backend):
    """The logits' gradient, [..., V], into `out`, which may be the logits."""
    rows = as_rows(logits)
    shape = rows.shape[:2]
    run = {"reference": _reference_bwd, "native": _native_bwd, "triton": _triton_bwd}[_choose(logits, backend)]
    run(
        grad.reshape(shape).contiguous(),
        rows,
        labels.reshape(shape).contiguous(),
        logps.reshape(shape),
        lse.reshape(2, *shape),
        transform,
        as_rows(out),
    )


def _bwd(grad, logits, labels, logps, lse, temperature, softcap, scale, ignore_index, backend):
    out = _native.empty(logits.shape, logits.dtype, logits.device)
    transform = Transform(temperature, softcap, scale, ignore_index)
    write_gradient(out, grad, logits, labels, logps, lse, transform, backend)
    return out


def _bwd_fake(grad, logits, labels, logps, lse, temperature, softcap, scale, ignore_index, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _bwd_inplace(grad, logits, labels, logps, lse, temperature, softcap, scale, ignore_index, backend):
    transform = Transform(temperature, softcap, scale, ignore_index)
    write_gradient(logits, grad, logits, labels, logps, lse, transform, backend)


# ---- autograd ----


@_autograd.cache_signature
class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(logits, labels, transform, stats, inplace, backend):
        return token_logps_fwd(logits, labels, *transform, stats, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, ctx.transform, _stats, ctx.inplace, ctx.backend = inputs
        logps, lse, values = output
        ctx.mark_non_differentiable(lse, values)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, logps, lse)

    @staticmethod
    def backward(ctx, grad, grad_lse, grad_values):
        if grad is None:
            return _autograd.pad_gradients(ctx)

        def run(op, logits, *saved):
            return op(grad, logits, *saved, *ctx.transform, ctx.backend)

        return _autograd.pad_gradients(ctx, logits_gradient(ctx, grad, token_logps_bwd, token_logps_bwd_, run))


def logits_gradient(ctx, grad, bwd, bwd_, run) -> Tensor:
    """run(op, *saved) by `bwd`; or, with ctx.inplace, by `bwd_` into the logits' own memory, bumping their version."""
    if ctx.inplace == "done":
        raise RuntimeError(
            "inplace_backward=True has overwritten the logits with their gradient; "
            "a second backward through them needs inplace_backward=False"
        )
    logits, *saved = ctx.saved_tensors
    with torch.no_grad():
        if ctx.inplace:
            ctx.inplace = "done"
            gradient = logits.detach()
            run(bwd_, gradient, *saved)
            torch.autograd.graph.increment_version(logits)  # an operator's Python implementation does not
        else:
            gradient = run(bwd, logits, *saved)
    (gradient,) = _autograd.differentiable_once([gradient], grad, logits)
    return gradient


# ---- public ----


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Unshifted labels [..., T] as targets of the logits at the same position: labels[t + 1], the last one ignored."""
    if labels.shape[-1] == 0:
        return labels
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def check_inplace(logits: Tensor) -> None:
    leaf = logits
    if not torch.compiler.is_compiling() and logits._base is not None:
        leaf = logits._base  # a view of a parameter is its memory
    if leaf.is_leaf and leaf.requires_grad:
        raise ValueError(
            "inplace_backward=True overwrites logits, which must not be a leaf that requires grad, nor a view of one"
        )
    reach, one_memory = 1, logits.stride(-1) == 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        one_memory = one_memory and (size <= 1 or stride >= reach)
        reach = max(reach, size * stride)
    if one_memory and logits.dim() > 3:
        try:
            logits.view(-1, *logits.shape[-2:])
        except RuntimeError:
            one_memory = False
    if not one_memory:
        raise ValueError(
            "inplace_backward=True needs logits with contiguous columns, no two places in one memory, and leading "
            f"dimensions that can be viewed as two, got strides {logits.stride()} for shape {list(logits.shape)}"
        )


def check_call(logits, inplace_backward, stats, backend, known_stats=STATS) -> None:
    """What every call takes beside its tensors and the transform."""
    _library.check_backend("token_logps", backend)
    if not isinstance(stats, (tuple, list)) or not set(stats) <= set(known_stats):
        raise ValueError(f"stats must be a tuple of names out of {known_stats}, got {stats!r}")
    if inplace_backward:
        check_inplace(logits)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    inplace_backward: bool = False,
    stats: tuple[str, ...] = (),
    backend: str | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """log softmax(z)[label] per token, with z = softcap * tanh(scale * logits / softcap) / temperature.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64. Rows may be strided: a slice of a larger tensor is
            read where it lies. Columns that are not contiguous cost a copy.
        labels: [...], int64 or int32: the token that the logits at the same position predict.
        temperature, scale, softcap: the logit transform, in the order above; softcap=None leaves the tanh out.
        ignore_index: the label of positions that do not count. Their rows are not read.
        shift: labels are Hugging Face's unshifted ones: the target of logits[..., t, :] is labels[..., t + 1], and the
            last position of each sequence is ignored. Logits are never sliced or copied for it.
        inplace_backward: the backward overwrites the logits with their gradient, instead of allocating a tensor of
            their size. Anyone who reads them later gets PyTorch's version-counter error; a second backward raises.
        stats: any of "entropy", "log_sum_p2", "mean_logit", "top1", "lse", from the same read; see TokenStats.
        backend: None (the fastest), "native", "triton" or "reference".

    Returns:
        float32 (float64 for float64 logits) of labels' shape, never positive, 0 at ignored positions; with stats, also
        a TokenStats. Sums are accumulated in float32 blocks and float64 totals on CPU, in float32 on a GPU; the
        gradient has the logits' dtype. -inf logits are columns of probability 0. Where the row stride is a multiple of
        16 bytes, a row's results have the same bits whatever else is in the batch, from one backend; the reference's
        may differ.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype or device, and on CPU for a label outside
            [0, V) that is not ignore_index (on a GPU, and in Triton, its log-prob is NaN).
        RuntimeError: for a backend that cannot serve, with the reason, and for a second backward.
    """
    _checks.logits("logits", logits)
    _checks.labels(labels, logits)
    transform = checked_transform(temperature, softcap, scale, ignore_index)
    check_call(logits, inplace_backward, stats, backend, ALL_STATS)
    _autograd.refuse_transforms("token_logps", logits)
    labels = labels.long()
    if shift:
        if labels.dim() == 0:
            raise ValueError("shift=True needs labels of shape [..., tokens], got a scalar")
        labels = shifted(labels, ignore_index)
    options = transform, needs_values(stats), inplace_backward, backend or ""
    logps, lse, values = _TokenLogps.apply(logits, labels, *options)
    if not stats:
        return logps
    return logps, token_stats(values, lse, transform, stats)


def needs_values(stats: tuple[str, ...]) -> bool:
    """Whether the kernels have to form more than they do in any case."""
    return any(name in STATS for name in stats)


def token_stats(values: Tensor, lse: Tensor, transform: Transform, stats: tuple[str, ...]) -> TokenStats:
    """values: [4, ...], in the order of STATS, or [0, ...] where none of them is asked for; lse: [2, ...]."""
    found = {name: values[i] for i, name in enumerate(STATS) if name in stats}
    if "lse" in stats:
        multiplier, _ = transform.multiplier_and_tanh_scale()
        found["lse"] = torch.add(lse[1], lse[0], alpha=multiplier).float()
    return TokenStats(**found)
