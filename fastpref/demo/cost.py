"""What a preference step costs: plain PyTorch against fastpref, on the same weights and the same batches."""

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


def fused_loss(logits, batch, beta, beta_rating):
    """RDPO by fastpref. The gradient replaces the logits [2B, T, V] in place: nothing else reads them."""
    return fastpref.preference_loss(
        logits,
        batch.labels,
        ref_token_logps=batch.ref_token_logps,
        loss="rdpo",
        loss_options={"beta_rating": beta_rating},
        beta=beta,
        rating_gap=batch.rating_gap,
        shift=True,
        inplace_backward=True,
    )


def plain_loss(logits, batch, beta, beta_rating) -> tuple[Tensor, Tensor]:
    """(loss, margins [B]): RDPO as one writes it in PyTorch, in the dtype of the logits."""
    targets = batch.labels[:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    log_ratios = ((logps - batch.ref_token_logps[:, :-1]) * (targets != -100)).sum(-1)
    chosen, rejected = log_ratios.chunk(2)
    margins = beta * (chosen - rejected)
    return -F.logsigmoid(margins - beta / beta_rating * batch.rating_gap).mean(), margins


def measure_cost(model, batches, beta, beta_rating, advance) -> dict:
    """Forward, loss and backward of every batch, by both, interleaved; the weights stay as they are.

    Times are medians over the batches, the ratio is the median of the ratios per batch. Peak memory is the growth of
    the resident set during a step, the largest over the batches (None where the system does not tell). Margin errors
    are against float64 log-probs of the same fp32 logits.
    """
    methods = {
        "plain": lambda logits, batch: plain_loss(logits, batch, beta, beta_rating)[0],
        "fastpref": lambda logits, batch: fused_loss(logits, batch, beta, beta_rating).loss,
    }
    for loss in methods.values():
        run_step(model, batches[0], loss)  # warm-up: thread pools, lazy imports
    seconds, peaks = ({name: [] for name in methods} for _ in range(2))
    losses, gradients = {}, {}
    margin_error = dict.fromkeys(methods, 0.0)
    loss_difference = gradient_difference = 0.0
    for number, batch in enumerate(batches):
        for name in list(methods)[:: 1 if number % 2 else -1]:
            peak = PeakGrowth()
            losses[name], gradients[name], elapsed = run_step(model, batch, methods[name])
            peaks[name].append(peak.bytes())
            seconds[name].append(elapsed)
        loss_difference = max(loss_difference, relative(losses["fastpref"] - losses["plain"], losses["plain"]))
        difference = torch.linalg.vector_norm(gradients["fastpref"] - gradients["plain"])
        gradient_difference = max(
            gradient_difference, relative(difference, torch.linalg.vector_norm(gradients["plain"]))
        )
        for name, error in margin_errors(model, batch, beta, beta_rating).items():
            margin_error[name] = max(margin_error[name], error)
        advance()
    ratios = [fused / plain for fused, plain in zip(seconds["fastpref"], seconds["plain"], strict=True)]
    return {
        "steps": len(batches),
        "sequences": len(batches[0].ids),
        "tokens": max(batch.ids.shape[1] for batch in batches),
        "vocabulary": model.embedding.num_embeddings,
        **{
            name: {
                "step_seconds": statistics.median(seconds[name]),
                "peak_mb": None if None in peaks[name] else max(peaks[name]) / MB,
                "margin_error": margin_error[name],
            }
            for name in methods
        },
        "step_time_ratio": statistics.median(ratios),
        "step_time_ratio_range": [min(ratios), max(ratios)],
        "loss_tolerance": LOSS_TOLERANCE,
        "loss_difference": loss_difference,
        "gradient_difference": gradient_difference,
        "losses_equal": loss_difference <= LOSS_TOLERANCE,
    }


def run_step(model, batch, loss) -> tuple[Tensor, Tensor, float]:
    """(loss, gradient of the embedding table, seconds); no gradient is left behind."""
    started = time.perf_counter()
    value = loss(model(batch.ids), batch)
    value.backward()
    elapsed = time.perf_counter() - started
    gradient = model.embedding.weight.grad
    model.zero_grad()
    return value.detach(), gradient, elapsed


def relative(difference, size) -> float:
    """|difference| / |size|; NaN counts as infinitely different."""
    ratio = (difference.abs() / size.abs()).item()
    return ratio if ratio == ratio else float("inf")


@torch.no_grad()
def margin_errors(model, batch, beta, beta_rating) -> dict[str, float]:
    """Largest |margin - float64 margin| of both, all three from one set of fp32 logits."""
    logits = model(batch.ids)
    truth = exact_margins(logits, batch, beta)
    margins = {
        "plain": plain_loss(logits, batch, beta, beta_rating)[1],
        "fastpref": fused_loss(logits, batch, beta, beta_rating).margins,
    }
    return {name: (margin.double() - truth).abs().max().item() for name, margin in margins.items()}


def exact_margins(logits, batch, beta) -> Tensor:
    """[B] float64. One sequence at a time: all of them in float64 would not fit where the step itself does."""
    log_ratios = []
    for row, labels, ref_logps in zip(logits, batch.labels, batch.ref_token_logps, strict=True):
        scored = labels[1:] != -100
        logps = row[:-1][scored].double().log_softmax(-1).gather(-1, labels[1:][scored][:, None])[:, 0]
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
