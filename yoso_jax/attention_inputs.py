"""What attention accepts: errors that name the argument and the accepted values."""

import jax.numpy as jnp
from jaxtyping import Array

from yoso_jax.hashing import HashFn
from yoso_jax.kernels.backward_choice import BACKWARDS, Backward
from yoso_jax.kernels.checks import check_integer
from yoso_jax.kernels.codes import BitLayout


def check_arrays(query: Array, key: Array, value: Array) -> None:
    """Refuses arrays that do not belong together.

    Raises:
      ValueError: for their shapes.
      TypeError: for their dtypes.
    """
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


def check_choices(
    num_hashes: int | None,
    hash_code_len: int,
    hash_fn: HashFn,
    bit_layout: BitLayout,
) -> None:
    """Refuses hashes that cannot be drawn, by a ValueError."""
    if num_hashes is not None:
        check_integer("num_hashes, unless it is None,", num_hashes, 1)
    check_integer("hash_code_len", hash_code_len, 1, 16)
    _check_choice("hash_fn", hash_fn, ("gaussian", "fast"))
    _check_choice("bit_layout", bit_layout, ("spread", "block"))


def check_backward(
    backward: Backward | None,
    num_backward_hashes: int | None,
    bucket_bits: int | None,
    num_hashes: int | None,
    hash_code_len: int,
) -> None:
    """Refuses gradients that `num_hashes` hashes cannot give, by a ValueError."""
    _check_choice("backward", backward, (*BACKWARDS, None))
    if num_backward_hashes is not None:
        name = "num_backward_hashes, unless it is None,"
        check_integer(name, num_backward_hashes, 1, num_hashes)
    if bucket_bits is not None:
        check_integer("bucket_bits, unless it is None,", bucket_bits, 0, hash_code_len)


def _check_choice(name: str, choice: str | None, accepted: tuple[str | None, ...]) -> None:
    if choice not in accepted:
        *first, last = map(repr, accepted)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {choice!r}.")


def check_mask(name: str, mask: Array | None, x: Array) -> Array | None:
    """A mask of the tokens of `x`, `[B, T, N, H]`, as an array.

    Raises:
      ValueError: it is not `[B, T]`.
      TypeError: it is not bool.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"{name} must be bool (True: attend), got {mask.dtype}.")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{name} must have shape {x.shape[:2]}, got {mask.shape}.")
    return mask


def make_masks(
    query: Array,
    key: Array,
    mask: Array | None,
    query_mask: Array | None,
    query_seq_lengths: Array | None,
    key_value_seq_lengths: Array | None,
) -> tuple[Array | None, Array | None]:
    """Masks of the queries and of the keys, None where all take part.

    Arguments are those of `yoso_attention`.

    Raises:
      ValueError: for a shape.
      TypeError: a mask is not bool.
    """
    batch, num_queries, num_keys = query.shape[0], query.shape[1], key.shape[1]
    if mask is not None and jnp.ndim(mask) != 2:
        raise ValueError(
            f"mask must be [B, S] = {(batch, num_keys)}, True for keys to attend to, got shape "
            f"{jnp.shape(mask)}. Masks of single pairs [B, N, T, S] cannot be used: keys are "
            f"summed in buckets that all queries share."
        )
    if mask is not None and query_mask is None and num_queries == num_keys:
        query_mask = mask
    masks = []
    for mask_name, given, name, lengths, x in (
        ("query_mask", query_mask, "query_seq_lengths", query_seq_lengths, query),
        ("mask", mask, "key_value_seq_lengths", key_value_seq_lengths, key),
    ):
        given = check_mask(mask_name, given, x)
        if lengths is not None:
            lengths = jnp.asarray(lengths)
            if not jnp.issubdtype(lengths.dtype, jnp.integer) or lengths.shape != (batch,):
                raise ValueError(
                    f"{name} must be integers of shape {(batch,)}, got {lengths.dtype} of shape "
                    f"{lengths.shape}."
                )
            within = jnp.arange(x.shape[1]) < lengths[:, None]
            given = within if given is None else given & within
        masks.append(given)
    return masks[0], masks[1]
