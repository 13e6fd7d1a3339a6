"""What the forward and the backward kernel of the expectation share.

With `w = sqrt(| |q| - q.k / |k| |)` the distance of unit vectors is `u = w / sqrt(|q|)`, and
`collision_chain` is a chain of w whose first slope depends on the query alone: neither queries nor
keys are normalised, or rounded once more. As the probability is symmetric, the backward kernel
exchanges the roles of queries and keys.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.kernels.mosaic_gpu.collision_chain import Chain
from yoso_jax.kernels.mosaic_gpu.lane import F32, I32, Lane, SharedPointer

ROWS = 64
"""Rows of a warpgroup's matrix products."""

MAX_DIM = 256
# The longest tile that is loaded.
_TILE = 128
# Probabilities evaluated together.
_PIECE = 16
_EPS = 1e-12
# Powers of lengths must be float32.
_SHORTEST, _LONGEST = 1e-10, 1e10


def probabilities(
    lane: Lane,
    products: Sequence[F32],
    rows: Sequence[Sequence[F32]],
    scales: SharedPointer,
    chain: Chain,
) -> Iterator[tuple[list[F32], list[F32]]]:
    """Collision probabilities of what a thread holds of a tile's matrix product, in pieces.

    Args:
      lane: a thread of a warpgroup.
      products: q.k, `[columns / 8, 2 rows, 2 columns]` flattened.
      rows: of the two rows, what `row_values` gives.
      scales: to the float32 -1 / |k| of the columns, in their order in `in_column_order`.
      chain: the probability of a distance.

    Yields:
      Probabilities, and the scales of their columns.
    """
    lengths, slopes = rows
    for first in range(0, len(products), _PIECE):
        # Step by step, so that neighbouring instructions do not wait for each other.
        places = range(first, min(first + _PIECE, len(products)))
        scale = [lane.bitcast_f32(word) for word in of_columns(lane, scales, places)]
        row = [i // 2 % 2 for i in places]
        ws = [
            lane.sqrt_abs(lane.fma(products[i], each, lengths[r]))
            for i, each, r in zip(places, scale, row, strict=True)
        ]
        terms = [[lane.fma(w, slopes[r], chain.start) for w, r in zip(ws, row, strict=True)]]
        for factor, constant in chain.steps:
            terms.append(
                [
                    lane.fma(x, y, constant) if constant else x * y
                    for x, y in zip(terms[-1], terms[factor], strict=True)
                ]
            )
        yield terms[-1], scale


def scale_and_shift(
    lane: Lane,
    products: Sequence[F32],
    scales: Sequence[F32],
    shifts: Sequence[SharedPointer],
    places: Sequence[int],
) -> list[F32]:
    """Products times the scales of their columns, plus the shifts of these, if there are any."""
    if not shifts:
        return [x * scale for x, scale in zip(products, scales, strict=True)]
    added = [lane.bitcast_f32(word) for word in of_columns(lane, shifts[0], places)]
    triples = zip(products, scales, added, strict=True)
    return [lane.fma(x, scale, shift) for x, scale, shift in triples]


def of_columns(lane: Lane, words: SharedPointer, places: Sequence[int]) -> list[I32]:
    """What belongs to the columns of the places of a matrix product, 32 bits each.

    Args:
      lane: a thread of a warpgroup.
      words: of all columns, in their order in `in_column_order`.
      places: of what a thread holds, whole columns / 16.
    """
    # Loads of 16 bytes: fewer instructions count for more than anything else here.
    mine = words.at(lane.thread_id() & 3, 16)
    loaded = {i // 8: mine.load(4, i // 8 * 64) for i in places[::8]}
    return [loaded[i // 8][i // 4 % 2 * 2 + i % 2] for i in places]


def in_column_order(x: Array) -> Array:
    """`[..., columns]` so that what one thread needs of 16 columns lies together."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2, 4, 2), -3, -2).reshape(x.shape)


def from_column_order(x: Array) -> Array:
    """The inverse of `in_column_order`."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 4, 2, 2), -3, -2).reshape(x.shape)


def place_of_column[Number: (I32, int)](column: Number) -> Number:
    """Where `in_column_order` puts a column."""
    return (column & ~14) | (column & 6) << 1 | (column & 8) >> 2


def row_values(lengths: Array, chain: Chain) -> list[Array]:
    """The lengths, and the slopes of w."""
    return [lengths, np.float32(chain.slope) * lax.rsqrt(lengths)]


def token_lengths(x: Float[Array, "B T N H"]) -> Float[Array, "heads T"]:
    """The l2 norms of tokens; 1 for tokens of zeros, which have no direction."""
    norm = lengths_of(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))
    return jnp.swapaxes(norm, 1, 2).reshape(-1, x.shape[1])


def lengths_of(squares: Array) -> Array:
    """The same of sums of squares."""
    norm = jnp.sqrt(squares)
    return jnp.where(norm <= _EPS, 1, jnp.clip(norm, _SHORTEST, _LONGEST))


def ends_of(
    query_mask: Bool[Array, "B T"] | None,
    query: Float[Array, "B T N H"],
    key_mask: Bool[Array, "B S"] | None,
    key: Float[Array, "B S N H"],
) -> Int[Array, " two_B"]:
    """Of each batch row, the ends of the queries and of the keys that take part."""

    def end(mask: Array | None, x: Array) -> Array:
        if mask is None:
            return jnp.full(x.shape[0], x.shape[1], jnp.int32)
        numbers = jnp.arange(1, mask.shape[1] + 1, dtype=jnp.int32)
        return jnp.max(jnp.where(mask, numbers, 0), axis=1)

    return jnp.stack([end(query_mask, query), end(key_mask, key)], axis=1).reshape(-1)


def pad(x: Float[Array, "B T N H"]) -> Float[Array, "B padded N padded_dim"]:
    """To what TMA loads: whole groups of eight tokens, at least a tile, and of sixteen columns."""
    tokens = max(_TILE, -(-x.shape[1] // 8) * 8) - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, tokens), (0, 0), (0, -x.shape[-1] % 16)])


def pad_to(x: Float[Array, "rows T"], tokens: int) -> Float[Array, "rows {tokens}"]:
    """With zeros."""
    return jnp.pad(x, [(0, 0), (0, tokens - x.shape[1])])


def swizzle(row_bytes: int) -> int:
    """Bytes of the rows of the tiles of shared memory: the most that divide a row."""
    return next(size for size in (128, 64, 32) if row_bytes % size == 0)


def shared(dtype: np.dtype, *shape: int, size: int | None = None) -> Any:
    """Shared memory in the arrangement that TMA and matrix products want.

    Args:
      dtype: of the elements.
      *shape: the last two are rows and columns.
      size: bytes of a swizzled row, if not the most that are possible.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = size or swizzle(shape[-1] * dtype.itemsize)
    transforms = (
        plgpu.TilingTransform((8, size // dtype.itemsize)),
        plgpu.SwizzleTransform(size),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)
