"""Chains of collision probabilities against arccosines, and the script that fits them."""

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from yoso_jax.kernels.mosaic_gpu.collision_chain import collision_chain, evaluate
from yoso_jax.kernels.mosaic_gpu.collision_coefficients import TABLE

SCRIPT = Path(__file__).parents[1] / "scripts" / "fit_chains.py"
EXPONENTS = range(1, 17)


def exact(cosine, exponent):
    return (np.arccos(-cosine.astype(np.float64)) / np.pi) ** exponent


def evaluate_float64(chain, cosine):
    u = np.sqrt(np.abs(1 - cosine.astype(np.float64)))
    terms = [chain.slope * u + chain.start]
    for factor, constant in chain.steps:
        terms.append(terms[-1] * terms[factor] + constant)
    return terms[-1]


@pytest.fixture(scope="module")
def cosines():
    # Not the places where the script measures.
    near_one = np.geomspace(3e-7, 0.3, 3001)
    return np.concatenate([np.linspace(-1, 1, 70_001), 1 - near_one, near_one - 1]).astype("f4")


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_recorded_errors_hold(exponent, cosines):
    chain = collision_chain(exponent)
    expected = exact(cosines, exponent)
    in_float64 = evaluate_float64(chain, cosines)
    in_float32 = np.asarray(evaluate(chain, jnp.asarray(cosines)), np.float64)
    usual = cosines >= -0.7
    for found in (in_float64, in_float32):
        error = np.abs(found - expected)
        assert error.max() <= chain.max_error + 1e-6
        relative = (error / (expected + 1e-6))[usual].max()
        # Without fused multiply-adds roundings differ a little where probabilities are small.
        assert relative <= 1.5 * chain.max_relative_error


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_most_cosines_are_close(exponent, cosines):
    chain = collision_chain(exponent)
    found = np.asarray(evaluate(chain, jnp.asarray(cosines)))
    expected = exact(cosines, exponent)
    limit = 1.1e-3
    large = (expected > 1e-4) & (cosines > -0.7)
    np.testing.assert_allclose(found[large], expected[large], rtol=limit)
    # The weight of tokens that are alike in nothing.
    found = float(evaluate(chain, jnp.float32(0)))
    assert found == pytest.approx(2.0**-exponent, rel=limit)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_ends(exponent):
    chain = collision_chain(exponent)
    cosine = np.linspace(-1, 1, 257)
    found = evaluate_float64(chain, cosine)
    # It falls with the cosine, but for what is too small to matter.
    assert np.diff(found).min() >= -2e-3 * 2.0**-exponent
    limit = {1: 0.25, 2: 0.04}.get(exponent, 2e-2)
    assert found[0] <= limit * 2.0**-exponent
    # Cosines that rounding took beyond the ends.
    beyond = jnp.float32(1 + 2.0**-7 * np.linspace(0, 1, 9))
    near = 2 - beyond
    np.testing.assert_array_equal(evaluate(chain, beyond), evaluate(chain, near))
    below = np.asarray(evaluate(chain, -beyond))
    assert np.all(np.isfinite(below))
    assert below.max() <= limit * 2.0**-exponent


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_sums_of_random_tokens(exponent):
    rng = np.random.default_rng(exponent)

    def tokens():
        x = rng.standard_normal((256, 64))
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)

    cosine = (tokens() @ tokens().T).astype(np.float32)
    value = rng.standard_normal((256, 64))
    found = np.asarray(evaluate(collision_chain(exponent), jnp.asarray(cosine)), np.float64)
    expected = exact(cosine, exponent) @ value
    error = np.linalg.norm(found @ value - expected) / np.linalg.norm(expected)
    assert error < 1e-3


def test_exponents():
    constant = collision_chain(0)
    np.testing.assert_array_equal(evaluate(constant, jnp.float32([-1, 0, 1])), [1, 1, 1])
    for exponent in (-1, 17, True):
        with pytest.raises(ValueError, match=r"exponent must be in 0\.\.16"):
            collision_chain(exponent)


def test_numbers_are_float32():
    for slope, start, steps, _, relative in TABLE.values():
        assert len(steps) <= 5
        assert steps[-1][0] == len(steps) - 1
        assert all(factor <= i for i, (factor, _) in enumerate(steps))
        numbers = [slope, start, *(constant for _, constant in steps)]
        assert all(float(np.float32(each)) == each for each in numbers)
        assert relative <= 1.1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype):
    cosine = jnp.linspace(-1, 1, 9).astype(dtype)
    found = evaluate(collision_chain(9), cosine)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, evaluate(collision_chain(9), cosine.astype(jnp.float32)))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fit_chains_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_the_table(script, tmp_path, monkeypatch):
    path = tmp_path / "table.py"
    monkeypatch.setattr(sys, "argv", ["fit_chains.py", "--table", str(path)])
    monkeypatch.setattr(script, "EXPONENTS", [2, 5])
    script.main()
    written = path.read_text()
    assert written.splitlines()[:8] == script.TABLE.read_text().splitlines()[:8]
    names = {}
    exec(written, names)
    assert names["TABLE"].keys() == {2, 5}
    for exponent, (*_, steps, absolute, relative) in names["TABLE"].items():
        # Other libraries of linear algebra may find other numbers that are as good.
        known = collision_chain(exponent)
        assert len(steps) == len(known.steps)
        assert absolute < 1.2 * known.max_error
        assert relative < 1.2 * known.max_relative_error


def test_the_script_checks(script, tmp_path, monkeypatch):
    path = tmp_path / "table.py"
    path.write_text("TABLE = {}\n")
    monkeypatch.setattr(sys, "argv", ["fit_chains.py", "--check", "--table", str(path)])
    monkeypatch.setattr(script, "EXPONENTS", [4])
    with pytest.raises(script.DataError, match=r"differs: run scripts/fit_chains\.py"):
        script.main()
    assert path.read_text() == "TABLE = {}\n"


def test_the_error_has_alternating_signs(script):
    # A sign of the best there is (Chebyshev).
    factors = tuple(factor for factor, _ in collision_chain(9).steps)
    numbers = script.fit(9, factors)[0]
    u = np.sqrt(1.7) * (1 - np.cos(np.linspace(0, np.pi, 2001))) / 2
    expected = exact(1 - u * u, 9)
    end, _ = script._run(numbers[None], u, factors)
    error = (end[0] - expected) / (expected + 1e-6)
    extreme = error[np.abs(error) > 0.8 * np.abs(error).max()]
    assert np.sum(np.diff(np.sign(extreme)) != 0) >= len(numbers) - 1
