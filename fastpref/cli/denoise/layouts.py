"""How tables are read: which of their columns are the items, the votes, the cells. The header alone decides."""

from collections.abc import Sequence
from typing import NamedTuple

from fastpref.curate.files.layouts import nearest
from fastpref.errors import InputError


class Layout(NamedTuple):
    """The roles of a table's columns."""

    roles: tuple[str, ...]  # all of which it needs
    optional: tuple[str, ...]
    names: tuple[dict[str, str], ...]  # role -> what the column is called by itself, in one way or another
    others: tuple[tuple[str, str], ...] = ()  # of optional roles, further names that are read


def _same(*roles: str) -> dict[str, str]:
    return {role: role for role in roles}


_ARENA = {"i": "model_a", "j": "model_b"}
LAYOUTS = {
    "triples": Layout(("row", "column", "value"), (), (_same("row", "column", "value"),)),
    "votes": Layout(
        ("i", "j", "wins_i", "wins_j"),
        ("ties", "judge", "prompt"),
        (
            _same("i", "j", "wins_i", "wins_j", "ties", "judge"),
            _ARENA | {"wins_i": "winner_model_a", "wins_j": "winner_model_b", "ties": "winner_tie", "judge": "judge"},
        ),
    ),
    "winners": Layout(
        ("winner", "loser"),
        ("ties", "count", "judge", "prompt"),
        (_same("winner", "loser", "ties", "count", "judge"),),
        (("ties", "tie"), ("ties", "is_tie"), ("count", "weight")),
    ),
    "battles": Layout(
        ("i", "j", "winner"),
        ("count", "judge", "prompt"),
        (_same("i", "j", "winner", "count", "judge"), _ARENA | _same("winner", "count", "judge")),
        (("count", "weight"),),
    ),
    "logits": Layout(("i", "j", "value"), ("prompt",), (_same("i", "j", "value"),)),
}
ROLES = sorted({role for layout in LAYOUTS.values() for role in (*layout.roles, *layout.optional)})
NUMBER_ROLES = ("wins_i", "wins_j", "ties", "count", "value")


class Choice(NamedTuple):
    """A layout, and what the file calls its roles."""

    layout: str
    columns: dict[str, str]  # role -> column

    def __str__(self) -> str:
        return f"{self.layout}: " + ", ".join(f"{role}={name}" for role, name in self.columns.items())


def choose_layout(what: str, found: Sequence[str], layout: str | None, columns: dict[str, str]) -> Choice:
    """Chooses the layout of a table by its header.

    Args:
        what: The file, for messages.
        found: Its columns.
        layout: The name of one; None for the only one that fits.
        columns: Role -> column, where the file calls it otherwise. `prompt` is in use only where it is named here.

    Raises:
        InputError: No layout fits, or several do; a role or a column that is named is not there.
    """
    choice = _choose(what, found, layout, columns)
    named = choice.columns.values()
    if len(set(named)) < len(named):
        raise InputError(f"--columns must name a column for each role, got one twice in {', '.join(named)}")
    return choice


def _choose(what: str, found: Sequence[str], layout: str | None, columns: dict[str, str]) -> Choice:
    if not found:
        raise InputError(f"{what} is empty: it has no column")
    for role in columns:
        if role not in ROLES:
            raise InputError(f"--columns: no layout has a role {role}, only {', '.join(ROLES)}" + hint(role, ROLES))
    for name in columns.values():
        if name not in found:
            raise InputError(f"{what} has no column {name}, found {_listed(found)}" + hint(name, found))
    if layout is not None:
        if wrong := [role for role in columns if role not in (*LAYOUTS[layout].roles, *LAYOUTS[layout].optional)]:
            known = ", ".join((*LAYOUTS[layout].roles, *LAYOUTS[layout].optional))
            raise InputError(f"--columns: {layout} has no role {', '.join(wrong)}, only {known}")
        if choice := _fit(layout, found, columns):
            return choice
        names = [columns.get(role, role) for role in LAYOUTS[layout].roles]
        missing = [name for name in names if name not in found]
        raise InputError(
            f"{what} has no column {', '.join(missing)} for {layout}, found {_listed(found)}" + hint(missing[0], found)
        )
    fitting = [choice for name in LAYOUTS if (choice := _fit(name, found, columns))]
    # A layout all of whose roles are named is meant, whatever other columns the file has.
    named = [choice for choice in fitting if set(LAYOUTS[choice.layout].roles) <= set(columns)]
    if len(named or fitting) == 1:
        return (named or fitting)[0]
    if fitting:
        names = ", ".join(choice.layout for choice in fitting)
        raise InputError(f"{what}: its columns {_listed(found)} fit several layouts, choose with --layout: {names}")
    layouts = "; ".join(f"{name}: {', '.join(one.roles)}" for name, one in LAYOUTS.items())
    raise InputError(f"{what}: its columns {_listed(found)} fit no layout ({layouts}); name them with --columns")


def late_columns(choice: Choice, found: Sequence[str], columns: dict[str, str]) -> frozenset[str]:
    """Returns the usual names of optional roles that nothing in the header has, and that would be read if it had.

    Args:
        choice: What `choose_layout` chose.
        found: The columns that it chose by.
        columns: What it was given as such.
    """
    layout = LAYOUTS[choice.layout]
    usual = {own[role] for own in layout.names for role in layout.optional if role in own}
    usual |= {name for _, name in layout.others}
    return frozenset(name for name in usual.difference(found) if _fit(choice.layout, [*found, name], columns) != choice)


def hint(name: str, found: Sequence[str]) -> str:
    """Returns "; the nearest is NAME", or nothing where none is near."""
    near = nearest(name, found)
    return f"; the nearest is {near[0]}" if near else ""


def _listed(found: Sequence[str]) -> str:
    return ", ".join(repr(name) if "," in name else name for name in found) if found else "none"


def _fit(name: str, found: Sequence[str], columns: dict[str, str]) -> Choice | None:
    """The layout with the columns that are there, or None where one is missing."""
    layout = LAYOUTS[name]
    if not set(columns) <= {*layout.roles, *layout.optional}:
        return None
    for own in layout.names:
        chosen = {role: columns.get(role, own[role]) for role in layout.roles}
        if any(column not in found for column in chosen.values()):
            continue
        taken = set(columns.values()) | set(chosen.values())
        for role in layout.optional:
            if role in columns:
                chosen[role] = columns[role]
                continue
            # a column that is not called ties counts them only beside the wins it belongs to
            belongs = role != "ties" or own[role] == role or own["wins_i"] == chosen["wins_i"]
            usual = [own[role]] if role in own and belongs else []
            usual += [other for its_role, other in layout.others if its_role == role]
            if there := [name for name in usual if name in found and name not in taken]:
                chosen[role] = there[0]
        return Choice(name, chosen)
    return None
