"""How often rpca finds L: `python benchmarks/studies/recovery.py [--seeds 40] [--out FOLDER]`, minutes.

The cases of a robustness table, n = 300, rank 5, float64: corruptions of up to 10 (or 1) mean |L|, missing entries,
noise, condition numbers; each with the rank given and without. Prints the share of seeds with a relative error of L of
at most 1e-6, the median and the largest error, and how often the result said that it had converged.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fastpref
from harness import machine
from harness.problem import corrupted
from harness.report import table

CASES = {
    "5 % corrupted": {"share": 0.05},
    "30 %": {"share": 0.3},
    "40 %": {"share": 0.4},
    "20 %, small (1 mean)": {"share": 0.2, "size": 1.0},
    "50 % observed, 5 %": {"share": 0.05, "observed": 0.5},
    "30 % observed, 5 %": {"share": 0.05, "observed": 0.3},
    "20 % observed, 5 %": {"share": 0.05, "observed": 0.2},
    "30 % observed, 20 %": {"share": 0.2, "observed": 0.3},
    "10 %, noise 0.1 mean": {"share": 0.1, "noise": 0.1},
    "condition 20, 10 %": {"share": 0.1, "condition": 20.0},
    "condition 20, 30 %": {"share": 0.3, "condition": 20.0},
}
N, RANK = 300, 5


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--rank-free-seeds", type=int, default=10, help="of the slower one (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for a .json and a .md beside what is printed")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of ranks that look wrong
    records = []
    for rank, seeds in ((RANK, arguments.seeds), (None, arguments.rank_free_seeds)):
        for case in CASES if seeds else ():
            records.append(recovered(case, rank, seeds))
            print(records[-1], file=sys.stderr, flush=True)
    facts = machine.facts()
    text = markdown(records, facts["commit"])
    print(text, end="")
    if arguments.out:
        stem = arguments.out / f"{facts['date'][:10]}-recovery"
        stem.with_suffix(".json").write_text(json.dumps({"machine": facts, "records": records}, indent=1) + "\n")
        stem.with_suffix(".md").write_text(text)
    return 0


def recovered(case: str, rank: int | None, seeds: int) -> dict:
    """Errors of rpca on one case; rank: what it is told."""
    errors, converged = [], []
    for seed in range(seeds):
        low, data = corrupted(N, N, RANK, seed=seed, dtype=torch.float64, **CASES[case])
        found = fastpref.rpca(data, rank=rank)
        errors.append(float((found.low_rank() - low).norm() / low.norm()))
        converged.append(bool(found.info.converged))
    errors = torch.tensor(errors, dtype=torch.float64)
    return {
        "case": case,
        "rank": rank,
        "seeds": seeds,
        "within_1e-6": float((errors <= 1e-6).double().mean()),
        "median_error": float(errors.median()),
        "largest_error": float(errors.max()),
        "converged": sum(converged) / len(converged),
    }


def markdown(records: list[dict], commit: str) -> str:
    head = ["", "rank", "seeds", "within 1e-6", "median error", "largest", "converged"]
    rows = [
        [
            r["case"],
            "given" if r["rank"] else "free",
            r["seeds"],
            f"{100 * r['within_1e-6']:.0f} %",
            f"{r['median_error']:.1e}",
            f"{r['largest_error']:.1e}",
            f"{100 * r['converged']:.0f} %",
        ]
        for r in records
    ]
    return f"# Recovery by rpca, n = {N}, rank {RANK}, float64, commit {commit}\n\n{table(head, rows)}\n"


if __name__ == "__main__":
    sys.exit(main())
