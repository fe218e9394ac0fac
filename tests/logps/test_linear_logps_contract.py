"""What linear_token_logps promises as a citizen of torch: gradients once, memory, host reads, errors, compilation."""

import gc
import inspect
import re

import pytest
import torch
from linear_logps_cases import (
    COSTS,
    DTYPES,
    PASSES,
    TRAINED,
    cast,
    check,
    close,
    dtypes,
    exact,
    fused,
    loosely,
    make,
    planned,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref
from fastpref._logps import tile
from fastpref._logps.linear_logps import Tokens, gather_logps
from fastpref._logps.tile import Budget, Projection
from fastpref._logps.token_logps import ALL_STATS, token_logps_ref
from fastpref._logps.transform import Transform


@pytest.mark.parametrize("trained", [t for t in TRAINED if t != "score"])
def test_a_second_backward_is_refused(trained):
    tensors, labels = make((7,), bias=True, rank=2)
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    loss = fused(leaves, labels).sum()
    loss.backward(retain_graph=True)
    kept = {name: t.grad.clone() for name, t in leaves.items() if t.grad is not None}
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward(retain_graph=True)
    for name, gradient in kept.items():
        torch.testing.assert_close(leaves[name].grad, gradient, rtol=0, atol=0)
    loss = fused(leaves, labels).sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("trained", [t for t in TRAINED if t != "score"])
def test_double_backward_is_refused(trained):
    tensors, labels = make((7,), bias=True, rank=2)
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    gradients = torch.autograd.grad(fused(leaves, labels).sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        sum(gradient.square().sum() for gradient in gradients).backward()


@dtypes
def test_inputs_are_left_as_they_are(place, dtype):
    tensors, labels = make((17,), 12, 90, dtype, place.device, bias=True, rank=2)
    grad = torch.randn(17, device=place.device)
    inputs = [*tensors.values(), labels, grad]
    before, versions = [t.clone() for t in inputs], [t._version for t in inputs]
    for trained in TRAINED.values():
        leaves = {name: t.requires_grad_(name in trained) for name, t in tensors.items()}
        logps, _ = fused(leaves, labels, stats=ALL_STATS, backend=place.name)
        if trained:
            logps.backward(grad)
        for now, then, version in zip(inputs, before, versions, strict=True):
            assert torch.equal(now, then)
            assert now._version == version


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "A", "B", "labels"])
@pytest.mark.parametrize("trained", ["hidden", "all"])
def test_inputs_changed_before_the_backward_do_not_pass_unseen(name, trained):
    tensors, labels = make((17,), bias=True, rank=2)
    grad = torch.randn(17)
    expected = run(fused, tensors, labels, grad, TRAINED[trained])[1]
    leaves = {key: t.clone().requires_grad_(key in TRAINED[trained]) for key, t in tensors.items()}
    labels = labels.clone()
    logps = fused(leaves, labels)
    with torch.no_grad():
        if name == "labels":
            labels.copy_(labels.flip(0))
        else:
            leaves[name].mul_(2.0)
    wanted = {key: t for key, t in leaves.items() if t.requires_grad}
    try:
        gradients = torch.autograd.grad(logps, list(wanted.values()), grad)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    for key, gradient in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-5)


def test_no_grad_and_inference_mode_keep_nothing():
    tensors, labels = make((7,), bias=True, rank=2)
    expected = fused(tensors, labels)
    for t in tensors.values():
        t.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            logps = fused(tensors, labels)
        assert logps.grad_fn is None
        with torch.inference_mode():
            inferred = fused(tensors, labels)
        assert not saved
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(inferred.clone(), expected, rtol=0, atol=1e-6)
    with torch.inference_mode():
        frozen = {name: t.detach().clone() for name, t in tensors.items()}
    torch.testing.assert_close(fused(frozen, labels), expected, rtol=0, atol=1e-6)


def test_the_same_call_gives_the_same_bits(place):
    for dtype in DTYPES:
        tensors, labels = make((50,), 40, 1009, dtype, place.device, bias=True, rank=3)
        grad = torch.randn(50, device=place.device)
        for trained in ("hidden", "all"):
            first, second = (run(fused, tensors, labels, grad, TRAINED[trained], backend=place.name) for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
def test_more_tokens_than_the_capacity_are_nan(place, trained):
    tensors, labels = make((4, 10), 24, 203, device=place.device, bias=True, ignored=0.5)
    labels[0, :2] = 3
    active = int((labels != -100).sum())
    grad = torch.ones(4, 10, device=place.device)
    for capacity in (1, active - 1):
        logps, gradients = run(
            fused, tensors, labels, grad, TRAINED[trained], max_active_tokens=capacity, backend=place.name
        )
        assert logps.shape == labels.shape
        assert logps.isnan().all()
        assert all(gradient.shape == tensors[name].shape for name, gradient in gradients.items())
    # shifted, the first column of labels is no target
    labels[:, 1:] = -100
    shifted_out = fused(tensors, labels, shift=True, max_active_tokens=1, backend=place.name)
    assert (shifted_out == 0).all()


READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "nonzero_static", "unique")


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, func
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight", "all"])
@pytest.mark.parametrize("capacity", [None, 40], ids=["exact", "capacity"])
def test_what_is_read_on_the_host(monkeypatch, trained, capacity):
    tensors, labels = make((4, 10), bias=True, rank=2, ignored=0.5)
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    calls = []
    to_host = tile._to_host
    monkeypatch.setattr(tile, "_to_host", lambda *args: calls.append(args) or to_host(*args))
    for shift in (False, True):
        calls.clear()
        with _NoHostReads():  # operators of this package are opaque to it; what surrounds them is not
            logps, _ = fused(leaves, labels, shift=shift, stats=ALL_STATS, max_active_tokens=capacity)
            if trained != "score":
                logps.sum().backward()
        assert len(calls) <= (1 if capacity is None else 0)
        assert all(tensor.numel() <= 2 for tensor, *_ in calls)


# ---- cost ----


def profiled(f):
    """f's result, the peak and the remainder of what torch's allocator handed out, and the FLOPs of its GEMMs."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, with_flops=True, record_shapes=True
    ) as profile:
        result = f()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    gemms = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
    flops = sum(event.flops for event in profile.key_averages() if event.key in gemms)
    return result, peak, total, flops


def test_the_tracker_sees_what_is_allocated():
    def f():
        logits = torch.ones(100, 50) @ torch.ones(50, 1000)
        return torch.log_softmax(logits, -1).sum()

    _, peak, held, flops = profiled(f)
    assert 0.8e6 <= peak <= 0.9e6
    assert held <= 1000
    assert flops == 2 * 100 * 50 * 1000


def scratch(rows, weight):
    """What the matrix products of torch take for themselves: oneDNN's packed blocks, of each thread."""
    dz, out = torch.zeros(weight.shape[0], rows, dtype=weight.dtype), weight.new_empty(rows, weight.shape[1])
    return max(
        profiled(lambda: torch.mm(dz.t(), weight, out=out))[1],
        profiled(lambda: torch.mm(dz.t().contiguous(), weight, out=out))[1] - dz.nbytes,
        profiled(lambda: torch.mm(dz, out))[1] - weight.nbytes,
    )


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("budget", [None, 1 << 20], ids=["default", "1-mib"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory_is_what_the_plan_says(dtype, budget, kind, thin):
    thin(unless=(budget is None) == (dtype == torch.float32))
    tokens, hidden_size, vocab = 512, 128, 8000
    tensors, labels = make((tokens,), hidden_size, vocab, dtype, ignored=0)
    labels[::2] = -100
    active, trained = tokens // 2, COSTS[kind]
    plan = planned(active, hidden_size, vocab, trained, dtype=dtype, total_tokens=tokens, max_tile_bytes=budget)
    assert plan.kind == kind
    assert plan.gemm_passes == PASSES[kind]
    grad = torch.ones(tokens)
    run(fused, tensors, labels, grad, trained, max_tile_bytes=budget)  # what is cached once is not a call's
    _, peak, _, _ = profiled(lambda: run(fused, tensors, labels, grad, trained, max_tile_bytes=budget))
    allowed = 1.1 * plan.predicted_bytes + (64 << 10) + scratch(plan.tile_rows, tensors["weight"])
    assert peak <= allowed, f"{peak:,} bytes, predicted {plan.predicted_bytes:,}"
    if budget is not None:
        outputs = sum(tensors[name].nbytes for name in trained)
        assert peak < active * vocab * 4 + outputs  # not even one tensor of the active tokens' logits


@pytest.mark.parametrize("kind", COSTS)
def test_gemm_passes(kind):
    tokens, hidden_size, vocab = 96, 32, 1009
    tensors, labels = make((tokens,), hidden_size, vocab, ignored=0)
    labels[::3] = -100  # not projected
    grad = torch.randn(tokens)
    for budget in (None, 10 * vocab * 4):
        _, _, _, flops = profiled(lambda b=budget: run(fused, tensors, labels, grad, COSTS[kind], max_tile_bytes=b))
        passes = flops / (2 * (tokens - tokens // 3) * hidden_size * vocab)
        assert passes == pytest.approx(PASSES[kind], rel=0.05)


@pytest.mark.parametrize("trained", ["hidden", "hidden-weight", "all"])
def test_nothing_of_the_logits_size_lives_until_the_backward(trained):
    tensors, labels = make((64,), 16, 8000, bias=True, rank=2)
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    logps, _, held, _ = profiled(lambda: fused(leaves, labels))
    assert held <= 64 * 16 * 4 * 4 + 64 * 64
    del logps


@pytest.mark.slow
def test_beyond_two_billion_logits():
    tokens, vocab = 70_000, 32_003
    assert tokens * vocab > 2**31
    hidden, weight = torch.randn(tokens, 2), torch.randn(vocab, 2)
    labels = torch.randint(0, vocab, (tokens,))
    logps = fastpref.linear_token_logps(hidden, weight, labels)
    for rows in (slice(0, 50), slice(67_100, 67_110), slice(tokens - 50, tokens)):
        truth = token_logps_ref(hidden[rows].double() @ weight.double().t(), labels[rows])
        torch.testing.assert_close(logps[rows].double(), truth, rtol=1e-6, atol=4e-6)
    assert (logps < 0).all()


@pytest.mark.slow
def test_a_weight_beyond_two_billion_elements():
    # offsets of the last rows do not fit 32 bits
    torch.utils.deterministic.fill_uninitialized_memory = False  # gigabytes that nobody looks at
    try:
        base = torch.empty(2**31 + 40, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    weight = base.as_strided((3, 16), (2**30 + 3, 1))
    weight.copy_(torch.randn(3, 16))
    tensors = {"hidden": torch.randn(9, 16).bfloat16(), "weight": weight}
    labels, grad = torch.randint(0, 3, (9,)), torch.randn(9)
    got = run(fused, tensors, labels, grad, ("hidden",))
    expected = run(fused, {**tensors, "weight": weight.contiguous()}, labels, grad, ("hidden",))
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-5)


# ---- bad input ----


def test_errors_say_what_came():
    tensors, labels = make((4, 12), 32, 320, bias=True, rank=3, ignored=0)
    hidden, weight, bias, A, B = tensors.values()

    def message(kind, *parts, hidden=hidden, weight=weight, labels=labels, **options):
        with pytest.raises(kind) as caught:
            fastpref.linear_token_logps(hidden, weight, labels, **options)
        for part in parts:
            assert part in str(caught.value), str(caught.value)

    message(TypeError, "hidden must be a torch.Tensor, got list", hidden=[1.0])
    message(TypeError, "weight must be a torch.Tensor, got list", weight=[1.0])
    message(TypeError, "labels must be a torch.Tensor, got list", labels=[1])
    message(TypeError, "bias must be a torch.Tensor, got list", bias=[1.0])
    message(TypeError, "hidden must be", "torch.int64", hidden=hidden.long())
    message(TypeError, "hidden must be", "torch.complex64", hidden=hidden.to(torch.complex64))
    message(ValueError, "hidden must have shape", "scalar", hidden=torch.tensor(1.0))
    message(ValueError, "weight", "[320]", weight=weight[:, 0])
    message(ValueError, "weight", "[320, 32, 1]", weight=weight[..., None])
    message(ValueError, "weight", "[320, 31]", "32", weight=weight[:, :-1])
    message(ValueError, "weight", "[0, 32]", weight=weight[:0])
    message(ValueError, "labels must have shape [4, 12]", "[4, 11]", labels=labels[:, :-1])
    message(ValueError, "labels must have shape [4, 12]", "[4, 12, 1]", labels=labels[..., None])
    message(TypeError, "labels must be int64 or int32, got torch.float32", labels=labels.float())
    message(ValueError, "labels must be on cpu like hidden, got meta", labels=labels.to("meta"))
    message(ValueError, "weight must be on cpu like hidden, got meta", weight=weight.to("meta"))
    message(ValueError, "bias must be on cpu like", "got meta", bias=bias.to("meta"))
    message(ValueError, "adapter", "meta", adapter=(A.to("meta"), B))
    message(ValueError, "bias", "[320]", "[319]", bias=bias[:-1])
    message(ValueError, "bias", "[320]", "[320, 1]", bias=bias[:, None])
    message(TypeError, "adapter", "Tensor", adapter=A)
    message((TypeError, ValueError), "adapter", adapter=(A,))
    message((TypeError, ValueError), "adapter", adapter=(A, B, B))
    message(TypeError, "adapter", adapter=(A, None))
    message(ValueError, "adapter", "[3, 31]", "32", adapter=(A[:, :-1], B))
    message(ValueError, "adapter", "[319, 3]", "320", adapter=(A, B[:-1]))
    message(ValueError, "adapter", "2", "3", adapter=(A[:2], B))
    message(ValueError, "adapter", adapter=(A.t(), B.t()))
    message(ValueError, "adapter", adapter=(B, A))
    for mixed in ("hidden", "weight", "bias"):
        options = {mixed: tensors[mixed].bfloat16()}
        if mixed != "bias":
            options["bias"] = bias
        message(TypeError, "bfloat16", "float32", **options)
    message(TypeError, "adapter", "float64", "float32", adapter=(A.double(), B))
    message(TypeError, "adapter", "float64", "float32", adapter=(A, B.double()))
    message(TypeError, "weight", "torch.float64", "torch.float32", weight=weight.double())
    message(ValueError, "temperature must be positive and finite, got 0.0", temperature=0.0)
    message(ValueError, "softcap must be positive and finite, got -1", softcap=-1)
    message(TypeError, "scale must be a positive float, got str", scale="1")
    message(TypeError, "ignore_index must be an int, got float", ignore_index=-100.0)
    message(ValueError, "ignore_index must fit 64 bits", ignore_index=2**70)
    for bad in (0, -1):
        message(ValueError, "max_tile_bytes", str(bad), max_tile_bytes=bad)
        message(ValueError, "max_active_tokens", "-1", max_active_tokens=-1)
    for bad in (1.5, "1", True):
        message(TypeError, "max_tile_bytes", type(bad).__name__, max_tile_bytes=bad)
        message(TypeError, "max_active_tokens", type(bad).__name__, max_active_tokens=bad)
    for bad in (torch.bfloat16, torch.float16, torch.float64, torch.int8):
        message(ValueError, "logits_dtype", str(bad), logits_dtype=bad)
    half = {"hidden": hidden.bfloat16(), "weight": weight.bfloat16()}
    for bad in (torch.float16, torch.float64):
        message(ValueError, "logits_dtype", str(bad), logits_dtype=bad, **half)
    message(
        ValueError, "logits_dtype", "bfloat16", logits_dtype=torch.bfloat16, hidden=hidden.half(), weight=weight.half()
    )
    message((TypeError, ValueError), "logits_dtype", logits_dtype="bfloat16", **half)
    message(ValueError, "stats must be a tuple of names", stats="entropy")
    message(ValueError, "got ('entropie',)", stats=("entropie",))
    message(ValueError, "backend must be None or one of", "'cuda'", backend="cuda")
    message((TypeError, ValueError), "group", "str", group="world")
    message(TypeError, "backend='native'", "float64", backend="native", hidden=hidden.double(), weight=weight.double())
    message(ValueError, "shift=True needs labels of shape", shift=True, hidden=hidden[0, 0], labels=labels[0, 0])


def test_nothing_positional_after_the_tensors():
    tensors, labels = make()
    with pytest.raises(TypeError):
        fastpref.linear_token_logps(tensors["hidden"], tensors["weight"], labels, None)


def test_named_backend_that_is_missing_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors, labels = make()
    with pytest.raises(RuntimeError, match=r"backend='triton' of .* cannot serve cpu tensors: Triton has no"):
        fused(tensors, labels, backend="triton")
    monkeypatch.setattr("fastpref._native._core", None)
    with pytest.raises(RuntimeError, match="this installation has no native core"):
        fused(tensors, labels, backend="native")


def test_works_without_the_native_core(monkeypatch):
    tensors, labels = make(bias=True, rank=2)
    grad = torch.randn(labels.shape)
    expected = run(fused, tensors, labels, grad)
    monkeypatch.setattr("fastpref._native._core", None)
    close(run(fused, tensors, labels, grad, backend="reference"), expected, atol=1e-5)
    half = cast(tensors, torch.bfloat16)
    got = run(fused, half, labels, grad, backend="reference")[0]
    torch.testing.assert_close(got.double(), exact(half, labels), rtol=0, atol=2e-2)


def test_a_hidden_size_of_zero_is_the_bias_or_refused():
    bias, labels = torch.randn(20), torch.randint(0, 20, (5,))
    try:
        logps = fastpref.linear_token_logps(torch.empty(5, 0), torch.empty(20, 0), labels, bias=bias)
    except ValueError as error:
        assert "hidden" in str(error)
        return
    torch.testing.assert_close(logps.double(), token_logps_ref(bias.expand(5, -1), labels), rtol=0, atol=1e-6)


# ---- torch citizenship ----


@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight", "all"])
@pytest.mark.parametrize("capacity", [None, 30], ids=["exact", "capacity"])
def test_compiles_without_graph_breaks(trained, capacity):
    torch._dynamo.reset()
    tensors, labels = make((3, 10), bias=True, rank=2, ignored=0.4)
    options = {"shift": True, "softcap": 20.0, "stats": ("entropy",), "max_active_tokens": capacity}

    def step(leaves):
        logps, values = fused(leaves, labels, **options)
        return (logps * 2.0).sum(), values.entropy

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
        loss, entropy = f(leaves)
        if trained != "score":
            loss.backward()
        results.append((loss.detach(), entropy, [leaf.grad for leaf in leaves.values() if leaf.grad is not None]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_compiles_in_bf16_with_dynamic_shapes():
    torch._dynamo.reset()
    step = torch.compile(lambda t, y: fused(t, y, stats=("top1",)), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 8):
        tensors, labels = make((2, tokens), dtype=torch.bfloat16, bias=True, rank=2)
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        logps, _ = step(leaves, labels)
        logps.sum().backward()
        got = (logps.detach(), {name: t.grad for name, t in leaves.items()})
        close(got, run(fused, tensors, labels, torch.ones(2, tokens)), atol=2**-6)


@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
def test_new_lengths_do_not_recompile(trained):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda t, y: fused(t, y, shift=True).sum(), fullgraph=True, backend=counter)
    for length in (5, 6, 7, 11, 30):
        tensors, labels = make((2, length), bias=True)
        loss = step({name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}, labels)
        if trained != "score":
            loss.backward()
    assert counter.frame_count <= 2  # the first length, then any


class _Recorder(TorchDispatchMode):
    """Calls of this package's linear operators, their arguments copied as they came."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpref" and func.overloadpacket.__name__.startswith("linear"):
            copied = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs or {}))
            self.calls.append((func, *copied))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(place, dtype):
    tensors, labels = make((3, 7), 12, 50, dtype, place.device, bias=True, rank=2)
    with _Recorder() as recorder:
        for trained, capacity in (("score", None), ("hidden", 30), ("all", None), ("all", 30)):
            leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
            logps, _ = fused(leaves, labels, stats=ALL_STATS, max_active_tokens=capacity, backend=place.name)
            if trained != "score":
                logps.sum().backward()
    assert recorder.calls
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("trained", ["hidden", "all"])
def test_opcheck_of_kept_rows(place, trained):
    """Rows that the caller has chosen, some of which do not count."""
    tensors, labels = make((21,), 12, 50, torch.float32, place.device)
    leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    kept, bounds = torch.arange(20, -1, -1, device=place.device), torch.tensor([0, 9, 15])
    tokens = Tokens(labels, bounds.to(place.device), kept, bounds)
    projection = Projection(leaves["hidden"], leaves["weight"], None, None, None)
    budget = Budget(-1, 0, None, "", place.name)
    with _Recorder() as recorder:
        found = gather_logps(projection, tokens, Transform(1.0, None, 1.0, -100), True, budget)
        found.logps.sum().backward()
    assert torch.equal(found.index, kept) and torch.equal(found.bounds, bounds)
    assert len(recorder.calls) == (1 if trained == "hidden" else 2)
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trained", ["hidden", "all"])
def test_activation_checkpointing(reentrant, trained):
    from torch.utils.checkpoint import checkpoint

    tensors, labels = make(bias=True, rank=2)
    results = []
    for wrapped in (False, True):
        leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}

        def f(*values):
            return fused(dict(zip(tensors, values, strict=True)), labels)

        values = leaves.values()
        logps = checkpoint(f, *values, use_reentrant=reentrant) if wrapped else f(*values)
        logps.sum().backward()
        results.append((logps.detach(), [leaf.grad for leaf in values if leaf.requires_grad]))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("low", [("hidden",), ("weight",), ("hidden", "weight"), ("bias", "A"), ()], ids=repr)
@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
def test_autocast(low, trained):
    tensors, labels = make((13,), bias=True, rank=2)
    mixed = {name: t.bfloat16() if name in low else t for name, t in tensors.items()}
    leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in mixed.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, values = fused(leaves, labels, stats=("entropy",))
    assert logps.dtype == torch.float32
    assert values.entropy.dtype == torch.float32
    grad = torch.randn(13)
    if trained != "score":
        logps.backward(grad)
    expected, gradients = run(fused, cast(tensors, torch.bfloat16), labels, grad, TRAINED[trained])
    torch.testing.assert_close(logps.detach(), expected, rtol=1e-6, atol=2e-6)
    for name in TRAINED[trained]:
        assert leaves[name].grad.dtype == mixed[name].dtype
        torch.testing.assert_close(leaves[name].grad.bfloat16(), gradients[name], rtol=2**-6, atol=2**-6)


def test_autocast_leaves_float64_alone():
    tensors, labels = make(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = fused(tensors, labels)
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, exact(tensors, labels), rtol=0, atol=1e-10)


def test_autocast_off_refuses_mixed_dtypes():
    tensors, labels = make()
    with torch.autocast("cpu", enabled=False), pytest.raises(TypeError, match="weight"):
        fused({**tensors, "weight": tensors["weight"].bfloat16()}, labels)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_forward_mode_is_refused(name):
    tensors, labels = make(bias=True)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(
            lambda x: fused({**tensors, name: x}, labels).sum(), (tensors[name],), (torch.ones_like(tensors[name]),)
        )


def test_hooks_and_accumulation():
    tensors, labels = make((10,), bias=True)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    seen = []
    leaves["weight"].register_hook(lambda g: seen.append(g.shape))
    fused({**leaves, "hidden": leaves["hidden"][:4]}, labels[:4]).sum().backward()
    fused({**leaves, "hidden": leaves["hidden"][4:]}, labels[4:]).sum().backward()
    assert seen == [leaves["weight"].shape] * 2
    _, gradients = run(fused, tensors, labels, torch.ones(10))
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, gradients[name], rtol=1e-5, atol=1e-5)


def test_only_some_tokens_are_differentiated():
    tensors, labels = make((3, 8), bias=True, ignored=0)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    logps = fused(leaves, labels)
    logps[1, 2:5].sum().backward()
    grad = torch.zeros(3, 8)
    grad[1, 2:5] = 1
    expected = run(exact, cast(tensors, torch.float64), labels, grad)[1]
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_an_output_nobody_uses_costs_no_gradient():
    tensors, labels = make()
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    logps, values = fused(leaves, labels, stats=("entropy",))
    with pytest.raises(RuntimeError, match="does not require grad"):
        values.entropy.sum().backward()
    del logps


# ---- on a GPU ----


@pytest.mark.cuda
@dtypes
@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
def test_cuda_is_cpu(dtype, trained):
    tensors, labels = make((40,), 64, 1009, dtype, bias=True, rank=4)
    grad = torch.randn(40)
    expected = run(fused, tensors, labels, grad, TRAINED[trained])
    on_gpu = {name: t.cuda() for name, t in tensors.items()}
    logps, gradients = run(fused, on_gpu, labels.cuda(), grad.cuda(), TRAINED[trained])
    close((logps.cpu(), {name: g.cpu() for name, g in gradients.items()}), expected, atol=loosely(dtype))
    check(on_gpu, labels.cuda(), TRAINED[trained])


@pytest.mark.cuda
@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight"])
def test_no_host_sync_with_a_capacity(place, trained):
    if place.device.type != "cuda" or place.name == "reference":
        pytest.skip("only GPU kernels can avoid one")
    tensors, labels = make((64,), 64, 5003, torch.bfloat16, "cuda")
    grad = torch.randn(64, device="cuda")
    options = {"max_active_tokens": 64, "backend": place.name}
    run(fused, tensors, labels, grad, TRAINED[trained], **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(fused, tensors, labels, grad, TRAINED[trained], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight"])
def test_a_step_is_captured_in_a_cuda_graph(place, trained):
    if place.device.type != "cuda" or place.name == "reference":
        pytest.skip("graphs are CUDA's")
    tensors, labels = make((64,), 64, 5003, torch.bfloat16, "cuda")
    grad = torch.randn(64, device="cuda")
    options = {"max_active_tokens": 64, "backend": place.name}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(fused, tensors, labels, grad, TRAINED[trained], **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(fused, tensors, labels, grad, TRAINED[trained], **options)
    tensors["hidden"].copy_(tensors["hidden"].flip(0))
    labels.copy_(labels.roll(5))  # other tokens are ignored now
    graph.replay()
    torch.cuda.synchronize()
    close(out, run(fused, tensors, labels, grad, TRAINED[trained], **options), atol=2**-6)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", COSTS)
def test_memory_on_a_gpu_is_what_the_plan_says(kind):
    tokens, hidden_size, vocab = 4096, 512, 32000
    tensors, labels = make((tokens,), hidden_size, vocab, torch.bfloat16, "cuda", ignored=0)
    labels[::2] = -100
    trained, grad, budget = COSTS[kind], torch.ones(tokens, device="cuda"), 64 << 20
    run(fused, tensors, labels, grad, trained, max_tile_bytes=budget)
    plan = planned(
        tokens // 2, hidden_size, vocab, trained, dtype=torch.bfloat16, device="cuda", total_tokens=tokens,
        max_tile_bytes=budget,
    )  # fmt: skip
    assert plan.kind == kind
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(fused, tensors, labels, grad, trained, max_tile_bytes=budget)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.1 * plan.predicted_bytes + (1 << 20), f"{peak:,} bytes, predicted {plan.predicted_bytes:,}"


def test_the_docstring_names_every_argument():
    text = fastpref.linear_token_logps.__doc__
    for name in inspect.signature(fastpref.linear_token_logps).parameters:
        assert re.search(rf"\b{name}\b", text), name
