"""The last step of a gradient, in NumPy and on the GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yoso_jax.kernels.mosaic_gpu import lane_numpy
from yoso_jax.kernels.mosaic_gpu.tangents import add_tangents


def mosaic_call(program, *inputs):
    from yoso_jax.kernels.mosaic_gpu import lane_mosaic

    return jax.jit(functools.partial(lane_mosaic.call, program))(*inputs)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lane_numpy.call, id="numpy"),
        pytest.param(mosaic_call, id="mosaic_gpu", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "part_dtype", "columns", "num_parts", "heads_first", "masked"),
    [
        (jnp.bfloat16, jnp.bfloat16, 48, 3, False, True),
        (jnp.bfloat16, jnp.float32, 64, 1, True, False),
        (jnp.float16, jnp.float16, 256, 2, False, False),
    ],
)
def test_only_what_is_orthogonal_is_left(
    call, dtype, part_dtype, columns, num_parts, heads_first, masked
):
    batch, num_tokens, heads = 2, 7, 3
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.standard_normal((batch, num_tokens, heads, columns)), dtype)
    shape = tokens.shape
    if heads_first:
        shape = batch * heads, num_tokens + 3, columns
    parts = rng.standard_normal((num_parts, *shape))
    mask = None
    if masked:
        mask = np.arange(num_tokens) < np.array([3, 7])[:, None]
        # What is in the rows of masked tokens is whatever memory held.
        parts[:, ~mask] = np.nan
    parts = jnp.asarray(parts, part_dtype)
    exact = np.asarray(tokens, np.float64)
    norms = np.linalg.norm(exact, axis=-1)
    out = add_tangents(
        parts,
        tokens,
        jnp.asarray(norms.swapaxes(1, 2).reshape(-1, num_tokens), jnp.float32),
        None if mask is None else jnp.asarray(mask),
        factor=-2.5,
        heads_first=heads_first,
        call=call,
    )
    total = np.asarray(parts, np.float64).sum(axis=0)
    if heads_first:
        total = total.reshape(batch, heads, -1, columns)[:, :, :num_tokens].swapaxes(1, 2)
    unit = exact / norms[..., None]
    expected = -2.5 * (total - (total * unit).sum(axis=-1, keepdims=True) * unit)
    if mask is not None:
        expected = np.where(mask[..., None, None], expected, 0)
    assert out.dtype == dtype
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert error < (3e-4 if dtype == jnp.float16 else 3e-3)
