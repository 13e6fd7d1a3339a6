"""What a collision is worth: against the derivative of an expected loss, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yoso_jax.kernels.effects import (
    OTHER_HASHES,
    balance,
    collision_scales,
    other_projection,
)
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
    others = rng.binomial(OTHER_HASHES, chances, (draws, num_keys)) / OTHER_HASHES
    grad_unit = slope + curvature * (unit - aim) @ subspace @ subspace.T

    def device(x):
        return jnp.asarray(x, jnp.float32)[None, :, None]

    scale = collision_scales(device(unit), device(norm), device(value), None, num_hashes=num_hashes)
    tangents = l2_normalize_gradient(device(unit), 1 / scale, device(grad_unit))
    counts = jnp.asarray(others.sum(-1), jnp.float32)[None, :, None]
    shift = balance(
        tangents, device(value), None, device(others @ value), counts, num_others=OTHER_HASHES
    )
    found = (np.asarray(tangents)[0, :, 0] @ value.T + np.asarray(shift)[0]).mean(0) * chances
    assert np.linalg.norm(found - wanted) < 0.12 * np.linalg.norm(wanted)


def test_noise_that_all_values_share_is_taken_away():
    """Values that hardly differ, and cotangents that see what is peculiar to their row."""
    keys = jax.random.split(jax.random.key(0), 4)
    value = 1 + 0.1 * jax.random.normal(keys[0], (1, 50, 1, 16))
    chosen, others = jax.random.bernoulli(keys[1], 0.06, (2, 400, 8, 50)).mean(2)
    rows = jnp.einsum("ts,bsnd->btnd", chosen, value)
    norm = jnp.linalg.norm(rows, axis=-1)
    unit = rows / norm[..., None]
    signs = jax.random.rademacher(keys[2], norm.shape, jnp.float32)
    grad_unit = signs[..., None] * (unit - unit.mean(1, keepdims=True))
    scale = collision_scales(unit, norm, value, None, num_hashes=8)
    rows = l2_normalize_gradient(unit, 1 / scale, grad_unit)
    products = jnp.einsum("btnd,bsnd->bts", rows, value)
    sums = jnp.einsum("ts,bsnd->btnd", others, value)
    shift = balance(rows, value, None, sums, others.sum(-1)[None, :, None], num_others=8)
    left = jnp.abs((products + shift).mean(-1)).mean()
    assert left < 0.75 * jnp.abs(products.mean(-1)).mean()


def _draw():
    keys = jax.random.split(jax.random.key(0), 6)
    shape = 2, 5, 3, 4
    grad_unit, unit, value, other = (jax.random.normal(key, shape) for key in keys[:4])
    norm, counts = (jax.random.uniform(key, shape[:3]) + 0.5 for key in keys[4:])
    return (
        grad_unit,
        unit / jnp.linalg.norm(unit, axis=-1, keepdims=True),
        norm,
        value,
        other,
        counts,
    )


def test_without_collisions_the_mean_of_all_values_counts():
    rows, _, _, value, other, counts = _draw()
    shift = balance(rows, value, None, 0 * other, 0 * counts, num_others=8)
    mean = value.mean(1, keepdims=True)
    np.testing.assert_allclose(shift, -jnp.sum(rows * mean, -1) / 2, rtol=1e-5, atol=1e-6)
    shift = balance(rows, value, None, 1e6 * other, 1e6 * counts, num_others=8)
    np.testing.assert_allclose(2 * shift, -jnp.sum(rows * other, -1) / counts, rtol=1e-3, atol=1e-4)


def test_one_collision_of_many_hardly_counts_and_the_only_one_is_all():
    _, unit, norm, value, *_ = _draw()
    scale = collision_scales(unit, norm, value, None, num_hashes=10_000)
    np.testing.assert_allclose(scale, 1 / norm, rtol=1e-2)
    scale = collision_scales(unit, 1e-6 * norm, value, None, num_hashes=8)
    assert np.all(np.abs(scale) < 1e-3)


def test_nothing_is_finite_and_masked_keys_do_not_matter():
    rows, unit, norm, value, other, counts = _draw()
    unit, norm = unit.at[0, 0].set(0), norm.at[0, 0].set(0)
    mask = jnp.arange(5) < jnp.array([[3], [0]])
    value = jnp.where(mask[..., None, None], value, jnp.nan)
    scale = collision_scales(unit, norm, value, mask, num_hashes=7)
    assert np.isfinite(scale).all()
    assert not np.any(scale[1])  # without a key
    assert not np.any(scale[0, 0])  # nothing collided
    shift = balance(rows, value, mask, other, counts, num_others=8)
    assert np.isfinite(shift).all()
    cut = value[:1, :3]
    same = collision_scales(unit[:1], norm[:1], cut, None, num_hashes=7)
    np.testing.assert_allclose(scale[:1], same, rtol=1e-5)
    same = balance(rows[:1], cut, None, other[:1], counts[:1], num_others=8)
    np.testing.assert_allclose(shift[:1], same, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [1, 2, 5, 64])
def test_other_hashes_are_turned_by_a_right_angle(head_dim):
    bits, heads = 3, 2
    # Columns are those of the identity, so that what is hashed comes out turned.
    columns = jnp.tile(jnp.eye(head_dim), (1, heads, 1, 10 * bits))[..., : 10 * bits * head_dim]
    turned = other_projection(columns, bits)
    assert turned.shape == (1, heads, head_dim, min(OTHER_HASHES * bits, columns.shape[-1]))
    x = jax.random.normal(jax.random.key(0), (head_dim,))
    if head_dim % 2:
        x = x.at[-1].set(0)
    y = x @ turned[0, 0][:, : min(head_dim, turned.shape[-1])]
    if turned.shape[-1] >= head_dim:
        np.testing.assert_allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-6)
        np.testing.assert_allclose(x @ y, 0, atol=1e-6)
