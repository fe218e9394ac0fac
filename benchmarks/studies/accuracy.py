"""Errors against float64, from hidden states and LM head: `python benchmarks/studies/accuracy.py [--quick]`.

Prints tables per dtype, for fastpref and for every peer that runs here: log-probs of tokens, margins of pairs by
completion length, gradients, and tokens the model is sure of apart. Log-probs are taken in slices of tokens, which
changes no token's value and lets peers that keep all logits take part. Takes an hour or more on two cores; --quick,
one vocabulary and no long completions, minutes.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import machine
from harness.contest import step_truth
from harness.measure import HeadTruth, free_bytes
from harness.report import table
from peers import linear

VOCABS, LENGTHS = (32000, 128256, 262144), (256, 1024, 4096)
DTYPES = ("float32", "bfloat16")
SURE = (0.95, 0.995, 0.9999)
SURE_TOKENS = 16  # of each probability, in each sequence of the gradients' batch
SLICE = 1 << 27  # logits at a time


def main(argv=None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    longest = max(arguments.lengths)
    if any(longest % length for length in arguments.lengths):
        parser.error(f"--lengths must divide the longest, {longest}, got {arguments.lengths}")
    warnings.simplefilter("ignore")  # the peers' are theirs
    torch.manual_seed(0)
    results = {"machine": machine.facts(), **vars(arguments), "out": None, "errors": []}
    for dtype in arguments.dtypes:
        for vocab in arguments.vocab:
            start = time.perf_counter()
            results["errors"] += measured(getattr(torch, dtype), vocab, arguments)
            print(f"{dtype}, V={vocab}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    text = markdown(results)
    print(text, end="")
    if arguments.out:
        stem = arguments.out / f"{results['machine']['date'][:10]}-accuracy"
        stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        stem.with_suffix(".md").write_text(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of completions; divide the longest")
    parser.add_argument("--pairs", type=int, default=2, help="of the longest completions (%(default)s)")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--device", default="cpu")
    quick = {"vocab": VOCABS[:1], "lengths": LENGTHS[:2], "pairs": 4}
    parser.add_argument("--quick", action=_Preset, preset=quick, help="the smallest vocabulary, L up to 1024")
    parser.add_argument("--out", type=Path, help="folder for a .json and a .md beside what is printed")
    return parser


class _Preset(argparse.Action):
    def __init__(self, *args, preset, **options):
        super().__init__(*args, nargs=0, default=False, **options)
        self.preset = preset

    def __call__(self, parser, namespace, values, option=None):
        vars(namespace).update(self.preset, quick=True)


# ---- inputs ----


class Inputs(NamedTuple):
    """A pair of sequences and the same for the reference."""

    hidden: Tensor  # [2, T, H] chosen, rejected
    ref_hidden: Tensor
    weight: Tensor  # [V, H]
    labels: Tensor  # [2, T]


def _draw_inputs(tokens: int, weight: Tensor) -> Inputs:
    """Labels as the model would draw them."""
    hidden = torch.randn(2, tokens, weight.shape[1], device=weight.device)
    ref_hidden = hidden + 0.02 * torch.randn_like(hidden)
    draws = [
        torch.multinomial(torch.softmax(rows @ weight.t().float(), -1), 1)
        for rows in hidden.flatten(0, 1).split(_slice_rows(weight))
    ]
    labels = torch.cat(draws).view(2, tokens)
    return Inputs(hidden.to(weight.dtype), ref_hidden.to(weight.dtype), weight, labels)


def _slice_rows(weight: Tensor) -> int:
    return max(1, SLICE // weight.shape[0])


def _make_sure(inputs: Inputs) -> Inputs:
    """The first tokens of both sequences get the probabilities SURE, by a step along their label's row of the head."""
    hidden, _, weight, labels = inputs
    hidden, chosen = hidden.clone(), slice(0, SURE_TOKENS * len(SURE))
    targets = torch.tensor(SURE, dtype=torch.float64, device=weight.device).repeat_interleave(SURE_TOKENS)
    rows, own = hidden[:, chosen].double(), weight[labels[:, chosen]].double()
    for _ in range(4):  # the step moves the other logits a little too
        logits = rows @ weight.double().t()
        target_logit = logits.gather(-1, labels[:, chosen, None])
        others = logits.scatter_(-1, labels[:, chosen, None], -torch.inf).logsumexp(-1, keepdim=True)
        missing = torch.logit(targets)[None, :, None] + others - target_logit
        rows += missing * own / own.square().sum(-1, keepdim=True)
    hidden[:, chosen] = rows.to(hidden.dtype)
    ref_hidden = (hidden.float() + 0.02 * torch.randn_like(hidden, dtype=torch.float32)).to(hidden.dtype)
    return inputs._replace(hidden=hidden, ref_hidden=ref_hidden)


# ---- errors ----


def measured(dtype: torch.dtype, vocab: int, arguments) -> list[dict]:
    """[{"what", "peer", "dtype", "vocab", "at", "error"}]: the row "peer" of table "what", column "at" of "vocab"."""
    torch.compiler.reset()
    weight = torch.randn(vocab, arguments.hidden_size, device=arguments.device)
    weight = weight.mul_(3 / arguments.hidden_size**0.5).to(dtype)
    inputs = _draw_inputs(arguments.pairs * max(arguments.lengths), weight)
    found = [*_logps_errors(inputs, arguments.lengths), *_gradient_errors(_make_sure(_draw_inputs(256, weight)))]
    return [
        {
            "what": what,
            "peer": peer,
            "dtype": str(dtype).removeprefix("torch."),
            "vocab": vocab,
            "at": at,
            "error": error,
        }
        for what, peer, at, error in found
    ]


def _peers(table, prefix, inputs, batch=None):
    """Those of a table that can take the inputs, fastpref as it chooses its backend itself."""
    given = linear.Inputs(inputs.hidden, inputs.weight, inputs.labels, True, batch)
    chosen = (prefix, f"{prefix}_rounded")
    for name, function in table.items():
        if (name in chosen or not name.startswith("fastpref")) and function.available(given) is None:
            yield name, function


def _logps_errors(inputs: Inputs, lengths):
    """Of log-probs, and of margins: of the peers' log-probs summed in fp32, of fastpref's and Liger's own loss."""
    truth = HeadTruth(inputs.hidden, inputs.weight, inputs.labels)
    differences = truth.logps - HeadTruth(inputs.ref_hidden, inputs.weight, inputs.labels).logps

    for _, function in _peers(linear.LOGPS_PEERS, "fastpref_linear", inputs):
        title = function.title
        try:
            logps = _in_slices(function, inputs.hidden, inputs)
            own = title.startswith("fastpref")
            ref_logps = None if own else _in_slices(function, inputs.ref_hidden, inputs)
        except Exception as error:
            yield "logps rms", title, None, _reason(error)
            continue
        errors = truth.logps_errors(logps)
        yield "logps rms", title, None, _rms(errors)
        yield "logps max", title, None, errors.max().item()
        for length in [] if own else lengths:
            error = _margins(logps - ref_logps, length) - _margins(differences, length)
            yield "margin", title, f"L={length}", _rms(error)

    batch = linear.HeadBatch(inputs.labels, None, inputs.ref_hidden)
    steps = dict(_peers(linear.STEP_PEERS, "fastpref_linear_step", inputs, batch))
    for name in ("fastpref_linear_step", "fastpref_linear_step_rounded", "liger_dpo"):
        for length in lengths if name in steps else ():
            title = steps[name].title
            margins = _margins(differences, length)
            try:
                yield "margin", title, f"L={length}", _rms(_own_margins(steps[name], inputs, length) - margins)
            except Exception as error:
                yield "margin", title, f"L={length}", _reason(error)


def _in_slices(function, hidden: Tensor, inputs: Inputs) -> Tensor:
    rows = _slice_rows(inputs.weight)
    with torch.no_grad(), function.around():
        pieces = [
            function(some, inputs.weight, labels)
            for some, labels in zip(hidden.flatten(0, 1).split(rows), inputs.labels.flatten().split(rows), strict=True)
        ]
    return torch.cat(pieces).float().view(inputs.labels.shape)


def _margins(differences: Tensor, length: int) -> Tensor:
    """[2, T] policy - reference -> [T / length] margins in nats."""
    chosen, rejected = differences.unflatten(-1, (-1, length)).sum(-1)
    return (chosen - rejected).double()


def _own_margins(step, inputs: Inputs, length: int) -> Tensor:
    """As the loss itself reports them, over beta; pair by pair, which bounds the memory of those that keep logits."""
    tokens = (inputs.hidden, inputs.ref_hidden, inputs.labels)
    hidden, ref_hidden, labels = (t.unflatten(1, (-1, length)).transpose(0, 1) for t in tokens)
    needed = 28 * length * inputs.weight.shape[0]
    if step.__name__.startswith("liger") and needed > free_bytes(inputs.weight.device):
        raise MemoryError(f"needs {needed / 2**30:.0f} GiB")
    margins = []
    with torch.no_grad(), step.around():
        for pair in range(labels.shape[0]):
            batch = linear.HeadBatch(labels[pair].contiguous(), None, ref_hidden[pair].contiguous())
            margins.append(step(hidden[pair].contiguous(), inputs.weight, batch)[1] / batch.beta)
    return torch.cat(margins).double()


def _gradient_errors(inputs: Inputs):
    """With a trained head: of a DPO step, and of single tokens when each is handed the true coefficient."""
    batch = linear.HeadBatch(inputs.labels, None, inputs.ref_hidden)
    truth, _, coefficients = step_truth(HeadTruth(inputs.hidden, inputs.weight, inputs.labels), batch, True)
    level = torch.arange(inputs.labels.shape[1]).div(SURE_TOKENS, rounding_mode="floor").clamp(max=len(SURE)).repeat(2)
    groups = [("other", level == len(SURE))] + [(f"p={p}", level == i) for i, p in enumerate(SURE)]

    for _, function in _peers(linear.STEP_PEERS, "fastpref_linear_step", inputs, batch):
        title = function.title.removesuffix(" + logsigmoid")
        try:
            _, hidden_gradient, weight_gradient = _run(function, inputs, batch, None)
        except Exception as error:
            yield "step", title, "hidden", _reason(error)
            continue
        yield "step", title, "hidden", _rms(truth.hidden_errors(hidden_gradient)[groups[0][1]])
        yield "step", title, "head", truth.weight_error(weight_gradient)

    for _, function in _peers(linear.LOGPS_PEERS, "fastpref_linear", inputs):
        try:
            logps, hidden_gradient, weight_gradient = _run(function, inputs, inputs.labels, coefficients)
        except Exception as error:
            yield "token", function.title, "other", _reason(error)
            continue
        errors = truth.hidden_errors(hidden_gradient)
        relative = truth.logps_errors(logps) / truth.kept_logps.abs()
        for at, group in groups:
            yield "sure", function.title, at, _rms(relative[group])
            yield "token", function.title, at, _rms(errors[group])
        yield "token", function.title, "head", truth.weight_error(weight_gradient)


def _run(function, inputs: Inputs, given, coefficients):
    """What it returns first, and the gradients of hidden states and head."""
    hidden, weight = (t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight))
    with function.around():
        out = function(hidden, weight, given)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(None if coefficients is None else coefficients.to(out.dtype))
    return out.detach(), hidden.grad, weight.grad


def _rms(errors: Tensor) -> float:
    return errors.square().mean().sqrt().item()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, MemoryError) else f"{type(error).__name__}"


# ---- tables ----

_LEGEND = (
    "Logits have standard deviation 3, labels are drawn from the model, the reference is the model with a little noise "
    "on its hidden states. Truth is in float64 of the same inputs, those of 16 bits as they are rounded. Margins: of "
    "the peers' per-token log-probs, summed in float32; of fastpref and of Liger's DPO loss, as they report them."
)
_TABLES = {
    "logps rms": "log-prob of a token, rms error in nats",
    "logps max": "log-prob of a token, largest error in nats",
    "margin": "margin of a pair before beta, rms error in nats, by tokens per completion",
    "sure": "log-prob of tokens of probability p, rms of error over log-prob",
    "step": "gradients of a DPO step, error over the gradient's norm; hidden states per token, rms",
    "token": "the same gradients with the loss's true coefficients handed in, tokens of probability p apart",
}


def markdown(results: dict) -> str:
    facts = results["machine"]
    device = (facts.get("gpu") or {}).get("name") if results["device"] != "cpu" else facts["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        f"# Errors against float64, {facts['date'][:10]}, {device}",
        f"{versions}; commit {facts['commit']}.",
        _LEGEND,
        f"H={results['hidden_size']}; {results['pairs']} pairs of the longest completions, the same tokens cut into "
        "more pairs of the shorter ones.",
    ]
    for dtype in results["dtypes"]:
        of_dtype = [error for error in results["errors"] if error["dtype"] == dtype]
        peers = dict.fromkeys(error["peer"] for error in of_dtype)  # keeps the order
        for what, title in _TABLES.items():
            errors = [error for error in of_dtype if error["what"] == what]
            columns = sorted(dict.fromkeys((e["vocab"], e["at"]) for e in errors), key=lambda column: column[0])
            cells = {(e["peer"], e["vocab"], e["at"]): e["error"] for e in errors}
            rows = [
                [peer, *(_cell(cells.get((peer, *column), "")) for column in columns)]
                for peer in peers
                if any((peer, *column) in cells for column in columns)
            ]
            head = ["", *(f"V={vocab}" + (f", {at}" if at else "") for vocab, at in columns)]
            parts += [f"## {dtype}: {title}", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def _cell(error) -> str:
    return error if isinstance(error, str) else f"{error:.1e}"


if __name__ == "__main__":
    sys.exit(main())
