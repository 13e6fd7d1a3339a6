"""Examples to what a model is called with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from tokenizers import Encoding

from yoso_jax.errors import DataError
from yoso_jax.finetuning.encoding import TextEncoder
from yoso_jax.finetuning.examples import (
    Answer,
    ChoiceExample,
    Examples,
    QuestionExample,
    TextExample,
    WordsExample,
)
from yoso_jax.losses import IGNORED

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Features:
    """Inputs of the model and labels, by index.

    Attributes:
      rows: a dict for each example, or window of one: `input_ids` (and perhaps `token_type_ids`)
        int32 [length], for multiple choice a tuple of them; and labels: `labels`, or
        `start_positions` and `end_positions`.
      truncated: examples that were cut.
      unseen: words that got no token, because they were cut off or the tokenizer drops them.
    """

    rows: Sequence[Row]
    truncated: int = 0
    unseen: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """Tokens of each row, of multiple choice of its longest choice."""
        ids = (row["input_ids"] for row in self.rows)
        return np.array([max(map(len, x)) if isinstance(x, tuple) else len(x) for x in ids])

    def column(self, name: str) -> Shaped[np.ndarray, " rows"]:
        """The label of each row, where that is one number."""
        return np.array([row[name] for row in self.rows])


@dataclasses.dataclass(frozen=True)
class Window:
    """The part of a context that a row of question answering holds.

    Attributes:
      example: number of the question.
      first: the token at which the context begins.
      spans: where each of its tokens is in the context: first character and the one after the last.
    """

    example: int
    first: int
    spans: Int[np.ndarray, "tokens 2"]


def text_features(
    examples: Examples[TextExample], labels: Sequence[str] | None, encoder: TextEncoder
) -> Features:
    """Rows of texts to classify.

    Args:
        examples: the texts.
        labels: names of the classes; None for regression.
        encoder: makes ids.

    Returns:
        Rows with `labels`: a class, or a float32 for regression; -100 or 0 where it is not known.

    Raises:
        DataError: a label is none of `labels`, or as `TextEncoder.encode`.
    """
    numbers = None if labels is None else {name: number for number, name in enumerate(labels)}
    inputs = [x.text if x.pair is None else (x.text, x.pair) for x in examples.items]
    rows, truncated = [], 0
    for example, encoding in zip(examples.items, encoder.encode(examples, inputs), strict=True):
        if numbers is None:
            label = np.float32(example.label or 0)
        else:
            label = _number(numbers, example.label, examples, example.place)
        rows.append({**encoder.to_inputs(encoding), "labels": label})
        truncated += bool(encoding.overflowing)
    return Features(rows, truncated)


def words_features(
    examples: Examples[WordsExample], tags: Sequence[str], encoder: TextEncoder
) -> tuple[Features, list[Int[np.ndarray, " _"]]]:
    """Rows of sentences whose words have tags.

    Words are joined by spaces, as the tokenizer saw them in pretraining.

    Args:
        examples: the sentences.
        tags: their names in the order of their numbers.
        encoder: makes ids.

    Returns:
        Rows with `labels`, int32 [length], the tag of a word at its first token, else -100; and for
        each row the first token of each word, -1 for a word without one.

    Raises:
        DataError: a tag is none of `tags`, or as `TextEncoder.encode`.
    """
    numbers = {name: number for number, name in enumerate(tags)}
    inputs = [" ".join(example.words) for example in examples.items]
    rows, positions, truncated = [], [], 0
    for example, encoding in zip(examples.items, encoder.encode(examples, inputs), strict=True):
        first = first_tokens(example.words, encoding)
        labels = np.full(len(encoding), IGNORED, np.int32)
        if example.tags is not None:
            for position, tag in zip(first, example.tags, strict=True):
                number = _number(numbers, tag, examples, example.place)
                if position >= 0:
                    labels[position] = number
        rows.append({**encoder.to_inputs(encoding), "labels": labels})
        positions.append(first)
        truncated += bool(encoding.overflowing)
    unseen = sum(int((first < 0).sum()) for first in positions)
    return Features(rows, truncated, unseen), positions


def first_tokens(words: Sequence[str], encoding: Encoding) -> Int[np.ndarray, " words"]:
    """The first token of each word of a text in which they are joined by spaces, -1 for none."""
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    first = np.full(len(words), -1)
    for token, (start, end) in enumerate(encoding.offsets):
        # With the space before it, if the tokenizer counts that as a part of it.
        word = int(np.searchsorted(ends, start, side="right"))
        is_of_word = start < end and word < len(words) and end > ends[word] - len(words[word])
        if is_of_word and first[word] < 0:
            first[word] = token
    return first


def question_features(
    examples: Examples[QuestionExample], encoder: TextEncoder, stride: int
) -> tuple[Features, list[Window]]:
    """Rows of question and context, several of them where the context does not fit in one.

    Args:
        examples: the questions.
        encoder: makes ids; its `truncation` does not matter, for nothing is cut off.
        stride: tokens that a window shares with the one before it.

    Returns:
        Rows with `start_positions` and `end_positions`: the first and last token of the first
        answer, or 0, the first token of all, where it is not (whole) in the window; and what each
        row holds.

    Raises:
        DataError: as `TextEncoder.encode_windows`.
    """
    # Blanks before a question, which some have many of, say nothing.
    inputs = [(example.question.lstrip(), example.context) for example in examples.items]
    rows, windows = [], []
    encodings = encoder.encode_windows(examples, inputs, stride)
    for number, (example, parts) in enumerate(zip(examples.items, encodings, strict=True)):
        for part in parts:
            inside = np.array([text == 1 for text in part.sequence_ids])
            first = int(inside.argmax()) if inside.any() else len(part)
            spans = np.array(part.offsets, np.int32)[inside]
            start, end = _find_answer(spans, example.answers)
            rows.append(
                {
                    **encoder.to_inputs(part),
                    "start_positions": np.int32(0 if start is None else first + start),
                    "end_positions": np.int32(0 if end is None else first + end),
                }
            )
            windows.append(Window(number, first, spans))
    return Features(rows), windows


def choice_features(examples: Examples[ChoiceExample], encoder: TextEncoder) -> Features:
    """Rows of contexts, each with all of its choices.

    Returns:
        Rows whose `input_ids` (and `token_type_ids`) are tuples of an array for each choice, with
        `labels`, the right one, -100 where it is not known.

    Raises:
        DataError: as `TextEncoder.encode`.
    """
    flat = Examples(examples.path, [x for x in examples.items for _ in x.choices])
    inputs = [(x.context, choice) for x in examples.items for choice in x.choices]
    encodings = encoder.encode(flat, inputs)
    rows, truncated = [], 0
    for example in examples.items:
        parts = [next(encodings) for _ in example.choices]
        arrays = [encoder.to_inputs(part) for part in parts]
        label = IGNORED if example.label is None else example.label
        rows.append(
            {
                **{name: tuple(each[name] for each in arrays) for name in arrays[0]},
                "labels": np.int32(label),
            }
        )
        truncated += any(part.overflowing for part in parts)
    return Features(rows, truncated)


def _number(
    numbers: Mapping[str, int], label: str | float | None, examples: Examples, place: str
) -> np.int32:
    if label is None:
        return np.int32(IGNORED)
    if label not in numbers:
        raise DataError(
            f"{examples.path}, {place}: the label {label!r} is none of {', '.join(numbers)}"
        )
    return np.int32(numbers[str(label)])


def _find_answer(
    spans: Int[np.ndarray, "tokens 2"], answers: Sequence[Answer] | None
) -> tuple[int | None, int | None]:
    """The first and last of the tokens that hold the first answer, if all of it is in them."""
    if not answers or not len(spans):
        return None, None
    begin, end = answers[0].start, answers[0].start + len(answers[0].text)
    if spans[0, 0] > begin or spans[-1, 1] < end:
        return None, None
    touching = np.flatnonzero((spans[:, 1] > begin) & (spans[:, 0] < end))
    return (int(touching[0]), int(touching[-1])) if touching.size else (None, None)
