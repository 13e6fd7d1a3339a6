"""Hash codes from projections on tensor cores, arranged for the cumulation kernels.

A block of threads keeps a head's projection, or some groups of eight hashes of it, in shared
memory, and its warpgroups take tiles of 64 tokens in turn. A warpgroup multiplies its tile by a few
groups at a time; each thread then packs the signs of what it holds and writes finished codes, so
that projected tokens never reach memory.

In the result of a warpgroup's matrix product, thread l of a warp holds the columns `8 * j + 2 * q`
and `8 * j + 2 * q + 1` for all j, where `q = l % 4`, of two rows. The columns of each group are
permuted so that these are all the bits of hashes `2 * q` and `2 * q + 1`: threads exchange nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt16

from yoso_jax.kernels.mosaic_gpu import layout
from yoso_jax.kernels.mosaic_gpu.lane import (
    F32,
    I32,
    WARPGROUP,
    GlobalPointer,
    Lane,
    SharedPointer,
)
from yoso_jax.kernels.mosaic_gpu.swizzling import swizzle_bytes, tile_offset

MAX_HASHES = 128
MAX_HEAD_DIM = 256

TILE = 64
"""Tokens of a tile: the rows of a warpgroup's matrix product."""

# Streaming multiprocessors of an H100 or H200; each runs one block at a time.
_MULTIPROCESSORS = 132
# What Hopper lends a block, less barriers and scratch space of the compiler.
_SHARED_BYTES = 224 * 1024
_MAX_WARPGROUPS = 4
# Two tiles for each warpgroup leave at least this part of the shared memory to projections.
_MAX_TILE_BYTES = 128 * 1024
# Wider products would not fit into the 128 registers that a thread of four warpgroups has.
_MAX_COLUMNS = 192
# What starting a block costs, in the time of a round: a tile for each of its warpgroups.
_START_ROUNDS = 1
# Bytes of a token's codes for a group of hashes.
_CODES_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of a hash and how its work is cut.

    Attributes:
      heads: batch rows times heads.
      num_tokens: tokens of a head, T.
      head_dim: length of a token, H, an even number.
      num_hashes: number of hashes.
      hash_code_len: bits of a code.
      filler: code of the hashes that fill up the last group.
    """

    heads: int
    num_tokens: int
    head_dim: int
    num_hashes: int
    hash_code_len: int
    filler: int

    @property
    def groups(self) -> int:
        """Groups of eight hashes."""
        return layout.num_groups(self.num_hashes)

    @property
    def group_columns(self) -> int:
        """Columns of the projection for a group."""
        return layout.HASHES * self.hash_code_len

    @property
    def padded_dim(self) -> int:
        """Length of a token in shared memory, a multiple of 16."""
        return -(-self.head_dim // 16) * 16

    @property
    def row_bytes(self) -> int:
        """Bytes of a token in shared memory, and of a column of the projection."""
        return 2 * self.padded_dim

    @property
    def has_whole_tiles(self) -> bool:
        """Whether tiles can be loaded by one instruction of the hardware (TMA).

        It reads zeros beyond the end, but only from whole groups of eight rows.
        """
        is_long = self.num_tokens >= TILE
        return is_long and self.num_tokens % 8 == 0 and self.head_dim == self.padded_dim

    @property
    def swizzle(self) -> int:
        """Bytes of the swizzled rows of the tiles of shared memory."""
        return swizzle_bytes(self.row_bytes)

    @property
    def num_warpgroups(self) -> int:
        """Warpgroups of a block."""
        return min(_MAX_WARPGROUPS, _MAX_TILE_BYTES // (2 * TILE * self.row_bytes))

    @property
    def block_groups(self) -> int:
        """Groups of a block: the largest divisor of their number that fits."""
        free = _SHARED_BYTES - 2 * self.num_warpgroups * TILE * self.row_bytes
        return _largest_divisor(self.groups, free // (self.group_columns * self.row_bytes))

    @property
    def chunks(self) -> int:
        """Blocks among which the groups are divided."""
        return self.groups // self.block_groups

    @property
    def step_groups(self) -> int:
        """Groups of a matrix product."""
        return _largest_divisor(self.block_groups, _MAX_COLUMNS // self.group_columns)

    @property
    def tiles(self) -> int:
        """Tiles of a head."""
        return -(-self.num_tokens // TILE)

    @property
    def block_tiles(self) -> int:
        """Tiles of a block, so that all blocks finish first; the last of a head may have fewer."""
        heads, tiles, warpgroups = self.heads * self.chunks, self.tiles, self.num_warpgroups

        def time(rounds: int) -> int:
            blocks = heads * -(-tiles // (rounds * warpgroups))
            return -(-blocks // _MULTIPROCESSORS) * (rounds + _START_ROUNDS)

        return min(range(-(-tiles // warpgroups), 0, -1), key=time) * warpgroups

    @property
    def splits(self) -> int:
        """Blocks among which the tokens of a head are divided."""
        return -(-self.tiles // self.block_tiles)

    @property
    def num_blocks(self) -> int:
        """Blocks of threads."""
        return self.heads * self.splits * self.chunks


def _largest_divisor(number: int, most: int) -> int:
    return next(i for i in range(min(number, most), 0, -1) if number % i == 0)


def arrange_projection(
    projection: Float[Array, "heads H columns"], plan: Plan
) -> Float[Array, "heads arranged {plan.padded_dim}"]:
    """The rows are what the columns of a matrix product are to be, negated.

    A bit is then the sign bit of its product: set where the projection is greater than zero. It is
    not set where the projection is zero, since a sum that starts from +0 is never -0.
    """
    heads, size, columns = projection.shape
    fill = [(0, 0), (0, plan.padded_dim - size), (0, plan.groups * plan.group_columns - columns)]
    # Of a group: the thread q, then its bits of two hashes as pairs of neighbours.
    shape = (heads, plan.padded_dim, plan.groups, 4, plan.hash_code_len, 2)
    rows = jnp.pad(-projection, fill).reshape(shape).transpose(0, 2, 4, 3, 5, 1)
    return rows.reshape(heads, -1, plan.padded_dim)


def copy_tile(
    lane: Lane,
    tokens: GlobalPointer,
    tile: SharedPointer,
    *,
    first_token: I32,
    stride: int,
    plan: Plan,
) -> None:
    """Starts to copy a tile into the arrangement that matrix products read.

    Args:
      lane: a thread of a warpgroup.
      tokens: to a head's first token.
      tile: to the tile, aligned to 1024 bytes. Beyond the end of a row nothing is written.
      first_token: the token of the first row. Rows beyond the last token repeat it.
      stride: bytes from a token to the next.
      plan: shapes.
    """
    size = math.gcd(2 * plan.head_dim, 16)
    pieces = 2 * plan.head_dim // size

    def copy(i: I32) -> None:
        row, byte = i // pieces, i % pieces * size
        token = lane.minimum(first_token + row, plan.num_tokens - 1)
        offset = tile_offset(row, byte, row_bytes=plan.row_bytes)
        tile.at(offset).start_copy(tokens.at(token, stride).at(byte, 1), size)

    thread = lane.thread_id() & (WARPGROUP - 1)
    lane.fori_loop(thread, TILE * pieces, copy, step=WARPGROUP)


def clear_tiles(lane: Lane, tiles: SharedPointer, plan: Plan) -> None:
    """Sets the two tiles of a warpgroup to zero, for what is beyond the end of rows."""
    zeros = [lane.i32(0)] * 4
    lane.fori_loop(
        lane.thread_id() & (WARPGROUP - 1),
        2 * TILE * plan.row_bytes // 16,
        lambda i: tiles.at(i, 16).store(zeros),
        step=WARPGROUP,
    )


def store_codes(
    lane: Lane,
    products: Sequence[F32],
    codes: GlobalPointer,
    *,
    first_group: I32,
    first_token: I32,
    plan: Plan,
) -> None:
    """Packs the signs of a tile's products into codes and stores them.

    Args:
      lane: a thread.
      products: what it holds of a matrix product, `[groups, hash_code_len, 2, 2]` flattened: a pair
        of columns in each of two rows, the rows `r` and `r + 8` with `r = thread // 4 % 8` of the
        warp's 16.
      codes: to a head's codes.
      first_group: the first of the groups.
      first_token: the token of the tile's first row, a multiple of 64.
      plan: shapes.
    """
    bits, group_bytes = plan.hash_code_len, plan.num_tokens * _CODES_BYTES
    scale = layout.code_scale(bits)
    thread = lane.thread_id() & (WARPGROUP - 1)
    quad, row = thread & 3, (thread >> 2) & 7
    token = first_token + (thread >> 5) * 16 + row
    # The place of slot s is `s ^ (token & 7)`, and `token & 7` is `row`: a pair of slots stays in
    # one word, exchanged in odd rows.
    word = codes.at(first_group, group_bytes).at(token, _CODES_BYTES).at(quad ^ (row >> 1), 4)
    odd = (row & 1) != 0

    def store(half: int) -> None:
        for group in range(len(products) // (4 * bits)):
            start = group * 4 * bits
            pairs = [products[start + i : start + i + 2] for i in range(2 * half, 4 * bits, 4)]
            values = [value for pair in pairs for value in pair]
            entries = []
            for i in range(2):
                slot = quad * 2 + i
                code = _pack_signs(lane, values[i * bits : (i + 1) * bits])
                if plan.num_hashes % layout.HASHES:
                    hash_index = (first_group + group) * layout.HASHES + slot
                    code = lane.select(hash_index < plan.num_hashes, code, lane.i32(plan.filler))
                entries.append((code * layout.HASHES + slot) * scale)
            low, high = entries
            packed = lane.select(odd, high | (low << 16), low | (high << 16))
            word.at(group, group_bytes).store([packed], 8 * half * _CODES_BYTES)

    for half in range(2):
        if plan.num_tokens % TILE:
            with lane.when(token + 8 * half < plan.num_tokens):
                store(half)
        else:
            store(half)


def _pack_signs(lane: Lane, values: Sequence[F32]) -> I32:
    """The sign bits, the first value's in bit 0; a funnel shift for each."""
    code = lane.i32(0)
    for value in reversed(values):
        code = (code << 1) | lane.shift_right_logical(lane.bitcast_i32(value), 31)
    return code


def _kernel(plan: Plan, dtype: np.dtype, num_heads: int) -> Callable[..., Array]:
    """The kernel of tokens `[B, T, N, H]` and an arranged projection."""
    # These load JAX's GPU dialects.
    from jax._src.lib.mlir.dialects import vector
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from yoso_jax.kernels.mosaic_gpu.lane_mosaic import MosaicLane

    warpgroups, groups = plan.num_warpgroups, plan.block_groups
    columns = groups * plan.group_columns
    step_columns = plan.step_groups * plan.group_columns
    chunks, splits, block_tiles = plan.chunks, plan.splits, plan.block_tiles
    scalar = plgpu.Layout.WG_SPLAT(())
    transforms = (
        plgpu.TilingTransform((8, plan.swizzle // 2)),
        plgpu.SwizzleTransform(plan.swizzle),
    )

    def tile_pointer(lane: MosaicLane, tiles: Any, number: I32) -> SharedPointer:
        return lane.shared_pointer(tiles).at(number, TILE * plan.row_bytes)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), scalar))
    def clear(_: Any, tiles: Any, slot: Any) -> None:
        lane = MosaicLane(warpgroups * WARPGROUP)
        clear_tiles(lane, tile_pointer(lane, tiles, I32(lane, slot.registers.item())), plan)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(transforms), scalar, scalar, scalar, scalar)
    )
    def copy(_: Any, x: Any, tiles: Any, *scalars: Any) -> None:
        lane = MosaicLane(warpgroups * WARPGROUP)
        slot, batch, n, token = (I32(lane, x.registers.item()) for x in scalars)
        stride = 2 * num_heads * plan.head_dim
        tokens = lane.global_pointer(x, writable=False)
        tokens = tokens.at(batch, plan.num_tokens * stride).at(n, 2 * plan.head_dim)
        tile = tile_pointer(lane, tiles, slot)
        copy_tile(lane, tokens, tile, first_token=token, stride=stride, plan=plan)

    @plgpu.inline_mgpu()
    def wait_for_copies(_: Any) -> None:
        lane = MosaicLane(warpgroups * WARPGROUP)
        lane.commit_copies()
        lane.wait_for_copies(0)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), scalar, scalar, scalar))
    def epilogue(_: Any, products: Any, codes: Any, *scalars: Any) -> None:
        lane = MosaicLane(warpgroups * WARPGROUP)
        head, group, token = (I32(lane, x.registers.item()) for x in scalars)
        values = [
            F32(lane, vector.extract(pair, [], [i]))
            for pair in products.registers.reshape(-1)
            for i in range(2)
        ]
        pointer = lane.global_pointer(codes, writable=True)
        pointer = pointer.at(head, plan.groups * plan.num_tokens * _CODES_BYTES)
        store_codes(lane, values, pointer, first_group=group, first_token=token, plan=plan)

    def hash_tokens(
        x: Any, rows: Any, codes: Any, tiles: Any, projection: Any, loaded: Any, projected: Any
    ) -> None:
        warpgroup = lax.axis_index("warpgroup")
        # The number of the block comes from JAX: vmap adds an axis to the grid of the hardware.
        # Neighbouring blocks share tokens, then a projection.
        block = lax.axis_index("block")
        chunk, block = lax.rem(block, chunks), lax.div(block, chunks)
        head, split = lax.div(block, splits), lax.rem(block, splits)
        first_tile = split * block_tiles + warpgroup
        last_tile = jnp.minimum((split + 1) * block_tiles, plan.tiles)
        rounds = lax.div(last_tile - first_tile + warpgroups - 1, warpgroups)

        def load(i: Any) -> None:
            slot = warpgroup * 2 + lax.rem(i, 2)
            token = (first_tile + i * warpgroups) * TILE
            batch, n = lax.div(head, num_heads), lax.rem(head, num_heads)
            if plan.has_whole_tiles:
                tile = x.at[batch, pl.ds(token, TILE), n]
                plgpu.copy_gmem_to_smem(tile, tiles.at[slot], loaded.at[slot])
            else:
                copy(x, tiles, slot, batch, n, token)

        @pl.when(warpgroup == 0)
        def _() -> None:
            mine = rows.at[head, pl.ds(chunk * columns, columns)]
            plgpu.copy_gmem_to_smem(mine, projection, projected)

        if plan.head_dim != plan.padded_dim:
            clear(tiles, warpgroup * 2)
            plgpu.commit_smem()

        @pl.when(rounds > 0)
        def _() -> None:
            load(jnp.int32(0))

        plgpu.barrier_wait(projected)

        @pl.loop(0, rounds)
        def _(i: Any) -> None:
            slot = warpgroup * 2 + lax.rem(i, 2)

            def load_next() -> None:
                pl.when(i + 1 < rounds)(lambda: load(i + 1))

            if plan.has_whole_tiles:
                load_next()
                plgpu.barrier_wait(loaded.at[slot])
            else:
                wait_for_copies()
                # Only then are all threads of the warpgroup done with the tile before this one.
                plgpu.commit_smem()
                load_next()

            # A loop that stays one: unrolled products would wait for each other and spill.
            @pl.loop(0, groups // plan.step_groups)
            def _(step: Any) -> None:
                def multiply(accumulator: Any) -> Any:
                    start = pl.multiple_of(step * step_columns, 8)
                    mine = projection.at[pl.ds(start, step_columns)]
                    plgpu.wgmma(accumulator, tiles.at[slot], mine.T)
                    return accumulator[...]

                products = pl.run_scoped(multiply, plgpu.ACC((TILE, step_columns), jnp.float32))
                group = chunk * groups + step * plan.step_groups
                token = (first_tile + i * warpgroups) * TILE
                epilogue(products, codes, head, group, token)

    return plgpu.kernel(
        hash_tokens,
        out_type=jax.ShapeDtypeStruct(
            (plan.heads, plan.groups, plan.num_tokens, layout.HASHES), jnp.uint16
        ),
        scratch_types=[
            plgpu.SMEM((2 * warpgroups, TILE, plan.padded_dim), dtype, transforms=transforms),
            plgpu.SMEM((columns, plan.padded_dim), dtype, transforms=transforms),
            plgpu.Barrier(num_barriers=2 * warpgroups),
            plgpu.Barrier(),
        ],
        grid=(plan.num_blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
    )


def hash_tokens(
    x: Float[Array, "B T N H"],
    projection: Float[Array, "B N H columns"],
    *,
    hash_code_len: int,
    filler: int,
) -> UInt16[Array, "heads groups T 8"]:
    """Arranged codes of `x @ projection`, with float32 sums.

    Args:
      x: tokens, bfloat16 or float16. H is 1 to 256; only if it is odd is the array copied.
      projection: of each head, in the dtype of `x`; column `h * hash_code_len + i` is bit i of hash
        h.
      hash_code_len: bits of a code, 1 to 12.
      filler: code of the hashes that fill up the last group, 0 or 1.

    Returns:
      `layout.arrange_codes` of `codes.hash_codes`, with `heads = B * N`. Projections within
      rounding of zero may differ in sign.

    Raises:
      NotImplementedError: the kernel cannot take this shape or dtype.
    """
    batch, num_tokens, num_heads, head_dim = x.shape
    num_hashes = projection.shape[-1] // hash_code_len
    for name, size, most in (
        ("hash_code_len", hash_code_len, layout.MAX_CODE_LEN),
        ("num_hashes", num_hashes, MAX_HASHES),
        ("the last dimension of x", head_dim, MAX_HEAD_DIM),
    ):
        if not 1 <= size <= most:
            raise NotImplementedError(f"{name} must be 1 to {most} for mosaic_gpu, got {size}.")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"x must be bfloat16 or float16 for mosaic_gpu's hash, got {x.dtype}."
        )
    if 0 in (batch, num_tokens, num_heads):
        raise NotImplementedError(f"mosaic_gpu needs at least one token, got {x.shape}.")
    if head_dim % 2:
        # Threads copy whole words.
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, 1)])
        projection = jnp.pad(projection, [(0, 0), (0, 0), (0, 1), (0, 0)])
        head_dim += 1
    plan = Plan(
        heads=batch * num_heads,
        num_tokens=num_tokens,
        head_dim=head_dim,
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
        filler=filler,
    )
    rows = arrange_projection(projection.reshape(plan.heads, head_dim, -1), plan)
    return _kernel(plan, np.dtype(x.dtype), num_heads)(x, rows)
