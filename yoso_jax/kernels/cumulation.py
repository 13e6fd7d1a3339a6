"""Bernoulli cumulation for given codes: validated, masked, differentiable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from yoso_jax.kernels import dispatch
from yoso_jax.kernels.blocked import mask_rows
from yoso_jax.kernels.checks import check_integer
from yoso_jax.kernels.dispatch import Implementation
from yoso_jax.kernels.xla import widen


def lsh_cumulation(
    query_codes: Integer[Array, "*batch T m"],
    key_codes: Integer[Array, "*batch S m"],
    value: Float[Array, "*batch S D"],
    *,
    hash_code_len: int,
    query_mask: Bool[Array, "*batch T"] | None = None,
    key_mask: Bool[Array, "*batch S"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "*batch T D"]:
    """`B v`, where B is the fraction of the m hashes in which query and key collide.

    The linear-time estimator of YOSO attention (paper, section 3.1 and algorithm 1). Codes are
    constants to differentiation; the gradient of `value` is exact.

    Args:
      query_codes: integers in `[0, 2**hash_code_len)`, `[..., T, m]`.
      key_codes: integers in `[0, 2**hash_code_len)`, `[..., S, m]`.
      value: float32, bfloat16, float16 (or float64), `[..., S, D]`; sums are in float32.
      hash_code_len: bits of a code, 1 to 16.
      query_mask: True for the queries that attend; the rows of others are zero.
      key_mask: True for the keys that are attended to.
      implementation: "mosaic_gpu" (Hopper GPUs), "xla", a sequence of names to try, or None for the
        best that applies, see `yoso_attention`.

    Returns:
      `[..., T, D]` in the dtype of `value`.

    Raises:
      ValueError: shapes do not agree, codes are out of range (where their values are concrete),
        hash_code_len or implementation is not one of the accepted values.
      TypeError: codes are not integers, or value is not floating point.
      NotImplementedError: the implementation named does not support the device, a shape or a dtype.
    """
    query_codes, key_codes, value = map(jnp.asarray, (query_codes, key_codes, value))
    names = _check(query_codes, key_codes, value, hash_code_len, implementation)
    # Narrower integers could not index the tables of all batch rows.
    query_codes, key_codes = query_codes.astype(jnp.int32), key_codes.astype(jnp.int32)
    query_mask = _check_mask("query_mask", query_mask, query_codes)
    key_mask = _check_mask("key_mask", key_mask, key_codes)
    return _cumulation(hash_code_len, names, query_codes, key_codes, value, query_mask, key_mask)


def lsh_weighted_cumulation(
    query_codes: Integer[Array, "*batch T m"],
    key_codes: Integer[Array, "*batch S m"],
    query_weight: Float[Array, "*batch T W"],
    key_weight: Float[Array, "*batch S W"],
    value: Float[Array, "*batch S D"],
    *,
    hash_code_len: int,
    query_mask: Bool[Array, "*batch T"] | None = None,
    key_mask: Bool[Array, "*batch S"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "*batch T D"]:
    """`(B * (query_weight key_weight^T)) v`, with the collision fractions B of `lsh_cumulation`.

    With the cotangent of the output as `query_weight`, the value as `key_weight` and the key as
    `value` it estimates the gradient of the query, up to `hash_code_len / 2` (paper, section 3.3).
    Exactly differentiable in `query_weight`, `key_weight` and `value`.

    Args:
      query_codes: integers in `[0, 2**hash_code_len)`, `[..., T, m]`.
      key_codes: integers in `[0, 2**hash_code_len)`, `[..., S, m]`.
      query_weight: `[..., T, W]`.
      key_weight: `[..., S, W]`.
      value: `[..., S, D]`.
      hash_code_len: bits of a code, 1 to 16.
      query_mask: True for the queries that attend; the rows of others are zero.
      key_mask: True for the keys that are attended to.
      implementation: "xla", a sequence of names to try, or None for the best that applies.

    Returns:
      `[..., T, D]` in the dtype of `value`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `lsh_cumulation`.
    """
    query_codes, key_codes, value = map(jnp.asarray, (query_codes, key_codes, value))
    query_weight, key_weight = map(jnp.asarray, (query_weight, key_weight))
    names = _check(query_codes, key_codes, value, hash_code_len, implementation)
    # Narrower integers could not index the tables of all batch rows.
    query_codes, key_codes = query_codes.astype(jnp.int32), key_codes.astype(jnp.int32)
    for name, weight, codes in (
        ("query_weight", query_weight, query_codes),
        ("key_weight", key_weight, key_codes),
    ):
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {weight.dtype}.")
        if weight.shape != (*codes.shape[:-1], query_weight.shape[-1]):
            raise ValueError(
                f"{name} must have shape {(*codes.shape[:-1], query_weight.shape[-1])}, "
                f"got {weight.shape}."
            )
    query_mask = _check_mask("query_mask", query_mask, query_codes)
    key_mask = _check_mask("key_mask", key_mask, key_codes)
    wide = mask_rows(widen(value), key_mask)
    query_weight = query_weight.astype(wide.dtype)
    key_weight = mask_rows(key_weight.astype(wide.dtype), key_mask)
    out = _weighted(hash_code_len, names, query_codes, key_codes, query_weight, key_weight, wide)
    return mask_rows(out, query_mask).astype(value.dtype)


def _check_mask(name: str, mask: Array | None, codes: Array) -> Array | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"{name} must be bool (True: attend), got {mask.dtype}.")
    if mask.shape != codes.shape[:-1]:
        raise ValueError(f"{name} must have shape {codes.shape[:-1]}, got {mask.shape}.")
    return mask


def _check(
    query_codes: Array,
    key_codes: Array,
    value: Array,
    hash_code_len: int,
    implementation: Implementation,
) -> tuple[str, ...]:
    check_integer("hash_code_len", hash_code_len, 1, 16)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"value must be floating point, got {value.dtype}.")
    for name, codes in (("query_codes", query_codes), ("key_codes", key_codes)):
        if not jnp.issubdtype(codes.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {codes.dtype}.")
        if codes.ndim < 2 or codes.shape[-1] < 1:
            raise ValueError(f"{name} must have shape [..., tokens, m], m >= 1, got {codes.shape}.")
        if not isinstance(codes, jax.core.Tracer) and codes.size:
            concrete = np.asarray(codes)
            low, high = concrete.min(), concrete.max()
            if low < 0 or high >= 2**hash_code_len:
                raise ValueError(
                    f"{name} must be in 0..{2**hash_code_len - 1} for hash_code_len="
                    f"{hash_code_len}, got values from {low} to {high}."
                )
    if query_codes.shape[-1] != key_codes.shape[-1]:
        raise ValueError(
            f"query_codes and key_codes must have equally many hashes, "
            f"got {query_codes.shape} and {key_codes.shape}."
        )
    if query_codes.shape[:-2] != key_codes.shape[:-2] or value.shape[:-1] != key_codes.shape[:-1]:
        raise ValueError(
            f"query_codes [..., T, m], key_codes [..., S, m] and value [..., S, D] must agree, "
            f"got {query_codes.shape}, {key_codes.shape} and {value.shape}."
        )
    return dispatch.resolve(implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cumulation(
    hash_code_len: int,
    names: tuple[str, ...],
    query_codes: Array,
    key_codes: Array,
    value: Array,
    query_mask: Array | None,
    key_mask: Array | None,
) -> Array:
    return dispatch.call(
        "lsh_cumulation",
        names,
        query_codes,
        key_codes,
        value,
        query_mask,
        key_mask,
        hash_code_len=hash_code_len,
    )


def _cumulation_fwd(
    hash_code_len: int,
    names: tuple[str, ...],
    query_codes: Array,
    key_codes: Array,
    value: Array,
    *masks: Array | None,
) -> tuple:
    out = _cumulation(hash_code_len, names, query_codes, key_codes, value, *masks)
    return out, (query_codes, key_codes, *masks)


def _cumulation_bwd(
    hash_code_len: int, names: tuple[str, ...], residuals: tuple, grad_out: Array
) -> tuple:
    query_codes, key_codes, query_mask, key_mask = residuals
    grad_value = _cumulation(
        hash_code_len, names, key_codes, query_codes, grad_out, key_mask, query_mask
    )
    return None, None, grad_value, None, None


_cumulation.defvjp(_cumulation_fwd, _cumulation_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted(
    hash_code_len: int,
    names: tuple[str, ...],
    query_codes: Array,
    key_codes: Array,
    query_weight: Array,
    key_weight: Array,
    value: Array,
) -> Array:
    return dispatch.call(
        "lsh_weighted_cumulation",
        names,
        query_codes,
        key_codes,
        query_weight,
        key_weight,
        value,
        hash_code_len=hash_code_len,
    )


def _weighted_fwd(hash_code_len: int, names: tuple[str, ...], *args: Array) -> tuple:
    return _weighted(hash_code_len, names, *args), args


def _weighted_bwd(
    hash_code_len: int, names: tuple[str, ...], residuals: tuple, grad_out: Array
) -> tuple:
    query_codes, key_codes, query_weight, key_weight, value = residuals
    weighted = functools.partial(_weighted, hash_code_len, names)
    return (
        None,
        None,
        weighted(query_codes, key_codes, grad_out, value, key_weight),
        weighted(key_codes, query_codes, value, grad_out, query_weight),
        weighted(key_codes, query_codes, key_weight, query_weight, grad_out),
    )


_weighted.defvjp(_weighted_fwd, _weighted_bwd)
