"""Multiple choice."""

from pathlib import Path
from typing import override

import jax.numpy as jnp

from yoso_jax.finetuning.choices import read_choices
from yoso_jax.finetuning.encoding import TextEncoder
from yoso_jax.finetuning.examples import Examples
from yoso_jax.finetuning.features import choice_features
from yoso_jax.finetuning.metrics import class_metrics
from yoso_jax.finetuning.task import Outputs, Split, Task, dump, softmax, write_lines
from yoso_jax.losses import cross_entropy
from yoso_jax.modeling import YosoForMultipleChoice


class ChoicesTask(Task):
    """Multiple choice."""

    model_class = YosoForMultipleChoice

    def _read(self, file: Path, split: str) -> Examples:
        return read_choices(self.config, file, split)

    def _prepare(self, examples: Examples, encoder: TextEncoder) -> Split:
        features = choice_features(examples, encoder)
        return Split(examples, features, all(x.label is not None for x in examples.items))

    @override
    def loss(self, split: str, outputs: Outputs) -> float:
        labels = self.splits[split].features.column("labels")
        return float(cross_entropy(jnp.asarray(outputs["logits"]), jnp.asarray(labels)))

    @override
    def metrics(self, split: str, outputs: Outputs) -> dict[str, float]:
        labels = self.splits[split].features.column("labels")
        return class_metrics(["accuracy"], outputs["logits"].argmax(-1), labels)

    def write_predictions(self, split: str, outputs: Outputs, folder: Path) -> list[Path]:
        """Writes an object a line: id, prediction (from 0), and the probability of each choice."""
        lines = []
        for example, logits in zip(
            self.splits[split].examples.items, outputs["logits"], strict=True
        ):
            entry = {
                "id": example.id,
                "prediction": int(logits.argmax()),
                "probabilities": softmax(logits),
            }
            lines.append(dump(entry))
        return [write_lines(folder / f"{split}.jsonl", lines)]
