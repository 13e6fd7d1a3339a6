"""Gradients by buckets: gathering in NumPy, the whole interpreted, for CUDA, and on a GPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import always_buckets

from yoso_jax.attention import sampled_attention
from yoso_jax.hashing import sample_projection
from yoso_jax.kernels import xla
from yoso_jax.kernels.codes import hash_codes
from yoso_jax.kernels.mosaic_gpu import bucket_tiles, buckets, lane_numpy
from yoso_jax.kernels.mosaic_gpu import expectation_tiles as tiles
from yoso_jax.kernels.mosaic_gpu.collision_chain import collision_chain
from yoso_jax.kernels.mosaic_gpu.lane import Program
from yoso_jax.kernels.mosaic_gpu.sorting import TILE, Words

RNG = jax.random.key(3)


@pytest.fixture(autouse=True, scope="module")
def xla_takes_buckets():
    with always_buckets():
        yield


@pytest.mark.parametrize("columns", [16, 48, 64])
@pytest.mark.parametrize("count", [1, 40, 64])
@pytest.mark.parametrize("by_column", [False, True])
def test_tokens_are_gathered_and_scattered(columns, count, by_column):
    """Of one head of two: what is gathered in sorted order is scattered to where it was."""
    num_tokens, heads, row_columns = 100, 2, 32
    layout = Words(num_tokens, 3)
    rng = np.random.default_rng(0)
    tokens, rows = (
        rng.integers(1, 2**15, (num_tokens, heads, x)).astype(np.int16)
        for x in (columns, row_columns)
    )
    numbers = rng.standard_normal((2, num_tokens)).astype(np.float32)
    order = rng.permutation(num_tokens)[:TILE]
    words = ((5 << layout.token_bits) | order).astype(np.int32)
    tile_bytes, row_bytes = TILE * 2 * columns, TILE * 2 * row_columns

    def body(lane, inputs, outputs, shared, _):
        tile, row_tile = shared, shared.at(tile_bytes)
        copies = row_tile.at(row_bytes)
        own = copies.at(8 * TILE)
        thread, counted = lane.thread_id(), lane.i32(count)
        bucket_tiles.copy_words(lane, inputs[0], own, first=lane.i32(0), layout=Words(TILE, 3))
        lane.commit_copies()
        lane.wait_for_copies(0)
        lane.barrier()
        bucket_tiles.gather(
            lane,
            own,
            (inputs[1].at(1, 2 * columns), tile, columns),
            (inputs[2].at(1, 2 * row_columns), row_tile, row_columns),
            (inputs[3], copies, 2),
            count=counted,
            stride=heads,
            layout=layout,
            by_column=by_column,
        )
        lane.commit_copies()
        lane.wait_for_copies(0)
        lane.barrier()
        target = outputs[0].at(1, 2 * columns)
        options = dict(stride=heads, layout=layout)
        bucket_tiles.scatter(lane, own, tile, target, count=counted, columns=columns, **options)
        target = outputs[1].at(1, 2 * row_columns)
        bucket_tiles.scatter(
            lane, own, row_tile, target, count=counted, columns=row_columns, **options
        )
        outputs[2].at(thread, 4).store(copies.at(thread, 4).load())
        bucket_tiles.scatter_numbers(lane, own, copies, outputs[3], count=counted, layout=layout)

    out = (
        jax.ShapeDtypeStruct(tokens.shape, np.int16),
        jax.ShapeDtypeStruct(rows.shape, np.int16),
        jax.ShapeDtypeStruct((2, TILE), np.float32),
        jax.ShapeDtypeStruct(numbers.shape, np.float32),
    )
    shared_bytes = tile_bytes + row_bytes + 12 * TILE
    program = Program("test", body, out, 1, 1, shared_bytes=shared_bytes, incomplete=True)
    results = lane_numpy.call(program, words, tokens, rows, numbers)
    scattered, scattered_rows, known, scattered_numbers = results
    np.testing.assert_array_equal(scattered_numbers[:, order[:count]], known[:, :count])
    if by_column:
        known = np.asarray(tiles.from_column_order(jnp.asarray(known)))
    # Beyond the count the last one is repeated, but by column there are zeros.
    expected = numbers[:, order[np.minimum(np.arange(TILE), count - 1)]]
    if by_column:
        expected[:, count:] = 0
    np.testing.assert_array_equal(known, expected)
    np.testing.assert_array_equal(scattered[order[:count], 1], tokens[order[:count], 1])
    others = np.setdiff1d(np.arange(num_tokens), order[:count])
    assert not (scattered[others, 1] == tokens[others, 1]).all(axis=-1).any()
    np.testing.assert_array_equal(scattered_rows[order[:count], 1], rows[order[:count], 1])


@dataclasses.dataclass
class ThreadTile:
    """What a thread of a warpgroup has of tiles of 64 rows and 32 columns, stored by columns.

    Attributes:
      lane: the thread.
      first: the first of its two rows.
      rows: for each register of a matrix product, 0 or 1 of these.
      columns: for each register.
    """

    lane: lane_numpy.NumpyLane
    first: Any = dataclasses.field(init=False)
    rows: list[int] = dataclasses.field(init=False)
    columns: list[Any] = dataclasses.field(init=False)

    def __post_init__(self):
        thread = self.lane.thread_id()
        self.first = (thread >> 5) * 16 + ((thread >> 2) & 7)
        place = [(j, r, c) for j in range(4) for r in range(2) for c in range(2)]
        self.rows = [r for _, r, _ in place]
        self.columns = [self.lane.i32(8 * j + c) + (thread & 3) * 2 for j, _, c in place]

    def _at(self, pointer, column):
        return pointer.at(column * 64 + self.first, 4)

    def load(self, pointer):
        return [
            self.lane.bitcast_f32(self._at(pointer, column).load(1, 32 * row)[0])
            for column, row in zip(self.columns, self.rows, strict=True)
        ]

    def load_rows(self, pointer, number):
        """Some numbers of both rows."""
        return [
            [
                self.lane.bitcast_f32(self._at(pointer, self.lane.i32(i)).load(1, 32 * row)[0])
                for row in range(2)
            ]
            for i in range(number)
        ]

    def store(self, pointer, values):
        for column, row, value in zip(self.columns, self.rows, values, strict=False):
            self._at(pointer, column).store([self.lane.bitcast_i32(value)], 32 * row)


def share_columns(lane, source, shared):
    """Two numbers of 32 columns to where kernels have them."""
    thread = lane.thread_id()
    with lane.when(thread < 32):
        for i in range(2):
            word = source.at(thread, 4).load(1, 128 * i)
            shared.at(thread, 4).at(i, 4 * TILE).store(word)
    lane.barrier()


@pytest.mark.parametrize("exponent", [0, 6])
@pytest.mark.parametrize("shift", [None, "rows", "columns"])
def test_weights_of_a_tile(exponent, shift, unchecked_shapes):
    """What unnormalised columns are weighed by."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(-1, 1, 64)).astype(np.float32)
    column_lengths = np.exp(rng.uniform(-1, 1, 32)).astype(np.float32)
    cosine, products = rng.uniform(-0.7, 0.7, (64, 32)), rng.standard_normal((64, 32))
    chain = collision_chain(exponent)
    rows = tiles.row_values(jnp.asarray(lengths), chain)
    shifts = rng.standard_normal(64 if shift == "rows" else 32).astype(np.float32)
    if shift == "rows":
        rows.append(shifts)
    rows = np.stack(rows)
    columns = np.stack([-1 / column_lengths, shifts[:32] / -column_lengths])
    scores = cosine * lengths[:, None] * column_lengths

    def body(lane, inputs, outputs, shared, _):
        share_columns(lane, inputs[2], shared)
        tile = ThreadTile(lane)
        out = bucket_tiles.weights(
            lane,
            tile.load(inputs[0]),
            tile.load(inputs[1]),
            tile.load_rows(inputs[3], len(rows)),
            shared,
            chain,
            shift,
        )
        tile.store(outputs[0], out)

    out = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    program = Program(
        "weights", body, (out,), num_blocks=1, num_warpgroups=1, shared_bytes=8 * TILE
    )
    args = scores.T, products.T
    (out,) = lane_numpy.call(
        program,
        *(np.ascontiguousarray(x, np.float32) for x in args),
        np.asarray(tiles.in_column_order(jnp.asarray(columns))),
        rows,
    )
    expected = (1 - np.arccos(cosine) / np.pi) ** exponent
    if shift is not None:
        products = products + (shifts[:, None] if shift == "rows" else shifts)
    expected = expected * products / -column_lengths
    np.testing.assert_allclose(out.T, expected, rtol=3e-3, atol=1e-5)


@pytest.mark.parametrize("exponent", [0, 6])
def test_means_of_a_tile(exponent, unchecked_shapes):
    """Sums of weights and of weighted products, added to those of another tile."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(-1, 1, 64)).astype(np.float32)
    column_lengths = np.exp(rng.uniform(-1, 1, 32)).astype(np.float32)
    cosine, products = rng.uniform(-0.7, 0.7, (64, 32)), rng.standard_normal((64, 32))
    ones = (np.arange(32) < 29).astype(np.float32)
    chain = collision_chain(exponent)
    rows = np.stack(tiles.row_values(jnp.asarray(lengths), chain))
    columns = np.stack([-1 / column_lengths, ones])
    scores = cosine * lengths[:, None] * column_lengths

    def body(lane, inputs, outputs, shared, _):
        share_columns(lane, inputs[2], shared)
        tile = ThreadTile(lane)
        sums = [lane.f32(1)] * 4, [lane.f32(2)] * 4
        args = tile.load(inputs[0]), tile.load(inputs[1]), tile.load_rows(inputs[3], 2)
        found = bucket_tiles.add_to_means(lane, *args, shared, chain, sums)
        for output, parts in zip(outputs, found, strict=True):
            tile.store(output, parts)

    # Of eight columns, which a thread has two of in each of its rows.
    out = (jax.ShapeDtypeStruct((8, 64), jnp.float32),) * 2
    program = Program("means", body, out, num_blocks=1, num_warpgroups=1, shared_bytes=8 * TILE)
    counts, totals = lane_numpy.call(
        program,
        *(np.ascontiguousarray(x.T, np.float32) for x in (scores, products)),
        np.asarray(tiles.in_column_order(jnp.asarray(columns))),
        rows,
    )
    weights = (1 - np.arccos(cosine) / np.pi) ** exponent * ones
    np.testing.assert_allclose(counts.sum(0), 8 + weights.sum(1), rtol=1e-3)
    np.testing.assert_allclose(totals.sum(0), 16 + (weights * products).sum(1), rtol=1e-2)


SHAPES = [
    # T, S, H, D, code bits, bucket bits, hashes
    pytest.param(512, 512, 64, 64, 9, 3, 4, id="usual"),
    pytest.param(300, 700, 64, 48, 9, 3, 3, id="unequal"),
    pytest.param(129, 65, 33, 20, 5, 2, 2, id="odd"),
    pytest.param(256, 256, 128, 128, 12, 4, 2, id="wide"),
    pytest.param(256, 256, 192, 64, 4, 1, 1, id="wider"),
    pytest.param(512, 512, 64, 64, 9, 9, 8, id="all-bits"),
    pytest.param(256, 256, 64, 64, 9, 0, 1, id="no-bits"),
    pytest.param(2500, 2100, 16, 16, 16, 7, 2, id="two-digits"),
]


def draw(num_queries, num_keys, head_dim, value_dim, bits, num_hashes, dtype, batch=2, heads=2):
    keys = jax.random.split(RNG, 5)
    lengths = num_queries, num_keys, num_keys, num_queries
    dims = head_dim, head_dim, value_dim, value_dim
    query, key, value, grad_out = (
        jax.random.normal(rng, (batch, n, heads, dim), jnp.float32).astype(dtype)
        for rng, n, dim in zip(keys, lengths, dims, strict=False)
    )
    projection = sample_projection(
        keys[4], (batch, heads), head_dim, num_hashes=num_hashes, hash_code_len=bits
    )
    codes = [
        hash_codes(jnp.swapaxes(x, 1, 2).astype(jnp.float32), projection, hash_code_len=bits)
        for x in (query, key)
    ]
    shift = jax.random.normal(keys[0], (batch, num_queries, heads)) * 3
    return *codes, query, key, value, grad_out, shift


def run_kernels(*args, hash_code_len, bucket_bits, call=None, interpret=False):
    """Gradients of queries and keys, and means and counts."""
    *args, shift = args
    options = dict(hash_code_len=hash_code_len, bucket_bits=bucket_bits)
    found = buckets.find(*args, **options, call=call)
    options = dict(hash_code_len=hash_code_len, call=call, interpret=interpret)
    grads = buckets.gradients(found, *args[2:4], shift, **options)
    return *grads, *buckets.means(found, interpret=interpret)


@pytest.mark.parametrize(("t", "s", "h", "d", "bits", "bucket_bits", "hashes"), SHAPES)
@pytest.mark.parametrize("shifted", [False, True])
def test_kernels_lower_for_cuda(t, s, h, d, bits, bucket_bits, hashes, shifted):
    make = functools.partial(draw, t, s, h, d, bits, hashes, jnp.bfloat16)
    *args, rows, shift = jax.eval_shape(make)
    masks = [jax.ShapeDtypeStruct((2, n), bool) for n in (t, s)]

    def run(*args):
        assert buckets.is_supported(args[2], args[4], bucket_bits)
        options = dict(hash_code_len=bits, bucket_bits=bucket_bits)
        return run_kernels(*args, **options)

    traced = jax.jit(run).trace(*args, *masks, rows, shift if shifted else None)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Sorting each side by each digit; buckets, tiles, sums and the last step of each side; means.
    sorts = 2 if bucket_bits > 6 else 1
    assert text.count("@mosaic_gpu") == 2 * sorts + 9


INTERPRETED = {
    # T, S, H, D, code bits, bucket bits, hashes, blocks that run at a time, masks, shifts
    "more-work-than-blocks": (150, 130, 16, 16, 6, 1, 2, 1, True, True),
    "unequal-buckets-without-tokens": (20, 200, 64, 48, 9, 3, 1, 2, False, True),
    "all-bits": (65, 65, 33, 20, 3, 3, 1, 1, True, False),
}


@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted_kernels_agree_with_xla(capsys, monkeypatch, unchecked_shapes, case):
    t, s, h, d, bits, bucket_bits, hashes, blocks, masked, shifted = INTERPRETED[case]
    monkeypatch.setattr(bucket_tiles, "_BLOCKS", blocks)
    *args, rows, shift = draw(t, s, h, d, bits, hashes, jnp.bfloat16, batch=1)
    masks = [jnp.arange(n)[None] < n - n // 3 if masked else None for n in (t, s)]
    if masked:
        # What is in the rows of masked tokens is not used.
        args[2:4] = [
            jnp.where(m[..., None, None], x, jnp.nan) for m, x in zip(masks, args[2:4], strict=True)
        ]
    options = dict(hash_code_len=bits, bucket_bits=bucket_bits)
    args += [*masks, rows, shift if shifted else None]
    found = run_kernels(*args, **options, call=lane_numpy.call, interpret=True)
    assert_agree(found, expected(args, **options), 6e-3)
    assert "RACE DETECTED" not in capsys.readouterr().out


def expected(args, **options):
    """What `run_kernels` is to return."""
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, args
    )

    @jax.jit
    def run(*args):
        grads = xla.bucketed_gradients(*args, **options)
        return *grads, *xla.bucket_means(*args[:-1], **options)

    return run(*wide)


def assert_agree(found, expected, tolerance):
    for mine, exact in zip(found, expected, strict=True):
        exact = np.asarray(exact, np.float64)
        error = np.linalg.norm(np.asarray(mine, np.float64) - exact) / np.linalg.norm(exact)
        assert error < tolerance


def test_what_is_not_supported():
    def supported(tokens, dim, bits, dtype=jnp.bfloat16):
        x = jax.ShapeDtypeStruct((1, tokens, 1, dim), dtype)
        answers = []
        jax.eval_shape(lambda x: answers.append(buckets.is_supported(x, x, bits)), x)
        return answers[0]

    assert supported(2**18, 64, 12)
    assert not supported(2**19, 64, 12)
    assert not supported(512, 256, 3)
    assert not supported(512, 64, 3, jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("t", "s", "h", "d", "bits", "bucket_bits", "hashes"), SHAPES)
def test_kernels_agree_with_xla(t, s, h, d, bits, bucket_bits, hashes, masked, shifted, dtype):
    *args, rows, shift = draw(t, s, h, d, bits, hashes, dtype)
    masks = [None, None]
    if masked:
        masks = [
            jnp.arange(n) < jnp.array([[first], [last]])
            for n, first, last in ((t, t, t - t // 3), (s, s // 2, s))
        ]
        # What is in the rows of masked tokens is not used.
        args[2] = jnp.where(masks[0][..., None, None], args[2], jnp.nan)
        args[3] = jnp.where(masks[1][..., None, None], args[3], jnp.nan)
    options = dict(hash_code_len=bits, bucket_bits=bucket_bits)
    run = jax.jit(functools.partial(run_kernels, **options))
    args += [*masks, rows, shift if shifted else None]
    found, again = run(*args), run(*args)
    for mine, same in zip(found, again, strict=True):
        np.testing.assert_array_equal(mine, same)
    assert all(x.dtype == dtype for x in found[:2])
    assert_agree(found, expected(args, **options), 6e-3 if dtype == jnp.bfloat16 else 3e-3)


@pytest.mark.gpu
def test_uneven_buckets_take_the_gradients_over_all_pairs():
    """Where all tokens share a bucket, sums over buckets would take longer."""
    *_, query, key, value, grad_out, _ = draw(1024, 1024, 64, 64, 9, 2, jnp.bfloat16)
    projection = sample_projection(RNG, (2, 2), 64, num_hashes=4, hash_code_len=9)

    @functools.partial(jax.jit, static_argnames="backward")
    def run(query, key, backward):
        options = dict(hash_code_len=9, num_backward_hashes=2, bucket_bits=4, normalize=True)
        options |= dict(backward=backward, implementation="mosaic_gpu")
        attend = functools.partial(sampled_attention, **options)
        _, vjp = jax.vjp(attend, query, key, value, projection.astype(query.dtype))
        return vjp(grad_out)[:2]

    alike = query[:, :1] + query / 256
    for tokens, is_same in (((alike, alike), True), ((query, key), False)):
        bucketed, dense = (run(*tokens, backward=x) for x in ("bucketed", "expectation"))
        for x, y in zip(bucketed, dense, strict=True):
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
            assert (jnp.linalg.norm(x - y) < 1e-2 * jnp.linalg.norm(y)) == is_same
