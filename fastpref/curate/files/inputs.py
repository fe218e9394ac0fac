"""What one input is: its files, the layout that they have, and what is read of every row."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastpref.curate.files.containers import check_marks, check_unique, column_names, first_rows
from fastpref.curate.files.grouping import group_rows
from fastpref.curate.files.layouts import LAYOUTS, Resolved, is_unclear, nearest_hint, resolve_layout
from fastpref.curate.files.rows import (
    PREFERENCE,
    Fields,
    column_of_row,
    decoded_cells,
    is_number,
    is_unicode,
    number_columns,
    says_none,
    score_fields,
    sides_hold_prompt,
    top_fields,
)
from fastpref.curate.files.sources import Source, find_sources
from fastpref.curate.files.table import RowProblem
from fastpref.errors import InputError

MOST_BESIDE = 3  # columns of numbers that were not asked for
_NO_SCORE = re.compile("len|token|count|size|words|char|time|seed|turn|_id$|^id$|index|logp|temperature", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """What a caller says of an input."""

    scores: tuple[str, ...] | None = None  # columns; None: the usual ones of the layout
    source: str | None = None
    length: str | None = None
    layout: str | None = None  # a name of LAYOUTS; None: the only one that fits
    columns: dict[str, str] = field(default_factory=dict)  # role -> column
    keep: tuple[str, ...] = ()  # columns that reach the output
    missing: tuple[float, ...] = ()  # scores that stand for none


class Inputs(NamedTuple):
    """Files whose rows all have the same fields."""

    name: str
    inputs: tuple[Source, ...]  # as they were given
    files: tuple[Source, ...]  # as they are read: these, or one of pools
    fields: Fields
    layout: str
    read_as: str
    scored: bool  # whether the file has scores, or only says which response is preferred
    problems: list[RowProblem]  # of rows that are in no file of `files`
    numbers: np.ndarray | None  # int64 [rows of files], of grouped rows the line or row of the first
    rows: int | None  # that were read and grouped; None where no rows were
    counts: dict[str, int]  # of grouped rows: what is not handed on, by reason


def open_inputs(names: str | os.PathLike | Sequence, request: Request) -> Inputs:
    """Finds the files of an input, and their layout by their columns. Rows per response are grouped here.

    Raises:
        InputError: They cannot be read, fit no layout or more than one, or lack what is asked for.
    """
    sources = find_sources(names)
    name = sources[0].name if len(sources) == 1 else f"{sources[0].name} and {len(sources) - 1} more"
    heads = [first_rows(source) for source in sources]
    columns = list(
        dict.fromkeys(column for source, rows in zip(sources, heads, strict=True) for column in _names(source, rows))
    )
    if not columns:  # no row is an object: each is reported
        resolved = Resolved("pools", dict(LAYOUTS["pools"].roles), ())
    else:
        resolved = resolve_layout(
            name, columns, request.layout, request.columns, request.keep, _rare(sources, columns, heads)
        )
    if wrong := [column for column in resolved.carried if not is_unicode(column)]:
        raise InputError(f"{name}: the column {wrong[0]!r} holds a lone surrogate, which is not Unicode text")
    fields = Fields(
        None, request.source, request.length, resolved.layout, resolved.roles, resolved.carried, request.missing
    )
    if any(source.container in ("json-lines", "json-array") for source in sources):
        fields = fields._replace(known=tuple(columns))  # which all rows of tables keep to
    _check_columns(sources, fields._replace(scores=request.scores))
    head = [row for source, rows in zip(sources, heads, strict=True) for row in _decoded(source, rows, fields)]
    _check_unclear(name, fields, request, head)
    for role, is_such in (("strength", is_number), ("source", lambda value: isinstance(value, str))):
        if role not in request.columns and _says_otherwise(head, fields.roles.get(role), is_such):
            del fields.roles[role]  # a column of that name which says something else
    if 2 * sum(sides_hold_prompt(row, fields) for row in head) > len(head):
        fields = fields._replace(prompt_in_sides=True)
    scores = _scores(name, columns, head, fields, request.scores)
    scored = scores != (PREFERENCE,)
    fields = fields._replace(scores=scores, beside=_beside(head, columns, fields, scores))
    for source in sources:
        check_marks(source, number_columns(fields, columns))
    read_as = f"{resolved}{_more_roles(fields, scored)}"
    formats = dict.fromkeys(source.description for source in sources if source.container == "csv")
    read_as = "; ".join([read_as, *formats])
    if fields.shape != "rows":
        files = tuple(sources)
        return Inputs(name, files, files, fields, resolved.layout, read_as, scored, [], None, None, {})
    grouped = group_rows(name, sources, fields)
    fields = Fields(scores, carried=fields.carried, missing=fields.missing, beside=fields.beside)
    files = (grouped.source,)
    return Inputs(
        name,
        tuple(sources),
        files,
        fields,
        resolved.layout,
        read_as,
        scored,
        grouped.problems,
        grouped.numbers,
        grouped.rows,
        grouped.counts,
    )


def _rare(sources, columns, heads: list[list[dict]]) -> list[str]:
    """Columns of JSON that fewer than half of the first rows have."""
    if any(source.container not in ("json-lines", "json-array") for source in sources):
        return []
    head = [row for rows in heads for row in rows]
    return [name for name in columns if 2 * sum(name in row for row in head) < len(head)]


def _decoded(source: Source, head: list[dict], fields: Fields) -> Iterator[dict]:
    """The first rows as they are read; of CSV without those whose cells cannot be, which are bad rows later."""
    if source.delimiter is None:
        yield from head
        return
    for row in head:
        with contextlib.suppress(ValueError):
            yield decoded_cells(row, fields._replace(cells=source.delimiter))


def _says_otherwise(head: list[dict], name: str | None, is_such: Callable) -> bool:
    """Whether a column says something, and never what is such; a word for "none", such as N/A, says nothing."""
    said = [row.get(name) for row in head if row.get(name) is not None]
    said = [value for value in said if not (isinstance(value, str) and says_none(value))]
    return bool(said) and not any(map(is_such, said))


def _names(source: Source, head: list[dict]) -> list[str]:
    if source.container in ("json-lines", "json-array"):
        return list(dict.fromkeys(name for row in head for name in row))
    return column_names(source)


def _check_columns(sources: list[Source], fields: Fields) -> None:
    """Of tables; a row of JSON without a column, or with it twice, is a bad row."""
    required = [fields.roles[role] for role in LAYOUTS[fields.layout].roles]
    for source in sources:
        if source.container not in ("json-lines", "json-array"):
            names = column_names(source)
            check_unique(source, names, [name for name in names if name in top_fields(fields)])
            if missing := [name for name in required if name not in names]:
                raise InputError(
                    f"{source.name} has no column {', '.join(missing)} for {fields.layout}, as {sources[0].name}; "
                    f"found {', '.join(names)}"
                )


def _check_unclear(name, fields: Fields, request: Request, head: list[dict]) -> None:
    """Raises InputError where a column may belong to the prompt, and the caller does not say whether it does."""
    for column in fields.carried:
        there = any(isinstance(row.get(column), str | list | dict) and row[column] for row in head)
        if there and is_unclear(column) and column not in {*request.keep, *request.columns.values()}:
            role, place = ("input", "behind") if "prompt" in fields.roles else ("prompt", "as")
            raise InputError(
                f"{name}: {column} may be what the prompt is about: --columns {role}={column} reads it {place} the "
                f"prompt, --keep {column} writes it beside the prompt"
            )


def _scores(name, columns, head, fields: Fields, asked) -> tuple[str, ...] | None:
    """The columns of the scores; None where no row is there."""
    if asked is not None:
        for score in asked:
            base = re.sub("^(chosen|rejected)[_-]|_(chosen|rejected)$", "", score)
            if fields.published and score in columns and base != score:
                raise InputError(f"{name}: {score} is the score of one side; --scores {base} reads those of both")
            if head and score not in columns and not any(column_of_row(row, fields, score) is not None for row in head):
                found = f"{', '.join(columns)}{nearest_hint(score, columns)}"
                raise InputError(f"{name} has no scores {score!r}, found {found}; name them by --scores")
        return tuple(asked)
    found = next((scores for row in head if (scores := score_fields(row, fields)) is not None), None)
    if found is not None or not head:
        return found
    if fields.published:
        return (PREFERENCE,)
    numbers = [column for column in columns if any(_holds_numbers(row.get(column)) for row in head)]
    usual = ", ".join(LAYOUTS[fields.layout].scores)
    there = f"; numbers are in {', '.join(numbers)}" if numbers else f", found {', '.join(columns)}"
    raise InputError(f"{name} has no scores ({usual}){there}: name them by --scores {(numbers or ['NAME'])[0]}")


def _beside(head, columns, fields: Fields, scores) -> tuple[str, ...]:
    """Scores not asked for, which may contradict those that were: usual ones, and a few numbers per response."""
    usual = [name for name in LAYOUTS[fields.layout].scores if any(column_of_row(row, fields, name) for row in head)]
    taken = {*(scores or ()), *fields.roles.values(), *fields.carried, fields.length, fields.source}
    further = []
    if fields.shape in ("pool", "rows"):
        further = [
            name
            for name in columns
            if not _NO_SCORE.search(name)
            and is_unicode(name)
            and all(isinstance(row.get(name), list) == (fields.shape == "pool") for row in head if name in row)
            and any(_holds_numbers(row.get(name)) for row in head)
        ]
    return tuple(name for name in dict.fromkeys([*usual, *further]) if name not in taken)[:MOST_BESIDE]


def _holds_numbers(value) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(type(item) in (int, float) for item in values) and all(
        type(item) in (int, float, type(None)) for item in values
    )


def _more_roles(fields: Fields, scored: bool) -> str:
    parts = (
        [f"scores={'+'.join(fields.scores)}"] if scored and fields.scores else ["no scores"] if fields.scores else []
    )
    parts += [f"carried={'+'.join(fields.carried)}"] if fields.carried else []
    parts += ["the prompt cut from both sides, which begin with it"] if fields.prompt_in_sides else []
    return "".join(f", {part}" for part in parts)
