"""Measures gradient noise in trained models: `python scripts/gradient_noise.py RUN_DIR ...`.

For each run, of sampled attention, takes the newest checkpoint and a few training sequences, and
compares estimates of the gradients of queries and keys with the expectation's, layer by layer, for
the same queries, keys, values and incoming gradients. The JSON file is a report as
`yoso_jax.benchmarking.report` describes it, its rows are those of `yoso_jax.gradient_noise`.
"""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from yoso_jax import cli
from yoso_jax.benchmarking.report import describe_environment, write_report
from yoso_jax.config_files import CONFIG_FILE, load_config
from yoso_jax.errors import CheckpointError, ConfigError
from yoso_jax.gradient_noise import Row, capture, measure
from yoso_jax.kinds import make_objective
from yoso_jax.sharding import make_layout
from yoso_jax.training import restore_params


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure, and where to write it."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that train.py wrote."""
    mb: tuple[int, ...] = (2, 4, 8, 16)
    """Hashes of the estimates by buckets."""
    buckets: tuple[int, ...] = (32, 64, 128, 256)
    """Tokens of a bucket."""
    samples: int = 4
    """Draws of the hashes."""
    sequences: int = 4
    """Training sequences of each run."""
    seed: int = 0
    """Of hashes and dropout."""
    json: Path | None = None
    """Report."""
    plot: Path | None = None
    """Picture of noise against hashes, a panel a run."""


def main() -> None:
    """Measures one run after another and prints a table."""
    arguments = tyro.cli(Arguments, description=f"Measures gradient noise. {cli.EXIT_CODES}")
    if not arguments.run_dirs:
        raise ConfigError("RUN_DIR: name one or more runs")
    for name in ("samples", "sequences"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be >= 1, got {getattr(arguments, name)}")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install '.[plot]'")
    for path in filter(None, (arguments.json, arguments.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for run_dir in arguments.run_dirs for row in measure_run(run_dir, arguments)]
    console = Console(width=160)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=f"gradient noise, on {jax.devices()[0].device_kind}")
    for row in rows:
        cells = (row.get(name, "") for name in names)
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells))
    console.print(table)
    if arguments.json is not None:
        report = {"benchmark": "gradient_noise", **describe_environment()}
        values = dataclasses.asdict(arguments)
        asked = {name: values[name] for name in ("mb", "buckets", "samples", "sequences", "seed")}
        write_report(arguments.json, {**report, "arguments": asked, "rows": rows})
    if arguments.plot is not None:
        draw(arguments.plot, rows)


def measure_run(run_dir: Path, arguments: Arguments) -> list[Row]:
    """The rows of a run."""
    if not (run_dir / CONFIG_FILE).is_file():
        raise CheckpointError(f"there is no run in {run_dir} (no {CONFIG_FILE})")
    config = dataclasses.replace(
        load_config(run_dir / CONFIG_FILE), run_dir=str(run_dir), batch_size=arguments.sequences
    )
    objective = make_objective(config)
    step, params, notes = restore_params(objective, "latest", make_layout())
    for note in notes:
        print(note)
    key = jax.random.key(arguments.seed)
    captured = capture(objective, params, next(objective.make_iterator(step)), key)
    if too_many := [number for number in arguments.mb if number > captured[0].num_hashes]:
        raise ConfigError(f"--mb must be at most {captured[0].num_hashes}, got {too_many[0]}")
    rows = measure(captured, arguments.mb, arguments.buckets, arguments.samples, key)
    return [{"run": run_dir.name, "step": step, **row} for row in rows]


def draw(path: Path, rows: list[Row]) -> None:
    """Draws the noise of the gradient of queries against hashes, a line a size of buckets."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure = Figure(figsize=(4.5 * len(runs), 4), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        mine = [row for row in rows if row["run"] == run]
        for size in dict.fromkeys(row.get("bucket_tokens") for row in mine):
            line = [row for row in mine if row.get("bucket_tokens") == size]
            label = "sampled" if size is None else f"buckets of {size:.0f}"
            points = [(row["num_hashes"], row["noise_query"]) for row in line]
            axes.plot(*zip(*points, strict=True), "o-" if len(points) > 1 else "k*", label=label)
        axes.set(xscale="log", yscale="log", xlabel="hashes", ylabel="relative noise of dq")
        axes.set_title(f"{run}, n = {mine[0]['n']}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main)
