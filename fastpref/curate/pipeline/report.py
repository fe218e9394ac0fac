"""One page about a set of pairs, as Markdown with PNG files and as one HTML file that needs nothing beside it.

It begins with a verdict and what to do first, then shows what goes wrong in practice: sources that score unlike all
others, what the pipeline changed, where in the pools the pairs were picked, pairs that are told apart by their length
alone, margins that do not agree, what was dropped and why. A section whose data is None or empty is left out.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpref._whole_file import whole_file
from fastpref.curate.pipeline.report_sections import (
    MarginPairs,
    PairLengths,
    PickedScores,
    SourceTable,
    number,
    sections_of,
)
from fastpref.errors import InputError

__all__ = [
    "Action",
    "Example",
    "MarginPairs",
    "PairLengths",
    "PickedScores",
    "ReportData",
    "SourceTable",
    "write_report",
]

EXAMPLE_CHARACTERS = 700
GLOSSARY = (
    ("prompt", "what a model was asked"),
    ("response", "one answer to a prompt"),
    ("pool", "all responses to one prompt"),
    ("source", "who wrote a response, usually a model"),
    ("score", "a number that a judge or a reward model gave a response; higher is better"),
    ("pair", "two responses to one prompt, of which one is preferred"),
    ("chosen, rejected", "the preferred response of a pair, and the other one"),
    ("margin", "the score of the chosen response less that of the rejected one; negative where they contradict"),
    ("percentile", "the share of the pool's other responses that score lower"),
    ("z", "how many standard deviations a score is above the mean of its pool"),
    ("unexplained share", "how much of the ups and downs of a source's scores the other sources do not share"),
    ("SFT", "training on the chosen response alone, without comparing"),
)


@dataclass(frozen=True)
class Action:
    """Something to do before training."""

    title: str
    text: str  # what was found, with numbers
    advice: str


@dataclass(frozen=True)
class Example:
    prompt: str
    chosen: str
    rejected: str
    score_chosen: float
    score_rejected: float
    note: str = ""  # why it is shown, where the two come from


@dataclass(frozen=True)
class ReportData:
    title: str
    summary: Mapping[str, object]  # what -> number or text
    verdict: str = ""  # in one sentence
    severity: str = "finding"  # of the worst that was found, which colours the verdict
    actions: Sequence[Action] = ()  # the most urgent first
    findings: Sequence[Action] = ()  # what else there is to know
    scores: PickedScores | None = None
    sources: SourceTable | None = None
    before_after: Sequence[Sequence[object]] = ()  # rows of what, before, after
    margins: MarginPairs | None = None
    counts: Mapping[str, Mapping[str, int]] | None = None  # of what ("prompts", "pairs") -> {"kept": ..., reason: ...}
    lengths: PairLengths | None = None
    rating_scale: Mapping[str, float] | None = None  # losses.rating_scale(gap, beta)._asdict(), with "beta"
    examples: Sequence[Example] = ()
    provenance: Mapping[str, object] | None = None  # input, command, version, seed, date


def write_report(folder, data: ReportData) -> Path:
    """Writes report.md with its PNG files, and report.html, into `folder`; returns the path of the HTML file.

    The folder is made where it does not exist. Every file is whole or not there; the pages come last. Raises InputError
    where matplotlib or jinja2 is missing or the folder cannot be written.
    """
    sections = sections_of(data)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    files = {section.figure.name: section.figure.png for section in sections if section.figure}
    files["report.md"] = _markdown(data, sections).encode("utf-8")
    files["report.html"] = _html(data, sections).encode("utf-8")
    for name, content in files.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(content)
    return folder / "report.html"


def visible(text) -> str:
    """The text with what cannot be seen, such as direction marks, escape codes and half surrogate pairs, as escapes."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\r\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def _shorten(text, most) -> tuple[str, int]:
    """The beginning, and how many characters were cut off."""
    return text[:most], max(len(text) - most, 0)


def _texts(example) -> list[tuple[str, str, str]]:
    """Kind, name and text of the three parts of an example, as they are shown."""
    found = []
    for kind, name, text in (
        ("prompt", "Prompt", example.prompt),
        ("chosen", f"Chosen ({number(float(example.score_chosen))})", example.chosen),
        ("rejected", f"Rejected ({number(float(example.score_rejected))})", example.rejected),
    ):
        shown, cut = _shorten(text, EXAMPLE_CHARACTERS)
        found.append((kind, name + (f", without its last {number(cut)} characters" if cut else ""), visible(shown)))
    return found


def _heading(place, example) -> str:
    return f"Pair {place}" + (f": {example.note}" if example.note else "")


def _numeric(cells, columns) -> list[bool]:
    """[columns] whether a column of a table holds numbers alone, which belong to the right."""
    shape = re.compile(r"–|-?[\d.,]+(e[+-]\d+)?( %)?")
    return [bool(cells) and all(shape.fullmatch(row[column]) for row in cells) for column in range(columns)]


# ---- HTML


def _html(data, sections) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise InputError('the report needs jinja2: pip install "fastpref[cli]"') from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastpref.curate.pipeline", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=visible_markup,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html").render(
        data=data,
        sections=[
            (section, section.figure and base64.b64encode(section.figure.png).decode("ascii")) for section in sections
        ],
        examples=[(_heading(place, example), _texts(example)) for place, example in enumerate(data.examples, start=1)],
        glossary=GLOSSARY,
        cells=lambda rows: [[number(cell) for cell in row] for row in rows],
        numeric=_numeric,
    )


def visible_markup(value):
    """What jinja2 puts into the page: texts that are visible, and what is marked as safe as it is."""
    return value if hasattr(value, "__html__") else visible(value)


# ---- Markdown


def _markdown(data, sections) -> str:
    parts = [f"# {_plain(data.title)}"]
    if data.verdict:
        parts.append(f"**{_plain(data.verdict)}**")
    if data.actions:
        items = (f"{place}. {_plain(_sentence(action))}" for place, action in enumerate(data.actions, start=1))
        parts.append("\n".join(["To do first:", "", *items]))
    if data.findings:
        parts.append("\n".join(["Also found:", "", *(f"- {_plain(_sentence(action))}" for action in data.findings)]))
    parts.append(_markdown_table(["", ""], list(data.summary.items())))
    for section in sections:
        parts.append(f"## {section.title}")
        if section.figure:
            parts.append(f"![{section.figure.description}]({section.figure.name})")
        parts.append(_plain(section.text))
        if section.rows:
            parts.append(_markdown_table(section.head, section.rows))
    if data.examples:
        parts.append("## Examples")
    for place, example in enumerate(data.examples, start=1):
        parts.append(f"### {_plain(_heading(place, example))}")
        for _, name, shown in _texts(example):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
            parts.append(f"{name}:\n\n{fence}text\n{shown}\n{fence}")
    if data.provenance:
        parts += ["## How these pairs were made", _markdown_table(["", ""], list(data.provenance.items()))]
    parts += ["## Words", "\n".join(f"- {term}: {meaning}" for term, meaning in GLOSSARY)]
    return "\n\n".join(parts) + "\n"


def _sentence(action) -> str:
    return f"{action.title}: {action.text}. {action.advice}"


def _plain(text) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _BLOCK.sub(r"\g<1>\\\g<2>", _MARKUP.sub(r"\\\g<0>", visible(" ".join(str(text).split()))))


_MARKUP = re.compile(r"[\\`*#\[\]<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # an underscore within a word is none
_BLOCK = re.compile(r"^(\d*)([-+=.)])(?=[-= ]|$)")  # the mark of a list or a rule; a sign before a number is none


def _markdown_table(head, rows) -> str:
    cells = [[number(cell) for cell in row] for row in rows]
    aligned = ["---:" if numeric else "---" for numeric in _numeric(cells, len(head))]
    lines = [[_plain(cell) for cell in head], aligned, *([_plain(cell) for cell in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
