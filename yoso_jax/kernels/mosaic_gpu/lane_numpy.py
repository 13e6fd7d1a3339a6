"""Runs `lane` programs in NumPy, all threads of a block in lock step, to check them on a CPU.

A program that runs here without an error makes no access out of bounds or misaligned, reads no
word that was not written, leaves no output word unwritten, and has no race: between two barriers
no two threads touch a word of which one writes it (only atomic operations may share a word), and
no two blocks touch an output word of which one writes it.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, override

import ml_dtypes
import numpy as np

from yoso_jax.kernels.mosaic_gpu.lane import (
    F32,
    I32,
    GlobalPointer,
    Lane,
    Pred,
    Program,
    SharedPointer,
)

# What memory holds before it is written.
_POISON = 0xA5
_NOBODY = np.iinfo(np.int32).max


class ProgramError(Exception):
    """A program did what is undefined on a GPU; the traceback shows the line."""


class _Touched:
    """The lowest and highest number of those that touched each word in one way."""

    def __init__(self, num_words: int) -> None:
        self.anything = False
        self.lowest = np.full(num_words, _NOBODY, np.int32)
        self.highest = np.full(num_words, -1, np.int32)

    def add(self, words: np.ndarray, who: np.ndarray) -> None:
        self.anything = True
        np.minimum.at(self.lowest, words, who)
        np.maximum.at(self.highest, words, who)

    def by_others(self, words: np.ndarray, who: np.ndarray) -> np.ndarray:
        return (self.lowest[words] < who) | (self.highest[words] > who)

    def forget(self) -> None:
        if self.anything:
            self.anything = False
            self.lowest.fill(_NOBODY)
            self.highest.fill(-1)


# What may not meet each access of another thread between two barriers.
_CONFLICTS = {
    "read": ("write", "atomic operation"),
    "write": ("read", "write", "atomic operation"),
    "atomic operation": ("read", "write"),
}


class _Memory:
    """Words that know whether they are written, and who touched them.

    `between` names the kinds of parties that may race for them: threads of a block, blocks.
    """

    def __init__(self, name: str, num_bytes: int, between: Sequence[str] = ()) -> None:
        self.name = name
        self.bytes = np.full(-(-num_bytes // 4) * 4, _POISON, np.uint8)
        self.num_bytes = num_bytes
        self.words = self.bytes.view(np.int32)
        self.written = np.zeros(self.words.size, bool)
        self.arriving = np.zeros(self.words.size, bool)
        self._touched = {
            party: {access: _Touched(self.words.size) for access in _CONFLICTS} for party in between
        }

    def forget(self, party: str) -> None:
        for touched in self._touched.get(party, {}).values():
            touched.forget()

    def touch(self, access: str, words: np.ndarray, **parties: np.ndarray) -> None:
        """Refuses an access that races, or that uses words never written.

        `words` has a row for each thread, `parties` the number of each thread and its block.
        """
        if self.arriving[words].any():
            raise ProgramError(f"{self.name}: a word is used while it is being copied.")
        if access == "write":
            self.written[words] = True
        elif not self.written[words].all():
            raise ProgramError(f"{self.name}: a word is used that was never written.")
        for party, touched in self._touched.items():
            who = np.broadcast_to(parties[party][:, None], words.shape)
            touched[access].add(words, who)
            for other in _CONFLICTS[access]:
                if not touched[other].anything:
                    continue
                raced = touched[other].by_others(words, who)
                if raced.any():
                    raise ProgramError(
                        f"{self.name}: race on word {words[raced][0]}: a {access} by {party} "
                        f"{who[raced][0]} and a {other} by another {party}."
                    )


def _halves(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unsigned = word.view(np.uint32)
    return (unsigned & 0xFFFF).astype(np.uint16), (unsigned >> 16).astype(np.uint16)


def _round_to_i32(x: np.ndarray) -> np.ndarray:
    limits = np.iinfo(np.int32)
    rounded = np.rint(np.where(np.isnan(x), 0, x).astype(np.float64))
    return np.clip(rounded, limits.min, limits.max).astype(np.int32)


def _pack(dtype: type) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        low, high = (x.astype(dtype).view(np.uint16).astype(np.uint32) for x in (low, high))
        return (low | high << 16).view(np.int32)

    return pack


_OPS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shift_left": np.left_shift,
    "shift_right_arithmetic": np.right_shift,
    "shift_right_logical": lambda x, bits: (x.view(np.uint32) >> bits.view(np.uint32)).view(
        np.int32
    ),
    "divide": np.floor_divide,
    "remainder": np.remainder,
    "min": np.minimum,
    "max": np.maximum,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "add_f32": np.add,
    "sub_f32": np.subtract,
    "mul_f32": np.multiply,
    "divide_f32": np.divide,
    "sqrt_f32": np.sqrt,
    "sqrt_abs": lambda x: np.sqrt(np.abs(x)),
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    # The product is exact in float64; its sum is rounded twice, which hardly ever matters.
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "less_f32": np.less,
    "greater_f32": np.greater,
    "pred_and": np.logical_and,
    "pred_or": np.logical_or,
    "pred_not": np.logical_not,
    "select": np.where,
    "bitcast_i32": lambda x: x.view(np.int32),
    "bitcast_f32": lambda x: x.view(np.float32),
    "to_f32": lambda x: x.astype(np.float32),
    "round_to_i32": _round_to_i32,
    "add_low_half": lambda acc, word: acc + _halves(word)[0].astype(np.int32),
    "add_high_half": lambda acc, word: acc + (word >> 16),
    "add_shifted": lambda acc, word, bits: acc + (word >> bits),
    "unpack_float16": lambda word: [
        half.view(np.float16).astype(np.float32) for half in _halves(word)
    ],
    "pack_bfloat16": _pack(ml_dtypes.bfloat16),
    "pack_float16": _pack(np.float16),
}


class NumpyLane(Lane):
    """All threads of one block; a value is an array with an element for each."""

    def __init__(self, num_threads: int, block: int, memories: Sequence[_Memory]) -> None:
        super().__init__(num_threads)
        self._blocks = np.full(num_threads, block, np.int32)
        self._memories = memories
        self._threads = np.arange(num_threads, dtype=np.int32)
        self._active = np.ones(num_threads, bool)
        # Words of shared memory that copies under way will write, the oldest group first.
        self._copies: list[list[np.ndarray]] = [[]]

    def _constant_i32(self, value: int) -> np.ndarray:
        return np.full(self.num_threads, value, np.int32)

    def _constant_f32(self, value: float) -> np.ndarray:
        return np.full(self.num_threads, value, np.float32)

    def _op(self, name: str, *args: np.ndarray) -> Any:
        if name.startswith("shift"):
            bits = args[1][self._active]
            if (bits < 0).any() or (bits > 31).any():
                raise ProgramError("A shift must be by 0 to 31 bits.")
        if name in ("divide", "remainder") and (
            (args[0] < 0)[self._active].any() or (args[1] <= 0)[self._active].any()
        ):
            raise ProgramError("// and % need a dividend >= 0 and a divisor > 0.")
        return _OPS[name](*args)

    @override
    def thread_id(self) -> I32:
        return I32(self, self._threads)

    @override
    def barrier(self) -> None:
        if self._active.all():
            for memory in self._memories:
                memory.forget("thread")
        elif self._active.any():
            raise ProgramError("Some threads of the block do not reach a barrier.")

    @override
    def commit_copies(self) -> None:
        self._copies.append([])

    @override
    def wait_for_copies(self, num_later: int) -> None:
        arrived = self._copies[: len(self._copies) - 1 - num_later]
        self._copies = self._copies[len(arrived) :]
        for words in itertools.chain(*arrived):
            self._memories[-1].arriving[words] = False

    @override
    @contextlib.contextmanager
    def when(self, pred: Pred) -> Iterator[None]:
        outer, self._active = self._active, self._active & pred.raw
        try:
            yield
        finally:
            self._active = outer

    @override
    def fori_loop(
        self,
        lower: I32 | int,
        upper: I32 | int,
        body: Callable[..., Sequence[I32 | F32] | None],
        init: Sequence[I32 | F32] = (),
        *,
        step: int = 1,
    ) -> list[Any]:
        index, upper = self.i32(lower).raw, self.i32(upper).raw
        carry, outer = list(init), self._active
        try:
            while (active := outer & (index < upper)).any():
                self._active = active
                new = body(I32(self, index), *carry) or ()
                carry = [
                    type(old)(self, np.where(active, value.raw, old.raw))
                    for old, value in zip(carry, new, strict=True)
                ]
                index = index + np.int32(step)
        finally:
            self._active = outer
        return carry

    def _words(self, memory: _Memory, address: np.ndarray, num_words: int) -> np.ndarray:
        """Checked indices of words, a row for each active thread."""
        address = address[self._active]
        size = 4 * num_words
        if (address % size).any():
            raise ProgramError(f"{memory.name}: an access of {size} bytes is misaligned.")
        if (address < 0).any() or (address + size > memory.num_bytes).any():
            raise ProgramError(
                f"{memory.name}: bytes {address.min()} to {address.max() + size} of "
                f"{memory.num_bytes} are accessed."
            )
        return address[:, None] // 4 + np.arange(num_words)

    def _touch(self, memory: _Memory, access: str, words: np.ndarray) -> None:
        parties = {"thread": self._threads[self._active], "block": self._blocks[self._active]}
        memory.touch(access, words, **parties)

    def _load(self, memory: _Memory, address: np.ndarray, num_words: int) -> list[np.ndarray]:
        words = self._words(memory, address, num_words)
        self._touch(memory, "read", words)
        loaded = np.zeros((num_words, self.num_threads), np.int32)
        loaded[:, self._active] = memory.words[words].T
        return list(loaded)

    def _store(self, memory: _Memory, address: np.ndarray, values: list[np.ndarray]) -> None:
        words = self._words(memory, address, len(values))
        self._touch(memory, "write", words)
        memory.words[words] = np.stack(values, -1)[self._active]

    def _offset_global(
        self, address: tuple[_Memory, np.ndarray], index: np.ndarray, stride: int
    ) -> tuple[_Memory, np.ndarray]:
        memory, offset = address
        return memory, offset + index.astype(np.int64) * stride

    def _load_global(
        self,
        address: tuple[_Memory, np.ndarray],
        num_words: int,
        offset: int,
        mutable: bool,
        again: bool,
    ) -> list[np.ndarray]:
        return self._load(address[0], address[1] + offset, num_words)

    def _store_global(
        self, address: tuple[_Memory, np.ndarray], words: list[np.ndarray], offset: int
    ) -> None:
        self._store(address[0], address[1] + offset, words)

    def _load_shared(self, address: np.ndarray, num_words: int, offset: int) -> list[np.ndarray]:
        return self._load(self._memories[-1], address + offset, num_words)

    def _store_shared(self, address: np.ndarray, words: list[np.ndarray], offset: int) -> None:
        self._store(self._memories[-1], address + offset, words)

    def _start_copy(
        self,
        address: np.ndarray,
        source: tuple[_Memory, np.ndarray],
        num_bytes: int,
        size: np.ndarray | None,
    ) -> None:
        num_words = num_bytes // 4
        loaded = self._load_global(source, num_words, 0, False, False)
        if size is not None:
            loaded = [np.where(size > 0, word, 0) for word in loaded]
        self._store_shared(address, loaded, 0)
        words = self._words(self._memories[-1], address, num_words)
        self._memories[-1].arriving[words] = True
        self._copies[-1].append(words)

    def _reduce_shared(
        self, name: str, address: np.ndarray, value: np.ndarray, offset: int
    ) -> None:
        shared = self._memories[-1]
        words = self._words(shared, address + offset, 1)
        self._touch(shared, "atomic operation", words)
        reduce = {"add": np.add, "max": np.maximum}[name]
        reduce.at(shared.words, words[:, 0], value[self._active])


def call(program: Program, *inputs: Any) -> list[np.ndarray]:
    """Runs the program in NumPy, block after block.

    Args:
      program: what to run.
      *inputs: arrays of any shapes; the program sees their bytes in row-major order.

    Returns:
      The program's outputs.

    Raises:
      ProgramError: it does what is undefined on a GPU.
    """
    arrays = []
    for i, value in enumerate(inputs):
        array = np.ascontiguousarray(value)
        memory = _Memory(f"input {i}", array.nbytes)
        memory.bytes[: array.nbytes] = array.reshape(-1).view(np.uint8)
        memory.written[:] = True
        arrays.append(memory)
    outputs = []
    for i, output in enumerate(program.outputs):
        num_bytes = int(np.prod(output.shape)) * np.dtype(output.dtype).itemsize
        outputs.append(_Memory(f"output {i}", num_bytes, ("thread", "block")))
    arrays += outputs

    with np.errstate(all="ignore"):
        for block in range(program.num_blocks):
            for memory in outputs:
                memory.forget("thread")
            shared = _Memory("shared memory", program.shared_bytes, ("thread",))
            lane = NumpyLane(program.num_threads, block, [*arrays, shared])
            start = np.zeros(program.num_threads, np.int64)
            pointers = tuple(
                GlobalPointer(lane, (memory, start), i >= len(inputs))
                for i, memory in enumerate(arrays)
            )
            program.body(
                lane,
                pointers[: len(inputs)],
                pointers[len(inputs) :],
                SharedPointer(lane, lane.i32(0).raw),
                lane.i32(block),
            )
    for memory in outputs:
        if not (program.incomplete or memory.written.all()):
            raise ProgramError(f"{memory.name}: {(~memory.written).sum()} words are not written.")
    return [
        memory.bytes[: memory.num_bytes].view(output.dtype).reshape(output.shape)
        for memory, output in zip(outputs, program.outputs, strict=True)
    ]
