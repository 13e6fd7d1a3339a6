"""The operation under JAX's transformations, shardings, export and other platforms' lowerings."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import draw_codes, normal
from jax import export
from run_helpers import fast_compilations

from yoso_jax import kernels, yoso_attention

RNG = jax.random.key(3)
MODES = {
    "expectation": dict(num_hashes=None, hash_code_len=4),
    "sampled": dict(num_hashes=5, hash_code_len=4, backward="sampled"),
    "sampled-E": dict(num_hashes=5, hash_code_len=4, backward="expectation"),
}
mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True, scope="module")
def compilations():
    with fast_compilations():
        yield


def inputs(batch=2, tokens=12):
    return tuple(normal(*[(batch, tokens, 2, 8)] * 3))


def attention(mode, rng=RNG, **options):
    return functools.partial(yoso_attention, rng=rng, **MODES[mode], **options)


def gradients(mode, **options):
    def loss(*args):
        return jnp.sum(attention(mode, **options)(*args) * jnp.arange(8))

    return jax.grad(loss, argnums=(0, 1, 2))


def assert_close(result, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), result, expected
    )


@mode
def test_jit_and_grad(mode):
    args = inputs()
    assert_close(jax.jit(attention(mode))(*args), attention(mode)(*args))
    assert_close(jax.jit(gradients(mode))(*args), gradients(mode)(*args))


@mode
def test_vmap_and_vmap_of_grad(mode):
    stacked = tuple(jnp.stack([x, 2 * x[::-1]]) for x in inputs())
    for f in (attention(mode), gradients(mode)):
        expected = [f(*(x[i] for x in stacked)) for i in range(2)]
        expected = jax.tree.map(lambda *rows: jnp.stack(rows), *expected)
        assert_close(jax.jit(jax.vmap(f))(*stacked), expected)


def test_vmap_over_keys_draws_a_sample_for_each():
    query, key, value = inputs()
    keys = jax.random.split(RNG, 3)
    out = jax.vmap(lambda rng: attention("sampled", rng)(query, key, value))(keys)
    assert_close(out[1], attention("sampled", keys[1])(query, key, value))
    assert np.any(out[0] != out[1])


@mode
def test_scan_and_checkpoint(mode):
    _, key, value = inputs()

    def layers(query, layer):
        def layer_fn(x, rng):
            return x + attention(mode, rng)(x, key, value), None

        return jnp.sum(jax.lax.scan(layer(layer_fn), query, jax.random.split(RNG, 2))[0])

    def unrolled(query):
        for rng in jax.random.split(RNG, 2):
            query = query + attention(mode, rng)(query, key, value)
        return jnp.sum(query)

    query = inputs()[0]
    expected = jax.value_and_grad(unrolled)(query)
    for layer in (lambda f: f, jax.checkpoint):
        result = jax.value_and_grad(functools.partial(layers, layer=layer))(query)
        assert_close(result, expected)


@mode
def test_export_round_trip(mode):
    args = inputs()
    f = jax.jit(gradients(mode, implementation="xla"))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    blob = export.export(f, platforms=("cpu", "cuda", "tpu"))(*shapes).serialize(vjp_order=0)
    assert_close(export.deserialize(blob).call(*args), f(*args))


@mode
@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_lowers_for_every_platform(mode, platform):
    for dtype in (jnp.float32, jnp.bfloat16):
        args = [x.astype(dtype) for x in inputs(tokens=600)]
        traced = jax.jit(gradients(mode, implementation="xla")).trace(*args)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        if mode != "expectation":
            assert ("stablehlo.scatter" in text) == (platform != "tpu")


def test_shardings_do_not_change_the_result():
    """Four virtual devices, batch and heads split, and a shard_map over heads."""
    script = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from yoso_jax import yoso_attention

keys = jax.random.split(jax.random.key(0), 3)
args = [jax.random.normal(key, (4, 12, 2, 8)) for key in keys]
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
for options in (dict(num_hashes=None), dict(num_hashes=5), dict(num_hashes=5, hash_fn="fast")):
    def loss(*args):
        out = yoso_attention(*args, rng=jax.random.key(1), hash_code_len=4, **options)
        return jnp.sum(out * jnp.arange(8)), out
    f = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    expected = f(*args)
    for spec in (P("data"), P("data", None, "model"), P(None, "data", "model")):
        sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in args]
        for result, wanted in zip(*map(jax.tree.leaves, (f(*sharded), expected)), strict=True):
            np.testing.assert_allclose(result, wanted, atol=2e-5)

def attend(query, key, value):
    return yoso_attention(query, key, value, num_hashes=None, hash_code_len=4)
spec = P("data", None, "model")
mapped = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec))
np.testing.assert_allclose(mapped(*args), attend(*args), atol=2e-5)
sampled = lambda *args: yoso_attention(*args, rng=jax.random.key(1), num_hashes=5, hash_code_len=4)
mapped = jax.jit(jax.shard_map(sampled, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
np.testing.assert_allclose(mapped(*args)[:2], sampled(*(x[:2] for x in args)), atol=2e-5)
print("equal")
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={
            "PATH": "",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "equal\n", result.stderr


def temporaries(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_expectation_keeps_nothing_quadratic():
    """A T x S matrix of one head alone would take 1 GiB."""
    shapes = [jax.ShapeDtypeStruct((2, 16384, 2, 64), jnp.float32)] * 3

    def loss(*args):
        return jnp.sum(yoso_attention(*args, num_hashes=None))

    size = temporaries(jax.value_and_grad(loss, argnums=(0, 1, 2)), *shapes)
    assert size < 512 * 2**20


def test_sampled_memory_is_linear():
    def loss(*args):
        return jnp.sum(yoso_attention(*args, rng=RNG, num_hashes=32))

    f = jax.value_and_grad(loss, argnums=(0, 1, 2))
    sizes = [
        temporaries(f, *[jax.ShapeDtypeStruct((1, tokens, 2, 64), jnp.float32)] * 3)
        for tokens in (32768, 131072)
    ]
    assert sizes[1] < 4.2 * sizes[0]
    # Inputs, unit vectors, codes and cotangents: a few arrays of 64 + 32 numbers a token and head.
    assert sizes[1] < 16 * 2 * 131072 * (64 + 32) * 4


def test_cumulation_under_vmap_and_grad():
    (codes,) = draw_codes((3, 10, 4), num_codes=8)
    value, step = normal((3, 10, 5), (3, 10, 5))

    def f(codes, value):
        return kernels.lsh_cumulation(codes, codes, value, hash_code_len=3)

    assert_close(jax.jit(jax.vmap(f))(codes, value), f(codes, value))
    grad = jax.grad(lambda value: jnp.sum(f(codes, value) ** 2))
    step = 1e-2 * step
    difference = jnp.sum(f(codes, value + step) ** 2) - jnp.sum(f(codes, value - step) ** 2)
    np.testing.assert_allclose(jnp.sum(grad(value) * step), difference / 2, rtol=1e-3)
