"""Where a run ends: the kept pairs as rows of the files that were asked for."""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from fastpref._build import version
from fastpref._rating_scale import of_gaps
from fastpref.curate import goals
from fastpref.curate.files import writing as files
from fastpref.curate.files.formats import FORMATS
from fastpref.curate.files.sources import local_files
from fastpref.curate.hygiene import split_of
from fastpref.curate.notices import DataWarning
from fastpref.curate.pipeline.options import Options, check_positive, choice
from fastpref.curate.pipeline.scores import linear_scores, primary_field
from fastpref.curate.pipeline.state import PairReason, State
from fastpref.curate.routing import Route
from fastpref.errors import InputError

GOALS = ("none", "both", "half")


@dataclass(frozen=True)
class WriteOptions(Options):
    format: str = choice("trl", FORMATS)
    sft: str | None = None  # file of the rows routed to SFT; without one they stay in the output, by their route
    test: str | None = None  # file of the prompts held out
    test_share: float = 0.0
    bad_rows: str | None = None
    goals: str = choice("none", GOALS)  # "both": two goal-conditioned rows per pair; "half": as many rows as pairs
    system_role: bool = True  # of the chat template; without one the goal goes before the first user turn
    easy_to_hard: bool = False  # the order of the rows: the largest margin first, rather than that of the file
    beta: float = 0.1  # what the suggested scale of the ratings is for

    def check(self) -> None:
        if (self.test is None) != (self.test_share == 0):
            raise InputError("write.test and write.test_share need each other")
        if not 0 <= self.test_share < 1:
            raise InputError(f"write.test_share must be in [0, 1), got {self.test_share:g}")
        check_positive("write.beta", self.beta)
        if self.easy_to_hard and self.goals != "none":
            raise InputError("write.easy_to_hard is not for goal-conditioned rows, which are shuffled")


def check_outputs(config) -> None:
    """Raises InputError for files that cannot be written, or would overwrite another."""
    write = config.write
    rows = [path for path in (config.output, write.sft, write.test) if path is not None]
    beside = [files.path_of_metadata(path) for path in rows if not os.fspath(path).endswith(".parquet")]
    outputs = [*rows, *beside, *([] if write.bad_rows is None else [write.bad_rows])]
    given = [path for name in (*config.inputs, *config.hygiene.decontaminate) for path in local_files(name)]
    inputs = {os.path.realpath(path) for path in (*given, config.read.implicit) if path is not None}
    for index, path in enumerate(outputs):
        if path in rows:
            files.check_ending(path, write.format)
        _check_folder(path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"cannot write {path}: it is not a regular file")
        if os.path.realpath(path) in inputs:
            raise InputError(f"{path} would overwrite an input")
        if any(os.path.realpath(path) == os.path.realpath(other) for other in outputs[:index]):
            raise InputError(f"{path} would overwrite another output")


def _check_folder(path) -> None:
    """Raises InputError where the folder of a file can neither be written nor made."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise InputError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {path}: the folder {folder} is not writable")


def write_outputs(state: State, config, progress=None) -> tuple[dict, dict]:
    """Writes every output. Returns the columns of all rows, and the summary."""
    samples, options = state.samples, config.write
    columns = row_columns(state, config)
    scale = _rating_scale(columns.get("margin", np.empty(0)), options.beta)
    rewrite = None
    if options.easy_to_hard:
        easiest_first = np.argsort(columns["easy_to_hard"], kind="stable")
        columns = _take_rows(columns, easiest_first)
    if options.goals != "none":
        columns, rewrite = _with_goals(columns, config)
    reproducible = replace(config, read=replace(config.read, workers=None))  # which change nothing
    metadata = {"version": version, "config": asdict(reproducible), "rating_scale": scale}
    names = files.carried_names(samples.fields.carried, files.pair_columns(samples, columns))
    if renamed := {name: written for name, written in names.items() if name != written}:
        text = ", ".join(f"{name} is {written}" for name, written in renamed.items())
        text = f"columns of {samples.path} have the names of columns that are written: there, {text}"
        warnings.warn(DataWarning("renamed-columns", text), stacklevel=2)
    held_out = split_of(samples.prompt_hash, test_share=options.test_share, salt=config.seed)[columns["prompt"]]
    parts = [(config.output, ~held_out, options.sft)]
    if options.test is not None:
        parts.append((options.test, held_out, None))
    written = {}
    for path, which, sft in parts:
        rows = _take_rows(columns, which)
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
        problems = [*samples.problems, *samples.bad_responses]
        files.write_problems(problems, options.bad_rows)
        written[options.bad_rows] = len(problems)
    rows = columns | files.pair_columns(samples, columns)
    for name, column in rows.items():
        if isinstance(column, files.Coded):
            rows[name] = np.array([*column.names, None], dtype=object)[column.codes]
    return rows, {"output": config.output, "rating_scale": scale, "written": written}


def _take_rows(columns, which) -> dict:
    """Some rows of all columns; a name alone is the same in every row."""
    return {name: column[which] if isinstance(column, np.ndarray) else column for name, column in columns.items()}


def _with_goals(columns, config) -> tuple[dict, Callable]:
    """Goal-conditioned rows, and what writes the goals into their prompts."""
    if "score_chosen" not in columns:
        raise InputError(f"write.goals states scores, and {', '.join(config.inputs)} has none")
    records = goals.goal_records(columns, half=config.write.goals == "half", seed=config.seed)
    del records["pair"]
    swapped = records["goal_swapped"]
    del records["margin"]  # it is that of the scores, which are swapped
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
    gap = gap[~np.isnan(gap)]
    if not (gap != 0).any():
        return None
    return {"beta": beta, "pairs": len(gap), **of_gaps(gap, beta)._asdict()}


def row_columns(state: State, config) -> dict[str, object]:
    """The kept pairs as `write_pairs` takes them: indices, scores, and what the stages know of each."""
    samples, kept = state.samples, state.kept
    at = {side: state.place(side)[kept] for side in ("chosen", "rejected")}
    primary = primary_field(samples, config)
    columns = state.kept_pairs
    columns["row"] = samples.row[columns["prompt"]]

    def both(column, end=""):
        columns.update({f"score_{side}{end}": column[place] for side, place in at.items()})

    if primary is not None:
        as_read = linear_scores(samples, primary)
        both(as_read)
        columns["margin"] = np.subtract(*(as_read[place] for place in at.values()))
        if any(not np.array_equal(state.score[place], as_read[place], equal_nan=True) for place in at.values()):
            both(state.score, "_used")  # the mean of copies, or replaced, or without the slope of length
        if primary.scale != "raw" or len(samples.scores) > 1:
            for field, column in samples.scores.items():
                both(column, f"_{field}")
    if samples.strength is not None:
        known = columns.get("margin", math.nan)
        columns["margin"] = np.where(np.isnan(known), state.margins()[kept], known)
    for known in ("n_pool", "z_chosen", "z_rejected", "rank_rejected"):
        if known in state.pairs:
            columns[known] = state.pairs[known][kept]
    made = state.summaries["construct"]
    columns["rule"] = made["rule"]
    if primary is not None:
        field = primary.declaration
        columns["scale"] = field if made["scale"] == "raw" else f"{field}, {made['scale']}"
    columns["reason"] = PairReason.KEPT.name.lower()
    columns["route"] = np.array([route.name.lower() for route in Route], object)[state.pairs["route"][kept]]
    further = [known for known in state.pairs if known.startswith(("margin_", "p_", "select_", "easy_"))]
    return columns | {known: state.pairs[known][kept] for known in further}
