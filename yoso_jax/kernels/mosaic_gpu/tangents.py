"""What is left of rows without their component along others.

It is the last step of a gradient of queries or keys: what is parallel to a token changes its length
only. So it is of the gradient through a normalisation.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from yoso_jax.kernels.mosaic_gpu.lane import (
    F32,
    I32,
    WARPGROUP,
    Call,
    GlobalPointer,
    Lane,
    Program,
    SharedPointer,
)

_WARPGROUPS = 2
_THREADS = _WARPGROUPS * WARPGROUP
COLUMNS = 8
"""Columns of a row that a thread has. Rows have a multiple of them."""

# Sums of squares up to this, and norms up to its root, are taken for zero.
_TINY = 1e-24


def tangents(
    parts: Float[Array, "P *rows columns"],
    directions: Float[Array, "B T N columns"],
    mask: Bool[Array, "B T"] | None,
    *,
    factor: float = 1,
    norms: Sequence[Float[Array, "B T N"]] = (),
    heads_first: bool = False,
    call: Call | None = None,
) -> list[Float[Array, "B T N columns"]]:
    """The sum of the parts times a factor, less its component along a direction.

    Args:
      parts: `[P, B, T, N, columns]`, or with `heads_first` `[P, B * N, padded T, columns]`, float32
        or the dtype of `directions`.
      directions: bfloat16 or float16; columns are a multiple of `COLUMNS`. Zeros are none.
      mask: False for tokens whose result is zero, whatever their rows are; or None.
      factor: what the sum is multiplied by.
      norms: float32; there is a result for each, divided by it, zero where it is about zero or
        infinite. Without any there is one result, not divided.
      heads_first: the order of the axes of `parts`.
      call: what runs the program; the GPU by default.

    Returns:
      Results, in the dtype of `directions`.
    """
    if call is None:
        from yoso_jax.kernels.mosaic_gpu.lane_mosaic import call  # loads JAX's GPU dialects
    batch, num_tokens, heads, columns = directions.shape
    num_rows = batch * num_tokens * heads
    lanes = columns // COLUMNS
    block_rows = _THREADS // lanes
    dtype = directions.dtype

    def tangent(
        lane: Lane,
        inputs: tuple[GlobalPointer, ...],
        outputs: tuple[GlobalPointer, ...],
        products: SharedPointer,
        block: I32,
    ) -> None:
        thread = lane.thread_id()
        here, piece = thread // lanes, thread % lanes
        number = block * block_rows + here
        # Threads without a row of their own do as others do, but store nothing.
        row = lane.minimum(number, num_rows - 1)
        token, n = row // heads, row % heads

        def load(row: GlobalPointer, dtype: jnp.dtype) -> list[F32]:
            words = COLUMNS * dtype.itemsize // 4
            place = row.at(piece, 4 * words)
            loaded = [x for first in range(0, words, 4) for x in place.load(4, 4 * first)]
            return lane.unpack(loaded, dtype)

        row_bytes = columns * parts.dtype.itemsize
        place = inputs[0].at(row, row_bytes)
        if heads_first:
            head, token_of_head = token // num_tokens * heads + n, token % num_tokens
            place = inputs[0].at(head, parts.shape[-2] * row_bytes).at(token_of_head, row_bytes)
        sums = [lane.f32(0)] * COLUMNS
        for part in range(parts.shape[0]):
            values = load(place.at(part, parts.nbytes // parts.shape[0]), parts.dtype)
            sums = [a + b for a, b in zip(sums, values, strict=True)]
        along = load(inputs[1].at(row, 2 * columns), dtype)
        pair = [lane.f32(0)] * 2
        for a, b in zip(sums, along, strict=True):
            pair = [lane.fma(a, b, pair[0]), lane.fma(b, b, pair[1])]
        products.at(thread, 8).store([lane.bitcast_i32(x) for x in pair])
        lane.barrier()
        pair = [lane.f32(0)] * 2
        first = lane.minimum(here, block_rows - 1) * lanes
        for i in range(lanes):
            words = products.at(first + i, 8).load(2)
            pair = [a + lane.bitcast_f32(b) for a, b in zip(pair, words, strict=True)]
        zero, one = lane.f32(0), lane.f32(1)
        counts = pair[1] > _TINY
        share = lane.select(counts, pair[0] / lane.select(counts, pair[1], one), zero)
        rest = [a - share * b for a, b in zip(sums, along, strict=True)]
        if mask is not None:
            (takes_part,) = inputs[-1].at(token, 4).load()
            rest = [lane.select(takes_part != 0, x, zero) for x in rest]
        scales = [lane.f32(factor)] * len(outputs)
        for i, pointer in enumerate(inputs[2 : 2 + len(norms)]):
            norm = lane.bitcast_f32(pointer.at(row, 4).load()[0])
            counts = norm > math.sqrt(_TINY)
            scales[i] = lane.select(counts, scales[i] / lane.select(counts, norm, one), zero)
        with lane.when((here < block_rows) & (number < num_rows)):
            for output, scale in zip(outputs, scales, strict=True):
                target = output.at(row, 2 * columns).at(piece, 2 * COLUMNS)
                target.store(lane.pack([x * scale for x in rest], dtype))

    program = Program(
        "tangents",
        tangent,
        outputs=(jax.ShapeDtypeStruct(directions.shape, dtype),) * max(1, len(norms)),
        num_blocks=-(-num_rows // block_rows),
        num_warpgroups=_WARPGROUPS,
        shared_bytes=8 * _THREADS,
    )
    masks = () if mask is None else (mask.astype(jnp.int32),)
    return [jnp.asarray(x) for x in call(program, parts, directions, *norms, *masks)]
