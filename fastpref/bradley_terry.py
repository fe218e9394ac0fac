"""Robust Bradley-Terry fits: scores w with logits M[i, j] = w_i - w_j, or P(i beats j) = sigmoid(w_i - w_j).

A matrix of pairwise logits has n numbers in it, not n^2, so no singular value is ever computed: a reweighted fit of the
scores with redescending (Cauchy) weights, whose cutoff is annealed from the size of the data down to the noise, ignores
corrupted pairs altogether, where maximum likelihood is dragged along by them. From vote counts the weights act on
standardised count residuals, which keeps the statistical efficiency of the likelihood.

On CPU each matrix of a batch is solved whole by one thread, in cache (csrc/cpu/bradley_terry.cpp). Floor: about 12
operations per entry and reweighting, 28 reweightings where there is no noise. Edge lists take O(items + edges) memory.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import _checks, _library, _native

# as in csrc/cpu/bradley_terry.cpp
MAD = 1.4826  # of a normal distribution: standard deviation / median |x|
CUTOFF = 2.4  # of Cauchy's weights, in standard deviations: 95 % efficiency
SHRINK = 0.7  # of the cutoff per reweighting, down to the noise
FLOOR = 1e-4  # of mean |M|
COUNT_CUTOFF = 3.0  # of standardised count residuals
OUTLIER = 5.0  # standard deviations
RIDGE = 1e-2  # on scores fitted to counts: of items that always win, too


class Edges(NamedTuple):
    """Comparisons as a list: pair e is (i[e], j[e]), with either its votes or its logit."""

    i: Tensor  # [E] int64
    j: Tensor  # [E] int64
    wins_i: Tensor | None = None  # [E] votes for i
    wins_j: Tensor | None = None  # [E] votes for j
    logits: Tensor | None = None  # [E] of P(i beats j)
    num_items: int | None = None  # default: one more than the largest index


class BradleyTerryInfo(NamedTuple):
    iterations: Tensor  # [...] int64
    converged: Tensor  # [...] bool
    scale: Tensor  # [...] float64, 1.4826 * median |residual| of logits; 1 for counts, whose residuals are standardised
    outlier_rate: Tensor  # [...] float64, share of the compared pairs more than 5 scales off


class Outliers(NamedTuple):
    """Pairs more than 5 scales off, i < j (edge lists: as given)."""

    batch: Tensor  # [K] int64 into the flattened batch
    i: Tensor  # [K] int64
    j: Tensor  # [K] int64
    residual: Tensor  # [K] logit - (w_i - w_j), or the standardised count residual


class BradleyTerryResult(NamedTuple):
    scores: Tensor  # [..., N], centred per component; NaN: an item without comparisons
    info: BradleyTerryInfo
    stderr: Tensor | None  # [..., N]
    outliers: Outliers | None
    components: Tensor  # [..., N] int64: items with the same label are connected; only their scores compare
    rejected: Tensor  # [..., N] float32, share of an item's comparisons that are outliers


# ---- reference ----


def bradley_terry_ref(data: Tensor, counts: bool, robust: bool, max_iter: int, tol: float, ridge: float):
    """The fit in batched PyTorch, the weighted Laplacian solved exactly: data [B, N, N] in float64 or its own dtype.

    Returns scores [B, N], rejected [B, N], components [B, N], info [B, 4].
    """
    batch, items = data.shape[:2]
    votes = _votes(data) if counts else None
    observed = votes > 0 if counts else ~data.isnan()
    observed = observed & ~torch.eye(items, dtype=torch.bool, device=data.device)
    components = _components(observed)
    same = components.unsqueeze(-1) == components.unsqueeze(-2)
    projector = same.to(data.dtype) / same.sum(-1, keepdim=True)
    pairs = observed.sum((-2, -1))
    iterations = torch.zeros(batch, dtype=torch.int64, device=data.device)
    scores = data.new_zeros(batch, items)
    if counts:
        shares = torch.where(observed, data / votes, 0)
        logits = torch.where(observed, torch.log((data + 0.5) / (votes - data + 0.5)), 0)
        if robust:
            scores, done, iterations = _fit_logits(logits, observed, projector, robust, max_iter, 1e-2)
        done = pairs == 0
        for _ in range(max_iter):
            change, step = _newton(scores, shares, votes, observed, projector, robust, ridge)
            scores = torch.where(done.unsqueeze(-1), scores, scores + step)
            iterations += ~done
            done = done | (change <= tol)
            if done.all():
                break
        scale = data.new_ones(batch)
        residual = _count_residual(scores, shares, votes, observed)
        bound = OUTLIER * scale
    else:
        clean = torch.where(observed, data, 0)
        scores, done, iterations = _fit_logits(clean, observed, projector, robust, max_iter, tol)
        residual = torch.where(observed, clean - _differences(scores), 0)
        scale = MAD * _median(residual, observed)
        bound = torch.maximum(OUTLIER * scale, FLOOR * _mean(clean, pairs))
    far = (residual.abs() > bound[:, None, None]) & observed
    degree = observed.sum(-1)
    rejected = torch.where(degree > 0, far.sum(-1) / degree.clamp(min=1), 0.0).float()
    scores = scores - (projector @ scores.unsqueeze(-1)).squeeze(-1)
    scores = scores.masked_fill(degree == 0, torch.nan)
    rate = far.sum((-2, -1)) / pairs.clamp(min=1)
    info = torch.stack([iterations.double(), (done & (pairs > 0)).double(), scale.double(), rate.double()], -1)
    return scores, rejected, components, info


def _differences(scores: Tensor) -> Tensor:
    return scores.unsqueeze(-1) - scores.unsqueeze(-2)


def _votes(wins: Tensor) -> Tensor:
    return (wins + wins.mT).nan_to_num(0.0)


def _mean(logits: Tensor, pairs: Tensor) -> Tensor:
    return logits.abs().sum((-2, -1)) / pairs.clamp(min=1)


def _median(residual: Tensor, observed: Tensor) -> Tensor:
    return torch.where(observed, residual.abs(), torch.nan).flatten(1).nanmedian(-1).values.nan_to_num(0.0)


def _components(observed: Tensor) -> Tensor:
    """Labels 0, 1, ... in the order of each component's first item, [B, N]."""
    items = observed.shape[-1]
    reach = (observed | torch.eye(items, dtype=torch.bool, device=observed.device)).float()
    for _ in range(max(1, (items - 1).bit_length())):
        reach = ((reach @ reach) > 0).float()
    first = reach.argmax(-1)  # the first item of each item's component
    is_first = first == torch.arange(items, device=observed.device)
    return (is_first.cumsum(-1) - 1).gather(-1, first)


def _laplacian_step(weights: Tensor, force: Tensor, projector: Tensor, ridge: float) -> Tensor:
    """(diag(weights 1) - weights + ridge)^-1 force; the kernel, constant per component, is left alone."""
    laplacian = torch.diag_embed(weights.sum(-1) + ridge) - weights
    if ridge == 0:
        laplacian = (
            laplacian + projector * laplacian.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-30)[:, None, None]
        )
    return torch.linalg.solve(laplacian, force.unsqueeze(-1)).squeeze(-1)


def _fit_logits(logits, observed, projector, robust, max_iter, tol):
    batch, items = logits.shape[:2]
    pairs = observed.sum((-2, -1))
    mean = _mean(logits, pairs)
    scores = logits.new_zeros(batch, items)
    cutoff = 2 * mean if robust else torch.full_like(mean, torch.inf)
    done, at_floor = (pairs == 0) | (mean == 0), torch.full_like(pairs, not robust, dtype=torch.bool)
    iterations = torch.zeros_like(pairs)
    for _ in range(max_iter):
        if done.all():
            break
        residual = torch.where(observed, logits - _differences(scores), 0)
        weights = torch.where(observed, 1 / (1 + (residual / cutoff[:, None, None].clamp(min=1e-300)) ** 2), 0)
        step = _laplacian_step(weights, (weights * residual).sum(-1), projector, 0)
        step = step.masked_fill(done.unsqueeze(-1), 0)
        scores = scores + step
        iterations += ~done
        done = done | (at_floor & (step.abs().amax(-1) <= tol * mean))
        if robust:
            noise = CUTOFF * MAD * _median(logits - _differences(scores), observed)
            following = torch.maximum(torch.maximum(SHRINK * cutoff, FLOOR * mean), noise)
            at_floor = (following >= 0.99 * cutoff) | (following <= FLOOR * mean)
            cutoff = following
    return scores, done, iterations


def _count_residual(scores, shares, votes, observed) -> Tensor:
    """(wins / k - s) / sqrt(s (1 - s) / k + 1 / (4 k^2)), with the expected share s = sigmoid(w_i - w_j)."""
    s = torch.sigmoid(_differences(scores))
    k = votes.clamp(min=1)
    return torch.where(observed, (shares - s) / (s * (1 - s) / k + 0.25 / k**2).sqrt(), 0)


def _newton(scores, shares, votes, observed, projector, robust, ridge) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(_differences(scores))
    weights = torch.where(observed, votes, 0)
    if robust:
        weights = weights / (1 + (_count_residual(scores, shares, votes, observed) / COUNT_CUTOFF) ** 2)
    force = (weights * (shares - s)).sum(-1) - ridge * scores
    step = _laplacian_step(weights * s * (1 - s), force, projector, ridge)
    change = step.abs().amax(-1) if step.shape[-1] else step.sum(-1)
    return change, step / change.clamp(min=1).unsqueeze(-1)


# ---- operator ----


_library.OPS["bradley_terry"] = {
    "native": lambda device: _library.native_reason(device) if device == "cpu" else "there is no GPU kernel yet",
    "reference": _library.reference_reason,
}


def _outputs(data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors = data.shape[:-1]
    return (
        torch.empty(vectors, dtype=data.dtype, device=data.device),
        torch.empty(vectors, dtype=torch.float32, device=data.device),
        torch.empty(vectors, dtype=torch.int64, device=data.device),
        torch.empty((data.shape[0], 4), dtype=torch.float64, device=data.device),
    )


def _fit(data, counts, robust, max_iter, tol, ridge, backend):
    backend = _library.choose_backend("bradley_terry", backend, data.device.type)
    if data.numel() == 0:  # no items; torch has no maximum of them
        return *_outputs(data)[:3], torch.zeros((data.shape[0], 4), dtype=torch.float64, device=data.device)
    if backend == "reference":
        return bradley_terry_ref(data, counts, robust, max_iter, tol, ridge)
    core, threads = _native._core, torch.get_num_threads()
    data = data.contiguous()
    scores, rejected, components, _ = _outputs(data)
    batch, items = data.shape[:2]
    info = torch.empty((batch, 6), dtype=torch.float64)
    is_double = data.dtype == torch.float64
    workspace = torch.empty(threads * core.bradley_terry_workspace(items, is_double) + 64, dtype=torch.uint8)
    aligned = (workspace.data_ptr() + 63) // 64 * 64
    core.bradley_terry_cpu(
        data.data_ptr(),
        is_double,
        counts,
        robust,
        batch,
        items,
        max_iter,
        tol,
        ridge,
        scores.data_ptr(),
        rejected.data_ptr(),
        components.data_ptr(),
        info.data_ptr(),
        aligned,
        threads,
    )
    if (info[:, 4] >= 0).any():
        b = int((info[:, 4] >= 0).nonzero()[0])
        i, j = int(info[b, 4]), int(info[b, 5])
        _asymmetric(b, i, j, data[b, i, j].item(), data[b, j, i].item())
    return scores, rejected, components, info[:, :4].clone()


def _asymmetric(b, i, j, value, mirror):
    raise ValueError(
        f"logits must be skew-symmetric (logits[i, j] = -logits[j, i], missing on both sides or on none), got "
        f"{value:.6g} at [{i}, {j}] and {mirror:.6g} at [{j}, {i}] of matrix {b}"
    )


bradley_terry_fit = _library.define(
    "bradley_terry_fit(Tensor data, bool counts, bool robust, int max_iter, float tol, float ridge, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fit,
    lambda data, *rest: _outputs(data),
)


# ---- edge lists ----


class _Graph:
    """Both directions of every pair, by rows, so that sums over an item's comparisons are sparse products."""

    def __init__(self, i: Tensor, j: Tensor, items: int):
        source = torch.cat([i, j])
        self.order = source.argsort(stable=True)
        self.row, self.column = source[self.order], torch.cat([j, i])[self.order]
        self.items = items
        self.degree = torch.bincount(self.row, minlength=items)
        self.starts = torch.nn.functional.pad(self.degree.cumsum(0), (1, 0))

    def both(self, forward: Tensor, backward: Tensor) -> Tensor:
        return torch.cat([forward, backward])[self.order]

    def matrix(self, values: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.starts, self.column, values, (self.items, self.items), check_invariants=False
            )

    def sums(self, values: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", offsets=self.starts, initial=0.0)

    def components(self) -> Tensor:
        """Labels as of _components: the smaller root of each pair is hooked on, then paths are halved."""
        root = torch.arange(self.items)
        while True:
            least = torch.minimum(root[self.row], root[self.column])
            hooked = root.scatter_reduce(0, root[self.row], least, "amin")
            while not torch.equal(hooked, shorter := hooked[hooked]):
                hooked = shorter
            if torch.equal(hooked, root):
                break
            root = hooked
        is_first = root == torch.arange(self.items)
        return (is_first.cumsum(0) - 1)[root]

    def solve(self, weights: Tensor, force: Tensor, ridge: float, precision: float) -> Tensor:
        """_laplacian_step by conjugate gradients."""
        matrix, diagonal = self.matrix(weights), self.sums(weights) + ridge
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
        x, residual = torch.zeros_like(force), force.clone()
        direction = inverse * residual
        norm = torch.dot(residual, direction)
        target = norm * precision**2
        for _ in range(4 * self.items):
            if not norm > target or norm == 0:
                break
            product = diagonal * direction - matrix @ direction
            length = norm / torch.dot(product, direction)
            x += length * direction
            residual -= length * product
            scaled = inverse * residual
            following = torch.dot(residual, scaled)
            direction = scaled + following / norm * direction
            norm = following
        return x


def _fit_edges(edges: Edges, robust: bool, max_iter: int, tol: float):
    items, counts = edges.num_items, edges.logits is None
    i, j = edges.i.long(), edges.j.long()
    if counts:
        wins_i, wins_j = edges.wins_i.double(), edges.wins_j.double()
        i, j, wins_i, wins_j = _merged(i, j, wins_i, wins_j, items)
        graph = _Graph(i, j, items)
        votes = graph.both(wins_i + wins_j, wins_i + wins_j)
        share = graph.both(wins_i, wins_j) / votes
        logits = torch.log((share * votes + 0.5) / ((1 - share) * votes + 0.5))
    else:
        present = ~edges.logits.isnan() & (i != j)
        i, j, given = i[present], j[present], edges.logits[present].double()
        graph = _Graph(i, j, items)
        logits = graph.both(given, -given)
    scores, iterations, converged = torch.zeros(items, dtype=torch.float64), 0, False
    mean = logits.abs().mean().item() if logits.numel() else 0.0
    ridge = RIDGE if counts and robust else 0.0

    def difference() -> Tensor:
        return scores[graph.row] - scores[graph.column]

    if counts and not robust:
        lost, won = graph.sums((1 - share) * votes), graph.sums(share * votes)
        if ((lost == 0) | (won == 0))[graph.degree > 0].any():
            _warn_no_maximum(1)
            ridge = RIDGE
    if not counts or robust:
        cutoff, at_floor = (2 * mean, False) if robust else (float("inf"), True)
        goal = 1e-2 if counts else tol
        while iterations < max_iter and not converged and mean > 0:
            residual = logits - difference()
            weights = 1 / (1 + (residual / cutoff) ** 2)
            step = graph.solve(weights, graph.sums(weights * residual), 0.0, 1e-6)
            scores += step
            iterations += 1
            converged = at_floor and step.abs().max().item() <= goal * mean
            if robust:
                noise = CUTOFF * MAD * (logits - difference()).abs().median().item()
                following = max(SHRINK * cutoff, FLOOR * mean, noise)
                at_floor = following >= 0.99 * cutoff or following <= FLOOR * mean
                cutoff = following
        residual = logits - difference()
        scale = MAD * residual.abs().median().item() if logits.numel() else 0.0
    if counts:
        converged, scale = False, 1.0
        for _ in range(max_iter if share.numel() else 0):
            s = torch.sigmoid(difference())
            residual = (share - s) / (s * (1 - s) / votes + 0.25 / votes**2).sqrt()
            weights = votes / (1 + (residual / COUNT_CUTOFF) ** 2) if robust else votes
            force = graph.sums(weights * (share - s)) - ridge * scores
            step = graph.solve(weights * s * (1 - s), force, ridge, 1e-6)
            change = step.abs().max().item()
            scores += step / max(change, 1.0)
            iterations += 1
            if converged := change <= tol:
                break
        s = torch.sigmoid(difference())
        residual = (share - s) / (s * (1 - s) / votes + 0.25 / votes**2).sqrt()
    components = graph.components()
    members = torch.bincount(components, minlength=1).double()
    scores -= (torch.zeros_like(members).index_add_(0, components, scores) / members.clamp(min=1))[components]
    bound = max(OUTLIER * scale, 0.0 if counts else FLOOR * mean)
    far = residual.abs() > bound if logits.numel() else torch.zeros(0, dtype=torch.bool)
    rejected = (graph.sums(far.double()) / graph.degree.clamp(min=1)).float()
    scores[graph.degree == 0] = torch.nan
    rate = far.double().mean().item() if far.numel() else 0.0
    info = torch.tensor([iterations, converged, scale, rate], dtype=torch.float64)
    forward = torch.empty_like(graph.order)
    forward[graph.order] = torch.arange(graph.order.numel())
    forward = forward[: i.numel()]  # where each pair's own direction lies
    kept = far[forward]
    outliers = Outliers(torch.zeros_like(i[kept]), i[kept], j[kept], residual[forward][kept])
    return scores, rejected, components, info, outliers


def _merged(i, j, wins_i, wins_j, items):
    """One entry per pair that was compared, its votes summed."""
    present = (i != j) & (wins_i + wins_j > 0)
    i, j, wins_i, wins_j = i[present], j[present], wins_i[present], wins_j[present]
    swapped = i > j
    low, high = torch.where(swapped, j, i), torch.where(swapped, i, j)
    wins_low, wins_high = torch.where(swapped, wins_j, wins_i), torch.where(swapped, wins_i, wins_j)
    pairs, place = (low * items + high).unique(return_inverse=True)
    zero = torch.zeros(pairs.shape, dtype=torch.float64)
    return (
        pairs // max(items, 1),
        pairs % max(items, 1),
        zero.index_add(0, place, wins_low),
        zero.index_add(0, place, wins_high),
    )


# ---- public ----


def bradley_terry(
    logits: Tensor | None = None,
    *,
    wins: Tensor | None = None,
    edges: Edges | None = None,
    robust: bool = True,
    stderr: bool = False,
    outliers: str = "none",
    tol: float | None = None,
    max_iter: int = 200,
    backend: str | None = None,
) -> BradleyTerryResult:
    """Scores of items from pairwise comparisons, some of which may be corrupted.

    Exactly one of:
        logits: [..., N, N] float32 or float64 (16 bits are computed in float32), skew-symmetric, NaN: not compared.
        wins: [..., N, N], wins[i, j] votes for i against j; NaN, or no votes on either side: not compared.
        edges: an Edges list on CPU, of votes or of logits; duplicates of a pair add up their votes. Not batched.

    Args:
        robust: redescending weights; False fits least squares to logits and maximum likelihood to votes.
        stderr: standard errors too: from the Fisher information for votes, from the sandwich of an M-estimator for
            logits. Takes O(N^3); edge lists up to 4096 items.
        outliers: "none", or "pairs" for a list of the pairs more than 5 scales off.
        tol: the largest change of a score at which a fit has converged, relative to the mean |logit| for logits;
            default 1e-6 for float32, 1e-9 for float64; 1e-4 and 1e-6 for votes.
        max_iter: reweightings; a fit that has not converged by then says so in info.
        backend: None (the fastest), "native" (CPU) or "reference".

    Returns:
        BradleyTerryResult. Scores are centred per connected component. Items without comparisons have NaN, and a
        component of their own.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or shape, infinite logits, logits that are not skew,
            negative votes.

    Source: redescending M-estimation (Holland and Welsch 1977) on the comparison graph; Bradley and Terry 1952. Votes
    carry a ridge of 0.01 on the scores; without `robust` only where maximum likelihood has no maximum, which warns.
    """
    given = {"logits": logits, "wins": wins, "edges": edges}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"exactly one of logits, wins and edges must be given, got {named or 'none'}")
    if outliers not in ("none", "pairs"):
        raise ValueError(f"outliers must be 'none' or 'pairs', got {outliers!r}")
    if tol is not None:
        _checks.positive("tol", tol)
    _checks.positive_int("max_iter", max_iter)
    _library.check_backend("bradley_terry", backend)
    if edges is not None:
        return _of_edges(edges, robust, stderr, outliers, tol, max_iter)
    name, value, counts = named[0], given[named[0]], wins is not None
    _check_matrix(name, value, counts)
    dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
    data = value.detach().to(dtype).reshape(value.shape[:-2].numel(), *value.shape[-2:])
    if tol is None:
        tol = {(False, torch.float32): 1e-6, (False, torch.float64): 1e-9}.get((counts, dtype))
        tol = tol or (1e-4 if dtype == torch.float32 else 1e-6)
    ridge = RIDGE if robust else 0.0
    exists = None
    if counts and not robust and data.numel():
        exists = _strongly_connected(data)
        if not exists.all():
            _warn_no_maximum(int((~exists).sum()))
    with torch.no_grad():
        if exists is None or exists.all():
            found = bradley_terry_fit(data, counts, robust, max_iter, float(tol), ridge, backend or "")
        else:
            parts = [
                (part, bradley_terry_fit(data[part], counts, robust, max_iter, float(tol), r, backend or ""))
                for part, r in ((exists, 0.0), (~exists, RIDGE))
            ]
            found = tuple(torch.empty(len(data), *x.shape[1:], dtype=x.dtype, device=x.device) for x in parts[0][1])
            for part, values in parts:
                for out, x in zip(found, values, strict=True):
                    out[part] = x
        scores, rejected, components, info = found
        errors = _stderr(data, scores, components, info[:, 2], counts, robust) if stderr else None
        listed = _outliers(data, scores, info[:, 2], counts) if outliers == "pairs" else None
    shape = value.shape[:-1]
    info = info.view(*value.shape[:-2], 4)
    return BradleyTerryResult(
        scores.view(shape),
        BradleyTerryInfo(info[..., 0].long(), info[..., 1] > 0, info[..., 2], info[..., 3]),
        None if errors is None else errors.view(shape),
        listed,
        components.view(shape),
        rejected.view(shape),
    )


def _check_matrix(name: str, value, counts: bool) -> None:
    _checks.floats(name, value) if not counts else _checks.tensor(name, value)
    if value.dim() < 2 or value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{name} must have shape [..., N, N], got {list(value.shape)}")
    if value.device.type != "cpu":
        return  # no host sync: infinities end up in a result that has not converged
    if value.dtype.is_floating_point and value.numel() and value.isinf().any():
        where = value.isinf().nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite (NaN: not compared), got {value[tuple(where)].item()} at {where}")
    if counts and value.numel() and (value < 0).any():
        where = (value < 0).nonzero()[0].tolist()
        raise ValueError(f"wins must not be negative, got {value[tuple(where)].item()} at {where}")


def _warn_no_maximum(number: int) -> None:
    warnings.warn(
        f"maximum likelihood has no maximum for {number} matrices: some items only win or only lose against the rest; "
        f"a ridge of {RIDGE} keeps their scores finite. robust=True has it always",
        RuntimeWarning,
        stacklevel=3,
    )


def _strongly_connected(wins: Tensor) -> Tensor:
    """Per matrix and component: everybody beats everybody through others (Ford 1957), [B] bool."""
    wins = wins.nan_to_num(0.0)
    items = wins.shape[-1]
    reach = ((wins > 0) | torch.eye(items, dtype=torch.bool, device=wins.device)).float()
    for _ in range(max(1, (items - 1).bit_length())):
        reach = ((reach @ reach) > 0).float()
    return (reach == reach.mT).flatten(1).all(-1)


def _fisher(data, scores, counts, robust, scale) -> tuple[Tensor, Tensor]:
    """Laplacian weights [B, N, N] and the variance they are to be multiplied with, [B]."""
    w = scores.double().nan_to_num(0.0)
    data = data.double()
    off = ~torch.eye(data.shape[-1], dtype=torch.bool, device=data.device)
    if counts:
        votes = _votes(data)
        observed = (votes > 0) & off
        s = torch.sigmoid(_differences(w))
        weights = torch.where(observed, votes * s * (1 - s), 0)
        if robust:
            shares = torch.where(observed, data / votes, 0)
            weights = weights / (1 + (_count_residual(w, shares, votes, observed) / COUNT_CUTOFF) ** 2)
        return weights, torch.ones_like(scale)
    observed = ~data.isnan() & off
    r = torch.where(observed, data - _differences(w), 0)
    pairs = observed.sum((-2, -1)).clamp(min=1)
    if robust:
        x = (r / (CUTOFF * scale).clamp(min=1e-300)[:, None, None]) ** 2
        influence = torch.where(observed, r / (1 + x), 0)
        slope = torch.where(observed, (1 - x) / (1 + x) ** 2, 0).sum((-2, -1)) / pairs
    else:
        influence, slope = r, torch.ones_like(scale)
    variance = (influence**2).sum((-2, -1)) / pairs / slope**2
    fitted = data.shape[-1] / (pairs / 2).clamp(min=1)  # degrees of freedom that the scores take
    return observed.double(), variance / (1 - fitted).clamp(min=1e-3)


def _stderr(data, scores, components, scale, counts, robust) -> Tensor:
    weights, variance = _fisher(data, scores, counts, robust, scale)
    same = (components.unsqueeze(-1) == components.unsqueeze(-2)).double()
    projector = same.to(data.dtype) / same.sum(-1, keepdim=True)
    size = weights.sum(-1).amax(-1).clamp(min=1e-30)[:, None, None]
    laplacian = torch.diag_embed(weights.sum(-1)) - weights + projector * size
    inverse = torch.linalg.inv(laplacian) - projector / size
    errors = (inverse.diagonal(dim1=-2, dim2=-1).clamp(min=0) * variance.unsqueeze(-1)).sqrt()
    return errors.masked_fill(scores.isnan(), torch.nan).to(scores.dtype)


def _outliers(data, scores, scale, counts) -> Outliers:
    upper = torch.ones(data.shape[-2:], dtype=torch.bool, device=data.device).triu(1)
    w = scores.nan_to_num(0.0)
    if counts:
        votes = _votes(data)
        observed = (votes > 0) & upper
        residual = _count_residual(w, torch.where(observed, data / votes, 0), votes, observed)
        bound = OUTLIER * scale
    else:
        observed = ~data.isnan() & upper
        residual = torch.where(observed, data - _differences(w), 0)
        mean = torch.where(observed, data.abs(), 0).sum((-2, -1)) / observed.sum((-2, -1)).clamp(min=1)
        bound = torch.maximum(OUTLIER * scale, FLOOR * mean.double())
    batch, i, j = (residual.abs() > bound[:, None, None]).nonzero(as_tuple=True)
    return Outliers(batch, i, j, residual[batch, i, j])


def _of_edges(edges: Edges, robust, stderr, outliers, tol, max_iter) -> BradleyTerryResult:
    edges = _checked_edges(edges)
    counts = edges.logits is None
    goal = tol if tol is not None else (1e-6 if counts else 1e-9)
    scores, rejected, components, info, listed = _fit_edges(edges, robust, max_iter, goal)
    errors = None
    if stderr:
        if edges.num_items > 4096:
            raise ValueError(f"stderr must be False for edges of more than 4096 items, got {edges.num_items}")
        data = _dense(edges)
        errors = _stderr(data[None], scores[None], components[None], info[None, 2], counts, robust)[0]
    return BradleyTerryResult(
        scores,
        BradleyTerryInfo(info[0].long(), info[1] > 0, info[2], info[3]),
        errors,
        listed if outliers == "pairs" else None,
        components,
        rejected,
    )


def _dense(edges: Edges) -> Tensor:
    """[N, N] of wins, or of logits, of which the last of a pair counts."""
    n = edges.num_items
    if edges.logits is None:
        wins = torch.zeros(n, n, dtype=torch.float64)
        wins.index_put_((edges.i, edges.j), edges.wins_i.double(), accumulate=True)
        return wins.index_put_((edges.j, edges.i), edges.wins_j.double(), accumulate=True)
    logits = torch.full((n, n), torch.nan, dtype=torch.float64)
    logits[edges.i, edges.j] = edges.logits.double()
    logits[edges.j, edges.i] = -edges.logits.double()
    return logits


def _checked_edges(edges: Edges) -> Edges:
    if not isinstance(edges, Edges):
        raise TypeError(f"edges must be an Edges, got {type(edges).__name__}")
    for name in ("i", "j"):
        _checks.integers(f"edges.{name}", getattr(edges, name))
        if getattr(edges, name).dim() != 1:
            raise ValueError(f"edges.{name} must have shape [E], got {list(getattr(edges, name).shape)}")
    values = [name for name in ("wins_i", "wins_j", "logits") if getattr(edges, name) is not None]
    if values not in (["wins_i", "wins_j"], ["logits"]):
        raise ValueError(f"edges must have either wins_i and wins_j or logits, got {values or 'neither'}")
    for name in ("j", *values):
        value = getattr(edges, name)
        _checks.tensor(f"edges.{name}", value)
        _checks.shaped_like(f"edges.{name}", value, "edges.i", edges.i)
        if name != "j" and (value.double().isinf().any() or (name != "logits" and not (value >= 0).all())):
            raise ValueError(f"edges.{name} must be finite{', and not negative' * (name != 'logits')}")
    if edges.i.device.type != "cpu":
        raise ValueError(f"edges must be on the CPU, got {edges.i.device}")
    both = torch.cat([edges.i, edges.j])
    least, most = (int(both.min()), int(both.max())) if both.numel() else (0, -1)
    items = most + 1 if edges.num_items is None else edges.num_items
    if least < 0 or most >= items:
        raise ValueError(f"edges must have indices in [0, {items}), got {least if least < 0 else most}")
    return edges._replace(num_items=items)
