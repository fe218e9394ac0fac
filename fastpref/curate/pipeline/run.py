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

from fastpref.curate.diagnostics import resample
from fastpref.curate.hygiene import Flag
from fastpref.curate.notices import DataWarning, Notice, by_severity, collected_notices
from fastpref.curate.pipeline.config import STAGE_FUNCTIONS, CurateConfig
from fastpref.curate.pipeline.start import first_state, read_state
from fastpref.curate.pipeline.state import LeftOut, PairReason, State, as_json
from fastpref.curate.pipeline.work import check_repeatable, fingerprint, load_samples, load_state, save_state
from fastpref.curate.pipeline.write import check_outputs, write_outputs
from fastpref.errors import InputError

CONTRADICTIONS_SAID = 50  # by row and response
FEWEST_PAIRS = 20  # that say anything of length
LONGEST_WINS = 0.9  # share of pairs told apart by length alone, beyond which accuracy on them measures style


@dataclass(frozen=True)
class CurateResult:
    """What a run ends with.

    Attributes:
        state: what the stages made of the samples.
        rows: columns as they were written, [rows] each; None where nothing was.
        summary: ready for JSON.
        notices: what there is to say about the data, the most urgent first; `curate.notices.NOTICES` explains the ids.
    """

    state: State
    rows: dict | None
    summary: dict
    notices: tuple[Notice, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """The texts of the notices that are more than findings."""
        return tuple(notice.text for notice in self.notices if notice.severity != "finding")


def run(
    config: CurateConfig,
    *,
    begin: str = "read",
    only: bool = False,
    progress: Callable | None = None,
    command: str | None = None,
) -> CurateResult:
    """Runs the pipeline of a config and writes its outputs.

    Deterministic by config.seed. Warns (DataWarning) at its end, with numbers, of what is wrong with the data or cannot
    be done with it; that is in the result, too, beside findings that are no warnings.

    Args:
        config: what is done; see CurateConfig.
        begin: "read", a stage of config.order, or "write". With another than "read", config.work holds what the stages
            before it made, of the same input and with the same options.
        only: that stage alone, whose result is kept in config.work; nothing else is written.
        progress: called with (what, done, total).
        command: the line that started the run, for the report.

    Returns:
        State, rows, summary and notices.

    Raises:
        InputError: for what the user can mend.
        TypeError: for a config that is none.
    """
    started = time.perf_counter()
    begin_place, last = _checked_range(config, begin, only)
    progress_of = (lambda what: None) if progress is None else (lambda what: partial(progress, what))
    names = ("read", *config.order, "write")

    state = _resumed(config, names[begin_place - 1]) if begin_place else None
    for name in names[begin_place : min(last, len(names) - 1)]:
        with collected_notices() as notices, _refused_options(name):
            if name == "read":
                state = read_state(config, progress_of("reading"))
            else:
                state = STAGE_FUNCTIONS[name](state, config)
        state = replace(state, notices=(*state.notices, *notices))
        if config.work is not None:
            save_state(state, config.work, name, fingerprint(config, name))
    with collected_notices() as notices:
        _warn_of_order(config)
        summary = _input_summary(state.samples)
        if state.pairs is not None:
            summary |= _pairs_summary(state)
        rows = None
        if last == len(names):
            rows, written = write_outputs(state, config, progress_of("writing"))
            summary |= written
    notices = tuple(by_severity(dict.fromkeys([*state.notices, *notices])))
    summary |= {"stages": state.summaries, "notices": [notice.as_dict() for notice in notices]}
    if config.report is not None and state.pairs is not None:
        from fastpref.curate.pipeline.report import write_report
        from fastpref.curate.pipeline.report_of_run import report_of_run

        write_report(config.report, report_of_run(state, config, summary, notices, command))
    summary["seconds"] = time.perf_counter() - started
    for notice in notices:
        if notice.severity != "finding":
            warnings.warn(DataWarning(*notice), stacklevel=2)
    return CurateResult(state, rows, summary, notices)


def _checked_range(config, begin, only) -> tuple[int, int]:
    """Where a run begins among read, the stages and write, and before which of them it ends."""
    if not isinstance(config, CurateConfig):
        raise TypeError(
            f"config must be a CurateConfig, got {config!r:.80}: a file of samples is its input, "
            "CurateConfig(input=..., output=...), and a file of options is read by config_from_toml"
        )
    names = ("read", *config.order, "write")
    if begin not in names:
        raise InputError(f"a run can begin at {', '.join(names)}, got {begin!r}")
    if config.work is None and (only or begin != "read"):
        raise InputError(
            "a run that begins later than read, or does one stage alone, needs --work DIR (work), the folder in which "
            "the stages before it were kept"
        )
    if config.output is None and (not only or begin == "write"):
        raise InputError("no output was named: -o OUT (output), a file that ends in .jsonl, .jsonl.gz or .parquet")
    check_outputs(config)
    if config.work is not None:
        check_repeatable(config)
    for package in ("matplotlib", "jinja2") if config.report is not None else ():
        if find_spec(package) is None:
            raise InputError(f'the report needs {package}: pip install "fastpref[cli]"')
    place = names.index(begin)
    return place, place + 1 if only else len(names)


def _resumed(config, name) -> State:
    samples = load_samples(config)
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
            text = f"order has {stage} before audit ({', '.join(order)}): {why}"
            warnings.warn(DataWarning("stage-order", text), stacklevel=2)


# ---- the summary


def _input_summary(samples) -> dict:
    if bad := len(samples.problems):
        text = f"{bad} of {samples.rows} rows are left out, the first {samples.problems[0]}"
        warnings.warn(DataWarning("bad-rows", text), stacklevel=2)
    if bad_responses := len(samples.bad_responses):
        text = f"{bad_responses} responses are left out of their pools, the first {samples.bad_responses[0]}"
        warnings.warn(DataWarning("bad-responses", text), stacklevel=2)
    return {
        "input": samples.path,
        "read_as": samples.read_as,
        "prompts": samples.prompts,
        "responses": samples.responses,
        "bad_rows": bad,
        "bad_responses": bad_responses,
        "not_read": dict(samples.counts),  # ties, and scores that stand for none
        "scores": list(samples.scores),
        "sources": None if samples.sources is None else len(samples.source_names),
    }


def _pairs_summary(state) -> dict:
    kept = state.kept
    _warn_of_flags(state.flags, state.place("chosen")[kept])
    contradicted, contradicting = _contradicting_responses(state)
    if negative := int((state.margins()[kept] < 0).sum()):
        text = (
            f"the margin of {negative} of {int(kept.sum())} pairs is negative: their scores contradict their sides. "
            "RDPO and ML-RDPO take the margin as a rating gap and push such pairs the other way"
        )
        warnings.warn(DataWarning("negative-margins", text), stacklevel=2)
    lengths = state.length_report()
    if kept.sum() >= FEWEST_PAIRS and lengths.longest_wins > LONGEST_WINS:
        text = (
            f"the longer response is the chosen one in {lengths.longest_wins:.1%} of the pairs, and "
            f"{lengths.median_ratio:.1f} times as long in the median: accuracy on such pairs measures length. Another "
            "rule for rejected or length control changes it"
        )
        warnings.warn(DataWarning("length-decides", text), stacklevel=2)
    return {
        "pairs": int(kept.sum()),
        "dropped": state.summaries["construct"]["dropped"] | _counts(PairReason, state.pairs["reason"]),
        "responses_left_out": _counts(LeftOut, state.left_out),
        "negative_margins": negative,
        "contradicted": contradicted,
        "contradicting": contradicting,
        "length": as_json(lengths._asdict()),
        "resample": None if state.published else _worth_resampling(state),
    }


def _contradicting_responses(state) -> tuple[int, list[dict]]:
    """How many responses have scores that contradict each other, and those furthest apart, the chosen ones first.

    Warns of them.
    """
    hygiene = state.summaries.get("hygiene", {})
    count, found = hygiene.get("contradicted", 0), hygiene.get("contradicting", [])
    if not count:
        return 0, []
    places = np.unique(state.place("chosen")[state.kept])
    wins = int(np.count_nonzero(state.flags[places] & Flag.CONTRADICTED))
    chosen = set(places.tolist())
    listed = [{name: value for name, value in row.items() if name != "index"} for row in found]
    for row, known in zip(listed, found, strict=True):
        row["chosen"] = known["index"] in chosen
    listed.sort(key=lambda row: not row["chosen"])
    left_out = hygiene["applied"]
    text = (
        f"{count} responses have two scores that contradict each other, {wins} of them are the chosen response"
        f"{'; they are left out' if left_out else ''}. Row and response: "
        + ", ".join(f"{row['row']}:{row['response']}" for row in listed[:CONTRADICTIONS_SAID])
        + (", ..." if count > CONTRADICTIONS_SAID else "")
    )
    warnings.warn(DataWarning("contradicting-scores-out" if left_out else "contradicting-scores", text), stacklevel=3)
    return count, listed


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
    for flag, id, what in (
        (
            Flag.REPEATED_TEXT,
            "repeated-text-chosen",
            "is a text that stands under many prompts: canned, or made to win",
        ),
        (Flag.CONTAMINATED, "test-data-chosen", "stands, or its prompt does, in a file not to train on"),
    ):
        if count := int(((flags[chosen] & flag) != 0).sum()):
            text = f"the chosen response of {count} of {len(chosen)} pairs {what}; --apply leaves such responses out"
            warnings.warn(DataWarning(id, text), stacklevel=3)
