"""The last step of a gradient of queries or keys: sums, without what changes a length only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from yoso_jax.kernels.mosaic_gpu.lane import (
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
# Columns of a row that a thread has.
_COLUMNS = 8


def add_tangents(
    parts: Float[Array, "P *rows columns"],
    tokens: Float[Array, "B T N columns"],
    lengths: Float[Array, "heads T"],
    mask: Bool[Array, "B T"] | None,
    *,
    factor: float,
    heads_first: bool,
    call: Call,
) -> Float[Array, "B T N columns"]:
    """The sum of the parts times a factor, less its component along each token.

    Args:
      parts: `[P, B, T, N, columns]`, or with `heads_first` `[P, B * N, padded T, columns]`, float32
        or the dtype of `tokens`.
      tokens: bfloat16 or float16; columns are a multiple of 8.
      lengths: l2 norms of the tokens, `[B * N, T]`.
      mask: False for tokens whose result is zero, whatever their parts are; or None.
      factor: what the sum is multiplied by.
      heads_first: the order of the axes of `parts`.
      call: runs programs, e.g. `lane_mosaic.call`.

    Returns:
      In the dtype of `tokens`.
    """
    batch, num_tokens, heads, columns = tokens.shape
    num_parts, num_rows = parts.shape[0], batch * num_tokens * heads
    lanes = columns // _COLUMNS
    block_rows = _THREADS // lanes
    part_dtype, dtype = parts.dtype, tokens.dtype
    part_bytes = parts.nbytes // num_parts
    row_bytes = columns * part_dtype.itemsize
    words = _COLUMNS * part_dtype.itemsize // 4

    def add(
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
        head, token_of_head = token // num_tokens * heads + n, token % num_tokens
        sums = [lane.f32(0)] * _COLUMNS
        place = inputs[0].at(row, row_bytes)
        if heads_first:
            place = inputs[0].at(head, parts.shape[-2] * row_bytes).at(token_of_head, row_bytes)
        place = place.at(piece, 4 * words)
        for part in range(num_parts):
            values = [
                word
                for first in range(0, words, 4)
                for word in place.at(part, part_bytes).load(4, 4 * first)
            ]
            values = lane.unpack(values, part_dtype)
            sums = [a + b for a, b in zip(sums, values, strict=True)]
        (length,) = inputs[2].at(head, 4 * num_tokens).at(token_of_head, 4).load()
        inverse = lane.f32(1) / lane.bitcast_f32(length)
        mine = inputs[1].at(row, 2 * columns).at(piece, 2 * _COLUMNS).load(4)
        units = [x * inverse for x in lane.unpack(mine, dtype)]
        product = lane.f32(0)
        for a, b in zip(sums, units, strict=True):
            product = lane.fma(a, b, product)
        products.at(thread, 4).store([lane.bitcast_i32(product)])
        lane.barrier()
        along = lane.f32(0)
        for i in range(lanes):
            (word,) = products.at(lane.minimum(here, block_rows - 1) * lanes + i, 4).load()
            along += lane.bitcast_f32(word)
        results = [(a - along * b) * factor for a, b in zip(sums, units, strict=True)]
        if mask is not None:
            (takes_part,) = inputs[3].at(token, 4).load()
            results = [lane.select(takes_part != 0, x, lane.f32(0)) for x in results]
        with lane.when((here < block_rows) & (number < num_rows)):
            target = outputs[0].at(row, 2 * columns).at(piece, 2 * _COLUMNS)
            target.store(lane.pack(results, dtype))

    program = Program(
        "add_tangents",
        add,
        outputs=(jax.ShapeDtypeStruct(tokens.shape, dtype),),
        num_blocks=-(-num_rows // block_rows),
        num_warpgroups=_WARPGROUPS,
        shared_bytes=4 * _THREADS,
    )
    masks = [] if mask is None else [mask.astype(jnp.int32)]
    return jnp.asarray(call(program, parts, tokens, lengths, *masks)[0])
