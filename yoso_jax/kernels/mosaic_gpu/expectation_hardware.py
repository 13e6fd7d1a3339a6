"""What the expectation kernels leave to the hardware, and the same for a machine without a GPU.

Pallas' interpreter runs kernels on a CPU: blocks and their warpgroups, barriers, copies with their
edges, and matrix products of shared memory. It has neither code of single threads nor products of
registers. In their place are array operations, and copies in shared memory.
"""

import abc
import dataclasses
from typing import Any, override

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from yoso_jax.kernels.mosaic_gpu import expectation_tiles as tiles
from yoso_jax.kernels.mosaic_gpu.collision_chain import Chain
from yoso_jax.kernels.mosaic_gpu.expectation_tiles import ROWS
from yoso_jax.kernels.mosaic_gpu.lane import I32, WARPGROUP

# Methods import what loads JAX's GPU dialects.


@dataclasses.dataclass(frozen=True)
class Hardware(abc.ABC):
    """Operations of a compute warpgroup, on tiles of its rows.

    Attributes:
      dtype: of probabilities, bfloat16 or float16.
      columns: of a tile of probabilities.
      chain: the probability of a distance.
      warpgroups: compute warpgroups of a block.
    """

    dtype: np.dtype
    columns: int
    chain: Chain
    warpgroups: int

    @property
    @abc.abstractmethod
    def interpret(self) -> Any:
        """How Pallas interprets the kernel, or None."""

    @abc.abstractmethod
    def staging(self) -> list[Any]:
        """Types of the shared memory that `multiply` takes."""

    @abc.abstractmethod
    def weigh(self, scores: Any, scales: Any, row_values: list[Array]) -> Any:
        """Probabilities, float32.

        Args:
          scores: q.k, float32.
          scales: Ref to the float32 -1 / |k| of the columns, `tiles.in_column_order`, in shared
            memory.
          row_values: what `expectation_tiles.row_values` gives.
        """

    @abc.abstractmethod
    def weigh_gradients(
        self, products: tuple[Any, Any], columns: list[Any], row_values: list[Array]
    ) -> tuple[Any, Any]:
        """Probabilities, and these times products of rows and the scales of their columns.

        Args:
          products: q.k, and those of rows.
          columns: Ref to the scales, as in `weigh`, and perhaps one to shifts times these scales:
            then these are added to the products of rows, times scales.
          row_values: as in `weigh`, and perhaps shifts of the rows.
        """

    @abc.abstractmethod
    def multiply(self, sums: Any, weights: Any, tile: Any, staging: list[Any]) -> None:
        """Adds the product of weights and a tile in shared memory to an accumulator."""

    @abc.abstractmethod
    def add(self, rows: Any, sums: Any) -> None:
        """Begins to add float32 rows in shared memory to others in global memory."""

    @abc.abstractmethod
    def observe(self, barriers: Any, first: Array, last: Array) -> None:
        """Waits for the arrivals at a barrier, or at barriers that steps take in turn.

        For those of the steps `first` to `last - 1`, but none before 0. The interpreter wants each
        arrival to be waited for; a GPU does not, when a kernel ends.
        """


class Hopper(Hardware):
    """A GPU."""

    @property
    @override
    def interpret(self) -> Any:
        return None

    @override
    def staging(self) -> list[Any]:
        return []

    @override
    def weigh(self, scores: Any, scales: Any, row_values: list[Array]) -> Any:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        from yoso_jax.kernels.mosaic_gpu.lane_mosaic import MosaicLane
        from yoso_jax.kernels.mosaic_gpu.registers import read_registers, write_registers

        layout = plgpu.Layout.WGMMA

        @plgpu.inline_mgpu(
            arg_types=(layout, plgpu.RefType(), *[layout.reduce(1)] * len(row_values)),
            return_type=plgpu.ShapeDtypeStruct((ROWS, self.columns), jnp.float32, layout=layout),
        )
        def weigh(_: Any, scores: Any, scales: Any, *row_arrays: Any) -> Any:
            lane = MosaicLane((self.warpgroups + 1) * WARPGROUP)
            pieces = tiles.probabilities(
                lane,
                read_registers(lane, scores),
                [read_registers(lane, each) for each in row_arrays],
                lane.shared_pointer(scales),
                self.chain,
            )
            return write_registers([x for piece, _ in pieces for x in piece], scores)

        return weigh(scores, scales, *row_values)

    @override
    def weigh_gradients(
        self, products: tuple[Any, Any], columns: list[Any], row_values: list[Array]
    ) -> tuple[Any, Any]:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        from yoso_jax.kernels.mosaic_gpu.lane_mosaic import MosaicLane
        from yoso_jax.kernels.mosaic_gpu.registers import read_registers, write_words

        layout = plgpu.Layout.WGMMA
        shape = plgpu.ShapeDtypeStruct((ROWS, self.columns), self.dtype, layout=layout)
        refs, of_rows = [plgpu.RefType()] * len(columns), [layout.reduce(1)] * len(row_values)

        @plgpu.inline_mgpu(arg_types=(layout, layout, *refs, *of_rows), return_type=(shape, shape))
        def weigh(_: Any, scores: Any, products: Any, *args: Any) -> tuple[Any, Any]:
            lane = MosaicLane((self.warpgroups + 1) * WARPGROUP)
            scales, *shifts = (lane.shared_pointer(each) for each in args[: len(refs)])
            rows = [read_registers(lane, each) for each in args[len(refs) :]]
            row_values, row_shifts = rows[:2], rows[2:]
            others = read_registers(lane, products)
            words: tuple[list[I32], list[I32]] = ([], [])
            first = 0
            for weights, scale in tiles.probabilities(
                lane, read_registers(lane, scores), row_values, scales, self.chain
            ):
                # Each piece to the end: registers are scarce.
                places = range(first, first + len(weights))
                first = places.stop
                mine = [others[i] for i in places]
                for each in row_shifts:
                    mine = [x + each[i // 2 % 2] for i, x in zip(places, mine, strict=True)]
                scaled = tiles.scale_and_shift(lane, mine, scale, shifts, places)
                grads = [weight * x for weight, x in zip(weights, scaled, strict=True)]
                words[0].extend(lane.pack(weights, self.dtype))
                words[1].extend(lane.pack(grads, self.dtype))
            return (
                write_words(words[0], scores, self.dtype),
                write_words(words[1], scores, self.dtype),
            )

        return weigh(*products, *columns, *row_values)

    @override
    def multiply(self, sums: Any, weights: Any, tile: Any, staging: list[Any]) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plgpu.wgmma(sums, weights, tile)

    @override
    def add(self, rows: Any, sums: Any) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plgpu.copy_smem_to_gmem(rows, sums, reduction_op="add")

    @override
    def observe(self, barriers: Any, first: Array, last: Array) -> None:
        pass


class Interpreted(Hardware):
    """A CPU."""

    @property
    @override
    def interpret(self) -> Any:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.InterpretGPUParams(detect_races=True)

    @override
    def staging(self) -> list[Any]:
        return [tiles.shared(self.dtype, self.warpgroups, ROWS, self.columns)]

    @override
    def weigh(self, scores: Any, scales: Any, row_values: list[Array]) -> Any:
        return self._probabilities(scores, scales, row_values)

    @override
    def weigh_gradients(
        self, products: tuple[Any, Any], columns: list[Any], row_values: list[Array]
    ) -> tuple[Any, Any]:
        (scores, of_rows), row_shifts = products, row_values[2:]
        scales, *shifts = (tiles.from_column_order(each[...]) for each in columns)
        scaled = sum((each[:, None] for each in row_shifts), of_rows) * scales + sum(shifts)
        weights = self._probabilities(scores, columns[0], row_values[:2])
        grads = weights * scaled
        return weights.astype(self.dtype), grads.astype(self.dtype)

    def _probabilities(self, scores: Array, scales: Any, row_values: list[Array]) -> Array:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        lengths, slopes = (each[:, None] for each in row_values)
        scales = tiles.from_column_order(scales[...])
        w = jnp.sqrt(jnp.abs(lengths + scores * scales))
        # What copies after the next barrier overwrite has been read; the interpreter must be told.
        plgpu.commit_smem()
        terms = [w * slopes + np.float32(self.chain.start)]
        for factor, constant in self.chain.steps:
            terms.append(terms[-1] * terms[factor] + np.float32(constant))
        return terms[-1]

    @override
    def multiply(self, sums: Any, weights: Any, tile: Any, staging: list[Any]) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        staged = staging[0].at[lax.axis_index("warpgroup")]
        staged[...] = weights
        plgpu.commit_smem()
        plgpu.wgmma(sums, staged, tile)

    @override
    def add(self, rows: Any, sums: Any) -> None:
        # Blocks run one after another. Yet of two that add to the same rows the interpreter says
        # that they race, as they would on a GPU without atomic additions.
        sums[...] += rows[...]

    @override
    def observe(self, barriers: Any, first: Array, last: Array) -> None:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        @pl.loop(jnp.maximum(first, 0), last)
        def _(step: Any) -> None:
            shape = barriers.shape
            plgpu.barrier_wait(barriers.at[lax.rem(step, shape[0])] if shape else barriers)
