"""One page about a set of pairs, as Markdown with PNG files and as one HTML file that needs nothing beside it.

It shows what goes wrong in practice: where in the pools the pairs were picked, sources that score unlike all others,
margins that do not agree, what was dropped and why, and pairs that are told apart by their length alone. A section
whose data is None is left out.
"""

import base64
import contextlib
import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastpref.curate.diagnostics import Diagnosis, diagnose, pool_z
from fastpref.curate.pools import as_pools
from fastpref.curate.samples import InputError

SOURCES_SHOWN = 40
EXAMPLE_CHARACTERS = 700
POINTS = 3000  # of a scatter plot; more become a density


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
    from fastpref.denoise.files import whole_file

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
        (_counts, data.counts),
        (_lengths, data.lengths),
        (_rating_scale, data.rating_scale),
    )
    return [make(part) for make, part in makers if part is not None]


def _scores(scores: PickedScores) -> _Section:
    found = diagnose(scores.rewards, scores.pairs, offsets=scores.offsets)
    quantiles = ", ".join(f"{_number(100 * q)} %: {_number(value)}" for q, value in found.contrast_quantiles.items())
    rows = [
        ["mean reward", found.chosen_quality, found.rejected_quality],
        ["mean percentile within the pool", found.chosen_percentile, found.rejected_percentile],
        ["mean z within the pool", found.chosen_z, found.rejected_z],
    ]
    return _Section(
        "Scores, and where pairs were picked",
        f"{_number(found.pairs)} pairs of {_number(found.prompts)} prompts. Chosen quality (mean reward of the chosen "
        f"responses) is {_number(found.chosen_quality)}, contrast (mean gap) {_number(found.contrast)}; quantiles of "
        f"the gap: {quantiles}. Rewards are in units of {scores.unit}; z counts standard deviations from the mean of "
        "the prompt's own responses.",
        _Figure("scores.png", _draw_scores(scores, found), "Distributions of all, chosen and rejected rewards"),
        ["", "chosen", "rejected"],
        rows,
    )


def _sources(sources: SourceTable) -> _Section:
    order = np.argsort(-np.nan_to_num(np.asarray(sources.unexplained, float), nan=-1.0), kind="stable")
    flagged = [sources.names[at] for at in order if sources.flagged[at]]
    supplied = int(np.asarray(sources.chosen)[np.asarray(sources.flagged, bool)].sum())
    text = (
        f"{_count(len(flagged), 'source')} of {len(order)} flagged"
        + (f" ({', '.join(flagged)}), with {_number(supplied)} chosen responses" if flagged else "")
        + ". Unexplained is the share of a source's variance over the prompts that the structure of the other sources "
        "leaves; the bar is its interval. A source of its own kind is outlying too: flagged is not guilty."
    )
    if len(order) > SOURCES_SHOWN:
        text += f" The plot shows the {SOURCES_SHOWN} most outlying ones."
    rows = [
        [
            str(sources.names[at]),
            _share_text(sources.unexplained[at]),
            f"{_share_text(sources.low[at])} to {_share_text(sources.high[at])}"
            if np.isfinite(sources.low[at])
            else "–",
            "flagged" if sources.flagged[at] else "" if np.isfinite(sources.unexplained[at]) else "not audited",
            int(sources.chosen[at]),
        ]
        for at in order
    ]
    figure = _Figure("sources.png", _draw_sources(sources, order[:SOURCES_SHOWN]), "Unexplained share of every source")
    head = ["source", "unexplained", "interval", "", "chosen responses"]
    return _Section("Sources", text, figure, head, rows, open=False)


def _margins(margins: MarginPairs) -> _Section:
    kept = np.asarray(margins.kept, bool)
    both = np.isfinite(margins.external) & np.isfinite(margins.implicit)
    x, y = margins.external[both], margins.implicit[both]
    agree = ((x > 0) == (y > 0)).mean() if len(x) else math.nan
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    correlation = float(np.corrcoef(x, y)[0, 1]) if varies else math.nan
    text = (
        f"{_number(int(kept.sum()))} of {_number(len(kept))} pairs kept. External margin: difference of the rewards; "
        "implicit: difference of the policy's log-ratios to its reference. Their signs agree on "
        f"{_percent(agree)} of the pairs, their correlation is {_number(round(correlation, 2))}."
    )
    figure = _Figure("margins.png", _draw_margins(margins), "External against implicit margins, kept pairs marked")
    return _Section("External and implicit margins", text, figure)


def _counts(counts: Mapping[str, Mapping[str, int]]) -> _Section:
    rows = [
        [what, _words(reason), number, _percent(number / max(sum(reasons.values()), 1))]
        for what, reasons in counts.items()
        for reason, number in reasons.items()
    ]
    figure = _Figure("counts.png", _draw_counts(counts), "What was kept and what was dropped, by reason")
    return _Section(
        "Kept and dropped", "Every prompt, response or pair is counted once.", figure, ["of", "", "number", ""], rows
    )


def _lengths(lengths: PairLengths) -> _Section:
    ratio = _ratio(lengths)
    longest_wins = _percent((ratio > 1).mean() + (ratio == 1).mean() / 2 if len(ratio) else math.nan)
    text = (
        f"Taking the longer response for the chosen one is right on {longest_wins} of the pairs (equal lengths count "
        f"half). The chosen one is {_number(np.median(ratio) if len(ratio) else math.nan)} times as long as the "
        "rejected one at the median. Far from 50 %, accuracy on these pairs measures length rather than preference."
    )
    return _Section("Length", text, _Figure("lengths.png", _draw_lengths(lengths), "Lengths of chosen and rejected"))


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


def _ratio(lengths) -> np.ndarray:
    """[pairs] chosen over rejected; an empty response counts as one character."""
    return np.maximum(lengths.chosen, 1) / np.maximum(lengths.rejected, 1)


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


def _share_text(share) -> str:
    return "–" if math.isnan(share) else f"{share:.3f}"


def _count(number, thing) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _words(reason) -> str:
    return str(reason).replace("_", " ").lower()


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
    return _MARKUP.sub(r"\\\g<0>", " ".join(str(text).split()))


_MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # an underscore within a word is none


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


# ---- plots; colours of Okabe and Ito, which colour-blind readers tell apart

CHOSEN, REJECTED, POOL, PAIRS, LINE = "#0072B2", "#D55E00", "#B8BCC4", "#7A7F89", "#444444"
_CLEAR = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
_LOOK = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E6EA",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar in a source's name is a dollar
}


@contextlib.contextmanager
def _figure(width, height) -> Iterator[tuple[object, io.BytesIO]]:
    """A figure of that many inches that is drawn into the buffer at the end, whatever style and backend are set."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('the report needs matplotlib: pip install "fastpref[cli]"') from error
    buffer = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # names in any script
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, buffer
        figure.savefig(buffer, format="png", dpi=130)


def _draw_scores(scores: PickedScores, found: Diagnosis) -> bytes:
    pools = as_pools("rewards", scores.rewards, offsets=scores.offsets)
    measures = found.measures
    with _figure(10, 6.6) as (figure, buffer):
        ((raw, standard), (rank, gap)) = figure.subplots(2, 2)
        _shares(raw, pools.values, measures.score_chosen, measures.score_rejected)
        raw.set(title="rewards", xlabel=scores.unit)
        _shares(standard, pool_z(pools), measures.z_chosen, measures.z_rejected)
        _note(standard, -2, "mean − 2 std")
        standard.set(title="rewards within the prompt", xlabel="z: standard deviations from the prompt's mean")
        edges = np.linspace(0, 100, 21)
        _outline(rank, measures.percentile_chosen, edges, CHOSEN, "chosen", "-")
        _outline(rank, measures.percentile_rejected, edges, REJECTED, "rejected", "--")
        rank.set(title="rank within the prompt", xlabel="percentage of the prompt's other responses that score lower")
        edges = _edges(measures.gap)
        _filled(gap, measures.gap, edges, PAIRS)
        if found.pairs:
            median = float(np.median(measures.gap))
            _note(gap, median, f"median {_number(median)}")
        gap.set(title="gap of the pairs", xlabel=f"chosen − rejected, {scores.unit}")
        for axes in (raw, standard, rank, gap):
            axes.set_ylabel("share per bin, %")
            _headroom(axes)
        figure.legend(*raw.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return buffer.getvalue()


def _note(axes, x, text) -> None:
    """A vertical line with its name at the top."""
    axes.axvline(x, color=LINE, linewidth=1, linestyle=":")
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(text, (x, 1), (4, -2), va="top", fontsize=9, **place)


def _headroom(axes) -> None:
    """Room above the data for what `_note` writes there."""
    axes.set_ylim(0, 1.1 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)


def _shares(axes, pool, chosen, rejected) -> None:
    edges = _edges(pool)
    _filled(axes, pool, edges, POOL, "all responses")
    _outline(axes, chosen, edges, CHOSEN, "chosen", "-")
    _outline(axes, rejected, edges, REJECTED, "rejected", "--")


def _filled(axes, values, edges, colour, label=None) -> None:
    axes.stairs(_share(values, edges), edges, fill=True, color=colour, label=label)


def _outline(axes, values, edges, colour, label, style) -> None:
    share = _share(values, edges)
    filled = np.flatnonzero(share)
    first, last = (filled[0], filled[-1]) if len(filled) else (0, 0)
    style = {"color": colour, "label": label, "linewidth": 1.8, "linestyle": style}
    axes.stairs(share[first : last + 1], edges[first : last + 2], **style)


def _share(values, edges) -> np.ndarray:
    """Percentage of the values in every bin; those beyond the ends count in the first and the last."""
    values = values[np.isfinite(values)]
    return 100 * np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / max(len(values), 1)


def _edges(values, bins=60) -> np.ndarray:
    """One bin per value where there are few, else equal ones; a tail that would squeeze the rest is cut."""
    values = values[np.isfinite(values)]
    if not len(values):
        return np.linspace(0, 1, bins + 1)
    if len(np.unique(values[:100_000])) <= 30 and len(distinct := np.unique(values)) <= 30:
        middle = (distinct[1:] + distinct[:-1]) / 2
        half = np.diff(distinct).min() / 2 if len(distinct) > 1 else 0.5
        return np.concatenate([[distinct[0] - half], middle, [distinct[-1] + half]])
    low, high = values.min(), values.max()
    inner_low, inner_high = np.quantile(values, [0.002, 0.998])
    if high - low > 2 * (inner_high - inner_low) > 0:
        low, high = inner_low, inner_high
    return np.linspace(low, high, bins + 1)


def _draw_sources(sources: SourceTable, order) -> bytes:
    names = [name if len(name) <= 34 else name[:33] + "…" for name in (str(sources.names[at]) for at in order)]
    place = np.arange(len(order))
    share, low, high = (np.asarray(part, float)[order] for part in (sources.unexplained, sources.low, sources.high))
    flagged, chosen = np.asarray(sources.flagged, bool)[order], np.asarray(sources.chosen)[order]
    with _figure(10, 1.3 + 0.2 * max(len(order), 4)) as (figure, buffer):
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        for which, colour, marker, label in (
            (~flagged, "#5F6673", "o", "not flagged"),
            (flagged, REJECTED, "D", "flagged"),
        ):
            left.hlines(place[which], low[which], high[which], colors=colour, linewidth=1.4)
            left.plot(share[which], place[which], marker, color=colour, markersize=5, label=label)
            right.barh(place[which], chosen[which], color=colour, height=0.7)
        left.set(title="unexplained share of the variance, with interval", xlim=(0, 1), yticks=place, yticklabels=names)
        right.set(title="chosen responses", xlim=(0, 1.15 * max(chosen.max(initial=0), 1)))
        for at, number in zip(place, chosen, strict=True):
            if number:
                right.annotate(f"{number:,}", (number, at), (3, 0), textcoords="offset points", va="center", fontsize=8)
        left.set_ylim(len(order) - 0.5, -0.5)
        left.tick_params(axis="y", labelsize=8.5, length=0)
        right.tick_params(axis="y", length=0)
        right.grid(False, axis="y")
        if flagged.any():
            left.legend(loc="lower right")
    return buffer.getvalue()


def _draw_margins(margins: MarginPairs) -> bytes:
    kept = np.asarray(margins.kept, bool)
    both = np.isfinite(margins.external) & np.isfinite(margins.implicit)
    x, y, kept = margins.external[both], margins.implicit[both], kept[both]
    labels = {"xlabel": "external margin", "ylabel": "implicit margin"}
    many = len(x) > POINTS
    with _figure(10 if many else 6.5, 4.6) as (figure, buffer):
        panels = figure.subplots(1, 2, sharex=True, sharey=True) if many else [figure.subplots()]
        if many:
            limits = [edge for values in (x, y) for edge in _edges(values)[[0, -1]]]
            for axes, which, name in zip(panels, (np.ones_like(kept), kept), ("all pairs", "kept pairs"), strict=True):
                shown = axes.hexbin(
                    x[which], y[which], gridsize=45, extent=limits, mincnt=1, bins="log", cmap="cividis", linewidths=0
                )
                figure.colorbar(shown, ax=axes, label="pairs per cell")
                axes.set(title=f"{name}: {which.sum():,}", **labels)
        else:
            panels[0].plot(
                x[~kept], y[~kept], "o", color=POOL, markersize=4, alpha=0.7, label=f"dropped: {(~kept).sum():,}"
            )
            panels[0].plot(x[kept], y[kept], "o", color=CHOSEN, markersize=4, alpha=0.7, label=f"kept: {kept.sum():,}")
            panels[0].set(**labels)
            figure.legend(loc="outside upper left", ncols=2)
        for axes in panels:
            axes.axhline(0, color=LINE, linewidth=0.8)
            axes.axvline(0, color=LINE, linewidth=0.8)
    return buffer.getvalue()


def _draw_counts(counts: Mapping[str, Mapping[str, int]]) -> bytes:
    rows = [max(len(reasons), 1) for reasons in counts.values()]
    with _figure(10, sum(0.75 + 0.32 * row for row in rows)) as (figure, buffer):
        panels = figure.subplots(len(rows), 1, height_ratios=[1.2 + row for row in rows], squeeze=False)[:, 0]
        for axes, (what, reasons) in zip(panels, counts.items(), strict=True):
            numbers = np.array(list(reasons.values()))
            total = numbers.sum()
            place = np.arange(len(numbers))
            colours = [CHOSEN if reason == "kept" else REJECTED for reason in reasons]
            axes.barh(place, numbers, color=colours, height=0.7)
            axes.set(title=f"{total:,} {what}", yticks=place, yticklabels=[_words(reason) for reason in reasons])
            for at, number in zip(place, numbers, strict=True):
                label = f"{number:,} ({_percent(number / max(total, 1))})"
                axes.annotate(label, (number, at), (4, 0), textcoords="offset points", va="center", fontsize=9)
            axes.set(xlim=(0, 1.18 * max(numbers.max(initial=0), 1)), ylim=(len(numbers) - 0.4, -0.6))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.tick_params(axis="y", length=0)
            axes.grid(False, axis="y")
    return buffer.getvalue()


def _draw_lengths(lengths: PairLengths) -> bytes:
    chosen, rejected = (np.maximum(part, 1).astype(float) for part in (lengths.chosen, lengths.rejected))
    ratio = _ratio(lengths)
    with _figure(10, 4.2) as (figure, buffer):
        pair, share = figure.subplots(1, 2)
        if len(chosen) > POINTS:
            look = {"gridsize": 45, "mincnt": 1, "bins": "log", "cmap": "cividis", "linewidths": 0}
            shown = pair.hexbin(rejected, chosen, xscale="log", yscale="log", **look)
            figure.colorbar(shown, ax=pair, label="pairs per cell")
        else:
            pair.loglog(rejected, chosen, "o", color=CHOSEN, markersize=3.5, alpha=0.45)
        both = np.concatenate([chosen, rejected, [10.0]])
        ends = both.min(), both.max()
        pair.plot(ends, ends, color=LINE, linewidth=1)
        pair.annotate("same length", (ends[0], ends[0]), (14, 4), textcoords="offset points", fontsize=9, bbox=_CLEAR)
        pair.set(title="lengths of the pairs", xlabel=f"rejected, {lengths.unit}", ylabel=f"chosen, {lengths.unit}")
        for axis in (pair.xaxis, pair.yaxis):
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_formatter("")
        least, most = np.floor(np.log2(ratio).min(initial=-1)), np.ceil(np.log2(ratio).max(initial=1))
        _filled(share, ratio, np.exp2(np.linspace(least, most, 61)), PAIRS)
        share.set_xscale("log", base=2)
        share.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}×" if x >= 1 else f"1/{1 / x:,.0f}")
        share.xaxis.set_minor_formatter("")
        share.axvline(1, color=LINE, linewidth=1)
        share.set(title="chosen over rejected", xlabel="ratio of the lengths", ylabel="share per bin, %")
        if len(ratio):
            median = float(np.median(ratio))
            _note(share, median, f"median {_number(median)}×")
        _headroom(share)
    return buffer.getvalue()
