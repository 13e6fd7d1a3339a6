"""What the kernel of buckets leaves to the hardware, and the same for a machine without a GPU.

Pallas' interpreter has no code of single threads. In its place are array operations, see
`expectation_hardware`.
"""

import abc
import dataclasses
from typing import Any, override

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from yoso_jax.kernels.mosaic_gpu import bucket_tiles
from yoso_jax.kernels.mosaic_gpu import expectation_tiles as tiles
from yoso_jax.kernels.mosaic_gpu.bucket_tiles import Plan
from yoso_jax.kernels.mosaic_gpu.collision_chain import Chain
from yoso_jax.kernels.mosaic_gpu.lane import I32, WARPGROUP
from yoso_jax.kernels.mosaic_gpu.sorting import TILE, Words

# Methods import what loads JAX's GPU dialects.


@dataclasses.dataclass(frozen=True)
class Hardware(abc.ABC):
    """Operations of a warpgroup, on tiles of its own.

    Attributes:
      plan: the shapes.
      dtype: of tokens, rows and weights, bfloat16 or float16.
      chain: the probability of a distance.
    """

    plan: Plan
    dtype: np.dtype
    chain: Chain

    @property
    @abc.abstractmethod
    def interpret(self) -> Any:
        """How Pallas interprets the kernel, or None."""

    @abc.abstractmethod
    def staging(self) -> list[Any]:
        """Types of the shared memory that `multiply` takes."""

    @abc.abstractmethod
    def copy_words(
        self, layout: Words, words: Any, copies: Any, row: Any, slot: Any, first: Any
    ) -> None:
        """Begins to copy 64 words of a row, from the position `first` on."""

    @abc.abstractmethod
    def gather(
        self,
        layout: Words,
        arrays: tuple[Any, Any, Any],
        targets: tuple[Any, Any, Any],
        words: Any,
        scalars: tuple[Any, Any, Any, Any, Any],
        *,
        by_column: bool,
    ) -> None:
        """Begins to copy what belongs to the tokens of a tile, as `bucket_tiles.gather`.

        Args:
          layout: of the words.
          arrays: tokens, their rows, and numbers of each.
          targets: the tiles of those.
          words: tiles of words.
          scalars: batch row, head, the slots of words and of targets, and the words that count.
          by_column: numbers are in the order of `tiles.in_column_order`.
        """

    @abc.abstractmethod
    def wait_for_copies(self) -> None:
        """Waits until what this warpgroup copies is there."""

    @abc.abstractmethod
    def weigh(self, products: tuple[Array, Array], scales: Any, row_values: list[Array]) -> Any:
        """Weights, see `bucket_tiles.weights`.

        Args:
          products: of tokens, and of their rows.
          scales: Ref to those of the columns, and perhaps shifts.
          row_values: what `expectation_tiles.row_values` gives, and perhaps shifts.
        """

    @abc.abstractmethod
    def add_to_means(
        self,
        products: tuple[Array, Array],
        columns: Any,
        row_values: list[Array],
        sums: tuple[Array, Array],
    ) -> tuple[Array, Array]:
        """Sums of weights and of weighted products, see `bucket_tiles.add_to_means`.

        Args:
          products: of tokens, and of their rows.
          columns: Ref to scales of the columns, and to ones.
          row_values: what `expectation_tiles.row_values` gives.
          sums: those before, `[64, PARTS]`.
        """

    @abc.abstractmethod
    def store_numbers(self, words: Any, numbers: Any, out: Any, scalars: tuple[Any, ...]) -> None:
        """Stores two numbers of each row of a tile at the place of its token, as `store`."""

    @abc.abstractmethod
    def multiply(self, sums: Any, weights: Any, tile: Any, staging: tuple[Any, ...]) -> None:
        """Adds the product of weights and a tile in shared memory to an accumulator."""

    @abc.abstractmethod
    def store(self, words: Any, tile: Any, out: Any, scalars: tuple[Any, ...]) -> None:
        """Stores the rows of a tile at the places of their tokens.

        Args:
          words: tiles of words.
          tile: tiles of sums.
          out: the array of all hashes.
          scalars: number of the hash, batch row, head, the slots of words and of the tile, and the
            rows that count.
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

    def _lane(self) -> Any:
        from yoso_jax.kernels.mosaic_gpu.lane_mosaic import MosaicLane

        return MosaicLane(self.plan.warpgroups * WARPGROUP)

    @override
    def copy_words(
        self, layout: Words, words: Any, copies: Any, row: Any, slot: Any, first: Any
    ) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *[_scalar()] * 3))
        def start(_: Any, words: Any, copies: Any, *scalars: Any) -> None:
            lane = self._lane()
            row, slot, first = (I32(lane, x.registers.item()) for x in scalars)
            source = lane.global_pointer(words, writable=False).at(row, 4 * layout.length)
            target = lane.shared_pointer(copies).at(slot, 4 * TILE)
            bucket_tiles.copy_words(lane, source, target, first=first, layout=layout)

        start(words, copies, row, slot, first)

    @override
    def gather(
        self,
        layout: Words,
        arrays: tuple[Any, Any, Any],
        targets: tuple[Any, Any, Any],
        words: Any,
        scalars: tuple[Any, Any, Any, Any, Any],
        *,
        by_column: bool,
    ) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plan, plain = self.plan, plgpu.RefType()
        columns = plan.head_dim, plan.value_dim

        @plgpu.inline_mgpu(
            arg_types=(*[plain] * 4, *map(_tile_type, columns), plain, *[_scalar()] * 5)
        )
        def start(_: Any, words: Any, *args: Any) -> None:
            lane = self._lane()
            batch, n, words_slot, slot, count = (I32(lane, x.registers.item()) for x in args[6:])
            tokens, rows, known = (lane.global_pointer(x, writable=False) for x in args[:3])
            sources = []
            for source, tile, width in zip((tokens, rows), args[3:5], columns, strict=True):
                source = source.at(batch, layout.num_tokens * plan.heads * 2 * width)
                pointer = lane.shared_pointer(tile).at(slot, TILE * 2 * width)
                sources.append((source.at(n, 2 * width), pointer, width))
            kinds = plan.other_numbers if by_column else plan.own_numbers
            known = known.at(batch * plan.heads + n, 4 * layout.num_tokens * kinds)
            bucket_tiles.gather(
                lane,
                lane.shared_pointer(words).at(words_slot, 4 * TILE),
                sources[0],
                sources[1],
                (known, lane.shared_pointer(args[5]).at(slot, 4 * TILE * kinds), kinds),
                count=count,
                stride=plan.heads,
                layout=layout,
                by_column=by_column,
            )

        start(words, *arrays, *targets, *scalars)

    @override
    def wait_for_copies(self) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        @plgpu.inline_mgpu()
        def wait(_: Any) -> None:
            lane = self._lane()
            lane.commit_copies()
            lane.wait_for_copies(0)

        wait()

    @override
    def weigh(self, products: tuple[Array, Array], scales: Any, row_values: list[Array]) -> Any:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        from yoso_jax.kernels.mosaic_gpu.registers import read_registers, write_words

        layout = plgpu.Layout.WGMMA
        row_layout = layout.reduce(1)

        @plgpu.inline_mgpu(
            arg_types=(layout, layout, plgpu.RefType(), *[row_layout] * len(row_values)),
            return_type=plgpu.ShapeDtypeStruct((TILE, TILE), self.dtype, layout=layout),
        )
        def weigh(_: Any, scores: Any, products: Any, scales: Any, *rows: Any) -> Any:
            lane = self._lane()
            values = bucket_tiles.weights(
                lane,
                read_registers(lane, scores),
                read_registers(lane, products),
                [read_registers(lane, each) for each in rows],
                lane.shared_pointer(scales),
                self.chain,
                self.plan.shift,
            )
            return write_words(lane.pack(values, self.dtype), scores, self.dtype)

        return weigh(*products, scales, *row_values)

    @override
    def add_to_means(
        self,
        products: tuple[Array, Array],
        columns: Any,
        row_values: list[Array],
        sums: tuple[Array, Array],
    ) -> tuple[Array, Array]:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        from yoso_jax.kernels.mosaic_gpu.registers import read_registers, write_registers

        layout = plgpu.Layout.WGMMA
        row_layout = layout.reduce(1)
        part = plgpu.ShapeDtypeStruct((TILE, bucket_tiles.PARTS), jnp.float32, layout=layout)

        @plgpu.inline_mgpu(
            arg_types=(
                *[layout] * 4,
                plgpu.RefType(),
                *[row_layout] * len(row_values),
            ),
            return_type=(part, part),
        )
        def add(
            _: Any, scores: Any, products: Any, counts: Any, totals: Any, columns: Any, *rows: Any
        ) -> tuple[Any, Any]:
            lane = self._lane()
            found = bucket_tiles.add_to_means(
                lane,
                read_registers(lane, scores),
                read_registers(lane, products),
                [read_registers(lane, each) for each in rows],
                lane.shared_pointer(columns),
                self.chain,
                (read_registers(lane, counts), read_registers(lane, totals)),
            )
            return write_registers(found[0], counts), write_registers(found[1], totals)

        return add(*products, *sums, columns, *row_values)

    @override
    def store_numbers(self, words: Any, numbers: Any, out: Any, scalars: tuple[Any, ...]) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plan, plain = self.plan, plgpu.RefType()

        @plgpu.inline_mgpu(arg_types=(*[plain] * 3, *[_scalar()] * 6))
        def store(_: Any, words: Any, numbers: Any, out: Any, *scalars: Any) -> None:
            lane = self._lane()
            values = (I32(lane, x.registers.item()) for x in scalars)
            number, batch, n, words_slot, slot, count = values
            head_bytes = 8 * plan.layout.num_tokens
            target = lane.global_pointer(out, writable=True)
            target = target.at(number, plan.batch * plan.heads * head_bytes)
            bucket_tiles.scatter_numbers(
                lane,
                lane.shared_pointer(words).at(words_slot, 4 * TILE),
                lane.shared_pointer(numbers).at(slot, 8 * TILE),
                target.at(batch * plan.heads + n, head_bytes),
                count=count,
                layout=plan.layout,
            )

        store(words, numbers, out, *scalars)

    @override
    def multiply(self, sums: Any, weights: Any, tile: Any, staging: tuple[Any, ...]) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plgpu.wgmma(sums, weights, tile)

    @override
    def store(self, words: Any, tile: Any, out: Any, scalars: tuple[Any, ...]) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plan, plain = self.plan, plgpu.RefType()

        @plgpu.inline_mgpu(arg_types=(plain, _tile_type(plan.head_dim), plain, *[_scalar()] * 6))
        def store(_: Any, words: Any, tile: Any, out: Any, *scalars: Any) -> None:
            lane = self._lane()
            values = (I32(lane, x.registers.item()) for x in scalars)
            number, batch, n, words_slot, slot, count = values
            row_bytes = 2 * plan.head_dim
            batch_bytes = plan.layout.num_tokens * plan.heads * row_bytes
            target = lane.global_pointer(out, writable=True).at(number, plan.batch * batch_bytes)
            bucket_tiles.scatter(
                lane,
                lane.shared_pointer(words).at(words_slot, 4 * TILE),
                lane.shared_pointer(tile).at(slot, TILE * row_bytes),
                target.at(batch, batch_bytes).at(n, row_bytes),
                count=count,
                columns=plan.head_dim,
                stride=plan.heads,
                layout=plan.layout,
            )

        store(words, tile, out, *scalars)


def _scalar() -> Any:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.Layout.WG_SPLAT(())


def _tile_type(columns: int) -> Any:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = tiles.swizzle(2 * columns)
    return plgpu.RefType((plgpu.TilingTransform((8, size // 2)), plgpu.SwizzleTransform(size)))


class Interpreted(Hardware):
    """A CPU."""

    @property
    @override
    def interpret(self) -> Any:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.InterpretGPUParams(detect_races=True)

    @override
    def staging(self) -> list[Any]:
        return [tiles.shared(self.dtype, self.plan.warpgroups, TILE, TILE)]

    @override
    def copy_words(
        self, layout: Words, words: Any, copies: Any, row: Any, slot: Any, first: Any
    ) -> None:
        positions = jnp.clip(first + jnp.arange(TILE), 0, layout.length - 1)
        copies[slot] = jnp.take(words[row], positions)

    @override
    def gather(
        self,
        layout: Words,
        arrays: tuple[Any, Any, Any],
        targets: tuple[Any, Any, Any],
        words: Any,
        scalars: tuple[Any, Any, Any, Any, Any],
        *,
        by_column: bool,
    ) -> None:
        batch, n, words_slot, slot, count = scalars
        places = jnp.arange(TILE)
        tokens = layout.token(jnp.take(words[words_slot], jnp.minimum(places, count - 1)))
        of_tokens, rows = (jnp.take(x[batch, :, n, :], tokens, axis=0) for x in arrays[:2])
        numbers = jnp.take(arrays[2][batch * self.plan.heads + n], tokens, axis=1)
        targets[0][slot] = of_tokens
        targets[1][slot] = rows
        if by_column:
            numbers = tiles.in_column_order(jnp.where(places < count, numbers, 0))
        targets[2][slot] = numbers

    @override
    def wait_for_copies(self) -> None:
        pass

    @override
    def weigh(self, products: tuple[Array, Array], scales: Any, row_values: list[Array]) -> Any:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        shifts = [each[:, None] for each in row_values[2:]]
        scores, of_rows = products
        column_scales, *column_shifts = tiles.from_column_order(scales[...])
        # What copies after the next barrier overwrite has been read; the interpreter must be told.
        plgpu.commit_smem()
        factors = self._factors(scores, row_values, column_scales)
        factors = factors * (sum(shifts, of_rows) * column_scales + sum(column_shifts))
        return factors.astype(self.dtype)

    def _factors(self, scores: Array, row_values: list[Array], column_scales: Array) -> Array:
        lengths, slopes = (each[:, None] for each in row_values[:2])
        if not self.chain.steps:
            return jnp.ones_like(scores)
        w = jnp.sqrt(jnp.abs(lengths + scores * column_scales))
        terms = [w * slopes + np.float32(self.chain.start)]
        for factor, constant in self.chain.steps:
            terms.append(terms[-1] * terms[factor] + np.float32(constant))
        return terms[-1]

    @override
    def add_to_means(
        self,
        products: tuple[Array, Array],
        columns: Any,
        row_values: list[Array],
        sums: tuple[Array, Array],
    ) -> tuple[Array, Array]:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        scales, ones = tiles.from_column_order(columns[...])
        plgpu.commit_smem()  # as in `weigh`
        scores, of_rows = products
        weights = self._factors(scores, row_values, scales) * ones
        parts = TILE, -1, bucket_tiles.PARTS
        return (
            sums[0] + jnp.sum(weights.reshape(parts), axis=1),
            sums[1] + jnp.sum((weights * of_rows).reshape(parts), axis=1),
        )

    @override
    def store_numbers(self, words: Any, numbers: Any, out: Any, scalars: tuple[Any, ...]) -> None:
        from jax.experimental import pallas as pl

        number, batch, n, words_slot, slot, count = scalars
        tokens, both = self.plan.layout.token(words[words_slot]), numbers[slot]

        @pl.loop(0, count)
        def _(i: Any) -> None:
            token = lax.dynamic_index_in_dim(tokens, i, keepdims=False)
            two = lax.dynamic_index_in_dim(both, i, axis=1, keepdims=False)
            out[number, batch * self.plan.heads + n, :, token] = two

    @override
    def multiply(self, sums: Any, weights: Any, tile: Any, staging: tuple[Any, ...]) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        staged = staging[0].at[lax.axis_index("warpgroup")]
        staged[...] = weights
        plgpu.commit_smem()
        plgpu.wgmma(sums, staged, tile)

    @override
    def store(self, words: Any, tile: Any, out: Any, scalars: tuple[Any, ...]) -> None:
        from jax.experimental import pallas as pl

        number, batch, n, words_slot, slot, count = scalars
        tokens, rows = self.plan.layout.token(words[words_slot]), tile[slot]

        @pl.loop(0, count)
        def _(i: Any) -> None:
            token = lax.dynamic_index_in_dim(tokens, i, keepdims=False)
            row = lax.dynamic_index_in_dim(rows, i, keepdims=False)
            out[number, batch, token, n, :] = row
