"""What tests of attention share."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from yoso_jax.kernels import buckets
from yoso_jax.kernels.xla import l2_normalize


@contextlib.contextmanager
def always_buckets():
    """Sums over buckets, where all pairs of the few tokens that tests have would be less work."""
    with mock.patch.object(buckets, "takes_all_pairs", lambda tile_pairs, **_: tile_pairs < 0):
        yield


def normal(*shapes, dtype=jnp.float32):
    """Arrays that NumPy draws: JAX's generator takes long to compile, for each shape again."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def draw_codes(*shapes, num_codes):
    """Hash codes, likewise."""
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.integers(0, num_codes, shape), jnp.int32) for shape in shapes]


def unit_rows(weights, slope, cosine, value, *, hash_code_len, num_hashes=None, key_mask=None):
    """Normalised rows of `weights value`, whose derivative by the cosines is that of YOSO.

    `t/2 slope` is that of the weights. Where the slope is not that of `num_hashes` hashes
    themselves, but of what they are in expectation, a row moves by what one collision more in one
    of them would do, less the balance: half, and in as much as the row is noise all, of what the
    mean value would that it collides with, by the weights of the slope.
    """
    weights, slope = jax.lax.stop_gradient((weights, slope))
    total = functools.partial(jnp.einsum, "bnts,bnsd->bntd", precision="highest")
    fixed = jax.lax.stop_gradient(value)
    change = hash_code_len / 2 * slope * (cosine - jax.lax.stop_gradient(cosine))
    rows = total(weights, value)
    if num_hashes is None:
        return l2_normalize(rows + total(change, fixed))
    if key_mask is None:
        key_mask = jnp.ones((value.shape[0], value.shape[2]), bool)
    is_key = key_mask[:, None, :, None]
    count = jnp.sum(is_key, axis=2, keepdims=True)
    norm = jnp.linalg.norm(jax.lax.stop_gradient(rows), axis=-1, keepdims=True)
    unit = l2_normalize(jax.lax.stop_gradient(rows))
    mean = jnp.sum(jnp.where(is_key, fixed, 0), axis=2, keepdims=True) / count
    square = jnp.sum(jnp.where(is_key, fixed**2, 0), axis=(2, 3), keepdims=True) / count
    square = square / num_hashes**2
    added = norm * jnp.sum(unit * mean, axis=-1, keepdims=True) / num_hashes
    squared = jnp.maximum(norm**2 + 2 * added + square, jnp.maximum(norm**2, square) / 2)
    share = jnp.clip((added + square) / squared, 0, 1)
    count = jnp.sum(slope, axis=-1, keepdims=True)
    met = total(slope, fixed) / jnp.where(count > 0, count, 1)
    noise = count * square * num_hashes / jnp.where(norm > 0, norm, 1) ** 2
    part = (1 + jnp.clip(noise, 0, 1)) / 2
    moved = total(change, fixed) - jnp.sum(change, axis=-1, keepdims=True) * part * met
    turn = moved - jnp.sum(moved * unit, axis=-1, keepdims=True) * unit
    return l2_normalize(rows) + jnp.where(norm > 0, (1 - share) / jnp.sqrt(squared), 0) * turn
