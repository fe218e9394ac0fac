"""What a run of gpu.py comes to: which rows are proved, which backend was faster, and the short table."""

import math
import re

BACKENDS = ("native", "triton")
OPS = (
    "token_logps", "preference", "linear_logps", "linear_preference", "residual_pass", "rpca", "svt", "bradley_terry",
    "outliers",
)  # fmt: skip
LARGEST_ERROR = 1e-3  # of a low-rank answer against what was put in
# of one H200, in ms; forward and backward: at least so much of the rates of the same run
GOALS_MS = {
    "rdpo-step-8192x128256-bfloat16-masked0": 1.57,
    "sigmoid-step-8192x4096x128256-bfloat16-trained-masked0-reference_given": 39,
    "sigmoid-step-8192x4096x128256-bfloat16-frozen-masked0-reference_given": 26,
    "forward-8192x4096x128256-bfloat16-masked0": 12.6,
}
GOAL_SHARES = "goals: forward 95 % of the read rate, backward 93 % of the copy rate"
LINES, WIDTH = 40, 150

# ---- which rows are proved ----


def op_of_test(test: str) -> str | None:
    """ "tests/logps/test_linear_logps_numbers.py::test_x[...]" -> "linear_logps"; else by the function's name."""
    words = re.findall(r"test_(\w+?)(?:\.py|\[|$)", test)
    for word in words:
        if found := [op for op in OPS if word == op or word.startswith(op + "_")]:
            return max(found, key=len)
    return None


def backend_of_test(test: str) -> str | None:
    found = re.search(r"\[.*?(native|triton|reference)-(cpu|cuda)", test)
    return found[1] if found else None


def own_backend(name: str) -> str | None:
    """The backend that a row's name says."""
    return next((b for b in BACKENDS if name.startswith("fastpref") and b in name.split("_")), None)


def unproven(results: dict, op: str, backend: str | None) -> str | None:
    """Why a row of this op, by this backend where it has one, is not proved by what ran in this run; None if it is."""
    contact = results["contact"]
    if ended := [name for name, c in contact.items() if "op" not in c]:  # a variant that took its process with it
        return f"first contact: {ended[0]} did not end"
    met = {name: c for name, c in contact.items() if c["op"] == op and backend in (None, c.get("backend"))}
    if backend and not met:
        return "no first contact"
    if wrong := [name for name, c in met.items() if not c.get("ok")]:
        return f"first contact: {len(wrong)} of {len(met)} not ok, {wrong[0]}"
    tests = results["tests"] or {"passed": {}, "failures": []}
    failed = [f["test"] for f in tests["failures"] if op_of_test(f["test"]) == op]
    failed = [t for t in failed if backend is None or backend_of_test(t) in (None, backend)]
    if failed:
        return f"{len(failed)} of its tests failed, {failed[0].rpartition('/')[2]}"
    counts = tests["passed"].get(op, {})
    if not (sum(counts.values()) if backend is None else counts.get(backend, 0) + counts.get("any", 0)):
        return "none of its tests has passed in this run"
    return None


def mark(results: dict) -> None:
    """Enters `unproven` into fastpref's rows."""
    for record in results["cases"]:
        for name, row in record["competitors"].items():
            if not name.startswith("fastpref"):
                continue
            reason = unproven(results, record["op"], own_backend(name))
            error = row.get("error", 0.0)
            if record.get("problem") and not (error is not None and error <= LARGEST_ERROR):
                reason = f"its error is {error}"
            if reason:
                row["unproven"] = reason
            else:
                row.pop("unproven", None)


# ---- the short table ----


def short(results: dict) -> list[str]:
    """At most LINES lines, the figures a reader looks for first."""
    cases = results["cases"]
    loss = [record for record in cases if "problem" not in record]
    low_rank = [record for record in cases if "problem" in record]
    residual = [record for record in low_rank if record["op"] == "residual_pass"]
    others = [record for record in low_rank if record["op"] != "residual_pass"]
    lines = [*_head(results), *map(_loss_line, loss)]
    lines += [_goals(loss)] if loss else []
    lines += _residual_lines(residual)
    lines += map(_problem_line, others)
    lines += _order_lines(cases)
    missing = [f"not run: {name} ({reason})" for name, reason in results["not_run"].items()]
    for failure in (results["tests"] or {"failures": []})["failures"]:
        missing.append(f"failed: {failure['test'].rpartition('/')[2]}: {failure['reason'].strip().splitlines()[-1]}")
    room = max(LINES - len(lines) - 1, 0)
    lines += [line[:WIDTH] for line in missing[:room]]
    if len(missing) > room:
        lines.append(f"{len(missing) - room} more that failed or did not run: see the record")
    return lines[:LINES]


def _head(results: dict) -> list[str]:
    machine, ceilings = results["machine"], results["bandwidth"]
    gpu, versions = machine.get("gpu") or {}, machine.get("versions", {})
    contact = results["contact"]
    wrong = [name for name, c in contact.items() if not c.get("ok")]
    tests = results["tests"] or {"by_backend": {}, "failures": [], "not_run": "?"}
    counts = [sum(group[word] for group in tests["by_backend"].values()) for word in ("passed", "failed", "skipped")]
    where = "the CPU, kernels on the simulator: no time means anything" if results["dry_run"] else gpu.get("name", "?")
    return [
        f"{where}; torch {versions.get('torch')}, triton {versions.get('triton')}; commit {machine.get('commit')}",
        f"ceilings of this run: read {ceilings.get('read_gbps', math.nan):.0f} GB/s, copy "
        f"{ceilings.get('copy_gbps', math.nan):.0f} GB/s, cuBLAS {ceilings.get('gemm_tflops', math.nan):.0f} TFLOP/s",
        f"first contact: {len(contact) - len(wrong)} of {len(contact)} variants ok"
        + (f"; not ok: {', '.join(wrong)}"[: WIDTH - 40] if wrong else ""),
        "tests: {} passed, {} failed, {} skipped; {} did not run".format(*counts, tests["not_run"]),
    ]


def _loss_line(record: dict) -> str:
    rows = record["competitors"]
    parts = []
    for name, row in rows.items():
        if _is_plain(name) or "stats" in name:
            by_products = " with entropy and top-1" if "stats" in name else ""
            parts.append(f"{own_backend(name)}{by_products} {_row_text(record, row)}")
    peers = {row["title"]: row["median_ms"] for name, row in rows.items() if not name.startswith("fastpref")}
    peers.pop("bare GEMM (U)", None)
    if peers:
        best = min(peers, key=peers.get)
        parts.append(f"best peer {peers[best]:.4g} ms ({best[:30]})")
    goal = GOALS_MS.get(record["name"])
    parts += [f"goal {goal} ms"] if goal else []
    return f"{record['op']} {record['name']}: {'; '.join(parts)}"[: 2 * WIDTH]


def _is_plain(name: str) -> bool:
    """fastpref by a backend, with no option besides."""
    options = ("inplace", "stats", "rounded", "vectors")
    return own_backend(name) is not None and not any(word in name for word in options)


def _row_text(record: dict, row: dict) -> str:
    text = f"{row['median_ms']:.4g} ms"
    if "forward_share" in row:
        text += f" (read {100 * row['forward_share']:.0f} %, copy {100 * row['backward_share']:.0f} %)"
    elif "bandwidth_share" in row:
        text += f" ({record['bandwidth_kind']} {100 * row['bandwidth_share']:.0f} %)"
    if row.get("times_unit"):
        text += f" ({row['times_unit']:.2f} U"
        if row.get("peak_bytes") is not None:
            text += f", peak {row['peak_bytes'] / 2**30:.2f} GiB, plan {record['plan']['predicted_bytes'] / 2**30:.2f}"
        text += ")"
    return text + (" UNPROVEN" if "unproven" in row else "")


def _goals(loss: list[dict]) -> str:
    reasons = {row["unproven"] for record in loss for row in record["competitors"].values() if "unproven" in row}
    return GOAL_SHARES + (f"; unproven: {min(reasons)}" if reasons else "")


def _residual_lines(records: list[dict]) -> list[str]:
    """A line for each rank."""
    by_rank = {}
    for record in records:
        size, rank, dtype = record["name"].split(", ")
        row = record["competitors"]["fastpref_triton"]
        mark = " UNPROVEN" if "unproven" in row else ""
        text = f"{dtype} {row['median_ms']:.4g} ms (read {100 * record['bandwidth_share']:.0f} %){mark}"
        by_rank.setdefault(f"residual_pass {size}, {rank}", []).append(text)
    return [f"{name}: {'; '.join(texts)}" for name, texts in by_rank.items()]


def _problem_line(record: dict) -> str:
    first, *others = record["competitors"].values()
    text = f"{record['op']} {record['name']}: {first['median_ms']:.4g} ms, error {first['error']:.0e}"
    text += "".join(f"; {row['title']} {row['median_ms']:.4g} ms" for row in others)
    text += f"; {record['notes'][-1].rstrip('.')}" if record["notes"] else ""
    return text + (" UNPROVEN" if "unproven" in first else "")


def _order_lines(cases: list[dict]) -> list[str]:
    """The faster backend of each op, by this run's figures."""
    measured = {}  # op and mode -> {backend: ms}, of the first case that has both
    for record in cases:
        rows = {own_backend(name): row["median_ms"] for name, row in record["competitors"].items() if _is_plain(name)}
        rows = {backend: rows[backend] for backend in BACKENDS if backend in rows}
        if len(rows) == len(BACKENDS):
            measured.setdefault(f"{record['op']} {record['mode']}", rows)
    texts = []
    for what, times in measured.items():
        first, second = sorted(BACKENDS, key=times.get)
        texts.append(f"{what}: {first} ({times[second] / times[first]:.2f}x)")
    return [f"measured order: {'; '.join(texts)}"[: 2 * WIDTH]] if texts else []
