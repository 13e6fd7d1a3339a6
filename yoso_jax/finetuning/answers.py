"""Answers from the scores of their first and last tokens, and how SQuAD judges them."""

import collections
import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from yoso_jax.finetuning.examples import QuestionExample
from yoso_jax.finetuning.features import Window
from yoso_jax.finetuning.squad import QuestionsConfig


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A possible answer."""

    text: str
    score: float
    """Score of its first token plus that of its last."""
    start: int
    """Of its first character in the context."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What is answered to a question.

    Attributes:
      text: the answer; empty for none.
      candidates: the best, best first, and with `null_answers` the empty one among them.
      null_score: score of there being no answer, less that of the best candidate; 0 without
        `null_answers`.
    """

    text: str
    candidates: tuple[Candidate, ...]
    null_score: float

    def probabilities(self) -> list[float]:
        """Softmax of the candidates' scores."""
        scores = np.array([candidate.score for candidate in self.candidates])
        weights = np.exp(scores - scores.max())
        return (weights / weights.sum()).tolist()


def choose_answers(
    questions: Sequence[QuestionExample],
    windows: Sequence[Window],
    start_logits: Sequence[Float[np.ndarray, " _"]],
    end_logits: Sequence[Float[np.ndarray, " _"]],
    config: QuestionsConfig,
) -> list[Prediction]:
    """Finds the best answer to each question over all windows of its context.

    Args:
        questions: what was asked.
        windows: see `question_features`.
        start_logits: for each window, scores of its tokens to be an answer's first.
        end_logits: likewise, the last.
        config: how many candidates, how long, and whether and when to answer nothing.

    Returns:
        A prediction for each question, in their order. It is empty also where no token of the
        context can be answered with.
    """
    found: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    nulls = [float("inf")] * len(questions)
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        # As in training: the first token stands for an answer that is not here. A text has none if
        # no window has, so the least sure one counts.
        null = float(starts[0]) + float(ends[0])
        nulls[window.example] = min(nulls[window.example], null)
        _add_candidates(found[window.example], window, starts, ends, config)
    return [
        _choose(question, candidates, null, config)
        for question, candidates, null in zip(questions, found, nulls, strict=True)
    ]


def _add_candidates(
    found: dict[tuple[int, int], float],
    window: Window,
    starts: Float[np.ndarray, " tokens"],
    ends: Float[np.ndarray, " tokens"],
    config: QuestionsConfig,
) -> None:
    """Adds the best of a window, by their characters, which windows may share."""
    inside = slice(window.first, window.first + len(window.spans))
    starts, ends = starts[inside].astype(np.float64), ends[inside].astype(np.float64)
    best_starts, best_ends = (
        np.argsort(-scores, kind="stable")[: config.n_best] for scores in (starts, ends)
    )
    for start in best_starts.tolist():
        for end in best_ends.tolist():
            if start <= end < start + config.max_answer_length:
                span = int(window.spans[start, 0]), int(window.spans[end, 1])
                score = float(starts[start] + ends[end])
                found[span] = max(score, found.get(span, score))


def _choose(
    question: QuestionExample,
    found: Mapping[tuple[int, int], float],
    null: float,
    config: QuestionsConfig,
) -> Prediction:
    texts = (
        Candidate(question.context[start:end].strip(), score, start)
        for (start, end), score in found.items()
    )
    ranked = sorted((each for each in texts if each.text), key=lambda each: -each.score)
    best = ranked[: config.n_best]
    if not config.null_answers:
        best = best or [Candidate("", null, 0)]
        return Prediction(best[0].text, tuple(best), 0.0)
    nothing = Candidate("", null, 0)
    if not best:
        return Prediction("", (nothing,), 0.0)
    null_score = null - best[0].score
    candidates = sorted([*best, nothing], key=lambda each: -each.score)
    text = "" if null_score > config.null_threshold else best[0].text
    return Prediction(text, tuple(candidates), null_score)


def normalize_answer(text: str) -> str:
    """Without capitals, punctuation, articles and superfluous blanks, as SQuAD compares answers."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_metrics(
    predicted: Sequence[str], questions: Sequence[QuestionExample], *, null_answers: bool
) -> dict[str, float]:
    """Exact match and F1, as the official scripts compute them, but as fractions.

    Args:
        predicted: the answer to each question.
        questions: with the right answers, of which the best counts.
        null_answers: compare as SQuAD 2.0, where no answer may be right, and also give the metrics
            of questions with and without answer.

    Returns:
        `f1`, `exact_match`; with `null_answers` also `has_answer_f1`, `no_answer_f1` and likewise
        `exact_match`, of those there are.
    """
    scores = [
        _score(text, [answer.text for answer in question.answers or ()], null_answers)
        for text, question in zip(predicted, questions, strict=True)
    ]
    result = _mean("", scores)
    if null_answers:
        for name, wanted in (("has_answer_", True), ("no_answer_", False)):
            part = [s for s, q in zip(scores, questions, strict=True) if bool(q.answers) == wanted]
            if part:
                result |= _mean(name, part)
    return result


def _mean(prefix: str, scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    f1, exact = np.mean(scores, axis=0)
    return {f"{prefix}f1": float(f1), f"{prefix}exact_match": float(exact)}


def _score(predicted: str, answers: list[str], null_answers: bool) -> tuple[float, float]:
    if null_answers:
        answers = [answer for answer in answers if normalize_answer(answer)] or [""]
    f1 = max(_f1(predicted, answer, null_answers) for answer in answers)
    exact = max(normalize_answer(predicted) == normalize_answer(answer) for answer in answers)
    return f1, float(exact)


def _f1(predicted: str, answer: str, null_answers: bool) -> float:
    found, right = normalize_answer(predicted).split(), normalize_answer(answer).split()
    if null_answers and not (found and right):
        return float(found == right)
    common = (collections.Counter(found) & collections.Counter(right)).total()
    return 2 * common / (len(found) + len(right)) if common else 0.0


def n_best_entries(prediction: Prediction) -> list[dict[str, Any]]:
    """The candidates as they are written: text, score and probability of each."""
    return [
        {"text": candidate.text, "score": candidate.score, "probability": probability}
        for candidate, probability in zip(
            prediction.candidates, prediction.probabilities(), strict=True
        )
    ]
