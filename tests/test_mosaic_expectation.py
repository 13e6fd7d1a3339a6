"""The expectation kernels: probabilities in NumPy, lowered for CUDA, and on a GPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from yoso_jax import yoso_attention
from yoso_jax.kernels.mosaic_gpu import expectation, expectation_backward, hopper, lane_numpy
from yoso_jax.kernels.mosaic_gpu import expectation_tiles as tiles
from yoso_jax.kernels.mosaic_gpu.collision_chain import collision_chain
from yoso_jax.kernels.mosaic_gpu.lane import Program


@pytest.mark.parametrize("hash_code_len", range(1, 17))
def test_probabilities_of_a_tile(hash_code_len):
    """A warpgroup's 64 rows and 32 columns, of vectors of any lengths."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(-5, 5, 64)).astype(np.float32)
    scales = -np.exp(rng.uniform(-5, 5, 32)).astype(np.float32)
    cosine = rng.uniform(-1, 1, (64, 32))
    cosine[:8, :4], cosine[8:16, 4:8], cosine[16:24] = 1, -1, 0
    products = (cosine * lengths[:, None] / -scales).astype(np.float32)
    rows = np.stack(tiles.row_values(jnp.asarray(lengths), collision_chain(hash_code_len)))

    def body(lane, inputs, outputs, shared, block):
        thread = lane.thread_id()
        with lane.when(thread < 32):
            shared.at(thread, 4).store(inputs[1].at(thread, 4).load())
        lane.barrier()
        first = (thread >> 5) * 16 + ((thread >> 2) & 7)

        def load(pointer, column, row):
            (word,) = pointer.at(column * 64 + first, 4).load(1, 32 * row)
            return lane.bitcast_f32(word)

        # In the order of a matrix product's registers.
        place = [(j, r, c) for j in range(4) for r in range(2) for c in range(2)]
        column = [lane.i32(8 * j + c) + (thread & 3) * 2 for j, _, c in place]
        values = [load(inputs[0], each, r) for each, (_, r, _) in zip(column, place, strict=True)]
        mine = [[load(inputs[2], lane.i32(i), r) for r in range(2)] for i in range(len(rows))]
        chain = collision_chain(hash_code_len)
        pieces = tiles.probabilities(lane, values, mine, shared, chain)
        out = [x for piece, _ in pieces for x in piece]
        for each, (_, r, _), value in zip(column, place, out, strict=True):
            pointer = outputs[0].at(each * 64 + first, 4)
            pointer.store([lane.bitcast_i32(value)], 32 * r)

    out = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    program = Program(
        "probabilities", body, outputs=(out,), num_blocks=1, num_warpgroups=1, shared_bytes=128
    )
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        ordered = np.asarray(tiles.in_column_order(jnp.asarray(scales)))
        (out,) = lane_numpy.call(program, np.ascontiguousarray(products.T), ordered, rows)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    probability = (1 - np.arccos(cosine) / np.pi) ** hash_code_len
    # Where vectors point to opposite sides roots are singular; where they are parallel, the
    # rounding of products shows.
    error = np.abs(out.T - probability)
    assert (error <= (1.5e-3 * probability + 1e-6))[np.abs(cosine) < 0.7].all()
    assert (error <= 1e-2)[cosine > 0].all()
    assert (error <= 0.13).all()


def test_the_order_of_columns():
    columns = jnp.arange(48)
    ordered = np.asarray(tiles.in_column_order(columns))
    np.testing.assert_array_equal(tiles.from_column_order(jnp.asarray(ordered)), columns)
    # Of a thread those of two groups of eight columns lie together.
    np.testing.assert_array_equal(ordered[20:24], [18, 19, 26, 27])
    places = [tiles.place_of_column(i) for i in range(48)]
    np.testing.assert_array_equal(ordered[places], columns)


@pytest.mark.parametrize("num_queries", [8, 64, 100, 128, 192, 256, 320, 384, 1000, 4096])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
def test_items_cover_all_queries(num_queries, dims):
    plan = expectation.Plan(2, 3, num_queries, 512, *dims, 9, False, True)
    whole, short = plan.items
    units = whole * plan.warpgroups + short * max(plan.warpgroups - 1, 1)
    # Only where there are fewer units than warpgroups do some have none.
    assert plan.units <= units <= plan.units + (plan.units < plan.warpgroups)
    assert 1 <= plan.num_blocks <= plan.num_items


def normal(shape, num_keys, value_dim, dtype):
    batch, num_queries, heads, head_dim = shape
    sizes = [
        (num_queries, head_dim),
        (num_keys, head_dim),
        (num_keys, value_dim),
        (num_queries, value_dim),
    ]
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (batch, n, heads, d), dtype)
        for key, (n, d) in zip(keys, sizes, strict=True)
    ]


SHAPES = [
    # B, T, N, H; S; D; bits
    ((2, 256, 2, 64), 256, 64, 9),
    ((1, 300, 3, 64), 515, 64, 9),
    ((2, 128, 1, 32), 64, 16, 4),
    ((1, 200, 2, 128), 1000, 128, 12),
    ((1, 130, 2, 256), 260, 256, 8),
    ((1, 5, 1, 7), 3, 5, 16),
    ((1, 128, 2, 80), 1024, 48, 3),
    ((1, 100, 2, 48), 256, 160, 6),
]
shapes = pytest.mark.parametrize(
    ("shape", "num_keys", "value_dim", "bits"), SHAPES, ids=lambda x: str(x).replace(" ", "")
)


def lower(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


# A case for each code length: last dimensions of queries and of values, and how many there are. In
# groups of four: both dimensions are at most 64, that of queries, that of values, none.
CASES = [
    # H, D, T, S
    (64, 64, 256, 128),
    (16, 48, 300, 515),
    (48, 32, 130, 1000),
    (7, 5, 5, 3),
    (64, 256, 100, 256),
    (16, 160, 512, 64),
    (64, 128, 1, 300),
    (32, 80, 200, 129),
    (256, 64, 128, 260),
    (176, 16, 77, 1),
    (100, 33, 1024, 96),
    (96, 48, 63, 65),
    (128, 128, 256, 300),
    (128, 240, 255, 128),
    (144, 256, 8, 100),
    (256, 240, 131, 256),
]


def flags(case):
    """Any two of them have all values among the cases; the first two in each group of four."""
    columns = dict(deterministic=1, with_value=2, half=7, query_mask=11, key_mask=13)
    return {name: (case & column).bit_count() % 2 == 1 for name, column in columns.items()}


@pytest.mark.parametrize("case", range(len(CASES)))
def test_kernels_lower_for_cuda(case):
    head_dim, value_dim, num_queries, num_keys = CASES[case]
    hash_code_len, chosen = case + 1, flags(case)
    dtype = jnp.float16 if chosen["half"] else jnp.bfloat16
    shape = 2, num_queries, 3, head_dim
    *args, cotangent = jax.eval_shape(lambda: normal(shape, num_keys, value_dim, dtype))
    masks = [
        jax.ShapeDtypeStruct((2, n), bool) if chosen[name] else None
        for name, n in (("query_mask", num_queries), ("key_mask", num_keys))
    ]
    # One of three ways in which the forward kernel ends.
    if case % 3 == 2:
        means = functools.partial(expectation.means, hash_code_len=hash_code_len)
        text = lower(means, *args, *masks, cotangent)
    else:
        forward = functools.partial(
            expectation.attend, hash_code_len=hash_code_len, normalize=case % 3 == 1
        )
        text = lower(forward, *args, *masks)
    assert text.count("@mosaic_gpu") == 1
    options = {name: chosen[name] for name in ("deterministic", "with_value")}
    backward = functools.partial(
        expectation_backward.gradients, hash_code_len=hash_code_len, **options
    )
    parts = -(-max(head_dim, value_dim if chosen["with_value"] else 0) // 64)
    # The gradient of the queries by kernels of its own, or the kernel of `tangents`.
    others = -(-head_dim // 64) if chosen["deterministic"] else 1
    # Shifts are of what was sampled, without the gradient of value.
    shift = None if chosen["with_value"] else jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    text = lower(backward, *args, *masks, cotangent, shift)
    assert text.count("@mosaic_gpu") == parts + others


def test_cases_have_all_plans():
    """All there are of what decides which code is generated, but for widths and lengths."""

    def forward(head_dim, value_dim):
        plan = expectation.Plan(1, 1, 128, 128, head_dim, value_dim, 9, False, True)
        return {(plan.block_keys, plan.warpgroups, plan.stages)}

    def backward(head_dim, value_dim, deterministic, with_value):
        found = set()
        for part in range(4):
            plan = expectation_backward.Plan(
                1,
                1,
                128,
                128,
                head_dim,
                value_dim,
                9,
                part,
                False,
                None,
                not deterministic,
                with_value,
            )
            if part < plan.parts:
                outputs = plan.key_width > 0, plan.value_width > 0
                found.add((plan.warpgroups, plan.parts > 1, deterministic, with_value, outputs))
        return found

    every = list(itertools.product(range(16, 257, 16), range(16, 257, 16)))
    cases = [tuple(-(-dim // 16) * 16 for dim in case[:2]) for case in CASES]
    assert set().union(*itertools.starmap(forward, every)) == set().union(
        *itertools.starmap(forward, cases)
    )
    chosen = list(itertools.product((False, True), repeat=2))
    assert set().union(
        *(backward(*dims, *each) for dims in every for each in chosen)
    ) == set().union(
        *(backward(*dims, *list(flags(i).values())[:2]) for i, dims in enumerate(cases))
    )
    for pair in itertools.combinations(flags(0), 2):
        assert len({tuple(flags(case)[name] for name in pair) for case in range(16)}) == 4


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
@pytest.mark.parametrize("value_dim", [16, 64, 80, 128, 256])
def test_plans_fit(head_dim, value_dim):
    limit = 227 * 1024
    plan = expectation.Plan(1, 1, 512, 512, head_dim, value_dim, 9, False, True)
    token = 2 * (head_dim + value_dim)
    used = plan.warpgroups * tiles.ROWS * token + plan.stages * plan.block_keys * (token + 4)
    assert plan.stages >= 2
    assert used + 1024 <= limit
    for part in range(4):
        plan = expectation_backward.Plan(
            1, 1, 512, 512, head_dim, value_dim, 9, part, True, "columns", True, True
        )
        assert plan.stages >= 1
        assert (plan.key_width + plan.value_width > 0) == (part < plan.parts)


def test_flags_of_xla_ask_for_the_same_bits(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert not hopper.wants_same_bits()
    for flag in ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops=true"):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x {flag}")
        assert hopper.wants_same_bits()
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    assert not hopper.wants_same_bits()


# On a GPU.


def expected(args, masks, bits, shift=0):
    """Result and gradients in float64; products of the cotangent and values with a shift."""
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in args)
    query_mask, key_mask = masks
    if query_mask is not None:
        query, cotangent = (np.where(query_mask[..., None, None], x, 0) for x in (query, cotangent))
    if key_mask is not None:
        key, value = (np.where(key_mask[..., None, None], x, 0) for x in (key, value))
    lengths = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key)]
    lengths = [np.where(x == 0, 1, x) for x in lengths]
    unit_query, unit_key = query / lengths[0], key / lengths[1]
    cosine = np.einsum("btnh,bsnh->bnts", unit_query, unit_key).clip(-1, 1)
    weights = (1 - np.arccos(cosine) / np.pi) ** bits
    if query_mask is not None:
        weights = weights * np.asarray(query_mask)[:, None, :, None]
    if key_mask is not None:
        weights = weights * np.asarray(key_mask)[:, None, None]
    out = np.einsum("bnts,bsnd->btnd", weights, value)
    products = np.einsum("btnd,bsnd->bnts", cotangent, value)
    if np.ndim(shift):
        products = products + np.swapaxes(np.asarray(shift, np.float64), 1, 2)[..., None]
    scores = bits / 2 * weights * products
    grad_query = np.einsum("bnts,bsnh->btnh", scores, unit_key)
    grad_key = np.einsum("bnts,btnh->bsnh", scores, unit_query)
    grads = [
        (grad - (grad * unit).sum(-1, keepdims=True) * unit) / length
        for grad, unit, length in zip(
            (grad_query, grad_key), (unit_query, unit_key), lengths, strict=True
        )
    ]
    return out, *grads, np.einsum("bnts,btnd->bsnd", weights, cotangent)


def expected_means(args, masks, bits):
    """Products of rows and values on average, by probabilities, and the sums of these."""
    *tokens, value, rows = args
    out, count = (
        expected((*tokens, x, rows), masks, bits)[0] for x in (value, jnp.ones_like(value))
    )
    total = np.einsum("btnd,btnd->btn", np.nan_to_num(np.asarray(rows, np.float64)), out)
    count = count[..., 0]
    return total / np.where(count > 0, count, 1), count


def relative_error(x, y):
    x = np.asarray(x, np.float64)
    return np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)


def assert_accurate(args, masks, bits):
    *tokens, cotangent = args
    out, norm = jax.jit(functools.partial(expectation.attend, hash_code_len=bits, normalize=True))(
        *tokens, *masks
    )
    plain, _ = jax.jit(functools.partial(expectation.attend, hash_code_len=bits, normalize=False))(
        *tokens, *masks
    )
    wanted, *exact_grads = expected(args, masks, bits)
    wanted_norm = np.linalg.norm(wanted, axis=-1)
    assert relative_error(plain, wanted) < 3e-3
    assert relative_error(norm, wanted_norm) < 3e-3
    unit = wanted / np.maximum(wanted_norm, 1e-12)[..., None]
    assert relative_error(out, unit) < 3e-3
    # Rows, unlike a cotangent, with something in common with values.
    with_mean = *tokens[:2], tokens[2] + 1, cotangent + 1
    found = jax.jit(functools.partial(expectation.means, hash_code_len=bits))(
        *with_mean[:3], *masks, with_mean[3]
    )
    (mean, count), (wanted_mean, wanted_count) = found, expected_means(with_mean, masks, bits)
    assert relative_error(count, wanted_count) < 3e-3
    # Probabilities of less than a millionth, which matter to nothing, have no digit that is right.
    assert relative_error(mean * wanted_count, wanted_mean * wanted_count) < 3e-3
    some_shift = 3 * normal(tokens[0].shape, 1, 1, jnp.float32)[0][..., 0]
    shifted_grads = expected(args, masks, bits, some_shift)[1:]
    for deterministic in (False, True):
        for with_value in (True, False):
            shift = None if with_value else some_shift
            wanted_grads = exact_grads if with_value else shifted_grads
            grads = jax.jit(
                functools.partial(
                    expectation_backward.gradients,
                    hash_code_len=bits,
                    with_value=with_value,
                    deterministic=deterministic,
                )
            )(*tokens, *masks, cotangent, shift)
            assert (grads[2] is None) == (not with_value)
            for grad, each in zip(grads, wanted_grads, strict=True):
                if grad is not None:
                    assert relative_error(grad, each) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@shapes
def test_gpu_matches_float64(shape, num_keys, value_dim, bits, dtype):
    assert_accurate(normal(shape, num_keys, value_dim, dtype), (None, None), bits)


@pytest.mark.gpu
@shapes
def test_gpu_masks(shape, num_keys, value_dim, bits):
    args = normal(shape, num_keys, value_dim, jnp.bfloat16)
    rng = np.random.default_rng(0)
    query_mask = rng.random(shape[:2]) < 0.7
    key_mask = (rng.random((shape[0], num_keys)) < 0.7) & (np.arange(num_keys) <= num_keys // 2)
    key_mask[:, 0] = query_mask[:, 0] = True
    masks = [query_mask, key_mask, key_mask, query_mask]
    args = [jnp.where(m[..., None, None], x, jnp.nan) for x, m in zip(args, masks, strict=True)]
    assert_accurate(args, tuple(map(jnp.asarray, masks[:2])), bits)


@pytest.mark.gpu
@pytest.mark.parametrize("num_queries", [700, 1024])
def test_gpu_more_work_than_blocks(monkeypatch, num_queries):
    for kernels in (expectation, expectation_backward):
        monkeypatch.setattr(kernels, "_MULTIPROCESSORS", 4)
    assert_accurate(normal((2, num_queries, 3, 64), 500, 64, jnp.bfloat16), (None, None), 9)


@pytest.mark.gpu
def test_gpu_nothing_takes_part():
    args = normal((2, 100, 2, 64), 70, 64, jnp.bfloat16)
    for masks in ((None, jnp.zeros((2, 70), bool)), (jnp.zeros((2, 100), bool), None)):
        out, norm = expectation.attend(*args[:3], *masks, hash_code_len=9, normalize=True)
        assert not np.asarray(out, np.float32).any()
        assert not np.asarray(norm).any()
        grads = expectation_backward.gradients(*args[:3], *masks, args[3], hash_code_len=9)
        assert not any(np.asarray(grad, np.float32).any() for grad in grads)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1, -1, 0])
def test_gpu_parallel_opposite_and_zero_vectors(factor):
    query, _, value, cotangent = normal((1, 300, 2, 64), 300, 64, jnp.bfloat16)
    args = query, factor * query, value
    out, _ = expectation.attend(*args, None, None, hash_code_len=9, normalize=False)
    wanted, *wanted_grads = expected((*args, cotangent), (None, None), 9)
    assert relative_error(out, wanted) < 5e-3
    grads = expectation_backward.gradients(*args, None, None, cotangent, hash_code_len=9)
    for grad in grads:
        assert np.isfinite(np.asarray(grad, np.float32)).all()
    assert relative_error(grads[2], wanted_grads[2]) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_gpu_lengths_do_not_matter(scale):
    query, key, value, _ = normal((1, 200, 2, 64), 200, 64, jnp.bfloat16)
    query = query * jnp.exp2(jnp.arange(200) % 9 - 4.0)[None, :, None, None].astype(query.dtype)
    run = functools.partial(expectation.attend, hash_code_len=9, normalize=True)
    out, _ = run(query * scale, key * scale, value, None, None)
    wanted, _ = run(query, key, value, None, None)
    assert relative_error(out, np.asarray(wanted, np.float64)) < 4e-3


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit():
    args = normal((2, 1500, 4, 64), 1500, 64, jnp.bfloat16)
    forward = jax.jit(functools.partial(expectation.attend, hash_code_len=9, normalize=True))
    backward = jax.jit(
        functools.partial(expectation_backward.gradients, hash_code_len=9, deterministic=True)
    )
    for run in (
        lambda: forward(*args[:3], None, None),
        lambda: backward(*args[:3], None, None, args[3]),
    ):
        for first, second in zip(run(), run(), strict=True):
            np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.gpu
def test_gpu_under_transformations():
    query, key, value, cotangent = normal((2, 260, 2, 64), 260, 64, jnp.bfloat16)

    def loss(query, key, value, implementation="mosaic_gpu"):
        def layer(x, _):
            out = yoso_attention(
                x, key, value, num_hashes=None, hash_code_len=5, implementation=implementation
            )
            return x + out, None

        out = jax.lax.scan(jax.checkpoint(layer), query, length=2)[0]
        return jnp.sum((out * cotangent).astype(jnp.float32))

    grad = jax.grad(loss, argnums=(0, 1, 2))
    wanted = jax.jit(functools.partial(grad, implementation="xla"))(query, key, value)
    found = jax.jit(grad)(query, key, value)
    stacked = [jnp.stack([x, x[:, ::-1]]) for x in (query, key, value)]
    batched = jax.jit(jax.vmap(grad))(*stacked)
    for each, one, other in zip(wanted, found, batched, strict=True):
        each = np.asarray(each, np.float64)
        assert relative_error(one, each) < 2e-2
        assert relative_error(other[0], each) < 2e-2


@pytest.mark.gpu
def test_gpu_memory_is_linear():
    def extra(tokens):
        args = jax.eval_shape(lambda: normal((1, tokens, 4, 64), tokens, 64, jnp.bfloat16))

        def run(query, key, value, cotangent):
            out, vjp = jax.vjp(
                functools.partial(yoso_attention, num_hashes=None, implementation="mosaic_gpu"),
                query,
                key,
                value,
            )
            return out, vjp(cotangent)

        return jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert extra(2**16) < 1.1 * 4 * extra(2**14)
    # 2**18 tokens.
    assert extra(2**16) < 110 * 2**20
