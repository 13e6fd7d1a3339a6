"""What a collision is worth, beside what it does to normalised rows on average."""

import jax.numpy as jnp
import numpy as np
import pytest

from yoso_jax.kernels.effects import collision_effects


@pytest.mark.parametrize(("chance", "worst"), [(0.01, 0.2), (0.05, 0.2)])
def test_is_the_derivative_of_the_expected_row(chance, worst):
    """By each probability, of independent collisions; the cotangent at the sampled row is not."""
    rng = np.random.default_rng(0)
    draws, num_hashes, num_keys, dim = 40_000, 8, 6, 16
    value = rng.standard_normal((num_keys, dim)) + 0.7
    grad_unit = rng.standard_normal(dim)
    chances = chance * rng.uniform(0.5, 1.5, num_keys)
    counts = rng.binomial(num_hashes - 1, chances, (draws, num_keys))
    last = rng.random((draws, num_keys)) < chances

    def loss(rows):
        lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
        return (rows / np.where(lengths > 0, lengths, 1)) @ grad_unit

    rows = (counts + last) @ value / num_hashes
    wanted = np.empty(num_keys)
    for j in range(num_keys):
        # Of one hash of all: with the collision and without it.
        without = rows - np.where(last[:, j, None], value[j] / num_hashes, 0)
        wanted[j] = num_hashes * np.mean(loss(without + value[j] / num_hashes) - loss(without))

    norm = np.linalg.norm(rows, axis=-1)
    unit = rows / np.where(norm > 0, norm, 1)[:, None]
    scale, shift = collision_effects(
        jnp.broadcast_to(jnp.asarray(grad_unit, jnp.float32), (1, draws, 1, dim)),
        jnp.asarray(unit, jnp.float32)[None, :, None],
        jnp.asarray(norm, jnp.float32)[None, :, None],
        jnp.asarray(value, jnp.float32)[None, :, None],
        None,
        num_hashes=num_hashes,
    )
    tangent = grad_unit - (unit @ grad_unit)[:, None] * unit
    effects = np.asarray(scale)[0] * (tangent @ value.T) + np.asarray(shift)[0]
    error = np.linalg.norm(effects.mean(0) - wanted) / np.linalg.norm(wanted)
    plain = np.where(norm > 0, 1 / np.where(norm > 0, norm, 1), 0)[:, None] * (tangent @ value.T)
    plain_error = np.linalg.norm(plain.mean(0) - wanted) / np.linalg.norm(wanted)
    assert error < worst
    assert plain_error > 2 * error


def test_nothing_is_finite_and_masked_keys_do_not_matter():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 5, 3, 4)), jnp.float32) for _ in range(3)]
    grad_unit, unit, value = arrays
    norm = jnp.linalg.norm(unit, axis=-1).at[0, 0].set(0)
    unit = (unit / norm[..., None]).at[0, 0].set(0)
    mask = jnp.arange(5) < jnp.array([[3], [0]])
    value = jnp.where(mask[..., None, None], value, jnp.nan)
    found = collision_effects(grad_unit, unit, norm, value, mask, num_hashes=7)
    for x in found:
        assert np.isfinite(x).all()
        assert not np.any(x[1])  # without a key
    cut = (x[:1] for x in (grad_unit, unit, norm, value[:, :3]))
    for x, same in zip(found, collision_effects(*cut, None, num_hashes=7), strict=True):
        np.testing.assert_allclose(x[:1], same, rtol=1e-5, atol=1e-6)
    assert not np.any(found[1][0, 0])  # nothing collided: there is no row to be stretched
