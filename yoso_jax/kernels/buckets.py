"""Gradients of query and key from the pairs of tokens that share a bucket, in plain JAX.

In linear time where buckets are about even, and in linear memory always, for every backend. The
result is that of `reference.bucketed_weights`; docs/gradients.md derives it.

For each hash, the tokens of a head are sorted by bucket. In a bucket every tile of queries meets
every tile of keys, in dense matrix products. The pairs of tiles of all heads and buckets are one
list, of which a loop takes a chunk at a time. The list is never written down: which pair has a
number is found by a search in the running count of pairs over the buckets.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.kernels import blocked, collisions

# Tokens a side of a tile: the larger, the more of a tile is beyond the end of its bucket.
_TILE = 64
# Pairs of tiles a chunk has: what a CPU's cache holds, and what keeps an accelerator busy.
_CHUNK_CPU, _CHUNK = 64, 1024
# So many pairs of tiles can be numbered.
_MOST_PAIRS = 2**30


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
    grad_query, grad_key = _sums(_gradients_of_pairs, options, *args)
    return hash_code_len / 2 * grad_query, hash_code_len / 2 * grad_key


def bucketed_values(
    query_codes: Int[Array, "*batch T m"],
    key_codes: Int[Array, "*batch S m"],
    query: Float[Array, "*batch T H"],
    key: Float[Array, "*batch S H"],
    value: Float[Array, "*batch S D"],
    query_mask: Bool[Array, "*batch T"] | None,
    key_mask: Bool[Array, "*batch S"] | None,
    *,
    hash_code_len: int,
    bucket_bits: int,
) -> Float[Array, "*batch T D"]:
    """The sums of values of which `bucketed_gradients` has the gradients, by the same pairs.

    See there for arguments.
    """
    options = dict(hash_code_len=hash_code_len, bucket_bits=bucket_bits)
    nothing = jnp.zeros((*query.shape[:-1], 0), query.dtype)
    args = query_codes, key_codes, query, key, value, nothing, query_mask, key_mask
    return _sums(_values_of_pairs, options, *args)[0]


def _gradients_of_pairs(
    weights: Array, query: Array, grad_out: Array, key: Array, value: Array
) -> tuple[Array, Array]:
    weights = weights * blocked.matmul("ptd,psd->pts", grad_out, value)
    return (
        blocked.matmul("pts,psh->pth", weights, key),
        blocked.matmul("pts,pth->psh", weights, query),
    )


def _values_of_pairs(
    weights: Array, query: Array, grad_out: Array, key: Array, value: Array
) -> tuple[Array, Array]:
    nothing = jnp.zeros((*key.shape[:-1], 0), key.dtype)
    return blocked.matmul("pts,psd->ptd", weights, value), nothing


# From the weights of tiles of pairs, and query, gradient, key and value of their tokens, to what is
# summed up for the queries and for the keys.
_OfPairs = Callable[[Array, Array, Array, Array, Array], tuple[Array, Array]]


def _sums(of_pairs: _OfPairs, options: Any, *args: Any) -> tuple[Array, Array]:
    sums = functools.partial(_sums_of_heads, of_pairs, **options)
    # More heads, for `vmap`: a loop with a length for each of them would copy all it sums into, in
    # every step, for those that have ended.
    sums = jax.custom_batching.custom_vmap(sums)

    @sums.def_vmap
    def _(axis_size: int, is_batched: Any, *args: Any) -> tuple:
        args = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)),
            args,
            tuple(is_batched),
        )
        return _sums(of_pairs, options, *args), (True, True)

    return sums(*args)


def _sums_of_heads(
    of_pairs: _OfPairs,
    query_codes: Array,
    key_codes: Array,
    query: Array,
    key: Array,
    value: Array,
    grad_out: Array,
    query_mask: Array | None,
    key_mask: Array | None,
    *,
    hash_code_len: int,
    bucket_bits: int,
) -> tuple[Array, Array]:
    """Means over the hashes, with the leading dimensions together as heads."""
    num_buckets, num_hashes = 2**bucket_bits, query_codes.shape[-1]

    def by_hash(codes: Array, mask: Array | None) -> Array:
        """The buckets `[m, heads, tokens]`; masked tokens are in one that does not exist."""
        codes = codes & (num_buckets - 1)
        if mask is not None:
            codes = jnp.where(mask[..., None], codes, num_buckets)
        return jnp.moveaxis(codes.reshape(-1, *codes.shape[-2:]), -1, 0)

    def sum_hashes(codes: tuple[Array, Array], rows: tuple[Array, ...], *, chunk: int) -> Any:
        query, key, value, grad_out = rows
        heads, num_queries = codes[0].shape[1:]
        num_keys = codes[1].shape[2]
        tile, most_pairs = _tile_size(heads, num_queries, num_keys, num_buckets)
        power = hash_code_len - bucket_bits
        sum_pairs = functools.partial(
            _sum_pairs, of_pairs, power=power, tile=tile, chunk=min(chunk, most_pairs)
        )

        def add_hash(sums: tuple[Array, Array], codes: tuple[Array, Array]) -> tuple[Any, None]:
            queries = _sort(codes[0], (query, grad_out), num_buckets=num_buckets, tile=tile)
            keys = _sort(codes[1], (key, value), num_buckets=num_buckets, tile=tile)
            of_queries, of_keys = sum_pairs(queries, keys)
            return (
                _add_in_order(sums[0], queries.order, of_queries),
                _add_in_order(sums[1], keys.order, of_keys),
            ), None

        columns = _columns(of_pairs, rows)
        start = (
            blocked.zeros((len(query), columns[0]), query.dtype, codes, rows),
            blocked.zeros((len(key), columns[1]), key.dtype, codes, rows),
        )
        return lax.scan(add_hash, start, codes)[0]

    sums = lax.platform_dependent(
        (by_hash(query_codes, query_mask), by_hash(key_codes, key_mask)),
        tuple(
            x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (query, key, value, grad_out)
        ),
        cpu=functools.partial(sum_hashes, chunk=_CHUNK_CPU),
        default=functools.partial(sum_hashes, chunk=_CHUNK),
    )
    return tuple(
        (total / num_hashes).reshape(*x.shape[:-1], total.shape[-1])
        for total, x in zip(sums, (query, key), strict=True)
    )


def _columns(of_pairs: _OfPairs, rows: tuple[Array, ...]) -> tuple[int, int]:
    """Of the sums for the queries and for the keys, from those of query, key, value, gradient."""
    query, key, value, grad_out = (jax.ShapeDtypeStruct((1, 1, x.shape[-1]), x.dtype) for x in rows)
    weights = jax.ShapeDtypeStruct((1, 1, 1), query.dtype)
    return tuple(
        x.shape[-1] for x in jax.eval_shape(of_pairs, weights, query, grad_out, key, value)
    )


def _tile_size(heads: int, num_queries: int, num_keys: int, num_buckets: int) -> tuple[int, int]:
    """Tokens a side of a tile, and the most pairs of tiles that there can be."""
    tile, longest = _TILE, max(num_queries, num_keys)
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
    of_pairs: _OfPairs, queries: _Sorted, keys: _Sorted, *, power: int, tile: int, chunk: int
) -> tuple[Array, Array]:
    """The sums of one hash, for sorted rows."""
    query_tiles, key_tiles = -(-queries.counts // tile), -(-keys.counts // tile)
    pairs = query_tiles * key_tiles
    ends = jnp.cumsum(pairs, dtype=jnp.int32)

    def find(side: _Sorted, bucket: Array, tile_number: Array, is_pair: Array) -> tuple:
        """The first rows of tiles, and which of their rows are in the bucket."""
        skipped = tile * tile_number
        in_bucket = jnp.arange(tile) < (side.counts[bucket] - skipped)[:, None]
        return jnp.where(is_pair, side.starts[bucket] + skipped, 0), in_bucket & is_pair[:, None]

    def add_chunk(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        done, of_queries, of_keys = carry
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
        weights = collisions.collision_probability(cosine, power)
        # The rows behind a bucket's last are another bucket's.
        weights = jnp.where(is_query[:, :, None] & is_key[:, None, :], weights, 0)
        mine, others = of_pairs(weights, query, grad_out, key, value)
        of_queries = _add_windows(of_queries, query_rows, mine)
        of_keys = _add_windows(of_keys, key_rows, others)
        return done + chunk, of_queries, of_keys

    inputs = ends, queries.arrays, keys.arrays
    (query, grad_out), (key, value) = queries.arrays, keys.arrays
    columns = _columns(of_pairs, (query, key, value, grad_out))
    start = (
        blocked.zeros((), jnp.int32, inputs),
        blocked.zeros((len(query), columns[0]), query.dtype, inputs),
        blocked.zeros((len(key), columns[1]), key.dtype, inputs),
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
