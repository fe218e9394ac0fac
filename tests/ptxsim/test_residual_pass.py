"""The Triton residual pass, executed, against its reference in float64."""

import ptxsim
import pytest
import torch
from ptxsim_triton import Kernel

from fastpref._lowrank import residual_pass as op

INPUTS = {"matrix_ptr", "left_ptr", "right_ptr", "row_weights_ptr", "column_weights_ptr"}


@pytest.fixture
def triton_pass(triton_compiler, monkeypatch):
    monkeypatch.setattr(op, "_residual_pass_kernel", Kernel(triton_compiler, op._residual_pass_kernel, INPUTS))
    return op._triton_pass


@pytest.mark.parametrize(
    "psi,dtype",
    [
        ("cauchy", torch.float32),
        ("hard", torch.bfloat16),
        pytest.param("cauchy", torch.bfloat16, marks=pytest.mark.full),
        pytest.param("hard", torch.float32, marks=pytest.mark.full),
        pytest.param("soft", torch.float16, marks=pytest.mark.full),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_matches_float64(triton_pass, psi, dtype):
    matrix, left, right = torch.randn(150, 70).to(dtype), torch.randn(150, 6), torch.randn(70, 6)
    matrix.view(-1)[::17] = torch.nan
    terms = op._Terms(psi, 0.7, 1.0, False, None, None, False)
    with ptxsim.options(ulp=2):
        found, _ = triton_pass(matrix, left, right, terms)
    expected, _ = op._reference(matrix, left, right, terms)
    assert (found.left_grad - expected.left_grad).abs().max() < 1e-4
    assert (found.right_grad - expected.right_grad).abs().max() < 1e-4
    assert abs(found.sum_squares - expected.sum_squares) < 1e-2
    assert found.observed == expected.observed
    assert abs(found.kept - expected.kept) <= 2  # an |R| next to zeta falls on either side
    assert (found.histogram - expected.histogram).abs().sum() <= 8  # and one next to the edge of a bin
