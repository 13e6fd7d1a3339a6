"""Bernoulli cumulation `B v` for given codes, in shared memory.

A block of threads does one slice of value columns of one head. For a few groups of eight hashes at
a time it fills tables of zeros, adds the rows of all keys into their buckets, and reads a bucket
for each query. Sums are of integers (see `fixed_point`), so results are the same bit for bit in
every run. `layout` says how codes and tables are arranged, `tables` what is in them.

One kernel does all that if slices of heads keep the GPU busy. If they are few, one kernel writes
the tables of a group of hashes to memory, and another one reads them, for some of the queries.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt16

from yoso_jax.kernels.mosaic_gpu import fixed_point, layout, values
from yoso_jax.kernels.mosaic_gpu.lane import (
    I32,
    Call,
    GlobalPointer,
    Lane,
    Pred,
    Program,
    SharedPointer,
)
from yoso_jax.kernels.mosaic_gpu.layout import Rows, load_words, store_words
from yoso_jax.kernels.mosaic_gpu.plan import WARPGROUPS, Pass, Plan, parities
from yoso_jax.kernels.mosaic_gpu.tables import PACKED_BIAS, Tables

MAX_HASHES = 128
MAX_VALUE_DIM = 256
# Bytes of shared memory beside the tables, for what blocks find out about them.
_CHECK_BYTES = 128


def _load_scale(work: Tables, bounds: GlobalPointer) -> fixed_point.Scale:
    return fixed_point.Scale.load(work.lane, bounds, work.head, work.plan.num_bounds)


def _cumulate(
    lane: Lane,
    inputs: tuple[GlobalPointer, ...],
    outputs: tuple[GlobalPointer, ...],
    shared: SharedPointer,
    block: I32,
    *,
    plan: Plan,
) -> None:
    query_codes, key_codes, value, bounds = inputs
    out, *sums_of_passes = outputs
    work = Tables(plan, lane, shared, block)
    # While what follows is loaded.
    work.fill(plan.passes(wide=not plan.may_pack)[0])
    scale = _load_scale(work, bounds)
    codes = work.codes_of(query_codes, plan.num_queries)
    # A word for each pass with packed tables; it becomes other than 0 if a sum does not fit.
    checks = shared.at(plan.groups_per_pass, plan.table_bytes)
    with lane.when(work.thread < _CHECK_BYTES // 4):
        checks.at(work.thread, 4).store([lane.i32(0)])
    tokens = [work.thread + i * plan.num_threads for i in range(plan.resident_queries)]

    def sums_of(token: I32) -> GlobalPointer:
        row_bytes = 4 * plan.width
        return sums_of_passes[0].at(block, plan.num_queries * row_bytes).at(token, row_bytes)

    def run(wide: bool, filled: bool) -> None:
        passes = plan.passes(wide)
        zeros = [lane.i32(0)] * plan.width
        resident = [zeros] * len(tokens)
        for i, part in enumerate(passes):
            first, last = i == 0, part is passes[-1]
            if not first:
                lane.barrier()
            if not (first and filled):
                work.fill(part)
            # While sums are in registers, these are few.
            prefetch = first or not tokens or part.num_groups == 1
            keys = scale, key_codes, value, 0, plan.num_keys
            added = work.add_keys(part, *keys, prefetch=prefetch)
            following = work.load_query_codes(part, codes, tokens[0]) if tokens else []
            lane.barrier()
            if not wide:
                with lane.when(~scale.is_safe):
                    checks.at(i, 4).add(added - work.fingerprint(part.num_groups))

            def read(token: I32, part: Pass = part, first: bool = first, last: bool = last) -> None:
                words = work.load_query_codes(part, codes, token)
                row = zeros if first else load_words(sums_of(token), plan.width)
                row = work.read_buckets(part, work.table, words, row)
                if last:
                    work.finish(wide, scale, out, token, row)
                else:
                    store_words(sums_of(token), row)

            if not tokens:
                lane.fori_loop(work.thread, plan.num_queries, read, step=plan.num_threads)
            for j, token in enumerate(tokens):
                words = following
                if token is not tokens[-1]:
                    following = work.load_query_codes(part, codes, tokens[j + 1])
                resident[j] = work.read_buckets(part, work.table, words, resident[j])
                if last:
                    work.finish(wide, scale, out, token, resident[j])

    if not plan.may_pack:
        run(wide=True, filled=True)
        return
    run(wide=False, filled=True)
    lane.barrier()
    with lane.when(_any([x for i in range(0, _CHECK_BYTES, 16) for x in checks.load(4, i)])):
        run(wide=True, filled=False)


def _any(words: list[I32]) -> Pred:
    """Whether a word is not 0."""
    return functools.reduce(I32.__or__, words) != 0


def cumulation_program(plan: Plan) -> Program:
    """The kernel that does all, if `plan.takes_one_kernel`.

    Inputs: arranged codes of queries and keys, uint16 `[heads, groups, tokens, 8]`; slices of
    `values.slice_values`; bounds of `fixed_point`.
    Outputs: `[heads, slices, T, width]`, and memory for sums if registers are too few.
    """
    shape = (plan.heads, plan.slices, plan.num_queries, plan.width)
    sums = () if plan.resident_queries else (jax.ShapeDtypeStruct(shape, jnp.int32),)
    return Program(
        "lsh_cumulation",
        functools.partial(_cumulate, plan=plan),
        outputs=(jax.ShapeDtypeStruct(shape, plan.out_dtype), *sums),
        num_blocks=plan.heads * plan.slices,
        num_warpgroups=plan.num_warpgroups,
        shared_bytes=plan.groups_per_pass * plan.table_bytes + _CHECK_BYTES,
        incomplete=bool(sums),
    )


def _is_flagged(work: Tables, flags: GlobalPointer) -> Pred:
    """Whether a sum of the slice does not fit into the packed tables of any group."""
    num_flags = work.plan.key_chunks * work.plan.groups
    return _any(load_words(flags.at(work.index, 4 * num_flags), num_flags))


def _write_tables(
    lane: Lane,
    inputs: tuple[GlobalPointer, ...],
    outputs: tuple[GlobalPointer, ...],
    shared: SharedPointer,
    block: I32,
    *,
    plan: Plan,
    wide: bool,
) -> None:
    key_codes, value, bounds, *flags = inputs
    group, chunk = block % plan.groups, block // plan.groups % plan.key_chunks
    work = Tables(plan, lane, shared, block // (plan.groups * plan.key_chunks))
    scale = _load_scale(work, bounds)
    per_chunk = -(-plan.num_keys // plan.key_chunks)
    first = chunk * per_chunk
    end = lane.minimum(first + per_chunk, plan.num_keys)
    mismatch = shared.at(plan.table_bytes)

    def write(parity: int | None) -> None:
        part = Pass(group, 1, parity)
        work.fill(part)
        added = work.add_keys(part, scale, key_codes, value, first, end, prefetch=True)
        lane.barrier()
        if not wide:
            with lane.when(~scale.is_safe):
                mismatch.add(added - work.fingerprint(1))
        tables = (block // plan.groups) * len(parities(wide)) + (parity or 0)
        table = outputs[0].at(tables, plan.groups * plan.table_bytes).at(group, plan.table_bytes)
        lane.fori_loop(
            work.thread,
            plan.table_bytes // 16,
            lambda i: table.at(i, 16).store(work.table.at(i, 16).load(4)),
            step=plan.num_threads,
        )
        lane.barrier()

    if not wide:
        with lane.when(work.thread == 0):
            mismatch.store([lane.i32(0)])
        write(None)
        with lane.when(work.thread == 0):
            outputs[1].at(block, 4).store(mismatch.load())
        return
    needed = _is_flagged(work, flags[0]) if flags else lane.i32(0) == 0
    with lane.when(needed):
        for parity in parities(wide):
            write(parity)


def write_tables_program(plan: Plan, *, wide: bool) -> Program:
    """The kernel that writes packed tables, or wide ones where flags say that they are needed.

    Inputs: codes and slices of the keys, and bounds, as `cumulation_program`; for wide tables the
    flags, unless there are no packed ones.
    Outputs: int32 `[heads, slices, key_chunks, parities, groups, words]`, to be added up over the
    chunks; for packed tables flags, int32 `[heads, slices, key_chunks, groups]`, other than 0 where
    a sum of the chunk does not fit.
    """
    shape = (plan.heads, plan.slices, plan.key_chunks, plan.groups)
    words = (*shape[:3], len(parities(wide)), plan.groups, plan.table_bytes // 4)
    flags = () if wide else (jax.ShapeDtypeStruct(shape, jnp.int32),)
    return Program(
        "write_wide_tables" if wide else "write_tables",
        functools.partial(_write_tables, plan=plan.for_writing, wide=wide),
        outputs=(jax.ShapeDtypeStruct(words, jnp.int32), *flags),
        num_blocks=plan.write_blocks,
        num_warpgroups=plan.for_writing.num_warpgroups,
        shared_bytes=plan.table_bytes + _CHECK_BYTES,
        incomplete=wide and plan.may_pack,
    )


def _read_tables(
    lane: Lane,
    inputs: tuple[GlobalPointer, ...],
    outputs: tuple[GlobalPointer, ...],
    shared: SharedPointer,
    block: I32,
    *,
    plan: Plan,
) -> None:
    query_codes, bounds, wide_tables, *packed = inputs
    work = Tables(plan, lane, shared, block // plan.query_chunks)
    scale = _load_scale(work, bounds)
    codes = work.codes_of(query_codes, plan.num_queries)
    first = work.thread + block % plan.query_chunks * (plan.queries_per_thread * plan.num_threads)
    tokens = [first + i * plan.num_threads for i in range(plan.queries_per_thread)]
    slots = plan.groups_per_pass

    def read(tables: GlobalPointer, wide: bool) -> None:
        sums = [lane.i32(0)] * (plan.width * len(tokens))
        for parity in parities(wide):
            index = work.index * len(parities(wide)) + (parity or 0)
            array = tables.at(index, plan.groups * plan.table_bytes)

            def start_copy(group: I32, array: GlobalPointer = array) -> None:
                source = array.at(group, plan.table_bytes)
                table = work.table.at(group % slots, plan.table_bytes)
                lane.fori_loop(
                    work.thread,
                    plan.table_bytes // 16,
                    lambda i: table.at(i, 16).start_copy(source.at(i, 16)),
                    step=plan.num_threads,
                )

            def read_group(
                group: I32,
                *sums: I32,
                parity: int | None = parity,
                start_copy: Callable[[I32], None] = start_copy,
                last: bool = False,
            ) -> list[I32]:
                part = Pass(group, 1, parity)
                words = [work.load_query_codes(part, codes, token) for token in tokens]
                if slots == 1:
                    lane.barrier()
                    start_copy(group)
                    lane.commit_copies()
                lane.wait_for_copies(max(0, slots - 2))
                lane.barrier()
                if slots > 1:
                    # Into the table that all threads have done with.
                    later = group + (slots - 1)
                    with lane.when(later < plan.groups):
                        start_copy(later)
                    lane.commit_copies()
                table, new = work.table.at(group % slots, plan.table_bytes), list[I32]()
                for i, token in enumerate(tokens):
                    row = list(sums[i * plan.width : (i + 1) * plan.width])
                    row = work.read_buckets(part, table, words[i], row)
                    if last:
                        work.finish(wide, scale, outputs[0], token, row)
                    new += row
                return new

            if parity == 1:
                lane.barrier()
            for group in range(slots - 1):
                start_copy(lane.i32(group))
                lane.commit_copies()
            sums = lane.fori_loop(0, plan.groups - 1, read_group, sums)
            last = parity == parities(wide)[-1]
            sums = read_group(lane.i32(plan.groups - 1), *sums, last=last)

    if not packed:
        read(wide_tables, wide=True)
        return
    tables, flags = packed
    is_wide = _is_flagged(work, flags)
    with lane.when(~is_wide):
        read(tables, wide=False)
    with lane.when(is_wide):
        read(wide_tables, wide=True)


def read_tables_program(plan: Plan) -> Program:
    """The kernel that reads tables.

    Inputs: codes of the queries; bounds; wide tables, added up over chunks of keys; packed ones,
    and the flags, if there are any.
    Output: `[heads, slices, T, width]`.
    """
    shape = (plan.heads, plan.slices, plan.num_queries, plan.width)
    return Program(
        "read_tables",
        functools.partial(_read_tables, plan=plan),
        outputs=(jax.ShapeDtypeStruct(shape, plan.out_dtype),),
        num_blocks=plan.heads * plan.slices * plan.query_chunks,
        num_warpgroups=plan.num_warpgroups,
        shared_bytes=plan.groups_per_pass * plan.table_bytes,
    )


def _add_up_packed(tables: Array, flags: Array) -> tuple[Array, Array]:
    """Sums over chunks of keys, and flags also where these do not fit."""
    low = jnp.sum((tables & 0xFFFF) - PACKED_BIAS, 2)
    high = jnp.sum(tables >> 16, 2)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high)).max((2, 4))
    too_large = (largest > 0x7FFF).astype(jnp.int32)
    return (high << 16) + low + PACKED_BIAS, flags.at[:, :, 0].set(flags[:, :, 0] | too_large)


def _cumulate_by_tables(
    plan: Plan,
    query_codes: UInt16[Array, "heads groups T 8"],
    key_codes: UInt16[Array, "heads groups S 8"],
    value: values.SlicedValues,
    bounds: Float[Array, "heads bounds 2"],
    call: Call,
) -> Array:
    keys, packed, flags = (key_codes, value.slices, bounds), (), ()
    if plan.may_pack:
        tables, flag = call(write_tables_program(plan, wide=False), *keys)
        if plan.key_chunks > 1:
            tables, flag = _add_up_packed(tables, flag)
        packed, flags = (tables, flag), (flag,)
    (wide,) = call(write_tables_program(plan, wide=True), *keys, *flags)
    if plan.key_chunks > 1:
        # Each chunk's tables start from empty ones.
        wide = jnp.sum(wide, 2) - (plan.key_chunks - 1) * (2**plan.wide_shift // 2)
    (out,) = call(read_tables_program(plan), query_codes, bounds, wide, *packed)
    return out


def cumulate(
    query_codes: UInt16[Array, "heads groups T 8"],
    key_codes: UInt16[Array, "heads groups S 8"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None = None,
    key_mask: Bool[Array, "B S"] | None = None,
    *,
    num_hashes: int,
    hash_code_len: int,
    normalize: bool = False,
    out_dtype: DTypeLike | None = None,
    one_kernel: bool | None = None,
    num_warpgroups: int = WARPGROUPS,
    call: Call | None = None,
) -> Float[Array, "B T N D"] | tuple[Float[Array, "B T N D"], Float[Array, "B T N"]]:
    """`B v` for arranged codes, where B is the fraction of hashes in which query and key collide.

    With queries and keys exchanged and the cotangent of the result as `value`, it is the gradient
    of the value.

    Args:
      query_codes: codes from `layout.arrange_codes`, heads numbered `b * N + n`.
      key_codes: likewise, with the other filler.
      value: float32, bfloat16 or float16, at most `MAX_VALUE_DIM` columns.
      query_mask: False for queries whose rows of the result are zero.
      key_mask: False for keys whose values count as zero.
      num_hashes: number of hashes, 1 to `MAX_HASHES`.
      hash_code_len: bits of a code, 1 to `layout.MAX_CODE_LEN`.
      normalize: divide each row of the result by its l2 norm.
      out_dtype: float32, bfloat16 or float16; that of `value` by default.
      one_kernel: whether one kernel does all, or None for what suits the shapes.
      num_warpgroups: warpgroups of a block, 1 to 8.
      call: what runs the programs; the GPU by default.

    Returns:
      `[B, T, N, D]`; with `normalize` also the norms, float32 `[B, T, N]`. The relative error of a
      head, in the Frobenius norm and beside the rounding to `out_dtype`, is about 2e-3 at most, and
      1e-5 for a value in float32. A head with a value that is not finite is NaN.
    """
    if call is None:
        from yoso_jax.kernels.mosaic_gpu.lane_mosaic import call  # loads JAX's GPU dialects
    batch, num_keys, heads, value_dim = value.shape
    if value_dim * value.dtype.itemsize % 4:
        value = jnp.pad(value, [(0, 0), (0, 0), (0, 0), (0, 1)])  # rows of whole words
    width = layout.slice_width(hash_code_len)
    plan = Plan(
        heads=batch * heads,
        num_queries=query_codes.shape[2],
        num_keys=num_keys,
        slices=-(-value.shape[-1] // width),
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
        value_dtype=np.dtype(value.dtype),
        out_dtype=np.dtype(out_dtype or value.dtype),
        one_kernel=one_kernel,
        num_warpgroups=num_warpgroups,
    )
    query_masks = () if query_mask is None else (query_mask.astype(jnp.int32),)
    key_mask = None if key_mask is None else key_mask.astype(jnp.int32)
    sliced = values.slice_values(value, key_mask, width=width, call=call)
    coarseness = jnp.ones(plan.heads, jnp.float32)
    if plan.may_pack:
        coarseness = fixed_point.coarseness(value, query_codes, key_codes)
    if plan.searches:
        search = fixed_point.largest_bucket_program(plan.buckets)
        (bounds,) = call(search, key_codes, sliced.weights, sliced.sums, coarseness)
    else:
        bounds = fixed_point.bounds_of_all(sliced.sums, coarseness)
    if plan.takes_one_kernel:
        program = cumulation_program(plan)
        out, *_ = call(program, query_codes, key_codes, sliced.slices, bounds)
    else:
        out = _cumulate_by_tables(plan, query_codes, key_codes, sliced, bounds, call)
    rows = Rows(batch, plan.num_queries, heads, value.shape[-1], plan.out_dtype)
    merge = values.merge_slices_program(rows, width, normalize=normalize)
    out, *norms = call(merge, out, *query_masks)
    out = jnp.asarray(out)[..., :value_dim]
    return (out, norms[0]) if normalize else out
