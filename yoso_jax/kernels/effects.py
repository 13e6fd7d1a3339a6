"""What a collision does to a normalised row, and so to the loss.

Where rows are normalised their length does not matter: the cotangent of a row is orthogonal to it,
so over the keys that it did collide with, what the cotangent asks for adds up to nothing. Over all
keys, by their probabilities, it does not, since the cotangent knows the noise of the row: it adds
up to more noise, or less, with all keys at once. The derivative of the expected loss is halfway
between the two, which docs/gradients.md derives.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

_TINY = 1e-24
# That are added up first.
_ROWS = 64


def collision_scales(
    unit: Float[Array, "B T N D"],
    norm: Float[Array, "B T N"],
    value: Float[Array, "B S N D"],
    key_mask: Bool[Array, "B S"] | None,
    *,
    num_hashes: int,
) -> Float[Array, "B T N"]:
    """What to multiply cotangents of normalised rows with.

    One collision more makes a row longer, and the cotangent is orthogonal to that, too: the scale
    is `(1 - w) / l` for a row that is then of length l and has a share w of the collision. Values
    of a head are all taken for as long as their mean square, and for as far along the row as their
    mean.

    Args:
      unit: normalised rows; zeros where nothing collided.
      norm: l2 norms of the rows before that, of means over hashes.
      value: rows that were summed.
      key_mask: True for the keys that were attended to, or None.
      num_hashes: how many there were, m.

    Returns:
      float32 (or float64); zeros where nothing collided.
    """
    dtype = jnp.promote_types(jnp.promote_types(unit.dtype, norm.dtype), jnp.float32)
    unit, norm = unit.astype(dtype), norm.astype(dtype)
    mean = _mean(value, key_mask, dtype) / num_hashes
    square = jnp.sum(_mean(value, key_mask, dtype, power=2), axis=-1) / num_hashes**2
    added = norm * jnp.sum(unit * mean, axis=-1)
    # By the means a row could become shorter than the part of it that is not the collision's.
    squared = jnp.maximum(norm**2 + 2 * added + square, jnp.maximum(norm**2, square) / 2)
    share = jnp.clip((added + square) / jnp.maximum(squared, _TINY), 0, 1)
    exists = (square > _TINY) & (norm > 0)
    return jnp.where(exists, (1 - share) / jnp.sqrt(jnp.maximum(squared, _TINY)), 0)


def balance(
    mean: Float[Array, "B T N"],
    count: Float[Array, "B T N"],
    norm: Float[Array, "B T N"],
    value: Float[Array, "B S N D"],
    key_mask: Bool[Array, "B S"] | None,
    *,
    num_hashes: int,
) -> Float[Array, "B T N"]:
    """What each query is to add to its products with values, for what they add up to.

    That is half of their mean, negative: halfway between a row without the next collision and one
    with it. Where rows are noise, what they add up to is, too, and all of it is taken away: of the
    square of a row's length, the share is taken that as many values would have of no direction in
    common.

    Args:
      mean: of the products of each query, by the probabilities of collisions.
      count: the sum of those probabilities.
      norm: as of `collision_scales`.
      value: as of `collision_scales`.
      key_mask: as of `collision_scales`.
      num_hashes: as of `collision_scales`.
    """
    dtype = jnp.promote_types(jnp.promote_types(mean.dtype, norm.dtype), jnp.float32)
    square = jnp.sum(_mean(value, key_mask, dtype, power=2), axis=-1)
    noise = count.astype(dtype) * square / num_hashes
    share = jnp.clip(noise / jnp.maximum(norm.astype(dtype) ** 2, _TINY), 0, 1)
    return -(1 + share) / 2 * mean.astype(dtype)


def first_projection(
    projection: Float[Array, "B N H columns"],
    *,
    hash_code_len: int,
    num_hashes: int,
    num_bits: int,
) -> Float[Array, "B N H first"]:
    """The first bits of the first hashes of `projection`; arguments as of `other_projection`."""
    *batch, head_dim, _ = projection.shape
    hashes = projection.reshape(*batch, head_dim, -1, hash_code_len)
    return hashes[..., :num_hashes, :num_bits].reshape(*batch, head_dim, -1)


def other_projection(
    projection: Float[Array, "B N H columns"],
    *,
    hash_code_len: int,
    num_hashes: int,
    num_bits: int,
) -> Float[Array, "B N H others"]:
    """Other hashes than those of `projection`: its first ones, turned by 90 degrees.

    A vector is orthogonal to itself, turned, so that what both hashes say of it is independent. The
    cotangent of a normalised row knows the noise of the hashes that made the row, and is orthogonal
    to it: by these hashes it would seem to add up to nothing.

    Args:
      projection: of the hashes that made the rows.
      hash_code_len: bits of them.
      num_hashes: how many others.
      num_bits: bits of these, at least 1.
    """
    options = dict(hash_code_len=hash_code_len, num_hashes=num_hashes, num_bits=num_bits)
    first = first_projection(projection, **options)
    half = first.shape[-2] // 2
    parts = -first[..., half : 2 * half, :], first[..., :half, :], first[..., 2 * half :, :]
    return jnp.concatenate(parts, axis=-2)


def _mean(value: Array, key_mask: Array | None, dtype: jnp.dtype, power: int = 1) -> Array:
    """`[B, 1, N, D]`, of the keys that are not masked."""
    batch, num_keys, *rest = value.shape
    count = jnp.asarray(num_keys, dtype)
    if key_mask is not None:
        value = jnp.where(key_mask[..., None, None], value, 0)
        count = jnp.maximum(jnp.sum(key_mask, axis=1), 1).astype(dtype)[:, None, None, None]
    # In two steps, which XLA would make one of: for GPUs it has few threads for many rows.
    value = jnp.pad(value, [(0, 0), (0, -num_keys % _ROWS), (0, 0), (0, 0)])
    parts = jnp.sum(value.astype(dtype).reshape(batch, -1, _ROWS, *rest) ** power, axis=2)
    return jnp.sum(lax.optimization_barrier(parts), axis=1, keepdims=True) / count
