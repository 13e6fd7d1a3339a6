"""`E v` on tensor cores: exact collision probabilities by tiles, in memory linear in the tokens.

A block of threads takes 64 queries for each of its compute warpgroups and goes through all keys,
which a warpgroup of its own loads with their values (TMA). A compute warpgroup multiplies its
queries with a tile of keys while it multiplies the probabilities of the tile before with values;
then it evaluates the probabilities of this tile while others multiply.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from yoso_jax.kernels import xla
from yoso_jax.kernels.mosaic_gpu import expectation_tiles as tiles
from yoso_jax.kernels.mosaic_gpu.collision_polynomial import collision_polynomial
from yoso_jax.kernels.mosaic_gpu.expectation_hardware import Hopper, Interpreted
from yoso_jax.kernels.mosaic_gpu.expectation_tiles import ROWS

# What Hopper lends a block, less barriers and the scratch space of the compiler.
_SHARED_BYTES = 223 * 1024
_MAX_STAGES = 4
# Rows are divided by no less.
_EPS = 1e-12


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
      normalize: whether rows of the result are normalised.
    """

    batch: int
    heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    value_dim: int
    hash_code_len: int
    normalize: bool

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
    def block_queries(self) -> int:
        """Queries of a block."""
        return ROWS * self.warpgroups

    @property
    def query_blocks(self) -> int:
        """Blocks of a head."""
        return -(-self.num_queries // self.block_queries)

    @property
    def stages(self) -> int:
        """Tiles of keys and values in shared memory."""
        token_bytes = 2 * (self.head_dim + self.value_dim)
        free = _SHARED_BYTES - self.block_queries * token_bytes
        return min(_MAX_STAGES, free // (self.block_keys * (token_bytes + 4)))


def _kernel(plan: Plan, dtype: np.dtype, interpret: bool) -> Callable[..., list[Array]]:
    """Of query, key, value, query lengths, key scales and ends."""
    # These load JAX's GPU dialects.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    keys, stages, warpgroups = plan.block_keys, plan.stages, plan.warpgroups
    row = plgpu.Layout.WGMMA.reduce(1)
    polynomial = collision_polynomial(plan.hash_code_len)
    hardware = (Interpreted if interpret else Hopper)(dtype, keys, polynomial, warpgroups)

    def attend(
        query: Any,
        key: Any,
        value: Any,
        lengths: Any,
        scales: Any,
        ends: Any,
        out: Any,
        *refs: Any,
    ) -> None:
        norms, refs = (refs[0], refs[1:]) if plan.normalize else (None, refs)
        query_tiles, out_tiles, norm_tiles, key_tiles, scale_tiles, value_tiles, *rest = refs
        *staging, query_loaded, key_loaded, value_loaded, key_used, value_used = rest
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        head, block = lax.div(block, plan.query_blocks), lax.rem(block, plan.query_blocks)
        batch, n = lax.div(head, plan.heads), lax.rem(head, plan.heads)
        first_query = block * plan.block_queries
        # At least one, of zeros if nothing takes part: a result must be written.
        steps = jnp.maximum(lax.div(ends[2 * batch + 1] + keys - 1, keys), 1)
        steps = jnp.where(first_query < ends[2 * batch], steps, 1)

        @pl.when(warpgroup == warpgroups)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")

            @pl.loop(0, steps)
            def _(step: Any) -> None:
                i, rows = lax.rem(step, stages), pl.ds(step * keys, keys)

                @pl.when(step >= stages)
                def _() -> None:
                    plgpu.barrier_wait(key_used.at[i])

                plgpu.copy_gmem_to_smem(key.at[batch, rows, n], key_tiles.at[i], key_loaded.at[i])
                plgpu.copy_gmem_to_smem(scales.at[head, rows], scale_tiles.at[i], key_loaded.at[i])

                @pl.when(step >= stages)
                def _() -> None:
                    plgpu.barrier_wait(value_used.at[i])

                plgpu.copy_gmem_to_smem(
                    value.at[batch, rows, n], value_tiles.at[i], value_loaded.at[i]
                )

            hardware.observe(key_used, steps - stages, steps)
            hardware.observe(value_used, steps - stages, steps - 1)

        @pl.when(warpgroup < warpgroups)
        def _() -> None:
            plgpu.set_max_registers(160 if warpgroups == 3 else 240, action="increase")
            rows = pl.ds(first_query + warpgroup * ROWS, ROWS)
            mine = query_tiles.at[warpgroup]
            plgpu.copy_gmem_to_smem(query.at[batch, rows, n], mine, query_loaded.at[warpgroup])
            length = plgpu.load(lengths.at[head, rows], layout=row, optimized=False)
            attends = length > 0
            length = jnp.where(attends, length, 1)
            row_values = tiles.row_values(length, polynomial)
            plgpu.barrier_wait(query_loaded.at[warpgroup])

            def go(sums: Any) -> Any:
                def add(step: Any, taken: Any) -> None:
                    hardware.multiply(sums, taken, value_tiles.at[lax.rem(step, stages)], staging)

                def take(step: Any, before: Any) -> Any:
                    """The weights of a tile; those before are multiplied with values."""
                    i = lax.rem(step, jnp.int32(stages))

                    def multiply(scores: Any) -> Any:
                        if before is not None:
                            add(step - 1, before)
                        plgpu.wgmma(scores, mine, key_tiles.at[i].T)
                        return scores[...]

                    plgpu.barrier_wait(key_loaded.at[i])
                    if before is not None:
                        plgpu.barrier_wait(value_loaded.at[lax.rem(step - 1, stages)])
                    scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, keys), jnp.float32))
                    if before is not None:
                        plgpu.barrier_arrive(value_used.at[lax.rem(step - 1, stages)])
                    taken = hardware.weigh(scores, scale_tiles.at[i], row_values)
                    plgpu.barrier_arrive(key_used.at[i])
                    return taken

                taken = lax.fori_loop(1, steps, take, take(jnp.int32(0), None))
                plgpu.barrier_wait(value_loaded.at[lax.rem(steps - 1, stages)])
                add(steps - 1, taken)
                return sums[...]

            sums = pl.run_scoped(go, plgpu.ACC((ROWS, plan.value_dim), jnp.float32))
            if plan.normalize:
                norm = jnp.where(attends, jnp.sqrt(jnp.sum(sums * sums, axis=1)), 0)
                norm_tiles[warpgroup] = norm
                factor = 1 / jnp.maximum(norm, _EPS)
                sums = sums * lax.broadcast_in_dim(factor, sums.shape, [0])
            sums = jnp.where(lax.broadcast_in_dim(attends, sums.shape, [0]), sums, 0)
            out_tiles[warpgroup] = sums.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tiles.at[warpgroup], out.at[batch, rows, n])
            if norms is not None:
                plgpu.copy_smem_to_gmem(norm_tiles.at[warpgroup], norms.at[head, rows])
            plgpu.wait_smem_to_gmem(0)

    heads = plan.batch * plan.heads
    queries = plan.query_blocks * plan.block_queries
    out = jax.ShapeDtypeStruct((plan.batch, plan.num_queries, plan.heads, plan.value_dim), dtype)
    norms = jax.ShapeDtypeStruct((heads, queries), jnp.float32)
    return plgpu.kernel(
        attend,
        out_type=[out, norms] if plan.normalize else [out],
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
        grid=(heads * plan.query_blocks,),
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
    batch, num_queries, heads, _ = query.shape
    num_keys, value_dim = value.shape[1], value.shape[-1]
    ends = tiles.ends_of(query_mask, query, key_mask, key)
    key, value = xla.mask_tokens(key, key_mask), xla.mask_tokens(value, key_mask)
    lengths = tiles.masked_lengths(tiles.token_lengths(query), query_mask, heads)
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
        normalize=normalize,
    )
    lengths = tiles.pad_to(lengths, plan.query_blocks * plan.block_queries)
    scales = tiles.pad_to(scales, -(-num_keys // plan.block_keys) * plan.block_keys)
    kernel = _kernel(plan, np.dtype(value.dtype), interpret)
    out, *norms = kernel(query, key, value, lengths, scales, ends)
    out = out[:, :num_queries, :, :value_dim]
    if not normalize:
        return out, None
    norm = norms[0][:, :num_queries].reshape(batch, heads, num_queries)
    return out, jnp.swapaxes(norm, 1, 2)
