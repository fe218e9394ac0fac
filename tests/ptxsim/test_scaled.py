"""The kernel that scales a gradient, executed: its bounds, and what it reads for a factor of 1."""

import ptxsim
import pytest
import torch
from forced_cuda import devices
from ptxsim_triton import Kernel

from fastpref._logps import scaled as module
from fastpref._logps.scaled import scaled


@pytest.fixture
def scale(triton_compiler, monkeypatch):
    kernel = Kernel(triton_compiler, module._scale_kernel, {"factor_ptr"})
    monkeypatch.setattr(module, "_scale_kernel", kernel)
    monkeypatch.setattr(module, "_PROGRAMS", 3)

    def run(gradient, factor):
        with devices(lambda place: "cuda", lambda kernel, grid, *args, **options: kernel[grid](*args, **options)):
            return scaled(gradient, torch.tensor(factor))

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("blocks", [0, 1, 7], ids=str)
def test_scaled(scale, dtype, offset, blocks):
    block = module._WARPS * 32 * module._THREAD_BYTES // dtype.itemsize
    gradient = torch.randn(blocks * block + 37 + offset).to(dtype)[offset:]
    expected = (gradient.float() * torch.tensor(-0.3)).to(dtype)
    assert torch.equal(scale(gradient, -0.3), expected)


def test_a_factor_of_one_reads_the_factor_alone(scale):
    gradient = torch.randn(50_000)
    kept = gradient.clone()
    with ptxsim.options(ledger=1):
        assert torch.equal(scale(gradient, 1.0), kept)
    counts = ptxsim.ledger()
    assert (counts["unique_read"], counts["unique_written"]) == (4, 0)
