"""The loss half on a GPU, against its peers: what gpu.py measures, as ITEMS of worker.py.

ITEMS: {name: function(device) -> {"case": record of contest.py} or {"bandwidth": ceilings}}, the most telling first.
The ceilings of a row (read rate, copy rate, cuBLAS) are measured in the process that measures the row.
"""

from functools import cache, partial

import torch

from harness.contest import Case, LinearCase, measured, too_large
from harness.measure import between_runs, copy_gbps, gemm_tflops, read_gbps
from peers import linear, token

BACKENDS = ("native", "triton")
LLAMA, QWEN = 128256, 151936
ROUND_SECONDS = 2.0  # per case, and 30 rounds at most


def _step(tokens, vocab, dtype="bfloat16", masked=0.0, **more) -> Case:
    return Case("preference", "step", tokens, vocab, dtype, masked, loss="rdpo", **more)


def _planned(tokens, hidden_size, small, large) -> list[Case | LinearCase]:
    head = (tokens, hidden_size, small, "bfloat16")
    return [
        _step(tokens, small),
        Case("token_logps", "step", tokens, small, "bfloat16"),
        Case("token_logps", "forward", tokens, small, "bfloat16"),
        LinearCase("linear_preference", "step", *head, trained=True, loss="sigmoid", reference="given"),
        LinearCase("linear_preference", "step", *head, trained=False, loss="sigmoid", reference="given"),
        LinearCase("linear_logps", "forward", *head),
        _step(tokens, small, variant="ref_logits"),
        _step(tokens, large),
        Case("token_logps", "step", tokens, large, "bfloat16"),
        Case("token_logps", "forward", tokens, large, "bfloat16"),
        _step(tokens, small, variant="packed"),
        _step(tokens, small, variant="stats"),
        _step(tokens, large, variant="ref_logits"),
        Case("token_logps", "step", tokens, small, "float32"),
        _step(tokens, small, masked=0.5),
        _step(32, 64, "float32", masked=0.5),  # what a call costs beside the work
    ]


REAL = _planned(8192, 4096, LLAMA, QWEN)
TINY = _planned(8, 16, 300, 301)  # of a dry run
COMPILED = str(REAL[14])  # the compiler takes seconds per shape: one row tells, after what tells more
_FASTPREF = {
    "token_logps": (token.TOKEN_PEERS, "fastpref"),
    "preference": (token.PREFERENCE_PEERS, "fastpref_step"),
    "linear_logps": (linear.LOGPS_PEERS, "fastpref_linear"),
    "linear_preference": (linear.STEP_PEERS, "fastpref_linear_step"),
}
# what a dry run compares with; the peers have tests of their own
PLAIN = ("eager", "eager_step", "plain_head", "plain_head_step")


@cache
def ceilings(device: torch.device) -> dict:
    """Of this process: GB/s of reading and of copying, TFLOP/s of the head's product."""
    on_gpu = device.type == "cuda"
    size = min(4 << 30, torch.cuda.mem_get_info()[0] // 4) if on_gpu else 1 << 20
    shape = (8192, LLAMA, 4096) if on_gpu else (8, 300, 16)
    found = {
        "read_gbps": read_gbps(device, size),
        "copy_gbps": copy_gbps(device, size),
        "gemm_tflops": gemm_tflops(device, *shape, torch.bfloat16),
    }
    if on_gpu:
        torch.cuda.empty_cache()
    return found


def _measure(case, device: torch.device) -> dict:
    bandwidth = ceilings(device)
    case = _fitting(case, device)
    options = {"subject": _subject(case, device), "leave_out": _left_out(case, device), "flush": flusher(device)}
    seconds, least = (0.0, 1) if device.type == "cpu" else (ROUND_SECONDS, 5)  # times of a dry run mean nothing
    record = measured(case, device, bandwidth, seconds, least, **options)
    return {"case": record | {"ceilings": bandwidth}}


def _subject(case, device) -> str:
    """fastpref by the first backend that is there."""
    table, prefix = _FASTPREF[case.op]
    reasons = {b: table[f"{prefix}_{b}"].available(torch.empty(1, device=device)) for b in BACKENDS}
    for backend, reason in reasons.items():
        if reason is None:
            return f"{prefix}_{backend}"
    raise RuntimeError(f"no backend of fastpref can be measured: {reasons}")


def _left_out(case, device) -> dict[str, str]:
    """{row: reason}"""
    table, _ = _FASTPREF[case.op]
    reasons = {}
    for name in table:
        if name.startswith("fastpref"):
            if not any(backend in name for backend in BACKENDS) or "rounded" in name:
                reasons[name] = "the backends are measured by name here, with exact products"
        elif device.type == "cpu" and name not in PLAIN:
            reasons[name] = "a dry run compares with plain PyTorch alone"
    for name in ("compiled", "compiled_step", "cce_compiled", "cce_compiled_step", "liger_dpo_compiled"):
        if name in table and str(case) != COMPILED:
            reasons[name] = f"one row of torch.compile, to save time: {COMPILED}"
    if getattr(case, "variant", ""):
        peers = [name for name in table if not name.startswith("fastpref") and name != "eager_step"]
        reasons |= dict.fromkeys(peers, "its figures are those of the plain step")
    return reasons


def _fitting(case, device):
    """Fewer tokens where the largest peer would not fit."""
    if device.type != "cuda":
        return case
    while case.tokens > 512 and too_large(case, device):
        case = case._replace(tokens=case.tokens // 2)
    return case


def flusher(device):
    """Before a run, outside the timing: overwrites more than any L2 cache holds, then keeps the GPU busy."""
    if device.type != "cuda":
        return lambda: None
    cache_lines = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def flush():
        cache_lines.zero_()
        between_runs(device)

    return flush


def _items() -> dict:
    cases = {str(case): partial(_measure, case) for case in (*REAL, *TINY)}
    return {"ceilings": lambda device: {"bandwidth": ceilings(device)}} | cases


ITEMS = _items()


def names(dry_run: bool, few: bool) -> tuple[str, ...]:
    cases = TINY if dry_run else REAL
    if few:  # of each kind one
        cases = [cases[i] for i in (0, 1, 3, 6)]
    return "ceilings", *map(str, cases)


def cap_s(name: str) -> float:
    return 45
