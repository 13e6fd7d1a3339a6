"""Curves and a summary of training runs, side by side."""

import dataclasses
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from yoso_jax.config_files import CONFIG_FILE
from yoso_jax.errors import CheckpointError, ConfigError
from yoso_jax.metrics import METRICS_FILE, read_metrics, score_name, write_atomically
from yoso_jax.trainer import RESULTS_FILE

REPORT_FILE = "report.md"
PICTURE_FILE = "report.png"

_UNSHOWN = ("step", "split", "time")
_MARK = "<!-- written by scripts/report.py, which may replace this file and the picture -->"


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run left behind.

    Attributes:
      folder: its folder.
      config: the fields of config.yaml, those of sections as `section.field`.
      records: of metrics.jsonl.
      results: of results.json; empty if the run has not ended.
    """

    folder: Path
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.absolute().name

    def split(self, name: str) -> list[Mapping[str, Any]]:
        """The records of a split."""
        return [record for record in self.records if record["split"] == name]

    @property
    def valid_splits(self) -> list[str]:
        """The splits it was validated on, in order of their first validation."""
        splits = dict.fromkeys(record["split"] for record in self.records)
        return [split for split in splits if split.startswith("valid")]

    def median(self, name: str) -> float | None:
        """The median over the training records of what some of them have; None if none has."""
        values = [record[name] for record in self.split("train") if name in record]
        return statistics.median(values) if values else None


def read_run(folder: Path) -> RunRecord:
    """Reads a run's folder.

    Raises:
        CheckpointError: there is no run in it, or its configuration or results are damaged.
    """
    path = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"there is no run in {folder} (no {CONFIG_FILE})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("steps"), int):
        raise CheckpointError(f"{path} is not the configuration of a run: it says no `steps`")
    path, results = folder / RESULTS_FILE, {}
    if path.exists():
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(results, dict):
            raise CheckpointError(f"{path} must hold a JSON object")
    return RunRecord(folder, _flatten(config), read_metrics(folder / METRICS_FILE), results)


def label_runs(runs: Sequence[RunRecord]) -> list[str]:
    """A label a run, all different: the names of their folders, or the paths."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder.absolute()) for run in runs]
    return names


def write_report(out: Path, runs: Sequence[RunRecord]) -> bool:
    """Writes `report.md` and, if there is anything to draw, `report.png`.

    Returns whether there is a picture.

    Raises:
        ConfigError: there is such a file that is none of an earlier report.
        OSError: they cannot be written.
    """
    report, picture = out / REPORT_FILE, out / PICTURE_FILE
    if report.exists():
        if _MARK not in report.read_text(encoding="utf-8", errors="replace"):
            raise ConfigError(f"--out: {report} is not a report of this script; move it away")
    elif picture.exists():
        raise ConfigError(f"--out: {picture} is of no report of this script; move it away")
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw(runs)
    # The report first, for it says whose the picture is.
    write_atomically(report, to_markdown(runs, None if drawn is None else PICTURE_FILE))
    if drawn is None:
        picture.unlink(missing_ok=True)
    else:
        write_atomically(picture, drawn)
    return drawn is not None


def summarize(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row of cells a run.

    Steps made of those asked for; the last and the best validation; what results.json has; medians
    of the speed, and of the share of time spent waiting for input; hours from the first record to
    the last.
    """
    rows = [
        {"run": label} | _summarize(run) for label, run in zip(label_runs(runs), runs, strict=True)
    ]
    headings = list(dict.fromkeys(name for row in rows for name in row))
    return headings, [[row.get(name, "-") for name in headings] for row in rows]


def differences(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """The fields of the configurations in which runs differ, a row a field."""
    names = dict.fromkeys(name for run in runs for name in run.config if name != "run_dir")
    rows = []
    for name in names:
        values = [str(run.config.get(name, "-")) for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return ["field", *label_runs(runs)], rows


def to_markdown(runs: Sequence[RunRecord], picture: str | None) -> str:
    """The summary, the picture if there is one, and what differs between the runs."""
    parts = [f"# {', '.join(label_runs(runs))}", markdown_table(*summarize(runs))]
    if picture is not None:
        parts.append(f"![curves]({picture})")
    headings, rows = differences(runs)
    if rows:
        parts += ["## What differs", markdown_table(headings, rows)]
    return "\n\n".join([*parts, _MARK]) + "\n"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its cells to the right but for the first of each row."""
    rules = ["---", *["---:"] * (len(headings) - 1)]
    lines = ([cell.replace("|", r"\|") for cell in cells] for cells in (headings, rules, *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(runs: Sequence[RunRecord]) -> bytes | None:
    """Draws a panel a metric, in each a line a run and split.

    Returns the PNG file; None if matplotlib is not installed or nothing is recorded.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    splits = list(dict.fromkeys(record["split"] for run in runs for record in run.records))
    names = list(
        dict.fromkeys(
            name
            for run in runs
            for record in run.records
            for name, value in record.items()
            if name not in _UNSHOWN and isinstance(value, int | float)
        )
    )
    if not names:
        return None
    names.sort(key=lambda name: name != "loss")  # first
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5 * columns, 3.5 * lines), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for number, (label_of_run, run) in enumerate(zip(label_runs(runs), runs, strict=True)):
            for split in splits:
                points = [(r["step"], r[name]) for r in run.split(split) if name in r]
                if points:
                    style = {"linewidth": 1} if split == "train" else {"marker": "o"}
                    label = label_of_run if split == "train" else f"{label_of_run}, {split}"
                    alpha = 0.5 if split == "train" else 1.0
                    steps, values = zip(*points, strict=True)
                    axes.plot(
                        steps, values, color=f"C{number}", label=label, alpha=alpha, markersize=3,
                        **style,
                    )  # fmt: skip
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    panels[0].legend(fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _summarize(run: RunRecord) -> dict[str, str]:
    last = max((record["step"] for record in run.records), default=0)
    row = {"steps": f"{last:,} of {run.config['steps']:,}"}
    for split in run.valid_splits:
        records = [record for record in run.split(split) if "loss" in record]
        if not records:
            continue
        row[f"{split} loss"] = f"{records[-1]['loss']:.4g}"
        if (name := score_name(records[-1])) is not None:
            scored = [record for record in records if name in record]
            best = max(scored, key=lambda record: (record[name], record["step"]))
            row[f"{split} {name}"] = f"{records[-1][name]:.4g}"
            row[f"best {split} {name}"] = f"{best[name]:.4g} at {best['step']:,}"
    for name, value in run.results.items():
        if isinstance(value, float) and not name.startswith("valid"):
            row[name.replace("_", " ")] = f"{value:.4g}"
    for name, heading, style in (
        ("steps_per_s", "steps/s", ".3g"),
        ("tokens_per_s", "tokens/s", ",.0f"),
        ("input_wait", "input wait", ".1%"),
    ):
        if (value := run.median(name)) is not None:
            row[heading] = f"{value:{style}}"
    times = [record["time"] for record in run.records if "time" in record]
    if times:
        row["hours"] = f"{(max(times) - min(times)) / 3600:.2f}"
    return row


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
