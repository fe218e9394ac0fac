"""What each plan of linear_preference_loss costs, what a call may not do, and its citizenship of torch."""

import math
from functools import partial

import pytest
import torch
from forced_cuda import devices
from linear_preference_cases import (
    BUDGETS,
    HEAD,
    PLANS,
    Batch,
    assert_gradients_no_worse,
    assert_same,
    chosen_plan,
    coupled,
    head_options,
    leaves,
    make,
    pack,
    plain,
    plans,
    run,
    separable,
    shared_batch,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastpref
from fastpref._logps import tile
from fastpref._logps.sequences import rising
from fastpref._logps.token_logps import STATS

# ---- what a call may not do ----


@plans
def test_a_second_backward_is_refused(which):
    batch = make()
    options = chosen_plan(which)
    for retain in (False, True):
        leaf = leaves(batch, options["trained"], options["used"])
        out = fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, reduction=options["reduction"], **head_options(leaf),
            **batch.reference,
        )  # fmt: skip
        out.loss.sum().backward(retain_graph=retain)
        with pytest.raises(RuntimeError):
            out.loss.sum().backward()


@plans
def test_double_backward_is_refused(which):
    batch = make()
    options = chosen_plan(which)
    leaf = leaves(batch, options["trained"], options["used"])
    out = fastpref.linear_preference_loss(
        leaf["hidden"], leaf["weight"], batch.labels, reduction=options["reduction"], **head_options(leaf),
        **batch.reference,
    )  # fmt: skip
    name = options["trained"][0]
    (gradient,) = torch.autograd.grad(out.loss.sum(), leaf[name], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


# ---- bounds: memory, products, host copies ----

_FIRST_OPERAND = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1,
                  "aten::baddbmm_": 1}  # fmt: skip


class Cost:
    """FLOPs of the matrix products inside a block, and the largest sum of bytes allocated in it and not yet freed."""

    def __enter__(self):
        self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *raised):
        self._profile.__exit__(*raised)
        self.flops = 0
        for event in self._profile.events():
            if event.name in _FIRST_OPERAND:
                first, second = event.input_shapes[_FIRST_OPERAND[event.name] :][:2]
                self.flops += 2 * math.prod(first) * second[-1]
        held = self.peak = 0
        for event in _in_order(self._profile.profiler.kineto_results.experimental_event_tree()):
            held += getattr(event.typed[1], "alloc_size", 0)
            self.peak = max(self.peak, held)


def _in_order(events):
    for event in events:
        yield event
        yield from _in_order(event.children)


TOKENS, WIDTH, VOCAB = 128, 128, 8000


def cost_batch(pairs=4, tokens=TOKENS, width=WIDTH, vocab=VOCAB, dtype=torch.float32):
    """Half of the positions are masked, as a prompt is."""
    batch = make(pairs, tokens, width, vocab, dtype, ignored=0)
    batch.labels[:, : tokens // 2] = -100
    batch.labels[:pairs, -tokens // 8 :] = -100  # and the chosen answers are shorter
    return batch, (batch.labels != -100).sum(-1).tolist()


def measure(batch, trained, **options):
    leaf = leaves(batch, trained)
    reference = {"ref_logps": torch.zeros(batch.labels.shape[0]), "beta": 1e-3}  # no saturated pair: denormals are slow
    with Cost() as cost:
        out = fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, **reference, **head_options(leaf), **options
        )
        if trained:
            out.loss.sum().backward()
    return cost


def predict(batch, lengths, trained, max_tile_bytes=None, loss="sigmoid", reduction="mean"):
    return fastpref.plan(
        lengths, batch.weight.shape[1], batch.weight.shape[0], dtype=batch.hidden.dtype, loss=loss,
        reduction=reduction, hidden_grad="hidden" in trained, weight_grad="weight" in trained,
        bias_grad="bias" in trained, total_tokens=batch.labels.numel(), max_tile_bytes=max_tile_bytes,
    )  # fmt: skip


# trained, options -> kind, passes over hidden x weight
COSTS = {
    "pair_resident": (("hidden", "weight"), {}, "pair_resident", 3),
    "pair_resident-groups": (("hidden", "weight"), {"max_tile_bytes": 6 << 20}, "pair_resident", 3),
    "pairs-recomputed": (("hidden", "weight"), {"max_tile_bytes": 1 << 20}, None, 4),
    "unit": (("hidden",), {}, "unit", 2),
    "unit-tiles": (("hidden",), {"max_tile_bytes": 1 << 20}, "unit", 2),
    "unit-coupled": (("hidden",), {"loss": "aot"}, "unit", 2),
    "unit-none": (("hidden",), {"reduction": "none"}, "unit", 2),
    "recompute-coupled": (("hidden", "weight"), {"loss": "aot"}, "recompute", 4),
    "recompute-none": (("hidden", "weight"), {"reduction": "none"}, "recompute", 4),
    "recompute-tiles": (("hidden", "weight"), {"loss": "aot", "max_tile_bytes": 1 << 20}, "recompute", 4),
    "weight-only": (("weight",), {}, "pair_resident", 2),
    "score": ((), {}, "score", 1),
    "score-tiles": ((), {"max_tile_bytes": 1 << 20}, "score", 1),
}
costs = pytest.mark.parametrize("case", COSTS)


@costs
def test_products_and_memory_are_those_of_the_plan(case):
    trained, options, kind, passes = COSTS[case]
    batch, lengths = cost_batch()
    plan = predict(batch, lengths, trained, **options)
    assert kind in (None, plan.kind)
    assert plan.gemm_passes == passes
    cost = measure(batch, trained, **options)
    active = sum(lengths)
    assert cost.flops / (2 * active * WIDTH * VOCAB) == pytest.approx(passes, rel=0.05)  # and no ignored token
    assert abs(cost.peak - plan.predicted_bytes) <= 0.1 * plan.predicted_bytes + (1 << 19), (cost.peak, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["pair_resident", "unit", "recompute-coupled", "score"])
def test_memory_of_half_precision(case, dtype):
    trained, options, _, _ = COSTS[case]
    batch, lengths = cost_batch(dtype=dtype)
    plan = predict(batch, lengths, trained, **options)
    cost = measure(batch, trained, **options)
    assert abs(cost.peak - plan.predicted_bytes) <= 0.1 * plan.predicted_bytes + (1 << 19), (cost.peak, plan)


def test_a_reference_costs_one_pass_more():
    batch, lengths = cost_batch()
    for trained, passes in ((("hidden", "weight"), 3), (("hidden",), 2)):
        leaf = leaves(batch, trained)
        with Cost() as cost:
            out = fastpref.linear_preference_loss(leaf["hidden"], leaf["weight"], batch.labels, **batch.reference)
            out.loss.backward()
        assert cost.flops / (2 * sum(lengths) * WIDTH * VOCAB) == pytest.approx(passes + 1, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_takes_little_beyond_the_gradient(dtype, trained):
    """32,000 x 512 in fp32 are 65.5 MB; the logits of the active tokens alone would be 118 MB."""
    batch, _ = cost_batch(4, 256, 512, 32000, dtype)
    cost = measure(batch, trained)
    gradient = batch.weight.nbytes if "weight" in trained else 0
    assert cost.peak - gradient <= 100e6


def test_nothing_is_held_after_the_backward():
    batch, _ = cost_batch()
    for trained, options in ((("hidden", "weight"), {}), (("hidden",), {}), (("hidden", "weight"), {"loss": "aot"})):
        leaf = leaves(batch, trained)
        reference = -torch.rand(8)
        with Cost() as cost:
            out = fastpref.linear_preference_loss(
                leaf["hidden"], leaf["weight"], batch.labels, ref_logps=reference, **options
            )
            out.loss.backward()
            for x in leaf.values():
                x.grad = None
        held = sum(getattr(e.typed[1], "alloc_size", 0) for e in _in_order(
            cost._profile.profiler.kineto_results.experimental_event_tree()
        ))  # fmt: skip
        assert held <= 1 << 16, "the output keeps a large tensor alive"


@pytest.fixture
def host_copies(monkeypatch):
    """How many integers each device-to-host copy had."""
    copies, original = [], tile._to_host

    def counted(tensor):
        copies.append((tensor.numel(), tensor.dtype))
        return original(tensor)

    monkeypatch.setattr(tile, "_to_host", counted)
    return copies


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_one_host_copy_of_at_most_2b_plus_1_integers(which, host_copies):
    batch = make()
    run(batch, **chosen_plan(which), loss="rdpo", rating_gap=batch.gap, stats=STATS, **batch.reference)
    if not host_copies:
        pytest.skip("tensors on the CPU are read where they lie")
    assert host_copies == [(7 if which == "pair_resident" else 1, torch.int64)]


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_a_fixed_capacity_needs_no_host_copy(which, host_copies):
    batch = make()
    options = {**chosen_plan(which), "loss": "rdpo", "rating_gap": batch.gap, "stats": STATS, **batch.reference}
    active = int((batch.labels != -100).sum())
    expected = plain(batch, **options)
    for capacity in (active, active + 1, 54, 1000):
        for budget in (1500, None):
            assert_same(run(batch, max_active_tokens=capacity, max_tile_bytes=budget, **options), expected)
    assert not host_copies
    # too small: NaN, rather than the loss, and the gradients, of some of the tokens
    out, gradients = run(batch, max_active_tokens=active - 1, **options)
    assert out.loss.isnan().all()
    assert not any(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_a_fixed_capacity_of_packed_sequences(which, host_copies):
    batch, cu_seqlens = pack(make(), [9, 4, 0, 7, 0, 1])
    for shift in (False, True):
        for loss in ("rdpo", "ld_dpo"):
            options = {
                **chosen_plan(which), **batch.reference, "cu_seqlens": cu_seqlens, "shift": shift, "loss": loss,
                "rating_gap": batch.gap, "stats": STATS,
            }  # fmt: skip
            assert_same(run(batch, max_active_tokens=30, **options), plain(batch, **options))
    assert not host_copies


def test_a_shared_prefix_is_not_projected():
    batch = shared_batch([64, 64, 64, 64], TOKENS, width=WIDTH, vocab=VOCAB, dtype=torch.float32)
    active = (batch.labels[:, 64:] != -100).sum()
    cost = measure(batch, ("hidden", "weight"), shared_prefix=torch.tensor([64] * 4))
    assert cost.flops / (2 * active * WIDTH * VOCAB) == pytest.approx(3, rel=0.05)


# ---- outputs ----


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_outputs_are_those_of_preference_loss(which):
    batch = make()
    options = {**chosen_plan(which), **batch.reference, "stats": STATS, "loss": "rdpo", "rating_gap": batch.gap}
    out, _ = run(batch, max_tile_bytes=1500, **options)
    expected, _ = plain(batch, **options)
    assert set(out.as_trl()) == set(expected.as_trl())
    for name, value in out.as_trl().items():
        assert value.shape == ()
        torch.testing.assert_close(value, expected.as_trl()[name], rtol=2e-6, atol=2e-6, msg=name)
    assert out.stats.unrated == 1
    assert not any(t.requires_grad for t in (*out[1:-1], *filter(torch.is_tensor, out.stats)))
    for name in STATS:
        some, _ = run(batch, **{**options, "stats": (name,)})
        one, _ = plain(batch, **{**options, "stats": (name,)})
        assert_same((some, {}), (one, {}))
    bare, _ = run(batch, **{**options, "stats": ()})
    assert not {"entropy", "logits/chosen", "mean_token_accuracy"} & set(bare.as_trl())


def test_without_a_gradient():
    batch = make()
    expected, _ = plain(batch, **batch.reference, stats=STATS)
    call = partial(fastpref.linear_preference_loss, batch.hidden, batch.weight, batch.labels, **batch.reference)
    assert not call().loss.requires_grad  # nothing wants one
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for budget in BUDGETS:
                out = call(max_tile_bytes=budget, stats=STATS)
                assert_same((out, {}), (expected._replace(loss=expected.loss.detach()), {}))


# ---- bad input ----


def test_errors_say_what_came():
    batch = make(dtype=torch.float32)
    hidden, weight, labels = batch.hidden, batch.weight, batch.labels
    a, b = batch.adapter_a, batch.adapter_b

    def message(kind, *texts, hidden=hidden, weight=weight, labels=labels, **options):
        for leaf in ((), ("hidden", "weight")):  # whatever the plan
            given = {"hidden": hidden, "weight": weight}
            for name in leaf:
                if torch.is_tensor(given[name]) and given[name].is_floating_point():
                    given[name] = given[name].detach().requires_grad_()
            with pytest.raises(kind) as caught:
                fastpref.linear_preference_loss(given["hidden"], given["weight"], labels, **options)
            for text in texts:
                assert text in str(caught.value), str(caught.value)

    good = {"ref_logps": torch.ones(6)}
    # tensors
    message(TypeError, "hidden", "list", hidden=[1.0], **good)
    message(TypeError, "weight", "NoneType", weight=None, **good)
    message(TypeError, "hidden", "torch.int64", hidden=hidden.long(), **good)
    message(TypeError, "weight", "torch.bfloat16", weight=weight.bfloat16(), **good)
    message(TypeError, "hidden", "torch.float16", hidden=hidden.half(), weight=weight.bfloat16(), **good)
    message(ValueError, "weight", "[37, 15]", weight=weight[:, :15], **good)
    message(ValueError, "weight", "[37]", weight=weight[:, 0], **good)
    message(ValueError, "labels must have shape [6, 9]", "[6, 8]", labels=labels[:, :8], **good)
    message(TypeError, "labels", "torch.float32", labels=labels.float(), **good)
    message(ValueError, "labels must lie in [0, 37)", labels=labels.clamp(min=37), **good)
    message(ValueError, "labels must lie in [0, 37)", labels=labels.masked_fill(labels == -100, -1), **good)
    message(ValueError, "bias", "[37]", "[36]", bias=batch.bias[:36], **good)
    message(TypeError, "bias", "torch.float64", bias=batch.bias.double(), **good)
    message((TypeError, ValueError), "adapter", adapter=a, **good)
    message(ValueError, "adapter", "[2, 15]", adapter=(a[:, :15], b), **good)
    message(ValueError, "adapter", "[37, 1]", adapter=(a, b[:, :1]), **good)
    message(ValueError, "adapter", "[36, 2]", adapter=(a, b[:36]), **good)
    message(TypeError, "adapter", "torch.float64", adapter=(a.double(), b.double()), **good)
    # the reference
    message(ValueError, "ref_hidden", "[6, 8, 16]", ref_hidden=hidden[:, :8])
    message(ValueError, "ref_weight", ref_weight=weight, **good)  # without ref_hidden it would do nothing
    message(ValueError, "ref_bias", ref_bias=batch.bias, **good)
    message(ValueError, "ref_weight", "[37, 15]", ref_hidden=hidden, ref_weight=weight[:, :15])
    message(ValueError, "ref_weight", "37", "36", ref_hidden=hidden, ref_weight=weight[:36])
    message(ValueError, "ref_bias", "[36]", ref_hidden=hidden, ref_weight=weight, ref_bias=batch.bias[:36])
    message(ValueError, "ref_bias", "ref_weight", ref_hidden=hidden, ref_bias=batch.bias)
    message(ValueError, "the reference must be given in one form, got ref_hidden and ref_logps", ref_hidden=hidden,
            **good)  # fmt: skip
    message(ValueError, "ref_logps must have shape [6] (one per sequence), got [3]", ref_logps=torch.ones(3))
    message(ValueError, "ref_token_logps must have shape [6, 9] like labels, got [6, 10]",
            ref_token_logps=torch.ones(6, 10))  # fmt: skip
    message(ValueError, "sigmoid needs ref_chosen_logps")
    message(ValueError, "a loss on part of the completion needs the reference per token", loss="ld_dpo", **good)
    # the loss
    message(ValueError, "got 'sigmod'; nearest names: 'sigmoid'", loss="sigmod", **good)
    message(ValueError, "rdpo needs rating_gap (one float per pair); got None", loss="rdpo", **good)
    message(ValueError, "rating_gap must have shape [3] (one per pair), got [4]", rating_gap=torch.ones(4), **good)
    message(ValueError, "scores must have shape [6] (one per sequence), got [3]", scores=torch.ones(3), **good)
    message(TypeError, "pair_weights must be a floating-point tensor, got torch.int64",
            pair_weights=torch.ones(3, dtype=torch.long), **good)  # fmt: skip
    message(ValueError, "reduction must be one of ('mean', 'sum', 'none'), got 'avg'", reduction="avg", **good)
    message(ValueError, "num_items replaces the divisor", reduction="sum", num_items=3, **good)
    message(ValueError, "num_items must be positive and finite, got -3", num_items=-3, **good)
    message(ValueError, "loss_weights needs a list of losses", loss_weights=[1.0], **good)
    message(ValueError, "loss_weights must be a list with one entry per loss (2)", loss=["sigmoid", "sft"],
            loss_weights=[1.0], **good)  # fmt: skip
    message(TypeError, "loss_options must be a mapping for a single loss, got list", loss_options=[{}], **good)
    message(TypeError, "label_smooth", loss_options={"label_smooth": 0.1}, **good)
    message(ValueError, "beta must be positive and finite, got -0.1", beta=-0.1, **good)
    # the layout
    message(ValueError, "an even number, got 5 sequences", hidden=hidden[:5], labels=labels[:5])
    message(ValueError, "labels must have shape [sequences, tokens], or [tokens] with cu_seqlens, got [54]",
            hidden=hidden.view(54, 16), labels=labels.view(54), **good)  # fmt: skip
    packed = {"hidden": hidden.view(54, 16), "labels": labels.view(54), **good}
    for bad in ([0, 9, 18], [1, 54], [0, 30, 20, 54, 54], [0, 60, 54]):
        message(ValueError, f"cu_seqlens must rise from 0 to the number of tokens 54, got {bad}",
                cu_seqlens=torch.tensor(bad), **packed)  # fmt: skip
    message(ValueError, "lengths must have shape [6] (one per sequence), got [3]",
            lengths=torch.ones(3, dtype=torch.long), **good)  # fmt: skip
    message(ValueError, "lengths belongs to padded batches", lengths=torch.ones(6, dtype=torch.long),
            cu_seqlens=torch.arange(0, 55, 9), **packed)  # fmt: skip
    message(ValueError, "shared_prefix", "[3]", "[2]", shared_prefix=torch.tensor([1, 2]), **good)
    message(ValueError, "shared_prefix", "10", shared_prefix=torch.tensor([1, 2, 10]), **good)
    message(ValueError, "shared_prefix", "-1", shared_prefix=torch.tensor([1, 2, -1]), **good)
    message(TypeError, "shared_prefix", "torch.float32", shared_prefix=torch.ones(3), **good)
    # options
    message(ValueError, "temperature must be positive and finite, got 0", temperature=0, **good)
    message(ValueError, "stats must be a tuple of names out of", stats=("entropie",), **good)
    message(ValueError, "backend must be None or one of", backend="cuda", **good)
    message(TypeError, "ignore_index must be an int", ignore_index=0.5, **good)
    message(ValueError, "max_tile_bytes", "0", max_tile_bytes=0, **good)
    message(TypeError, "max_tile_bytes", "float", max_tile_bytes=1e6, **good)
    message(ValueError, "max_active_tokens", "-1", max_active_tokens=-1, **good)
    message(TypeError, "max_active_tokens", "float", max_active_tokens=3.5, **good)
    message(ValueError, "logits_dtype", "torch.bfloat16", logits_dtype=torch.bfloat16, **good)  # of float32
    message(ValueError, "logits_dtype", logits_dtype=torch.int32, **good)
    message((TypeError, ValueError), "group", group="world", **good)
    message((TypeError, ValueError), "sequence_group", sequence_group="world", **good)


# ---- torch citizenship ----


COMPILED = ("sigmoid", "rdpo", "ml_rdpo", "ipo", "kto", "aot", "wpo", "ld_dpo", coupled, separable)


@pytest.mark.parametrize(
    ("loss", "which"),
    # the plan is chosen behind the operator: for the others the losses need not be repeated
    [(loss, "pair_resident") for loss in COMPILED] + [("sigmoid", "unit"), ("aot", "unit"), ("sigmoid", "recompute")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_compiles_without_graph_breaks(loss, which):
    torch._dynamo.reset()
    batch = make(dtype=torch.float32)
    trained, reduction = PLANS[which]

    def step(leaf):
        out = fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, loss=loss, rating_gap=batch.gap, shift=True,
            stats=("entropy",), reduction=reduction, **batch.reference,
        )  # fmt: skip
        return out.loss.sum(), out.as_trl()

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = leaves(batch, trained)
        value, metrics = f(leaf)
        (3 * value).backward()
        results.append((value.detach(), metrics, {name: leaf[name].grad for name in trained}))
    torch.testing.assert_close(*results)


def test_compiles_packed_with_a_prefix_and_a_head():
    torch._dynamo.reset()
    batch, cu_seqlens = pack(shared_batch([4, 0, 7], dtype=torch.float32), [9, 3, 8, 6, 5, 9])
    names = ("hidden", "weight", *HEAD)

    def step(leaf, prefix):
        return fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, cu_seqlens=cu_seqlens, shared_prefix=prefix,
            **head_options(leaf), **batch.reference,
        ).loss  # fmt: skip

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = leaves(batch, names)
        value = f(leaf, torch.tensor([4, 0, 7]))
        value.backward()
        results.append((value.detach(), {name: leaf[name].grad for name in names}))
    torch.testing.assert_close(*results)


def test_new_lengths_do_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(hidden, weight, labels, ref_hidden):
        return fastpref.linear_preference_loss(hidden, weight, labels, ref_hidden=ref_hidden).loss

    for tokens in (5, 6, 7, 11, 30):
        batch = make(tokens=tokens, dtype=torch.float32)
        step(batch.hidden.requires_grad_(), batch.weight.requires_grad_(), batch.labels, batch.ref_hidden).backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_checkpointing(which):
    from torch.utils.checkpoint import checkpoint

    batch = make()
    trained, reduction = PLANS[which]

    def step(hidden, weight):
        return fastpref.linear_preference_loss(
            hidden, weight, batch.labels, reduction=reduction, **batch.reference
        ).loss.sum()

    leaf = leaves(batch, trained)
    checkpoint(step, leaf["hidden"], leaf["weight"], use_reentrant=False).backward()
    _, expected = plain(batch, **chosen_plan(which), **batch.reference)
    torch.testing.assert_close({name: leaf[name].grad for name in trained}, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute", "frozen_weight-head"])
@pytest.mark.parametrize("mixed", ["hidden", "weight", "none"])
def test_autocast(which, mixed):
    """As F.linear would: everything in bf16, and each gradient in the dtype of its own tensor."""
    batch = make(tokens=30, dtype=torch.float32)
    options = chosen_plan(which)
    half = batch.to(torch.bfloat16)
    if mixed != "none":
        batch = batch._replace(**{mixed: getattr(half, mixed)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradients = run(batch, **options, **batch.reference)
    expected, true_gradients = run(half, **options, **half.reference)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=1e-6)
    for name, gradient in gradients.items():
        assert gradient.dtype == getattr(batch, name).dtype, name
        torch.testing.assert_close(gradient.bfloat16(), true_gradients[name], rtol=2e-2, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_forward_mode_is_refused(loss):
    batch = make()

    def step(hidden):
        return fastpref.linear_preference_loss(hidden, batch.weight, batch.labels, loss=loss, **batch.reference).loss

    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(step, (batch.hidden,), (batch.hidden,))


class _Opcheck(torch.utils._python_dispatch.TorchDispatchMode):
    """Checks the operators at every call of them, with the arguments of that call."""

    seen = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpref" and "linear" in func.name():
            self.seen = (*self.seen, func.name().removeprefix("fastpref::"))
            # below autograd, which lies outside the operators
            plain_args = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, args)
            torch.library.opcheck(func, plain_args, test_utils=("test_schema", "test_faketensor"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", ["pair_resident-head", "unit", "recompute-head", "bias_only"])
@pytest.mark.parametrize("options", [{}, {"max_active_tokens": 50}], ids=["exact", "capacity"])
def test_opcheck(which, options):
    batch = make(dtype=torch.float32)
    with _Opcheck() as mode:
        run(batch, **chosen_plan(which), loss="rdpo", rating_gap=batch.gap, stats=STATS, **options, **batch.reference)
        with torch.no_grad():
            fastpref.linear_preference_loss(batch.hidden, batch.weight, batch.labels, loss="simpo")
    assert "linear_logps_fwd" in mode.seen
    assert ("linear_preference_fwd" in mode.seen) == (which in ("pair_resident-head", "bias_only"))
    assert ("linear_logps_bwd" in mode.seen) == (which == "recompute-head")


@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
@pytest.mark.parametrize("capacity", [None, 18])
def test_wrong_offsets_read_nothing_out_of_bounds_when_compiled(which, capacity):
    """Offsets on the host, which a graph cannot look at, of tensors that are taken for CUDA's."""
    torch._dynamo.reset()
    trained, reduction = PLANS[which]
    batch = make(pairs=10, tokens=1, dtype=torch.float32)
    hidden, labels, reference = batch.hidden.flatten(0, 1), batch.labels.flatten(), -5 * torch.rand(20)

    def step(hidden, weight, cu_seqlens):
        return fastpref.linear_preference_loss(
            hidden, weight, labels, ref_token_logps=reference, cu_seqlens=cu_seqlens, reduction=reduction,
            max_active_tokens=capacity, backend="reference",
        ).loss  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for wrong in ([0, 5, 10_000], [0, -7, 20], [3, 50, 4]):
        leaf = leaves(batch._replace(hidden=hidden), trained)
        with devices(lambda place: "cpu" if isinstance(place, Tensor) and place.dtype == torch.int32 else "cuda", None):
            loss = compiled(*leaf.values(), torch.tensor(wrong, dtype=torch.int32))
            loss.sum().backward()
        bounds = rising(torch.tensor(wrong), 20)
        if bounds[0] == 0:
            torch.testing.assert_close(loss, step(*leaf.values(), bounds))
        assert all(value.isfinite().all() for value in (loss, *(leaf[name].grad for name in trained)))


def test_hooks_and_anomaly_mode():
    batch = make()
    _, expected = plain(batch, **batch.reference)
    seen = []
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly(check_nan=True):
        leaf = leaves(batch, ("hidden", "weight"))
        hidden = leaf["hidden"] * 1.0
        hidden.register_hook(lambda gradient: seen.append(gradient.clone()) or gradient * 2)
        fastpref.linear_preference_loss(hidden, leaf["weight"], batch.labels, **batch.reference).loss.backward()
    torch.testing.assert_close(seen, [expected["hidden"]], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(leaf["hidden"].grad, 2 * expected["hidden"], rtol=1e-10, atol=1e-10)


# ---- on a GPU ----


def on_gpu(batch):
    return Batch(*(t.cuda() for t in batch))


@pytest.mark.cuda
@pytest.mark.parametrize("which", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_is_float64(dtype, which):
    batch = make(pairs=4, tokens=40, width=64, vocab=503).to(dtype)
    options = {**chosen_plan(which), "loss": "rdpo", "beta": 0.02, "stats": STATS}
    exact, gpu = batch.to(torch.float64), on_gpu(batch)
    truth, true_gradients = plain(exact, **options, rating_gap=exact.gap, **exact.reference)
    _, same_gradients = plain(gpu, **options, rating_gap=gpu.gap, **gpu.reference)
    for budget in (40_000, None):
        out, gradients = run(gpu, max_tile_bytes=budget, **options, rating_gap=gpu.gap, **gpu.reference)
        torch.testing.assert_close(out.loss.cpu().double(), truth.loss, rtol=0, atol=1e-5)
        assert_gradients_no_worse(gradients, same_gradients, true_gradients, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_host_copies_on_a_gpu(which, host_copies):
    batch = make(dtype=torch.float32)
    gpu = on_gpu(batch)
    options = {**chosen_plan(which), "loss": "rdpo", "rating_gap": gpu.gap, **gpu.reference}
    expected, _ = run(gpu, **options)
    assert host_copies == [(7, torch.int64)]
    host_copies.clear()
    lengths = torch.tensor([9, 4, 1, 7, 0, 9])
    by_device, _ = run(gpu, lengths=lengths.cuda(), **options)
    assert len(host_copies) == 1
    host_copies.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fixed, _ = run(gpu, max_active_tokens=54, **options)
        fixed_by_host, _ = run(gpu, lengths=lengths, max_active_tokens=54, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    by_host, _ = run(gpu, lengths=lengths, **options)
    assert not host_copies
    torch.testing.assert_close(fixed.loss, expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_host.loss, by_device.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fixed_by_host.loss, by_device.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("which", ["pair_resident", "unit", "recompute"])
def test_a_step_is_captured_in_a_cuda_graph(which):
    batch = on_gpu(make(dtype=torch.float32))
    trained, reduction = PLANS[which]
    leaf = leaves(batch, trained)

    def step():
        out = fastpref.linear_preference_loss(
            leaf["hidden"], leaf["weight"], batch.labels, max_active_tokens=54, reduction=reduction, **batch.reference
        )
        return out.loss.detach(), *torch.autograd.grad(out.loss.sum(), [leaf[name] for name in trained])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf["hidden"].copy_(torch.randn_like(leaf["hidden"]))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, step(), rtol=1e-5, atol=1e-6)
