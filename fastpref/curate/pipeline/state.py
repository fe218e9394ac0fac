"""What one stage of the pipeline hands to the next, and the files in the work folder that keep it.

A file carries the fingerprint of everything that led to it: the input (size and time of change), the version, the seed,
the stages so far and their options. One that does not agree is refused, never mended.
"""

import enum
import json
import math
import os
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from fastpref._build import version
from fastpref._whole_file import whole_file
from fastpref.curate.files.rows import Fields
from fastpref.curate.files.table import RowProblem, Samples
from fastpref.curate.length import LengthReport, length_report
from fastpref.curate.pairs import PLACES
from fastpref.errors import InputError


class LeftOut(enum.IntEnum):
    """Why a response takes no part; `KEPT` where it does. Of several reasons the first."""

    KEPT = 0
    NO_SCORE = 1
    BLANK = 2
    DUPLICATE = 3  # of another response of its prompt
    REPEATED_TEXT = 4  # one text under many prompts
    CONTAMINATED = 5  # it or its prompt stands in a file that must not be trained on
    FLAGGED_SOURCE = 6
    CORRUPTED_SCORE = 7


class PairReason(enum.IntEnum):
    """Why a pair is not written; `KEPT` where it is."""

    KEPT = 0
    LEFT_OUT = 1  # a stage after construction left out one of its responses, or its chosen one as such
    NOT_BETTER = 2  # a stage after construction changed the scores so
    NOT_SELECTED = 3


@dataclass(frozen=True)
class State:
    samples: Samples
    score: np.ndarray  # float64 [responses], what pairs are constructed by; NaN where there is none
    left_out: np.ndarray  # uint8 [responses], a LeftOut
    choosable: np.ndarray  # bool [responses]; False: may be rejected, is never chosen
    flags: np.ndarray  # uint8 [responses], what hygiene found, a sum of its Flags
    taken: np.ndarray  # bool [prompts]; False: prompts that a selection before construction left out
    pairs: dict[str, np.ndarray] | None = None  # [pairs] each: prompt, chosen, rejected, reason (a PairReason), ...
    summaries: dict[str, dict] = field(default_factory=dict)  # by stage, ready for JSON
    warnings: tuple[str, ...] = ()

    @property
    def valid(self) -> np.ndarray:
        """bool [responses]."""
        return self.left_out == LeftOut.KEPT

    @property
    def usable(self) -> np.ndarray:
        """bool [responses], the valid ones of the prompts that were not left out."""
        return self.valid & np.repeat(self.taken, np.diff(self.samples.offsets))

    @property
    def kept(self) -> np.ndarray:
        """bool [pairs]."""
        return self.pairs["reason"] == PairReason.KEPT

    @property
    def kept_pairs(self) -> dict[str, np.ndarray]:
        """Prompt, chosen and rejected, the columns in the pool, of the pairs that are written."""
        kept = self.kept
        return {name: self.pairs[name][kept] for name in PLACES}

    def place(self, side) -> np.ndarray:
        """int64 [pairs], index among all responses of each pair's "chosen" or "rejected"."""
        return self.samples.offsets[self.pairs["prompt"]] + self.pairs[side]

    def margin(self, column) -> np.ndarray:
        """float64 [pairs], a number per response of the chosen minus that of the rejected one."""
        return column[self.place("chosen")] - column[self.place("rejected")]

    def length_report(self) -> LengthReport:
        """How far length alone explains the kept pairs."""
        samples = self.samples
        return length_report(samples.lengths, self.kept_pairs, truncated=samples.truncated, offsets=samples.offsets)

    # ---- what a stage makes of it

    def leave_out(self, which, reason: LeftOut) -> "State":
        """Without some responses from here on, and the pairs made with them; a response keeps its first reason."""
        left_out = np.where(which & self.valid, reason, self.left_out).astype(np.uint8)
        return replace(self, left_out=left_out)._with_checked_pairs()

    def rescored(self, scores) -> "State":
        """With other scores; NaN leaves a response out."""
        left_out = np.where(np.isnan(scores) & self.valid, LeftOut.NO_SCORE, self.left_out).astype(np.uint8)
        return replace(self, score=scores, left_out=left_out)._with_checked_pairs()

    def _with_checked_pairs(self) -> "State":
        """After construction the pairs stay, but those that would not be made any more are dropped."""
        if self.pairs is None:
            return self
        kept, valid = self.kept, self.valid
        missing = kept & ~((valid & self.choosable)[self.place("chosen")] & valid[self.place("rejected")])
        worse = kept & ~missing & ~(self.margin(self.score) > 0)
        reason = np.where(missing, PairReason.LEFT_OUT, np.where(worse, PairReason.NOT_BETTER, self.pairs["reason"]))
        return replace(self, pairs=self.pairs | {"reason": reason.astype(np.int8)})

    def with_summary(self, stage: str, summary: dict) -> "State":
        return replace(self, summaries=self.summaries | {stage: as_json(summary)})

    def skipped(self, stage: str, why: str) -> "State":
        """Nothing done by the stage."""
        return self.with_summary(stage, {"skipped": why})

    def refused(self, stage: str, error: ValueError, *, asked: bool) -> "State":
        """Nothing done, because the method refused the data; warns if the stage was asked for."""
        if asked:
            warnings.warn(f"{stage} did nothing: {error}", UserWarning, stacklevel=3)
        return self.skipped(stage, str(error))


def as_json(value):
    """The value as JSON has it: plain numbers and lists, None for what is not finite."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(config, stage) -> dict:
    """Everything that decides what the file of a stage holds; equal for runs that would write the same."""
    stages = () if stage == "read" else config.order[: config.order.index(stage) + 1]
    found = {
        "version": version,
        "input": _file_facts(config.input),
        "read": asdict(config.read) | {"workers": None},  # which change nothing
    }
    if stages:
        implicit = config.read.implicit
        files = [implicit] * (implicit is not None and os.path.exists(implicit)) + list(config.hygiene.decontaminate)
        found |= {"seed": config.seed, "order": stages, "files": [_file_facts(path) for path in files]}
        found |= {name: asdict(getattr(config, name)) for name in stages}
    return json.loads(json.dumps(found))


def _file_facts(path) -> dict:
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return {"path": os.path.realpath(path), "bytes": status.st_size, "changed_ns": status.st_mtime_ns}


_COLUMNS = ("score", "left_out", "choosable", "flags", "taken")
_SAMPLES_FACTS = ("path", "source_names", "fields", "stamp", "problems")


def save_state(state: State, work, stage: str, made_of: dict) -> None:
    """Writes work/<stage>.npz: the samples after "read", else what the stages made of them."""
    if stage == "read":
        known = vars(state.samples)
        facts = {name: known[name] for name in _SAMPLES_FACTS}
        facts["problems"] = [vars(problem) for problem in state.samples.problems]
        arrays = {name: value for name, value in known.items() if isinstance(value, np.ndarray)}
        arrays |= {f"scores.{name}": column for name, column in state.samples.scores.items()}
    else:
        facts = {"summaries": state.summaries, "warnings": state.warnings, "paired": state.pairs is not None}
        arrays = {name: getattr(state, name) for name in _COLUMNS}
        arrays |= {f"pairs.{name}": column for name, column in (state.pairs or {}).items()}
    path = _stage_path(work, stage)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {work}: {error.strerror}") from error
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, facts=np.array(json.dumps({"made_of": made_of, **facts})), **arrays)


def load_samples(work, made_of: dict) -> Samples:
    """From work/read.npz. Raises InputError as `load_state` does."""
    arrays, facts = _read_stage(work, "read", made_of)
    scores = {name.removeprefix("scores."): arrays.pop(name) for name in list(arrays) if name.startswith("scores.")}
    named = {name: facts[name] for name in _SAMPLES_FACTS}
    named["problems"] = [RowProblem(**problem) for problem in facts["problems"]]
    named["stamp"] = tuple(facts["stamp"])
    named["fields"] = Fields(*(tuple(value) if isinstance(value, list) else value for value in facts["fields"]))
    return Samples(**(dict.fromkeys(("truncated", "sources")) | arrays | named), scores=scores)


def load_state(samples: Samples, work, stage: str, made_of: dict) -> State:
    """From work/<stage>.npz. Raises InputError where it is not there, is no such file or was made of others."""
    arrays, facts = _read_stage(work, stage, made_of)
    pairs = {name.removeprefix("pairs."): arrays[name] for name in arrays if name.startswith("pairs.")}
    return State(
        samples,
        *(arrays[name] for name in _COLUMNS),
        pairs=pairs if facts["paired"] else None,
        summaries=facts["summaries"],
        warnings=tuple(facts["warnings"]),
    )


def _stage_path(work, stage) -> Path:
    return Path(work) / f"{stage}.npz"


def _read_stage(work, stage, made_of):
    path = _stage_path(work, stage)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        facts = json.loads(str(arrays.pop("facts")))
    except FileNotFoundError:
        raise InputError(f"{path} is not there: run with --work {work} from an earlier stage first") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not the file of a stage: {str(error).partition(chr(10))[0]}") from error
    if different := _differences(facts["made_of"], made_of, ""):
        raise InputError(f"{path} is stale: {'; '.join(different)}; run from an earlier stage")
    return arrays, facts


def _differences(then, now, name) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*then, *now])
        return [text for key in keys for text in _differences(then.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if then == now else [f"{name} was {then!r}, now {now!r}"]
