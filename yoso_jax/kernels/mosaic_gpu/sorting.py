"""Sorting tokens by bucket: a stable counting sort, and where each bucket is.

A word holds the bucket of a token and, below it, the token's number. A block of threads sorts a
segment of a sequence by a digit of the bucket: each thread has a counter of its own for each value
of the digit, counts a part of the segment, and after all counters are summed up in order writes the
words of its part where they belong. What other segments have of each value is counted before. Wide
buckets are sorted digit by digit, the lowest first. The order is always the same.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from yoso_jax.kernels.mosaic_gpu.lane import (
    I32,
    WARPGROUP,
    Call,
    GlobalPointer,
    Lane,
    Pred,
    Program,
    SharedPointer,
)

TILE = 64
"""The most words of a tile, see `find_tiles`."""

_WARPGROUPS = 2
_THREADS = _WARPGROUPS * WARPGROUP
# Words of an access.
_VECTOR = 4
# Segments are of whole accesses of all threads.
_PADDING = _THREADS * _VECTOR
_MAX_SEGMENT = 8192
_DIGIT_BITS = 6
# Counters of a value are this far from those of the next, which shifts their banks by one.
_STRIDE = _THREADS + 1
_MAX_BITS = 30


@dataclasses.dataclass(frozen=True)
class Words:
    """How a word is made of a bucket and the number of a token.

    Attributes:
      num_tokens: tokens of a sequence, at least 1.
      bucket_bits: bits of a bucket's number. `2 ** bucket_bits` is the bucket of the tokens that
        take no part, and of the padding.
    """

    num_tokens: int
    bucket_bits: int

    @property
    def token_bits(self) -> int:
        """Bits of a token's number."""
        return max(1, (self.num_tokens - 1).bit_length())

    @property
    def is_supported(self) -> bool:
        """Whether words are positive integers of 32 bits."""
        return self.token_bits + self.bucket_bits <= _MAX_BITS

    @property
    def nowhere(self) -> int:
        """The bucket of what takes no part."""
        return 2**self.bucket_bits

    @property
    def segments(self) -> int:
        """Segments of a sequence, each for a block of threads."""
        return -(-self.num_tokens // _MAX_SEGMENT)

    @property
    def length(self) -> int:
        """Words of a sequence with its padding: whole segments."""
        unit = _PADDING * self.segments
        return -(-self.num_tokens // unit) * unit

    @property
    def tiles(self) -> int:
        """Places for tiles of words that share a bucket, of which some remain empty."""
        return self.num_tokens // TILE + min(self.nowhere, self.num_tokens)

    def make(self, buckets: Int[Array, "rows tokens"]) -> Int[Array, "rows length"]:
        """Words of tokens in order, and the padding: token 0 in the bucket of no part."""
        words = (buckets << self.token_bits) | jnp.arange(self.num_tokens, dtype=jnp.int32)
        padding = [(0, 0), (0, self.length - self.num_tokens)]
        return jnp.pad(words, padding, constant_values=self.nowhere << self.token_bits)

    def token[Number: (I32, Array)](self, word: Number) -> Number:
        """The number of the token."""
        return word & (2**self.token_bits - 1)

    def bucket(self, word: I32) -> I32:
        """The bucket."""
        return word >> self.token_bits


def sort(
    words: Int[Array, "rows length"], layout: Words, *, call: Call
) -> Int[Array, "rows length"]:
    """Sorts each row by bucket; tokens of a bucket stay in order.

    Args:
      words: from `Words.make`.
      layout: of the words.
      call: runs programs, e.g. `lane_mosaic.call`.
    """
    first_bit, largest = layout.token_bits, layout.nowhere
    while True:
        # The last digit has one value more, that of no part.
        is_last = largest <= 2**_DIGIT_BITS
        num_values = largest + 1 if is_last else 2**_DIGIT_BITS
        digit = _Digit(words.shape, layout.segments, first_bit, num_values)
        starts = []
        if digit.segments > 1:
            counts = jnp.asarray(call(_count_program(digit), words)[0])
            sums = jnp.cumsum(counts.reshape(digit.rows, -1), axis=1).reshape(counts.shape)
            starts.append(sums - counts)
        words = jnp.asarray(call(_sort_program(digit), words, *starts)[0])
        if is_last:
            return words
        first_bit, largest = first_bit + _DIGIT_BITS, largest >> _DIGIT_BITS


@dataclasses.dataclass(frozen=True)
class _Digit:
    """A digit by which rows of words are sorted: `num_values` values, the bits from `first_bit`."""

    shape: tuple[int, ...]
    segments: int
    first_bit: int
    num_values: int

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def part(self) -> int:
        """Words of a thread."""
        return self.shape[1] // self.segments // _THREADS

    def value(self, word: I32) -> I32:
        value = word >> self.first_bit
        # The last digit has no bits above it.
        return value & (self.num_values - 1) if self.num_values == 2**_DIGIT_BITS else value

    def program(
        self, body: Callable[..., None], output: tuple[int, ...], shared_words: int
    ) -> Program:
        return Program(
            body.__name__,
            body,
            outputs=(jax.ShapeDtypeStruct(output, np.int32),),
            num_blocks=self.rows * self.segments,
            num_warpgroups=_WARPGROUPS,
            shared_bytes=4 * shared_words,
        )


def _count_program(digit: _Digit) -> Program:
    """Of words: how many of each value there are, `[rows, num_values, segments]`."""

    def count_words(
        lane: Lane,
        inputs: tuple[GlobalPointer, ...],
        outputs: tuple[GlobalPointer, ...],
        table: SharedPointer,
        block: I32,
    ) -> None:
        thread = lane.thread_id()
        source = inputs[0].at(block, 4 * digit.part * _THREADS).at(thread, 4 * _VECTOR)

        def count(i: I32) -> None:
            for word in source.at(i, 4 * _VECTOR * _THREADS).load(_VECTOR):
                table.at(digit.value(word), 4).add(lane.i32(1))

        with lane.when(thread < digit.num_values):
            table.at(thread, 4).store([lane.i32(0)])
        lane.barrier()
        lane.fori_loop(0, digit.part // _VECTOR, count)
        lane.barrier()
        row, segment = block // digit.segments, block % digit.segments
        with lane.when(thread < digit.num_values):
            number = (row * digit.num_values + thread) * digit.segments + segment
            outputs[0].at(number, 4).store(table.at(thread, 4).load())

    counts = digit.rows, digit.num_values, digit.segments
    return digit.program(count_words, counts, digit.num_values)


def _sort_program(digit: _Digit) -> Program:
    """Of words, and the positions where the words of a segment begin if there are several."""
    num_values, segments = digit.num_values, digit.segments
    # An odd number of counters a thread: neighbours sum up different banks.
    chunk = num_values | 1
    num_counters = num_values * _THREADS
    table_words = num_values * _STRIDE

    def counter(table: SharedPointer, number: I32) -> SharedPointer:
        return table.at(number + number // _THREADS, 4)

    def sort_words(
        lane: Lane,
        inputs: tuple[GlobalPointer, ...],
        outputs: tuple[GlobalPointer, ...],
        table: SharedPointer,
        block: I32,
    ) -> None:
        thread = lane.thread_id()
        row, segment = block // segments, block % segments
        sums = table.at(4 * table_words)
        source = inputs[0].at(block, 4 * digit.part * _THREADS).at(thread, 4 * digit.part)
        target = outputs[0].at(row, 4 * digit.part * _THREADS * segments)

        def counter_of(word: I32) -> SharedPointer:
            return table.at(digit.value(word) * _STRIDE + thread, 4)

        def clear(i: I32) -> None:
            table.at(i, 4).store([lane.i32(0)])

        def count(i: I32) -> None:
            for word in source.at(i, 4 * _VECTOR).load(_VECTOR):
                counter_of(word).add(lane.i32(1))

        def sum_up(i: I32, total: I32) -> list[I32]:
            (number,) = counter(table, i).load()
            return [total + number]

        def replace(i: I32, total: I32) -> list[I32]:
            here = counter(table, i)
            (number,) = here.load()
            here.store([total])
            return [total + number]

        def place(i: I32) -> None:
            for word in source.at(i, 4 * _VECTOR).load(_VECTOR, again=True):
                here = counter_of(word)
                (position,) = here.load()
                here.store([position + 1])
                if segments > 1:
                    position += sums.at(digit.value(word), 4).load()[0]
                target.at(position, 4).store([word])

        lane.fori_loop(thread, table_words, clear, step=_THREADS)
        lane.barrier()
        lane.fori_loop(0, digit.part // _VECTOR, count)
        lane.barrier()
        first = lane.minimum(thread * chunk, num_counters)
        last = lane.minimum(first + chunk, num_counters)
        (total,) = lane.fori_loop(first, last, sum_up, [lane.i32(0)])
        sums.at(thread, 4).store([total])
        lane.barrier()
        distance = 1
        while distance < _THREADS:
            (other,) = sums.at(lane.maximum(thread - distance, 0), 4).load()
            total += lane.select(thread >= distance, other, lane.i32(0))
            lane.barrier()
            sums.at(thread, 4).store([total])
            lane.barrier()
            distance *= 2
        (before,) = sums.at(lane.maximum(thread - 1, 0), 4).load()
        before = lane.select(thread > 0, before, lane.i32(0))
        lane.fori_loop(first, last, replace, [before])
        lane.barrier()
        if segments > 1:
            # From positions in the sorted segment to those in the sequence.
            with lane.when(thread < num_values):
                number = (row * num_values + thread) * segments + segment
                (start,) = inputs[1].at(number, 4).load()
                (here,) = table.at(thread * _STRIDE, 4).load()
                sums.at(thread, 4).store([start - here])
            lane.barrier()
        lane.fori_loop(0, digit.part // _VECTOR, place)

    return digit.program(sort_words, digit.shape, table_words + _THREADS)


def find_buckets(
    words: Int[Array, "rows length"], layout: Words, *, call: Call
) -> Int[Array, "rows starts"]:
    """Where each bucket begins.

    Args:
      words: sorted.
      layout: of the words.
      call: runs programs.

    Returns:
      For each row the position of the first word of each bucket, or of the next one that has any,
      and of what is in no bucket: `2 ** bucket_bits + 1` numbers.
    """
    rows, length = words.shape
    starts = layout.nowhere + 1

    def find(
        lane: Lane,
        inputs: tuple[GlobalPointer, ...],
        outputs: tuple[GlobalPointer, ...],
        _: SharedPointer,
        block: I32,
    ) -> None:
        number = block * WARPGROUP + lane.thread_id()
        with lane.when(number < rows * starts):
            mine = inputs[0].at(number // starts, 4 * length)
            word = number % starts << layout.token_bits
            position = _count_while(lane, length, lambda i: mine.at(i, 4).load()[0] < word)
            outputs[0].at(number, 4).store([position])

    program = Program(
        "find_buckets",
        find,
        outputs=(jax.ShapeDtypeStruct((rows, starts), np.int32),),
        num_blocks=-(-rows * starts // WARPGROUP),
        num_warpgroups=1,
    )
    return jnp.asarray(call(program, words)[0])


def find_tiles(
    starts: Int[Array, "rows starts"],
    others: Int[Array, "rows starts"],
    layout: Words,
    *,
    call: Call,
) -> Int[Array, "rows tiles 4"]:
    """Tiles of words that share a bucket.

    Args:
      starts: of buckets, from `find_buckets`.
      others: those of the other side.
      layout: of the words that `starts` is of.
      call: runs programs.

    Returns:
      For each tile the positions of its first word and of the end of its bucket, which may be more
      than `TILE` words further, and of the first and the end of the other side's words in the same
      bucket. Places without a tile have zeros.
    """
    rows, tiles, buckets = len(starts), layout.tiles, layout.nowhere

    def find(
        lane: Lane,
        inputs: tuple[GlobalPointer, ...],
        outputs: tuple[GlobalPointer, ...],
        _: SharedPointer,
        block: I32,
    ) -> None:
        number = block * WARPGROUP + lane.thread_id()

        def place(start: I32, bucket: I32) -> I32:
            """Of a bucket's first tile: each one before has at most one that is not full."""
            return start // TILE + lane.minimum(bucket, start)

        with lane.when(number < rows * tiles):
            row, tile = number // tiles, number % tiles
            mine, theirs = (array.at(row, 4 * (buckets + 1)) for array in inputs)
            # The last one whose place is not further; that of the first is 0.
            bucket = _count_while(
                lane,
                buckets - 1,
                lambda i: place(mine.at(i + 1, 4).load()[0], i + 1) <= tile,
            )
            ranges = [x.at(bucket + i, 4).load()[0] for x in (mine, theirs) for i in (0, 1)]
            first = ranges[0] + (tile - place(ranges[0], bucket)) * TILE
            is_tile = first < ranges[1]
            found = [first, *ranges[1:]]
            outputs[0].at(number, 16).store([lane.select(is_tile, x, lane.i32(0)) for x in found])

    program = Program(
        "find_tiles",
        find,
        outputs=(jax.ShapeDtypeStruct((rows, tiles, 4), np.int32),),
        num_blocks=-(-rows * tiles // WARPGROUP),
        num_warpgroups=1,
    )
    return jnp.asarray(call(program, starts, others)[0])


def _count_while(lane: Lane, count: int, holds: Callable[[I32], Pred]) -> I32:
    """How many of the numbers from 0 to `count - 1` a condition holds for: those before any other.

    It is looked at for `count - 1` where it is not needed.
    """
    found = lane.i32(0)
    step = 1 << (count.bit_length() - 1) if count else 0
    while step:
        probe = found + step
        fits = (probe <= count) & holds(lane.minimum(probe, count) - 1)
        found = lane.select(fits, probe, found)
        step //= 2
    return found
