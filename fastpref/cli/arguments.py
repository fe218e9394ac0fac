"""Types of arguments that several commands share, and the options that their parsers found."""

import argparse


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
