"""Bernoulli cumulation `B v` for given codes, in shared memory.

A block of threads does one slice of value columns of one head. For a few groups of eight hashes at
a time it fills tables of zeros, adds the rows of all keys into their buckets, and reads a bucket
for each query. Sums are of integers (see `fixed_point`), so results are the same bit for bit in
every run. `layout` says how codes and tables are arranged.

A packed table has two columns in a 32-bit word: `high << 16` plus `low`, which starts at 0x8000 so
that it never borrows from the upper half. A wide table has one column in a word; a slot then holds
half the slice, and the keys are visited once for the even columns and once for the odd ones.

The sums of a query over passes stay in registers, so one kernel can do only as many queries as
there are registers, and has as many blocks as there are slices of heads. For long sequences, and
for few heads, there are two: one writes the tables of a group to memory, and one reads them, for
some of the queries.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt16

from yoso_jax.kernels.mosaic_gpu import fixed_point, layout
from yoso_jax.kernels.mosaic_gpu.lane import (
    I32,
    WARPGROUP,
    Call,
    GlobalPointer,
    Lane,
    Program,
    SharedPointer,
)
from yoso_jax.kernels.mosaic_gpu.layout import Rows, load_words, store_words
from yoso_jax.kernels.mosaic_gpu.values import slice_values

MAX_HASHES = 128
MAX_VALUE_DIM = 256

_TABLE_BYTES = 224 * 1024
# Tables of more groups would cost registers for their codes.
_MAX_GROUPS_PER_PASS = 4
# Queries of a thread: more sums would not fit into its registers.
_MAX_QUERIES_PER_THREAD = 4
_WARPGROUPS = 8
# Streaming multiprocessors of an H100 or H200; each runs one block at a time.
_MULTIPROCESSORS = 132
# How much of the GPU one kernel must keep busy to be better than two.
_BUSY = 0.7
# Time of loading the tables of a block, in that of one query of each thread.
_LOAD_TABLES = 1
_MIN_KEYS_PER_CHUNK = 1024
_PACKED_BIAS = 0x8000
# Bytes of a token's codes for a group of hashes.
_CODES_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of a cumulation and how its work is cut.

    Attributes:
      queries: what is written, `[B, T, N, D]`.
      num_keys: tokens that are added, S.
      value_dtype: float32, bfloat16 or float16.
      num_hashes: number of hashes m.
      hash_code_len: bits of a code.
      query_masked: whether there is a mask of the queries.
      one_kernel: whether one kernel does all, or None for what suits the shapes.
      num_warpgroups: warpgroups of a block.
    """

    queries: Rows
    num_keys: int
    value_dtype: np.dtype
    num_hashes: int
    hash_code_len: int
    query_masked: bool = False
    one_kernel: bool | None = None
    num_warpgroups: int = _WARPGROUPS

    @property
    def slot_words(self) -> int:
        """Words of a hash's slot in a row of a table."""
        return layout.slot_bytes(self.hash_code_len) // 4

    @property
    def width(self) -> int:
        """Columns of a slice."""
        return layout.slice_width(self.hash_code_len)

    @property
    def heads(self) -> int:
        """Heads of all batch rows."""
        return self.queries.num_heads

    @property
    def slices(self) -> int:
        """Slices of value columns."""
        return self.queries.columns // self.width

    @property
    def groups(self) -> int:
        """Groups of hashes."""
        return layout.num_groups(self.num_hashes)

    @property
    def table_bytes(self) -> int:
        """Bytes of a group's table."""
        return 2**self.hash_code_len * layout.HASHES * layout.slot_bytes(self.hash_code_len)

    @property
    def groups_per_pass(self) -> int:
        """Groups whose tables are in shared memory at a time."""
        return min(self.groups, _MAX_GROUPS_PER_PASS, _TABLE_BYTES // self.table_bytes)

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return self.num_warpgroups * WARPGROUP

    @property
    def wide_shift(self) -> int:
        """Bits by which what is read from wide tables is shifted, for the sum over hashes."""
        return (self.num_hashes - 1).bit_length()

    @property
    def buckets(self) -> fixed_point.Buckets:
        """What the scales are chosen by."""
        return fixed_point.Buckets(
            self.heads,
            self.num_keys,
            self.queries.columns,
            self.value_dtype,
            self.num_hashes,
            self.hash_code_len,
        )

    @property
    def may_pack(self) -> bool:
        """Whether each head chooses between packed and wide tables."""
        return self.value_dtype != np.float32

    @property
    def takes_one_kernel(self) -> bool:
        """Whether one kernel does all: it holds the sums in registers and keeps the GPU busy."""
        if self.one_kernel is not None:
            return self.one_kernel
        blocks = self.heads * self.slices
        busy = blocks / _MULTIPROCESSORS / -(-blocks // _MULTIPROCESSORS)
        fits = self.queries.tokens <= _MAX_QUERIES_PER_THREAD * self.num_threads
        return fits and (busy >= _BUSY or self.groups == 1)

    @property
    def queries_per_thread(self) -> int:
        """Queries of a thread that reads tables: few fill the GPU, many load tables rarely."""
        tokens, blocks = -(-self.queries.tokens // self.num_threads), self.heads * self.slices

        def time(per_thread: int) -> int:
            waves = -(-blocks * -(-tokens // per_thread) // _MULTIPROCESSORS)
            return waves * (per_thread + _LOAD_TABLES)

        return min(range(1, min(tokens, _MAX_QUERIES_PER_THREAD) + 1), key=time)

    @property
    def query_chunks(self) -> int:
        """Blocks that read the same tables."""
        return -(-self.queries.tokens // (self.queries_per_thread * self.num_threads))

    @property
    def key_chunks(self) -> int:
        """Blocks that write parts of the same table."""
        blocks = self.heads * self.slices * self.groups
        most = -(-self.num_keys // _MIN_KEYS_PER_CHUNK)
        return min(most, max(1, _MULTIPROCESSORS // blocks))

    @property
    def part_bytes(self) -> int:
        """Bytes of the tables in memory of a chunk of keys: packed, or even and odd columns."""
        return 2 * self.groups * self.table_bytes

    def passes(self, wide: bool) -> list["_Pass"]:
        """What is resident in shared memory, one pass over tokens after another."""
        return [
            _Pass(start, min(self.groups_per_pass, self.groups - start), parity)
            for parity in _parities(wide)
            for start in range(0, self.groups, self.groups_per_pass)
        ]


@dataclasses.dataclass(frozen=True)
class _Pass:
    """Some groups of hashes, and which columns if tables are wide: even (0) or odd (1)."""

    first_group: int | I32
    num_groups: int
    parity: int | None


def _parities(wide: bool) -> tuple[int | None, ...]:
    return (0, 1) if wide else (None,)


class _Slice:
    """A slice of the columns of a head: what a block does with it."""

    def __init__(self, plan: Plan, lane: Lane, table: SharedPointer, head_and_slice: I32) -> None:
        self.plan = plan
        self.lane = lane
        self.table = table
        self.thread = lane.thread_id()
        self.index = head_and_slice
        self.head = head_and_slice // plan.slices

    def codes_of(self, codes: GlobalPointer, tokens: int) -> GlobalPointer:
        """The head's codes."""
        return codes.at(self.head, self.plan.groups * tokens * _CODES_BYTES)

    def empty_word(self, parity: int | None) -> int:
        """What a bucket without keys holds."""
        # Shifts round if sums start from half of what they drop.
        return _PACKED_BIAS if parity is None else 2**self.plan.wide_shift // 2

    def fill(self, num_groups: int, word: I32 | int) -> None:
        """Sets all words of the tables."""
        words = [self.lane.i32(word)] * 4
        self.lane.fori_loop(
            self.thread,
            num_groups * self.plan.table_bytes // 16,
            lambda i: self.table.at(i, 16).store(words),
            step=self.plan.num_threads,
        )

    def add_keys(
        self,
        part: _Pass,
        scale: fixed_point.Scale,
        codes: GlobalPointer,
        value: GlobalPointer,
        first: I32 | int,
        end: I32 | int,
        *,
        prefetch: bool,
    ) -> None:
        """Adds the rows of keys from `first` to `end` into their buckets, after a barrier.

        With `prefetch`, those of the next key are loaded meanwhile, into more registers.
        """
        plan, lane = self.plan, self.lane
        row_bytes = plan.width * plan.value_dtype.itemsize
        # Eight neighbouring threads use different slots; the next eight start at another word.
        start = lane.shift_right_logical(self.thread, 3) & (plan.slot_words - 1)
        table = self.table.at(start, 4)
        codes = self.codes_of(codes, plan.num_keys)
        value = value.at(self.index, plan.num_keys * row_bytes)

        def load(token: I32) -> list[I32]:
            token = lane.minimum(token, plan.num_keys - 1)
            row = load_words(value.at(token, row_bytes), row_bytes // 4)
            return row + self.load_codes(part, codes, plan.num_keys, token)

        def add(words: list[I32]) -> None:
            row = lane.unpack(words[: row_bytes // 4], plan.value_dtype)
            if part.parity is None:
                integers = [lane.round_to_i32(x * scale.scale) for x in row]
                sums = [
                    (high << 16) + low
                    for low, high in zip(integers[::2], integers[1::2], strict=True)
                ]
            else:
                sums = [lane.round_to_i32(x * scale.scale) for x in row[part.parity :: 2]]
            distance = 1
            while distance < plan.slot_words:
                odd = (start & distance) != 0
                sums = [lane.select(odd, sums[i ^ distance], x) for i, x in enumerate(sums)]
                distance *= 2
            for group, offset in self.slots(words[row_bytes // 4 :]):
                slot = table.at(offset)
                for i, word in enumerate(sums):
                    (slot ^ (4 * i) if i else slot).add(word, group * plan.table_bytes)

        def add_and_load_next(token: I32, *words: I32) -> list[I32]:
            following = load(token + plan.num_threads)
            add(list(words))
            return following

        token = self.thread + first
        if prefetch:
            words = load(token)
            lane.barrier()
            lane.fori_loop(token, end, add_and_load_next, words, step=plan.num_threads)
        else:
            lane.barrier()
            lane.fori_loop(token, end, lambda token: add(load(token)), step=plan.num_threads)

    def read_buckets(
        self, part: _Pass, table: SharedPointer, codes: list[I32], sums: list[I32]
    ) -> list[I32]:
        """The sums plus what the buckets of a query hold in the tables of a pass."""
        plan, lane, sums = self.plan, self.lane, list(sums)
        for group, offset in self.slots(codes):
            words = table.at(offset).load(plan.slot_words, group * plan.table_bytes)
            for i, word in enumerate(words):
                if part.parity is None:
                    sums[2 * i] = lane.add_low_half(sums[2 * i], word)
                    sums[2 * i + 1] = lane.add_high_half(sums[2 * i + 1], word)
                else:
                    column = 2 * i + part.parity
                    sums[column] = lane.add_shifted(sums[column], word, plan.wide_shift)
        return sums

    def load_codes(
        self, part: _Pass, codes: GlobalPointer, num_tokens: int, token: I32
    ) -> list[I32]:
        """The words of a token's codes for the groups of a pass."""
        first = codes.at(part.first_group, num_tokens * _CODES_BYTES).at(token, _CODES_BYTES)
        return [
            word
            for group in range(part.num_groups)
            for word in first.at(group, num_tokens * _CODES_BYTES).load(4, again=True)
        ]

    def load_query_codes(self, part: _Pass, codes: GlobalPointer, token: I32) -> list[I32]:
        """As `load_codes`; a token beyond the last one has its codes, and reads in vain."""
        num_queries = self.plan.queries.tokens
        return self.load_codes(part, codes, num_queries, self.lane.minimum(token, num_queries - 1))

    def slots(self, codes: list[I32]) -> Iterator[tuple[int, I32]]:
        """The groups of a pass, from 0, and the offsets of a token's slots in their tables."""
        for i, word in enumerate(codes):
            for offset in layout.offsets(
                self.lane,
                word,
                stride=layout.slot_bytes(self.plan.hash_code_len),
                scale=layout.code_scale(self.plan.hash_code_len),
            ):
                yield i // 4, offset

    def finish(
        self,
        wide: bool,
        scale: fixed_point.Scale,
        masks: tuple[GlobalPointer, ...],
        out: GlobalPointer,
        token: I32,
        sums: list[I32],
    ) -> None:
        """Writes a query's row of the output."""
        plan, lane, rows = self.plan, self.lane, self.plan.queries
        out = rows.of_head(out, self.head)
        out = out.at(self.index % plan.slices, plan.width * rows.dtype.itemsize)
        shift = 2.0**plan.wide_shift if wide else 1.0
        unscale = lane.f32(shift) / (scale.scale * plan.num_hashes)
        if not wide:
            bias = _PACKED_BIAS * plan.groups * layout.HASHES
            sums = [x if i % 2 else x - bias for i, x in enumerate(sums)]
        with lane.when(token < rows.tokens):
            words = lane.pack([lane.to_f32(x) * unscale for x in sums], rows.dtype)
            if masks:
                mask = masks[0].at(self.head // rows.heads, 4 * rows.tokens)
                (kept,) = mask.at(token, 4).load()
                words = [lane.select(kept != 0, word, lane.i32(0)) for word in words]
            store_words(out.at(token, rows.token_bytes), words)


def _by_scale(
    work: _Slice, bounds: GlobalPointer, body: Callable[[bool, fixed_point.Scale], None]
) -> None:
    """Runs `body(wide, scale)` for what fits the head."""
    lane, plan = work.lane, work.plan
    num_bounds = plan.buckets.groups * plan.buckets.parts
    scale = fixed_point.Scale.load(lane, bounds, work.head, num_bounds, plan.value_dtype)
    if not plan.may_pack:
        body(True, scale)
        return
    with lane.when(~scale.is_wide):
        body(False, scale)
    with lane.when(scale.is_wide):
        body(True, scale)


def _cumulate(
    lane: Lane,
    inputs: tuple[GlobalPointer, ...],
    outputs: tuple[GlobalPointer, ...],
    shared: SharedPointer,
    block: I32,
    *,
    plan: Plan,
) -> None:
    query_codes, key_codes, value, bounds, *masks = inputs
    work = _Slice(plan, lane, shared, block)

    per_thread = -(-plan.queries.tokens // plan.num_threads)
    tokens = [work.thread + i * plan.num_threads for i in range(per_thread)]
    codes = work.codes_of(query_codes, plan.queries.tokens)

    def run(wide: bool, scale: fixed_point.Scale) -> None:
        sums = [[lane.i32(0)] * plan.width] * per_thread
        passes = plan.passes(wide)
        for part in passes:
            if part is not passes[0]:
                lane.barrier()
            work.fill(part.num_groups, work.empty_word(part.parity))
            # While there are sums, registers are few.
            prefetch = part is passes[0] or part.num_groups == 1
            keys = scale, key_codes, value, 0, plan.num_keys
            work.add_keys(part, *keys, prefetch=prefetch)
            following = work.load_query_codes(part, codes, tokens[0])
            lane.barrier()
            for i, token in enumerate(tokens):
                words = following
                if i + 1 < per_thread:
                    following = work.load_query_codes(part, codes, tokens[i + 1])
                sums[i] = work.read_buckets(part, work.table, words, sums[i])
                if part is passes[-1]:
                    work.finish(wide, scale, tuple(masks), outputs[0], token, sums[i])

    _by_scale(work, bounds, run)


def cumulation_program(plan: Plan) -> Program:
    """The kernel that does all, if `plan.takes_one_kernel`.

    Inputs: arranged codes of queries and keys, uint16 `[heads, groups, tokens, 8]`; slices of
    `values.slice_values`; bounds of `fixed_point.largest_bucket_program`; an int32 mask of the
    queries, `[B, T]`, if the plan has it. Output: that of the queries.
    """
    return Program(
        "lsh_cumulation",
        functools.partial(_cumulate, plan=plan),
        outputs=(plan.queries.shape,),
        num_blocks=plan.heads * plan.slices,
        num_warpgroups=plan.num_warpgroups,
        shared_bytes=plan.groups_per_pass * plan.table_bytes,
    )


def _write_tables(
    lane: Lane,
    inputs: tuple[GlobalPointer, ...],
    outputs: tuple[GlobalPointer, ...],
    shared: SharedPointer,
    block: I32,
    *,
    plan: Plan,
) -> None:
    key_codes, value, bounds = inputs
    group, chunk = block % plan.groups, block // plan.groups % plan.key_chunks
    work = _Slice(plan, lane, shared, block // (plan.groups * plan.key_chunks))
    per_chunk = -(-plan.num_keys // plan.key_chunks)
    first = chunk * per_chunk
    end = lane.minimum(first + per_chunk, plan.num_keys)
    part_of_head = outputs[0].at(block // plan.groups, plan.part_bytes)

    def run(wide: bool, scale: fixed_point.Scale) -> None:
        for parity in _parities(wide):
            # Parts of a table are added up.
            empty = lane.select(chunk == 0, lane.i32(work.empty_word(parity)), lane.i32(0))
            work.fill(1, empty)
            part = _Pass(group, 1, parity)
            work.add_keys(part, scale, key_codes, value, first, end, prefetch=True)
            lane.barrier()
            table = part_of_head.at(group + (parity or 0) * plan.groups, plan.table_bytes)
            lane.fori_loop(
                work.thread,
                plan.table_bytes // 16,
                lambda i, table=table: table.at(i, 16).store(work.table.at(i, 16).load(4)),
                step=plan.num_threads,
            )
            lane.barrier()

    _by_scale(work, bounds, run)


def write_tables_program(plan: Plan) -> Program:
    """The kernel that writes tables.

    Inputs: as `cumulation_program`, without those of the queries.
    Output: int32 `[heads, slices, key_chunks, 2, groups, words]`, to be added up over the chunks;
    packed tables are only in the first of two.
    """
    num_blocks = plan.heads * plan.slices * plan.key_chunks * plan.groups
    if num_blocks >= 2 * _MULTIPROCESSORS:
        # More blocks on a multiprocessor, of which some add while others wait.
        plan = dataclasses.replace(plan, num_warpgroups=min(plan.num_warpgroups, 4))
    shape = (plan.heads, plan.slices, plan.key_chunks, 2, plan.groups, plan.table_bytes // 4)
    return Program(
        "write_tables",
        functools.partial(_write_tables, plan=plan),
        outputs=(jax.ShapeDtypeStruct(shape, jnp.int32),),
        num_blocks=num_blocks,
        num_warpgroups=plan.num_warpgroups,
        shared_bytes=plan.table_bytes,
        incomplete=True,
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
    query_codes, bounds, tables, *masks = inputs
    work = _Slice(plan, lane, shared, block // plan.query_chunks)
    tables = tables.at(work.index, plan.part_bytes)
    codes = work.codes_of(query_codes, plan.queries.tokens)
    first = work.thread + block % plan.query_chunks * (plan.queries_per_thread * plan.num_threads)
    tokens = [first + i * plan.num_threads for i in range(plan.queries_per_thread)]
    slots = plan.groups_per_pass

    def start_copy(group: I32 | int, parity: int | None) -> None:
        source = tables.at(group, plan.table_bytes).at(
            (parity or 0) * plan.groups, plan.table_bytes
        )
        table = work.table.at(lane.i32(group) % slots, plan.table_bytes)
        lane.fori_loop(
            work.thread,
            plan.table_bytes // 16,
            lambda i: table.at(i, 16).start_copy(source.at(i, 16)),
            step=plan.num_threads,
        )

    def run(wide: bool, scale: fixed_point.Scale) -> None:
        sums = [lane.i32(0)] * (plan.width * len(tokens))
        for parity in _parities(wide):
            is_last = parity == _parities(wide)[-1]

            def read_group(
                group: I32, *sums: I32, parity: int | None = parity, finish: bool = False
            ) -> list[I32]:
                part = _Pass(group, 1, parity)
                words = [work.load_query_codes(part, codes, token) for token in tokens]
                if slots == 1:
                    lane.barrier()
                    start_copy(group, parity)
                    lane.commit_copies()
                lane.wait_for_copies(max(0, slots - 2))
                lane.barrier()
                if slots > 1:
                    # Into the table that all threads have done with.
                    later = group + (slots - 1)
                    with lane.when(later < plan.groups):
                        start_copy(later, parity)
                    lane.commit_copies()
                table, new = work.table.at(group % slots, plan.table_bytes), list[I32]()
                for i, token in enumerate(tokens):
                    old = list(sums[i * plan.width : (i + 1) * plan.width])
                    row = work.read_buckets(part, table, words[i], old)
                    if finish:
                        work.finish(wide, scale, tuple(masks), outputs[0], token, row)
                    new += row
                return new

            if parity == 1:
                lane.barrier()
            for group in range(slots - 1):
                start_copy(group, parity)
                lane.commit_copies()
            sums = lane.fori_loop(0, plan.groups - 1, read_group, sums)
            sums = read_group(lane.i32(plan.groups - 1), *sums, finish=is_last)

    _by_scale(work, bounds, run)


def read_tables_program(plan: Plan) -> Program:
    """The kernel that reads tables.

    Inputs: codes of the queries, bounds, sums of what `write_tables_program` wrote, the queries'
    mask.
    Output: that of the queries.
    """
    return Program(
        "read_tables",
        functools.partial(_read_tables, plan=plan),
        outputs=(plan.queries.shape,),
        num_blocks=plan.heads * plan.slices * plan.query_chunks,
        num_warpgroups=plan.num_warpgroups,
        shared_bytes=plan.groups_per_pass * plan.table_bytes,
    )


def cumulate(
    query_codes: UInt16[Array, "heads groups T 8"],
    key_codes: UInt16[Array, "heads groups S 8"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None = None,
    key_mask: Bool[Array, "B S"] | None = None,
    *,
    num_hashes: int,
    hash_code_len: int,
    out_dtype: DTypeLike | None = None,
    one_kernel: bool | None = None,
    num_warpgroups: int = _WARPGROUPS,
    call: Call | None = None,
) -> Float[Array, "B T N D"]:
    """`B v` for arranged codes, where B is the fraction of hashes in which query and key collide.

    With queries and keys exchanged and the cotangent of the result as `value`, it is the gradient
    of the value.

    Args:
      query_codes: codes from `layout.arrange_codes`, heads numbered `b * N + n`.
      key_codes: likewise, with the other filler.
      value: float32, bfloat16 or float16.
      query_mask: False for queries whose rows of the result are zero.
      key_mask: False for keys whose values count as zero.
      num_hashes: number of hashes, 1 to 128.
      hash_code_len: bits of a code, 1 to 12.
      out_dtype: float32, bfloat16 or float16; that of `value` by default.
      one_kernel: whether one kernel does all, or None for what suits the shapes.
      num_warpgroups: warpgroups of a block, 1 to 8.
      call: what runs the programs; the GPU by default.

    Returns:
      `[B, T, N, D]`. The relative error of a head, in the Frobenius norm and beside the rounding
      to `out_dtype`, is about 2e-3 at most, and 1e-5 for a value in float32. A head with a value
      that is not finite is NaN.

    Raises:
      NotImplementedError: the kernel has no tables for this shape or dtype.
    """
    batch, num_keys, heads, value_dim = value.shape
    num_queries = query_codes.shape[2]
    _check(num_hashes, hash_code_len, value, num_queries)
    if call is None:
        from yoso_jax.kernels.mosaic_gpu.lane_mosaic import call  # loads JAX's GPU dialects
    value = layout.pad_columns(value, layout.slice_width(hash_code_len))
    plan = Plan(
        queries=Rows(
            batch, num_queries, heads, value.shape[-1], np.dtype(out_dtype or value.dtype)
        ),
        num_keys=num_keys,
        value_dtype=np.dtype(value.dtype),
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
        query_masked=query_mask is not None,
        one_kernel=one_kernel,
        num_warpgroups=num_warpgroups,
    )
    query_masks = () if query_mask is None else (query_mask.astype(jnp.int32),)
    key_mask = None if key_mask is None else key_mask.astype(jnp.int32)
    sliced = slice_values(value, key_mask, width=plan.width, call=call)
    search = fixed_point.largest_bucket_program(plan.buckets)
    (bounds,) = call(search, key_codes, sliced.weights, sliced.sums)
    keys = key_codes, sliced.slices, bounds
    if plan.takes_one_kernel:
        (out,) = call(cumulation_program(plan), query_codes, *keys, *query_masks)
    else:
        (tables,) = call(write_tables_program(plan), *keys)
        if plan.key_chunks > 1:
            tables = jnp.sum(tables, 2)
        (out,) = call(read_tables_program(plan), query_codes, bounds, tables, *query_masks)
    return jnp.asarray(out)[..., :value_dim]


def lsh_cumulation(
    query_codes: Int[Array, "*batch T m"],
    key_codes: Int[Array, "*batch S m"],
    value: Float[Array, "*batch S D"],
    *,
    hash_code_len: int,
    call: Call | None = None,
) -> Float[Array, "*batch T D"]:
    """`B v`, as `xla.lsh_cumulation`, in the dtype of `value`.

    Raises:
      NotImplementedError: the kernel has no tables for this shape or dtype.
    """
    num_queries, num_hashes = query_codes.shape[-2:]
    *batch, num_keys, value_dim = value.shape
    _check(num_hashes, hash_code_len, value, num_queries)
    arrange = functools.partial(layout.arrange_codes, hash_code_len=hash_code_len)
    out = cumulate(
        arrange(query_codes.reshape(-1, num_queries, num_hashes), filler=0),
        arrange(key_codes.reshape(-1, num_keys, num_hashes), filler=1),
        value.reshape(-1, num_keys, 1, value_dim),
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
        call=call,
    )
    return out.reshape(*batch, num_queries, value_dim)


def _check(num_hashes: int, hash_code_len: int, value: Array, num_queries: int) -> None:
    for name, size, most in (
        ("hash_code_len", hash_code_len, layout.MAX_CODE_LEN),
        ("num_hashes", num_hashes, MAX_HASHES),
        ("the value's last dimension", value.shape[-1], MAX_VALUE_DIM),
    ):
        if not 1 <= size <= most:
            raise NotImplementedError(f"{name} must be 1 to {most} for mosaic_gpu, got {size}.")
    if value.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"value must be float32, bfloat16 or float16 for mosaic_gpu, got {value.dtype}."
        )
    if 0 in value.shape or not num_queries:
        raise NotImplementedError(f"mosaic_gpu needs at least one token, got {value.shape}.")
