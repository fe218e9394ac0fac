"""One row of scored samples: what a JSON object or a Parquet row must hold, in any of three shapes.

    pool          {"prompt", "responses": [...], "scores": [...]}; per response also "sources", "lengths" (in the unit
                  of the file's choice), "truncated" or "finish_reason". The names of scores, sources and lengths are
                  the caller's choice
    UltraFeedback {"instruction", "completions": [{"response", "model", "overall_score", "annotations", ...}, ...]}; a
                  named score is a field of the completion, or the "Rating" of the annotation of that name
    pair          {"prompt"?, "chosen", "rejected", "score_chosen", "score_rejected"} as TRL has it, a pool of two; the
                  prompt may be implicit: what both sides begin with. `source_chosen`, `len_chosen` likewise

A text is a string or a list of {"role", "content"}. A score of null or NaN ("N/A" as a Rating) is no score. A row that
is not like that is refused with the reason, never repaired.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

USUAL_SCORES = ("scores", "win_prob")  # of a pool, where none is named
COMPLETION_SCORES = ("overall_score", "fine-grained_score")
SIDES = ("chosen", "rejected")

Text: TypeAlias = str | list[dict[str, str]]


class Fields(NamedTuple):
    """The fields to read. A named source or length must be in every row; None takes the usual one, if there is one."""

    scores: tuple[str, ...] | None = None  # None: no row has said yet, see `score_fields`
    source: str | None = None
    length: str | None = None
    carried: tuple[str, ...] = ()  # columns that rows hand to the output as they are


class Row(NamedTuple):
    prompt: Text
    responses: list[Text]  # all strings or all lists of messages; of messages where the prompt is
    scores: dict[str, list[float]]  # by field, one per response, NaN where there is none
    sources: list[str | None] | None
    lengths: list[int] | None
    truncated: list[bool] | None  # null is False
    prompt_id: str | None
    carried: dict[str, object] = {}  # noqa: RUF012  columns for the output, as they came


def score_fields(row) -> tuple[str, ...] | None:
    """The score fields of a row where the caller named none; None where it has none."""
    if not isinstance(row, dict):
        return None
    if _is_completions(row):
        found = [name for name in COMPLETION_SCORES if _completions(row).column(name) is not None]
    elif _is_pair(row):
        found = ["score"] if _pair(row).column("score") is not None else []
    else:
        found = [name for name in USUAL_SCORES if name in row][:1]
    return tuple(found) or None


def top_fields(fields: Fields) -> set[str]:
    """Every field at the top of a row that `parse_row` may look at."""
    columns = {*(USUAL_SCORES if fields.scores is None else fields.scores), fields.source, fields.length} - {None}
    columns |= {"score", "source", "len", "truncated"}
    columns |= {"sources", "lengths", "finish_reason"}
    rows = {"prompt", "prompt_id", "responses", "instruction", "completions", *SIDES}
    return rows | columns | {key for name in columns for keys in _pair_keys(name) for key in keys}


def parse_row(row, fields: Fields) -> Row:
    """Raises ValueError with the reason when the row is malformed."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {type(row).__name__}")
    shape = _completions(row) if _is_completions(row) else _pair(row) if _is_pair(row) else _pool(row)
    if fields.scores is None:
        raise ValueError("no field 'scores' (or name it: score_field)")
    columns = {name: shape.column(name) for name in fields.scores}
    for name, column in columns.items():
        if column is None:
            raise ValueError(f"no field {name!r}")
    responses = _texts("responses", shape.responses)
    prompt, responses = _prompt(shape.prompt, responses)
    count = len(responses)

    def optional(named, usual):
        name = named or usual
        column = shape.column(name)
        if column is None and named:
            raise ValueError(f"no field {name!r}")
        return name, None if column is None else _aligned(name, column, count)

    truncated = _flags(*optional(None, "truncated"))
    if truncated is None:
        _, finish = optional(None, "finish_reason")
        truncated = None if finish is None else [reason == "length" for reason in finish]
    prompt_id = row.get("prompt_id")
    return Row(
        prompt,
        responses,
        {name: _scores(name, _aligned(name, column, count)) for name, column in columns.items()},
        _sources(*optional(fields.source, shape.source)),
        _lengths(*optional(fields.length, shape.length)),
        truncated,
        str(prompt_id) if isinstance(prompt_id, str | int) else None,
    )


def check_unicode(row: Row) -> None:
    """Raises ValueError for half a surrogate pair, which JSON can spell; no tokenizer and no UTF-8 file can hold it."""
    named = {"prompt": row.prompt} | {f"responses[{i}]": text for i, text in enumerate(row.responses)}
    for name, text in named.items():
        for part in [text] if isinstance(text, str) else [part for message in text for part in message.values()]:
            try:
                part.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name} holds a lone surrogate, which is not Unicode text") from None


# ---- the shapes


class _Shape(NamedTuple):
    prompt: object
    responses: object
    column: Callable[[str], object]  # name -> one value per response, None where the row has no such field
    source: str  # the usual name of the column of sources
    length: str


def _pool(row) -> _Shape:
    for field in ("prompt", "responses"):
        if field not in row:
            raise ValueError(f"no field {field!r}")
    return _Shape(row["prompt"], row["responses"], row.get, "sources", "lengths")


def _is_completions(row) -> bool:
    return "completions" in row and "responses" not in row


def _completions(row) -> _Shape:
    prompt = next((row[field] for field in ("instruction", "prompt") if field in row), None)
    if prompt is None:
        raise ValueError("no field 'instruction'")
    completions = row["completions"]
    if not isinstance(completions, list):
        raise ValueError(f"completions must be a list, got {type(completions).__name__}")
    for index, completion in enumerate(completions):
        if not isinstance(completion, dict) or "response" not in completion:
            raise ValueError(f"completions[{index}] must be an object with a response")

    def column(name):
        if any(name in completion for completion in completions):
            return [completion.get(name) for completion in completions]
        ratings = [_rating(completion, name) for completion in completions]
        return ratings if any(rating is not None for rating in ratings) or not completions else None

    return _Shape(prompt, [completion["response"] for completion in completions], column, "model", "length")


def _rating(completion, name):
    """What the annotation of that name rates the completion, as it is written: usually a digit, or "N/A"."""
    annotations = completion.get("annotations")
    annotation = annotations.get(name) if isinstance(annotations, dict) else None
    rating = annotation.get("Rating") if isinstance(annotation, dict) else None
    if not isinstance(rating, str):
        return rating
    try:
        return math.nan if rating == "N/A" else float(rating)
    except ValueError:
        return rating


def _is_pair(row) -> bool:
    return "chosen" in row and "rejected" in row and "responses" not in row


def _pair(row) -> _Shape:
    sides = [row[side] for side in SIDES]
    prompt = row.get("prompt")
    # An explicit prompt may come as a string beside sides that are whole conversations: they hold it, too.
    if prompt is None or (isinstance(prompt, str) and isinstance(sides[0], list)):
        prompt, *sides = _implicit_prompt(*sides)

    def column(name):
        return next(([row[key] for key in keys] for keys in _pair_keys(name) if all(key in row for key in keys)), None)

    return _Shape(prompt, sides, column, "source", "len")


def _pair_keys(name) -> list[list[str]]:
    return [[pattern.format(name, side) for side in SIDES] for pattern in ("{0}_{1}", "{1}_{0}", "{1}-{0}")]


def _implicit_prompt(chosen, rejected) -> tuple:
    """What both begin with, and the rest of each: TRL's rule, which leaves a space at the end to the responses.

    Where one conversation goes on from the other, the shorter one ends in a response. A string has no turns that would
    tell where its response begins.
    """
    for side, value in zip(SIDES, (chosen, rejected), strict=True):
        if not isinstance(value, type(chosen)) or not isinstance(value, str | list):
            raise ValueError(f"{side} must be a string or a list of messages, as the other side is")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None and isinstance(chosen, list):
        same = min(len(chosen), len(rejected)) - 1
    if same is None:
        raise ValueError("no field 'prompt', and one of chosen and rejected begins with all of the other")
    if same > 0 and chosen[same - 1] == " ":
        same -= 1
    if same < 1:
        raise ValueError("no field 'prompt', and chosen and rejected begin with nothing in common")
    return chosen[:same], chosen[same:], rejected[same:]


# ---- their values


def _texts(name, values) -> list[Text]:
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list, got {type(values).__name__}")
    kinds = set(map(type, _of_type(name, values, "a string", str, list)))
    if len(kinds) > 1:
        raise ValueError(f"{name} must be all strings or all lists of messages, got both")
    return [_messages(f"{name}[{i}]", value) for i, value in enumerate(values)] if kinds == {list} else values


def _prompt(prompt, responses) -> tuple[Text, list[Text]]:
    """The prompt and the responses in one form: replies in plain text to a conversation are the assistant's."""
    strings = not responses or isinstance(responses[0], str)
    if isinstance(prompt, list):
        prompt = _messages("prompt", prompt)
        if strings:
            responses = [[{"role": "assistant", "content": text}] for text in responses]
        return prompt, responses
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a string, got {type(prompt).__name__}")
    if not strings:
        raise ValueError("prompt must be a list of messages, as the responses are, got str")
    return prompt, responses


def _messages(name, messages) -> list[dict[str, str]]:
    if not messages:
        raise ValueError(f"{name} must hold a message, got an empty list")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{name}[{index}] must be a message, got {type(message).__name__}")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                got = type(message[field]).__name__ if field in message else "none"
                raise ValueError(f"{name}[{index}] must have a {field} that is a string, got {got}")
        if more := [
            field for field, value in message.items() if value is not None and field not in ("role", "content")
        ]:
            raise ValueError(f"{name}[{index}] must hold role and content alone, got also {more[0]}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _aligned(name, values, count) -> list:
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"{name} must have one entry per response, got {len(values)} for {count}")
    return values


def _scores(name, values) -> list[float]:
    return [
        value if type(value) is float and math.isfinite(value) else _score(f"{name}[{i}]", value)
        for i, value in enumerate(values)
    ]


def _score(name, value) -> float:
    if value is None:
        return math.nan
    # bool is an int in Python, but `true` is no score.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer beyond float64") from None
    if math.isinf(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _sources(name, values) -> list[str | None] | None:
    return _of_type(name, values, "a string", str, type(None))


def _lengths(name, values) -> list[int] | None:
    wrong = next((value for value in _of_type(name, values, "an integer", int) or () if not 0 <= value < 2**31), None)
    if wrong is not None:
        raise ValueError(f"{name} must lie in [0, 2^31), got {wrong}")
    return values


def _flags(name, values) -> list[bool] | None:
    values = _of_type(name, values, "true or false", bool, type(None))
    return None if values is None else [bool(value) for value in values]


def _of_type(name, values, expected, *types):
    """The list as it is (or None); types are exact, for bool is an int in Python."""
    if values is not None and not set(map(type, values)).issubset(types):
        index, kind = next((i, type(value)) for i, value in enumerate(values) if type(value) not in types)
        raise ValueError(f"{name}[{index}] must be {expected}, got {kind.__name__}")
    return values
