"""token_logps on a GPU, executed: clean in every order of execution, and a bug of each kind is found."""

import re
from functools import partial
from typing import NamedTuple

import ptxsim
import pytest
import torch
from ptxsim_build import CHECKOUT
from ptxsim_triton import Kernel

from fastpref._logps import token_logps as op
from fastpref._logps.transform import Transform

CSRC = CHECKOUT / "csrc"
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
TRANSFORMS = {"plain": Transform(temperature=0.7), "softcap": Transform(temperature=0.7, softcap=30.0)}
transforms = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
SHAPES = {  # rows, columns, elements before the first row, elements between rows
    "vectors": (5, 1000, 0, 0),
    "unaligned": (3, 5003, 1, 3),
    "less-than-a-vector": (2, 7, 0, 5),
    "one": (1, 1, 0, 0),
}


class Case(NamedTuple):
    logits: torch.Tensor  # [1, rows, V]
    labels: torch.Tensor  # [1, rows] int64
    grad: torch.Tensor  # [1, rows] fp32
    transform: Transform


class Outputs(NamedTuple):
    logps: torch.Tensor  # [1, rows]
    lse: torch.Tensor  # [2, 1, rows]: hi, lo
    stats: torch.Tensor  # [4, 1, rows], or [0, 1, rows]


def make(rows, vocab, offset=0, pad=0, dtype=torch.float32, transform=TRANSFORMS["plain"]) -> Case:
    """One ignored row in the middle; NaN before the rows and between them."""
    store = torch.full((64 + offset + rows * (vocab + pad),), torch.nan, dtype=dtype)
    begin = -store.data_ptr() % 64 // store.element_size() + offset
    logits = store[begin : begin + rows * (vocab + pad)].view(1, rows, vocab + pad)[..., :vocab]
    logits.copy_(torch.randn(1, rows, vocab) * 4)
    labels = torch.randint(0, vocab, (1, rows))
    if rows > 1:
        labels[0, rows // 2] = transform.ignore_index
    return Case(logits, labels, torch.randn(1, rows), transform)


def truth(case: Case) -> tuple[Outputs, torch.Tensor]:
    """In float64, and the gradient."""
    rows = case.logits.double()
    out = torch.empty_like(rows)
    found = Outputs(*op._reference_fwd(rows, case.labels, case.transform, True))
    op._reference_bwd(case.grad, rows, case.labels, found.logps, found.lse, case.transform, out)
    return found, out


class Cuda:
    """csrc/cuda/token_logps.cu by the launchers of fastpref's core."""

    def __init__(self, core):
        self.core = core

    def forward(self, case: Case, stats: bool = True) -> Outputs:
        outputs, args = op.native_forward(case.logits, case.labels, case.transform, stats)
        tensors = ptxsim.by_row("logits", case.logits, readonly=True) | {"labels": (case.labels, True)}
        tensors |= Outputs(*outputs)._asdict()
        ptxsim.launch(partial(self.core.token_logps_fwd_cuda, args, 0), tensors)
        return Outputs(*outputs)

    def backward(self, case: Case, saved: Outputs, out: torch.Tensor):
        args = op.native_backward(case.grad, case.logits, case.labels, saved.logps, saved.lse, case.transform, out)
        inputs = {"labels": case.labels, "logps": saved.logps, "lse": saved.lse, "grad": case.grad}
        tensors = {name: (x, True) for name, x in inputs.items()} | ptxsim.by_row("out", out)
        if out.data_ptr() != case.logits.data_ptr():
            tensors |= ptxsim.by_row("logits", case.logits, readonly=True)
        ptxsim.launch(partial(self.core.token_logps_bwd_cuda, args, 0), tensors)


class Triton:
    """The Triton kernels, launched by fastpref's own functions."""

    def __init__(self, compiler, monkeypatch):
        inputs = {"x_ptr", "labels_ptr"}
        self.kernels = {
            "_token_logps_fwd_kernel": inputs,
            "_token_logps_bwd_kernel": inputs | {"grad_ptr", "logps_ptr", "lse_ptr"},
        }
        for name, readonly in self.kernels.items():
            kernel = Kernel(compiler, getattr(op, name), readonly, by_row={"x_ptr", "out_ptr"})
            monkeypatch.setattr(op, name, kernel)

    def forward(self, case: Case, stats: bool = True) -> Outputs:
        return Outputs(*op._triton_fwd(case.logits, case.labels, case.transform, stats))

    def backward(self, case: Case, saved: Outputs, out: torch.Tensor):
        op._triton_bwd(case.grad, case.logits, case.labels, saved.logps, saved.lse, case.transform, out)


@pytest.fixture
def cuda(core):
    return Cuda(core)


@pytest.fixture(params=["cuda", "triton"])
def kernels(request, monkeypatch):
    if request.param == "cuda":
        return request.getfixturevalue("cuda")
    return Triton(request.getfixturevalue("triton_compiler"), monkeypatch)


def check(case: Case, found: Outputs, out: torch.Tensor):
    expected, gradient = truth(case)
    assert (found.logps.double() - expected.logps).abs().max() < 1e-5
    multiplier, _ = case.transform.multiplier_and_tanh_scale()
    lse, true_lse = (multiplier * hi.double() + lo.double() for hi, lo in (found.lse, expected.lse))
    assert (lse - true_lse).abs().max() < 1e-5
    if len(found.stats):
        assert (found.stats - expected.stats).abs().max() < 1e-4
    target = torch.zeros(gradient.shape, dtype=torch.bool)
    target.scatter_(-1, case.labels.clamp(min=0).unsqueeze(-1), True)
    error, tolerance = (out.double() - gradient).abs(), 1e-5 + torch.finfo(out.dtype).eps
    for part in (target, ~target):
        largest = gradient.where(part, 0.0).abs().amax(-1)
        assert (error.where(part, 0.0).amax(-1) <= tolerance * largest + torch.finfo(out.dtype).tiny).all()


def run(kernels, case: Case, stats: bool = True):
    found = kernels.forward(case, stats)
    out = torch.empty_like(case.logits, memory_format=torch.contiguous_format)
    kernels.backward(case, found, out)
    check(case, found, out)


@dtypes
@transforms
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(kernels, shape, transform, dtype):
    for stats in (True, False):
        run(kernels, make(*shape, dtype=dtype, transform=transform), stats)


@pytest.mark.parametrize("order", range(6))
def test_in_any_order_and_off_by_two_units(kernels, order):
    transform = TRANSFORMS["softcap" if order % 2 else "plain"]
    with ptxsim.options(seed=order, quantum=order % 4, resident=1 + order % 3, ulp=2):
        run(kernels, make(4, 3001, order % 2, transform=transform))


@pytest.mark.parametrize("pad", [0, 3])
def test_in_place(kernels, pad):
    case = make(3, 3000, 0, pad)
    saved = kernels.forward(case)
    expected = torch.empty_like(case.logits)
    kernels.backward(case, saved, expected)
    kernels.backward(case, saved, case.logits)
    assert torch.equal(case.logits, expected)


@pytest.mark.parametrize("shift", [1, 4])
def test_a_gradient_half_over_the_logits_is_a_race(cuda, shift):
    """Memory that no caller passes: it shows that threads of other warps read what one has written."""
    store = torch.randn(2 * 3000 + 64)
    case = Case(store[16:6016].view(1, 2, 3000), torch.tensor([[1, 2]]), torch.ones(1, 2), Transform())
    saved = Outputs(*(x.float() for x in truth(case)[0]))
    out = store[16 - shift :][:6000].view(1, 2, 3000)
    args = op.native_backward(case.grad, case.logits, case.labels, saved.logps, saved.lse, case.transform, out)
    tensors = {"store": store, "labels": case.labels, "logps": saved.logps, "lse": saved.lse, "grad": case.grad}
    with pytest.raises(ptxsim.Findings, match="RACE in global memory"):
        ptxsim.launch(partial(cuda.core.token_logps_bwd_cuda, args, 0), tensors)


def test_the_next_row_is_out_of_bounds(kernels):
    case = make(3, 1000, 0, 3)
    wider = case._replace(logits=case.logits.as_strided((1, 3, 1001), (3009, 1003, 1)))
    register = ptxsim.by_row

    def narrower(name, x, readonly=False):
        return register(name, x[..., :1000], readonly)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ptxsim, "by_row", narrower)
        with pytest.raises(ptxsim.Findings, match=r"OUT OF BOUNDS global read.*\[0, 0\]' of 4000"):
            kernels.forward(wider)


# ---- planted bugs ----

SYNC = "  __syncthreads();\n  if (threadIdx.x != 0) return;"
# name: (what to replace, by what, what has to be said)
BUGS = {
    "no barrier": (SYNC, "  if (threadIdx.x != 0) return;", "UNINITIALISED shared read|RACE in shared"),
    "one vector too far": ("i < count ? vectors[i]", "i <= count ? vectors[i]", "OUT OF BOUNDS global read"),
    "misaligned vectors": (
        "head = head < vocab ? head : vocab;",
        "head = head < vocab ? head + 1 : vocab;",
        "MISALIGNED",
    ),
    "lane leaves before the shuffle": (
        "  sums = warp_merge(sums, k);",
        "  if (threadIdx.x % 32 == 31) return;\n  sums = warp_merge(sums, k);",
        "MEMBER MASK",
    ),
    "wrong stride of an output": (
        "args.stats[s * rows + row] = result.stats[s];",
        "args.stats[s * rows + row + 1] = result.stats[s];",
        "RACE in global|OUT OF BOUNDS",
    ),
    "one column too far": (
        "col < vocab; col += blockDim.x) f(col);\n  }",
        "col <= vocab; col += blockDim.x) f(col);\n  }",
        "OUT OF BOUNDS|RACE",
    ),
    "divergent barrier": (SYNC, "  if (threadIdx.x >= 40) { __syncthreads(); return; }\n" + SYNC, "DIVERGENT BARRIER"),
    "return before the barrier": (SYNC, "  if (threadIdx.x % 32 == 5) return;\n" + SYNC, "BARRIER after some threads"),
    "slot not written": (
        "if (threadIdx.x % warp == 0) warps",
        "if (threadIdx.x % warp == 0 && threadIdx.x != 32) warps",
        "UNINITIALISED shared read",
    ),
    "shared array too small": (
        "storage[max_threads / warp * sizeof(Sums<HAS_STATS>)]",
        "storage[2 * sizeof(Sums<HAS_STATS>)]",
        "OUT OF BOUNDS shared",
    ),
    "shuffle of half a warp": (
        "if (HAS_STATS) {\n      other.sum_t = __shfl_xor_sync(0xffffffff",
        "if (HAS_STATS) {\n      other.sum_t = __shfl_xor_sync(0xffff",
        "MEMBER MASK|SHUFFLE",
    ),
}


@pytest.fixture
def planted(tmp_path):
    def compiled(old, new) -> ptxsim.Module:
        source = (CSRC / "cuda/token_logps.cu").read_text()
        assert old in source, "the kernel has changed: plant this bug anew"
        changed = tmp_path / "token_logps.cu"
        changed.write_text(source.replace(old, new))
        return ptxsim.Module(ptxsim.nvcc_ptx(changed, tmp_path / "token_logps.ptx", f"-I{CSRC}", f"-I{CSRC}/cuda"))

    return compiled


ALWAYS = ("no barrier", "one vector too far", "misaligned vectors", "lane leaves before the shuffle")


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=() if bug in ALWAYS else pytest.mark.full) for bug in BUGS])
def test_planted(cuda, planted, bug):
    old, new, said = BUGS[bug]
    case = make(4, 5000, 1)
    with ptxsim.replaced(planted(old, new)), pytest.raises(ptxsim.Findings, match=said):
        run(cuda, case)
    assert re.search(r"\.cu:\d+", ptxsim.report())


# ---- the ledger ----


def test_ledger(cuda):
    case = make(2, 131072, dtype=torch.bfloat16)
    case.labels[:] = 5
    ptxsim.option(ledger=1, race=0)
    saved = cuda.forward(case, stats=False)
    forward = ptxsim.ledger()
    cuda.backward(case, saved, torch.empty_like(case.logits))
    backward = ptxsim.ledger()
    for counts, moved in ((forward, 2), (backward, 4)):
        s = ptxsim.summary(counts, case.logits.numel())
        assert s["excess_sectors"] < 1.01 and s["traffic_ratio"] < 1.05 and s["bank_conflicts"] == 0
        assert s["active_lanes"] > 29
        assert moved <= s["bytes_per_element"] < moved * 1.01 and s["slots_per_element"] < 4 * moved, s
    assert ptxsim.summary(forward)["barriers_per_block"] == 1
