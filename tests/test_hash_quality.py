"""Statistics of the hashes: collision rates, and means of sampled outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yoso_jax import yoso_attention
from yoso_jax.attention import l2_normalize
from yoso_jax.hashing import sample_projection
from yoso_jax.kernels import reference
from yoso_jax.kernels.codes import hash_codes

ANGLES = np.array([0.2, 0.5, 1.1, np.pi / 2, 1.8])


@functools.partial(jax.jit, static_argnames=("head_dim", "hash_code_len", "draws", "hash_fn"))
def collision_rates(rng, *, head_dim, hash_code_len, draws, hash_fn):
    """Mean and spread over draws of the collision fraction of pairs at each angle."""
    rng, pair_rng = jax.random.split(rng)
    # A pair of its own for every draw: structured hashes are unbiased on average over directions.
    first, other = jax.random.normal(pair_rng, (2, draws, 1, head_dim))
    first = l2_normalize(first)
    other = l2_normalize(other - jnp.sum(other * first, -1, keepdims=True) * first)
    angles = jnp.asarray(ANGLES, jnp.float32)[:, None]
    second = jnp.cos(angles) * first + jnp.sin(angles) * other
    projection = sample_projection(
        rng, (draws,), head_dim, num_hashes=32, hash_code_len=hash_code_len, hash_fn=hash_fn
    )
    codes = hash_codes(jnp.concatenate([first, second], 1), projection, hash_code_len=hash_code_len)
    fractions = reference.collision_weights(codes[:, :1], codes[:, 1:])[:, 0]
    return fractions.mean(0), fractions.std(0) / np.sqrt(draws)


@pytest.mark.parametrize("hash_fn", ["gaussian", "fast"])
@pytest.mark.parametrize(("head_dim", "hash_code_len"), [(16, 8), (32, 9), (64, 9), (128, 11)])
def test_collision_rate_is_the_expectation(hash_fn, head_dim, hash_code_len):
    draws = 2000
    rate, error = collision_rates(
        jax.random.key(head_dim),
        head_dim=head_dim,
        hash_code_len=hash_code_len,
        draws=draws,
        hash_fn=hash_fn,
    )
    expected = (1 - ANGLES / np.pi) ** hash_code_len
    # The spread of a handful of collisions is no measure of it; that of independent ones is known.
    error = np.maximum(error, np.sqrt(expected / (32 * draws)))
    # Small heads have few distinct sign patterns: 2 % of structure is allowed for "fast".
    allowed = 4 * error + (0.02 * expected if hash_fn == "fast" else 0)
    assert np.all(np.abs(rate - expected) < allowed), (rate / expected, error / expected)


@pytest.mark.parametrize("hash_fn", ["gaussian", "fast"])
def test_mean_of_samples_is_the_expectation(hash_fn):
    """Outputs before normalisation, and gradients of query, key and value, over 4,000 draws."""
    keys = jax.random.split(jax.random.key(0), 5)
    query, key, value, cotangent = (jax.random.normal(k, (1, 6, 1, 16)) for k in keys[:4])
    key = 0.7 * query + key
    draws = 4000

    def outputs(rng, num_hashes):
        out, vjp = jax.vjp(
            lambda *args: yoso_attention(
                *args,
                rng=rng,
                num_hashes=num_hashes,
                hash_code_len=6,
                hash_fn=hash_fn,
                normalize=False,
            ),
            query,
            key,
            value,
        )
        return out, *vjp(cotangent)

    rngs = jax.random.split(keys[4], draws)
    samples = jax.jit(lambda rngs: jax.lax.map(lambda r: outputs(r, 4), rngs, batch_size=500))(rngs)
    for sample, expected in zip(samples, outputs(None, None), strict=True):
        z = (sample.mean(0) - expected) / (sample.std(0) / np.sqrt(draws) + 1e-6)
        # Elements of one sample are correlated, so their z-scores may be large together.
        assert np.sqrt(np.mean(z**2)) < 1.6
        assert np.abs(z).max() < 5
