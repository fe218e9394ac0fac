"""One row of preferences, of any layout of `layouts`, as a prompt and its responses with their scores.

A text is a string or a list of messages: {"role", "content"} and whatever else a message holds, such as tool_calls or
reasoning_content, which is kept. A content is a string or a list of parts. A score of null or NaN ("N/A" as a Rating)
is no score. A response that cannot be read is left out of its pool, counted; a row that is not as its layout has it is
refused with the reason, never repaired.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

from fastpref.curate.files.layouts import (
    FIRST,
    FURTHER,
    LAYOUTS,
    PAIR_SHAPES,
    SECOND,
    TIES,
    changes_meaning,
    is_context,
)
from fastpref.errors import InputError

SIDES = ("chosen", "rejected")
PREFERENCE = "preference"  # the score, 1 and 0, of published sides without any
LARGEST_SCORE = 1e30  # from here on a number stands for none, as the lowest of float32 does

Text: TypeAlias = str | list[dict[str, Any]]

_POOL_ROLES = {"prompt": "prompt", "responses": "responses", "sources": "sources"}
_POOL_ROLES |= {name: name for name in ("prompt_id", "lengths", "truncated", "finish_reason")}


class Fields(NamedTuple):
    """What to read of a row. A named source or length must be in every row; None takes the usual one, where it is."""

    scores: tuple[str, ...] | None = None  # None: no row has said yet, see `score_fields`
    source: str | None = None
    length: str | None = None
    layout: str = "pools"
    roles: dict[str, str] = _POOL_ROLES  # role -> column
    carried: tuple[str, ...] = ()  # columns that reach the output as they are
    missing: tuple[float, ...] = ()  # scores that stand for none
    beside: tuple[str, ...] = ()  # scores that were not asked for; a row need not have them
    known: tuple[str, ...] = ()  # all columns of the first rows of JSON; none: every row has the same
    cells: str | None = None  # the delimiter of CSV, where numbers and lists are text
    prompt_in_sides: bool = False  # strings of both sides that begin with the prompt go on from it, and are cut

    @property
    def shape(self) -> str:
        return LAYOUTS[self.layout].shape

    @property
    def published(self) -> bool:
        """Whether the sides of a pair are given, the chosen one first."""
        return self.shape in PAIR_SHAPES


class Row(NamedTuple):
    """A prompt and its responses."""

    prompt: Text
    responses: list[Text]  # all strings or all lists of messages; of messages where the prompt is
    scores: dict[str, list[float]]  # by field, one per response, NaN where there is none
    sources: list[str | None] | None
    lengths: list[int] | None
    truncated: list[bool] | None  # null is False
    prompt_id: str | None
    carried: dict[str, Any] = {}  # noqa: RUF012
    strength: float | None = None  # of the preference for the first response, where the row says so instead of scores
    beside: dict[str, list[float]] = {}  # noqa: RUF012
    bad: dict[int, str] = {}  # noqa: RUF012  responses that cannot be read, and why; an empty text is in their place


class Tie(ValueError):
    """A row whose label prefers no side."""


def parse_row(row, fields: Fields) -> Row:
    """Reads a row. Raises ValueError with the reason when it is malformed, and Tie where no side is preferred."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {type(row).__name__}")
    if fields.cells is not None:
        row = decoded_cells(row, fields)
    if fields.known:
        _check_late_columns(row, fields)
    if fields.scores is None:
        raise ValueError("the file has no scores under a usual name, and none are named")
    shape = _SHAPES[fields.shape](row, fields)
    columns = {name: shape.column(name) for name in fields.scores}
    for name, column in columns.items():
        if column is None:
            raise ValueError(f"{name} is null" if name in row else f"no field {name!r}")
    responses, bad = _texts("responses", shape.responses)
    prompt, responses = _prompt(shape.prompt, responses)
    if "system" in fields.roles or "history" in fields.roles:
        prompt, responses = _with_turns_before(prompt, responses, row, fields)
    count = len(responses)

    def optional(named, usual):
        name = named or usual
        column = None if name is None else shape.column(name)
        if column is None and named:
            raise ValueError(f"no field {name!r}")
        return name, None if column is None else _aligned(name, column, count)

    roles = fields.roles
    truncated = _flags(*optional(None, roles.get("truncated", "truncated")))
    if truncated is None:
        _, finish = optional(None, roles.get("finish_reason", "finish_reason"))
        truncated = None if finish is None else [reason == "length" for reason in finish]
    scores = {name: _scores(name, _aligned(name, column, count), shape.keys(name)) for name, column in columns.items()}
    prompt_id = row.get(roles.get("prompt_id"))
    found = Row(
        prompt,
        responses,
        scores,
        _sources(*optional(fields.source, shape.source)),
        _lengths(*optional(fields.length, shape.length)),
        truncated,
        _identity(prompt_id),
        {name: row.get(name) for name in fields.carried} if fields.carried else {},
        shape.strength,
        {name: _beside(shape.column(name), count) for name in fields.beside} if fields.beside else {},
        bad,
    )
    _check_images(found)
    return _without_bad_responses(found, fields) if bad else found


def _identity(value) -> str | None:
    """An id as text; pandas makes floats of integers beside missing ones."""
    if value is None or isinstance(value, list | dict) or value != value:
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


_known_columns = functools.cache(frozenset)


def _check_late_columns(row: dict, fields: Fields) -> None:
    """What would be read must not be left out because the first rows, which were looked at, lack it."""
    late = row.keys() - _known_columns(fields.known)
    if not late:
        return
    for name in late:
        if (changes_meaning(name) or _has_a_role(name, row[name], fields)) and row[name] not in (None, "", [], {}):
            raise ValueError(f"{name} is a column of this row and of none of the first: have such a row at the top")
    if fields.scores == (PREFERENCE,) and any(_BASE.fullmatch(name) for name in late) and _scores_of_pairs(row, fields):
        raise ValueError("scores of the sides are in this row and in none of the first: have such a row at the top")


def _has_a_role(name: str, value, fields: Fields) -> bool:
    """Whether the layout would have read a column of that name as something that no other column is."""
    if name == "input" and fields.roles.get("prompt") == "instruction":
        return True
    of_completions = fields.shape == "completions"  # whose other optional roles are within the completions
    for role, aliases in (FURTHER if of_completions else LAYOUTS[fields.layout].optional | FURTHER).items():
        if name in aliases and role not in fields.roles and role not in ("truncated", "finish_reason"):
            return role != "strength" or is_number(value)  # truncated and finish_reason are read wherever they are
    return False


def score_fields(row, fields: Fields) -> tuple[str, ...] | None:
    """The score fields of a row where the caller named none; None where it has none.

    Raises InputError where it has several, and it is not known which are meant.
    """
    if not isinstance(row, dict):
        return None
    usual = LAYOUTS[fields.layout].scores
    if fields.shape == "completions":
        found = [name for name in usual if column_of_row(row, fields, name) is not None]
        return tuple(found[:1] if fields.layout == "nemo-rl" else found) or None
    if fields.shape in ("pair", "sharegpt", "swift"):
        return _scores_of_pairs(row, fields)
    if fields.published:
        return next(((name,) for name in ("score", *usual) if _ab_column(row, fields, name) is not None), None)
    if fields.layout == "kto":
        return (fields.roles["label"],)
    return tuple(name for name in usual if name in row)[:1] or None


def column_of_row(row: dict, fields: Fields, name: str) -> list | None:
    """Returns one value per response, None where the row has no such field or is malformed; cells are decoded."""
    try:
        return _SHAPES[fields.shape](row, fields).column(name)
    except ValueError:
        return None


def top_fields(fields: Fields) -> set[str]:
    """Every field at the top of a row that `parse_row` may look at."""
    names = {*(fields.scores or ()), *fields.beside, *LAYOUTS[fields.layout].scores, fields.source, fields.length} - {
        None
    }
    names |= {"score", "source", "model", "len", "length", "truncated", "finish_reason"}
    found = {*fields.roles.values(), *fields.carried, *names, "sources", "lengths"}
    found |= {key for name in names for keys in _pair_keys(name) for key in keys}
    return found | {key for name in names for keys in _ab_keys(name) for key in keys}


def plain_text(text: Text) -> str:
    """Returns what a reader sees of a text: of messages their contents, and the calls of tools as JSON."""
    if isinstance(text, str):
        return text
    return "".join(map(_plain_message, text))


def context_of(row: Row) -> dict[str, Any]:
    """Returns the carried columns that change what the prompt means, but for empty ones."""
    return {name: value for name, value in row.carried.items() if is_context(name) and value not in (None, [], "", {})}


# ---- the shapes


class _Shape(NamedTuple):
    prompt: object
    responses: object
    column: Callable[[str], object]  # name -> one value per response, None where the row has no such field
    source: str | None  # the usual name of the column of sources
    length: str | None
    strength: float | None = None
    keys: Callable[[str], list[str] | None] = lambda name: None  # name -> the columns of the sides, for messages


def _value(row, fields: Fields, role: str):
    column = fields.roles[role]
    if column not in row:
        raise ValueError(f"no field {column!r}")
    return row[column]


def _pool(row, fields: Fields) -> _Shape:
    prompt, responses = _with_input(row, fields), _value(row, fields, "responses")
    return _Shape(prompt, responses, row.get, fields.roles.get("sources"), fields.roles.get("lengths"))


def _completions(row, fields: Fields) -> _Shape:
    name, key = fields.roles["completions"], fields.roles.get("response") or _response_key(fields)
    prompt, completions = _with_input(row, fields), _value(row, fields, "completions")
    if not isinstance(completions, list):
        raise ValueError(f"{name} must be a list, got {type(completions).__name__}")
    for index, completion in enumerate(completions):
        if not isinstance(completion, dict) or key not in completion:
            raise ValueError(f"{name}[{index}] must be an object with a {key}")

    def column(name):
        if any(name in completion for completion in completions):
            return [completion.get(name) for completion in completions]
        ratings = [_rating(completion, name) for completion in completions]
        return ratings if any(rating is not None for rating in ratings) or not completions else None

    return _Shape(prompt, [completion[key] for completion in completions], column, "model", "length")


def _response_key(fields: Fields) -> str:
    return LAYOUTS[fields.layout].optional["response"][0]


def _rating(completion, name):
    """What the annotation of that name rates the completion, as it is written: usually a digit, or "N/A"."""
    annotations = completion.get("annotations")
    annotation = annotations.get(name) if isinstance(annotations, dict) else None
    rating = annotation.get("Rating") if isinstance(annotation, dict) else None
    if not isinstance(rating, str):
        return rating
    number = _number_in(rating)
    return rating if number is None else number


def _pair(row, fields: Fields) -> _Shape:
    sides = [_value(row, fields, side) for side in SIDES]
    name = fields.roles.get("prompt")
    if name is None or name not in row:
        prompt, *sides = _implicit_prompt(*sides)
    else:
        prompt, *sides = _explicit_prompt(fields, _with_input(row, fields), *sides)
    return _published(row, fields, prompt, sides)


def _published(row, fields: Fields, prompt, sides) -> _Shape:
    for side, text in zip(SIDES, sides, strict=True):
        if text is None:
            raise ValueError(f"{fields.roles.get(side, side)} is null")

    def keys_of(name):
        return next((keys for keys in _pair_keys(name) if all(key in row for key in keys)), None)

    def column(name):
        keys = keys_of(name)
        if keys is None:
            return [1.0, 0.0] if name == PREFERENCE else None
        return [row[key] for key in keys]

    strength = row.get(fields.roles.get("strength"))
    strength = None if strength is None else _score(fields.roles["strength"], strength)
    return _Shape(prompt, sides, column, "source", "len", strength, keys_of)


def _pair_keys(name) -> list[list[str]]:
    return [[pattern.format(name, side) for side in SIDES] for pattern in ("{0}_{1}", "{1}_{0}", "{1}-{0}")]


_BASE = re.compile(r"(?:chosen[_-](.+)|(.+)_chosen)")
# Other numbers of the sides, such as tokens or log-probs, are scores only if they are named.
_SCORE_NAMES = re.compile(r"(?<![a-z])(score|rating|reward|grade|quality|helpfulness|win_?prob)s?(?![a-z])")


def _scores_of_pairs(row, fields: Fields) -> tuple[str, ...] | None:
    names = dict.fromkeys(match[1] or match[2] for key in row if (match := _BASE.fullmatch(key)))
    found = []
    for name in names:
        keys = next((keys for keys in _pair_keys(name) if all(key in row for key in keys)), None)
        if any(is_number(row[key]) for key in keys or ()) and _SCORE_NAMES.search(name.lower()):
            found.append(name)
    for usual in ("score", "rating", "reward"):
        if usual in found:
            return (usual,)
    if len(found) > 1:
        raise InputError(
            f"scores of the sides are {', '.join(found)}: name those to use, the first one first, by --scores"
        )
    return tuple(found) or None


def _with_input(row, fields: Fields):
    """The prompt; in LLaMA-Factory's rows, the instruction, a line feed and the input."""
    prompt = _value(row, fields, "prompt")
    further = row.get(fields.roles.get("input"))
    if not further:
        return prompt
    if not (isinstance(prompt, str) and isinstance(further, str)):
        raise ValueError(f"instruction and input must be strings, got {prompt!r:.40} and {further!r:.40}")
    return f"{prompt}\n{further}" if prompt else further


def _explicit_prompt(fields: Fields, prompt, chosen, rejected) -> tuple:
    """The prompt and the sides without it: beside a prompt, sides may be whole conversations that hold it.

    Strings are cut where most rows of the file say that their sides begin so, for a reply may begin as its prompt does.
    """
    if _begin_with(prompt, chosen, rejected):
        if fields.prompt_in_sides:
            return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
        if any(not prompt[turn.end() :].strip() for turn in _TURN_MARKS.finditer(prompt)):
            raise ValueError("both sides begin with the prompt, up to the assistant's turn, which most rows do not")
    lists = [isinstance(side, list) for side in (chosen, rejected)]
    if prompt is None or not all(lists) or not (chosen and rejected):
        return prompt, chosen, rejected
    if not isinstance(prompt, list | str):
        return prompt, chosen, rejected
    if all(_role(side[0]) not in ("user", "system", "developer") for side in (chosen, rejected)):
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, chosen, rejected
    common, *sides = _implicit_prompt(chosen, rejected)
    turns = [_turn(message) for message in common]
    if isinstance(prompt, str):
        if not any(_holds(text, prompt) for _, text in turns):
            raise ValueError("prompt is in no message that chosen and rejected begin with")
        return common, *sides
    asked = [_turn(message) for message in prompt]
    for end in range(len(turns), len(asked) - 1, -1):
        if turns[end - len(asked) : end] == asked:
            return chosen[:end], chosen[end:], rejected[end:]
    raise ValueError("prompt is not what chosen and rejected begin with")


def _begin_with(prompt, *sides) -> bool:
    """Whether all are strings, and the sides begin with the prompt and go on, not within a word."""
    if not all(isinstance(text, str) and text for text in (prompt, *sides)):
        return False
    end = len(prompt)
    return all(side.startswith(prompt) and side[end:] and not side[end - 1 : end + 1].isalnum() for side in sides)


def sides_hold_prompt(row: dict, fields: Fields) -> bool:
    """Returns whether both sides of a row of pairs are strings that begin with its prompt."""
    roles = SIDES if fields.shape == "pair" else ("response_a", "response_b")
    sides = [row.get(fields.roles.get(role)) for role in roles]
    try:
        return _begin_with(_with_input(row, fields), *sides)
    except (KeyError, ValueError):
        return False


def _turn(message) -> tuple:
    """Role and text: one of two copies may have a name, or nulls, which the other lacks."""
    if not isinstance(message, dict):
        return None, message
    content = message.get("content", message.get("value"))
    return _role(message), content.strip() if isinstance(content, str) else content


def _holds(text, prompt: str) -> bool:
    if isinstance(text, list):
        text = "".join([part.get("text") or "" for part in text if isinstance(part, dict)])
    return isinstance(text, str) and bool(text) and (text in prompt or prompt.strip() in text)


# What begins the reply of an assistant in the templates of chat models and in published data.
_TURN_MARKS = re.compile(
    r"\n\nAssistant:|\n(?:### ?)?(?:Assistant|ASSISTANT):|\n### ?Response:|(?<=\s)ASSISTANT:"
    r"|(?<=\s)GPT4 Correct Assistant:|<\|im_start\|>assistant\n|<\|assistant\|>\n?|\[/INST\]|<start_of_turn>model\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<\|turn>model\n"
)


def _implicit_prompt(chosen, rejected) -> tuple:
    """What both sides begin with, and the rest of each.

    Conversations are cut before the first message that differs, as TRL does; where one goes on from the other, the
    shorter one ends in a response. Strings are cut behind the last mark of an assistant's turn that both have: what two
    answers happen to begin with is no prompt.
    """
    for side, value in zip(SIDES, (chosen, rejected), strict=True):
        if not isinstance(value, type(chosen)) or not isinstance(value, str | list):
            raise ValueError(f"{side} must be a string or a list of messages, as the other side is")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None:
        same = min(len(chosen), len(rejected)) - isinstance(chosen, list)
    if isinstance(chosen, str):
        turns = [turn for turn in _TURN_MARKS.finditer(chosen, 0, same) if chosen[: turn.start()].strip()]
        if not turns:
            raise ValueError("no field 'prompt', and chosen and rejected have no turn of an assistant in common")
        same = turns[-1].end()
    if same < 1:
        raise ValueError("no field 'prompt', and chosen and rejected begin with no message in common")
    return chosen[:same], chosen[same:], rejected[same:]


def _sharegpt(row, fields: Fields) -> _Shape:
    prompt = _value(row, fields, "prompt")
    sides = [[side] if isinstance(side, dict) else side for side in (_value(row, fields, side) for side in SIDES)]
    return _published(row, fields, prompt, sides)


def _swift(row, fields: Fields) -> _Shape:
    messages, rejected = (_value(row, fields, role) for role in ("messages", "rejected"))
    if not isinstance(messages, list) or len(messages) < 2 or _role(messages[-1]) != "assistant":
        raise ValueError("messages must be a conversation that ends in the response of an assistant")
    if isinstance(rejected, list):
        return _published(row, fields, *_split(_implicit_prompt(messages, rejected)))
    if isinstance(rejected, str):
        rejected = [{"role": "assistant", "content": rejected}]
    return _published(row, fields, messages[:-1], [messages[-1:], rejected])


def _split(parts) -> tuple:
    return parts[0], list(parts[1:])


def _ab(row, fields: Fields) -> _Shape:
    label = _value(row, fields, "label")
    first, strength = _LABELS[LAYOUTS[fields.layout].label](fields.roles["label"], label)
    return _preferred(row, fields, first, strength)


def _arena_wins(row, fields: Fields) -> _Shape:
    votes = [_vote(_value(row, fields, role)) for role in ("wins_a", "wins_b", "tie")]
    if any(vote not in (0, 1) for vote in votes) or sum(votes) != 1:
        names = ", ".join(fields.roles[role] for role in ("wins_a", "wins_b", "tie"))
        raise ValueError(f"one of {names} must be 1 and the others 0, got {', '.join(map(str, votes))}")
    if votes[2]:
        raise Tie("ties")
    return _preferred(row, fields, bool(votes[0]), None)


def _vote(value):
    """As a number, where it is a text that says one, or true or false."""
    if not isinstance(value, str):
        return value
    return {"true": 1, "false": 0}.get(value.strip().lower(), _number_in(value))


def _preferred(row, fields: Fields, first: bool, strength) -> _Shape:
    """Two responses, the preferred one first."""
    sides = [_value(row, fields, "response_a"), _value(row, fields, "response_b")]
    if "prompt" not in fields.roles:
        prompt, *sides = _implicit_prompt(*sides)
    else:
        prompt = _with_input(row, fields)
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            prompt, *sides = _from_turns(prompt, *sides)
        else:
            prompt, *sides = _explicit_prompt(fields, prompt, *sides)
    order = (0, 1) if first else (1, 0)

    def column(name):
        values = _ab_column(row, fields, name)
        if values is None:
            return [1.0, 0.0] if name == PREFERENCE else None
        return [values[k] for k in order]

    if strength is None and (strength := row.get(fields.roles.get("strength"))) is not None:
        strength = _score("margin", strength)
    sides = [sides[k] for k in order]
    for text in sides:
        if text is None:
            raise ValueError("a response is null")
    return _Shape(prompt, sides, column, "model", "len", strength)


def _ab_column(row, fields: Fields, name) -> list | None:
    keys = next((keys for keys in _ab_keys(name) if all(key in row for key in keys)), None)
    return None if keys is None else [row[key] for key in keys]


def _ab_keys(name) -> list[list[str]]:
    return [[name + end for end in ends] for ends in (("_a", "_b"), ("_A", "_B"), ("_0", "_1"), ("_1", "_2"))]


def _from_turns(prompts, *answers) -> tuple:
    """Of lists, with an entry per turn: the prompt that ends in the last turn, and the last answers."""
    if not all(isinstance(side, list) and len(side) == len(prompts) for side in answers):
        raise ValueError("prompt is a list of turns, each response must be one of as many")
    if len(prompts) == 1:
        return prompts[0], *(side[0] for side in answers)
    first, second = (side[:-1] for side in answers)
    if first != second:
        raise ValueError("the answers differ before the last turn: they are no answers to one prompt")
    messages = [{"role": "user", "content": prompts[0]}]
    for answer, prompt in zip(first, prompts[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": prompt}]
    return messages, *([{"role": "assistant", "content": side[-1]}] for side in answers)


def _letters(name, label) -> tuple[bool, None]:
    text = label.strip().lower() if isinstance(label, str) else label
    if text in TIES:
        raise Tie("ties")
    if text not in (*FIRST, *SECOND):
        raise ValueError(f"{name} must be one of {', '.join((*FIRST, *SECOND, *TIES))}, got {label!r}")
    return text in FIRST, None


def _signed(name, label) -> tuple[bool, float]:
    number = _score(name, label)
    if math.isnan(number):
        raise ValueError(f"{name} is null")
    if number == 0:
        raise Tie("ties")
    return number < 0, abs(number)


def _numbered(first):
    def read(name, label) -> tuple[bool, None]:
        if isinstance(label, bool) or label not in (0, 1):
            raise ValueError(f"{name} must be 0 or 1, got {label!r}")
        return label == first, None

    return read


_LABELS = {"letters": _letters, "signed": _signed, "one is a": _numbered(1), "number": _numbered(0)}


def _single(row, fields: Fields) -> _Shape:
    """A row per response: a pool of one, which `grouping` joins with the others of its prompt."""

    def column(name):
        if name not in row:
            return None
        # the label of KTO is a score of two values; elsewhere true is no score
        return [float(row[name]) if name == label and isinstance(row[name], bool) else row[name]]

    label = fields.roles.get("label")
    responses = [_value(row, fields, "response")]
    if isinstance(responses[0], dict):
        responses = [responses]
    return _Shape(_with_input(row, fields), responses, column, fields.roles.get("source"), "length")


_SHAPES = {
    "pool": _pool,
    "completions": _completions,
    "pair": _pair,
    "sharegpt": _sharegpt,
    "swift": _swift,
    "ab": _ab,
    "arena-wins": _arena_wins,
    "rows": _single,
}


# ---- texts


def _texts(name, values) -> tuple[list[Text], dict[int, str]]:
    """The texts, and those that are none: by index the reason, an empty one in their place."""
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list, got {'null' if values is None else type(values).__name__}")
    kinds = set(map(type, values))
    if kinds == {str} or not kinds:
        return values, {}
    if {str, list} <= kinds:
        raise ValueError(f"{name} must be all strings or all lists of messages, got both")
    texts, bad = [], {}
    empty = [{"role": "assistant", "content": ""}] if list in kinds else ""
    for index, value in enumerate(values):
        try:
            if not isinstance(value, str | list):
                raise ValueError(f"{name}[{index}] {_not_a('a string', value)}")
            texts.append(_messages(f"{name}[{index}]", value) if isinstance(value, list) else value)
        except ValueError as error:
            bad[index] = str(error)
            texts.append(empty)
    return texts, bad


def _not_a(expected: str, value) -> str:
    return "is null" if value is None else f"must be {expected}, got {type(value).__name__}"


def _prompt(prompt, responses) -> tuple[Text, list[Text]]:
    """The prompt and the responses in one form: replies in plain text to a conversation are the assistant's."""
    strings = not responses or isinstance(responses[0], str)
    if isinstance(prompt, list):
        prompt = _messages("prompt", prompt)
        return prompt, _as_replies(responses) if strings else responses
    if not isinstance(prompt, str):
        raise ValueError(f"prompt {_not_a('a string', prompt)}")
    if not strings:
        if any(response[0]["role"] != "assistant" for response in responses):
            raise ValueError("prompt must be a list of messages, as the responses are, got str")
        return [{"role": "user", "content": prompt}], responses
    return prompt, responses


def _as_replies(texts) -> list[Text]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def _with_turns_before(prompt, responses, row, fields: Fields) -> tuple[Text, list[Text]]:
    """As messages, in every row of the file, with the system prompt and the turns before."""
    if isinstance(prompt, str):
        prompt, responses = [{"role": "user", "content": prompt}], _as_replies(responses)
    history = _history(row.get(fields.roles.get("history")))
    begin = 1 if prompt[0]["role"] == "system" else 0
    turns, before = ([_turn(message) for message in messages] for messages in (prompt, history))
    if all(turns[at : at + len(before)] != before for at in (0, begin)):  # a whole conversation holds them already
        prompt = [*prompt[:begin], *history, *prompt[begin:]]
    name = fields.roles.get("system")
    system = row.get(name)
    if system is None or system == "":
        return prompt, responses
    if not isinstance(system, str):
        raise ValueError(f"{name} must be a string, got {type(system).__name__}")
    if prompt[0]["role"] == "system":
        if prompt[0]["content"] != system:
            raise ValueError(f"{name} differs from the system message that the prompt begins with")
        return prompt, responses
    return [{"role": "system", "content": system}, *prompt], responses


def _history(turns) -> list[dict]:
    if not turns:
        return []
    if not isinstance(turns, list):
        raise ValueError(f"history must be a list of turns, got {type(turns).__name__}")
    if isinstance(turns[0], dict):
        return _messages("history", turns)
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"history[{index}] must be [prompt, response], or history be messages")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


_FROM = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_ROLES_OF_CALLS = ("function_call", "tool_call")


def _role(message) -> str | None:
    if not isinstance(message, dict):
        return None
    role = message.get("role", message.get("from"))
    return _FROM.get(role, role) if isinstance(role, str) else None


def _messages(name, messages) -> list[dict[str, Any]]:
    if not messages:
        raise ValueError(f"{name} must hold a message, got an empty list")
    return [
        message
        if type(message) is dict
        and len(message) == 2
        and type(message.get("role")) is type(message.get("content")) is str
        else _message(f"{name}[{index}]", message)
        for index, message in enumerate(messages)
    ]


def _message(name, message) -> dict[str, Any]:
    """With its role and content first, and all other keys that say something."""
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be a message, got {type(message).__name__}")
    if "role" not in message and "from" in message:
        message = _from_sharegpt(name, message)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ValueError(f"{name} must have a role that is a string, got {_kind_of(message, 'role')}")
    further = {key: value for key, value in message.items() if value is not None and key not in ("role", "content")}
    if isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise ValueError(f"{name}.content[{index}] must be a part with a type")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"{name}.content[{index}] must have a text that is a string")
    elif content is None:
        if not (further.get("tool_calls") or further.get("function_call")):
            raise ValueError(f"{name} must have a content that is a string, got {_kind_of(message, 'content')}")
    elif not isinstance(content, str):
        raise ValueError(f"{name} must have a content that is a string or parts, got {_kind_of(message, 'content')}")
    return {"role": role, "content": content, **further}


def _kind_of(message, key) -> str:
    return "none" if message.get(key) is None else type(message[key]).__name__


def _from_sharegpt(name, message) -> dict[str, Any]:
    """{from, value} as {role, content}; a call of a function as TRL and the templates have it."""
    further = {key: value for key, value in message.items() if key not in ("from", "value", "role")}
    role, value = message["from"], message.get("value")
    if role not in _ROLES_OF_CALLS:
        return {"role": _FROM.get(role, role) if isinstance(role, str) else role, "content": value, **further}
    try:
        call = json.loads(value)
        calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
        if not all(isinstance(one["function"]["name"], str) for one in calls):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{name} must be a call as JSON, with a name and arguments") from None
    return {"role": "assistant", "content": "", "tool_calls": calls, **further}


def _plain_message(message) -> str:
    content = message["content"]
    if isinstance(content, list):
        content = "".join([part.get("text") or "" for part in content if part["type"] == "text"] or ["\ufffc"])
    if len(message) > 2 and (calls := message.get("tool_calls") or message.get("function_call")):
        content = (content or "") + json.dumps(calls, ensure_ascii=False, default=str)
    return content or ""


_PAYLOADS = ("image", "video", "audio")


def _check_images(row: Row) -> None:
    """A part that only says that there is an image needs the column that holds it."""
    if isinstance(row.prompt, str):
        return
    for text in (row.prompt, *row.responses):
        for message in text:
            if type(message["content"]) is not list:
                continue
            for part in message["content"]:
                kind = part["type"]
                alone = kind in _PAYLOADS and not any(v for key, v in part.items() if key not in ("type", "text"))
                if alone and not any(value and name.lower().startswith(kind) for name, value in row.carried.items()):
                    raise ValueError(f"a message has an {kind}, and the row no column {kind}s")


# ---- what is left out


def without_bad_unicode(row: Row, fields: Fields) -> Row:
    """Returns the row without texts that hold half a surrogate pair: JSON can spell it, and no UTF-8 file can hold it.

    `parse_row` leaves this to the code that encodes the texts, where it shows.

    Raises:
        ValueError: It is the prompt, or no response is left.
    """
    if not is_unicode(row.prompt):
        raise ValueError("prompt holds a lone surrogate, which is not Unicode text")
    if wrong := [name for name, value in row.carried.items() if not is_unicode([value])]:
        raise ValueError(f"{wrong[0]} holds a lone surrogate, which is not Unicode text")
    bad = {}
    for index, text in enumerate(row.responses):
        if not is_unicode(text):
            bad[index] = f"responses[{index}] holds a lone surrogate, which is not Unicode text"
    if not bad:
        return row
    bad = row.bad | bad
    empty = "" if isinstance(row.prompt, str) else [{"role": "assistant", "content": ""}]
    responses = [empty if index in bad else text for index, text in enumerate(row.responses)]
    return _without_bad_responses(row._replace(responses=responses, bad=bad), fields)


def is_unicode(text: Text) -> bool:
    """Returns whether a text can be written, for it holds no lone surrogate."""
    if type(text) is str:
        if text.isascii():
            return True
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
        return True
    try:
        json.dumps(text, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_bad_responses(row: Row, fields: Fields) -> Row:
    """The pool of the others; without one it is no pool, and a published pair needs both."""
    if fields.published or len(row.bad) == len(row.responses):
        raise ValueError(next(iter(row.bad.values())))
    scores = {
        name: [math.nan if index in row.bad else value for index, value in enumerate(values)]
        for name, values in row.scores.items()
    }
    return row._replace(scores=scores)


# ---- values


def _aligned(name, values, count) -> list:
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list, got {'null' if values is None else type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"{name} must have one entry per response, got {len(values)} for {count}")
    return values


def _scores(name, values, keys=None) -> list[float]:
    return [
        value if type(value) is float and math.isfinite(value) else _score(keys[i] if keys else f"{name}[{i}]", value)
        for i, value in enumerate(values)
    ]


def _beside(values, count) -> list[float]:
    """NaN for what is no number: it was not asked for."""
    if not isinstance(values, list) or len(values) != count:
        return [math.nan] * count
    return [
        float(v) if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < LARGEST_SCORE else math.nan
        for v in values
    ]


def _score(name, value) -> float:
    if value is None:
        return math.nan
    number = _number_in(value) if isinstance(value, str) else value
    # bool is an int in Python, but `true` is no score.
    if isinstance(number, bool) or not isinstance(number, int | float | Decimal):
        raise ValueError(f"{name} must be a number, got {value!r:.40}")
    try:
        number = float(number)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer beyond float64") from None
    if math.isinf(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


_NO_NUMBER = ("", "na", "n/a", "null", "none")


def says_none(text: str) -> bool:
    """Returns whether a text stands for a number that is not there, as "N/A" and "" do."""
    return text.strip().lower() in _NO_NUMBER


def _number_in(text: str) -> float | None:
    """The number that a text spells, NaN for a word that says there is none, None for another text."""
    if says_none(text):
        return math.nan
    try:
        return None if "_" in text else float(text)  # 1_000 is Python's alone
    except ValueError:
        return None


def is_number(value) -> bool:
    """Returns whether a value is a number, or a text that spells one."""
    if isinstance(value, str):
        return _number_in(value) is not None and not says_none(value)
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


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


# ---- cells of CSV


def decoded_cells(row: dict, fields: Fields) -> dict:
    """Returns a row of CSV with numbers and lists as such where the layout has them; texts stay, but for messages."""
    texts = {fields.roles[role] for role in _TEXT_ROLES if role in fields.roles}
    kept = _kept_cells(fields)
    found = dict(row)
    for name, value in row.items():
        if not isinstance(value, str) or name in kept:
            continue
        if name in texts:
            if value.startswith("[{") and value.endswith("}]"):
                found[name] = _decoded_messages(value)
            elif fields.layout == "sharegpt" and value.startswith("{"):
                found[name] = _decoded_json(value)
            if found[name] is value and _PYTHON_MESSAGES.match(value):
                raise ValueError(f"{name} holds messages as Python prints them: write them as JSON, by json.dumps")
        elif value[:1] in "[{" and value[:1]:
            found[name] = _decoded_json(value)
        else:
            found[name] = _decoded_number(value, fields.cells)
    if fields.layout in ("arena", "arena-wins"):
        sides = {name: _decoded_json(found[name]) for name in texts if isinstance(found.get(name), str)}
        if len(sides) == 3 and all(isinstance(side, list) for side in sides.values()):  # an entry per turn
            found |= sides
    return found


def _kept_cells(fields: Fields) -> set[str]:
    named = _source_columns(fields.source, fields.shape)
    return {*fields.carried, *named, *(fields.roles[role] for role in _NAME_ROLES if role in fields.roles)}


@functools.cache
def _source_columns(source: str | None, shape: str) -> frozenset[str]:
    """The columns that hold the name of one source; of a pool a column holds a list of them."""
    if shape == "rows":
        return frozenset() if source is None else frozenset([source])
    if shape in ("pool", "completions"):
        return frozenset()
    names = ("source", "model") if source is None else (source,)
    return frozenset(key for name in names for keys in (*_pair_keys(name), *_ab_keys(name)) for key in keys)


def number_columns(fields: Fields, names) -> list[str]:
    """Returns which columns of CSV `parse_row` may read as numbers."""
    texts = {fields.roles[role] for role in _TEXT_ROLES if role in fields.roles}
    numbers = top_fields(fields) - texts - _kept_cells(fields)
    return [name for name in names if name in numbers]


_PYTHON_MESSAGES = re.compile(r"\[?\s*\{\s*'(?:role|content|from|value)'\s*:")
_TEXT_ROLES = ("prompt", "response", "chosen", "rejected", "messages", "response_a", "response_b", "input", "system")
_NAME_ROLES = ("prompt_id", "model_a", "model_b", "source")


def _decoded_json(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _decoded_messages(text: str):
    value = _decoded_json(text)
    return value if isinstance(value, list) and all(_role(message) for message in value) else text


def _decoded_number(text, delimiter: str):
    """The number that a cell holds, else the text; with a decimal comma where it does not separate fields."""
    if not isinstance(text, str):
        return text
    if delimiter == ";" and _DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    number = _number_in(text)
    if number is None:
        return {"true": True, "false": False}.get(text.lower(), text)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
