"""What `fastpref curate` does, as one frozen dataclass or one TOML file: a table per stage, a field per option.

    seed = 0
    [read]
    scores = ["win_prob:logit"]
    [construct]
    rejected = "quantile:0.10"

A key that is not a field, or a value of another type, is an InputError that names it: no option is ever ignored.
"""

import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass, field

from fastpref.curate.clean import EXCLUDE
from fastpref.curate.files.writing import FORMATS
from fastpref.errors import InputError

STAGES = ("hygiene", "audit", "clean", "length", "construct", "select", "route")
CLEAN = ("mask", "replace", "low_rank", "none")
LENGTH_CONTROL = ("none", "within_source", "match")
GOALS = ("none", "both", "half")


@dataclass(frozen=True)
class ReadOptions:
    """What is read of every row. `scores` are "field" or "field:logit"; the first one constructs the pairs, the others
    vote when pairs are selected. `implicit` is a field, or a .npy with one implicit reward per response of the file,
    of `implicit_rewards` with beta=1: the bounds of `select` are in nats."""

    scores: tuple[str, ...] = ()  # none: "scores", else "win_prob"
    sources: str | None = None
    lengths: str | None = None
    implicit: str | None = None
    score_range: tuple[float, ...] = ()  # (lowest, highest) the scores can be, such as (1, 10)
    workers: int | None = None


@dataclass(frozen=True)
class HygieneOptions:
    apply: bool = False  # also leave out repeated texts and contaminated prompts, rather than report them
    repeated_share: float = 0.01
    repeated_least: int = 3
    decontaminate: tuple[str, ...] = ()  # files whose prompts must not be trained on


@dataclass(frozen=True)
class AuditOptions:
    exclude: str = "both"
    threshold: float = 3.0
    rank: int | None = None


@dataclass(frozen=True)
class CleanOptions:
    action: str = "mask"
    threshold: float = 5.0
    rank: int | None = None


@dataclass(frozen=True)
class LengthOptions:
    control: str = "none"
    band: float = 0.5


@dataclass(frozen=True)
class ConstructOptions:
    """As the arguments of `select_pairs`."""

    chosen: str = "max"
    rejected: str = "mean-2std"
    scale: str = "raw"
    ddof: int = 0
    on_degenerate: str = "warn"
    min_chosen: float | str | None = None
    min_gap: float | str | None = None
    max_gap: float | str | None = None
    pairs_per_prompt: int = 1


@dataclass(frozen=True)
class SelectOptions:
    """At most one of `fraction` and `k`; neither keeps every pair. The rest as the arguments of `bees`."""

    fraction: float | None = None
    k: int | None = None
    how: str = "mul"
    lower: float = -2.0
    upper: float | None = None
    require_positive: bool = False


@dataclass(frozen=True)
class RouteOptions:
    """tau: a number, "quantile:<share>", "none", or "auto": 0.5 for scores declared as 1 to 10, else quantile:0.12."""

    tau: float | str = "auto"
    inclusive: bool = False


@dataclass(frozen=True)
class WriteOptions:
    format: str = "trl"
    sft: str | None = None  # file of the rows routed to SFT; without one they stay in the output, by their route
    test: str | None = None  # file of the prompts held out
    test_share: float = 0.0
    bad_rows: str | None = None
    goals: str = "none"  # "both": two goal-conditioned rows per pair; "half": as many rows as pairs
    system_role: bool = True  # of the chat template; without one the goal goes before the first user turn
    easy_to_hard: bool = False  # the order of the rows: the largest margin first, rather than that of the file
    beta: float = 0.1  # what the suggested scale of the ratings is for


@dataclass(frozen=True)
class CurateConfig:
    input: str = ""
    output: str | None = None
    report: str | None = None  # folder
    work: str | None = None  # folder of the stages' files
    seed: int = 0
    order: tuple[str, ...] = STAGES
    read: ReadOptions = field(default_factory=ReadOptions)
    hygiene: HygieneOptions = field(default_factory=HygieneOptions)
    audit: AuditOptions = field(default_factory=AuditOptions)
    clean: CleanOptions = field(default_factory=CleanOptions)
    length: LengthOptions = field(default_factory=LengthOptions)
    construct: ConstructOptions = field(default_factory=ConstructOptions)
    select: SelectOptions = field(default_factory=SelectOptions)
    route: RouteOptions = field(default_factory=RouteOptions)
    write: WriteOptions = field(default_factory=WriteOptions)

    def __post_init__(self):
        for name, hint in typing.get_type_hints(CurateConfig).items():
            object.__setattr__(self, name, _value(hint, getattr(self, name), name))
        _check_order(self.order)
        _one_of("audit.exclude", self.audit.exclude, EXCLUDE)
        _one_of("clean.action", self.clean.action, CLEAN)
        _one_of("length.control", self.length.control, LENGTH_CONTROL)
        _one_of("write.format", self.write.format, FORMATS)
        _one_of("write.goals", self.write.goals, GOALS)
        if self.length.control == "match" and "length" in self.order[self.order.index("construct") :]:
            raise InputError("order must have length before construct, where length.control match chooses responses")
        if self.select.fraction is not None and self.select.k is not None:
            raise InputError("select.fraction and select.k must not both be given")
        if self.read.workers is not None and self.read.workers < 1:
            raise InputError(f"read.workers must be at least 1, got {self.read.workers}")
        declared = self.read.score_range
        if declared and not (len(declared) == 2 and -math.inf < declared[0] < declared[1] < math.inf):
            raise InputError(f"read.score_range must be two numbers, the lower first, got {list(declared)}")
        for stage in ("audit", "clean"):
            options = getattr(self, stage)
            if not 0 < options.threshold < math.inf:
                raise InputError(f"{stage}.threshold must be positive and finite, got {options.threshold:g}")
            if options.rank is not None and options.rank < 1:
                raise InputError(f"{stage}.rank must be at least 1, got {options.rank}")
        if (self.write.test is None) != (self.write.test_share == 0):
            raise InputError("write.test and write.test_share need each other")
        if not 0 <= self.write.test_share < 1:
            raise InputError(f"write.test_share must be in [0, 1), got {self.write.test_share:g}")
        if not 0 < self.write.beta < math.inf:
            raise InputError(f"write.beta must be positive and finite, got {self.write.beta:g}")
        if self.write.easy_to_hard and self.write.goals != "none":
            raise InputError("write.easy_to_hard is not for goal-conditioned rows, which are shuffled")
        if self.write.easy_to_hard and "route" not in self.order:
            raise InputError("write.easy_to_hard needs route in order, which finds how easy a pair is")


def config_from_toml(path) -> CurateConfig:
    """Reads a config from a TOML file. Raises InputError for what cannot be read, is unknown or of another type."""
    return config_from_table(toml_table(path))


def toml_table(path) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{os.fspath(path)} is not TOML: {error}") from error


def config_from_table(table: dict) -> CurateConfig:
    """From nested dicts, as TOML and JSON give them. Raises InputError as the class does, and for unknown keys."""
    _check_keys(CurateConfig, table, "")
    return CurateConfig(**table)


def _check_keys(cls, table, prefix) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := [name for name in table if name not in known]:
        raise InputError(f"unknown key {prefix}{unknown[0]}, known: {', '.join(prefix + name for name in known)}")


def _value(hint, value, name):
    """The value as the type says, lists as tuples; raises InputError for another type."""
    if dataclasses.is_dataclass(hint):
        table = vars(value) if isinstance(value, hint) else value
        if not isinstance(table, dict):
            raise InputError(f"{name} must be a table, got {value!r}")
        _check_keys(hint, table, name + ".")
        hints = typing.get_type_hints(hint)
        return hint(**{key: _value(hints[key], item, f"{name}.{key}") for key, item in table.items()})
    for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if typing.get_origin(option) is tuple:
            if isinstance(value, list | tuple):
                item_type = typing.get_args(option)[0]
                return tuple(_value(item_type, item, f"{name}[{i}]") for i, item in enumerate(value))
        # a bool is an int in Python, but true is no number
        elif isinstance(value, bool) and option is not bool:
            continue
        elif option is float and isinstance(value, int):
            return float(value)
        elif isinstance(value, option):
            return value
    raise InputError(f"{name} must be {_described(hint)}, got {value!r}")


def _described(hint) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_described(option) for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is tuple:
        return f"a list, each item {_described(typing.get_args(hint)[0])}"
    return {str: "a string", bool: "true or false", int: "an integer", float: "a number"}[hint]


def _one_of(name, value, options) -> None:
    if value not in options:
        raise InputError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def _check_order(order) -> None:
    for stage in order:
        _one_of("order", stage, STAGES)
    if len(set(order)) < len(order):
        raise InputError(f"order must name a stage once, got {', '.join(order)}")
    if "construct" not in order:
        raise InputError(f"order must hold construct, which makes the pairs, got {', '.join(order)}")
    if "route" in order and order.index("route") < order.index("construct"):
        raise InputError("order must have construct before route, which routes pairs")
