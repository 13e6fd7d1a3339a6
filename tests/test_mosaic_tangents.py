"""The last step of a gradient, in NumPy and on the GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yoso_jax.kernels.mosaic_gpu import lane_numpy
from yoso_jax.kernels.mosaic_gpu.tangents import tangents


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
@pytest.mark.parametrize("num_norms", [0, 1, 2])
def test_only_what_is_orthogonal_is_left(
    call, dtype, part_dtype, columns, num_parts, heads_first, masked, num_norms
):
    batch, num_tokens, heads = 2, 7, 3
    rng = np.random.default_rng(0)
    shape = batch, num_tokens, heads, columns
    directions = rng.standard_normal(shape)
    directions[0, 1] = 0
    norms = np.abs(rng.standard_normal((num_norms, *shape[:3])))
    norms[:, 1, 2] = np.array([0, np.inf])[:num_norms, None]
    if heads_first:
        shape = batch * heads, num_tokens + 3, columns
    parts = rng.standard_normal((num_parts, *shape))
    mask = None
    if masked:
        mask = np.arange(num_tokens) < np.array([3, 7])[:, None]
        # What is in the rows of masked tokens is whatever memory held.
        parts[:, ~mask] = np.nan
    parts, directions = jnp.asarray(parts, part_dtype), jnp.asarray(directions, dtype)
    outs = tangents(
        parts,
        directions,
        None if mask is None else jnp.asarray(mask),
        factor=-2.5,
        norms=[jnp.asarray(norm, jnp.float32) for norm in norms],
        heads_first=heads_first,
        call=call,
    )
    total, along = np.asarray(parts, np.float64).sum(axis=0), np.asarray(directions, np.float64)
    if heads_first:
        total = total.reshape(batch, heads, -1, columns)[:, :, :num_tokens].swapaxes(1, 2)
    lengths = np.linalg.norm(along, axis=-1, keepdims=True)
    unit = along / np.where(lengths > 0, lengths, 1)
    expected = -2.5 * (total - (total * unit).sum(axis=-1, keepdims=True) * unit)
    if mask is not None:
        expected = np.where(mask[..., None, None], expected, 0)
    results = [expected]
    if num_norms:
        safe = np.where(norms > 0, norms, np.inf)
        results = [expected / norm[..., None] for norm in safe]
    for out, result in zip(outs, results, strict=True):
        assert out.dtype == dtype
        error = np.linalg.norm(np.asarray(out, np.float64) - result) / np.linalg.norm(result)
        assert error < (3e-4 if dtype == jnp.float16 else 3e-3)
