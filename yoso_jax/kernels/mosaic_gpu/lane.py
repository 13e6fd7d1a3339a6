"""A small language for the code of one GPU thread, which also runs on a CPU.

A kernel is a Python function of a `Lane`, the thread it is running as. It computes with 32-bit
values (`I32`, `F32`, and `Pred` from comparisons), loads and stores words through pointers, and
meets the other threads of its block at `Lane.barrier`. Python's own control flow unrolls; what
depends on a value is `Lane.fori_loop`, `Lane.when` and `Lane.select`.

    def double(lane, inputs, outputs, shared, block):
        index = block * lane.num_threads + lane.thread_id()
        with lane.when(index < 1000):
            (word,) = inputs[0].at(index, 4).load()
            outputs[0].at(index, 4).store([word * 2])

    program = Program(
        "double",
        double,
        outputs=(jax.ShapeDtypeStruct((1000,), jnp.int32),),
        num_blocks=8,
        num_warpgroups=1,
    )

`lane_mosaic.call(program, x)` runs it on the GPU. `lane_numpy.call(program, x)` runs the same
function in NumPy, all threads of a block in lock step, and refuses what a GPU would not notice:
accesses out of bounds, misaligned, of memory that nobody has written, or that race.

Here are the types and their rules; a backend supplies the primitives whose names begin with an
underscore.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

WARPGROUP = 128
"""Threads of a warpgroup."""


class _Value:
    """A value of each thread; `raw` is the backend's representation."""

    __slots__ = ("lane", "raw")
    __hash__ = None  # pyrefly: ignore[bad-override]

    def __init__(self, lane: "Lane", raw: Any) -> None:
        self.lane = lane
        self.raw = raw

    def __bool__(self) -> bool:
        raise TypeError("A value of a lane has no truth value in Python: use lane.when or select.")


class Pred(_Value):
    """A truth value. `&`, `|` and `~` combine them."""

    __slots__ = ()

    def __and__(self, other: "Pred") -> "Pred":
        return Pred(self.lane, self.lane._op("pred_and", self.raw, other.raw))

    def __or__(self, other: "Pred") -> "Pred":
        return Pred(self.lane, self.lane._op("pred_or", self.raw, other.raw))

    def __invert__(self) -> "Pred":
        return Pred(self.lane, self.lane._op("pred_not", self.raw))


class I32(_Value):
    """A 32-bit integer: signed, two's complement, sums and products wrap.

    `>>` keeps the sign (`Lane.shift_right_logical` does not); `//` and `%` are for operands that
    are not negative.
    """

    __slots__ = ()

    def _with(self, name: str, other: "I32 | int") -> "I32":
        return I32(self.lane, self.lane._op(name, self.raw, self.lane.i32(other).raw))

    def _compare(self, name: str, other: "I32 | int") -> Pred:
        return Pred(self.lane, self.lane._op(name, self.raw, self.lane.i32(other).raw))

    def __add__(self, other: "I32 | int") -> "I32":
        return self._with("add", other)

    def __sub__(self, other: "I32 | int") -> "I32":
        return self._with("sub", other)

    def __mul__(self, other: "I32 | int") -> "I32":
        return self._with("mul", other)

    def __and__(self, other: "I32 | int") -> "I32":
        return self._with("and", other)

    def __or__(self, other: "I32 | int") -> "I32":
        return self._with("or", other)

    def __xor__(self, other: "I32 | int") -> "I32":
        return self._with("xor", other)

    def __lshift__(self, other: "I32 | int") -> "I32":
        return self._with("shift_left", other)

    def __rshift__(self, other: "I32 | int") -> "I32":
        return self._with("shift_right_arithmetic", other)

    def __floordiv__(self, other: "I32 | int") -> "I32":
        return self._with("divide", other)

    def __mod__(self, other: "I32 | int") -> "I32":
        return self._with("remainder", other)

    def __lt__(self, other: "I32 | int") -> Pred:
        return self._compare("less", other)

    def __le__(self, other: "I32 | int") -> Pred:
        return self._compare("less_equal", other)

    def __gt__(self, other: "I32 | int") -> Pred:
        return self._compare("greater", other)

    def __ge__(self, other: "I32 | int") -> Pred:
        return self._compare("greater_equal", other)

    def __eq__(self, other: "I32 | int") -> Pred:  # pyrefly: ignore[bad-override]
        return self._compare("equal", other)

    def __ne__(self, other: "I32 | int") -> Pred:  # pyrefly: ignore[bad-override]
        return self._compare("not_equal", other)


class F32(_Value):
    """A 32-bit float; results are rounded to nearest even."""

    __slots__ = ()

    def _with(self, name: str, other: "F32 | float | int") -> "F32":
        return F32(self.lane, self.lane._op(name, self.raw, self.lane.f32(other).raw))

    def _compare(self, name: str, other: "F32 | float | int") -> Pred:
        return Pred(self.lane, self.lane._op(name, self.raw, self.lane.f32(other).raw))

    def __add__(self, other: "F32 | float | int") -> "F32":
        return self._with("add_f32", other)

    def __sub__(self, other: "F32 | float | int") -> "F32":
        return self._with("sub_f32", other)

    def __mul__(self, other: "F32 | float | int") -> "F32":
        return self._with("mul_f32", other)

    def __truediv__(self, other: "F32 | float | int") -> "F32":
        return self._with("divide_f32", other)

    def __lt__(self, other: "F32 | float | int") -> Pred:
        return self._compare("less_f32", other)

    def __gt__(self, other: "F32 | float | int") -> Pred:
        return self._compare("greater_f32", other)


def _check_access(num_words: int, offset: int) -> None:
    if num_words not in (1, 2, 4):
        raise ValueError(f"An access is of 1, 2 or 4 words, got {num_words}.")
    if offset % (4 * num_words):
        raise ValueError(f"offset must be a multiple of {4 * num_words} bytes, got {offset}.")


class GlobalPointer(_Value):
    """An address in an input or an output, with 64 bits.

    An access is of 1, 2 or 4 words of 32 bits, at an address that is a multiple of its size.
    Inputs are constant: a store to one is an error, and loads may be cached and moved.
    """

    __slots__ = ("writable",)

    def __init__(self, lane: "Lane", raw: Any, writable: bool) -> None:
        super().__init__(lane, raw)
        self.writable = writable

    def at(self, index: I32 | int, stride: int) -> "GlobalPointer":
        """The address `index * stride` bytes further; the product has 64 bits."""
        raw = self.lane._offset_global(self.raw, self.lane.i32(index).raw, stride)
        return GlobalPointer(self.lane, raw, self.writable)

    def load(self, num_words: int = 1, offset: int = 0, *, again: bool = False) -> list[I32]:
        """The words at `offset` bytes from here.

        With `again` a constant is not kept in a register from an earlier load of it.
        """
        _check_access(num_words, offset)
        words = self.lane._load_global(self.raw, num_words, offset, self.writable, again)
        return [I32(self.lane, word) for word in words]

    def store(self, words: Sequence[I32], offset: int = 0) -> None:
        """Writes the words at `offset` bytes from here."""
        _check_access(len(words), offset)
        if not self.writable:
            raise TypeError("An input cannot be written.")
        self.lane._store_global(self.raw, [word.raw for word in words], offset)


class SharedPointer(_Value):
    """An address in the memory that the threads of a block share."""

    __slots__ = ()

    def at(self, index: I32 | int, stride: int = 1) -> "SharedPointer":
        """The address `index * stride` bytes further."""
        offset = self.lane.i32(index)
        if stride != 1:
            offset *= stride
        return SharedPointer(self.lane, self.lane._op("add", self.raw, offset.raw))

    def __xor__(self, mask: int) -> "SharedPointer":
        """The address with the bits of `mask` flipped.

        The start of the shared memory is a multiple of 1024, so bits below that are those of the
        offset.
        """
        return SharedPointer(self.lane, self.lane._op("xor", self.raw, self.lane.i32(mask).raw))

    def load(self, num_words: int = 1, offset: int = 0) -> list[I32]:
        """The words at `offset` bytes from here."""
        _check_access(num_words, offset)
        return [
            I32(self.lane, word) for word in self.lane._load_shared(self.raw, num_words, offset)
        ]

    def store(self, words: Sequence[I32], offset: int = 0) -> None:
        """Writes the words at `offset` bytes from here."""
        _check_access(len(words), offset)
        self.lane._store_shared(self.raw, [word.raw for word in words], offset)

    def start_copy(
        self, source: GlobalPointer, num_bytes: int = 16, *, where: Pred | None = None
    ) -> None:
        """Begins to copy 4, 8 or 16 bytes of an input; `Lane.wait_for_copies` waits for the end.

        Zeros are stored where `where` does not hold; the source must be an input's there, too.
        """
        if num_bytes not in (4, 8, 16):
            raise ValueError(f"num_bytes must be 4, 8 or 16, got {num_bytes}.")
        size = None
        if where is not None:
            size = self.lane.select(where, self.lane.i32(num_bytes), self.lane.i32(0)).raw
        self.lane._start_copy(self.raw, source.raw, num_bytes, size)

    def add(self, value: I32, offset: int = 0) -> None:
        """Adds to the word at `offset` bytes from here, atomically."""
        _check_access(1, offset)
        self.lane._reduce_shared("add", self.raw, value.raw, offset)

    def maximum(self, value: I32, offset: int = 0) -> None:
        """Raises the word at `offset` bytes from here to at least `value`, atomically."""
        _check_access(1, offset)
        self.lane._reduce_shared("max", self.raw, value.raw, offset)


class Lane(abc.ABC):
    """One thread of a block of `num_threads`, and the instructions it can run."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads

    def i32(self, value: I32 | int) -> I32:
        """An integer constant, taken modulo 2**32; an I32 stays what it is."""
        if isinstance(value, I32):
            return value
        return I32(self, self._constant_i32((int(value) + 2**31) % 2**32 - 2**31))

    def f32(self, value: F32 | float | int) -> F32:
        """A float constant; an F32 stays what it is."""
        return value if isinstance(value, F32) else F32(self, self._constant_f32(float(value)))

    def select[T: (I32, F32)](self, pred: Pred, on_true: T, on_false: T) -> T:
        """`on_true` where `pred` holds, else `on_false`."""
        return type(on_true)(self, self._op("select", pred.raw, on_true.raw, on_false.raw))

    def minimum(self, a: I32, b: I32 | int) -> I32:
        """The smaller of two integers."""
        return I32(self, self._op("min", a.raw, self.i32(b).raw))

    def maximum(self, a: I32, b: I32 | int) -> I32:
        """The larger of two integers."""
        return I32(self, self._op("max", a.raw, self.i32(b).raw))

    def shift_right_logical(self, x: I32, bits: I32 | int) -> I32:
        """Shifts zeros in from the left."""
        return I32(self, self._op("shift_right_logical", x.raw, self.i32(bits).raw))

    def bitcast_i32(self, x: F32) -> I32:
        """The same 32 bits as an integer."""
        return I32(self, self._op("bitcast_i32", x.raw))

    def bitcast_f32(self, x: I32) -> F32:
        """The same 32 bits as a float."""
        return F32(self, self._op("bitcast_f32", x.raw))

    def to_f32(self, x: I32) -> F32:
        """The nearest float."""
        return F32(self, self._op("to_f32", x.raw))

    def round_to_i32(self, x: F32) -> I32:
        """The nearest integer, ties to even; clipped to 32 bits, and 0 for NaN."""
        return I32(self, self._op("round_to_i32", x.raw))

    def sqrt(self, x: F32) -> F32:
        """The square root."""
        return F32(self, self._op("sqrt_f32", x.raw))

    def sqrt_abs(self, x: F32) -> F32:
        """The square root of `|x|` in one instruction, to about a unit in the last place.

        It is 0 where `|x|` is denormal.
        """
        return F32(self, self._op("sqrt_abs", x.raw))

    def rsqrt(self, x: F32) -> F32:
        """One over the square root, to about a unit in the last place."""
        return F32(self, self._op("rsqrt", x.raw))

    def fma(self, a: F32, b: F32, c: F32 | float) -> F32:
        """`a * b + c`, rounded once."""
        return F32(self, self._op("fma", a.raw, b.raw, self.f32(c).raw))

    def add_low_half(self, accumulator: I32, word: I32) -> I32:
        """`accumulator` plus the lower 16 bits of `word` without sign, in one instruction."""
        return I32(self, self._op("add_low_half", accumulator.raw, word.raw))

    def add_high_half(self, accumulator: I32, word: I32) -> I32:
        """`accumulator` plus the upper 16 bits of `word` with sign, in one instruction."""
        return I32(self, self._op("add_high_half", accumulator.raw, word.raw))

    def add_shifted(self, accumulator: I32, word: I32, bits: int) -> I32:
        """`accumulator + (word >> bits)`, one after another where many are added."""
        args = accumulator.raw, word.raw, self.i32(bits).raw
        return I32(self, self._op("add_shifted", *args))

    def unpack(self, words: Sequence[I32], dtype: np.dtype) -> list[F32]:
        """The floats of `dtype` (float32, bfloat16 or float16) in words of memory."""
        if dtype == np.float32:
            return [self.bitcast_f32(word) for word in words]
        if dtype == np.float16:
            halves = [self._op("unpack_float16", word.raw) for word in words]
            return [F32(self, half) for pair in halves for half in pair]
        self._check_bfloat16(dtype)
        # A bfloat16 is the upper half of a float32.
        halves = [half for word in words for half in (word << 16, word & -0x10000)]
        return [self.bitcast_f32(half) for half in halves]

    def pack(self, values: Sequence[F32], dtype: np.dtype) -> list[I32]:
        """The words of memory that hold `values` as `dtype`, rounded to nearest even."""
        if dtype == np.float32:
            return [self.bitcast_i32(value) for value in values]
        if dtype != np.float16:
            self._check_bfloat16(dtype)
        if len(values) % 2:
            raise ValueError(f"Two {dtype.name} fill a word, got {len(values)} values.")
        name = f"pack_{dtype.name}"
        pairs = zip(values[::2], values[1::2], strict=True)
        return [I32(self, self._op(name, low.raw, high.raw)) for low, high in pairs]

    def _check_bfloat16(self, dtype: np.dtype) -> None:
        if dtype.name != "bfloat16":
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype.name}.")

    @abc.abstractmethod
    def thread_id(self) -> I32:
        """The number of this thread in its block, from 0."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Waits for all threads of the block; what each wrote is then visible to all."""

    @abc.abstractmethod
    def commit_copies(self) -> None:
        """Makes a group, perhaps an empty one, of the copies that this thread has started."""

    @abc.abstractmethod
    def wait_for_copies(self, num_later: int) -> None:
        """Waits for this thread's groups of copies, but for the `num_later` newest.

        Other threads see what was copied after a barrier.
        """

    @abc.abstractmethod
    def when(self, pred: Pred) -> contextlib.AbstractContextManager[None]:
        """A context whose instructions run only in threads where `pred` holds.

        A barrier inside needs a `pred` that is the same in all threads.
        """

    @abc.abstractmethod
    def fori_loop(
        self,
        lower: I32 | int,
        upper: I32 | int,
        body: Callable[..., Sequence[I32 | F32] | None],
        init: Sequence[I32 | F32] = (),
        *,
        step: int = 1,
    ) -> list[Any]:
        """Runs `carry = body(i, *carry)` for i in `range(lower, upper, step)`.

        Args:
          lower: first i.
          upper: end of the range.
          body: returns the new carry, as many values of the same types as `init`.
          init: the first carry.
          step: at least 1.

        Returns:
          The last carry.
        """

    @abc.abstractmethod
    def _constant_i32(self, value: int) -> Any: ...

    @abc.abstractmethod
    def _constant_f32(self, value: float) -> Any: ...

    @abc.abstractmethod
    def _op(self, name: str, *args: Any) -> Any: ...

    @abc.abstractmethod
    def _offset_global(self, address: Any, index: Any, stride: int) -> Any: ...

    @abc.abstractmethod
    def _load_global(
        self, address: Any, num_words: int, offset: int, mutable: bool, again: bool
    ) -> list: ...

    @abc.abstractmethod
    def _store_global(self, address: Any, words: list, offset: int) -> None: ...

    @abc.abstractmethod
    def _load_shared(self, address: Any, num_words: int, offset: int) -> list: ...

    @abc.abstractmethod
    def _store_shared(self, address: Any, words: list, offset: int) -> None: ...

    @abc.abstractmethod
    def _start_copy(self, address: Any, source: Any, num_bytes: int, size: Any) -> None: ...

    @abc.abstractmethod
    def _reduce_shared(self, name: str, address: Any, value: Any, offset: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel with the shapes of what it writes and of its launch.

    Attributes:
      name: what profilers show.
      body: `body(lane, inputs, outputs, shared, block)` runs one thread: tuples of `GlobalPointer`
        to the first element of each input and output, the `SharedPointer` to the block's shared
        memory, and the block's number as `I32`.
      outputs: shapes and dtypes of what it writes: each word, unless it is `incomplete`.
      num_blocks: blocks of threads; they run in any order.
      num_warpgroups: warpgroups of a block, 1 to 8.
      shared_bytes: shared memory of a block, a multiple of 4.
      incomplete: whether words of the outputs may stay unwritten.
    """

    name: str
    body: Callable[[Lane, tuple, tuple, SharedPointer, I32], None]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    num_blocks: int
    num_warpgroups: int
    shared_bytes: int = 4
    incomplete: bool = False

    @property
    def num_threads(self) -> int:
        """Threads of a block."""
        return self.num_warpgroups * WARPGROUP


type Call = Callable[..., list]
"""Runs a program on arrays: `call(program, *inputs)` returns its outputs."""
