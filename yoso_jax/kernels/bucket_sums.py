"""Sums over the pairs of tokens that share a bucket, in plain JAX.

For each hash, the tokens of a head are sorted by bucket. In a bucket every tile of queries meets
every tile of keys, in dense matrix products. The pairs of tiles of all heads and buckets are one
list, of which a loop takes a chunk at a time. The list is never written down: which pair has a
number is found by a search in the running count of pairs over the buckets.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from yoso_jax.kernels import blocked, collisions

# Tokens a side of a tile: the larger, the more of a tile is beyond the end of its bucket.
TILE = 64
# Pairs of tiles a chunk has: what a CPU's cache holds, and what keeps an accelerator busy.
_CHUNK_CPU, _CHUNK = 64, 1024
# So many pairs of tiles can be numbered.
_MOST_PAIRS = 2**30


def sum_hashes(
    codes: tuple[Array, Array],
    arrays: tuple[Any, ...],
    *,
    take: Callable[..., tuple[Array, ...]],
    widths: tuple[int, ...],
    hash_code_len: int,
    bucket_bits: int,
) -> tuple[Array, ...]:
    """Sums over hashes and pairs, `[heads * tokens, width]` of the queries, and of the keys.

    Args:
      codes: of queries and keys.
      arrays: queries, keys, values, rows, and masks of queries and keys.
      take: of weights and products of pairs of tiles, and of their queries and keys, what to add up
        for the queries, and perhaps for the keys.
      widths: of what it returns.
      hash_code_len: bits of a hash.
      bucket_bits: bits of a bucket.
    """
    num_buckets = 2**bucket_bits
    *rows, query_mask, key_mask = arrays

    def by_hash(codes: Array, mask: Array | None) -> Array:
        """The buckets `[m, heads, tokens]`; masked tokens are in one that does not exist."""
        codes = codes & (num_buckets - 1)
        if mask is not None:
            codes = jnp.where(mask[..., None], codes, num_buckets)
        return jnp.moveaxis(codes.reshape(-1, *codes.shape[-2:]), -1, 0)

    def add_up(codes: tuple[Array, Array], rows: tuple[Array, ...], *, chunk: int) -> Any:
        query, key, value, grad_out = rows
        heads, num_queries = codes[0].shape[1:]
        num_keys = codes[1].shape[2]
        tile, most_pairs = _tile_size(heads, num_queries, num_keys, num_buckets)
        sum_pairs = functools.partial(
            _sum_pairs,
            take=take,
            widths=widths,
            power=hash_code_len - bucket_bits,
            tile=tile,
            chunk=min(chunk, most_pairs),
        )

        def add_hash(sums: tuple[Array, ...], codes: tuple[Array, Array]) -> tuple[Any, None]:
            queries = _sort(codes[0], (query, grad_out), num_buckets=num_buckets, tile=tile)
            keys = _sort(codes[1], (key, value), num_buckets=num_buckets, tile=tile)
            parts = zip(sums, (queries, keys), sum_pairs(queries, keys), strict=False)
            return tuple(_add_in_order(x, side.order, part) for x, side, part in parts), None

        start = tuple(
            blocked.zeros((len(x), width), query.dtype, codes, rows)
            for x, width in zip((query, key), widths, strict=False)
        )
        return lax.scan(add_hash, start, codes)[0]

    return lax.platform_dependent(
        (by_hash(codes[0], query_mask), by_hash(codes[1], key_mask)),
        tuple(x.reshape(-1, x.shape[-1]) for x in rows),
        cpu=functools.partial(add_up, chunk=_CHUNK_CPU),
        default=functools.partial(add_up, chunk=_CHUNK),
    )


def _tile_size(heads: int, num_queries: int, num_keys: int, num_buckets: int) -> tuple[int, int]:
    """Tokens a side of a tile, and the most pairs of tiles that there can be."""
    tile, longest = TILE, max(num_queries, num_keys)
    while True:
        # With ceil(x) ceil(y) <= x y + x + y + 1 in every bucket that has queries and keys.
        tiles = (num_queries // tile + 1) * (num_keys // tile + 1)
        most_pairs = heads * (tiles + min(num_queries, num_keys, num_buckets))
        if most_pairs <= _MOST_PAIRS or tile >= longest:
            return tile, most_pairs
        tile *= 2


@dataclasses.dataclass(frozen=True)
class _Sorted:
    """The queries or the keys of all heads by bucket, for one hash.

    Attributes:
      order: `[rows]`, the token of each row.
      counts: `[buckets]`, tokens in each bucket of each head.
      starts: `[buckets]`, the first row of each.
      arrays: `[rows + tile, features]`, what tokens have, zeros for masked ones and at the end.
    """

    order: Array
    counts: Array
    starts: Array
    arrays: tuple[Array, ...]


def _sort(
    codes: Int[Array, "heads tokens"],
    arrays: tuple[Float[Array, "rows _"], ...],
    *,
    num_buckets: int,
    tile: int,
) -> _Sorted:
    heads, tokens = codes.shape
    first = tokens * jnp.arange(heads, dtype=jnp.int32)[:, None]
    order = jnp.argsort(codes, axis=-1).astype(jnp.int32)
    by_bucket = jnp.take_along_axis(codes, order, axis=-1)
    buckets = jnp.arange(num_buckets + 1, dtype=codes.dtype)
    edges = jax.vmap(lambda codes: jnp.searchsorted(codes, buckets))(by_bucket).astype(jnp.int32)
    rows = jnp.arange(heads * tokens, dtype=jnp.int32)
    order = (order + first).reshape(-1)
    # Masked tokens get rows beyond the end, where nothing is written: tiles reach behind buckets,
    # and zero times NaN is NaN.
    target = jnp.where(by_bucket.reshape(-1) < num_buckets, rows, rows + len(rows) + tile)
    target = jnp.zeros_like(rows).at[order].set(target, unique_indices=True)

    def sort(x: Array) -> Array:
        empty = jnp.zeros((len(rows) + tile, x.shape[1]), x.dtype)
        return empty.at[target].set(x, mode="drop", unique_indices=True)

    return _Sorted(
        order=order,
        counts=jnp.diff(edges).reshape(-1),
        starts=(edges[:, :-1] + first).reshape(-1),
        arrays=tuple(map(sort, arrays)),
    )


def _add_in_order(sums: Array, order: Array, part: Array) -> Array:
    return sums.at[order].add(part[: len(order)], unique_indices=True)


def _sum_pairs(
    queries: _Sorted,
    keys: _Sorted,
    *,
    take: Callable[..., tuple[Array, ...]],
    widths: tuple[int, ...],
    power: int,
    tile: int,
    chunk: int,
) -> tuple[Array, ...]:
    """What `take` makes of the pairs of one hash, for sorted rows."""
    query_tiles, key_tiles = -(-queries.counts // tile), -(-keys.counts // tile)
    pairs = query_tiles * key_tiles
    ends = jnp.cumsum(pairs, dtype=jnp.int32)

    def find(side: _Sorted, bucket: Array, tile_number: Array, is_pair: Array) -> tuple:
        """The first rows of tiles, and which of their rows are in the bucket."""
        skipped = tile * tile_number
        in_bucket = jnp.arange(tile) < (side.counts[bucket] - skipped)[:, None]
        return jnp.where(is_pair, side.starts[bucket] + skipped, 0), in_bucket & is_pair[:, None]

    def add_chunk(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        done, *sums = carry
        number = done + jnp.arange(chunk, dtype=jnp.int32)
        is_pair = number < ends[-1]
        bucket = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
        bucket = jnp.minimum(bucket, len(ends) - 1)
        within = number - ends[bucket] + pairs[bucket]
        query_tile, key_tile = jnp.divmod(within, jnp.maximum(key_tiles[bucket], 1))
        query_rows, is_query = find(queries, bucket, query_tile, is_pair)
        key_rows, is_key = find(keys, bucket, key_tile, is_pair)
        query, grad_out = (_windows(x, query_rows, tile) for x in queries.arrays)
        key, value = (_windows(x, key_rows, tile) for x in keys.arrays)
        cosine = blocked.matmul("pth,psh->pts", query, key)
        products = blocked.matmul("ptd,psd->pts", grad_out, value)
        # The rows behind a bucket's last are another bucket's.
        weights, products = (
            jnp.where(is_query[:, :, None] & is_key[:, None, :], x, 0)
            for x in (collisions.collision_probability(cosine, power), products)
        )
        taken = take(weights, products, query, key)
        parts = zip(sums, (query_rows, key_rows), taken, strict=False)
        return done + chunk, *(_add_windows(x, rows, part) for x, rows, part in parts)

    inputs = ends, queries.arrays, keys.arrays
    start = (
        blocked.zeros((), jnp.int32, inputs),
        *(
            blocked.zeros((len(side.arrays[0]), width), side.arrays[0].dtype, inputs)
            for side, width in zip((queries, keys), widths, strict=False)
        ),
    )
    return lax.while_loop(lambda carry: carry[0] < ends[-1], add_chunk, start)[1:]


def _windows(x: Array, starts: Array, size: int) -> Array:
    """`[rows, features], [p] -> [p, size, features]`, the rows from each start."""
    return jax.vmap(lambda start: lax.dynamic_slice_in_dim(x, start, size))(starts)


def _add_windows(x: Array, starts: Array, windows: Array) -> Array:
    """`x` with windows, which may overlap, added to its rows from each start."""
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.scatter_add(x, starts[:, None], windows, dimensions, mode=mode)
