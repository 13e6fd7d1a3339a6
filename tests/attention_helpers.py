"""What tests of attention share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from yoso_jax.kernels.xla import l2_normalize


def normal(*shapes, dtype=jnp.float32):
    """Arrays that NumPy draws: JAX's generator takes long to compile, for each shape again."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def draw_codes(*shapes, num_codes):
    """Hash codes, likewise."""
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.integers(0, num_codes, shape), jnp.int32) for shape in shapes]


def rows_with_slope(weights, slope, cosine, value, *, hash_code_len):
    """`weights value`, whose derivative by the cosines is `t/2 slope value`.

    Without its part along `slope value`, which is zero anyway where slope and weights are the same
    and the rows are normalised.
    """
    weights, slope = jax.lax.stop_gradient((weights, slope))
    total = functools.partial(jnp.einsum, "bnts,bnsd->bntd", precision="highest")
    fixed = jax.lax.stop_gradient(value)
    along = l2_normalize(total(slope, fixed))
    change = total(hash_code_len / 2 * slope * (cosine - jax.lax.stop_gradient(cosine)), fixed)
    change -= jnp.sum(change * along, axis=-1, keepdims=True) * along
    return total(weights, value) + change
