"""Token classification."""

from pathlib import Path
from typing import override

import jax.numpy as jnp
import numpy as np

from yoso_jax.finetuning.conll import collect_tags, read_conll
from yoso_jax.finetuning.encoding import TextEncoder
from yoso_jax.finetuning.examples import Examples
from yoso_jax.finetuning.features import words_features
from yoso_jax.finetuning.metrics import are_entities, tag_metrics
from yoso_jax.finetuning.task import Outputs, Split, Task, write_lines
from yoso_jax.losses import cross_entropy
from yoso_jax.modeling import YosoForTokenClassification


class WordsTask(Task):
    """Token classification."""

    model_class = YosoForTokenClassification

    def _read(self, file: Path, split: str) -> Examples:
        return read_conll(self.config, file, split)

    def _collect_labels(self, train: Examples) -> tuple[str, ...]:
        return collect_tags(train)

    def _prepare(self, examples: Examples, encoder: TextEncoder) -> Split:
        features, first = words_features(examples, self.labels or (), encoder)
        return Split(examples, features, all(x.tags for x in examples.items), first)

    @override
    def loss(self, split: str, outputs: Outputs) -> float:
        rows = self.splits[split].features.rows
        logits = [
            logits[: row["labels"].size]
            for row, logits in zip(rows, outputs["logits"], strict=True)
        ]
        labels = np.concatenate([row["labels"] for row in rows])
        return float(cross_entropy(jnp.concatenate(logits), jnp.asarray(labels)))

    @override
    def metrics(self, split: str, outputs: Outputs) -> dict[str, float]:
        tags = [example.tags for example in self.splits[split].examples.items]
        predicted = self._predict(split, outputs)
        return tag_metrics(predicted, tags, entities=are_entities(self.labels or ()))

    def write_predictions(self, split: str, outputs: Outputs, folder: Path) -> list[Path]:
        """Writes the two columns word and tag, and a blank line after each sentence."""
        lines = []
        for example, tags in zip(
            self.splits[split].examples.items, self._predict(split, outputs), strict=True
        ):
            lines += [f"{word}\t{tag}" for word, tag in zip(example.words, tags, strict=True)]
            lines.append("")
        return [write_lines(folder / f"{split}.tsv", lines)]

    def _predict(self, split: str, outputs: Outputs) -> list[list[str]]:
        """Tags of all words; those without a token get the first, `O` if it is a tag."""
        assert self.labels is not None
        found = []
        for first, logits in zip(self.splits[split].places, outputs["logits"], strict=True):
            numbers = np.where(first < 0, 0, logits[first].argmax(-1))
            found.append([self.labels[number] for number in numbers])
        return found
