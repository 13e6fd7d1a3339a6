"""Gradients of queries and keys from pairs that share a bucket, on tensor cores.

For a hash, queries and keys are sorted by bucket. A warpgroup takes up to 64 queries of a bucket
and goes through its keys, in tiles of 64, which its threads gather from where they are. Of a tile
it evaluates the weights (`docs/gradients.md`), and sums up the keys times weights. Behind the last
key of a bucket there are values of zeros, so that no weight counts. The rows of a hash go to the
places of their queries, and another kernel sums up the hashes. For the gradient of the keys the
roles are exchanged, so that every sum has one owner and its bits are the same in every run. With
weights that are probabilities alone it sums up values, see `xla.orthogonal`.

What is needed next is copied while the tensor cores and the arithmetic units are busy: first words,
which say where tokens are, then the tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.kernels.mosaic_gpu import expectation_tiles as tiles
from yoso_jax.kernels.mosaic_gpu import sorting
from yoso_jax.kernels.mosaic_gpu.collision_chain import Chain, collision_chain
from yoso_jax.kernels.mosaic_gpu.lane import (
    F32,
    I32,
    WARPGROUP,
    Call,
    GlobalPointer,
    Lane,
    SharedPointer,
)
from yoso_jax.kernels.mosaic_gpu.sorting import TILE, Words
from yoso_jax.kernels.mosaic_gpu.swizzling import tile_offset
from yoso_jax.kernels.mosaic_gpu.tangents import tangents
from yoso_jax.kernels.mosaic_gpu.varying import vary_like

# Blocks that run at a time: one a multiprocessor.
_BLOCKS = 132
# What Hopper lends a block, less barriers and the scratch space of the compiler.
_SHARED_BYTES = 223 * 1024
# Bytes that a thread copies at a time.
_PIECE = 16
# Tiles of words of a warpgroup.
_WORD_TILES = 5


@dataclasses.dataclass(frozen=True)
class Side:
    """Tokens whose gradients are wanted, or the tokens that they are sums of.

    Attributes:
      tokens: `[B, T, N, H]`.
      rows: `[B, T, N, D]`, gradients of the results of queries, or values of keys.
      lengths: `[B * N, T]`, from `tiles.token_lengths`.
      words: `[B * N * hashes, length]`, sorted.
      layout: of the words.
    """

    tokens: Array
    rows: Array
    lengths: Array
    words: Array
    layout: Words


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of the sums and how their work is cut.

    Attributes:
      batch: batch rows, B.
      heads: N.
      num_hashes: hashes in use.
      head_dim: H, a multiple of 16.
      value_dim: D, a multiple of 16.
      exponent: of the collision probability in the weights.
      sums_rows: whether rows of the other side are summed up, by probabilities; otherwise tokens
        are, by probabilities times products of rows.
      layout: of the words of the tokens whose gradients are wanted.
      other_layout: of the words of the other side.
    """

    batch: int
    heads: int
    num_hashes: int
    head_dim: int
    value_dim: int
    exponent: int
    sums_rows: bool
    layout: Words
    other_layout: Words

    @property
    def columns(self) -> int:
        """Columns of the sums."""
        return self.value_dim if self.sums_rows else self.head_dim

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a block; each has tiles of its own."""
        most = 3 if self.head_dim <= 64 else 2 if self.head_dim <= 128 else 1
        # Of each side a tile in use, and the next one.
        tile_bytes = 4 * TILE * (2 * self.head_dim + 2 * self.value_dim + 4)
        tile_bytes += _WORD_TILES * TILE * 4
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
        return (self.num_hashes, self.batch, self.layout.num_tokens, self.heads, self.columns)


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
    numbers: tuple[GlobalPointer, SharedPointer],
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
      numbers: to a float32 of each token of the head, and to the 64 of them that are copied.
      count: words that count, at least 1. Later tokens and numbers repeat the last of them, rows
        are zeros.
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
            tile.at(offset).start_copy(
                source.at(token, 2 * columns * stride).at(byte, 1),
                _PIECE,
                where=row < count if tile is rows[1] else None,
            )
    known, copies = numbers
    with lane.when(thread < TILE):
        place = tiles.place_of_column(thread) if by_column else thread
        copies.at(place, 4).start_copy(known.at(layout.token(word_at(thread)), 4), 4)


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


def _places(thread: I32, columns: int) -> list[tuple[I32, I32]]:
    """The rows and bytes of the pieces of a tile that a thread copies."""
    pieces = 2 * columns // _PIECE
    numbers = [thread + i * WARPGROUP for i in range(TILE * pieces // WARPGROUP)]
    return [(number // pieces, number % pieces * _PIECE) for number in numbers]


def weights(
    lane: Lane,
    scores: list[F32],
    products: list[F32] | None,
    rows: list[list[F32]],
    scales: SharedPointer,
    chain: Chain,
) -> list[F32]:
    """What a thread has of the weights of a tile.

    With products they have the scales as factors, also of the sign, since the tokens that they
    weigh are to be divided by their lengths.

    Args:
      lane: a thread of a warpgroup.
      scores: products of tokens, as in `tiles.probabilities`.
      products: products of their rows; None for ones.
      rows: of the two rows, what `tiles.row_values` gives.
      scales: to -1 / length of the columns, in their order in `tiles.in_column_order`.
      chain: of the power of the collision probability.
    """
    if chain.steps:
        pieces = list(tiles.probabilities(lane, scores, rows, scales, chain))
        factors = [factor for piece, _ in pieces for factor in piece]
        column_scales = [scale for _, piece in pieces for scale in piece]
    else:
        factors = [lane.f32(1)] * len(scores)
        places = tiles.of_columns(lane, scales, range(len(scores)))
        column_scales = [lane.bitcast_f32(x) for x in places]
    if products is None:
        return factors
    return [
        factor * scale * product
        for factor, scale, product in zip(factors, column_scales, products, strict=True)
    ]


def _kernel(plan: Plan, dtype: np.dtype) -> Callable[..., Array]:
    """Of tokens, rows and words of both sides, ranges, lengths and the scales of the others."""
    # These load JAX's GPU dialects.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from yoso_jax.kernels.mosaic_gpu.lane_mosaic import MosaicLane
    from yoso_jax.kernels.mosaic_gpu.registers import read_registers, write_words

    warpgroups, layout = plan.warpgroups, plgpu.Layout.WGMMA
    row_layout = layout.reduce(1)
    scalar = plgpu.Layout.WG_SPLAT(())
    chain = collision_chain(plan.exponent)
    plain = plgpu.RefType()

    def tile_type(columns: int) -> Any:
        size = tiles.swizzle(2 * columns)
        return plgpu.RefType(
            (plgpu.TilingTransform((8, size // 2)), plgpu.SwizzleTransform(size)),
        )

    def make_copy_words(words_layout: Words) -> Any:
        @plgpu.inline_mgpu(arg_types=(plain, plain, *[scalar] * 3))
        def start(_: Any, words: Any, copies: Any, *scalars: Any) -> None:
            lane = MosaicLane(warpgroups * WARPGROUP)
            row, slot, first = (I32(lane, x.registers.item()) for x in scalars)
            source = lane.global_pointer(words, writable=False).at(row, 4 * words_layout.length)
            target = lane.shared_pointer(copies).at(slot, 4 * TILE)
            copy_words(lane, source, target, first=first, layout=words_layout)

        return start

    def make_gather(words_layout: Words, *, by_column: bool) -> Any:
        tile_types = tile_type(plan.head_dim), tile_type(plan.value_dim)

        @plgpu.inline_mgpu(arg_types=(*[plain] * 4, *tile_types, plain, *[scalar] * 5))
        def start(_: Any, *args: Any) -> None:
            lane = MosaicLane(warpgroups * WARPGROUP)
            words, *arrays = args[:4]
            batch, n, words_slot, slot, count = (I32(lane, x.registers.item()) for x in args[7:])
            tokens, rows, known = (lane.global_pointer(x, writable=False) for x in arrays)
            sources = []
            for source, tile, columns in (
                (tokens, args[4], plan.head_dim),
                (rows, args[5], plan.value_dim),
            ):
                row_bytes = 2 * columns
                source = source.at(batch, words_layout.num_tokens * plan.heads * row_bytes)
                pointer = lane.shared_pointer(tile).at(slot, TILE * row_bytes)
                sources.append((source.at(n, row_bytes), pointer, columns))
            known = known.at(batch * plan.heads + n, 4 * words_layout.num_tokens)
            gather(
                lane,
                lane.shared_pointer(words).at(words_slot, 4 * TILE),
                sources[0],
                sources[1],
                (known, lane.shared_pointer(args[6]).at(slot, 4 * TILE)),
                count=count,
                stride=plan.heads,
                layout=words_layout,
                by_column=by_column,
            )

        return start

    copy_row_words, copy_column_words = map(make_copy_words, (plan.layout, plan.other_layout))
    gather_rows = make_gather(plan.layout, by_column=False)
    gather_columns = make_gather(plan.other_layout, by_column=True)

    @plgpu.inline_mgpu()
    def wait_for_copies(_: Any) -> None:
        lane = MosaicLane(warpgroups * WARPGROUP)
        lane.commit_copies()
        lane.wait_for_copies(0)

    @plgpu.inline_mgpu(arg_types=(plain, tile_type(plan.columns), plain, *[scalar] * 6))
    def store_rows(_: Any, words: Any, tile: Any, out: Any, *scalars: Any) -> None:
        lane = MosaicLane(warpgroups * WARPGROUP)
        values = (I32(lane, x.registers.item()) for x in scalars)
        number, batch, n, words_slot, slot, count = values
        row_bytes = 2 * plan.columns
        batch_bytes = plan.layout.num_tokens * plan.heads * row_bytes
        target = lane.global_pointer(out, writable=True).at(number, plan.batch * batch_bytes)
        scatter(
            lane,
            lane.shared_pointer(words).at(words_slot, 4 * TILE),
            lane.shared_pointer(tile).at(slot, TILE * row_bytes),
            target.at(batch, batch_bytes).at(n, row_bytes),
            count=count,
            columns=plan.columns,
            stride=plan.heads,
            layout=plan.layout,
        )

    num_products = 1 if plan.sums_rows else 2

    @plgpu.inline_mgpu(
        arg_types=(*[layout] * num_products, plain, *[row_layout] * 2),
        return_type=plgpu.ShapeDtypeStruct((TILE, TILE), dtype, layout=layout),
    )
    def weigh(_: Any, *args: Any) -> Any:
        lane = MosaicLane(warpgroups * WARPGROUP)
        (scores, *products), rest = args[:num_products], args[num_products:]
        scales, *rows = rest
        values = weights(
            lane,
            read_registers(lane, scores),
            read_registers(lane, *products) if products else None,
            [read_registers(lane, each) for each in rows],
            lane.shared_pointer(scales),
            chain,
        )
        return write_words(lane.pack(values, dtype), scores, dtype)

    def bucket_sums(
        tokens: Any,
        rows: Any,
        words: Any,
        lengths: Any,
        other_tokens: Any,
        other_rows: Any,
        other_words: Any,
        scales: Any,
        ranges: Any,
        out: Any,
        token_tiles: Any,
        row_tiles: Any,
        length_tiles: Any,
        other_token_tiles: Any,
        other_row_tiles: Any,
        scale_tiles: Any,
        word_tiles: Any,
    ) -> None:
        own_tiles = row_tiles if plan.sums_rows else token_tiles
        summed_tiles = other_row_tiles if plan.sums_rows else other_token_tiles
        warpgroup = lax.axis_index("warpgroup")
        first_item = lax.axis_index("block") * warpgroups + warpgroup
        all_warpgroups = plan.blocks * warpgroups
        num_items = lax.div(plan.items - first_item + all_warpgroups - 1, all_warpgroups)
        # Of words: those of an item and of the next one; those of the first tile of the next
        # item's others; those of two tiles of the others.
        first_words = warpgroup * _WORD_TILES + 2

        def two(number: Any) -> Any:
            """The tile of this warpgroup that a number takes, in turns."""
            return warpgroup * 2 + lax.rem(number, 2)

        def item_words(number: Any) -> Any:
            return warpgroup * _WORD_TILES + lax.rem(number, 2)

        def step_words(slot: Any) -> Any:
            return warpgroup * _WORD_TILES + 3 + lax.rem(slot, 2)

        def places_of(number: Any) -> tuple[Any, ...]:
            item = first_item + jnp.minimum(number, num_items - 1) * all_warpgroups
            row, tile = lax.div(item, plan.layout.tiles), lax.rem(item, plan.layout.tiles)
            head = lax.div(row, plan.num_hashes)
            return row, tile, lax.div(head, plan.heads), lax.rem(head, plan.heads)

        def range_of(number: Any) -> tuple[Any, Any, Any, Any]:
            """Position and number of an item's own words, and first and end of the others."""
            row, tile, _, _ = places_of(number)
            mine, end, first, other_end = (ranges[row, tile, i] for i in range(4))
            count = jnp.where(number < num_items, jnp.minimum(end - mine, TILE), 0)
            return mine, count, first, jnp.where(count > 0, other_end, first)

        def load_words(number: Any, mine: Any, first: Any) -> None:
            row, _, _, _ = places_of(number)
            copy_row_words(words, word_tiles, row, item_words(number), mine)
            copy_column_words(other_words, word_tiles, row, first_words, first)

        def load_step(
            number: Any, first: Any, end: Any, step: Any, slot: Any, words_slot: Any
        ) -> None:
            """A tile of the others, whose words are there, and the words of the next one."""
            row, _, batch, n = places_of(number)
            gather_columns(
                word_tiles,
                other_tokens,
                other_rows,
                scales,
                other_token_tiles,
                other_row_tiles,
                scale_tiles,
                batch,
                n,
                words_slot,
                two(slot),
                end - first - step * TILE,
            )
            following = first + (step + 1) * TILE
            copy_column_words(other_words, word_tiles, row, step_words(slot + 1), following)

        def load_item(number: Any, count: Any, first: Any, end: Any, slot: Any) -> None:
            """The tokens of an item, whose words are there, and the first tile of the others."""

            @pl.when(count > 0)
            def _() -> None:
                _, _, batch, n = places_of(number)
                gather_rows(
                    word_tiles,
                    tokens,
                    rows,
                    lengths,
                    token_tiles,
                    row_tiles,
                    length_tiles,
                    batch,
                    n,
                    item_words(number),
                    two(number),
                    count,
                )

            @pl.when(end > first)
            def _() -> None:
                load_step(number, first, end, jnp.int32(0), slot, first_words)

        def wait() -> None:
            """All threads are done with the tiles before, and see what was loaded."""
            wait_for_copies()
            plgpu.commit_smem()

        def go(number: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            count, first, end, next_mine, next_count, next_first, next_end, slot = carry
            steps = lax.div(end - first + TILE - 1, TILE)
            later = range_of(number + 2)
            load_words(number + 1, next_mine, next_first)

            @pl.when(count > 0)
            def _() -> None:
                mine = two(number)
                length = plgpu.load(length_tiles.at[mine], layout=row_layout, optimized=False)
                row_values = tiles.row_values(length, chain)

                def add_up(sums: Any) -> Any:
                    @pl.loop(0, steps)
                    def _(step: Any) -> None:
                        other = two(slot + step)

                        def multiply(scores: Any, *products: Any) -> Any:
                            plgpu.wgmma(scores, token_tiles.at[mine], other_token_tiles.at[other].T)
                            for each in products:
                                plgpu.wgmma(each, row_tiles.at[mine], other_row_tiles.at[other].T)

                            @pl.when(step + 1 < steps)
                            def _() -> None:
                                following = slot + step + 1
                                words_slot = step_words(following)
                                load_step(number, first, end, step + 1, following, words_slot)

                            return scores[...], *(each[...] for each in products)

                        accumulator = plgpu.ACC((TILE, TILE), jnp.float32)
                        products = pl.run_scoped(multiply, *[accumulator] * num_products)
                        taken = weigh(
                            *products,
                            scale_tiles.at[other],
                            *row_values,
                        )
                        plgpu.wgmma(sums, taken, summed_tiles.at[other])
                        plgpu.wgmma_wait(0)
                        wait()

                    return sums[...]

                sums = pl.run_scoped(add_up, plgpu.ACC((TILE, plan.columns), jnp.float32))
                sums = sums * lax.broadcast_in_dim(1 / length, sums.shape, [0])
                own_tiles[mine] = sums.astype(dtype)

            pl.when(steps == 0)(wait)
            load_item(number + 1, next_count, next_first, next_end, slot + steps)

            @pl.when(count > 0)
            def _() -> None:
                row, _, batch, n = places_of(number)
                plgpu.commit_smem()
                hash_number = lax.rem(row, plan.num_hashes)
                mine = item_words(number), two(number)
                store_rows(word_tiles, own_tiles, out, hash_number, batch, n, *mine, count)

            wait()
            return next_count, next_first, next_end, *later, slot + steps

        @pl.when(num_items > 0)
        def _() -> None:
            zero = jnp.int32(0)
            mine, count, first, end = range_of(zero)
            following = range_of(zero + 1)
            load_words(zero, mine, first)
            wait()
            load_item(zero, count, first, end, zero)
            wait()
            lax.fori_loop(0, num_items, go, (count, first, end, *following, zero))

    swizzled = functools.partial(tiles.shared, dtype)
    side = [
        swizzled(2 * warpgroups, TILE, plan.head_dim),
        swizzled(2 * warpgroups, TILE, plan.value_dim),
        plgpu.SMEM((2 * warpgroups, TILE), jnp.float32),
    ]
    return plgpu.kernel(
        bucket_sums,
        out_type=jax.ShapeDtypeStruct(plan.out, dtype),
        scratch_types=[*side * 2, plgpu.SMEM((_WORD_TILES * warpgroups, TILE), jnp.int32)],
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
    )


def is_supported(
    query: Float[Array, "B T N H"], value: Float[Array, "B S N D"], bucket_bits: int
) -> bool:
    """Whether the kernels take these shapes and this dtype."""
    layouts = [Words(x.shape[1], bucket_bits) for x in (query, value)]
    if value.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    plan = _plan(query, value.shape[-1], *layouts, num_hashes=1, exponent=0, sums_rows=False)
    return plan.warpgroups > 0 and all(layout.is_supported for layout in layouts)


def bucketed_gradients(
    query_codes: Int[Array, "B N T hashes"],
    key_codes: Int[Array, "B N S hashes"],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    grad_out: Float[Array, "B T N D"],
    *,
    hash_code_len: int,
    bucket_bits: int,
    normalize: bool = False,
    dense: Callable[[], tuple[Array, Array]] | None = None,
    call: Call | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
    """As `xla.bucketed_gradients`, in the dtype of `value`.

    Args:
      query_codes: of the hashes to use; their lowest `bucket_bits` bits are the buckets.
      key_codes: the same of the keys.
      query: an array that `is_supported`.
      key: same dtype.
      value: same dtype.
      query_mask: True for the queries that attend, or None. What is in other rows is not used.
      key_mask: True for the keys to attend to, or None.
      grad_out: gradient of the result, same dtype.
      hash_code_len: bits of a hash, 1 to 16.
      bucket_bits: 0 to `hash_code_len`.
      normalize: whether the rows of the result were normalised, see `xla.orthogonal`.
      dense: computes the gradients of the expectation, which are taken where buckets are so uneven
        that they have as much work. Without it they are always those of the buckets.
      call: what runs the programs; the GPU by default.
    """
    if call is None:
        from yoso_jax.kernels.mosaic_gpu.lane_mosaic import call  # loads JAX's GPU dialects
    make_side = functools.partial(_make_side, bucket_bits=bucket_bits, call=call)
    queries = make_side(query_codes, query, grad_out, query_mask)
    keys = make_side(key_codes, key, value, key_mask)
    num_hashes = query_codes.shape[-1]
    arrays = query_codes, key_codes, query, key, value, query_mask, key_mask, grad_out
    starts = [sorting.find_buckets(x.words, x.layout, call=call) for x in (queries, keys)]
    ranges = [
        sorting.find_tiles(mine, others, side.layout, call=call)
        for side, mine, others in ((queries, *starts), (keys, *starts[::-1]))
    ]

    def sum_up(side: Side, other: Side, mine: Array, sums_rows: bool) -> Array:
        plan = _plan(
            side.tokens,
            side.rows.shape[-1],
            side.layout,
            other.layout,
            num_hashes=num_hashes,
            exponent=hash_code_len - bucket_bits,
            sums_rows=sums_rows,
        )
        return _kernel(plan, np.dtype(query.dtype))(
            side.tokens,
            side.rows,
            side.words,
            side.lengths,
            other.tokens,
            other.rows,
            other.words,
            -1 / other.lengths,
            mine,
        )

    def of_buckets() -> tuple[Array, Array]:
        mine = queries
        if normalize:
            # Whatever the lengths of queries, that they are divided by: only directions matter.
            values = sum_up(queries, keys, ranges[0], True)
            # As `xla.orthogonal`.
            rows = tangents(queries.rows[None], values, query_mask, call=call)
            mine = dataclasses.replace(queries, rows=rows)
        sides = (mine, keys, query, query_mask), (keys, mine, key, key_mask)
        grads = []
        for (side, other, x, mask), found in zip(sides, ranges, strict=True):
            grad = tangents(
                sum_up(side, other, found, False),
                side.tokens[None],
                mask,
                # Weights have the sign of the scales.
                factor=-hash_code_len / 2 / num_hashes,
                call=call,
            )
            # Both branches of the choice below need the same types.
            grads.append(vary_like(grad[..., : x.shape[-1]], *arrays))
        return grads[0], grads[1]

    if dense is None:
        return of_buckets()
    # A tile of one side's sums and a tile of both in `dense` take about the same time.
    others = jnp.concatenate([(r[..., 3] - r[..., 2]).reshape(-1) for r in ranges])
    pairs = vary_like(jnp.sum(-(-others // TILE), dtype=jnp.float32), *arrays)
    heads = query.shape[0] * query.shape[2]
    all_pairs = heads * math.prod(-(-x.shape[1] // TILE) for x in (query, key))
    return lax.cond(pairs > all_pairs, dense, of_buckets)


def _plan(
    tokens: Array,
    value_dim: int,
    layout: Words,
    other_layout: Words,
    *,
    num_hashes: int,
    exponent: int,
    sums_rows: bool,
) -> Plan:
    batch, _, heads, head_dim = tokens.shape
    return Plan(
        batch=batch,
        heads=heads,
        num_hashes=num_hashes,
        head_dim=-(-head_dim // 16) * 16,
        value_dim=-(-value_dim // 16) * 16,
        exponent=exponent,
        sums_rows=sums_rows,
        layout=layout,
        other_layout=other_layout,
    )


def _make_side(
    codes: Array, tokens: Array, rows: Array, mask: Array | None, *, bucket_bits: int, call: Call
) -> Side:
    num_tokens = codes.shape[2]
    layout = Words(num_tokens, bucket_bits)
    buckets = jnp.swapaxes(codes, 2, 3).astype(jnp.int32) & (layout.nowhere - 1)
    if mask is not None:
        buckets = jnp.where(mask[:, None, None, :], buckets, layout.nowhere)
    words = layout.make(buckets.reshape(-1, num_tokens))
    return Side(
        _pad_columns(tokens),
        _pad_columns(rows),
        tiles.token_lengths(tokens),
        sorting.sort(words, layout, call=call),
        layout,
    )


def _pad_columns(x: Array) -> Array:
    return jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[-1] % 16)])
