"""Stage audit: sources whose scores the other sources do not explain."""

import warnings
from dataclasses import dataclass, replace

from fastpref.curate import clean
from fastpref.curate.notices import DataWarning
from fastpref.curate.pipeline.options import Options, check_at_least_one, check_positive, choice
from fastpref.curate.pipeline.scores import primary_scores
from fastpref.curate.pipeline.stages.construct import picked_pairs
from fastpref.curate.pipeline.state import LeftOut, State


@dataclass(frozen=True)
class AuditOptions(Options):
    exclude: str = choice("both", clean.EXCLUSION_MODES)
    threshold: float = 3.0
    rank: int | None = None

    def check(self) -> None:
        check_positive("audit.threshold", self.threshold)
        check_at_least_one("audit.rank", self.rank)


def audit_sources(state: State, config) -> State:
    samples, options = state.samples, config.audit
    if samples.sources is None:
        return state.skipped("audit", "no sources")
    if not samples.scored:
        return state.skipped("audit", "no scores")
    rule = config.construct.on_degenerate
    # By the rule of this run: another one later, on what --work kept, does not bring the audit back. What warns or
    # fails here would do so again, or not, of the pools that are left.
    unaudited = picked_pairs(state, config, on_degenerate="ignore" if rule in ("warn", "error") else rule)
    try:
        found = clean.audit(
            primary_scores(samples, config),  # copies and canned texts too: they are what gives a source away
            samples.sources,
            offsets=samples.offsets,
            names=samples.source_names,
            selection=unaudited,
            rank=options.rank,
            threshold=options.threshold,
            seed=config.seed,
        )
    except ValueError as error:
        return state.refused("audit", error, asked=config.read.sources is not None)
    masks = clean.exclude(samples.sources, found.flagged, options.exclude)
    table = [
        {
            "source": samples.source_names[s],
            "unexplained": found.unexplained[s],
            "low": found.low[s],
            "high": found.high[s],
            "z": found.z[s],
            "flagged": found.flagged[s],
            "reference": found.reference[s],
            "prompts": found.prompts[s],
            "would_supply_chosen": found.as_chosen[s],
            "would_supply_rejected": found.as_rejected[s],
        }
        for s in found.order
    ]
    flagged = [row for row in table if row["flagged"]]
    if flagged and options.exclude == "none":
        names = ", ".join(f"{row['source']} (z {row['z']:.1f})" for row in flagged)
        supply = sum(row["would_supply_chosen"] for row in flagged)
        text = (
            f"flagged sources are left in: {names}; they supply the chosen response of {supply} pairs. "
            "--exclude both leaves them out"
        )
        warnings.warn(DataWarning("flagged-source-left-in", text), stacklevel=2)
    elif flagged:
        names = ", ".join(row["source"] for row in flagged)
        text = (
            f"the responses of {names} are {'never chosen' if options.exclude == 'chosen' else 'left out'}; they would "
            f"have been the chosen response of {sum(row['would_supply_chosen'] for row in flagged)} pairs"
        )
        warnings.warn(DataWarning("flagged-source-out", text), stacklevel=2)
    state = replace(state, choosable=state.choosable & masks.choosable)
    state = state.leave_out(~masks.valid, LeftOut.FLAGGED_SOURCE)
    summary = {
        "prompts": found.audited_prompts,
        "rank": found.rank,
        "exclude": options.exclude,
        "flagged": [row["source"] for row in flagged],
        "reference": [row["source"] for row in table if row["reference"]],
        "would_supply_chosen": sum(row["would_supply_chosen"] for row in flagged),
        "would_supply_rejected": sum(row["would_supply_rejected"] for row in flagged),
        "sources": table,
    }
    return state.with_summary("audit", summary)
