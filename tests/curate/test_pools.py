"""curate.pools: padded and flat pools are the same thing, and what is no number is NaN."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.curate.pools import as_pools, blocks, per_prompt

NAN, INF = np.nan, np.inf


def test_padded_pools_keep_their_columns():
    pools = as_pools("rewards", [[1.0, NAN, 3.0], [INF, 2.0, -INF]])
    np.testing.assert_array_equal(pools.values, [1, NAN, 3, NAN, 2, NAN])
    np.testing.assert_array_equal(pools.offsets, [0, 3, 6])
    assert pools.values.dtype == np.float64 and pools.offsets.dtype == np.int64


def test_flat_pools_and_a_mask():
    values = np.array([5, 6, 7], np.int32)
    pools = as_pools("rewards", values, valid=np.array([True, False, True]), offsets=np.array([0, 0, 2, 3], np.int32))
    np.testing.assert_array_equal(pools.values, [5, NAN, 7])
    np.testing.assert_array_equal(pools.offsets, [0, 0, 2, 3])
    assert pools.offsets.dtype == np.int64


def test_the_callers_array_is_neither_copied_nor_changed():
    values = np.arange(6.0).reshape(2, 3)
    assert np.shares_memory(as_pools("rewards", values).values, values)
    values[0, 1] = INF
    assert not np.shares_memory(as_pools("rewards", values).values, values)
    assert values[0, 1] == INF


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_no_responses_at_all(shape):
    pools = as_pools("rewards", np.empty(shape))
    assert pools.values.shape == (0,) and len(pools.offsets) == shape[0] + 1
    assert list(blocks(pools.offsets)) == [] and per_prompt(pools.offsets).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0],), ValueError, r"rewards must have shape \[prompts, responses\], got \[2\]"),
        (([[1.0], [1.0, 2.0]],), ValueError, "rewards must be .* padded with NaN"),
        (([["1.0"]],), TypeError, "rewards must be real numbers"),
        (([[1j]],), TypeError, "rewards must be real numbers"),
        (([[1.0, None]],), TypeError, "got object"),
        ((np.zeros((2, 3)), np.ones((2, 2), bool)), ValueError, r"valid must be bool with shape \[2, 3\] to match rew"),
        ((np.zeros((2, 3)), np.ones((2, 3))), ValueError, "got float64"),
        ((np.zeros((2, 3)), None, [0, 6]), ValueError, r"rewards must have shape \[responses\] beside offsets"),
        ((np.zeros(3), None, [0.0, 3.0]), TypeError, "offsets must be integers, got float64"),
        ((np.zeros(3), None, [[0, 3]]), ValueError, r"offsets must have shape \[prompts \+ 1\], got \[1, 2\]"),
        ((np.zeros(3), None, np.zeros(0, int)), ValueError, r"got \[0\]"),
        ((np.zeros(3), None, [0, 2]), ValueError, "offsets must run from 0 to 3, the responses; got 0 to 2"),
        ((np.zeros(3), None, [1, 3]), ValueError, "got 1 to 3"),
        ((np.zeros(3), None, [0, 2, 1, 3]), ValueError, "offsets must not fall, got 2 before 1 at 1"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        as_pools("rewards", *arguments)


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 30))
def test_blocks_hold_every_response_once(sizes, most):
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
    prompt_of = per_prompt(offsets)
    seen = []
    for prompts, flat in blocks(offsets, most):
        assert flat.shape == (len(prompts), sizes[prompts[0]])
        assert flat.size <= most or len(prompts) == 1
        assert (prompt_of[flat] == prompts[:, None]).all() and (np.diff(flat, axis=1) == 1).all()
        seen.extend(flat.ravel())
    assert sorted(seen) == list(range(sum(sizes)))
