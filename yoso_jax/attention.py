"""YOSO attention: exact collision probabilities, or Bernoulli samples of them by hashing."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.hashing import HashFn, sample_projection
from yoso_jax.kernels import dispatch
from yoso_jax.kernels.checks import check_integer
from yoso_jax.kernels.codes import BitLayout
from yoso_jax.kernels.dispatch import Implementation

type Backward = Literal["sampled", "expectation"]


def yoso_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    mask: Bool[Array, "B S"] | None = None,
    *,
    rng: Array | None = None,
    num_hashes: int | None = 32,
    hash_code_len: int = 9,
    query_mask: Bool[Array, "B T"] | None = None,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    hash_fn: HashFn = "gaussian",
    bit_layout: BitLayout = "spread",
    backward: Backward = "sampled",
    normalize: bool = True,
    implementation: Implementation = None,
) -> Float[Array, "B T N D"]:
    """Attention by collisions of sign hashes (YOSO, arXiv 2111.09714).

    A query attends to a key with the probability that their `hash_code_len`-bit hashes collide,
    `E = (1 - arccos(q.k / |q||k|) / pi) ** hash_code_len` (paper, eq. 3). With `num_hashes=None`
    the result is `E v` exactly (YOSO-E), in quadratic time and linear memory. Otherwise E is
    replaced by the fraction of `num_hashes` random hashes that collide (YOSO-m, paper, section
    3.1), in linear time. Then each row is divided by its l2 norm.

    Gradients of query and key are the paper's surrogate (section 3.3), which replaces `dE/dcos` by
    `hash_code_len / 2 * E` and is finite for parallel vectors; the gradient of value is exact.

    Args:
      query: `[B, T, N, H]`, float32, bfloat16, float16 (or float64). Its length does not matter.
      key: `[B, S, N, H]`, same dtype.
      value: `[B, S, N, D]`, same dtype.
      mask: bool `[B, S]`, True for the keys to attend to. When T == S and `query_mask` is not
        given, it masks the queries also, as self-attention over padded rows needs.
      rng: key of the hashes; required unless `num_hashes` is None. The same key gives the same
        hashes in every implementation and sharding. Batch rows and heads have their own.
      num_hashes: number of hashes, at least 1, or None for the expectation.
      hash_code_len: bits of a hash, 1 to 16; more bits concentrate attention.
      query_mask: bool `[B, T]`, True for the queries that attend. Other rows of the result are
        zero.
      query_seq_lengths: integers `[B]`; queries from this position on are masked.
      key_value_seq_lengths: integers `[B]`; keys from this position on are masked.
      hash_fn: "gaussian" projections, or "fast" ones of random signs and Hadamard transforms.
      bit_layout: "spread" (unbiased) or "block" (as published), with `hash_fn="fast"`.
      backward: gradients of query and key of a sampled forward pass: from the same hashes
        ("sampled"), or from the expectation, in quadratic time and with less noise.
      normalize: divide each row of the result by its l2 norm.
      implementation: "xla", a sequence of names to try in order, or None for the best that
        applies.

    Returns:
      `[B, T, N, D]` in the dtype of `query`. Rows that attend to nothing are zero.

    Raises:
      ValueError: a shape, range or choice is not accepted, or `rng` is missing.
      TypeError: a dtype is not accepted.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    _check_arrays(query, key, value)
    names = dispatch.resolve(implementation)
    _check_choices(num_hashes, hash_code_len, hash_fn, bit_layout, backward)
    query_mask, key_mask = _masks(
        query, key, mask, query_mask, query_seq_lengths, key_value_seq_lengths
    )
    dtype = query.dtype
    # Masked rows are zeroed on the way in and out, so nothing in them, not even a NaN, reaches
    # another row or a gradient.
    query, key, value = (
        _heads_first(x, mask)
        for x, mask in ((query, query_mask), (key, key_mask), (value, key_mask))
    )
    options = _Options(hash_code_len, backward, names)
    unit_query, unit_key = l2_normalize(query), l2_normalize(key)
    if num_hashes is None:
        out = _expectation(options, unit_query, unit_key, value)
    else:
        if rng is None:
            raise ValueError("rng is required unless num_hashes is None: pass a jax.random.key.")
        projection = sample_projection(
            rng,
            query.shape[:2],
            query.shape[-1],
            num_hashes=num_hashes,
            hash_code_len=hash_code_len,
            hash_fn=hash_fn,
            bit_layout=bit_layout,
        ).astype(query.dtype)
        query_codes, key_codes = (
            dispatch.call(
                "hash_codes",
                names,
                jax.lax.stop_gradient(x),
                projection,
                hash_code_len=hash_code_len,
            )
            for x in (query, key)
        )
        out = _sampled(options, query_codes, key_codes, unit_query, unit_key, value)
    if normalize:
        out = l2_normalize(out)
    out = jnp.swapaxes(out, 1, 2)
    if query_mask is not None:
        out = jnp.where(query_mask[..., None, None], out, 0)
    return out.astype(dtype)


def l2_normalize(x: Float[Array, "..."], axis: int = -1, eps: float = 1e-12) -> Float[Array, "..."]:
    """`x / max(|x|, eps)`, computed in float32, with gradient 0 where `|x| <= eps`.

    Args:
      x: any shape, floating point.
      axis: the axis of the norm.
      eps: lower bound of the norm.

    Returns:
      The shape and dtype of `x`.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.sum(wide * wide, axis, keepdims=True)
    small = squared <= eps**2
    norm = jnp.sqrt(jnp.where(small, 1, squared))
    out = jnp.where(small, jax.lax.stop_gradient(wide) / eps, wide / norm)
    return out.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Options:
    hash_code_len: int
    backward: Backward
    implementations: tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expectation(options: _Options, query: Array, key: Array, value: Array) -> Array:
    return dispatch.call(
        "expectation",
        options.implementations,
        query,
        key,
        value,
        hash_code_len=options.hash_code_len,
    )


def _expectation_fwd(options: _Options, *args: Array) -> tuple:
    return _expectation(options, *args), args


def _expectation_bwd(options: _Options, residuals: tuple, grad_out: Array) -> tuple:
    return dispatch.call(
        "expectation_backward",
        options.implementations,
        *residuals,
        grad_out,
        hash_code_len=options.hash_code_len,
    )


_expectation.defvjp(_expectation_fwd, _expectation_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sampled(
    options: _Options,
    query_codes: Array,
    key_codes: Array,
    query: Array,
    key: Array,
    value: Array,
) -> Array:
    """`B v`; the unit query and key only receive gradients."""
    del query, key
    return dispatch.call(
        "lsh_cumulation",
        options.implementations,
        query_codes,
        key_codes,
        value,
        hash_code_len=options.hash_code_len,
    )


def _sampled_fwd(options: _Options, *args: Array) -> tuple:
    return _sampled(options, *args), args


def _sampled_bwd(options: _Options, residuals: tuple, grad_out: Array) -> tuple:
    call = functools.partial(dispatch.call, hash_code_len=options.hash_code_len)
    names = options.implementations
    query_codes, key_codes, query, key, value = residuals
    if options.backward == "sampled":
        grads = call("sampled_backward", names, *residuals, grad_out)
    else:
        grad_query, grad_key, _ = call("expectation_backward", names, query, key, value, grad_out)
        grads = (
            grad_query,
            grad_key,
            call("lsh_cumulation", names, key_codes, query_codes, grad_out),
        )
    return None, None, *grads


_sampled.defvjp(_sampled_fwd, _sampled_bwd)


def _heads_first(x: Array, mask: Array | None) -> Array:
    """`[B, T, N, H]` to `[B, N, T, H]` in at least float32, masked rows zero."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is not None:
        x = jnp.where(mask[..., None, None], x, 0)
    return jnp.swapaxes(x, 1, 2)


def _check_arrays(query: Array, key: Array, value: Array) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, T, N, H], got shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.finfo(x.dtype).bits < 16:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}.")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}.")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got shape {x.shape}.")
    batch, _, heads, head_dim = query.shape
    if (key.shape[0], *key.shape[2:]) != (batch, heads, head_dim):
        raise ValueError(
            f"key must have shape [B={batch}, S, N={heads}, H={head_dim}] to fit query "
            f"{query.shape}, got {key.shape}."
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have shape [B, S, N, D] with the B, S, N of key {key.shape}, "
            f"got {value.shape}."
        )


def _check_choices(
    num_hashes: int | None,
    hash_code_len: int,
    hash_fn: HashFn,
    bit_layout: BitLayout,
    backward: Backward,
) -> None:
    if num_hashes is not None:
        check_integer("num_hashes, unless it is None,", num_hashes, 1)
    check_integer("hash_code_len", hash_code_len, 1, 16)
    for name, choice, accepted in (
        ("hash_fn", hash_fn, ("gaussian", "fast")),
        ("bit_layout", bit_layout, ("spread", "block")),
        ("backward", backward, ("sampled", "expectation")),
    ):
        if choice not in accepted:
            raise ValueError(f"{name} must be {accepted[0]!r} or {accepted[1]!r}, got {choice!r}.")


def _masks(
    query: Array,
    key: Array,
    mask: Array | None,
    query_mask: Array | None,
    query_seq_lengths: Array | None,
    key_value_seq_lengths: Array | None,
) -> tuple[Array | None, Array | None]:
    """Masks of the queries and of the keys, None where all take part."""
    batch, num_queries, num_keys = query.shape[0], query.shape[1], key.shape[1]
    mask, query_mask, query_seq_lengths, key_value_seq_lengths = (
        None if x is None else jnp.asarray(x)
        for x in (mask, query_mask, query_seq_lengths, key_value_seq_lengths)
    )
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"mask must be [B, S] = {(batch, num_keys)}, True for keys to attend to, got shape "
            f"{mask.shape}. Masks of single pairs [B, N, T, S] cannot be used: keys are summed in "
            f"buckets that all queries share."
        )
    if mask is not None and query_mask is None and num_queries == num_keys:
        query_mask = mask
    masks = []
    for name, given, lengths, tokens in (
        ("query", query_mask, query_seq_lengths, num_queries),
        ("key_value", mask, key_value_seq_lengths, num_keys),
    ):
        mask_name = "query_mask" if name == "query" else "mask"
        if given is not None and given.dtype != bool:
            raise TypeError(f"{mask_name} must be bool (True: attend), got {given.dtype}.")
        if given is not None and given.shape != (batch, tokens):
            raise ValueError(f"{mask_name} must have shape {(batch, tokens)}, got {given.shape}.")
        if lengths is not None:
            if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != (batch,):
                raise ValueError(
                    f"{name}_seq_lengths must be integers of shape {(batch,)}, got "
                    f"{lengths.dtype} of shape {lengths.shape}."
                )
            within = jnp.arange(tokens) < lengths[:, None]
            given = within if given is None else given & within
        masks.append(given)
    return masks[0], masks[1]
