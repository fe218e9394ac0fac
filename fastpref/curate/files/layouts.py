"""What the columns of a file of preferences mean: one table of layouts, told apart by the columns that are there.

A role is what a column is for, and `--columns ROLE=NAME` names its column. A layout fits a file that has all columns of
its roles; of two that fit, one whose columns are among the other's gives way, and otherwise `--layout` must choose.

    layout           columns of IN
    pools            prompt, responses[]; scores[] or any column that --scores names; sources[], lengths[], truncated[]
    ultrafeedback    instruction, completions[{response, overall_score, annotations, model}]
    completions      the same with a prompt: prompt, completions[{response, overall_score or score or reward}]
    distilabel       instruction, generations[], ratings[]; model_names[]
    simpo            prompt, all_generated_responses[], all_rm_scores[]
    nectar           prompt, answers[{answer, rank, model}]; 1 is best: --scores rank:best-low
    nemo-rl          context, completions[{completion, reward, rank}]
    responses        a row per response: prompt, response, any columns of scores (HelpSteer2: --scores helpfulness)
    kto              a row per response: prompt, completion, label (true: desired)
    pairs            chosen, rejected; prompt, else question, instruction or input; any two scores, such as score_chosen
                     and score_rejected, chosen_score, chosen-rating; margin. Strings without a prompt are cut behind
                     the last turn marker that both have
    alpaca           LLaMA-Factory: instruction, input, history, system; chosen, rejected
    sharegpt         LLaMA-Factory: conversations[{from, value}], chosen{from, value}, rejected{from, value}
    swift            ms-swift: messages, ending in the chosen response, and rejected_response
    swift-messages   ms-swift: messages and rejected_messages
    ab               prompt, response_a, response_b, label
    arena            model_a, model_b, winner, prompt, response_a, response_b
    arena-chats      model_a, model_b, winner, conversation_a, conversation_b
    arena-wins       model_a, model_b, prompt, response_a, response_b, winner_model_a, winner_model_b, winner_tie
    helpsteer3       context, response1, response2, overall_preference
    helpsteer2-pairs prompt, response_1, response_2, preference_strength
    shp              history, human_ref_A, human_ref_B, labels; score_A, score_B
    pku              prompt, response_0, response_1; --columns label=better_response_id or label=safer_response_id

What a label says:
    ab, arena        a, A, model_a, response_a: the first is better; b, ... likewise; tie, tie (bothbad), both_bad: none
    arena-wins       one of the three columns is 1
    helpsteer3, helpsteer2-pairs    negative: the first is better; 0: a tie; the size is the margin
    shp              1: A is better; 0: B
    pku              the number of the better response

Beside these, in every layout: system, system_prompt and the like (becomes the first message), history (the turns
before), input (behind an instruction), tools, functions, documents, images, videos, audios, chat_template_kwargs and
what else begins so (reach OUT as they are), prompt_id, id. Text called context, passage, paragraph, article or
background needs --keep NAME (reaches OUT as it is) or --columns input=NAME (goes behind the prompt).
"""

import difflib
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from fastpref.errors import InputError

# labels of a side, in lower case
FIRST = ("a", "model_a", "response_a")
SECOND = ("b", "model_b", "response_b")
TIES = ("tie", "tie (bothbad)", "tie(bothbad)", "both_bad", "bothbad", "both bad", "tie (both bad)")

PAIR_SHAPES = ("pair", "sharegpt", "swift", "ab", "arena-wins")  # the sides are published


class Layout(NamedTuple):
    """A layout of the table above."""

    name: str
    shape: str  # how a row is read: a function of `rows`
    roles: dict[str, str]  # role -> the column that must be there, where --columns names no other
    optional: dict[str, tuple[str, ...]] = {}  # noqa: RUF012  role -> columns, of which the first that is there is read
    scores: tuple[str, ...] = ()  # usual names, of which the first that is there is read
    label: str = ""  # what a label says: "letters", "signed", "one is a" or "number"
    hides: tuple[str, ...] = ()  # layouts that give way to this one
    without: tuple[str, ...] = ()  # columns that the file must not have


_SOURCES = {"sources": ("sources",)}
_PAIR = {"prompt": ("prompt", "question", "instruction", "input"), "strength": ("margin",)}
_AB = {"prompt": "prompt", "response_a": "response_a", "response_b": "response_b"}
_ARENA = {"model_a": "model_a", "model_b": "model_b"}

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("pools", "pool", {"prompt": "prompt", "responses": "responses"}, _SOURCES, ("scores", "win_prob")),
        Layout(
            "ultrafeedback",
            "completions",
            {"prompt": "instruction", "completions": "completions"},
            {"response": ("response",), "source": ("model",)},
            ("overall_score", "fine-grained_score"),
        ),
        Layout(
            "distilabel",
            "pool",
            {"prompt": "instruction", "responses": "generations"},
            {"sources": ("model_names", "generation_models", "generation_model", "models")},
            ("ratings", "rating"),
        ),
        Layout(
            "simpo",
            "pool",
            {"prompt": "prompt", "responses": "all_generated_responses"},
            {},
            ("all_rm_scores",),
            hides=("pairs",),
        ),
        Layout(
            "nectar",
            "completions",
            {"prompt": "prompt", "completions": "answers"},
            {"response": ("answer",), "source": ("model",)},
            ("rank",),
        ),
        Layout(
            "nemo-rl",
            "completions",
            {"prompt": "context", "completions": "completions"},
            {"response": ("completion",), "source": ("model",)},
            ("reward", "rank"),
        ),
        Layout(
            "completions",  # UltraFeedback's with a prompt
            "completions",
            {"prompt": "prompt", "completions": "completions"},
            {"response": ("response",), "source": ("model",)},
            ("overall_score", "fine-grained_score", "score", "reward"),
        ),
        Layout(
            "responses",
            "rows",
            {"prompt": "prompt", "response": "response"},
            {"source": ("source", "model")},
            ("score", "reward", "rating"),
        ),
        Layout("kto", "rows", {"prompt": "prompt", "response": "completion", "label": "label"}, {}, ()),
        Layout("pairs", "pair", {"chosen": "chosen", "rejected": "rejected"}, _PAIR),
        Layout(
            "alpaca",
            "pair",
            {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
            {"strength": ("margin",)},
            without=("prompt", "question"),
        ),
        Layout(
            "sharegpt",
            "sharegpt",
            {"prompt": "conversations", "chosen": "chosen", "rejected": "rejected"},
            {"strength": ("margin",)},
        ),
        Layout(
            "swift",
            "swift",
            {"messages": "messages", "rejected": "rejected_response"},
            {"strength": ("margin",)},
        ),
        Layout("swift-messages", "swift", {"messages": "messages", "rejected": "rejected_messages"}, {}),
        Layout("ab", "ab", _AB | {"label": "label"}, {"strength": ("margin",)}, label="letters"),
        Layout("arena", "ab", _ARENA | _AB | {"label": "winner"}, label="letters"),
        Layout(
            "arena-chats",
            "ab",
            _ARENA | {"response_a": "conversation_a", "response_b": "conversation_b", "label": "winner"},
            label="letters",
        ),
        Layout(
            "arena-wins",
            "arena-wins",
            _ARENA | _AB | {"wins_a": "winner_model_a", "wins_b": "winner_model_b", "tie": "winner_tie"},
        ),
        Layout(
            "helpsteer3",
            "ab",
            {"prompt": "context", "response_a": "response1", "response_b": "response2", "label": "overall_preference"},
            label="signed",
        ),
        Layout(
            "helpsteer2-pairs",
            "ab",
            {
                "prompt": "prompt",
                "response_a": "response_1",
                "response_b": "response_2",
                "label": "preference_strength",
            },
            label="signed",
        ),
        Layout(
            "shp",
            "ab",
            {"prompt": "history", "response_a": "human_ref_A", "response_b": "human_ref_B", "label": "labels"},
            {},
            ("score",),
            label="one is a",
        ),
        Layout(
            "pku",
            "ab",
            {"prompt": "prompt", "response_a": "response_0", "response_b": "response_1", "label": ""},
            label="number",
        ),
    )
}
_CHOICES = {"pku": ("better_response_id", "safer_response_id")}  # where the file has two labels

# Columns that change what a pair means, in every layout: those that become messages, and those that reach OUT.
# Names are compared without case and punctuation.
MEANING = {
    "system": (
        "system",
        "systemprompt",
        "systemmessage",
        "systeminstruction",
        "systeminstructions",
        "systemcontent",
        "systemtext",
        "sysprompt",
        "sysmessage",
        "sysmsg",
        "customsystemprompt",
    ),
    "history": (
        "history",
        "chathistory",
        "conversationhistory",
        "dialoghistory",
        "dialoguehistory",
        "priorturns",
    ),
}
CONTEXT = ("tools", "functions", "documents", "images", "videos", "audios", "chat_template_kwargs")
_CONTEXT_BEGINNINGS = (
    "tool",
    "function",
    "document",
    "image",
    "img",
    "video",
    "audio",
    "chattemplate",
    "system",
)
# Text of these names may belong to a prompt or only be kept beside it: the caller must say.
_UNCLEAR = ("context", "contexts", "passage", "passages", "paragraph", "paragraphs", "article", "background")
FURTHER = {
    "prompt_id": ("prompt_id",),
    "lengths": ("lengths",),
    "truncated": ("truncated",),
    "finish_reason": ("finish_reason",),
}


_VOTES = (("winner", "loser"), ("i", "j"), ("model_a", "model_b", "winner"))  # of `fastpref denoise`


class Resolved(NamedTuple):
    """A layout as it is read from one input."""

    layout: str
    roles: dict[str, str]  # role -> column
    carried: tuple[str, ...]  # columns that reach OUT as they are; those of CONTEXT first

    def __str__(self):
        """As the summary has it: "pairs: prompt=question, chosen=chosen, ..."."""
        return f"{self.layout}: {', '.join(f'{role}={column}' for role, column in self.roles.items())}"


def resolve_layout(
    what: str,
    names: Sequence[str],
    layout: str | None = None,
    columns: dict[str, str] | None = None,
    keep=(),
    rare: Sequence[str] = (),
) -> Resolved:
    """Finds the one layout that fits the columns of an input.

    Args:
        what: The input, for messages.
        names: Its columns.
        layout: A name of LAYOUTS, to force it.
        columns: role -> column, where the input calls it otherwise.
        keep: Further columns that reach OUT.
        rare: Those of its columns that few rows have, by which no layout is told.

    Raises:
        InputError: No layout fits, or more than one; a role, layout or column is not there.
    """
    columns = dict(columns or {})
    _check_request(what, names, layout, columns, keep)
    tried = LAYOUTS.values() if layout is None else [LAYOUTS[layout]]
    usual = [name for name in names if name not in rare or name in columns.values()]
    fitting = [one for one in tried if _fits(one, usual, columns, forced=layout is not None)]
    # what --columns names stands for itself in one layout and for another column in the next
    renamed = [sum(column != one.roles[role] for role, column in _required(one, columns).items()) for one in fitting]
    fitting = [one for one, count in zip(fitting, renamed, strict=True) if count == min(renamed)]
    fitting = [one for one in fitting if not any(_gives_way(one, other, columns) for other in fitting)]
    if not fitting:
        raise InputError(_no_layout(what, names, list(tried), columns))
    if len(fitting) > 1:
        found = " and ".join(f"{one.name} ({', '.join(_required(one, columns).values())})" for one in fitting)
        raise InputError(f"{what} could be read as {found}: say which by --layout {fitting[0].name}, or another")
    (found,) = fitting
    roles = _required(found, columns)
    if missing := [role for role, column in roles.items() if not column]:
        choices = [name for name in _CHOICES.get(found.name, ()) if name in names] or list(names)
        choices = " or ".join(f"{missing[0]}={name}" for name in choices)
        raise InputError(f"{what} fits {found.name}, which needs --columns {choices}")
    for role, aliases in (found.optional | FURTHER).items():
        if role not in roles and (column := columns.get(role) or _first(what, role, aliases, names, roles)):
            roles[role] = column
    for role, aliases in MEANING.items():
        there = [name for name in names if _plain(name) in aliases and name not in roles.values()]
        if role not in columns and len(there) > 1:
            meant = {"system": "system prompt", "history": "history"}[role]
            raise InputError(
                f"{what} has {' and '.join(there)}: say which is the {meant} by --columns {role}={there[0]}"
            )
        if column := columns.get(role) or next(iter(there), None):
            roles[role] = column
    if "input" in columns or ("input" in names and roles.get("prompt") == "instruction"):
        roles["input"] = columns.get("input", "input")
    roles = {role: roles[role] for role in ("prompt", *roles) if role in roles}
    return Resolved(found.name, roles, tuple(_carried(names, roles, columns, keep)))


def _carried(names, roles, columns, keep) -> list[str]:
    """What changes the meaning of a prompt and has no role, ids, and what is asked for; images and tools first."""
    context = [columns[name] for name in CONTEXT if name in columns]
    context += [name for name in names if is_context(name)]
    further = [name for name in ("input", "id") if name in names]
    return [name for name in dict.fromkeys([*context, *further, *keep]) if name not in roles.values() or name in keep]


def is_context(name: str) -> bool:
    """Returns whether a column of this name changes what a prompt means: images, tools, documents and the like."""
    return _plain(name).startswith(_CONTEXT_BEGINNINGS) or is_unclear(name)


def is_unclear(name: str) -> bool:
    """Returns whether a column of this name may hold what the prompt is about, as a passage does."""
    return _plain(name) in _UNCLEAR


def changes_meaning(name: str) -> bool:
    """Returns whether a column of this name changes what a prompt means: context, a system prompt or earlier turns."""
    return is_context(name) or any(_plain(name) in aliases for aliases in MEANING.values())


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def roles_of(layout: Layout) -> list[str]:
    """Returns the roles that --columns may name for a layout."""
    return [*layout.roles, *layout.optional, "input", *MEANING, *CONTEXT, *FURTHER]


def nearest(name: str, names: Sequence[str]) -> list[str]:
    """Returns the names that may be meant by one that is not there, the nearest first."""
    plain = {_plain(other): other for other in names}
    found = difflib.get_close_matches(_plain(name), plain, 3, 0.6)
    return [plain[match] for match in found]


def _check_request(what, names, layout, columns, keep) -> None:
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"--layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    known = dict.fromkeys(role for one in LAYOUTS.values() for role in roles_of(one))
    if layout is not None:
        known = roles_of(LAYOUTS[layout])
    for role in columns:
        if role not in known:
            raise InputError(f"--columns: no role is called {role!r}, only {', '.join(known)}")
    if repeated := [name for name in columns.values() if list(columns.values()).count(name) > 1]:
        raise InputError(f"--columns must name a column for each role, got {repeated[0]!r} twice")
    for name in [*columns.values(), *keep]:
        if name not in names:
            raise InputError(f"{what} has no column {name!r}, found {', '.join(names)}{nearest_hint(name, names)}")


def nearest_hint(name: str, names: Sequence[str]) -> str:
    """Returns "; nearest is NAME" for a message, or nothing where none is near."""
    near = nearest(name, names)
    return f"; nearest is {near[0]!r}" if near else ""


def _required(layout: Layout, columns: dict[str, str]) -> dict[str, str]:
    return {role: columns.get(role, column) for role, column in layout.roles.items()}


def _fits(layout: Layout, names, columns, forced: bool) -> bool:
    if not set(columns) <= {*roles_of(layout)}:
        return False
    if not forced and any(name in names for name in layout.without):
        return False
    return all(column in names for column in _required(layout, columns).values() if column)


def _gives_way(layout: Layout, other: Layout, columns) -> bool:
    if layout is other:
        return False
    if layout.name in other.hides:
        return True
    own, others = (_required(one, columns) for one in (layout, other))
    if layout.shape == other.shape and own == others:  # the same by --columns: the first one of the table
        return list(LAYOUTS).index(layout.name) > list(LAYOUTS).index(other.name)
    return {*own.values()} < {*others.values()} and layout.name not in other.hides


def _first(what, role, aliases, names, roles) -> str | None:
    """The first of the usual columns that is there; of a prompt, one that no other rivals."""
    there = [name for name in aliases if name in names and name not in roles.values()]
    if role == "prompt" and there[:1] not in ([], ["prompt"]):
        rivals = [name for name in there if name != "input"]
        if len(rivals) > 1:
            raise InputError(
                f"{what} has {' and '.join(rivals)}: say which is the prompt by --columns prompt={there[0]}"
            )
    return there[0] if there else None


def _no_layout(what, names, tried, columns) -> str:
    """What is there, the layout that lacks the fewest columns, and the flag that names them."""

    def lacking(layout):
        return [(role, name) for role, name in _required(layout, columns).items() if name and name not in names]

    if any({*votes} <= {*names} for votes in _VOTES):
        return f"{what}: its columns {', '.join(names)} are votes without texts, which fastpref denoise ranks"
    usable = [one for one in tried if set(columns) <= {*roles_of(one)}] or tried

    def distance(layout):
        lacks = lacking(layout)
        known = len(layout.roles) - len(lacks) - list(layout.roles.values()).count("")
        alike = sum(bool(nearest(name, names)) for _, name in lacks)
        return -known / len(layout.roles), -alike / max(1, len(lacks)), len(lacks)

    layout = min(usable, key=distance)
    lacks = lacking(layout)
    # where nothing is called alike, the only column without a use may be meant
    taken = {
        *_required(layout, columns).values(),
        *layout.scores,
        *FURTHER,
        *itertools.chain(*layout.optional.values()),
    }
    unused = [name for name in names if name not in taken]
    other = unused if len(unused) == 1 else ["NAME"]
    flags = ",".join(f"{role}={(nearest(name, unused) or other)[0]}" for role, name in lacks)
    return (
        f"{what}: its columns {', '.join(names) or '(none)'} fit no layout; nearest is {layout.name}, which lacks "
        f"{', '.join(name for _, name in lacks)}: name {'it' if len(lacks) == 1 else 'them'} with --columns {flags}"
    )
