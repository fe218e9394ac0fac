"""What a preference step costs: plain PyTorch against fastpref from logits and from hidden states, on the same weights
and the same batches."""

import ctypes
import gc
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref

LOSS_TOLERANCE = 1e-5  # relative; losses further apart than this are not the same computation
MB = 1e6


@dataclass(frozen=True)
class Batch:
    """B pairs: the first half of the sequences is chosen, the second half rejected."""

    ids: Tensor  # [2B, T] int64
    labels: Tensor  # [2B, T] int64, unshifted, -100 on prompt and padding
    ref_token_logps: Tensor  # [2B, T] fp32; entry t belongs to the label at t + 1
    rating_gap: Tensor  # [B] fp32


def linear_loss(hidden, weight, batch, beta, beta_rating) -> fastpref.PreferenceOutput:
    """Computes RDPO by fastpref from hidden states [2B, T, H] and the head [V, H]; the logits are never stored."""
    return fastpref.linear_preference_loss(hidden, weight, batch.labels, **rdpo_options(batch, beta, beta_rating))


def fused_loss(logits, batch, beta, beta_rating) -> fastpref.PreferenceOutput:
    """Computes RDPO by fastpref. The gradient replaces the logits [2B, T, V] in place: nothing else reads them."""
    return fastpref.preference_loss(
        logits, batch.labels, inplace_backward=True, **rdpo_options(batch, beta, beta_rating)
    )


def rdpo_options(batch, beta, beta_rating) -> dict:
    """Returns the arguments that both forms of the loss share."""
    return {
        "ref_token_logps": batch.ref_token_logps,
        "loss": "rdpo",
        "loss_options": {"beta_rating": beta_rating},
        "beta": beta,
        "rating_gap": batch.rating_gap,
        "shift": True,
    }


def plain_loss(logits, batch, beta, beta_rating) -> tuple[Tensor, Tensor]:
    """Returns (loss, margins [B]): RDPO as one writes it in PyTorch, in the dtype of the logits."""
    targets = batch.labels[:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    log_ratios = ((logps - batch.ref_token_logps[:, :-1]) * (targets != -100)).sum(-1)
    chosen, rejected = log_ratios.chunk(2)
    margins = beta * (chosen - rejected)
    return -F.logsigmoid(margins - beta / beta_rating * batch.rating_gap).mean(), margins


def measure_cost(model, batches, beta, beta_rating, advance) -> dict:
    """Runs forward, loss and backward of every batch by all three, interleaved; the weights stay as they are.

    "plain" and "fastpref" take the model's logits, "linear" its hidden states and its head. Times are medians over the
    batches, a ratio is the median of the ratios per batch to plain. Peak memory is the growth of the resident set
    during a step, the largest over the batches (None where the system does not tell). Margin errors are those of
    margin_errors. Differences of loss and gradient are relative to plain, the largest over the batches.
    """
    methods = {
        "plain": lambda batch: plain_loss(model(batch.ids), batch, beta, beta_rating)[0],
        "fastpref": lambda batch: fused_loss(model(batch.ids), batch, beta, beta_rating).loss,
        "linear": lambda batch: (
            linear_loss(model.hidden_states(batch.ids), model.embedding.weight, batch, beta, beta_rating).loss
        ),
    }
    for loss in methods.values():
        run_step(model, batches[0], loss)  # warm-up: thread pools, lazy imports
    names = list(methods)
    seconds, peaks = ({name: [] for name in names} for _ in range(2))
    losses, gradients = {}, {}
    margin_error, loss_difference, gradient_difference = (dict.fromkeys(names, 0.0) for _ in range(3))
    for number, batch in enumerate(batches):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            peak = PeakGrowth()
            losses[name], gradients[name], elapsed = run_step(model, batch, methods[name])
            peaks[name].append(peak.bytes())
            seconds[name].append(elapsed)
        errors = margin_errors(model, batch, beta, beta_rating)
        for name in names:
            apart = relative_size(losses[name] - losses["plain"], losses["plain"])
            loss_difference[name] = max(loss_difference[name], apart)
            apart = relative_size(
                *map(torch.linalg.vector_norm, (gradients[name] - gradients["plain"], gradients["plain"]))
            )
            gradient_difference[name] = max(gradient_difference[name], apart)
            margin_error[name] = max(margin_error[name], errors[name])
        advance()
    ratios = {name: [own / plain for own, plain in zip(seconds[name], seconds["plain"], strict=True)] for name in names}
    return {
        "steps": len(batches),
        "sequences": len(batches[0].ids),
        "tokens": max(batch.ids.shape[1] for batch in batches),
        "vocabulary": model.embedding.num_embeddings,
        "width": model.embedding.embedding_dim,
        **{
            name: {
                "step_seconds": statistics.median(seconds[name]),
                "peak_mb": None if None in peaks[name] else max(peaks[name]) / MB,
                "margin_error": margin_error[name],
            }
            for name in names
        },
        **against_plain("", "fastpref", ratios, loss_difference, gradient_difference),
        **against_plain("linear_", "linear", ratios, loss_difference, gradient_difference),
        "loss_tolerance": LOSS_TOLERANCE,
        "losses_equal": max(loss_difference.values()) <= LOSS_TOLERANCE,
    }


def against_plain(prefix, name, ratios, loss_difference, gradient_difference) -> dict:
    return {
        f"{prefix}step_time_ratio": statistics.median(ratios[name]),
        f"{prefix}step_time_ratio_range": [min(ratios[name]), max(ratios[name])],
        f"{prefix}loss_difference": loss_difference[name],
        f"{prefix}gradient_difference": gradient_difference[name],
    }


def run_step(model, batch, loss) -> tuple[Tensor, Tensor, float]:
    """Returns (loss, gradient of the embedding table, seconds); no gradient is left behind."""
    started = time.perf_counter()
    value = loss(batch)
    value.backward()
    elapsed = time.perf_counter() - started
    gradient = model.embedding.weight.grad
    model.zero_grad()
    return value.detach(), gradient, elapsed


def relative_size(difference, size) -> float:
    """Returns |difference| / |size|; NaN counts as infinitely different."""
    ratio = (difference.abs() / size.abs()).item()
    return ratio if ratio == ratio else float("inf")


@torch.no_grad()
def margin_errors(model, batch, beta, beta_rating) -> dict[str, float]:
    """Returns the largest |margin - float64 margin| of each, all from one set of fp32 hidden states and one head.

    Every error includes that of the product of the two: plain and fastpref share one set of fp32 logits, linear forms
    its own, and the truth is float64 from the product on.
    """
    hidden, weight = model.hidden_states(batch.ids), model.embedding.weight
    logits = hidden @ weight.T
    margins = {
        "plain": plain_loss(logits, batch, beta, beta_rating)[1],
        "fastpref": fused_loss(logits, batch, beta, beta_rating).margins,
        "linear": linear_loss(hidden, weight, batch, beta, beta_rating).margins,
    }
    truth = exact_margins(hidden, weight, batch, beta)
    return {name: (margin.double() - truth).abs().max().item() for name, margin in margins.items()}


def exact_margins(hidden, weight, batch, beta) -> Tensor:
    """Returns [B] float64. It takes one sequence at a time: all logits in float64 may not fit where the step does."""
    log_ratios, weight = [], weight.double()
    for row, labels, ref_logps in zip(hidden, batch.labels, batch.ref_token_logps, strict=True):
        scored = labels[1:] != -100
        logits = row[:-1][scored].double() @ weight.T
        logps = logits.log_softmax(-1).gather(-1, labels[1:][scored][:, None])[:, 0]
        log_ratios.append((logps - ref_logps[:-1][scored].double()).sum())
    chosen, rejected = torch.stack(log_ratios).chunk(2)
    return beta * (chosen - rejected)


class PeakGrowth:
    """How far the resident set of this process grows at its peak from here on; Linux only."""

    def __init__(self):
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what a step needs
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # sets VmHWM back to the present size
            self.before = status_bytes("VmRSS")
        except (OSError, AttributeError):  # no such file, or not ours to write; no glibc
            self.before = None

    def bytes(self) -> int | None:
        return None if self.before is None else status_bytes("VmHWM") - self.before


def status_bytes(field) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
