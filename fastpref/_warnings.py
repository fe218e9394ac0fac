"""Warnings as texts: of a long run, which shows them at its end rather than where they arise."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def collected_warnings(*categories: type[Warning]) -> Iterator[list[str]]:
    """Gives a list that holds the texts of the warnings at the end, each once, in the order of their first occurrence.

    categories: exactly these, without their subclasses, are collected; none given: UserWarning and RuntimeWarning, the
        library's own. Other warnings are issued at the end as they would have been. An error drops them all.
    """
    categories = categories or (UserWarning, RuntimeWarning)
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        for category in categories:
            warnings.simplefilter("always", category)
        yield messages
    messages += dict.fromkeys(str(warning.message) for warning in caught if warning.category in categories)
    for warning in caught:
        if warning.category not in categories:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
