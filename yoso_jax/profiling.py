"""A trace of a few steps by JAX's profiler."""

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path

import jax

FIRST_STEP = 10
"""Of those that are traced: not the first ones, which compile."""

_LAST_STEP = 14


class Profiler:
    """Traces steps 10 to 14 of those it is shown.

    Args:
        folder: gets the trace, for XProf or Perfetto; None: nothing is traced.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._is_running = folder, False
        self.has_traced = False
        """Whether there is a trace, or one is being made."""

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of this number, counted from 1."""
        if self._folder is not None and number == FIRST_STEP:
            jax.profiler.start_trace(str(self._folder))
            self._is_running = self.has_traced = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == _LAST_STEP:
            self._stop()

    def _stop(self) -> None:
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
