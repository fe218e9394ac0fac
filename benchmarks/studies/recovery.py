"""How often rpca finds L: `python benchmarks/recovery.py [--seeds 40] [--out FOLDER]`, minutes.

The cases of a robustness table, n = 300, rank 5, float64: corruptions of up to 10 (or 1) mean |L|, missing entries,
noise, condition numbers; each with the rank given and without. Prints the share of seeds with a relative error of L of
at most 1e-6, the median and the largest error, and how often the result said that it had converged.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

import machine
import torch
from report import table

import fastpref

CASES = {
    "5 % corrupted": {},
    "30 %": {"share": 0.3},
    "40 %": {"share": 0.4},
    "20 %, small (1 mean)": {"share": 0.2, "size": 1.0},
    "50 % observed, 5 %": {"observed": 0.5},
    "30 % observed, 5 %": {"observed": 0.3},
    "20 % observed, 5 %": {"observed": 0.2},
    "30 % observed, 20 %": {"observed": 0.3, "share": 0.2},
    "10 %, noise 0.1 mean": {"share": 0.1, "noise": 0.1},
    "condition 20, 10 %": {"share": 0.1, "condition": 20.0},
    "condition 20, 30 %": {"share": 0.3, "condition": 20.0},
}


def problem(seed, n=300, rank=5, share=0.05, observed=1.0, noise=0.0, condition=1.0, size=10.0):
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, rank, generator=rng, dtype=torch.float64) for _ in range(2))
    if condition > 1:
        a = n * torch.linalg.qr(a).Q * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
        b = torch.linalg.qr(b).Q
    low = a @ b.t()
    mean = low.abs().mean()
    wrong = torch.rand(n, n, generator=rng) < share
    data = low + wrong * size * mean * (2 * torch.rand(n, n, generator=rng, dtype=torch.float64) - 1)
    data += noise * mean * torch.randn(n, n, generator=rng, dtype=torch.float64)
    return low, data.masked_fill(torch.rand(n, n, generator=rng) >= observed, torch.nan)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--rank-free-seeds", type=int, default=10, help="of the slower one (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for a .json and a .md beside what is printed")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of ranks that look wrong
    records = []
    for rank, seeds in ((5, arguments.seeds), (None, arguments.rank_free_seeds)):
        for case, options in CASES.items() if seeds else ():
            errors, converged = [], []
            for seed in range(seeds):
                low, data = problem(seed, **options)
                found = fastpref.rpca(data, rank=rank)
                errors.append(float((found.low_rank() - low).norm() / low.norm()))
                converged.append(bool(found.info.converged))
            errors = torch.tensor(errors, dtype=torch.float64)
            records.append(
                {
                    "case": case,
                    "rank": rank,
                    "seeds": seeds,
                    "within_1e-6": float((errors <= 1e-6).double().mean()),
                    "median_error": float(errors.median()),
                    "largest_error": float(errors.max()),
                    "converged": sum(converged) / len(converged),
                }
            )
            print(records[-1], file=sys.stderr, flush=True)
    facts = machine.facts()
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
    text = f"# Recovery by rpca, n = 300, rank 5, float64, commit {facts['commit']}\n\n{table(head, rows)}\n"
    print(text, end="")
    if arguments.out:
        stem = arguments.out / f"{facts['date'][:10]}-recovery"
        stem.with_suffix(".json").write_text(json.dumps({"machine": facts, "records": records}, indent=1) + "\n")
        stem.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
