"""Batches of pairs for linear_preference_loss, and the same loss by way of the logits."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_no_worse, unit_roundoff
from torch import Tensor

import fastpref
from fastpref import losses
from fastpref._logps.pairs import PreferenceOutput, PreferenceStats


class Batch(NamedTuple):
    hidden: Tensor  # [2B, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [2B, T]
    ref_hidden: Tensor
    ref_weight: Tensor
    bias: Tensor  # [V]
    adapter_a: Tensor  # [r, H]
    adapter_b: Tensor  # [V, r]
    gap: Tensor  # [B]
    scores: Tensor  # [2B]

    def to(self, dtype):
        return Batch(*(t.to(dtype) if t.is_floating_point() else t for t in self))

    @property
    def reference(self):
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}


def make(pairs=3, tokens=9, width=16, vocab=37, dtype=torch.float64, ignored=0.3) -> Batch:
    labels = torch.randint(0, vocab, (2 * pairs, tokens))
    labels[torch.rand(labels.shape) < ignored] = -100
    gap = torch.randn(pairs)
    if pairs > 1:
        gap[1] = torch.nan
    hidden, ref_hidden = torch.randn(2, 2 * pairs, tokens, width)
    weight, ref_weight = torch.randn(2, vocab, width) * 2 / width**0.5
    adapter = torch.randn(2, width) / width**0.5, torch.randn(vocab, 2)
    return Batch(
        hidden, weight, labels, ref_hidden, ref_weight, torch.randn(vocab), *adapter, gap, torch.rand(2 * pairs)
    ).to(dtype)


HEAD = ("bias", "adapter_a", "adapter_b")


def leaves(batch, trained, used=()):
    """Copies of the inputs a call gets; those in `trained` want a gradient."""
    names = dict.fromkeys(("hidden", "weight", *used, *trained))
    return {name: getattr(batch, name).detach().clone().requires_grad_(name in trained) for name in names}


def head_options(leaf):
    adapter = (leaf["adapter_a"], leaf["adapter_b"]) if "adapter_a" in leaf else None
    return {"bias": leaf.get("bias"), "adapter": adapter}


def run(batch, trained=("hidden", "weight"), used=(), upstream=1.0, **options):
    leaf = leaves(batch, trained, used)
    out = fastpref.linear_preference_loss(leaf["hidden"], leaf["weight"], batch.labels, **head_options(leaf), **options)
    (out.loss * upstream).sum().backward()
    return out, {name: leaf[name].grad for name in trained}


def project(hidden, weight, bias=None, adapter=None):
    logits = F.linear(hidden, weight, bias)
    return logits if adapter is None else logits + hidden @ adapter[0].mT @ adapter[1].mT


def plain(batch, trained=("hidden", "weight"), used=(), upstream=1.0, max_tile_bytes=None, **options):
    """The same by way of the logits. The reference has its own head, or the policy's, and never an adapter."""
    leaf = leaves(batch, trained, used)
    logits = project(leaf["hidden"], leaf["weight"], **head_options(leaf))
    ref_hidden, ref_weight, ref_bias = (options.pop(f"ref_{name}", None) for name in ("hidden", "weight", "bias"))
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = leaf["weight"], leaf.get("bias")
        options["ref_logits"] = project(ref_hidden, ref_weight, ref_bias).detach()
    out = fastpref.preference_loss(logits, batch.labels, **options)
    (out.loss * upstream).sum().backward()
    return out, {name: leaf[name].grad for name in trained}


def assert_same(got, expected, tolerance=1e-10):
    (out, gradients), (true, true_gradients) = got, expected

    def close(name, value, truth, size=1.0):
        # statistics of tokens are float32 in any case
        allowed = max(tolerance, 2e-6) if truth.dtype == torch.float32 else tolerance
        torch.testing.assert_close(
            value / size, truth / size, rtol=allowed, atol=allowed, msg=lambda text: f"{name}: {text}"
        )

    assert type(out) is PreferenceOutput
    assert type(out.stats) is PreferenceStats
    for name, value, truth in zip(PreferenceOutput._fields[:-1], out[:-1], true[:-1], strict=True):
        close(name, value, truth)
    for name, value, truth in zip(PreferenceStats._fields, out.stats, true.stats, strict=True):
        assert (value is None) == (truth is None), name
        if truth is not None:
            close(name, value, truth)
    assert gradients.keys() == true_gradients.keys()
    for name, truth in true_gradients.items():
        size = truth.abs().max().clamp(min=1) if truth.numel() else 1.0
        close(f"gradient of {name}", gradients[name], truth, size)


def assert_gradients_no_worse(gradients, same, truth, dtype):
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        if name in ("hidden", "weight"):
            rows = [g.reshape(-1, g.shape[-1]) for g in (gradient, same[name], truth[name])]
            assert_no_worse(*rows, dtype, f"gradient of {name}")
        else:  # too few rows for PyTorch's own error to be a statistic
            error, same_error = ((g.cpu().double() - truth[name]).abs().max() for g in (gradient, same[name]))
            assert error <= 2 * same_error + 16 * unit_roundoff(dtype) * truth[name].abs().max(), name


def references(batch, **options):
    """The same reference in each of its forms."""
    tokens = fastpref.token_logps(project(batch.ref_hidden, batch.ref_weight), batch.labels, **options)
    sums = fastpref.sequence_logps(tokens, batch.labels, **options).sums
    return {
        "ref_hidden": batch.reference,
        "ref_token_logps": {"ref_token_logps": tokens},
        "ref_logps": {"ref_logps": sums},
        "none": {},
    }


def uncoupled(pairs, scale=0.3):
    """A user's loss; unmarked, it must see the whole batch at once."""
    return F.softplus(-scale * (pairs.chosen_logratios - pairs.rejected_logratios))


def coupled(pairs):
    delta = pairs.chosen_logratios - pairs.rejected_logratios
    return F.softplus(-0.1 * (delta - delta.mean()))


@losses.pair_separable
def separable(pairs, scale=0.3):
    return uncoupled(pairs, scale)


# What is trained, and the reduction, decide the plan.
PLANS = {
    "pair_resident": (("hidden", "weight"), "mean"),
    "pair_resident-head": (("hidden", "weight", *HEAD), "mean"),
    "pair_resident-no_hidden": (("weight",), "sum"),
    "unit": (("hidden",), "mean"),
    "unit-none": (("hidden",), "none"),
    "recompute": (("hidden", "weight"), "none"),
    "recompute-head": (("hidden", "weight", *HEAD), "none"),
    "frozen_weight-head": (("hidden", *HEAD), "mean"),
    "frozen_weight-head-none": (("hidden", *HEAD), "none"),
    "bias_only": (("bias",), "mean"),
    "adapter_only": (("adapter_a", "adapter_b"), "mean"),
    "adapter_b_only": (("hidden", "adapter_b"), "mean"),
}
plans = pytest.mark.parametrize("which", PLANS)
# Bytes, against 54 rows of 37 logits: one row at a time; a part of a sequence; about a pair; all of it.
BUDGETS = (1, 1500, 6000, None)
budgets = pytest.mark.parametrize("budget", BUDGETS)


def chosen_plan(which):
    trained, reduction = PLANS[which]
    used = HEAD if set(HEAD) & set(trained) else ()
    return {"trained": trained, "used": used, "reduction": reduction}


def pack(batch, lengths) -> tuple[Batch, Tensor]:
    """The first lengths[s] tokens of each sequence behind one another, and cu_seqlens."""

    def packed(padded):
        return torch.cat([padded[:0, 0], *(row[:n] for row, n in zip(padded, lengths, strict=True))])

    cu_seqlens = F.pad(torch.tensor(lengths, dtype=torch.long).cumsum(0), (1, 0))
    rows = {name: packed(getattr(batch, name)) for name in ("hidden", "ref_hidden", "labels")}
    return batch._replace(**rows), cu_seqlens


def shared_batch(prefixes, tokens=9, **shape):
    """Both sequences of pair i start with the same prefixes[i] tokens, and so with the same hidden states."""
    batch = make(pairs=len(prefixes), tokens=tokens, ignored=0, **shape)
    pairs = len(prefixes)
    for i, n in enumerate(prefixes):
        batch.labels[pairs + i, :n] = batch.labels[i, :n]
        for hidden in (batch.hidden, batch.ref_hidden):
            hidden[pairs + i, :n] = hidden[i, :n]
    batch.labels[0, 0] = batch.labels[pairs, 0] = -100  # a prompt
    batch.labels[-1, -2:] = -100
    return batch
