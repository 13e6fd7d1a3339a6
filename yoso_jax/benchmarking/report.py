"""The JSON reports that benchmarks write, as a table and as pictures.

A report is one JSON object:

- `benchmark`: what was timed; see `scripts/benchmark.py`. Of "training", which
  `yoso_jax.training_report` writes, the rows are of runs.
- `date`: when it was started, UTC, ISO 8601.
- `device`: `platform` and `kind` as JAX names them, `driver` (None where it is not known).
- `versions`: of python, jax, jaxlib, flax and yoso_jax.
- `commit`: what `git describe --dirty` says of the code, None outside a checkout.
- `arguments`: options of the benchmark.
- `rows`: one object a measurement. Each has `implementation`, `n` (tokens of a sequence), `m`
  (hashes, None where there are none) and what else identifies it, and then either `reason`, why it
  could not be measured, or the fields of `measure.Measurement` and what the benchmark
  derives from them; see `scripts/benchmark.py`.
"""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import yoso_jax
from yoso_jax.errors import DataError
from yoso_jax.metrics import write_atomically

type Row = dict[str, Any]

MISSING = "-"
"""Stands in a table for what was not measured."""

_WORDS = ("implementation", "direction")
_NAMES = (*_WORDS, "n", "m")
# Of the measured fields: heading, unit and format.
_NUMBERS = {
    "device_ms": ("ms device", 1, ".4f"),
    "wall_ms": ("ms wall", 1, ".4f"),
    "speed_device": ("x cuDNN device", 1, ".2f"),
    "speed_wall": ("x cuDNN wall", 1, ".2f"),
    "floor_fraction": ("of floor", 1, ".0%"),
    "kernel_floor_fraction": ("kernel of floor", 1, ".0%"),
    "tflop_per_s": ("TFLOP/s", 1, ".1f"),
    "gb_per_s": ("GB/s", 1, ",.0f"),
    "tokens_per_s": ("tokens/s", 1, ",.0f"),
    "temp_bytes": ("MiB", 2**20, ",.1f"),
}


def describe_environment() -> dict[str, Any]:
    """The fields `date`, `device`, `versions` and `commit` of a report."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    driver = None
    if device.platform == "gpu":
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    folder = str(Path(__file__).parent)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "driver": driver and driver.splitlines()[0],
        },
        "versions": {
            "python": platform.python_version(),
            "yoso_jax": yoso_jax.__version__,
            **versions,
        },
        "commit": _output(["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]),
    }


def _output(command: Sequence[str]) -> str | None:
    """What a command prints, None if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes a report, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def read_report(path: Path) -> dict[str, Any]:
    """Reads a report.

    Raises:
      DataError: the file is missing or is no report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the report {path}: {error}") from error
    fields = {"benchmark", "date", "device", "versions", "arguments", "rows"}
    if not isinstance(report, dict) or not fields <= report.keys():
        raise DataError(f"{path} is no report: it must have {', '.join(sorted(fields))}")
    return report


def tabulate(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings of the columns and the cells of the rows, for what the rows have."""
    names = [name for name in _NAMES if name in rows[0]]
    numbers = {field: how for field, how in _NUMBERS.items() if any(field in row for row in rows)}
    lines = []
    for row in rows:
        cells = [row[name] for name in names]
        for field, (_, unit, form) in numbers.items():
            value = row.get(field)
            cells.append(None if value is None else format(value / unit, form))
        lines.append([MISSING if cell is None else str(cell) for cell in cells])
    return [*names, *(heading for heading, _, _ in numbers.values())], lines


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Prints what was measured, and the reasons why something was not."""
    headings, lines = tabulate(rows)
    table = Table(title=title, highlight=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in _WORDS else "right")
    for cells in lines:
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "reason" in row:
            reasons.setdefault(row["reason"], []).append(label(row))
    for reason, labels in reasons.items():
        print(f"{'; '.join(labels)}:\n  {reason}")


def label(row: Row) -> str:
    """What a row is of, in words."""
    return f"{_series(row)}, n = {row['n']}"


def _series(row: Row) -> str:
    parts = [row["implementation"], row.get("direction"), row["m"] and f"m = {row['m']}"]
    return ", ".join(part for part in parts if part)


def draw(path: Path, benchmark: str, rows: list[Row]) -> None:
    """Draws time and memory against n; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if "reason" not in row]
    time = "wall_ms" if any(row["device_ms"] is None for row in rows) else "device_ms"
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    plots = (
        (time, 1, f"{time.removesuffix('_ms')} time, ms a call"),
        ("temp_bytes", 2**20, "memory beside inputs and outputs, MiB"),
    )
    for axes, (field, unit, quantity) in zip(figure.subplots(1, 2), plots, strict=True):
        for name in dict.fromkeys(map(_series, rows)):
            # Logarithmic axes have no place for a zero.
            points = [(r["n"], r[field] / unit) for r in rows if _series(r) == name and r[field]]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
        axes.set(xlabel="n, tokens of a sequence", ylabel=quantity)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    if rows:
        figure.axes[0].legend(fontsize="small")
    figure.suptitle(f"{benchmark}, {jax.devices()[0].device_kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_speed(path: Path, report: dict[str, Any]) -> None:
    """Draws how many times cuDNN's speed attention has, against n, as an SVG; needs matplotlib.

    The same report and release of matplotlib give the same bytes. The date of the report is in the
    picture's metadata.

    Raises:
      DataError: the report has no speeds.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["implementation"] != "cudnn"]
    # Those of the whole operation would hide those of its kernels.
    rows = [r for r in rows if "speed_device" in r and not r["implementation"].endswith("_op")]
    if not rows:
        raise DataError(f"no speeds to draw to {path}")
    rows.sort(key=lambda row: row["n"])
    numbers = sorted({row["n"] for row in rows})
    figure = Figure(figsize=(8, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.axhline(1, color="black", linewidth=0.8)
    axes.annotate("cuDNN", (numbers[0], 1), (0, 3), textcoords="offset points", fontsize="small")
    for name in dict.fromkeys(map(_series, rows)):
        points = [(row["n"], row["speed_device"]) for row in rows if _series(row) == name]
        (line,) = axes.plot(*zip(*points, strict=True), "o-", markersize=4)
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, points[-1], color=line.get_color(), fontsize="small", **place)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(numbers, [f"{n:,}" for n in numbers])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="n, tokens of a sequence", ylabel="speed on the device, times cuDNN's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Source": f"measured {report['date']}"}
    with matplotlib.rc_context({"svg.hashsalt": "yoso_jax"}):
        figure.savefig(path, format="svg", metadata=metadata)
