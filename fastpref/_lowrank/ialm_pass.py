"""The reads of a matrix D in its convex program (`ialm`), by a state of D's size beside it, and nothing else of it.

An inexact augmented Lagrangian step of min |L|_* + lam |S|_1, L + S = D, forms W = D - L + Y / mu, its soft threshold S
and the dual matrix Y = mu (W - S), and multiplies A = D - S + Y / mu by thin factors for the next L. In plain PyTorch
these are a dozen tensors of D's size. Here T = mu W is the state, from which Y = T clipped at lam and S = (T - Y) / mu
follow; A is formed tile by tile. Where D is missing (NaN; int8: -128), T holds L, which is A there. A step reads twice:

    ialm_update     T of the next step from D, T and the factors of L; A right of the new T; sums over the change
    ialm_product    A^T left

Floor per entry of a float32 matrix: 12 + 8 bytes, and 2 q + 2 k + 2 k flops for L of rank q and k directions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _library, _native
from fastpref._lowrank.storage import DTYPE_CODES, entries, factor_dtype, row_blocks


class State(NamedTuple):
    """T beside the matrix it belongs to."""

    matrix: Tensor  # [m, n], its rows contiguous
    unit: float  # of what is stored in it
    t: Tensor  # [at least m, at least n] of the factors' dtype
    lam: float
    complete: bool = False  # nothing is missing


class Update(NamedTuple):
    products: Tensor  # [m, k]: A right
    residual: Tensor  # [] float64: |D - L - S| over the observed entries
    change: Tensor  # [] float64: mu |S - S before|, where D is missing mu |L - L before|
    dual: Tensor  # [] float64: |Y|


class DualSums(NamedTuple):
    sparse: float  # |S|_1
    nonzero: int  # entries of S that are not 0
    inner: float  # <Y, D>
    largest: float  # |Y|_max


class _Value(NamedTuple):
    """What is multiplied: data D + sparse (T - Y) + dual Y, where D is missing `missing` T."""

    data: float
    sparse: float
    dual: float
    missing: float


_DUAL = _Value(0.0, 0.0, 1.0, 0.0)


def _target(mu: float, mu_next: float) -> _Value:
    """A of the step with mu_next, T being of the one with mu."""
    return _Value(1.0, -1 / mu, 1 / mu_next, 1.0)


# ---- reference ----


def _blocks(state: State):
    """Rows of D, where it is observed, and of T."""
    n = state.matrix.shape[1]
    for block in row_blocks(state.matrix):
        data = entries(state.matrix[block], state.t.dtype) * state.unit
        yield block, data, ~data.isnan(), state.t[block, :n]


def _valued(data, there, t, lam: float, value: _Value) -> Tensor:
    dual = t.clamp(-lam, lam)
    return torch.where(there, value.data * data + value.sparse * (t - dual) + value.dual * dual, value.missing * t)


def _update_ref(state: State, left, right, mu, mu_before, mu_next) -> tuple[Tensor, Tensor]:
    products = left.new_empty(len(left), right.shape[1])
    sums = torch.zeros(4, dtype=torch.float64)
    value, lam = _target(mu, mu_next), state.lam
    for block, data, there, t in _blocks(state):
        low = left[block] @ right[:, : left.shape[1]].t()
        dual_before = t.clamp(-lam, lam)
        formed = torch.where(there, (data - low + dual_before / mu) * mu, low)
        dual = formed.clamp(-lam, lam)
        move = torch.where(there, (formed - dual) / mu - (t - dual_before) / mu_before, low - t)
        for i, part in enumerate((torch.where(there, dual - dual_before, 0), move, torch.where(there, dual, 0))):
            sums[i] += part.double().square().sum()
        t.copy_(formed)
        products[block] = _valued(data, there, formed, lam, value) @ right
    return products, sums


def _rows_ref(state: State, right, value: _Value, sums: Tensor | None) -> Tensor:
    products = right.new_empty(len(state.matrix), right.shape[1])
    for block, data, there, t in _blocks(state):
        products[block] = _valued(data, there, t, state.lam, value) @ right
        if sums is not None and there.any():
            dual = t.clamp(-state.lam, state.lam)[there]
            sparse = t[there] - dual
            sums[0] += sparse.double().abs().sum()
            sums[1] += (sparse != 0).sum()
            sums[2] += (dual.double() * data[there]).sum()
            sums[3] = torch.maximum(sums[3], dual.double().abs().amax())
    return products


def _columns_ref(state: State, left, value: _Value) -> Tensor:
    products = left.new_zeros(state.matrix.shape[1], left.shape[1])
    for block, data, there, t in _blocks(state):
        products += _valued(data, there, t, state.lam, value).t() @ left[block]
    return products


# ---- native ----


def _native_args(state: State, reads_data: bool = True):
    matrix, t = state.matrix, state.t
    m, n = matrix.shape
    return _native._core.IalmPass(
        matrix.data_ptr() if reads_data else 0,
        DTYPE_CODES[matrix.dtype],
        m,
        n,
        matrix.stride(0),
        reads_data and not state.complete,
        state.unit,
        t.data_ptr(),
        t.stride(0),
        state.lam,
    )


def _run_kernel(kernel, args, products, sums: Tensor | None, by_columns: bool) -> None:
    workspace = _native.empty(_native._core.ialm_workspace(args, by_columns), torch.uint8, products.device)
    kernel(args, products.data_ptr(), _native.address(sums), workspace.data_ptr(), torch.get_num_threads())


def _native_update(state: State, left, right, mu, mu_before, mu_next) -> tuple[Tensor, Tensor]:
    left, right, args = left.contiguous(), right.contiguous(), _native_args(state)
    args.set_factors(left.data_ptr(), right.data_ptr(), left.shape[1], right.shape[1])
    args.set_penalty(mu, mu_before)
    args.set_value(*_target(mu, mu_next))
    products, sums = left.new_empty(len(left), right.shape[1]), torch.empty(4, dtype=torch.float64)
    _run_kernel(_native._core.ialm_update_cpu, args, products, sums, False)
    return products, sums


def _native_rows(state: State, right, value: _Value, sums: Tensor | None) -> Tensor:
    right, args = right.contiguous(), _native_args(state, value is not _DUAL or not state.complete or sums is not None)
    args.set_factors(0, right.data_ptr(), 0, right.shape[1])
    args.set_value(*value)
    products = right.new_empty(len(state.matrix), right.shape[1])
    _run_kernel(_native._core.ialm_rows_cpu, args, products, sums, False)
    return products


def _native_columns(state: State, left, value: _Value) -> Tensor:
    left, args = left.contiguous(), _native_args(state, value is not _DUAL or not state.complete)
    args.set_factors(left.data_ptr(), 0, left.shape[1], left.shape[1])
    args.set_value(*value)
    products = left.new_empty(state.matrix.shape[1], left.shape[1])
    _run_kernel(_native._core.ialm_columns_cpu, args, products, None, True)
    return products


_library.OPS["ialm_pass"] = {"native": _library.native_cpu_reason, "reference": _library.reference_reason}


def is_native(matrix: Tensor) -> bool:
    return _library.native_cpu_reason(_native.device_kind(matrix)) is None


def _native_serves(state: State, backend: str | None) -> bool:
    return _library.choose_backend("ialm_pass", backend or "", _native.device_kind(state.matrix)) == "native"


# ---- what the solver calls ----


def new_state(matrix: Tensor, unit: float, lam: float, complete: bool) -> State:
    """T = 0 for a matrix [m, n] with contiguous rows, of any dtype residual_pass reads; T is padded to whole tiles."""
    m, n = (-(-side // tile) * tile for side, tile in zip(matrix.shape, (8, 32), strict=True))
    t = _native.empty((m, n), factor_dtype(matrix), matrix.device)
    return State(matrix, unit, t.zero_(), lam, complete)


def set_dual(state: State, factor: float) -> None:
    """T = Y = factor D, S = 0, 0 where D is missing."""
    for block in row_blocks(state.matrix):
        t = state.t[block, : state.matrix.shape[1]]
        torch.mul(entries(state.matrix[block], t.dtype), factor * state.unit, out=t).nan_to_num_(0.0)


def ialm_update(
    state: State, left, right, *, mu: float, mu_before: float, mu_next: float, backend: str | None = None
) -> Update:
    """T <- mu (D - L + Y / mu), L = left right[:, :q]^T, left [m, q], right [n, k], q <= k; A right for mu_next.

    mu_before is the penalty at which T was formed. Results do not depend on the number of threads.
    """
    run = _native_update if _native_serves(state, backend) else _update_ref
    products, sums = run(state, left, right, mu, mu_before, mu_next)
    turn, move, dual = sums[:3].sqrt()
    return Update(products, turn / mu, move * mu, dual)


def ialm_product(
    state: State, factor, *, mu: float, mu_next: float, transposed: bool = False, backend: str | None = None
) -> Tensor:
    """A factor, or A^T factor, of the step with penalty mu_next; mu is that at which T was formed."""
    return _product(state, factor, _target(mu, mu_next), transposed, backend)


def dual_product(state: State, factor, *, transposed: bool = False, backend: str | None = None) -> Tensor:
    """Y factor, or Y^T factor."""
    return _product(state, factor, _DUAL, transposed, backend)


def _product(state: State, factor, value: _Value, transposed: bool, backend: str | None) -> Tensor:
    native = _native_serves(state, backend)
    if transposed:
        return (_native_columns if native else _columns_ref)(state, factor, value)
    return (_native_rows if native else _rows_ref)(state, factor, value, None)


def dual_sums(state: State, *, mu: float, backend: str | None = None) -> DualSums:
    """Sums over Y and S; mu is the penalty at which T was formed."""
    sums = torch.zeros(4, dtype=torch.float64)
    run = _native_rows if _native_serves(state, backend) else _rows_ref
    run(state, state.t.new_empty(state.matrix.shape[1], 0), _DUAL, sums)
    sparse, nonzero, inner, largest = sums.tolist()
    return DualSums(sparse / mu, int(nonzero), inner, largest)
