"""Results of kernels inside `shard_map`."""

import jax
from jaxtyping import Array, Shaped


def vary_like(x: Shaped[Array, "*shape"], *like: Array | None) -> Shaped[Array, "*shape"]:
    """`x` as varying, inside `shard_map`, over the mesh axes that any of the others varies over.

    Results of kernels say that they are the same on all devices.
    """
    axes = set[str]().union(
        *(jax.typeof(y).manual_axis_type.varying for y in like if y is not None)
    )
    missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x
