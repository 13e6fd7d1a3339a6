"""The cumulation kernel: in NumPy against float64, lowered for CUDA, and on a GPU."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from yoso_jax.kernels.mosaic_gpu import cumulation, fixed_point, lane_numpy, layout, values
from yoso_jax.kernels.mosaic_gpu.lane import Program
from yoso_jax.kernels.mosaic_gpu.layout import Rows
from yoso_jax.kernels.mosaic_gpu.plan import Plan


def numpy_run(program, *inputs):
    # Checking the types of each instruction takes longer than running it.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return lane_numpy.call(program, *inputs)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def numpy_call(program, *inputs):
    """Runs programs in NumPy from inside `jax.jit`."""
    run = functools.partial(numpy_run, program)
    return list(jax.pure_callback(run, program.outputs, *inputs))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Programs run once, so that optimising what is around them costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def reference(query_codes, key_codes, value):
    """`B v` in float64."""
    value = np.asarray(value, np.float64)
    out = np.zeros((*query_codes.shape[:2], value.shape[-1]))
    for head in range(len(out)):
        for h in range(query_codes.shape[-1]):
            table = np.zeros((2**12, value.shape[-1]))
            np.add.at(table, key_codes[head, :, h], value[head])
            out[head] += table[query_codes[head, :, h]]
    return out / query_codes.shape[-1]


def relative_error(actual, expected):
    actual = np.asarray(actual, np.float64)
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def random_case(heads, num_queries, num_keys, num_hashes, hash_code_len, dim, dtype, seed=0):
    """Codes of which a fifth agree between query i and key i, and normal values."""
    rng = np.random.default_rng(seed)
    tokens = max(num_queries, num_keys)
    codes = rng.integers(0, 2**hash_code_len, (2, heads, tokens, num_hashes)).astype(np.int32)
    codes[0] = np.where(rng.random(codes[0].shape) < 0.2, codes[1], codes[0])
    value = rng.standard_normal((heads, num_keys, dim))
    return codes[0, :, :num_queries], codes[1, :, :num_keys], jnp.asarray(value, dtype)


@functools.partial(jax.jit, static_argnames=("hash_code_len", "call", "kwargs"))
def run(query_codes, key_codes, value, *masks, hash_code_len, call=numpy_call, kwargs=()):
    """Pairs of heads are two heads of a batch row; masks are of batch rows."""
    arrange = functools.partial(layout.arrange_codes, hash_code_len=hash_code_len)
    heads, num_keys, dim = value.shape
    pairs = value.reshape(-1, 2 - heads % 2, num_keys, dim)
    out = cumulation.cumulate(
        arrange(query_codes, filler=0),
        arrange(key_codes, filler=1),
        jnp.swapaxes(pairs, 1, 2),
        *masks,
        num_hashes=query_codes.shape[-1],
        hash_code_len=hash_code_len,
        call=call,
        **dict(kwargs),
    )
    return jnp.swapaxes(out, 1, 2).reshape(heads, -1, dim)


BFLOAT16_ERROR, FLOAT16_ERROR, FLOAT32_ERROR = 3e-3, 2.2e-3, 2e-5

# T, S, hashes, bits, value dimension, dtype, options. One or two warpgroups make threads do several
# tokens.
CASES = [
    (1, 1, 1, 1, 16, jnp.bfloat16, {}),
    (7, 130, 5, 9, 40, jnp.float16, {"num_warpgroups": 1, "one_kernel": True}),
    (130, 7, 5, 12, 3, jnp.bfloat16, {"num_warpgroups": 1, "one_kernel": False}),
    (130, 130, 32, 11, 16, jnp.bfloat16, {"num_warpgroups": 1, "one_kernel": True}),
    (1000, 1000, 32, 9, 16, jnp.bfloat16, {"num_warpgroups": 1}),
    (700, 1000, 9, 10, 16, jnp.float32, {"num_warpgroups": 2}),
    (130, 2100, 32, 9, 64, jnp.bfloat16, {}),
    (130, 100, 32, 9, 64, jnp.bfloat16, {"one_kernel": True}),
    (33, 50, 128, 9, 16, jnp.bfloat16, {"num_warpgroups": 1}),
    (40, 10, 1, 12, 16, jnp.float32, {}),
    (10, 10, 8, 9, 256, jnp.bfloat16, {}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:5])))
def test_cumulation_matches_float64(case):
    *shape, hash_code_len, dim, dtype, kwargs = case
    arrays = random_case(1, *shape, hash_code_len, dim, dtype)
    out = run(*arrays, hash_code_len=hash_code_len, kwargs=tuple(kwargs.items()))
    assert out.dtype == dtype
    error = {"bfloat16": BFLOAT16_ERROR, "float16": FLOAT16_ERROR, "float32": FLOAT32_ERROR}
    assert relative_error(out, reference(*arrays)) < error[out.dtype.name]


def test_output_dtype_is_free():
    arrays = random_case(2, 20, 30, 3, 4, 8, jnp.bfloat16)
    kwargs = (("num_warpgroups", 1), ("out_dtype", jnp.float32))
    out = run(*arrays, hash_code_len=4, kwargs=kwargs)
    assert out.dtype == jnp.float32
    assert relative_error(out, reference(*arrays)) < 2e-3


@pytest.mark.parametrize("one_kernel", [True, False])
def test_masks(one_kernel):
    """Masked rows count as zero, also when they are not finite."""
    query_codes, key_codes, value = random_case(4, 140, 150, 9, 7, 8, jnp.float32)
    query_mask = np.random.default_rng(1).random((2, 140)) < 0.7
    key_mask = np.random.default_rng(2).random((2, 150)) < 0.7
    key_mask[1] = False
    by_head = np.repeat(key_mask, 2, 0)[..., None]
    masked = jnp.where(by_head, value, jnp.nan).astype(jnp.bfloat16)
    kwargs = (("num_warpgroups", 1), ("one_kernel", one_kernel))
    out = run(query_codes, key_codes, masked, query_mask, key_mask, hash_code_len=7, kwargs=kwargs)
    expected = reference(query_codes, key_codes, np.where(by_head, value, 0))
    expected *= np.repeat(query_mask, 2, 0)[..., None]
    assert relative_error(out, expected) < BFLOAT16_ERROR
    assert (out[np.repeat(~query_mask, 2, 0)] == 0).all()
    assert (out[2:] == 0).all()


def test_results_do_not_depend_on_how_the_work_is_cut():
    arrays = random_case(1, 140, 1100, 32, 9, 8, jnp.bfloat16)
    cuts = [(1, False), (2, False), (1, True)]
    outs = [
        run(*arrays, hash_code_len=9, kwargs=(("num_warpgroups", w), ("one_kernel", one)))
        for w, one in cuts
    ]
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def hard_heads():
    """Ordinary; in one bucket with an outlier; masked; not finite; with ten outliers."""
    query_codes, key_codes, value = random_case(5, 100, 1000, 5, 9, 16, jnp.float32)
    query_codes[1] = key_codes[1] = 3
    value = np.array(value)
    value[1, 17, 3] = 1e4
    value[2] = 0
    value[3, 5, 1] = np.nan
    value[4, 7::100, 5] = 1e4
    return query_codes, key_codes, jnp.asarray(value, jnp.bfloat16)


def load_scales(bounds):
    """What the cumulation takes from the bounds: two scales for each head, and whether safe."""
    heads, num_bounds, _ = bounds.shape

    def body(lane, inputs, outputs, shared, block):
        scale = fixed_point.Scale.load(lane, inputs[0], block, num_bounds)
        safe = lane.select(scale.is_safe, lane.i32(1), lane.i32(0))
        with lane.when(lane.thread_id() == 0):
            outputs[0].at(block, 4).store([lane.bitcast_i32(scale.packed)])
            outputs[1].at(block, 4).store([lane.bitcast_i32(scale.wide)])
            outputs[2].at(block, 4).store([safe])

    shapes = (jax.ShapeDtypeStruct((heads,), t) for t in (jnp.float32, jnp.float32, jnp.int32))
    return lane_numpy.call(Program("scales", body, tuple(shapes), heads, 1), bounds)


def largest_sum(codes, value, scale):
    """Of magnitudes, as integers, over the buckets of all hashes."""
    integers = np.abs(np.rint(np.asarray(value, np.float64) * float(scale)))
    sums = np.zeros((codes.shape[-1], 512, value.shape[-1]))
    for h, table in enumerate(sums):
        np.add.at(table, codes[:, h], integers)
    return sums.max()


def test_scales_are_chosen_for_each_head():
    query_codes, key_codes, value = hard_heads()
    sliced = values.slice_values(value[:, :, None], None, width=8, call=numpy_run)
    buckets = fixed_point.Buckets(5, 1000, value.dtype, 5, 9)
    codes = layout.arrange_codes(jnp.asarray(key_codes), hash_code_len=9, filler=1)
    program = fixed_point.largest_bucket_program(buckets)
    (bounds,) = numpy_run(program, codes, sliced.weights, sliced.sums, np.ones(5, np.float32))
    packed, wide, is_safe = load_scales(bounds)
    np.testing.assert_array_equal(is_safe, [True, False, True, True, False])
    for head in (0, 1, 2, 4):
        assert largest_sum(key_codes[head], value[head], wide[head]) < 2**31
        fits = largest_sum(key_codes[head], value[head], packed[head]) < 2**15
        assert fits == is_safe[head]
    assert np.isnan(packed[3])
    assert np.isnan(wide[3])

    out = run(query_codes, key_codes, value, hash_code_len=9)
    expected = reference(query_codes, key_codes, value)
    for head in (0, 1, 2, 4):
        assert relative_error(out[head], expected[head]) < BFLOAT16_ERROR
    assert jnp.isnan(out[3]).all()
    assert (out[2] == 0).all()


@pytest.mark.parametrize("outlier", [0.0, 1e4])
def test_long_sequences_in_one_bucket(outlier):
    """65,536 keys of one code: 32-bit sums, within 2e-3 before the rounding of the result."""
    _, _, value = random_case(1, 1, 2**16, 1, 1, 8, jnp.bfloat16)
    value = value.at[0, 99, 0].add(outlier)
    codes = np.full((1, 2**16, 2), 1, np.int32)
    arrays = codes[:, :3], codes, value
    out = run(*arrays, hash_code_len=1, kwargs=(("out_dtype", jnp.float32),))
    assert relative_error(out, reference(*arrays)) < 2e-3


@pytest.mark.parametrize("one_kernel", [True, False])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_sums_that_may_not_fit_are_checked(one_kernel, mean, monkeypatch):
    """In four buckets of 1,000 keys: signs that meet keep sums small, or they do not."""
    monkeypatch.setattr(fixed_point, "_MOST_COARSE", 1.0)
    arrays = random_case(1, 60, 4000, 9, 2, 8, jnp.bfloat16)
    arrays = *arrays[:2], arrays[2] + jnp.bfloat16(mean)
    kwargs = (("out_dtype", jnp.float32), ("one_kernel", one_kernel), ("num_warpgroups", 4))
    error = relative_error(run(*arrays, hash_code_len=2, kwargs=kwargs), reference(*arrays))
    if mean:
        assert error < 1e-5  # wide tables
    else:
        assert 1e-5 < error < 2.5e-3


def test_values_with_a_mean_fit_into_packed_tables():
    """Sums of 250 keys would not, at the scale of values that have nothing in common."""
    *codes, value = random_case(1, 600, 4000, 32, 4, 8, jnp.bfloat16)
    arrays = *codes, value + jnp.bfloat16(1)
    kwargs = (("out_dtype", jnp.float32), ("num_warpgroups", 4))
    error = relative_error(run(*arrays, hash_code_len=9, kwargs=kwargs), reference(*arrays))
    assert 1e-5 < error < 1e-3  # wide tables: 1e-7

    def factor(value, query_codes=codes[0]):
        arranged = [
            layout.arrange_codes(jnp.asarray(x), hash_code_len=9, filler=i)
            for i, x in enumerate((query_codes, codes[1]))
        ]
        (factor,) = fixed_point.coarseness(value[:, :, None], *arranged)
        return float(factor)

    # 32 hashes find 250 keys each; half of the mean square is the mean's.
    assert factor(arrays[2]) == pytest.approx((1 + 32 * 250 / 2) ** 0.5, rel=0.55)
    assert factor(value) == 1
    assert factor(arrays[2], codes[0] + 16) == 1  # which find nothing
    assert factor(arrays[2] * jnp.nan) == 1


EQUAL_VALUES = [(512, 1.0, None), (2000, 0.6, None), (5000, 1.0, None), (5000, 1.0, False)]


def equal_values(tokens, share, value):
    """Of so many tokens, of which a share has one code in all of eight hashes."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**9, (1, tokens, 8)).astype(np.int32)
    codes = np.where(rng.random(codes.shape) < share, 3, codes)
    return codes, codes, jnp.full((1, tokens, 8), value, jnp.bfloat16)


@pytest.mark.parametrize("value", [1.0, 1.3])
@pytest.mark.parametrize("case", EQUAL_VALUES, ids=lambda case: "-".join(map(str, case)))
def test_equal_values_are_rounded_alike_and_fit(case, value):
    """As when collisions are counted: all roundings have the same sign."""
    *case, one_kernel = case
    arrays = equal_values(*case, value)
    kwargs = (("out_dtype", jnp.float32), ("one_kernel", one_kernel))
    out = run(*arrays, hash_code_len=9, kwargs=kwargs)
    assert relative_error(out, reference(*arrays)) < 4e-3


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("columns", "width", "dtype"),
    [
        (64, 8, jnp.bfloat16),
        (250, 8, jnp.float32),
        (10, 4, jnp.float16),
        (3, 2, jnp.float32),
        (254, 8, jnp.bfloat16),
    ],
)
def test_slices_are_merged(columns, width, dtype, normalize):
    """They come back as they were, but for masked rows and, if wanted, norms."""
    value = np.random.default_rng(0).standard_normal((2, 150, 3, columns))
    value[0, 7] = 0
    value = jnp.asarray(value, dtype)
    mask = np.random.default_rng(1).random((2, 150)) < 0.7
    slices = values.slice_values(value, None, width=width, call=numpy_run).slices
    rows = Rows(2, 150, 3, columns, np.dtype(dtype))
    merge = values.merge_slices_program(rows, width, normalize=normalize)
    out, *norms = numpy_run(merge, slices, mask.astype(np.int32))
    expected = np.where(mask[..., None, None], value, 0).astype(np.float64)
    if normalize:
        norm = np.linalg.norm(expected, axis=-1)
        np.testing.assert_allclose(norms[0], norm, rtol=1e-5)
        expected /= np.maximum(norm, 1e-12)[..., None]
    tolerance = float(jnp.finfo(dtype).eps) if normalize else 0
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=2 * tolerance + 1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_magnitude_does_not_matter(scale):
    query_codes, key_codes, value = random_case(1, 60, 60, 8, 5, 8, jnp.bfloat16)
    arrays = query_codes, key_codes, value * jnp.bfloat16(scale)
    out = run(*arrays, hash_code_len=5, kwargs=(("num_warpgroups", 1),))
    assert relative_error(out, reference(*arrays)) < BFLOAT16_ERROR


def test_gradient_of_value_is_the_cumulation_with_exchanged_roles():
    key_codes, query_codes, grad_out = random_case(2, 60, 40, 5, 6, 8, jnp.float32)
    out = run(key_codes, query_codes, grad_out, hash_code_len=6)
    weights = (query_codes[:, :, None] == key_codes[:, None]).mean(-1)
    expected = np.einsum("bts,btd->bsd", weights, np.asarray(grad_out, np.float64))
    assert relative_error(out, expected) < FLOAT32_ERROR


def test_codes_are_arranged_as_documented():
    codes = np.random.default_rng(0).integers(0, 2**10, (2, 19, 11)).astype(np.int32)
    out = np.asarray(layout.arrange_codes(jnp.asarray(codes), hash_code_len=10, filler=1))
    assert out.shape == (2, 2, 19, 8)
    for group, token, p in np.ndindex(2, 19, 8):
        slot = p ^ (token & 7)
        h = group * 8 + slot
        code = codes[:, token, h] if h < 11 else 1
        np.testing.assert_array_equal(out[:, group, token, p], (code * 8 + slot) * 8)


@pytest.mark.parametrize("hash_code_len", range(1, 13))
def test_tables_fit_and_slots_do_not_share_banks(hash_code_len):
    dtype = np.dtype(np.float16)
    plan = Plan(1, 9, 9, 8, 128, hash_code_len, dtype, dtype)
    assert plan.groups_per_pass * plan.table_bytes <= 224 * 1024
    assert (8 * 2**hash_code_len - 1) * layout.code_scale(hash_code_len) < 2**16
    if hash_code_len <= 10:
        # Whatever the codes, 32 threads that add a word use 32 banks.
        token, words = np.arange(32), plan.slot_words
        slot, word = token & 7, (token >> 3) & (words - 1)
        assert len(set(slot * words + word)) == 32


@pytest.mark.parametrize(
    ("heads", "tokens", "num_hashes", "one_kernel", "query_chunks", "key_chunks"),
    [
        (256, 1024, 32, True, 1, 1),
        (64, 4096, 32, True, 1, 1),
        (16, 16384, 32, True, 4, 1),
        (4, 65536, 32, False, 16, 1),
        (1, 2**18, 32, False, 64, 4),
        (1, 4096, 32, False, 4, 4),
        (1, 100, 32, False, 1, 1),
        (18, 4096, 32, False, 2, 1),  # one kernel would need two waves for 144 blocks
        (16, 16384, 8, True, 4, 1),
        (1, 2**18, 8, False, 64, 16),
        (1, 4096, 8, True, 4, 4),
    ],
)
def test_the_work_fills_the_gpu(heads, tokens, num_hashes, one_kernel, query_chunks, key_chunks):
    dtype = np.dtype(np.float16)
    plan = Plan(heads, tokens, tokens, 8, num_hashes, 9, dtype, dtype)
    assert plan.takes_one_kernel == one_kernel
    assert (plan.query_chunks, plan.key_chunks) == (query_chunks, key_chunks)


def lower(fn, *arrays):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    return jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    ("heads", "tokens", "num_hashes", "hash_code_len", "dim"),
    [
        (256, 1000, 32, 9, 64),  # in registers
        (64, 8192, 32, 9, 64),  # in memory
        (1, 8192, 33, 10, 40),  # split
        (2, 130, 128, 1, 256),
        (256, 130, 5, 11, 16),
        (256, 5000, 8, 12, 16),
    ],
)
def test_kernels_lower_for_cuda(heads, tokens, num_hashes, hash_code_len, dim, dtype):
    codes = jax.ShapeDtypeStruct((heads, tokens, num_hashes), jnp.int32)
    text = lower(
        functools.partial(run, call=None, hash_code_len=hash_code_len),
        codes,
        codes,
        jax.ShapeDtypeStruct((heads, tokens, dim), dtype),
    )
    assert text.count("@mosaic_gpu") >= 2


def test_kernels_lower_under_vmap():
    codes = jax.ShapeDtypeStruct((3, 2, 130, 5), jnp.int32)
    value = jax.ShapeDtypeStruct((3, 2, 130, 16), jnp.bfloat16)
    fn = jax.vmap(functools.partial(run, call=None, hash_code_len=9))
    assert "mosaic_gpu" in lower(fn, codes, codes, value)


def test_importing_loads_no_gpu_dialects():
    code = (
        "import sys, yoso_jax.kernels.mosaic_gpu.cumulation; "
        "sys.exit(any(name.startswith(('jax.experimental.mosaic', 'jaxlib.mlir.dialects.gpu')) "
        "for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


GPU_SHAPES = [
    # heads, T, S, hashes, bits, dimension, one_kernel
    (3, 1, 1, 1, 1, 16, None),
    (3, 1000, 777, 32, 9, 64, True),
    (3, 5000, 5001, 64, 9, 40, None),
    (2, 4096, 4096, 40, 10, 64, True),
    (2, 4096, 4096, 40, 10, 64, False),
    (2, 130, 1000, 5, 11, 16, False),
    (2, 6000, 130, 128, 12, 256, None),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("case", GPU_SHAPES, ids=lambda case: "-".join(map(str, case)))
def test_gpu_matches_float64(case, dtype):
    *shape, one_kernel = case
    arrays = random_case(*shape, dtype)
    from yoso_jax.kernels.mosaic_gpu import lane_mosaic

    arguments = {"hash_code_len": shape[4], "kwargs": (("one_kernel", one_kernel),)}
    out = run(*arrays, call=lane_mosaic.call, **arguments)
    error = {"bfloat16": BFLOAT16_ERROR, "float16": FLOAT16_ERROR, "float32": FLOAT32_ERROR}
    assert relative_error(out, reference(*arrays)) < error[out.dtype.name]
    again = run(*arrays, call=lane_mosaic.call, **arguments)
    np.testing.assert_array_equal(out, again)


@pytest.mark.gpu
@pytest.mark.parametrize("num_queries", [130, 700])
def test_gpu_agrees_with_numpy_bit_for_bit(num_queries):
    """The same programs on the same inputs, with packed, wide and not finite heads."""
    from yoso_jax.kernels.mosaic_gpu import lane_mosaic

    query_codes, key_codes, value = hard_heads()
    query_codes = jnp.asarray(np.resize(query_codes, (5, num_queries, 5)))
    key_codes = jnp.asarray(key_codes)
    arrange = functools.partial(layout.arrange_codes, hash_code_len=9)
    query_codes, key_codes = arrange(query_codes, filler=0), arrange(key_codes, filler=1)
    dtype, value = np.dtype(value.dtype), value[:, :, None]
    plan = Plan(5, num_queries, 1000, 2, 5, 9, dtype, dtype, num_warpgroups=1)

    def check(program, *arrays):
        """What NumPy computes, compared with the GPU."""
        expected = numpy_run(program, *arrays)
        actual = jax.jit(functools.partial(lane_mosaic.call, program))(*arrays)
        for a, b in zip(actual, expected, strict=True):
            if not program.incomplete:
                np.testing.assert_array_equal(np.asarray(a, np.float64), b.astype(np.float64))
        return expected

    keys = Rows(5, 1000, 1, 16, dtype)
    slices, weights, sums = check(values.slice_values_program(keys, 8), value)
    search = fixed_point.largest_bucket_program(plan.buckets)
    (bounds,) = check(search, key_codes, weights, sums, np.full(5, 1.5, np.float32))
    arrays = key_codes, slices, bounds
    out, *_ = check(cumulation.cumulation_program(plan), query_codes, *arrays)
    tables, flags = check(cumulation.write_tables_program(plan, wide=False), *arrays)
    (wide,) = check(cumulation.write_tables_program(plan, wide=True), *arrays, flags)
    check(cumulation.read_tables_program(plan), query_codes, bounds, wide, tables, flags)
    rows = Rows(5, num_queries, 1, 16, dtype)
    check(values.merge_slices_program(rows, 8, normalize=True), out)


@pytest.mark.gpu
@pytest.mark.parametrize("case", EQUAL_VALUES, ids=lambda case: "-".join(map(str, case)))
def test_gpu_counts_collisions(case):
    *case, one_kernel = case
    arrays = equal_values(*case, 1.0)
    kwargs = (("out_dtype", jnp.float32), ("one_kernel", one_kernel))
    out = run(*arrays, hash_code_len=9, call=None, kwargs=kwargs)
    assert relative_error(out, reference(*arrays)) < 4e-3


@pytest.mark.gpu
def test_gpu_keeps_hard_heads_exact():
    query_codes, key_codes, value = hard_heads()
    out = jax.jit(
        functools.partial(run, call=None, hash_code_len=9),
    )(query_codes, key_codes, value)
    expected = reference(query_codes, key_codes, value)
    for head in (0, 1, 2, 4):
        assert relative_error(out[head], expected[head]) < BFLOAT16_ERROR
    assert jnp.isnan(out[3]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("outlier", [0.0, 1e4])
def test_gpu_long_sequences_in_one_bucket(outlier):
    codes = np.full((2, 2**16, 32), 5, np.int32)
    _, _, value = random_case(2, 1, 2**16, 1, 1, 64, jnp.bfloat16)
    value = value.at[0, 99, 0].add(outlier)
    out = jax.jit(functools.partial(run, call=None, hash_code_len=9))(codes, codes, value)
    expected = np.asarray(value, np.float64).sum(1, keepdims=True)
    assert relative_error(out, np.broadcast_to(expected, out.shape)) < BFLOAT16_ERROR


@pytest.mark.gpu
def test_gpu_under_vmap():
    arrays = random_case(6, 130, 150, 9, 9, 16, jnp.bfloat16)
    fn = functools.partial(run, call=None, hash_code_len=9)
    out = jax.jit(fn)(*arrays)
    batched = [jnp.asarray(x).reshape(3, 2, *x.shape[1:]) for x in arrays]
    np.testing.assert_array_equal(jax.jit(jax.vmap(fn))(*batched).reshape(out.shape), out)
