"""Arrays in registers of a warpgroup, as values of each thread.

To be imported only where a kernel is built: it loads JAX's GPU dialects.
"""

from collections.abc import Sequence

import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental.mosaic import gpu as mgpu

from yoso_jax.kernels.mosaic_gpu.lane import F32, I32, Lane


def read_registers(lane: Lane, array: mgpu.FragmentedArray) -> list[F32]:
    """What a thread holds of a float32 array.

    Of the result of a warpgroup's matrix product these are, for each eight columns, two neighbours
    in one row and in the row eight further on; of an array of its rows or columns those.
    """
    size = ir.VectorType(array.registers.flat[0].type).shape[0]
    return [
        F32(lane, vector.extract(register, [], [i]))
        for register in array.registers.flat
        for i in range(size)
    ]


def write_registers(values: Sequence[F32], like: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """A float32 array laid out as `like`, of what `read_registers` would give."""
    size = ir.VectorType(like.registers.flat[0].type).shape[0]
    register = ir.VectorType.get((size,), ir.F32Type.get())
    registers = np.empty(like.registers.shape, object)
    for i in range(registers.size):
        parts = [value.raw for value in values[i * size : (i + 1) * size]]
        registers.flat[i] = vector.from_elements(register, parts)
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)


def write_words(
    words: Sequence[I32], like: mgpu.FragmentedArray, dtype: np.dtype
) -> mgpu.FragmentedArray:
    """An array laid out as `like`, of words that hold two 16-bit floats each."""
    pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
    registers = np.empty(like.registers.shape, object)
    for i, word in enumerate(words):
        registers.flat[i] = llvm.bitcast(pair, word.raw)
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)
