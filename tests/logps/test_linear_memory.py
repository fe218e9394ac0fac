"""What the linear half takes of a GPU's memory, against what plan says; counted on the CPU by device_counts.py."""

import itertools

import pytest
import torch
from device_counts import WORKSPACE_BYTES, Counts, counting, on_device
from forced_cuda import TOTAL_MEMORY, devices
from torch.torch_version import TorchVersion

import fastpref
from fastpref import _native
from fastpref._logps import plan as plan_module
from fastpref._logps import tile

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"),
]

PAIRS, TOKENS, VOCAB, WIDTH = 2, 6, 2003, 96
ACTIVE = 4  # tokens of a sequence that count
TILE = PAIRS * ACTIVE * VOCAB * 6  # of 16-bit inputs: half of the rows that count, and their gradient
TRAINED = {"score": (), "frozen": ("hidden",), "trained": ("hidden", "weight"), "head": ("weight",)}


def step(dtype, trained, pairs, all_count, max_tile_bytes, native=False) -> tuple[Counts, fastpref.Plan, list]:
    """The counts, the plan and the gradients of one call and its backward. native: as in counting."""
    labels = torch.randint(0, VOCAB, (2 * PAIRS, TOKENS))
    if not all_count:
        labels[:, : TOKENS - ACTIVE] = -100
    inputs = torch.randn(2 * PAIRS, TOKENS, WIDTH), torch.randn(VOCAB, WIDTH) / WIDTH**0.5
    ref, upstream = on_device(torch.zeros(2 * PAIRS)), on_device(torch.ones(()))
    hidden, weight, labels = map(on_device, (*(t.to(dtype) for t in inputs), labels))
    options = {"max_tile_bytes": max_tile_bytes}
    with counting():
        leaves = [{"hidden": hidden, "weight": weight}[name].requires_grad_() for name in trained]
    with counting(native) as counts:
        if pairs:
            loss = fastpref.linear_preference_loss(hidden, weight, labels, ref_logps=ref, **options).loss
        else:
            loss = fastpref.linear_token_logps(hidden, weight, labels, **options).sum()
        gradients = torch.autograd.grad(loss, leaves, upstream) if leaves else []
        lengths = [TOKENS if all_count else ACTIVE] * (2 * PAIRS)
        plan = fastpref.plan(
            lengths if pairs else sum(lengths), WIDTH, VOCAB, dtype=dtype, device="meta",
            loss="sigmoid" if pairs else None, hidden_grad="hidden" in trained, weight_grad="weight" in trained,
            total_tokens=2 * PAIRS * TOKENS, **options,
        )  # fmt: skip
    return counts, plan, gradients


CASES = {
    f"{str(dtype).removeprefix('torch.')}-{trained}-{'pairs' if pairs else 'tokens'}-{'tiles' if bytes_ else 'tile'}": (
        dtype, TRAINED[trained], pairs, bytes_,
    )
    for dtype, trained, pairs, bytes_ in (
        *itertools.product((torch.bfloat16,), TRAINED, (True, False), (None, TILE)),
        (torch.float32, "score", True, TILE),
        (torch.float32, "trained", True, TILE),
        (torch.float32, "trained", False, TILE),
        (torch.float16, "trained", True, TILE),
    )
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_plan_counts_every_byte(case):
    dtype, trained, pairs, max_tile_bytes = CASES[case]
    all_count = pairs == (max_tile_bytes is None)
    counts, plan, _ = step(dtype, trained, pairs, all_count, max_tile_bytes)
    assert_equal_bytes(counts, plan)


def assert_equal_bytes(counts: Counts, plan: fastpref.Plan) -> None:
    assert counts.peak <= 1.002 * plan.predicted_bytes + 2048  # vectors of one number per sequence
    assert counts.peak >= 0.998 * plan.predicted_bytes - 2048


@pytest.mark.skipif(_native._core is None, reason="there is no native core")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "tokens"])
@pytest.mark.parametrize("trained", ["score", "trained"])
def test_plan_counts_the_workspace_of_native_kernels(trained, pairs, dtype):
    """It is there with the logits alone: not with 16 bits of gradient beside those of float32, nor with the weight's in
    a backward that forms the logits again."""
    counts, plan, _ = step(dtype, TRAINED[trained], pairs, pairs, None if pairs else TILE, native=True)
    assert_equal_bytes(counts, plan)
    without = step(dtype, TRAINED[trained], pairs, pairs, None if pairs else TILE)[1]
    seen = trained == "score" or (dtype == torch.float32 and pairs)
    assert plan.predicted_bytes - without.predicted_bytes == WORKSPACE_BYTES * seen


@pytest.mark.parametrize("version", ["2.8.0", "2.9.1", "2.10.0"])
def test_a_torch_that_adds_no_wider_product(version, monkeypatch):
    """pytorch#167931: addmm(out_dtype=, out=) raises on torch 2.8 and 2.9."""
    arguments = torch.bfloat16, TRAINED["trained"], True, False, TILE
    torch.manual_seed(0)
    _, _, expected = step(*arguments)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(plan_module, "CUDA_BLOCK_BYTES", 700 * WIDTH * 4)  # three blocks
    torch.manual_seed(0)
    counts, plan, gradients = step(*arguments)
    assert plan.groups == 2
    assert ("addmm" in counts.ops) == (version == "2.10.0")
    assert counts.peak <= 1.002 * plan.predicted_bytes + 2048
    for gradient, true in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.held, true.held)


def test_the_default_tile_is_a_constant_of_the_gpu():
    def rows(vocab, bytes_per_logit):
        return plan_module.rows_of_tile(vocab, bytes_per_logit, torch.device("cuda"), None)

    with devices(lambda place: "cuda", None):
        assert rows(128256, 6) == 2048
        most = TOTAL_MEMORY // 16
        assert rows(1 << 20, 12) == most // (12 << 20) < 2048
        assert rows(2 * most, 1) == 1


def test_a_trained_head_takes_its_gradient_and_little_more():
    """Llama 3's head, 8192 tokens of 16 pairs, bf16: beside the float32 gradient of the weight."""
    lengths, width, vocab = [256] * 32, 4096, 128256

    def beside(**options):
        plan = fastpref.plan(lengths, width, vocab, dtype=torch.bfloat16, device="cuda", loss="rdpo", **options)
        return (plan.predicted_bytes - 4 * width * vocab) / 2**30, plan

    with devices(lambda place: "cuda", None):
        gibibytes, plan = beside()
        assert plan.gemm_passes == 3
        assert plan.tile_rows == 2048
        assert gibibytes <= 1.6
        gibibytes, plan = beside(max_tile_bytes=1 << 29)
        assert plan.gemm_passes == 3
        assert gibibytes <= 1.1


def test_out_of_memory_names_the_tile(monkeypatch):
    def full(shape, dtype, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(tile._native, "empty", full)
    for pairs, bytes_, expected in ((True, 4000, "got 4000"), (False, None, "got None"), (False, 7, "got 7")):
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2.00 GiB\n.*max_tile_bytes") as caught:
            step(torch.float32, TRAINED["trained"], pairs, True, bytes_)
        assert expected in str(caught.value)
