"""From a file of scored samples to files of training pairs: the methods of this package in a row.

It starts at scored files: it samples no responses and scores none. The stages know of each other by the state alone, so
their order is the caller's. Scores are never overwritten: what a stage makes of them is kept beside them, and every row
that is written says where it comes from.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import numpy as np

from fastpref._warnings import collected_warnings
from fastpref.curate.diagnostics import resample
from fastpref.curate.hygiene import Flag
from fastpref.curate.pipeline.config import STAGE_FUNCTIONS, CurateConfig
from fastpref.curate.pipeline.start import first_state, read_state
from fastpref.curate.pipeline.state import (
    LeftOut,
    PairReason,
    State,
    as_json,
    fingerprint,
    load_samples,
    load_state,
    save_state,
)
from fastpref.curate.pipeline.write import check_outputs, write_outputs
from fastpref.errors import InputError

LONGEST_WINS = 0.9  # share of pairs told apart by length alone, beyond which accuracy on them measures style


@dataclass(frozen=True)
class CurateResult:
    """What a run ends with."""

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
    check_outputs(config)
    if config.report is not None and find_spec("matplotlib") is None:
        raise InputError('the report needs matplotlib: pip install "fastpref[cli]"')
    progress_of = (lambda what: None) if progress is None else (lambda what: partial(progress, what))
    place = names.index(begin)
    last = place + 1 if only else len(names)

    state = _resumed(config, names[place - 1]) if place else None
    for name in names[place : min(last, len(names) - 1)]:
        with collected_warnings() as messages, _refused_options(name):
            if name == "read":
                state = read_state(config, progress_of("reading"))
            else:
                state = STAGE_FUNCTIONS[name](state, config)
        state = replace(state, warnings=(*state.warnings, *messages))
        if config.work is not None:
            save_state(state, config.work, name, fingerprint(config, name))
    with collected_warnings() as messages:
        _warn_of_order(config)
        summary = _input_summary(state.samples)
        if state.pairs is not None:
            summary |= _pairs_summary(state)
        rows = None
        if last == len(names):
            rows, written = write_outputs(state, config, progress_of("writing"))
            summary |= written
    messages = tuple(dict.fromkeys([*state.warnings, *messages]))
    summary |= {"stages": state.summaries, "warnings": list(messages)}
    if config.report is not None and state.pairs is not None:
        from fastpref.curate.pipeline.report import report_of_run, write_report

        write_report(config.report, report_of_run(state, config, summary))
    summary["seconds"] = time.perf_counter() - started
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=2)
    return CurateResult(state, rows, summary, messages)


def _resumed(config, name) -> State:
    samples = load_samples(config.work, fingerprint(config, "read"))
    if name == "read":
        return first_state(samples, config)
    return load_state(samples, config.work, name, fingerprint(config, name))


@contextlib.contextmanager
def _refused_options(stage) -> Iterator[None]:
    """A ValueError of a method is about the options it was given."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{stage}: {error}") from error


def _warn_of_order(config) -> None:
    order = config.order
    for stage, why in (
        ("select", "a source that games the judge has the largest margins, and its pairs take the place of others"),
        ("length", "a source that games the judge bends the slope of length"),
    ):
        acts = stage == "select" or config.length.control == "within_source"
        if acts and {stage, "audit"} <= set(order) and order.index(stage) < order.index("audit"):
            warnings.warn(f"order has {stage} before audit ({', '.join(order)}): {why}", UserWarning, stacklevel=2)


# ---- the summary


def _input_summary(samples) -> dict:
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


def _pairs_summary(state) -> dict:
    kept = state.kept
    _warn_of_flags(state.flags, state.place("chosen")[kept])
    lengths = state.length_report()
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


def _counts(reasons, codes) -> dict[str, int]:
    counts = np.bincount(codes, minlength=len(reasons))
    return {reason.name.lower(): int(counts[reason]) for reason in reasons if reason and counts[reason]}


def _warn_of_flags(flags, chosen) -> None:
    """About what hygiene found, and what still stands in the pairs."""
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
