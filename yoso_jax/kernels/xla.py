"""The operations in plain JAX, for every backend, in memory linear in the number of tokens.

Attention comes in the layout and dtypes of `yoso_attention`, with its masks. Inside and in its
results numbers are float32 (or float64). Validation and differentiation are the callers'.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.kernels import blocked, buckets, collisions, effects
from yoso_jax.kernels.codes import hash_codes
from yoso_jax.kernels.collisions import lsh_weighted_cumulation as lsh_weighted_cumulation

# Rows are divided by no less.
_EPS = 1e-12


def widen(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def l2_normalize(x: Float[Array, "..."], axis: int = -1, eps: float = _EPS) -> Float[Array, "..."]:
    """`x / max(|x|, eps)`, computed in float32, with gradient 0 where `|x| <= eps`.

    Args:
      x: any shape, floating point.
      axis: the axis of the norm.
      eps: lower bound of the norm.

    Returns:
      The shape and dtype of `x`.
    """
    wide = widen(x)
    squared = jnp.sum(wide * wide, axis, keepdims=True)
    small = squared <= eps**2
    norm = jnp.sqrt(jnp.where(small, 1, squared))
    out = jnp.where(small, jax.lax.stop_gradient(wide) / eps, wide / norm)
    return out.astype(x.dtype)


def l2_normalize_gradient(
    unit: Float[Array, "*rows D"], norm: Float[Array, "*rows"], grad_unit: Float[Array, "*rows D"]
) -> Float[Array, "*rows D"]:
    """The gradient of x from that of `unit = l2_normalize(x)`, in the dtype of `unit`.

    Args:
      unit: normalised rows, which may have been rounded.
      norm: float32, `|x|` of each row.
      grad_unit: gradient of `unit`.
    """
    # Lengths do not change what is normalised: at a unit row the gradient is |x| times that at x.
    _, vjp = jax.vjp(l2_normalize, widen(unit))
    (grad,) = vjp(grad_unit.astype(widen(unit).dtype))
    norm = norm[..., None]
    small = norm <= _EPS
    return jnp.where(small, 0, grad / jnp.where(small, 1, norm)).astype(unit.dtype)


def lsh_cumulation(
    query_codes: Int[Array, "*batch T m"],
    key_codes: Int[Array, "*batch S m"],
    value: Float[Array, "*batch S D"],
    query_mask: Bool[Array, "*batch T"] | None,
    key_mask: Bool[Array, "*batch S"] | None,
    *,
    hash_code_len: int,
) -> Float[Array, "*batch T D"]:
    """`B v` with zero rows for masked queries and without masked keys, in the dtype of `value`."""
    wide = blocked.mask_rows(widen(value), key_mask)
    out = collisions.lsh_cumulation(query_codes, key_codes, wide, hash_code_len=hash_code_len)
    return blocked.mask_rows(out, query_mask).astype(value.dtype)


def heads_first(
    x: Float[Array, "B T N H"], mask: Bool[Array, "B T"] | None
) -> Float[Array, "B N T H"]:
    """In at least float32, masked rows zero."""
    return jnp.swapaxes(mask_tokens(widen(x), mask), 1, 2)


def tokens_first(
    x: Float[Array, "B N T H"], mask: Bool[Array, "B T"] | None
) -> Float[Array, "B T N H"]:
    """The layout of attention again, masked rows zero."""
    return mask_tokens(jnp.swapaxes(x, 1, 2), mask)


def mask_tokens(
    x: Float[Array, "B T N H"], mask: Bool[Array, "B T"] | None
) -> Float[Array, "B T N H"]:
    """Zeros for the tokens that are not True in `mask`, whatever stood there."""
    return x if mask is None else jnp.where(mask[..., None, None], x, 0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query", "key"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Codes:
    """What `sampled` keeps for its backward pass: codes as they are, int32 `[B, N, tokens, m]`."""

    query: Array
    key: Array


def sampled(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    projection: Float[Array, "B N H columns"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    *,
    hash_code_len: int,
    normalize: bool,
    keep_codes: bool,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None, Codes]:
    """`B v` for the hashes of `projection`, in float32, and what the backward pass needs of them.

    That is all codes here; another implementation may hash again, if not to `keep_codes`.

    With `normalize` the rows of `B v` are normalised, and the second result is their l2 norm before
    that; it is None otherwise.
    """
    del keep_codes
    options = dict(hash_code_len=hash_code_len)
    codes = _hash(query, key, projection, query_mask, key_mask, **options)
    value = heads_first(value, key_mask)
    out = collisions.lsh_cumulation(codes.query, codes.key, value, **options)
    out = tokens_first(out, query_mask)
    out, norm = _normalize_rows(out) if normalize else (out, None)
    return out, norm, codes


def _hash(
    query: Array,
    key: Array,
    projection: Array,
    query_mask: Array | None,
    key_mask: Array | None,
    *,
    hash_code_len: int,
) -> Codes:
    query_codes, key_codes = (
        hash_codes(heads_first(x, mask), widen(projection), hash_code_len=hash_code_len)
        for x, mask in ((query, query_mask), (key, key_mask))
    )
    return Codes(query_codes, key_codes)


def sampled_backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    projection: Float[Array, "B N H columns"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    codes: object,
    unit: Float[Array, "B T N D"] | None,
    norm: Float[Array, "B T N"] | None,
    grad_out: Float[Array, "B T N D"],
    *,
    hash_code_len: int,
    backward: str,
    num_backward_hashes: int,
    bucket_bits: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"], Float[Array, "B S N D"]]:
    """Gradients of `sampled`; those of query and key are the ones that `backward` names.

    `unit` and `norm` are what `sampled` returned if rows were normalised, else None. "bucketed"
    uses the lowest `bucket_bits` bits, which are 0 for "expectation", of the first
    `num_backward_hashes` hashes or, where rows were normalised, of others. These say, too, what the
    balance of `effects` is.
    """
    if not isinstance(codes, Codes):
        raise NotImplementedError(f"xla made no codes of type {type(codes).__name__}.")
    args = query, key, value, query_mask, key_mask
    rows, shift = grad_out, None
    near = Codes(*(x[..., :num_backward_hashes] for x in (codes.query, codes.key)))
    if unit is not None and norm is not None:
        if backward != "sampled":
            options = dict(num_hashes=codes.query.shape[-1])
            scale = effects.collision_scales(unit, norm, value, key_mask, **options)
            rows = l2_normalize_gradient(unit, 1 / scale, grad_out)
            if bucket_bits:
                other = effects.other_projection(
                    projection,
                    hash_code_len=hash_code_len,
                    num_hashes=num_backward_hashes,
                    num_bits=bucket_bits,
                )
                masks = query_mask, key_mask
                near = _hash(query, key, other, *masks, hash_code_len=bucket_bits)
            bits = dict(hash_code_len=hash_code_len, bucket_bits=bucket_bits)
            means = bucket_means(near.query, near.key, *args, rows, **bits)
            shift = effects.balance(*means, norm, value, key_mask, **options)
        grad_out = l2_normalize_gradient(unit, norm, grad_out)
    if backward == "sampled":
        return surrogate_gradients(codes, *args, grad_out, hash_code_len=hash_code_len)
    if backward == "bucketed":
        grads = bucketed_gradients(
            near.query,
            near.key,
            *args,
            rows,
            shift,
            hash_code_len=hash_code_len,
            bucket_bits=bucket_bits,
        )
    else:
        grads = expected_gradients(*args, rows, shift, hash_code_len=hash_code_len)
    grad_value = collisions.lsh_cumulation(
        codes.key, codes.query, heads_first(grad_out, query_mask), hash_code_len=hash_code_len
    )
    return *grads, tokens_first(grad_value, key_mask).astype(value.dtype)


def expected_gradients(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    rows: Float[Array, "B T N D"],
    shift: Float[Array, "B T N"] | None,
    *,
    hash_code_len: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
    """Gradients of query and key over all pairs, of what was sampled.

    Args:
      query: as of `sampled`.
      key: as of `sampled`.
      value: as of `sampled`.
      query_mask: as of `sampled`.
      key_mask: as of `sampled`.
      rows: gradient of `B v`; where that was normalised, with the scales of `effects`.
      shift: what to add to products of these with values, the balance of `effects`; or None.
      hash_code_len: bits of a hash.
    """
    units, unit_vjp = _units(query, key, query_mask, key_mask)
    value, rows = _with_shift(value, query_mask, key_mask, rows, shift)
    options = dict(hash_code_len=hash_code_len, with_value=False)
    return unit_vjp(collisions.expectation_gradients(*units, value, rows, **options)[:2])


def _with_shift(
    value: Array, query_mask: Array | None, key_mask: Array | None, rows: Array, shift: Array | None
) -> tuple[Array, Array]:
    """Values and rows with a column more, of ones and of shifts, so that products have these."""
    ones = jnp.ones((*value.shape[:-1], 1), jnp.float32)
    value, rows = heads_first(value, key_mask), heads_first(rows, query_mask)
    if shift is None:
        return value, rows
    ones, shift = heads_first(ones, key_mask), heads_first(shift[..., None], query_mask)
    return (
        jnp.concatenate([value, ones.astype(value.dtype)], axis=-1),
        jnp.concatenate([rows, shift.astype(rows.dtype)], axis=-1),
    )


def expectation(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    *,
    hash_code_len: int,
    normalize: bool,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """`E v`, in float32, and its norms as from `sampled`."""
    query, key = _unit(query, query_mask), _unit(key, key_mask)
    value = heads_first(value, key_mask)
    probability = collisions.probability_fn(hash_code_len)
    out = tokens_first(blocked.attend(probability, query, key, value), query_mask)
    return _normalize_rows(out) if normalize else (out, None)


def _normalize_rows(out: Array) -> tuple[Array, Array]:
    return l2_normalize(out), jnp.linalg.norm(out, axis=-1)


def expectation_backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    grad_out: Float[Array, "B T N D"],
    unit: Float[Array, "B T N D"] | None,
    norm: Float[Array, "B T N"] | None,
    *,
    hash_code_len: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"], Float[Array, "B S N D"]]:
    """Gradients of `expectation`; `unit` and `norm` are its results if normalised, else None."""
    if unit is not None and norm is not None:
        grad_out = l2_normalize_gradient(unit, norm, grad_out)
    args = query, key, value, query_mask, key_mask, grad_out
    return surrogate_gradients(None, *args, hash_code_len=hash_code_len)


def surrogate_gradients(
    codes: Codes | None,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    grad_out: Float[Array, "B T N D"],
    *,
    hash_code_len: int,
    with_value: bool = True,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"], Any]:
    """Gradients over the collisions in `codes`, or over the expected ones.

    That of value is None unless `with_value`.
    """
    gradients = collisions.expectation_gradients
    if codes is not None:
        gradients = functools.partial(collisions.collision_gradients, codes.query, codes.key)
    units, unit_vjp = _units(query, key, query_mask, key_mask)
    grad_query, grad_key, grad_value = gradients(
        *units,
        heads_first(value, key_mask),
        heads_first(grad_out, query_mask),
        hash_code_len=hash_code_len,
        with_value=with_value,
    )
    if grad_value is not None:
        grad_value = tokens_first(grad_value, key_mask).astype(value.dtype)
    return *unit_vjp((grad_query, grad_key)), grad_value


def bucketed_gradients(
    query_codes: Int[Array, "B N T m"],
    key_codes: Int[Array, "B N S m"],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    rows: Float[Array, "B T N D"],
    shift: Float[Array, "B T N"] | None,
    *,
    hash_code_len: int,
    bucket_bits: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
    """Gradients of query and key over the pairs whose codes agree in the lowest `bucket_bits`.

    `rows` and `shift` are those of `expected_gradients`.
    """
    units, unit_vjp = _units(query, key, query_mask, key_mask)
    grads = buckets.bucketed_gradients(
        query_codes,
        key_codes,
        *units,
        *_with_shift(value, query_mask, key_mask, rows, shift),
        *(_by_head(mask, query.shape[2]) for mask in (query_mask, key_mask)),
        hash_code_len=hash_code_len,
        bucket_bits=bucket_bits,
    )
    return unit_vjp(grads)


def bucket_means(
    query_codes: Int[Array, "B N T m"],
    key_codes: Int[Array, "B N S m"],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    rows: Float[Array, "B T N D"],
    *,
    hash_code_len: int,
    bucket_bits: int,
) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
    """As `buckets.bucket_means`, of `rows` that are those of `expected_gradients`."""
    unit_query, unit_key = _unit(query, query_mask), _unit(key, key_mask)
    value, rows = heads_first(value, key_mask), heads_first(rows, query_mask)
    masks = [_by_head(mask, query.shape[2]) for mask in (query_mask, key_mask)]
    args = query_codes, key_codes, unit_query, unit_key, value, rows, *masks
    options = dict(hash_code_len=hash_code_len, bucket_bits=bucket_bits)
    means = buckets.bucket_means(*args, **options)
    mean, count = (jnp.swapaxes(x, 1, 2) for x in means)
    return mean, count


def _by_head(mask: Array | None, heads: int) -> Array | None:
    if mask is None:
        return None
    return jnp.broadcast_to(mask[:, None], (len(mask), heads, mask.shape[1]))


def _units(
    query: Array, key: Array, query_mask: Array | None, key_mask: Array | None
) -> tuple[tuple[Array, Array], Callable[[tuple[Array, Array]], tuple[Array, Array]]]:
    """Unit queries and keys, and what turns their gradients into those of query and key."""
    return jax.vjp(lambda q, k: (_unit(q, query_mask), _unit(k, key_mask)), query, key)


def _unit(x: Array, mask: Array | None) -> Array:
    return l2_normalize(heads_first(x, mask))
