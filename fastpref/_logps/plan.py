"""Which passes a linear op will make, and the bytes it will take: host arithmetic, used by the ops themselves.

    score          no gradient is wanted: the forward product alone                                  1 GEMM pass
    unit           a frozen head: the hidden gradient per unit coefficient is formed in the forward  2
    pair_resident  a trained head, a loss whose pairs stand alone: whole pairs share a tile, their
                   coefficients exist while it does, so nothing is computed twice                    3
    recompute      a trained head and any other loss: the backward forms the logits again            4

The tile is the only place where logits exist: `tile_rows` rows of the whole vocabulary, within `max_tile_bytes`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastpref import _checks, _library, _native, losses
from fastpref._logps.token_logps import native_workspace

CPU_TILE_BYTES = 80 << 20
CUDA_TILE_ROWS = 2048  # below, reading and writing the weight gradient per group costs more than its product
CUDA_TILE_SHARE = 16  # at most this part of the memory
CPU_BLOCK_BYTES = 4 << 20  # a block of a 16-bit weight, or of its gradient, in float32: what a cache holds
CUDA_BLOCK_BYTES = 128 << 20  # and there what a product needs to fill the machine


# of the kernels between the products
_library.OPS["linear_token_logps"] = {
    "native": _library.native_reason,
    "triton": _library.triton_reason,
    "reference": _library.reference_reason,
}


class Plan(NamedTuple):
    __module__ = "fastpref"

    kind: str  # "score", "unit", "pair_resident" or "recompute"
    gemm_passes: float  # forward and backward, in units of hidden x weight over the tokens that count
    tile_rows: int  # rows of the largest tile
    groups: int  # how many tiles are formed one after the other in a pass
    product: str  # what forms the logits
    predicted_bytes: int  # largest extra memory of forward and backward, gradients included


def product_of(dtype: torch.dtype, device: str, logits_dtype, backend: str, sharded: bool) -> str:
    """What forms the logits: "mm" in the inputs' dtype, "native", "out_dtype" or "upcast" (float32 from 16 bits)."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "mm"
    rounded = logits_dtype == dtype
    wanted = device == "cpu" and dtype == torch.bfloat16 and backend in ("", "native") and not sharded
    if wanted and _native.cpu_missing() is None and _native._core.linear_logps_product():
        return "native"
    if rounded:
        return "mm"
    if device == "cuda" and backend != "reference" and "dtype_out" in torch.ops.aten.mm.overloads():
        return "out_dtype"
    return "upcast"


def adds_wider() -> bool:
    """Whether a product of 16 bits can be added to a float32 sum in its place: torch 2.8 and 2.9 refuse it
    (pytorch#167931)."""
    return torch.__version__ >= (2, 10)


def block_bytes(device: str) -> int:
    return CPU_BLOCK_BYTES if device == "cpu" else CUDA_BLOCK_BYTES


def rows_of_block(hidden_size: int, device: str, wide: bool) -> int:
    """Rows of a weight gradient that are formed apart before they are added to the float32 sum."""
    return max(1, block_bytes(device) // (apart_bytes(wide) * max(hidden_size, 1)))


def apart_bytes(wide: bool) -> int:
    """Of an entry that is formed apart: float32, or 16 bits that the addition holds once more in float32."""
    return 4 if wide else 2 + 4


def logit_bytes(product: str, dtype: torch.dtype, device: str, backend: str) -> int:
    """Bytes of a logit in the tile, its gradient included."""
    if product in ("mm", "native"):
        return dtype.itemsize
    return 4 if narrows_in_place(device, backend) else 4 + dtype.itemsize


def narrows_in_place(device: str, backend: str) -> bool:
    """Whether the kernels can leave the 16-bit gradient of a float32 tile in that tile: row by row, in order."""
    return device == "cpu" and backend in ("", "native", "reference")


def rows_of_tile(vocab: int, bytes_per_logit: int, device: torch.device, max_tile_bytes: int | None) -> int:
    """At least one row, whatever the budget. The default of a GPU depends on its size and not on what is free of it:
    torch's cache does not count as free, and the groups of a step must not change with it."""
    row = max(vocab, 1) * bytes_per_logit
    if max_tile_bytes is None:
        max_tile_bytes = CPU_TILE_BYTES
        if _native.device_kind(device) == "cuda":
            max_tile_bytes = min(CUDA_TILE_ROWS * row, _native.total_memory(device) // CUDA_TILE_SHARE)
    return max(1, max_tile_bytes // row)


def even_chunks(rows: int, tile_rows: int) -> list[tuple[int, int]]:
    """[0, rows) in as few pieces as fit, all of about one size."""
    pieces = -(-rows // tile_rows)
    ends = [rows * (i + 1) // pieces for i in range(pieces)]
    return list(zip([0, *ends], ends, strict=False))


def pair_groups(bounds: Sequence[int], tile_rows: int) -> list[tuple[int, int]]:
    """Consecutive pairs whose rows fit the tile together; one that does not fit is a group of its own.

    bounds: [2B + 1] cumulated rows of the B chosen sequences and then the B rejected ones.
    """
    pairs = len(bounds) // 2
    groups, begin, rows = [], 0, 0
    for i in range(pairs):
        own = rows_of_pairs(bounds, i, i + 1)
        if rows and rows + own > tile_rows:
            groups.append((begin, i))
            begin, rows = i, 0
        rows += own
    return [*groups, (begin, pairs)] if pairs else []


def rows_of_pairs(bounds: Sequence[int], begin: int, end: int) -> int:
    pairs = len(bounds) // 2
    return bounds[end] - bounds[begin] + bounds[pairs + end] - bounds[pairs + begin]


def choose_kind(hidden_grad: bool, head_grad: bool, resident: bool, dtype: torch.dtype) -> str:
    """resident: the loss is separable and reduced to a scalar, so that a pair's coefficient exists with its tile."""
    if not (hidden_grad or head_grad):
        return "score"
    if dtype == torch.float16:  # its gradients need the loss scale, which only arrives with the backward
        return "recompute"
    if head_grad:
        return "pair_resident" if resident else "recompute"
    return "unit"


def is_resident(loss, loss_options, reduction: str) -> bool:
    return reduction != "none" and losses.traits(loss, loss_options).separable


def plan(
    lengths: int | Sequence[int],
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    loss=None,
    loss_options=None,
    reduction: str = "mean",
    hidden_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = False,
    adapter_rank: int = 0,
    adapter_grad: bool = False,
    total_tokens: int | None = None,
    max_tile_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    stats: bool = False,
    backend: str | None = None,
) -> Plan:
    """What linear_token_logps or linear_preference_loss will do for these shapes, and the memory it will take.

    Args:
        lengths: tokens that count: one number for linear_token_logps, or one per sequence, the B chosen ones first and
            then the B rejected ones, for linear_preference_loss with this `loss`, `loss_options` and `reduction`.
        hidden_size, vocab_size, dtype, device: of hidden [tokens, hidden_size] and weight [vocab_size, hidden_size].
        hidden_grad, weight_grad, bias_grad, adapter_rank, adapter_grad: what asks for a gradient.
        total_tokens: rows of hidden, those that do not count included; default the sum of lengths.
        max_tile_bytes, logits_dtype, stats, backend: as given to the op.

    Returns:
        Plan; predicted_bytes counts what is allocated beyond the inputs: tile, gradients, vectors, copies of rows.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range.
    """
    single = isinstance(lengths, int)
    listed = [lengths] if single else lengths
    if not isinstance(listed, (list, tuple)) or any(type(length) is not int for length in listed):
        raise TypeError(f"lengths must be an int or a list of ints, got {lengths!r}")
    lengths = listed
    if min(lengths, default=0) < 0:
        raise ValueError(f"lengths must not be negative, got {min(lengths)}")
    losses.check_reduction(reduction)
    if type(adapter_rank) is not int or adapter_rank < 0 or (adapter_grad and adapter_rank == 0):
        expected = "positive, for adapter_grad=True needs an adapter" if adapter_grad else "an int, 0 or more"
        raise ValueError(f"adapter_rank must be {expected}, got {adapter_rank!r}")
    for name, value in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        _checks.positive_int(name, value)
    if dtype not in _checks.LOGITS_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    check_tile(max_tile_bytes, logits_dtype, dtype)
    _library.check_backend("linear_token_logps", backend)
    if single == (loss is not None):
        what = "one number per sequence" if single else "one number: without loss= there are no sequences"
        raise ValueError(f"lengths must be {what}, got {lengths[0] if single else lengths}")
    if not single and len(lengths) % 2:
        raise ValueError(f"lengths must hold B chosen and then B rejected sequences, got {len(lengths)}")
    try:
        place, backend = torch.device(device), backend or ""
    except RuntimeError as error:
        raise ValueError(f"device must be one of torch's, such as 'cpu' or 'cuda:0', got {device!r}") from error
    device = _native.device_kind(place)
    tokens = sum(lengths)
    total_tokens = tokens if total_tokens is None else total_tokens
    if total_tokens < tokens:
        raise ValueError(f"total_tokens must be at least the {tokens} tokens that count, got {total_tokens}")

    head_grad = weight_grad or bias_grad or adapter_grad
    resident = loss is not None and is_resident(loss, loss_options, reduction)
    kind = choose_kind(hidden_grad, head_grad, resident, dtype)
    product = product_of(dtype, device, logits_dtype, backend, False)
    per_logit = logit_bytes(product, dtype, device, backend)
    tile_rows = rows_of_tile(vocab_size, per_logit, place, max_tile_bytes)
    pieces = _cut(kind, lengths, tile_rows)
    largest, recomputed = max(pieces.sizes, default=0), pieces.recomputed
    gemms = 1 + recomputed / max(tokens, 1)
    if kind != "score":
        gemms += hidden_grad + weight_grad

    item = dtype.itemsize
    accumulator = item if item >= 4 or len(pieces.sizes) == 1 else 4
    if kind == "score" and product in ("out_dtype", "upcast"):
        per_logit = 4  # no gradient is left beside the logits
    tile = _tile_bytes(
        kind, product, per_logit, largest, hidden_size, vocab_size, adapter_rank, hidden_grad,
        weight_grad and accumulator != item, stats, device,
    )  # fmt: skip
    in_place = tokens == total_tokens and (kind != "pair_resident" or pieces.groups <= 1)
    copies = 0 if in_place else (pieces.copied + (largest if hidden_grad else 0)) * hidden_size * item
    size = torch.float64.itemsize if dtype == torch.float64 else 4
    vectors = total_tokens * (3 * size + 8 + (16 if stats else 0)) + tokens * 8
    trained = kind not in ("score", "unit")
    gradients = total_tokens * hidden_size * item if hidden_grad else 0
    weight_bytes = vocab_size * hidden_size if trained and weight_grad else 0
    gradients += weight_bytes * accumulator
    if trained and adapter_grad:
        gradients += (vocab_size + hidden_size) * adapter_rank * 4
    if trained and bias_grad:
        gradients += vocab_size * 4
    cast = weight_bytes * item if accumulator != item else 0
    fold = _fold_bytes(product, dtype, largest, vocab_size, stats, device, backend) + copies
    if kind != "recompute":  # whose forward has no gradients yet
        fold += gradients
    predicted = vectors + max(gradients + max(tile + copies, cast), fold)
    return Plan(kind, gemms, largest, len(pieces.sizes), _describe(product, dtype, logits_dtype), predicted)


class _Pieces(NamedTuple):
    sizes: list[int]  # rows of each tile
    groups: int  # of whole pairs, or tiles
    copied: int  # rows of hidden that are gathered at a time
    recomputed: int  # rows whose logits are formed twice


def _cut(kind: str, lengths: Sequence[int], tile_rows: int) -> _Pieces:
    if kind != "pair_resident":
        tokens = sum(lengths)
        sizes = [end - begin for begin, end in even_chunks(tokens, tile_rows)]
        return _Pieces(sizes, len(sizes), max(sizes, default=0), tokens if kind == "recompute" else 0)
    bounds = [0, *itertools.accumulate(lengths)]
    groups = [rows_of_pairs(bounds, *group) for group in pair_groups(bounds, tile_rows)]
    sizes = [end - begin for rows in groups for begin, end in even_chunks(rows, tile_rows)]
    return _Pieces(sizes, len(groups), max(groups, default=0), sum(rows for rows in groups if rows > tile_rows))


def _tile_bytes(
    kind, product, per_logit, rows, hidden_size, vocab_size, adapter_rank, hidden_grad, adds_weight, stats, device
) -> int:
    """The largest tile with the workspaces of its products. adds_weight: to a weight gradient wider than the inputs."""
    if product != "native":
        blocks = [0]
        if product == "upcast":
            blocks.append(rows * hidden_size * 4 + min(block_bytes(device), vocab_size * hidden_size * 4))
        wide = product == "out_dtype"
        if adds_weight and not (wide and adds_wider()):
            apart = min(vocab_size, rows_of_block(hidden_size, device, wide))
            blocks.append(apart * hidden_size * apart_bytes(wide))
        return rows * vocab_size * per_logit + max(blocks)
    core, threads = _native._core, torch.get_num_threads()
    workspaces = [core.linear_logps_workspace(rows, hidden_size, vocab_size, 3 * adapter_rank, stats, threads)]
    if hidden_grad:
        workspaces.append(core.linear_logps_hidden_grad_workspace(rows, hidden_size, vocab_size, threads))
    if adds_weight:
        workspaces.append(core.linear_logps_weight_grad_workspace(rows, hidden_size, threads))
    tile = 0 if kind == "score" else _native.padded_rows(rows) * vocab_size * per_logit
    return tile + max(workspaces)


def _fold_bytes(product, dtype, rows, vocab_size, stats, device, backend) -> int:
    """The logits of the largest tile with the workspace of the kernel that folds them, on a GPU."""
    native = device == "cuda" and backend in ("", "native") and _library.native_reason(device) is None
    if not native or dtype not in _native.DTYPE_CODES:
        return 0
    dtype = torch.float32 if product in ("out_dtype", "upcast") else dtype
    return rows * vocab_size * dtype.itemsize + native_workspace(rows, vocab_size, dtype, stats)


def _describe(product: str, dtype: torch.dtype, logits_dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if product == "native":
        rounded = ", rounded" if logits_dtype == dtype else ""
        return f"{name} tile ({_native._core.linear_logps_product()}{rounded})"
    return {"mm": name, "out_dtype": f"{name} to float32", "upcast": f"float32 of upcast {name}"}[product]


def check_tile(max_tile_bytes, logits_dtype, dtype: torch.dtype) -> None:
    if max_tile_bytes is not None:
        _checks.positive_int("max_tile_bytes", max_tile_bytes)
    if logits_dtype is None or (logits_dtype == dtype and dtype in (torch.bfloat16, torch.float16)):
        return
    allowed = f"None or {dtype}" if dtype in (torch.bfloat16, torch.float16) else "None"
    raise ValueError(f"logits_dtype must be {allowed} for {dtype} hidden states, got {logits_dtype!r}")
