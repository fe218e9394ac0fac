"""linear_preference_loss on a GPU, executed: its kernels between torch's products."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import ptxsim
import ptxsim_triton
import pytest
import torch
from simulated import poison, simulated

import fastpref
from fastpref._logps.pair_epilogue import PairResults, write_pairs
from fastpref._logps.pairs import Family, PairData


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


def given_to(case: str, dtype: torch.dtype) -> tuple[dict, tuple, dict]:
    trained, reference, options = CASES[case]
    options = {"loss": "rdpo", **options}
    forms = {"ref_hidden", "ref_token_logps", "ref_logps"} - {reference}
    unused = {"rating_gap"} if options["loss"] in ("sigmoid", "hinge") else set()
    return {name: t for name, t in make(dtype).items() if name not in forms | unused}, trained, options


def check(kernels: Kernels, case: str, dtype: torch.dtype) -> None:
    """Against float64."""
    given, trained, options = given_to(case, dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(kernels, case, dtype):
    check(kernels, case, dtype)


@pytest.mark.parametrize("order", range(3))
def test_the_epilogue_of_long_sequences(kernels, order):
    """Several rounds of a block's loops, and rows of no sequence, in different orders of execution."""
    sizes = torch.tensor([1500, 0, 260, 3001])
    bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)) + 5
    rows = int(bounds[-1]) + 7
    labels = torch.where(torch.rand(rows) < 0.2, -100, 1)
    logps, ref_logps = -torch.rand(2, rows)
    data = PairData(ref_logps, None, torch.tensor([0.4, math.nan]), None)
    scale, family = torch.tensor([0.5, 0.7]), Family([0.1, 1.0, 0.0, 0.3, 0.1, 0.2, 0.5], True)

    leaf = logps.double().requires_grad_()
    ratios = torch.where(labels == -100, 0.0, leaf - ref_logps)
    sums = torch.stack([ratios[bounds[s] : bounds[s + 1]].sum() for s in range(4)])
    L, g = 0.1 * (sums[:2] - sums[2:]), torch.tensor([0.4, 0.0])
    square = 0.15 * (L - 0.1 - 0.2 * g) ** 2 * torch.tensor([1.0, 0.0])
    losses = torch.nn.functional.softplus(-(L - 0.5 * g)) + square
    (true_gradient,) = torch.autograd.grad((losses * scale).sum(), leaf)

    out = PairResults.empty(scale)
    for tensor in out:
        poison(tensor)
    written = {f"out{i}": (tensor, False) for i, tensor in enumerate(out)}
    read = {"logps": logps, "ref": ref_logps, "labels": labels, "bounds": bounds, "gap": data.rating_gap}
    order_of_execution = ptxsim.options(seed=order, quantum=order, resident=1 + order, ulp=2)
    with order_of_execution, simulated(read | written | {"scale": scale}, compiler=kernels.compiler):
        gradient = write_pairs(out, (0, 2), logps, labels, bounds, data, scale, -100, family, kernels.backend)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.losses.double(), losses.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logratios.double(), sums.detach(), rtol=1e-6, atol=1e-6)
    counts = [(labels[bounds[s] : bounds[s + 1]] != -100).sum() for s in range(4)]
    assert torch.equal(out.lengths, torch.stack(counts))


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
        f"OUT OF BOUNDS|{RACE}",
    ),
    "the other side's bounds": ("tl.num_programs(0) + program, rows", "program, rows", "wrong"),
    "tokens beyond the sequence": (
        "inside = token < length\n            counts",
        "inside = token < length + 1000\n            counts",
        "OUT OF BOUNDS",
    ),
    "sums of the next sequence": (
        "tl.store(ratios_ptr + sequence, ratio)",
        "tl.store(ratios_ptr + sequence + 1, ratio)",
        f"OUT OF BOUNDS|{RACE}",
    ),
    "the group's pair for the batch's": ("pair = first_pair + program", "pair = program", f"wrong|{RACE}"),
}


@pytest.mark.parametrize("bug", TRITON_BUGS)
def test_planted_in_triton(triton, tmp_path, bug):
    old, new, said = TRITON_BUGS[bug]
    changed = Kernels("triton", ptxsim_triton.Planted(triton.compiler, tmp_path, old, new))
    with pytest.raises((ptxsim.Findings, AssertionError)) as found:
        check(changed, "two-groups", torch.float32)
    assert re.search(said, f"{'wrong: ' * (found.type is AssertionError)}{found.value}"), found.value
