"""What a collision does to a normalised row, and so to the loss.

A sampled row is normalised, and with few collisions it is short: one more turns it by much, and all
of them together it turns by less than each would alone. So the cotangent at the row that was
sampled is not what a collision is worth. docs/gradients.md derives what is.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Rows are taken for no shorter than this times what a single collision makes them.
_SHORTEST = 0.1
_TINY = 1e-24


def collision_effects(
    grad_unit: Float[Array, "B T N D"],
    unit: Float[Array, "B T N D"],
    norm: Float[Array, "B T N"],
    value: Float[Array, "B S N D"],
    key_mask: Bool[Array, "B S"] | None,
    *,
    num_hashes: int,
) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
    """Scale and shift of the change of the loss, per probability, by collisions with a key.

    With the part `r` of `grad_unit` that is orthogonal to `unit` it is `scale * (r . v) + shift`
    for a key with value v: the finite difference of the normalised row, by one collision more in
    one of the hashes, along `grad_unit`. In its second order all values have the mean and the mean
    square of those of their head.

    Args:
      grad_unit: gradient of the normalised rows.
      unit: normalised rows; zeros where nothing collided.
      norm: l2 norms of the rows before that, of means over hashes.
      value: rows that were summed.
      key_mask: True for the keys that were attended to, or None.
      num_hashes: how many there were, m.

    Returns:
      Both float32 (or float64).
    """
    dtype = jnp.promote_types(jnp.promote_types(unit.dtype, norm.dtype), jnp.float32)
    grad_unit, unit, norm, value = (x.astype(dtype) for x in (grad_unit, unit, norm, value))
    count = jnp.asarray(value.shape[1], dtype)
    if key_mask is not None:
        value = jnp.where(key_mask[..., None, None], value, 0)
        count = jnp.maximum(jnp.sum(key_mask, axis=1), 1).astype(dtype)[:, None, None, None]
    mean = jnp.sum(value, axis=1, keepdims=True) / count / num_hashes
    square = jnp.sum(jnp.sum(value**2, axis=-1, keepdims=True) / count, axis=1) / num_hashes**2
    square = jnp.swapaxes(square, 1, 2)  # [B, 1, N]
    along = jnp.sum(grad_unit * unit, axis=-1)
    # What a collision adds in the direction of a row, in the mean.
    added = jnp.sum(unit * mean, axis=-1)
    squared = jnp.maximum(norm**2 + 2 * norm * added + square, _SHORTEST**2 * square)
    scale = jnp.where(square > _TINY, 1 / jnp.sqrt(jnp.maximum(squared, _TINY)), 0)
    shift = num_hashes * along * ((norm + added) * scale - 1)
    return scale, jnp.where(square > _TINY, shift, 0)
