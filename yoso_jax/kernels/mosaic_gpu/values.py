"""Values as the cumulation reads and writes them: in slices of columns.

Neighbouring threads of the cumulation read and write a slice of neighbouring tokens, which has to
be one piece of memory. Two kernels go from rows to slices and back. The first one also finds the
largest magnitude and a typical one of each row, from which `fixed_point` chooses scales; the second
one can divide each row by its norm.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from yoso_jax.kernels.mosaic_gpu.lane import (
    F32,
    I32,
    WARPGROUP,
    Call,
    GlobalPointer,
    Lane,
    Pred,
    Program,
    SharedPointer,
)
from yoso_jax.kernels.mosaic_gpu.layout import Rows, load_words, store_words

ROWS_PER_SUM = WARPGROUP
"""Tokens of a head whose weights are summed up."""
SUMS = 4
"""Sums of each: largest magnitudes, roots, tokens that are not zero, and nothing."""
# Words of a row that a thread has in registers.
_MAX_WORDS = 32
_EPSILON = 1e-12


class SlicedValues(NamedTuple):
    """What `slice_values` makes.

    Attributes:
      slices: `[heads, slices, S, width]`, masked rows zero.
      weights: for each row its largest magnitude, and the square root of the mean magnitude.
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


class _Tile:
    """Some columns of 128 rows of a head: a thread's row in registers, all in shared memory.

    Neighbouring threads read and write neighbouring pieces of a row in memory, and the same slice
    of neighbouring rows. Pieces beyond the end of a row are zero, and so are rows beyond the last.
    """

    def __init__(
        self, rows: Rows, width: int, lane: Lane, shared: SharedPointer, block: I32
    ) -> None:
        chunks = -(-rows.tokens // WARPGROUP)
        self.rows = rows
        self.shape = _TileShape(rows, width)
        self.lane = lane
        self.shared = shared
        self.head = block // chunks
        self.first_token = block % chunks * WARPGROUP
        self.token = self.first_token + lane.thread_id()
        self.exists = self.token < rows.tokens

    def kept(self, masks: list[GlobalPointer]) -> Pred:
        """Whether the thread's row exists and is not masked."""
        if not masks:
            return self.exists
        mask = masks[0].at(self.head // self.rows.heads, 4 * self.rows.tokens)
        (word,) = mask.at(self.lane.minimum(self.token, self.rows.tokens - 1), 4).load()
        return self.exists & (word != 0)

    def slice_of(self, slices: GlobalPointer, index: I32) -> GlobalPointer:
        """The thread's row of a slice; one beyond the last row is that."""
        shape, tokens = self.shape, self.rows.tokens
        array = slices.at(self.head * shape.slices + index, tokens * shape.slice_bytes)
        return array.at(self.lane.minimum(self.token, tokens - 1), shape.slice_bytes)

    def my_row(self) -> SharedPointer:
        """The thread's row in shared memory."""
        return self.shared.at(self.lane.thread_id(), self.shape.stride)

    def for_pieces(self, array: GlobalPointer, first_slice: I32, body: Callable[..., None]) -> None:
        """Runs `body(row, exists, memory, shared)` for the pieces that the thread reads or writes.

        They are of row `row`, at the pointers `memory` and `shared`, unless they do not exist.
        """
        shape, rows = self.shape, self.rows
        array = rows.of_head(array, self.head)
        for i in range(shape.pieces):
            piece = self.lane.thread_id() + i * WARPGROUP
            row, column = piece // shape.pieces, piece % shape.pieces
            word = first_slice * (shape.slice_bytes // 4) + column * shape.piece_words
            exists = (word < rows.row_bytes // 4) & (self.first_token + row < rows.tokens)
            memory = array.at(self.first_token + row, rows.token_bytes).at(word, 4)
            body(
                row, exists, memory, self.shared.at(row, shape.stride).at(column, shape.piece_bytes)
            )


@dataclasses.dataclass(frozen=True)
class _TileShape:
    rows: Rows
    width: int

    @property
    def slices(self) -> int:
        """Slices of a row."""
        return -(-self.rows.columns // self.width)

    @property
    def slice_bytes(self) -> int:
        return self.width * self.rows.dtype.itemsize

    @property
    def num_slices(self) -> int:
        """Slices of the tile: as many as divide those of a row and fit into registers."""
        most = max(1, 4 * _MAX_WORDS // self.slice_bytes)
        return max(n for n in range(1, self.slices + 1) if self.slices % n == 0 and n <= most)

    @property
    def words(self) -> int:
        """Words of a row of the tile."""
        return self.num_slices * self.slice_bytes // 4

    @property
    def piece_words(self) -> int:
        """Words that a thread reads or writes at once."""
        return math.gcd(4, self.words, self.rows.row_bytes // 4)

    @property
    def piece_bytes(self) -> int:
        return 4 * self.piece_words

    @property
    def pieces(self) -> int:
        """Pieces of a row of the tile."""
        return self.words // self.piece_words

    @property
    def stride(self) -> int:
        """Bytes between rows: an odd number of pieces, for neighbouring rows in other banks."""
        return self.piece_bytes * (self.pieces | 1)

    @property
    def shared_bytes(self) -> int:
        return WARPGROUP * self.stride


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
    value, *mask = inputs
    slices, weights, sums = outputs
    tile = _Tile(rows, width, lane, shared, block)
    shape, kept, zero = tile.shape, tile.kept(mask), lane.i32(0)

    def load_piece(row: I32, exists: Pred, memory: GlobalPointer, shared: SharedPointer) -> None:
        del row
        shared.store([zero] * shape.piece_words)
        with lane.when(exists):
            shared.store(memory.load(shape.piece_words))

    def add(first_slice: I32, largest: I32, total: F32) -> list[I32 | F32]:
        lane.barrier()
        tile.for_pieces(value, first_slice, load_piece)
        lane.barrier()
        row = tile.my_row()
        words = [
            lane.select(kept, word, zero)
            for i in range(shape.pieces)
            for word in row.load(shape.piece_words, shape.piece_bytes * i)
        ]
        with lane.when(tile.exists):
            for i in range(shape.num_slices):
                part = words[i * shape.slice_bytes // 4 : (i + 1) * shape.slice_bytes // 4]
                store_words(tile.slice_of(slices, first_slice + i), part)
        for x in lane.unpack(words, rows.dtype):
            # As integers, magnitudes have the order they have as floats, and NaN is the largest.
            magnitude = lane.bitcast_i32(x) & 0x7FFFFFFF
            largest = lane.maximum(largest, magnitude)
            total = total + lane.bitcast_f32(magnitude)
        return [largest, total]

    init = [zero, lane.f32(0.0)]
    largest, total = lane.fori_loop(0, shape.slices, add, init, step=shape.num_slices)
    lane.barrier()
    root = lane.sqrt(total * (1 / rows.columns))
    with lane.when(tile.exists):
        pair = weights.at(tile.head, 8 * rows.tokens).at(tile.token, 8)
        pair.store([largest, lane.bitcast_i32(root)])
    count = lane.select(largest == 0, lane.f32(0.0), lane.f32(1.0))
    totals = sum_over_threads(lane, shared, [lane.bitcast_f32(largest), root, count])
    with lane.when(lane.thread_id() == 0):
        words = [*map(lane.bitcast_i32, totals), zero]
        sums.at(block, 4 * SUMS).store(words)


def slice_values_program(rows: Rows, width: int) -> Program:
    """Inputs: `[B, S, N, D]`, and an int32 mask `[B, S]` or nothing. Outputs: `SlicedValues`."""
    shape, heads = _TileShape(rows, width), rows.num_heads
    chunks = -(-rows.tokens // ROWS_PER_SUM)
    return Program(
        "slice_values",
        functools.partial(_slice_values, rows=rows, width=width),
        outputs=(
            jax.ShapeDtypeStruct((heads, shape.slices, rows.tokens, width), rows.dtype),
            jax.ShapeDtypeStruct((heads, rows.tokens, 2), jnp.float32),
            jax.ShapeDtypeStruct((heads, chunks, SUMS), jnp.float32),
        ),
        num_blocks=heads * chunks,
        num_warpgroups=1,
        shared_bytes=max(4 * 3 * (WARPGROUP + 32), shape.shared_bytes),
    )


def slice_values(
    value: Float[Array, "B S N D"], mask: Int[Array, "B S"] | None, *, width: int, call: Call
) -> SlicedValues:
    """Cuts values into slices of `width` columns, the last one filled up with zeros.

    Args:
      value: float32, bfloat16 or float16; rows are whole words of 32 bits.
      mask: 0 for rows that count as zero.
      width: columns of a slice.
      call: what runs the program.
    """
    batch, tokens, heads, columns = value.shape
    rows = Rows(batch, tokens, heads, columns, np.dtype(value.dtype))
    masks = () if mask is None else (mask,)
    return SlicedValues(*call(slice_values_program(rows, width), value, *masks))


def _merge_slices(
    lane: Lane,
    inputs: tuple[GlobalPointer, ...],
    outputs: tuple[GlobalPointer, ...],
    shared: SharedPointer,
    block: I32,
    *,
    rows: Rows,
    width: int,
    normalize: bool,
) -> None:
    slices, *mask = inputs
    out, *norms = outputs
    tile = _Tile(rows, width, lane, shared, block)
    shape, kept, zero = tile.shape, tile.kept(mask), lane.i32(0)

    def load(first_slice: I32) -> list[I32]:
        words = [
            word
            for i in range(shape.num_slices)
            for word in load_words(tile.slice_of(slices, first_slice + i), shape.slice_bytes // 4)
        ]
        return [lane.select(kept, word, zero) for word in words]

    def add_squares(first_slice: I32, total: F32) -> list[F32]:
        for x in lane.unpack(load(first_slice), rows.dtype):
            total = total + x * x
        return [total]

    def write(first_slice: I32, inverse: F32) -> None:
        words = load(first_slice)
        if normalize:
            row = lane.unpack(words, rows.dtype)
            words = lane.pack([x * inverse for x in row], rows.dtype)
        row = tile.my_row()
        for i in range(shape.pieces):
            part = words[i * shape.piece_words : (i + 1) * shape.piece_words]
            row.store(part, shape.piece_bytes * i)
        lane.barrier()
        tile.for_pieces(out, first_slice, store_piece)
        lane.barrier()

    def store_piece(row: I32, exists: Pred, memory: GlobalPointer, shared: SharedPointer) -> None:
        del row
        with lane.when(exists):
            memory.store(shared.load(shape.piece_words))

    inverse = lane.f32(1.0)
    if normalize:
        init, step = [lane.f32(0.0)], shape.num_slices
        (squares,) = lane.fori_loop(0, shape.slices, add_squares, init, step=step)
        norm = lane.sqrt(squares)
        inverse = lane.f32(1.0) / lane.select(norm > _EPSILON, norm, lane.f32(_EPSILON))
        with lane.when(tile.exists):
            index = (tile.head // rows.heads * rows.tokens + tile.token) * rows.heads
            norms[0].at(index + tile.head % rows.heads, 4).store([lane.bitcast_i32(norm)])
    lane.fori_loop(0, shape.slices, lambda first: write(first, inverse), step=shape.num_slices)


def merge_slices_program(rows: Rows, width: int, *, normalize: bool) -> Program:
    """Inputs: `[heads, slices, T, width]`, and an int32 mask `[B, T]` or nothing.

    Outputs: `[B, T, N, D]`, masked rows zero; with `normalize` each row is divided by its l2 norm,
    and these are another output, float32 `[B, T, N]`.
    """
    shape = _TileShape(rows, width)
    norms = jax.ShapeDtypeStruct(rows.shape.shape[:3], jnp.float32)
    return Program(
        "merge_slices",
        functools.partial(_merge_slices, rows=rows, width=width, normalize=normalize),
        outputs=(rows.shape, norms) if normalize else (rows.shape,),
        num_blocks=rows.num_heads * -(-rows.tokens // WARPGROUP),
        num_warpgroups=1,
        shared_bytes=shape.shared_bytes,
    )
