"""The epilogue of whole pairs behind log-probs of tokens: native on the CPU and Triton's, against float64 and another.

Triton's kernel runs under the interpreter; compiled: tests/ptxsim/test_linear_preference.py.
"""

import math
from typing import NamedTuple

import pytest
import torch
from cases import Backend
from torch import Tensor

from fastpref._logps.pair_epilogue import PairResults, fused_family, write_pairs
from fastpref._logps.pairs import FUSED_BACKENDS, Family, Loss, PairData, pair_gradients
from fastpref._logps.preference import _choose
from fastpref._logps.sequences import Sequences

IGNORED = -100
BACKENDS = [
    pytest.param(Backend(name, device), id=f"{name}-{device}", marks=[getattr(pytest.mark, mark)] if mark else [])
    for name, device, mark in (
        ("native", "cpu", None),
        ("triton", "cpu", "triton"),
        ("native", "cuda", "cuda"),
        ("triton", "cuda", "cuda"),
    )
]


@pytest.fixture(params=BACKENDS)
def on(request) -> Backend:
    if reason := request.param.missing():
        pytest.skip(f"{request.param}: {reason}")
    return request.param


class Case(NamedTuple):
    """Pairs [begin, end) of a batch, whose tokens are these rows."""

    pairs: tuple[int, int]
    token_logps: Tensor
    labels: Tensor
    bounds: Tensor
    data: PairData
    scale: Tensor


def make(batch=5, begin=1, end=4, most=9, reference="ref_token_logps", before=2, behind=3) -> Case:
    """Rows before the first sequence and behind the last are of none, and one sequence is empty."""
    sizes = torch.randint(0, most + 1, (2 * (end - begin),))
    sizes[torch.randint(0, len(sizes), ())] = 0
    bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)) + before
    rows = int(bounds[-1]) + behind
    labels = torch.randint(0, 30, (rows,))
    labels[torch.rand(rows) < 0.3] = IGNORED
    gap = torch.randn(batch)
    gap[torch.rand(batch) < 0.4] = math.nan
    logps, ref_logps = -5 * torch.rand(2, rows)
    data = PairData(
        ref_logps if reference == "ref_token_logps" else None,
        -30 * torch.rand(2 * batch) if reference == "ref_logps" else None,
        gap,
        None,
    )
    logps[labels == IGNORED] = math.nan  # nobody reads them
    return Case((begin, end), logps, labels, bounds, data, torch.rand(batch) + 0.1)


def epilogue(on: Backend, case: Case, loss: Loss) -> tuple[PairResults, Tensor]:
    """What other pairs have stays as it is."""
    there = [t.to(on.device) for t in (case.token_logps, case.labels, case.bounds)]
    data = PairData(*(None if t is None else t.to(on.device) for t in case.data))
    scale = case.scale.to(on.device)
    out = PairResults(*(t.fill_(77) for t in PairResults.empty(scale)))
    has_reference = data.ref_token_logps is not None or data.ref_logps is not None
    family = fused_family(loss, has_reference, True, scale, on.name)
    assert family is not None
    gradient = write_pairs(out, case.pairs, *there, data, scale, IGNORED, family, on.name)
    return PairResults(*(t.cpu() for t in out)), gradient.cpu()


def truth(case: Case, loss: Loss) -> tuple[PairResults, Tensor]:
    """In float64, as torch on vectors."""
    (begin, end), batch = case.pairs, case.scale.shape[0]
    both = torch.cat([torch.arange(begin, end), batch + torch.arange(begin, end)])
    wide = [None if t is None else t.double() for t in case.data]
    ref_tokens, ref_sums, gap, _ = wide
    data = PairData(ref_tokens, None if ref_sums is None else ref_sums[both], gap[begin:end], None)
    sequences = Sequences.compacted(torch.arange(len(case.labels)), case.bounds, case.labels == IGNORED)
    tokens, values = case.token_logps.double(), torch.zeros(0, len(case.labels))
    found, gradient = pair_gradients(tokens, values, sequences, data, loss, case.scale[begin:end].double())
    inside = torch.arange(len(case.labels))
    counted = (case.labels != IGNORED) & (inside >= case.bounds[0]) & (inside < case.bounds[-1])
    out = [torch.full((n,), 77.0, dtype=torch.float64) for n in (batch, 2 * batch, 2 * batch, 2 * batch)]
    for whole, part, places in zip(out, found[:4], (torch.arange(begin, end), both, both, both), strict=True):
        whole[places] = part.double()
    return PairResults(*out), torch.where(counted, gradient, 0.0)


LOSSES = {
    "sigmoid": {},
    "smoothed": {"loss": "sigmoid", "options": {"label_smoothing": 0.1}},
    "robust": {"options": {"label_smoothing": 0.2}},
    "rdpo": {},
    "ripo": {},
    "ml_rdpo": {},
    "ddpo": {},
    "ipo": {"options": {"length_normalize": False}},
    "free": {"loss": "sigmoid", "options": {"reference_free": True}, "reference": None},
    "sums": {"loss": "rdpo", "reference": "ref_logps"},
}


def of(name: str) -> tuple[Loss, str | None]:
    case = LOSSES[name]
    loss = Loss(case.get("loss", name), None, case.get("options"), 0.3)
    return loss, case.get("reference", "ref_token_logps")


@pytest.mark.numerics
@pytest.mark.parametrize("name", LOSSES)
def test_matches_float64(on, name):
    loss, reference = of(name)
    case = make(reference=reference)
    (found, gradient), (expected, true_gradient) = epilogue(on, case, loss), truth(case, loss)
    for field, value, true in zip(PairResults._fields, found, expected, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=2e-6, atol=2e-6, msg=lambda m, f=field: f"{f}: {m}")
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=2e-6, atol=2e-6)
    assert (gradient[case.labels == IGNORED] == 0).all()


@pytest.mark.parametrize("most", [0, 3, 2500])
def test_sequences_of_any_length(on, most):
    """Nothing counts; less than a block; more than one."""
    loss, _ = of("rdpo")
    case = make(batch=2, begin=0, end=2, most=most)
    (found, gradient), (expected, true_gradient) = epilogue(on, case, loss), truth(case, loss)
    torch.testing.assert_close(found.logps.double(), expected.logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.losses.double(), expected.losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.lengths.double(), expected.lengths)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)


def test_a_pair_has_the_same_bits_whatever_the_group(on):
    """Its rows lie elsewhere there, and others stand beside it."""
    loss, _ = of("ml_rdpo")
    case = make(batch=4, begin=0, end=4, most=700)
    whole, gradient = epilogue(on, case, loss)
    for pair in range(4):
        spans = [slice(*case.bounds[s : s + 2].tolist()) for s in (pair, 4 + pair)]
        rows = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        sizes = torch.tensor([span.stop - span.start for span in spans])
        data = case.data._replace(ref_token_logps=case.data.ref_token_logps[rows])
        bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        alone = Case((pair, pair + 1), case.token_logps[rows], case.labels[rows], bounds, data, case.scale)
        found, own = epilogue(on, alone, loss)
        assert torch.equal(own, gradient[rows])
        assert found.losses[pair] == whole.losses[pair]
        for name in ("logps", "logratios", "lengths"):
            assert torch.equal(getattr(found, name)[[pair, 4 + pair]], getattr(whole, name)[[pair, 4 + pair]]), name
            assert (getattr(found, name)[[(pair + 1) % 4, 4 + (pair + 1) % 4]] == 77).all()


@pytest.mark.parametrize("extreme", [1e4, math.inf, math.nan])
def test_extreme_log_ratios(on, extreme):
    """Saturated losses neither overflow nor divide by zero; what is not finite stays within its pair."""
    for name in ("sigmoid", "robust", "rdpo"):
        loss, _ = of(name)
        case = make(batch=2, begin=0, end=2, most=4)
        case = case._replace(labels=torch.ones_like(case.labels), token_logps=-torch.rand(len(case.labels)))
        case.data.rating_gap[:] = 0.5
        case.token_logps[case.bounds[0] : case.bounds[1]] = -extreme
        (found, gradient), (expected, true_gradient) = epilogue(on, case, loss), truth(case, loss)
        torch.testing.assert_close(found.losses.double(), expected.losses, rtol=1e-5, atol=1e-5, equal_nan=True)
        rows = slice(int(case.bounds[1]), int(case.bounds[2]))  # the other pair's
        torch.testing.assert_close(gradient[rows].double(), true_gradient[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", ["", "native", "triton"])
def test_a_machine_without_the_backend(monkeypatch, asked):
    """As a saved program may find it; a backend that was asked for is not replaced by another."""
    for name in FUSED_BACKENDS if not asked else [asked]:
        monkeypatch.setitem(FUSED_BACKENDS, name, lambda device: "it is elsewhere")
    case = make()
    family = Family([0.1, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], False)
    out, inputs = PairResults.empty(case.scale), (case.token_logps, case.labels, case.bounds, case.data, case.scale)
    with pytest.raises(RuntimeError, match=r"no backend of pair_epilogue serves cpu tensors here: .*it is elsewhere"):
        write_pairs(out, case.pairs, *inputs, IGNORED, family, asked)
    with pytest.raises(RuntimeError, match=r"no backend of preference_loss serves cpu tensors here: .*it is elsewhere"):
        _choose(torch.randn(2, 3, 4), None, IGNORED, asked)


def test_who_takes_the_epilogue():
    vector, wide = torch.empty(2), torch.empty(2, dtype=torch.float64)
    sigmoid = Loss("sigmoid", None, None, 0.1)
    assert fused_family(sigmoid, True, False, wide, "") is None
    assert fused_family(sigmoid, True, False, vector, "reference") is None
    assert fused_family(sigmoid, False, False, vector, "") is None  # it needs a reference
    assert fused_family(Loss("hinge", None, None, 0.1), True, False, vector, "") is None
    assert fused_family(Loss("rdpo", None, None, 0.1), True, False, vector, "") is None
