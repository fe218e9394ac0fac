"""The plots of the report, each as the bytes of a PNG file.

Nothing here touches pyplot or leaves matplotlib's settings changed. Colours are those of Okabe and Ito and matplotlib's
cividis, which colour-blind readers tell apart; marks differ in more than colour.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping

import numpy as np

from fastpref.errors import InputError

POINTS = 3000  # of a scatter plot; more become a density
CELLS = 50  # of a density, along each axis
CHOSEN, REJECTED, POOL, PAIRS, LINE = "#0072B2", "#D55E00", "#B8BCC4", "#7A7F89", "#444444"
DPI = 130
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
}
_CLEAR = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}


def scores(rewards, z, measures, unit) -> bytes:
    """rewards, z: [responses], NaN = none; measures: PairMeasures; unit of the rewards."""
    with _figure(10, 6.6) as (figure, buffer):
        ((raw, standard), (rank, gap)) = figure.subplots(2, 2)
        _distributions(raw, rewards, measures.score_chosen, measures.score_rejected)
        raw.set(title="rewards", xlabel=_literal(unit))
        _distributions(standard, z, measures.z_chosen, measures.z_rejected)
        _note(standard, -2, "mean − 2 std")
        standard.set(title="rewards within the prompt", xlabel="z: standard deviations from the prompt's mean")
        edges = np.linspace(0, 100, 21)
        _outline(rank, measures.percentile_chosen, edges, CHOSEN, "chosen", "-")
        _outline(rank, measures.percentile_rejected, edges, REJECTED, "rejected", "--")
        rank.set(title="rank within the prompt", xlabel="percentage of the prompt's other responses that score lower")
        _filled(gap, measures.gap, _edges(measures.gap), PAIRS)
        if len(measures.gap):
            median = np.median(measures.gap)
            _note(gap, median, f"median {median:.4g}")
        gap.set(title="gap of the pairs", xlabel=f"chosen − rejected, {_literal(unit)}")
        for axes in (raw, standard, rank, gap):
            axes.set_ylabel("share per bin, %")
            _headroom(axes)
        figure.legend(*raw.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return buffer.getvalue()


def sources(names, share, low, high, flagged, chosen) -> bytes:
    """All [sources], from the top; share NaN = not audited."""
    names = [_literal(name if len(name) <= 34 else name[:33] + "…") for name in names]
    place = np.arange(len(names))
    with _figure(10, 1.3 + 0.2 * max(len(names), 4)) as (figure, buffer):
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        groups = ((~flagged, "#5F6673", "o", "not flagged"), (flagged, REJECTED, "D", "flagged"))
        for which, colour, marker, label in groups:
            left.hlines(place[which], low[which], high[which], colors=colour, linewidth=1.4)
            left.plot(share[which], place[which], marker, color=colour, markersize=5, label=label)
            right.barh(place[which], chosen[which], color=colour, height=0.7)
        left.set(title="unexplained share of the variance", xlim=(0, 1), yticks=place, yticklabels=names)
        right.set(title="chosen responses", xlim=(0, 1.15 * max(chosen.max(initial=0), 1)))
        for at, number in zip(place, chosen, strict=True):
            if number:
                right.annotate(f"{number:,}", (number, at), (3, 0), textcoords="offset points", va="center", fontsize=8)
        left.set_ylim(max(len(names), 1) - 0.5, -0.5)
        left.tick_params(axis="y", labelsize=8.5, length=0)
        right.tick_params(axis="y", length=0)
        right.grid(False, axis="y")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.xaxis.set_major_formatter("{x:,.0f}")
        if flagged.any():
            left.legend(loc="lower right", framealpha=0.9, frameon=True, edgecolor="none")
    return buffer.getvalue()


def margins(external, implicit, kept) -> bytes:
    """All [pairs], finite; kept bool."""
    many = len(kept) > POINTS
    with _figure(10 if many else 6.5, 4.4) as (figure, buffer):
        if many:
            panels = figure.subplots(1, 2, sharex=True, sharey=True)
            edges = [np.linspace(*_edges(values)[[0, -1]], CELLS + 1) for values in (external, implicit)]
            every = _cells(external, implicit, edges)
            among = _cells(external[kept], implicit[kept], edges)
            _density(figure, panels[0], every, edges)
            panels[0].set_title(f"all {len(kept):,} pairs")
            share = np.divide(among, every, out=np.full(every.shape, np.nan), where=every > 0)
            _mesh(figure, panels[1], share, edges, "share kept", vmin=0, vmax=1)
            panels[1].set_title(f"{int(kept.sum()):,} kept")
        else:
            panels = [figure.subplots()]
            look = {"markersize": 4, "alpha": 0.7}
            dropped = f"dropped: {(~kept).sum():,}"
            panels[0].plot(external[~kept], implicit[~kept], "o", color=PAIRS, mfc="none", label=dropped, **look)
            panels[0].plot(external[kept], implicit[kept], "o", color=CHOSEN, label=f"kept: {kept.sum():,}", **look)
            figure.legend(loc="outside upper left", ncols=2)
        for axes in panels:
            axes.axhline(0, color=LINE, linewidth=0.8)
            axes.axvline(0, color=LINE, linewidth=0.8)
            axes.set(xlabel="external margin", ylabel="implicit margin")
    return buffer.getvalue()


def counts(table: Mapping[str, Mapping[str, int]]) -> bytes:
    """Of what ("pairs") -> {"kept": number, reason: number, ...}."""
    rows = [max(len(reasons), 1) for reasons in table.values()]
    with _figure(10, sum(0.75 + 0.32 * row for row in rows) + 0.1) as (figure, buffer):
        panels = figure.subplots(len(rows), 1, height_ratios=[1.2 + row for row in rows], squeeze=False)[:, 0]
        for axes, (what, reasons) in zip(panels, table.items(), strict=True):
            numbers, place = np.array(list(reasons.values()), int), np.arange(len(reasons))
            total = numbers.sum()
            axes.barh(place, numbers, color=[CHOSEN if r == "kept" else REJECTED for r in reasons], height=0.7)
            axes.set(title=f"{total:,} {_literal(what)}", yticks=place, yticklabels=[_literal(r) for r in reasons])
            for at, number in zip(place, numbers, strict=True):
                label = f"{number:,} ({100 * number / max(total, 1):.1f} %)"
                axes.annotate(label, (number, at), (4, 0), textcoords="offset points", va="center", fontsize=9)
            axes.set(xlim=(0, 1.18 * max(numbers.max(initial=0), 1)), ylim=(len(place) - 0.4, -0.6))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.tick_params(axis="y", length=0)
            axes.grid(False, axis="y")
    return buffer.getvalue()


def lengths(chosen, rejected, unit) -> bytes:
    """float64 [pairs] each, at least 1: an empty response counts as one character."""
    ratio = chosen / rejected
    with _figure(10, 4.2) as (figure, buffer):
        pair, share = figure.subplots(1, 2)
        both = np.concatenate([chosen, rejected, [10.0]])
        ends = both.min(), both.max()
        if len(chosen) > POINTS:
            edges = [np.geomspace(*ends, CELLS + 1)] * 2
            _density(figure, pair, _cells(rejected, chosen, edges), edges)
        else:
            pair.plot(rejected, chosen, "o", color=CHOSEN, markersize=3.5, alpha=0.45)
        pair.plot(ends, ends, color=LINE, linewidth=1)
        pair.annotate("same length", (ends[0], ends[0]), (14, 4), textcoords="offset points", fontsize=9, bbox=_CLEAR)
        pair.set(title="lengths of the pairs", xscale="log", yscale="log")
        pair.set(xlabel=f"rejected, {_literal(unit)}", ylabel=f"chosen, {_literal(unit)}")
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
            _note(share, np.median(ratio), f"median {np.median(ratio):.3g}×")
        _headroom(share)
    return buffer.getvalue()


@contextlib.contextmanager
def _figure(width, height) -> Iterator[tuple[object, io.BytesIO]]:
    """A figure of so many inches, drawn into the buffer at the end, whatever style and backend the user has set."""
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
        figure.savefig(buffer, format="png", dpi=DPI)


def _literal(text) -> str:
    """Text on one line in which matplotlib sees no formula, and nothing that no font can hold."""
    return " ".join(str(text).encode("utf-8", "replace").decode().split()).replace("$", r"\$")


def _note(axes, x, text) -> None:
    """A vertical line with its name at the top."""
    axes.axvline(x, color=LINE, linewidth=1, linestyle=":")
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(text, (x, 1), (4, -2), va="top", fontsize=9, **place)


def _headroom(axes) -> None:
    """Room above the data for what `_note` writes there."""
    axes.set_ylim(0, 1.1 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)


def _distributions(axes, pool, chosen, rejected) -> None:
    edges = _edges(pool)
    _filled(axes, pool, edges, POOL, "all responses")
    _outline(axes, chosen, edges, CHOSEN, "chosen", "-")
    _outline(axes, rejected, edges, REJECTED, "rejected", "--")


def _filled(axes, values, edges, colour, label=None) -> None:
    axes.stairs(_shares(values, edges), edges, fill=True, color=colour, label=label)


def _outline(axes, values, edges, colour, label, style) -> None:
    shares = _shares(values, edges)
    filled = np.flatnonzero(shares)
    first, last = (filled[0], filled[-1]) if len(filled) else (0, 0)
    look = {"color": colour, "label": label, "linewidth": 1.8, "linestyle": style}
    axes.stairs(shares[first : last + 1], edges[first : last + 2], **look)


def _shares(values, edges) -> np.ndarray:
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


def _cells(x, y, edges) -> np.ndarray:
    """[CELLS, CELLS] numbers of pairs; those beyond the ends count at the edge."""
    inside = [np.clip(values, own[0], own[-1]) for values, own in zip((x, y), edges, strict=True)]
    return np.histogram2d(*inside, bins=edges)[0]


def _density(figure, axes, cells, edges) -> None:
    _mesh(figure, axes, np.where(cells > 0, cells, np.nan), edges, "pairs per cell", norm="log")


def _mesh(figure, axes, cells, edges, label, **look) -> None:
    shown = axes.pcolormesh(*edges, cells.T, cmap="cividis", **look)
    figure.colorbar(shown, ax=axes, label=label)
