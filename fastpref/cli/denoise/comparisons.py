"""Solves comparisons by bradley_terry: one graph, or one for every prompt, small ones of one size as a batch."""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from fastpref import BradleyTerryInfo, Edges, bradley_terry
from fastpref._lowrank.bradley_terry import ridge_doubts
from fastpref._whole_file import format_of
from fastpref.cli.denoise import tables
from fastpref.cli.denoise.options import DenoiseOptions, spread_of
from fastpref.cli.denoise.votes import Comparisons
from fastpref.preference_matrix import from_comparisons
from fastpref.preference_matrix._comparisons import DECISIVE

SHOWN = 3  # judges that are warned of by name
SMALL = 64  # items: up to here graphs of one size are solved as dense batches
BATCH_ENTRIES = 1 << 22  # of such a batch


class _Graphs(NamedTuple):
    """Comparisons, sorted by graph. Items are numbered from 0 in each graph, nodes through all of them."""

    graph: np.ndarray  # [E] int64, graphs by size
    i: np.ndarray  # [E] int64
    j: np.ndarray
    value: np.ndarray  # [E] float64: wins of i, or the logit of i beating j
    back: np.ndarray | None  # [E] wins of j; None: logits
    sizes: np.ndarray  # [graphs] items
    prompt: np.ndarray  # [nodes]
    name: np.ndarray  # [nodes]


class _Fit(NamedTuple):
    """What was found of consecutive graphs."""

    scores: torch.Tensor  # [nodes]
    stderr: torch.Tensor | None
    components: torch.Tensor
    rejected: torch.Tensor
    graph: torch.Tensor  # [K] of the flagged pairs
    pairs: torch.Tensor  # [K, 2] items
    residuals: torch.Tensor
    info: BradleyTerryInfo


def denoise_comparisons(given: Comparisons, options: DenoiseOptions, temporary, progress) -> dict:
    """Solves every graph and writes the scores, the flagged pairs and the plot; returns the summary."""
    data = _by_graph(given)
    progress.begin_stage("graphs", len(data.sizes))
    fits = []
    for fit in _fits(data, options):
        fits.append(fit)
        progress.advance(len(fit.info.converged))
    progress.begin_stage("writing")
    fit = _joined(fits)
    starts = np.cumsum(data.sizes) - data.sizes
    _write_scores(temporary[options.output_file], data, fit, given, options)
    if options.flagged is not None:
        _write_flagged(temporary[options.flagged], data, fit, starts, given, options)
    if options.plot is not None:
        _plot_largest(temporary[options.plot], data, fit, starts, options)
    return _summary(given, data, fit, starts)


def _by_graph(given: Comparisons) -> _Graphs:
    prompt, i, j, names = given.prompt, given.i, given.j, len(given.names)
    nodes, place = np.unique(np.concatenate([prompt * names + i, prompt * names + j]), return_inverse=True)
    sizes = np.bincount(nodes // names)
    starts = np.cumsum(sizes) - sizes
    by_size = np.argsort(sizes, kind="stable")
    graph_of = np.argsort(by_size)  # of a prompt
    i, j = place[: len(i)] - starts[prompt], place[len(i) :] - starts[prompt]
    graph = graph_of[prompt]
    order = np.argsort(graph, kind="stable")
    node_order = np.argsort(graph_of[nodes // names], kind="stable")
    nodes = nodes[node_order]
    return _Graphs(
        graph[order],
        i[order],
        j[order],
        given.value[order],
        None if given.back is None else given.back[order],
        sizes[by_size],
        nodes // names,
        nodes % names,
    )


def _joined(fits: list[_Fit]) -> _Fit:
    """Joins the fits of consecutive graphs."""

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(fit, name) for fit in fits])

    return _Fit(
        scores=joined("scores"),
        stderr=None if fits[0].stderr is None else joined("stderr"),
        components=joined("components"),
        rejected=joined("rejected"),
        graph=joined("graph"),
        pairs=joined("pairs"),
        residuals=joined("residuals"),
        info=BradleyTerryInfo(*(torch.cat(parts) for parts in zip(*(fit.info for fit in fits), strict=True))),
    )


def _write_scores(path, data: _Graphs, fit: _Fit, given: Comparisons, options: DenoiseOptions) -> None:
    order = np.lexsort((data.name, data.prompt))  # prompts and items as they appear in the input
    columns = {"prompt": given.prompts.take(data.prompt[order])} if given.prompts is not None else {}
    columns |= {"item": given.names.take(data.name[order]), "score": fit.scores[order]}
    if fit.stderr is not None:
        columns["stderr"] = fit.stderr[order]
    columns |= {"component": fit.components[order], "rejected": fit.rejected[order]}
    tables.write_table(path, format_of(options.output_file), [tables.to_table(columns)], options.csv_safe)


def _write_flagged(path, data: _Graphs, fit: _Fit, starts, given: Comparisons, options: DenoiseOptions) -> None:
    i, j = (starts[fit.graph] + fit.pairs[:, side].numpy() for side in (0, 1))
    order = np.lexsort((data.name[j], data.name[i], data.prompt[i]))
    columns = {"prompt": given.prompts.take(data.prompt[i][order])} if given.prompts is not None else {}
    columns |= {side: given.names.take(data.name[node][order]) for side, node in (("i", i), ("j", j))}
    columns["residual"] = fit.residuals[order]
    tables.write_table(path, format_of(options.flagged), [tables.to_table(columns)], options.csv_safe)


def _plot_largest(path, data: _Graphs, fit: _Fit, starts, options: DenoiseOptions) -> None:
    from fastpref.cli.denoise.plots import plot_scores

    flagged = fit.graph == len(data.sizes) - 1
    nodes = slice(int(starts[-1]), None)
    stderr = None if fit.stderr is None else fit.stderr[nodes]
    format = format_of(options.plot)[1:]
    plot_scores(path, fit.scores[nodes], stderr, fit.pairs[flagged], fit.residuals[flagged], format)


def _fits(data: _Graphs, options: DenoiseOptions) -> Iterator[_Fit]:
    """Solves all graphs in order: small ones of one size together, the others one by one."""
    keywords = options.given("robust", "stderr", "tol", "max_iter") | {"outliers": "pairs"}
    alone = data.sizes > SMALL
    if data.back is None:  # of one pair a matrix has one logit
        low, high, most = np.minimum(data.i, data.j), np.maximum(data.i, data.j), data.sizes[-1]
        _, first, count = np.unique((data.graph * most + low) * most + high, return_index=True, return_counts=True)
        alone[data.graph[first[count > 1]]] = True
    begin = 0
    while begin < len(data.sizes):
        size, end = int(data.sizes[begin]), begin + 1
        while (
            not alone[begin] and end < len(data.sizes) and data.sizes[end] == size and not alone[end]
            and (end + 1 - begin) * size * size <= BATCH_ENTRIES
        ):  # fmt: skip
            end += 1
        edges = slice(*np.searchsorted(data.graph, (begin, end)))
        solve = _solve_alone if alone[begin] else _solve_batch
        with warnings.catch_warnings():  # said once of all graphs, by `_summary`
            warnings.filterwarnings("ignore", ".* ridge of ", RuntimeWarning)
            fit = solve(data, edges, begin, end, keywords)
        yield fit
        begin = end


def _solve_alone(data: _Graphs, edges: slice, begin: int, end: int, keywords) -> _Fit:
    i, j, value = (torch.from_numpy(column[edges]) for column in (data.i, data.j, data.value))
    if data.back is None:
        given = Edges(i, j, logits=value, num_items=int(data.sizes[begin]))
    else:
        given = Edges(i, j, value, torch.from_numpy(data.back[edges]), num_items=int(data.sizes[begin]))
    found = bradley_terry(edges=given, **keywords)
    pairs, residuals = found.outliers
    graph = torch.full((len(pairs),), begin)
    info = BradleyTerryInfo(*(number.unsqueeze(0) for number in found.info))
    return _Fit(found.scores, found.stderr, found.components, found.rejected, graph, pairs, residuals, info)


def _solve_batch(data: _Graphs, edges: slice, begin: int, end: int, keywords) -> _Fit:
    size = int(data.sizes[begin])
    graph, i, j, value = (column[edges] for column in (data.graph - begin, data.i, data.j, data.value))
    if data.back is None:
        matrix = np.full((end - begin, size, size), np.nan)
        matrix[graph, i, j], matrix[graph, j, i] = value, -value
        found = bradley_terry(torch.from_numpy(matrix), **keywords)
    else:
        matrix = np.zeros((end - begin, size, size))
        np.add.at(matrix, (graph, i, j), value)
        np.add.at(matrix, (graph, j, i), data.back[edges])
        found = bradley_terry(wins=torch.from_numpy(matrix), **keywords)
    (indices, residuals) = found.outliers
    stderr = None if found.stderr is None else found.stderr.flatten()
    per_node = (found.scores.flatten(), stderr, found.components.flatten(), found.rejected.flatten())
    return _Fit(*per_node, indices[:, 0] + begin, indices[:, 1:], residuals, found.info)


def _summary(given: Comparisons, data: _Graphs, fit: _Fit, starts) -> dict:
    info, messages = fit.info, []
    if not info.converged.all():
        count = int((~info.converged).sum())
        messages.append(f"{count} of {len(info.converged)} graphs did not converge: raise --max-iter")
    parts = np.maximum.reduceat(fit.components.numpy(), starts) + 1
    if (parts > 1).any():
        messages.append(
            f"the comparisons of {int((parts > 1).sum())} of {len(parts)} graphs fall apart into unconnected parts: "
            "scores compare only within a component"
        )
    messages += ridge_doubts(info.separated, info.ridge_share)
    shown = BradleyTerryInfo(*(number[0] for number in info)) if given.prompts is None else info
    judges, said = (None, []) if given.judges is None else _judges(given)
    return {
        "kind": "comparisons",
        "graphs": len(data.sizes),
        "items": len(data.name),
        "comparisons": len(given.i) - given.unused,
        "unused": given.unused,
        "ties": given.ties,
        "judges": judges,
        "components": int(parts.sum()),
        "converged": bool(info.converged.all()),
        "not_converged": int((~info.converged).sum()),
        "iterations": spread_of(shown.iterations),
        "outlier_rate": spread_of(shown.outlier_rate),
        "noise_scale": spread_of(shown.scale),
        "separated": int(info.separated.sum()),
        "flagged": len(fit.residuals),
        "warnings": messages + said,
        "notes": given.notes,
    }


def _judges(given: Comparisons) -> tuple[dict, list[str]]:
    """How many judges there are, and how they take the order of presentation; warnings of those who favour one."""
    found = {"number": len(given.judges)}
    if not given.ordered:  # winner and loser say nothing about who was shown first
        return found, []
    votes = given.value + given.back
    used = votes > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of judges by their numbers; here they have names
        columns = (given.i[used], given.j[used], given.value[used])
        report = from_comparisons(
            *columns, votes=votes[used], prompt=given.prompt[used], judge=given.judge[used], num_items=len(given.names)
        ).judges
    found |= {name: spread_of(getattr(report, name)) for name in ("votes", "inconsistency", "first_advantage", "z")}
    partial = (report.z.abs() > DECISIVE).nonzero().flatten().tolist()
    names = [given.judges[k].as_py() for k in partial[:SHOWN]]
    said = [
        f"judge {name} favours the item shown {'first' if report.order_effect[k] > 0 else 'second'} by "
        f"{abs(float(report.order_effect[k])):.2f} logits (z = {float(report.z[k]):.1f})"
        for name, k in zip(names, partial, strict=False)
    ]
    if len(partial) > SHOWN:
        said.append(f"{len(partial) - SHOWN} more judges favour an order of presentation (|z| > {DECISIVE:g})")
    return found, said
