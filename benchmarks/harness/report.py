"""Markdown tables and a plot from a benchmark's JSON: `python benchmarks/harness/report.py FILE.json`.

Writes FILE.md and FILE.png. Takes what `pytest benchmarks/bench_*.py --benchmark-json FILE.json` or gpu.py wrote.
"""

import argparse
import json
import sys
from pathlib import Path


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="from --benchmark-json, or from gpu.py")
    parser.add_argument("--out", type=Path, help="folder for the .md and .png (default: beside the JSON)")
    arguments = parser.parse_args(argv)
    results = load(json.loads(arguments.json.read_text()))
    stem = (arguments.out or arguments.json.parent) / arguments.json.stem
    stem.with_suffix(".md").write_text(markdown(results))
    print(f"wrote {stem}.md")
    try:
        plot(results, stem.with_suffix(".png"))
        print(f"wrote {stem}.png")
    except ImportError as error:
        print(f"no plot: matplotlib cannot be imported ({error}); pip install matplotlib", file=sys.stderr)
    return 0


def load(raw: dict) -> dict:
    """Either kind of file as {machine, bandwidth, cases, ...}."""
    if "cases" in raw:
        return raw
    records = [entry["extra_info"] for entry in raw["benchmarks"] if "competitors" in entry["extra_info"]]
    return {
        "machine": raw["machine_info"],
        "bandwidth": next((record["bandwidth"] for record in records if "bandwidth" in record), {}),
        "cases": records,
    }


# ---- Markdown ----


def markdown(results: dict) -> str:
    machine = results["machine"]
    gpu = machine.get("gpu")
    device = gpu["name"] if gpu else machine.get("cpu", "unknown device")
    parts = [f"# Benchmarks, {machine.get('date', 'no date')[:10]}, {device}", _facts(results)]
    parts[1:1] = _caution(results)
    parts += _stages(results) + _contact(results) + _tests(results) + _published(results)
    problems = [record for record in results["cases"] if "problem" in record]
    linear = [record for record in results["cases"] if "hidden_size" in record]
    parts += [_LEGEND] if len(linear) + len(problems) < len(results["cases"]) else []
    parts += [_LINEAR_LEGEND] if linear else []
    parts += [_PROBLEM_LEGEND] if problems else []
    parts += [_case(record) for record in results["cases"]] or ["No case was measured."]
    return "\n\n".join(parts) + "\n"


_LEGEND = (
    "Medians of rounds in which every row ran once, in the same process. *over plain*: how many times faster the row "
    "is than log_softmax + gather, median of the ratios of each round. GB/s counts the bytes that must move: each "
    "logit that counts read once by a forward and once by a backward, every logit's gradient written once; *of "
    "bandwidth* is that over the bandwidth measured in the same run. Peak is memory beyond what was there before the "
    "call, gradient included. Errors are against float64 of the same logits: log-probs (or margins) absolute in nats, "
    "gradients per token relative to the token's gradient. Rows that overwrite the logits get them back by a copy "
    "outside the timing."
)
_LINEAR_LEGEND = (
    "From hidden states and LM head: medians of rounds in which every row ran once; rows that take three times "
    "fastpref's time leave after two. *U* is the row's time over that of one bare GEMM of the tokens that count with "
    "the head, in the same dtype, into memory that is there; that GEMM runs before each single run, and *U* is the "
    "median of the ratios of these pairs. *over plain*: how many times faster than linear + log_softmax + gather. Peak "
    "is memory beyond what was there before the call; *beyond gradients* is that less the gradients asked for. Errors "
    "are against float64 of the same inputs: log-probs (or margins, beta included) absolute in nats, the largest; the "
    "hidden states' gradient per token, relative to that token's gradient, the largest; the head's gradient as a "
    "matrix, relative to its norm."
)


_PROBLEM_LEGEND = (
    "Medians of rounds in which every row ran once, in the same process; rows marked so ran less often. *times first*: "
    "the row's time over that of the first row, median of the ratios of each round. Errors are relative, the median "
    "where there are many; *recovered*: the share with an error below 1e-3."
)


def _facts(results: dict) -> str:
    machine = results["machine"]
    gpu = machine.get("gpu") or {}
    native = (results.get("build_info") or {}).get("native", {})
    lines = {
        "CPU": f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('threads')} threads, "
        f"{machine.get('simd')}",
        "GPU": ", ".join(f"{key} {value}" for key, value in gpu.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items()),
        "native core": ", ".join(f"{k} {v}" for k, v in native.items()) if isinstance(native, dict) else native,
        "Python": machine.get("python"),
        "commit": machine.get("commit"),
        "transparent huge pages": f"{machine.get('transparent_huge_pages')}; THP_MEM_ALLOC_ENABLE "
        f"{machine.get('THP_MEM_ALLOC_ENABLE')}",
        "load average at the start": machine.get("load_average"),
        "measured bandwidth": ", ".join(
            f"{key.removesuffix('_gbps')} {v:.1f} GB/s"
            for key, v in results["bandwidth"].items()
            if key.endswith("_gbps")
        ),
        "measured product": f"{results['bandwidth'].get('gemm_tflops', 0):.0f} TFLOP/s (cuBLAS, bf16)"
        if "gemm_tflops" in results["bandwidth"]
        else None,
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items() if value)


def _caution(results: dict) -> list[str]:
    parts = []
    if results.get("dry_run"):
        parts.append(
            "**Dry run on a CPU, the kernels' PTX on a simulator, tiny shapes: nothing in this file was measured on a "
            "GPU, and no time in it means anything.**"
        )
    if results.get("not_run"):
        lines = [f"- {name}: {reason}" for name, reason in results["not_run"].items()]
        parts.append("## Not run here\n\n" + "\n".join(lines))
    return parts


def _stages(results: dict) -> list[str]:
    if not results.get("stages"):
        return []
    rows = [
        f"| {name} | {stage['status']} | {stage['seconds']:.0f} | {_cell(stage.get('note', ''))} |"
        for name, stage in results["stages"].items()
    ]
    return ["\n".join(["## Stages", "", "| stage | status | s | |", "|---|---|---|---|", *rows])]


def _contact(results: dict) -> list[str]:
    """Every variant's largest share of what its outputs may be off by, and those that are not ok in words."""
    contact = results.get("contact")
    if not contact:
        return []
    rows = []
    for name, said in contact.items():
        parts = said.get("parts", {})
        word = "ok" if said.get("ok") else said.get("failed") or said.get("not_run") or "wrong"
        errors = ", ".join(f"{part} {_power(p['error'])} of {p['bound']:.0e}" for part, p in parts.items())
        rows.append(f"| {name} | {_cell(word)} | {errors} |")
    ok = sum(bool(said.get("ok")) for said in contact.values())
    title = f"## First contact: {ok} of {len(contact)} kernel variants agree with float64"
    legend = "Errors relative to the norm of each output, and what they may be."
    return ["\n".join([title, "", legend, "", "| variant | | errors |", "|---|---|---|", *rows])]


def _power(error) -> str:
    return error if isinstance(error, str) else f"{error:.0e}"


def _published(results: dict) -> list[str]:
    published = results.get("published")
    if not published:
        return []
    rows = [f"| {what} | {figure} |" for what, figure in published.items()]
    legend = "Theirs, as they state them for an H200 at T=8192, H=4096, V=128256, bf16. No run here has repeated them."
    return ["\n".join(["## Published figures of others", "", legend, "", "| | |", "|---|---|", *rows])]


def _tests(results: dict) -> list[str]:
    tests = results.get("tests")
    if not tests:
        return []
    rows = [
        f"| {group} | {count['passed']} | {count['failed']} | {count['skipped']} |"
        for group, count in tests["by_backend"].items()
    ]
    parts = ["\n".join(["## Tests", "", "| backend | passed | failed | skipped |", "|---|---|---|---|", *rows])]
    if tests.get("not_run"):
        parts.append(f"{tests['not_run']} of {tests['collected']} tests did not run.")
    if tests["failures"]:
        lines = [f"- `{failure['test']}`: {_last_line(failure['reason'])}" for failure in tests["failures"]]
        parts.append("### Failures\n\n" + "\n".join(lines))
    return parts


def _case(record: dict) -> str:
    if "problem" in record:
        text = _problem_case(record)
    else:
        text = _linear_case(record) if "hidden_size" in record else _logits_case(record)
    doubts = {}
    for row in record["competitors"].values():
        if "unproven" in row:
            doubts.setdefault(row["unproven"], []).append(row["title"])
    return text + "".join(f"\n\n**Unproven**: {', '.join(t)}: {reason}." for reason, t in doubts.items())


def _logits_case(record: dict) -> str:
    step = record["mode"] == "step"
    title = f"{record['op']}, {'forward and backward' if step else 'forward'}, T={record['tokens']}, "
    title += f"V={record['vocab']}, {record['dtype']}, {100 * record['masked']:.0f} % ignored"
    title += f", {record['loss']}" if record["loss"] else ""
    title += f", {record['variant']}" if record.get("variant") else ""
    title += ", THP_MEM_ALLOC_ENABLE=1" if record.get("huge_page_allocator") else ""
    head = ["", "ms", "min–max", "over plain", "GB/s", f"of {record['bandwidth_kind']} bandwidth", "peak MiB", "error"]
    head += ["gradient error"] if step else []
    apart = any("forward_share" in row for row in record["competitors"].values()) and record.get("device") == "cuda"
    head += ["forward, of reading", "backward, of copying"] if apart else []
    rows = []
    for row in record["competitors"].values():
        cells = [
            row["title"],
            _significant(row["median_ms"]),
            f"{_significant(row['min_ms'])}–{_significant(row['max_ms'])}",
            f"{row['speedup_over_plain']:.2f}×" if row["speedup_over_plain"] else "?",
            _significant(row["gbps"]),
            f"{100 * row['bandwidth_share']:.0f} %",
            _mebibytes(row, "peak_bytes"),
            f"{row['error']:.1e}",
        ]
        cells += [f"{row['gradient_error']:.1e}"] if step else []
        cells += [f"{100 * row[key]:.0f} %" for key in ("forward_share", "backward_share")] if apart else []
        rows.append(cells)
    rounds = f"{record['rounds']} rounds; gradient {record['gradient_bytes'] / 2**20:.1f} MiB."
    return "\n".join([f"## {title}\n\n{table(head, rows)}\n", rounds, *_absent(record)])


def _linear_case(record: dict) -> str:
    step = record["mode"] == "step"
    title = f"{record['op']}, {'forward and backward' if step else 'forward'}, T={record['tokens']}, "
    title += f"H={record['hidden_size']}, V={record['vocab']}, {record['dtype']}, "
    title += f"{'trained' if record['trained'] else 'frozen'} head, " if step else ""
    title += f"{100 * record['masked']:.0f} % ignored"
    title += f", {record['loss']}, reference {record['reference']}" if record["loss"] else ""
    head = ["", "U", "ms", "min–max", "over plain", "peak MiB", *(["beyond gradients MiB"] if step else []), "error"]
    head += ["hidden gradient error", "head gradient error"] if step else []
    rows = []
    for row in record["competitors"].values():
        speedup = row.get("speedup_over_plain")
        cells = [
            row["title"] + (f" ({row['rounds']} rounds)" if row["rounds"] < record["rounds"] else ""),
            f"{row['times_unit']:.2f}",
            _significant(row["median_ms"]),
            f"{_significant(row['min_ms'])}–{_significant(row['max_ms'])}",
            f"{speedup:.2f}×" if speedup else "",
            _mebibytes(row, "peak_bytes"),
            *([_mebibytes(row, "beyond_gradients_bytes")] if step else []),
            *(f"{row[key]:.1e}" if key in row else "" for key in ("error", *(_GRADIENT_ERRORS if step else ()))),
        ]
        rows.append(cells)
    gemm = record["competitors"]["gemm"]
    plan = record["plan"]
    lines = [
        f"## {title}\n\n{table(head, rows)}\n",
        f"{record['rounds']} rounds; U at {_significant(record['unit_flop'] / gemm['median_ms'] / 1e9)} TFLOP/s; "
        f"gradients {record['gradient_bytes'] / 2**20:.1f} MiB. fastpref's plan: {plan['kind']}, "
        f"{plan['gemm_passes']} GEMM passes, {plan['product']}, {plan['predicted_bytes'] / 2**20:.1f} MiB predicted.",
    ]
    return "\n".join(lines + _absent(record))


def _problem_case(record: dict) -> str:
    rows = list(record["competitors"].values())
    more = {
        "recovered": lambda x: f"{100 * x:.0f} %",
        "error": lambda x: f"{x:.1e}",
        "agreement": lambda x: f"{100 * x:.3f} %",
        "iterations": str,
        "beside_data": lambda x: f"{100 * x:.1f} %",
    }
    shown = [key for key in more if any(row.get(key) is not None for row in rows)]
    head = ["", "ms", "min–max", "times first", *(key.replace("_", " ") for key in shown)]
    cells = [
        [
            row["title"] + (f" ({row['rounds']} rounds)" if row["rounds"] < record["rounds"] else ""),
            _significant(row["median_ms"]),
            f"{_significant(row['min_ms'])}–{_significant(row['max_ms'])}",
            f"{_significant(row['times_subject'])}×",
            *("" if row.get(key) is None else more[key](row[key]) for key in shown),
        ]
        for row in rows
    ]
    lines = [f"## {record['op']}, {record['name']}\n\n{table(head, cells)}\n"]
    lines.append(f"{record['rounds']} rounds, {record['threads']} threads. " + " ".join(record["notes"]))
    return "\n".join(lines + _absent(record))


_GRADIENT_ERRORS = ("hidden_error", "weight_error")


def _mebibytes(row: dict, key: str) -> str:
    if key not in row:
        return ""
    return "?" if row[key] is None else f"{row[key] / 2**20:.1f}"


def _absent(record: dict) -> list[str]:
    if not record["absent"]:
        return []
    reasons = {}
    for name, reason in record["absent"].items():
        reasons.setdefault(reason, []).append(name)
    return ["Absent: " + "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()) + "."]


def table(head: list, rows: list) -> str:
    """The first column to the left, numbers to the right."""
    return "\n".join([_row(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(_row, rows)])


def _row(cells) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _last_line(text: str) -> str:
    return _cell(text.strip().splitlines()[-1] if text.strip() else "")


def _significant(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


# ---- plot ----


def plot(results: dict, path: Path) -> None:
    """One panel of horizontal bars per case: median time, min to max as a whisker, shorter is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = results["cases"]
    if not cases:
        return
    heights = [1.2 + 0.28 * len(record["competitors"]) for record in cases]
    figure, panels = plt.subplots(
        len(cases), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for panel, record in zip(panels[:, 0], cases, strict=True):
        rows = list(record["competitors"].values())
        medians = [row["median_ms"] for row in rows]
        whiskers = [
            [m - row["min_ms"] for m, row in zip(medians, rows, strict=True)],
            [row["max_ms"] - m for m, row in zip(medians, rows, strict=True)],
        ]
        colours = ["tab:blue" if row["title"].startswith("fastpref") else "tab:gray" for row in rows]
        panel.barh([row["title"] for row in rows], medians, xerr=whiskers, color=colours, ecolor="black", capsize=2)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.15 * max(medians))
        suffix = ", THP_MEM_ALLOC_ENABLE=1" if record.get("huge_page_allocator") else ""
        panel.set_title(f"{record['op']} {record['name']}{suffix}", fontsize=9, loc="left")
        panel.set_xlabel("ms, median of rounds; whisker: min to max", fontsize=8)
        panel.tick_params(labelsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
