"""Values as the cumulation reads them: in slices of columns, with the weight of each row.

Neighbouring threads of the cumulation read a slice of neighbouring tokens, which has to be one
piece of memory. While a row is at hand, its largest magnitude and its typical one are found, from
which `fixed_point` chooses scales.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from yoso_jax.kernels.mosaic_gpu import layout
from yoso_jax.kernels.mosaic_gpu.lane import (
    F32,
    I32,
    WARPGROUP,
    Call,
    GlobalPointer,
    Lane,
    Program,
    SharedPointer,
)
from yoso_jax.kernels.mosaic_gpu.layout import Rows

ROWS_PER_SUM = WARPGROUP
"""Tokens of a head whose weights are summed up."""
SUMS = 4
"""Sums of each: largest magnitudes, roots, tokens that are not zero, and nothing."""
# Words of a row that a thread has in registers.
_MAX_WORDS = 32


class SlicedValues(NamedTuple):
    """What `slice_values` makes.

    Attributes:
      slices: `[heads, slices, S, width]`, masked rows zero.
      weights: for each row its largest magnitude, and the square root of the sum of magnitudes.
      sums: sums of these over `ROWS_PER_SUM` tokens, and how many rows are not zero.
    """

    slices: Shaped[Array, "heads slices S width"]
    weights: Float[Array, "heads S 2"]
    sums: Float[Array, "heads chunks 4"]


def sum_over_threads(lane: Lane, shared: SharedPointer, values: list[F32]) -> list[F32]:
    """Sums over the threads of a block, the same in all of them, and in every run.

    Uses `num_threads + 32` words of shared memory for each value.
    """
    thread, share = lane.thread_id(), lane.num_threads // 32
    areas = [shared.at(i * (lane.num_threads + 32), 4) for i in range(len(values))]

    def total(start: SharedPointer, num_words: int) -> F32:
        words = [x for i in range(0, num_words, 4) for x in start.load(4, 4 * i)]
        return functools.reduce(F32.__add__, map(lane.bitcast_f32, words))

    for area, value in zip(areas, values, strict=True):
        area.at(thread, 4).store([lane.bitcast_i32(value)])
    lane.barrier()
    with lane.when(thread < 32):
        for area in areas:
            part = total(area.at(thread, 4 * share), share)
            area.at(thread, 4).store([lane.bitcast_i32(part)], 4 * lane.num_threads)
    lane.barrier()
    return [total(area.at(lane.num_threads, 4), 32) for area in areas]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Some columns of the rows of a block, in shared memory."""

    rows: Rows
    width: int

    @property
    def slice_bytes(self) -> int:
        return self.width * self.rows.dtype.itemsize

    @property
    def num_slices(self) -> int:
        """As many as divide those of a row and fit into the registers of a thread."""
        slices = self.rows.columns // self.width
        most = max(1, 4 * _MAX_WORDS // self.slice_bytes)
        return max(n for n in range(1, slices + 1) if slices % n == 0 and n <= most)

    @property
    def piece_words(self) -> int:
        """Words that a thread reads at once."""
        return math.gcd(4, self.num_slices * self.slice_bytes // 4)

    @property
    def pieces(self) -> int:
        """Pieces of a row."""
        return self.num_slices * self.slice_bytes // (4 * self.piece_words)

    @property
    def stride(self) -> int:
        """Bytes between rows: an odd number of pieces, for neighbouring rows in other banks."""
        return 4 * self.piece_words * (self.pieces | 1)


def _slice_values(
    lane: Lane,
    inputs: tuple[GlobalPointer, ...],
    outputs: tuple[GlobalPointer, ...],
    shared: SharedPointer,
    block: I32,
    *,
    rows: Rows,
    width: int,
) -> None:
    """Each thread does a row."""
    value, *mask = inputs
    slices, weights, sums = outputs
    chunks = -(-rows.tokens // ROWS_PER_SUM)
    head, first_token = block // chunks, block % chunks * ROWS_PER_SUM
    token = first_token + lane.thread_id()
    tile = _Tile(rows, width)
    array, zero = rows.of_head(value, head), lane.i32(0)
    used = token < rows.tokens
    kept = used
    if mask:
        masks = mask[0].at(head // rows.heads, 4 * rows.tokens)
        (word,) = masks.at(lane.minimum(token, rows.tokens - 1), 4).load()
        kept = used & (word != 0)

    def load_tile(first_slice: I32) -> None:
        """Neighbouring threads read neighbouring pieces of a row."""
        for i in range(tile.pieces):
            piece = lane.thread_id() + i * WARPGROUP
            row, column = piece // tile.pieces, piece % tile.pieces
            # Tokens beyond the end get the last one's row; they count as masked.
            last = lane.minimum(first_token + row, rows.tokens - 1)
            source = array.at(last, rows.token_bytes).at(first_slice, tile.slice_bytes)
            words = source.at(column, 4 * tile.piece_words).load(tile.piece_words)
            shared.at(row, tile.stride).at(column, 4 * tile.piece_words).store(words)

    def add(first_slice: I32, largest: I32, total: F32) -> list[I32 | F32]:
        lane.barrier()
        load_tile(first_slice)
        lane.barrier()
        row = shared.at(lane.thread_id(), tile.stride)
        words = [
            lane.select(kept, word, zero)
            for i in range(tile.pieces)
            for word in row.load(tile.piece_words, 4 * tile.piece_words * i)
        ]
        with lane.when(used):
            for i in range(tile.num_slices):
                index = head * (rows.columns // width) + first_slice + i
                out = slices.at(index, rows.tokens * tile.slice_bytes)
                part = words[i * tile.slice_bytes // 4 : (i + 1) * tile.slice_bytes // 4]
                layout.store_words(out.at(token, tile.slice_bytes), part)
        for x in lane.unpack(words, rows.dtype):
            # As integers, magnitudes have the order they have as floats, and NaN is the largest.
            magnitude = lane.bitcast_i32(x) & 0x7FFFFFFF
            largest = lane.maximum(largest, magnitude)
            total = total + lane.bitcast_f32(magnitude)
        return [largest, total]

    init = [zero, lane.f32(0.0)]
    largest, total = lane.fori_loop(0, rows.columns // width, add, init, step=tile.num_slices)
    lane.barrier()
    root = lane.sqrt(total)
    with lane.when(used):
        pair = weights.at(head, 8 * rows.tokens).at(token, 8)
        pair.store([largest, lane.bitcast_i32(root)])
    count = lane.select(largest == 0, lane.f32(0.0), lane.f32(1.0))
    totals = sum_over_threads(lane, shared, [lane.bitcast_f32(largest), root, count])
    with lane.when(lane.thread_id() == 0):
        words = [*map(lane.bitcast_i32, totals), zero]
        sums.at(block, 4 * SUMS).store(words)


def slice_values_program(rows: Rows, width: int) -> Program:
    """Inputs: `[B, S, N, D]`, and an int32 mask `[B, S]` or nothing. Outputs: `SlicedValues`."""
    heads, chunks = rows.num_heads, -(-rows.tokens // ROWS_PER_SUM)
    return Program(
        "slice_values",
        functools.partial(_slice_values, rows=rows, width=width),
        outputs=(
            jax.ShapeDtypeStruct((heads, rows.columns // width, rows.tokens, width), rows.dtype),
            jax.ShapeDtypeStruct((heads, rows.tokens, 2), jnp.float32),
            jax.ShapeDtypeStruct((heads, chunks, SUMS), jnp.float32),
        ),
        num_blocks=heads * chunks,
        num_warpgroups=1,
        shared_bytes=max(4 * 3 * (WARPGROUP + 32), WARPGROUP * _Tile(rows, width).stride),
    )


def slice_values(
    value: Float[Array, "B S N D"], mask: Int[Array, "B S"] | None, *, width: int, call: Call
) -> SlicedValues:
    """Cuts values into slices of `width` columns.

    Args:
      value: float32, bfloat16 or float16; D is a multiple of `width`.
      mask: 0 for rows that count as zero.
      width: columns of a slice.
      call: what runs the program.
    """
    batch, tokens, heads, columns = value.shape
    rows = Rows(batch, tokens, heads, columns, np.dtype(value.dtype))
    masks = () if mask is None else (mask,)
    return SlicedValues(*call(slice_values_program(rows, width), value, *masks))
