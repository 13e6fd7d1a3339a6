"""What the user sees of a run: a progress bar in a terminal, a line now and then elsewhere."""

import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows steps/s, tokens/s, loss, metrics and the time left of a run.

    Args:
        steps: steps of the run.
        completed: steps already done.
        console: where to write; standard output by default.
        metrics: of training, to show besides the loss.
    """

    def __init__(
        self,
        steps: int,
        completed: int = 0,
        console: Console | None = None,
        metrics: Sequence[str] = (),
    ) -> None:
        self.console = console or Console()
        self._steps, self._metrics = steps, metrics
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=completed, text="compiling")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Removes the bar from the terminal's control; what it shows stays."""
        self._bar.stop()

    def step(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._bar.update(self._task, completed=step)

    def train(self, record: Mapping[str, Any]) -> None:
        """Shows one record of training metrics."""
        metrics = "".join(f"{name} {record[name]:.3f} " for name in ("loss", *self._metrics))
        text = metrics.rstrip()
        if "steps_per_s" in record:
            rates = record["steps_per_s"], record["tokens_per_s"]
            text += " {:.1f} steps/s {:,.0f} tokens/s".format(*rates)
        self._bar.update(self._task, text=text)
        if not self.console.is_terminal:
            now = time.monotonic()
            if now - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._last_line = now
                self.say(f"step {record['step']}/{self._steps} {text}")

    def valid(self, record: Mapping[str, Any]) -> None:
        """Shows one validation."""
        numbers = {k: v for k, v in record.items() if k not in ("step", "split", "time")}
        text = " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        what = record["split"].replace("valid", "validation")
        self.say(f"step {record['step']}/{self._steps} {what} {text}")

    def say(self, text: str) -> None:
        """Writes a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
