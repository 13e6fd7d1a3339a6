"""Scales of the integer tables: how large sums can get, and which tables are exact enough.

The cumulation adds values as integers, `round(value * scale)`. Sums then do not depend on the
order, and shared memory adds integers at full speed. A sum must fit: into 16 bits where a word
holds two columns ("packed"), else into 32 bits ("wide"), which takes twice as long.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt16

from yoso_jax.kernels.mosaic_gpu import layout
from yoso_jax.kernels.mosaic_gpu.lane import (
    I32,
    Call,
    GlobalPointer,
    Lane,
    Program,
    SharedPointer,
)

# Largest relative error that packed tables may add. A bfloat16 result has 1.7e-3 of its own.
_PACKED_ERROR = 2e-3
# Standard deviation of rounding to an integer.
_ROUNDING = 1 / math.sqrt(12)
# The largest sums, with some room for the rounding of what follows.
_PACKED_RANGE = 32700.0
_WIDE_RANGE = 2.0**30
# Integers in which the weights of a head's tokens are counted: all of them fit into 32 bits.
_UNITS = 2.0**30
# Bounds below this are as good as zero, and their inverse would overflow.
_TINY = 1e-25


def _largest_bucket(
    lane: Lane,
    inputs: tuple[GlobalPointer, ...],
    outputs: tuple[GlobalPointer, ...],
    shared: SharedPointer,
    block: I32,
    *,
    num_tokens: int,
    num_hashes: int,
    hash_code_len: int,
) -> None:
    """Adds the weights of tokens by code for the eight hashes of a group; writes the largest sum.

    A block does one group of one head.
    """
    groups = layout.num_groups(num_hashes)
    head, group = block // groups, block % groups
    codes = inputs[0].at(block, num_tokens * 16)
    weights = inputs[1].at(head, num_tokens * 4)
    thread, num_words = lane.thread_id(), 2**hash_code_len * layout.HASHES
    largest, zero = shared.at(num_words, 4), lane.i32(0)

    lane.fori_loop(
        thread * 4,
        num_words,
        lambda word: shared.at(word, 4).store([zero] * 4),
        step=lane.num_threads * 4,
    )
    with lane.when(thread == 0):
        largest.store([zero])
    lane.barrier()

    def add(token: I32) -> None:
        (weight,) = weights.at(token, 4).load()
        for word in codes.at(token, 16).load(4):
            scale = layout.code_scale(hash_code_len)
            for offset in layout.offsets(lane, word, stride=4, scale=scale):
                shared.at(offset).add(weight)

    lane.fori_loop(thread, num_tokens, add, step=lane.num_threads)
    lane.barrier()

    def compare(word: I32, maximum: I32) -> list[I32]:
        first_hash = group * layout.HASHES + (word & (layout.HASHES - 1))
        for i, total in enumerate(shared.at(word, 4).load(4)):
            if num_hashes % layout.HASHES:
                total = lane.select(first_hash + i < num_hashes, total, zero)
            maximum = lane.maximum(maximum, total)
        return [maximum]

    (maximum,) = lane.fori_loop(thread * 4, num_words, compare, [zero], step=lane.num_threads * 4)
    largest.maximum(maximum)
    lane.barrier()
    with lane.when(thread == 0):
        outputs[0].at(block, 4).store(largest.load())


def largest_bucket_program(
    heads: int, num_tokens: int, *, num_hashes: int, hash_code_len: int
) -> Program:
    """The largest sum of weights over the buckets of each group of hashes.

    Inputs: arranged codes, uint16 `[heads, groups, num_tokens, 8]`, and weights, int32
    `[heads, num_tokens]`, at least 0, whose sum for a head is below 2**31.
    Output: int32 `[heads, groups]`.
    """
    groups = layout.num_groups(num_hashes)
    return Program(
        "largest_bucket",
        functools.partial(
            _largest_bucket,
            num_tokens=num_tokens,
            num_hashes=num_hashes,
            hash_code_len=hash_code_len,
        ),
        outputs=(jax.ShapeDtypeStruct((heads, groups), jnp.int32),),
        num_blocks=heads * groups,
        num_warpgroups=8,
        shared_bytes=2**hash_code_len * layout.HASHES * 4 + 16,
    )


def choose_scales(
    codes: UInt16[Array, "heads groups S 8"],
    value: Float[Array, "heads S D"],
    *,
    num_hashes: int,
    hash_code_len: int,
    call: Call,
) -> tuple[Float[Array, " heads"], Bool[Array, " heads"]]:
    """A scale for each head with which no bucket's sum overflows, and whether tables are wide.

    A bucket's sum is at most the sum of its rows' largest magnitudes. Packed tables are taken where
    the rounding of values to integers is small beside a typical row: the mean of square roots, so
    that a few outliers do not hide what they do to the other rows. Values in float32 are given
    wide tables, which keep about six digits.

    Args:
      codes: arranged codes of the keys.
      value: float32, bfloat16 or float16; rows of masked keys are zero.
      num_hashes: number of hashes.
      hash_code_len: bits of a code.
      call: what runs the program.

    Returns:
      Scales, and True for the heads with wide tables. The scale of a head with values that are not
      finite is NaN.
    """
    heads, num_tokens, _ = value.shape
    wide_value = value.astype(jnp.float32)
    largest = jnp.abs(wide_value).max(-1)
    used = largest != 0
    row = jnp.sqrt(jnp.mean(wide_value * wide_value, -1))
    typical = (jnp.sqrt(row).sum(-1) / jnp.maximum(used.sum(-1), 1)) ** 2
    may_pack = jnp.isfinite(typical) & (value.dtype != jnp.float32)
    # Rounding adds up to half an integer to each row. Where the packed error is accepted, that is
    # at most this:
    half = jnp.where(may_pack, _PACKED_ERROR / _ROUNDING / 2 * typical, 0)
    weight = jnp.where(used, largest + half[:, None], 0)
    total = weight.sum(-1)
    countable = (total > 0) & jnp.isfinite(total)
    parts = jnp.where(countable[:, None], weight / total[:, None], 0)
    program = largest_bucket_program(
        heads, num_tokens, num_hashes=num_hashes, hash_code_len=hash_code_len
    )
    (buckets,) = call(program, codes, jnp.ceil(parts * _UNITS).astype(jnp.int32))
    bound = jnp.maximum(jnp.asarray(buckets).max(-1) * (total / _UNITS), _TINY)
    # XLA's maximum drops NaN on CPUs, the mean does not.
    bound = jnp.where(jnp.isnan(typical) | jnp.isinf(total), jnp.nan, bound)

    packed = _PACKED_RANGE / bound
    exact_enough = (_PACKED_ERROR * typical * packed >= _ROUNDING) | (total == 0)
    wide = ~(may_pack & exact_enough)
    return jnp.where(wide, _WIDE_RANGE / bound, packed), wide
