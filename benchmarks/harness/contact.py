"""First contact: every variant of every GPU kernel launched once, on small odd shapes, against float64.

ITEMS: {name: function(device) -> {"op", "backend", "ok", "parts": {name: {"error", "bound"}}}}, for worker.py. An error
is ||found - expected|| / ||expected||; an entry that is NaN, or was never written, makes it infinite.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastpref
from fastpref import operators
from fastpref._logps.scaled import scaled
from fastpref._logps.token_logps import STATS, write_gradient
from fastpref._logps.transform import Transform
from fastpref._lowrank.residual_pass import residual_pass, residual_pass_ref

BACKENDS = ("native", "triton")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRANSFORMS = {"plain": {}, "softcap": {"softcap": 30.0, "temperature": 0.7}}
GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
FP32_BOUND = 1e-5
IGNORE = -100


class Part(NamedTuple):
    """What is compared: one output of one launch."""

    name: str
    found: Tensor
    expected: Tensor
    bound: float = FP32_BOUND


def _checked(op: str, backend: str, parts: Callable[[torch.device], Iterator[Part]], device: torch.device) -> dict:
    """The record of one variant. What a part raises leaves the parts before it in the record."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is full of NaN
    record = {"op": op, "backend": backend, "ok": True, "parts": {}}
    try:
        for part in parts(device):
            error = _error(part.found, part.expected)
            ok = error <= part.bound
            record["parts"][part.name] = {"error": error if math.isfinite(error) else str(error), "bound": part.bound}
            record["ok"] = record["ok"] and ok
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        record |= {"ok": False, "failed": f"{type(error).__name__}: {str(error)[:500]}"}
    finally:
        torch.use_deterministic_algorithms(False)
    return record


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape:
        raise AssertionError(f"shape {list(found.shape)}, expected {list(expected.shape)}")
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return math.inf if math.isnan(error) else error


# ---- log-probs of tokens ----


def _logits(device, dtype, transform) -> tuple[Tensor, Tensor, Transform]:
    """Rows that begin at any address, a confident one, an ignored one; on a GPU as long as a real vocabulary."""
    rows, vocab = (9, 128256 + 1) if device.type == "cuda" else (4, 1003)
    values = torch.randn(rows, vocab, device=device) * 3
    labels = torch.randint(0, vocab, (rows,), device=device)
    values[0, labels[0]] = 30.0
    labels[1] = IGNORE
    return values.to(dtype), labels, Transform(**TRANSFORMS[transform])


def _token_forward(device, backend, dtype, transform, stats) -> Iterator[Part]:
    logits, labels, transform = _logits(device, dtype, transform)
    found = operators.token_logps_fwd(logits, labels, *transform, stats, backend)
    expected = operators.token_logps_fwd(logits.double(), labels, *transform, stats, "reference")
    multiplier, _ = transform.multiplier_and_tanh_scale()
    yield Part("log-probs", found[0], expected[0])
    yield Part("lse", *(multiplier * lse[0].double() + lse[1].double() for lse in (found[1], expected[1])))
    for name, *values in zip(STATS, found[2], expected[2], strict=False):
        yield Part(name, *values)


def _token_backward(device, backend, dtype, transform, out_dtype) -> Iterator[Part]:
    """After the reference's forward: of the kernel alone. Into memory of out_dtype, and over the logits."""
    logits, labels, transform = _logits(device, dtype, transform)
    grad = torch.randn(labels.shape, device=device)
    saved = operators.token_logps_fwd(logits, labels, *transform, False, "reference")[:2]
    exact_saved = operators.token_logps_fwd(logits.double(), labels, *transform, False, "reference")[:2]
    args = grad.double(), logits.double(), labels, *exact_saved, *transform, "reference"
    expected, bound = operators.token_logps_bwd(*args), GRADIENT_BOUND[out_dtype]
    out = torch.empty_like(logits, dtype=out_dtype)
    write_gradient(out, grad, logits, labels, *saved, transform, backend)
    yield Part("gradient", out, expected, bound)
    if dtype == out_dtype:
        operators.token_logps_bwd_(grad, logits, labels, *saved, *transform, backend)
        yield Part("gradient in place", logits, expected, bound)


# ---- preference losses ----


def _preference_inputs(device, dtype, layout) -> tuple[Tensor, Tensor, dict]:
    pairs, tokens, vocab = (3, 40, 5003) if device.type == "cuda" else (1, 5, 203)
    logits = (torch.randn(2 * pairs, tokens, vocab, device=device) * 3).to(dtype)
    labels = torch.randint(0, vocab, (2 * pairs, tokens), device=device)
    labels[:, :2] = IGNORE
    labels[:1, -2:] = IGNORE  # the first pair's rejected sequence is longer, the others' chosen ones
    labels[pairs + 1 :, -2:] = IGNORE
    given = {"rating_gap": torch.rand(pairs, device=device)}
    if layout == "ref_logits":
        given["ref_logits"] = (logits.float() + torch.randn(logits.shape, device=device) / 10).to(dtype)
    else:
        given["ref_token_logps"] = -5 * torch.rand(labels.shape, device=device)
    if layout == "packed":
        given["cu_seqlens"] = torch.arange(2 * pairs + 1, device=device) * tokens
        given["ref_token_logps"] = given["ref_token_logps"].flatten()
        logits, labels = logits.flatten(0, 1), labels.flatten()
    return logits, labels, given


def _preference(device, backend, dtype, layout, transform, stats, loss="rdpo") -> Iterator[Part]:
    """rdpo is of the family whose epilogue is in the kernels; ipo, of mean log-probs, is torch between them; so is
    ld_dpo, of a part of the completion, which has a kernel more."""
    logits, labels, given = _preference_inputs(device, dtype, layout)
    options = {"loss": loss, "shift": True, "stats": STATS if stats else (), **TRANSFORMS[transform]}
    exact = {name: t.double() if t.dtype.is_floating_point else t for name, t in given.items()}
    leaf, true_leaf = logits.requires_grad_(), logits.detach().double().requires_grad_()
    found = fastpref.preference_loss(leaf, labels, backend=backend, **given, **options)
    expected = fastpref.preference_loss(true_leaf, labels, backend="reference", **exact, **options)
    for name in ("loss", "chosen_logps", "rejected_logps"):
        yield Part(name, getattr(found, name), getattr(expected, name))
    yield Part("margins", found.margins, expected.margins, 1e-4)  # the difference of two sums
    for name in ("entropy", "log_sum_p2", "top1", "chosen_mean_logit", "rejected_mean_logit") if stats else ():
        yield Part(name, getattr(found.stats, name), getattr(expected.stats, name), 1e-4)
    (truth,) = torch.autograd.grad(expected.loss, true_leaf)
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    yield Part("gradient", gradient, truth, 2e-5 + GRADIENT_BOUND[dtype])


# ---- from hidden states ----


def _head(device, dtype) -> tuple[Tensor, Tensor, Tensor]:
    pairs, tokens, width, vocab = (2, 40, 128, 5003) if device.type == "cuda" else (1, 4, 16, 203)
    hidden = torch.randn(2 * pairs, tokens, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * 3 / width**0.5).to(dtype)
    labels = torch.randint(0, vocab, (2 * pairs, tokens), device=device)
    labels[:, :1] = IGNORE
    return hidden, weight, labels


def _linear(device, backend, dtype, kind) -> Iterator[Part]:
    """kind: score, frozen (the unit gradient), trained (recomputed), pairs (in one tile), pairs-frozen."""
    hidden, weight, labels = _head(device, dtype)
    pairs = len(labels) // 2
    reference, gap = -5 * torch.rand(labels.shape, device=device), torch.rand(pairs, device=device)

    def run(hidden, weight, reference, gap, backend):
        leaves = [hidden.detach().requires_grad_(kind != "score")]
        leaves.append(weight.detach().requires_grad_(kind in ("trained", "pairs")))
        if kind.startswith("pairs"):
            out = fastpref.linear_preference_loss(
                *leaves, labels, ref_token_logps=reference, loss="rdpo", rating_gap=gap, backend=backend
            )
            scores, total = out.chosen_logps, out.loss
        else:
            scores = fastpref.linear_token_logps(*leaves, labels, backend=backend)
            total = scores.sum()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return scores, torch.autograd.grad(total, wanted) if wanted else []

    found, gradients = run(hidden, weight, reference, gap, backend)
    exact = (t.double() for t in (hidden, weight, reference, gap))
    expected, truths = run(*exact, "reference")
    yield Part("log-probs", found, expected)
    # a gradient from 16-bit operands: the coefficients enter their products rounded
    bound = 3 * GRADIENT_BOUND[dtype]
    for name, *values in zip(("hidden gradient", "weight gradient"), gradients, truths, strict=False):
        yield Part(name, *values, bound)


def _scaled(device, dtype) -> Iterator[Part]:
    values = torch.randn(70_001 if device.type == "cuda" else 5001, device=device).to(dtype)
    for factor in (1.0, 0.3):
        expected = values.double() * factor
        yield Part(f"times {factor}", scaled(values.clone(), torch.full((), factor, device=device)), expected, 6e-3)


# ---- the residual pass ----


def _residual(device, backend, dtype, psi, rank, structure, weighted) -> Iterator[Part]:
    m, n = (1500, 1500) if device.type == "cuda" else (70, 70)
    left, right = (torch.randn(m, rank, device=device) for _ in range(2))
    matrix = left @ right.t() + torch.randn(m, n, device=device)
    unit = 0.05 if dtype == torch.int8 else 1.0
    if structure == "skew":
        left, right = torch.cat([left, -right], 1), torch.cat([right, left], 1)
        matrix = matrix - matrix.t()
    matrix = (matrix / unit).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else matrix.to(dtype)
    matrix.view(-1)[:: 97 * 7] = -128 if dtype == torch.int8 else torch.nan
    options = {"psi": psi, "zeta": 0.7, "scale": unit, "structure": structure, "squares": weighted}
    if weighted:
        options["row_weights"], options["column_weights"] = (torch.rand(k, device=device) for k in (m, n))
    found = residual_pass(matrix, left, right, backend=backend, **options)
    expected = residual_pass_ref(matrix, left, right, **options)
    bound = 1e-2 if psi == "hard" else 1e-4  # an |R| next to zeta falls on either side, and takes its whole E along
    yield Part("left gradient", found.left_grad, expected.left_grad, bound)
    yield Part("right gradient", found.right_grad, expected.right_grad, bound)
    yield Part("sum of squares", found.sum_squares, expected.sum_squares, 1e-4)
    yield Part("observed", found.observed, expected.observed, 0.0)
    yield Part("kept", found.kept, expected.kept, 2e-3)
    if weighted:
        yield Part("row squares", found.row_squares, expected.row_squares, 1e-4)
        yield Part("column squares", found.column_squares, expected.column_squares, 1e-4)


# ---- the list ----


def _variants() -> Iterator[tuple[str, Callable]]:
    """(op-part-backend-what, item) of each; the cheapest and most telling first."""

    def item(op, backend, parts, **options):
        return partial(_checked, op, backend, partial(parts, backend=backend, **options))

    for backend in BACKENDS:
        for dtype in DTYPES:
            of = {"dtype": DTYPES[dtype]}
            for transform in TRANSFORMS:
                name = f"{backend}-{dtype}-{transform}"
                these = of | {"transform": transform}
                for stats in (False, True):
                    what = f"{name}-stats" if stats else name
                    yield (
                        f"token_logps-forward-{what}",
                        item("token_logps", backend, _token_forward, stats=stats, **these),
                    )
                    options = these | {"layout": "padded", "stats": stats}
                    yield f"preference-{what}", item("preference", backend, _preference, **options)
                options = these | {"out_dtype": DTYPES[dtype]}
                yield f"token_logps-backward-{name}", item("token_logps", backend, _token_backward, **options)
                if dtype != "fp32":
                    options = these | {"dtype": torch.float32, "out_dtype": DTYPES[dtype]}
                    what = f"{backend}-fp32-to-{dtype}-{transform}"
                    yield f"token_logps-backward-{what}", item("token_logps", backend, _token_backward, **options)
            for layout in ("packed", "ref_logits"):
                options = of | {"transform": "plain", "layout": layout, "stats": False}
                yield f"preference-{backend}-{dtype}-{layout}", item("preference", backend, _preference, **options)
            for loss in ("ipo", "ld_dpo"):
                options = of | {"transform": "plain", "layout": "padded", "stats": False, "loss": loss}
                yield f"preference-{backend}-{dtype}-{loss}", item("preference", backend, _preference, **options)
            for kind in ("score", "frozen", "trained", "pairs", "pairs-frozen"):
                op = "linear_preference" if kind.startswith("pairs") else "linear_logps"
                yield f"{op}-{backend}-{dtype}-{kind}", item(op, backend, _linear, kind=kind, **of)
    for dtype in DTYPES:
        scale = partial(_checked, "linear_preference", "triton", partial(_scaled, dtype=DTYPES[dtype]))
        yield f"scaled-triton-{dtype}", scale
    general = {"rank": 5, "structure": "general", "weighted": False}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        for psi in ("hard", "soft", "cauchy", "identity"):
            name = f"residual_pass-triton-{str(dtype).removeprefix('torch.')}-{psi}"
            yield name, item("residual_pass", "triton", _residual, dtype=dtype, psi=psi, **general)
    for name, more in {
        "rank10": {"rank": 10},
        "rank20": {"rank": 20},
        "rank40": {"rank": 40},
        "skew": {"structure": "skew"},
        "weighted": {"weighted": True},
    }.items():
        options = general | {"dtype": torch.float32, "psi": "cauchy"} | more
        yield f"residual_pass-triton-float32-cauchy-{name}", item("residual_pass", "triton", _residual, **options)


def _build_info(device) -> dict:
    return {"build_info": json.loads(json.dumps(fastpref.build_info(), default=str))}


ITEMS = {"build_info": _build_info} | dict(_variants())
# of a rehearsal: each kernel and each of its switches once
FEW = (
    "build_info",
    "token_logps-forward-native-bf16-softcap-stats",
    "token_logps-backward-native-fp32-to-bf16-plain",
    "preference-native-bf16-plain",
    "preference-native-fp32-softcap-stats",
    "preference-native-fp16-packed",
    "preference-native-bf16-ref_logits",
    "preference-native-bf16-ld_dpo",
    "preference-triton-bf16-plain",
    "linear_preference-native-bf16-pairs",
    "linear_logps-native-fp32-frozen",
    "token_logps-forward-triton-bf16-plain",
    "token_logps-backward-triton-fp32-to-bf16-plain",
    "scaled-triton-fp32",
)


def names(dry_run: bool, few: bool) -> tuple[str, ...]:
    return FEW if few else tuple(ITEMS)


def cap_s(name: str) -> float:
    return 40
