"""Rows of a table: values, and gradients however many tokens have the same row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from yoso_jax.modeling.lookup import look_up


def gradient(rows: int, ids: Array, grad: Array) -> Array:
    table = jnp.ones((rows, grad.shape[-1]))
    return jax.vjp(lambda table: look_up(grad.dtype, table, ids), table)[1](grad)[0]


@pytest.mark.parametrize("rows", [1, 7, 2000])
def test_gradient_is_the_sum_of_the_tokens_of_a_row(rows: int) -> None:
    rng = np.random.default_rng(0)
    ids, grad = rng.integers(rows, size=(3, 50)), rng.normal(size=(3, 50, 4)).astype(np.float32)
    expected = np.zeros((rows, 4))
    np.add.at(expected, ids, grad)
    found = gradient(rows, jnp.asarray(ids), jnp.asarray(grad))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_many_tokens_of_a_row_are_all_counted_in_bfloat16() -> None:
    grad = jnp.full((20_000, 2), 0.5, jnp.bfloat16)
    found = gradient(3, jnp.ones(20_000, jnp.int32), grad)
    np.testing.assert_array_equal(found, [[0, 0], [10_000, 10_000], [0, 0]])


@pytest.mark.parametrize(("rows", "is_product"), [(1024, True), (1025, False)])
def test_small_tables_take_products_on_accelerators(rows: int, is_product: bool) -> None:
    arguments = jnp.zeros(16, jnp.int32), jnp.zeros((16, 4), jnp.bfloat16)
    traced = jax.jit(lambda ids, grad: gradient(rows, ids, grad)).trace(*arguments)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("dot_general" in text, "scatter" in text) == (is_product, not is_product)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert ("dot_general" in text, "scatter" in text) == (False, True)


def test_values_and_rows_that_are_not_there() -> None:
    table = jnp.arange(6.0).reshape(3, 2)
    out = look_up(jnp.bfloat16, table, jnp.array([2, 0, 9]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), [[4, 5], [0, 1], [np.nan, np.nan]])
