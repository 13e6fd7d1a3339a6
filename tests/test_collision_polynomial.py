"""Polynomials of collision probabilities against arccosines, and the script that fits them."""

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from yoso_jax.kernels.mosaic_gpu.collision_coefficients import COARSE_TABLE, TABLE
from yoso_jax.kernels.mosaic_gpu.collision_polynomial import collision_polynomial, evaluate

SCRIPT = Path(__file__).parents[1] / "scripts" / "fit_polynomials.py"
EXPONENTS = range(1, 17)


def exact(cosine, exponent):
    return (np.arccos(-cosine.astype(np.float64)) / np.pi) ** exponent


def evaluate_float64(polynomial, cosine):
    u = np.sqrt(np.abs(1 - cosine.astype(np.float64)))
    return np.polyval(polynomial.coefficients[::-1], u) ** 2


@pytest.fixture(scope="module")
def cosines():
    # Not the places where the script measures.
    near_one = np.geomspace(3e-7, 0.3, 3001)
    return np.concatenate([np.linspace(-1, 1, 70_001), 1 - near_one, near_one - 1]).astype("f4")


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_recorded_errors_hold(exponent, coarse, cosines):
    polynomial = collision_polynomial(exponent, coarse=coarse)
    expected = exact(cosines, exponent)
    in_float64 = evaluate_float64(polynomial, cosines)
    in_float32 = np.asarray(evaluate(polynomial, jnp.asarray(cosines)), np.float64)
    usual = cosines >= -0.7
    for found in (in_float64, in_float32):
        error = np.abs(found - expected)
        assert error.max() <= polynomial.max_error + 1e-6
        relative = (error / (expected + 1e-6))[usual].max()
        # Without fused multiply-adds roundings differ a little where probabilities are small.
        assert relative <= 1.5 * polynomial.max_relative_error


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_most_cosines_are_close(exponent, cosines):
    polynomial = collision_polynomial(exponent)
    found = np.asarray(evaluate(polynomial, jnp.asarray(cosines)))
    expected = exact(cosines, exponent)
    limit = 1e-3 if exponent <= 2 else 5e-4
    large = (expected > 1e-4) & (cosines > -0.7)
    np.testing.assert_allclose(found[large], expected[large], rtol=limit)
    # The weight of tokens that are alike in nothing.
    found = float(evaluate(polynomial, jnp.float32(0)))
    assert found == pytest.approx(2.0**-exponent, rel=limit)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_ends(exponent):
    polynomial = collision_polynomial(exponent)
    cosine = np.linspace(-1, 1, 257)
    found = evaluate_float64(polynomial, cosine)
    # It falls with the cosine, but for what is too small to matter.
    assert np.diff(found).min() >= -2e-3 * 2.0**-exponent
    limit = {1: 0.25, 2: 0.04, 3: 4e-3}.get(exponent, 1e-3)
    assert found[0] <= limit * 2.0**-exponent
    # Cosines that rounding took beyond the ends.
    beyond = jnp.float32(1 + 2.0**-7 * np.linspace(0, 1, 9))
    near = 2 - beyond
    np.testing.assert_array_equal(evaluate(polynomial, beyond), evaluate(polynomial, near))
    below = np.asarray(evaluate(polynomial, -beyond))
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
    found = np.asarray(evaluate(collision_polynomial(exponent), jnp.asarray(cosine)), np.float64)
    expected = exact(cosine, exponent) @ value
    error = np.linalg.norm(found @ value - expected) / np.linalg.norm(expected)
    assert error < 1e-3


def test_exponents():
    constant = collision_polynomial(0)
    np.testing.assert_array_equal(evaluate(constant, jnp.float32([-1, 0, 1])), [1, 1, 1])
    for exponent in (-1, 17, True):
        with pytest.raises(ValueError, match=r"exponent must be in 0\.\.16"):
            collision_polynomial(exponent)


def test_coefficients_are_float32():
    for coefficients, _, _ in [*TABLE.values(), *COARSE_TABLE.values()]:
        assert len(coefficients) <= 8
        assert all(float(np.float32(c)) == c for c in coefficients)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype):
    cosine = jnp.linspace(-1, 1, 9).astype(dtype)
    found = evaluate(collision_polynomial(9), cosine)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(
        found, evaluate(collision_polynomial(9), cosine.astype(jnp.float32))
    )


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fit_polynomials_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_the_table(script, tmp_path, monkeypatch):
    path = tmp_path / "table.py"
    monkeypatch.setattr(sys, "argv", ["fit_polynomials.py", "--table", str(path)])
    script.main()
    written = path.read_text()
    assert written.splitlines()[:7] == script.TABLE.read_text().splitlines()[:7]
    names = {}
    exec(written, names)
    for name, table in (("TABLE", TABLE), ("COARSE_TABLE", COARSE_TABLE)):
        assert names[name].keys() == table.keys() == set(EXPONENTS)
        for exponent, (coefficients, *errors) in names[name].items():
            # Other libraries of linear algebra may round the last digit differently.
            np.testing.assert_allclose(coefficients, table[exponent][0], rtol=2e-7)
            np.testing.assert_allclose(errors, table[exponent][1:], rtol=0.2)


def test_the_script_checks(script, tmp_path, monkeypatch):
    path = tmp_path / "table.py"
    path.write_text("TABLE = {}\n")
    monkeypatch.setattr(sys, "argv", ["fit_polynomials.py", "--check", "--table", str(path)])
    monkeypatch.setattr(script, "EXPONENTS", [4])
    with pytest.raises(script.DataError, match=r"differs: run scripts/fit_polynomials\.py"):
        script.main()
    assert path.read_text() == "TABLE = {}\n"


@pytest.mark.parametrize("exponent", [1, 4, 9, 16])
def test_no_polynomial_of_this_degree_is_better(script, exponent):
    # The largest error comes back with alternating signs: the best there is (Chebyshev).
    degree = 5
    coefficients, largest = script.fit(exponent, degree)
    u = np.sqrt(1.7) * (1 - np.cos(np.linspace(0, np.pi, 2001))) / 2
    expected = exact(1 - u * u, exponent)
    h = np.polyval(coefficients[::-1], u)
    error = (h * np.abs(h) - expected) / (expected + 1e-6)
    extreme = error[np.abs(error) > (1 - 1e-5) * largest]
    assert np.sum(np.diff(np.sign(extreme)) != 0) >= degree + 1
