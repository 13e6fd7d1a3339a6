"""Extractive question answering."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, override

import jax.numpy as jnp

from yoso_jax.finetuning.answers import (
    Prediction,
    answer_metrics,
    choose_answers,
    n_best_entries,
)
from yoso_jax.finetuning.encoding import TextEncoder
from yoso_jax.finetuning.examples import Examples
from yoso_jax.finetuning.features import question_features
from yoso_jax.finetuning.squad import read_squad
from yoso_jax.finetuning.task import Outputs, Split, Task, dump, write_lines
from yoso_jax.losses import question_answering_loss
from yoso_jax.modeling import YosoForQuestionAnswering


class QuestionsTask(Task):
    """Extractive question answering."""

    model_class = YosoForQuestionAnswering

    def _read(self, file: Path, split: str) -> Examples:
        return read_squad(self.config, file, split)

    def _prepare(self, examples: Examples, encoder: TextEncoder) -> Split:
        features, windows = question_features(examples, encoder, self.config.doc_stride)
        has_labels = all(x.answers is not None for x in examples.items)
        return Split(examples, features, has_labels, windows)

    @override
    def loss(self, split: str, outputs: Outputs) -> float:
        features = self.splits[split].features
        logits = (jnp.asarray(outputs[f"{end}_logits"]) for end in ("start", "end"))
        positions = (jnp.asarray(features.column(f"{end}_positions")) for end in ("start", "end"))
        return float(question_answering_loss(*logits, *positions))

    @override
    def metrics(self, split: str, outputs: Outputs) -> dict[str, float]:
        predicted = [each.text for each in self._predict(split, outputs)]
        questions = self.splits[split].examples.items
        return answer_metrics(predicted, questions, null_answers=self.config.null_answers)

    def write_predictions(self, split: str, outputs: Outputs, folder: Path) -> list[Path]:
        """Writes objects by question: the answer, as SQuAD's scripts read it, and the best few.

        With `null_answers` also a third: by how much no answer is better than the best one.
        """
        ids = [example.id for example in self.splits[split].examples.items]
        found = dict(zip(ids, self._predict(split, outputs), strict=True))
        files: dict[str, Callable[[Prediction], Any]] = {
            f"{split}.json": lambda each: each.text,
            f"{split}_n_best.json": n_best_entries,
        }
        if self.config.null_answers:
            files[f"{split}_null_scores.json"] = lambda each: each.null_score
        written = []
        for name, select in files.items():
            entries = {identity: select(each) for identity, each in found.items()}
            written.append(write_lines(folder / name, [dump(entries, indent=2)]))
        return written

    def _predict(self, split: str, outputs: Outputs) -> list[Prediction]:
        prepared = self.splits[split]
        return choose_answers(
            prepared.examples.items,
            prepared.places,
            list(outputs["start_logits"]),
            list(outputs["end_logits"]),
            self.config,
        )
