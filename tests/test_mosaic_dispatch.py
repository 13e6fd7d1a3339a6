"""The kernels behind the public operations: choice, transformations, numbers, and on a GPU."""

import functools
import logging
import subprocess
import sys
import types

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import draw_codes, normal
from jax import export
from jax.sharding import PartitionSpec as P
from test_mosaic_cumulation import numpy_run, quick_compilation  # noqa: F401

from yoso_jax import kernels, yoso_attention
from yoso_jax.attention import sampled_attention
from yoso_jax.hashing import sample_projection
from yoso_jax.kernels import dispatch, xla
from yoso_jax.kernels.mosaic_gpu import (
    buckets,
    cumulation,
    hashes,
    hashing,
    hopper,
    layout,
    operations,
)

RNG = jax.random.key(5)
backward = pytest.mark.parametrize("backward", ["sampled", "expectation"])


def inputs(shape, num_keys=None, value_dim=None, dtype=jnp.bfloat16):
    """Query, key, value and a cotangent; keys are close to queries, so that some pairs collide."""
    batch, tokens, heads, head_dim = shape
    num_keys, value_dim = num_keys or tokens, value_dim or head_dim
    sizes = (tokens, head_dim), (num_keys, head_dim), (num_keys, value_dim), (tokens, value_dim)
    arrays = [np.asarray(x) for x in normal(*((batch, n, heads, d) for n, d in sizes))]
    arrays[1] = 0.5 * arrays[1] + np.resize(arrays[0], arrays[1].shape)
    return [jnp.asarray(x, dtype) for x in arrays]


def attend(*args, implementation="mosaic_gpu", **options):
    options = dict(rng=RNG, num_hashes=9, hash_code_len=5) | options
    return yoso_attention(*args, implementation=implementation, **options)


def gradients(**options):
    def loss(*args):
        out = attend(*args, **options).astype(jnp.float32)
        return jnp.sum(out * jnp.arange(out.shape[-1]))

    return jax.grad(loss, argnums=(0, 1, 2))


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64))


def relative_error(actual, expected, least=1e-30):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return norm(actual - expected) / max(norm(expected), least)


# The choice.

HOPPER = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0"
)
AMPERE = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
BOTH = ("mosaic_gpu", "xla")


@pytest.mark.parametrize(("device", "names"), [(HOPPER, BOTH), (AMPERE, ("xla",)), (TPU, ("xla",))])
def test_the_default_device_decides_among_several(monkeypatch, device, names):
    monkeypatch.setattr(hopper, "default_device", lambda: device)
    assert dispatch.resolve(None) == names
    assert dispatch.resolve(BOTH) == names
    assert dispatch.resolve(["xla", "mosaic_gpu"]) == names[::-1]
    assert dispatch.resolve("mosaic_gpu") == ("mosaic_gpu",)


def test_the_default_device_is_the_one_jax_uses(monkeypatch):
    assert hopper.default_device() == jnp.zeros(()).device
    for device in (jax.local_devices(backend="cpu")[0], "cpu"):
        with jax.default_device(device):
            assert hopper.default_device().platform == "cpu"


def test_another_gpu_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(hopper, "default_device", lambda: AMPERE)
    dispatch._say_once.cache_clear()
    args = inputs((1, 8, 1, 8))[:3]
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(2):
            jax.eval_shape(functools.partial(attend, implementation=None), *args)
    assert [record.message for record in caplog.records] == [
        "mosaic_gpu needs an NVIDIA GPU of compute capability 9.0 (Hopper), but the default device "
        "is NVIDIA A100 of compute capability 8.0."
    ]
    with pytest.raises(NotImplementedError, match=r"but the default device is NVIDIA A100"):
        attend(*args)


def test_a_shape_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(hopper, "default_device", lambda: HOPPER)
    dispatch._say_once.cache_clear()
    args = inputs((1, 8, 1, 8))[:3]
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(2):
            jaxpr = jax.make_jaxpr(functools.partial(attend, implementation=None, num_hashes=129))
            assert "mosaic_gpu" not in str(jaxpr(*args))
    assert len(caplog.records) == 1
    assert "sampled runs by xla: mosaic_gpu needs num_hashes in 1..128" in caplog.records[0].message
    assert "mosaic_gpu" in str(
        jax.make_jaxpr(functools.partial(attend, implementation=None))(*args)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(hash_code_len=13, num_keys=4089),
            r"hash_code_len in 1\.\.12 for more than 4096 queries and keys .* got 13 for 4097",
        ),
        (dict(num_hashes=129), r"mosaic_gpu needs num_hashes in 1\.\.128, got 129"),
        (dict(num_hashes=None, dtype=jnp.float32), "bfloat16 or float16 arrays for the expect"),
        (dict(num_hashes=None, head_dim=257), r"dimension of query in 1\.\.256, got 257"),
        (
            dict(head_dim=257, value_dim=8),
            r"needs the last dimension of query in 1\.\.256, got 257",
        ),
        (dict(value_dim=257), r"needs the last dimension of value in 1\.\.256, got 257"),
    ],
)
def test_refuses_what_has_no_kernel(change, message):
    shape = (1, 8, 1, change.pop("head_dim", 8))
    names = ("num_keys", "value_dim", "dtype")
    arrays = {name: change.pop(name) for name in names if name in change}
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(attend, **change), *inputs(shape, **arrays)[:3])


def test_refuses_float64():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="got float64"):
        jax.eval_shape(attend, *inputs((1, 8, 1, 8), dtype=jnp.float64)[:3])


def test_refuses_other_operations():
    codes, weight = jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 3))
    with pytest.raises(NotImplementedError, match="does not implement lsh_weighted_cumulation"):
        kernels.lsh_weighted_cumulation(
            codes, codes, weight, weight, weight, hash_code_len=3, implementation="mosaic_gpu"
        )


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap])
def test_refuses_to_run_elsewhere(transform):
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        args = inputs((1, 8, 1, 8))[:3]
        if transform is jax.vmap:
            args = [x[None] for x in args]
        with pytest.raises(NotImplementedError, match=r"Hopper.*is lowered for cpu\. Other"):
            transform(attend)(*args)


def test_importing_loads_no_gpu_dialects():
    code = (
        "import sys, yoso_jax, yoso_jax.kernels.mosaic_gpu.operations; "
        "sys.exit(any(name.startswith(('jax.experimental.mosaic', 'jaxlib.mlir.dialects.gpu')) "
        "for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Transformations, lowered for CUDA on any machine.


def lower(f, *args):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def on_any_machine(monkeypatch):
    """Where another GPU is the default device, too."""
    monkeypatch.setattr(hopper, "check", lambda: None)


@pytest.mark.parametrize(
    "options",
    [
        dict(backward="sampled"),
        dict(backward="expectation"),
        dict(backward="bucketed", bucket_bits=2),
        dict(num_hashes=None),
    ],
    ids=["sampled", "sampled-E", "bucketed", "expectation"],
)
def test_lowers_for_cuda_under_transformations(on_any_machine, options):
    *args, _ = inputs((1, 64, 2, 16))
    attend_so = functools.partial(attend, **options)
    grad = gradients(**options)
    forward = lower(attend_so, *args).count("@mosaic_gpu")
    assert forward >= (1 if "num_hashes" in options else 3)
    assert lower(grad, *args).count("@mosaic_gpu") > forward

    def layers(query, key, value):
        def layer(x, rng):
            return x + attend_so(x, key, value, rng=rng), None

        out = jax.lax.scan(jax.checkpoint(layer), query, jax.random.split(RNG, 2))[0]
        return jnp.sum(out.astype(jnp.float32))

    text = lower(jax.grad(layers), *args)
    # The forward pass, and again before the backward one.
    assert text.count("@mosaic_gpu") >= 2 * forward

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    # Without checks all of them are lowered as the others are.
    for check_vma in (True, False) if options.get("backward") == "sampled" else (True,):
        mapped = jax.shard_map(
            jax.vmap(grad), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
        )
        assert "@mosaic_gpu" in lower(mapped, *(jnp.stack([x, x]) for x in args))


def test_codes_of_more_bits_than_tables_have_lower_for_cuda(on_any_machine):
    *args, _ = inputs((1, 64, 2, 16))
    options = dict(backward="bucketed", bucket_bits=2, hash_code_len=16, normalize=False)
    assert "@mosaic_gpu" in lower(gradients(**options), *args)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_exports_for_cuda(on_any_machine, dtype):
    *args, _ = inputs((1, 30, 2, 16), num_keys=13, value_dim=5, dtype=dtype)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(jax.jit(attend), platforms=["cuda"], disabled_checks=checks)(*shapes)
    exported = export.deserialize(exported.serialize())
    assert exported.platforms == ("cuda",)
    assert exported.out_avals[0].shape == (1, 30, 2, 5)


@pytest.mark.parametrize("normalize", [False, True])
def test_only_kernels_touch_the_tokens_of_a_forward_pass(on_any_machine, normalize):
    """No copy, transposition, mask or float32 twin of an array of the size of the inputs."""
    *args, _ = inputs((2, 2048, 3, 32))
    projection = sample_projection(RNG, (2, 3), 32, num_hashes=8, hash_code_len=5)
    mask = jnp.ones((2, 2048), bool)
    jaxpr = jax.make_jaxpr(
        functools.partial(
            sampled_attention, hash_code_len=5, normalize=normalize, implementation="mosaic_gpu"
        )
    )(*args, projection.astype(args[0].dtype), mask, mask)
    free = {"mosaic_gpu_only", "reshape", "pad", "slice", "convert_element_type", "jit", "pjit"}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name in ("core_map", "pallas_call", "run_state"):
                continue
            subjaxprs = list(jax.extend.core.jaxprs_in_params(equation.params))
            for sub in subjaxprs:
                visit(sub)
            for x in equation.outvars:
                if x.aval.size >= args[0].size and not subjaxprs:
                    assert name in free, equation
                    assert x.aval.dtype != jnp.float32, equation

    visit(jaxpr.jaxpr)


@pytest.mark.parametrize("normalize", [False, True])
def test_residuals_are_the_inputs_and_norms(on_any_machine, normalize):
    *args, _ = inputs((1, 64, 2, 16))
    mask = jnp.ones((1, 64), bool)
    f = functools.partial(attend, normalize=normalize)
    _, vjp = jax.eval_shape(lambda *args: jax.vjp(f, *args, mask), *args)
    residuals = jax.tree.leaves(vjp)
    assert [x.shape for x in residuals if x.dtype == jnp.float32] == [(1, 64, 2)] * normalize
    rest = [x.shape for x in residuals if x.dtype == jnp.bfloat16]
    assert rest == [(1, 64, 2, 16)] * (3 + normalize)
    # The projection is drawn again.
    keys = [x for x in residuals if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    assert [x.shape for x in keys] == [()]
    dtypes = {x.dtype for x in residuals} - {keys[0].dtype}
    assert dtypes <= {jnp.dtype(x) for x in (jnp.bfloat16, jnp.bool_, jnp.float32)}


# Numbers, in NumPy.


def numpy_call(program, *inputs):
    """Runs programs in NumPy from inside `jax.jit` and, one after the other, `jax.vmap`."""
    run = functools.partial(numpy_run, program)
    return list(jax.pure_callback(run, program.outputs, *inputs, vmap_method="sequential"))


@pytest.fixture
def in_numpy(monkeypatch, on_any_machine):
    """Lanes run in NumPy, and XLA hashes: without rounding, as in its own implementation."""
    monkeypatch.setattr(hopper, "only", lambda x: x)
    monkeypatch.setattr(hashing, "hash_tokens", hashes.hash_tokens_by_xla)
    cumulate = functools.partial(cumulation.cumulate, call=numpy_call)
    monkeypatch.setattr(cumulation, "cumulate", cumulate)
    tangents = functools.partial(operations.tangents, call=numpy_call)
    monkeypatch.setattr(operations, "tangents", tangents)

    def xla_gradients(*args, deterministic, with_value=True, **options):
        if with_value:
            return xla.surrogate_gradients(None, *args[:-1], **options)
        return *xla.expected_gradients(*args, **options), None

    def xla_means(query, key, *args, **options):
        codes = (jnp.zeros((len(x), x.shape[2], x.shape[1], 1), jnp.int32) for x in (query, key))
        return xla.bucket_means(*codes, query, key, *args, **options, bucket_bits=0)

    find = functools.partial(buckets.find, call=numpy_call)
    monkeypatch.setattr(buckets, "find", find)
    monkeypatch.setattr(buckets, "means", functools.partial(buckets.means, interpret=True))
    monkeypatch.setattr(operations, "gradients", xla_gradients)
    monkeypatch.setattr(operations, "attend", xla.expectation)
    monkeypatch.setattr(operations, "means", xla_means)


def value_and_gradients(implementation, args, cotangent, masks=(None, None), **options):
    @jax.jit
    def compiled(args, cotangent):
        def f(*args):
            mask, query_mask = masks
            return attend(
                *args, mask, query_mask=query_mask, implementation=implementation, **options
            )

        out, vjp = jax.vjp(f, *args)
        return out, *vjp(cotangent)

    return compiled(args, cotangent)


def assert_agrees_with_xla(args, cotangent, tolerance, **options):
    results = value_and_gradients("mosaic_gpu", args, cotangent, **options)
    expected = value_and_gradients("xla", args, cotangent, **options)
    # With a single key, gradients of query and key are sums that cancel: a normalised row does not
    # change with the weight of the key. What is left is the rounding of the terms, which are as
    # large as those of the gradient of value.
    least = max(1e-30, max(map(norm, expected[1:])) / 4)
    leasts = 1e-30, least, least, least
    for result, wanted, least in zip(results, expected, leasts, strict=True):
        assert result.dtype == wanted.dtype
        assert np.isfinite(np.asarray(result, np.float32)).all()
        assert relative_error(result, wanted, least) < tolerance
    return results


TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


@pytest.mark.parametrize(
    ("dtype", "backward"),
    [
        (jnp.float32, "sampled"),
        (jnp.bfloat16, "expectation"),
        (jnp.float16, "sampled"),
        (jnp.float32, "bucketed"),
    ],
)
def test_equals_xla(in_numpy, backward, dtype):
    *args, cotangent = inputs((2, 19, 2, 16), num_keys=13, value_dim=5, dtype=dtype)
    tolerance = TOLERANCE[cotangent.dtype.name]
    assert_agrees_with_xla(args, cotangent, tolerance, backward=backward, bucket_bits=2)


def test_equals_xla_unnormalised(in_numpy):
    *args, cotangent = inputs((2, 19, 2, 16), num_keys=13, value_dim=5)
    assert_agrees_with_xla(args, cotangent, 1e-2, normalize=False)


@pytest.mark.parametrize(
    ("backward", "hash_code_len", "normalize"),
    [("sampled", 13, True), ("expectation", 14, True), ("bucketed", 16, False)],
)
def test_codes_of_more_bits_than_tables_have(in_numpy, backward, hash_code_len, normalize):
    *args, cotangent = inputs((1, 19, 2, 16), num_keys=13, value_dim=5, dtype=jnp.float32)
    # Close enough to collide.
    args[1] = args[1].at[:, :7].set(args[0][:, :7] + 0.02 * args[1][:, :7])
    options = dict(backward=backward, hash_code_len=hash_code_len, normalize=normalize)
    out, *_ = assert_agrees_with_xla(args, cotangent, 1e-4, bucket_bits=2, **options)
    assert norm(out) > 0


def test_single_key(in_numpy):
    *args, cotangent = inputs((2, 1, 1, 16))
    assert_agrees_with_xla(args, cotangent, 1e-2)


def test_masks(in_numpy):
    """Whatever stands in masked rows, even NaN; batch rows without keys, or without tokens."""
    *args, cotangent = inputs((3, 20, 2, 16), num_keys=12)
    query_mask = jnp.asarray([[True] * 13 + [False] * 7, [True, False] * 10, [False] * 20])
    mask = jnp.asarray([[False] * 2 + [True] * 10, [False] * 12, [False] * 12])
    masked = [query_mask, mask, mask, query_mask]
    args = [jnp.where(m[..., None, None], x, jnp.nan) for x, m in zip(args, masked, strict=False)]
    out, *grads = assert_agrees_with_xla(
        args, cotangent, 1e-2, masks=(mask, query_mask), backward="sampled"
    )
    for x, m in zip((*grads, out), masked, strict=True):
        assert not np.any(np.asarray(x)[~np.asarray(m)])
    assert not any(np.any(np.asarray(x)[1:]) for x in (*grads, out))


def test_under_scan_and_checkpoint(in_numpy):
    *args, _ = inputs((1, 12, 2, 16), dtype=jnp.float32)

    def layers(query, key, value, implementation):
        def layer(x, rng):
            return x + attend(x, key, value, rng=rng, implementation=implementation), None

        out = jax.lax.scan(jax.checkpoint(layer), query, jax.random.split(RNG, 2))[0]
        return jnp.sum(out * jnp.arange(16))

    for implementation in ("xla", "mosaic_gpu"):
        f = jax.grad(functools.partial(layers, implementation=implementation), argnums=(0, 1, 2))
        grads = jax.jit(f)(*args)
        if implementation == "xla":
            expected = grads
    for grad, wanted in zip(grads, expected, strict=True):
        assert relative_error(grad, wanted) < 1e-4


def test_under_vmap(in_numpy):
    @jax.jit
    def out_and_gradients(*args):
        out, vjp = jax.vjp(attend, *args)
        return out, *vjp(out * jnp.arange(16).astype(out.dtype))

    *args, _ = inputs((1, 6, 2, 16), num_keys=5)
    stacked = [jnp.stack([x, 2 * x[:, ::-1]]) for x in args]
    results = jax.jit(jax.vmap(out_and_gradients))(*stacked)
    for i in range(2):
        expected = out_and_gradients(*(x[i] for x in stacked))
        for result, wanted in zip(results, expected, strict=True):
            assert relative_error(result[i], wanted) < 1e-5


@pytest.mark.parametrize("hash_code_len", [3, 16])
def test_cumulation_equals_xla(in_numpy, hash_code_len):
    dtype = jnp.bfloat16
    query_codes, key_codes = draw_codes((2, 3, 10, 5), (2, 3, 14, 5), num_codes=8)
    query_codes = query_codes.astype(jnp.uint8)
    if hash_code_len == 16:
        query_codes, key_codes = (
            65535 - 1000 * codes.astype(jnp.int32) for codes in (query_codes, key_codes)
        )
    (value,) = normal((2, 3, 14, 6), dtype=dtype)
    rng = np.random.default_rng(2)
    masks = {
        "query_mask": jnp.asarray(rng.random((2, 3, 10)) < 0.7),
        "key_mask": jnp.asarray(rng.random((2, 3, 14)) < 0.7),
    }

    def f(value, implementation):
        return kernels.lsh_cumulation(
            query_codes,
            key_codes,
            value,
            hash_code_len=hash_code_len,
            implementation=implementation,
            **masks,
        )

    for given in (masks, {}):
        masks = given
        results, expected = (
            jax.vjp(jax.jit(functools.partial(f, implementation=name)), value)
            for name in ("mosaic_gpu", "xla")
        )
        assert results[0].dtype == dtype
        tolerance = TOLERANCE[results[0].dtype.name]
        assert relative_error(results[0], expected[0]) < tolerance
        assert relative_error(results[1](expected[0])[0], expected[1](expected[0])[0]) < tolerance


@pytest.mark.parametrize(("num_hashes", "hash_code_len"), [(1, 1), (11, 9), (16, 12)])
def test_plain_codes_are_those_arranged(num_hashes, hash_code_len):
    (codes,) = draw_codes((2, 21, num_hashes), num_codes=2**hash_code_len)
    arranged = layout.arrange_codes(codes, hash_code_len=hash_code_len, filler=1)
    plain = hashes.plain_codes(arranged, num_hashes=num_hashes, hash_code_len=hash_code_len)
    np.testing.assert_array_equal(plain, codes)


# On a GPU.

GPU_CASES = {
    "small": dict(shape=(2, 1, 3, 64)),
    "ragged": dict(shape=(2, 1000, 3, 64), num_keys=777),
    "narrow": dict(shape=(1, 130, 2, 40), num_keys=1030, value_dim=24),
    "wide": dict(shape=(1, 300, 1, 256)),
    "long": dict(shape=(1, 5000, 2, 64)),
}


@pytest.fixture
def exact_products():
    """float32 products as in the expected values."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.gpu
@backward
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("case", GPU_CASES)
def test_gpu_agrees_with_xla(exact_products, case, dtype, backward):
    *args, cotangent = inputs(**GPU_CASES[case], dtype=dtype)
    options = dict(num_hashes=32, hash_code_len=9, backward=backward)
    assert_agrees_with_xla(args, cotangent, 1e-2, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("hash_fn", ["gaussian", "fast"])
@pytest.mark.parametrize(
    ("num_hashes", "hash_code_len"), [(1, 1), (33, 10), (128, 8), (20, 12), (32, 16)]
)
def test_gpu_with_any_hashes(exact_products, num_hashes, hash_code_len, hash_fn):
    *args, cotangent = inputs((2, 500, 2, 64))
    options = dict(num_hashes=num_hashes, hash_code_len=hash_code_len, hash_fn=hash_fn)
    assert_agrees_with_xla(args, cotangent, 2e-2, normalize=False, **options)


@pytest.mark.gpu
@backward
def test_gpu_masks(exact_products, backward):
    *args, cotangent = inputs((3, 300, 2, 64), num_keys=200)
    query_mask = jnp.arange(300) < jnp.asarray([[300], [111], [0]])
    mask = jnp.arange(200) < jnp.asarray([[77], [0], [0]])
    masked = [query_mask, mask, mask, query_mask]
    args = [jnp.where(m[..., None, None], x, jnp.nan) for x, m in zip(args, masked, strict=False)]
    out, *grads = assert_agrees_with_xla(
        args,
        cotangent,
        1e-2,
        masks=(mask, query_mask),
        num_hashes=32,
        hash_code_len=7,
        backward=backward,
    )
    for x, m in zip((*grads, out), masked, strict=True):
        assert not np.any(np.asarray(x, np.float32)[~np.asarray(m)])


@pytest.mark.gpu
def test_gpu_is_the_default_and_repeats_bit_for_bit():
    if dispatch.resolve(None) == ("xla",):
        pytest.skip("the default device is not a Hopper GPU")
    *args, _ = inputs((2, 3000, 4, 64))
    results = [
        jax.jit(lambda *args, name=name: attend(*args, num_hashes=32, implementation=name))(*args)
        for name in (None, "mosaic_gpu", None)
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(np.asarray(result), np.asarray(results[0]))


@pytest.mark.gpu
@backward
def test_gpu_under_transformations(exact_products, backward):
    *args, _ = inputs((2, 260, 2, 64))
    grad = gradients(backward=backward)
    expected = jax.jit(grad)(*args)

    def assert_equal(results):
        for result, wanted in zip(results, expected, strict=True):
            assert relative_error(result, wanted) < 1e-2

    assert_equal(gradients(backward=backward, implementation="xla")(*args))
    stacked = [jnp.stack([x, 2 * x[:, ::-1]]) for x in args]
    assert_equal([x[0] for x in jax.jit(jax.vmap(grad))(*stacked)])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    # Without checks all of them are lowered as the others are.
    for check_vma in (True, False) if backward == "sampled" else (True,):
        mapped = jax.shard_map(
            grad, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
        )
        assert_equal(jax.jit(mapped)(*args))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    checks = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(jax.jit(grad), platforms=["cuda"], disabled_checks=checks)(*shapes)
    assert_equal(export.deserialize(exported.serialize()).call(*args))


@pytest.mark.gpu
def test_gpu_scan_and_checkpoint(exact_products):
    query, key, value, _ = inputs((2, 260, 2, 64))

    def layers(query, implementation):
        def layer(x, rng):
            return x + attend(x, key, value, rng=rng, implementation=implementation), None

        out = jax.lax.scan(jax.checkpoint(layer), query, jax.random.split(RNG, 2))[0]
        return jnp.sum(out.astype(jnp.float32) * jnp.arange(64))

    grads = [
        jax.jit(jax.grad(functools.partial(layers, implementation=name)))(query)
        for name in ("mosaic_gpu", "xla")
    ]
    # The second layer hashes sums that were rounded differently.
    assert relative_error(*grads) < 5e-2
