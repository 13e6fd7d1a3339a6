"""Tasks of each head: metrics and predictions of made-up logits, without a model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_helpers import save_tokenizer

from yoso_jax.data.tokenizer import load_tokenizer
from yoso_jax.errors import ConfigError
from yoso_jax.finetuning.choices import ChoicesConfig
from yoso_jax.finetuning.conll import WordsConfig
from yoso_jax.finetuning.encoding import TextEncoder
from yoso_jax.finetuning.glue import GlueConfig
from yoso_jax.finetuning.squad import QuestionsConfig
from yoso_jax.finetuning.task import Task
from yoso_jax.finetuning.tasks import TASKS, DataConfig, split_files
from yoso_jax.finetuning.texts import TextsConfig


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> TextEncoder:
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), data_dir / "finetune")
    return TextEncoder(load_tokenizer(folder), 64)


@pytest.fixture
def make(data_dir: Path, encoder: TextEncoder) -> Any:
    def make(config: DataConfig, folder: str, known_labels: tuple[str, ...] = ()) -> Task:
        files = split_files(config, data_dir / "finetune" / folder)
        return TASKS[config.task](config, files, encoder, known_labels)

    return make


def logits_for(numbers: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[numbers]


def test_glue(make: Any, tmp_path: Path) -> None:
    task = make(GlueConfig("mnli"), "glue/MNLI")
    assert list(task.splits) == ["train", "valid", "valid_mismatched", "test", "test_mismatched"]
    assert [split.has_labels for split in task.splits.values()] == [True] * 3 + [False] * 2
    assert task.model_fields == {
        "id2label": {0: "entailment", 1: "neutral", 2: "contradiction"},
        "problem_type": "single_label_classification",
    }
    outputs = {"logits": logits_for([0, 1], 3)}
    assert task.metrics("valid_mismatched", outputs) == {"accuracy": 0.5}
    (matched,) = task.write_predictions("test", outputs, tmp_path)
    (mismatched,) = task.write_predictions("test_mismatched", outputs, tmp_path)
    assert (matched.name, mismatched.name) == ("MNLI-m.tsv", "MNLI-mm.tsv")
    assert matched.read_text() == "index\tprediction\n0\tentailment\n1\tneutral\n"
    # A checkpoint's classifier that knows the same classes goes on knowing them by its numbers.
    known = ("contradiction", "neutral", "entailment")
    task = make(GlueConfig("mnli"), "glue/MNLI", known)
    assert task.labels == known
    assert [row["labels"] for row in task.splits["train"].features.rows] == [2, 0, 1]
    assert make(GlueConfig("mnli"), "glue/MNLI", ("a", "b", "c")).labels[0] == "entailment"


def test_glue_regression(make: Any, tmp_path: Path) -> None:
    task = make(GlueConfig("stsb"), "glue/STS-B")
    assert task.model_fields == {"num_labels": 1, "problem_type": "regression"}
    outputs = {"logits": np.array([[2.5], [0.5], [2.0]], np.float32)}
    metrics = task.metrics("valid", outputs)
    assert list(metrics) == ["pearson", "spearman"]
    assert metrics["spearman"] == pytest.approx(1)
    (file,) = task.write_predictions("test", {"logits": outputs["logits"][:2]}, tmp_path)
    assert file.read_text() == "index\tprediction\n0\t2.5\n1\t0.5\n"


def test_tests_of_glue_need_not_be_there(tmp_path: Path) -> None:
    assert list(split_files(GlueConfig("rte"), tmp_path)) == ["train", "valid"]


def test_texts(make: Any, tmp_path: Path) -> None:
    columns = {"text": "title", "text_pair": "body", "label": "topic"}
    config = TextsConfig(
        "train.csv", "valid.csv", "test.csv", metrics=("f1", "accuracy"), **columns
    )
    task = make(config, "texts")
    assert task.labels == ("boats", "food")
    assert task.metrics("valid", {"logits": logits_for([1, 1], 2)}) == {
        "f1": 2 / 3,
        "accuracy": 0.5,
    }
    (file,) = task.write_predictions("test", {"logits": np.log([[3.0, 1.0]])}, tmp_path)
    entry = json.loads(file.read_text())
    assert (entry["id"], entry["prediction"]) == ("0", "boats")
    assert entry["probabilities"] == pytest.approx({"boats": 0.75, "food": 0.25})
    three = TextsConfig(
        "train.csv", "valid.csv", labels=("boats", "food", "mills"), metrics=("f1",), **columns
    )
    with pytest.raises(ConfigError, match=r"data\.metrics: f1 is that of two classes"):
        make(three, "texts")


def test_words(make: Any, tmp_path: Path) -> None:
    task = make(WordsConfig(), "conll")
    assert task.labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    split = task.splits["valid"]
    logits = np.zeros((2, 64, 5), np.float32)
    for row, first, example in zip(logits, split.places, split.examples.items, strict=True):
        for position, tag in zip(first, example.tags, strict=True):
            row[position, task.labels.index(tag)] = 1
    assert task.metrics("valid", {"logits": logits}) == dict.fromkeys(
        ("f1", "precision", "recall", "accuracy"), 1
    )
    logits[1] = 0  # the one entity of the second sentence, of two words, is missed
    metrics = task.metrics("valid", {"logits": logits})
    assert (metrics["precision"], metrics["recall"]) == (1, 2 / 3)
    (file,) = task.write_predictions("valid", {"logits": logits}, tmp_path)
    assert file.read_text() == (
        "Ada\tB-PER\nsang\tO\nin\tO\nFeldau\tB-LOC\n.\tO\n\nCora\tO\nMiller\tO\nlives\tO\n.\tO\n\n"
    )
    parts = make(WordsConfig(tag_column=1), "conll")
    assert "NNP" in parts.labels
    assert list(parts.metrics("valid", {"logits": np.zeros((2, 64, 9))})) == ["accuracy"]


@pytest.mark.parametrize("null_answers", [False, True], ids=["v1", "v2"])
def test_questions(make: Any, tmp_path: Path, null_answers: bool) -> None:
    version = "v2.0" if null_answers else "v1.1"
    config = QuestionsConfig(
        f"train-{version}.json", f"dev-{version}.json", doc_stride=8, null_answers=null_answers
    )
    task = make(config, "squad")
    assert task.model_fields == {}
    split = task.splits["valid"]
    assert len(split.features) > len(split.examples)
    starts, ends = np.zeros((2, len(split.features), 64), np.float32)
    for number, row in enumerate(split.features.rows):
        starts[number, row["start_positions"]] = ends[number, row["end_positions"]] = 5
    outputs = {"start_logits": starts, "end_logits": ends}
    metrics = task.metrics("valid", outputs)
    assert (metrics["f1"], metrics["exact_match"]) == (1, 1)
    assert ("no_answer_f1" in metrics) == null_answers
    files = task.write_predictions("valid", outputs, tmp_path)
    assert [file.name for file in files] == [
        "valid.json",
        "valid_n_best.json",
        *(["valid_null_scores.json"] if null_answers else []),
    ]
    answers, n_best = (json.loads(file.read_text()) for file in files[:2])
    expected = {"d1": "Ostelle", "d3": "", "d4": ""} if null_answers else {"d1": "Ostelle"}
    assert answers.items() >= expected.items()
    assert n_best["d1"][0]["text"] == "Ostelle"
    assert sum(entry["probability"] for entry in n_best["d1"]) == pytest.approx(1)
    if null_answers:
        assert {k: v > 0 for k, v in json.loads(files[2].read_text()).items()} == {
            "d1": False,
            "d3": True,
            "d4": True,
        }


def test_choices(make: Any, tmp_path: Path) -> None:
    config = ChoicesConfig("train.jsonl", "valid.jsonl")
    task = make(config, "choices")
    assert task.metrics("valid", {"logits": logits_for([1, 1], 3)}) == {"accuracy": 0.5}
    task = make(ChoicesConfig("train.jsonl", "valid.jsonl", "test.jsonl", id="id"), "choices")
    assert not task.splits["test"].has_labels
    (file,) = task.write_predictions("test", {"logits": logits_for([2, 0], 3)}, tmp_path)
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(entry["id"], entry["prediction"]) for entry in entries] == [("q7", 2), ("q5", 0)]
    assert sum(entries[0]["probabilities"]) == pytest.approx(1)
