"""Sentences with tagged words, one word a line, as the shared tasks of CoNLL have them."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from yoso_jax.errors import DataError
from yoso_jax.finetuning.examples import BadRows, Examples, RowGuard, WordsExample, read_text
from yoso_jax.validation import Validated


@dataclasses.dataclass(frozen=True)
class WordsConfig(Validated):
    """Files in `data_dir` with a word a line and a blank line after each sentence.

    The defaults read the files of CoNLL 2003, `word part-of-speech chunk entity`, and any with the
    tag in the last column. Lines whose word is `-DOCSTART-` are passed over.

    Attributes:
      train: file to train on.
      valid: file to validate on.
      test: file to predict, with tags or without; none: there is none.
      word_column: number of the word's column, from 0; negative ones count from the end.
      tag_column: likewise, of the tag's. Without tags, a test file has no such column.
      separator: what is between columns: `whitespace`, or `tab` for words with spaces.
      bad_rows: `error`, or `skip` to leave out sentences of `train` and `valid` with a line that
        cannot be used; their number is reported.

    Raises:
      ValueError: a field has another value; the message names it.
    """

    task: ClassVar[str] = "words"

    train: str = "eng.train"
    valid: str = "eng.testa"
    test: str | None = "eng.testb"
    word_column: int = 0
    tag_column: int = -1
    separator: Literal["whitespace", "tab"] = "whitespace"
    bad_rows: BadRows = "error"

    def __post_init__(self) -> None:
        if self.word_column == self.tag_column:
            self._fail("tag_column", f"another than word_column ({self.word_column})")
        self._check_choice("separator", ("whitespace", "tab"))
        self._check_choice("bad_rows", ("error", "skip"))


def read_conll(config: WordsConfig, path: Path, split: str) -> Examples[WordsExample]:
    """Reads one file.

    Args:
        config: says which columns to read.
        path: the file.
        split: `train`, `valid` or `test`; in the last, sentences may lack tags, and none is
            skipped.

    Raises:
        DataError: the file is missing, or a line lacks the word or the tag; the message names it.
    """
    is_test = split == "test"
    guard = RowGuard(path, "error" if is_test else config.bad_rows)
    separator = "\t" if config.separator == "tab" else None
    sentences: list[WordsExample] = []
    lines: list[tuple[int, list[str]]] = []

    def end_sentence() -> None:
        if lines:
            with guard.row(f"line {lines[0][0]}"):
                sentences.append(_to_sentence(config, lines, may_lack_tags=is_test))
            lines.clear()

    for number, line in enumerate(read_text(path).split("\n"), 1):
        fields = line.removesuffix("\r").split(separator)
        if not any(fields):
            end_sentence()
        elif "-DOCSTART-" not in fields:
            lines.append((number, fields))
    end_sentence()
    return guard.examples(sentences)


def collect_tags(train: Examples[WordsExample]) -> tuple[str, ...]:
    """The tags in `train`: `O` first, then those of a kind together, e.g. B-LOC, I-LOC, B-PER.

    Raises:
        DataError: there is only one.
    """
    tags = {tag for example in train.items for tag in example.tags or ()}
    if len(tags) < 2:
        raise DataError(f"{train.path}: all tags are {tags.pop()!r}, there must be two or more")
    return tuple(sorted(tags, key=lambda tag: (tag != "O", tag.partition("-")[::-1])))


def _to_sentence(
    config: WordsConfig, lines: list[tuple[int, list[str]]], *, may_lack_tags: bool
) -> WordsExample:
    words, tags = [], []
    for number, fields in lines:
        word = _get(fields, config.word_column)
        tag = _get(fields, config.tag_column)
        is_same = (config.word_column - config.tag_column) % len(fields) == 0
        if not word:
            raise ValueError(
                f"line {number} has no column {config.word_column}, the word: {fields}"
            )
        if tag and not is_same:
            tags.append(tag)
        elif not may_lack_tags:
            raise ValueError(f"line {number} has no column {config.tag_column}, the tag: {fields}")
        words.append(word)
    if tags and len(tags) < len(words):
        raise ValueError(f"only {len(tags)} of {len(words)} words have a tag")
    return WordsExample(f"line {lines[0][0]}", tuple(words), tuple(tags) or None)


def _get(fields: list[str], column: int) -> str | None:
    return fields[column] if -len(fields) <= column < len(fields) else None
