"""Robust Bradley-Terry scores from pairwise data: dense matrices (batched) or edge lists; no singular value anywhere.

A Bradley-Terry logit matrix is m_ij = w_i - w_j. Corrupted entries are down-weighted instead of separated:
logits by Cauchy weights 1 / (1 + (r/c)^2) of the residual r = m_ij - (w_i - w_j), with c annealed from twice the mean
|m| down to 2.4 noise scales (1.4826 median |r|); win counts by the same weights of the standardised residual of the
Bradley-Terry likelihood, c annealed from 20 to 3. Each iteration solves a Laplacian system of the comparison graph.
The reference is the specification; it works on any device and in any precision. The native kernels hold a small
matrix in cache for its whole solve, matrices in parallel, and run the rows of large problems in parallel.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks, _library, _native, operators
from fastpref._lowrank.noise import MAD, OUTLIER

LARGEST_DENSE = 512  # items; above, a matrix's observed pairs are solved as edges
# of logits: the annealing's constant, in units of the mean |logit|, below which it is known which ones are wrong: what
# they still pull falls with its square
EARLY, DECAY, LATE_DECAY = 0.1, 0.7, 0.4
RIDGE = 1e-2  # of counts without a maximum of their likelihood, and of every robust fit of counts; as in the kernels
RULES = 0.05  # share of the pull on the scores that the ridge may have before it is said to rule them
LARGEST_STDERR = 4096  # items of an edge list: the pseudo-inverse is dense
DATA = ("logits", "counts", "counts_mle")
# columns of the statistics, csrc/bradley_terry.h
STATS = (
    "iterations", "converged", "scale", "outlier_rate", "gradient", "constant", "threshold", "ridge",
    "worst", "worst_row", "worst_column", "largest",
)  # fmt: skip
_AT = {name: index for index, name in enumerate(STATS)}


class Edges(NamedTuple):
    """Comparisons as a list: item i[e] against item j[e], with votes for each, or with the logit of i beating j.

    i, j: [E] int64 in [0, num_items). wins_i, wins_j: [E] counts, pairs may repeat; or logits: [E].
    """

    __module__ = "fastpref"

    i: Tensor
    j: Tensor
    wins_i: Tensor | None = None
    wins_j: Tensor | None = None
    logits: Tensor | None = None
    num_items: int = 0


class BradleyTerryInfo(NamedTuple):
    """Per matrix: iterations int64, converged bool, and in float64:

    scale: 1.4826 * median |residual|, rounded up by at most 0.8 %; of counts standardised by their binomial deviation
    outlier_rate: share of the compared pairs whose |residual| exceeds `threshold`
    gradient: largest |gradient| / degree of an item, in units of the mean |logit| (counts: in logits); 0 at a fit
    threshold: 5 * scale, at least 1e-5 (float64: 1e-6) of the mean |logit|; for counts 5 * max(scale, 1)
    separated: bool, of counts: the likelihood has no maximum, and the ridge alone keeps the scores finite
    ridge_share: of counts: the share that the ridge has of the pull on the scores, by which they are too small
    """

    __module__ = "fastpref"

    iterations: Tensor
    converged: Tensor
    scale: Tensor
    outlier_rate: Tensor
    gradient: Tensor
    threshold: Tensor
    separated: Tensor
    ridge_share: Tensor


class PairOutliers(NamedTuple):
    """Compared pairs beyond the threshold: indices [K, d] int64 (batch indices, then i < j), residuals [K] float64.

    The residual of a logit is m_ij - (w_i - w_j); of counts, the wins of i above their expectation in standard
    deviations.
    """

    indices: Tensor
    residuals: Tensor


class BradleyTerryResult(NamedTuple):
    __module__ = "fastpref"

    scores: Tensor  # [..., N], mean 0 in each component, NaN: an item without comparisons
    info: BradleyTerryInfo
    stderr: Tensor | None  # [..., N] float64
    outliers: PairOutliers | None
    components: Tensor  # [..., N] int64, numbered from 0 by their first items
    rejected: Tensor  # [..., N] float64, share of the item's pairs that are outliers


class _Options(NamedTuple):
    """What an operator takes beside its tensors."""

    data: str  # one of DATA
    tol: float | None  # None: by the dtype
    max_iter: int
    backend: str


class _Fits(NamedTuple):
    """What an operator returns, of B matrices or one list of edges."""

    scores: Tensor  # [B, N] or [N], float64
    components: Tensor  # [B, N] or [N], int64
    rejected: Tensor  # [B, N] or [N], float64
    stats: Tensor  # [B or 1, len(STATS)] float64


class _Directed(NamedTuple):
    """Pairs of items in both directions, by rows (CSR)."""

    offsets: Tensor  # [N + 1] int64
    columns: Tensor  # [2 E] int32
    values: Tensor  # [2 E] float64: logits, or shares of wins
    votes: Tensor  # [2 E] float64, 0 for logits


# ---- reference ----


def pair_terms(value: Tensor, votes: Tensor, difference: Tensor, data: str, constant):
    """Residual (counts: standardised), pull on w_i, and Laplacian weight of pairs with w_i - w_j = difference."""
    if data == "logits":
        residual = value - difference
        weight = 1 / (1 + (residual / constant) ** 2)
        return residual, weight * residual, weight
    share = torch.sigmoid(difference)
    variance = share * (1 - share)
    miss = (value - share) * votes
    residual = miss / (variance * votes + 0.25).sqrt()
    weight = 1 / (1 + (residual / constant) ** 2) if data == "counts" else torch.ones_like(miss)
    return residual, weight * miss, weight * votes * variance


class _Graph:
    """Directed entries of many graphs at once; sums per node and per graph, in the order of the entries."""

    def __init__(self, rows: Tensor, columns: Tensor, nodes: int, graphs: int):
        self.rows, self.columns, self.nodes, self.graphs = rows, columns, nodes, graphs
        self.graph = torch.arange(nodes, device=rows.device) // max(nodes // max(graphs, 1), 1)  # of a node
        self.entry_graph = self.graph[rows]
        self.observed = torch.bincount(self.entry_graph, minlength=graphs)
        self.compared = torch.bincount(rows, minlength=nodes)

    def per_node(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.nodes).index_add_(0, self.rows, x)

    def per_graph(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.graphs).index_add_(0, self.graph, x)

    def largest(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.graphs).scatter_reduce(0, self.graph, x, "amax")

    def median(self, x: Tensor) -> Tensor:
        """Lower median of the entries of each graph, NaN where there are none."""
        order = x.argsort()
        order = order[self.entry_graph[order].argsort(stable=True)]
        middle = self.observed.cumsum(0) - self.observed + (self.observed - 1).clamp(min=0) // 2
        if not len(x):
            return x.new_full((self.graphs,), math.nan)
        return torch.where(self.observed > 0, x[order[middle.clamp(max=len(x) - 1)]], math.nan)

    def components(self) -> Tensor:
        """First node of the component of each node."""
        label = torch.arange(self.nodes, device=self.rows.device)
        while True:
            least = label.scatter_reduce(0, self.rows, label[self.columns], "amin")
            least = least[least]
            if torch.equal(least, label):
                return label
            label = least

    def reached(self, roots: Tensor, along: Tensor) -> Tensor:
        """Nodes to which chosen entries lead from the roots."""
        seen, rows, columns = roots.clone(), self.rows[along], self.columns[along]
        while True:
            more = seen.clone()
            more[columns[seen[rows]]] = True
            if torch.equal(more, seen):
                return seen
            seen = more


def _solve_ref(graph: _Graph, values: Tensor, votes: Tensor, data: str, tol: float, max_iter: int):
    """Returns w, stats and components of all graphs, in the dtype of the values."""
    g, logits, nodes = graph, data == "logits", graph.nodes
    root = g.components()
    members = torch.bincount(root, minlength=nodes).clamp(min=1)

    def centred(w):
        return w - (w.new_zeros(nodes).index_add_(0, root, w) / members)[root]

    zero = values.new_zeros(g.graphs)
    mean = zero.index_add(0, g.entry_graph, values.abs()) / g.observed.clamp(min=1)
    ridge = torch.full_like(zero, 0.0 if logits else RIDGE)
    if data == "counts_mle":
        roots = root == torch.arange(nodes, device=root.device)
        complete = g.reached(roots, values > 0) & g.reached(roots, values < 1)
        ridge[g.per_graph((~complete).to(values.dtype)) == 0] = 0
    floor = 1e-4 * mean if logits else zero + 3
    constant = 2 * mean if logits else zero + 20
    settled = torch.full((g.graphs,), data == "counts_mle", device=values.device)
    converged = (g.observed == 0) | (logits & (mean == 0))
    iterations = torch.zeros(g.graphs, dtype=torch.int64, device=values.device)
    w = values.new_zeros(nodes)
    safe = torch.where(constant > 0, constant, 1)

    def terms(w, constant):
        return pair_terms(values, votes, w[g.rows] - w[g.columns], data, constant[g.entry_graph])

    for _ in range(max_iter):
        active = ~converged
        if not active.any():
            break
        iterations += active
        safe = torch.where(constant > 0, constant, 1)
        _, pull, weight = terms(w, safe)
        right = g.per_node(pull) - ridge[g.graph] * w
        x = _laplacian_solve(g, weight, centred(right), ridge, active)
        x = centred(x)
        step = g.largest(x.abs())
        damping = torch.where(step > 1, 1 / step, 1) if not logits else torch.ones_like(step)
        w = w + (active * damping)[g.graph] * x
        size = mean if logits else g.largest(w.abs()).clamp(min=1)
        converged = converged | (settled & (step <= tol * size))
        decay = torch.where(constant > EARLY * mean, DECAY, LATE_DECAY) if logits else 0.8
        target = decay * constant
        if logits:
            residual = terms(w, safe)[0]
            target = torch.maximum(target, 2.4 * MAD * g.median(residual.abs()).nan_to_num())
        target = torch.minimum(torch.maximum(target, floor), constant)
        reached = (target <= floor) | ((target >= 0.99 * constant) & (step <= 0.05 * constant))
        constant = torch.where(settled | ~active, constant, target)
        settled = settled | (reached & active)
    w = centred(w)
    residual, pull, weight = terms(w, torch.where(constant > 0, constant, 1))
    degree = g.per_node(weight)
    slope = (g.per_node(pull) - ridge[g.graph] * w).abs() / degree
    slope = g.largest(torch.where(degree > 0, slope, 0)) / (torch.where(mean > 0, mean, 1) if logits else 1)
    sigma = MAD * g.median(residual.abs())
    rounding = 1e-5 if values.dtype == torch.float32 else 1e-6
    threshold = OUTLIER * (torch.maximum(sigma, rounding / OUTLIER * mean) if logits else sigma.clamp(min=1))
    flagged = g.per_node((residual.abs() > threshold[g.entry_graph]).to(torch.float64))
    rate = g.per_graph(flagged) / g.observed
    columns = {"iterations": iterations, "converged": converged, "scale": sigma, "outlier_rate": rate}
    columns |= {"gradient": slope, "constant": constant, "threshold": threshold, "ridge": ridge}
    stats = torch.zeros(g.graphs, len(STATS), dtype=torch.float64, device=values.device)
    for name, column in columns.items():
        stats[:, _AT[name]] = column.to(torch.float64)
    alone = g.compared == 0
    scores = torch.where(alone, math.nan, w.double())
    is_root = (root == torch.arange(nodes, device=root.device)).long()
    number = is_root.cumsum(0) - 1
    first = torch.arange(g.graphs, device=root.device) * (nodes // max(g.graphs, 1))
    components = number[root] - (number[first] if nodes else number)[g.graph]
    return scores, components, flagged / torch.where(alone, math.nan, g.compared), stats


def _laplacian_solve(g: _Graph, weight, right, ridge, active):
    """x of the weighted Laplacian plus ridge, by Jacobi-preconditioned conjugate gradients, all graphs at once."""
    degree = g.per_node(weight) + ridge[g.graph]
    inverse = torch.where(degree > 0, 1 / degree, 0)
    x, r = torch.zeros_like(right), right * active[g.graph]
    z = inverse * r
    p = z
    rho = g.per_graph(r * z)
    goal = 1e-6 * rho
    for _ in range(g.nodes // g.graphs + 10):
        y = degree * p - g.per_node(weight * p[g.columns])
        curvature = g.per_graph(p * y)
        real = curvature > 8 * torch.finfo(p.dtype).eps * g.per_graph(p * degree * p)  # the rest is rounding
        alpha = torch.where((rho > goal) & real, rho / curvature, 0)
        if not alpha.any():
            break
        x = x + alpha[g.graph] * p
        r = r - alpha[g.graph] * y
        z = inverse * r
        following = g.per_graph(r * z)
        p = z + torch.where(alpha > 0, following / rho, 0)[g.graph] * p
        rho = torch.where(alpha > 0, following, rho)
    return x


def bradley_terry_ref(matrix: Tensor, data: str, tol: float, max_iter: int):
    """[B, N, N] -> scores [B, N], components [B, N], rejected [B, N], stats [B, len(STATS)]: the specification."""
    batch, items = matrix.shape[:2]
    offdiagonal = ~torch.eye(items, dtype=torch.bool, device=matrix.device)
    other = matrix.mT
    if data == "logits":
        wrong = (matrix + other).abs()
        wrong = torch.where(matrix.isnan() != other.isnan(), math.inf, wrong.nan_to_num(0, posinf=math.inf))
        wrong = torch.where(matrix.isinf(), math.inf, wrong)
        values, votes = matrix, torch.zeros_like(matrix)
    else:
        wrong = (matrix < 0) | matrix.isinf() | (matrix.isnan() != other.isnan())
        wrong = (wrong | (~offdiagonal & (matrix != 0) & ~matrix.isnan())).to(matrix.dtype)
        votes = matrix + other
        values = matrix / votes  # NaN without votes
    wrong = wrong.flatten(1)
    worst, where = wrong.max(1) if items else (wrong.sum(1), wrong.sum(1).long())
    seen = ~values.isnan() & offdiagonal
    if not (worst == math.inf).any() and not (data != "logits" and worst.any()):
        graph_index, rows, columns = seen.nonzero(as_tuple=True)
        graph = _Graph(graph_index * items + rows, graph_index * items + columns, batch * items, batch)
        scores, components, rejected, stats = _solve_ref(graph, values[seen], votes[seen], data, tol, max_iter)
    else:  # the caller raises
        scores = torch.full((batch * items,), math.nan, dtype=torch.float64, device=matrix.device)
        components, rejected = torch.zeros_like(scores, dtype=torch.int64), scores
        stats = scores.new_full((batch, len(STATS)), math.nan)
    stats[:, _AT["worst"]] = worst
    stats[:, _AT["worst_row"]] = torch.where(worst > 0, where // max(items, 1), -1)
    stats[:, _AT["worst_column"]] = torch.where(worst > 0, where % max(items, 1), -1)
    stats[:, _AT["largest"]] = matrix.abs().nan_to_num(0, posinf=math.inf).flatten(1).max(1).values if items else 0
    shape = (batch, items)
    return scores.view(shape), components.view(shape), rejected.reshape(shape), stats


def bradley_terry_edges_ref(offsets: Tensor, columns: Tensor, values: Tensor, votes: Tensor, data, tol, max_iter):
    """Both directions of every pair by rows (CSR) -> scores [N], components [N], rejected [N], stats [1, ...]."""
    items = len(offsets) - 1
    rows = torch.repeat_interleave(torch.arange(items, device=offsets.device), offsets.diff())
    graph = _Graph(rows, columns.long(), items, 1)
    return _solve_ref(graph, values, votes, data, tol, max_iter)


# ---- native ----


def _native_dense(matrix: Tensor, data: str, tol: float, max_iter: int):
    batch, items = matrix.shape[:2]
    is_double = matrix.dtype == torch.float64
    threads = torch.get_num_threads()
    slots = max(1, min(batch, threads))
    scores, rejected = (torch.empty(batch, items, dtype=torch.float64) for _ in range(2))
    components = torch.empty(batch, items, dtype=torch.int64)
    stats = torch.empty(batch, len(STATS), dtype=torch.float64)
    size = _native._core.bradley_terry_workspace(items, is_double)
    workspace = torch.empty(slots * size, dtype=torch.uint8)
    _native._core.bradley_terry_dense_cpu(
        matrix.data_ptr(), is_double, batch, items, DATA.index(data), tol, max_iter, scores.data_ptr(),
        components.data_ptr(), rejected.data_ptr(), stats.data_ptr(), workspace.data_ptr(), slots, threads,
    )  # fmt: skip
    return scores, components, rejected, stats


def _native_edges(offsets, columns, values, votes, data, tol, max_iter):
    items = len(offsets) - 1
    scores, rejected = (torch.empty(items, dtype=torch.float64) for _ in range(2))
    components = torch.empty(items, dtype=torch.int64)
    stats = torch.zeros(1, len(STATS), dtype=torch.float64)
    weights = torch.empty(len(columns), dtype=torch.float64)
    vectors = torch.empty(14, items, dtype=torch.float64)
    _native._core.bradley_terry_edges_cpu(
        offsets.data_ptr(), columns.data_ptr(), values.data_ptr(), votes.data_ptr(), items, DATA.index(data), tol,
        max_iter, scores.data_ptr(), components.data_ptr(), rejected.data_ptr(), stats.data_ptr(),
        weights.data_ptr(), vectors.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return scores, components, rejected, stats


# ---- operators ----


def _native_reason(device: str) -> str | None:
    return _library.native_reason(device) if device == "cpu" else "the native fit runs on CPU tensors"


_library.OPS["bradley_terry"] = {"native": _native_reason, "reference": _library.reference_reason}


def _dense(matrix, data, tol, max_iter, backend):
    chosen = _library.choose_backend("bradley_terry", backend, _native.device_kind(matrix))
    run = {"native": _native_dense, "reference": bradley_terry_ref}[chosen]
    return run(matrix.contiguous(), data, tol, max_iter)


def _dense_fake(matrix, data, tol, max_iter, backend):
    scores = matrix.new_empty(matrix.shape[:2], dtype=torch.float64)
    stats = scores.new_empty(matrix.shape[0], len(STATS))
    return scores, torch.empty_like(scores, dtype=torch.int64), torch.empty_like(scores), stats


def _edges(offsets, columns, values, votes, data, tol, max_iter, backend):
    chosen = _library.choose_backend("bradley_terry", backend, _native.device_kind(values))
    run = {"native": _native_edges, "reference": bradley_terry_edges_ref}[chosen]
    return run(offsets.contiguous(), columns.contiguous(), values.contiguous(), votes.contiguous(), data, tol, max_iter)


def _edges_fake(offsets, columns, values, votes, data, tol, max_iter, backend):
    scores = values.new_empty(offsets.shape[0] - 1, dtype=torch.float64)
    stats = scores.new_empty(1, len(STATS))
    return scores, torch.empty_like(scores, dtype=torch.int64), torch.empty_like(scores), stats


bradley_terry_dense, bradley_terry_edges = operators.bradley_terry_dense, operators.bradley_terry_edges


# ---- public ----


def bradley_terry(
    logits=None,
    *,
    wins=None,
    edges: Edges | None = None,
    robust: bool = True,
    stderr: bool = False,
    outliers: str = "none",
    tol: float | None = None,
    max_iter: int | None = None,
    backend: str | None = None,
) -> BradleyTerryResult:
    """Bradley-Terry scores w, P(i beats j) = sigmoid(w_i - w_j), that a share of corrupted pairs does not move.

    Exactly one of:
        logits: [..., N, N] floating point, logits[i, j] = -logits[j, i]; NaN: missing, on both sides.
        wins: [..., N, N] counts; wins[i, j]: how often i beat j. NaN on both sides, or 0 and 0: not compared.
        edges: Edges; arithmetic in float64, memory proportional to the edges.
    Tensors or NumPy arrays; the diagonal is 0 or NaN. float32 and narrower data are solved in float32, float64 and
    integers in float64. A matrix of more than 512 items is solved as the edges it has.

    Args:
        robust: redescending (Cauchy) weights. False: logits by least squares are not offered (ValueError); wins by
            maximum likelihood, with a ridge of 1e-2/2 |w|^2 where no maximum exists because wins do not lead from every
            item to every other of its component. The robust fit of wins always has that ridge.
        stderr: standard errors of the centred scores, sqrt(diag(pinv(Laplacian))) with the final weights, for logits
            times info.scale; at most 4096 items.
        outliers: "pairs" lists the pairs beyond info.threshold.
        tol: largest last step of a score, in units of the mean |logit| (wins: in logits, relative to the largest score
            above 1). Default 1e-6, in float64 1e-9.
        max_iter: default 300. What has not converged by then says so in info.converged.
        backend: None (the fastest), "native" or "reference".

    Returns:
        BradleyTerryResult. The robust criterion is not convex: converged means a stationary point was reached.

    Raises:
        ValueError: naming the worst entry of logits that are not skew-symmetric or the first infinite entry; for
            negative or infinite counts; for edges out of range or from an item to itself.

    Warns:
        RuntimeWarning: where the wins have no maximum of their likelihood, so that the ridge alone keeps the scores
            finite, robust or not; and where the ridge rules: it shrinks the scores by more than 5 %, because the votes
            are few, or weighted far below 1.

    Sources: Bradley and Terry 1952; Holland and Welsch 1977 (Cauchy weights); Jiang et al. 2011 (HodgeRank).
    """
    given = [name for name, value in (("logits", logits), ("wins", wins), ("edges", edges)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one of logits, wins and edges must be given, got {' and '.join(given) or 'none'}")
    if outliers not in ("none", "pairs"):
        raise ValueError(f"outliers must be 'none' or 'pairs', got {outliers!r}")
    if tol is not None:
        _checks.positive("tol", tol)
    if max_iter is not None:
        _checks.positive_int("max_iter", max_iter)
    _library.check_backend("bradley_terry", backend)
    has_logits = logits is not None or (edges is not None and edges.logits is not None)
    if has_logits and not robust:
        raise ValueError("robust=False needs wins: it is maximum likelihood, which logits do not have")
    data = "logits" if has_logits else "counts" if robust else "counts_mle"
    options = _Options(data, tol, max_iter or 300, backend or "")
    if edges is not None:
        return _fit_edges(_both_directions(edges), options, stderr, outliers)
    return _fit_matrices("logits" if has_logits else "wins", logits if has_logits else wins, options, stderr, outliers)


def _matrices(name: str, value) -> Tensor:
    matrix = torch.as_tensor(value)
    if matrix.is_complex() or matrix.dtype == torch.bool or (name == "logits" and not matrix.is_floating_point()):
        raise TypeError(f"{name} must be real numbers, got {matrix.dtype}")
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name} must have shape [..., N, N], got {list(matrix.shape)}")
    exact = torch.float64 if matrix.dtype == torch.float64 or not matrix.is_floating_point() else torch.float32
    return matrix.detach().to(exact)


def _fit_matrices(name: str, value, options: _Options, stderr: bool, outliers: str) -> BradleyTerryResult:
    given, data = torch.as_tensor(value), options.data
    matrix = _matrices(name, value)
    shape = matrix.shape
    items = shape[-1]
    flat = matrix.reshape(shape[:-2].numel(), items, items)
    options = options._replace(tol=options.tol or (1e-9 if matrix.dtype == torch.float64 else 1e-6))
    if _are_large(flat, options):
        for one in flat:
            _refuse_large(name, one, given.dtype)
    fits = _fit_each(flat, options)
    _refuse_matrices(name, flat, given.dtype, fits.stats)
    scores, components, rejected, stats = fits
    separated, share = torch.zeros(len(flat), dtype=torch.bool, device=flat.device), stats.new_zeros(len(flat))
    if data != "logits" and len(flat):
        separated, share = _separated_matrices(flat, stats, options), _share_in_matrices(flat, fits)
        _warn_of_ridge(separated, share)
    deviations = found = None
    if stderr:
        rows = zip(flat, scores, components, stats, strict=True)
        deviations = torch.stack([_stderr(*row, data) for row in rows]) if len(flat) else scores.clone()
    batch = shape[:-2]
    if outliers == "pairs":
        found = _outlier_pairs(flat, scores, stats, data, batch)
    return BradleyTerryResult(
        scores.view(*batch, items).to(matrix.dtype),
        _info(stats, separated, share, batch),
        None if deviations is None else deviations.view(*batch, items),
        found,
        components.view(*batch, items),
        rejected.view(*batch, items),
    )


def _info(stats: Tensor, separated: Tensor, share: Tensor, batch) -> BradleyTerryInfo:
    column = dict(zip(STATS, stats.unbind(-1), strict=True))
    return BradleyTerryInfo(
        column["iterations"].long().view(batch),
        column["converged"].bool().view(batch),
        *(column[name].clone().view(batch) for name in ("scale", "outlier_rate", "gradient", "threshold")),
        separated.view(batch),
        share.view(batch),
    )


def ridge_doubts(separated: Tensor, share: Tensor) -> list[str]:
    """What there is to say of `separated` and `ridge_share` of the info of some graphs."""
    said = []
    if count := int(separated.sum()):
        said.append(
            f"the maximum-likelihood scores of {count} of {len(separated)} graphs do not exist: wins do not lead from "
            f"every item to every other of its component; a ridge of {RIDGE:g} keeps them finite"
        )
    ruled = share[~separated & (share > RULES)]
    if len(ruled):
        said.append(
            f"a ridge of {RIDGE:g} rules the scores of {len(ruled)} of {len(separated)} graphs: it shrinks them by up "
            f"to {float(ruled.max()):.0%}, for their votes say too little; collect more, or give them larger weights"
        )
    return said


def _warn_of_ridge(separated: Tensor, share: Tensor) -> None:
    for text in ridge_doubts(separated, share):
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def _separated_matrices(flat: Tensor, stats: Tensor, options: _Options) -> Tensor:
    """[B]: the likelihood of the counts has no maximum."""
    if options.data == "counts_mle":
        return stats[:, _AT["ridge"]] > 0
    won = flat > 0
    separated = (won != won.mT).flatten(1).any(1)  # both sides of every pair won: there is a maximum
    if separated.any():  # no iteration: the ridge that the fit would have tells
        fits = _fit_each(won[separated].float(), options._replace(data="counts_mle", max_iter=0))
        separated[separated.clone()] = fits.stats[:, _AT["ridge"]] > 0
    return separated


def _share_in_matrices(flat: Tensor, fits: _Fits) -> Tensor:
    """[B]: the share that the ridge has of the pull on the scores."""
    share = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    ridged = (fits.stats[:, _AT["ridge"]] > 0).nonzero().flatten()
    for some in ridged.split(max(1, (1 << 17) // max(flat.shape[-1] ** 2, 1))):
        w = fits.scores[some].nan_to_num(0).float()
        difference = w.unsqueeze(2) - w.unsqueeze(1)
        # s (1 - s) = (1 - tanh(d / 2)^2) / 4, and a pair's votes are its wins of both directions
        curved = (difference / 2).tanh_().square_().neg_().add_(1).mul_(difference.square_())
        pull = (curved.flatten(1) * flat[some].float().flatten(1)).nansum(1).double() / 4
        share[some] = _share_of_ridge(w, pull)
    return share


def _share_of_ridge(w: Tensor, pull: Tensor) -> Tensor:
    """Of w^T (L + ridge) w, where pull is w^T L w: by about so much the scores would grow without it."""
    own = RIDGE * w.double().square().sum(-1)
    return own / (own + pull).clamp(min=1e-300)


def _refuse_matrices(name: str, flat: Tensor, dtype: torch.dtype, stats: Tensor) -> None:
    column = dict(zip(STATS, stats.unbind(-1), strict=True))
    worst, largest = column["worst"], column["largest"]
    if name == "wins":
        wrong = ~(worst == 0)
    else:
        rounding = max(1e-5, 8 * torch.finfo(dtype).eps)
        wrong = ~(worst <= rounding * largest) | largest.isinf()
    if not wrong.any():
        return
    b = int(wrong.nonzero()[0])
    if name == "logits" and largest[b] == math.inf:
        i, j = flat[b].isinf().nonzero()[0].tolist()
        raise ValueError(f"logits must be finite or NaN, got {flat[b, i, j].item()} at {[b, i, j]}")
    i, j = int(column["worst_row"][b]), int(column["worst_column"][b])
    there, back = flat[b, i, j].item(), flat[b, j, i].item()
    at, mirror = ([b, i, j], [b, j, i]) if len(flat) > 1 else ([i, j], [j, i])
    if i == j:
        raise ValueError(f"{name} must be 0 or NaN on the diagonal, an item against itself, got {there} at {at}")
    if name == "logits":
        raise ValueError(
            f"logits must be skew-symmetric, logits[i, j] = -logits[j, i] and NaN on both sides or neither; the worst "
            f"entry is {there} at {at} against {back} at {mirror} (preference_matrix symmetrises)"
        )
    raise ValueError(
        f"wins must be finite counts >= 0, and NaN on both sides or neither, got {there} at {at} and {back} at {mirror}"
    )


def _pairs(matrix: Tensor, data: str):
    """Value and votes of every entry of [..., N, N]: the logit, or the share of wins; NaN where not compared."""
    if data == "logits":
        return matrix, torch.zeros_like(matrix)
    votes = matrix + matrix.mT
    return matrix / votes, votes


def _are_large(flat: Tensor, options: _Options) -> bool:
    """Whether matrices [B, N, N] are solved as the edges they have."""
    return flat.shape[-1] > LARGEST_DENSE and options.backend != "reference" and _native.device_kind(flat) == "cpu"


def _fit_each(flat: Tensor, options: _Options) -> _Fits:
    if not _are_large(flat, options):
        return _Fits(*bradley_terry_dense(flat, *options))
    items = flat.shape[-1]
    if not len(flat):
        return _Fits(*(flat.new_empty(0, size) for size in (items, items, items, len(STATS))))
    every = []
    for matrix in flat:
        fit = _Fits(*bradley_terry_edges(*_edges_of(matrix, options.data), *options))
        every.append(fit._replace(stats=fit.stats[0]))
    return _Fits(*(torch.stack(part) for part in zip(*every, strict=True)))


def _refuse_large(name: str, matrix: Tensor, dtype: torch.dtype) -> None:
    """Looks at one matrix [N, N] as the dense kernel does, which edges do not pass through."""
    items = matrix.shape[0]
    worst, largest = matrix.new_zeros(()), matrix.new_zeros(())
    position = -1
    for begin in range(0, items, 512):  # no second matrix
        block, other = matrix[begin : begin + 512], matrix[:, begin : begin + 512].T
        one_side = block.isnan() != other.isnan()
        if name == "logits":
            wrong = torch.where(one_side, math.inf, (block + other).abs().nan_to_num(0, posinf=math.inf))
        else:
            wrong = (one_side | (block < 0) | block.isinf()).to(matrix.dtype)
            diagonal = block.diagonal(begin)
            wrong.diagonal(begin).add_((diagonal != 0) & ~diagonal.isnan())
        if wrong.max() > worst:
            worst, position = wrong.max(), begin * items + int(wrong.argmax())
        largest = torch.maximum(largest, block.abs().nan_to_num(0, posinf=math.inf).max())
    stats = torch.zeros(1, len(STATS), dtype=torch.float64)
    stats[0, _AT["worst"] :] = torch.tensor([worst.item(), position // items, position % items, largest.item()])
    _refuse_matrices(name, matrix[None], dtype, stats)


def _edges_of(matrix: Tensor, data: str) -> _Directed:
    values, votes = _pairs(matrix, data)
    seen = ~values.isnan()
    seen.fill_diagonal_(False)
    offsets = torch.zeros(len(matrix) + 1, dtype=torch.int64)
    torch.cumsum(seen.sum(1), 0, out=offsets[1:])
    return _Directed(offsets, seen.nonzero()[:, 1].int(), values[seen].double(), votes[seen].double())


def _stderr(matrix, scores, components, stats, data):
    value, votes = _pairs(matrix.double(), data)
    seen = ~value.isnan()
    seen.fill_diagonal_(False)
    i, j = seen.nonzero(as_tuple=True)
    return _deviations(i, j, value[seen], votes[seen], scores, components, stats, data)


def _deviations(i, j, value, votes, scores, components, stats, data):
    """sqrt(diag(pinv(Laplacian))): adding 1 1^T / size per component makes it invertible without a change elsewhere."""
    items = len(scores)
    constant = stats[_AT["constant"]]
    constant = torch.where(constant > 0, constant, 1)
    w = scores.nan_to_num(0)
    weight = pair_terms(value, votes, w[i] - w[j], data, constant)[2]
    laplacian = torch.zeros(items * items, dtype=torch.float64, device=w.device)
    laplacian.index_add_(0, i * items + j, -weight)
    laplacian = laplacian.view(items, items)
    laplacian.diagonal().sub_(laplacian.sum(1))
    same = (components[:, None] == components).double()
    ones = same / same.sum(1, keepdim=True)
    size = torch.where(laplacian.diagonal() > 0, laplacian.diagonal(), math.nan).nanmean().nan_to_num(1.0)
    inverse = torch.linalg.inv_ex(laplacian / size + ones).inverse
    variance = (inverse - ones).diagonal().clamp(min=0) / size
    if data == "logits":
        variance = variance * stats[_AT["scale"]] ** 2
    return torch.where(scores.isnan(), math.nan, variance.sqrt())


def _outlier_pairs(flat, scores, stats, data, batch) -> PairOutliers:
    indices, residuals = [], []
    threshold = stats[:, _AT["threshold"]]
    for b, matrix in enumerate(flat):
        value, votes = _pairs(matrix.double(), data)
        difference = scores[b, :, None] - scores[b]
        residual = pair_terms(value, votes, difference, data, 1.0)[0].triu(1)
        found = (residual.abs() > threshold[b]).nonzero()
        head = torch.tensor(_unravel(b, batch), dtype=torch.int64, device=flat.device).expand(len(found), len(batch))
        indices.append(torch.cat([head, found], 1))
        residuals.append(residual[found[:, 0], found[:, 1]])
    if not indices:
        return PairOutliers(torch.zeros(0, len(batch) + 2, dtype=torch.int64), torch.zeros(0, dtype=torch.float64))
    return PairOutliers(torch.cat(indices), torch.cat(residuals))


def _unravel(index: int, shape) -> list[int]:
    out = []
    for size in reversed(shape):
        out.append(index % size)
        index //= size
    return out[::-1]


def _both_directions(edges: Edges) -> _Directed:
    """Both directions of every edge; repeated pairs of votes are added."""
    items = edges.num_items
    if isinstance(items, bool) or not isinstance(items, int) or not 0 <= items < 2**31:
        raise ValueError(f"edges.num_items must be an int in [0, 2**31), got {items!r}")
    i, j = torch.as_tensor(edges.i), torch.as_tensor(edges.j)
    for name, index in (("edges.i", i), ("edges.j", j)):
        _checks.integers(name, index)
        if index.dim() != 1 or index.shape != i.shape:
            raise ValueError(f"{name} must have shape {list(i.shape[:1])} like edges.i, got {list(index.shape)}")
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < items):
            raise ValueError(f"{name} must lie in [0, {items}), got {int(index.min())} to {int(index.max())}")
    i, j = i.long(), j.long()
    if (own := i == j).any():
        raise ValueError(f"edges must join two items, got item {int(i[own][0])} with itself at {int(own.nonzero()[0])}")
    has_wins = edges.wins_i is not None and edges.wins_j is not None
    if has_wins == (edges.logits is not None) or (edges.wins_i is None) != (edges.wins_j is None):
        raise ValueError("edges must have either wins_i and wins_j, or logits")
    columns = [("wins_i", edges.wins_i), ("wins_j", edges.wins_j)] if has_wins else [("logits", edges.logits)]
    data = []
    for name, value in columns:
        value = torch.as_tensor(value).to(i.device).double()
        if value.shape != i.shape:
            raise ValueError(f"edges.{name} must have shape {list(i.shape)} like edges.i, got {list(value.shape)}")
        wrong = value.isinf() | (value < 0) | value.isnan() if has_wins else value.isinf()
        if wrong.any():
            expected = "finite counts >= 0" if has_wins else "finite or NaN"
            at = int(wrong.nonzero()[0])
            raise ValueError(f"edges.{name} must be {expected}, got {value[at].item()} at {at}")
        data.append(value)
    if has_wins:
        low, high = torch.minimum(i, j), torch.maximum(i, j)
        pair, place = torch.unique(low * items + high, return_inverse=True)
        won = pair.new_zeros(len(pair), dtype=torch.float64).index_add_(0, place, torch.where(i < j, data[0], data[1]))
        lost = torch.zeros_like(won).index_add_(0, place, torch.where(i < j, data[1], data[0]))
        seen = won + lost > 0
        i, j, won, lost = pair[seen] // items, pair[seen] % items, won[seen], lost[seen]
        value, back, votes = won / (won + lost), lost / (won + lost), won + lost
    else:
        seen = ~data[0].isnan()
        i, j, value = i[seen], j[seen], data[0][seen]
        back, votes = -value, torch.zeros_like(value)
    rows = torch.cat([i, j])
    order = rows.argsort(stable=True)
    offsets = torch.zeros(items + 1, dtype=torch.int64, device=i.device)
    offsets[1:] = torch.bincount(rows, minlength=items).cumsum(0)
    return _Directed(
        offsets,
        columns=torch.cat([j, i])[order].int(),
        values=torch.cat([value, back])[order],
        votes=torch.cat([votes, votes])[order],
    )


def _fit_edges(directed: _Directed, options: _Options, stderr: bool, outliers: str) -> BradleyTerryResult:
    offsets, columns, values, votes = directed
    data, items = options.data, len(offsets) - 1
    if stderr and items > LARGEST_STDERR:
        raise ValueError(f"stderr=True takes at most {LARGEST_STDERR} items (a dense pseudo-inverse), got {items}")
    fits = _Fits(*bradley_terry_edges(*directed, *options._replace(tol=options.tol or 1e-9)))
    scores, components, rejected, stats = fits
    rows = torch.repeat_interleave(torch.arange(items, device=offsets.device), offsets.diff())
    separated, share = torch.zeros(1, dtype=torch.bool, device=stats.device), stats.new_zeros(1)
    if data != "logits":
        separated, share = _separated_edges(directed, stats, options), _share_in_edges(directed, rows, fits)
        _warn_of_ridge(separated, share)
    deviations = found = None
    if stderr:
        deviations = _deviations(rows, columns.long(), values, votes, scores, components, stats[0], data)
    if outliers == "pairs":
        difference = scores[rows] - scores[columns.long()]
        residual = pair_terms(values, votes, difference, data, 1.0)[0]
        flagged = (residual.abs() > stats[0, _AT["threshold"]]) & (rows < columns)
        found = PairOutliers(torch.stack([rows[flagged], columns[flagged].long()], 1), residual[flagged])
    return BradleyTerryResult(scores, _info(stats, separated, share, ()), deviations, found, components, rejected)


def _separated_edges(directed: _Directed, stats: Tensor, options: _Options) -> Tensor:
    """[1]: the likelihood of the counts has no maximum."""
    if options.data == "counts" and not ((directed.values > 0) & (directed.values < 1)).all():
        # no iteration: the ridge that the fit would have tells
        options = options._replace(data="counts_mle", max_iter=0, tol=1e-9)
        return _Fits(*bradley_terry_edges(*directed, *options)).stats[:, _AT["ridge"]] > 0
    return (stats[:, _AT["ridge"]] > 0) & (options.data == "counts_mle")


def _share_in_edges(directed: _Directed, rows: Tensor, fits: _Fits) -> Tensor:
    """[1]: the share that the ridge has of the pull on the scores."""
    if not fits.stats[0, _AT["ridge"]] > 0:
        return torch.zeros(1, dtype=torch.float64, device=rows.device)
    w = fits.scores.nan_to_num(0)
    difference = w[rows] - w[directed.columns.long()]
    _, _, weight = pair_terms(directed.values, directed.votes, difference, "counts_mle", 1.0)
    return _share_of_ridge(w, (weight * difference.square()).sum() / 2).reshape(1)
