"""Labelled examples as they are read, before any tokenizer sees them."""

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from yoso_jax.errors import DataError

BadRows = Literal["error", "skip"]
"""What to do with a row that cannot be used: stop, or leave it out and count it."""


class TextExample(NamedTuple):
    """A text, or a pair of texts, to classify or to give a number to."""

    place: str
    """Where it is in its file, for messages, e.g. `line 3`."""
    id: str
    """What predictions name it by."""
    text: str
    pair: str | None
    label: str | float | None
    """Name of the class, a number for regression, or None where it is not known."""


class WordsExample(NamedTuple):
    """A sentence whose words have tags."""

    place: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    """One for each word, or None where they are not known."""


class Answer(NamedTuple):
    """A part of a context, `context[start : start + len(text)]`."""

    text: str
    start: int


class QuestionExample(NamedTuple):
    """A question about a text."""

    place: str
    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None
    """All that count as right, none if the text has no answer; None where they are not known."""


class ChoiceExample(NamedTuple):
    """Continuations of which one is right."""

    place: str
    id: str
    context: str
    choices: tuple[str, ...]
    label: int | None
    """Number of the right choice, from 0; None where it is not known."""


@dataclasses.dataclass(frozen=True)
class Examples[E: TextExample | WordsExample | QuestionExample | ChoiceExample]:
    """The examples of one file, in its order."""

    path: Path
    items: Sequence[E]
    skipped: int = 0
    """Rows left out because they could not be used."""

    def __len__(self) -> int:
        return len(self.items)


class RowGuard:
    """Turns what is wrong with a row into a `DataError` that names file and row, or counts it.

    Args:
        path: the file.
        bad_rows: `"skip"` passes over rows that raise a `ValueError`.
    """

    def __init__(self, path: Path, bad_rows: BadRows) -> None:
        self._path, self._bad_rows = path, bad_rows
        self.skipped = 0
        """Rows passed over."""

    @contextlib.contextmanager
    def row(self, place: str) -> Generator[None, None, None]:
        """Guards the statements that read the row at `place`."""
        try:
            yield
        except ValueError as error:
            if self._bad_rows == "error":
                raise DataError(
                    f"{self._path}, {place}: {error} (data.bad_rows: skip passes over such rows of "
                    "training and validation data)"
                ) from None
            self.skipped += 1

    def examples[E: TextExample | WordsExample | QuestionExample | ChoiceExample](
        self, items: Sequence[E]
    ) -> Examples[E]:
        """The examples that were read.

        Raises:
            DataError: there are none.
        """
        if not items:
            raise DataError(f"{self._path}: no examples")
        return Examples(self._path, items, self.skipped)


def read_text(path: Path) -> str:
    """Reads a file of UTF-8, with or without a byte order mark.

    Raises:
        DataError: it cannot be read or is not UTF-8; the message names it.
    """
    try:
        # Not read_text, which would make line ends of a carriage return inside a field.
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
