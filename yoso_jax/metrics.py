"""What a run records: metrics.jsonl (one JSON object a line) and the picture of its curves."""

import contextlib
import json
import time
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, empty if there is none.

    A line cut short, as a killed run or a full disk leaves, is left out.
    """
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader sees the old text or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class MetricsWriter:
    """Appends records to `run_dir/metrics.jsonl`.

    Args:
        run_dir: folder of the run.
        step: step the run (re)starts from. Records of later steps, written by a run that was
            stopped after its last checkpoint, are dropped, so that the file has each step once.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        path = run_dir / METRICS_FILE
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; its numbers must be finite, for JSON knows no other."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")


class Throughput:
    """Steps and tokens (padding not counted) a second since the rates were last read."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted and starts the clock."""
        self._start = time.perf_counter()
        self._steps = self._tokens = 0

    def add(self, tokens: int) -> None:
        """Counts one step of so many tokens."""
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Generator[None, None, None]:
        """Leaves the time inside out of the rates."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """The rates; counting starts anew."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rates = {"steps_per_s": self._steps / seconds, "tokens_per_s": self._tokens / seconds}
        self.restart()
        return rates


def plot_curves(run_dir: Path) -> Path | None:
    """Draws loss and accuracy against the step to `run_dir/curves.png`.

    Returns the file, or None when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = read_metrics(run_dir / METRICS_FILE)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, style in (("train", "-"), ("valid", "o-")):
            points = [(r["step"], r[name]) for r in records if r["split"] == split]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=split, markersize=4)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    path = run_dir / CURVES_FILE
    figure.savefig(path, dpi=120)
    return path
