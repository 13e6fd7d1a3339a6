"""Checks of what the models are called with, made before anything is computed.

Ranges can only be checked outside jit, where the values are known: JAX clamps or fills silently.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Int, PRNGKeyArray

ArrayInput = Array | np.ndarray
"""Any array a model may be called with; the checks here say more about it than a type can."""


def require_rank(name: str, array: ArrayInput, accepted: str) -> tuple[int, ...]:
    """The shape of an array, which must have the axes that `accepted` names.

    Raises:
        ValueError: it has more or fewer.
    """
    shape = np.shape(array)
    if len(shape) != accepted.count(",") + 1:
        raise ValueError(f"{name} must be {accepted}, got shape {shape}")
    return shape


def check_integers(name: str, values: ArrayInput, shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Returns an array as int32 after checking its type and shape.

    Narrower integers would wrap when compared with -100 or added to.

    Raises:
        ValueError: it does not hold integers (outside jit: that fit in 32 bits), or has another
            shape.
    """
    if not isinstance(values, jax.core.Tracer):
        values = np.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer) or values.shape != shape:
        raise ValueError(f"{name} must be integers {shape}, got {values.dtype} {values.shape}")
    if isinstance(values, np.ndarray) and values.size:
        low, high = values.min(), values.max()
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name} must fit in 32 bits, got {low}..{high}")
    return jnp.asarray(values, jnp.int32)


def check_ids(name: str, ids: ArrayInput, shape: tuple[int, ...], size: int) -> Int[Array, "..."]:
    """Returns `ids` as a JAX array after checking that they are integers in [0, size).

    Args:
        name: of the argument, for messages.
        ids: integers of exactly `shape`.
        shape: what is accepted.
        size: rows of the table they index.

    Raises:
        ValueError: a wrong type, shape or (outside jit) range.
    """
    ids = check_integers(name, ids, shape)
    if not isinstance(ids, jax.core.Tracer) and ids.size:
        concrete = np.asarray(ids)
        low, high = concrete.min(), concrete.max()
        if low < 0 or high >= size:
            raise ValueError(f"{name} must be in [0, {size}), got {low}..{high}")
    return ids


def check_mask(mask: ArrayInput, shape: tuple[int, ...]) -> Bool[Array, "B T"]:
    """Returns an attention mask as booleans, True where a token is real.

    Raises:
        ValueError: a wrong shape, or (outside jit) values other than 0 and 1.
    """
    mask = jnp.asarray(mask)
    if mask.shape != shape:
        raise ValueError(f"attention_mask must have shape {shape}, got {mask.shape}")
    if mask.dtype == bool:
        return mask
    if not isinstance(mask, jax.core.Tracer) and not np.isin(mask, (0, 1)).all():
        raise ValueError(
            "attention_mask must hold 0 (padding) and 1 (real token) or booleans, "
            f"got {np.unique(mask)[:5]}; additive masks are not accepted"
        )
    return mask.astype(bool)


def check_length(length: int, maximum: int) -> None:
    """Refuses sequences that the position embeddings do not cover.

    Raises:
        ValueError: `length` > `maximum`.
    """
    if length > maximum:
        raise ValueError(
            f"sequences must have at most max_position_embeddings={maximum} tokens, got {length}"
        )


def draw_key(rngs: nnx.Rngs | None, stream: str, reason: str) -> PRNGKeyArray:
    """The next key of a stream.

    Raises:
        ValueError: `rngs` is missing or lacks the stream (and has no default one).
    """
    if not isinstance(rngs, nnx.Rngs) or not {stream, "default"} & set(rngs):
        raise ValueError(f"{reason} needs random keys: pass rngs=nnx.Rngs({stream}=seed_or_key)")
    return rngs[stream]()
