"""From a file of scored samples to files of training pairs: the methods of this package in a row.

It starts at scored files: it samples no responses and scores none. A stage is a function State -> State, and knows of
the others by the state alone; the order is the caller's. Scores are never overwritten: what a stage makes of them is
kept beside them, and every row that is written says where it comes from.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from fastpref.curate import goals, length, margins, routing
from fastpref.curate import hygiene as hygiene_checks
from fastpref.curate.config import CurateConfig
from fastpref.curate.hygiene import Flag
from fastpref.curate.pairs import DropReason, select_pairs
from fastpref.curate.samples import InputError, Samples, read_samples, text_hashes, to_logit
from fastpref.curate.state import LeftOut, PairReason, State, fingerprint, load, load_samples, save
from fastpref.curate.writing import write_pairs
from fastpref.rating_scale import of_gaps

LONGEST_WINS = 0.9  # share of pairs told apart by length alone, beyond which accuracy on them measures style


@dataclass(frozen=True)
class CurateResult:
    state: State
    rows: dict[str, np.ndarray] | None  # the columns that were written; None where nothing was
    summary: dict  # ready for JSON
    warnings: tuple[str, ...]


def run(config: CurateConfig, *, begin="read", only=False, progress=None) -> CurateResult:
    """Runs the pipeline of a config, writes its outputs and warns (UserWarning) of what is wrong with the data.

    begin: "read", a stage of config.order, or "write"; with another than "read" config.work holds what the stages
        before it made, of the same input and options.
    only: that stage alone; its result is kept in config.work, and nothing is written.
    progress: as in `read_samples`.

    Deterministic by config.seed. Raises InputError for what the user can mend.
    """
    started = time.perf_counter()
    stages = ("read", *config.order, "write")
    if begin not in stages:
        raise InputError(f"a run can begin at {', '.join(stages)}, got {begin!r}")
    if config.work is None and (begin != "read" or only):
        raise InputError(f"to begin at {begin} alone or without the stages before it, there must be a folder of work")
    if only and begin == "write":
        only = False
    place = stages.index(begin)
    if not only and config.output is None:
        raise InputError("there must be an output")
    _check_outputs(config)
    messages: list[str] = []
    with _collected(messages):
        _warn_of_order(config.order)
    state = _resume(config, stages[place - 1]) if place else None
    for stage in stages[place : place + 1] if only else stages[place:-1]:
        caught = []
        with _collected(caught):
            state = _read(config, progress) if stage == "read" else STAGES[stage](state, config)
        state = replace(state, warnings=(*state.warnings, *caught))
        if config.work is not None:
            save(state, config.work, stage, fingerprint(config, stage))
    rows = None
    summary = _input_summary(state.samples)
    if state.pairs is not None:
        with _collected(messages):
            summary |= _pairs_summary(state)
    if not only:
        with _collected(messages):
            rows, written = _write(state, config, progress)
        summary |= written
    messages = tuple(dict.fromkeys([*_problems(state.samples), *state.warnings, *messages]))
    summary |= {"stages": state.summaries, "warnings": list(messages), "seconds": time.perf_counter() - started}
    if config.report is not None and state.pairs is not None:
        _report(state, config, summary)
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=2)
    return CurateResult(state, rows, summary, messages)


# ---- outputs


def _write(state, config, progress):
    """Writes every output; returns the columns and their summary."""
    samples, options = state.samples, config.write
    columns = pair_columns(state, config)
    rewrite, written = None, {}
    scale = _rating_scale(columns["margin"], options.beta)
    if scale is not None:
        written["rating_scale"] = scale
    rows = columns
    if options.goals != "none":
        rows, rewrite = _goal_conditioned(columns, config)
    metadata = {"fastpref": __version__, "config": asdict(config), "rating_scale": scale}
    test = split_of(samples.prompt_hash, test_share=options.test_share, salt=options.salt)[rows["prompt"]]
    sft = (rows["route"] == routing.Route.SFT.name.lower()) & ~test & (options.sft is not None)
    parts = [(config.output, "trl", ~test & ~sft), (options.test, "trl", test), (options.sft, "sft", sft)]
    written["written"] = {}
    return rows, written


def _goal_conditioned(columns, config):
    records = goals.goal_records(columns, half=config.write.goals == "half", seed=config.seed)
    stated = config.read.score_range
    if not stated:
        stated = (1.0, 10.0)
        records["goal"] = goals.rescale_scores(records["goal"], target_range=stated)
    del records["pair"]
    return records, goals.goal_rewrite(score_range=stated, system_role=config.write.system_role)


def _rating_scale(margin, beta) -> dict | None:
    if not (margin[np.isfinite(margin)] != 0).any():
        return None
    return {"beta": beta, "pairs": len(margin), **of_gaps(margin, beta)._asdict()}


# ---- what is said about it


def _input_summary(samples) -> dict:
    return {
        "input": samples.path,
        "prompts": samples.prompts,
        "responses": samples.responses,
        "bad_rows": len(samples.problems),
        "scores": list(samples.scores),
        "sources": None if samples.sources is None else len(samples.source_names),
    }


def _problems(samples) -> list[str]:
    if not samples.problems:
        return []
    bad = len(samples.problems)
    return [f"{bad} of {bad + samples.prompts} rows were left out, the first: {samples.problems[0]}"]


def _pairs_summary(state) -> dict:
    samples, pairs = state.samples, state.pairs
    reasons = np.bincount(pairs["reason"], minlength=len(PairReason))
    left_out = np.bincount(state.left_out, minlength=len(LeftOut))
    dropped = state.summaries["construct"]["dropped"] | _counts(PairReason, reasons)
    kept = state.kept
    chosen = state.place("chosen")[kept]
    _warn_of_flags(state, chosen)
    lengths = length.length_report(
        samples.lengths,
        {name: pairs[name][kept] for name in ("prompt", "chosen", "rejected")},
        truncated=samples.truncated,
        offsets=samples.offsets,
    )
    if lengths.longest_wins > LONGEST_WINS:
        warnings.warn(
            f"the chosen response is the longer one in {lengths.longest_wins:.1%} of the pairs (median "
            f"{lengths.median_ratio:.1f} times as long): accuracy on such pairs measures length. "
            "length_control, or another rejected rule, changes it",
            UserWarning,
            stacklevel=2,
        )
    return {
        "pairs": int(kept.sum()),
        "dropped": dropped,
        "responses_left_out": _counts(LeftOut, left_out),
        "length": {name: finite(value) for name, value in lengths._asdict().items()},
    }


def _counts(reasons, counts) -> dict[str, int]:
    return {reason.name.lower(): int(counts[reason]) for reason in reasons if reason and counts[reason]}


def _warn_of_flags(state, chosen) -> None:
    """Of what hygiene reported and nobody left out, what the pairs hold."""
    for flag, what, remedy in (
        (Flag.REPEATED_TEXT, "is a text that stands under many prompts", "canned, or made to win"),
        (Flag.CONTAMINATED, "answers a prompt of a file not to train on", "or is in it"),
    ):
        if count := int((state.flags[chosen] & flag != 0).sum()):
            warnings.warn(
                f"the chosen response of {count} of {len(chosen)} pairs {what} ({remedy}): hygiene.apply leaves it out",
                UserWarning,
                stacklevel=3,
            )


def _warn_of_order(order) -> None:
    if {"select", "audit"} <= set(order) and order.index("select") < order.index("audit"):
        warnings.warn(
            f"pairs are selected before the sources are audited (order {', '.join(order)}): margins that a source "
            "gained by gaming the judge are the largest, and take the place of others",
            UserWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def _collected(messages: list[str]) -> Iterator[None]:
    """The warnings of the library, as texts at the end of the list; other warnings go their way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("always", RuntimeWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning | RuntimeWarning):
            messages.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _check_outputs(config) -> None:
    write = config.write
    outputs = [path for path in (config.output, write.sft, write.test, write.bad_rows) if path is not None]
    for index, path in enumerate(outputs):
        for other in [config.input, *outputs[:index]]:
            if os.path.realpath(path) == os.path.realpath(other):
                raise InputError(f"{path} would overwrite {'the input' if other == config.input else 'another output'}")


def _report(state, config, summary) -> None:
    from fastpref.curate import report

    samples, kept = state.samples, state.kept
    at = {side: state.place(side) for side in ("chosen", "rejected")}
    picked = {name: state.pairs[name][kept] for name in ("prompt", "chosen", "rejected")}
    name, scale = primary_field(samples, config)
    audited = summary["stages"].get("audit", {}).get("sources")
    implicit = state.pairs.get("margin_implicit")
    examples = np.unique(picked["prompt"], return_index=True)[1]
    examples = examples[np.linspace(0, len(examples) - 1, EXAMPLES).astype(int)] if len(examples) >= EXAMPLES else examples
    told = zip(examples, texts(samples, picked["prompt"][examples]), strict=True)
    data = report.ReportData(
        title=f"Pairs of {os.path.basename(config.input)}",
        summary=_headlines(summary),
        warnings=summary["warnings"],
        scores=report.PickedScores(
            np.where(state.valid, state.score, np.nan), picked, samples.offsets, f"{scale} of {name}" * (scale != "raw") or name
        ),
        sources=audited and report.SourceTable(
            names=[row["source"] for row in audited],
            **{key: np.array([row[key] for row in audited], float) for key in ("unexplained", "low", "high")},
            flagged=np.array([row["flagged"] for row in audited]),
            chosen=np.array([row["would_supply_chosen"] for row in audited]),
        ),
        margins=None if implicit is None else report.MarginPairs(state.margin(state.score), implicit, kept),
        counts={
            "responses": {"kept": int(state.valid.sum())} | summary["responses_left_out"],
            "pairs": {"kept": summary["pairs"]} | summary["dropped"],
        },
        lengths=report.PairLengths(*(samples.lengths[at[side]][kept] for side in at), config.read.lengths or "characters"),
        rating_scale=summary.get("rating_scale"),
        examples=[],
    )
    report.write_report(config.report, data)
