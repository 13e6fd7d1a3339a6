"""Gradients of `E v` on tensor cores, in memory linear in the tokens.

A block of threads keeps 64 keys and values for each of its compute warpgroups and goes through all
queries, which a warpgroup of its own loads with the gradients of their results (TMA). Then it takes
the next keys: there is one block a multiprocessor, and what is stored and loaded in between has
something beside it. Matrix
products are transposed: a row for each key. For a tile of queries each warpgroup evaluates the
collision probabilities once more, and sums up the gradients of its keys and values. For the
gradient of the queries each multiplies what all of them found with the keys, for a part of the
tile, and has the hardware add it to an array in memory: in any order, so that sums differ in their
last bits from run to run.

Without that array the result is the same in every run. The gradient of the queries is then that of
the keys with the roles exchanged.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from yoso_jax.kernels import blocked, xla
from yoso_jax.kernels.mosaic_gpu import expectation_tiles as tiles
from yoso_jax.kernels.mosaic_gpu.collision_chain import collision_chain
from yoso_jax.kernels.mosaic_gpu.expectation_hardware import Hopper, Interpreted
from yoso_jax.kernels.mosaic_gpu.expectation_tiles import ROWS
from yoso_jax.kernels.mosaic_gpu.tangents import tangents

# Columns of the gradients that a warpgroup has registers for.
_MAX_COLUMNS = 64
# What Hopper lends a block, less barriers and the scratch space of the compiler.
_SHARED_BYTES = 223 * 1024
_MAX_STAGES = 4
# Blocks that run at a time: one a multiprocessor.
_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of the gradients and how their work is cut.

    Attributes:
      batch: batch rows, B.
      heads: N.
      num_queries: T, a multiple of 8 and at least a tile.
      num_keys: S, a multiple of 8 and at least a tile.
      head_dim: H, a multiple of 16.
      value_dim: D, a multiple of 16.
      hash_code_len: bits of a code.
      part: which columns of the gradients: these times 64, up to 64 of them.
      has_key_mask: whether some keys may not be attended to.
      shift: what has shifts, which are added to the products of rows and gradients: the "rows" of a
        tile of products, its "columns", or nothing.
      with_query: whether the gradient of the queries is wanted.
      with_value: whether that of the values is wanted.
    """

    batch: int
    heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    value_dim: int
    hash_code_len: int
    part: int
    has_key_mask: bool
    shift: Literal["rows", "columns"] | None
    with_query: bool
    with_value: bool

    @property
    def parts(self) -> int:
        """Kernels that it takes for all columns."""
        widest = max(self.head_dim, self.value_dim if self.with_value else 0)
        return -(-widest // _MAX_COLUMNS)

    @property
    def key_columns(self) -> slice:
        """Columns of the gradients of queries and keys; perhaps none."""
        return self._columns(self.head_dim)

    @property
    def value_columns(self) -> slice:
        """Columns of the gradient of the values; perhaps none."""
        return self._columns(self.value_dim if self.with_value else 0)

    @property
    def key_width(self) -> int:
        """Number of columns of the gradients of queries and keys."""
        return self.key_columns.stop - self.key_columns.start

    @property
    def value_width(self) -> int:
        """Number of columns of the gradient of the values."""
        return self.value_columns.stop - self.value_columns.start

    def _columns(self, dim: int) -> slice:
        start = min(self.part * _MAX_COLUMNS, dim)
        return slice(start, min(start + _MAX_COLUMNS, dim))

    @property
    def warpgroups(self) -> int:
        """Compute warpgroups of a block."""
        return 2 if self.head_dim <= 64 and self.value_dim <= 64 else 1

    @property
    def block_keys(self) -> int:
        """Keys of a block, and queries of a tile."""
        return ROWS * self.warpgroups

    @property
    def piece(self) -> int:
        """Queries of a tile whose products are in registers at a time."""
        return ROWS if self.with_value else self.block_keys

    @property
    def key_blocks(self) -> int:
        """Times that a block takes keys of a head."""
        return -(-self.num_keys // self.block_keys)

    @property
    def num_items(self) -> int:
        """The same of all heads."""
        return self.batch * self.heads * self.key_blocks

    @property
    def blocks(self) -> int:
        """Blocks of threads."""
        return min(_MULTIPROCESSORS, self.num_items)

    @property
    def stages(self) -> int:
        """Tiles of queries in shared memory."""
        rows = self.block_keys
        token_bytes = 2 * (self.head_dim + self.value_dim)
        # Keys and values, and their gradients on the way out.
        used = rows * (token_bytes + 2 * (self.key_width + self.value_width))
        if self.with_query:
            # Unit keys, weights, and the gradient of the queries on the way out.
            used += rows * (2 * self.key_width + 2 * rows + 4 * self.key_width)
        numbers = 2 if self.shift == "columns" else 1
        return min(_MAX_STAGES, (_SHARED_BYTES - used) // (rows * (token_bytes + 4 * numbers)))


def _kernel(plan: Plan, dtype: np.dtype, interpret: bool) -> Callable[..., list[Array]]:
    """Of query, key, value, grad_out, what `_gradients` derives from them, and perhaps a Ref."""
    # These load JAX's GPU dialects.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    stages, warpgroups = plan.stages, plan.warpgroups
    tile = plan.block_keys
    key_width, value_width = plan.key_width, plan.value_width
    key_columns = pl.ds(plan.key_columns.start, key_width)
    value_columns = pl.ds(plan.value_columns.start, value_width)
    with_query = plan.with_query and key_width > 0
    layout = plgpu.Layout.WGMMA
    row = layout.reduce(1)
    chain = collision_chain(plan.hash_code_len)
    choice = Interpreted if interpret else Hopper
    hardware = choice(dtype, plan.piece, chain, warpgroups)

    def body(
        query: Any,
        key: Any,
        value: Any,
        grad_out: Any,
        scales: Any,
        ends: Any,
        *arrays_and_scratch: Any,
    ) -> None:
        refs = list(arrays_and_scratch)
        key_mask: Any = refs.pop(0) if plan.has_key_mask else None
        shifts: Any = refs.pop(0) if plan.shift else None
        grad_query: Any = refs.pop(0) if with_query else None
        grad_key: Any = refs.pop(0) if key_width else None
        grad_value: Any = refs.pop(0) if value_width else None
        key_tiles, value_tiles, query_tiles, grad_tiles, scale_tiles, *refs = refs
        shift_tiles: Any = refs.pop(0) if plan.shift == "columns" else None
        key_out: Any = refs.pop(0) if key_width and plan.parts == 1 else None
        value_out: Any = refs.pop(0) if value_width else None
        if with_query:
            unit_tile, weight_tile, query_out, written, read, *refs = refs
        *staging, keys_loaded, loaded, used = refs

        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        num_items = lax.div(plan.num_items - block + plan.blocks - 1, plan.blocks)

        def item(number: Any) -> tuple[Any, Any, Any, Any, Any]:
            """Its head, with batch row and number in that, its first key, and tiles of queries."""
            index = block + number * plan.blocks
            head, first_key = lax.div(index, plan.key_blocks), lax.rem(index, plan.key_blocks)
            first_key = first_key * plan.block_keys
            batch, n = lax.div(head, plan.heads), lax.rem(head, plan.heads)
            steps = lax.div(ends[2 * batch] + tile - 1, tile)
            steps = jnp.where(first_key < ends[2 * batch + 1], steps, 0)
            return head, batch, n, first_key, steps

        @pl.when(warpgroup == warpgroups)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def load_item(number: Any, first: Any) -> Any:
                head, batch, n, _, steps = item(number)

                @pl.loop(0, steps)
                def _(step: Any) -> None:
                    i, rows = lax.rem(first + step, stages), pl.ds(step * tile, tile)

                    @pl.when(first + step >= stages)
                    def _() -> None:
                        plgpu.barrier_wait(used.at[i])

                    for array, tiles_ in ((query, query_tiles), (grad_out, grad_tiles)):
                        here = array.at[batch, rows, n]
                        plgpu.copy_gmem_to_smem(here, tiles_.at[i], loaded.at[i])
                    plgpu.copy_gmem_to_smem(scales.at[head, rows], scale_tiles.at[i], loaded.at[i])
                    if shift_tiles is not None:
                        here = shifts.at[head, rows]
                        plgpu.copy_gmem_to_smem(here, shift_tiles.at[i], loaded.at[i])

                return first + steps

            total = lax.fori_loop(0, num_items, load_item, jnp.int32(0))
            hardware.observe(used, total - stages, total)

        @pl.when(warpgroup < warpgroups)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            own_rows = pl.ds(warpgroup * ROWS, ROWS)
            mine = key_tiles.at[warpgroup], value_tiles.at[warpgroup]

            def load_keys(number: Any) -> None:
                @pl.when(number < num_items)
                def _() -> None:
                    _, batch, n, first_key, _ = item(number)
                    rows = pl.ds(first_key + warpgroup * ROWS, ROWS)
                    for array, here in zip((key, value), mine, strict=True):
                        barrier = keys_loaded.at[warpgroup]
                        plgpu.copy_gmem_to_smem(array.at[batch, rows, n], here, barrier)

            def by_row(x: Any, width: int) -> Any:
                return lax.broadcast_in_dim(x, (ROWS, width), [0])

            def unit_keys(length: Any) -> Any:
                keys = plgpu.load(mine[0].at[:, key_columns], layout=layout)
                return keys.astype(jnp.float32) * by_row(1 / length, key_width)

            def add_query_gradient(head: Any, step: Any, count: Any) -> None:
                # Where the compiler knows that tiles are in one place, it keeps the descriptors of
                # their products in thirty registers, for which there is room without values.
                zero = jnp.minimum(count, 0) if value_width else 0
                plgpu.commit_smem()
                plgpu.barrier_arrive(written)
                plgpu.barrier_wait(written)

                def multiply(products: Any) -> Any:
                    plgpu.wgmma(products, weight_tile.at[zero, :, own_rows].T, unit_tile.at[zero])
                    return products[...]

                sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, key_width), jnp.float32))
                plgpu.barrier_arrive(read)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                query_out[warpgroup] = sums
                plgpu.commit_smem()
                hardware.add(
                    query_out.at[warpgroup],
                    grad_query.at[head, pl.ds(step * tile + warpgroup * ROWS, ROWS)],
                )

            def add_key_gradients(i: Any, rows: Any, sums: Any, row_values: Any) -> None:
                def multiply(scores: Any, products: Any) -> Any:
                    plgpu.wgmma(scores, mine[0], query_tiles.at[i, rows].T)
                    plgpu.wgmma(products, mine[1], grad_tiles.at[i, rows].T)
                    return scores[...], products[...]

                accumulator = plgpu.ACC((ROWS, plan.piece), jnp.float32)
                products = pl.run_scoped(multiply, accumulator, accumulator)
                columns = [scale_tiles.at[i, rows]]
                if shift_tiles is not None:
                    columns.append(shift_tiles.at[i, rows])
                taken, grads = hardware.weigh_gradients(products, columns, row_values)
                if value_width:
                    tokens = grad_tiles.at[i, rows, value_columns]
                    hardware.multiply(sums[-1], taken, tokens, staging)
                if key_width:
                    tokens = query_tiles.at[i, rows, key_columns]
                    hardware.multiply(sums[0], grads, tokens, staging)
                if with_query:
                    weight_tile[0, own_rows, rows] = grads

            def take_item(number: Any, first: Any) -> Any:
                head, batch, n, first_key, steps = item(number)
                rows = pl.ds(first_key + warpgroup * ROWS, ROWS)
                attends = None
                if key_mask is not None:
                    attends = plgpu.load(key_mask.at[batch, rows], layout=row, optimized=False) > 0
                plgpu.barrier_wait(keys_loaded.at[warpgroup])
                keys = plgpu.load(mine[0], layout=layout).astype(jnp.float32)
                length = tiles.lengths_of(jnp.sum(keys * keys, axis=1))
                row_values = tiles.row_values(length, chain)
                if plan.shift == "rows":
                    here = shifts.at[head, rows]
                    row_values.append(plgpu.load(here, layout=row, optimized=False))
                if with_query:

                    @pl.when(steps > 0)
                    def _() -> None:
                        # The other warpgroups are done with the keys before.
                        pl.when(first > 0)(lambda: plgpu.barrier_wait(read))
                        # For them these are ready when weights are.
                        unit_tile[0, own_rows, :] = unit_keys(length).astype(dtype)

                def go(*sums: Any) -> Any:
                    @pl.loop(0, steps)
                    def _(step: Any) -> None:
                        i = lax.rem(first + step, stages)
                        plgpu.barrier_wait(loaded.at[i])
                        if with_query:
                            pl.when(step > 0)(lambda: plgpu.barrier_wait(read))
                        for start in range(0, tile, plan.piece):
                            add_key_gradients(i, pl.ds(start, plan.piece), sums, row_values)
                        if with_query:
                            add_query_gradient(head, step, first + step)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(used.at[i])

                    return [each[...] for each in sums]

                accumulators = [
                    plgpu.ACC((ROWS, width), jnp.float32)
                    for width in (key_width, value_width)
                    if width
                ]
                sums = pl.run_scoped(go, *accumulators)
                unit = unit_keys(length) if key_width and plan.parts == 1 else None
                plgpu.commit_smem()
                load_keys(number + 1)
                # Results before are written.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if key_width:
                    # Weights have the sign of the scales.
                    total = sums[0] * np.float32(-plan.hash_code_len / 2)
                    total = total * by_row(1 / length, key_width)
                    if unit is not None:
                        # Only what is orthogonal to a key changes its direction.
                        along = jnp.sum(total * unit, axis=1)
                        total = total - by_row(along, key_width) * unit
                    if attends is not None:
                        total = jnp.where(by_row(attends, key_width), total, 0)
                    if plan.parts == 1:
                        key_out[warpgroup] = total.astype(dtype)
                    else:
                        grad_key[head, rows, :] = total
                if value_width:
                    total = sums[-1]
                    if attends is not None:
                        total = jnp.where(by_row(attends, value_width), total, 0)
                    value_out[warpgroup] = total.astype(dtype)
                plgpu.commit_smem()
                for staged, array in ((key_out, grad_key), (value_out, grad_value)):
                    if staged is not None:
                        plgpu.copy_smem_to_gmem(staged.at[warpgroup], array.at[batch, rows, n])
                return first + steps

            load_keys(jnp.int32(0))
            total = lax.fori_loop(0, num_items, take_item, jnp.int32(0))
            if with_query:
                hardware.observe(read, total - 1, total)
            plgpu.wait_smem_to_gmem(0)

    swizzled = functools.partial(tiles.shared, dtype)
    heads, keys = plan.batch * plan.heads, plan.key_blocks * plan.block_keys
    arrays = []
    if key_width and plan.parts == 1:
        shape = (plan.batch, plan.num_keys, plan.heads, key_width)
        arrays.append(jax.ShapeDtypeStruct(shape, dtype))
    elif key_width:
        arrays.append(jax.ShapeDtypeStruct((heads, keys, key_width), jnp.float32))
    if value_width:
        shape = (plan.batch, plan.num_keys, plan.heads, value_width)
        arrays.append(jax.ShapeDtypeStruct(shape, dtype))
    scratch = [
        swizzled(warpgroups, ROWS, plan.head_dim),
        swizzled(warpgroups, ROWS, plan.value_dim),
        swizzled(stages, tile, plan.head_dim),
        swizzled(stages, tile, plan.value_dim),
        plgpu.SMEM((stages, tile), jnp.float32),
    ]
    if plan.shift == "columns":
        scratch.append(plgpu.SMEM((stages, tile), jnp.float32))
    if key_width and plan.parts == 1:
        scratch.append(swizzled(warpgroups, ROWS, key_width))
    if value_width:
        scratch.append(swizzled(warpgroups, ROWS, value_width))
    if with_query:
        scratch += [
            swizzled(1, tile, key_width),
            # Of the same arrangement, as operands of one product.
            swizzled(1, tile, tile, size=tiles.swizzle(2 * key_width)),
            tiles.shared(np.dtype(np.float32), warpgroups, ROWS, key_width),
            plgpu.Barrier(num_arrivals=warpgroups),
            plgpu.Barrier(num_arrivals=warpgroups),
        ]
    return plgpu.kernel(
        body,
        out_type=arrays,
        scratch_types=[
            *scratch,
            *hardware.staging(),
            plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=4 if plan.shift == "columns" else 3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        ],
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        interpret=hardware.interpret,
    )


def gradients(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    grad_out: Float[Array, "B T N D"],
    shift: Float[Array, "B T N"] | None = None,
    *,
    hash_code_len: int,
    with_value: bool = True,
    deterministic: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"], Float[Array, "B S N D"] | None]:
    """Gradients of `expectation.attend` without normalisation, in the dtype of `value`.

    Those of query and key are the surrogate of `reference.surrogate_gradients`.

    Args:
      query: bfloat16 or float16; H is 1 to 256. What is copied: see `expectation.attend`.
      key: same dtype.
      value: same dtype; D is 1 to 256.
      query_mask: True for the queries that attend, or None.
      key_mask: True for the keys to attend to, or None.
      grad_out: gradient of the result, same dtype.
      shift: what is added to the products of `grad_out` with all values, or None. The gradient of
        value does not have it.
      hash_code_len: bits of a hash, 1 to 16.
      with_value: whether the gradient of value is wanted; it is None otherwise.
      deterministic: the same bits in every run, for two more matrix products of five.
      interpret: as of `expectation.attend`; not under `jax.jit`.
    """
    if interpret:
        from yoso_jax.kernels.mosaic_gpu.lane_numpy import call as run
    else:
        from yoso_jax.kernels.mosaic_gpu.lane_mosaic import call as run  # loads JAX's GPU dialects

    query, grad_out = xla.mask_tokens(query, query_mask), xla.mask_tokens(grad_out, query_mask)
    key, value = xla.mask_tokens(key, key_mask), xla.mask_tokens(value, key_mask)
    if shift is not None:
        shift = blocked.mask_rows(shift, query_mask)
    from_queries = _Side(query, grad_out, query_mask, shift)
    from_keys = _Side(key, value, key_mask)
    call = functools.partial(_gradients, hash_code_len=hash_code_len, interpret=interpret)
    if deterministic:
        grad_query, _, _ = call(from_keys, from_queries, with_query=False, with_value=False)
        grad_key, grad_value, _ = call(
            from_queries, from_keys, with_query=False, with_value=with_value
        )
        return grad_query, grad_key, grad_value
    grad_key, grad_value, sums = call(
        from_queries, from_keys, with_query=True, with_value=with_value
    )
    # The sums are divided by the lengths of queries already.
    (grad_query,) = tangents(
        sums[None],
        jnp.pad(query, [(0, 0)] * 3 + [(0, sums.shape[-1] - query.shape[-1])]),
        None,
        factor=-hash_code_len / 2,
        heads_first=True,
        call=run,
    )
    return grad_query[..., : query.shape[-1]], grad_key, grad_value


class _Side:
    """Queries with gradients of their results, or keys with values."""

    def __init__(
        self, tokens: Array, rows: Array, mask: Array | None, shift: Array | None = None
    ) -> None:
        self.tokens, self.rows, self.mask = tokens, rows, mask
        self.lengths = tiles.token_lengths(tokens)
        self.shifts = None
        if shift is not None:
            self.shifts = jnp.swapaxes(shift, 1, 2).reshape(-1, shift.shape[1])

    @property
    def by_token(self) -> Array:
        """Lengths, `[B, T, N]`."""
        return self.tokens_first(self.lengths)

    def tokens_first(self, x: Array) -> Array:
        """`[B * N, T, ...] to [B, T, N, ...]`, without padding."""
        batch, tokens, heads, _ = self.tokens.shape
        return jnp.swapaxes(x[:, :tokens].reshape(batch, heads, tokens, *x.shape[2:]), 1, 2)


def _gradients(
    queries: _Side,
    keys: _Side,
    *,
    hash_code_len: int,
    with_query: bool,
    with_value: bool,
    interpret: bool,
) -> tuple[Array, Any, Any]:
    """Gradients of the keys and of their values, and sums for `tangents` of the queries."""
    batch, num_keys, heads, head_dim = keys.tokens.shape
    value_dim = keys.rows.shape[-1]
    query, grad_out = tiles.pad(queries.tokens), tiles.pad(queries.rows)
    key, value = tiles.pad(keys.tokens), tiles.pad(keys.rows)
    plan = Plan(
        batch=batch,
        heads=heads,
        num_queries=query.shape[1],
        num_keys=key.shape[1],
        head_dim=key.shape[-1],
        value_dim=value.shape[-1],
        hash_code_len=hash_code_len,
        part=0,
        has_key_mask=keys.mask is not None,
        shift="columns"
        if queries.shifts is not None
        else "rows"
        if keys.shifts is not None
        else None,
        with_query=with_query,
        with_value=with_value,
    )
    padded_keys = plan.key_blocks * plan.block_keys
    padded_queries = -(-query.shape[1] // plan.block_keys) * plan.block_keys
    scales = -1 / queries.lengths
    derived = [
        tiles.in_column_order(tiles.pad_to(scales, padded_queries)),
        tiles.ends_of(queries.mask, queries.tokens, keys.mask, keys.tokens),
    ]
    if keys.mask is not None:
        derived.append(tiles.pad_to(keys.mask.astype(jnp.float32), padded_keys))
    if queries.shifts is not None:
        derived.append(tiles.in_column_order(tiles.pad_to(scales * queries.shifts, padded_queries)))
    elif keys.shifts is not None:
        derived.append(tiles.pad_to(keys.shifts, padded_keys))
    grad_keys, grad_values, sums = [], [], []
    for part in range(plan.parts):
        plan = dataclasses.replace(plan, part=part)
        arguments: list[Any] = [query, key, value, grad_out, *derived]
        total: Any = None
        if with_query and plan.key_width:
            shape = (batch * heads, padded_queries, plan.key_width)
            total = jax.new_ref(jnp.zeros(shape, jnp.float32))
            arguments.append(total)
        outputs = _kernel(plan, np.dtype(value.dtype), interpret)(*arguments)
        if plan.key_width:
            grad_keys.append(outputs.pop(0))
            if total is not None:
                sums.append(total[...])
        if plan.value_width:
            grad_values.append(outputs.pop(0))
    grad_key = jnp.concatenate(grad_keys, axis=-1)
    if plan.parts > 1:
        total = keys.tokens_first(grad_key)
        unit = key[:, :num_keys].astype(jnp.float32) / keys.by_token[..., None]
        grad_key = (total - jnp.sum(total * unit, axis=-1, keepdims=True) * unit).astype(key.dtype)
    grad_key = grad_key[:, :num_keys, :, :head_dim]
    grad_value = grad_query = None
    if with_value:
        grad_value = jnp.concatenate(grad_values, axis=-1)[:, :num_keys, :, :value_dim]
    if with_query:
        grad_query = jnp.concatenate(sums, axis=-1)
    return grad_key, grad_value, grad_query
