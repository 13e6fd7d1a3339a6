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
def test_ranges_are_those_of_the_buckets_of_a_tile(call, num_tokens, bucket_bits):
    layout, other_layout = Words(num_tokens, bucket_bits), Words(2 * num_tokens + 1, bucket_bits)
    buckets, others = draw(3, layout, 1), draw(3, other_layout, 2)
    words, other_words = (
        jnp.asarray(expected(*pair)) for pair in ((buckets, layout), (others, other_layout))
    )
    ranges = sorting.find_ranges(words, other_words, layout, other_layout, call=call)
    assert ranges.shape == (3, layout.tiles, 2)
    for row in range(3):
        others_sorted = np.sort(others[row][others[row] < layout.nowhere])
        for tile in range(layout.tiles):
            mine = words[row, tile * TILE : (tile + 1) * TILE] >> layout.token_bits
            start, end = ranges[row, tile]
            shared = others_sorted[(others_sorted >= mine[0]) & (others_sorted <= mine[-1])]
            assert end - start == shared.size
            np.testing.assert_array_equal(others_sorted[start:end], shared)


def test_words_that_do_not_fit_are_told():
    assert Words(2**18, 12).is_supported
    assert not Words(2**18 + 1, 12).is_supported
