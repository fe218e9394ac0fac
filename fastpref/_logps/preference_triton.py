"""The forward of a whole preference step by Triton, for NVIDIA without the core's CUDA kernels and for AMD.

Three launches: token_logps' own forward, of the policy's rows and the reference's; the sums of each sequence; and, in
one program, pair losses, their reduction and the coefficients of the backward, which is token_logps' own too. A fourth
sums the tails, for a loss on part of the completion. Sums are in float64 and in a fixed order: a sequence has the same
ones padded or packed, and in any batch. For log-probs that come from hidden states, sums, pair losses and the gradient
of every token are one launch.
"""

import struct

import torch
from torch import Tensor

from fastpref import _native
from fastpref._logps import columns
from fastpref._logps.token_logps import as_rows, launch_forward
from fastpref._logps.transform import Transform

try:
    import triton
    import triton.language as tl
except ImportError:  # _library.triton_reason says why
    triton = None

if triton is not None:

    @triton.jit
    def _double(bits):  # a number of the host's would arrive as float32
        return bits.to(tl.int64).to(tl.float64, bitcast=True)

    @triton.jit
    def _softplus(x):
        e = tl.exp(-tl.abs(x))
        u = 1.0 + e
        # log1p(e): what u has lost of e is lost in u - 1 too
        return tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))

    @triton.jit
    def _sigmoid(x):
        e = tl.exp(-tl.abs(x))
        return tl.where(x > 0.0, 1.0, e) / (1.0 + e)

    @triton.jit
    def _logps_and_ratios(token_logps_ptr, ref_token_logps_ptr, row, mask):
        # of rows: policy, policy - reference
        logp = tl.load(token_logps_ptr + row, mask=mask, other=0.0).to(tl.float64)
        ratio = logp
        if ref_token_logps_ptr is not None:
            ratio = logp - tl.load(ref_token_logps_ptr + row, mask=mask, other=0.0).to(tl.float64)
        return logp, ratio

    @triton.jit
    def _pair_loss(chosen, rejected, gap, beta, a, b, c, m0, m1, offset, DROP_SQUARE: tl.constexpr):
        # pair_loss of csrc/preference.h: the loss, and its slope by the difference of the log-ratios
        L = beta * (chosen.to(tl.float64) - rejected.to(tl.float64))
        rated = gap == gap
        g = tl.where(rated, gap, 0.0).to(tl.float64)
        square = tl.where(rated, c, 0.0) if DROP_SQUARE else c
        # a term with weight 0 is left out: 0 * inf would not be 0
        z = tl.where(offset != 0.0, L - offset * g, L)
        error = L - tl.where(m1 != 0.0, m0 + m1 * g, m0)
        loss = tl.where(a != 0.0, a * _softplus(-z), 0.0) + tl.where(b != 0.0, b * _softplus(z), 0.0)
        loss += tl.where(square != 0.0, 0.5 * square * error * error, 0.0)
        slope = tl.where(b != 0.0, b * _sigmoid(z), 0.0) - tl.where(a != 0.0, a * _sigmoid(-z), 0.0)
        slope += tl.where(square != 0.0, square * error, 0.0)
        return loss, beta * slope

    @triton.jit
    def _store_sums(logps, ratios, counted, ref_logps_ptr, logps_ptr, ratios_ptr, counted_ptr, sequence):
        # of a sequence, from those of its lanes; -> log-ratio
        logp = tl.sum(logps, 0)
        ratio = tl.sum(ratios, 0)
        if ref_logps_ptr is not None:
            ratio = logp - tl.load(ref_logps_ptr + sequence).to(tl.float64)
        ratio = ratio.to(tl.float32)
        tl.store(logps_ptr + sequence, logp.to(tl.float32))
        tl.store(ratios_ptr + sequence, ratio)
        tl.store(counted_ptr + sequence, tl.sum(counted, 0).to(tl.int64))
        return ratio

    @triton.jit(do_not_specialize=["rows", "tokens", "V", "shift", "ignore_index"])
    def _sequence_kernel(
        token_logps_ptr,  # [rows] fp32
        ref_token_logps_ptr,  # [rows] fp32; or None
        ref_logps_ptr,  # [sequences] fp32; or None
        stats_ptr,  # [4, rows] fp32; or None
        labels_ptr,  # [rows] int64 or int32
        cu_seqlens_ptr,  # [sequences + 1] int64 or int32; or None
        lengths_ptr,  # [sequences] int64 or int32; or None
        logps_ptr,  # [sequences] fp32
        ratios_ptr,  # [sequences] fp32: policy - reference
        counted_ptr,  # [sequences] int64
        invalid_ptr,  # [sequences] int32
        stat_sums_ptr,  # [sequences, 4] fp64; or None
        rows,
        tokens,  # of a padded sequence
        V,
        shift,
        ignore_index,
        BLOCK: tl.constexpr,
    ):
        sequence = tl.program_id(0)
        begin, length = columns.sequence_at(cu_seqlens_ptr, sequence, rows, tokens)
        # a lane adds up every BLOCK-th token of the sequence: the same sums, padded or packed, in any batch
        logps = tl.zeros([BLOCK], tl.float64)
        ratios = tl.zeros([BLOCK], tl.float64)
        counted = tl.zeros([BLOCK], tl.int32)
        invalid = tl.zeros([BLOCK], tl.int32)
        entropy = tl.zeros([BLOCK], tl.float64)
        log_sum_p2 = tl.zeros([BLOCK], tl.float64)
        mean_logit = tl.zeros([BLOCK], tl.float64)
        top1 = tl.zeros([BLOCK], tl.float64)
        for first in range(0, length, BLOCK):
            token = first + tl.arange(0, BLOCK)
            row = begin + token
            label = columns.label_at(labels_ptr, lengths_ptr, row, sequence, token, length, shift, ignore_index)
            counts = label != ignore_index
            logp, ratio = _logps_and_ratios(token_logps_ptr, ref_token_logps_ptr, row, counts)
            logps += logp
            ratios += ratio
            counted += counts.to(tl.int32)
            invalid += (counts & ((label < 0) | (label >= V))).to(tl.int32)
            if stats_ptr is not None:
                value = stats_ptr + row
                entropy += tl.load(value, mask=counts, other=0.0).to(tl.float64)
                log_sum_p2 += tl.load(value + rows.to(tl.int64), mask=counts, other=0.0).to(tl.float64)
                mean_logit += tl.load(value + 2 * rows.to(tl.int64), mask=counts, other=0.0).to(tl.float64)
                top1 += tl.load(value + 3 * rows.to(tl.int64), mask=counts, other=0.0).to(tl.float64)
        _store_sums(logps, ratios, counted, ref_logps_ptr, logps_ptr, ratios_ptr, counted_ptr, sequence)
        tl.store(invalid_ptr + sequence, tl.sum(invalid, 0))
        if stats_ptr is not None:
            sums = stat_sums_ptr + 4 * sequence
            tl.store(sums, tl.sum(entropy, 0))
            tl.store(sums + 1, tl.sum(log_sum_p2, 0))
            tl.store(sums + 2, tl.sum(mean_logit, 0))
            tl.store(sums + 3, tl.sum(top1, 0))

    @triton.jit(do_not_specialize=["rows", "tokens", "shift", "ignore_index"])
    def _tail_kernel(
        token_logps_ptr,  # [rows] fp32
        ref_token_logps_ptr,  # [rows] fp32; or None
        labels_ptr,  # [rows] int64 or int32
        cu_seqlens_ptr,  # [sequences + 1] int64 or int32; or None
        lengths_ptr,  # [sequences] int64 or int32; or None
        counted_ptr,  # [sequences] int64
        tail_ptr,  # [sequences] fp32: policy - reference of the tokens beyond as many as the pair's shorter one has
        tail_begin_ptr,  # [sequences] int64: the first of these tokens, behind the last one where there is none
        rows,
        tokens,
        shift,
        ignore_index,
        BLOCK: tl.constexpr,
    ):
        sequence = tl.program_id(0)
        pairs = tl.num_programs(0) // 2
        partner = tl.where(sequence < pairs, sequence + pairs, sequence - pairs)
        counted = tl.load(counted_ptr + sequence)
        shorter = tl.minimum(counted, tl.load(counted_ptr + partner))
        begin, length = columns.sequence_at(cu_seqlens_ptr, sequence, rows, tokens)
        sums = tl.zeros([BLOCK], tl.float64)
        begins = tl.zeros([BLOCK], tl.int32) + length
        before = shorter * 0  # tokens that count before this round's
        for first in range(0, tl.where(counted > shorter, length, 0), BLOCK):
            token = first + tl.arange(0, BLOCK)
            row = begin + token
            label = columns.label_at(labels_ptr, lengths_ptr, row, sequence, token, length, shift, ignore_index)
            counts = (label != ignore_index).to(tl.int32)
            in_tail = (counts > 0) & (before + tl.cumsum(counts, 0) > shorter)
            _, ratio = _logps_and_ratios(token_logps_ptr, ref_token_logps_ptr, row, in_tail)
            sums += ratio
            begins = tl.minimum(begins, tl.where(in_tail, token, length))
            before += tl.sum(counts, 0)
        tl.store(tail_ptr + sequence, tl.sum(sums, 0).to(tl.float32))
        tl.store(tail_begin_ptr + sequence, tl.min(begins, 0).to(tl.int64))

    @triton.jit
    def _side_sums(stat_sums_ptr, counted_ptr, first, pairs, BLOCK: tl.constexpr):
        # of the sequences [first, first + pairs): tokens that count, and the sums of each of STATS
        tokens = tl.zeros([BLOCK], tl.float64)
        entropy = tl.zeros([BLOCK], tl.float64)
        log_sum_p2 = tl.zeros([BLOCK], tl.float64)
        mean_logit = tl.zeros([BLOCK], tl.float64)
        top1 = tl.zeros([BLOCK], tl.float64)
        for start in range(0, pairs, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            mask = pair < pairs
            sums = stat_sums_ptr + 4 * (first + pair)
            tokens += tl.load(counted_ptr + first + pair, mask=mask, other=0).to(tl.float64)
            entropy += tl.load(sums, mask=mask, other=0.0)
            log_sum_p2 += tl.load(sums + 1, mask=mask, other=0.0)
            mean_logit += tl.load(sums + 2, mask=mask, other=0.0)
            top1 += tl.load(sums + 3, mask=mask, other=0.0)
        tokens = tl.sum(tokens, 0)
        return tokens, tl.sum(entropy, 0), tl.sum(log_sum_p2, 0), tl.sum(mean_logit, 0), tl.sum(top1, 0)

    @triton.jit(do_not_specialize=["pairs", "beta", "a", "b", "c", "m0", "m1", "offset", "num_items"])
    def _batch_kernel(
        ratios_ptr,  # [2 pairs] fp32: policy - reference
        counted_ptr,  # [2 pairs] int64
        invalid_ptr,  # [2 pairs] int32
        stat_sums_ptr,  # [2 pairs, 4] fp64; or None
        rating_gap_ptr,  # [pairs] fp32; or None
        pair_weights_ptr,  # [pairs] fp32; or None
        num_items_ptr,  # [1] fp32: replaces the mean's divisor; or None
        loss_ptr,  # [1] fp32, [pairs] unreduced
        losses_ptr,  # [pairs] fp32
        rewards_ptr,  # [2 pairs] fp32
        margins_ptr,  # [pairs] fp32
        metrics_ptr,  # [7] fp32, as csrc/preference.h has them
        counts_ptr,  # [3] int64: ties, unrated, invalid labels
        coefficients_ptr,  # [2 pairs] fp32
        pairs,
        beta: tl.int64,  # these are float64's bits
        a: tl.int64,
        b: tl.int64,
        c: tl.int64,
        m0: tl.int64,
        m1: tl.int64,
        offset: tl.int64,
        num_items: tl.int64,  # 0, or the same as the tensor
        DROP_SQUARE: tl.constexpr,
        REDUCTION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        beta, a, b, c = _double(beta), _double(a), _double(b), _double(c)
        m0, m1, offset, num_items = _double(m0), _double(m1), _double(offset), _double(num_items)
        divisor = num_items
        if REDUCTION != "mean":
            divisor = 0.0 * num_items + 1.0
        elif num_items_ptr is not None:
            divisor = tl.load(num_items_ptr).to(tl.float64)
        elif num_items == 0.0:
            weights = tl.zeros([BLOCK], tl.float64)
            for start in range(0, pairs, BLOCK):
                pair = start + tl.arange(0, BLOCK)
                weights += _weights(pair_weights_ptr, pair, pair < pairs)
            divisor = tl.sum(weights, 0)
            divisor = tl.where(divisor == 0.0, 1.0, divisor)

        total = tl.zeros([BLOCK], tl.float64)
        right = tl.zeros([BLOCK], tl.int32)
        ties = tl.zeros([BLOCK], tl.int32)
        unrated = tl.zeros([BLOCK], tl.int32)
        invalid = tl.zeros([BLOCK], tl.int32)
        for start in range(0, pairs, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            mask = pair < pairs
            chosen = tl.load(ratios_ptr + pair, mask=mask, other=0.0)
            rejected = tl.load(ratios_ptr + pairs + pair, mask=mask, other=0.0)
            chosen_reward = beta.to(tl.float32) * chosen
            rejected_reward = beta.to(tl.float32) * rejected
            margin = chosen_reward - rejected_reward
            gap = tl.full([BLOCK], columns.NAN, tl.float32)
            if rating_gap_ptr is not None:
                gap = tl.load(rating_gap_ptr + pair, mask=mask, other=0.0)
                unrated += (gap != gap).to(tl.int32)
            loss, slope = _pair_loss(chosen, rejected, gap, beta, a, b, c, m0, m1, offset, DROP_SQUARE)
            loss, slope = loss.to(tl.float32), slope.to(tl.float32)
            weight = _weights(pair_weights_ptr, pair, mask)
            weighted = weight * loss.to(tl.float64)
            coefficient = (slope.to(tl.float64) * (weight / divisor)).to(tl.float32)
            tl.store(losses_ptr + pair, loss, mask=mask)
            if REDUCTION == "none":
                tl.store(loss_ptr + pair, weighted.to(tl.float32), mask=mask)
            tl.store(rewards_ptr + pair, chosen_reward, mask=mask)
            tl.store(rewards_ptr + pairs + pair, rejected_reward, mask=mask)
            tl.store(margins_ptr + pair, margin, mask=mask)
            tl.store(coefficients_ptr + pair, coefficient, mask=mask)
            tl.store(coefficients_ptr + pairs + pair, -coefficient, mask=mask)
            total += tl.where(mask, weighted, 0.0)
            right += (margin > 0.0).to(tl.int32)
            ties += (mask & (margin == 0.0)).to(tl.int32)
            invalid += tl.load(invalid_ptr + pair, mask=mask, other=0)
            invalid += tl.load(invalid_ptr + pairs + pair, mask=mask, other=0)

        if REDUCTION != "none":
            tl.store(loss_ptr, (tl.sum(total, 0) / divisor).to(tl.float32))
        tl.store(metrics_ptr, (tl.sum(right, 0).to(tl.float64) / pairs.to(tl.float64)).to(tl.float32))
        tl.store(counts_ptr, tl.sum(ties, 0).to(tl.int64))
        tl.store(counts_ptr + 1, tl.sum(unrated, 0).to(tl.int64))
        tl.store(counts_ptr + 2, tl.sum(invalid, 0).to(tl.int64))
        if stat_sums_ptr is not None:
            chosen, entropy, log_sum_p2, chosen_mean, chosen_top1 = _side_sums(
                stat_sums_ptr, counted_ptr, 0, pairs, BLOCK
            )
            rejected, entropy2, log_sum_p22, rejected_mean, top1 = _side_sums(
                stat_sums_ptr, counted_ptr, pairs, pairs, BLOCK
            )
            tokens = tl.maximum(chosen + rejected, 1.0)
            chosen, rejected = tl.maximum(chosen, 1.0), tl.maximum(rejected, 1.0)
            tl.store(metrics_ptr + 1, ((entropy + entropy2) / tokens).to(tl.float32))
            tl.store(metrics_ptr + 2, ((log_sum_p2 + log_sum_p22) / tokens).to(tl.float32))
            tl.store(metrics_ptr + 3, ((chosen_top1 + top1) / tokens).to(tl.float32))
            tl.store(metrics_ptr + 4, (chosen_mean / chosen).to(tl.float32))
            tl.store(metrics_ptr + 5, (rejected_mean / rejected).to(tl.float32))
            tl.store(metrics_ptr + 6, (chosen_top1 / chosen).to(tl.float32))

    @triton.jit
    def _weights(pair_weights_ptr, pair, mask):
        if pair_weights_ptr is None:
            weight = mask.to(tl.float64)
        else:
            weight = tl.load(pair_weights_ptr + pair, mask=mask, other=0.0).to(tl.float64)
        return weight

    # ---- the epilogue alone, behind log-probs of tokens: a program per pair ----

    @triton.jit
    def _finish_sequence(
        token_logps_ptr,
        ref_token_logps_ptr,
        ref_logps_ptr,
        labels_ptr,
        logps_ptr,
        ratios_ptr,
        counted_ptr,
        sequence,
        begin,
        length,
        ignore_index,
        BLOCK: tl.constexpr,
    ):
        # writes the sums of the rows [begin, begin + length), every BLOCK-th added up by one lane; -> log-ratio
        logps = tl.zeros([BLOCK], tl.float64)
        ratios = tl.zeros([BLOCK], tl.float64)
        counted = tl.zeros([BLOCK], tl.int32)
        for first in range(0, length, BLOCK):
            token = first + tl.arange(0, BLOCK)
            row = begin + token
            inside = token < length
            counts = inside & (tl.load(labels_ptr + row, mask=inside, other=0) != ignore_index)
            logp, ratio = _logps_and_ratios(token_logps_ptr, ref_token_logps_ptr, row, counts)
            logps += logp
            ratios += ratio
            counted += counts.to(tl.int32)
        return _store_sums(logps, ratios, counted, ref_logps_ptr, logps_ptr, ratios_ptr, counted_ptr, sequence)

    @triton.jit
    def _write_token_grad(token_grad_ptr, labels_ptr, begin, length, grad, ignore_index, BLOCK: tl.constexpr):
        for first in range(0, length, BLOCK):
            token = first + tl.arange(0, BLOCK)
            row = begin + token
            inside = token < length
            label = tl.load(labels_ptr + row, mask=inside, other=0)
            tl.store(token_grad_ptr + row, tl.where(label == ignore_index, 0.0, grad), mask=inside)

    @triton.jit(
        do_not_specialize=[
            "rows",
            "first_pair",
            "pairs",
            "ignore_index",
            "beta",
            "a",
            "b",
            "c",
            "m0",
            "m1",
            "offset",
        ]
    )
    def _pair_kernel(
        token_logps_ptr,  # [rows] fp32
        ref_token_logps_ptr,  # [rows] fp32; or None
        ref_logps_ptr,  # [2 pairs] fp32; or None
        labels_ptr,  # [rows] int64
        bounds_ptr,  # [2 programs + 1] int64: where sequences begin among the rows, first the programs' chosen ones
        rating_gap_ptr,  # [pairs] fp32; or None
        scale_of_pair_ptr,  # [pairs] fp32
        losses_ptr,  # [pairs] fp32
        logps_ptr,  # [2 pairs] fp32
        ratios_ptr,  # [2 pairs] fp32: policy - reference
        counted_ptr,  # [2 pairs] int64
        token_grad_ptr,  # [rows] fp32; rows of no sequence are left as they are
        rows,
        first_pair,  # of the programs
        pairs,
        ignore_index,
        beta: tl.int64,  # these are float64's bits
        a: tl.int64,
        b: tl.int64,
        c: tl.int64,
        m0: tl.int64,
        m1: tl.int64,
        offset: tl.int64,
        DROP_SQUARE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        pair = first_pair + program
        begin, length = columns.sequence_at(bounds_ptr, program, rows, 0)
        begin2, length2 = columns.sequence_at(bounds_ptr, tl.num_programs(0) + program, rows, 0)
        chosen = _finish_sequence(
            token_logps_ptr, ref_token_logps_ptr, ref_logps_ptr, labels_ptr, logps_ptr, ratios_ptr, counted_ptr,
            pair, begin, length, ignore_index, BLOCK,
        )  # fmt: skip
        rejected = _finish_sequence(
            token_logps_ptr, ref_token_logps_ptr, ref_logps_ptr, labels_ptr, logps_ptr, ratios_ptr, counted_ptr,
            pairs + pair, begin2, length2, ignore_index, BLOCK,
        )  # fmt: skip
        gap = tl.full((), columns.NAN, tl.float32)
        if rating_gap_ptr is not None:
            gap = tl.load(rating_gap_ptr + pair)
        loss, slope = _pair_loss(
            chosen, rejected, gap, _double(beta), _double(a), _double(b), _double(c), _double(m0), _double(m1),
            _double(offset), DROP_SQUARE,
        )  # fmt: skip
        tl.store(losses_ptr + pair, loss.to(tl.float32))
        grad = (slope * tl.load(scale_of_pair_ptr + pair).to(tl.float64)).to(tl.float32)
        _write_token_grad(token_grad_ptr, labels_ptr, begin, length, grad, ignore_index, BLOCK)
        _write_token_grad(token_grad_ptr, labels_ptr, begin2, length2, -grad, ignore_index, BLOCK)


_SEQUENCE_BLOCK, _SEQUENCE_THREADS = 1024, 256
_BATCH_BLOCK, _BATCH_THREADS = 128, 128
# Without contraction, whose default changes from one Triton to the next: margins are rounded as torch rounds them.
_LAUNCH = {"num_stages": 1, "enable_fp_fusion": False}


def _bits(number: float) -> int:
    """Of a float64."""
    return struct.unpack("q", struct.pack("d", number))[0]


def forward(logits, layout, pairs, reduction, transform: Transform, stats, family, out) -> None:
    """Fills `out`, of preference.py's _Outputs, from its _Layout, _PairInputs and _LogisticFamily."""
    sequences, labels = layout.sequences(), layout.of_rows()
    rows = as_rows(logits)
    tokens = labels.labels.numel()
    pairs = pairs.floats()
    ref_token_logps = pairs.ref_token_logps
    values = rows.new_empty((4 if stats else 0, tokens), dtype=torch.float32)
    if tokens:
        reference = None
        if pairs.ref_logits is not None:
            reference, ref_token_logps = as_rows(pairs.ref_logits), rows.new_empty(tokens, dtype=torch.float32)
        outputs = out.token_logps, out.lse, values
        launch_forward(rows, labels, transform, outputs, reference, None if reference is None else ref_token_logps)
    ratios = rows.new_empty(sequences, dtype=torch.float32)
    invalid = rows.new_empty(sequences, dtype=torch.int32)
    references = ref_token_logps, pairs.ref_logps
    _sum_sequences(layout, references, values if stats else None, rows.shape[-1], transform, ratios, invalid, out)
    *numbers, drop_square = family
    _native.launch_triton(
        _batch_kernel,
        (1,),
        ratios,
        out.lengths,
        invalid,
        out.stat_sums if stats else None,
        pairs.rating_gap,
        pairs.pair_weights,
        pairs.num_items,
        out.loss,
        out.losses,
        out.rewards,
        out.margins,
        out.metrics,
        out.counts,
        out.coefficients,
        sequences // 2,
        *map(_bits, numbers),
        DROP_SQUARE=drop_square,
        REDUCTION=reduction,
        BLOCK=_BATCH_BLOCK,
        num_warps=_BATCH_THREADS // _native.warp_size(logits),
        **_LAUNCH,
    )


def _sum_sequences(layout, references, values, vocab: int, transform: Transform, ratios, invalid, out) -> None:
    """Fills ratios [2B], invalid [2B] and what `out` has of sequences, tails where asked for.

    references: ref_token_logps and ref_logps. values: [4, tokens] of the stats, or None.
    """
    labels, cu_seqlens, lengths, shift = layout
    labelled, sizes = (labels, cu_seqlens, lengths), (labels.numel(), labels.shape[-1])
    alignment = int(shift), transform.ignore_index
    ref_token_logps, _ = references
    grid = (layout.sequences(),)
    num_warps = _SEQUENCE_THREADS // _native.warp_size(out.token_logps)
    options = {"BLOCK": _SEQUENCE_BLOCK, "num_warps": num_warps, **_LAUNCH}
    _native.launch_triton(
        _sequence_kernel,
        grid,
        out.token_logps,
        *references,
        values,
        *labelled,
        out.logps,
        ratios,
        out.lengths,
        invalid,
        None if values is None else out.stat_sums,
        *sizes,
        vocab,
        *alignment,
        **options,
    )
    if len(out.tail):
        _native.launch_triton(
            _tail_kernel,
            grid,
            out.token_logps,
            ref_token_logps,
            *labelled,
            out.lengths,
            out.tail,
            out.tail_begin,
            *sizes,
            *alignment,
            **options,
        )


def pair_epilogue(
    tensors: dict[str, Tensor], pairs: tuple[int, int], ignore_index: int, numbers: list[float], drop_square: bool
) -> None:
    """csrc/preference.h's PairEpilogue of the pairs [begin, end): `tensors` has its arrays by their names."""
    begin, end = pairs
    if begin == end:
        return
    token_logps, scale_of_pair = tensors["token_logps"], tensors["scale_of_pair"]
    _native.launch_triton(
        _pair_kernel,
        (end - begin,),
        token_logps,
        tensors.get("ref_token_logps"),
        tensors.get("ref_logps"),
        tensors["labels"],
        tensors["bounds"],
        tensors.get("rating_gap"),
        scale_of_pair,
        tensors["losses"],
        tensors["logps"],
        tensors["logratios"],
        tensors["lengths"],
        tensors["token_grad"],
        token_logps.shape[0],
        begin,
        scale_of_pair.shape[0],
        ignore_index,
        *map(_bits, numbers),
        DROP_SQUARE=drop_square,
        BLOCK=_SEQUENCE_BLOCK,
        num_warps=_SEQUENCE_THREADS // _native.warp_size(token_logps),
        **_LAUNCH,
    )
