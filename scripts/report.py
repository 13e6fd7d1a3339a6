"""Curves and a summary of training runs: `python scripts/report.py RUN_DIR ... [--out FOLDER]`.

Writes `report.png`, a panel a metric, and `report.md`: what each run reached, how fast it was, and
in what the configurations differ. `--json FILE` puts runs that have ended into a report as
`yoso_jax.training_report` describes it, such as that of the tables in docs/training.md, and then
the other two files are only written to a folder that `--out` names.
"""

import dataclasses
import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from yoso_jax import cli
from yoso_jax.benchmarking.report import write_report as write_json
from yoso_jax.errors import ConfigError, DiskFullError, is_disk_full
from yoso_jax.reports import REPORT_FILE, read_run, summarize, write_report
from yoso_jax.training_report import add_runs


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which runs, and where to write."""

    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that train.py wrote, of runs that have ended or not."""
    out: Path | None = None
    """Folder of the report; by default that of the only run, none with --json."""
    json: Path | None = None
    """JSON report to write, or to add the runs to; of the same label the new ones stay."""
    device: str | None = None
    """With --json, what ran the runs that do not say so; by default the device of this machine."""


def main() -> None:
    """Writes the report and prints the summary."""
    arguments = tyro.cli(Arguments, description=f"Summarises runs. {cli.EXIT_CODES}")
    if not arguments.run_dirs:
        raise ConfigError("RUN_DIR: name one or more runs")
    if arguments.device is not None and arguments.json is None:
        raise ConfigError("--device is for --json only")
    out = arguments.out
    if out is None and arguments.json is None:
        if len(arguments.run_dirs) > 1:
            raise ConfigError("--out: name a folder for the report of several runs")
        out = arguments.run_dirs[0]
    runs = [read_run(folder) for folder in arguments.run_dirs]
    # Before anything is written.
    report, replaced = None, []
    if arguments.json is not None:
        report, replaced = add_runs(arguments.json, runs, arguments.device)
    has_picture = True
    try:
        if out is not None:
            has_picture = write_report(out, runs)
        if arguments.json is not None and report is not None:
            write_json(arguments.json, report)
    except OSError as error:
        raise (DiskFullError if is_disk_full(error) else ConfigError)(str(error)) from error
    headings, rows = summarize(runs)
    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")  # names of runs may differ at their ends
    for cells in rows:
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if out is not None:
        console.print(f"{out / REPORT_FILE}", highlight=False, soft_wrap=True)
    if report is not None:
        note = f", of {', '.join(replaced)} in place of older ones" if replaced else ""
        text = f"{arguments.json}: {len(report['rows'])} rows{note}"
        console.print(text, highlight=False, soft_wrap=True)
    if not has_picture:
        console.print("no picture was drawn: nothing is recorded, or matplotlib is not installed")


if __name__ == "__main__":
    cli.run(main)
