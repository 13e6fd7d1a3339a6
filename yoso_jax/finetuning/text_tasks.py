"""Sequence classification and regression, of GLUE and of the user's own texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, override

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from yoso_jax.errors import ConfigError
from yoso_jax.finetuning.encoding import TextEncoder
from yoso_jax.finetuning.examples import Examples
from yoso_jax.finetuning.features import text_features
from yoso_jax.finetuning.glue import GLUE, read_glue
from yoso_jax.finetuning.metrics import class_metrics, score_metrics
from yoso_jax.finetuning.task import Outputs, Split, Task, dump, softmax, write_lines
from yoso_jax.finetuning.texts import collect_labels, read_texts
from yoso_jax.losses import sequence_classification_loss
from yoso_jax.modeling import YosoForSequenceClassification


class _TextTask(Task):
    """Sequence classification and regression."""

    model_class = YosoForSequenceClassification

    @property
    def model_fields(self) -> dict[str, Any]:
        if self.labels is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {**super().model_fields, "problem_type": "single_label_classification"}

    @override
    def loss(self, split: str, outputs: Outputs) -> float:
        labels = self.splits[split].features.column("labels")
        kind = self.model_fields["problem_type"]
        return float(
            sequence_classification_loss(jnp.asarray(outputs["logits"]), jnp.asarray(labels), kind)
        )

    @override
    def metrics(self, split: str, outputs: Outputs) -> dict[str, float]:
        labels = self.splits[split].features.column("labels")
        if self.labels is None:
            return score_metrics(self._metric_names(), outputs["logits"][:, 0], labels)
        return class_metrics(self._metric_names(), outputs["logits"].argmax(-1), labels)

    def _metric_names(self) -> Sequence[Any]:
        raise NotImplementedError

    def _prepare(self, examples: Examples, encoder: TextEncoder) -> Split:
        features = text_features(examples, self.labels, encoder)
        return Split(examples, features, all(x.label is not None for x in examples.items))

    def _predict(self, logits: Float[np.ndarray, " classes"]) -> str | float:
        if self.labels is None:
            return float(logits[0])
        return self.labels[int(logits.argmax())]


class GlueTask(_TextTask):
    """A task of GLUE; predictions are as its server takes them."""

    def _metric_names(self) -> Sequence[Any]:
        return GLUE[self.config.name].metrics

    def _read(self, file: Path, split: str) -> Examples:
        return read_glue(self.config.name, file, split, self.config.bad_rows)

    def _collect_labels(self, train: Examples) -> tuple[str, ...] | None:
        return GLUE[self.config.name].labels

    def write_predictions(self, split: str, outputs: Outputs, folder: Path) -> list[Path]:
        """Writes the two columns index and prediction, to a file named as in a submission."""
        name = GLUE[self.config.name].archive
        if self.config.name == "mnli":
            name += "-mm" if split.endswith("_mismatched") else "-m"
        lines = ["index\tprediction"]
        for example, logits in zip(
            self.splits[split].examples.items, outputs["logits"], strict=True
        ):
            lines.append(f"{example.id}\t{self._predict(logits)}")
        return [write_lines(folder / f"{name}.tsv", lines)]


class TextsTask(_TextTask):
    """Texts of the user's own."""

    def _metric_names(self) -> Sequence[Any]:
        default = ("pearson", "spearman") if self.config.regression else ("accuracy",)
        return self.config.metrics or default

    def _read(self, file: Path, split: str) -> Examples:
        return read_texts(self.config, file, split)

    def _collect_labels(self, train: Examples) -> tuple[str, ...] | None:
        if self.config.regression:
            return None
        labels = self.config.labels or collect_labels(train)
        if "f1" in self._metric_names() and len(labels) != 2:
            raise ConfigError(
                f"data.metrics: f1 is that of two classes, there are {', '.join(labels)}; "
                "macro_f1 is that of any number"
            )
        return labels

    def write_predictions(self, split: str, outputs: Outputs, folder: Path) -> list[Path]:
        """Writes an object a line: id, prediction, and for classes the probability of each."""
        lines = []
        for example, logits in zip(
            self.splits[split].examples.items, outputs["logits"], strict=True
        ):
            entry: dict[str, Any] = {"id": example.id, "prediction": self._predict(logits)}
            if self.labels is not None:
                entry["probabilities"] = dict(zip(self.labels, softmax(logits), strict=True))
            lines.append(dump(entry))
        return [write_lines(folder / f"{split}.jsonl", lines)]
