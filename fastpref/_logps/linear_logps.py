"""Log-probabilities of given tokens straight from hidden states and the LM head; `[tokens, vocab]` is never stored.

The logits of a few rows at a time are formed in one tile, folded by token_logps' kernels, turned into their gradient in
place where one is wanted, multiplied on into the gradients, and overwritten by the next rows. Ignored tokens are left
out before the first product.

Floor, in units of one product hidden x weight over the tokens that count: 1 to score, 2 with a frozen head (the
gradient of the hidden states per unit coefficient is formed while the tile is there, the backward scales its rows), 4
with a trained head. `linear_preference` needs 3 there, for a loss knows its coefficients as soon as a pair is done.

16-bit inputs have float32-exact logits unless `logits_dtype` allows rounding: on CPU from a native tile product with
float32 accumulators, where the processor has one (csrc/cpu/linear_logps.cpp), on CUDA from a product that writes
float32, elsewhere from a float32 product of the upcast weight, a block at a time.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref import _autograd, _checks, _library, _native, operators
from fastpref._logps.plan import check_tile, choose_kind, even_chunks
from fastpref._logps.scaled import scaled
from fastpref._logps.tile import (
    Budget,
    Gradients,
    Head,
    Projection,
    Rows,
    Shard,
    active_rows,
    fwd_outputs,
    no_autocast,
    refuse_invalid,
    smaller_tile_advised,
    take_rows,
)
from fastpref._logps.token_logps import (
    ALL_STATS,
    TokenStats,
    check_call,
    needs_values,
    shifted,
    token_logps_ref,
    token_stats,
)
from fastpref._logps.transform import Transform, checked_transform


def linear_token_logps_ref(hidden, weight, labels, *, bias=None, adapter=None, **options) -> Tensor:
    """What linear_token_logps computes, in plain float64 PyTorch; options as in token_logps_ref."""
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    if adapter is not None:
        logits = logits + hidden.double() @ adapter[0].double().t() @ adapter[1].double().t()
    return token_logps_ref(logits, labels, **options)


# ---- operators ----


class Tokens(NamedTuple):
    """Which rows of hidden count, what they predict, and what is scored beside them. No gradient flows into it."""

    labels: Tensor  # [tokens]
    cu_seqlens: Tensor | None = None  # [sequences + 1]
    kept: Tensor | None = None  # [tokens], of which the leading ones are projected whether they count or not
    kept_bounds: Tensor | None = None  # [sequences + 1] among them, on the host; cu_seqlens has the same
    ref_hidden: Tensor | None = None  # [tokens, H_ref]
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None


class LinearLogps(NamedTuple):
    logps: Tensor  # [tokens]
    lse: Tensor  # [2, tokens]
    values: Tensor  # [4 or 0, tokens]
    unit_grad: Tensor  # of hidden, per unit coefficient; or empty
    ref_logps: Tensor  # [tokens] or empty
    index: Tensor  # [tokens], of which the leading ones count
    bounds: Tensor  # on the host


def _fwd(
    hidden, weight, bias, adapter_a, adapter_b, labels, cu_seqlens, kept, kept_bounds, ref_hidden, ref_weight, ref_bias,
    temperature, softcap, scale, ignore_index, stats, unit, max_active_tokens, max_tile_bytes, logits_dtype, group,
    backend,
):  # fmt: skip
    projection = Projection(hidden, weight, bias, adapter_a, adapter_b)
    transform = Transform(temperature, softcap, scale, ignore_index)
    budget = Budget(max_active_tokens, max_tile_bytes, logits_dtype, group, backend)
    with no_autocast(hidden.device), smaller_tile_advised(max_tile_bytes):
        shard = Shard.of(group, weight)
        refuse_invalid(labels, weight, shard, ignore_index)
        index, bounds, _ = active_rows(labels, ignore_index, cu_seqlens, kept, kept_bounds, max_active_tokens)
        rows = Rows(index, bounds, labels, ignore_index, max_active_tokens, kept is not None)
        head = Head(projection, transform, stats, budget, shard)
        chunks = even_chunks(rows.count, head.tile_rows())
        gradients = Gradients(head, hidden, [unit, False, False, False, False], rows, len(chunks))
        logps, lse, values = fwd_outputs(hidden, labels, stats)
        for begin, end in chunks:
            where, y = rows.where(begin, end), rows.labels[begin:end]
            x = rows.take(hidden, where, y)
            row_logps, row_lse, row_values = head.fold(x, y, keep=unit)
            if unit:
                gradients.add(head.turn(torch.ones_like(row_logps), y, row_logps, row_lse), x, where)
            rows.put(logps, where, row_logps)
            rows.put(lse, where, row_lse, 1)
            rows.put(values, where, row_values, 1)
            del x  # before the next rows are gathered
        ref_logps = _ref_zeros(ref_hidden, labels)
        if ref_hidden is not None:
            ref = head.like(ref_hidden, ref_weight, ref_bias)
            for begin, end in chunks:
                where = rows.where(begin, end)
                y = rows.labels[begin:end]
                rows.put(ref_logps, where, ref.fold(rows.take(ref_hidden, where, y), y, keep=False)[0])
        if rows.padded:
            for out in (logps, ref_logps):
                out.masked_fill_(rows.overflow, torch.nan)
        return LinearLogps(logps, lse, values, gradients.finish()[0], ref_logps, index, bounds)


def _ref_zeros(ref_hidden: Tensor | None, labels: Tensor) -> Tensor:
    if ref_hidden is None:
        return labels.new_zeros(0, dtype=torch.float32)
    return fwd_outputs(ref_hidden, labels, False)[0]


def _fwd_fake(
    hidden, weight, bias, adapter_a, adapter_b, labels, cu_seqlens, kept, kept_bounds, ref_hidden, ref_weight, ref_bias,
    temperature, softcap, scale, ignore_index, stats, unit, max_active_tokens, max_tile_bytes, logits_dtype, group,
    backend,
):  # fmt: skip
    given = cu_seqlens if kept is None else kept_bounds
    bounds = 1 if given is None else given.shape[0]
    return LinearLogps(
        *fwd_outputs(hidden, labels, stats),
        unit_grad=hidden.new_empty(hidden.shape if unit else 0),
        ref_logps=_ref_zeros(ref_hidden, labels),
        # as active_rows leaves it
        index=labels.new_empty(labels.shape[0] + 1)[1:] if kept is None else torch.empty_like(kept),
        bounds=torch.empty(0 if max_active_tokens >= 0 else bounds, dtype=torch.int64, device="cpu"),
    )


def _bwd(
    grad, hidden, weight, bias, adapter_a, adapter_b, labels, logps, lse, index, bounds, temperature, softcap, scale,
    ignore_index, has_kept, needs, max_active_tokens, max_tile_bytes, logits_dtype, group, backend,
):  # fmt: skip
    projection = Projection(hidden, weight, bias, adapter_a, adapter_b)
    transform = Transform(temperature, softcap, scale, ignore_index)
    budget = Budget(max_active_tokens, max_tile_bytes, logits_dtype, group, backend)
    with no_autocast(hidden.device), smaller_tile_advised(max_tile_bytes):
        rows = Rows(index, bounds, labels, ignore_index, max_active_tokens, has_kept)
        head = Head(projection, transform, False, budget, Shard.of(group, weight))
        chunks = even_chunks(rows.count, head.tile_rows())
        gradients = Gradients(head, hidden, needs, rows, len(chunks))
        for begin, end in chunks:
            where, y = rows.where(begin, end), rows.labels[begin:end]
            x = rows.take(hidden, where, y)
            saved = head.form(x, y, take_rows(logps, where), take_rows(lse.t(), where).t())
            gradients.add(head.turn(take_rows(grad, where), y, *saved), x, where)
        return gradients.finish()


def _bwd_fake(
    grad, hidden, weight, bias, adapter_a, adapter_b, labels, logps, lse, index, bounds, temperature, softcap, scale,
    ignore_index, has_kept, needs, max_active_tokens, max_tile_bytes, logits_dtype, group, backend,
):  # fmt: skip
    return empty_gradients(Projection(hidden, weight, bias, adapter_a, adapter_b), needs)


def empty_gradients(projection: Projection, needs: list[bool]) -> tuple[Tensor, ...]:
    """Of what a linear operator returns for each part, the shapes."""
    shapes = (tensor.shape if needed else 0 for tensor, needed in zip(projection, needs, strict=True))
    return tuple(projection.hidden.new_empty(shape) for shape in shapes)


linear_logps_fwd, linear_logps_bwd = operators.linear_logps_fwd, operators.linear_logps_bwd


# ---- autograd ----


@_autograd.cache_signature
class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(hidden, weight, bias, adapter_a, adapter_b, tokens, transform, stats, unit, budget):
        head = weight, bias, adapter_a, adapter_b
        found = linear_logps_fwd(hidden, *head, *tokens, *transform, stats, unit, *budget)
        return *found, _autograd.anchor(hidden)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *projection, tokens, ctx.transform, _stats, ctx.unit, ctx.budget = inputs
        *found, anchor = output
        outputs = LinearLogps(*found)
        _logps, *others = found
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.done, ctx.has_kept = False, tokens.kept is not None
        if ctx.unit:
            ctx.save_for_backward(anchor, outputs.unit_grad, tokens.labels)
        else:
            saved = outputs.logps, outputs.lse, outputs.index, outputs.bounds
            ctx.save_for_backward(*projection, tokens.labels, *saved)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return _autograd.pad_gradients(ctx)
        _autograd.refuse_second_backward(ctx)
        if ctx.unit:
            anchor, unit_grad, labels = ctx.saved_tensors
            grad = grad.masked_fill(labels == ctx.transform.ignore_index, 0)  # whatever an ignored token is handed
            gradients, sources = [scaled(unit_grad, grad.unsqueeze(-1))], (anchor,)
        else:
            needs = list(ctx.needs_input_grad[: len(Projection._fields)])
            saved = ctx.saved_tensors  # read once: a second read raises under checkpointing
            with torch.no_grad():
                gradients = linear_logps_bwd(grad, *saved, *ctx.transform, ctx.has_kept, needs, *ctx.budget)
            gradients = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
            sources = saved[: len(needs)]
        return _autograd.pad_gradients(ctx, *_autograd.differentiable_once(gradients, grad, *sources))


# ---- public ----


def cast_for_autocast(hidden: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """What F.linear would compute with: under autocast its dtype, for all but float64."""
    tensors = (hidden, *others)
    device = _native.device_kind(hidden)
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def whole_weight(weight):
    """A sharded parameter as one tensor; its gradient is averaged over the mesh, as FSDP averages all others."""
    if type(weight).__name__ != "DTensor":
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def check_head(hidden, weight, bias, adapter, name="weight", hidden_name="hidden", bias_name="bias") -> None:
    _checks.logits(hidden_name, hidden)
    _checks.tensor(name, weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name} must have shape [vocab, {hidden.shape[-1]}] to match {hidden_name} {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    expected = {name: (weight, weight.shape)}
    if bias is not None:
        _checks.tensor(bias_name, bias)
        expected[bias_name] = (bias, weight.shape[:1])
    if adapter is not None:
        if not isinstance(adapter, (tuple, list)) or len(adapter) != 2:
            raise TypeError(f"adapter must be a pair (A, B) of tensors, got {type(adapter).__name__}")
        a, b = adapter
        _checks.tensor("adapter A", a)
        _checks.tensor("adapter B", b)
        rank = a.shape[0] if a.dim() == 2 else 1
        expected["adapter A"] = (a, (rank, weight.shape[1]))
        expected["adapter B"] = (b, (weight.shape[0], rank))
    for what, (value, shape) in expected.items():
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{what} must have shape {list(shape)}, got {list(value.shape)}")
        if value.dtype != hidden.dtype:
            raise TypeError(
                f"{what} must have the dtype {hidden.dtype} of {hidden_name}, got {value.dtype} (autocast casts both)"
            )
        _checks.same_device(what, value, hidden_name, hidden)


def checked_budget(weight, max_active_tokens, max_tile_bytes, logits_dtype, group, backend, dtype) -> Budget:
    """From the arguments that both linear calls take."""
    check_tile(max_tile_bytes, logits_dtype, dtype)
    _library.check_backend("linear_token_logps", backend)
    if max_active_tokens is not None:
        _checks.positive_int("max_active_tokens", max_active_tokens)
    if group is None and weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row, got shape {list(weight.shape)}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group, got {type(group).__name__}")
    capacity = -1 if max_active_tokens is None else max_active_tokens
    return Budget(capacity, max_tile_bytes or 0, logits_dtype, "" if group is None else group.group_name, backend or "")


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = False,
    max_active_tokens: int | None = None,
    max_tile_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    stats: tuple[str, ...] = (),
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """token_logps of the logits hidden @ weight.T (+ bias), which are never stored.

    Differentiable by hidden, weight, bias and adapter, once. What asks for a gradient decides the work: nothing, one
    product; hidden alone, two (a frozen head), in float16 three: its gradients wait for the loss scale; the head too,
    four.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H], the LM head; the same dtype, as have bias and adapter (autocast casts all as for F.linear). Any
            strides. A DTensor is gathered, and its gradient averaged over its mesh, as FSDP does.
        labels: [...], int64 or int32: the token that the hidden state at the same position predicts.
        bias: [V]. adapter: (A [r, H], B [V, r]), which add (hidden @ A.T) @ B.T, as a LoRA adapter of the head does.
        temperature, softcap, scale, ignore_index, shift, stats: as in token_logps. Positions that do not count are left
            out before the first product.
        max_active_tokens: capacity for the tokens that count. Without it their number is read from the device, one
            integer per call; with it nothing is, and the call can be captured in a CUDA graph. If more tokens count,
            every log-prob is NaN.
        max_tile_bytes: memory for the logits at hand (at least one row is taken); default 80 MiB on CPU, on CUDA 2048
            rows, at most a sixteenth of the GPU's memory, which does not change from step to step.
        logits_dtype: None for float32-exact logits from 16-bit inputs; the inputs' own dtype to round them, as a plain
            `hidden @ weight.T` does, at 0.01 nats of error per token.
        group: process group over which the vocabulary is sharded: weight (bias, B) holds this rank's rows, in rank
            order, uneven or none; hidden and labels are the same on all ranks, labels count over all shards.
        backend: None (the fastest), "native", "triton" or "reference", of the kernels between the products.

    Returns:
        As token_logps: float32 (float64 for float64) of labels' shape; with stats, also a TokenStats. Gradients come in
        the inputs' dtypes, the head's summed in float32. The same call gives the same bits; a row alone need not have
        those that it has in a batch, whose products are BLAS's.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype or device; on CPU for an invalid label (on
            a GPU its log-prob is NaN).
        RuntimeError: for a backend that cannot serve, and for a second backward.
    """
    weight, bias = whole_weight(weight), whole_weight(bias)
    _checks.logits("hidden", hidden)
    _checks.labels(labels, hidden, "hidden")
    a, b = (None, None) if adapter is None or len(adapter) != 2 else adapter
    hidden, weight, bias, a, b = cast_for_autocast(hidden, weight, bias, a, b)
    check_head(hidden, weight, bias, adapter if a is None else (a, b))
    transform = checked_transform(temperature, softcap, scale, ignore_index)
    check_call(hidden, False, stats, backend, ALL_STATS)
    budget = checked_budget(weight, max_active_tokens, max_tile_bytes, logits_dtype, group, backend, hidden.dtype)
    _autograd.refuse_transforms("linear_token_logps", hidden, weight, bias, a, b)
    targets = labels.long()
    if shift:
        if labels.dim() == 0:
            raise ValueError("shift=True needs labels of shape [..., tokens], got a scalar")
        targets = shifted(targets, ignore_index)
    projection = Projection(hidden.reshape(-1, hidden.shape[-1]), weight, bias, a, b)
    found = gather_logps(projection, Tokens(targets.reshape(-1)), transform, needs_values(stats), budget)
    logps = found.logps.view(labels.shape)
    if not stats:
        return logps
    lse, values = (t.view(t.shape[0], *labels.shape) for t in (found.lse, found.values))
    return logps, token_stats(values, lse, transform, stats)


def gather_logps(
    projection: Projection, tokens: Tokens, transform: Transform, stats: bool, budget: Budget
) -> LinearLogps:
    """Differentiable in `logps`."""
    kind = "score"
    if torch.is_grad_enabled():
        hidden, *head = projection
        head_grad = any(t is not None and t.requires_grad for t in head)
        kind = choose_kind(hidden.requires_grad, head_grad, False, hidden.dtype)
    unit = kind == "unit"
    if kind == "score":
        found = linear_logps_fwd(*projection, *tokens, *transform, stats, unit, *budget)
    else:
        *found, _anchor = _LinearLogps.apply(*projection, tokens, transform, stats, unit, budget)
    return LinearLogps(*found)
