"""Sorting by bucket: exact, the same in NumPy and on the GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yoso_jax.kernels.mosaic_gpu import lane_numpy, sorting
from yoso_jax.kernels.mosaic_gpu.sorting import TILE, Words


def mosaic_call(program, *inputs):
    from yoso_jax.kernels.mosaic_gpu import lane_mosaic

    return jax.jit(functools.partial(lane_mosaic.call, program))(*inputs)


CALLS = [
    pytest.param(lane_numpy.call, id="numpy"),
    pytest.param(mosaic_call, id="mosaic_gpu", marks=pytest.mark.gpu),
]
CASES = [(1, 0), (64, 1), (200, 3), (1000, 6), (1500, 7), (3000, 12), (9000, 5)]


def draw(rows, layout, seed):
    """Uneven buckets; some tokens take no part, and a row is all in one bucket."""
    rng = np.random.default_rng(seed)
    shape = rows, layout.num_tokens
    buckets = rng.integers(0, layout.nowhere, shape) * rng.integers(0, 2, shape)
    buckets[rng.random(shape) < 0.2] = layout.nowhere
    buckets[-1] = layout.nowhere - 1
    return buckets.astype(np.int32)


def expected(buckets, layout):
    words = np.asarray(layout.make(jnp.asarray(buckets)))
    order = np.argsort(words >> layout.token_bits, axis=1, kind="stable")
    return np.take_along_axis(words, order, axis=1)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("num_tokens", "bucket_bits"), CASES)
def test_sort_is_stable(call, num_tokens, bucket_bits):
    layout = Words(num_tokens, bucket_bits)
    buckets = draw(3, layout, num_tokens)
    words = sorting.sort(layout.make(jnp.asarray(buckets)), layout, call=call)
    np.testing.assert_array_equal(words, expected(buckets, layout))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("num_tokens", "bucket_bits"), CASES)
def test_tiles_are_of_one_bucket(call, num_tokens, bucket_bits):
    layout, other_layout = Words(num_tokens, bucket_bits), Words(2 * num_tokens + 1, bucket_bits)
    sides = (draw(3, layout, 1), layout), (draw(3, other_layout, 2), other_layout)
    words = [expected(*side) >> side[1].token_bits for side in sides]
    starts = [
        sorting.find_buckets(jnp.asarray(expected(*side)), side[1], call=call) for side in sides
    ]
    for found, each in zip(starts, words, strict=True):
        wanted = [np.searchsorted(row, np.arange(layout.nowhere + 1)) for row in each]
        np.testing.assert_array_equal(found, wanted)
    tiles = np.asarray(sorting.find_tiles(*starts, layout, call=call))
    assert tiles.shape == (3, layout.tiles, 4)
    for row in range(3):
        wanted = []
        for bucket in range(layout.nowhere):
            mine, others = (np.flatnonzero(each[row] == bucket) for each in words)
            theirs = [starts[1][row, bucket + i] for i in (0, 1)]
            assert theirs[1] - theirs[0] == others.size
            wanted += [[first, mine[-1] + 1, *theirs] for first in mine[::TILE]]
        is_tile = tiles[row].any(axis=1)
        np.testing.assert_array_equal(tiles[row][is_tile], np.reshape(wanted, (-1, 4)))


def test_words_that_do_not_fit_are_told():
    assert Words(2**18, 12).is_supported
    assert not Words(2**18 + 1, 12).is_supported
