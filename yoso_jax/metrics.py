"""What a run records: metrics.jsonl (one JSON object a line) and the picture of its curves."""

import contextlib
import importlib.util
import json
import time
import types
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from yoso_jax.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
TENSORBOARD_FOLDER = "tensorboard"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, empty if there is none.

    A line cut short, as a killed run or a full disk leaves, is left out.
    """
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and record.keys() >= {"step", "split"}:
            records.append(record)
    return records


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def score_name(metrics: Mapping[str, Any]) -> str | None:
    """The name of what ranks checkpoints: the metric after the loss; None if there is none."""
    names = [name for name in metrics if name != "time"]
    return next(iter(names[names.index("loss") + 1 :]), None)


def score(metrics: Mapping[str, Any]) -> float:
    """What ranks checkpoints, see `score_name`."""
    name = score_name(metrics)
    assert name is not None
    return metrics[name]


class MetricsWriter:
    """Appends records to `run_dir/metrics.jsonl`, and perhaps to events for TensorBoard.

    Args:
        run_dir: folder of the run; None: nothing is written.
        step: step the run (re)starts from. Records of later steps, written by a run that was
            stopped after its last checkpoint, are dropped, so that the file has each step once.
        tensorboard: whether events are written to `run_dir/tensorboard`.
    """

    def __init__(self, run_dir: Path | None, step: int, tensorboard: bool = False) -> None:
        self._file = self._events = None
        if run_dir is None:
            return
        path = run_dir / METRICS_FILE
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if tensorboard:
            from tensorboardX import SummaryWriter

            folder = run_dir / TENSORBOARD_FOLDER
            self._events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; its numbers must be finite, for JSON knows no other."""
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._events is not None:
            for name, value in record.items():
                if name not in ("step", "split", "time"):
                    self._events.add_scalar(f"{record['split']}/{name}", value, record["step"])


def check_tensorboard() -> None:
    """Raises `ConfigError` if events cannot be written."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "tensorboard: true needs tensorboardX: pip install 'yoso-jax[tensorboard]'"
        )


class Throughput:
    """Steps and tokens (padding not counted) a second since the rates were last read.

    Also the share of the time that the loop waited for input. Since it does not wait for the
    device, which works on the steps before, that bounds the time in which the device had nothing
    to do for lack of input from above.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted and starts the clock."""
        self._start = time.perf_counter()
        self._steps = self._tokens = 0
        self._waited = 0.0

    def add(self, tokens: int) -> None:
        """Counts one step of so many tokens."""
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def waiting(self) -> Generator[None, None, None]:
        """Counts the time inside as spent waiting for input."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Generator[None, None, None]:
        """Leaves the time inside out of the rates."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """The rates, of at least one step; counting starts anew."""
        if not self._steps:
            self.restart()
            return {}
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rates = {
            "steps_per_s": self._steps / seconds,
            "tokens_per_s": self._tokens / seconds,
            "input_wait": self._waited / seconds,
        }
        self.restart()
        return rates


def plot_curves(run_dir: Path) -> Path | None:
    """Draws loss and score of the steps to `run_dir/curves.png`, see `score_name`.

    Returns the file, or None when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = read_metrics(run_dir / METRICS_FILE)
    validations = [record for record in records if record["split"].startswith("valid")]
    scored = score_name(validations[0]) if validations else None
    names = ["loss"] if scored is None else ["loss", scored]
    splits = dict.fromkeys(record["split"] for record in records)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for split in splits:
            points = [(r["step"], r[name]) for r in records if r["split"] == split and name in r]
            if points:
                style = "-" if split == "train" else "o-"
                axes.plot(*zip(*points, strict=True), style, label=split, markersize=4)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    path = run_dir / CURVES_FILE
    figure.savefig(path, dpi=120)
    return path
