"""What a collision is worth: against the derivative of an expected loss, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yoso_jax.kernels.effects import balance, collision_scales, other_projection
from yoso_jax.kernels.xla import l2_normalize_gradient


@pytest.mark.parametrize("curvature", [0.0, 3.0])
@pytest.mark.parametrize("chance", [0.01, 0.05])
def test_is_the_derivative_of_the_expected_loss(chance, curvature):
    """By the probabilities of independent collisions, 20 and 100 a query; closer than all pairs."""
    rng = np.random.default_rng(0)
    draws, num_hashes, num_keys, dim = 8000, 32, 64, 16
    value = rng.standard_normal((num_keys, dim)) + 0.4
    chances = chance * rng.uniform(0, 2, num_keys)
    slope, aim = rng.standard_normal((2, dim))
    subspace = np.linalg.qr(rng.standard_normal((dim, dim // 2)))[0]

    def normalize(rows):
        norm = np.linalg.norm(rows, axis=-1)
        return rows / np.where(norm > 0, norm, 1)[..., None], norm

    def loss(rows):
        unit, _ = normalize(rows)
        return unit @ slope + curvature / 2 * np.sum(((unit - aim) @ subspace) ** 2, axis=-1)

    counts = rng.binomial(num_hashes - 1, chances, (draws, num_keys))
    last = rng.random((draws, num_keys)) < chances
    rows = (counts + last) @ value / num_hashes
    wanted = np.empty(num_keys)
    for j, added in enumerate(value / num_hashes):
        # Of one hash of all: with the collision and without it.
        without = rows - np.where(last[:, j, None], added, 0)
        wanted[j] = chances[j] * num_hashes * np.mean(loss(without + added) - loss(without))

    unit, norm = normalize(rows)
    grad_unit = slope + curvature * (unit - aim) @ subspace @ subspace.T

    def device(x):
        return jnp.asarray(x, jnp.float32)[None, :, None]

    scale = collision_scales(device(unit), device(norm), device(value), None, num_hashes=num_hashes)
    tangents = l2_normalize_gradient(device(unit), 1 / scale, device(grad_unit))
    products = np.asarray(tangents)[0, :, 0] @ value.T
    mean = device(products @ chances / chances.sum())
    count = jnp.full_like(mean, chances.sum())
    shift = balance(mean, count, device(norm), device(value), None, num_hashes=num_hashes)
    found = (products + np.asarray(shift)[0]).mean(0) * chances
    all_pairs = products.mean(0) * chances
    assert np.linalg.norm(found - wanted) < np.linalg.norm(all_pairs - wanted)
    assert np.linalg.norm(found - wanted) < 0.12 * np.linalg.norm(wanted)


def _draw():
    keys = jax.random.split(jax.random.key(0), 4)
    shape = 2, 5, 3, 4
    grad_unit, unit, value = (jax.random.normal(key, shape) for key in keys[:3])
    norm = jax.random.uniform(keys[3], shape[:3]) + 0.5
    return grad_unit, unit / jnp.linalg.norm(unit, axis=-1, keepdims=True), norm, value


def test_half_of_the_mean_is_taken_and_all_where_a_row_is_noise():
    _, _, norm, value = _draw()
    mean, count = jnp.sin(jnp.arange(30.0)).reshape(norm.shape), 1 + jnp.cos(norm)

    def shift(norm):
        return balance(mean, count, norm, value, None, num_hashes=32)

    np.testing.assert_allclose(shift(1e4 * norm), -mean / 2, rtol=1e-6)
    np.testing.assert_allclose(shift(1e-4 * norm), -mean, rtol=1e-6)
    np.testing.assert_allclose(shift(0 * norm), -mean, rtol=1e-6)
    # As long as so many values are on average that are orthogonal.
    square = jnp.sum(value**2, axis=(1, 3))[:, None] / 5
    noise = jnp.sqrt(count * square / 32)
    np.testing.assert_allclose(shift(2**0.5 * noise), -0.75 * mean, rtol=1e-5)


def test_one_collision_of_many_hardly_counts_and_the_only_one_is_all():
    _, unit, norm, value = _draw()
    scale = collision_scales(unit, norm, value, None, num_hashes=10_000)
    np.testing.assert_allclose(scale, 1 / norm, rtol=1e-2)
    scale = collision_scales(unit, 1e-6 * norm, value, None, num_hashes=8)
    assert np.all(np.abs(scale) < 1e-3)


def test_nothing_is_finite_and_masked_keys_do_not_matter():
    mean, unit, norm, value = _draw()
    mean = mean[..., 0]
    unit, norm = unit.at[0, 0].set(0), norm.at[0, 0].set(0)
    mask = jnp.arange(5) < jnp.array([[3], [0]])
    value = jnp.where(mask[..., None, None], value, jnp.nan)
    scale = collision_scales(unit, norm, value, mask, num_hashes=7)
    assert np.isfinite(scale).all()
    assert not np.any(scale[1])  # without a key
    assert not np.any(scale[0, 0])  # nothing collided
    shift = balance(mean, norm, norm, value, mask, num_hashes=7)
    assert np.isfinite(shift).all()
    cut = value[:1, :3]
    same = collision_scales(unit[:1], norm[:1], cut, None, num_hashes=7)
    np.testing.assert_allclose(scale[:1], same, rtol=1e-5)
    same = balance(mean[:1], norm[:1], norm[:1], cut, None, num_hashes=7)
    np.testing.assert_allclose(shift[:1], same, rtol=1e-5)


@pytest.mark.parametrize(("head_dim", "num_hashes", "num_bits"), [(4, 2, 2), (5, 3, 1), (1, 1, 3)])
def test_other_hashes_are_the_first_turned_by_a_right_angle(head_dim, num_hashes, num_bits):
    projection = jax.random.normal(jax.random.key(0), (2, 3, head_dim, 4 * 3))
    options = dict(hash_code_len=3, num_hashes=num_hashes, num_bits=num_bits)
    turned = other_projection(projection, **options)
    first = projection.reshape(2, 3, head_dim, 4, 3)[..., :num_hashes, :num_bits]
    first = first.reshape(2, 3, head_dim, -1)
    assert turned.shape == first.shape
    even = head_dim // 2 * 2
    lengths = (jnp.linalg.norm(x[..., :even, :], axis=-2) for x in (first, turned))
    np.testing.assert_allclose(*lengths, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum((first * turned)[..., :even, :], -2), 0, atol=1e-6)
