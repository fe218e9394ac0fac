"""What one stage of the pipeline hands to the next, and the file in the work folder that keeps it.

A file carries the fingerprint of everything that led to it: the input (size and time of change), the version, the seed,
the stages so far and their options. One that does not agree is refused, never mended.
"""

import enum
import json
import os
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from fastpref import __version__
from fastpref.curate.samples import InputError, RowProblem, Samples


class LeftOut(enum.IntEnum):
    """Why a response takes no part; `KEPT` where it does."""

    KEPT = 0
    NO_SCORE = 1
    BLANK = 2
    DUPLICATE = 3  # of another response of its prompt
    REPEATED_TEXT = 4  # one text under many prompts
    CONTAMINATED = 5  # its prompt stands in a file that must not be trained on
    FLAGGED_SOURCE = 6
    CORRUPTED_SCORE = 7


class PairReason(enum.IntEnum):
    """Why a pair is not written; `KEPT` where it is."""

    KEPT = 0
    NOT_SELECTED = 1
    LEFT_OUT = 2  # a stage after construction left out one of its responses
    NOT_BETTER = 3  # a stage after construction changed the scores so


@dataclass(frozen=True)
class State:
    samples: Samples
    score: np.ndarray  # float64 [responses], what pairs are constructed by; NaN where there is none
    valid: np.ndarray  # bool [responses]
    choosable: np.ndarray  # bool [responses]; False: may be rejected, is never chosen
    left_out: np.ndarray  # uint8 [responses], a LeftOut
    prompts: dict[str, np.ndarray] = field(default_factory=dict)  # [prompts] each
    pairs: dict[str, np.ndarray] | None = None  # [pairs] each; prompt, chosen, rejected, reason (a PairReason), ...
    summaries: dict[str, dict] = field(default_factory=dict)  # by stage, ready for JSON
    warnings: tuple[str, ...] = ()


def fingerprint(config, stage) -> dict:
    """Everything that decides what the file of a stage holds; equal for runs that would write the same."""
    stages = () if stage == "read" else config.order[: config.order.index(stage) + 1]
    read = asdict(config.read) | {"workers": None}  # which change nothing
    files = [config.input, *config.hygiene.decontaminate] + [config.read.implicit] * os.path.exists(config.read.implicit or "")
    return json.loads(json.dumps(
        {"version": __version__, "input": {os.path.realpath(path): _identity(path) for path in files}, "read": read}
        | ({"seed": config.seed, "order": stages} if stages else {})
        | {name: asdict(getattr(config, name)) for name in stages}
    ))


def _identity(path) -> dict:
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return {"bytes": found.st_size, "changed": found.st_mtime_ns}


def save(state: State, work, stage: str, identity: dict) -> None:
    """Writes work/<stage>.npz; "read" keeps the samples, the others what the stages made of them."""
    if stage == "read":
        arrays, facts = _disassembled(state.samples)
    else:
        arrays = {name: getattr(state, name) for name in _ARRAYS}
        arrays |= {f"prompts.{name}": column for name, column in state.prompts.items()}
        arrays |= {f"pairs.{name}": column for name, column in (state.pairs or {}).items()}
        facts = {"summaries": state.summaries, "warnings": state.warnings, "paired": state.pairs is not None}
    path = stage_file(work, stage)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {work}: {error.strerror}") from error
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, facts=np.array(json.dumps({"fingerprint": identity, **facts})), **arrays)


def load(work, stage: str, identity: dict):
    """The arrays and facts of work/<stage>.npz. Raises InputError for one that is not there, or not of this run."""
    path = stage_file(work, stage)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            facts = json.loads(str(arrays.pop("facts")))
    except FileNotFoundError:
        raise InputError(f"{path} is not there: run the stages up to {stage} with --work {work} first") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not the file of a stage: {str(error).partition(chr(10))[0]}") from error
    if different := _differences(facts["fingerprint"], identity):
        raise InputError(f"{path} is stale: {'; '.join(different)}")
    return arrays, facts


def _differences(then, now, prefix="") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        names = dict.fromkeys([*then, *now])
        return [text for name in names for text in _differences(then.get(name), now.get(name), f"{prefix}.{name}".lstrip("."))]
    return [] if then == now else [f"{prefix} was {then!r}, now {now!r}"]
