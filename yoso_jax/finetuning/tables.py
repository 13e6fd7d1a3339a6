"""Rows with named columns, from TSV, CSV and JSON lines."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from yoso_jax.errors import DataError
from yoso_jax.finetuning.examples import (
    BadRows,
    ChoiceExample,
    Examples,
    RowGuard,
    TextExample,
    read_text,
)

Row = Mapping[str, Any]
"""Cells by the name of their column: strings, or whatever a JSON object holds."""

# The place of each row, and what makes it or raises a ValueError.
_Rows = Iterator[tuple[str, Callable[[], Row]]]


def read_table[E: TextExample | ChoiceExample](
    path: Path,
    parse: Callable[[str, Row], E],
    bad_rows: BadRows,
    header: Sequence[str] | None = None,
) -> Examples[E]:
    """Reads the examples in a table.

    Args:
        path: `.tsv`: fields between tabs, in which a quotation mark is a character as any other;
            `.csv`: fields between commas, quoted by `"` where they hold a comma, a quotation mark
            or a line end; `.jsonl`: an object on each line. Blank lines are passed over.
        parse: makes an example of a row and its place in the file, or raises a `ValueError`.
        bad_rows: what to do with rows that cannot be read or parsed.
        header: names of the columns of a `.tsv` that does not begin with them.

    Raises:
        DataError: the file cannot be read, has a name that says none of these formats, no header
            or no rows, or, with `"error"`, a bad row; the message names the line.
    """
    if path.suffix not in _READERS:
        raise DataError(f"{path}: the name must end in one of {', '.join(_READERS)}")
    guard = RowGuard(path, bad_rows)
    items = []
    for place, make_row in _READERS[path.suffix](path, read_text(path), header):
        with guard.row(place):
            items.append(parse(place, make_row()))
    return guard.examples(items)


def get_cell(row: Row, column: str) -> Any:
    """The cell of a column.

    Raises:
        ValueError: the row has no such column; the message lists those it has.
    """
    if column not in row:
        raise ValueError(f"there is no column {column!r}; there are {', '.join(map(repr, row))}")
    return row[column]


def get_text(row: Row, column: str) -> str:
    """The text in a column, which may be empty.

    Raises:
        ValueError: the row has no such column, or something else than text is in it.
    """
    cell = get_cell(row, column)
    if not isinstance(cell, str):
        raise ValueError(f"column {column!r} must be a text, got {cell!r:.100}")
    return cell


def get_name(row: Row, column: str) -> str | None:
    """The name in a column, as text whatever JSON has: `true`, `1`; None if it is empty or null.

    Raises:
        ValueError: the row has no such column, or an array or object is in it.
    """
    cell = get_cell(row, column)
    if isinstance(cell, list | dict):
        raise ValueError(f"column {column!r} must be a name or a number, got {cell!r:.100}")
    if cell is None or cell == "":
        return None
    return cell if isinstance(cell, str) else json.dumps(cell)


def _read_tsv(path: Path, text: str, header: Sequence[str] | None) -> _Rows:
    # csv.QUOTE_NONE means the same, but limits the length of a field and takes a carriage return
    # inside one for the end of a line.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    first = 0 if header else 1
    header = header or _check_header(path, lines[0].split("\t"))
    for number, line in enumerate(lines[first:], first + 1):
        if line:
            yield f"line {number}", partial(_to_row, header, line.split("\t"))


def _read_csv(path: Path, text: str, _: Sequence[str] | None) -> _Rows:
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = _check_header(path, next(reader, []))
        end = reader.line_num
        for fields in reader:
            start, end = end + 1, reader.line_num
            if fields:
                yield f"line {start}", partial(_to_row, header, fields)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_json_lines(path: Path, text: str, _: Sequence[str] | None) -> _Rows:
    # Not splitlines, for a string may hold other line ends as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", partial(_to_object, line)


_READERS = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_json_lines}


def _check_header(path: Path, header: Sequence[str]) -> Sequence[str]:
    if not any(header):
        raise DataError(f"{path}: the first line must name the columns, it is empty")
    if len(set(header)) < len(header):
        raise DataError(f"{path}: two columns have the same name: {', '.join(header)}")
    return header


def _to_row(header: Sequence[str], fields: Sequence[str]) -> Row:
    if len(fields) != len(header):
        raise ValueError(f"expected {len(header)} fields ({', '.join(header)}), got {len(fields)}")
    return dict(zip(header, fields, strict=True))


def _to_object(line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {line!r:.100}")
    return row
