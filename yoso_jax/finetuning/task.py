"""What a head is fine-tuned on: splits, the metrics of the model's outputs, and predictions."""

import abc
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from yoso_jax.finetuning.encoding import TextEncoder
from yoso_jax.finetuning.examples import Examples
from yoso_jax.finetuning.features import Features
from yoso_jax.metrics import write_atomically

Outputs = Mapping[str, Float[np.ndarray, "rows *axes"]]
"""Logits of all rows of a split by the name of the model's output."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one file, ready for the model."""

    examples: Examples
    features: Features
    has_labels: bool
    """Whether all examples are labelled, so that metrics can be computed."""
    places: Sequence[Any] = ()
    """Where in the rows the outputs that matter are: see `words_features`, `question_features`."""


class Task(abc.ABC):
    """Examples for one head.

    Args:
        config: what to read.
        files: for each split its file; `train` and `valid` are among them.
        encoder: makes the model's inputs.
        known_labels: labels of the checkpoint the model starts from; their order is kept if the
            training examples have the same ones.

    Raises:
        DataError: a file is missing, or an example cannot be used.
        ConfigError: the examples do not suit the configuration.
    """

    model_class: ClassVar[type[Any]]

    def __init__(
        self,
        config: Any,
        files: Mapping[str, Path],
        encoder: TextEncoder,
        known_labels: Sequence[str] = (),
    ) -> None:
        self.config = config
        examples = {split: self._read(file, split) for split, file in files.items()}
        labels = self._collect_labels(examples["train"])
        if labels is not None and set(labels) == set(known_labels):
            labels = tuple(known_labels)
        self.labels = labels
        """Names of the classes in the order of their numbers; None where there are none."""
        self.splits = {split: self._prepare(items, encoder) for split, items in examples.items()}
        """The splits by name; those that begin with `valid` have labels."""

    @property
    def model_fields(self) -> dict[str, Any]:
        """Fields of the model's configuration that follow from the examples."""
        return {} if self.labels is None else {"id2label": dict(enumerate(self.labels))}

    @abc.abstractmethod
    def loss(self, split: str, outputs: Outputs) -> float:
        """Mean loss of a split with labels, as the model computes that of a batch."""

    @abc.abstractmethod
    def metrics(self, split: str, outputs: Outputs) -> dict[str, float]:
        """Metrics of a split with labels; the first is the one that chooses the best checkpoint."""

    @abc.abstractmethod
    def write_predictions(self, split: str, outputs: Outputs, folder: Path) -> list[Path]:
        """Writes what the model predicts, in the order of the split's file; returns the files."""

    @abc.abstractmethod
    def _read(self, file: Path, split: str) -> Examples: ...

    @abc.abstractmethod
    def _prepare(self, examples: Examples, encoder: TextEncoder) -> Split: ...

    def _collect_labels(self, train: Examples) -> tuple[str, ...] | None:
        return None


def softmax(logits: Float[np.ndarray, " classes"]) -> list[float]:
    """Probabilities of the classes."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return (weights / weights.sum()).tolist()


def dump(entry: Any, indent: int | None = None) -> str:
    """An entry as JSON, with letters of all languages as they are."""
    return json.dumps(entry, ensure_ascii=False, allow_nan=False, indent=indent)


def write_lines(file: Path, lines: Sequence[str]) -> Path:
    """Writes a file, whole or not at all, makes its folder, and returns it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(line + "\n" for line in lines))
    return file
