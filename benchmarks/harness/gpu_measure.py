"""gpu.py's measuring child: one JSON line per finished piece of work on stdout, so that what is done is kept.

    gpu_measure.py bandwidth | cases SECONDS REFUSED_JSON | tiny      [--dry-run]

`tiny` launches every kernel on small odd shapes and checks them, for a memory checker to watch.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fastpref
from harness.contest import Case, LinearCase, measured, too_large
from harness.measure import copy_gbps
from peers import linear, token

# the most telling first: time may run out
SHAPES = [  # tokens, vocabulary, dtype, masked
    (8192, 128256, "bfloat16", 0.0),
    (8192, 128256, "float32", 0.0),
    (8192, 128256, "bfloat16", 0.5),
    (8192, 262144, "bfloat16", 0.0),
    (8192, 32000, "bfloat16", 0.0),
    (8192, 152064, "bfloat16", 0.0),
]
LINEAR_SHAPES = [(8192, 4096, 128256, "bfloat16", trained, 0.0) for trained in (True, False)]
DRY_SHAPES = [(8, 300, "bfloat16", 0.5)]
DRY_LINEAR_SHAPES = [(16, 24, 300, "bfloat16", trained, 0.5) for trained in (True, False)]
COMPILED_VOCAB = 128256  # the compiler takes seconds per shape; one vocabulary tells
BACKENDS = ("triton", "native")  # the order that fastpref itself tries them in on a GPU
_FASTPREF = {
    "token_logps": (token.TOKEN_PEERS, "fastpref"),
    "preference": (token.PREFERENCE_PEERS, "fastpref_step"),
    "linear_logps": (linear.LOGPS_PEERS, "fastpref_linear"),
    "linear_preference": (linear.STEP_PEERS, "fastpref_linear_step"),
}
ROUND_SECONDS = 2.0  # per case, and 30 rounds at most


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=["bandwidth", "cases", "tiny"])
    parser.add_argument("seconds", nargs="?", type=float)
    parser.add_argument("refused", nargs="?", type=json.loads, default={})
    parser.add_argument("--bandwidth", type=json.loads)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' are theirs
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    if arguments.work == "bandwidth":
        size = 64 << 20 if arguments.dry_run else min(4 << 30, torch.cuda.mem_get_info()[0] // 4)
        emit({"bandwidth": {"copy_gbps": copy_gbps(device, size)}})
    elif arguments.work == "tiny":
        tiny(device)
    else:
        cases(device, arguments.seconds, arguments.refused, arguments.bandwidth, arguments.dry_run)


def emit(line: dict) -> None:
    print(json.dumps(line), flush=True)


def planned(dry_run: bool) -> list[Case | LinearCase]:
    shapes = DRY_SHAPES if dry_run else SHAPES
    linear_shapes = DRY_LINEAR_SHAPES if dry_run else LINEAR_SHAPES
    token_cases = [Case("token_logps", mode, *shape) for shape in shapes for mode in ("step", "forward")]
    tokens, vocab, dtype, _ = shapes[0]
    steps = [
        Case("preference", "step", tokens, vocab, dtype, 0.5, loss="rdpo"),
        Case("preference", "step", 32, 64, "float32", 0.5, loss="rdpo"),  # what a call costs beside the work
    ]
    linear = [LinearCase("linear_preference", "step", *s, loss="sigmoid", reference="given") for s in linear_shapes]
    linear += [LinearCase("linear_logps", "step", *s) for s in linear_shapes]
    return token_cases[:2] + steps + linear + token_cases[2:]


def cases(device, seconds: float, refused: dict, bandwidth: dict, dry_run: bool) -> None:
    """refused: {backend: reason}, backends whose tests are red; they do not report."""
    if dry_run:
        token.COMPILER = "aot_eager"
    deadline = time.monotonic() + seconds
    flush = _cache_flusher(device)
    for case in planned(dry_run):
        case = _fitting(case, device)
        if time.monotonic() > deadline:
            emit({"not_run": {str(case): "out of time"}})
            continue
        try:
            record = _measure(case, device, refused, bandwidth, flush)
        except Exception as error:
            emit({"not_run": {str(case): f"{type(error).__name__}: {str(error)[:500]}"}})
        else:
            emit({"case": record})
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(case, device, refused, bandwidth, flush) -> dict:
    table, prefix = _FASTPREF[case.op]
    probe = torch.empty(1, device=device)
    reasons = {backend: refused.get(backend) or table[f"{prefix}_{backend}"].available(probe) for backend in BACKENDS}
    subject = next((f"{prefix}_{backend}" for backend, reason in reasons.items() if reason is None), None)
    if subject is None:
        raise RuntimeError(f"no backend of fastpref may report: {reasons}")
    leave_out = {}
    for name in table:
        if name.startswith("fastpref"):
            backend = next((backend for backend in BACKENDS if backend in name), None)
            if reason := reasons[backend] if backend else "the backends are measured by name here":
                leave_out[name] = reason
    if device.type == "cpu":
        leave_out |= dict.fromkeys(["cce_compiled", "cce_compiled_step"], "its compiler is left out of a dry run")
    if case.vocab not in (COMPILED_VOCAB, DRY_SHAPES[0][1]):
        leave_out |= dict.fromkeys(["compiled", "compiled_step"], f"compiled at V={COMPILED_VOCAB} only, to save time")
    options = {"subject": subject, "leave_out": leave_out, "flush": flush}
    if device.type == "cpu":  # a dry run, whose times mean nothing
        return measured(case, device, bandwidth, 0.0, least=1, **options)
    return measured(case, device, bandwidth, ROUND_SECONDS, **options)


def _fitting(case, device):
    """Fewer tokens where the largest peer would not fit."""
    if device.type != "cuda":
        return case
    while case.tokens > 512 and too_large(case, device):
        case = case._replace(tokens=case.tokens // 2)
    return case


def _cache_flusher(device):
    """Between two runs: overwrites more than any L2 cache holds, outside the timing."""
    if device.type != "cuda":
        return lambda: None
    return torch.empty(256 << 20, dtype=torch.uint8, device=device).zero_


def tiny(device) -> None:
    for backend in ("native", "triton"):
        function = token.TOKEN_PEERS[f"fastpref_{backend}"]
        if reason := function.available(torch.empty(1, device=device)):
            emit({"tiny": f"{backend}: {reason}"})
            continue
        for rows, vocab in ((3, 5003), (5, 3)):
            for dtype in (torch.float32, torch.bfloat16):
                _tiny_step(function, torch.randn(rows, vocab, device=device).to(dtype))
                for trained in (True, False):
                    _tiny_linear_step(backend, trained, rows, vocab, dtype, device)
        emit({"tiny": f"{backend}: clean"})
    if device.type == "cuda":
        torch.cuda.synchronize()


def _tiny_step(function, logits) -> None:
    labels = torch.arange(len(logits), device=logits.device) % logits.shape[-1]
    labels[1] = token.IGNORE
    expected = token.eager(logits.double(), labels)
    leaf = logits.clone().requires_grad_()
    logps = function(leaf, labels)
    logps.sum().backward()
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    assert leaf.grad.isfinite().all()


def _tiny_linear_step(backend, trained, rows, vocab, dtype, device) -> None:
    hidden = torch.randn(rows, 7, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocab, 7, device=device).to(dtype).requires_grad_(trained)
    labels = torch.arange(rows, device=device) % vocab
    labels[1] = token.IGNORE
    expected = token.eager(hidden.double() @ weight.double().t(), labels)
    logps = fastpref.linear_token_logps(hidden, weight, labels, backend=backend)
    logps.sum().backward()
    torch.testing.assert_close(logps.double(), expected, rtol=1e-4, atol=1e-4)
    assert hidden.grad.isfinite().all()
    assert not trained or weight.grad.isfinite().all()


if __name__ == "__main__":
    sys.exit(main())
