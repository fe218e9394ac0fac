"""The low-rank half on a GPU: what gpu.py measures, as ITEMS of worker.py, at the sizes that the goals name.

ITEMS: {name: function(device) -> {"case": record of problem.py}}. Each is judged by what was put in, and each has a cap
of its own, cap_s: what takes longer ends alone (worker.py's parent sees to it).
"""

import math
import warnings
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastpref
from fastpref._lowrank.residual_pass import residual_pass, residual_pass_ref
from harness.gpu_measure import ceilings, flusher
from harness.measure import FunctionCompetitor
from harness.problem import judge_by, played
from peers import low_rank

SECONDS = 3.0  # of rounds, per item
ZETA = 3.0


class Sizes(NamedTuple):
    residual: int  # side of the residual pass's matrix
    batch: int  # matrices of 64 x 64
    svt: dict[int, int]  # side -> matrices
    single: int  # side of the one large matrix


REAL = Sizes(10_000, 10_000, {16: 65_536, 32: 16_384, 64: 4096, 128: 512}, 100_000)
TINY = Sizes(150, 2, {16: 2, 32: 2, 64: 1, 128: 1}, 150)  # of a dry run


def _sizes(device) -> Sizes:
    return REAL if device.type == "cuda" else TINY


def _seconds(device) -> float:
    return SECONDS if device.type == "cuda" else 0.0


def _played(op, name, competitors, judge, device, notes=()) -> dict:
    record = played(op, name, competitors, judge, device, _seconds(device), flusher(device), notes)
    return {"case": record}


# ---- the residual pass ----


def _residual(dtype: torch.dtype, rank: int, device) -> dict:
    n = _sizes(device).residual
    left, right = (torch.randn(n, rank, device=device) for _ in range(2))
    matrix = torch.randn(n, n, device=device).addmm_(left, right.t())
    unit = 0.1 if dtype == torch.int8 else 1.0
    matrix = (matrix / unit).round_().clamp_(-127, 127).to(dtype) if dtype == torch.int8 else matrix.to(dtype)
    matrix.view(-1)[:: 97 * 97] = -128 if dtype == torch.int8 else torch.nan
    options = {"psi": "cauchy", "zeta": ZETA, "scale": unit}
    rows = slice(0, n, max(1, n // 500))
    truth = residual_pass_ref(matrix[rows], left[rows], right, **options).left_grad

    def judge(found):
        error = (found[0][rows].double() - truth).norm() / truth.norm()
        return {"error": float(error)}

    def fused(d, a, b):
        return residual_pass(d, a, b, **options)

    competitors = [FunctionCompetitor("fastpref_triton", "fastpref, Triton", fused, matrix, left, right)]
    if dtype == torch.float32:
        competitors.append(
            FunctionCompetitor("composed", "plain PyTorch", low_rank.residual_composed(ZETA), matrix, left, right)
        )
    name = f"{n}x{n}, rank {rank}, {str(dtype).removeprefix('torch.')}"
    record = _played("residual_pass", name, competitors, judge, device)["case"]
    seconds = record["competitors"]["fastpref_triton"]["median_ms"] / 1e3
    share = matrix.nbytes / seconds / 1e9 / ceilings(device)["read_gbps"]
    record["notes"] = [
        f"{matrix.nbytes / seconds / 1e9:.0f} GB/s, {100 * share:.0f} % of the read rate; "
        f"{6 * n * n * rank / seconds / 1e12:.1f} TFLOP/s."
    ]
    record["bandwidth_share"] = share
    return {"case": record}


# ---- batches ----


def _corrupted_batch(size: int, items: int, rank: int, share: float, device) -> tuple[Tensor, Tensor]:
    """L float64 and D float32, both [size, items, items]; corruptions up to 10 mean |L|."""
    left, right = (torch.randn(size, items, rank, device=device, dtype=torch.float64) for _ in range(2))
    low = left @ right.mT
    return low, (low + _gross(low, share)).float()


def _gross(low: Tensor, share: float) -> Tensor:
    wrong = torch.rand(low.shape, device=low.device) < share
    size = 10 * low.abs().mean((-2, -1), keepdim=True)
    return wrong * size * (2 * torch.rand(low.shape, device=low.device, dtype=low.dtype) - 1)


def _rpca(rank):
    def run(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a rank that looks wrong
            return fastpref.rpca(data, rank=rank).low_rank()

    return run


def _batch(rank: int | None, device) -> dict:
    size = _sizes(device).batch
    low, data = _corrupted_batch(size, 64, 4, 0.1, device)
    title = f"fastpref.rpca({'' if rank is None else f'rank={rank}'})"
    competitors = [FunctionCompetitor("fastpref", title, _rpca(rank), data)]
    name = f"{size} of 64x64, rank 4, 10 % corrupted, {'rank-free' if rank is None else 'rank given'}"
    return _of_a_batch(_played("rpca", name, competitors, judge_by(low, (-2, -1)), device), size)


def _of_a_batch(result: dict, size: int) -> dict:
    record = result["case"]
    ms = next(iter(record["competitors"].values()))["median_ms"]
    record["notes"] = [*record["notes"], f"{1e3 * size / ms:.3g} matrices/s."]
    return result


def _bradley_terry(device) -> dict:
    size = _sizes(device).batch
    w = torch.randn(size, 64, device=device, dtype=torch.float64)
    w -= w.mean(-1, keepdim=True)
    low = w.unsqueeze(-1) - w.unsqueeze(-2)
    off = _gross(low, 0.2).triu(1)
    data = (low + off - off.mT).float()
    competitors = [
        FunctionCompetitor("fastpref", "fastpref.bradley_terry", lambda m: fastpref.bradley_terry(m).scores, data)
    ]
    name = f"{size} logit matrices of 64 items, 20 % corrupted"
    return _of_a_batch(_played("bradley_terry", name, competitors, judge_by(w, -1), device), size)


def _svt(side: int, device) -> dict:
    size = _sizes(device).svt[side]
    matrix = torch.randn(size, side, side, device=device)
    threshold = torch.full((size,), math.sqrt(side), device=device)  # half of the largest singular value
    few = slice(0, min(size, 64))
    truth = low_rank.svt_by_svd(matrix[few].double(), threshold[few].double())
    norm = torch.linalg.matrix_norm(matrix[few].double())

    def judge(found):
        return {"error": float((torch.linalg.matrix_norm(found[few] - truth) / norm).max())}

    competitors = [
        FunctionCompetitor("fastpref", "fastpref.svt", lambda m, t: fastpref.svt(m, t).low_rank, matrix, threshold),
        FunctionCompetitor("gram", "Gram and eigh", low_rank.svt_by_gram, matrix, threshold),
    ]
    if side <= 32:  # beyond, cuSOLVER loops over the matrices
        competitors.append(FunctionCompetitor("svd", "torch.linalg.svd", low_rank.svt_by_svd, matrix, threshold))
    return _of_a_batch(_played("svt", f"{size} of {side}x{side}", competitors, judge, device), size)


# ---- one large matrix ----


def _single(device) -> dict:
    n, rank = _sizes(device).single, 10
    left, right = (torch.randn(n, rank, device=device) for _ in range(2))
    matrix = torch.empty(n, n, device=device)
    for rows in range(0, n, 2000):
        block = left[rows : rows + 2000] @ right.t()
        matrix[rows : rows + 2000] = block + _gross(block, 0.05)
    sample = slice(0, n, max(1, n // 500))
    low = left[sample].double() @ right.double().t()

    def judge(found):
        error = (found.U[sample] * found.S).double() @ found.Vh.double() - low
        return {"error": float(error.norm() / low.norm()), "iterations": int(found.info.iterations)}

    run = partial(fastpref.rpca, rank=rank)
    competitors = [FunctionCompetitor("fastpref", f"fastpref.rpca(rank={rank})", run, matrix)]
    notes = [f"the matrix has {matrix.nbytes / 2**30:.1f} GiB."]
    return _played("rpca", f"one of {n}x{n}, rank {rank}, 5 % corrupted", competitors, judge, device, notes)


ITEMS = {
    f"residual_pass-r{rank}-{str(dtype).removeprefix('torch.')}": partial(_residual, dtype, rank)
    for rank in (10, 5, 20)
    for dtype in (torch.float32, torch.bfloat16, torch.int8)
} | {
    "rpca-batch-rank4": partial(_batch, 4),
    "bradley_terry": _bradley_terry,
    "svt-32": partial(_svt, 32),
    "svt-64": partial(_svt, 64),
    "svt-16": partial(_svt, 16),
    "svt-128": partial(_svt, 128),
    "rpca-single": _single,
    "rpca-batch-rank-free": partial(_batch, None),
}
FEW = ("residual_pass-r5-bfloat16", "bradley_terry", "svt-16")  # of a rehearsal
LONG_S = {"rpca-single": 30, "rpca-batch-rank-free": 35, "rpca-batch-rank4": 25, "svt-64": 20, "svt-128": 20}


def names(dry_run: bool, few: bool) -> tuple[str, ...]:
    return FEW if few else tuple(ITEMS)


def cap_s(name: str) -> float:
    return LONG_S.get(name, 12)
