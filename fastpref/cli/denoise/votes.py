"""Comparisons of a table: who was compared with whom, how often each won, ties, and which rows say nothing."""

from typing import NamedTuple

import numpy as np
import pyarrow

from fastpref.cli.denoise.layouts import Choice
from fastpref.cli.denoise.tables import first_row, index_names, measures_of, names_of, near_twins
from fastpref.curate.files.containers import Table, as_numbers
from fastpref.curate.files.layouts import FIRST, SECOND, TIES
from fastpref.curate.files.rows import LARGEST_SCORE
from fastpref.errors import InputError

# what the column `winner` of battles says, in lower case -> the share of i's win
LABELS = dict.fromkeys(FIRST, 1.0) | dict.fromkeys(SECOND, 0.0) | dict.fromkeys(TIES, 0.5)
NO_ITEMS = {*LABELS} - {"a", "b"}  # what no item is called: in a column of items they are read wrongly


class Comparisons(NamedTuple):
    """The rows of a table of comparisons. Items are numbered by their first appearance, in all prompts together."""

    i: np.ndarray  # [rows] int64, items
    j: np.ndarray
    value: np.ndarray  # [rows] float64: wins of i, or the logit of i beating j (NaN: missing)
    back: np.ndarray | None  # [rows] wins of j; None: logits
    prompt: np.ndarray  # [rows] int64; all 0 without prompts
    names: pyarrow.Array  # of items
    prompts: pyarrow.Array | None
    judge: np.ndarray | None  # [rows] int64
    judges: pyarrow.Array | None
    ordered: bool  # i was shown first
    unused: int  # rows without a vote, or without a value
    ties: float
    warnings: list[str]
    notes: list[str]


def read_comparisons(table: Table, choice: Choice, what: str, found: list[str], layout_given: bool) -> Comparisons:
    """Reads the comparisons of a table.

    Args:
        table: With the columns of the choice.
        choice: Layout and columns.
        what: The file, for messages.
        found: All its columns.
        layout_given: The user named the layout: small logits are logits then.

    Raises:
        InputError: A row that cannot be right: without a name, of an item against itself, of a label or a number that
            is none; with its file and line.
    """
    layout, columns = choice
    if not len(table.numbers):
        raise InputError(f"{what} holds no comparisons")
    first, second = ("winner", "loser") if layout == "winners" else ("i", "j")
    items = [names_of(table, columns[role]) for role in (first, second)]
    names, (i, j) = index_names(*items)
    if (row := first_row(i == j)) is not None:
        raise InputError(f"{table.place(row)}: compares an item with itself: {names[int(i[row])]}")
    warnings, notes, tied, back = [], [], np.zeros(len(i)), None
    if layout in ("winners", "battles"):
        share = _shares(table, layout, columns)
        count = _counts(table, columns["count"]) if "count" in columns else np.ones(len(i))
        value, back, tied = count * share, count * (1 - share), np.where(share == 0.5, count, 0)
    elif layout == "votes":
        value, back = (_counts(table, columns[role]) for role in ("wins_i", "wins_j"))
        if "ties" in columns:
            tied = _counts(table, columns["ties"])
            value, back = value + tied / 2, back + tied / 2
    else:
        value, too_large = measures_of(table, columns["value"])
        if too_large:
            warnings.append(f"{too_large} values of a size of 1e30 or more are taken as missing")
        _refuse_probabilities(value, what, layout_given)
    huge = 0
    if back is not None:
        missing = np.isnan(value + back)
        value, back, tied = (np.where(missing, 0, votes) for votes in (value, back, tied))
        huge = int(missing.sum())
        if huge:
            warnings.append(f"{huge} of {len(i)} rows have a count of 1e30 or more, which is missing, and are not used")
    unused = int((np.isnan(value) if back is None else value + back == 0).sum())
    if unused > huge:
        warnings.append(_unused_said(unused - huge, len(i), layout, columns, found))
    if twins := near_twins(names):
        warnings.append(f"the items {twins[0]!r} and {twins[1]!r} differ only in white space, and count as two")
    prompts, prompt = None, np.zeros(len(i), np.int64)
    if "prompt" in columns:
        prompts, (prompt,) = index_names(names_of(table, columns["prompt"]))
        pairs = np.unique((prompt * len(names) + np.minimum(i, j)) * len(names) + np.maximum(i, j))
        if 1 < len(prompts) == len(pairs):
            warnings.append(
                f"every prompt compares a single pair, so no ranking across pairs is possible; leave out "
                f"prompt={columns['prompt']} to rank all items together"
            )
    elif "prompt" in found:
        notes.append("all prompts are ranked together; --columns prompt=prompt gives every prompt scores of its own")
    judges = judge = None
    if "judge" in columns:
        judges, (judge,) = index_names(names_of(table, columns["judge"]))
    ordered = layout in ("battles", "votes")
    ties = float(tied.sum())
    return Comparisons(i, j, value, back, prompt, names, prompts, judge, judges, ordered, unused, ties, warnings, notes)


def _counts(table: Table, column: str) -> np.ndarray:
    """NaN for what is of a size of LARGEST_SCORE or more."""
    votes = as_numbers(table, column)
    if (row := first_row(~((votes >= 0) & (votes < np.inf)))) is not None:
        raise InputError(f"{table.place(row)}: {column} must be a finite count >= 0, got {votes[row]:g}")
    return np.where(votes >= LARGEST_SCORE, np.nan, votes)


def _shares(table: Table, layout: str, columns: dict[str, str]) -> np.ndarray:
    """The share that the first item of every row has of its vote."""
    if layout == "battles":
        return _labels(table, columns["winner"])
    _refuse_labels(table, columns["winner"])
    if "ties" not in columns:
        return np.ones(len(table.numbers))
    tied = as_numbers(table, columns["ties"])
    if (row := first_row(~np.isin(tied, (0, 1)))) is not None:
        raise InputError(f"{table.place(row)}: {columns['ties']} must be true or false, 1 or 0, got {tied[row]:g}")
    return np.where(tied == 1, 0.5, 1.0)


def _labels(table: Table, column: str) -> np.ndarray:
    """The share of i's win by the labels of battles."""
    distinct, (which,) = index_names(names_of(table, column))
    shares = []
    for index, label in enumerate(distinct.to_pylist()):
        share = LABELS.get(str(label).strip().lower())
        if share is None:
            place = table.place(first_row(which == index))
            raise InputError(f"{place}: {column} must be one of {', '.join(LABELS)}, got {label!r}")
        shares.append(share)
    return np.array(shares, np.float64)[which]


def _refuse_labels(table: Table, column: str) -> None:
    """Raises InputError where a column of winners holds labels, which would be ranked as items."""
    distinct, (which,) = index_names(names_of(table, column))
    for index, name in enumerate(distinct.to_pylist()):
        if str(name).strip().lower() in NO_ITEMS:
            raise InputError(
                f"{table.place(first_row(which == index))}: {column} holds {name!r}, which is a label, no item: name "
                f"the columns of the two items, as in --columns i=model_a,j=model_b,winner={column}"
            )


def _refuse_probabilities(value: np.ndarray, what: str, layout_given: bool) -> None:
    known = value[~np.isnan(value)]
    if not layout_given and len(known) and known.min() >= 0 and known.max() <= 1:
        raise InputError(
            f"the values of {what} all lie in [0, 1], as probabilities do: make logits of them, log(p / (1 - p)), or "
            "say with --layout logits that they are"
        )


def _unused_said(unused: int, rows: int, layout: str, columns: dict[str, str], found: list[str]) -> str:
    if layout == "logits":
        return f"{unused} of {rows} rows have no value, and are not used"
    text = f"{unused} of {rows} rows have no vote for either item, and are not used"
    if "ties" in columns:
        return text
    near = [name for name in found if "tie" in name.lower()] or ["NAME"]
    return f"{text}: if they are ties, name the column that counts them, as in --columns ties={near[0]}"
