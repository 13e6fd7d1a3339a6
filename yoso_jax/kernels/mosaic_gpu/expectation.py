"""`E v` on tensor cores: exact collision probabilities by tiles, in memory linear in the tokens.

A block of threads takes 64 queries of a head for each of its compute warpgroups and goes through
all keys, which a warpgroup of its own loads with their values (TMA); then it takes other queries,
perhaps of another head. A compute warpgroup multiplies its queries with a tile of keys. While it
evaluates the probabilities of these, it multiplies those of the tile before with values.

There is a block for each multiprocessor: what the next queries need is loaded while the last
results are written, and warpgroups do not wait for each other to begin.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.kernels import xla
from yoso_jax.kernels.mosaic_gpu import expectation_tiles as tiles
from yoso_jax.kernels.mosaic_gpu.collision_chain import collision_chain, evaluate
from yoso_jax.kernels.mosaic_gpu.expectation_hardware import Hopper, Interpreted
from yoso_jax.kernels.mosaic_gpu.expectation_tiles import ROWS

# What Hopper lends a block, less barriers and the scratch space of the compiler.
_SHARED_BYTES = 223 * 1024
_MAX_STAGES = 4
# Rows are divided by no less.
_EPS = 1e-12
# Of an H100 or H200.
_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of an attention and how its work is cut.

    Attributes:
      batch: batch rows, B.
      heads: N.
      num_queries: T, a multiple of 8 and at least a tile.
      num_keys: S, a multiple of 8 and at least a tile.
      head_dim: H, a multiple of 16.
      value_dim: D, a multiple of 16.
      hash_code_len: bits of a code.
      has_query_mask: whether some queries may not attend.
      normalize: whether rows of the result are normalised, and their norms another result.
      count: whether rows are divided by the sums of their probabilities, and these another
        result; not with `normalize`.
    """

    batch: int
    heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    value_dim: int
    hash_code_len: int
    has_query_mask: bool
    normalize: bool
    count: bool = False

    @property
    def block_keys(self) -> int:
        """Keys of a tile: what registers are there for."""
        return 128 if self.value_dim <= 128 and self.head_dim + self.value_dim <= 256 else 64

    @property
    def warpgroups(self) -> int:
        """Compute warpgroups of a block."""
        if self.head_dim <= 64 and self.value_dim <= 64:
            return 3
        return 2 if self.head_dim + self.value_dim <= 384 else 1

    @property
    def units(self) -> int:
        """Warpgroups that the queries of a head are for."""
        return -(-self.num_queries // ROWS)

    @property
    def items(self) -> tuple[int, int]:
        """Into how many pieces the queries of a head are cut: whole ones, one unit shorter ones.

        The last unit alone would take a block as long as a whole piece.
        """
        short = -self.units % self.warpgroups
        whole = (self.units - short * (self.warpgroups - 1)) // self.warpgroups
        if whole < 0:
            return 0, -(-self.units // (self.warpgroups - 1))
        return whole, short

    @property
    def num_items(self) -> int:
        """Pieces of all heads."""
        return self.batch * self.heads * sum(self.items)

    @property
    def num_blocks(self) -> int:
        """Blocks, each of which takes a piece after another."""
        return min(_MULTIPROCESSORS, self.num_items)

    @property
    def stages(self) -> int:
        """Tiles of keys and values in shared memory."""
        token_bytes = 2 * (self.head_dim + self.value_dim)
        free = _SHARED_BYTES - ROWS * self.warpgroups * token_bytes
        return min(_MAX_STAGES, free // (self.block_keys * (token_bytes + 4)))


def _kernel(plan: Plan, dtype: np.dtype, interpret: bool) -> Callable[..., list[Array]]:
    """Of query, key, value, key scales, ends and perhaps a mask of queries."""
    # These load JAX's GPU dialects.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    keys, stages, warpgroups = plan.block_keys, plan.stages, plan.warpgroups
    row = plgpu.Layout.WGMMA.reduce(1)
    chain = collision_chain(plan.hash_code_len)
    hardware = (Interpreted if interpret else Hopper)(dtype, keys, chain, warpgroups)

    def attend(
        query: Any,
        key: Any,
        value: Any,
        scales: Any,
        ends: Any,
        *results_and_scratch: Any,
    ) -> None:
        refs = list(results_and_scratch)
        query_mask = refs.pop(0) if plan.has_query_mask else None
        out = refs.pop(0)
        numbers = refs.pop(0) if plan.normalize or plan.count else None
        query_tiles, out_tiles, number_tiles, key_tiles, scale_tiles, value_tiles, *rest = refs
        *staging, query_loaded, key_loaded, value_loaded, key_used, value_used = rest
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        num_items = lax.div(plan.num_items - block + plan.num_blocks - 1, plan.num_blocks)

        def item(number: Any) -> tuple[Any, Any, Any, Any]:
            """Head, unit of the first warpgroup, units and tiles of keys of a block's item."""
            whole, short = plan.items
            i = block + number * plan.num_blocks
            # The short ones come last, when some blocks have nothing else to do.
            j = i - plan.batch * plan.heads * whole
            is_whole = j < 0
            head = jnp.where(is_whole, lax.div(i, max(whole, 1)), lax.div(j, max(short, 1)))
            place = jnp.where(is_whole, lax.rem(i, max(whole, 1)), lax.rem(j, max(short, 1)))
            size = jnp.where(is_whole, warpgroups, max(warpgroups - 1, 1))
            unit = place * size + jnp.where(is_whole, 0, whole * warpgroups)
            batch = lax.div(head, plan.heads)
            # At least one, of zeros if nothing takes part: a result must be written.
            steps = jnp.maximum(lax.div(ends[2 * batch + 1] + keys - 1, keys), 1)
            steps = jnp.where(unit * ROWS < ends[2 * batch], steps, 1)
            return head, unit, jnp.minimum(size, plan.units - unit), steps

        @pl.when(warpgroup == warpgroups)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def load_item(number: Any, first: Any) -> Any:
                head, _, _, steps = item(number)
                batch, n = lax.div(head, plan.heads), lax.rem(head, plan.heads)

                @pl.loop(0, steps)
                def _(step: Any) -> None:
                    i, rows = lax.rem(first + step, stages), pl.ds(step * keys, keys)
                    refill = first + step >= stages

                    @pl.when(refill)
                    def _() -> None:
                        plgpu.barrier_wait(key_used.at[i])

                    loaded = key_loaded.at[i]
                    plgpu.copy_gmem_to_smem(key.at[batch, rows, n], key_tiles.at[i], loaded)
                    plgpu.copy_gmem_to_smem(scales.at[head, rows], scale_tiles.at[i], loaded)

                    @pl.when(refill)
                    def _() -> None:
                        plgpu.barrier_wait(value_used.at[i])

                    plgpu.copy_gmem_to_smem(
                        value.at[batch, rows, n], value_tiles.at[i], value_loaded.at[i]
                    )

                return first + steps

            steps = lax.fori_loop(0, num_items, load_item, jnp.int32(0))
            hardware.observe(key_used, steps - stages, steps)
            hardware.observe(value_used, steps - stages, steps)

        @pl.when(warpgroup < warpgroups)
        def _() -> None:
            plgpu.set_max_registers(160 if warpgroups == 3 else 240, action="increase")
            mine = query_tiles.at[warpgroup]

            def load_queries(number: Any) -> None:
                head, unit, units, _ = item(jnp.minimum(number, num_items - 1))
                batch, n = lax.div(head, plan.heads), lax.rem(head, plan.heads)

                @pl.when((number < num_items) & (warpgroup < units))
                def _() -> None:
                    rows = pl.ds((unit + warpgroup) * ROWS, ROWS)
                    loaded = query_loaded.at[warpgroup]
                    plgpu.copy_gmem_to_smem(query.at[batch, rows, n], mine, loaded)

            def attend_item(number: Any, head: Any, unit: Any, steps: Any, first: Any) -> None:
                batch, n = lax.div(head, plan.heads), lax.rem(head, plan.heads)
                rows = pl.ds((unit + warpgroup) * ROWS, ROWS)
                attends = None
                if query_mask is not None:
                    attends = plgpu.load(query_mask.at[batch, rows], layout=row, optimized=False)
                    attends = attends > 0
                plgpu.barrier_wait(query_loaded.at[warpgroup])
                queries = plgpu.load(mine, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                lengths = tiles.lengths_of(jnp.sum(queries * queries, axis=1))
                row_values = tiles.row_values(lengths, chain)

                def go(sums: Any) -> Any:
                    def add(step: Any, taken: Any) -> None:
                        i = lax.rem(first + step, stages)
                        plgpu.barrier_wait(value_loaded.at[i])
                        hardware.multiply(sums, taken, value_tiles.at[i], staging)

                    def take(step: Any, taken: Any) -> Any:
                        """The weights of a tile; those before are multiplied with values."""
                        i = lax.rem(first + step, jnp.int32(stages))
                        before, count = taken

                        def multiply(scores: Any) -> Any:
                            plgpu.wgmma(scores, mine, key_tiles.at[i].T)
                            if before is None:
                                return scores[...]
                            add(step - 1, before)
                            return plgpu.wgmma_accumulator_load(scores, wait_n=1)

                        plgpu.barrier_wait(key_loaded.at[i])
                        scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, keys), jnp.float32))
                        weights = hardware.weigh(scores, scale_tiles.at[i], row_values)
                        if plan.count:
                            more = jnp.sum(weights, axis=1)
                            count = more if count is None else count + more
                        plgpu.barrier_arrive(key_used.at[i])
                        if before is not None:
                            # In registers of the weights before, so not earlier.
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(value_used.at[lax.rem(first + step - 1, stages)])
                        return weights.astype(dtype), count

                    start = take(jnp.int32(0), (None, None))
                    taken, count = lax.fori_loop(1, steps, take, start)
                    load_queries(number + 1)
                    add(steps - 1, taken)
                    return sums[...], count

                sums, count = pl.run_scoped(go, plgpu.ACC((ROWS, plan.value_dim), jnp.float32))
                plgpu.barrier_arrive(value_used.at[lax.rem(first + steps - 1, stages)])
                # Results before are written.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if plan.normalize:
                    norm = jnp.sqrt(jnp.sum(sums * sums, axis=1))
                    norm = norm if attends is None else jnp.where(attends, norm, 0)
                    number_tiles[warpgroup] = norm
                    factor = 1 / jnp.maximum(norm, _EPS)
                    sums = sums * lax.broadcast_in_dim(factor, sums.shape, [0])
                if plan.count:
                    number_tiles[warpgroup] = count
                    factor = 1 / jnp.maximum(count, _EPS)
                    sums = sums * lax.broadcast_in_dim(factor, sums.shape, [0])
                if attends is not None:
                    sums = jnp.where(lax.broadcast_in_dim(attends, sums.shape, [0]), sums, 0)
                out_tiles[warpgroup] = sums.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_tiles.at[warpgroup], out.at[batch, rows, n])
                if numbers is not None:
                    plgpu.copy_smem_to_gmem(number_tiles.at[warpgroup], numbers.at[head, rows])

            def pass_item(number: Any, steps: Any, first: Any) -> None:
                """What others wait for, of a warpgroup that has no queries."""
                load_queries(number + 1)

                @pl.loop(0, steps)
                def _(step: Any) -> None:
                    i = lax.rem(first + step, stages)
                    for loaded, used in ((key_loaded, key_used), (value_loaded, value_used)):
                        plgpu.barrier_wait(loaded.at[i])
                        plgpu.barrier_arrive(used.at[i])

            def take_item(number: Any, first: Any) -> Any:
                head, unit, units, steps = item(number)

                @pl.when(warpgroup < units)
                def _() -> None:
                    attend_item(number, head, unit, steps, first)

                @pl.when(warpgroup >= units)
                def _() -> None:
                    pass_item(number, steps, first)

                return first + steps

            load_queries(jnp.int32(0))
            lax.fori_loop(0, num_items, take_item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    heads = plan.batch * plan.heads
    queries = plan.units * ROWS
    out = jax.ShapeDtypeStruct((plan.batch, plan.num_queries, plan.heads, plan.value_dim), dtype)
    numbers = jax.ShapeDtypeStruct((heads, queries), jnp.float32)
    return plgpu.kernel(
        attend,
        out_type=[out, numbers] if plan.normalize or plan.count else [out],
        scratch_types=[
            tiles.shared(dtype, warpgroups, ROWS, plan.head_dim),
            tiles.shared(dtype, warpgroups, ROWS, plan.value_dim),
            plgpu.SMEM((warpgroups, ROWS), jnp.float32),
            tiles.shared(dtype, stages, keys, plan.head_dim),
            plgpu.SMEM((stages, keys), jnp.float32),
            tiles.shared(dtype, stages, keys, plan.value_dim),
            *hardware.staging(),
            plgpu.Barrier(num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        ],
        grid=(plan.num_blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        interpret=hardware.interpret,
    )


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    *,
    hash_code_len: int,
    normalize: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """`E v` with zero rows for masked queries and without masked keys.

    Args:
      query: bfloat16 or float16; H is 1 to 256. Arrays whose H or D is no multiple of 16, or whose
        tokens are no multiple of 8, are copied.
      key: same dtype.
      value: same dtype; D is 1 to 256.
      query_mask: True for the queries that attend, or None.
      key_mask: True for the keys to attend to, or None. With a mask keys and values are copied.
      hash_code_len: bits of a hash, 1 to 16.
      normalize: divide each row by its l2 norm.
      interpret: run on a CPU, to check all but the instructions of a GPU. XLA must have threads for
        five warpgroups that wait, say by `NPROC=16` in the environment.

    Returns:
      The rows, in the dtype of `value`, and with `normalize` what their norms were before, float32.
    """
    out, norm, _ = _run(
        query,
        key,
        value,
        query_mask,
        key_mask,
        hash_code_len=hash_code_len,
        normalize=normalize,
        count=False,
        interpret=interpret,
    )
    return out, norm if normalize else None


def means(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    rows: Float[Array, "B T N D"],
    *,
    hash_code_len: int,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
    """As `xla.bucket_means` over all pairs, whatever the hashes.

    Args:
      query: as of `attend`, like all that are not named here.
      key: as of `attend`.
      value: as of `attend`.
      query_mask: as of `attend`.
      key_mask: as of `attend`.
      rows: what each query multiplies values with.
      hash_code_len: as of `attend`.
      interpret: as of `attend`.
    """
    out, divisor, visited = _run(
        query,
        key,
        value,
        query_mask,
        key_mask,
        hash_code_len=hash_code_len,
        normalize=False,
        count=True,
        interpret=interpret,
    )
    # Keys that do not take part are zeros, at right angles to every query.
    valid = value.shape[1] if key_mask is None else jnp.sum(key_mask, axis=1)
    zeros = (visited - valid).astype(jnp.float32)[:, None, None]
    count = divisor - zeros * evaluate(collision_chain(hash_code_len), jnp.float32(0))
    exists = count > _EPS
    if query_mask is not None:
        exists &= query_mask[..., None]
    # Fused with the transposition that follows, sums take four times as long.
    mean = lax.optimization_barrier(
        jnp.sum(out.astype(jnp.float32) * rows.astype(jnp.float32), axis=-1)
    )
    return jnp.where(exists, mean * divisor / count, 0), jnp.where(exists, count, 0)


def _run(
    query: Array,
    key: Array,
    value: Array,
    query_mask: Array | None,
    key_mask: Array | None,
    *,
    hash_code_len: int,
    normalize: bool,
    count: bool,
    interpret: bool,
) -> tuple[Array, Any, Int[Array, " B"]]:
    """The rows, their norms or counts if asked for, and how many keys a query met in its tiles."""
    batch, num_queries, heads, _ = query.shape
    num_keys, value_dim = value.shape[1], value.shape[-1]
    ends = tiles.ends_of(query_mask, query, key_mask, key)
    key, value = xla.mask_tokens(key, key_mask), xla.mask_tokens(value, key_mask)
    scales = -1 / tiles.token_lengths(key)
    query, key, value = tiles.pad(query), tiles.pad(key), tiles.pad(value)
    plan = Plan(
        batch=batch,
        heads=heads,
        num_queries=query.shape[1],
        num_keys=key.shape[1],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        hash_code_len=hash_code_len,
        has_query_mask=query_mask is not None,
        normalize=normalize,
        count=count,
    )
    scales = tiles.pad_to(scales, -(-num_keys // plan.block_keys) * plan.block_keys)
    scales = tiles.in_column_order(scales)
    kernel = _kernel(plan, np.dtype(value.dtype), interpret)
    arguments = [query, key, value, scales, ends]
    if query_mask is not None:
        arguments.append(tiles.pad_to(query_mask.astype(jnp.float32), plan.units * ROWS))
    out, *numbers = kernel(*arguments)
    numbers = [
        jnp.swapaxes(x[:, :num_queries].reshape(batch, heads, num_queries), 1, 2) for x in numbers
    ]
    visited = jnp.maximum(-(-ends[1::2] // plan.block_keys), 1) * plan.block_keys
    return out[:, :num_queries, :, :value_dim], numbers[0] if numbers else None, visited
