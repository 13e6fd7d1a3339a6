"""Ctrl-C and SIGTERM: finish the step, then stop."""

import contextlib
import os
import signal
import threading
import types
from collections.abc import Iterator
from typing import NoReturn


@contextlib.contextmanager
def sigterm_exits() -> Iterator[None]:
    """While entered, SIGTERM ends the process with 0, and what was written aside is removed.

    For what comes before the first step. Only the main thread can receive signals; elsewhere this
    does nothing.
    """

    def leave(number: int, frame: types.FrameType | None) -> NoReturn:
        raise SystemExit(0)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopSignals:
    """While entered, notes the first SIGINT or SIGTERM; the second ends the process at once.

    Only the main thread can receive signals; elsewhere this does nothing.
    """

    received: signal.Signals | None = None
    """The signal that asked to stop, if any."""

    def __enter__(self) -> "StopSignals":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.received = signal.Signals(number)
        # The default action needs no Python, so it works even while a compiled step runs.
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        # Not print: a handler may interrupt a print.
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")
