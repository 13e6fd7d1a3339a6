"""What the trainer asks of a kind of run: a model, batches, a loss, an evaluation, and an end."""

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from yoso_jax.run_config import RunConfig

HostBatch = Mapping[str, np.ndarray]
"""A batch as an iterator yields it."""

Batch = Mapping[str, Array | np.ndarray]
"""A batch as the compiled functions take it."""

Put = Callable[[HostBatch], Batch]
"""Brings a batch to the devices."""

Evaluation = Callable[[PyTree, str], dict[str, float]]
"""From parameters and the name of a split to its loss and metrics, in this order.

The metric after the loss ranks checkpoints; more is better."""


class Objective[Config: RunConfig](abc.ABC):
    """One training run, but for its loop."""

    config: Config
    notes: Sequence[str] = ()
    """What the user should know before it starts, a line each."""
    valid_splits: Sequence[str] = ("valid",)
    """Splits to validate on; the first ranks checkpoints."""
    labelled_splits: Sequence[str] = ("valid", "test")
    """Splits that can be evaluated."""
    train_metrics: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics that `loss` gives besides it."""
    reads_parameters: bool = False
    """Whether `make_model` reads files, so that it cannot be compiled."""

    @classmethod
    @abc.abstractmethod
    def create(cls, config: Any) -> "Objective":
        """See `yoso_jax.kinds.make_objective`."""

    @abc.abstractmethod
    def make_model(self, key: Key[Array, ""]) -> Any:
        """The model to start from, its parameters float32; `key` draws those it lacks."""

    @abc.abstractmethod
    def make_abstract_model(self) -> Any:
        """The same model with shapes for arrays; reads and allocates nothing."""

    def make_graphdef(self) -> nnx.GraphDef:
        """The structure of the model, to `nnx.merge` with parameters."""
        return nnx.graphdef(self.make_abstract_model())

    def init_params(self, key: Key[Array, ""]) -> PyTree:
        """The parameters to start from."""

        def init(key: Key[Array, ""]) -> PyTree:
            return nnx.state(self.make_model(key), nnx.Param)

        return init(key) if self.reads_parameters else jax.jit(init)(key)

    @abc.abstractmethod
    def make_iterator(self, start: int = 0) -> Iterator[HostBatch]:
        """Training batches from number `start` (the steps made before) on, without end."""

    @abc.abstractmethod
    def loss(
        self, model: Any, batch: Batch, rngs: nnx.Rngs
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Mean loss of a batch, with dropout, and `train_metrics`.

        `rngs` has the streams `dropout` and `hash`.
        """

    @abc.abstractmethod
    def make_evaluation(self, key: Key[Array, ""], put: Put = dict) -> Evaluation:
        """Compiles an evaluation; the same `key`, the root of its hashes, gives the same result."""

    @abc.abstractmethod
    def finish(self, params: PyTree, evaluation: Any, say: Callable[[str], None]) -> dict[str, Any]:
        """Tests the parameters and writes to the run's folder what is to be kept of them.

        Args:
            params: of the model.
            evaluation: what `make_evaluation` made.
            say: shows the user a line.

        Returns:
            What results.json is to hold besides the step.
        """

    def describe(self, split: str, metrics: Mapping[str, float]) -> str:
        """The result of an evaluation for the user, e.g. `loss 0.123, f1 0.912`."""
        return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def sum_up(parts: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Adds what steps of an evaluation gave, by name, in float64."""
    found = list(parts)  # so that the steps are under way before the first is waited for
    return {
        name: float(np.sum([each[name] for each in found], dtype=np.float64)) for name in found[0]
    }
