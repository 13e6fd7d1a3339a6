"""Scales of the integer tables: how large sums can get, and which tables are exact enough.

The cumulation adds values as integers, `round(value * scale)`. Sums then do not depend on the
order, and shared memory adds integers at full speed. A sum must fit: into 16 bits where a word
holds two columns ("packed"), else into 32 bits ("wide"), which takes twice as long.

A bucket's sum is at most the sum of its rows' largest magnitudes, their weights (see `values`). A
kernel finds the largest bucket of each hash, or the sum over all keys has to do, and the cumulation
takes its scales from that.

Packed tables need a scale at which the rounding of values to integers is small beside a typical
row: the mean of square roots, so that a few outliers do not hide what they do to the other rows.
Where the bound allows less, sums will usually fit all the same, because values of both signs meet;
the cumulation then checks that they do, and resorts to wide tables if not. Values that share a
mean, as a model's do, add up to more than others do, and roundings, which share none, are smaller
beside them: then a coarser scale is exact enough. Values in float32 get wide tables at once, which
keep about six digits.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt16

from yoso_jax.kernels.mosaic_gpu import layout
from yoso_jax.kernels.mosaic_gpu.lane import (
    F32,
    I32,
    WARPGROUP,
    GlobalPointer,
    Lane,
    Pred,
    Program,
    SharedPointer,
)
from yoso_jax.kernels.mosaic_gpu.values import ROWS_PER_SUM, SUMS, sum_over_threads

# Relative error that packed tables may add, on average: it can be half as much again if there are
# few buckets. A bfloat16 result has 1.7e-3 of its own.
_PACKED_ERROR = 1.4e-3
# Standard deviation of rounding to an integer.
_ROUNDING = 1 / math.sqrt(12)
# What rounding adds to each row, half an integer, is at most so much of a typical value, where the
# packed error is accepted.
_HALF_INTEGER = _PACKED_ERROR / _ROUNDING / 2
# The largest sums, with some room for the rounding of what follows.
_PACKED_RANGE = 32700.0
_WIDE_RANGE = 2.0**30
# Root mean square of normal values over their mean magnitude.
_NORMAL_RMS = math.sqrt(math.pi / 2)
# Integers in which the weights of a head's tokens are counted: all of them fit into 32 bits.
_UNITS = 2.0**30
# Values of a head that are looked at to find what they have in common.
_SAMPLED_VALUES = 256
_LEAST_COMMON = 0.03
_SAMPLED_QUERIES, _SAMPLED_KEYS = 32, 128
# A typical value is several integers at least.
_MOST_COARSE = 32.0
# Bounds below this are as good as zero, and their inverse would overflow.
_TINY = 1e-25
# Bytes of a pair of floats.
_PAIR = 8
# Blocks that keep the GPU busy.
_MANY_BLOCKS = 132


def _largest_bucket(
    lane: Lane,
    inputs: tuple[GlobalPointer, ...],
    outputs: tuple[GlobalPointer, ...],
    shared: SharedPointer,
    block: I32,
    *,
    tables: "Buckets",
) -> None:
    """Adds the weights of tokens by code for all or two hashes of a group of one head."""
    num_tokens, num_words = tables.num_tokens, tables.num_words
    part, head_and_group = block % tables.parts, block // tables.parts
    head = head_and_group // tables.groups
    codes = inputs[0].at(head_and_group, num_tokens * 16)
    weights = inputs[1].at(head, num_tokens * _PAIR)
    sums = inputs[2].at(head, tables.chunks * 4 * SUMS)
    coarseness = lane.bitcast_f32(inputs[3].at(head, 4).load()[0])
    thread, zero = lane.thread_id(), lane.i32(0)
    largest_word = shared.at(num_words, 4)

    def add_sums(chunk: I32, *totals: F32) -> list[F32]:
        words = map(lane.bitcast_f32, sums.at(chunk, 4 * SUMS).load(4))
        return [x + y for x, y in zip(totals, words, strict=False)]

    totals = lane.fori_loop(
        thread, tables.chunks, add_sums, [lane.f32(0.0)] * 3, step=lane.num_threads
    )
    total, roots, used = sum_over_threads(lane, shared.at(num_words + 4, 4), totals)
    mean = roots / lane.select(used > 1, used, lane.f32(1.0))
    typical = mean * mean * _NORMAL_RMS * coarseness
    half = lane.f32(0.0)
    if tables.dtype != np.float32:
        half = typical * _HALF_INTEGER
    total = total + half * used
    units = lane.f32(_UNITS) / lane.select(total > _TINY, total, lane.f32(_TINY))

    lane.fori_loop(
        thread * 4,
        num_words,
        lambda word: shared.at(word, 4).store([zero] * 4),
        step=lane.num_threads * 4,
    )
    with lane.when(thread == 0):
        largest_word.store([zero])
    lane.barrier()

    def load_codes(token: I32) -> list[I32]:
        if tables.parts == 1:
            return codes.at(token, 16).load(4)
        # The word in which a token has the two hashes of this part.
        word = ((token >> 1) & 3) ^ part
        return codes.at(token, 16).at(word, 4).load()

    def add(first: I32) -> None:
        tokens = [first + i * lane.num_threads for i in range(tables.unrolled)]
        clipped = [lane.minimum(token, num_tokens - 1) for token in tokens]
        loaded = [(weights.at(token, _PAIR).load(), load_codes(token)) for token in clipped]
        for token, ((largest,), words) in zip(tokens, loaded, strict=True):
            weight = lane.round_to_i32((lane.bitcast_f32(largest) + half) * units) + 1
            counts = (token < num_tokens) & (largest != 0)
            weight = lane.select(counts, weight, zero)
            for word in words:
                scale = layout.code_scale(tables.hash_code_len)
                for offset in layout.offsets(lane, word, stride=4, scale=scale):
                    shared.at(offset).add(weight)

    lane.fori_loop(thread, num_tokens, add, step=lane.num_threads * tables.unrolled)
    lane.barrier()

    def compare(word: I32, maximum: I32) -> list[I32]:
        first_hash = head_and_group % tables.groups * layout.HASHES + (word & (layout.HASHES - 1))
        for i, bucket in enumerate(shared.at(word, 4).load(4)):
            if tables.num_hashes % layout.HASHES:
                bucket = lane.select(first_hash + i < tables.num_hashes, bucket, zero)
            maximum = lane.maximum(maximum, bucket)
        return [maximum]

    (maximum,) = lane.fori_loop(thread * 4, num_words, compare, [zero], step=lane.num_threads * 4)
    largest_word.maximum(maximum)
    lane.barrier()
    with lane.when(thread == 0):
        (maximum,) = largest_word.load()
        # Not finite if any value is not.
        bound = lane.to_f32(maximum) / units + (total - total)
        outputs[0].at(block, _PAIR).store(list(map(lane.bitcast_i32, (bound, typical))))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Shapes of the search for the largest bucket.

    Attributes:
      heads: batch rows times heads.
      num_tokens: keys S.
      dtype: of the values.
      num_hashes: number of hashes.
      hash_code_len: bits of a code.
    """

    heads: int
    num_tokens: int
    dtype: np.dtype
    num_hashes: int
    hash_code_len: int

    @property
    def groups(self) -> int:
        """Groups of hashes."""
        return layout.num_groups(self.num_hashes)

    @property
    def parts(self) -> int:
        """Blocks of a group: four if there are few heads, each with two of the eight hashes."""
        return 1 if self.heads * self.groups >= _MANY_BLOCKS else 4

    @property
    def unrolled(self) -> int:
        """Tokens of a thread whose loads are under way together."""
        return 4 if self.parts == 1 else 8

    @property
    def chunks(self) -> int:
        """Sums of weights of a head."""
        return -(-self.num_tokens // ROWS_PER_SUM)

    @property
    def num_words(self) -> int:
        """Words of the tables of a group."""
        return 2**self.hash_code_len * layout.HASHES


def largest_bucket_program(tables: Buckets) -> Program:
    """A bound of the sums in the tables of each part of a group.

    Inputs: arranged codes of the keys, uint16 `[heads, groups, tokens, 8]`; weights and sums of
    `values.slice_values`; how much larger typical values are taken for, `[heads]`.
    Output: float32 `[heads, groups * parts, 2]`, the bound and the magnitude of a typical value,
    NaN if any value is not finite.
    """
    num_blocks = tables.heads * tables.groups * tables.parts
    num_warpgroups = 2 if tables.parts == 1 else 4 if num_blocks >= _MANY_BLOCKS else 8
    sums = 3 * (num_warpgroups * WARPGROUP + 32)
    return Program(
        "largest_bucket",
        functools.partial(_largest_bucket, tables=tables),
        outputs=(
            jax.ShapeDtypeStruct((tables.heads, tables.groups * tables.parts, 2), jnp.float32),
        ),
        num_blocks=num_blocks,
        num_warpgroups=num_warpgroups,
        shared_bytes=4 * (tables.num_words + 4 + sums),
    )


def bounds_of_all(
    sums: Float[Array, "heads chunks 4"], coarseness: Float[Array, "heads"]
) -> Float[Array, "heads 1 2"]:
    """As `largest_bucket_program`, for a bucket of all keys; of values that may be packed."""
    # XLA would repeat the sum for each of what follows.
    sums = jax.lax.optimization_barrier(jnp.asarray(sums).sum(1))
    total, roots, used = sums[:, 0], sums[:, 1], sums[:, 2]
    typical = (roots / jnp.maximum(used, 1)) ** 2 * _NORMAL_RMS * coarseness
    total = total + _HALF_INTEGER * typical * used
    return jnp.stack([total, typical + (total - total)], -1)[:, None]


def coarseness(
    value: Float[Array, "B S N D"],
    query_codes: UInt16[Array, "heads groups T 8"],
    key_codes: UInt16[Array, "heads groups S 8"],
) -> Float[Array, "heads"]:
    """How much larger typical values may be taken for, as they have a mean in common.

    With a fraction c of the mean squared length in their mean, the sum of K values has a mean
    square of `K (1 + (K - 1) c)` of theirs, and that of their roundings K of those. So typical
    values may be taken for larger by a factor f, with `1 / f**2` the mean of `1 / (1 + (K - 1) c)`
    over queries. K and c are those of a few tokens; K is the keys found in all hashes.

    Roundings share no mean as long as values, `sqrt(1 - c)` of whose length is their own, differ by
    half an integer.
    """
    some = value[:, :: max(1, value.shape[1] // _SAMPLED_VALUES)].astype(jnp.float32)
    squares = jnp.sum(jnp.square(some), axis=(1, 3))
    total = jnp.sum(jnp.square(jnp.sum(some, axis=1)), axis=-1)
    common = (total - squares) / (jnp.maximum(squares, _TINY) * max(1, some.shape[1] - 1))
    # Not by chance, nor NaN.
    common = jnp.where(common > _LEAST_COMMON, jnp.minimum(common, 1), 0).reshape(-1, 1)

    def sample(codes: Array, count: int) -> Array:
        # Every eighth token has the hashes of a group in the same order.
        stride = layout.HASHES * max(1, codes.shape[2] // (layout.HASHES * count))
        return codes[:, :, ::stride]

    queries, keys = sample(query_codes, _SAMPLED_QUERIES), sample(key_codes, _SAMPLED_KEYS)
    found = jnp.sum(queries[:, :, :, None] == keys[:, :, None], axis=(1, 3, 4), dtype=jnp.float32)
    others = jnp.maximum(found * (key_codes.shape[2] / keys.shape[2]) - 1, 0)
    factor = jax.lax.rsqrt(jnp.mean(1 / (1 + others * common), axis=1))
    most = jnp.minimum(_MOST_COARSE, jnp.sqrt(1 - common[:, 0]) / _HALF_INTEGER)
    return jnp.maximum(jnp.minimum(factor, most), 1)


class Scale(NamedTuple):
    """What a head's values are multiplied by to become integers, NaN if one is not finite.

    Attributes:
      packed: the factor for packed tables. It is large enough for their accuracy.
      wide: the factor for wide tables.
      is_safe: whether no sum of packed tables can be too large.
    """

    packed: F32
    wide: F32
    is_safe: Pred

    @classmethod
    def load(cls, lane: Lane, bounds: GlobalPointer, head: I32, num_bounds: int) -> "Scale":
        """The scale of a head, from what `largest_bucket_program` wrote for it."""
        pairs = [bounds.at(head, num_bounds * _PAIR).load(2, _PAIR * i) for i in range(num_bounds)]
        # As integers, bounds have the order they have as floats, and NaN is the largest.
        magnitudes = [pair[0] & 0x7FFFFFFF for pair in pairs]
        bound = lane.bitcast_f32(functools.reduce(lane.maximum, magnitudes))
        typical = lane.bitcast_f32(pairs[0][1])
        bound = lane.select(bound < _TINY, lane.f32(_TINY), bound)
        packed = lane.f32(_PACKED_RANGE) / bound
        needed = lane.f32(_ROUNDING / _PACKED_ERROR) / lane.select(typical < _TINY, bound, typical)
        is_safe = ~(packed < needed)
        return cls(lane.select(is_safe, packed, needed), lane.f32(_WIDE_RANGE) / bound, is_safe)
