"""A kernel may not be less accurate than plain PyTorch in the same dtype; truth is in float64."""

import torch


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def assert_no_worse(kernel, same_dtype, truth, dtype, what=""):
    """max|kernel - truth| <= 1.5 max|same_dtype - truth| + 2 u(dtype) max|truth|, for each row of [rows, ...].

    PyTorch's own error is taken relative to the row's largest value and over all rows: one row where it happens to
    round exactly says nothing. Non-finite values must agree in place, kind and sign.
    """
    kernel, same_dtype, truth = (t.detach().cpu().double().reshape(t.shape[0], -1) for t in (kernel, same_dtype, truth))
    finite = truth.isfinite()
    torch.testing.assert_close(
        torch.where(finite, 0.0, kernel), torch.where(finite, 0.0, truth), rtol=0, atol=0, equal_nan=True
    )
    if not truth.numel():
        return

    def largest(t):
        return torch.where(finite, t, 0.0).abs().amax(-1)

    size = largest(truth)
    same = torch.where(size > 0, largest(same_dtype - truth) / size, 0.0).max()
    tiny = torch.finfo(dtype).smallest_normal  # results below it may be flushed
    error, allowed = largest(kernel - truth), (1.5 * same + 2 * unit_roundoff(dtype)) * size + tiny
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{what}: row {worst} is off by {error[worst]:.3e}, allowed {allowed[worst]:.3e}, "
        f"largest value {size[worst]:.3e}"
    )
