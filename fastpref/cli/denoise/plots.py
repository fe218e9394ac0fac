"""Draws what was found."""

import numpy as np
import torch
from torch import Tensor

from fastpref.errors import InputError

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise InputError('plots need matplotlib: pip install "fastpref[cli]"') from error

PIXELS = 600  # of a side of a matrix; beyond, L is sampled and of S the largest entry of each pixel is shown


def plot_low_rank(path, result, format: str | None = None) -> None:
    """Draws L, S and singular values of one matrix, an RPCAResult with sparse="coo". format: "png", "pdf", "svg"."""
    drawn, (low, sparse, values) = _figure(3)
    m, n = result.U.shape[0], result.Vh.shape[1]
    rows, columns = _sample(m), _sample(n)
    dense = result.low_rank(rows)[:, columns].numpy()
    _image(drawn, low, dense, (m, n), f"L: rank {int(result.info.rank)}")
    share = float(result.info.outlier_rate)
    _image(drawn, sparse, _largest(*result.sparse, (m, n)), (m, n), f"S: {share:.2%} of the observed entries")
    kept = result.S[: int(result.info.rank)].numpy()
    values.semilogy(np.arange(1, len(kept) + 1), kept, "o-")
    values.set(title="singular values of L", xlabel="component")
    values.xaxis.get_major_locator().set_params(integer=True)
    values.grid(alpha=0.3)
    drawn.savefig(path, format=format, dpi=120)


def plot_scores(path, scores: Tensor, stderr: Tensor | None, indices: Tensor, residuals: Tensor, format=None) -> None:
    """Draws Bradley-Terry scores [N] by rank, and the flagged pairs: indices [K, 2], residuals [K]."""
    drawn, (curve, pairs) = _figure(2)
    order = scores.argsort(descending=True)
    order = order[~scores[order].isnan()]
    place = torch.zeros_like(order.new_empty(len(scores)))
    place[order] = torch.arange(len(order))
    bars = None if stderr is None else stderr[order]
    curve.errorbar(np.arange(len(order)), scores[order], bars, fmt=".", elinewidth=0.8)
    curve.set(title=f"scores of {len(order)} items", xlabel="items, best first", ylabel="score")
    curve.grid(alpha=0.3)
    both = torch.cat([place[indices], place[indices.flip(1)]])
    shape = (len(order), len(order))
    image = _largest(both, torch.cat([residuals, -residuals]), shape)
    _image(drawn, pairs, image, shape, f"residuals of {len(indices)} flagged pairs")
    drawn.savefig(path, format=format, dpi=120)


def _figure(columns: int):
    drawn = Figure(figsize=(4.5 * columns, 4), layout="constrained")
    return drawn, drawn.subplots(1, columns)


def _sample(size: int) -> Tensor:
    return torch.linspace(0, size - 1, min(size, PIXELS), dtype=torch.float64).round().long()


def _largest(indices: Tensor, values: Tensor, shape) -> np.ndarray:
    """Returns the entries as at most PIXELS by PIXELS: of those that fall into a pixel, the largest in size."""
    size = [min(side, PIXELS) for side in shape]
    row, column = (indices[:, axis] * size[axis] // max(shape[axis], 1) for axis in (0, 1))
    image = np.zeros(size, np.float64)
    order = values.abs().argsort().numpy()
    image[row.numpy()[order], column.numpy()[order]] = values.numpy()[order]  # the last one written stays
    return image


def _image(drawn, axes, image: np.ndarray, shape, title: str) -> None:
    most = np.nanmax(np.abs(image), initial=0.0) or 1.0  # cells without a value stay blank
    extent = (-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5)
    shown = axes.imshow(image, "RdBu_r", vmin=-most, vmax=most, extent=extent, aspect="auto", interpolation="nearest")
    axes.set(title=title)
    drawn.colorbar(shown, ax=axes)
