"""Sequence classification and regression from tables of the user's own."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from yoso_jax.errors import DataError
from yoso_jax.finetuning.examples import BadRows, Examples, TextExample
from yoso_jax.finetuning.metrics import CLASS_METRICS, SCORE_METRICS, MetricName
from yoso_jax.finetuning.tables import Row, get_name, get_text, read_table
from yoso_jax.validation import Validated


@dataclasses.dataclass(frozen=True)
class TextsConfig(Validated):
    """Texts or pairs of texts in columns of .csv, .tsv or .jsonl files in `data_dir`.

    Attributes:
      train: file of the examples to train on.
      valid: file of those to validate on.
      test: file of those to predict, with labels or without; none: there are none.
      text: column of the text.
      text_pair: column of the second text of a pair; none: there are no pairs.
      label: column of the label: the name of a class, or a number.
      id: column of what predictions name an example by; none: its number, from 0.
      regression: predict a number instead of a class.
      labels: names of the classes in the order of their numbers; none: those in `train`, sorted.
      metrics: of accuracy, f1 (of the second of two classes), macro_f1 and matthews, or for
        regression of pearson, spearman and mse; the first chooses the best checkpoint. None:
        accuracy, or pearson and spearman.
      bad_rows: `error`, or `skip` to leave out rows of `train` and `valid` that cannot be used;
        their number is reported.

    Raises:
      ValueError: a field has another value; the message names it.
    """

    task: ClassVar[str] = "texts"

    train: str
    valid: str
    test: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    id: str | None = None
    regression: bool = False
    labels: tuple[str, ...] | None = None
    metrics: tuple[MetricName, ...] | None = None
    bad_rows: BadRows = "error"

    def __post_init__(self) -> None:
        self._check_bool("regression")
        self._check_choice("bad_rows", ("error", "skip"))
        if self.labels is not None and (self.regression or len(set(self.labels)) < 2):
            self._fail("labels", "at least two different names, or none; none for regression")
        accepted = SCORE_METRICS if self.regression else CLASS_METRICS
        if self.metrics is not None and not (self.metrics and set(self.metrics) <= set(accepted)):
            self._fail("metrics", f"some of {', '.join(accepted)}, or none")
        if self.metrics is not None and self.metrics[0] == "mse":
            self._fail("metrics", "begun with one of which more is better, which mse is not")


def read_texts(config: TextsConfig, path: Path, split: str) -> Examples[TextExample]:
    """Reads one file; labels are names as they are in it, and numbers for regression.

    Args:
        config: says which columns to read.
        path: the file.
        split: `train`, `valid` or `test`; the last may lack labels, and no row of it is skipped.

    Raises:
        DataError: the file is missing or has a bad row; the message names it.
    """
    is_test = split == "test"
    rows = 0

    def parse(place: str, row: Row) -> TextExample:
        nonlocal rows
        pair = None if config.text_pair is None else get_text(row, config.text_pair)
        label = None
        if not is_test or row.get(config.label) not in (None, ""):
            names = None if config.regression else config.labels or ()
            label = parse_label(get_name(row, config.label), config.label, names)
        identity = str(rows) if config.id is None else get_name(row, config.id)
        if identity is None:
            raise ValueError(f"column {config.id!r} is empty")
        rows += 1
        return TextExample(place, identity, get_text(row, config.text), pair, label)

    return read_table(path, parse, "error" if is_test else config.bad_rows)


def parse_label(cell: str | None, column: str, labels: Sequence[str] | None) -> str | float:
    """A label as a column has it.

    Args:
        cell: its text.
        column: named in messages.
        labels: accepted names; empty accepts all, None wants a number.

    Raises:
        ValueError: it is empty, or not accepted.
    """
    if cell is None:
        raise ValueError(f"column {column!r}, the label, is empty")
    if labels is not None:
        if labels and cell not in labels:
            raise ValueError(f"column {column!r} must be one of {', '.join(labels)}, got {cell!r}")
        return cell
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"column {column!r} must be a finite number, got {cell!r}")
    return score


def collect_labels(train: Examples[TextExample]) -> tuple[str, ...]:
    """The names of the classes in `train`: whole numbers by their value, others by alphabet.

    Raises:
        DataError: there is only one.
    """
    names = {str(example.label) for example in train.items}
    if len(names) < 2:
        raise DataError(f"{train.path}: all labels are {names.pop()!r}, there must be two or more")
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))
