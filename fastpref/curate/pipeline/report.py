"""One page about a set of pairs, as Markdown with PNG files and as one HTML file that needs nothing beside it.

It shows what goes wrong in practice: where in the pools the pairs were picked, sources that score unlike all others,
margins that do not agree, what was dropped and why, and pairs that are told apart by their length alone. A section
whose data is None or empty is left out.
"""

import base64
import html
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastpref._whole_file import whole_file
from fastpref.curate.diagnostics import diagnose, pool_z
from fastpref.curate.files.samples import texts
from fastpref.curate.length import LengthReport, length_report
from fastpref.curate.pipeline import report_plots
from fastpref.curate.pipeline.config import CurateConfig
from fastpref.curate.pipeline.scores import primary_field
from fastpref.curate.pipeline.state import State
from fastpref.curate.pools import as_pools
from fastpref.errors import InputError

SOURCES_SHOWN = 30
EXAMPLES_SHOWN = 3  # of a run
EXAMPLE_CHARACTERS = 700


@dataclass(frozen=True)
class PickedScores:
    rewards: np.ndarray  # [prompts, n], or [responses] with offsets; NaN = none
    pairs: object  # PairSelection, or a mapping with "prompt", "chosen", "rejected": [pairs]
    offsets: np.ndarray | None = None
    unit: str = "reward"  # for the axes: "logit of win_prob"


@dataclass(frozen=True)
class SourceTable:
    """Per source, [sources]."""

    names: Sequence[str]
    unexplained: np.ndarray  # share of the source's variance that the others do not explain; NaN where not audited
    low: np.ndarray  # interval of it
    high: np.ndarray
    flagged: np.ndarray  # bool
    chosen: np.ndarray  # int, chosen responses the source supplies, or would have supplied
    confidence: float = 0.9  # of the interval


@dataclass(frozen=True)
class MarginPairs:
    """[pairs], before the selection."""

    external: np.ndarray
    implicit: np.ndarray
    kept: np.ndarray  # bool


@dataclass(frozen=True)
class PairLengths:
    chosen: np.ndarray  # int [pairs]
    rejected: np.ndarray
    unit: str = "characters"
    found: LengthReport | None = None  # of the pairs in their pools; None: what these lengths alone can say


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
    warnings: Sequence[str] = ()
    scores: PickedScores | None = None
    sources: SourceTable | None = None
    margins: MarginPairs | None = None
    counts: Mapping[str, Mapping[str, int]] | None = None  # of what ("prompts", "pairs") -> {"kept": ..., reason: ...}
    lengths: PairLengths | None = None
    rating_scale: Mapping[str, float] | None = None  # losses.rating_scale(gap, beta)._asdict(), with "beta"
    examples: Sequence[Example] = ()


def write_report(folder, data: ReportData) -> Path:
    """Writes report.md with its PNG files, and report.html, into `folder`; returns the path of the HTML file.

    The folder is made where it does not exist. Every file is whole or not there; the pages come last. Raises InputError
    where matplotlib is missing or the folder cannot be written.
    """
    sections = _sections(data)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    files = {section.figure.name: section.figure.png for section in sections if section.figure}
    files["report.md"] = _markdown(data, sections).encode("utf-8", "replace")
    files["report.html"] = _html(data, sections).encode("utf-8", "replace")
    for name, content in files.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(content)
    return folder / "report.html"


# ---- the page of a run


def report_of_run(state: State, config: CurateConfig, summary: dict) -> ReportData:
    """What a run says of its pairs; summary: as in its result."""
    samples, kept = state.samples, state.kept
    pairs, field = state.kept_pairs, primary_field(samples, config)
    audited = summary["stages"].get("audit", {}).get("sources")
    sources = audited and SourceTable(
        names=[row["source"] for row in audited],
        **{key: np.array([row[key] for row in audited], np.float64) for key in ("unexplained", "low", "high")},
        flagged=np.array([row["flagged"] for row in audited], bool),
        chosen=np.array([row["would_supply_chosen"] for row in audited]),
    )
    implicit = state.pairs.get("margin_implicit")
    return ReportData(
        title=f"Pairs of {os.path.basename(samples.path)}",
        summary=_headlines(summary),
        warnings=summary["warnings"],
        scores=PickedScores(
            np.where(state.valid, state.score, np.nan),
            pairs,
            samples.offsets,
            field.name if field.scale == "raw" else f"{field.scale} of {field.name}",
        ),
        sources=sources,
        margins=None if implicit is None else MarginPairs(state.margin(state.score), implicit, kept),
        counts={
            "responses": {"kept": int(state.valid.sum())} | summary["responses_left_out"],
            "pairs": {"kept": summary["pairs"]} | summary["dropped"],
        },
        lengths=PairLengths(
            *(samples.lengths[state.place(side)[kept]] for side in ("chosen", "rejected")),
            unit=config.read.lengths or "characters",
            found=state.length_report(),
        ),
        rating_scale=summary.get("rating_scale"),
        examples=_examples(state, pairs),
    )


def _headlines(summary) -> dict:
    made = summary["stages"]["construct"]
    found = {name.replace("_", " "): summary[name] for name in ("input", "prompts", "responses", "bad_rows", "pairs")}
    routed = summary["stages"].get("route", {})
    if "sft" in routed:
        found["of them to SFT"] = routed["sft"]
    return found | {"rule": made["rule"]}


def _examples(state, pairs) -> list[Example]:
    """Three pairs from all over the file."""
    prompts, first = np.unique(pairs["prompt"], return_index=True)
    shown = np.unique(np.linspace(0, max(len(prompts) - 1, 0), EXAMPLES_SHOWN).astype(np.int64))[: len(prompts)]
    found = []
    for pair, (prompt, responses) in zip(first[shown], texts(state.samples, prompts[shown]), strict=True):
        begin = state.samples.offsets[pairs["prompt"][pair]]
        sides = [pairs[side][pair] for side in ("chosen", "rejected")]
        shown_texts = [_conversation(responses[k]) for k in sides]
        found.append(Example(_conversation(prompt), *shown_texts, *(float(state.score[begin + k]) for k in sides)))
    return found


def _conversation(text) -> str:
    return text if isinstance(text, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in text)


# ---- what the page says


class _Figure(NamedTuple):
    name: str
    png: bytes
    description: str


class _Section(NamedTuple):
    title: str
    text: str
    figure: _Figure | None = None
    head: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    open: bool = True  # whether the table is shown at once


def _sections(data) -> list[_Section]:
    makers = (
        (_scores, data.scores),
        (_sources, data.sources),
        (_margins, data.margins),
        (_counts, data.counts or None),
        (_lengths, data.lengths),
        (_rating_scale, data.rating_scale or None),
    )
    return [make(part) for make, part in makers if part is not None]


def _scores(scores: PickedScores) -> _Section:
    found = diagnose(scores.rewards, scores.pairs, offsets=scores.offsets)
    pools = as_pools("rewards", scores.rewards, offsets=scores.offsets)
    quantiles = ", ".join(f"{_number(100 * q)} %: {_number(value)}" for q, value in found.contrast_quantiles.items())
    text = (
        f"{_number(found.pairs)} pairs of {_number(found.prompts)} prompts. Chosen quality (mean reward of the chosen "
        f"responses) is {_number(found.chosen_quality)}, contrast (mean gap) {_number(found.contrast)}; quantiles of "
        f"the gap: {quantiles}. Rewards are in units of {scores.unit}; z counts standard deviations from the mean of "
        "the prompt's own responses. Values beyond an axis count in its outermost bin."
    )
    rows = [
        ["mean reward", found.chosen_quality, found.rejected_quality],
        ["mean percentile within the pool", found.chosen_percentile, found.rejected_percentile],
        ["mean z within the pool", found.chosen_z, found.rejected_z],
    ]
    png = report_plots.scores(pools.values, pool_z(pools), found.measures, scores.unit)
    figure = _Figure("scores.png", png, "Distributions of all, chosen and rejected rewards")
    return _Section("Scores, and where pairs were picked", text, figure, ["", "chosen", "rejected"], rows)


def _sources(sources: SourceTable) -> _Section:
    names = np.array([str(name) for name in sources.names], object)
    share, low, high = (np.asarray(part, float) for part in (sources.unexplained, sources.low, sources.high))
    flagged, chosen = np.asarray(sources.flagged, bool), np.asarray(sources.chosen)
    _same_length("SourceTable", names=names, unexplained=share, low=low, high=high, flagged=flagged, chosen=chosen)
    order = np.argsort(-np.nan_to_num(share, nan=-1.0), kind="stable")
    names, share, low, high, flagged, chosen = (part[order] for part in (names, share, low, high, flagged, chosen))
    which = f" ({', '.join(names[flagged])}), with {_number(int(chosen[flagged].sum()))} chosen responses"
    text = (
        f"{_number(int(flagged.sum()))} of {_number(len(names))} sources flagged{which if flagged.any() else ''}. "
        "Unexplained is the share of a source's variance over the prompts that the structure of the other sources "
        f"leaves; the bar is its {_number(100 * sources.confidence)} % interval. A source of its own kind is outlying "
        "too: flagged is not guilty."
    )
    if len(names) > SOURCES_SHOWN:
        text += f" The plot shows the {SOURCES_SHOWN} most outlying ones."
    rows = [
        [
            name,
            "–" if math.isnan(at) else f"{at:.3f}",
            "–" if math.isnan(lowest) else f"{lowest:.3f} to {highest:.3f}",
            "flagged" if bad else "not audited" if math.isnan(at) else "",
            int(number),
        ]
        for name, at, lowest, highest, bad, number in zip(names, share, low, high, flagged, chosen, strict=True)
    ]
    png = report_plots.sources(*(part[:SOURCES_SHOWN] for part in (names, share, low, high, flagged, chosen)))
    figure = _Figure("sources.png", png, "Unexplained share of every source, and chosen responses it supplies")
    head = ["source", "unexplained", "interval", "", "chosen responses"]
    return _Section("Sources", text, figure, head, rows, open=False)


def _margins(margins: MarginPairs) -> _Section:
    external, implicit = (np.asarray(part, float) for part in (margins.external, margins.implicit))
    kept = np.asarray(margins.kept, bool)
    _same_length("MarginPairs", external=external, implicit=implicit, kept=kept)
    both = np.isfinite(external) & np.isfinite(implicit)
    x, y = external[both], implicit[both]
    agree = (np.sign(x) == np.sign(y)).mean() if len(x) else math.nan
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    correlation = float(np.corrcoef(x, y)[0, 1]) if varies else math.nan
    text = (
        f"{_number(int(kept.sum()))} of {_number(len(kept))} pairs kept. External margin: difference of the rewards; "
        "implicit: difference of the policy's log-ratios to its reference. Their signs agree on "
        f"{_percent(agree)} of the pairs, their correlation is {_number(round(correlation, 2))}."
    )
    if len(x) > report_plots.POINTS:
        text += " Pairs beyond an axis count in its outermost cells."
    if not both.all():
        text += f" {_number(int((~both).sum()))} pairs lack one of the two."
    png = report_plots.margins(x, y, kept[both])
    figure = _Figure("margins.png", png, "External against implicit margins, kept pairs marked")
    return _Section("External and implicit margins", text, figure)


def _counts(counts: Mapping[str, Mapping[str, int]]) -> _Section:
    worded = {
        what: {str(reason).replace("_", " ").lower(): int(number) for reason, number in reasons.items()}
        for what, reasons in counts.items()
    }
    rows = [
        [what, reason, number, _percent(number / max(sum(reasons.values()), 1))]
        for what, reasons in worded.items()
        for reason, number in reasons.items()
    ]
    figure = _Figure("counts.png", report_plots.counts(worded), "What was kept and what was dropped, by reason")
    return _Section("Kept and dropped", "Each is counted once.", figure, ["of", "", "number", "share"], rows)


def _lengths(lengths: PairLengths) -> _Section:
    chosen, rejected = (np.asarray(part, float) for part in (lengths.chosen, lengths.rejected))
    _same_length("PairLengths", chosen=chosen, rejected=rejected)
    found = lengths.found
    if found is None:
        zero = np.zeros(len(chosen), np.int64)
        pairs = {"prompt": np.arange(len(chosen)), "chosen": zero, "rejected": zero + 1}
        found = length_report(np.stack([chosen, rejected], 1), pairs)._replace(chosen_in_top_decile=math.nan)
    text = (
        f"Taking the longer response for the chosen one is right on {_percent(found.longest_wins)} of the pairs (equal "
        f"lengths count half). The chosen one is {_number(found.median_ratio)} times as long as the rejected one at "
        "the median. Far from 50 %, accuracy on these pairs measures length rather than preference."
    )
    if not math.isnan(found.chosen_in_top_decile):
        text += f" {_percent(found.chosen_in_top_decile)} of the chosen ones are in the longest tenth of their pool."
    if not math.isnan(found.truncated_share):
        text += (
            f" Truncated: {_percent(found.truncated_share)} of all responses, {_percent(found.truncated_chosen)} of "
            f"the chosen and {_percent(found.truncated_rejected)} of the rejected ones."
        )
    png = report_plots.lengths(np.maximum(chosen, 1), np.maximum(rejected, 1), lengths.unit)
    return _Section("Length", text, _Figure("lengths.png", png, "Lengths of chosen and rejected responses"))


_RATING = {
    "beta": "β of the loss",
    "median": "median gap |g| of the pairs that are no ties",
    "std": "standard deviation of the gaps",
    "suggested_beta_rating": "β₁ for RDPO: its offset then starts at a median of ½ nat",
    "suggested_variance": "V for ML-RDPO: its square term then starts at a mean of ½",
    "initial_offset": "median offset in nats that β₁ = 0.3 would give; far above 1 it saturates RDPO",
}


def _rating_scale(scale: Mapping[str, float]) -> _Section:
    rows = [[name, value, _RATING.get(name, "")] for name, value in scale.items()]
    text = "What the scale of the rating gaps means for losses that use them."
    return _Section("Rating scale", text, None, ["", "", ""], rows)


def _same_length(name, **parts) -> None:
    shapes = {field: list(part.shape) for field, part in parts.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or any(shape != first for shape in shapes.values()):
        raise ValueError(f"the arrays of {name} must be vectors of one length, got {shapes}")


def _number(value) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return "–" if math.isnan(value) else f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _percent(share) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _shorten(text, most) -> tuple[str, int]:
    """The beginning, and how many characters were cut off."""
    return text[:most], max(len(text) - most, 0)


# ---- Markdown


def _markdown(data, sections) -> str:
    parts = [f"# {_plain(data.title)}"]
    if data.warnings:
        parts.append("\n".join(["**Warnings**", "", *(f"- {_plain(warning)}" for warning in data.warnings)]))
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
    for number, example in enumerate(data.examples, start=1):
        parts.append(f"### {_plain(_heading(number, example))}")
        for name, text in _texts(example):
            shown, cut = _shorten(text, EXAMPLE_CHARACTERS)
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
            parts.append(f"{name}{_cut(cut)}:\n\n{fence}text\n{shown}\n{fence}")
    return "\n\n".join(parts) + "\n"


def _texts(example) -> list[tuple[str, str]]:
    return [
        ("Prompt", example.prompt),
        (f"Chosen ({_number(float(example.score_chosen))})", example.chosen),
        (f"Rejected ({_number(float(example.score_rejected))})", example.rejected),
    ]


def _heading(number, example) -> str:
    return f"Pair {number}" + (f": {example.note}" if example.note else "")


def _cut(cut) -> str:
    return f", without its last {_number(cut)} characters" if cut else ""


def _plain(text) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _BLOCK.sub(r"\g<1>\\\g<2>", _MARKUP.sub(r"\\\g<0>", " ".join(str(text).split())))


_MARKUP = re.compile(r"[\\`*#\[\]<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # an underscore within a word is none
_BLOCK = re.compile(r"^(\d*)([-+=.)])(?=[-= ]|$)")  # the mark of a list or a rule; a sign before a number is none


def _markdown_table(head, rows) -> str:
    cells = [[_number(cell) for cell in row] for row in rows]
    aligned = ["---:" if numeric else "---" for numeric in _numeric(cells, len(head))]
    lines = [[_plain(cell) for cell in head], aligned, *([_plain(cell) for cell in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numeric(cells, columns) -> list[bool]:
    """[columns] whether a column of a table holds numbers alone, which belong to the right."""
    shape = re.compile(r"–|-?[\d.,]+(e[+-]\d+)?( %)?")
    return [bool(cells) and all(shape.fullmatch(row[column]) for row in cells) for column in range(columns)]


# ---- HTML

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1f; --page: #ffffff; --soft: #5f6368; --line: #d9dce1; --box: #f6f7f9;
  --warn: #fff4e5; --warn-line: #d55e00; --good: #0072b2; --bad: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6ea; --page: #17181c; --soft: #a5a8b0; --line: #3a3d45;
  --box: #212329; --warn: #33251a; --warn-line: #e8823a; --good: #56b4e9; --bad: #e8823a; } }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { max-width: 48rem; }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .6rem 1rem; border-radius: 4px; }
.warnings h2 { border: 0; margin: 0; padding: 0; font-size: 1rem; }
.warnings ul { margin: .3rem 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
summary { cursor: pointer; color: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box); border-left: 4px solid var(--line);
  padding: .6rem .8rem; margin: .3rem 0 .8rem; border-radius: 4px; font: .88rem/1.45 ui-monospace, Menlo, Consolas,
  monospace; }
pre.chosen { border-color: var(--good); } pre.rejected { border-color: var(--bad); }
.name { color: var(--soft); font-size: .9rem; margin: .6rem 0 0; }
"""


def _html(data, sections) -> str:
    title = html.escape(data.title)
    body = [f"<h1>{title}</h1>"]
    if data.warnings:
        items = "".join(f"<li>{html.escape(str(warning))}</li>" for warning in data.warnings)
        body.append(f'<div class="warnings"><h2>Warnings</h2><ul>{items}</ul></div>')
    body.append(_html_table(["", ""], list(data.summary.items())))
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.figure:
            image = base64.b64encode(section.figure.png).decode("ascii")
            body.append(f'<img alt="{html.escape(section.figure.description)}" src="data:image/png;base64,{image}">')
        body.append(f"<p>{html.escape(section.text)}</p>")
        if section.rows:
            table = _html_table(section.head, section.rows)
            fold = f"<details><summary>all {len(section.rows)}</summary>{table}</details>"
            body.append(table if section.open else fold)
    if data.examples:
        body.append("<h2>Examples</h2>")
    for number, example in enumerate(data.examples, start=1):
        body.append(f"<h3>{html.escape(_heading(number, example))}</h3>")
        for kind, (name, text) in zip(("prompt", "chosen", "rejected"), _texts(example), strict=True):
            shown, cut = _shorten(text, EXAMPLE_CHARACTERS)
            body.append(f'<p class="name">{html.escape(name + _cut(cut))}</p>')
            body.append(f'<pre class="{kind}">{html.escape(shown)}</pre>')
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def _html_table(head, rows) -> str:
    cells = [[_number(cell) for cell in row] for row in rows]
    kinds = [' class="number"' if numeric else "" for numeric in _numeric(cells, len(head))]

    def line(texts, tag):
        inner = (f"<{tag}{kind}>{html.escape(text)}</{tag}>" for text, kind in zip(texts, kinds, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    top = line(head, "th") if any(head) else ""
    return f'<div class="wide"><table>{top}{"".join(line(row, "td") for row in cells)}</table></div>'
