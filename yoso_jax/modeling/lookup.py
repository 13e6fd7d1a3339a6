"""Rows of a table, with a gradient that many tokens of one row neither slow down nor round away."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

# Up to so many rows a product with one-hot vectors is nothing beside the rest of a model.
_MOST_ROWS = 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(
    dtype: DTypeLike, table: Float[Array, "rows hidden"], ids: Int[Array, "*batch"]
) -> Float[Array, "*batch hidden"]:
    """`table[ids]` in another type.

    The gradient is summed in float32 whatever the type: JAX's own would be in `dtype`, and of a sum
    of bfloat16 nothing is left of a term once 256 like it are in. Where accelerators would have
    thousands of threads wait to add to one row of a small table, it is a product of matrices.

    Args:
        dtype: of the result.
        table: the rows.
        ids: integers in [0, rows); rows of others are NaN.
    """
    return jnp.take(table, ids, axis=0).astype(dtype)


def _forward(dtype: DTypeLike, table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    # Of the table only the shape and type are kept.
    return look_up(dtype, table, ids), (jnp.empty((len(table), 0), table.dtype), ids)


def _backward(dtype: DTypeLike, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    empty, ids = residuals
    rows = len(empty)

    def add(grad: Array, ids: Array) -> Array:
        zeros = jnp.zeros((rows, grad.shape[-1]), jnp.float32)
        return zeros.at[ids].add(grad.astype(jnp.float32))

    def multiply(grad: Array, ids: Array) -> Array:
        return lax.dot_general(
            jax.nn.one_hot(ids, rows, dtype=grad.dtype),
            grad,
            (((0,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    flat = grad.reshape(-1, grad.shape[-1]), ids.reshape(-1)
    if rows > _MOST_ROWS:
        total = add(*flat)
    else:
        total = lax.platform_dependent(*flat, cpu=add, default=multiply)
    return total.astype(empty.dtype), None


look_up.defvjp(_forward, _backward)
