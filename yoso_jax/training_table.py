"""The rows of a `yoso_jax.training_report` as a table: tasks against attentions."""

from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from yoso_jax.benchmarking.report import MISSING, Row
from yoso_jax.kernels.backward_choice import BACKWARDS

BENCHMARK = "training"
"""The field `benchmark` of the report."""

_GRADIENTS = (*BACKWARDS, "auto")
# What runs share whose scores stand in one line of a table, beside task, n and steps.
_DETAILS = (
    "learning_rate",
    "batch_size",
    "dtype",
    "init_from",
    "mean_over",
    "hidden_size",
    "num_hidden_layers",
    "initializer_range",
    "hash_code_len",
)


def tabulate(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, cells and notes on the headings.

    A line is of runs that share task, length, steps and all that `_DETAILS` and `data` hold; where
    lines of a task and length differ in those, they say it. A column is of an attention, its
    gradients and the note of its rows; softmax, which has no hashes, stands in the lines of all
    lengths of their codes. A cell has a score a seed, from the first seed of the line on, of the
    newest run of that seed.
    """
    rows = [row for row in rows if row.get("in_table", True) and _metric(row)]
    columns = sorted({_column(row) for row in rows})
    notes = list(dict.fromkeys(note for *_, note in columns if note))
    headings = ["task", "n", "steps", *(_heading(column, notes) for column in columns)]
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (_title(row), row["n"], row["steps"], *_details(row).items())
        lines.setdefault(key, []).append(row)
    _share_softmax(lines)
    cells = []
    for key in sorted(lines, key=_order):
        title, n, steps, *details = key
        others = [dict(other[3:]) for other in lines if other[:2] == key[:2]]
        title += "".join(
            f", {name.replace('_', ' ')} {value}"
            for name, value in details
            if value is not None and any(other.get(name) != value for other in others)
        )
        seeds = sorted({row["seed"] for row in lines[key]})
        line = [title, f"{n:,}", f"{steps:,}"]
        for column in columns:
            found = [row for row in lines[key] if _column(row) == column]
            found.sort(key=lambda row: row.get("date", ""))
            line.append(_cell(seeds, {row["seed"]: _score(row) for row in found}))
        cells.append(line)
    return headings, cells, [f"{_mark(notes, note)} {note}" for note in notes]


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of lines: by the first cells, then by the details, numbers as such."""
    values = (value for _, value in key[3:])
    return *key[:3], *((x if isinstance(x, int | float) else 0, str(x)) for x in values)


def _share_softmax(lines: dict[tuple[Any, ...], list[Row]]) -> None:
    """Adds lines of softmax alone to those that differ in nothing but the length of codes."""

    def others(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*key[:3], *(part for part in key[3:] if part[0] != "hash_code_len"))

    alone = [k for k, rows in lines.items() if all(_is_softmax(row) for row in rows)]
    for key in alone:
        same = [other for other in lines if other != key and others(other) == others(key)]
        for other in same:
            lines[other] += lines[key]
        if same:
            del lines[key]


def _is_softmax(row: Row) -> bool:
    return row["attention"].startswith("softmax")


def _metric(row: Row) -> str | None:
    """What a run is judged by: the perplexity, or what stands after the loss; None if untested."""
    if "test_perplexity" in row:
        return "test_perplexity"
    names = (name for name, value in row.items() if isinstance(value, int | float))
    return next((n for n in names if n.startswith("test_") and n != "test_loss"), None)


def _score(row: Row) -> str:
    """A perplexity, or anything else in %; halves are rounded up, as of 0.3485 to 34.9."""
    name = _metric(row)
    assert name is not None
    value = Decimal(str(row[name])) * (1 if name == "test_perplexity" else 100)
    return f"{value.quantize(Decimal('0.1'), ROUND_HALF_UP):,}"


def _title(row: Row) -> str:
    metric = _metric(row)
    assert metric is not None
    parts = [row["task"]]
    if metric != "test_accuracy":
        parts.append(metric.removeprefix("test_").replace("_", " "))
    if row.get("final_checkpoint") == "best":
        parts.append("best checkpoint")
    return ", ".join(parts)


def _details(row: Row) -> dict[str, Any]:
    """What tells the lines of a table apart, beside the first three cells; hashable."""
    details = {name: row.get(name) for name in _DETAILS}
    data = row.get("data", {}).items()
    return details | {
        f"data {name.removeprefix('data_')}": _hashable(value) for name, value in sorted(data)
    }


def _hashable(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _column(row: Row) -> tuple[Any, ...]:
    """Sorts as the columns stand: softmax, the expectation, and then by what is sampled."""
    attention, backward = row["attention"], row.get("attention_backward")
    return (
        not _is_softmax(row),
        row.get("num_hash", 0),
        attention,
        -1 if backward is None else _GRADIENTS.index(backward),
        row.get("num_backward_hashes", 0),
        _bucket_tokens(row),
        row.get("note", ""),
    )


def _bucket_tokens(row: Row) -> int:
    """A power of two, of which a bucket has as many tokens on average, up to twice as many."""
    if "bucket_bits" not in row:
        return 0
    return 2 ** ((row["n"] >> row["bucket_bits"]).bit_length() - 1)


def _heading(column: tuple[Any, ...], notes: Sequence[str]) -> str:
    _, _, attention, backward, hashes, tokens, note = column
    parts = [_paper_name(attention)]
    if backward >= 0:
        parts.append(_GRADIENTS[backward])
    if hashes:
        parts.append(f"{hashes} x {tokens}")
    return ", ".join(parts) + (f" {_mark(notes, note)}" if note else "")


def _paper_name(attention: str) -> str:
    if attention.startswith("softmax"):
        return attention
    return attention.upper().replace("_", "-")  # YOSO-E, YOSO-32, YOSO-C-16


def _mark(notes: Sequence[str], note: str) -> str:
    return f"({notes.index(note) + 1})"


def _cell(seeds: Sequence[int], scores: Mapping[int, str]) -> str:
    """Scores in order of the seeds; after the last there is nothing to keep a place for."""
    last = max((index for index, seed in enumerate(seeds) if seed in scores), default=0)
    return ", ".join(scores.get(seed, MISSING) for seed in seeds[: last + 1])
