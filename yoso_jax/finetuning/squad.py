"""Questions about texts, in the JSON of SQuAD 1.1 and 2.0."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from yoso_jax.errors import DataError
from yoso_jax.finetuning.examples import (
    Answer,
    BadRows,
    Examples,
    QuestionExample,
    RowGuard,
    read_text,
)
from yoso_jax.validation import Validated


@dataclasses.dataclass(frozen=True)
class QuestionsConfig(Validated):
    """Files in `data_dir` in the format of SQuAD, and how answers are looked for.

    Attributes:
      train: file to train on.
      valid: file to validate on.
      test: file to predict, with answers or without; none: there is none.
      null_answers: some questions have no answer, as in SQuAD 2.0.
      null_threshold: answer nothing if the score of that, less the score of the best answer,
        exceeds this.
      doc_stride: tokens that a window shares with the one before it, where a text is longer than
        fits, >= 0.
      max_answer_length: tokens of the longest answer, >= 1.
      n_best: answers to write for each question, and first and last tokens of a window to choose
        them from, >= 1.
      bad_rows: `error`, or `skip` to leave out questions of `train` and `valid` that cannot be
        used; their number is reported.

    Raises:
      ValueError: a field has another value; the message names it.
    """

    task: ClassVar[str] = "questions"

    train: str = "train-v1.1.json"
    valid: str = "dev-v1.1.json"
    test: str | None = None
    null_answers: bool = False
    null_threshold: float = 0.0
    doc_stride: int = 128
    max_answer_length: int = 30
    n_best: int = 20
    bad_rows: BadRows = "error"

    def __post_init__(self) -> None:
        self._check_bool("null_answers")
        self._check_number("null_threshold", "", lambda value: True)
        self._check_integer("doc_stride", 0)
        self._check_integer("max_answer_length")
        self._check_integer("n_best")
        self._check_choice("bad_rows", ("error", "skip"))


def read_squad(config: QuestionsConfig, path: Path, split: str) -> Examples[QuestionExample]:
    """Reads one file.

    Args:
        config: says whether questions may have no answer.
        path: the file.
        split: `train`, `valid` or `test`; in the last, questions may lack `answers`, and none is
            skipped.

    Raises:
        DataError: the file is missing or not of this format, or a question cannot be used: it
            lacks a field, its answer is not where it is said to be, or it has none though
            `null_answers` is off. The message names the question by its `id`.
    """
    is_test = split == "test"
    guard = RowGuard(path, "error" if is_test else config.bad_rows)
    questions: list[QuestionExample] = []
    seen: set[str] = set()
    try:
        articles = json.loads(read_text(path))["data"]
        entries = [
            (f"article {i}, paragraph {j}, question {k}", paragraph["context"], entry)
            for i, article in enumerate(articles)
            for j, paragraph in enumerate(article["paragraphs"])
            for k, entry in enumerate(paragraph["qas"])
        ]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not in the format of SQuAD: expected data, in it a list of articles with "
            f"paragraphs, in each a context and qas ({error!r})"
        ) from error
    for place, context, entry in entries:
        with guard.row(place):
            question = _to_question(config, context, entry, may_lack_answers=is_test)
            if question.id in seen:
                raise ValueError(f"the id {question.id!r} was used before")
            seen.add(question.id)
            questions.append(question)
    return guard.examples(questions)


def _to_question(
    config: QuestionsConfig, context: Any, entry: Any, *, may_lack_answers: bool
) -> QuestionExample:
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object with id, question and answers, got {entry!r:.100}")
    identity, question = _get(entry, "id", str), _get(entry, "question", str)
    if not isinstance(context, str):
        raise ValueError(f"context must be a text, got {context!r:.100}")
    place = f"question {identity}"
    if may_lack_answers and "answers" not in entry:
        return QuestionExample(place, identity, question, context, None)
    answers = [] if entry.get("is_impossible") else _get(entry, "answers", list)
    if not answers and not config.null_answers:
        raise ValueError(f"question {identity} has no answer, set data.null_answers if that is so")
    found = tuple(_to_answer(identity, context, answer) for answer in answers)
    return QuestionExample(place, identity, question, context, found)


def _to_answer(identity: str, context: str, answer: Any) -> Answer:
    if not isinstance(answer, Mapping):
        raise ValueError(f"question {identity}: expected an object as answer, got {answer!r:.100}")
    text, start = _get(answer, "text", str), _get(answer, "answer_start", int)
    if not text.strip() or start < 0 or context[start : start + len(text)] != text:
        raise ValueError(
            f"question {identity}: the answer {text!r} is not at {start} in its context"
        )
    return Answer(text, start)


def _get[T](values: Mapping[str, Any], field: str, kind: type[T]) -> T:
    value = values.get(field)
    if not isinstance(value, kind):
        raise ValueError(f"{field} must be of {kind.__name__}, got {value!r:.100}")
    return value
