"""What a collision does to a normalised row, and so to the loss.

Where rows are normalised their length does not matter: the cotangent of a row is orthogonal to it,
so over the keys that it did collide with, what the cotangent asks for adds up to nothing. Over all
keys, by their probabilities, it does not, since the cotangent knows the noise of the row: it adds
up to more noise, or less, with all keys at once. The derivative of the expected loss is halfway
between the two, which docs/gradients.md derives.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

OTHER_HASHES = 8
"""At most as many more say what the values are that a query collides with."""

# The mean of all values counts like so many collisions.
_PRIOR = 8
# Halfway between a row without the next collision and one with it.
_HALF = 0.5
_TINY = 1e-24


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
    rows: Float[Array, "B T N D"],
    value: Float[Array, "B S N D"],
    key_mask: Bool[Array, "B S"] | None,
    other_rows: Float[Array, "B T N D"],
    other_counts: Float[Array, "B T N"],
    *,
    num_others: int,
) -> Float[Array, "B T N"]:
    """What each query is to add to its products with values, to halve what they add up to.

    That is half of the product with the mean value that it collides with, negative. Other hashes
    say which it is, whose noise the cotangents do not know; where they have few collisions, it is
    the mean of all values.

    Args:
      rows: cotangents of rows, scaled.
      value: as of `collision_scales`.
      key_mask: as of `collision_scales`.
      other_rows: sums of values by other hashes, means over them.
      other_counts: and their numbers.
      num_others: how many hashes.
    """
    dtype = jnp.promote_types(jnp.promote_types(rows.dtype, other_counts.dtype), jnp.float32)
    collided = num_others * other_rows.astype(dtype) + _PRIOR * _mean(value, key_mask, dtype)
    count = num_others * other_counts.astype(dtype) + _PRIOR
    return -_HALF * jnp.sum(rows.astype(dtype) * collided, axis=-1) / count


def other_projection(
    projection: Float[Array, "B N H columns"], hash_code_len: int
) -> Float[Array, "B N H others"]:
    """Hashes that have nothing to do with those of `projection`: its first, turned by 90 degrees.

    A vector is orthogonal to itself, turned: what both hashes say of it is independent.
    """
    first = projection[..., : OTHER_HASHES * hash_code_len]
    half = first.shape[-2] // 2
    parts = -first[..., half : 2 * half, :], first[..., :half, :], first[..., 2 * half :, :]
    return jnp.concatenate(parts, axis=-2)


def _mean(value: Array, key_mask: Array | None, dtype: jnp.dtype, power: int = 1) -> Array:
    """`[B, 1, N, D]`, of the keys that are not masked."""
    count = jnp.asarray(value.shape[1], dtype)
    if key_mask is not None:
        value = jnp.where(key_mask[..., None, None], value, 0)
        count = jnp.maximum(jnp.sum(key_mask, axis=1), 1).astype(dtype)[:, None, None, None]
    return jnp.sum(value.astype(dtype) ** power, axis=1, keepdims=True) / count
