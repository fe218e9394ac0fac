"""Options from the tables of a config: values of the right type, among the choices there are."""

import dataclasses
import math
import types
import typing

from fastpref.errors import InputError


class Options:
    """A table of the config: subclasses are frozen dataclasses, with a field and a default for every option."""

    def check(self) -> None:
        """Raises InputError for values that have the right type and still make no sense."""


def choice(default: str, choices: tuple[str, ...]):
    """A field of Options whose value is one of the choices, which stand in its metadata."""
    return dataclasses.field(default=default, metadata={"choices": choices})


def check_keys(cls, table, prefix) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := [name for name in table if name not in known]:
        raise InputError(f"unknown key {prefix}{unknown[0]}, known: {', '.join(prefix + name for name in known)}")


def typed_value(hint, value, name):
    """The value as the type says, lists as tuples; raises InputError for another type."""
    if dataclasses.is_dataclass(hint):
        return _typed_options(hint, value, name)
    for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if typing.get_origin(option) is tuple:
            if isinstance(value, list | tuple):
                item_type = typing.get_args(option)[0]
                return tuple(typed_value(item_type, item, f"{name}[{i}]") for i, item in enumerate(value))
        elif typing.get_origin(option) is dict:
            if isinstance(value, dict):
                kinds = typing.get_args(option)
                return {
                    typed_value(kinds[0], key, name): typed_value(kinds[1], value[key], f"{name}.{key}")
                    for key in value
                }
        # a bool is an int in Python, but true is no number
        elif isinstance(value, bool) and option is not bool:
            continue
        elif option is float and isinstance(value, int):
            return float(value)
        elif isinstance(value, option):
            return value
    raise InputError(f"{name} must be {_described_type(hint)}, got {value!r}")


def _typed_options(cls, value, name) -> Options:
    table = vars(value) if isinstance(value, cls) else value
    if not isinstance(table, dict):
        raise InputError(f"{name} must be a table, got {value!r}")
    check_keys(cls, table, name + ".")
    hints = typing.get_type_hints(cls)
    return cls(**{key: typed_value(hints[key], item, f"{name}.{key}") for key, item in table.items()})


def _described_type(hint) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_described_type(option) for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is tuple:
        return f"a list, each item {_described_type(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return f"a table, each entry {_described_type(typing.get_args(hint)[1])}"
    return {str: "a string", bool: "true or false", int: "an integer", float: "a number"}[hint]


def check_table(name: str, options: Options) -> None:
    """The choices of a table, and what its own check says."""
    for field in dataclasses.fields(options):
        if "choices" in field.metadata:
            check_choice(f"{name}.{field.name}", getattr(options, field.name), field.metadata["choices"])
    options.check()


def check_choice(name, value, choices) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_positive(name, value) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"{name} must be positive and finite, got {value:g}")


def check_at_least_one(name, value: int | None) -> None:
    if value is not None and value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")
