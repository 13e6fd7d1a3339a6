"""Multiple choice, from tables."""

import dataclasses
import string
from pathlib import Path
from typing import Any, ClassVar

from yoso_jax.finetuning.examples import BadRows, ChoiceExample, Examples
from yoso_jax.finetuning.tables import Row, get_cell, get_name, get_text, read_table
from yoso_jax.validation import Validated


@dataclasses.dataclass(frozen=True)
class ChoicesConfig(Validated):
    """Questions with choices in columns of .jsonl, .csv or .tsv files in `data_dir`.

    The model reads the context and, after it, the question and one choice. All examples have the
    same number of choices. SWAG, whose columns are sentences and four endings, is `context: sent1`,
    `question: sent2`, `choices: [ending0, ending1, ending2, ending3]`.

    Attributes:
      train: file to train on.
      valid: file to validate on.
      test: file to predict, with labels or without; none: there is none.
      context: column of the text the question is about; none: the model reads the question and,
        after it, a choice.
      question: column of the question, or of the beginning of all choices; none: there is none.
      choices: column of the list of choices, or a column for each of them.
      label: column of the right choice: its number from 0, or its letter, A or a for the first.
      id: column of what predictions name an example by; none: its number, from 0.
      bad_rows: `error`, or `skip` to leave out rows of `train` and `valid` that cannot be used;
        their number is reported.

    Raises:
      ValueError: a field has another value; the message names it.
    """

    task: ClassVar[str] = "choices"

    train: str
    valid: str
    test: str | None = None
    context: str | None = "context"
    question: str | None = "question"
    choices: tuple[str, ...] = ("choices",)
    label: str = "label"
    id: str | None = None
    bad_rows: BadRows = "error"

    def __post_init__(self) -> None:
        if self.context is None and self.question is None:
            self._fail("question", "a column if context is none")
        if not self.choices:
            self._fail("choices", "one column of lists, or a column for each choice")
        self._check_choice("bad_rows", ("error", "skip"))


def read_choices(config: ChoicesConfig, path: Path, split: str) -> Examples[ChoiceExample]:
    """Reads one file.

    Args:
        config: says which columns to read.
        path: the file.
        split: `train`, `valid` or `test`; the last may lack labels, and no row of it is skipped.

    Raises:
        DataError: the file is missing or has a bad row, such as one with another number of choices
            than the first; the message names it.
    """
    is_test = split == "test"
    rows, count = 0, 0

    def parse(place: str, row: Row) -> ChoiceExample:
        nonlocal rows, count
        context = "" if config.context is None else get_text(row, config.context)
        question = "" if config.question is None else get_text(row, config.question)
        choices = _get_choices(config, row)
        count = count or len(choices)
        if len(choices) != count:
            raise ValueError(f"expected {count} choices as in the first row, got {len(choices)}")
        label = None
        if not is_test or row.get(config.label) not in (None, ""):
            label = _parse_label(get_name(row, config.label), config.label, len(choices))
        identity = str(rows) if config.id is None else get_name(row, config.id)
        if identity is None:
            raise ValueError(f"column {config.id!r} is empty")
        rows += 1
        if config.context is None:
            return ChoiceExample(place, identity, question, choices, label)
        endings = tuple(f"{question} {choice}".strip() for choice in choices)
        return ChoiceExample(place, identity, context, endings, label)

    return read_table(path, parse, "error" if is_test else config.bad_rows)


def _get_choices(config: ChoicesConfig, row: Row) -> tuple[str, ...]:
    choices: Any = [get_cell(row, column) for column in config.choices]
    if len(config.choices) == 1:
        (choices,) = choices
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) for choice in choices)
    ):
        columns = ", ".join(map(repr, config.choices))
        raise ValueError(f"column {columns} must hold at least two texts, got {choices!r:.100}")
    return tuple(choices)


def _parse_label(cell: str | None, column: str, count: int) -> int:
    if cell is not None and cell.isdecimal() and int(cell) < count:
        return int(cell)
    letters = string.ascii_uppercase[:count]
    if cell and len(cell) == 1 and cell.upper() in letters:
        return letters.index(cell.upper())
    raise ValueError(
        f"column {column!r} must be a number in 0..{count - 1} or a letter of {letters}, "
        f"got {cell!r}"
    )
