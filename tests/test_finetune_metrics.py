"""Metrics of fine-tuned models, against values worked out by hand."""

import numpy as np
import pytest

from yoso_jax.finetuning.answers import answer_metrics, choose_answers, normalize_answer
from yoso_jax.finetuning.examples import Answer, QuestionExample
from yoso_jax.finetuning.features import Window
from yoso_jax.finetuning.metrics import are_entities, class_metrics, score_metrics, tag_metrics
from yoso_jax.finetuning.squad import QuestionsConfig


def test_classes() -> None:
    labels, predicted = np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 1, 1])
    found = class_metrics(("accuracy", "f1", "macro_f1", "matthews"), predicted, labels)
    # Of class 1 two are found, one missed, one wrong; of class 0 one, one and one.
    assert found == pytest.approx(
        {"accuracy": 3 / 5, "f1": 2 / 3, "macro_f1": (2 / 3 + 1 / 2) / 2, "matthews": 1 / 6}
    )
    assert class_metrics(("matthews", "f1"), np.zeros(5, int), labels) == {"matthews": 0, "f1": 0}


def test_scores() -> None:
    scores, predicted = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 4.0, 9.0])
    found = score_metrics(("spearman", "mse", "pearson"), predicted, scores)
    assert found == pytest.approx({"spearman": 1, "mse": 10, "pearson": np.sqrt(45 / 49)})
    constant = score_metrics(("pearson", "spearman"), np.ones(4), scores)
    assert constant == {"pearson": 0, "spearman": 0}


def test_entities() -> None:
    tags = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "B-LOC"]]
    # Four are predicted, two of the three are right.
    found = tag_metrics(predicted, tags, entities=True)
    assert found == pytest.approx(
        {"f1": 4 / 7, "precision": 1 / 2, "recall": 2 / 3, "accuracy": 4 / 6}
    )
    assert next(iter(found)) == "f1"
    nothing = tag_metrics([["O"] * 4, ["O"] * 2], tags, entities=True)
    assert (nothing["f1"], nothing["accuracy"]) == (0, 2 / 6)
    long = tag_metrics([["B-A", "L-A", "U-A"]], [["B-A", "L-A", "U-B"]], entities=True)
    assert long["f1"] == 1 / 2
    assert tag_metrics([["N"]], [["V"]], entities=False) == {"accuracy": 0}
    assert are_entities(["O", "B-PER", "I-PER"])
    assert not are_entities(["O", "NN", "VB"])
    assert not are_entities(["O"])


# Answers


def question(*answers: str, context: str = "") -> QuestionExample:
    return QuestionExample("", "q", "", context, tuple(Answer(text, 0) for text in answers))


def test_answers_are_compared_without_case_punctuation_and_articles() -> None:
    assert normalize_answer("  The  Mill, (an) old-one. ") == "mill oldone"
    questions = [question("The mill"), question("x", "old oak wheel"), question("in 1612")]
    predicted = ["mill!", "the oak wheel of Ada", "1612"]
    found = answer_metrics(predicted, questions, null_answers=False)
    assert found == pytest.approx(
        {"f1": (1 + 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3) + 2 / 3) / 3, "exact_match": 1 / 3}
    )
    # SQuAD 1.1 gives no F1 for an answer that is an article; exact match it does.
    assert answer_metrics(["a"], [question("the")], null_answers=False) == {
        "f1": 0,
        "exact_match": 1,
    }


def test_no_answer_may_be_right() -> None:
    questions = [question("oak"), question(), question(), question("the")]
    found = answer_metrics(["", "", "oak", ""], questions, null_answers=True)
    assert found == {
        "f1": 0.5,
        "exact_match": 0.5,
        "has_answer_f1": 0.5,
        "has_answer_exact_match": 0.5,
        "no_answer_f1": 0.5,
        "no_answer_exact_match": 0.5,
    }
    assert "no_answer_f1" not in answer_metrics(["oak"], questions[:1], null_answers=True)


# Two windows over "one two three four", which share "three"; a question of one token before.
CONTEXT = "one two three four"
WINDOWS = [
    Window(0, 2, np.array([[0, 3], [4, 7], [8, 13]])),
    Window(0, 2, np.array([[8, 13], [14, 18]])),
]


def choose(starts: list[list[float]], ends: list[list[float]], **options: object) -> object:
    config = QuestionsConfig(**options)
    sides = ([np.array(row, np.float32) for row in side] for side in (starts, ends))
    (prediction,) = choose_answers([question(context=CONTEXT)], WINDOWS, *sides, config)
    return prediction


def test_best_answer_of_all_windows() -> None:
    starts = [[0, 9, 1, 3, 2, 9], [0, 9, 4, 1, 9, 9]]
    ends = [[0, 9, 3, 1, 2, 9], [0, 9, 1, 2, 9, 9]]
    found = choose(starts, ends)
    assert found.text == "three four"
    assert [(x.text, x.score) for x in found.candidates][:3] == [
        ("three four", 6.0),
        ("two three", 5.0),
        ("three", 5.0),
    ]
    texts = [x.text for x in found.candidates]
    assert len(set(texts)) == len(texts) == 8  # "three" is in both windows
    assert sum(found.probabilities()) == pytest.approx(1)
    assert choose(starts, ends, max_answer_length=1).text == "three"
    assert len(choose(starts, ends, n_best=1).candidates) == 1
    assert choose(starts, ends, n_best=1).text == "three four"


def test_nothing_is_answered_if_all_windows_say_so() -> None:
    starts, ends = [[3, 0, 1, 3, 2], [8, 0, 4, 1]], [[4, 0, 3, 1, 2], [8, 0, 1, 2]]
    options = {"null_answers": True}
    assert choose(starts, ends).text == "three four"
    found = choose(starts, ends, **options)
    assert (found.text, found.null_score) == ("", 1.0)
    assert found.candidates[0].text == ""
    assert choose(starts, ends, null_threshold=1.0, **options).text == "three four"
    assert choose(starts, [[0] * 5, [0] * 4], null_threshold=-9.0, **options).text == ""
