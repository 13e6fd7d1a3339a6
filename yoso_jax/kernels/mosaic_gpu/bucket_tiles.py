"""What the kernel of buckets and its hardware share: shapes, and the code of threads."""

import dataclasses
from typing import Literal

from yoso_jax.kernels.mosaic_gpu import expectation_tiles as tiles
from yoso_jax.kernels.mosaic_gpu.collision_chain import Chain
from yoso_jax.kernels.mosaic_gpu.lane import (
    F32,
    I32,
    WARPGROUP,
    GlobalPointer,
    Lane,
    SharedPointer,
)
from yoso_jax.kernels.mosaic_gpu.sorting import TILE, Words
from yoso_jax.kernels.mosaic_gpu.swizzling import tile_offset

# Blocks that run at a time: one a multiprocessor.
_BLOCKS = 132
# What Hopper lends a block, less barriers and the scratch space of the compiler.
_SHARED_BYTES = 223 * 1024
# Bytes that a thread copies at a time.
_PIECE = 16
WORD_TILES = 5
"""Tiles of words of a warpgroup."""
PARTS = 8
"""Columns that what threads have of a row's sum is spread over."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of the sums and how their work is cut.

    Attributes:
      batch: batch rows, B.
      heads: N.
      num_hashes: hashes in use, the first of those that there are words of.
      head_dim: H, a multiple of 16.
      value_dim: D, a multiple of 16.
      exponent: of the collision probability in the weights.
      shift: what has shifts, which are added to the products of rows: the "rows" of a tile, whose
        gradients are wanted, its "columns", or nothing.
      means: sums of weights and of products are wanted, not gradients; then without shifts.
      layout: of the words of the tokens whose gradients are wanted.
      other_layout: of the words of the other side.
    """

    batch: int
    heads: int
    num_hashes: int
    head_dim: int
    value_dim: int
    exponent: int
    shift: Literal["rows", "columns"] | None
    means: bool
    layout: Words
    other_layout: Words

    @property
    def own_numbers(self) -> int:
        """Numbers of a token whose gradient is wanted: its length, and perhaps a shift."""
        return 2 if self.shift == "rows" else 1

    @property
    def other_numbers(self) -> int:
        """Numbers of a token of the other side: a scale, and perhaps a shift, or for means 1."""
        return 2 if self.shift == "columns" or self.means else 1

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a block; each has tiles of its own."""
        most = 3 if self.head_dim <= 64 else 2 if self.head_dim <= 128 else 1
        # Of each side a tile in use, and the next one.
        tile_bytes = 4 * TILE * (2 * self.head_dim + 2 * self.value_dim)
        numbers = 2 * (self.own_numbers + self.other_numbers) + WORD_TILES + 2 * self.means
        tile_bytes += 4 * TILE * numbers
        return min(most, _SHARED_BYTES // tile_bytes)

    @property
    def items(self) -> int:
        """Places for tiles of all heads and hashes."""
        return self.batch * self.heads * self.num_hashes * self.layout.tiles

    @property
    def blocks(self) -> int:
        """Blocks of threads."""
        return min(_BLOCKS, -(-self.items // self.warpgroups))

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the sums."""
        if self.means:
            return (self.num_hashes, self.batch * self.heads, 2, self.layout.num_tokens)
        return (self.num_hashes, self.batch, self.layout.num_tokens, self.heads, self.head_dim)


def copy_words(
    lane: Lane, words: GlobalPointer, copies: SharedPointer, *, first: I32, layout: Words
) -> None:
    """Starts to copy 64 words, from the position `first` on, of a head and a hash."""
    thread = lane.thread_id() & (WARPGROUP - 1)
    with lane.when(thread < TILE):
        position = lane.minimum(lane.maximum(first + thread, 0), layout.length - 1)
        copies.at(thread, 4).start_copy(words.at(position, 4), 4)


def gather(
    lane: Lane,
    words: SharedPointer,
    tokens: tuple[GlobalPointer, SharedPointer, int],
    rows: tuple[GlobalPointer, SharedPointer, int],
    numbers: tuple[GlobalPointer, SharedPointer, int],
    *,
    count: I32,
    stride: int,
    layout: Words,
    by_column: bool,
) -> None:
    """Starts to copy what belongs to the tokens of a tile.

    Args:
      lane: a thread of a warpgroup.
      words: to the 64 words of the tile.
      tokens: the row of the head's first token, the tile that tokens are copied to in the
        arrangement that matrix products read, and the number of its columns.
      rows: the same of the rows of tokens.
      numbers: to a float32 of each token of the head, to the 64 of them that are copied, and how
        many such there are, one after the other.
      count: words that count, at least 1. Later tokens repeat the last of them, but their numbers
        by column are zeros.
      stride: columns of all heads of a token, by columns of a head.
      layout: of the words.
      by_column: numbers are in the order of `tiles.in_column_order`.
    """
    thread = lane.thread_id() & (WARPGROUP - 1)

    def word_at(row: I32) -> I32:
        return words.at(lane.minimum(row, count - 1), 4).load()[0]

    for source, tile, columns in (tokens, rows):
        places = _places(thread, columns)
        # All at once: each takes a while.
        numbers_of_tokens = [layout.token(word_at(row)) for row, _ in places]
        for (row, byte), token in zip(places, numbers_of_tokens, strict=True):
            offset = tile_offset(row, byte, row_bytes=2 * columns)
            tile.at(offset).start_copy(source.at(token, 2 * columns * stride).at(byte, 1), _PIECE)
    known, copies, kinds = numbers
    with lane.when(thread < TILE):
        place = tiles.place_of_column(thread) if by_column else thread
        token = layout.token(word_at(thread))
        for i in range(kinds):
            copies.at(place, 4).at(i, 4 * TILE).start_copy(
                known.at(token, 4).at(i, 4 * layout.num_tokens),
                4,
                where=thread < count if by_column else None,
            )


def scatter(
    lane: Lane,
    words: SharedPointer,
    tile: SharedPointer,
    target: GlobalPointer,
    *,
    count: I32,
    columns: int,
    stride: int,
    layout: Words,
) -> None:
    """Stores the rows of a tile at the places of their tokens.

    Args:
      lane: a thread of a warpgroup.
      words: to the 64 words of the tile.
      tile: the rows, as `gather` arranges them.
      target: to the row of the head's first token.
      count: rows to store.
      columns: of a row.
      stride: columns of all heads of a token, by columns of a head.
      layout: of the words.
    """
    for row, byte in _places(lane.thread_id() & (WARPGROUP - 1), columns):
        (word,) = words.at(row, 4).load()
        piece = tile.at(tile_offset(row, byte, row_bytes=2 * columns)).load(_PIECE // 4)
        with lane.when(row < count):
            target.at(layout.token(word), 2 * columns * stride).at(byte, 1).store(piece)


def scatter_numbers(
    lane: Lane,
    words: SharedPointer,
    numbers: SharedPointer,
    target: GlobalPointer,
    *,
    count: I32,
    layout: Words,
) -> None:
    """Stores two float32 of each row of a tile at the place of its token.

    Args:
      lane: a thread of a warpgroup.
      words: to the 64 words of the tile.
      numbers: to 64 of the first and then of the second.
      target: to the first of the head's first token; the second are behind all first.
      count: rows to store.
      layout: of the words.
    """
    thread = lane.thread_id() & (WARPGROUP - 1)
    with lane.when(thread < count):
        (word,) = words.at(thread, 4).load()
        place = target.at(layout.token(word), 4)
        for i in range(2):
            value = numbers.at(thread, 4).load(1, 4 * TILE * i)
            place.at(i, 4 * layout.num_tokens).store(value)


def _places(thread: I32, columns: int) -> list[tuple[I32, I32]]:
    """The rows and bytes of the pieces of a tile that a thread copies."""
    pieces = 2 * columns // _PIECE
    numbers = [thread + i * WARPGROUP for i in range(TILE * pieces // WARPGROUP)]
    return [(number // pieces, number % pieces * _PIECE) for number in numbers]


def weights(
    lane: Lane,
    scores: list[F32],
    products: list[F32],
    rows: list[list[F32]],
    scales: SharedPointer,
    chain: Chain,
    shift: Literal["rows", "columns"] | None = None,
) -> list[F32]:
    """What a thread has of the weights of a tile.

    They have the scales as factors, also of the sign, since the tokens that they weigh are to be
    divided by their lengths.

    Args:
      lane: a thread of a warpgroup.
      scores: products of tokens, as in `tiles.probabilities`.
      products: products of their rows.
      rows: of the two rows, what `tiles.row_values` gives, and then perhaps their shifts.
      scales: to -1 / length of the columns, in their order in `tiles.in_column_order`, and then
        perhaps to their shifts, times that.
      chain: of the power of the collision probability.
      shift: what has shifts.
    """
    values = rows[:-1] if shift == "rows" else rows
    factors, column_scales = _factors(lane, scores, values, scales, chain)
    if shift == "rows":
        # Of four places two are in the other row.
        products = [x + rows[-1][i // 2 % 2] for i, x in enumerate(products)]
    shifts = [scales.at(4 * TILE)] if shift == "columns" else []
    places = range(len(products))
    scaled = tiles.scale_and_shift(lane, products, column_scales, shifts, places)
    return [factor * x for factor, x in zip(factors, scaled, strict=True)]


def add_to_means(
    lane: Lane,
    scores: list[F32],
    products: list[F32],
    rows: list[list[F32]],
    columns: SharedPointer,
    chain: Chain,
    sums: tuple[list[F32], list[F32]],
) -> tuple[list[F32], list[F32]]:
    """What a thread has of the sums of weights of rows, and of weighted products.

    Args:
      lane: a thread of a warpgroup.
      scores: as of `weights`, like all that are not named here.
      products: products of their rows.
      rows: of the two rows, what `tiles.row_values` gives.
      columns: to -1 / length of the columns, and then to ones, or zeros where they do not count.
      chain: of the power of the collision probability.
      sums: those of the tiles before, `PARTS` columns in the registers of a matrix product.
    """
    factors, _ = _factors(lane, scores, rows, columns, chain)
    ones = tiles.of_columns(lane, columns.at(4 * TILE), range(len(scores)))
    counts, totals = map(list, sums)
    for i, (factor, x, one) in enumerate(zip(factors, products, ones, strict=True)):
        weight = factor * lane.bitcast_f32(one)
        part = i % len(counts)
        counts[part] = counts[part] + weight
        totals[part] = lane.fma(weight, x, totals[part])
    return counts, totals


def _factors(
    lane: Lane, scores: list[F32], rows: list[list[F32]], scales: SharedPointer, chain: Chain
) -> tuple[list[F32], list[F32]]:
    """Powers of collision probabilities, and the scales of their columns."""
    if chain.steps:
        pieces = list(tiles.probabilities(lane, scores, rows, scales, chain))
        return [x for piece, _ in pieces for x in piece], [x for _, piece in pieces for x in piece]
    words = tiles.of_columns(lane, scales, range(len(scores)))
    return [lane.f32(1)] * len(scores), [lane.bitcast_f32(word) for word in words]
