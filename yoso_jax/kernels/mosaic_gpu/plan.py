"""Shapes of a cumulation, and how its work is cut into blocks of threads."""

import dataclasses

import numpy as np

from yoso_jax.kernels.mosaic_gpu import fixed_point, layout
from yoso_jax.kernels.mosaic_gpu.lane import I32, WARPGROUP

WARPGROUPS = 8
"""Warpgroups of a block."""
# Streaming multiprocessors of an H100 or H200; each runs one block of eight warpgroups at a time.
_MULTIPROCESSORS = 132
_TABLE_BYTES = 224 * 1024
# Tables of more groups would cost registers for their codes.
_MAX_GROUPS_PER_PASS = 4
# Queries of a thread: more sums would not fit into its registers.
_MAX_QUERIES_PER_THREAD = 4
# How much of the GPU the blocks of one kernel must keep busy to be better than more kernels.
_BUSY = 0.7
# Time of loading the tables of a block, in that of one query of each thread.
_LOAD_TABLES = 1
_MIN_KEYS_PER_CHUNK = 1024
_MAX_SEARCHED_KEYS = 4096


@dataclasses.dataclass(frozen=True)
class Pass:
    """Some groups of hashes, and which columns if tables are wide: even (0) or odd (1)."""

    first_group: int | I32
    num_groups: int
    parity: int | None


def parities(wide: bool) -> tuple[int | None, ...]:
    """Those that are visited one after another."""
    return (0, 1) if wide else (None,)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of a cumulation and how its work is cut.

    Attributes:
      heads: batch rows times heads.
      num_queries: tokens that read, T.
      num_keys: tokens that are added, S.
      slices: slices of value columns.
      num_hashes: number of hashes m.
      hash_code_len: bits of a code.
      value_dtype: float32, bfloat16 or float16.
      out_dtype: likewise.
      one_kernel: whether one kernel does all, or None for what suits the shapes.
      num_warpgroups: warpgroups of a block.
    """

    heads: int
    num_queries: int
    num_keys: int
    slices: int
    num_hashes: int
    hash_code_len: int
    value_dtype: np.dtype
    out_dtype: np.dtype
    one_kernel: bool | None = None
    num_warpgroups: int = WARPGROUPS

    @property
    def slot_words(self) -> int:
        """Words of a hash's slot in a row of a table."""
        return layout.slot_bytes(self.hash_code_len) // 4

    @property
    def width(self) -> int:
        """Columns of a slice."""
        return layout.slice_width(self.hash_code_len)

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
            self.heads, self.num_keys, self.value_dtype, self.num_hashes, self.hash_code_len
        )

    @property
    def searches(self) -> bool:
        """Whether the largest bucket is searched, or taken for as large as all keys.

        It makes checks needless for short sequences, where they cost more than a search, and wide
        tables more exact.
        """
        return self.num_keys <= _MAX_SEARCHED_KEYS or not self.may_pack

    @property
    def num_bounds(self) -> int:
        """Bounds of a head's sums, of which the largest one counts."""
        return self.buckets.groups * self.buckets.parts if self.searches else 1

    @property
    def may_pack(self) -> bool:
        """Whether packed tables are tried."""
        return self.value_dtype != np.float32

    @property
    def takes_one_kernel(self) -> bool:
        """Whether one kernel does all, since slices of heads alone keep the GPU busy."""
        if self.one_kernel is not None:
            return self.one_kernel
        blocks = self.heads * self.slices
        if self.groups == 1:
            # Tables are written and read for nothing else but more blocks, of parts of the tokens.
            return 2 * blocks > _MULTIPROCESSORS or self.num_keys <= 8 * _MIN_KEYS_PER_CHUNK
        busy = blocks / _MULTIPROCESSORS / -(-blocks // _MULTIPROCESSORS)
        return busy >= _BUSY

    @property
    def resident_queries(self) -> int:
        """Queries of a thread of the one kernel if all of their sums stay in registers, else 0."""
        queries = -(-self.num_queries // self.num_threads)
        return queries if queries <= _MAX_QUERIES_PER_THREAD else 0

    @property
    def queries_per_thread(self) -> int:
        """Queries of a thread that reads tables: few fill the GPU, many load tables rarely."""
        queries, blocks = -(-self.num_queries // self.num_threads), self.heads * self.slices

        def time(per_thread: int) -> int:
            waves = -(-blocks * -(-queries // per_thread) // _MULTIPROCESSORS)
            return waves * (per_thread + _LOAD_TABLES)

        return min(range(1, min(queries, _MAX_QUERIES_PER_THREAD) + 1), key=time)

    @property
    def query_chunks(self) -> int:
        """Blocks that read the same tables."""
        return -(-self.num_queries // (self.queries_per_thread * self.num_threads))

    @property
    def key_chunks(self) -> int:
        """Blocks that write parts of the same table."""
        blocks = self.heads * self.slices * self.groups
        most = -(-self.num_keys // _MIN_KEYS_PER_CHUNK)
        return min(most, max(1, _MULTIPROCESSORS // blocks))

    @property
    def write_blocks(self) -> int:
        """Blocks that write tables."""
        return self.heads * self.slices * self.key_chunks * self.groups

    @property
    def for_writing(self) -> "Plan":
        """The plan of blocks that write tables: small ones, of which some add while others wait."""
        if self.write_blocks < 2 * _MULTIPROCESSORS:
            return self
        return dataclasses.replace(self, num_warpgroups=min(self.num_warpgroups, 4))

    def passes(self, wide: bool) -> list[Pass]:
        """What is resident in shared memory, one pass over tokens after another."""
        return [
            Pass(start, min(self.groups_per_pass, self.groups - start), parity)
            for parity in parities(wide)
            for start in range(0, self.groups, self.groups_per_pass)
        ]
