"""Tables of buckets in shared memory: how keys are added and queries read.

A packed table has two columns in a 32-bit word: `high << 16` plus `low`, which starts at 0x8000 so
that it never borrows from the upper half. A wide table has one column in a word; a slot then holds
half the slice, and the keys are visited once for the even columns and once for the odd ones.

A sum of a packed table is right if it fits into its 16 bits in the end, whatever it was meanwhile,
since words are added modulo 2**32. Where nothing is known beforehand that makes it fit, a
fingerprint tells: the columns, multiplied by odd weights of the bucket and of the column, are added
up both over the keys and over the buckets. Sums that do not fit are off by multiples of 2**16, and
make the two differ, up to a chance of 2**-12 that many such errors cancel.
"""

from collections.abc import Iterator

from yoso_jax.kernels.mosaic_gpu import fixed_point, layout
from yoso_jax.kernels.mosaic_gpu.lane import I32, GlobalPointer, Lane, SharedPointer
from yoso_jax.kernels.mosaic_gpu.layout import load_words, store_words
from yoso_jax.kernels.mosaic_gpu.plan import Pass, Plan

PACKED_BIAS = 0x8000
# Bytes of a token's codes for a group of hashes.
_CODES_BYTES = 16
# Odd numbers without a pattern.
_BUCKET_WEIGHT = 0x9E3779B1
_COLUMN_WEIGHTS = (
    *(0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1),
    *(0xD3A2646D, 0xFD7046C5, 0xB55A4F09, 0x6C8E9CF5),
)


class Tables:
    """The tables of a block, for a slice of the columns of a head."""

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
        return PACKED_BIAS if parity is None else 2**self.plan.wide_shift // 2

    def fill(self, part: Pass) -> None:
        """Empties the tables."""
        words = [self.lane.i32(self.empty_word(part.parity))] * 4
        self.lane.fori_loop(
            self.thread,
            part.num_groups * self.plan.table_bytes // 16,
            lambda i: self.table.at(i, 16).store(words),
            step=self.plan.num_threads,
        )

    def add_keys(
        self,
        part: Pass,
        scale: fixed_point.Scale,
        codes: GlobalPointer,
        value: GlobalPointer,
        first: I32 | int,
        end: I32 | int,
        *,
        prefetch: bool,
    ) -> I32:
        """Adds the rows of keys from `first` to `end` into their buckets, after a barrier.

        With `prefetch`, those of the next key are loaded meanwhile, into more registers.

        Returns:
          The fingerprint of this thread's keys, if tables are packed.
        """
        plan, lane = self.plan, self.lane
        row_bytes = plan.width * plan.value_dtype.itemsize
        # Eight neighbouring threads use different slots; the next eight start at another word.
        start = lane.shift_right_logical(self.thread, 3) & (plan.slot_words - 1)
        table = self.table.at(start, 4)
        codes = self.codes_of(codes, plan.num_keys)
        value = value.at(self.index, plan.num_keys * row_bytes)
        factor = scale.wide if part.parity is not None else scale.packed

        def load(token: I32) -> list[I32]:
            token = lane.minimum(token, plan.num_keys - 1)
            row = load_words(value.at(token, row_bytes), row_bytes // 4)
            return row + self.load_codes(part, codes, plan.num_keys, token)

        def add(words: list[I32], fingerprint: I32) -> I32:
            row = lane.unpack(words[: row_bytes // 4], plan.value_dtype)
            if part.parity is not None:
                row = row[part.parity :: 2]
            integers = [lane.round_to_i32(x * factor) for x in row]
            sums, weights = integers, lane.i32(0)
            if part.parity is None:
                sums = [
                    (high << 16) + low
                    for low, high in zip(integers[::2], integers[1::2], strict=True)
                ]
            distance = 1
            while distance < plan.slot_words:
                odd = (start & distance) != 0
                sums = [lane.select(odd, sums[i ^ distance], x) for i, x in enumerate(sums)]
                distance *= 2
            for group, offset in self.slots(words[row_bytes // 4 :]):
                slot = table.at(offset)
                for i, word in enumerate(sums):
                    (slot ^ (4 * i) if i else slot).add(word, group * plan.table_bytes)
                if part.parity is None:
                    weights += self.bucket_weight(group, offset)
            if part.parity is not None:
                return fingerprint
            return fingerprint + weights * self.weigh(integers)

        def add_and_load_next(token: I32, fingerprint: I32, *words: I32) -> list[I32]:
            following = load(token + plan.num_threads)
            return [add(list(words), fingerprint), *following]

        token, init = self.thread + first, [lane.i32(0)]
        if prefetch:
            init += load(token)
            lane.barrier()
            return lane.fori_loop(token, end, add_and_load_next, init, step=plan.num_threads)[0]
        lane.barrier()
        return lane.fori_loop(
            token,
            end,
            lambda token, fingerprint: [add(load(token), fingerprint)],
            init,
            step=plan.num_threads,
        )[0]

    def bucket_weight(self, group: int | I32, offset: I32) -> I32:
        """An odd number for the slot at `offset` bytes of a group's table."""
        return offset * (self.lane.i32(group) * (2 * _BUCKET_WEIGHT) + _BUCKET_WEIGHT) + 1

    def weigh(self, columns: list[I32]) -> I32:
        """The sum of a slot's columns, each with a weight of its own."""
        total = columns[0] * _COLUMN_WEIGHTS[0]
        for column, weight in zip(columns[1:], _COLUMN_WEIGHTS[1:], strict=False):
            total += column * weight
        return total

    def fingerprint(self, num_groups: int) -> I32:
        """This thread's part of the fingerprint of all buckets, from packed tables."""
        slot_bytes = 4 * self.plan.slot_words
        slots = self.plan.table_bytes // slot_bytes

        def add(slot: I32, total: I32) -> list[I32]:
            words = self.table.at(slot, slot_bytes).load(self.plan.slot_words)
            columns = [
                half for word in words for half in ((word & 0xFFFF) - PACKED_BIAS, word >> 16)
            ]
            weight = self.bucket_weight(slot // slots, (slot % slots) * slot_bytes)
            return [total + weight * self.weigh(columns)]

        init, step = [self.lane.i32(0)], self.plan.num_threads
        return self.lane.fori_loop(self.thread, num_groups * slots, add, init, step=step)[0]

    def read_buckets(
        self, part: Pass, table: SharedPointer, codes: list[I32], sums: list[I32]
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
        self, part: Pass, codes: GlobalPointer, num_tokens: int, token: I32
    ) -> list[I32]:
        """The words of a token's codes for the groups of a pass."""
        first = codes.at(part.first_group, num_tokens * _CODES_BYTES).at(token, _CODES_BYTES)
        return [
            word
            for group in range(part.num_groups)
            for word in first.at(group, num_tokens * _CODES_BYTES).load(4, again=True)
        ]

    def load_query_codes(self, part: Pass, codes: GlobalPointer, token: I32) -> list[I32]:
        """As `load_codes`; a token beyond the last one has its codes, and reads in vain."""
        num_queries = self.plan.num_queries
        return self.load_codes(part, codes, num_queries, self.lane.minimum(token, num_queries - 1))

    def slots(self, codes: list[I32]) -> Iterator[tuple[int, I32]]:
        """The groups of a pass, from 0, and the offsets of a token's slots in their tables."""
        for i, word in enumerate(codes):
            for offset in layout.offsets(
                self.lane,
                word,
                stride=4 * self.plan.slot_words,
                scale=layout.code_scale(self.plan.hash_code_len),
            ):
                yield i // 4, offset

    def finish(
        self,
        wide: bool,
        scale: fixed_point.Scale,
        out: GlobalPointer,
        token: I32,
        sums: list[I32],
    ) -> None:
        """Writes a query's row of the slice."""
        plan, lane = self.plan, self.lane
        row_bytes = plan.width * plan.out_dtype.itemsize
        unscale = lane.f32(1.0) / (scale.packed * plan.num_hashes)
        if wide:
            unscale = lane.f32(2.0**plan.wide_shift) / (scale.wide * plan.num_hashes)
        else:
            bias = PACKED_BIAS * plan.groups * layout.HASHES
            sums = [x if i % 2 else x - bias for i, x in enumerate(sums)]
        with lane.when(token < plan.num_queries):
            words = lane.pack([lane.to_f32(x) * unscale for x in sums], plan.out_dtype)
            store_words(
                out.at(self.index, plan.num_queries * row_bytes).at(token, row_bytes), words
            )
