"""Curves and a summary of training runs: `python scripts/report.py RUN_DIR ... [--out FOLDER]`.

Writes `report.png`, a panel a metric, and `report.md`: what each run reached, how fast it was, and
in what the configurations differ.
"""

import dataclasses
import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from yoso_jax import cli
from yoso_jax.errors import ConfigError, DiskFullError, is_disk_full
from yoso_jax.reports import REPORT_FILE, read_run, summarize, write_report


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which runs, and where to write."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that train.py wrote, of runs that have ended or not."""
    out: Path | None = None
    """Folder of the report; by default that of the only run."""


def main() -> None:
    """Writes the report and prints the summary."""
    arguments = tyro.cli(Arguments, description=f"Summarises runs. {cli.EXIT_CODES}")
    if not arguments.run_dirs:
        raise ConfigError("RUN_DIR: name one or more runs")
    if arguments.out is None and len(arguments.run_dirs) > 1:
        raise ConfigError("--out: name a folder for the report of several runs")
    runs = [read_run(folder) for folder in arguments.run_dirs]
    out = arguments.out or arguments.run_dirs[0]
    try:
        has_picture = write_report(out, runs)
    except OSError as error:
        raise (DiskFullError if is_disk_full(error) else ConfigError)(str(error)) from error
    headings, rows = summarize(runs)
    table = Table(*headings)
    for cells in rows:
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"{out / REPORT_FILE}", highlight=False, soft_wrap=True)
    if not has_picture:
        console.print("no picture was drawn: nothing is recorded, or matplotlib is not installed")


if __name__ == "__main__":
    cli.run(main)
