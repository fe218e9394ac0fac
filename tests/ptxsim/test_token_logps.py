"""token_logps on a GPU, executed: clean in every order of execution, and a bug of each kind is found."""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import ptxsim
import pytest
import torch
from simulated import simulated

from fastpref._logps import token_logps as op
from fastpref._logps.transform import Transform

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


class Kernels(NamedTuple):
    """csrc/cuda/token_logps.cu or the Triton kernels, launched by fastpref's own functions."""

    compiler: Callable | None = None  # of Triton's

    def forward(self, case: Case, stats: bool = True) -> Outputs:
        run = op._native_fwd if self.compiler is None else op._triton_fwd
        with simulated({"labels": case.labels}, {"logits": case.logits}, self.compiler):
            return Outputs(*run(case.logits, case.labels, case.transform, stats))

    def backward(self, case: Case, saved: Outputs, out: torch.Tensor):
        inputs = {"labels": case.labels, "logps": saved.logps, "lse": saved.lse, "grad": case.grad}
        rows = {"out": (out, False)}
        if out.data_ptr() != case.logits.data_ptr():
            rows["logits"] = case.logits
        run = op._native_bwd if self.compiler is None else op._triton_bwd
        with simulated(inputs, rows, self.compiler):
            run(case.grad, case.logits, case.labels, saved.logps, saved.lse, case.transform, out)


@pytest.fixture
def cuda(core):
    return Kernels()


@pytest.fixture
def triton(triton_compiler):
    return Kernels(triton_compiler)


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    return request.getfixturevalue(request.param)


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


def beside(logits: torch.Tensor) -> torch.Tensor:
    """As far from a 64-byte boundary as the logits, and of their strides."""
    item = logits.element_size()
    store = torch.empty(64 + logits.shape[1] * logits.stride(1), dtype=logits.dtype)
    begin = -store.data_ptr() % 64 // item + logits.data_ptr() % 64 // item
    return store[begin:].as_strided(logits.shape, logits.stride())


def run(kernels, case: Case, stats: bool = True, same_phase: bool = False):
    found = kernels.forward(case, stats)
    out = beside(case.logits) if same_phase else torch.empty_like(case.logits, memory_format=torch.contiguous_format)
    kernels.backward(case, found, out)
    check(case, found, out)


@dtypes
@transforms
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(kernels, shape, transform, dtype):
    for stats in (True, False):
        run(kernels, make(*shape, dtype=dtype, transform=transform), stats, same_phase=stats)


@pytest.mark.parametrize("order", range(6))
def test_in_any_order_and_off_by_two_units(kernels, order):
    transform = TRANSFORMS["softcap" if order % 2 else "plain"]
    with ptxsim.options(seed=order, quantum=order % 4, resident=1 + order % 3, ulp=2):
        run(kernels, make(4, 3001, order % 2, transform=transform))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_tie_under_a_softcap_is_a_hit(kernels, dtype):
    """Whatever the neighbours of the two columns are, with which a tanh may share its rounding."""
    case = make(9, 1003, dtype=dtype, transform=TRANSFORMS["softcap"])
    largest = case.logits.float().amax(-1)
    case.labels[:] = torch.randint(0, 500, case.labels.shape)
    for row in range(9):
        case.logits[0, row, case.labels[0, row]] = largest[0, row]
        case.logits[0, row, 500 + torch.randint(0, 503, ())] = largest[0, row]
    assert (kernels.forward(case).stats[3] == 1).all()


@pytest.mark.parametrize("pad", [0, 3])
def test_in_place(kernels, pad):
    case = make(3, 3000, 0, pad)
    saved = kernels.forward(case)
    expected = torch.empty_like(case.logits)
    kernels.backward(case, saved, expected)
    kernels.backward(case, saved, case.logits)
    assert torch.equal(case.logits, expected)


@pytest.mark.parametrize("shift", [1, 4])
def test_a_gradient_half_over_the_logits_is_a_race(core, shift):
    """Memory that no caller passes: it shows that threads of other warps read what one has written."""
    store = torch.randn(2 * 3000 + 64)
    case = Case(store[16:6016].view(1, 2, 3000), torch.tensor([[1, 2]]), torch.ones(1, 2), Transform())
    saved = Outputs(*(x.float() for x in truth(case)[0]))
    out = store[16 - shift :][:6000].view(1, 2, 3000)
    args = op.native_backward(case.grad, case.logits, case.labels, saved.logps, saved.lse, case.transform, out)
    tensors = {"store": store, "labels": case.labels, "logps": saved.logps, "lse": saved.lse, "grad": case.grad}
    with pytest.raises(ptxsim.Findings, match="RACE in global memory"):
        ptxsim.launch(partial(core.token_logps_bwd_cuda, args, 0), tensors)


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


# ---- planted bugs of the backward (the forward's: test_preference.py) ----

# name: (what to replace, by what, what has to be said; "wrong": only the results show it)
BUGS = {
    "a neighbour's vector": ("x += first, out += first;", "x += first, out += first + vec<In>;", "RACE|OUT OF BOUNDS"),
    "a vector too far": ("if (!MASKED || left - u * step >= vec<In>)", "if (!MASKED || left - u * step > 0)", "OUT OF"),
    "a column too far": ("if (u * step + e < left) out", "if (u * step + e <= left) out", "OUT OF BOUNDS|RACE"),
    "misaligned vectors": (
        "if (reinterpret_cast<uintptr_t>(out + begin + head) % sizeof(Packed) || head",
        "if (head",
        "MISALIGNED",
    ),
    "no head": ("col < begin + head; col += bwd_threads) {", "col < begin; col += bwd_threads) {", "wrong"),
    "zeros behind the row": (
        "col < end; col += bwd_threads) out[col]",
        "col <= end; col += bwd_threads) out[col]",
        "OUT OF",
    ),
    "label of the next column": ("if (i == target) v[i]", "if (i == target + 1) v[i]", "wrong"),
    "pieces overlap": (
        "a.pieces.divisor) * piece_columns<In>;",
        "a.pieces.divisor) * (piece_columns<In> / 2);",
        "RACE|wrong",
    ),
    "lse of another row": ("hi = a.lse[row];", "hi = a.lse[row ? row - 1 : row];", "wrong"),
}
FIRST = ("misaligned vectors",)  # of bounds and races some are planted in preference.cu always


@pytest.mark.parametrize("bug", [b if b in FIRST else pytest.param(b, marks=pytest.mark.full) for b in BUGS])
def test_planted(cuda, planted, bug):
    old, new, said = BUGS[bug]
    found = set()
    with ptxsim.replaced(planted("token_logps.cu", old, new)):
        for case, same_phase in ((make(4, 5000, 1), True), (make(2, 17001, 0, 3), True), (make(2, 1000, 1), False)):
            try:
                run(cuda, case, same_phase=same_phase)
            except ptxsim.Findings as finding:
                assert re.search(r"\.cuh?:\d+", str(finding))
                found.add(str(finding)[:300])
            except AssertionError as error:
                found.add("wrong: " + str(error)[:300])
    assert any(re.search(said, finding) for finding in found), found


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@transforms
def test_the_backward_narrows(cuda, transform, out_dtype):
    case = make(3, 5003, 1, 3, transform=transform)
    saved = cuda.forward(case, stats=False)
    wide, narrow = torch.empty(1, 3, 5003), torch.empty(1, 3, 5003, dtype=out_dtype)
    cuda.backward(case, saved, wide)
    cuda.backward(case, saved, narrow)
    few = torch.finfo(out_dtype).eps
    torch.testing.assert_close(
        narrow.float(), wide, rtol=few, atol=float(wide.abs().max()) * 1e-6 + torch.finfo(out_dtype).tiny
    )


@dtypes
@pytest.mark.parametrize("rows", [1, 33, 70])
def test_a_row_has_the_same_bits_in_any_batch(kernels, rows, dtype):
    """Triton's where the row stride is a multiple of 16 bytes; few rows do not fill the machine, of either."""
    ptxsim.option(race=0)
    vocab, aligned = 9001, kernels.compiler is not None
    offset, pad = (8, -vocab % 8) if aligned else (1, 3)
    alone = make(1, vocab, offset, pad if aligned else 0, dtype=dtype)
    base, base_out = kernels.forward(alone), torch.empty_like(alone.logits)
    kernels.backward(alone, base, base_out)
    case = make(rows, vocab, offset, pad, dtype=dtype)
    for own, theirs in ((case.logits, alone.logits), (case.labels, alone.labels), (case.grad, alone.grad)):
        own[0, rows - 1] = theirs[0, 0]
    for sms in (1, 3, 132) if not aligned else (1,):
        with ptxsim.options(sms=sms, seed=sms):
            found, out = kernels.forward(case), beside(case.logits)
            kernels.backward(case, found, out)
        for name, value in base._asdict().items():
            assert torch.equal(getattr(found, name)[..., -1], value[..., 0]), name
        assert torch.equal(out[0, -1], base_out[0, 0])


# ---- the ledger ----


def test_ledger(kernels):
    """Slots per logit; more of them in test_preference.py."""
    case = make(2, 131072, dtype=torch.bfloat16)
    case.labels[:] = 5
    ptxsim.option(ledger=1, race=0)
    saved = kernels.forward(case, stats=False)
    forward = ptxsim.ledger()
    kernels.backward(case, saved, torch.empty_like(case.logits))
    backward = ptxsim.ledger()
    most = (8.5, 10.5, 0) if kernels.compiler is None else (9.5, 9.5, 20)
    for counts, moved, slots in ((forward, 2, most[0]), (backward, 4, most[1])):
        s = ptxsim.summary(counts, case.logits.numel())
        assert s["excess_sectors"] < 1.01 and s["traffic_ratio"] < 1.05 and s["bank_conflicts"] == 0
        assert s["active_lanes"] > 30 and s["barriers_per_block"] <= most[2]
        assert moved <= s["bytes_per_element"] < moved * 1.01
        assert s["slots_per_element"] <= slots, s
