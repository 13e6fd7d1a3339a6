"""Shows what becomes of each tensor of a checkpoint."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from yoso_jax.conversion.plan import Plan

_WIDTH_OF_A_FILE = 220
"""Columns where the output is no terminal, so that no name is broken."""


def print_report(plan: Plan, dtype: str, console: Console | None = None) -> None:
    """Prints a table with a row a tensor, the plan's notes, and the number of each kind.

    Args:
        plan: of `make_plan`.
        dtype: the parameters are to be written in.
        console: where to print; standard output by default.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH_OF_A_FILE)
    table = Table("", "source", "target", "shape", "type", "transform, or reason", highlight=False)
    for entry in plan.entries:
        kind = entry.dtype
        if entry.status == "loaded" and entry.target and kind != dtype:
            kind = f"{kind} to {dtype}"
        shape = " x ".join(map(str, entry.shape))
        row = (entry.status, entry.source or "", entry.target or "", shape, kind, entry.remark)
        table.add_row(*row, style=None if entry.status in ("loaded", "tied") else "yellow")
    console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    counts = Counter(entry.status for entry in plan.entries)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    console.print(f"{plan.model_class.__name__}: {summary}", highlight=False)
