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
from torch.autograd.function import once_differentiable

from fastpref import _checks, _library, _native

STATS = ("entropy", "log_sum_p2", "mean_logit", "top1")
_REFERENCE_BYTES = 64 << 20  # the reference works through the rows in float64 blocks of this size


class TokenStats(NamedTuple):
    """By-products of the same read, float32 [...] like labels, detached; None where not asked for, 0 at ignored tokens.

    All are of the transformed logits z: the entropy of softmax(z) in nats, log sum_v p_v^2, mean_v z_v, and 1.0 where
    no other column is larger than the label's (a tie is a hit).
    """

    entropy: Tensor | None = None
    log_sum_p2: Tensor | None = None
    mean_logit: Tensor | None = None
    top1: Tensor | None = None


# ---- reference: the specification ----


def _transformed(logits: Tensor, temperature: float, softcap: float | None, scale: float) -> tuple[Tensor, Tensor]:
    """z = softcap * tanh(scale * x / softcap) / temperature, and dz/dx; both float64."""
    x = logits.double()
    if softcap is None:
        return x * (scale / temperature), torch.full((), scale / temperature, dtype=x.dtype, device=x.device)
    capped = torch.tanh(x * (scale / softcap))
    return capped * (softcap / temperature), (1 - capped * capped) * (scale / temperature)


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
    z, _ = _transformed(logits, temperature, softcap, scale)
    ignored = labels == ignore_index
    target = labels.masked_fill(ignored, 0).unsqueeze(-1)
    others = z.scatter(-1, target, -torch.inf).logsumexp(-1)
    logps = torch.nn.functional.logsigmoid(z.gather(-1, target).squeeze(-1) - others)
    return torch.where(ignored, 0.0, logps)


def _reference_blocks(rows: Tensor):
    """Slices of [outer, inner, V] that fit _REFERENCE_BYTES in float64."""
    outer, inner, vocab = rows.shape
    step = max(1, _REFERENCE_BYTES // (8 * vocab))
    for i in range(outer):
        for begin in range(0, inner, step):
            yield i, slice(begin, min(begin + step, inner))


def _reference_labels(labels: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels safe to index with, and where they were neither valid nor ignored (raises there on CPU)."""
    invalid = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if labels.device.type == "cpu" and invalid.any():
        position = int(invalid.flatten().nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {vocab}) or equal ignore_index={ignore_index}, "
            f"got {int(labels.flatten()[position])} at position {position}"
        )
    return labels.masked_fill(invalid, 0), invalid


def _reference_fwd(rows, labels, temperature, softcap, scale, ignore_index, stats):
    labels, invalid = _reference_labels(labels, rows.shape[-1], ignore_index)
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    logps = torch.empty(labels.shape, dtype=dtype, device=rows.device)
    lse = torch.empty(2, *labels.shape, dtype=dtype, device=rows.device)
    values = torch.empty(4 if stats else 0, *labels.shape, dtype=torch.float32, device=rows.device)
    options = {"temperature": temperature, "softcap": softcap, "scale": scale}
    multiplier = (scale if softcap is None else softcap) / temperature
    for block in _reference_blocks(rows):
        y = labels[block]
        skip = y == ignore_index
        logps[block] = token_logps_ref(rows[block], y, ignore_index=ignore_index, **options).to(dtype)
        z, _ = _transformed(rows[block], **options)
        total = z.logsumexp(-1)
        hi = (total / multiplier).to(dtype)
        lo = torch.where(hi.isfinite(), total - multiplier * hi.double(), 0.0)
        lse[(0, *block)] = hi.masked_fill(skip, 0)
        lse[(1, *block)] = lo.to(dtype).masked_fill(skip, 0)
        if stats:
            log_p = z - total.unsqueeze(-1)
            p = log_p.exp()
            target = z.gather(-1, y.masked_fill(skip, 0).unsqueeze(-1)).squeeze(-1)
            entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
            columns = (entropy, (2 * log_p).logsumexp(-1), z.mean(-1), (target >= z.amax(-1)).double())
            for i, value in enumerate(columns):
                values[(i, *block)] = value.float().masked_fill(skip, 0)
    for out in (logps, lse, values):
        out.masked_fill_(invalid, torch.nan)
    return logps, lse, values


def _reference_bwd(grad, rows, labels, logps, lse, temperature, softcap, scale, ignore_index, out):
    labels, _ = _reference_labels(labels, rows.shape[-1], ignore_index)
    multiplier = (scale if softcap is None else softcap) / temperature
    for block in _reference_blocks(rows):
        y = labels[block]
        skip = (y == ignore_index).unsqueeze(-1)
        z, slope = _transformed(rows[block], temperature, softcap, scale)
        total = multiplier * lse[(0, *block)].double() + lse[(1, *block)].double()
        unit = -torch.exp(z - total.unsqueeze(-1))
        unit.scatter_(-1, y.unsqueeze(-1).masked_fill(skip, 0), -torch.expm1(logps[block].double()).unsqueeze(-1))
        gradient = grad[block].double().unsqueeze(-1) * unit * slope
        out[block] = torch.where(skip, 0.0, gradient).to(out.dtype)


# ---- native ----


def _native_args(rows, labels, temperature, softcap, scale):
    core = _native._core
    transform = core.LogitTransform(
        (scale if softcap is None else softcap) / temperature, 0.0 if softcap is None else scale / softcap
    )
    return _native_rows(rows), transform, labels.data_ptr()


def _native_rows(rows: Tensor):
    outer, inner, vocab = rows.shape
    return _native._core.LogitRows(
        rows.data_ptr(), _native.DTYPE_CODES[rows.dtype], outer, inner, rows.stride(0), rows.stride(1), vocab
    )


def _native_fwd_args(rows, labels, temperature, softcap, scale, ignore_index, stats):
    """Outputs, and the call that fills them."""
    logps = torch.empty(labels.shape, dtype=torch.float32, device=rows.device)
    lse = torch.empty(2, *labels.shape, dtype=torch.float32, device=rows.device)
    values = torch.empty(4 if stats else 0, *labels.shape, dtype=torch.float32, device=rows.device)
    args = _native._core.TokenLogpsForward(
        *_native_args(rows, labels, temperature, softcap, scale),
        ignore_index,
        logps.data_ptr(),
        lse.data_ptr(),
        values.data_ptr() if stats else 0,
    )
    return (logps, lse, values), args


def _native_fwd(rows, labels, temperature, softcap, scale, ignore_index, stats):
    outputs, args = _native_fwd_args(rows, labels, temperature, softcap, scale, ignore_index, stats)
    if rows.device.type == "cuda":
        _native._core.token_logps_fwd_cuda(args, rows.device.index, _stream(rows))
    else:
        _native._core.token_logps_fwd_cpu(args, torch.get_num_threads())
    return outputs


def _native_bwd(grad, rows, labels, logps, lse, temperature, softcap, scale, ignore_index, out):
    args = _native._core.TokenLogpsBackward(
        *_native_args(rows, labels, temperature, softcap, scale),
        ignore_index,
        logps.data_ptr(),
        lse.data_ptr(),
        grad.data_ptr(),
        _native_rows(out),
    )
    if rows.device.type == "cuda":
        _native._core.token_logps_bwd_cuda(args, rows.device.index, _stream(rows))
    else:
        _native._core.token_logps_bwd_cpu(args, torch.get_num_threads())


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


# ---- operators: the backend is chosen here, on real tensors ----

_library.OPS["token_logps"] = {
    "native": _library.native_reason,
    "triton": _library.triton_reason,
    "reference": _library.reference_reason,
}


def _choose(logits: Tensor, backend: str) -> str:
    if logits.dtype != torch.float64:
        return _library.choose_backend("token_logps", backend, logits.device.type)
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
    run = {"reference": _reference_fwd, "native": _native_fwd}[chosen]
    logps, lse, values = run(rows, flat, temperature, softcap, scale, ignore_index, stats)
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


def _bwd_into(out, grad, logits, labels, logps, lse, temperature, softcap, scale, ignore_index, backend):
    rows = as_rows(logits)
    shape = rows.shape[:2]
    run = {"reference": _reference_bwd, "native": _native_bwd}[_choose(logits, backend)]
    run(
        grad.reshape(shape).contiguous(),
        rows,
        labels.reshape(shape).contiguous(),
        logps.reshape(shape),
        lse.reshape(2, *shape),
        temperature,
        softcap,
        scale,
        ignore_index,
        as_rows(out),
    )


def _bwd(grad, logits, *args):
    out = _native.empty_output(logits)
    _bwd_into(out, grad, logits, *args)
    return out


def _bwd_fake(grad, logits, *args):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _bwd_inplace(grad, logits, *args):
    _bwd_into(logits, grad, logits, *args)


_OPTIONS = "float temperature, float? softcap, float scale, int ignore_index"
_SAVED = f"Tensor labels, Tensor logps, Tensor lse, {_OPTIONS}, str backend"
token_logps_fwd = _library.define(
    f"token_logps_fwd(Tensor logits, Tensor labels, {_OPTIONS}, bool stats, str backend) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
token_logps_bwd = _library.define(f"token_logps_bwd(Tensor grad, Tensor logits, {_SAVED}) -> Tensor", _bwd, _bwd_fake)
token_logps_bwd_ = _library.define(
    f"token_logps_bwd_(Tensor grad, Tensor(a!) logits, {_SAVED}) -> ()", _bwd_inplace, lambda *args: None
)


# ---- autograd ----


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(logits, labels, temperature, softcap, scale, ignore_index, stats, inplace, backend):
        return token_logps_fwd(logits, labels, temperature, softcap, scale, ignore_index, stats, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, *options, stats, inplace, backend = inputs
        logps, lse, values = output
        ctx.mark_non_differentiable(lse, values)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, logps, lse)
        ctx.args = (*options, backend)
        ctx.inplace = inplace

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_lse, grad_values):
        if grad is None:
            return (None,) * 9
        return gradient(ctx, grad), *(None,) * 8


def gradient(ctx, grad: Tensor) -> Tensor:
    """The logits' gradient; with ctx.inplace it takes the logits' memory, and their version says so."""
    if not ctx.inplace:
        logits, *saved = ctx.saved_tensors
        return token_logps_bwd(grad, logits, *saved, *ctx.args)
    if ctx.inplace == "done":
        raise RuntimeError(
            "inplace_backward=True has overwritten the logits with their gradient; "
            "a second backward through them needs inplace_backward=False"
        )
    ctx.inplace = "done"
    logits, *saved = ctx.saved_tensors
    logits = logits.detach()
    token_logps_bwd_(grad, logits, *saved, *ctx.args)
    return logits


# ---- public ----


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Unshifted labels [..., T] as targets of the logits at the same position: labels[t + 1], the last one ignored."""
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def check_inplace(logits: Tensor) -> None:
    if logits.is_leaf and logits.requires_grad:
        raise ValueError("inplace_backward=True overwrites logits, which must not be a leaf that requires grad")
    if logits.stride(-1) != 1 or any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(
            f"inplace_backward=True needs logits with contiguous columns and no expanded dimension, got strides "
            f"{logits.stride()} for shape {list(logits.shape)}"
        )


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
        stats: any of "entropy", "log_sum_p2", "mean_logit", "top1", from the same read; see TokenStats.
        backend: None (the fastest), "native", "triton" or "reference".

    Returns:
        float32 (float64 for float64 logits) of labels' shape, never positive, 0 at ignored positions; with stats, also
        a TokenStats. Sums are accumulated in float32 blocks and float64 totals on CPU, in float32 on a GPU; the
        gradient has the logits' dtype. -inf logits are columns of probability 0.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype or device, and on CPU for a label outside
            [0, V) that is not ignore_index (on a GPU its log-prob is NaN).
        RuntimeError: for a backend that cannot serve, with the reason, and for a second backward.
    """
    _checks.logits("logits", logits)
    _checks.labels(labels, logits)
    _checks.transform(temperature, softcap, scale)
    _checks.ignore_index(ignore_index)
    _library.check_backend("token_logps", backend)
    if isinstance(stats, str) or not set(stats) <= set(STATS):
        raise ValueError(f"stats must be a tuple of names out of {STATS}, got {stats!r}")
    if inplace_backward:
        check_inplace(logits)
    labels = labels.long()
    if shift:
        if labels.dim() == 0:
            raise ValueError("shift=True needs labels of shape [..., tokens], got a scalar")
        labels = shifted(labels, ignore_index)
    args = (float(temperature), None if softcap is None else float(softcap), float(scale), ignore_index, bool(stats))
    if torch.is_grad_enabled() and logits.requires_grad:
        logps, _, values = _TokenLogps.apply(logits, labels, *args, inplace_backward, backend or "")
    else:
        logps, _, values = token_logps_fwd(logits, labels, *args, backend or "")
    if not stats:
        return logps
    return logps, TokenStats(**{name: values[i] for i, name in enumerate(STATS) if name in stats})
