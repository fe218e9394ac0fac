"""Pools of different sizes as one flat array: the responses of prompt p are `offsets[p]:offsets[p + 1]`.

Every function of this package takes its numbers per response padded ([prompts, n], NaN where there is none) or flat
with offsets; here both become the same thing. A padded pool keeps its padding, as responses without a usable number,
so that an index within the pool is the caller's column.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Pools(NamedTuple):
    """Numbers per response. `values` may be the caller's own memory: read it, never write to it."""

    values: np.ndarray  # float64 [responses], NaN where there is no usable number
    offsets: np.ndarray  # int64 [prompts + 1]


def as_pools(name, values, valid=None, offsets=None) -> Pools:
    """Checks numbers per response and makes one flat array of them; NaN, infinities and invalid ones become NaN.

    name: of the argument, for the messages.
    values: [prompts, n] numbers, or [responses] with offsets.
    valid: bool like values, False leaves a response out.
    offsets: [prompts + 1] integers from 0 to the number of responses, never falling.

    Raises TypeError for what is not numbers, ValueError for wrong shapes, masks and offsets.
    """
    values, offsets = as_flat(name, values, offsets)
    valid = None if valid is None else as_mask("valid", valid, name, values.shape).reshape(-1)
    return Pools(as_usable(values.reshape(-1), valid), offsets)


def as_flat(name, values, offsets=None) -> tuple[np.ndarray, np.ndarray]:
    """The values, in their own shape and dtype, and offsets, after the checks of as_pools and without a pass over them.

    For functions that read a few thousand prompts at a time, with `pool_table` and `as_usable`.
    """
    try:
        values = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must be [prompts, responses] numbers, ragged pools padded with NaN") from error
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be real numbers, NaN where there is none, got {values.dtype}")
    if offsets is None:
        if values.ndim != 2:
            raise ValueError(f"{name} must have shape [prompts, responses], got {list(values.shape)}")
        prompts, size = values.shape
        return values, np.arange(prompts + 1, dtype=np.int64) * size
    if values.ndim != 1:
        raise ValueError(f"{name} must have shape [responses] beside offsets, got {list(values.shape)}")
    return values, as_offsets(offsets, len(values))


def as_usable(values, valid=None) -> np.ndarray:
    """float64 like values: NaN for NaN, infinities and where valid is False. May be the memory of values."""
    values = values.astype(np.float64, copy=False)
    finite = np.isfinite(values)
    if valid is not None:
        finite &= valid
    return values if finite.all() else np.where(finite, values, np.nan)


def as_offsets(offsets, responses) -> np.ndarray:
    """int64 [prompts + 1], checked against the number of responses. Raises ValueError or TypeError naming offsets."""
    offsets = np.asarray(offsets)
    if offsets.dtype.kind not in "iu":
        raise TypeError(f"offsets must be integers, got {offsets.dtype}")
    if offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"offsets must have shape [prompts + 1], got {list(offsets.shape)}")
    offsets = offsets.astype(np.int64, copy=False)
    if offsets[0] != 0 or offsets[-1] != responses:
        raise ValueError(f"offsets must run from 0 to {responses}, the responses; got {offsets[0]} to {offsets[-1]}")
    if (falling := np.diff(offsets) < 0).any():
        at = int(np.argmax(falling))
        raise ValueError(f"offsets must not fall, got {offsets[at]} before {offsets[at + 1]} at {at}")
    return offsets


def as_mask(name, mask, beside, shape) -> np.ndarray:
    """bool of the shape of the argument `beside`. Raises ValueError."""
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != shape:
        raise ValueError(
            f"{name} must be bool with shape {list(shape)} to match {beside}, got {mask.dtype} {list(mask.shape)}"
        )
    return mask


def share_of(flags) -> float:
    """The mean of an array of bools, or of ones, zeros and halves; NaN of none."""
    return float(np.mean(flags)) if np.size(flags) else math.nan


def per_prompt(offsets) -> np.ndarray:
    """int64 [responses], the prompt of every response."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def blocks(offsets, most=1 << 16) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prompts of one pool size at a time: (prompts int64 [k], flat int64 [k, size]), the places of their responses.

    A block has about `most` responses, or one prompt that has more. Prompts without responses are left out.
    """
    every = np.arange(len(offsets) - 1)
    for prompts, size in same_size(offsets, most):
        yield every[prompts], _places(offsets, every[prompts], size)


def same_size(offsets, most=1 << 16) -> Iterator[tuple[slice | np.ndarray, int]]:
    """The same blocks as (prompts, size) for `pool_table`; prompts is a slice where all pools have one size."""
    sizes = np.diff(offsets)

    def parts(start, stop, size):
        step = max(1, most // size)
        return (slice(begin, min(begin + step, stop)) for begin in range(start, stop, step))

    if len(sizes) and sizes[0] and (sizes == sizes[0]).all():
        for part in parts(0, len(sizes), int(sizes[0])):
            yield part, int(sizes[0])
        return
    order = np.argsort(sizes, kind="stable")
    starts = np.flatnonzero(np.diff(sizes[order], prepend=0))
    for start, stop in zip(starts, np.append(starts, len(order))[1:], strict=True):
        size = int(sizes[order[start]])
        for part in parts(start, stop, size):
            yield order[part], size


def pool_table(values, offsets, prompts, size) -> np.ndarray:
    """[k, size], the values [responses] of one block of `same_size`; a view where prompts is a slice."""
    if isinstance(prompts, slice):
        return values.reshape(-1, size)[prompts]
    return values[_places(offsets, prompts, size)]


def _places(offsets, prompts, size) -> np.ndarray:
    return offsets[prompts][:, None] + np.arange(size)
