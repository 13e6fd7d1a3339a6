"""What the forward and the backward kernel of the expectation share.

With `w = sqrt(| |q| - q.k / |k| |)` the distance of unit vectors is `u = w / sqrt(|q|)`, and
`p ** (hash_code_len / 2)` is a polynomial of w whose coefficients depend on the query alone:
neither queries nor keys are normalised, or rounded once more. As the probability is symmetric, the
backward kernel exchanges the roles of queries and keys.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.kernels.mosaic_gpu.collision_polynomial import Polynomial
from yoso_jax.kernels.mosaic_gpu.lane import F32, Lane, SharedPointer

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
    constant: float,
) -> Iterator[tuple[list[F32], list[F32]]]:
    """Collision probabilities of what a thread holds of a tile's matrix product, in pieces.

    Args:
      lane: a thread of a warpgroup.
      products: q.k, `[columns / 8, 2 rows, 2 columns]` flattened.
      rows: of the two rows, what `row_values` gives.
      scales: to the float32 -1 / |k| of the columns.
      constant: of the polynomial.

    Yields:
      Probabilities, and the scales of their columns.
    """
    lengths, *coefficients, last = rows
    mine = scales.at(lane.thread_id() & 3, 8)
    for first in range(0, len(products), _PIECE):
        # Step by step, so that neighbouring instructions do not wait for each other.
        places = range(first, min(first + _PIECE, len(products)))
        columns = {i // 4: mine.load(2, i // 4 * 32) for i in places[::4]}
        scale = [lane.bitcast_f32(columns[i // 4][i % 2]) for i in places]
        row = [i // 2 % 2 for i in places]
        ws = [
            lane.sqrt_abs(lane.fma(products[i], each, lengths[r]))
            for i, each, r in zip(places, scale, row, strict=True)
        ]
        roots = [last[r] for r in row]
        for coefficient in reversed(coefficients):
            roots = [
                lane.fma(root, w, coefficient[r]) for root, w, r in zip(roots, ws, row, strict=True)
            ]
        roots = [lane.fma(root, w, constant) for root, w in zip(roots, ws, strict=True)]
        yield [root * root for root in roots], scale


def row_values(lengths: Array, polynomial: Polynomial) -> list[Array]:
    """The lengths, and the coefficients of w, w**2 and so on."""
    power = inverse = lax.rsqrt(lengths)
    values = [lengths]
    for coefficient in polynomial.coefficients[1:]:
        values.append(np.float32(coefficient) * power)
        power = power * inverse
    return values


def token_lengths(x: Float[Array, "B T N H"]) -> Float[Array, "heads T"]:
    """The l2 norms of tokens; 1 for tokens of zeros, which have no direction."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))
    norm = jnp.where(norm <= _EPS, 1, jnp.clip(norm, _SHORTEST, _LONGEST))
    return jnp.swapaxes(norm, 1, 2).reshape(-1, x.shape[1])


def masked_lengths(
    lengths: Float[Array, "heads T"], mask: Bool[Array, "B T"] | None, num_heads: int
) -> Float[Array, "heads T"]:
    """0 for the tokens that take no part."""
    return lengths if mask is None else jnp.where(jnp.repeat(mask, num_heads, axis=0), lengths, 0)


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


def pad_to(x: Float[Array, "heads T"], tokens: int) -> Float[Array, "heads {tokens}"]:
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
