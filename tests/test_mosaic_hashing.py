"""The hash kernel: its packing in NumPy, the whole lowered for CUDA, and on a GPU."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from yoso_jax.hashing import sample_projection
from yoso_jax.kernels.mosaic_gpu import hashing, lane_numpy, layout
from yoso_jax.kernels.mosaic_gpu.hashing import TILE, Plan
from yoso_jax.kernels.mosaic_gpu.lane import Program


def arranged_codes(bits, *, hash_code_len, filler):
    """`[heads, T, m, bits]` as `layout.arrange_codes` gives it."""
    codes = (bits << np.arange(hash_code_len)).sum(-1).astype(np.int32)
    return np.asarray(
        layout.arrange_codes(jnp.asarray(codes), hash_code_len=hash_code_len, filler=filler)
    )


def plain_codes(arranged, *, hash_code_len):
    """The inverse, `[heads, T, groups * 8]`; refuses codes of another slot."""
    heads, groups, tokens, _ = arranged.shape
    slot = np.arange(8) ^ (np.arange(tokens)[:, None] & 7)
    codes, scale = np.asarray(arranged, np.int64), layout.code_scale(hash_code_len)
    assert (codes % (8 * scale) == slot * scale).all()
    by_slot = np.take_along_axis(codes // (8 * scale), np.broadcast_to(slot, codes.shape), -1)
    return by_slot.swapaxes(1, 2).reshape(heads, tokens, groups * 8)


def store_from_fragments(plan, products):
    """Runs `store_codes` for whole matrix products `[heads, tiles * TILE, columns]`."""
    step_columns = plan.step_groups * plan.group_columns

    def body(lane, inputs, outputs, shared, block):
        head, tile = block // plan.tiles, block % plan.tiles
        thread = lane.thread_id()
        row = tile * TILE + (thread >> 5) * 16 + ((thread >> 2) & 7)
        column = (thread & 3) * 2
        codes = outputs[0].at(head, plan.groups * plan.num_tokens * 16)
        tokens = inputs[0].at(head, plan.tiles * TILE * products.shape[-1] * 4)

        def step(i):
            here = tokens.at(row, products.shape[-1] * 4).at(i * step_columns + column, 4)
            fragment = [
                lane.bitcast_f32(word)
                for j in range(step_columns // 8)
                for half in range(2)
                for word in here.at(8 * half, products.shape[-1] * 4).load(2, 8 * j * 4)
            ]
            hashing.store_codes(
                lane,
                fragment,
                codes,
                first_group=i * plan.step_groups,
                first_token=tile * TILE,
                plan=plan,
            )

        lane.fori_loop(0, plan.groups // plan.step_groups, step)

    program = Program(
        "store_codes",
        body,
        outputs=(jax.ShapeDtypeStruct((plan.heads, plan.groups, plan.num_tokens, 8), jnp.uint16),),
        num_blocks=plan.heads * plan.tiles,
        num_warpgroups=1,
    )
    # Checking the types of each instruction takes longer than running it.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return lane_numpy.call(program, products)[0]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("heads", "tokens", "num_hashes", "hash_code_len", "filler"),
    [
        (2, 64, 8, 1, 0),
        (1, 1, 1, 2, 1),
        (1, 130, 13, 3, 0),
        (1, 63, 5, 4, 1),
        (1, 65, 128, 5, 1),
        (1, 64, 9, 6, 1),
        (1, 100, 40, 7, 0),
        (1, 8, 24, 8, 1),
        (3, 128, 32, 9, 0),
        (1, 72, 61, 9, 1),
        (1, 77, 16, 10, 0),
        (1, 9, 30, 11, 1),
        (1, 66, 18, 12, 1),
    ],
)
def test_signs_become_arranged_codes(heads, tokens, num_hashes, hash_code_len, filler):
    """With small integers, whose projections are exact and often zero."""
    rng = np.random.default_rng(0)
    plan = Plan(heads, tokens, 16, num_hashes, hash_code_len, filler)
    x = rng.integers(-1, 2, (heads, tokens, 5)).astype(np.float32)
    x[:, -1] = 0
    projection = rng.integers(-1, 2, (heads, 5, num_hashes * hash_code_len)).astype(np.float32)

    rows = np.asarray(hashing.arrange_projection(jnp.asarray(projection), plan))
    assert rows.shape == (heads, plan.groups * plan.group_columns, 16)
    fill = [(0, 0), (0, plan.tiles * TILE - tokens), (0, 11)]
    # Rows beyond the end may be anything; sums start from +0.
    products = np.pad(x, fill, constant_values=1) @ rows.swapaxes(1, 2) + np.float32(0)

    bits = (x @ projection > 0).reshape(heads, tokens, num_hashes, hash_code_len)
    np.testing.assert_array_equal(
        store_from_fragments(plan, products),
        arranged_codes(bits, hash_code_len=hash_code_len, filler=filler),
    )


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"),
    [(1, 1, 2), (130, 3, 64), (70, 2, 72), (64, 1, 44), (9, 2, 256), (100, 1, 16), (77, 1, 250)],
)
def test_ragged_tiles_are_copied_as_matrix_products_read_them(tokens, heads, head_dim):
    plan = Plan(heads, tokens, head_dim, 8, 9, 0)
    assert not plan.has_whole_tiles
    x = np.random.default_rng(0).integers(1, 2**16, (tokens, heads, head_dim), np.uint16)
    words = TILE * plan.row_bytes // 4

    def body(lane, inputs, outputs, shared, block):
        head, tile = block // plan.tiles, block % plan.tiles
        hashing.clear_tiles(lane, shared, plan)
        lane.barrier()
        hashing.copy_tile(
            lane,
            inputs[0].at(head, 2 * head_dim),
            shared,
            first_token=tile * TILE,
            stride=2 * heads * head_dim,
            plan=plan,
        )
        lane.commit_copies()
        lane.wait_for_copies(0)
        lane.barrier()

        def store(i):
            outputs[0].at(block * words + i, 4).store(shared.at(i, 4).load())

        lane.fori_loop(lane.thread_id(), words, store, step=128)

    out = jax.ShapeDtypeStruct((heads, plan.tiles, words), jnp.int32)
    program = Program(
        "copy_tile",
        body,
        outputs=(out,),
        num_blocks=heads * plan.tiles,
        num_warpgroups=1,
        shared_bytes=2 * TILE * plan.row_bytes,
    )
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        out = lane_numpy.call(program, x)[0]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)

    # Pieces of 16 bytes: exchanged by their row of eight, in blocks of the swizzle.
    pieces = out.view(np.uint16).reshape(heads, plan.tiles, -1, 8)
    number = np.arange(pieces.shape[2])
    pieces = pieces[:, :, number ^ (number >> 3 & (plan.swizzle // 16 - 1))]
    blocks = pieces.reshape(heads, plan.tiles, TILE // 8, -1, 8, plan.swizzle // 2)
    rows = blocks.swapaxes(3, 4).reshape(heads, plan.tiles * TILE, plan.padded_dim)
    np.testing.assert_array_equal(rows[:, :tokens, :head_dim], x.swapaxes(0, 1))
    assert (rows[..., head_dim:] == 0).all()
    assert (rows[:, tokens:, :head_dim] == rows[:, tokens - 1 : tokens, :head_dim]).all()


def test_projections_that_are_not_numbers_set_no_bit():
    plan = Plan(1, 64, 16, 3, 9, 1)
    products = np.full((1, 64, 72), np.nan, np.float32)
    codes = plain_codes(store_from_fragments(plan, products), hash_code_len=9)
    assert (codes[..., :3] == 0).all()
    assert (codes[..., 3:] == 1).all()


@pytest.mark.parametrize("head_dim", [16, 48, 64, 128, 192, 256])
@pytest.mark.parametrize("hash_code_len", range(1, 13))
def test_plans_fit(hash_code_len, head_dim):
    for num_hashes in (1, 8, 32, 40, 100, 128):
        plan = Plan(12, 5000, head_dim, num_hashes, hash_code_len, 0)
        tiles = 2 * plan.num_warpgroups * TILE * plan.row_bytes
        projection = plan.block_groups * plan.group_columns * plan.row_bytes
        assert tiles + projection <= 224 * 1024
        assert plan.block_groups * plan.chunks == plan.groups
        assert plan.block_groups % plan.step_groups == 0
        assert plan.step_groups * plan.group_columns <= 192


@pytest.mark.parametrize(
    ("heads", "tokens", "num_blocks", "rounds"),
    [
        (256, 1024, 256, 4),
        (64, 4096, 128, 8),
        (16, 16384, 128, 8),
        (4, 65536, 128, 8),
        (1, 1, 1, 1),
    ],
)
def test_blocks_fill_the_gpu(heads, tokens, num_blocks, rounds):
    plan = Plan(heads, tokens, 64, 32, 9, 0)
    assert (plan.num_blocks, plan.block_tiles) == (num_blocks, rounds * plan.num_warpgroups)


def shapes(batch, tokens, heads, head_dim, columns, dtype, leading=()):
    return (
        jax.ShapeDtypeStruct((*leading, batch, tokens, heads, head_dim), dtype),
        jax.ShapeDtypeStruct((*leading, batch, heads, head_dim, columns), dtype),
    )


def lower(fn, *arrays):
    return jax.jit(fn).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "num_hashes", "hash_code_len"),
    [
        (2, 1024, 8, 64, 32, 9),
        (1, 1, 1, 3, 1, 1),
        (2, 130, 3, 32, 13, 5),
        (1, 1000, 2, 128, 128, 12),
        (3, 72, 2, 192, 40, 7),
        (2, 4096, 2, 256, 64, 10),
        (1, 64, 2, 80, 8, 11),
        (2, 301, 3, 72, 16, 9),
    ],
)
def test_kernel_lowers_for_cuda(batch, tokens, heads, head_dim, num_hashes, hash_code_len, dtype):
    arrays = shapes(batch, tokens, heads, head_dim, num_hashes * hash_code_len, dtype)
    fn = functools.partial(hashing.hash_tokens, hash_code_len=hash_code_len, filler=1)
    assert lower(fn, *arrays).count("@mosaic_gpu") == 1


def test_kernel_lowers_under_vmap():
    fn = functools.partial(hashing.hash_tokens, hash_code_len=9, filler=0)
    text = lower(jax.vmap(fn), *shapes(2, 130, 2, 128, 13 * 9, jnp.bfloat16, (3,)))
    assert text.count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("shape", "num_hashes", "hash_code_len", "dtype", "message"),
    [
        ((1, 8, 1, 16), 129, 2, jnp.bfloat16, "num_hashes"),
        ((1, 8, 1, 16), 1, 13, jnp.bfloat16, "hash_code_len"),
        ((1, 8, 1, 257), 1, 2, jnp.bfloat16, "last dimension of x"),
        ((1, 8, 1, 16), 1, 2, jnp.float32, "bfloat16 or float16"),
        ((1, 0, 1, 16), 1, 2, jnp.bfloat16, "at least one token"),
    ],
)
def test_unsupported_shapes_fall_through(shape, num_hashes, hash_code_len, dtype, message):
    batch, _, heads, head_dim = shape
    x = jnp.zeros(shape, dtype)
    projection = jnp.zeros((batch, heads, head_dim, num_hashes * hash_code_len), dtype)
    with pytest.raises(NotImplementedError, match=message):
        hashing.hash_tokens(x, projection, hash_code_len=hash_code_len, filler=0)


def test_importing_loads_no_gpu_dialects():
    code = (
        "import sys, yoso_jax.kernels.mosaic_gpu.hashing; "
        "sys.exit(any(name.startswith(('jax.experimental.mosaic', 'jaxlib.mlir.dialects.gpu')) "
        "for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def gpu_case(batch, tokens, heads, head_dim, num_hashes, hash_code_len, dtype, hash_fn, bit_layout):
    x = jax.random.normal(jax.random.key(0), (batch, tokens, heads, head_dim), dtype)
    if tokens > 1:  # vectors of zeros of either sign
        x = x.at[:, tokens // 2, 0].set(0).at[:, tokens // 3, -1].set(-0.0)
    projection = sample_projection(
        jax.random.key(1),
        (batch, heads),
        head_dim,
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
        hash_fn=hash_fn,
        bit_layout=bit_layout,
    )
    return x, projection.astype(dtype)


def check_codes(out, x, projection, *, hash_code_len, filler):
    """Compares with projections in float64: only what is near zero may differ, and rarely does."""
    x, projection = np.asarray(x, np.float64), np.asarray(projection, np.float64)
    batch, tokens, heads, head_dim = x.shape
    num_hashes = projection.shape[-1] // hash_code_len
    out = np.asarray(out)
    assert out.shape == (batch * heads, layout.num_groups(num_hashes), tokens, 8)
    codes = plain_codes(out, hash_code_len=hash_code_len)
    assert (codes[..., num_hashes:] == filler).all()

    x = x.swapaxes(1, 2).reshape(batch * heads, tokens, head_dim)
    projection = projection.reshape(batch * heads, head_dim, -1)
    projected = x @ projection
    lengths = np.linalg.norm(x, axis=-1)[..., None] * np.linalg.norm(projection, axis=1)[:, None]
    bits = codes[..., :num_hashes, None] >> np.arange(hash_code_len) & 1
    differs = bits.reshape(projected.shape) != (projected > 0)
    assert (np.abs(projected) <= 1e-5 * lengths)[differs].all()
    assert not differs[np.abs(x).max(-1) == 0].any()
    by_hash = differs.reshape(bits.shape).any(-1)
    assert by_hash.sum() <= max(1, 1e-4 * by_hash.size)


GPU_SHAPES = [
    # B, T, N, H, hashes, bits
    (2, 1024, 3, 64, 32, 9),
    (1, 4096, 2, 64, 61, 9),
    (1, 1, 1, 3, 1, 1),
    (2, 130, 3, 32, 13, 5),
    (1, 1000, 2, 128, 128, 12),
    (3, 72, 2, 192, 40, 7),
    (2, 777, 2, 256, 64, 10),
    (1, 64, 2, 80, 8, 11),
    (2, 301, 3, 72, 16, 9),
    (1, 20000, 1, 16, 9, 4),
    (2, 20001, 2, 64, 32, 9),
]


@pytest.mark.gpu
@pytest.mark.parametrize("filler", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_gpu_matches_float64(shape, dtype, filler):
    x, projection = gpu_case(*shape, dtype, "gaussian", "spread")
    arguments = {"hash_code_len": shape[-1], "filler": filler}
    run = jax.jit(functools.partial(hashing.hash_tokens, **arguments))
    out = run(x, projection)
    check_codes(out, x, projection, **arguments)
    np.testing.assert_array_equal(out, run(x, projection))


@pytest.mark.gpu
@pytest.mark.parametrize("bit_layout", ["spread", "block"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gpu_hashes_with_fast_projections(dtype, bit_layout):
    x, projection = gpu_case(2, 1000, 2, 64, 32, 9, dtype, "fast", bit_layout)
    out = jax.jit(functools.partial(hashing.hash_tokens, hash_code_len=9, filler=0))(x, projection)
    check_codes(out, x, projection, hash_code_len=9, filler=0)


@pytest.mark.gpu
def test_gpu_zero_projections_set_no_bit():
    """Integers: products of either sign that cancel exactly."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-1, 2, (1, 500, 2, 64)), jnp.bfloat16)
    projection = jnp.asarray(rng.integers(-1, 2, (1, 2, 64, 32 * 9)), jnp.bfloat16)
    projection = projection.at[..., ::7].set(0)
    out = jax.jit(functools.partial(hashing.hash_tokens, hash_code_len=9, filler=0))(x, projection)
    projected = np.einsum("btnh,bnhc->bntc", *(np.asarray(a, np.float32) for a in (x, projection)))
    bits = (projected > 0).reshape(2, 500, 32, 9)
    np.testing.assert_array_equal(out, arranged_codes(bits, hash_code_len=9, filler=0))


@pytest.mark.gpu
def test_gpu_under_vmap():
    x, projection = gpu_case(6, 130, 2, 64, 13, 9, jnp.bfloat16, "gaussian", "spread")
    fn = functools.partial(hashing.hash_tokens, hash_code_len=9, filler=1)
    out = jax.jit(fn)(x, projection)
    batched = [a.reshape(3, 2, *a.shape[1:]) for a in (x, projection)]
    np.testing.assert_array_equal(jax.jit(jax.vmap(fn))(*batched).reshape(out.shape), out)
