"""Which sources of a file of scored samples does the judge score unlike all others?

    python examples/source_audit.py samples.jsonl.gz

One prompt per line: {"models": [str, ...], "win_prob": [number in [0, 1], ...]}, other fields ignored; the same model
may be missing from some prompts. Prints the audit of the sources, and beside it what entry-wise robust PCA makes of
them."""

import argparse
import gzip
import json

import numpy as np

from fastpref import preference_matrix
from fastpref.curate import to_logit


def read_scores(path, source_field, score_field):
    """Names of the sources, and their scores [prompts, sources] with NaN where there is none."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [dict(zip(row[source_field], row[score_field], strict=True)) for row in map(json.loads, lines)]
    names = sorted(set().union(*rows))
    return names, np.array([[np.nan if (score := row.get(name)) is None else score for name in names] for row in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="JSON Lines, gzipped or not")
    parser.add_argument("--source-field", default="models")
    parser.add_argument("--score-field", default="win_prob")
    parser.add_argument("--rank", type=int, default=3, help="of the structure that sources share")
    parser.add_argument("--top", type=int, default=8, help="sources to print")
    args = parser.parse_args()

    names, scores = read_scores(args.path, args.source_field, args.score_field)
    logits = to_logit(scores)
    audit = preference_matrix.audit_sources(logits, args.rank)
    entries = preference_matrix.denoise_scores(logits, rank=args.rank)
    flagged = np.bincount(entries.corrupted[:, 1].numpy(), minlength=len(names)) / audit.observed.numpy().clip(min=1)
    place = np.empty(len(names), dtype=int)
    place[np.argsort(-flagged, kind="stable")] = np.arange(1, len(names) + 1)

    print(f"{scores.shape[0]} prompts, {len(names)} sources, structure of rank {audit.rank}")
    for name in np.array(names)[audit.reference.numpy()]:
        print(f"set apart, the same score everywhere: {name}")
    width = max(map(len, names))
    print(f"\n{'':3} {'source':{width}} {'unexplained':>11} {'90 % interval':>14} {'z':>5}   entries flagged (place)")
    for row, source in enumerate(audit.order[: args.top].tolist(), start=1):
        interval = f"{audit.low[source]:.2f} to {audit.high[source]:.2f}"
        print(
            f"{row:3} {names[source]:{width}} {audit.outlyingness[source]:11.2f} {interval:>14} "
            f"{audit.z[source]:5.1f}   {100 * flagged[source]:5.1f} % ({place[source]} of {len(names)})"
        )
    rate = len(entries.corrupted) / max(int(np.isfinite(logits).sum()), 1)
    print(
        f"\nEntry-wise robust PCA flags {len(entries.corrupted)} entries, {100 * rate:.1f} % of all; the source with "
        f"most of them is {names[int(np.argmax(flagged))]}, {100 * flagged.max():.1f} %.\nIt looks for single wrong "
        "scores: a source that games the judge throughout is consistent, and may be structure to it."
    )


if __name__ == "__main__":
    main()
