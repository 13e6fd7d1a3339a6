"""Attention over pairs of tokens, block by block, so that nothing of size T x S is kept.

The weight of a pair is a function of a block of query features and a block of key features:
collision probabilities of vectors, or collision fractions of codes. Features are pytrees of arrays
`[..., tokens, features]`; all share the leading dimensions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

# Tokens a side of a tile. Small enough for a tile of a few heads to stay in a CPU's cache, large
# enough that the loop's overhead does not show.
_BLOCK = 512

type Features = Any
type WeightFn = Callable[[Features, Features], Float[Array, "*batch T S"]]


def matmul(subscripts: str, *operands: Array) -> Array:
    """`einsum` whose float32 products stay float32 (GPUs and TPUs round them by default)."""
    return jnp.einsum(subscripts, *operands, precision=lax.Precision.HIGHEST)


def mask_rows(
    x: Float[Array, "*rows D"], mask: Bool[Array, "*rows"] | None
) -> Float[Array, "*rows D"]:
    """Zeros in the rows that are not True in `mask`, whatever stood there, even NaN."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def zeros(shape: tuple[int, ...], dtype: DTypeLike, *like: Any) -> Array:
    """Zeros to start a scan's carry from, of the axis types that a sum over `like` has.

    Under `shard_map` a carry must vary over the same mesh axes from the start.
    """
    scalars = (lax.full_like(x, 0, dtype, shape=()) for x in jax.tree.leaves(like))
    return jnp.broadcast_to(functools.reduce(jnp.add, scalars), shape)


def split(x: Array, block: int) -> Array:
    """`[..., tokens, f]` to `[blocks, ..., block, f]`, zero-padded."""
    tokens = x.shape[-2]
    pad = -tokens % block
    if pad:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)])
    x = x.reshape(*x.shape[:-2], (tokens + pad) // block, block, x.shape[-1])
    return jnp.moveaxis(x, -3, 0)


def merge(x: Array, tokens: int) -> Array:
    """The inverse of `split`."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :tokens, :]


def attend(
    weight_fn: WeightFn,
    query: Features,
    key: Features,
    value: Float[Array, "*batch S D"],
) -> Float[Array, "*batch T D"]:
    """`weights @ value`. Padded keys have value zero, so their weights do not matter."""
    num_queries = jax.tree.leaves(query)[0].shape[-2]
    block_q, block_k = min(_BLOCK, num_queries), min(_BLOCK, value.shape[-2])
    query = jax.tree.map(lambda x: split(x, block_q), query)
    key, value = jax.tree.map(lambda x: split(x, block_k), (key, value))

    def one_query_block(query: Features) -> Array:
        def add_key_block(out: Array, block: tuple[Features, Array]) -> tuple[Array, None]:
            key, value = block
            return out + matmul("...ts,...sd->...td", weight_fn(query, key), value), None

        shape = (*value.shape[1:-2], block_q, value.shape[-1])
        out = zeros(shape, value.dtype, query, key, value)
        return lax.scan(add_key_block, out, (key, value))[0]

    return merge(lax.map(one_query_block, query), num_queries)


def attend_backward(
    weight_fn: WeightFn,
    query_features: Features,
    key_features: Features,
    query: Float[Array, "*batch T H"],
    key: Float[Array, "*batch S H"],
    value: Float[Array, "*batch S D"],
    grad_out: Float[Array, "*batch T D"],
    *,
    with_value: bool = True,
) -> tuple[
    Float[Array, "*batch T H"], Float[Array, "*batch S H"], Float[Array, "*batch S D"] | None
]:
    """`W k`, `W^T q` and `weights^T g`, with `W = weights * (g v^T)`; weights are recomputed.

    Padded tokens have value or cotangent zero and so contribute nothing. The third is None unless
    `with_value`.
    """
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    block_q, block_k = min(_BLOCK, num_queries), min(_BLOCK, num_keys)
    queries = jax.tree.map(lambda x: split(x, block_q), (query_features, query, grad_out))
    keys = jax.tree.map(lambda x: split(x, block_k), (key_features, key, value))

    def one_query_block(carry: Any, block: Any) -> tuple[Any, Array]:
        query_features, query, grad_out = block

        def one_key_block(grad_query: Array, block: Any) -> tuple[Array, tuple[Array, ...]]:
            key_features, key, value = block
            weights = weight_fn(query_features, key_features)
            pair = weights * matmul("...td,...sd->...ts", grad_out, value)
            parts = (matmul("...ts,...th->...sh", pair, query),)
            if with_value:
                parts += (matmul("...ts,...td->...sd", weights, grad_out),)
            return grad_query + matmul("...ts,...sh->...th", pair, key), parts

        start = zeros(query.shape, query.dtype, block, keys)
        grad_query, parts = lax.scan(one_key_block, start, keys)
        return jax.tree.map(jnp.add, carry, parts), grad_query

    sums = keys[1:] if with_value else keys[1:2]
    start = tuple(zeros(x.shape, x.dtype, queries, keys) for x in sums)
    (grad_key, *grad_value), grad_query = lax.scan(one_query_block, start, queries)
    return (
        merge(grad_query, num_queries),
        merge(grad_key, num_keys),
        merge(grad_value[0], num_keys) if with_value else None,
    )
