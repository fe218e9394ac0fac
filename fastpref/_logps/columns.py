"""A row of logits in a Triton kernel: its label, 16-byte accesses, the transform, running sums, gradients.

csrc/cuda/columns.cuh is the same in CUDA C++. What a lane folds depends on the row's address modulo 16 bytes, on V and
on the dtype: where the row stride is a multiple of 16 bytes, a row has the same bits whatever else is in the batch.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # _library.triton_reason says why
    triton = None

if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)
    LOG2E_LO = tl.constexpr(1.4426950408889634 - 1.44269502162933349609375)  # what fp32 drops of it
    LN2 = tl.constexpr(0.6931471805599453)
    INF = tl.constexpr(float("inf"))
    NAN = tl.constexpr(float("nan"))
    SIGN = tl.constexpr(-(2**31))  # of a float32's bits
    LOADS = tl.constexpr(2)  # 16-byte loads per thread and step; with 4, 16-bit rows need over 64 registers
    BOUNDARIES = tl.constexpr(256)  # of packed sequences, looked at at a time

    # ---- arithmetic ----

    @triton.jit
    def log1p(x):
        # x in [0, 1]. log(1 + x) loses x in the rounding of 1 + x; 2 atanh(x / (2 + x)) keeps the relative accuracy.
        s = x / (x + 2.0)
        q = s * s
        r = 0.14285714286 + q * (0.11111111111 + q * (0.09090909091 + q * 0.07692307692))
        r = 0.33333333333 + q * (0.2 + q * r)
        return 2.0 * (s + s * q * r)

    @triton.jit
    def expm1(x):
        # x <= 0. exp(x) - 1 cancels near 0, where the target's gradient of a confident token lives.
        r = 0.0083333333333 + x * (0.0013888888889 + x * (0.00019841269841 + x * 0.000024801587302))
        r = 0.16666666667 + x * (0.041666666667 + x * r)
        return tl.where(x > -0.5, x + x * x * (0.5 + x * r), tl.exp2(x * LOG2E) - 1.0)

    @triton.jit
    def tanh(x, tanh_scale):
        # y = x tanh_scale -> tanh y and its slope: with e = exp(-2 |y|) and r = 1 / (1 + e), tanh |y| = 1 - 2 e r and
        # 1 - tanh^2 = 2 e r (1 + tanh |y|), which does not cancel where tanh saturates
        e = tl.exp2(tl.abs(x) * (tanh_scale * (-2.0 * LOG2E)))
        d = 1.0 + e
        # a step of Newton, which mends the rounding of 1 + e too; a division takes eight instructions, on AMD ten
        r = tl.rsqrt(d)
        r *= r
        r = tl.fma(tl.fma(d - 1.0 - e, r, tl.fma(-d, r, 1.0)), r, r)
        t = tl.fma(-2.0 * e, r, 1.0)
        bits = t.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & SIGN)
        return bits.to(tl.float32, bitcast=True), 2.0 * (e * r) * (1.0 + t)

    @triton.jit
    def transform(x, tanh_scale, HAS_SOFTCAP: tl.constexpr):
        v = x.to(tl.float32)
        if HAS_SOFTCAP:
            v, _ = tanh(v, tanh_scale)
        return v

    @triton.jit
    def finite_or_zero(top):  # what to subtract when the maximum is -inf: -inf - -inf would be NaN
        return tl.where(top == -INF, 0.0, top)

    # ---- labels, as the caller has them ----

    @triton.jit
    def sequence_at(cu_seqlens_ptr, sequence, rows, tokens):
        # -> first row, length. Nothing beyond the rows is read or written, whatever cu_seqlens says.
        if cu_seqlens_ptr is None:
            begin = sequence * tokens
            length = tokens
        else:
            begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
            end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
            begin = tl.minimum(tl.maximum(begin, 0), rows)
            length = (tl.minimum(tl.maximum(end, begin), rows) - begin).to(tl.int32)
            begin = begin.to(tl.int32)
        return begin, length

    @triton.jit
    def place(cu_seqlens_ptr, row, rows, tokens, sequences):
        # -> sequence, place in it, its length: 0 where the row is of none
        if cu_seqlens_ptr is None:
            sequence = row // tokens
            token = row % tokens
            length = tokens
        else:
            sequence = row * 0
            for first in range(1, sequences, BOUNDARIES):  # how many end at the row or before it
                i = first + tl.arange(0, BOUNDARIES)
                end = tl.load(cu_seqlens_ptr + i, mask=i < sequences, other=rows).to(tl.int64)
                sequence += tl.sum((end <= row).to(tl.int32), 0)
            begin, length = sequence_at(cu_seqlens_ptr, sequence, rows, tokens)
            token = row - begin
            inside = (token >= 0) & (token < length)
            token = tl.where(inside, token, 0)
            length = tl.where(inside, length, 0)
        return sequence, token, length

    @triton.jit
    def label_at(labels_ptr, lengths_ptr, row, sequence, token, length, shift, ignore_index):
        counts = token + shift < length
        if lengths_ptr is not None:
            counts &= token + shift < tl.load(lengths_ptr + sequence)
        label = tl.load(labels_ptr + row + shift, mask=counts, other=0).to(tl.int64)
        return tl.where(counts, label, ignore_index)

    # ---- columns ----

    @triton.jit
    def row_parts(row_ptr, V, BLOCK_V: tl.constexpr):
        # Rows begin at any address (odd vocabularies, sliced logits). The body [head, head + body) begins on a 16-byte
        # boundary and is a whole number of 16-byte vectors; fewer than VEC columns remain on either side of it.
        # constexpr(): Triton before 3.4 cannot divide the bare attribute
        ITEM_BYTES: tl.constexpr = tl.constexpr(row_ptr.dtype.element_ty.primitive_bitwidth) // 8
        VEC: tl.constexpr = 16 // ITEM_BYTES
        LANES: tl.constexpr = BLOCK_V // (LOADS * VEC)
        head = ((-row_ptr.to(tl.int64)) & 15).to(tl.int32) // ITEM_BYTES
        body = tl.maximum(V - head, 0) // VEC * VEC
        # a tile [LOADS, LANES, VEC]: reducing over the first and the last axis stays inside a thread
        lane = tl.arange(0, LANES)
        cols = tl.arange(0, LOADS)[:, None, None] * (LANES * VEC) + lane[None, :, None] * VEC
        cols += tl.arange(0, VEC)[None, None, :]
        # the columns outside the body, one per lane: lanes [0, VEC) those before it, [VEC, 2 VEC) those after it
        edge_cols = tl.where(lane < VEC, lane, head + body + lane - VEC)
        edge_mask = (lane < 2 * VEC) & (edge_cols < tl.where(lane < VEC, tl.minimum(head, V), V))
        return head, body, cols, edge_cols, edge_mask

    @triton.jit
    def fold(v, top, total, exp_t, squared, k, HAS_STATS: tl.constexpr):
        # v: [LOADS, LANES, VEC]; the running values are [LANES] and relative to top: total = sum 2^(k (v - top)), ...
        new_top = tl.maximum(top, tl.max(tl.max(v, 2), 0))
        ref = finite_or_zero(new_top)
        decay = tl.exp2((top - ref) * k)
        t = v - ref[None, :, None]
        e = tl.exp2(t * k)
        if HAS_STATS:
            # a selected, not multiplied, zero: 0 * -inf
            moved = exp_t + total * (finite_or_zero(top) - ref)
            exp_t = tl.where(decay > 0.0, decay * moved, 0.0) + tl.sum(tl.sum(tl.where(e > 0.0, e * t, 0.0), 2), 0)
            squared = squared * decay * decay + tl.sum(tl.sum(e * e, 2), 0)
        total = total * decay + tl.sum(tl.sum(e, 2), 0)
        return new_top, total, exp_t, squared

    @triton.jit
    def gradients(
        x,
        cols,
        target_col,
        has_target,  # whether one of cols may be target_col: one tile of the row pays for the comparison
        hi,
        k,
        k_lo,  # k + k_lo / ln 2 = multiplier log2(e)
        scale,
        at_target,
        tanh_scale,
        HAS_SOFTCAP: tl.constexpr,
        EXACT: tl.constexpr,  # what an fp32 exponent of -30 is off by, 1e-6, is put back; 16 bits would not show it
    ):
        # scale exp(multiplier (v - hi)), or at_target, times the slope of the softcap
        v = x.to(tl.float32)
        if HAS_SOFTCAP:
            v, slope = tanh(v, tanh_scale)
        t = v - hi
        if EXACT:
            t = tl.maximum(t, -200.0 / k)  # 2^-200 is 0; -inf would turn the residual into NaN
        exponent = t * k
        gradient = tl.exp2(exponent) * scale
        if EXACT:
            gradient = tl.fma(gradient, tl.fma(t, k_lo, tl.fma(t, k, -exponent) * LN2), gradient)
        if has_target:
            gradient = tl.where(cols == target_col, at_target, gradient)
        if HAS_SOFTCAP:
            gradient *= slope
        return gradient
