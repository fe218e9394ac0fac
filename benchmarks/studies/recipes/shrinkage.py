"""Noisy labels shrink the reward, large margins inflate it: `python benchmarks/studies/recipes/shrinkage.py [--json]`.

The linear model of "Less is More" (arXiv 2502.14560): reward <phi, w>, labels drawn by Bradley-Terry from a margin that
carries noise. The optimum of the logistic loss is then a shorter copy of w, the shorter the noisier; the pairs with the
largest margins move it the other way, pairs drawn at random do not. One seed, seconds.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from fastpref.curate import select_top
from harness.report import table

WIDTH, PAIRS, LENGTH = 8, 20_000, 2.0
NOISE = (0.0, 1.0, 2.0, 4.0)  # standard deviation of the margins' noise
SHARE = 0.1  # of the pairs that is selected
RIDGE = 1e-4  # times |w|^2, beside the mean loss


def shrinkage(seed=0, noise=NOISE) -> list[dict]:
    """One row per noise: length of the fitted w on all pairs, the selected and random ones, and the cosine with w."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=WIDTH)
    truth *= LENGTH / np.linalg.norm(truth)
    features = rng.normal(size=(PAIRS, WIDTH))
    rows = []
    for std in noise:
        margin = features @ truth + std * rng.normal(size=PAIRS)
        label = np.where(rng.random(PAIRS) < 1 / (1 + np.exp(-margin)), 1.0, -1.0)
        fitted = {"all": logistic_fit(features, label)}
        drawn = {
            "top": select_top(label * margin, fraction=SHARE).indices,
            "random": rng.choice(PAIRS, round(SHARE * PAIRS), replace=False),
        }
        for name, pairs in drawn.items():
            fitted[name] = logistic_fit(features[pairs], label[pairs])
        row = {"noise": std}
        for name, w in fitted.items():
            length = float(np.linalg.norm(w))
            row |= {name: length, f"{name}_cosine": float(w @ truth / (length * LENGTH))}
        rows.append(row)
    return rows


def logistic_fit(features, label, steps=100) -> np.ndarray:
    """Newton's minimum of mean softplus(-label * <features, w>) + RIDGE * |w|^2; label is 1 or -1."""
    w = np.zeros(features.shape[1])
    for _ in range(steps):
        wrong = 1 / (1 + np.exp(label * (features @ w)))  # probability of the other label
        gradient = -(features.T @ (label * wrong)) / len(label) + 2 * RIDGE * w
        curvature = (features.T * (wrong * (1 - wrong))) @ features / len(label) + 2 * RIDGE * np.eye(len(w))
        step = np.linalg.solve(curvature, gradient)
        w = w - step
        if np.abs(step).max() < 1e-10:
            return w
    raise RuntimeError(f"Newton's method did not converge in {steps} steps, the last of them {np.abs(step).max():.1e}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="the rows as JSON instead of the table")
    arguments = parser.parse_args(argv)
    rows = shrinkage(arguments.seed)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    names = ("all", "top", "random")
    head = ["noise", "all pairs", "largest 10 % of margins", "random 10 %", *(f"cosine, {name}" for name in names)]
    cells = [
        [f"{row['noise']:g}", *(f"{row[n]:.2f}" for n in names), *(f"{row[f'{n}_cosine']:.3f}" for n in names)]
        for row in rows
    ]
    print(f"Length of the fitted reward, true length {LENGTH:g}, {PAIRS:,} pairs, seed {arguments.seed}\n")
    print(table(head, cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
