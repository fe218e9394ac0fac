"""Types of arguments that several commands share, and the options that their parsers found."""

import argparse
import re


def positive_number(text) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return number


def positive_integer(text) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def options_of(arguments) -> dict:
    """Returns what the flags of a command gave, by the names of their destinations."""
    return {name: value for name, value in vars(arguments).items() if name not in ("handler", "name", "command")}


class ColumnsAction(argparse.Action):
    """`--columns ROLE=NAME,...`, once or several times, into a dict: what the file calls the columns of these roles.

    A name may hold commas, for only a comma before another ROLE= ends it.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        columns = dict(getattr(namespace, self.dest) or {})
        for pair in re.split(r",(?=\s*\w+=)", values):
            role, equals, name = pair.partition("=")
            role = role.strip()
            if not (role and equals and name):
                raise argparse.ArgumentError(self, f"must be ROLE=NAME,..., got {pair!r} in {values!r}")
            if role in columns:
                raise argparse.ArgumentError(self, f"must name {role} once, got {columns[role]!r} and {name!r}")
            columns[role] = name
        setattr(namespace, self.dest, columns)
