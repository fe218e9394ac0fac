"""The files of the work folder: the samples and what every stage made of them.

A file carries the fingerprint of everything that led to it: the input (size and time of change), the version, the seed,
the stages so far and their options. One that does not agree, is damaged, or holds what no stage writes is refused.
"""

import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastpref._build import version
from fastpref._whole_file import whole_file
from fastpref.curate.files.rows import Fields
from fastpref.curate.files.samples import find_inputs
from fastpref.curate.files.sources import find_sources, is_copied
from fastpref.curate.files.table import RowProblem, Samples
from fastpref.curate.notices import NOTICES, Notice
from fastpref.curate.pairs import PLACES
from fastpref.curate.pipeline.start import reading_options
from fastpref.curate.pipeline.state import LeftOut, PairReason, State
from fastpref.errors import InputError

_FACTS = (
    "path",
    "source_names",
    "fields",
    "stamp",
    "problems",
    "bad_responses",
    "counts",
    "rows",
    "layout",
    "read_as",
    "scored",
)
_TABLES = ("scores", "beside")  # columns by the name of their field
_OF_STATE = {"score": "f8", "left_out": "u1", "choosable": "?", "flags": "u1", "taken": "?"}
_OF_RESPONSES = {"lengths": "i4", "text_hash": "u8", "blank": "?", "truncated": "?", "sources": "i4"}
_OF_PROMPTS = {"prompt_hash": "u8", "row": "i8", "position": "i8", "conversational": "?", "strength": "f8"}
_OPTIONAL = ("truncated", "sources", "strength")  # None where no row says


def fingerprint(config, stage) -> dict:
    """Everything that decides what the file of a stage holds; equal for runs that would write the same."""
    stages = () if stage == "read" else config.order[: config.order.index(stage) + 1]
    found = {
        "version": version,
        "input": [_input_facts(name) for name in config.inputs],
        "read": asdict(config.read) | {"workers": None},  # which change nothing
    }
    if stages:
        implicit = config.read.implicit
        files = [implicit] * (implicit is not None and os.path.exists(implicit)) + list(config.hygiene.decontaminate)
        found |= {"seed": config.seed, "order": stages, "labels": config.construct.labels}
        found |= {"files": [_file_facts(path) for path in files]}
        found |= {name: asdict(getattr(config, name)) for name in stages}
    return json.loads(json.dumps(found))


def check_repeatable(config) -> None:
    """Raises InputError for an input that a later run cannot read once more, which is what --work is for."""
    if copied := [name for name in config.inputs if is_copied(name)]:
        raise InputError(f"--work is for later runs, which cannot read {copied[0]} once more: copy it to a file first")


def _input_facts(name) -> list[dict]:
    """Of the files that a name stands for."""
    return [_file_facts(source.path) for source in find_sources(name)]


def _file_facts(path) -> dict:
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return {"path": os.path.realpath(path), "bytes": status.st_size, "changed_ns": status.st_mtime_ns}


def save_state(state: State, work, stage: str, made_of: dict) -> None:
    """Writes work/<stage>.npz: the samples after "read", else what the stages made of them."""
    if stage == "read":
        known = vars(state.samples)
        facts = {name: known[name] for name in _FACTS}
        for name in ("problems", "bad_responses"):
            facts[name] = [vars(problem) for problem in known[name]]
        arrays = {name: value for name, value in known.items() if isinstance(value, np.ndarray)}
        for table in _TABLES:
            facts[table] = list(known[table])
            arrays |= {f"{table}.{k}": column for k, column in enumerate(known[table].values())}
    else:
        facts = {"summaries": state.summaries, "notices": state.notices, "published": state.published}
        facts["pairs"] = None if state.pairs is None else list(state.pairs)
        arrays = {name: getattr(state, name) for name in _OF_STATE}
        arrays |= {f"pairs.{k}": column for k, column in enumerate((state.pairs or {}).values())}
    with whole_file(_stage_path(work, stage)) as temporary, open(temporary, "wb") as file:
        np.savez(file, facts=np.array(json.dumps({"made_of": made_of, **facts})), **arrays)


def load_samples(config) -> Samples:
    """From work/read.npz, with the files of the input found, and their rows grouped, once more.

    Raises InputError as `load_state` does.
    """
    inputs = find_inputs(config.input, **reading_options(config))

    def build(arrays, facts):
        named = {name: facts[name] for name in _FACTS}
        for name in ("problems", "bad_responses"):
            named[name] = [RowProblem(**problem) for problem in facts[name]]
        named["stamp"] = _as_tuples(facts["stamp"])
        named["fields"] = Fields(*map(_as_tuples, facts["fields"]))
        for table in _TABLES:
            named[table] = {name: arrays.pop(f"{table}.{k}") for k, name in enumerate(facts[table])}
        samples = Samples(**(dict.fromkeys(_OPTIONAL) | arrays | named), inputs=inputs.inputs, files=inputs.files)
        _check_samples(samples)
        return samples

    return _read_stage(config.work, "read", fingerprint(config, "read"), build)


def load_state(samples: Samples, work, stage: str, made_of: dict) -> State:
    """From work/<stage>.npz. Raises InputError where it is not there, is no such file or was made of others."""

    def build(arrays, facts):
        pairs = facts["pairs"]
        state = State(
            samples,
            *(arrays.pop(name) for name in _OF_STATE),
            pairs=None if pairs is None else {name: arrays.pop(f"pairs.{k}") for k, name in enumerate(pairs)},
            summaries=facts["summaries"],
            notices=tuple(Notice(*notice) for notice in facts["notices"]),
            published=facts["published"],
        )
        if arrays:
            raise ValueError(f"it holds {next(iter(arrays))!r}, which no stage writes")
        _check_state(state)
        return state

    return _read_stage(work, stage, made_of, build)


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _stage_path(work, stage) -> Path:
    return Path(work) / f"{stage}.npz"


def _read_stage(work, stage, made_of, build):
    """What `build` makes of the arrays and the facts of a file that agrees with the fingerprint."""
    path = _stage_path(work, stage)
    try:
        with zipfile.ZipFile(path) as file:
            # as numpy.savez writes them; a packed one may unpack to anything
            if packed := [info.filename for info in file.infolist() if info.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"{packed[0]} is packed")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        facts = json.loads(str(arrays.pop("facts")))
        different = _differences(facts["made_of"], made_of, "")
    except FileNotFoundError:
        after = "the input was read" if stage == "read" else f"stage {stage} was done"
        raise InputError(
            f"{path}, which keeps what there was after {after}, is not there: run once with --work {work} and without "
            "--from and --stage, or begin at an earlier stage"
        ) from None
    except Exception as error:  # a damaged file fails in as many ways as zip, numpy and JSON have
        raise InputError(f"{path} is not the file of a stage: {_reason(error)}") from error
    if different:
        raise InputError(f"{path} is stale: {'; '.join(different)}; run from an earlier stage")
    try:
        return build(arrays, facts)
    except Exception as error:
        raise InputError(f"{path} is not what stage {stage} wrote: {_reason(error)}") from error


def _reason(error) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _differences(then, now, name) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*then, *now])
        return [text for key in keys for text in _differences(then.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        places = [f"{name}[{k}]" if len(then) > 1 else name for k in range(len(then))]
        return [text for pair in zip(then, now, places, strict=True) for text in _differences(*pair)]
    return [] if then == now else [f"{name} was {then!r}, now {now!r}"]


# ---- what no stage writes would be read as indices later


def _check_samples(samples: Samples) -> None:
    offsets = samples.offsets
    _check_array("offsets", offsets, "i8", len(samples.row) + 1)
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ValueError("offsets do not ascend from 0")
    for columns, size in ((_OF_RESPONSES, int(offsets[-1])), (_OF_PROMPTS, len(samples.row))):
        for name, dtype in columns.items():
            if (column := getattr(samples, name)) is not None or name not in _OPTIONAL:
                _check_array(name, column, dtype, size)
    for table in _TABLES:
        for name, column in getattr(samples, table).items():
            _check_array(name, column, "f8", int(offsets[-1]))
    if samples.sources is not None:
        _check_range("sources", samples.sources, -1, len(samples.source_names))


def _check_state(state: State) -> None:
    samples = state.samples
    for name, dtype in _OF_STATE.items():
        size = samples.prompts if name == "taken" else samples.responses
        _check_array(name, getattr(state, name), dtype, size)
    _check_range("left_out", state.left_out, 0, len(LeftOut))
    if not isinstance(state.summaries, dict) or not all(isinstance(found, dict) for found in state.summaries.values()):
        raise ValueError("summaries are no tables")
    if unknown := [notice.id for notice in state.notices if notice.id not in NOTICES]:
        raise ValueError(f"{unknown[0]!r} is no notice")
    if state.pairs is None:
        return
    count = len(state.pairs["prompt"])
    for name, column in state.pairs.items():
        _check_array(name, column, column.dtype, count)
    _check_range("prompt", state.pairs["prompt"], 0, samples.prompts)
    sizes = np.diff(samples.offsets)[state.pairs["prompt"]]
    for name in PLACES[1:]:
        _check_range(name, state.pairs[name], 0, sizes)
    _check_range("reason", state.pairs["reason"], 0, len(PairReason))


def _check_array(name, column, dtype, size) -> None:
    if column.dtype != np.dtype(dtype) or column.shape != (size,):
        raise ValueError(f"{name} is {column.dtype} {list(column.shape)}, not {np.dtype(dtype)} [{size}]")


def _check_range(name, values, low, high) -> None:
    if ((values < low) | (values >= high)).any():
        raise ValueError(f"{name} holds what is outside its range")
