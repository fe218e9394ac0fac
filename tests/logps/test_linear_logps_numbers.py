"""linear_token_logps against the logits it never stores, in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import TRANSFORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_logps_cases import (
    DTYPES,
    EXTRAS,
    SHAPES,
    TRAINED,
    at,
    cast,
    check,
    close,
    dtypes,
    exact,
    fused,
    loosely,
    make,
    plain,
    project,
    rms,
    run,
)
from tolerance import assert_no_worse

import fastpref
from fastpref import _library, _native
from fastpref._logps.token_logps import ALL_STATS, shifted, token_logps_ref

# ---- equality with the logits path ----


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_float64_equals_the_logits_path(transform):
    tensors, labels = make((3, 7), dtype=torch.float64, bias=True, rank=4)
    grad = torch.randn(labels.shape, dtype=torch.float64)
    for name, trained in TRAINED.items():
        for options in ({}, {"shift": True}):
            with at(name, options):
                got = run(fused, tensors, labels, grad, trained, **transform, **options)
                assert got[0].dtype == torch.float64
                close(got, run(exact, tensors, labels, grad, trained, **transform, **options))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float64_equals_the_logits_path_in_every_shape(shape):
    for extras in EXTRAS.values():
        tensors, labels = make(*shape, torch.float64, **extras)
        grad = torch.randn(labels.shape, dtype=torch.float64)
        with at(extras):
            close(run(fused, tensors, labels, grad), run(exact, tensors, labels, grad))


class _Fresh(torch.autograd.Function):
    """f with a new graph for every backward: gradcheck calls each one several times."""

    @staticmethod
    def forward(ctx, f, *inputs):
        ctx.f = f
        ctx.save_for_backward(*inputs)
        return f(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.f(*inputs), inputs, grad)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradcheck(transform):
    tensors, labels = make((2, 3), 4, 5, torch.float64, bias=True, rank=2)
    labels[1, 2] = -100
    names = list(tensors)

    def f(*values):
        return fused(dict(zip(names, values, strict=True)), labels, **transform)

    inputs = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *values: _Fresh.apply(f, *values), inputs)
    frozen = [tensors["weight"].detach(), labels]
    assert torch.autograd.gradcheck(
        lambda x: _Fresh.apply(lambda h: fastpref.linear_token_logps(h, *frozen, **transform), x), inputs[:1]
    )


@pytest.mark.numerics
@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(place, shape, dtype):
    for extras in ("bare", "both"):
        tensors, labels = make(*shape, dtype, place.device, **EXTRAS[extras])
        with at(extras):
            check(tensors, labels, backend=place.name)


@pytest.mark.numerics
@dtypes
def test_matches_float64_through_every_transform(place, dtype):
    for name, transform in TRANSFORMS.items():
        for trained in ("hidden", "all"):
            tensors, labels = make((37,), 33, 211, dtype, place.device, bias=True)
            with at(name, trained):
                check(tensors, labels, TRAINED[trained], place.name, transform)


@pytest.mark.numerics
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_matches_float64_at_every_simd_level(level):
    try:
        fastpref.set_simd_level(level)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for dtype in DTYPES:
            for trained in ("hidden", "all"):
                tensors, labels = make((37,), 33, 211, dtype, bias=True)
                with at(dtype, trained):
                    check(tensors, labels, TRAINED[trained], "native", TRANSFORMS["softcap"])
    finally:
        fastpref.set_simd_level("auto")


@pytest.mark.numerics
@pytest.mark.triton
def test_matches_float64_under_the_interpreter():
    if reason := _library.triton_reason("cpu"):
        pytest.skip(reason)
    for dtype, (trained, options) in itertools.product(
        DTYPES, [("score", {}), ("hidden", {"max_tile_bytes": 3 * 67 * 4}), ("all", {"max_active_tokens": 6})]
    ):
        tensors, labels = make((2, 3), 12, 67, dtype, bias=True, rank=2)
        with at(dtype, trained, options):
            check(tensors, labels, TRAINED[trained], "triton", TRANSFORMS["softcap"], **options)


@dtypes
def test_a_saturated_softcap(place, dtype):
    tensors, labels = make((37,), 33, 211, dtype, place.device, spread=20.0)
    check(tensors, labels, backend=place.name, transform={"softcap": 5.0})


@pytest.mark.numerics
@dtypes
def test_every_plan_matches_float64(place, dtype):
    for name, trained in TRAINED.items():
        tensors, labels = make((31,), 24, 203, dtype, place.device, bias=True, rank=4)
        with at(name):
            check(tensors, labels, trained, place.name)


@pytest.mark.numerics
def test_bf16_log_probs_are_those_of_unrounded_logits(place):
    tensors, labels = make((64,), 512, 4096, torch.bfloat16, place.device, ignored=0)
    truth = exact(tensors, labels)
    rounded = torch.log_softmax(project(tensors).float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert (rounded.double() - truth).abs().max() >= 2e-3  # what it would be otherwise
    grad = torch.randn(labels.shape, device=place.device)
    for trained in ("score", "hidden", "hidden-weight"):
        logps, _ = run(fused, tensors, labels, grad, TRAINED[trained], backend=place.name)
        assert (logps.double() - truth).abs().max() <= 2e-5


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("extras", ["bare", "both"])
def test_rounded_logits_are_no_worse_than_pytorchs(place, dtype, extras):
    tensors, labels = make((128,), 48, 777, dtype, place.device, **EXTRAS[extras])
    grad = torch.randn(labels.shape, device=place.device)

    def peer(t, y):
        z = torch.log_softmax(project(t).float(), -1)
        return torch.where(y == -100, 0.0, z.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1))

    for trained in ("score", "hidden", "all"):
        options = {"logits_dtype": dtype, "backend": place.name}
        logps, gradients = run(fused, tensors, labels, grad, TRAINED[trained], **options)
        same, same_gradients = run(peer, tensors, labels, grad, TRAINED[trained])
        truth, true_gradients = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
        assert logps.dtype == torch.float32
        # the noise of rounding, which hits two ways of computing at different tokens: its size is what can be compared
        assert rms(logps, truth) <= 1.5 * rms(same, truth)
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            assert rms(gradient, true_gradients[name]) <= 1.5 * rms(same_gradients[name], true_gradients[name]), name


@pytest.mark.numerics
def test_rounded_logits_are_rounded(place):
    # H = 1 with powers of two: every product is exact, and half of them do not fit bfloat16 once the bias is added
    weight = torch.randn(300, 1).bfloat16().to(place.device)
    hidden = 2.0 ** torch.randint(-2, 3, (20, 1)).to(place.device, torch.bfloat16)
    bias = torch.randn(300).bfloat16().to(place.device)
    labels = torch.randint(0, 300, (20,), device=place.device)
    logits = F.linear(hidden.float(), weight.float(), bias.float())
    options = {"bias": bias, "backend": place.name}
    got = fastpref.linear_token_logps(hidden, weight, labels, logits_dtype=torch.bfloat16, **options)
    torch.testing.assert_close(got.double(), token_logps_ref(logits.bfloat16(), labels), rtol=0, atol=1e-5)
    got = fastpref.linear_token_logps(hidden, weight, labels, **options)
    torch.testing.assert_close(got.double(), token_logps_ref(logits, labels), rtol=0, atol=1e-5)


@pytest.mark.numerics
@dtypes
@pytest.mark.parametrize("probability", [0.95, 0.995, 0.9999])
def test_confident_tokens_keep_their_gradient(place, probability, dtype):
    # of one token, the bias gradient is that of the logits: 1 - p at the label
    tensors, labels = make((1,), 64, 500, dtype, place.device, ignored=0, spread=1.0)
    tensors["bias"] = torch.zeros_like(tensors["weight"][:, 0])
    direction = torch.randn(64, device=place.device)
    others = tensors["weight"].double()
    low, high = 0.0, 100.0
    for _ in range(60):  # how far the hidden state must lean towards the label's row
        middle = (low + high) / 2
        hidden = (direction + middle * others[labels[0]]).to(dtype)[None]
        p = exact({**tensors, "hidden": hidden}, labels).exp().item()
        low, high = (middle, high) if p < probability else (low, middle)
    tensors["hidden"] = hidden
    grad = torch.full((1,), 1024.0, device=place.device)  # a loss scale: float16 has no small numbers
    bound = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-10}[dtype]
    for trained in ("hidden", "all"):
        logps, gradients = run(fused, tensors, labels, grad, TRAINED[trained], backend=place.name)
        truth, true_gradients = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
        torch.testing.assert_close(logps.double(), truth, rtol=1e-4, atol=0)
        for name, gradient in gradients.items():
            error = (gradient.double() - true_gradients[name]).norm() / true_gradients[name].norm()
            assert error <= bound, f"{trained}, gradient of {name}: {error:.2e}"
        if "bias" in gradients:
            target, true_target = gradients["bias"][labels], true_gradients["bias"][labels]
            torch.testing.assert_close(target.double(), true_target, rtol=bound, atol=0)


def large_and_exact(size, dtype=torch.bfloat16, device="cpu"):
    """Logits that are integers times a power of two near `size`, exact in float32 however they are summed."""
    unit = 2.0 ** round(math.log2(size / 40))
    hidden = torch.randint(-4, 5, (40, 16)).to(device, dtype)
    weight = (torch.randint(-8, 9, (77, 16)) * unit).to(device, dtype)
    logits = hidden.double() @ weight.double().t()
    labels = logits.argmax(-1)
    labels[::2] = torch.randint(0, 77, (20,), device=device)
    labels[::5] = -100
    if size > 2.0**50:  # log 2 is lost there, in float64 too: nobody can tell a tie from certainty
        labels[(logits == logits.amax(-1, keepdim=True)).sum(-1) > 1] = -100
    return {"hidden": hidden, "weight": weight}, labels


@pytest.mark.parametrize("size", [1e5, 1e30], ids=["beyond-float16", "1e30"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_large_logits(place, dtype, size):
    tensors, labels = large_and_exact(size, dtype, place.device)
    grad = torch.randn(labels.shape, device=place.device)
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    for trained in ("score", "hidden", "hidden-weight"):
        logps, gradients = run(fused, tensors, labels, grad, TRAINED[trained], backend=place.name)
        truth, true_gradients = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
        torch.testing.assert_close(logps.double(), truth, rtol=1e-6, atol=1e-6)
        for name, gradient in gradients.items():
            atol = bound * true_gradients[name].abs().max().item()
            torch.testing.assert_close(gradient.double(), true_gradients[name], rtol=bound, atol=atol)


def test_float16_logits_beyond_float16(place):
    # in float32 accumulators nothing overflows, though a float16 product would be inf
    tensors, labels = make((20,), 16, 77, torch.float16, place.device, spread=1e3)
    tensors["hidden"] *= 100
    assert not project(tensors).isfinite().all()
    grad = torch.randn(labels.shape, device=place.device)
    for trained in ("score", "hidden", "hidden-weight"):
        logps, gradients = run(fused, tensors, labels, grad, TRAINED[trained], backend=place.name)
        truth, true_gradients = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
        torch.testing.assert_close(logps.double(), truth, rtol=1e-5, atol=2e-2)
        for name, gradient in gradients.items():
            atol = 2e-2 * true_gradients[name].abs().max().item()
            torch.testing.assert_close(gradient.double(), true_gradients[name], rtol=1e-2, atol=atol)


@dtypes
def test_small_logits_keep_their_gradient(place, dtype):
    tensors, labels = make((20,), 16, 77, dtype, place.device, spread=1e-6)
    check(tensors, labels, backend=place.name)


@pytest.mark.sanitize
@pytest.mark.parametrize("product", ["amx", "avx512_bf16", "none"])
class TestProducts:
    """What forms the bf16 logits on a CPU."""

    @pytest.fixture(autouse=True)
    def _product(self, product):
        choose = getattr(_native._core, "set_linear_product", None)
        if choose is None:
            pytest.skip("this build chooses no product")
        try:
            choose(product)
        except ValueError as error:
            pytest.skip(str(error))
        yield
        choose("auto")

    def test_tails(self):
        for rows, hidden_size, vocab in itertools.product([1, 31, 33], [1, 33, 512], [1, 17, 1000]):
            tensors, labels = make((rows,), hidden_size, vocab, torch.bfloat16, bias=True, ignored=0.1)
            with at(rows, hidden_size, vocab):
                check(tensors, labels, TRAINED["hidden"])
                check(tensors, labels)

    @pytest.mark.parametrize("transform", ["plain", "softcap"])
    def test_plans(self, transform):
        for trained in ("score", "hidden", "hidden-bias", "adapter", "all"):
            for budget in (None, 40 * 333 * 2):
                tensors, labels = make((65,), 40, 333, torch.bfloat16, bias=True, rank=3)
                with at(trained, budget):
                    check(tensors, labels, TRAINED[trained], transform=TRANSFORMS[transform], max_tile_bytes=budget)

    def test_large_small_and_masked_logits(self):
        tensors, labels = make((33,), 40, 333, torch.bfloat16, spread=1e-6)
        check(tensors, labels)
        check(tensors, labels, TRAINED["hidden"])
        tensors, labels = make((33,), 40, 333, torch.bfloat16, bias=True)
        tensors["bias"][torch.randperm(333)[:100]] = -torch.inf
        labels[(labels >= 0) & (tensors["bias"][labels] == -torch.inf)] = -100
        check(tensors, labels)
        for size in (1e3, 1e5, 1e30):
            tensors, labels = large_and_exact(size)
            grad = torch.randn(labels.shape)
            for trained in ("hidden", "hidden-weight"):
                got = run(fused, tensors, labels, grad, TRAINED[trained])
                expected = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
                with at(size, trained):
                    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=1e-6)
                    close((expected[0], got[1]), expected, atol=2**-7)

    def test_a_tile_that_does_not_fit_float16_after_one_that_does(self):
        tensors, labels = large_and_exact(1e5)
        grad = torch.randn(labels.shape)
        tensors["hidden"][:33] *= 2.0**-10
        for order in (torch.arange(40), torch.arange(39, -1, -1)):
            moved, y = {**tensors, "hidden": tensors["hidden"][order]}, labels[order]
            for trained in ("score", "hidden", "hidden-weight"):
                got = run(fused, moved, y, grad, TRAINED[trained], max_tile_bytes=11 * 77 * 2)
                expected = run(exact, cast(moved, torch.float64), y, grad, TRAINED[trained])
                with at(trained):
                    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=2e-6)
                    close((expected[0], got[1]), expected, atol=2**-6)

    def test_stats(self):
        tensors, labels = make((45,), 40, 1003, torch.bfloat16, bias=True)
        for transform in TRANSFORMS.values():
            _, values = fused(tensors, labels, stats=ALL_STATS, **transform)
            logits = project(cast(tensors, torch.float64))
            _, true_values = fastpref.token_logps(logits, labels, stats=ALL_STATS, **transform)
            for name in ALL_STATS:
                torch.testing.assert_close(
                    getattr(values, name), getattr(true_values, name), rtol=1e-5, atol=2e-5, msg=name
                )

    @pytest.mark.numerics
    def test_rounded_logits(self):
        tensors, labels = make((45,), 40, 1003, torch.bfloat16)
        grad = torch.randn(45)
        for trained in ("score", "hidden", "hidden-weight"):
            got = run(fused, tensors, labels, grad, TRAINED[trained], logits_dtype=torch.bfloat16)
            same = run(plain, tensors, labels, grad, TRAINED[trained])  # rounds its log-probs too
            truth = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained])
            assert_no_worse(*(x[0].reshape(1, -1) for x in (got, same, truth)), torch.bfloat16, "logps")
            # and rounded they are: nearer to the rounded logits' log-probs than to the truth
            logits = project(cast(tensors, torch.float32)).bfloat16()
            assert (got[0] - token_logps_ref(logits, labels)).abs().median() <= 1e-5
            for name, gradient in got[1].items():
                assert_no_worse(gradient, same[1][name], truth[1][name], torch.bfloat16, name)

    def test_threads_and_repeats(self):
        tensors, labels = make((70,), 40, 5003, torch.bfloat16, bias=True, rank=2)
        grad, results = torch.randn(70), []
        for threads in (1, 2, 2, 5):  # a fixture puts the number back
            torch.set_num_threads(threads)
            for budget in (None, 40 * 5003 * 2):
                results.append(run(fused, tensors, labels, grad, max_tile_bytes=budget))
            check(tensors, labels)
            check(tensors, labels, TRAINED["hidden"])
        torch.testing.assert_close(results[2:4], results[4:6], rtol=0, atol=0)
        for other in results[1:]:
            torch.testing.assert_close(other[0], results[0][0], rtol=3e-7, atol=1e-6)  # sizes of 16 are 2e-6 apart
            close(other, results[0], atol=2**-6)


@pytest.mark.numerics
def test_products_agree():
    choose = getattr(_native._core, "set_linear_product", None)
    if choose is None:
        pytest.skip("this build chooses no product")
    tensors, labels = make((70,), 64, 2050, torch.bfloat16)
    grad, results = torch.randn(70), []
    try:
        for product in ("none", "avx512_bf16", "amx"):
            try:
                choose(product)
            except ValueError:
                continue
            results.append(run(fused, tensors, labels, grad))
    finally:
        choose("auto")
    for other in results[1:]:
        torch.testing.assert_close(other[0], results[0][0], rtol=1e-6, atol=4e-6)
        close(other, results[0], rtol=2**-7, atol=2**-7)
    with pytest.raises(ValueError, match="amx9"):
        choose("amx9")


# ---- stats ----


@dtypes
@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
@pytest.mark.parametrize("transform", ["plain", "softcap"])
def test_stats(place, dtype, trained, transform):
    tensors, labels = make((3, 7), 33, 777, dtype, place.device, bias=True, rank=2, ignored=0.3)
    if dtype != torch.float32:
        del tensors["A"], tensors["B"]  # hidden A^T would be rounded
    labels[0, 0] = project(cast(tensors, torch.float64))[0, 0].argmax()
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    options = {"backend": place.name, **TRANSFORMS[transform]}
    logps, values = fused(leaves, labels, stats=ALL_STATS, **options)
    _, true_values = fastpref.token_logps(
        project(cast(tensors, torch.float64)).detach(), labels, stats=ALL_STATS, **TRANSFORMS[transform]
    )
    torch.testing.assert_close(logps, fused(leaves, labels, **options), rtol=0, atol=1e-6)
    assert logps.requires_grad == bool(TRAINED[trained])
    assert values.top1[0, 0] == 1
    for name in ALL_STATS:
        got = getattr(values, name)
        assert not got.requires_grad
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, getattr(true_values, name), rtol=1e-5, atol=2e-5, msg=name)
    _, only = fused(leaves, labels, stats=("top1",), **options)
    assert only.entropy is None
    assert only.log_sum_p2 is None
    torch.testing.assert_close(only.top1, values.top1)
    _, only = fused(leaves, labels, stats=("lse",), **options)
    assert only.entropy is None
    torch.testing.assert_close(only.lse, values.lse)


def test_stats_do_not_change_the_gradient(place):
    tensors, labels = make((21,), device=place.device, bias=True)
    grad = torch.randn(21, device=place.device)
    for trained in ("hidden", "all"):
        with_stats = run(
            lambda t, y: fused(t, y, stats=ALL_STATS, backend=place.name)[0], tensors, labels, grad, TRAINED[trained]
        )
        without = run(fused, tensors, labels, grad, TRAINED[trained], backend=place.name)
        close(with_stats, without, atol=1e-6)


# ---- which tokens count ----


@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (2, 3, 5), (2, 3, 2, 2)], ids=len)
def test_leading_dimensions(place, lead):
    tensors, labels = make(lead, 16, 50, device=place.device, bias=True, ignored=0)
    grad = torch.randn(lead, device=place.device)
    got = run(fused, tensors, labels, grad, backend=place.name)
    assert got[0].shape == lead
    close(got, run(exact, cast(tensors, torch.float64), labels, grad), atol=3e-6)


def test_shift_is_hugging_faces_convention(place):
    tensors, labels = make((3, 9), 16, 50, device=place.device, ignored=0.2)
    grad = torch.randn(3, 9, device=place.device)
    logps, gradients = run(fused, tensors, labels, grad, shift=True, backend=place.name)
    by_hand = {**tensors, "hidden": tensors["hidden"][:, :-1]}
    expected, expected_gradients = run(fused, by_hand, labels[:, 1:], grad[:, :-1], backend=place.name)
    torch.testing.assert_close(logps[:, :-1], expected, rtol=1e-6, atol=2e-6)
    assert (logps[:, -1] == 0).all()
    assert (gradients["hidden"][:, -1] == 0).all()
    torch.testing.assert_close(gradients["hidden"][:, :-1], expected_gradients["hidden"])
    torch.testing.assert_close(gradients["weight"], expected_gradients["weight"], rtol=1e-5, atol=1e-5)
    one_sequence = fused({**tensors, "hidden": tensors["hidden"][0]}, labels[0], shift=True, backend=place.name)
    torch.testing.assert_close(one_sequence, logps[0], rtol=1e-6, atol=2e-6)
    one_token = fused({**tensors, "hidden": tensors["hidden"][:, :1]}, labels[:, :1], shift=True, backend=place.name)
    assert (one_token == 0).all()


@pytest.mark.parametrize("ignore_index", [0, 7, -1, 2**40])
@pytest.mark.parametrize("shift", [False, True])
def test_ignore_index(place, ignore_index, shift):
    tensors, labels = make((3, 9), 16, 50, device=place.device, ignored=0)
    labels[:, ::3] = ignore_index
    grad = torch.randn(3, 9, device=place.device)
    options = {"ignore_index": ignore_index, "shift": shift}
    got = run(fused, tensors, labels, grad, backend=place.name, **options)
    counted = (shifted(labels, ignore_index) if shift else labels) != ignore_index
    assert (got[0][~counted] == 0).all()
    assert (got[0][counted] != 0).all()
    close(got, run(exact, cast(tensors, torch.float64), labels, grad, **options), atol=3e-6)


@pytest.mark.numerics
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
@pytest.mark.parametrize("capacity", [None, 40], ids=["exact", "capacity"])
@dtypes
def test_ignored_tokens_are_not_read(place, dtype, capacity, trained, value):
    tensors, labels = make((4, 10), 16, 50, dtype, place.device, bias=True, rank=2, ignored=0.5)
    labels[0, 0], labels[1, 1] = -100, 3
    clean = tensors["hidden"].clone()
    tensors["hidden"][labels == -100] = value
    grad = torch.randn(labels.shape, device=place.device)
    grad[labels == -100] = torch.nan  # nor is their upstream gradient
    options = {"backend": place.name, "max_active_tokens": capacity}
    got = run(fused, tensors, labels, grad, TRAINED[trained], **options)
    assert (got[0][labels == -100] == 0).all()
    assert got[0].isfinite().all()
    for gradient in got[1].values():
        assert gradient.isfinite().all()
    if "hidden" in got[1]:
        assert (got[1]["hidden"][labels == -100] == 0).all()
    expected = run(fused, {**tensors, "hidden": clean}, labels, grad.nan_to_num(), TRAINED[trained], **options)
    close(got, expected, atol=1e-6 if dtype == torch.float32 else 2**-7)
    _, values = fused(tensors, labels, stats=ALL_STATS, **options)
    for stat in values:
        assert (stat[labels == -100] == 0).all()
        assert stat.isfinite().all()


@dtypes
@pytest.mark.parametrize("capacity", [None, 5], ids=["exact", "capacity"])
def test_all_ignored_is_a_differentiable_zero(place, capacity, dtype):
    tensors, labels = make((2, 3), 8, 40, dtype, place.device, bias=True, rank=2)
    tensors["hidden"].fill_(torch.nan)
    labels.fill_(7)
    grad = torch.ones(2, 3, device=place.device)
    options = {"ignore_index": 7, "backend": place.name, "max_active_tokens": capacity}
    for plan, trained in TRAINED.items():
        logps, gradients = run(fused, tensors, labels, grad, trained, **options)
        assert (logps == 0).all()
        for name, gradient in gradients.items():
            assert gradient.shape == tensors[name].shape
            assert (gradient == 0).all(), f"{plan}: {name}"
    _, values = fused(tensors, labels, stats=ALL_STATS, **options)
    assert all((value == 0).all() for value in values)


@dtypes
@pytest.mark.parametrize("lead", [(0,), (0, 4), (3, 0)], ids=str)
def test_no_tokens(place, lead, dtype):
    tensors, labels = make(lead, 8, 40, dtype, place.device, bias=True, rank=2)
    grad = torch.ones(lead, device=place.device)
    for plan, trained in TRAINED.items():
        logps, gradients = run(fused, tensors, labels, grad, trained, backend=place.name)
        assert logps.shape == lead
        for name, gradient in gradients.items():
            assert gradient.shape == tensors[name].shape
            assert (gradient == 0).all(), f"{plan}: {name}"
    _, values = fused(tensors, labels, stats=ALL_STATS, shift=True, backend=place.name)
    assert values.entropy.shape == lead


def test_a_masked_column_has_no_probability_and_no_gradient(place):
    for dtype in DTYPES:
        tensors, labels = make((20,), 16, 60, dtype, place.device, bias=True, ignored=0)
        labels %= 40
        tensors["bias"][40:] = -torch.inf
        grad = torch.randn(20, device=place.device)
        kept = {**tensors, "weight": tensors["weight"][:40], "bias": tensors["bias"][:40]}
        for trained in (TRAINED["hidden"], TRAINED["all"]):
            logps, gradients = run(fused, tensors, labels, grad, trained, backend=place.name)
            expected, expected_gradients = run(fused, kept, labels, grad, trained, backend=place.name)
            torch.testing.assert_close(logps, expected, rtol=1e-6, atol=2e-6)
            atol = 1e-5 if dtype == torch.float32 else 2**-6
            torch.testing.assert_close(gradients["hidden"], expected_gradients["hidden"], rtol=atol, atol=atol)
            for name in trained[1:]:
                if name in gradients:
                    assert (gradients[name][40:] == 0).all()
                    torch.testing.assert_close(gradients[name][:40], expected_gradients[name], rtol=atol, atol=atol)
        _, values = fused(tensors, labels, stats=("entropy", "log_sum_p2", "top1"), backend=place.name)
        _, kept_values = fused(kept, labels, stats=("entropy", "log_sum_p2", "top1"), backend=place.name)
        for name in ("entropy", "log_sum_p2", "top1"):
            torch.testing.assert_close(getattr(values, name), getattr(kept_values, name), rtol=0, atol=1e-5)


@dtypes
def test_a_label_without_a_probability(place, dtype):
    tensors, labels = make((6,), 16, 60, dtype, place.device, bias=True, ignored=0)
    labels[:] = torch.arange(6)
    tensors["bias"][2] = -torch.inf
    logps = fused(tensors, labels, backend=place.name)
    assert logps[2] == -torch.inf
    assert logps[labels != 2].isfinite().all()
    tensors["bias"][:] = -torch.inf  # one column left, the label's: certain
    tensors["bias"][5] = 0.0
    grad = torch.ones(6, device=place.device)
    logps, gradients = run(fused, tensors, torch.full_like(labels, 5), grad, backend=place.name)
    assert (logps == 0).all()
    for gradient in gradients.values():
        assert (gradient == 0).all()


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_a_bad_token_stays_in_its_row(place, dtype, value):
    tensors, labels = make((33,), 16, 60, dtype, place.device, ignored=0)
    grad = torch.randn(33, device=place.device)
    expected = run(fused, tensors, labels, grad, TRAINED["hidden"], backend=place.name)
    tensors["hidden"][5, 3] = value
    for trained in (TRAINED["hidden"], TRAINED["hidden-weight"]):
        logps, gradients = run(fused, tensors, labels, grad, trained, backend=place.name)
        assert logps[5].isnan()
        good = torch.arange(33, device=place.device) != 5
        torch.testing.assert_close(logps[good], expected[0][good], rtol=1e-6, atol=2e-6)
        bound = 1e-5 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(gradients["hidden"][good], expected[1]["hidden"][good], rtol=bound, atol=bound)
        assert gradients["hidden"][5].isnan().all()


@pytest.mark.parametrize("bad", [50, -1, -101, 2**40])
@pytest.mark.parametrize("trained", ["score", "hidden", "all"])
def test_label_out_of_range(place, bad, trained):
    tensors, labels = make((4, 3), 8, 50, device=place.device, ignored=0)
    labels[2, 1] = bad
    labels[0] = -100
    leaves = {name: t.requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    if place.device.type == "cpu" and place.name != "triton":
        text = f"labels must lie in \\[0, 50\\) or equal ignore_index=-100, got {bad} at position 7"
        with pytest.raises(ValueError, match=text):
            fused(leaves, labels, backend=place.name)
        return
    try:
        logps = fused(leaves, labels, backend=place.name)
    except ValueError as error:
        assert place.device.type == "cpu"
        assert f"got {bad} at position 7" in str(error)
        return
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[2, 1] = True
    assert torch.equal(logps.isnan().cpu(), expected)
    if leaves["hidden"].requires_grad:
        (gradient,) = torch.autograd.grad(logps.sum(), leaves["hidden"])
        assert torch.equal(gradient.isnan().all(-1).cpu(), expected)


# ---- layouts ----

HIDDEN_LAYOUTS = {
    "every-other-token": lambda x: x[::2, 1::2],
    "sliced-tokens": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "every-other-feature": lambda x: x[..., ::2],
    "sliced-features": lambda x: x[..., 3:-2],
    "features-first": lambda x: x.transpose(1, 2),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "four-dimensions": lambda x: x.unflatten(0, (2, 2)).transpose(0, 2),
    "reversed-storage": lambda x: x.flip(0).contiguous(),
}


@dtypes
@pytest.mark.parametrize("layout", HIDDEN_LAYOUTS.values(), ids=HIDDEN_LAYOUTS)
def test_hidden_layouts(place, layout, dtype):
    hidden = layout(torch.randn(4, 6, 18, device=place.device).to(dtype))
    tensors, _ = make((1,), hidden.shape[-1], 70, dtype, place.device)
    labels = torch.randint(0, 70, hidden.shape[:-1], device=place.device)
    labels[0] = -100
    grad = torch.randn(labels.shape, device=place.device)
    contiguous = {**tensors, "hidden": hidden.contiguous()}
    for trained in ("hidden", "all"):
        got = run(fused, {**tensors, "hidden": hidden}, labels, grad, TRAINED[trained], backend=place.name)
        expected = run(fused, contiguous, labels, grad, TRAINED[trained], backend=place.name)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=2e-6)
        close(got, expected, atol=1e-5 if dtype == torch.float32 else 2**-7)


WEIGHT_LAYOUTS = {  # views of a [V', H'] or [H', V'] leaf
    "transposed": ((20, 70), lambda w: w.t()),
    "sliced-columns": ((70, 33), lambda w: w[:, :20]),
    "sliced-columns-unaligned": ((70, 33), lambda w: w[:, 7:27]),
    "every-other-row": ((140, 20), lambda w: w[::2]),
    "every-other-column": ((70, 40), lambda w: w[:, ::2]),
    "last-rows": ((100, 20), lambda w: w[30:]),
    "expanded": ((1, 20), lambda w: w.expand(70, -1)),
    "permuted": ((7, 20, 10), lambda w: w.permute(0, 2, 1).reshape(70, 20)),
}


@dtypes
@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS.values(), ids=WEIGHT_LAYOUTS)
def test_weight_views(place, layout, dtype):
    shape, view = layout
    tensors, labels = make((13,), 20, 70, dtype, place.device)
    tensors["weight"] = torch.randn(shape, device=place.device).to(dtype)
    grad = torch.randn(13, device=place.device)

    def viewed(f):
        return lambda t, y, **options: f({**t, "weight": view(t["weight"])}, y, **options)

    bound = {torch.float32: 2e-5, torch.bfloat16: 2**-4, torch.float16: 2**-7}[dtype]
    for trained in (("hidden",), ("hidden", "weight"), ("weight",)):
        got = run(viewed(fused), tensors, labels, grad, trained, backend=place.name)
        assert all(gradient.shape == tensors[name].shape for name, gradient in got[1].items())
        expected = run(viewed(exact), cast(tensors, torch.float64), labels, grad, trained)
        torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=2e-5)
        close(got, expected, rtol=0, atol=bound)


def test_small_input_layouts(place):
    tensors, labels = make((40, 30), 8, 50, device=place.device, bias=True, rank=3)
    grad = torch.randn(40, 30, device=place.device)
    expected = run(fused, tensors, labels, grad, backend=place.name)
    strided = {
        **tensors,
        "bias": tensors["bias"].repeat_interleave(2)[::2],
        "A": tensors["A"].t().contiguous().t(),
        "B": torch.cat([tensors["B"], tensors["B"]], 1)[:, :3],
    }
    close(run(fused, strided, labels, grad, backend=place.name), expected, atol=1e-5)
    for same in (labels.int(), labels.t().contiguous().t(), labels.repeat(1, 2)[:, :30]):
        close(run(fused, tensors, same, grad, backend=place.name), expected, atol=1e-6)
    # an upstream gradient without memory of its own, as sum() sends it
    ones = torch.ones((), device=place.device).expand(40, 30)
    close(
        run(fused, tensors, labels, ones, backend=place.name),
        run(fused, tensors, labels, ones.contiguous(), backend=place.name),
        atol=1e-6,
    )
    transposed = grad.t().contiguous().t()
    close(run(fused, tensors, labels, transposed, backend=place.name), expected, atol=1e-6)


def test_expanded_labels(place):
    tensors, _ = make((5, 30), 8, 50, device=place.device)
    labels = torch.randint(0, 50, (1, 30), device=place.device).expand(5, -1)
    grad = torch.randn(5, 30, device=place.device)
    close(
        run(fused, tensors, labels, grad, backend=place.name),
        run(fused, tensors, labels.contiguous(), grad, backend=place.name),
        atol=1e-6,
    )


def test_a_tied_embedding_gets_both_gradients():
    weight, ids = torch.randn(70, 20, dtype=torch.float64), torch.randint(0, 70, (4, 9))

    def embedded(f):
        def g(tensors, labels, **options):
            hidden = torch.tanh(F.embedding(labels, tensors["weight"]))
            return f({"hidden": hidden, "weight": tensors["weight"]}, labels, shift=True, **options)

        return g

    grad = torch.randn(4, 9, dtype=torch.float64)
    close(run(embedded(fused), {"weight": weight}, ids, grad), run(embedded(exact), {"weight": weight}, ids, grad))
    # and a hidden state that is the head itself
    labels = torch.arange(70)

    def itself(f):
        return lambda tensors, y: f({"hidden": tensors["weight"], "weight": tensors["weight"]}, y)

    grad = torch.randn(70, dtype=torch.float64)
    close(run(itself(fused), {"weight": weight}, labels, grad), run(itself(exact), {"weight": weight}, labels, grad))


# ---- plans ----


@pytest.mark.numerics
@dtypes
def test_every_plan_gives_the_same(place, dtype):
    tensors, labels = make((41,), 24, 203, dtype, place.device, bias=True, rank=4)
    grad = torch.randn(41, device=place.device)
    full = run(fused, tensors, labels, grad, backend=place.name)
    for name, trained in TRAINED.items():
        logps, gradients = run(fused, tensors, labels, grad, trained, backend=place.name)
        torch.testing.assert_close(logps, full[0], rtol=1e-6, atol=1e-6, msg=name)
        close((logps, gradients), (logps, {key: full[1][key] for key in gradients}), atol=loosely(dtype))


@dtypes
@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight", "hidden-adapter", "all"])
def test_every_budget_gives_the_same(place, dtype, trained):
    tensors, labels = make((23,), 24, 203, dtype, place.device, bias=True, rank=4)
    grad = torch.randn(23, device=place.device)
    expected = run(fused, tensors, labels, grad, TRAINED[trained], backend=place.name)
    for rows in (1, 2, 7, 22, 23, 10**6):
        got = run(fused, tensors, labels, grad, TRAINED[trained], backend=place.name, max_tile_bytes=rows * 203 * 4)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=2e-6)
        close(got, expected, atol=loosely(dtype))


def test_a_budget_below_one_row_is_one_row():
    tensors, labels = make((5,))
    torch.testing.assert_close(fused(tensors, labels, max_tile_bytes=1), fused(tensors, labels), rtol=1e-6, atol=2e-6)


@dtypes
def test_scoring_and_training_agree_with_another_number_of_tokens(place, dtype):
    # the reference pass has other micro-batches: a policy equal to it must start at a margin of nothing
    tensors, labels = make((64,), 48, 1009, dtype, place.device, ignored=0)
    whole = fused(tensors, labels, backend=place.name)
    for rows in (slice(0, 1), slice(5, 22), slice(31, 64)):
        part = {**tensors, "hidden": tensors["hidden"][rows].requires_grad_()}
        torch.testing.assert_close(
            fused(part, labels[rows], backend=place.name).detach(), whole[rows], rtol=1e-6, atol=4e-6
        )


@pytest.mark.parametrize("trained", ["hidden", "hidden-weight", "all"])
@dtypes
def test_upstream_gradients(place, dtype, trained):
    tensors, labels = make((30,), 24, 203, dtype, place.device, bias=True, rank=2)
    ones = torch.ones(30, device=place.device)

    def gradients(grad):
        return run(fused, tensors, labels, grad, TRAINED[trained], backend=place.name)[1]

    unit = gradients(ones)
    for name, gradient in gradients(torch.zeros_like(ones)).items():
        assert (gradient == 0).all(), name
    exponents = (-10, 4) if dtype == torch.float16 else (-30, -10, 10, 30)
    for exponent in exponents:
        factor = 2.0**exponent
        for name, gradient in gradients(ones * factor).items():
            expected = unit[name].double() * factor
            size = expected.abs().max().item()
            torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=2 * loosely(dtype) * size + 1e-7)
    check_grad = torch.randn(30, device=place.device)
    check_grad[::3] = 0  # tokens that do not count in this loss
    got = run(fused, tensors, labels, check_grad, TRAINED[trained], backend=place.name)
    if "hidden" in got[1]:
        assert (got[1]["hidden"][::3] == 0).all()
    expected = run(exact, cast(tensors, torch.float64), labels, check_grad, TRAINED[trained])
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]
    close((expected[0], got[1]), expected, atol=bound)
    three = run(fused, tensors, labels, 3.0 * ones, TRAINED[trained], backend=place.name)[1]
    leaves = {name: t.detach().requires_grad_(name in TRAINED[trained]) for name, t in tensors.items()}
    (3.0 * fused(leaves, labels, backend=place.name)).sum().backward()
    for name, gradient in three.items():
        torch.testing.assert_close(leaves[name].grad, gradient, rtol=0, atol=0)


# ---- fixed capacity ----


@dtypes
@pytest.mark.parametrize("trained", ["score", "hidden", "hidden-weight", "all"])
def test_a_fixed_capacity_changes_nothing(place, dtype, trained):
    tensors, labels = make((4, 10), 24, 203, dtype, place.device, bias=True, rank=2, ignored=0.6)
    labels[0, 0] = 3
    grad = torch.randn(4, 10, device=place.device)
    active = int((labels != -100).sum())
    expected = run(fused, tensors, labels, grad, TRAINED[trained], backend=place.name)
    for capacity in (active, active + 1, 40, 1000):
        options = {"max_active_tokens": capacity, "backend": place.name}
        got = run(fused, tensors, labels, grad, TRAINED[trained], **options)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=2e-6)
        close(got, expected, atol=loosely(dtype))
        tiled = run(fused, tensors, labels, grad, TRAINED[trained], max_tile_bytes=3 * 203 * 4, **options)
        close(tiled, expected, atol=loosely(dtype))
        _, values = fused(tensors, labels, stats=ALL_STATS, **options)
        _, true_values = fused(tensors, labels, stats=ALL_STATS, backend=place.name)
        torch.testing.assert_close(values, true_values, rtol=1e-5, atol=1e-5)


# ---- properties ----


@settings(deadline=None, max_examples=50)
@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    hidden_size=st.integers(1, 40),
    vocab=st.integers(1, 200),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    trained=st.sampled_from(sorted(TRAINED)),
    extras=st.sampled_from(sorted(EXTRAS)),
    rows=st.none() | st.integers(1, 9),
    slack=st.none() | st.integers(0, 3),
    shift=st.booleans(),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_shape_mask_and_plan(lead, hidden_size, vocab, dtype, trained, extras, rows, slack, shift, ignored, seed):
    torch.manual_seed(seed)
    tensors, labels = make(tuple(lead), hidden_size, vocab, dtype, ignored=ignored, **EXTRAS[extras])
    shift = shift and bool(lead)
    counted = int(((shifted(labels, -100) if shift else labels) != -100).sum())
    options = {
        "shift": shift,
        "max_tile_bytes": None if rows is None else rows * vocab * 8,
        "max_active_tokens": None if slack is None else max(1, counted + slack),
    }
    grad = torch.randn(lead)
    got = run(fused, tensors, labels, grad, TRAINED[trained], **options)
    expected = run(exact, cast(tensors, torch.float64), labels, grad, TRAINED[trained], shift=shift)
    bound = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]
    adapted = dtype in (torch.bfloat16, torch.float16) and "A" in tensors
    torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=bound if adapted else min(bound, 2e-5))
    # sums of 16-bit gradients are off by their largest terms, which cancel
    scale = sum(t.abs().max().item() for t in tensors.values() if t.numel()) * max(1.0, math.sqrt(counted))
    close((expected[0], got[1]), expected, atol=bound * max(scale, 1.0))


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 20), vocab=st.integers(2, 150), seed=st.integers(0, 2**31), frozen=st.booleans())
def test_permutations_and_offsets_change_nothing(rows, vocab, seed, frozen):
    torch.manual_seed(seed)
    tensors, labels = make((rows,), 16, vocab, bias=True)
    grad, trained = torch.randn(rows), TRAINED["hidden"] if frozen else TRAINED["all"]
    logps, gradients = run(fused, tensors, labels, grad, trained)
    # of the tokens
    order = torch.randperm(rows)
    permuted = {**tensors, "hidden": tensors["hidden"][order]}
    got = run(fused, permuted, labels[order], grad[order], trained)
    close(got, (logps[order], {**gradients, "hidden": gradients["hidden"][order]}), atol=1e-5)
    # of the vocabulary
    order = torch.randperm(vocab)
    permuted = {**tensors, "weight": tensors["weight"][order], "bias": tensors["bias"][order]}
    renamed = torch.where(labels == -100, -100, order.argsort()[labels.clamp(min=0)])
    got = run(fused, permuted, renamed, grad, trained)
    moved = {name: gradients[name] if name == "hidden" else gradients[name][order] for name in gradients}
    close(got, (logps, moved), atol=1e-5)
    # a constant added to every logit
    close(run(fused, {**tensors, "bias": tensors["bias"] + 8.0}, labels, grad, trained), (logps, gradients), atol=2e-5)
    # the gradient of the bias sums to zero over the vocabulary
    if not frozen:
        assert gradients["bias"].double().sum().abs() <= 1e-4
