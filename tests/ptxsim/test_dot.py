"""Triton's matrix product on tensor cores: what its compiler makes of shared memory and mma.sync, executed."""

import pytest
import torch
from ptxsim_triton import Kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_product(triton_compiler, dtype):
    import dot_kernel  # and with it Triton, which the fixture looks for

    a, b, out = torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype), torch.empty(64, 64)
    # on sm_90 it would be wgmma
    Kernel(triton_compiler, dot_kernel.product, {"a_ptr", "b_ptr"}, arch=80)[(1,)](a, b, out, N=64)
    tolerance = 5e-2 if dtype == torch.float32 else 1e-5  # tf32
    assert (out.double() - a.double() @ b.double()).abs().max() < tolerance
