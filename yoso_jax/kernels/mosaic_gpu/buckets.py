"""Gradients of queries and keys from pairs that share a bucket, on tensor cores.

For a hash, queries and keys are sorted by bucket. A warpgroup takes up to 64 queries of a bucket
and goes through its keys, in tiles of 64, which its threads gather from where they are. Of a tile
it evaluates the weights (`docs/gradients.md`), and sums up the keys times weights. Behind the last
key of a bucket there are scales of zero, so that no weight counts. The rows of a hash go to the
places of their queries, and another kernel sums up the hashes. For the gradient of the keys the
roles are exchanged, so that every sum has one owner and its bits are the same in every run.

The same kernel, ended otherwise, sums up weights and products, of which the balance is made
(`effects`).

What is needed next is copied while the tensor cores and the arithmetic units are busy: first words,
which say where tokens are, then the tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.kernels.buckets import takes_all_pairs
from yoso_jax.kernels.mosaic_gpu import expectation_tiles as tiles
from yoso_jax.kernels.mosaic_gpu import sorting
from yoso_jax.kernels.mosaic_gpu.bucket_hardware import Hopper, Interpreted
from yoso_jax.kernels.mosaic_gpu.bucket_tiles import PARTS, WORD_TILES, Plan
from yoso_jax.kernels.mosaic_gpu.collision_chain import collision_chain
from yoso_jax.kernels.mosaic_gpu.lane import Call
from yoso_jax.kernels.mosaic_gpu.sorting import TILE, Words
from yoso_jax.kernels.mosaic_gpu.tangents import tangents


@dataclasses.dataclass(frozen=True)
class Side:
    """Tokens whose gradients are wanted, or the tokens that they are sums of.

    Attributes:
      tokens: `[B, T, N, H]`.
      rows: `[B, T, N, D]`, gradients of the results of queries, or values of keys.
      mask: True for those that take part, or None.
      lengths: `[B * N, T]`, from `tiles.token_lengths`.
      words: `[B * N * hashes, length]`, sorted.
      layout: of the words.
    """

    tokens: Array
    rows: Array
    mask: Array | None
    lengths: Array
    words: Array
    layout: Words


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Queries and keys sorted by bucket.

    Attributes:
      queries: with the rows that multiply values.
      keys: with values.
      query_ranges: of the tiles of queries, from `sorting.find_tiles`.
      key_ranges: of the tiles of keys.
      num_hashes: of the words.
      exponent: bits of a hash that say nothing of the bucket.
    """

    queries: Side
    keys: Side
    query_ranges: Array
    key_ranges: Array
    num_hashes: int
    exponent: int


def _kernel(plan: Plan, dtype: np.dtype, interpret: bool) -> Callable[..., Array]:
    """Of tokens, rows, words and numbers of both sides, and ranges."""
    # These load JAX's GPU dialects.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    warpgroups = plan.warpgroups
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    chain = collision_chain(plan.exponent)
    hardware = (Interpreted if interpret else Hopper)(plan, dtype, chain)

    def bucket_sums(
        tokens: Any,
        rows: Any,
        words: Any,
        numbers: Any,
        other_tokens: Any,
        other_rows: Any,
        other_words: Any,
        other_numbers: Any,
        ranges: Any,
        out: Any,
        token_tiles: Any,
        row_tiles: Any,
        number_tiles: Any,
        other_token_tiles: Any,
        other_row_tiles: Any,
        other_number_tiles: Any,
        word_tiles: Any,
        *staging: Any,
    ) -> None:
        mean_tiles = staging[0] if plan.means else None
        copy_words = hardware.copy_words
        warpgroup = lax.axis_index("warpgroup")
        first_item = lax.axis_index("block") * warpgroups + warpgroup
        all_warpgroups = plan.blocks * warpgroups
        num_items = lax.div(plan.items - first_item + all_warpgroups - 1, all_warpgroups)
        # Of words: those of an item and of the next one; those of the first tile of the next
        # item's others; those of two tiles of the others.
        first_words = warpgroup * WORD_TILES + 2

        def two(number: Any) -> Any:
            """The tile of this warpgroup that a number takes, in turns."""
            return warpgroup * 2 + lax.rem(number, 2)

        def item_words(number: Any) -> Any:
            return warpgroup * WORD_TILES + lax.rem(number, 2)

        def step_words(slot: Any) -> Any:
            return warpgroup * WORD_TILES + 3 + lax.rem(slot, 2)

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
            copy_words(plan.layout, words, word_tiles, row, item_words(number), mine)
            copy_words(plan.other_layout, other_words, word_tiles, row, first_words, first)

        def load_step(
            number: Any, first: Any, end: Any, step: Any, slot: Any, words_slot: Any
        ) -> None:
            """A tile of the others, whose words are there, and the words of the next one."""
            row, _, batch, n = places_of(number)
            hardware.gather(
                plan.other_layout,
                (other_tokens, other_rows, other_numbers),
                (other_token_tiles, other_row_tiles, other_number_tiles),
                word_tiles,
                (batch, n, words_slot, two(slot), end - first - step * TILE),
                by_column=True,
            )
            following = first + (step + 1) * TILE
            next_words = step_words(slot + 1)
            copy_words(plan.other_layout, other_words, word_tiles, row, next_words, following)

        def load_item(number: Any, count: Any, first: Any, end: Any, slot: Any) -> None:
            """The tokens of an item, whose words are there, and the first tile of the others."""

            @pl.when(count > 0)
            def _() -> None:
                _, _, batch, n = places_of(number)
                hardware.gather(
                    plan.layout,
                    (tokens, rows, numbers),
                    (token_tiles, row_tiles, number_tiles),
                    word_tiles,
                    (batch, n, item_words(number), two(number), count),
                    by_column=False,
                )

            @pl.when(end > first)
            def _() -> None:
                load_step(number, first, end, jnp.int32(0), slot, first_words)

        def wait() -> None:
            """All threads are done with the tiles before, and see what was loaded."""
            hardware.wait_for_copies()
            plgpu.commit_smem()

        def go(number: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            count, first, end, next_mine, next_count, next_first, next_end, slot = carry
            steps = lax.div(end - first + TILE - 1, TILE)
            later = range_of(number + 2)
            load_words(number + 1, next_mine, next_first)

            @pl.when(count > 0)
            def _() -> None:
                mine = two(number)
                length, *shifts = (
                    plgpu.load(number_tiles.at[mine, i], layout=row_layout, optimized=False)
                    for i in range(plan.own_numbers)
                )
                row_values = [*tiles.row_values(length, chain), *shifts]

                def products_of(step: Any) -> tuple[Any, Any]:
                    """Those of a tile of the others, and where it is; the next one is loaded."""
                    other = two(slot + step)

                    def multiply(scores: Any, products: Any) -> Any:
                        plgpu.wgmma(scores, token_tiles.at[mine], other_token_tiles.at[other].T)
                        plgpu.wgmma(products, row_tiles.at[mine], other_row_tiles.at[other].T)

                        @pl.when(step + 1 < steps)
                        def _() -> None:
                            following = slot + step + 1
                            words_slot = step_words(following)
                            load_step(number, first, end, step + 1, following, words_slot)

                        return scores[...], products[...]

                    accumulator = plgpu.ACC((TILE, TILE), jnp.float32)
                    return pl.run_scoped(multiply, accumulator, accumulator), other

                def add_up(sums: Any) -> Any:
                    @pl.loop(0, steps)
                    def _(step: Any) -> None:
                        products, other = products_of(step)
                        taken = hardware.weigh(products, other_number_tiles.at[other], row_values)
                        hardware.multiply(sums, taken, other_token_tiles.at[other], staging)
                        plgpu.wgmma_wait(0)
                        wait()

                    return sums[...]

                def add_to_means(step: Any, sums: Any) -> Any:
                    products, other = products_of(step)
                    columns = other_number_tiles.at[other]
                    sums = hardware.add_to_means(products, columns, row_values, sums)
                    wait()
                    return sums

                if mean_tiles is not None:
                    zeros = jnp.zeros((TILE, PARTS), jnp.float32)
                    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                    sums = lax.fori_loop(0, steps, add_to_means, (zeros, zeros))
                    for i in range(2):
                        mean_tiles[warpgroup, i] = jnp.sum(sums[i], axis=1)
                else:
                    sums = pl.run_scoped(add_up, plgpu.ACC((TILE, plan.head_dim), jnp.float32))
                    sums = sums * lax.broadcast_in_dim(1 / length, sums.shape, [0])
                    token_tiles[mine] = sums.astype(dtype)

            pl.when(steps == 0)(wait)
            load_item(number + 1, next_count, next_first, next_end, slot + steps)

            @pl.when(count > 0)
            def _() -> None:
                row, _, batch, n = places_of(number)
                plgpu.commit_smem()
                place = lax.rem(row, plan.num_hashes), batch, n, item_words(number)
                if mean_tiles is not None:
                    where = *place, warpgroup, count
                    hardware.store_numbers(word_tiles, mean_tiles, out, where)
                else:
                    hardware.store(word_tiles, token_tiles, out, (*place, two(number), count))

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

    def side(numbers: int) -> list[Any]:
        return [
            swizzled(2 * warpgroups, TILE, plan.head_dim),
            swizzled(2 * warpgroups, TILE, plan.value_dim),
            plgpu.SMEM((2 * warpgroups, numbers, TILE), jnp.float32),
        ]

    return plgpu.kernel(
        bucket_sums,
        out_type=jax.ShapeDtypeStruct(plan.out, jnp.float32 if plan.means else dtype),
        scratch_types=[
            *side(plan.own_numbers),
            *side(plan.other_numbers),
            plgpu.SMEM((WORD_TILES * warpgroups, TILE), jnp.int32),
            *([plgpu.SMEM((warpgroups, 2, TILE), jnp.float32)] if plan.means else []),
            *([] if plan.means else hardware.staging()),
        ],
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=hardware.interpret,
    )


def is_supported(
    query: Float[Array, "B T N H"], value: Float[Array, "B S N D"], bucket_bits: int
) -> bool:
    """Whether the kernels take these shapes and this dtype."""
    layouts = [Words(x.shape[1], bucket_bits) for x in (query, value)]
    if value.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    hashes = dict(num_hashes=1, exponent=0)
    plan = _plan(query, value.shape[-1], *layouts, **hashes, shift="rows", means=True)
    return plan.warpgroups > 0 and all(layout.is_supported for layout in layouts)


def find(
    query_codes: Int[Array, "B N T hashes"],
    key_codes: Int[Array, "B N S hashes"],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    rows: Float[Array, "B T N D"],
    *,
    hash_code_len: int,
    bucket_bits: int,
    call: Call | None = None,
) -> Buckets:
    """The tokens of each bucket.

    Args:
      query_codes: of the hashes to use; their lowest `bucket_bits` bits are the buckets.
      key_codes: the same of the keys.
      query: an array that `is_supported`.
      key: same dtype.
      value: same dtype.
      query_mask: True for the queries that attend, or None. What is in other rows is not used.
      key_mask: True for the keys to attend to, or None.
      rows: as of `xla.expected_gradients`, same dtype.
      hash_code_len: bits of a hash, 1 to 16.
      bucket_bits: 0 to `hash_code_len`.
      call: what runs the programs; the GPU by default.
    """
    call = call or _default_call()
    make_side = functools.partial(_make_side, bucket_bits=bucket_bits, call=call)
    queries = make_side(query_codes, query, rows, query_mask)
    keys = make_side(key_codes, key, value, key_mask)
    starts = [sorting.find_buckets(x.words, x.layout, call=call) for x in (queries, keys)]
    query_ranges, key_ranges = (
        sorting.find_tiles(mine, others, side.layout, call=call)
        for side, mine, others in ((queries, *starts), (keys, *starts[::-1]))
    )
    num_hashes = query_codes.shape[-1]
    exponent = hash_code_len - bucket_bits
    return Buckets(queries, keys, query_ranges, key_ranges, num_hashes, exponent)


def are_uneven(found: Buckets) -> Bool[Array, ""]:
    """Whether sums over the buckets take longer than those over all pairs."""
    tokens = found.query_ranges[..., 3] - found.query_ranges[..., 2]
    batch, num_queries, heads, _ = found.queries.tokens.shape
    return takes_all_pairs(
        jnp.sum(-(-tokens // TILE), dtype=jnp.float32),
        num_heads=batch * heads,
        num_queries=num_queries,
        num_keys=found.keys.tokens.shape[1],
    )


def means(
    found: Buckets, *, interpret: bool = False
) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
    """As `xla.bucket_means`.

    Args:
      found: from `find`.
      interpret: as of `gradients`.
    """
    queries, keys = found.queries, found.keys
    sums = _sum_up(
        found,
        (queries, [queries.lengths]),
        (keys, [-1 / keys.lengths, jnp.ones_like(keys.lengths)]),
        means=True,
        interpret=interpret,
    )
    batch, num_tokens, heads, _ = queries.tokens.shape
    sums = jnp.sum(sums, axis=0).reshape(batch, heads, 2, num_tokens)
    count, total = (jnp.swapaxes(sums[:, :, i], 1, 2) for i in range(2))
    if queries.mask is not None:  # nothing was stored for those
        count, total = (jnp.where(queries.mask[..., None], x, 0) for x in (count, total))
    return total / jnp.where(count > 0, count, 1), count / found.num_hashes


def gradients(
    found: Buckets,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    shift: Float[Array, "B T N"] | None,
    *,
    hash_code_len: int,
    call: Call | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"]]:
    """As `xla.bucketed_gradients`, in the dtype of the values.

    Args:
      found: from `find`, for these queries and keys.
      query: as of `find`.
      key: as of `find`.
      shift: as of `xla.expected_gradients`, float32 or None.
      hash_code_len: as of `find`.
      call: as of `find`.
      interpret: run the sums by Pallas' interpreter, which needs no GPU, and report races; with a
        `call` that needs none, either.
    """
    call = call or _default_call()
    queries, keys = found.queries, found.keys
    # Of the sums over keys, and of those over queries.
    own, others = ([queries.lengths], [keys.lengths]), ([-1 / keys.lengths], [-1 / queries.lengths])
    if shift is not None:
        shift = jnp.swapaxes(shift, 1, 2).reshape(queries.lengths.shape)
        own[0].append(shift)
        others[1].append(others[1][0] * shift)

    grads = []
    for x, mine, other, numbers, other_numbers in zip(
        (query, key), (queries, keys), (keys, queries), own, others, strict=True
    ):
        sums = _sum_up(
            found, (mine, numbers), (other, other_numbers), means=False, interpret=interpret
        )
        (grad,) = tangents(
            sums,
            mine.tokens,
            mine.mask,
            # Weights have the sign of the scales.
            factor=-hash_code_len / 2 / found.num_hashes,
            call=call,
        )
        grads.append(grad[..., : x.shape[-1]])
    return grads[0], grads[1]


def _sum_up(
    found: Buckets,
    mine: tuple[Side, list[Array]],
    others: tuple[Side, list[Array]],
    *,
    means: bool,
    interpret: bool,
) -> Array:
    """The kernel's sums of one side over the other, each with its numbers of tokens."""
    (side, numbers), (other, other_numbers) = mine, others
    is_queries = side is found.queries
    shift: Literal["rows", "columns"] | None = None
    if not means and len(numbers) + len(other_numbers) > 2:
        shift = "rows" if is_queries else "columns"
    plan = _plan(
        side.tokens,
        side.rows.shape[-1],
        side.layout,
        other.layout,
        num_hashes=found.num_hashes,
        exponent=found.exponent,
        shift=shift,
        means=means,
    )
    return _kernel(plan, np.dtype(side.tokens.dtype), interpret)(
        side.tokens,
        side.rows,
        side.words,
        jnp.stack(numbers, axis=1),
        other.tokens,
        other.rows,
        other.words,
        jnp.stack(other_numbers, axis=1),
        found.query_ranges if is_queries else found.key_ranges,
    )


def _plan(
    tokens: Array,
    value_dim: int,
    layout: Words,
    other_layout: Words,
    *,
    num_hashes: int,
    exponent: int,
    shift: Literal["rows", "columns"] | None,
    means: bool,
) -> Plan:
    batch, _, heads, head_dim = tokens.shape
    return Plan(
        batch=batch,
        heads=heads,
        num_hashes=num_hashes,
        head_dim=-(-head_dim // 16) * 16,
        value_dim=-(-value_dim // 16) * 16,
        exponent=exponent,
        shift=shift,
        means=means,
        layout=layout,
        other_layout=other_layout,
    )


def _make_side(
    codes: Array,
    tokens: Array,
    rows: Array,
    mask: Array | None,
    *,
    bucket_bits: int,
    call: Call,
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
        mask,
        tiles.token_lengths(tokens),
        sorting.sort(words, layout, call=call),
        layout,
    )


def _pad_columns(x: Array) -> Array:
    return jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[-1] % 16)])


def _default_call() -> Call:
    from yoso_jax.kernels.mosaic_gpu.lane_mosaic import call  # loads JAX's GPU dialects

    return call
