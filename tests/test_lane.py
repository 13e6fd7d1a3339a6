"""The lane language: what each instruction computes, and which wrong kernels NumPy refuses."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from yoso_jax.kernels.mosaic_gpu import lane_numpy
from yoso_jax.kernels.mosaic_gpu.lane import WARPGROUP, Program
from yoso_jax.kernels.mosaic_gpu.lane_numpy import ProgramError

N = WARPGROUP


def mosaic_call(program, *inputs):
    from yoso_jax.kernels.mosaic_gpu import lane_mosaic

    return jax.jit(functools.partial(lane_mosaic.call, program))(*inputs)


CALLS = [
    pytest.param(lane_numpy.call, id="numpy"),
    pytest.param(mosaic_call, id="mosaic_gpu", marks=pytest.mark.gpu),
]


def program(body, *, words=N, blocks=1, shared_bytes=4 * N):
    outputs = (jax.ShapeDtypeStruct((words,), jnp.int32),)
    return Program("test", body, outputs, blocks, 1, shared_bytes=shared_bytes)


def each_thread(fn):
    """A program whose thread i computes output i by `fn(lane, *words of inputs i)`."""

    def body(lane, inputs, outputs, shared, block):
        words = [x.at(lane.thread_id(), 4).load()[0] for x in inputs]
        outputs[0].at(lane.thread_id(), 4).store([fn(lane, *words)])

    return program(body)


def integers(seed):
    x = np.random.default_rng(seed).integers(-(2**31), 2**31, N).astype(np.int32)
    x[:4] = 0, -1, 2**31 - 1, -(2**31)
    return x


def floats(seed):
    x = (np.random.default_rng(seed).standard_normal(N) * 100).astype(np.float32)
    x[:8] = 0.5, 1.5, -2.5, 3e9, -3e9, np.nan, np.inf, 65520
    return x


def wrap(x):
    return (np.asarray(x) + 2**31) % 2**32 - 2**31


# What a thread computes from its words a and b, and NumPy from all of them in 64 bits.
INTEGER_OPS = {
    "add": (lambda lane, a, b: a + b, lambda a, b: a + b),
    "subtract": (lambda lane, a, b: a - b, lambda a, b: a - b),
    "multiply": (lambda lane, a, b: a * b, lambda a, b: a * (b & 0xFFFF) + ((a * (b >> 16)) << 16)),
    "and": (lambda lane, a, b: a & b, lambda a, b: a & b),
    "or": (lambda lane, a, b: a | b, lambda a, b: a | b),
    "xor": (lambda lane, a, b: a ^ b, lambda a, b: a ^ b),
    "left": (lambda lane, a, b: a << (b & 31), lambda a, b: a << (b & 31)),
    "right": (lambda lane, a, b: a >> (b & 31), lambda a, b: a >> (b & 31)),
    "logical right": (
        lambda lane, a, b: lane.shift_right_logical(a, b & 31),
        lambda a, b: a % 2**32 >> (b & 31),
    ),
    "divide": (
        lambda lane, a, b: (a & 0xFFFFFF) // ((b & 0xFF) | 1),
        lambda a, b: (a & 0xFFFFFF) // ((b & 0xFF) | 1),
    ),
    "remainder": (
        lambda lane, a, b: (a & 0xFFFFFF) % ((b & 0xFF) | 1),
        lambda a, b: (a & 0xFFFFFF) % ((b & 0xFF) | 1),
    ),
    "minimum": (lambda lane, a, b: lane.minimum(a, b), np.minimum),
    "maximum": (lambda lane, a, b: lane.maximum(a, b), np.maximum),
    "select": (
        lambda lane, a, b: lane.select(((a < b) & ~(a == 0)) | (b >= 99), a, b),
        lambda a, b: np.where(((a < b) & (a != 0)) | (b >= 99), a, b),
    ),
    "compare": (
        lambda lane, a, b: lane.select((a > b) | ((a <= 5) & (a != -1)), lane.i32(1), lane.i32(0)),
        lambda a, b: (a > b) | ((a <= 5) & (a != -1)),
    ),
    "constant": (lambda lane, a, b: a + (2**32 - 1), lambda a, b: a - 1),
    "low half": (lambda lane, a, b: lane.add_low_half(a, b), lambda a, b: a + b % 2**16),
    "high half": (lambda lane, a, b: lane.add_high_half(a, b), lambda a, b: a + (b >> 16)),
    "shifted": (lambda lane, a, b: lane.add_shifted(a, b, 5), lambda a, b: a + (b >> 5)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", INTEGER_OPS)
def test_integer_instructions(call, name):
    compute, expected = INTEGER_OPS[name]
    a, b = integers(0), integers(1)
    (out,) = call(each_thread(compute), a, b)
    np.testing.assert_array_equal(out, wrap(expected(a.astype(np.int64), b.astype(np.int64))))


FLOAT_OPS = {
    "add": (lambda lane, a, b: a + b, np.add),
    "subtract": (lambda lane, a, b: a - b, np.subtract),
    "multiply": (lambda lane, a, b: a * b * 0.5, lambda a, b: a * b * np.float32(0.5)),
    "select": (
        lambda lane, a, b: lane.select((a < b) | (a > 1e9), a, b),
        lambda a, b: np.where((a < b) | (a > 1e9), a, b),
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", FLOAT_OPS)
def test_float_instructions(call, name):
    compute, expected = FLOAT_OPS[name]

    def fn(lane, a, b):
        return lane.bitcast_i32(compute(lane, lane.bitcast_f32(a), lane.bitcast_f32(b)))

    a, b = floats(0), floats(1)[::-1].copy()
    (out,) = call(each_thread(fn), a, b)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(np.asarray(out).view(np.float32), expected(a, b))


@pytest.mark.parametrize("call", CALLS)
def test_floats_and_integers_convert(call):
    x = floats(2)
    (out,) = call(each_thread(lambda lane, x: lane.round_to_i32(lane.bitcast_f32(x))), x)
    expected = np.rint(np.nan_to_num(x.astype(np.float64), nan=0, posinf=2**40))
    np.testing.assert_array_equal(out, np.clip(expected, -(2**31), 2**31 - 1))
    i = integers(3)
    (out,) = call(each_thread(lambda lane, x: lane.bitcast_i32(lane.to_f32(x))), i)
    np.testing.assert_array_equal(np.asarray(out).view(np.float32), i.astype(np.float32))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_halves_unpack_and_pack_in_order(call, dtype):
    dtype = np.dtype(dtype)
    x = np.random.default_rng(0).standard_normal((N, 2)).astype(dtype)

    def double_and_swap(lane, word):
        low, high = lane.unpack([word], dtype)
        return lane.pack([high * 1.01, low * 1.01], dtype)[0]

    (out,) = call(each_thread(double_and_swap), x)
    expected = (x[:, ::-1].astype(np.float32) * np.float32(1.01)).astype(dtype)
    np.testing.assert_array_equal(np.asarray(out).view(dtype).reshape(N, 2), expected)


@pytest.mark.parametrize("call", CALLS)
def test_loops_branches_and_shared_memory(call):
    """Thread i sums the odd numbers below i, and adds its sum to a word that four threads share."""

    def body(lane, inputs, outputs, shared, block):
        thread = lane.thread_id()
        shared.at(thread, 4).store([lane.i32(7)])
        lane.barrier()
        (total,) = lane.fori_loop(1, thread, lambda i, total: [total + i], [lane.i32(0)], step=2)
        word = shared.at(lane.shift_right_logical(thread, 2), 4)
        word.add(total)
        with lane.when(thread % 4 == 3):
            (word ^ 64).maximum(lane.i32(10_000), 128)
        lane.barrier()
        words = shared.at(thread & ~3, 4).load(4)
        with lane.when(thread % 4 == 0):
            outputs[0].at(block * N + thread, 4).store(words)

    (out,) = call(program(body, words=2 * N, blocks=2))
    total = np.array([sum(range(1, i, 2)) for i in range(N)])
    expected = np.full(N, 7)
    expected[: N // 4] += total.reshape(-1, 4).sum(1)
    reached = (np.arange(N // 4) ^ 16) + 32
    expected[reached] = np.maximum(expected[reached], 10_000)
    np.testing.assert_array_equal(out, np.tile(expected, 2))


def no_barrier(lane, shared, output, thread):
    shared.at(thread, 4).store([thread])
    output.store(shared.at(thread ^ 1, 4).load())


def barrier_too_late(lane, shared, output, thread):
    shared.at(thread, 4).store([thread])
    lane.barrier()
    words = shared.at(thread ^ 1, 4).load()
    shared.at(thread, 4).store(words)


def same_word(lane, shared, output, thread):
    shared.at(thread & ~1, 4).store([lane.i32(0)])


def atomic_and_load(lane, shared, output, thread):
    shared.at(thread, 4).store([thread])
    lane.barrier()
    shared.at(thread, 4).add(thread)
    shared.at(thread ^ 1, 4).load()


def atomic_and_store(lane, shared, output, thread):
    shared.at(thread, 4).store([thread])
    shared.at(thread ^ 1, 4).add(thread)


def not_written(lane, shared, output, thread):
    shared.at(thread, 4).load()


def out_of_bounds(lane, shared, output, thread):
    shared.at(thread, 8).store([thread])


def misaligned(lane, shared, output, thread):
    shared.at(thread & 1, 8).store([thread] * 4)


def negative(lane, shared, output, thread):
    output.at(thread - N, 4).store([thread])


def divergent_barrier(lane, shared, output, thread):
    with lane.when(thread < 3):
        lane.barrier()


def uneven_loop_barrier(lane, shared, output, thread):
    lane.fori_loop(0, thread, lambda i: lane.barrier())


def shift_too_far(lane, shared, output, thread):
    output.store([thread >> (thread + 1)])


def divide_negative(lane, shared, output, thread):
    output.store([(thread - 1) // 2])


def output_race(lane, shared, output, thread):
    output.at(thread & 1, -4).store([thread])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (no_barrier, "race"),
        (barrier_too_late, "race"),
        (same_word, "race"),
        (atomic_and_load, "race"),
        (atomic_and_store, "race"),
        (output_race, "race"),
        (not_written, "never written"),
        (out_of_bounds, "of 512 are accessed"),
        (negative, "are accessed"),
        (misaligned, "misaligned"),
        (divergent_barrier, "do not reach a barrier"),
        (uneven_loop_barrier, "do not reach a barrier"),
        (shift_too_far, "0 to 31"),
        (divide_negative, "dividend"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_numpy_refuses_wrong_kernels(wrong, message):
    def body(lane, inputs, outputs, shared, block):
        thread = lane.thread_id()
        output = outputs[0].at(thread, 4)
        output.store([thread])
        wrong(lane, shared, output, thread)

    with pytest.raises(ProgramError, match=message):
        lane_numpy.call(program(body))


def test_numpy_refuses_blocks_that_share_a_word_and_words_left_out():
    def body(lane, inputs, outputs, shared, block):
        outputs[0].at(lane.thread_id(), 4).store([block])

    with pytest.raises(ProgramError, match="by another block"):
        lane_numpy.call(program(body, blocks=2))
    with pytest.raises(ProgramError, match="1 words are not written"):
        lane_numpy.call(program(body, words=N + 1))


def test_idle_threads_are_not_checked():
    def body(lane, inputs, outputs, shared, block):
        thread = lane.thread_id()
        with lane.when(thread < 5):
            outputs[0].at(thread, 4).store([thread // (thread * -1 + 5)])
        with lane.when(thread < 0):
            lane.barrier()

    (out,) = lane_numpy.call(program(body, words=5))
    np.testing.assert_array_equal(out, [0, 0, 0, 1, 4])


def test_misuse_is_refused_while_a_kernel_is_written():
    def attempt(use):
        def body(lane, inputs, outputs, shared, block):
            use(lane, inputs[0], shared)

        lane_numpy.call(program(body), np.zeros(N, np.int32))

    with pytest.raises(TypeError, match="cannot be written"):
        attempt(lambda lane, x, shared: x.store([lane.i32(0)]))
    with pytest.raises(TypeError, match=r"lane\.when"):
        attempt(lambda lane, x, shared: 1 if lane.thread_id() == 0 else 0)
    with pytest.raises(ValueError, match="1, 2 or 4 words"):
        attempt(lambda lane, x, shared: shared.load(3))
    with pytest.raises(ValueError, match="multiple of 8 bytes"):
        attempt(lambda lane, x, shared: shared.load(2, 4))


@pytest.mark.parametrize("name", [*INTEGER_OPS, "floats"])
def test_instructions_lower_for_cuda(name):
    from yoso_jax.kernels.mosaic_gpu import lane_mosaic

    def all_floats(lane, a, b):
        values = [
            op(lane, lane.bitcast_f32(a), lane.bitcast_f32(b)) for op, _ in FLOAT_OPS.values()
        ]
        words = [lane.round_to_i32(values[0]) + lane.bitcast_i32(values[1] + lane.to_f32(a))]
        for dtype in (jnp.bfloat16, jnp.float16):
            words += lane.pack(lane.unpack([a], np.dtype(dtype)), np.dtype(dtype))
        return functools.reduce(lambda x, y: x + y, words)

    compute = all_floats if name == "floats" else INTEGER_OPS[name][0]
    call = functools.partial(lane_mosaic.call, each_thread(compute))
    word = jax.ShapeDtypeStruct((N,), jnp.int32)
    text = jax.jit(call).trace(word, word).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
