"""Times of compiled functions, of the GPU itself and on the wall."""

import collections
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from yoso_jax.compiling import compiler_options

ROTATED_BYTES = 200_000_000
"""Inputs that take turns exceed this together, so that no call finds its own in the L2 cache."""

_MOST_SETS = 64
_LISTED_KERNELS = 8
# A batch of calls without a wait between them, and how many of them are timed.
_BATCH_SECONDS = 0.01
_MOST_CALLS = 100
_FEWEST_BATCHES, _MOST_BATCHES = 3, 100
_PROFILED_CALLS = 20


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one call of a compiled function takes.

    Attributes:
      wall_ms: median over batches of calls, each timed from its first call to its last result, of
        the milliseconds a call.
      device_ms: sum of the durations of its kernels and copies on the GPU; None elsewhere.
      kernels: the part of each kernel in `device_ms`, longest first; None elsewhere.
      temp_bytes: memory beside inputs and outputs, as XLA planned it.
      argument_bytes: size of the inputs.
      output_bytes: size of the outputs.
      timed_calls: calls in all batches.
    """

    wall_ms: float
    device_ms: float | None
    kernels: dict[str, float] | None
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    timed_calls: int

    def row(self) -> dict[str, Any]:
        """The fields, with the longest kernels only."""
        fields = dataclasses.asdict(self)
        if self.kernels is not None:
            fields["kernels"] = dict(list(self.kernels.items())[:_LISTED_KERNELS])
        return fields


def measure(
    function: Callable[..., Any], make_inputs: Callable[[int], tuple], *, seconds: float
) -> Measurement:
    """Compiles a function, warms it up and times it with inputs that take turns.

    Args:
      function: a function of arrays that `jax.jit` can compile.
      make_inputs: its arguments from the number of a set of them, which all have the same shapes.
        On a GPU there are as many sets as `ROTATED_BYTES` asks for (2 to 64), elsewhere two.
      seconds: about how long to time; at least three batches of calls are.
    """
    on_gpu = jax.default_backend() == "gpu"
    sets = [make_inputs(0)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(sets[0]))
    wanted = math.ceil(ROTATED_BYTES / size) if on_gpu else 0
    sets += [make_inputs(i) for i in range(1, max(2, min(wanted, _MOST_SETS)))]
    options = compiler_options(jax.default_backend())
    compiled = jax.jit(function, compiler_options=options).lower(*sets[0]).compile()
    jax.block_until_ready(sets)
    turns = itertools.cycle(sets)

    def run(calls: int) -> float:
        out, start = None, time.perf_counter()
        for inputs in itertools.islice(turns, calls):
            out = compiled(*inputs)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    for _ in sets[:3]:
        run(1)
    once = run(1)
    # A CPU runs calls beside each other unless they are waited for.
    calls = min(max(1, round(_BATCH_SECONDS / once)), _MOST_CALLS) if on_gpu else 1
    batches = min(max(_FEWEST_BATCHES, round(seconds / (calls * once))), _MOST_BATCHES)
    wall = statistics.median(run(calls) / calls for _ in range(batches))
    kernels = None
    if on_gpu:
        profiled = min(max(1, round(seconds / once)), _PROFILED_CALLS)
        kernels = _profile(lambda: run(profiled), profiled)
    memory = compiled.memory_analysis()
    assert memory is not None
    return Measurement(
        wall_ms=1e3 * wall,
        device_ms=None if kernels is None else sum(kernels.values()),
        kernels=kernels,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        timed_calls=calls * batches,
    )


def _profile(run: Callable[[], object], calls: int) -> dict[str, float]:
    """Milliseconds a call that each kernel runs on the GPU, longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return sum_kernels(jax.profiler.ProfileData.from_file(str(path)).planes, calls)


def sum_kernels(planes: Iterable[Any], calls: int) -> dict[str, float]:
    """Milliseconds a call by kernel, longest first, from the planes of a `ProfileData`."""
    total: collections.Counter[str] = collections.Counter()
    for plane in planes:
        if "GPU" in plane.name:
            for line in plane.lines:
                if "stream" in line.name.lower():
                    for event in line.events:
                        total[event.name] += event.duration_ns / (1e6 * calls)
    return dict(total.most_common())
