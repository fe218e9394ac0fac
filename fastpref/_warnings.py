"""Warnings of a long run, which shows them at its end rather than where they arise."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def recorded_warnings(*categories: type[Warning]) -> Iterator[list[Warning]]:
    """Gives a list that holds the warnings at the end, in order.

    categories: exactly these, without their subclasses, are recorded. Other warnings are issued at the end as they
        would have been. An error drops them all.
    """
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        for category in categories:
            warnings.simplefilter("always", category)
        yield messages
    messages += [warning.message for warning in caught if warning.category in categories]
    for warning in caught:
        if warning.category not in categories:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextlib.contextmanager
def collected_warnings(*categories: type[Warning]) -> Iterator[list[str]]:
    """Gives a list that holds the texts of the warnings at the end, each once, in the order of their first occurrence.

    categories: as in `recorded_warnings`.
    """
    messages = []
    with recorded_warnings(*categories) as caught:
        yield messages
    messages += dict.fromkeys(str(warning) for warning in caught)
