"""Gradients from buckets against their naive twin, in their limits, on average, and transformed."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import always_buckets, normal, unit_rows
from jax import export
from run_helpers import fast_compilations

from yoso_jax import yoso_attention
from yoso_jax.attention import sampled_attention
from yoso_jax.hashing import sample_projection
from yoso_jax.kernels import (
    backward_choice,
    bucket_sums,
    buckets,
    collisions,
    effects,
    reference,
)
from yoso_jax.kernels.codes import hash_codes
from yoso_jax.kernels.xla import l2_normalize

RNG = jax.random.key(5)
T = 9


@pytest.fixture(autouse=True, scope="module")
def compilations():
    with fast_compilations(), always_buckets():
        yield


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def draw(heads, num_queries, num_keys, head_dim=8, value_dim=5, num_hashes=3, spread=1.0):
    """Codes and unit queries and keys, values, cotangents, in NumPy; keys near each other."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=head_dim)
    query, key = (
        common + spread * rng.normal(size=(heads, n, head_dim)) for n in (num_queries, num_keys)
    )
    planes = rng.normal(size=(heads, head_dim, num_hashes, T))
    codes = [
        (np.einsum("nth,nhmb->ntmb", x, planes) > 0) @ (2 ** np.arange(T)) for x in (query, key)
    ]
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key)]
    value = rng.normal(size=(heads, num_keys, value_dim))
    return [*codes, *unit, value, rng.normal(size=(heads, num_queries, value_dim))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def bucketed(hash_code_len, bucket_bits, *args):
    options = dict(hash_code_len=hash_code_len, bucket_bits=bucket_bits)
    return *buckets.bucketed_gradients(*args, **options), *buckets.bucket_means(*args, **options)


def gradients(args, masks=(None, None), *, bucket_bits):
    """And means and counts."""
    return bucketed(T, bucket_bits, *map(jnp.asarray, args), *masks)


@functools.partial(jax.jit, static_argnames="bucket_bits")
def naive(args, masks=(None, None), *, bucket_bits):
    weights = reference.bucketed_weights(*args[:4], hash_code_len=T, bucket_bits=bucket_bits)
    for mask, expand in zip(masks, (np.s_[..., None], np.s_[..., None, :]), strict=True):
        if mask is not None:
            weights = jnp.where(mask[expand], weights, 0)
    gradients = reference.surrogate_gradients(weights, *args[2:], hash_code_len=T)[:2]
    products = jnp.einsum("ntd,nsd->nts", args[5], args[4], precision="highest")
    count = weights.sum(-1)
    total = jnp.where(weights > 0, weights * products, 0).sum(-1)
    return *gradients, total / jnp.where(count > 0, count, 1), count


def assert_equal(results, expected, tolerance=1e-12):
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        scale = max(float(np.abs(wanted).max()), 1e-30)
        np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("heads", "num_queries", "num_keys", "bucket_bits", "num_hashes"),
    [
        (2, 130, 77, 2, 3),  # ragged tiles
        (2, 130, 77, 9, 3),  # most buckets are empty
        (1, 1, 400, 1, 8),
    ],
)
def test_equals_the_naive_twin(float64, heads, num_queries, num_keys, bucket_bits, num_hashes):
    args = draw(heads, num_queries, num_keys, num_hashes=num_hashes)
    results = gradients(args, bucket_bits=bucket_bits)
    assert all(x.dtype == jnp.float64 for x in results)
    assert_equal(results, naive(args, bucket_bits=bucket_bits))


def test_more_pairs_than_a_chunk_and_larger_tiles(float64, monkeypatch):
    args = draw(2, 300, 290)
    monkeypatch.setattr(bucket_sums, "_CHUNK_CPU", 7)
    monkeypatch.setattr(bucket_sums, "_MOST_PAIRS", 40)
    assert bucket_sums._tile_size(2, 300, 290, 4)[0] == 128
    bucketed.clear_cache()
    results = gradients(args, bucket_bits=2)
    bucketed.clear_cache()
    assert_equal(results, naive(args, bucket_bits=2))


def test_numbers_of_pairs_fit_their_type():
    """At the length where one head's pairs of smallest tiles no longer do."""
    assert bucket_sums._tile_size(8, 4096, 4096, 64) == (64, 8 * (65**2 + 64))
    for heads, tokens in ((1, 2**22), (64, 2**20)):
        tile, most_pairs = bucket_sums._tile_size(heads, tokens, tokens, 2**9)
        assert tile > 64
        assert most_pairs + bucket_sums._CHUNK < 2**31
        assert heads * (tokens // tile) ** 2 <= most_pairs


def test_pairs_are_counted_at_their_most():
    for counts in ([(1, 1)] * 5, [(65, 64), (1, 129), (64, 0)], [(640, 641)]):
        queries, keys = np.transpose(counts)
        pairs = sum(-(-queries // 64) * -(-keys // 64))
        tokens = int(sum(queries)), int(sum(keys))
        assert pairs <= bucket_sums._tile_size(1, *tokens, len(counts))[1]


def test_crowded_buckets(float64):
    """All tokens the same, and queries and keys without a common bucket."""
    query_codes, key_codes, *args = draw(2, 130, 77)
    query_codes, key_codes = np.full_like(query_codes, 3), np.full_like(key_codes, 3)
    key_codes[0, :7] = 5
    query_codes[1] = 4
    args = [query_codes, key_codes, *(np.broadcast_to(x[:, :1], x.shape) for x in args)]
    results, expected = (f(args, bucket_bits=2) for f in (gradients, naive))
    # The arccosine is steep where the cosine is 1.
    assert_equal(results, expected, 1e-7)
    assert not any(np.any(x[1]) for x in results)


def test_no_bits_is_the_expectation(float64):
    args = draw(2, 190, 80, num_hashes=1)
    expected = collisions.expectation_gradients(
        *map(jnp.asarray, args[2:]), hash_code_len=T, with_value=False
    )
    assert_equal(gradients(args, bucket_bits=0)[:2], expected[:2])


def test_all_bits_is_the_weighted_cumulation(float64):
    query_codes, key_codes, query, key, value, grad_out = map(jnp.asarray, draw(2, 130, 77))
    weighted = functools.partial(collisions.lsh_weighted_cumulation, hash_code_len=T)
    expected = (
        T / 2 * weighted(query_codes, key_codes, grad_out, value, key),
        T / 2 * weighted(key_codes, query_codes, value, grad_out, query),
    )
    args = query_codes, key_codes, query, key, value, grad_out
    assert_equal(gradients(args, bucket_bits=T)[:2], expected)


def test_masked_tokens_do_not_matter(float64):
    """Whatever stands in their rows, even NaN; also a head without queries or without keys."""
    args = draw(4, 140, 130)
    rng = np.random.default_rng(1)
    query_mask, key_mask = (rng.random((4, n)) < 0.7 for n in (140, 130))
    query_mask[1], key_mask[2] = False, False
    query_mask[3], key_mask[3] = True, True
    masks = query_mask, key_mask
    expected = naive(args, masks, bucket_bits=2)
    sides = query_mask, key_mask, query_mask, key_mask, key_mask, query_mask
    args[2:] = [np.where(m[..., None], x, np.nan) for x, m in zip(args[2:], sides[2:], strict=True)]
    results = gradients(args, masks, bucket_bits=2)
    assert_equal(results, expected)
    for result, mask in zip(results, (*masks, query_mask, query_mask), strict=True):
        assert not np.any(np.asarray(result)[~mask])


@pytest.mark.parametrize("hash_fn", ["gaussian", "fast"])
def test_is_unbiased(hash_fn):
    """The mean over hashes comes as close to the expectation as its spread says, entry by entry.

    Gradients and counts; means are ratios.
    """
    draws, code_len, bits = 600, 7, 3
    args = [jnp.asarray(x, jnp.float32) for x in draw(1, 24, 20, head_dim=16, spread=0.7)[2:]]
    exact = collisions.expectation_gradients(*args, hash_code_len=code_len, with_value=False)[:2]
    exact += (reference.expectation_weights(*args[:2], hash_code_len=code_len).sum(-1),)

    def draw_codes(rng):
        projection = sample_projection(
            rng, (1,), 16, num_hashes=2, hash_code_len=code_len, hash_fn=hash_fn
        )
        return [hash_codes(x, projection, hash_code_len=code_len) for x in args[:2]]

    codes = jax.jit(jax.vmap(draw_codes))(jax.random.split(RNG, draws))
    args = [jnp.broadcast_to(x, (draws, *x.shape)) for x in args]
    *grads, _, counts = bucketed(code_len, bits, *codes, *args, None, None)
    samples = *grads, counts
    scores = []
    for sample, wanted in zip(samples, exact, strict=True):
        sample = np.asarray(sample, np.float64)
        scores.append((sample.mean(0) - wanted) / (sample.std(0) / np.sqrt(draws)))
        # The test would notice: 5 % of bias is far more than the noise of the mean.
        assert np.linalg.norm(sample.mean(0) - wanted) < 0.05 * np.linalg.norm(wanted)
    z = np.concatenate([np.ravel(x) for x in scores])
    assert np.abs(z).max() < 5  # of about 700 entries
    assert 0.8 < np.sqrt(np.mean(z**2)) < 1.2


# The public operation.

OPTIONS = dict(
    hash_code_len=4, num_hashes=5, backward="bucketed", num_backward_hashes=3, bucket_bits=2
)


def inputs(batch=2, tokens=70, num_keys=None, heads=2, head_dim=8, value_dim=8, dtype=jnp.float32):
    sizes = (tokens, head_dim), (num_keys or tokens, head_dim), (num_keys or tokens, value_dim)
    return tuple(normal(*((batch, n, heads, d) for n, d in sizes), dtype=dtype))


def attention(*args, rng=RNG, **options):
    return yoso_attention(*args, rng=rng, **(OPTIONS | options))


def loss(*args, **options):
    out = attention(*args, **options)
    return jnp.sum(out * jnp.arange(out.shape[-1], dtype=out.dtype))


@functools.cache
def grad(**options):
    return jax.jit(jax.grad(functools.partial(loss, **options), argnums=(0, 1, 2)))


def assert_close(result, expected, tolerance=2e-5):
    def check(a, b):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(
            np.asarray(a, "f"), np.asarray(b, "f"), rtol=0, atol=tolerance * scale + 1e-7
        )

    jax.tree.map(check, result, expected)


def test_gradients_are_those_of_the_definition():
    """With the codes of other hashes, through both normalisations; that of value is exact."""
    args = inputs(tokens=70, num_keys=41, value_dim=3)
    mask, query_mask = jnp.arange(41) < jnp.array([[41], [30]]), jnp.arange(70) % 7 > 0
    query_mask = jnp.broadcast_to(query_mask, (2, 70))

    def definition(query, key, value):
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        projection = sample_projection(RNG, (2, 2), 8, num_hashes=5, hash_code_len=4)
        codes = [hash_codes(x, projection, hash_code_len=4) for x in (query, key)]
        others = dict(hash_code_len=4, num_hashes=3, num_bits=2)
        projection = effects.other_projection(projection, **others)
        other = [hash_codes(x, projection, hash_code_len=2) for x in (query, key)]
        query, key = l2_normalize(query), l2_normalize(key)
        slope = reference.bucketed_weights(*other, query, key, hash_code_len=4, bucket_bits=2)
        cosine = jnp.einsum("bnth,bnsh->bnts", query, key)
        is_pair = mask[:, None, None] & query_mask[:, None, :, None]
        weights = jnp.where(is_pair, reference.collision_weights(*codes), 0)
        slope = jnp.where(is_pair, slope, 0)
        options = dict(hash_code_len=4, num_hashes=5, key_mask=mask)
        return jnp.sum(unit_rows(weights, slope, cosine, value, **options) * jnp.arange(3.0))

    expected = jax.jit(jax.value_and_grad(definition, argnums=(0, 1, 2)))(*args)
    f = functools.partial(loss, mask=mask, query_mask=query_mask)
    result = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*args)
    assert_close(result, expected)


def test_all_bits_of_all_hashes_are_the_sampled_gradients():
    """Of rows that are not normalised: to those, what a collision is worth is another thing."""
    args = inputs()
    result = grad(bucket_bits=4, num_backward_hashes=5, normalize=False)(*args)
    assert_close(result, grad(backward="sampled", normalize=False)(*args))


@pytest.mark.parametrize(
    ("tokens", "options", "same"),
    [
        (70, dict(bucket_bits=0), dict(backward="expectation", bucket_bits=0)),
        (
            70,
            dict(backward=None, bucket_bits=None),
            dict(backward="expectation", bucket_bits=None),
        ),
        (
            8192,
            dict(backward=None, num_backward_hashes=None, bucket_bits=None),
            dict(num_backward_hashes=5, bucket_bits=4),
        ),
    ],
)
def test_choices_left_open(tokens, options, same):
    """The same computation."""
    shapes = [jax.ShapeDtypeStruct((2, tokens, 2, 8), jnp.float32)] * 3
    result, expected = (grad(**x).lower(*shapes).as_text() for x in (options, same))
    assert result == expected


def test_half_precision_rounds_only_inputs_and_output():
    dtype = jnp.bfloat16
    args = inputs(dtype=dtype)
    projection = sample_projection(RNG, (2, 2), 8, num_hashes=5, hash_code_len=4).astype(dtype)
    options = {name: x for name, x in OPTIONS.items() if name != "num_hashes"}

    @jax.jit
    def f(*args):
        _, vjp = jax.vjp(lambda *args: sampled_attention(*args, projection, **options), *args)
        return vjp(jnp.ones_like(args[2]))

    result, expected = f(*args), f(*(x.astype(jnp.float32) for x in args))
    assert all(x.dtype == dtype for x in result)
    assert_close(result, expected, 1e-2)


def test_vmap_and_vmap_of_grad():
    """Also where some arguments are not batched, and the work differs between the batched."""
    query, key, value = inputs()
    queries = jnp.stack([query, 2 * query[::-1], jnp.broadcast_to(query[:, :1], query.shape)])
    mapped = jax.jit(jax.vmap(grad(), in_axes=(0, None, None)))(queries, key, value)
    one_by_one = [grad()(x, key, value) for x in queries]
    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *one_by_one)
    assert_close(mapped, expected)


def test_grad_of_scan_and_checkpoint():
    query, key, value = inputs()
    keys = jax.random.split(RNG, 2)

    def layer(x, rng):
        return x + attention(x, key, value, rng=rng), None

    def scanned(query):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), query, keys)[0])

    def unrolled(query):
        return jnp.sum(layer(layer(query, keys[0])[0], keys[1])[0])

    assert_close(*(jax.jit(jax.grad(f))(query) for f in (scanned, unrolled)))


def test_export_round_trip():
    args = inputs()
    f = grad(implementation="xla")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    blob = export.export(f, platforms=("cpu", "cuda", "tpu"))(*shapes).serialize(vjp_order=0)
    assert_close(export.deserialize(blob).call(*args), f(*args))


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_lowers_for_every_platform(platform):
    traced = grad(implementation="xla").trace(*inputs(dtype=jnp.bfloat16))
    assert "stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_shardings_do_not_change_the_result():
    script = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from yoso_jax import yoso_attention
from yoso_jax.kernels import buckets

jax.config.update("jax_disable_most_optimizations", True)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
keys = jax.random.split(jax.random.key(0), 6)
args = [jax.random.randint(key, (4, 2, 12, 3), 0, 16) for key in keys[:2]]
args += [jax.random.normal(key, (4, 2, 12, 8)) / 3 for key in keys[2:]] + [None, None]

def loss(*args):
    options = dict(num_hashes=5, hash_code_len=4, backward="bucketed", bucket_bits=2)
    out = yoso_attention(*args, rng=jax.random.key(1), **options)
    return jnp.sum(out * jnp.arange(8))

grad, inputs = jax.grad(lambda *x: loss(*x), argnums=(0, 1, 2)), args[2:5]

def unsharded():
    return jax.jit(lambda *x: grad(*x))(*(x[:2] for x in inputs))

def check():
    gradients = functools.partial(buckets.bucketed_gradients, hash_code_len=4, bucket_bits=2)
    f = jax.jit(lambda *args: gradients(*args))
    sharded = jax.device_put(args, NamedSharding(mesh, P("data", "model")))
    for a, b in zip(f(*sharded), f(*args), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    mapped = jax.shard_map(grad, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    expected = unsharded()
    for a, b in zip(jax.jit(mapped)(*inputs), expected, strict=True):
        np.testing.assert_allclose(a[:2], b, atol=2e-5)
    return expected[0]

chosen = unsharded()[0]  # so few tokens take all pairs
buckets.takes_all_pairs = lambda pairs, **_: pairs < 0
assert not np.allclose(chosen, check(), atol=2e-5)
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


def test_memory_is_linear():
    """For any data: what is planned does not depend on them."""
    arrays = []  # in units of one of query, key, value and cotangent
    for tokens in (16384, 65536):
        codes = jax.ShapeDtypeStruct((2, tokens, 8), jnp.int32)
        rows = jax.ShapeDtypeStruct((2, tokens, 64), jnp.float32)
        compiled = bucketed.lower(9, 8, codes, codes, *[rows] * 4, None, None).compile()
        arrays.append(compiled.memory_analysis().temp_size_in_bytes / (2 * tokens * 64 * 4))
    assert arrays[1] < 1.05 * arrays[0] < 10


def plan(backward="bucketed", num_backward_hashes=None, bucket_bits=None, **options):
    defaults = dict(
        num_hashes=32, hash_code_len=9, num_tokens=4096, is_biased=False, platform="cpu"
    )
    return backward_choice.plan(backward, num_backward_hashes, bucket_bits, **(defaults | options))


def test_defaults():
    assert plan() == backward_choice.BackwardPlan("bucketed", 8, 4)
    assert plan(num_hashes=1, num_tokens=2**20).num_hashes == 1
    assert plan(num_tokens=4095) == backward_choice.BackwardPlan("bucketed", 8, 3)
    bits = {n: plan(num_tokens=n).bucket_bits for n in (512, 1023, 1024, 16384, 2**17, 2**20)}
    assert bits == {512: 1, 1023: 1, 1024: 2, 16384: 6, 2**17: 9, 2**20: 9}
    # One bucket holds all pairs, whatever the hash.
    assert plan(num_tokens=511).kind == "expectation"
    assert plan(bucket_bits=0).kind == "expectation"
    assert plan(num_backward_hashes=3, bucket_bits=1) == backward_choice.BackwardPlan(
        "bucketed", 3, 1
    )


@pytest.mark.parametrize("platform", backward_choice.CROSSOVERS)
def test_the_choice_left_open(platform):
    assert plan(None, num_tokens=512, platform=platform).kind == "expectation"
    assert plan(None, num_tokens=16384, platform=platform).kind == "bucketed"
    assert plan(None, num_tokens=16384, platform=platform, is_biased=True).kind == "sampled"
    # Few hashes take less time.
    start = backward_choice.CROSSOVERS[platform].num_tokens
    assert plan(None, num_tokens=start - 1, platform=platform).kind == "expectation"
    assert plan(None, num_tokens=start // 2, num_hashes=1, platform=platform).kind == "bucketed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_backward_hashes=0), r"num_backward_hashes, .* must be in 1\.\.5 .* got 0"),
        (dict(num_backward_hashes=6), r"num_backward_hashes, .* must be in 1\.\.5 .* got 6"),
        (dict(num_backward_hashes=2.0), r"num_backward_hashes, .* got 2\.0"),
        (dict(num_hashes=None, num_backward_hashes=0), "num_backward_hashes, .* at least 1"),
        (dict(bucket_bits=-1), r"bucket_bits, .* must be in 0\.\.4 .* got -1"),
        (dict(bucket_bits=5), r"bucket_bits, .* must be in 0\.\.4 .* got 5"),
        (dict(hash_fn="fast", bit_layout="block"), "'bucketed' needs .* bit_layout must be 'spr"),
        (dict(backward="buckets"), "backward must be 'sampled', 'expectation', 'bucketed' or None"),
    ],
)
def test_refuses(unchecked_shapes, change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(attention, **change), *inputs())


def test_layouts_that_do_not_matter_are_taken():
    for options in (dict(hash_fn="gaussian"), dict(hash_fn="fast", backward=None)):
        jax.eval_shape(functools.partial(attention, bit_layout="block", **options), *inputs())
