"""The linear half on the simulator: fastpref's own functions down their CUDA paths, products by torch, every access of
the kernels between them checked; and the kernel that scales a gradient."""

import ptxsim
import pytest
import torch
from forced_cuda import devices
from ptxsim_triton import Kernel
from simulated import simulated

import fastpref
from fastpref._logps import scaled as scaled_module
from fastpref._logps.scaled import scaled

PAIRS, TOKENS, VOCAB, WIDTH = 3, 5, 83, 16  # rows of any alignment
ACTIVE = 4

DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def inputs(dtype):
    labels = torch.randint(0, VOCAB, (2 * PAIRS, TOKENS))
    labels[:, : TOKENS - ACTIVE] = -100
    labels[1] = -100
    return {
        "hidden": torch.randn(2 * PAIRS, TOKENS, WIDTH).to(dtype),
        "weight": (torch.randn(VOCAB, WIDTH) / WIDTH**0.5).to(dtype),
        "labels": labels,
        "ref_token_logps": -torch.rand(2 * PAIRS, TOKENS),
        "rating_gap": torch.tensor([0.4, torch.nan, -1.0]),
    }


def pairs(given, **options):
    hidden, weight, labels = (given[name] for name in ("hidden", "weight", "labels"))
    rest = {name: given[name] for name in ("ref_token_logps", "rating_gap")}
    return fastpref.linear_preference_loss(hidden, weight, labels, loss="rdpo", **rest, **options).loss


def tokens(given, **options):
    return fastpref.linear_token_logps(given["hidden"], given["weight"], given["labels"], **options).sum()


def run(call, given, trained, **options):
    leaves = {name: given[name].detach().requires_grad_() for name in trained}
    loss = call({**given, **leaves}, **options)
    if trained:
        loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


TRAINED = {"score": (), "frozen": ("hidden",), "trained": ("hidden", "weight")}
HALF = {"max_tile_bytes": PAIRS * ACTIVE * VOCAB * 6}


@dtypes
@pytest.mark.parametrize(
    "options", [{}, HALF, {"max_active_tokens": 2 * PAIRS * ACTIVE}], ids=["one", "tiles", "capacity"]
)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("call", [pairs, tokens])
def test_matches_float64(core, call, trained, options, dtype):
    given = inputs(dtype)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
    truth, true_gradients = run(call, wide, TRAINED[trained])
    with ptxsim.options(ulp=2), simulated(given):
        loss, gradients = run(call, given, TRAINED[trained], **options, backend="native")
    torch.testing.assert_close(loss.double(), truth.double(), rtol=1e-5, atol=1e-5)
    few = 1e-5 if dtype == torch.float32 else 2**-7
    for name, gradient in gradients.items():
        size = true_gradients[name].abs().max()
        torch.testing.assert_close(gradient.double() / size, true_gradients[name] / size, rtol=few, atol=few)


# ---- the gradient's factor ----


@pytest.fixture
def scale(triton_compiler, monkeypatch):
    kernel = Kernel(triton_compiler, scaled_module._scale_kernel, {"factor_ptr"})
    monkeypatch.setattr(scaled_module, "_scale_kernel", kernel)
    monkeypatch.setattr(scaled_module, "_PROGRAMS", 3)

    def run(gradient, factor):
        with devices(lambda place: "cuda", lambda kernel, grid, *args, **options: kernel[grid](*args, **options)):
            return scaled(gradient, torch.tensor(factor))

    return run


@dtypes
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("blocks", [0, 1, 7], ids=str)
def test_scaled(scale, dtype, offset, blocks):
    block = scaled_module._WARPS * 32 * scaled_module._THREAD_BYTES // dtype.itemsize
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
