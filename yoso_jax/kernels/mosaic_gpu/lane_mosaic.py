"""Runs `lane` programs on the GPU: as MLIR inside a Pallas Mosaic GPU kernel.

To be imported only where a kernel is built: it loads JAX's GPU dialects.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, override

import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, gpu, llvm, math, scf
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from yoso_jax.kernels.mosaic_gpu.lane import (
    F32,
    I32,
    GlobalPointer,
    Lane,
    Pred,
    Program,
    SharedPointer,
)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _compare(predicate: arith.CmpIPredicate) -> Callable[[ir.Value, ir.Value], ir.Value]:
    return lambda a, b: arith.cmpi(predicate, a, b)


def _compare_f32(predicate: arith.CmpFPredicate) -> Callable[[ir.Value, ir.Value], ir.Value]:
    return lambda a, b: arith.cmpf(predicate, a, b)


def _ptx(instruction: str, result: Callable[[], ir.Type]) -> Callable[..., ir.Value]:
    return lambda *args: utils.inline_ptx(instruction, *args, result_types=result())


def _not(pred: ir.Value) -> ir.Value:
    one = arith.constant(pred.type, ir.IntegerAttr.get(pred.type, 1))
    return arith.xori(pred, one)


def _unpack_float16(word: ir.Value) -> list[ir.Value]:
    i16, f16 = ir.IntegerType.get_signless(16), ir.F16Type.get()
    sixteen = arith.constant(_i32(), ir.IntegerAttr.get(_i32(), 16))
    halves = [word, arith.shrui(word, sixteen)]
    halves = [arith.bitcast(f16, arith.trunci(i16, half)) for half in halves]
    return [arith.extf(ir.F32Type.get(), half) for half in halves]


_OPS: dict[str, Callable[..., Any]] = {
    "add": arith.addi,
    "sub": arith.subi,
    "mul": arith.muli,
    "and": arith.andi,
    "or": arith.ori,
    "xor": arith.xori,
    "shift_left": arith.shli,
    "shift_right_arithmetic": arith.shrsi,
    "shift_right_logical": arith.shrui,
    "divide": arith.divui,
    "remainder": arith.remui,
    "min": arith.minsi,
    "max": arith.maxsi,
    "less": _compare(arith.CmpIPredicate.slt),
    "less_equal": _compare(arith.CmpIPredicate.sle),
    "greater": _compare(arith.CmpIPredicate.sgt),
    "greater_equal": _compare(arith.CmpIPredicate.sge),
    "equal": _compare(arith.CmpIPredicate.eq),
    "not_equal": _compare(arith.CmpIPredicate.ne),
    "add_f32": arith.addf,
    "sub_f32": arith.subf,
    "mul_f32": arith.mulf,
    "divide_f32": _ptx("div.rn.f32 $0, $1, $2;", ir.F32Type.get),
    "sqrt_f32": _ptx("sqrt.rn.f32 $0, $1;", ir.F32Type.get),
    "sqrt_abs": _ptx("{ .reg .f32 t; abs.f32 t, $1; sqrt.approx.ftz.f32 $0, t; }", ir.F32Type.get),
    "rsqrt": _ptx("rsqrt.approx.ftz.f32 $0, $1;", ir.F32Type.get),
    "fma": math.fma,
    "less_f32": _compare_f32(arith.CmpFPredicate.OLT),
    "greater_f32": _compare_f32(arith.CmpFPredicate.OGT),
    "pred_and": arith.andi,
    "pred_or": arith.ori,
    "pred_not": _not,
    "select": arith.select,
    "bitcast_i32": lambda x: arith.bitcast(_i32(), x),
    "bitcast_f32": lambda x: arith.bitcast(ir.F32Type.get(), x),
    "to_f32": lambda x: arith.sitofp(ir.F32Type.get(), x),
    "round_to_i32": _ptx("cvt.rni.s32.f32 $0, $1;", _i32),
    # The four bytes of the constant are the weights of the two halves (lower two bytes).
    "add_low_half": _ptx("dp2a.lo.u32.u32 $0, $2, 1, $1;", _i32),
    "add_high_half": _ptx("dp2a.lo.s32.u32 $0, $2, 256, $1;", _i32),
    # Opaque to LLVM, which would reorder a long sum and keep all of its terms in registers.
    "add_shifted": _ptx("{ .reg .s32 t; shr.s32 t, $2, $3; add.s32 $0, $1, t; }", _i32),
    "unpack_float16": _unpack_float16,
    "pack_bfloat16": _ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", _i32),
    "pack_float16": _ptx("cvt.rn.f16x2.f32 $0, $2, $1;", _i32),
}


def _vector(registers: Sequence[int]) -> tuple[str, str]:
    """PTX for a vector of registers: its suffix, and its operand."""
    names = ", ".join(f"${i}" for i in registers)
    if len(registers) == 1:
        return "", names
    return f".v{len(registers)}", f"{{{names}}}"


class MosaicLane(Lane):
    """Emits each instruction into the MLIR function under construction."""

    def global_pointer(self, ref: ir.Value, *, writable: bool) -> GlobalPointer:
        """The address of the first element of an array in global memory."""
        return GlobalPointer(self, llvm.ptrtoint(_i64(), utils.memref_ptr(ref)), writable)

    def shared_pointer(self, ref: ir.Value) -> SharedPointer:
        """The address of the first element of an array in shared memory."""
        return SharedPointer(self, llvm.ptrtoint(_i32(), utils.memref_ptr(ref)))

    def _constant_i32(self, value: int) -> ir.Value:
        return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), value))

    def _constant_f32(self, value: float) -> ir.Value:
        f32 = ir.F32Type.get()
        return arith.constant(f32, ir.FloatAttr.get(f32, value))

    def _op(self, name: str, *args: Any) -> Any:
        return _OPS[name](*args)

    @override
    def thread_id(self) -> I32:
        return I32(self, arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x)))

    @override
    def barrier(self) -> None:
        gpu.barrier()

    @override
    def commit_copies(self) -> None:
        utils.inline_ptx("cp.async.commit_group;")

    @override
    def wait_for_copies(self, num_later: int) -> None:
        utils.inline_ptx(f"cp.async.wait_group {num_later};")

    @override
    @contextlib.contextmanager
    def when(self, pred: Pred) -> Iterator[None]:
        branch = scf.IfOp(pred.raw)
        with ir.InsertionPoint(branch.then_block):
            yield
            scf.yield_([])

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
        bounds = [self.i32(bound).raw for bound in (lower, upper, step)]
        loop = scf.ForOp(*bounds, iter_args=[value.raw for value in init])
        types = [type(value) for value in init]
        with ir.InsertionPoint(loop.body):
            carry = [t(self, raw) for t, raw in zip(types, loop.inner_iter_args, strict=True)]
            carry = body(I32(self, loop.induction_variable), *carry) or ()
            scf.yield_([value.raw for value in carry])
        return [t(self, raw) for t, raw in zip(types, loop.results, strict=True)]

    def _offset_global(self, address: ir.Value, index: ir.Value, stride: int) -> ir.Value:
        wide = arith.constant(_i64(), ir.IntegerAttr.get(_i64(), stride))
        return arith.addi(address, arith.muli(arith.extsi(_i64(), index), wide))

    def _load(
        self, space: str, address: ir.Value, num_words: int, offset: int, side: bool
    ) -> list[ir.Value]:
        suffix, operand = _vector(range(num_words))
        return list(
            utils.inline_ptx(
                f"ld.{space}{suffix}.b32 {operand}, [${num_words}+{offset}];",
                address,
                result_types=[_i32()] * num_words,
                has_side_effects=side,
            )
        )

    def _store(self, space: str, address: ir.Value, words: list[ir.Value], offset: int) -> None:
        suffix, operand = _vector(range(1, len(words) + 1))
        utils.inline_ptx(f"st.{space}{suffix}.b32 [$0+{offset}], {operand};", address, *words)

    def _load_global(
        self, address: ir.Value, num_words: int, offset: int, mutable: bool, again: bool
    ) -> list[ir.Value]:
        # Without side effects a load may move: wrong for what the kernel itself writes.
        space = "global" if mutable else "global.nc"
        return self._load(space, address, num_words, offset, mutable or again)

    def _store_global(self, address: ir.Value, words: list[ir.Value], offset: int) -> None:
        self._store("global", address, words, offset)

    def _load_shared(self, address: ir.Value, num_words: int, offset: int) -> list[ir.Value]:
        return self._load("shared", address, num_words, offset, True)

    def _store_shared(self, address: ir.Value, words: list[ir.Value], offset: int) -> None:
        self._store("shared", address, words, offset)

    def _start_copy(
        self, address: ir.Value, source: ir.Value, num_bytes: int, size: ir.Value | None
    ) -> None:
        # Only whole vectors can bypass the L1 cache.
        cache = "cg" if num_bytes == 16 else "ca"
        instruction = f"cp.async.{cache}.shared.global [$0], [$1], {num_bytes}"
        if size is None:
            utils.inline_ptx(f"{instruction};", address, source)
        else:
            utils.inline_ptx(f"{instruction}, $2;", address, source, size)

    def _reduce_shared(self, name: str, address: ir.Value, value: ir.Value, offset: int) -> None:
        utils.inline_ptx(f"red.shared.{name}.s32 [$0+{offset}], $1;", address, value)


def call(program: Program, *inputs: Array) -> list[Array]:
    """Runs the program on the GPU.

    Args:
      program: what to run.
      *inputs: arrays of any shapes; the program sees their bytes in row-major order.

    Returns:
      The program's outputs.
    """
    num_arrays = len(inputs) + len(program.outputs)

    def body(*refs: Any) -> None:
        # The number of the block comes from JAX: vmap adds an axis to the grid of the hardware.
        block = lax.axis_index("block")

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),) * (num_arrays + 1) + (plgpu.Layout.WG_SPLAT(()),)
        )
        def lanes(_: Any, *args: Any) -> None:
            *arrays, shared, block = args
            lane = MosaicLane(program.num_threads)
            pointers = tuple(
                lane.global_pointer(array, writable=i >= len(inputs))
                for i, array in enumerate(arrays)
            )
            program.body(
                lane,
                pointers[: len(inputs)],
                pointers[len(inputs) :],
                lane.shared_pointer(shared),
                I32(lane, block.registers.item()),
            )

        lanes(*refs, block)

    body.__name__ = program.name
    kernel = plgpu.kernel(
        body,
        out_type=list(program.outputs),
        scratch_types=[plgpu.SMEM((program.shared_bytes // 4,), jnp.int32)],
        grid=(program.num_blocks,),
        grid_names=("block",),
        num_threads=program.num_warpgroups,
        thread_name="warpgroup",
        # Lane code places its own barriers.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return list(kernel(*map(jnp.asarray, inputs)))
