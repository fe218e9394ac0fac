"""scaled: the product in the gradient's own memory, and nothing at all for a factor of 1."""

import pytest
import torch
from forced_cuda import forced_cuda

from fastpref._logps import scaled as module
from fastpref._logps.scaled import scaled

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
BLOCK = module._WARPS * 32 * module._THREAD_BYTES // 4  # entries of float32 that a program takes at a time


@dtypes
def test_on_the_cpu(dtype):
    gradient, factor = torch.randn(5, 7).to(dtype), torch.randn(())
    expected = (gradient.double() * factor.double()).to(dtype)
    got = scaled(gradient, factor)
    assert got.data_ptr() == gradient.data_ptr()
    torch.testing.assert_close(got, expected, rtol=2**-6 if dtype == torch.bfloat16 else 1e-3, atol=0)
    kept = gradient.clone()
    assert torch.equal(scaled(gradient, torch.ones(())), kept)


@dtypes
@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
@pytest.mark.parametrize("programs", [1, 2, 1024])
def test_on_a_gpu(dtype, size, programs, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "_PROGRAMS", programs)  # fewer than blocks: each takes several
    around = torch.full((size + 2,), 7.0).to(dtype)
    gradient = around[1:-1]
    gradient.copy_(torch.randn(size))
    kept = gradient.clone()
    launched = []

    def launch(kernel, grid, *args, **options):
        launched.append(grid)
        kernel[grid](*args, **options)

    for factor in (1.0, -0.3, 0.0, torch.nan):
        with forced_cuda(lambda tensor, name: None, launch):
            got = scaled(gradient, torch.tensor(factor))
        assert got.data_ptr() == gradient.data_ptr()
        expected = (kept.double() * torch.tensor(factor).double()).to(dtype)
        few = 2**-6 if dtype == torch.bfloat16 else 2**-9 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(got, expected, rtol=few, atol=1e-7, equal_nan=True)
        if factor == 1.0:
            assert torch.equal(got, kept)
        gradient.copy_(kept)
    assert (around[[0, -1]] == 7).all()
    assert len(launched) == (4 if size and dtype != torch.float64 else 0)  # torch serves float64


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_factor_of_one_touches_no_entry():
    """A gradient without memory: whatever read or wrote it would die."""
    pytest.importorskip("triton")
    kernel, nowhere = module._scale_kernel, torch.empty(0)
    kernel[(4,)](nowhere, torch.ones(()), 1 << 40, BLOCK=16)


def test_rows_have_factors_of_their_own():
    gradient, factor = torch.randn(3, 4), torch.tensor([[2.0], [1.0], [-1.0]])
    expected = gradient * factor
    assert torch.equal(scaled(gradient, factor), expected)
