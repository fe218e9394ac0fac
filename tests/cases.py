"""What several test files share: the seed, the backends, shapes with the reason for each, and data to recover.

Enough rows that PyTorch's own error shows its usual size.
"""

import math
import os
import time
import warnings

import torch

import fastpref
import fastpref._logps.token_logps  # what Backend asks for its backends
from fastpref import _library
from fastpref._lowrank import storage

# in the environment, so that the workers of pytest-xdist and the processes that tests start draw from the same
SEED = int(os.environ.setdefault("FASTPREF_TEST_SEED", str(time.time_ns() % 2**31)))

SHAPES = {
    "one-column": (64, 1),  # V = 1: the target is the whole vocabulary
    "less-than-a-vector": (64, 3),
    "odd": (61, 101),  # nothing divides it: tails and unaligned rows everywhere
    "one-block": (17, 2048),
    "blocks-and-a-tail": (17, 5003),
    "batch": (8, 9, 130),  # [B, T, V]
    "deep": (3, 4, 5, 67),  # more leading dimensions than the kernels know
}
BIG_SHAPES = {
    "llama-3": (8, 128256),
    "gemma": (5, 262144),
    "many-rows": (70001, 3),  # more than 65,535 rows: a limit of grid.y
}
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 5.0, "temperature": 1.3, "scale": 1.5},
}


# ---- backends ----


class Backend:
    """A backend on a device, at a forced SIMD level where that matters."""

    def __init__(self, name, device, simd=None):
        self.name, self.device, self.simd = name, torch.device(device), simd

    def __repr__(self):
        return "-".join(filter(None, (self.name, self.device.type, self.simd)))

    @property
    def interpreted(self) -> bool:
        """By Triton's interpreter, which takes seconds where compiled kernels (tests/ptxsim) take none."""
        return self.name == "triton" and self.device.type == "cpu"

    def missing(self) -> str | None:
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return "no GPU is visible to torch"
        if reason := _library.OPS["token_logps"][self.name](self.device.type):
            return reason
        if self.simd:
            try:
                fastpref.set_simd_level(self.simd)
            except ValueError as error:
                return str(error)
            finally:
                fastpref.set_simd_level("auto")
        return None


BACKENDS = [
    Backend("reference", "cpu"),
    Backend("native", "cpu", "baseline"),
    Backend("native", "cpu", "avx2"),
    Backend("native", "cpu", "avx512"),
    Backend("triton", "cpu"),
    Backend("native", "cuda"),
    Backend("triton", "cuda"),
]


# ---- preference matrices ----


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return function(*args, **kwargs)


def scores_of(prompts, items, seed=0, sd=1.0):
    w = sd * torch.randn(prompts, items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return w - w.mean(-1, keepdim=True)


# ---- low rank ----

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8]
LAYOUTS = {
    "columns": lambda x: x.t().contiguous().t(),
    "row-stride": lambda x: torch.nn.functional.pad(x, (3, 5), value=7)[:, 3:-5],
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns-of-a-larger": lambda x: torch.nn.functional.pad(x.t(), (1, 2), value=7)[:, 1:-2].t(),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def make(m, n, r, dtype=torch.float32, device="cpu", missing=0.2):
    """A matrix, and factors that are some way from it."""
    left = torch.randn(m, r, dtype=torch.float64, device=device)
    right = torch.randn(n, r, dtype=torch.float64, device=device)
    matrix = left @ right.t() + torch.randn(m, n, dtype=torch.float64, device=device)
    if dtype == torch.int8:
        matrix = matrix.mul(8).round().clamp(-127, 127)
    matrix = matrix.to(dtype)
    matrix[torch.rand(m, n, device=device) < missing] = -128 if dtype == torch.int8 else torch.nan
    factor_dtype = storage.factor_dtype(matrix)
    near = [(f + 0.1 * torch.randn_like(f)).to(factor_dtype) for f in (left, right)]
    return matrix, *near


def sizes(matrix, left, right, scale=1.0):
    residual = scale * storage.entries(matrix, torch.float64) - left.double() @ right.double().t()
    return residual[~residual.isnan()].abs()


def zeta_in_a_gap(matrix, left, right, scale=1.0):
    """A zeta near the median of |R| that no |R| is close to: rounding must not decide which entries are kept."""
    ordered = sizes(matrix, left, right, scale).sort().values
    middle = ordered[len(ordered) // 4 : 3 * len(ordered) // 4 + 2]
    if len(middle) < 2:
        return 1.0
    widest = (middle[1:] - middle[:-1]).argmax()
    zeta = float(middle[widest] + middle[widest + 1]) / 2
    return zeta if zeta > 1e-5 else 1.0  # all are rounding alone, as on the diagonal of a skew matrix without its pairs


def corrupted(m, n, rank, share=0.05, observed=1.0, noise=0.0, condition=1.0, size=10.0, seed=0):
    """L and D: corruptions uniform up to `size` mean |L|, Gaussian noise, missing entries."""
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(side, rank, generator=rng, dtype=torch.float64) for side in (m, n))
    if condition > 1:
        a = torch.linalg.qr(a).Q * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) * (m * n) ** 0.5
        b = torch.linalg.qr(b).Q
    low = a @ b.t()
    mean = low.abs().mean()
    wrong = torch.rand(m, n, generator=rng) < share
    data = low + wrong * size * mean * (2 * torch.rand(m, n, generator=rng, dtype=torch.float64) - 1)
    data += noise * mean * torch.randn(m, n, generator=rng, dtype=torch.float64)
    missing = torch.rand(m, n, generator=rng) >= observed
    return low, data.masked_fill(missing, torch.nan)


def skew_corrupted(items, share=0.1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(items, generator=rng, dtype=torch.float64)
    low = w.unsqueeze(1) - w
    wrong = (torch.rand(items, items, generator=rng) < share).triu(1)
    change = wrong * 10 * low.abs().mean() * (2 * torch.rand(items, items, generator=rng, dtype=torch.float64) - 1)
    return low, low + change - change.t()


def error(result, low):
    return ((result.low_rank().double() - low).norm(dim=(-2, -1)) / low.norm(dim=(-2, -1))).max().item()
