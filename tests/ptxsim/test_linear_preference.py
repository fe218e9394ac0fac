"""linear_preference_loss on a GPU, executed: its kernels between torch's products."""

import math
from collections.abc import Callable
from typing import NamedTuple

import ptxsim
import ptxsim_triton
import pytest
import torch
from simulated import simulated

import fastpref


class Kernels(NamedTuple):
    """Whose kernels run between the products."""

    backend: str
    compiler: Callable | None  # of Triton's


@pytest.fixture
def native(core):
    return Kernels("native", None)


@pytest.fixture
def triton(triton_compiler):
    return Kernels("triton", triton_compiler)


@pytest.fixture(params=["native", "triton"])
def kernels(request):
    return request.getfixturevalue(request.param)


PAIRS, TOKENS, VOCAB, WIDTH = 3, 7, 301, 16


def make(dtype=torch.float32) -> dict:
    labels = torch.randint(0, VOCAB, (2 * PAIRS, TOKENS))
    labels[torch.rand(labels.shape) < 0.4] = -100
    labels[1] = -100  # a sequence without a token that counts
    return {
        "hidden": torch.randn(2 * PAIRS, TOKENS, WIDTH).to(dtype),
        "weight": (torch.randn(VOCAB, WIDTH) / 2).to(dtype),
        "labels": labels,
        "ref_hidden": torch.randn(2 * PAIRS, TOKENS, WIDTH).to(dtype),
        "ref_token_logps": -3 * torch.rand(labels.shape),
        "ref_logps": -9 * torch.rand(2 * PAIRS),
        "rating_gap": torch.tensor([0.5, math.nan, -1.0]),
        "pair_weights": torch.rand(PAIRS) + 0.5,
    }


def run(given: dict, trained, kernels: Kernels | None = None, **options):
    """By these kernels; without any as the CPU computes it."""
    given = {name: t.detach().clone() for name, t in given.items()}
    leaves = [given[name].requires_grad_() for name in trained]

    def step():
        tensors = [given[name] for name in ("hidden", "weight", "labels")]
        named = {name: t for name, t in given.items() if name not in ("hidden", "weight", "labels")}
        output = fastpref.linear_preference_loss(*tensors, **named, **options)
        return output, torch.autograd.grad(output.loss, leaves, torch.full_like(output.loss, 1.5)) if leaves else ()

    if kernels is None:
        return step()
    options["backend"] = kernels.backend
    with simulated({name: t.detach() for name, t in given.items()}, compiler=kernels.compiler):
        return step()


CASES = {
    "trained": (("hidden", "weight"), "ref_token_logps", {}),
    "two-groups": (("hidden", "weight"), "ref_logps", {"max_tile_bytes": 13 * VOCAB * 4}),
    "recomputed": (("hidden", "weight"), "ref_token_logps", {"max_tile_bytes": 3 * VOCAB * 4}),
    "capacity": (("hidden", "weight"), "ref_token_logps", {"max_active_tokens": 40}),
    "ref_hidden": (("hidden", "weight"), "ref_hidden", {"stats": ("entropy", "top1")}),
    "frozen": (("hidden",), "ref_token_logps", {"softcap": 20.0}),
    "score": ((), "ref_hidden", {"loss": "sigmoid"}),
    "other-loss": (("hidden", "weight"), "ref_token_logps", {"loss": "hinge"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(kernels, case, dtype):
    trained, reference, options = CASES[case]
    options = {"loss": "rdpo", **options}
    given = make(dtype)
    forms = {"ref_hidden", "ref_token_logps", "ref_logps"} - {reference}
    unused = {"rating_gap"} if options["loss"] in ("sigmoid", "hinge") else set()
    given = {name: t for name, t in given.items() if name not in forms | unused}
    exact = {name: t.double() if t.dtype.is_floating_point else t for name, t in given.items()}
    found, gradients = run(given, trained, kernels, **options)
    expected, true_gradients = run(exact, trained, **options)
    few = 1e-4 if dtype == torch.float32 else 2e-2
    for name in ("loss", "chosen_logps", "rejected_logps", "margins", "chosen_rewards"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-4, atol=1e-4)
    for name, value in expected.stats._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(found.stats, name).double(), value.double(), rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=few, atol=few * float(b.abs().max()))


RACE = "RACE in (global|shared)"
BUGS = {
    "no barrier": ("  __syncthreads();\n  const float grad = side", "  const float grad = side", RACE),
    "the other side's bounds": ("bound(side * group + p + 1);", "bound((1 - side) * group + p + 1);", RACE),
    "a bound that nothing limits": (
        "return min(max(a.bounds[sequence], int64_t(0)), a.rows); };",
        "return a.bounds[sequence] + 1000; };",
        "OUT OF BOUNDS",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted(native, planted, bug):
    old, new, said = BUGS[bug]
    given = {name: t for name, t in make().items() if name not in ("ref_hidden", "ref_logps")}
    options = {"loss": "rdpo", "max_active_tokens": 40}
    with ptxsim.replaced(planted("preference.cu", old, new)), pytest.raises(ptxsim.Findings, match=said):
        run(given, ("hidden", "weight"), native, **options)


TRITON_BUGS = {
    "a gradient for every lane": (
        "tl.where(label == ignore_index, 0.0, grad), mask=inside)",
        "tl.where(label == ignore_index, 0.0, grad))",
        "OUT OF BOUNDS|" + RACE,
    ),
    "the other side's bounds": ("tl.num_programs(0) + program, rows", "program, rows", RACE),
    "a bound that nothing limits": (
        "begin = tl.minimum(tl.maximum(begin, 0), rows)",
        "begin += 1000",
        "OUT OF BOUNDS",
    ),
    "the sums of the next sequence": (
        "tl.store(logps_ptr + sequence, logp.to",
        "tl.store(logps_ptr + sequence + 1, logp.to",
        RACE,
    ),
}


@pytest.mark.parametrize("bug", TRITON_BUGS)
def test_planted_in_triton(triton, tmp_path, bug):
    old, new, said = TRITON_BUGS[bug]
    given = {name: t for name, t in make().items() if name not in ("ref_hidden", "ref_logps")}
    changed = Kernels("triton", ptxsim_triton.Planted(triton.compiler, tmp_path, old, new))
    with pytest.raises(ptxsim.Findings, match=said):
        run(given, ("hidden", "weight"), changed, loss="rdpo", max_active_tokens=40)
