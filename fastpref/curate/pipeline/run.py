"""From a file of scored samples to files of training pairs: the methods of this package in a row.

It starts at scored files: it samples no responses and scores none. The stages know of each other by the state alone, so
their order is the caller's. Scores are never overwritten: what a stage makes of them is kept beside them, and every row
that is written says where it comes from.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec

import numpy as np

from fastpref import __version__
from fastpref._rating_scale import of_gaps
from fastpref.curate import goals
from fastpref.curate.diagnostics import resample
from fastpref.curate.files import writing as files
from fastpref.curate.files.samples import texts
from fastpref.curate.hygiene import Flag, split_of
from fastpref.curate.length import LengthReport, length_report
from fastpref.curate.pipeline import stages
from fastpref.curate.pipeline.config import CurateConfig
from fastpref.curate.pipeline.state import LeftOut, PairReason, State, as_json, fingerprint, load, load_samples, save
from fastpref.curate.routing import Route
from fastpref.errors import InputError

LONGEST_WINS = 0.9  # share of pairs told apart by length alone, beyond which accuracy on them measures style
EXAMPLES = 3  # in the report


@dataclass(frozen=True)
class CurateResult:
    state: State
    rows: dict | None  # columns as they were written, [rows] each; None where nothing was
    summary: dict  # ready for JSON
    warnings: tuple[str, ...]


def run(
    config: CurateConfig, *, begin: str = "read", only: bool = False, progress: Callable | None = None
) -> CurateResult:
    """Runs the pipeline of a config and writes its outputs.

    begin: "read", a stage of config.order, or "write". With another than "read", config.work holds what the stages
        before it made, of the same input and with the same options.
    only: that stage alone, whose result is kept in config.work; nothing else is written.
    progress: called with (what, done, total).

    Deterministic by config.seed. Warns (UserWarning) at its end, with numbers, of what is wrong with the data or cannot
    be done with it; the texts are in the result, too. Raises InputError for what the user can mend.
    """
    started = time.perf_counter()
    names = ("read", *config.order, "write")
    if begin not in names:
        raise InputError(f"a run can begin at {', '.join(names)}, got {begin!r}")
    if config.work is None and (only or begin != "read"):
        raise InputError("work must be a folder for a run that begins later than read, or ends after one stage")
    if config.output is None and (not only or begin == "write"):
        raise InputError("output must be a file")
    _check_outputs(config)
    if config.report is not None and find_spec("matplotlib") is None:
        raise InputError('the report needs matplotlib: pip install "fastpref[cli]"')
    report = (lambda what: None) if progress is None else (lambda what: partial(progress, what))
    place = names.index(begin)
    last = place + 1 if only else len(names)

    state = _resumed(config, names[place - 1]) if place else None
    for name in names[place : min(last, len(names) - 1)]:
        with _collected() as messages, _refused_options(name):
            state = stages.read(config, report("reading")) if name == "read" else stages.STAGES[name](state, config)
        state = replace(state, warnings=(*state.warnings, *messages))
        if config.work is not None:
            save(state, config.work, name, fingerprint(config, name))
    with _collected() as messages:
        _warn_of_order(config)
        summary = _said_of_input(state.samples)
        if state.pairs is not None:
            summary |= _said_of_pairs(state)
        rows = None
        if last == len(names):
            rows, written = _write(state, config, report("writing"))
            summary |= written
    messages = tuple(dict.fromkeys([*state.warnings, *messages]))
    summary |= {"stages": state.summaries, "warnings": list(messages)}
    if config.report is not None and state.pairs is not None:
        _write_report(state, config, summary)
    summary["seconds"] = time.perf_counter() - started
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=2)
    return CurateResult(state, rows, summary, messages)


def _resumed(config, name) -> State:
    samples = load_samples(config.work, fingerprint(config, "read"))
    if name == "read":
        return stages.start(samples, config)
    return load(samples, config.work, name, fingerprint(config, name))


def _check_outputs(config) -> None:
    write = config.write
    outputs = [path for path in (config.output, write.sft, write.test, write.bad_rows) if path is not None]
    inputs = [path for path in (config.input, config.read.implicit, *config.hygiene.decontaminate) if path is not None]
    for index, path in enumerate(outputs):
        if path != write.bad_rows and not path.endswith(files.ENDINGS):
            raise InputError(f"the output must end in {', '.join(files.ENDINGS)}, got {path}")
        if not os.access(folder := os.path.dirname(path) or ".", os.W_OK):
            raise InputError(f"cannot write {path}: the folder {folder} is not there or cannot be written")
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"cannot write {path}: it is no regular file")
        for other in [*inputs, *outputs[:index]]:
            if os.path.realpath(path) == os.path.realpath(other):
                raise InputError(f"{path} would overwrite {'an input' if other in inputs else 'another output'}")


@contextlib.contextmanager
def _refused_options(stage) -> Iterator[None]:
    """What a method refuses are the options it was given."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{stage}: {error}") from error


@contextlib.contextmanager
def _collected() -> Iterator[list[str]]:
    """The texts of the library's warnings, filled in at the end; other warnings go their way."""
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("always", RuntimeWarning)
        yield messages
    for warning in caught:
        if warning.category in (UserWarning, RuntimeWarning):
            messages.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _warn_of_order(config) -> None:
    order = config.order
    for stage, why in (
        ("select", "a source that games the judge has the largest margins, and its pairs take the place of others"),
        ("length", "a source that games the judge bends the slope of length"),
    ):
        acts = stage == "select" or config.length.control == "within_source"
        if acts and {stage, "audit"} <= set(order) and order.index(stage) < order.index("audit"):
            warnings.warn(f"order has {stage} before audit ({', '.join(order)}): {why}", UserWarning, stacklevel=2)


# ---- outputs


def _write(state, config, progress) -> tuple[dict, dict]:
    """Writes every output; returns the columns of all rows, and the summary."""
    samples, options = state.samples, config.write
    columns = stages.pair_columns(state, config)
    scale = _rating_scale(columns["score_chosen"] - columns["score_rejected"], options.beta)
    rewrite = None
    if options.easy_to_hard:
        easiest_first = np.argsort(columns["easy_to_hard"], kind="stable")
        columns = _rows(columns, easiest_first)
    if options.goals != "none":
        columns, rewrite = _with_goals(columns, config)
    reproducible = replace(config, read=replace(config.read, workers=None))  # which change nothing
    metadata = {"version": __version__, "config": asdict(reproducible), "rating_scale": scale}
    held_out = split_of(samples.prompt_hash, test_share=options.test_share, salt=config.seed)[columns["prompt"]]
    parts = [(config.output, ~held_out, options.sft)]
    if options.test is not None:
        parts.append((options.test, held_out, None))
    written = {}
    for path, which, sft in parts:
        rows = _rows(columns, which)
        to_sft = None if sft is None else rows["route"] == Route.SFT.name.lower()
        done = files.write_pairs(
            samples,
            rows,
            path,
            format=options.format,
            sft=sft,
            to_sft=to_sft,
            rewrite=rewrite,
            metadata=metadata,
            workers=config.read.workers,
            progress=progress,
        )
        written[path] = done.rows
        if sft is not None:
            written[sft] = done.sft_rows
    if options.bad_rows is not None:
        files.write_problems(samples.problems, options.bad_rows)
        written[options.bad_rows] = len(samples.problems)
    rows = columns | files.pair_columns(samples, columns)
    for name, column in rows.items():
        if isinstance(column, files.Coded):
            rows[name] = np.array([*column.names, None], dtype=object)[column.codes]
    return rows, {"output": config.output, "rating_scale": scale, "written": written}


def _rows(columns, which) -> dict:
    """Some rows of all columns; a name alone is the same in every row."""
    return {name: column[which] if isinstance(column, np.ndarray) else column for name, column in columns.items()}


def _with_goals(columns, config) -> tuple[dict, Callable]:
    """Goal-conditioned rows, and what writes the goals into their prompts."""
    records = goals.goal_records(columns, half=config.write.goals == "half", seed=config.seed)
    del records["pair"]
    swapped = records["goal_swapped"]
    for name in records:
        if name.startswith("margin_"):
            records[name] = np.where(swapped, -records[name], records[name])
    stated = config.read.score_range
    if not stated:  # the template states 1 to 10
        stated = (1.0, 10.0)
        if len(records["goal"]):
            every = np.concatenate([columns["score_chosen"], columns["score_rejected"]])
            records["goal"] = goals.rescale_scores(records["goal"], (every.min(), every.max()), stated)
    elif outside := np.count_nonzero((records["goal"] < stated[0]) | (records["goal"] > stated[1])):
        raise InputError(
            f"the goals of {outside} of {len(records['goal'])} rows lie outside read.score_range [{stated[0]:g}, "
            f"{stated[1]:g}], from {records['goal'].min():.4g} to {records['goal'].max():.4g}: declare the range of "
            "the scores that make the pairs, or none"
        )
    return records, goals.goal_rewrite(score_range=stated, system_role=config.write.system_role)


def _rating_scale(gap, beta) -> dict | None:
    if not (gap != 0).any():
        return None
    return {"beta": beta, "pairs": len(gap), **of_gaps(gap, beta)._asdict()}


# ---- what is said of it


def _said_of_input(samples) -> dict:
    if bad := len(samples.problems):
        warnings.warn(
            f"{bad} of {bad + samples.prompts} rows are left out, the first {samples.problems[0]}",
            UserWarning,
            stacklevel=2,
        )
    return {
        "input": samples.path,
        "prompts": samples.prompts,
        "responses": samples.responses,
        "bad_rows": bad,
        "scores": list(samples.scores),
        "sources": None if samples.sources is None else len(samples.source_names),
    }


def _said_of_pairs(state) -> dict:
    kept = state.kept
    pairs = {name: state.pairs[name][kept] for name in ("prompt", "chosen", "rejected")}
    _warn_of_flags(state.flags, state.place("chosen")[kept])
    lengths = _lengths(state, pairs)
    if lengths.longest_wins > LONGEST_WINS:
        warnings.warn(
            f"the longer response is the chosen one in {lengths.longest_wins:.1%} of the pairs, and "
            f"{lengths.median_ratio:.1f} times as long in the median: accuracy on such pairs measures length. Another "
            "rule for rejected or length control changes it",
            UserWarning,
            stacklevel=2,
        )
    return {
        "pairs": int(kept.sum()),
        "dropped": state.summaries["construct"]["dropped"] | _counts(PairReason, state.pairs["reason"]),
        "responses_left_out": _counts(LeftOut, state.left_out),
        "length": as_json(lengths._asdict()),
        "resample": _worth_resampling(state),
    }


def _worth_resampling(state) -> dict:
    """Prompts whose pool is small or whose best two the judge's own noise may have swapped, and what more would bring.

    The noise is what hygiene found between copies of a text, where there are any.
    """
    noise = state.summaries.get("hygiene", {}).get("copies_std")
    scores = np.where(state.valid, state.score, np.nan)
    found = resample(scores, judge_noise=noise, offsets=state.samples.offsets)
    gains = found.gain[~np.isnan(found.gain)]
    return as_json(
        {
            "too_few": int(found.too_few.sum()),
            "judge_noise": noise,
            "unresolved": None if noise is None else int(found.unresolved.sum()),
            "median_gain": np.median(gains) if len(gains) else np.nan,
        }
    )


def _lengths(state, pairs) -> LengthReport:
    samples = state.samples
    return length_report(samples.lengths, pairs, truncated=samples.truncated, offsets=samples.offsets)


def _counts(reasons, codes) -> dict[str, int]:
    counts = np.bincount(codes, minlength=len(reasons))
    return {reason.name.lower(): int(counts[reason]) for reason in reasons if reason and counts[reason]}


def _warn_of_flags(flags, chosen) -> None:
    """Of what hygiene found and nobody left out, what the pairs hold."""
    for flag, what in (
        (Flag.REPEATED_TEXT, "is a text that stands under many prompts: canned, or made to win"),
        (Flag.CONTAMINATED, "stands, or its prompt does, in a file not to train on"),
    ):
        if count := int(((flags[chosen] & flag) != 0).sum()):
            warnings.warn(
                f"the chosen response of {count} of {len(chosen)} pairs {what}; hygiene leaves it out only if it is to "
                "be applied",
                UserWarning,
                stacklevel=3,
            )


def _write_report(state, config, summary) -> None:
    from fastpref.curate.pipeline.report import (
        MarginPairs,
        PairLengths,
        PickedScores,
        ReportData,
        SourceTable,
        write_report,
    )

    samples, kept = state.samples, state.kept
    pairs = {name: state.pairs[name][kept] for name in ("prompt", "chosen", "rejected")}
    name, scale = stages.primary_field(samples, config)
    audited = summary["stages"].get("audit", {}).get("sources")
    sources = audited and SourceTable(
        names=[row["source"] for row in audited],
        **{key: np.array([row[key] for row in audited], np.float64) for key in ("unexplained", "low", "high")},
        flagged=np.array([row["flagged"] for row in audited], bool),
        chosen=np.array([row["would_supply_chosen"] for row in audited]),
    )
    implicit = state.pairs.get("margin_implicit")
    data = ReportData(
        title=f"Pairs of {os.path.basename(config.input)}",
        summary=_headlines(summary),
        warnings=summary["warnings"],
        scores=PickedScores(
            np.where(state.valid, state.score, np.nan),
            pairs,
            samples.offsets,
            name if scale == "raw" else f"{scale} of {name}",
        ),
        sources=sources,
        margins=None if implicit is None else MarginPairs(state.margin(state.score), implicit, kept),
        counts={
            "responses": {"kept": int(state.valid.sum())} | summary["responses_left_out"],
            "pairs": {"kept": summary["pairs"]} | summary["dropped"],
        },
        lengths=PairLengths(
            *(samples.lengths[state.place(side)[kept]] for side in ("chosen", "rejected")),
            unit=config.read.lengths or "characters",
            found=_lengths(state, pairs),
        ),
        rating_scale=summary.get("rating_scale"),
        examples=_examples(state, pairs),
    )
    write_report(config.report, data)


def _headlines(summary) -> dict:
    made = summary["stages"]["construct"]
    found = {name.replace("_", " "): summary[name] for name in ("input", "prompts", "responses", "bad_rows", "pairs")}
    routed = summary["stages"].get("route", {})
    if "sft" in routed:
        found["of them to SFT"] = routed["sft"]
    return found | {"rule": made["rule"]}


def _examples(state, pairs) -> list:
    """Three pairs from all over the file."""
    from fastpref.curate.pipeline.report import Example

    prompts, first = np.unique(pairs["prompt"], return_index=True)
    shown = np.unique(np.linspace(0, max(len(prompts) - 1, 0), EXAMPLES).astype(np.int64))[: len(prompts)]
    found = []
    for pair, (prompt, responses) in zip(first[shown], texts(state.samples, prompts[shown]), strict=True):
        begin = state.samples.offsets[pairs["prompt"][pair]]
        sides = [pairs[side][pair] for side in ("chosen", "rejected")]
        found.append(
            Example(
                _plain(prompt), *(_plain(responses[k]) for k in sides), *(float(state.score[begin + k]) for k in sides)
            )
        )
    return found


def _plain(text) -> str:
    return text if isinstance(text, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in text)
