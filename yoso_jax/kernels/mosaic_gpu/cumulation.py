"""Bernoulli cumulation `B v` for given codes, in shared memory.

A block of threads does one slice of value columns of one head. For a few groups of eight hashes at
a time it fills tables of zeros, adds the rows of all keys into their buckets, and reads a bucket
for each query. Sums are of integers (see `fixed_point`), so results are the same bit for bit in
every run. `layout` says how codes and tables are arranged.

A packed table has two columns in a 32-bit word: `high << 16` plus `low`, which starts at 0x8000 so
that it never borrows from the upper half. A wide table has one column in a word; a slot then holds
half the slice, and the keys are visited once for the even columns and once for the odd ones.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt16

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

MAX_HASHES = 128
MAX_VALUE_DIM = 256

_TABLE_BYTES = 224 * 1024
# Tables of more groups would cost registers for their codes.
_MAX_GROUPS_PER_PASS = 4
# Accumulators of so many tokens a thread stay in registers from pass to pass.
_MAX_RESIDENT_TOKENS = 4
_WARPGROUPS = 8
# Streaming multiprocessors of an H100 or H200; each runs one block at a time.
_MULTIPROCESSORS = 132
_PACKED_BIAS = 0x8000
# Bytes of a token's codes for a group of hashes.
_CODES_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of a cumulation and how its work is cut.

    Attributes:
      heads: batch rows times heads.
      num_queries: tokens that read, T.
      num_keys: tokens that are added, S.
      value_dim: columns of a value, D.
      num_hashes: number of hashes m.
      hash_code_len: bits of a code.
      value_dtype: float32, bfloat16 or float16.
      out_dtype: float32, bfloat16 or float16.
      splits: blocks among which the groups of hashes are divided; divides their number.
      num_warpgroups: warpgroups of a block.
    """

    heads: int
    num_queries: int
    num_keys: int
    value_dim: int
    num_hashes: int
    hash_code_len: int
    value_dtype: np.dtype
    out_dtype: np.dtype
    splits: int = 1
    num_warpgroups: int = _WARPGROUPS

    def __post_init__(self) -> None:
        if self.total_groups % self.splits:
            raise ValueError(
                f"splits must divide the {self.total_groups} groups of hashes, got {self.splits}."
            )

    @property
    def slot_bytes(self) -> int:
        """Bytes of a hash's slot in a row of a table."""
        return layout.slot_bytes(self.hash_code_len)

    @property
    def slot_words(self) -> int:
        """Words of a slot."""
        return self.slot_bytes // 4

    @property
    def width(self) -> int:
        """Columns of a slice."""
        return self.slot_bytes // 2

    @property
    def slices(self) -> int:
        """Slices of value columns."""
        return -(-self.value_dim // self.width)

    @property
    def total_groups(self) -> int:
        """Groups of hashes."""
        return layout.num_groups(self.num_hashes)

    @property
    def groups(self) -> int:
        """Groups of hashes of a block."""
        return self.total_groups // self.splits

    @property
    def table_bytes(self) -> int:
        """Bytes of a group's table."""
        return 2**self.hash_code_len * layout.HASHES * self.slot_bytes

    @property
    def groups_per_pass(self) -> int:
        """Groups whose tables are in shared memory at a time."""
        return min(self.groups, _MAX_GROUPS_PER_PASS, _TABLE_BYTES // self.table_bytes)

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return self.num_warpgroups * WARPGROUP

    @property
    def resident_tokens(self) -> int:
        """Queries of a thread if their accumulators stay in registers, else 0."""
        tokens = -(-self.num_queries // self.num_threads)
        return tokens if tokens <= _MAX_RESIDENT_TOKENS else 0

    @property
    def wide_shift(self) -> int:
        """Bits by which what is read from wide tables is shifted, for the sum over hashes."""
        return (self.num_hashes - 1).bit_length()

    @property
    def value_row_bytes(self) -> int:
        """Bytes of a key's row of a slice."""
        return self.width * self.value_dtype.itemsize

    @property
    def out_row_bytes(self) -> int:
        """Bytes of a query's row of a slice of the output."""
        return self.width * (self.out_dtype.itemsize if self.splits == 1 else 4)

    @property
    def may_pack(self) -> bool:
        """Whether each head chooses between packed and wide tables."""
        return self.value_dtype != np.float32

    @property
    def workspace(self) -> bool:
        """Whether accumulators need memory of their own between passes."""
        return self.splits == 1 and not self.resident_tokens

    def passes(self, wide: bool) -> list["_Pass"]:
        """What is resident in shared memory, one pass over keys and queries after another."""
        per_pass = self.groups_per_pass
        return [
            _Pass(start, min(per_pass, self.groups - start), parity)
            for parity in ((0, 1) if wide else (None,))
            for start in range(0, self.groups, per_pass)
        ]


@dataclasses.dataclass(frozen=True)
class _Pass:
    """Some groups of hashes, and which columns if tables are wide: even (0) or odd (1)."""

    first_group: int
    num_groups: int
    parity: int | None


class _Block:
    """A block's part of the arrays, and what it does with them."""

    def __init__(
        self,
        plan: Plan,
        lane: Lane,
        inputs: tuple[GlobalPointer, ...],
        outputs: tuple[GlobalPointer, ...],
        table: SharedPointer,
        block: I32,
    ) -> None:
        query_codes, key_codes, value, scales, _ = inputs
        head, split = block // (plan.slices * plan.splits), block % plan.splits
        head_and_slice = block // plan.splits
        first_group = head * plan.total_groups + split * plan.groups
        self.plan = plan
        self.lane = lane
        self.table = table
        self.thread = lane.thread_id()
        self.query_codes = query_codes.at(first_group, plan.num_queries * _CODES_BYTES)
        self.key_codes = key_codes.at(first_group, plan.num_keys * _CODES_BYTES)
        self.value = value.at(head_and_slice, plan.num_keys * plan.value_row_bytes)
        self.out = outputs[0].at(block, plan.num_queries * plan.out_row_bytes)
        # Where accumulators wait between passes unless they stay in registers.
        self.sums = self.out
        if plan.workspace:
            self.sums = outputs[1].at(block, plan.num_queries * plan.width * 4)
        words = scales.at(head, 8).load(2)
        self.scale, self.unscale = map(lane.bitcast_f32, words)

    def run(self, *, wide: bool) -> None:
        """All passes, with packed or wide tables."""
        plan, lane = self.plan, self.lane
        passes = plan.passes(wide)
        zeros = [lane.i32(0)] * plan.width
        resident = plan.resident_tokens if len(passes) > 1 else 0
        sums = [zeros] * resident
        for part in passes:
            first, last = part is passes[0], part is passes[-1]
            if not first:
                lane.barrier()
            self.fill(part)
            lane.barrier()
            self.add_keys(part)
            lane.barrier()

            def read(
                token: I32, part: _Pass = part, first: bool = first, last: bool = last
            ) -> None:
                start = zeros if first else self.load_sums(token)
                row = self.read_buckets(part, token, start)
                if last:
                    self.finish(token, row, wide=wide)
                else:
                    _store(self.sums.at(token, plan.width * 4), row)

            if not resident:
                lane.fori_loop(self.thread, plan.num_queries, read, step=plan.num_threads)
            for i in range(resident):
                token = self.thread + i * plan.num_threads
                # Without a branch: a thread beyond the end reads for the last query, in vain.
                sums[i] = self.read_buckets(
                    part, lane.minimum(token, plan.num_queries - 1), sums[i]
                )
                if last:
                    with lane.when(token < plan.num_queries):
                        self.finish(token, sums[i], wide=wide)

    def fill(self, part: _Pass) -> None:
        """Makes the tables empty."""
        plan, lane = self.plan, self.lane
        # Shifts round if sums start from half of what they drop.
        rounding = 2**plan.wide_shift // 2
        empty = lane.i32(_PACKED_BIAS if part.parity is None else rounding)
        lane.fori_loop(
            self.thread,
            part.num_groups * plan.table_bytes // 16,
            lambda i: self.table.at(i, 16).store([empty] * 4),
            step=plan.num_threads,
        )

    def add_keys(self, part: _Pass) -> None:
        """Adds the rows of all keys into their buckets."""
        plan, lane = self.plan, self.lane
        # Eight neighbouring threads use different slots; the next eight start at another word.
        start = self.lane.shift_right_logical(self.thread, 3) & (plan.slot_words - 1)
        table = self.table.at(start, 4)

        def add(token: I32) -> None:
            row = lane.unpack(
                _load(self.value.at(token, plan.value_row_bytes), plan.value_row_bytes // 4),
                plan.value_dtype,
            )
            if part.parity is None:
                integers = [lane.round_to_i32(x * self.scale) for x in row]
                words = [
                    (high << 16) + low
                    for low, high in zip(integers[::2], integers[1::2], strict=True)
                ]
            else:
                words = [lane.round_to_i32(x * self.scale) for x in row[part.parity :: 2]]
            distance = 1
            while distance < plan.slot_words:
                odd = (start & distance) != 0
                words = [lane.select(odd, words[i ^ distance], x) for i, x in enumerate(words)]
                distance *= 2
            for group, offset in self.slots(part, self.key_codes, plan.num_keys, token):
                slot = table.at(offset)
                for i, word in enumerate(words):
                    (slot ^ (4 * i) if i else slot).add(word, group * plan.table_bytes)

        lane.fori_loop(self.thread, plan.num_keys, add, step=plan.num_threads)

    def read_buckets(self, part: _Pass, token: I32, sums: list[I32]) -> list[I32]:
        """The sums plus what a query's buckets hold."""
        plan, lane, sums = self.plan, self.lane, list(sums)
        for group, offset in self.slots(part, self.query_codes, plan.num_queries, token):
            words = self.table.at(offset).load(plan.slot_words, group * plan.table_bytes)
            for i, word in enumerate(words):
                if part.parity is None:
                    sums[2 * i] = lane.add_low_half(sums[2 * i], word)
                    sums[2 * i + 1] = lane.add_high_half(sums[2 * i + 1], word)
                else:
                    column = 2 * i + part.parity
                    sums[column] = lane.add_shifted(sums[column], word, plan.wide_shift)
        return sums

    def slots(
        self, part: _Pass, codes: GlobalPointer, num_tokens: int, token: I32
    ) -> Iterator[tuple[int, I32]]:
        """The groups of a pass, from 0, and the offsets of a token's slots in their tables."""
        words = [
            codes.at(part.first_group + group, num_tokens * _CODES_BYTES)
            .at(token, _CODES_BYTES)
            .load(4, again=True)
            for group in range(part.num_groups)
        ]
        for group in range(part.num_groups):
            for word in words[group]:
                for offset in layout.offsets(
                    self.lane,
                    word,
                    stride=self.plan.slot_bytes,
                    scale=layout.code_scale(self.plan.hash_code_len),
                ):
                    yield group, offset

    def load_sums(self, token: I32) -> list[I32]:
        """A query's sums over earlier passes."""
        return _load(self.sums.at(token, self.plan.width * 4), self.plan.width)

    def finish(self, token: I32, sums: list[I32], *, wide: bool) -> None:
        """Writes a query's row of the output."""
        plan, lane = self.plan, self.lane
        if not wide:
            bias = _PACKED_BIAS * plan.groups * layout.HASHES
            sums = [x if i % 2 else x - bias for i, x in enumerate(sums)]
        if plan.splits == 1:
            sums = lane.pack([lane.to_f32(x) * self.unscale for x in sums], plan.out_dtype)
        _store(self.out.at(token, plan.out_row_bytes), sums)


def _load(pointer: GlobalPointer, num_words: int) -> list[I32]:
    size = min(num_words, 4)
    return [x for i in range(0, num_words, size) for x in pointer.load(size, 4 * i)]


def _store(pointer: GlobalPointer, words: list[I32]) -> None:
    size = min(len(words), 4)
    for i in range(0, len(words), size):
        pointer.store(words[i : i + size], 4 * i)


def _cumulation(
    lane: Lane,
    inputs: tuple[GlobalPointer, ...],
    outputs: tuple[GlobalPointer, ...],
    table: SharedPointer,
    block: I32,
    *,
    plan: Plan,
) -> None:
    work = _Block(plan, lane, inputs, outputs, table, block)
    if plan.may_pack:
        head = block // (plan.slices * plan.splits)
        (wide,) = inputs[-1].at(head, 4).load()
        with lane.when(wide == 0):
            work.run(wide=False)
        with lane.when(wide != 0):
            work.run(wide=True)
    else:
        work.run(wide=True)


def cumulation_program(plan: Plan) -> Program:
    """The kernel.

    Inputs: arranged codes of queries and keys, uint16 `[heads, groups, tokens, 8]`; values
    `[heads, slices, S, width]`; the scale of a head and its inverse, divided by the number of
    hashes, float32 `[heads, 2]`; int32 `[heads]`, not 0 for the heads with wide tables.
    Output: `[heads, slices, T, width]` in `out_dtype`, or with more than one split the sums of each
    as int32 `[heads, slices, splits, T, width]`.
    """
    rows = (plan.num_queries, plan.width)
    shape = (plan.heads, plan.slices, *rows)
    if plan.splits > 1:
        output = jax.ShapeDtypeStruct((*shape[:2], plan.splits, *rows), jnp.int32)
    else:
        output = jax.ShapeDtypeStruct(shape, plan.out_dtype)
    return Program(
        "lsh_cumulation",
        functools.partial(_cumulation, plan=plan),
        outputs=(output,),
        workspaces=(jax.ShapeDtypeStruct(shape, jnp.int32),) if plan.workspace else (),
        num_blocks=plan.heads * plan.slices * plan.splits,
        num_warpgroups=plan.num_warpgroups,
        shared_bytes=plan.groups_per_pass * plan.table_bytes,
    )


def choose_splits(num_blocks: int, num_groups: int) -> int:
    """The fewest splits of the groups of hashes that keep the GPU about as busy as any can.

    A split costs memory traffic for its sums, so it must shorten the time by a sixth.
    """
    times = {
        splits: -(-num_blocks * splits // _MULTIPROCESSORS) / splits
        for splits in range(1, num_groups + 1)
        if num_groups % splits == 0
    }
    return next(splits for splits, time in times.items() if time <= 1.2 * min(times.values()))


def cumulate(
    query_codes: UInt16[Array, "heads groups T 8"],
    key_codes: UInt16[Array, "heads groups S 8"],
    value: Float[Array, "heads S D"],
    *,
    num_hashes: int,
    hash_code_len: int,
    out_dtype: DTypeLike | None = None,
    splits: int | None = None,
    num_warpgroups: int = _WARPGROUPS,
    call: Call,
) -> Float[Array, "heads T D"]:
    """`B v` for arranged codes, where B is the fraction of hashes in which query and key collide.

    With queries and keys exchanged and the cotangent of the result as `value`, it is the gradient
    of the value.

    Args:
      query_codes: codes from `layout.arrange_codes`.
      key_codes: likewise, with the other filler.
      value: float32, bfloat16 or float16; rows of masked keys are zero.
      num_hashes: number of hashes, 1 to 128.
      hash_code_len: bits of a code, 1 to 12.
      out_dtype: float32, bfloat16 or float16; that of `value` by default.
      splits: blocks among which a head's hashes are divided, or None for what fills the GPU.
      num_warpgroups: warpgroups of a block, 1 to 8.
      call: what runs the programs.

    Returns:
      `[heads, T, D]`. The relative error of a head, in the Frobenius norm and beside the rounding
      to `out_dtype`, is about 2e-3 at most, and 1e-5 for a value in float32. A head with a value
      that is not finite is NaN.
    """
    heads, _, num_queries, _ = query_codes.shape
    num_keys, value_dim = value.shape[1:]
    plan = Plan(
        heads=heads,
        num_queries=num_queries,
        num_keys=num_keys,
        value_dim=value_dim,
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
        value_dtype=np.dtype(value.dtype),
        out_dtype=np.dtype(out_dtype or value.dtype),
        num_warpgroups=num_warpgroups,
    )
    if splits is None:
        splits = choose_splits(heads * plan.slices, plan.total_groups)
    plan = dataclasses.replace(plan, splits=splits)

    scale, wide = fixed_point.choose_scales(
        key_codes, value, num_hashes=num_hashes, hash_code_len=hash_code_len, call=call
    )
    unscale = jnp.where(wide, 2.0**plan.wide_shift, 1.0) / (scale * num_hashes)
    (out,) = call(
        cumulation_program(plan),
        query_codes,
        key_codes,
        layout.split_columns(value, plan.width),
        jnp.stack([scale, unscale], -1),
        wide.astype(jnp.int32),
    )
    out = jnp.asarray(out)
    if plan.splits > 1:
        out = out.sum(2).astype(jnp.float32) * unscale[:, None, None, None]
    return layout.merge_columns(out.astype(plan.out_dtype), value_dim)


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
    for name, size, most in (
        ("hash_code_len", hash_code_len, layout.MAX_CODE_LEN),
        ("num_hashes", num_hashes, MAX_HASHES),
        ("the value's last dimension", value_dim, MAX_VALUE_DIM),
    ):
        if not 1 <= size <= most:
            raise NotImplementedError(f"{name} must be 1 to {most} for mosaic_gpu, got {size}.")
    if value.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"value must be float32, bfloat16 or float16 for mosaic_gpu, got {value.dtype}."
        )
    if 0 in (*batch, num_queries, num_keys):
        raise NotImplementedError(f"mosaic_gpu needs at least one token, got {value.shape}.")
    if call is None:
        from yoso_jax.kernels.mosaic_gpu.lane_mosaic import call  # loads JAX's GPU dialects
    arrange = functools.partial(layout.arrange_codes, hash_code_len=hash_code_len)
    out = cumulate(
        arrange(query_codes.reshape(-1, num_queries, num_hashes), filler=0),
        arrange(key_codes.reshape(-1, num_keys, num_hashes), filler=1),
        value.reshape(-1, num_keys, value_dim),
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
        call=call,
    )
    return out.reshape(*batch, num_queries, value_dim)
