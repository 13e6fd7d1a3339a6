"""Writes tables and plots of README.md and docs/: `python scripts/update_readme.py [--check]`.

Between `<!-- benchmark: NAME -->` and `<!-- end -->` goes what `benchmarks/results/NAME.json` says,
a report of `scripts/benchmark.py` or, of trained models, of `scripts/report.py`. Pictures
`benchmarks/plots/NAME.svg` of a page are drawn from the same report, with matplotlib.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tyro

from yoso_jax import cli
from yoso_jax.benchmarking.report import MISSING, Row, draw_speed, read_report, tabulate
from yoso_jax.errors import ConfigError, DataError, DiskFullError, is_disk_full
from yoso_jax.metrics import write_atomically
from yoso_jax.training_table import BENCHMARK
from yoso_jax.training_table import tabulate as tabulate_training

ROOT = Path(__file__).parents[1]
# Kernels that are neither hash nor cumulation: values to slices, results back, the projection.
AROUND = re.compile("slice_values|merge_slices|transpose")
MARKED = re.compile(r"(<!-- benchmark: ([\w.-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
PLOT = re.compile(r"\((benchmarks/plots/([\w.-]+)\.svg)\)")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which pages to renew, with their plots, from which reports."""

    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Change nothing; fail if a table or a plot is not of the newest report."""
    pages: tuple[Path, ...] = (ROOT / "README.md", ROOT / "docs" / "training.md")
    """Pages with the markers."""
    results: Path = ROOT / "benchmarks" / "results"
    """Folder of the reports."""


def main() -> None:
    """Renews or checks all tables and plots of the pages."""
    arguments = tyro.cli(Arguments, description=f"Renews benchmark tables. {cli.EXIT_CODES}")
    # All are read, and made, before the first is written.
    pages = {page: renew(page, arguments.results) for page in arguments.pages}
    for page, (old, new) in pages.items():
        for place, name in PLOT.findall(old):
            path = page.parent / place
            report = read_report(arguments.results / f"{name}.json")
            if not arguments.check:
                _draw(path, report)
            elif not path.is_file() or report["date"] not in path.read_text(encoding="utf-8"):
                raise DataError(
                    f"{path} is not drawn from {name}.json: run scripts/update_readme.py"
                )
        if new == old:
            print(f"{page} is up to date")
        elif arguments.check:
            raise DataError(
                f"{page} differs from {arguments.results}: run scripts/update_readme.py"
            )
        else:
            write_atomically(page, new)
            print(f"wrote {page}")


def renew(page: Path, results: Path) -> tuple[str, str]:
    """The text of a page, and that with the tables of the reports."""
    try:
        old = page.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {page}: {error}") from error

    def renew_table(marked: re.Match[str]) -> str:
        start, name, _, end = marked.groups()
        return f"{start}\n{describe(name, read_report(results / f'{name}.json'))}\n{end}"

    return old, MARKED.sub(renew_table, old)


def _draw(path: Path, report: dict[str, Any]) -> None:
    try:
        draw_speed(path, report)
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install '.[plot]'") from error
    except OSError as error:
        raise (DiskFullError if is_disk_full(error) else ConfigError)(str(error)) from error
    print(f"wrote {path}")


def describe(name: str, report: dict[str, Any]) -> str:
    """A report as a Markdown table, with what it was measured on below it."""
    if report["benchmark"] == BENCHMARK:
        return describe_training(name, report)
    arguments, device, versions = (report[x] for x in ("arguments", "device", "versions"))
    rows = [row for row in report["rows"] if "reason" not in row]
    if not rows:
        raise DataError(f"the report {name} has no row that was measured")
    work = "Forward and backward pass" if arguments.get("backward") else "Forward pass"
    tokens = f"{arguments['tokens']:,} tokens of all heads and sequences together"
    listed = ("mosaic_gpu_expectation", "mosaic_gpu_bucketed")
    if any(row["implementation"] in listed for row in rows):
        table = _table(*list_implementations(rows))
        note = (
            "Milliseconds on the device and on the wall, and how many times cuDNN's speed that is. "
            "`expectation`: `yoso_attention` with `num_hashes=None`; `mixed`: sampled forward, and "
            "gradients of query and key from the expectation; `bucketed`: those from buckets. "
            f"Memory is beside inputs and outputs. {work}, {tokens}"
        )
    elif report["benchmark"] == "attention":
        ours = "mosaic_gpu"
        if all(row["implementation"] != ours for row in rows):
            ours = "xla"
        table = _table(*compare_with_cudnn(rows, ours))
        note = (
            "Milliseconds on the device, and how many times cuDNN's speed that is. Hash and "
            f"cumulation: the kernels of `{ours}` without those that cut values into slices and "
            "merge the results; attention: all kernels, for given random projections, and the "
            "time on the wall; `yoso_attention`: with drawing the projections and normalising. "
            f"Memory is beside inputs and outputs of attention. {work}, {tokens}"
        )
        if arguments["mask_fraction"]:
            note += f", {arguments['mask_fraction']:.0%} of them padding"
    else:
        table = _table(*tabulate(rows))
        note = f"{arguments['tokens']:,} tokens together"
    for field, text in (
        ("head_dim", "head dimension {}"),
        ("hash_code_len", "{} bits of a hash"),
        ("num_backward_hashes", "{} hashes in the gradients of buckets"),
        ("dtype", "{}"),
    ):
        if arguments.get(field) is not None:
            note += f", {text.format(arguments[field])}"
    driver = f", driver {device['driver']}" if device["driver"] else ""
    return (
        f"{table}\n{note}. Measured on {device['kind']}{driver}, jax {versions['jax']}, jaxlib "
        f"{versions['jaxlib']}, {report['date'][:10]}, by `scripts/benchmark.py "
        f"{report['benchmark']}` (`benchmarks/results/{name}.json`).\n"
    )


def describe_training(name: str, report: dict[str, Any]) -> str:
    """The same of trained models."""
    headings, lines, notes = tabulate_training(report["rows"])
    if not lines:
        raise DataError(f"the report {name} has no row that was tested")
    rows = [row for row in report["rows"] if row.get("in_table", True)]
    devices = ", ".join(sorted({row["device"] for row in rows}))
    dates = sorted({row["date"][:10] for row in rows if "date" in row})
    times = f", {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if dates else ""
    notes = "".join(f"; {note}" for note in notes)
    return (
        f"{_table(headings, lines)}\nTest scores of the last step, or where it says so of the "
        "checkpoint that is best in validation, one a seed in order of the seeds: perplexities, or "
        f"accuracies and what else stands by the task in %{notes}. Trained "
        f"on {devices}{times}, collected by `scripts/report.py` "
        f"(`benchmarks/results/{name}.json`).\n"
    )


def list_implementations(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table with a line for each n and implementation."""
    headings = ["n", "implementation", "device", "wall", "MiB"]
    lines = []
    for row in sorted(rows, key=lambda row: row["n"]):
        name = row["implementation"] + (f", m={row['m']}" if row["m"] else "")
        cells = [f"{row['n']:,}", name]
        for clock in ("device", "wall"):
            ms, speed = row.get(f"{clock}_ms"), row.get(f"speed_{clock}")
            cudnn = None if ms is None or speed is None else ms * speed
            cells.append(_time(ms, cudnn))
        lines.append([*cells, f"{row['temp_bytes'] / 2**20:,.1f}"])
    return headings, lines


def compare_with_cudnn(rows: list[Row], ours: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table with a line for each n and number of hashes."""
    found = {(row["implementation"], row["n"], row["m"]): row for row in rows}
    headings = ["n", "m", "cuDNN", "hash and cumulation", "attention", "on the wall"]
    headings += ["`yoso_attention`", "MiB"]
    lines = []
    for name, n, m in sorted(found, key=lambda key: (key[1], key[2] or 0)):
        if name != ours:
            continue
        row = found[name, n, m]
        cudnn = found.get(("cudnn", n, None), {})
        kernels = row.get("kernels")
        core = None
        if kernels:
            around = sum(ms for kernel, ms in kernels.items() if AROUND.search(kernel))
            core = row["device_ms"] - around
        cells = [f"{n:,}", str(m), _time(cudnn.get("device_ms"), None)]
        cells.append(_time(core, cudnn.get("device_ms")))
        cells.append(_time(row.get("device_ms"), cudnn.get("device_ms")))
        cells.append(_time(row.get("wall_ms"), cudnn.get("wall_ms")))
        whole = found.get((f"{ours}_op", n, m), {})
        cells.append(_time(whole.get("device_ms"), cudnn.get("device_ms")))
        lines.append([*cells, f"{row['temp_bytes'] / 2**20:,.1f}"])
    return headings, lines


def _time(ms: float | None, cudnn: float | None) -> str:
    if ms is None:
        return MISSING
    return f"{ms:.3f}" if cudnn is None else f"{ms:.3f} ({cudnn / ms:.2f} x)"


def _table(headings: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    rule = ["---:" for _ in headings]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, rule, *lines))


if __name__ == "__main__":
    cli.run(main)
