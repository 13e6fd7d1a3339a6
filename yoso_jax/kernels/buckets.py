"""Gradients of query and key from the pairs of tokens that share a bucket, in plain JAX.

In linear time where buckets are about even, and in linear memory always, for every backend. The
result is that of `reference.bucketed_weights`; docs/gradients.md derives it. Where buckets are so
uneven that all pairs are less work, all pairs are taken, by the expectation's weights.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.kernels import blocked, collisions
from yoso_jax.kernels.bucket_sums import TILE, sum_hashes


def bucketed_gradients(
    query_codes: Int[Array, "*batch T m"],
    key_codes: Int[Array, "*batch S m"],
    query: Float[Array, "*batch T H"],
    key: Float[Array, "*batch S H"],
    value: Float[Array, "*batch S D"],
    grad_out: Float[Array, "*batch T D"],
    query_mask: Bool[Array, "*batch T"] | None,
    key_mask: Bool[Array, "*batch S"] | None,
    *,
    hash_code_len: int,
    bucket_bits: int,
) -> tuple[Float[Array, "*batch T H"], Float[Array, "*batch S H"]]:
    """Gradients of unit query and unit key, estimated from m hashes.

    Args:
      query_codes: codes of at least `bucket_bits` bits, of which the lowest name the bucket.
      key_codes: the same of the keys.
      query: unit vectors.
      key: unit vectors.
      value: rows to attend to.
      grad_out: the cotangent of the sums of values.
      query_mask: True for the queries that attend. The rows of others, whatever stands there, are
        not read, and their gradients are zero.
      key_mask: the same of the keys.
      hash_code_len: bits of the hash whose collision probability weighs the values.
      bucket_bits: bits of a bucket, 0 to `hash_code_len`.

    Returns:
      The gradients, float32 or float64 as `query`.
    """
    options = dict(hash_code_len=hash_code_len, bucket_bits=bucket_bits)
    args = query_codes, key_codes, query, key, value, grad_out, query_mask, key_mask
    choose = functools.partial(_choose, _gradients, _gradients_of_all, **options)
    return _vmap_as_heads(choose, 2)(*args)


def bucket_means(
    query_codes: Int[Array, "*batch T m"],
    key_codes: Int[Array, "*batch S m"],
    query: Float[Array, "*batch T H"],
    key: Float[Array, "*batch S H"],
    value: Float[Array, "*batch S D"],
    rows: Float[Array, "*batch T D"],
    query_mask: Bool[Array, "*batch T"] | None,
    key_mask: Bool[Array, "*batch S"] | None,
    *,
    hash_code_len: int,
    bucket_bits: int,
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch T"]]:
    """What `rows` and values have in common for each query, by the keys it would collide with.

    Args:
      query_codes: as of `bucketed_gradients`, like all that are not named here.
      key_codes: the same of the keys.
      query: unit vectors.
      key: unit vectors.
      value: what collisions add.
      rows: what each query multiplies values with.
      query_mask: True for the queries that attend.
      key_mask: the same of the keys.
      hash_code_len: bits of the hash whose collision probability weighs the keys.
      bucket_bits: bits of a bucket.

    Returns:
      Estimates of `sum_j E_ij (rows_i . value_j) / sum_j E_ij`, zero without keys, and of the sum
      of the probabilities E; float32 or float64 as `query`.
    """
    options = dict(hash_code_len=hash_code_len, bucket_bits=bucket_bits)
    args = query_codes, key_codes, query, key, value, rows, query_mask, key_mask
    return _vmap_as_heads(functools.partial(_choose, _means, _means_of_all, **options), 2)(*args)


def _vmap_as_heads(function: Callable[..., tuple], num_results: int) -> Callable[..., tuple]:
    """More heads, for `vmap`.

    A loop with a length for each of them would copy all it sums into, in every step, for those that
    have ended, and a choice for each of them would compute both.
    """
    vmapped = jax.custom_batching.custom_vmap(function)

    @vmapped.def_vmap
    def _(axis_size: int, is_batched: Any, *args: Any) -> tuple:
        args = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)),
            args,
            tuple(is_batched),
        )
        return _vmap_as_heads(function, num_results)(*args), (True,) * num_results

    return vmapped


def _choose(
    of_buckets: Callable[..., tuple[Array, Array]],
    of_all: Callable[..., tuple[Array, Array]],
    query_codes: Array,
    key_codes: Array,
    *arrays: Any,
    hash_code_len: int,
    bucket_bits: int,
) -> tuple[Array, Array]:
    """What is less work, the buckets of all hashes or, once, all pairs."""
    *_, query_mask, key_mask = arrays
    of_all = functools.partial(of_all, hash_code_len=hash_code_len)
    if bucket_bits == 0:
        return of_all(*arrays)
    codes, masks = (query_codes, key_codes), (query_mask, key_mask)
    options = dict(hash_code_len=hash_code_len, bucket_bits=bucket_bits)
    *batch, num_queries, _ = query_codes.shape
    is_all = takes_all_pairs(
        _count_tile_pairs(codes, masks, bucket_bits),
        num_heads=math.prod(batch),
        num_queries=num_queries,
        num_keys=key_codes.shape[-2],
    )

    def take_all(codes: tuple[Array, Array], arrays: tuple[Any, ...]) -> tuple[Array, ...]:
        # Under `shard_map` both vary over the same mesh axes.
        return tuple(x + blocked.zeros((), x.dtype, codes, arrays) for x in of_all(*arrays))

    def take_buckets(codes: tuple[Array, Array], arrays: tuple[Any, ...]) -> tuple[Array, ...]:
        return of_buckets(*codes, *arrays, **options)

    return lax.cond(is_all, take_all, take_buckets, codes, arrays)


def _count_tile_pairs(
    codes: tuple[Array, Array], masks: tuple[Array | None, Array | None], bucket_bits: int
) -> Float[Array, ""]:
    """Pairs of tiles in all buckets of all heads and hashes."""
    tiles = []
    for code, mask in zip(codes, masks, strict=True):
        bucket = jnp.moveaxis(code & (2**bucket_bits - 1), -1, 0)
        ones = jnp.ones(bucket.shape, jnp.float32)
        if mask is not None:
            ones = jnp.where(mask, ones, 0)
        counts = collisions.bucket_sum(bucket, ones[..., None], 2**bucket_bits)
        tiles.append(jnp.ceil(counts / TILE))
    return jnp.sum(tiles[0] * tiles[1])


def takes_all_pairs(
    tile_pairs: Float[Array, ""], *, num_heads: int, num_queries: int, num_keys: int
) -> Bool[Array, ""]:
    """Whether that many pairs of tiles, of 64 tokens a side, are more work than all pairs are once.

    One of them counts as two of all pairs: about what it takes the kernels for Hopper, which sum
    up for each side by itself. Other devices choose as these do, so that results are the same.
    """
    tiles = -(-num_queries // TILE) * -(-num_keys // TILE)
    return 2 * tile_pairs > num_heads * tiles


def _gradients(
    query_codes: Array,
    key_codes: Array,
    query: Array,
    key: Array,
    *others: Array | None,
    hash_code_len: int,
    bucket_bits: int,
) -> tuple[Array, Array]:
    """`bucketed_gradients`, its leading dimensions together as heads."""

    def take(weights: Array, products: Array, query: Array, key: Array) -> tuple[Array, Array]:
        weights = weights * products
        return (
            blocked.matmul("pts,psh->pth", weights, key),
            blocked.matmul("pts,pth->psh", weights, query),
        )

    codes, width = (query_codes, key_codes), query.shape[-1]
    options = dict(take=take, widths=(width, width), bucket_bits=bucket_bits)
    sums = sum_hashes(codes, (query, key, *others), **options, hash_code_len=hash_code_len)
    scale = hash_code_len / 2 / query_codes.shape[-1]
    return scale * sums[0].reshape(query.shape), scale * sums[1].reshape(key.shape)


def _means(
    query_codes: Array,
    key_codes: Array,
    query: Array,
    *others: Array | None,
    hash_code_len: int,
    bucket_bits: int,
) -> tuple[Array, Array]:
    """`bucket_means`, its leading dimensions together as heads."""

    def take(weights: Array, products: Array, query: Array, key: Array) -> tuple[Array]:
        del query, key
        return (jnp.stack([jnp.sum(weights * products, -1), jnp.sum(weights, -1)], axis=-1),)

    options = dict(take=take, widths=(2,), bucket_bits=bucket_bits, hash_code_len=hash_code_len)
    (sums,) = sum_hashes((query_codes, key_codes), (query, *others), **options)
    total, count = jnp.moveaxis(sums.reshape(*query.shape[:-1], 2), -1, 0)
    return total / jnp.where(count > 0, count, 1), count / query_codes.shape[-1]


def _gradients_of_all(
    query: Array,
    key: Array,
    value: Array,
    grad_out: Array,
    query_mask: Array | None,
    key_mask: Array | None,
    *,
    hash_code_len: int,
) -> tuple[Array, Array]:
    """`bucketed_gradients` over all pairs."""
    queries = (blocked.mask_rows(x, query_mask) for x in (query, grad_out))
    keys = (blocked.mask_rows(x, key_mask) for x in (key, value))
    (query, grad_out), (key, value) = queries, keys
    options = dict(hash_code_len=hash_code_len, with_value=False)
    return collisions.expectation_gradients(query, key, value, grad_out, **options)[:2]


def _means_of_all(
    query: Array,
    key: Array,
    value: Array,
    rows: Array,
    query_mask: Array | None,
    key_mask: Array | None,
    *,
    hash_code_len: int,
) -> tuple[Array, Array]:
    """`bucket_means` over all pairs."""
    ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
    values = blocked.mask_rows(jnp.concatenate([value, ones], axis=-1), key_mask)
    query, key = blocked.mask_rows(query, query_mask), blocked.mask_rows(key, key_mask)
    sums = blocked.attend(collisions.probability_fn(hash_code_len), query, key, values)
    sums, rows = (blocked.mask_rows(x, query_mask) for x in (sums, rows))
    total, count = jnp.sum(rows * sums[..., :-1], axis=-1), sums[..., -1]
    return total / jnp.where(count > 0, count, 1), count
