"""linear_token_logps on a GPU, executed: its kernels between torch's products."""

import ptxsim
import pytest
import torch
from simulated import simulated

import fastpref
from fastpref._logps import token_logps
from fastpref._logps.transform import Transform

pytestmark = pytest.mark.usefixtures("core")

TOKENS, ACTIVE, VOCAB, WIDTH = 30, 24, 83, 16  # rows of any alignment

DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def run(given, trained, **options):
    hidden, weight = (t.detach().requires_grad_(name in trained) for name, t in given.items() if name != "labels")
    logps = fastpref.linear_token_logps(hidden, weight, given["labels"], **options)
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    upstream = torch.linspace(-1, 1, TOKENS, dtype=logps.dtype)
    return logps.detach(), torch.autograd.grad(logps, leaves, upstream) if leaves else ()


TRAINED = {"score": (), "frozen": ("hidden",), "trained": ("hidden", "weight")}
OPTIONS = {
    "one": {},
    "tiles": {"max_tile_bytes": 10 * VOCAB * 6},
    "capacity": {"max_active_tokens": TOKENS - 2},
    "softcap": {"softcap": 20.0},
}


@dtypes
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("trained", TRAINED)
def test_matches_float64(trained, options, dtype):
    labels = torch.randint(0, VOCAB, (TOKENS,))
    labels[torch.randperm(TOKENS)[ACTIVE:]] = -100
    given = {"hidden": torch.randn(TOKENS, WIDTH), "weight": torch.randn(VOCAB, WIDTH) / WIDTH**0.5}
    given = {name: t.to(dtype) for name, t in given.items()} | {"labels": labels}
    exact = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
    options = OPTIONS[options]
    expected, true_gradients = run(exact, TRAINED[trained], **options)
    with ptxsim.options(ulp=2), simulated(given):
        logps, gradients = run(given, TRAINED[trained], **options, backend="native")
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    few = 1e-5 if dtype == torch.float32 else 2**-7
    for gradient, true in zip(gradients, true_gradients, strict=True):
        size = true.abs().max()
        torch.testing.assert_close(gradient.double() / size, true / size, rtol=few, atol=few)


@pytest.mark.parametrize("stats", [False, True])
@dtypes
def test_the_workspace_that_plan_counts_is_what_a_tile_takes(core, dtype, stats):
    for rows, vocab in ((1, 5), (33, 83), (40, 9001)):
        logits, labels = torch.empty(1, rows, vocab, dtype=dtype), torch.zeros(1, rows, dtype=torch.long)
        _outputs, args = token_logps.native_forward(logits, labels, Transform(), stats)
        expected = core.token_logps_workspace_cuda(args)
        assert token_logps.native_workspace(rows, vocab, dtype, stats) == expected > 0
