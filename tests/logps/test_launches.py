"""What the public functions of the loss half cost on a GPU beside their time: launches, host reads, uploads.

Counted on the CPU by device_counts.py. Torch's launches are upper bounds: a change that needs fewer lowers them here.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from device_counts import Counted, counted, counting, on_device
from forced_cuda import forced_cuda
from torch import Tensor

import fastpref
from fastpref import _native, losses
from fastpref._logps.token_logps import STATS

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"),
]

native_core = pytest.mark.skipif(_native._core is None, reason="there is no native core")

PAIRS, TOKENS, VOCAB, WIDTH = 2, 4, 37, 16
ACTIVE = 3  # tokens of a sequence that count


class Inputs(NamedTuple):
    logits: Tensor
    labels: Tensor
    ref_logits: Tensor
    ref_token_logps: Tensor
    rating_gap: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    hidden: Tensor
    weight: Tensor


def inputs(dtype: torch.dtype, pairs: int = PAIRS) -> Inputs:
    labels = torch.randint(0, VOCAB, (2 * pairs, TOKENS))
    labels[:, : TOKENS - ACTIVE] = -100
    return Inputs(
        logits=torch.randn(2 * pairs, TOKENS, VOCAB).to(dtype),
        labels=labels,
        ref_logits=torch.randn(2 * pairs, TOKENS, VOCAB).to(dtype),
        ref_token_logps=-torch.rand(2 * pairs, TOKENS),
        rating_gap=torch.rand(pairs),
        cu_seqlens=torch.arange(2 * pairs + 1) * TOKENS,
        lengths=torch.full((2 * pairs,), TOKENS),
        hidden=torch.randn(2 * pairs, TOKENS, WIDTH).to(dtype),
        weight=(torch.randn(VOCAB, WIDTH) / WIDTH**0.5).to(dtype),
    )


def tokens(t: Inputs, **options) -> Tensor:
    found = fastpref.token_logps(t.logits, t.labels, **options)
    return found[0] if isinstance(found, tuple) else found


def tokens_inplace(t: Inputs) -> Tensor:
    return fastpref.token_logps(t.logits.clone(), t.labels, inplace_backward=True)


def linear_tokens(t: Inputs, **options) -> Tensor:
    return fastpref.linear_token_logps(t.hidden, t.weight, t.labels, **options)


def sums(t: Inputs, **options) -> Tensor:
    return fastpref.sequence_logps(t.ref_token_logps, t.labels, **options).sums


def pairs(t: Inputs, loss="sigmoid", reference="ref_token_logps", **options) -> Tensor:
    given = {reference: getattr(t, reference)} if reference else {}
    if loss == "rdpo":
        given["rating_gap"] = t.rating_gap
    return fastpref.preference_loss(t.logits, t.labels, loss=loss, **given, **options).loss


def packed(t: Inputs, **options) -> Tensor:
    rows = t._replace(**{name: getattr(t, name).flatten(0, 1) for name in ("logits", "labels", "ref_token_logps")})
    return pairs(rows, cu_seqlens=t.cu_seqlens, **options)


def linear_pairs(t: Inputs, loss="sigmoid", **options) -> Tensor:
    gap = t.rating_gap if loss in ("rdpo", "mmpo") else None
    reference = {} if "ref_hidden" in options else {"ref_token_logps": t.ref_token_logps}
    return fastpref.linear_preference_loss(
        t.hidden, t.weight, t.labels, loss=loss, rating_gap=gap, **reference, **options
    ).loss


def packed_linear_pairs(t: Inputs, **options) -> Tensor:
    rows = t._replace(**{name: getattr(t, name).flatten(0, 1) for name in ("hidden", "labels", "ref_token_logps")})
    return linear_pairs(rows, cu_seqlens=t.cu_seqlens, **options)


class Case(NamedTuple):
    call: Callable[[Inputs], Tensor]
    trained: tuple[str, ...]
    forward: Counted
    backward: Counted | None = None
    dtype: torch.dtype = torch.float32
    on_host: tuple[str, ...] = ()  # inputs that stay there


LOGITS, FROZEN, TRAINED = ("logits",), ("hidden",), ("hidden", "weight")
ROWS = PAIRS * ACTIVE  # half of those that count
FUSED = Counted(3, 0, 0), Counted(1, 0, 0)  # by Triton, whatever the batch is; the core's own: ptxsim/
CASES = {
    "token_logps": Case(tokens, LOGITS, Counted(1, 0, 0), Counted(1, 0, 0)),
    "token_logps-stats": Case(lambda t: tokens(t, stats=STATS), LOGITS, Counted(1, 0, 0), Counted(1, 0, 0)),
    "token_logps-shift": Case(lambda t: tokens(t, shift=True), LOGITS, Counted(1, 0, 2), Counted(1, 0, 0)),
    "token_logps-inplace": Case(tokens_inplace, LOGITS, Counted(1, 0, 1), Counted(1, 0, 0)),
    "sequence_logps": Case(sums, ("ref_token_logps",), Counted(0, 0, 7), Counted(0, 0, 4)),
    "preference": Case(pairs, LOGITS, *FUSED),
    "preference-ref_logits": Case(lambda t: pairs(t, reference="ref_logits"), LOGITS, *FUSED),
    "preference-rdpo": Case(lambda t: pairs(t, "rdpo"), LOGITS, *FUSED),
    "preference-none": Case(lambda t: pairs(t, "rdpo", reduction="none", shift=True), LOGITS, *FUSED),
    "preference-lengths": Case(lambda t: pairs(t, lengths=t.lengths), LOGITS, *FUSED),
    "preference-simpo": Case(lambda t: pairs(t, "simpo", None), LOGITS, Counted(3, 0, 19), Counted(1, 0, 9)),
    "preference-wpo": Case(lambda t: pairs(t, "wpo"), LOGITS, Counted(3, 0, 22), Counted(1, 0, 8)),
    "preference-ld_dpo": Case(lambda t: pairs(t, "ld_dpo"), LOGITS, Counted(4, 0, 17), Counted(1, 0, 11)),
    "preference-stats": Case(lambda t: pairs(t, stats=STATS), LOGITS, *FUSED),
    "preference-packed": Case(packed, LOGITS, *FUSED),
    "preference-packed-shift": Case(lambda t: packed(t, shift=True), LOGITS, *FUSED),
    "linear_tokens-score": Case(linear_tokens, (), Counted(1, 1, 13, reads=1)),
    "linear_tokens-frozen": Case(linear_tokens, FROZEN, Counted(2, 2, 16, reads=1), Counted(0, 0, 4)),
    "linear_tokens-trained": Case(linear_tokens, TRAINED, Counted(1, 1, 13, reads=1), Counted(1, 3, 8)),
    "linear_pairs-score": Case(linear_pairs, (), Counted(2, 1, 26, reads=1)),
    "linear_pairs-score-capacity": Case(lambda t: linear_pairs(t, max_active_tokens=3 * ROWS), (), Counted(2, 1, 37)),
    "linear_pairs-score-lengths": Case(
        lambda t: linear_pairs(t, lengths=t.lengths), (), Counted(2, 1, 25, uploads=1), on_host=("lengths",)
    ),
    "linear_pairs-frozen": Case(linear_pairs, FROZEN, Counted(3, 2, 29, reads=1), Counted(0, 0, 5)),
    "linear_pairs-frozen-rdpo": Case(
        lambda t: linear_pairs(t, "rdpo"), FROZEN, Counted(3, 2, 30, reads=1), Counted(0, 0, 5)
    ),
    "linear_pairs-trained": Case(linear_pairs, TRAINED, Counted(3, 3, 26, reads=1), Counted(2, 0, 0)),
    "linear_pairs-trained-rdpo": Case(
        lambda t: linear_pairs(t, "rdpo"), TRAINED, Counted(3, 3, 27, reads=1), Counted(2, 0, 0)
    ),
    "linear_pairs-trained-rdpo-2": Case(
        lambda t: linear_pairs(t, "rdpo", max_tile_bytes=ROWS * VOCAB * 4),
        TRAINED,
        Counted(6, 6, 37, reads=1),
        Counted(2, 0, 0),
    ),
    "linear_pairs-trained-capacity": Case(
        lambda t: linear_pairs(t, max_active_tokens=3 * ROWS), TRAINED, Counted(3, 3, 39), Counted(2, 0, 0)
    ),
    "linear_pairs-trained-lengths": Case(
        lambda t: linear_pairs(t, lengths=t.lengths),
        TRAINED,
        Counted(3, 3, 20, uploads=1),
        Counted(2, 0, 0),
        on_host=("lengths",),
    ),
    "linear_pairs-trained-packed": Case(
        packed_linear_pairs, TRAINED, Counted(3, 3, 17, uploads=1), Counted(2, 0, 0), on_host=("cu_seqlens",)
    ),
    "linear_pairs-trained-capacity-lengths": Case(
        lambda t: linear_pairs(t, lengths=t.lengths, max_active_tokens=3 * ROWS),
        TRAINED,
        Counted(3, 3, 43, uploads=1),
        Counted(2, 0, 0),
        on_host=("lengths",),
    ),
    "linear_pairs-trained-capacity-packed": Case(
        lambda t: packed_linear_pairs(t, max_active_tokens=3 * ROWS),
        TRAINED,
        Counted(3, 3, 40, uploads=1),
        Counted(2, 0, 0),
        on_host=("cu_seqlens",),
    ),
    "linear_pairs-trained-ref_hidden": Case(
        lambda t: linear_pairs(t, ref_hidden=t.hidden), TRAINED, Counted(4, 4, 26, reads=1), Counted(2, 0, 0)
    ),
    "linear_pairs-trained-bf16": Case(
        linear_pairs, TRAINED, Counted(3, 3, 26, reads=1), Counted(2, 0, 0), torch.bfloat16
    ),
    "linear_pairs-trained-bf16-2": Case(
        lambda t: linear_pairs(t, max_tile_bytes=ROWS * VOCAB * 6),
        TRAINED,
        Counted(6, 6, 37, reads=1),
        Counted(2, 0, 0),
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_launches(case):
    call, trained, forward, backward, dtype, on_host = CASES[case]
    t = inputs(dtype)
    there = Inputs(*(v if name in on_host else on_device(v) for name, v in t._asdict().items()))
    with counting():
        leaves = {name: getattr(there, name).requires_grad_() for name in trained}
    found, out = counted(lambda: call(there._replace(**leaves)))
    assert_no_more(found, forward)
    ours = t._replace(**{name: getattr(t, name).clone().requires_grad_() for name in trained})
    expected = call(ours)
    torch.testing.assert_close(out.held, expected, rtol=1e-5, atol=1e-5)
    if trained:
        upstream = torch.ones_like(expected)
        found, gradients = counted(lambda: torch.autograd.grad(out, list(leaves.values()), on_device(upstream)))
        assert_no_more(found, backward)
        expected = torch.autograd.grad(expected, [getattr(ours, name) for name in trained], upstream)
        few = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close([g.held for g in gradients], list(expected), rtol=few, atol=few)


def assert_no_more(found: Counted, most: Counted) -> None:
    assert found.others <= most.others, f"{found}, {most} allowed"
    assert found == most._replace(others=found.others), f"{found}, {most} expected"


def cost_of_a_group(loss: str, native: bool) -> Counted:
    """What two more groups of pairs cost, beside what any number of them costs; half of it."""
    t = Inputs(*map(on_device, inputs(torch.bfloat16, pairs=4)))

    def cost(groups: int) -> Counted:
        with counting():
            leaves = {name: getattr(t, name).detach().requires_grad_() for name in TRAINED}
        tile = 4 // groups * 2 * ACTIVE * VOCAB * 6
        return counted(lambda: linear_pairs(t._replace(**leaves), loss, max_tile_bytes=tile), native)[0]

    two, four = cost(2), cost(4)
    assert two[3:] == four[3:] == (1, 0, 0)
    return Counted(*((b - a) / 2 for a, b in zip(two, four, strict=True)))


@pytest.mark.parametrize("loss, most", [("hinge", 20), ("mmpo", 38)])
def test_a_group_of_pairs_with_its_loss_on_vectors(loss, most):
    """Three products, a fold forward and one backward, and torch."""
    assert_no_more(cost_of_a_group(loss, native=False), Counted(2, 3, most))


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=native_core)], ids=["triton", "native"])
@pytest.mark.parametrize("loss", ["sigmoid", "rdpo"])
def test_a_group_of_pairs_with_its_loss_in_one_launch(loss, native):
    """The epilogue is the third kernel; torch gathers the rows, shifts their bounds, zeroes the gradient of the tokens,
    some of which may be of no sequence, and puts the hidden gradient back. Beside the products and the two folds a
    group costs five launches."""
    assert_no_more(cost_of_a_group(loss, native), Counted(3, 3, 4))


NATIVE_CASES = {
    "token_logps": Case(lambda t: tokens(t, stats=STATS, shift=True), LOGITS, Counted(1, 0, 2), Counted(1, 0, 0)),
    "preference": Case(lambda t: pairs(t, stats=STATS, shift=True), LOGITS, Counted(1, 0, 0), Counted(1, 0, 0)),
    "preference-ref_logits": Case(
        lambda t: pairs(t, reference="ref_logits"), LOGITS, Counted(1, 0, 0), Counted(1, 0, 0)
    ),
    "preference-packed": Case(lambda t: packed(t, loss="rdpo", shift=True), LOGITS, Counted(1, 0, 0), Counted(1, 0, 0)),
    "preference-wpo": Case(lambda t: pairs(t, "wpo"), LOGITS, Counted(1, 0, 22), Counted(1, 0, 8)),
    "preference-ld_dpo": Case(lambda t: pairs(t, "ld_dpo"), LOGITS, Counted(1, 0, 17), Counted(1, 0, 11)),
    "linear_pairs-score": Case(linear_pairs, (), Counted(2, 1, 26, reads=1)),
    "linear_pairs-frozen": Case(linear_pairs, FROZEN, Counted(3, 2, 29, reads=1), Counted(0, 0, 5)),
    "linear_pairs-trained": Case(
        lambda t: linear_pairs(t, "rdpo"), TRAINED, Counted(3, 3, 27, reads=1), Counted(2, 0, 0)
    ),
    "linear_pairs-trained-ref_hidden": Case(
        lambda t: linear_pairs(t, "rdpo", ref_hidden=t.hidden), TRAINED, Counted(4, 4, 27, reads=1), Counted(2, 0, 0)
    ),
    "linear_pairs-trained-capacity": Case(
        lambda t: linear_pairs(t, "rdpo", max_active_tokens=3 * ROWS), TRAINED, Counted(3, 3, 40), Counted(2, 0, 0)
    ),
}


@native_core
@pytest.mark.parametrize("case", NATIVE_CASES)
def test_launches_with_native_kernels(case):
    """Their results are nobody's: tests/ptxsim executes them."""
    call, trained, forward, backward, dtype, _ = NATIVE_CASES[case]
    t = Inputs(*map(on_device, inputs(dtype)))
    with counting():
        leaves = {name: getattr(t, name).requires_grad_() for name in trained}
    found, out = counted(lambda: call(t._replace(**leaves)), native=True)
    assert_no_more(found, forward)
    if trained:
        upstream = on_device(torch.ones(out.shape))
        found, _ = counted(lambda: torch.autograd.grad(out, list(leaves.values()), upstream), native=True)
        assert_no_more(found, backward)


MOST_FORWARD, MOST_BACKWARD = 6, 4  # kernels


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=native_core)])
@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_every_loss_is_a_few_kernels_and_torch_on_vectors(loss, native):
    t, scores = Inputs(*map(on_device, inputs(torch.float32))), on_device(torch.rand(2 * PAIRS))
    with counting():
        logits = t.logits.requires_grad_()
    with counting(native) as forward:
        out = fastpref.preference_loss(
            logits, t.labels, ref_token_logps=t.ref_token_logps, loss=loss, rating_gap=t.rating_gap, scores=scores,
            shift=True,
        )  # fmt: skip
    with counting(native) as backward:
        torch.autograd.grad(out.loss, logits, on_device(torch.ones(())))
    for counts, most in ((forward, MOST_FORWARD), (backward, MOST_BACKWARD)):
        assert 0 < counts.counted().kernels <= most
        assert counts.widest <= 2 * PAIRS, counts.ops


def test_plan_launches_nothing():
    found, plan = counted(lambda: fastpref.plan([100, 80], 64, 1000, loss="sigmoid", device="meta"))
    assert found == Counted(0, 0, 0)
    assert plan.kind == "pair_resident"


# ---- the counter ----


def test_the_counter_counts():
    x, host = on_device(torch.ones(3, 4)), torch.ones(3, 4)

    def counts(call):
        return counted(call)[0]

    assert counts(lambda: x.view(2, 6).t()[1:]) == Counted(0, 0, 0)
    assert counts(lambda: x + 1) == Counted(0, 0, 1)
    assert counts(lambda: x.masked_fill(x > 0, 0)) == Counted(0, 0, 3)
    assert counts(lambda: torch.zeros(3, device=x.device)) == Counted(0, 0, 1)
    assert counts(lambda: torch.empty(3, device=x.device)) == Counted(0, 0, 0)
    assert counts(lambda: host + 1) == Counted(0, 0, 0)
    assert counts(lambda: x @ x.t()) == Counted(0, 1, 0)
    assert counts(lambda: x.sum().item()) == Counted(0, 0, 1, reads=1)
    assert counts(lambda: bool((x > 0).any())) == Counted(0, 0, 2, reads=1)
    assert counts(lambda: x[x > 0]) == Counted(0, 0, 1, reads=1)
    assert counts(lambda: x.tolist()) == counts(x.cpu) == Counted(0, 0, 0, reads=1)
    assert counts(lambda: host.to(x.device)) == counts(lambda: x.copy_(host)) == Counted(0, 0, 0, uploads=1, waits=1)
    assert counts(lambda: host.to(x.device, non_blocking=True)) == Counted(0, 0, 0, uploads=1)
    assert counts(lambda: x.copy_(host, non_blocking=True)) == Counted(0, 0, 0, uploads=1)
    for mixed in (lambda: x + host, lambda: torch.cat([x, host]), lambda: torch.where(host > 0, x, x)):
        with counting(), pytest.raises(RuntimeError, match="mixes tensors"):
            mixed()


def test_a_read_names_its_place():
    t = Inputs(*map(on_device, inputs(torch.float32)))
    with counting() as counts:
        linear_tokens(t)
    assert [where.partition(" at ")[2].partition(":")[0] for where in counts.reads] == ["_logps/tile.py"]


# ---- CPU tensors taken for CUDA's ----


GATHER, SCATTER = "_token_logps_fwd_kernel", "_token_logps_bwd_kernel"


@pytest.mark.parametrize(
    "call, launches",
    [
        (packed, [GATHER, "_sequence_kernel", "_batch_kernel", SCATTER]),
        (linear_pairs, [GATHER, "_pair_kernel", SCATTER, "_scale_kernel", "_scale_kernel"]),
    ],
    ids=["preference", "linear_pairs"],
)
def test_forced_cuda_registers_what_a_kernel_is_handed(call, launches):
    t = inputs(torch.float32)
    ours = t._replace(**{name: getattr(t, name).clone().requires_grad_() for name in ("logits", *TRAINED)})
    expected = call(ours)
    expected.backward()
    known = {tensor.untyped_storage().data_ptr() for tensor in t}
    launched = []

    def launch(kernel, grid, *args, **options):
        strange = [a.shape for a in args if isinstance(a, Tensor) and a.untyped_storage().data_ptr() not in known]
        assert not strange, kernel.fn.__name__
        launched.append(kernel.fn.__name__)
        kernel[grid](*args, **options)

    forced = t._replace(**{name: getattr(t, name).requires_grad_() for name in ("logits", *TRAINED)})
    with forced_cuda(lambda tensor, name: known.add(tensor.untyped_storage().data_ptr()), launch):
        loss = call(forced)
        loss.backward()
    assert launched == launches
    torch.testing.assert_close(loss, expected)
    for name in ("logits", *TRAINED):
        gradient = getattr(forced, name).grad
        assert (gradient is None) == (getattr(ours, name).grad is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, getattr(ours, name).grad, rtol=1e-4, atol=1e-5)
    assert _native.device_kind(loss) == "cpu"
