"""What `fastpref curate` does, as one frozen dataclass or one TOML file: a table per stage, a field per option.

    seed = 0
    [read]
    scores = ["win_prob:logit"]
    [construct]
    rejected = "quantile:0.10"

A key that is not a field, or a value of another type, is an InputError that names it: no option is ever ignored.
"""

import os
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from fastpref.curate.clean import EXCLUSION_MODES as EXCLUDE
from fastpref.curate.files.formats import FORMATS
from fastpref.curate.pipeline.options import Options, check_choice, check_keys, check_table, typed_value
from fastpref.curate.pipeline.stages.audit import AuditOptions, audit_sources
from fastpref.curate.pipeline.stages.clean import CLEAN, CleanOptions, clean_scores
from fastpref.curate.pipeline.stages.construct import LABELS, ConstructOptions, construct_pairs
from fastpref.curate.pipeline.stages.hygiene import HygieneOptions, check_texts
from fastpref.curate.pipeline.stages.length import LENGTH_CONTROL, LengthOptions, control_length
from fastpref.curate.pipeline.stages.route import RouteOptions, route_pairs
from fastpref.curate.pipeline.stages.select import SelectOptions, select_by_margin
from fastpref.curate.pipeline.start import ReadOptions
from fastpref.curate.pipeline.state import State
from fastpref.curate.pipeline.write import GOALS, WriteOptions
from fastpref.errors import InputError

# The lists of choices are here for the command, whose flags offer them.
__all__ = [
    "CLEAN",
    "EXCLUDE",
    "FORMATS",
    "GOALS",
    "LABELS",
    "LENGTH_CONTROL",
    "STAGES",
    "STAGE_FUNCTIONS",
    "CurateConfig",
    "config_from_table",
    "config_from_toml",
    "toml_table",
]

# What a stage does, in the usual order; its options are the field of its name.
STAGE_FUNCTIONS: dict[str, Callable[[State, "CurateConfig"], State]] = {
    "hygiene": check_texts,
    "audit": audit_sources,
    "clean": clean_scores,
    "length": control_length,
    "construct": construct_pairs,
    "select": select_by_margin,
    "route": route_pairs,
}
STAGES = tuple(STAGE_FUNCTIONS)


@dataclass(frozen=True)
class CurateConfig:
    """The paths, the stages in their order, and a table of options for reading, every stage and writing.

    Tables may be given as dicts. Raises InputError for values of another type, unknown keys, and what cannot be done.
    """

    input: str | tuple[str, ...] = ""  # a file, a glob, a folder, "-" or an address, or several
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

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the input."""
        return (self.input,) if isinstance(self.input, str) else self.input

    def __post_init__(self):
        for name, hint in typing.get_type_hints(CurateConfig).items():
            object.__setattr__(self, name, typed_value(hint, getattr(self, name), name))
        _check_order(self.order)
        for table in fields(self):
            if isinstance(options := getattr(self, table.name), Options):
                check_table(table.name, options)
        if self.length.control == "match" and "length" in self.order[self.order.index("construct") :]:
            raise InputError("order must have length before construct, where length.control match chooses responses")
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
    check_keys(CurateConfig, table, "")
    return CurateConfig(**table)


def _check_order(order) -> None:
    for stage in order:
        check_choice("order", stage, STAGES)
    if len(set(order)) < len(order):
        raise InputError(f"order must name a stage once, got {', '.join(order)}")
    if "construct" not in order:
        raise InputError(f"order must hold construct, which makes the pairs, got {', '.join(order)}")
    if "route" in order and order.index("route") < order.index("construct"):
        raise InputError("order must have construct before route, which routes pairs")
