"""Writes benchmark tables into README.md: `python scripts/update_readme.py [--check]`.

Between `<!-- benchmark: NAME -->` and `<!-- end -->` goes what `benchmarks/results/NAME.json` says,
a report of `scripts/benchmark.py`.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tyro

from yoso_jax import cli
from yoso_jax.benchmarking.report import MISSING, Row, read_report, tabulate
from yoso_jax.errors import DataError
from yoso_jax.metrics import write_atomically

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- benchmark: ([\w.-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which file to renew, from which reports."""

    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Change nothing; fail if the tables are not what the reports say."""
    readme: Path = ROOT / "README.md"
    """Page with the markers."""
    results: Path = ROOT / "benchmarks" / "results"
    """Folder of the reports."""


def main() -> None:
    """Renews or checks all tables of the page."""
    arguments = tyro.cli(Arguments, description=f"Renews benchmark tables. {cli.EXIT_CODES}")
    try:
        old = arguments.readme.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {arguments.readme}: {error}") from error

    def renew(marked: re.Match[str]) -> str:
        start, name, _, end = marked.groups()
        return f"{start}\n{describe(name, read_report(arguments.results / f'{name}.json'))}\n{end}"

    new = MARKED.sub(renew, old)
    if new == old:
        print(f"{arguments.readme} is up to date")
    elif arguments.check:
        raise DataError(
            f"{arguments.readme} differs from {arguments.results}: run scripts/update_readme.py"
        )
    else:
        write_atomically(arguments.readme, new)
        print(f"wrote {arguments.readme}")


def describe(name: str, report: dict[str, Any]) -> str:
    """A report as a Markdown table, with what it was measured on below it."""
    arguments, device, versions = (report[x] for x in ("arguments", "device", "versions"))
    rows = [row for row in report["rows"] if "reason" not in row]
    if not rows:
        raise DataError(f"the report {name} has no row that was measured")
    if report["benchmark"] == "attention":
        ours = "mosaic_gpu"
        if all(row["implementation"] != ours for row in rows):
            ours = "xla"
        table = _table(*compare_with_cudnn(rows, ours))
        work = "Forward and backward pass" if arguments["backward"] else "Forward pass"
        note = (
            f"Milliseconds of a call on the device / on the wall: of `{ours}`'s hash and "
            "cumulation with m hashes, and of the whole `yoso_attention`, which also draws hashes "
            "and normalises. Speed is cuDNN's time divided by that of hash and cumulation; memory "
            "is what they need beside inputs and outputs. "
            f"{work}, {arguments['tokens']:,} tokens of all heads and sequences together"
        )
        if arguments["mask_fraction"]:
            note += f", {arguments['mask_fraction']:.0%} of them padding"
    else:
        table = _table(*tabulate(rows))
        note = f"{arguments['tokens']:,} tokens together"
    for field, text in (
        ("head_dim", "head dimension {}"),
        ("hash_code_len", "{} bits of a hash"),
        ("dtype", "{}"),
    ):
        if field in arguments:
            note += f", {text.format(arguments[field])}"
    driver = f", driver {device['driver']}" if device["driver"] else ""
    return (
        f"{table}\n{note}. Measured on {device['kind']}{driver}, jax {versions['jax']}, jaxlib "
        f"{versions['jaxlib']}, {report['date'][:10]}, by `scripts/benchmark.py "
        f"{report['benchmark']}` (`benchmarks/results/{name}.json`).\n"
    )


def compare_with_cudnn(rows: list[Row], ours: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table with a line for each n: cuDNN, and ours by number of hashes."""
    found = {(row["implementation"], row["n"], row["m"]): row for row in rows}
    hashes = sorted({row["m"] for row in rows if row["m"] is not None})
    headings = ["n", "cuDNN, ms"]
    for m in hashes:
        headings += [f"m = {m}, ms", "speed", "whole, ms"]
    headings += ["memory, MiB: cuDNN", *(f"m = {m}" for m in hashes)]
    lines = []
    for n in sorted({row["n"] for row in rows}):
        cudnn = found.get(("cudnn", n, None), {})
        sampled = [found.get((ours, n, m), {}) for m in hashes]
        cells = [f"{n:,}", _times(cudnn)]
        for row, m in zip(sampled, hashes, strict=True):
            speed = _pair(row, "speed_device", "speed_wall", ".2f")
            cells += [_times(row), speed, _times(found.get((f"{ours}_op", n, m), {}))]
        lines.append([*cells, *(_memory(row) for row in (cudnn, *sampled))])
    return headings, lines


def _times(row: Row) -> str:
    return _pair(row, "device_ms", "wall_ms", ".3f")


def _pair(row: Row, first: str, second: str, form: str) -> str:
    cells = (MISSING if row.get(x) is None else format(row[x], form) for x in (first, second))
    return " / ".join(cells)


def _memory(row: Row) -> str:
    return f"{row['temp_bytes'] / 2**20:,.1f}" if row else MISSING


def _table(headings: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    rule = ["---:" for _ in headings]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, rule, *lines))


if __name__ == "__main__":
    cli.run(main)
