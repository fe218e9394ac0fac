"""Influence of pairs against gradients of single pairs: `pytest benchmarks/bench_influence.py --benchmark-json FILE`.

A Llama of 7 M parameters with random weights, all of them or LoRA adapters on every linear layer, in float32; 16
validation pairs. The mean validation gradient is part of every time. The competitors differentiate every training pair:
one after the other, or vmap over torch.func.grad, 16 padded pairs at a time. An error is relative to the spread of the
exact influences. --full adds a bfloat16 model under float32 adapters.
"""

import warnings
from typing import NamedTuple

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

from fastpref._logps.causal_lm import completion_logps
from fastpref.curate import pair_batches, pair_influence
from harness.measure import FunctionCompetitor
from harness.problem import measured
from peers.token import eager

BETA, VOCAB, TRAIN, VALIDATION = 0.1, 8000, 64, 16


class Case(NamedTuple):
    adapters: bool
    base: torch.dtype = torch.float32

    def __str__(self):
        name = "adapters" if self.adapters else "all parameters"
        return f"{name}, {str(self.base).removeprefix('torch.')} model"


DEFAULT = [Case(False), Case(True)]
FULL = [*DEFAULT, Case(True, torch.bfloat16)]


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, vocab_size=VOCAB,
        max_position_embeddings=256, attn_implementation="eager",
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def make(case):
    """Policy and reference; the reference is near the policy's base."""
    policy, reference = llama(), llama()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=2e-3)
    if case.adapters:
        config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks by a name that transformers 5 has replaced
            policy = peft.get_peft_model(policy, config).eval()
    for model in (policy, reference):
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(case.base)
    return policy, reference


def pairs_of(count, seed):
    draw = np.random.default_rng(seed)
    spans = (10, 40), (20, 80), (20, 80)
    return tuple([draw.integers(0, VOCAB, draw.integers(*span)).tolist() for _ in range(count)] for span in spans)


def masks(batch):
    return batch["input_ids"], batch["attention_mask"], batch["completion_mask"]


def dpo(ours, against):
    return F.softplus(-BETA * torch.sub(*(ours - against).chunk(2)))


def one_by_one(policy, reference, train, validation) -> np.ndarray:
    """A backward for every pair."""
    moved = [p for p in policy.parameters() if p.requires_grad]
    score, scored = completion_logps(policy), completion_logps(reference)

    def gradient(batch):
        with torch.no_grad():
            against = scored(*masks(batch))
        return torch.autograd.grad(dpo(score(*masks(batch)), against).sum(), moved)

    mean = [sum(parts) / VALIDATION for parts in zip(*map(gradient, pair_batches(*validation)), strict=True)]
    found = []
    for batch in pair_batches(*train, max_tokens=1):
        parts = zip(gradient(batch), mean, strict=True)
        found.append(sum(torch.dot(g.flatten().double(), m.flatten().double()) for g, m in parts).item())
    return np.array(found)


def by_vmap(policy, reference, train, validation) -> np.ndarray:
    """Gradients of 16 pairs at a time by torch.func, on plain log-softmax."""
    values = {name: p.detach() for name, p in policy.named_parameters()}
    moved = {name: values[name] for name, p in policy.named_parameters() if p.requires_grad}
    scored = completion_logps(reference)

    def loss(moved, ids, attention, completion, against):
        inputs = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
        logits = torch.func.functional_call(policy, {**values, **moved}, (), inputs).logits[:, :-1]
        return dpo((eager(logits, ids[:, 1:]) * completion[:, 1:]).sum(1), against)[0]

    per_pair = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))

    def gradients(pairs):
        widest = max(len(p) + max(len(c), len(r)) for p, c, r in zip(*pairs, strict=True))
        for begin in range(0, len(pairs[0]), 16):
            (batch,) = pair_batches(*(side[begin : begin + 16] for side in pairs), max_tokens=32 * widest)
            with torch.no_grad():
                against = scored(*masks(batch)).float()
            split = [torch.stack(t.chunk(2), 1) for t in (*masks(batch), against)]  # [pairs, 2, T]
            yield per_pair(moved, *split)

    (own,) = gradients(validation)
    mean = {name: part.mean(0) for name, part in own.items()}
    found = [sum((part * mean[name]).flatten(1).sum(1) for name, part in g.items()) for g in gradients(train)]
    return torch.cat(found).numpy()


def by_difference(policy, reference, train, validation):
    return pair_influence(policy, pair_batches(*train), pair_batches(*validation), reference=reference, beta=BETA)


def test_influence(benchmark, case):
    policy, reference = make(case)
    inputs = policy, reference, pairs_of(TRAIN, 0), pairs_of(VALIDATION, 1)
    wide = make(case._replace(base=torch.float32))
    truth = one_by_one(*wide, *inputs[2:])
    found = by_difference(*inputs)
    competitors = [
        FunctionCompetitor("fastpref", "curate.pair_influence", lambda *a: by_difference(*a).values, *inputs),
        FunctionCompetitor("one_by_one", "a backward per pair, fused log-probs", one_by_one, *inputs),
        FunctionCompetitor("vmap", "torch.func, 16 pairs at a time", by_vmap, *inputs),
    ]

    def judge(values):
        return {
            "error": float(np.abs(values - truth).max() / truth.std()),
            "correlation": float(np.corrcoef(values, truth)[0, 1]),
        }

    notes = [f"step {found.step:g}, check {found.check:.4f}"]
    rows = measured(benchmark, "influence", str(case), competitors, judge, seconds=30, notes=notes)
    exact = case.base == torch.float32
    assert rows["fastpref"]["correlation"] > (0.999 if exact else 0.98)
    assert rows["fastpref"]["error"] < (0.1 if exact else 1.0)
