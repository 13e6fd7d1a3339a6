"""What the trainer asks of a task of Long Range Arena."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from yoso_jax.conversion.load import make_plan
from yoso_jax.data.listops import read_published
from yoso_jax.data.pipeline import eval_batches, make_iterator
from yoso_jax.data.splits import Split, TaskData
from yoso_jax.data.tasks import load_task
from yoso_jax.errors import CheckpointError, ConfigError, DataError, is_disk_full
from yoso_jax.lra import LRAClassifier
from yoso_jax.objective import Batch, Evaluation, Objective, Put, sum_up
from yoso_jax.saving import MODEL_FOLDER
from yoso_jax.sharding import fetch, with_ambient_mesh
from yoso_jax.train_config import TrainConfig


class LRAObjective(Objective[TrainConfig]):
    """Trains a classifier.

    Args:
        config: the run.
        data: its examples; None where only the model is needed.
    """

    train_metrics = ("accuracy",)

    def __init__(self, config: TrainConfig, data: TaskData | None = None) -> None:
        self.config, self._data = config, data
        self.reads_parameters = config.init_from is not None

    @classmethod
    def create(cls, config: TrainConfig) -> "LRAObjective":
        """Reads the data, see `load_data`."""
        return cls(config, load_data(config))

    @property
    def data(self) -> TaskData:
        """The examples."""
        if self._data is None:
            raise ValueError("data must be given to LRAObjective for this")
        return self._data

    def make_model(self, key: Key[Array, ""]) -> LRAClassifier:
        """The classifier, its float32 parameters drawn from `key`, or those of `init_from`.

        Raises:
            CheckpointError: that cannot be read, or is of another model.
        """
        path = self.config.init_from
        if path is None:
            return self._draw_model(key)
        dtype, fields = jnp.dtype(self.config.dtype), dataclasses.asdict(self.config.model)
        how = self.config.position_extension
        try:
            plan = make_plan([LRAClassifier], path, position_extension=how, **fields)
            return plan.load(dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(key))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot start from {path}: {error}") from error

    def _draw_model(self, key: Key[Array, ""]) -> LRAClassifier:
        return LRAClassifier(
            self.config.model,
            dtype=jnp.dtype(self.config.dtype),
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(key),
        )

    def make_abstract_model(self) -> LRAClassifier:
        """The same with shapes for arrays."""
        return nnx.eval_shape(lambda: self._draw_model(jax.random.key(0)))

    def make_iterator(self, start: int = 0) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Batches of the training split, see `yoso_jax.data.pipeline.make_iterator`."""
        return make_iterator(
            self.data.train,
            batch_size=self.config.batch_size,
            max_length=self.config.sequence_length,
            seed=self.config.seed,
            shuffle=True,
            num_workers=self.config.num_workers,
            start=start,
            length_buckets=self.config.length_buckets,
        )

    def loss(
        self, model: LRAClassifier, batch: Batch, rngs: nnx.Rngs
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Mean cross entropy, and accuracy."""
        output = model(
            batch["input_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            deterministic=False,
            rngs=rngs,
        )
        assert output.loss is not None  # labels were given
        return output.loss, {"accuracy": (output.logits.argmax(-1) == batch["labels"]).mean()}

    def make_evaluation(self, key: Key[Array, ""], put: Put = dict) -> Evaluation:
        """Loss and accuracy."""
        graphdef, config = self.make_graphdef(), self.config

        @jax.jit
        @with_ambient_mesh
        def step(params: PyTree, batch: Batch, key: Key[Array, ""]) -> dict[str, Array]:
            model = nnx.merge(graphdef, params)
            output = model(batch["input_ids"], batch["attention_mask"], rngs=nnx.Rngs(hash=key))
            logits, labels, weight = output.logits, batch["labels"], batch["weight"]
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), labels
            )
            return {
                "loss": (losses * weight).sum(),
                "accuracy": ((logits.argmax(-1) == labels) * weight).sum(),
                "weight": weight.sum(),
            }

        def evaluation(params: PyTree, split: str) -> dict[str, float]:
            batches = eval_batches(
                getattr(self.data, split),
                batch_size=config.eval_batch_size,
                max_length=config.sequence_length,
            )
            sums = sum_up(
                step(params, put(batch), jax.random.fold_in(key, number))
                for number, batch in enumerate(batches)
            )
            return {name: sums[name] / sums["weight"] for name in ("loss", "accuracy")}

        return evaluation

    def finish(
        self, params: PyTree, evaluation: Evaluation, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Tests, and compares with always answering the most frequent label.

        The classifier goes to model/.
        """
        test = evaluation(params, "test")
        say(f"test {self.describe('test', test)}")
        params = fetch(params)
        if jax.process_index() == 0:
            model = nnx.merge(self.make_graphdef(), params)
            model.save_pretrained(Path(self.config.run_dir) / MODEL_FOLDER)
        return {
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
            "majority_baseline": majority_baseline(self.data.train, self.data.test),
            "use_expectation": self.config.model.use_expectation,
        }

    def describe(self, split: str, metrics: Mapping[str, float]) -> str:
        """E.g. `loss 1.2, accuracy 60% (sampled attention), majority baseline 20%, +40 points`."""
        model, accuracy = self.config.model, metrics["accuracy"]
        mode = "sampled" if model.is_sampled else "expectation"
        if model.attention == "softmax":
            mode = "softmax"
        baseline = majority_baseline(self.data.train, getattr(self.data, split))
        return (
            f"loss {metrics['loss']:.3f}, accuracy {accuracy:.1%} ({mode} attention), "
            f"majority baseline {baseline:.1%}, {100 * (accuracy - baseline):+.1f} points"
        )


def load_data(config: TrainConfig) -> TaskData:
    """The three splits, read from `tsv_dir` or `data_dir`, or generated (and kept) in `data_dir`.

    Raises:
        DataError: the files are missing or damaged, or cannot be made.
        ConfigError: an example is longer than `sequence_length`.
    """
    try:
        if config.tsv_dir is None:
            data = load_task(config.data, config.data_dir, config.sequence_length)
        else:
            data = read_published(config.tsv_dir)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise DataError(f"cannot read or prepare the data: {error}") from error
    longest = max(int(split.lengths.max()) for split in (data.train, data.valid, data.test))
    if longest > config.sequence_length:
        raise ConfigError(
            f"sequence_length must be at least {longest}, the longest example in {data.folder}, "
            f"got {config.sequence_length}"
        )
    return data


def majority_baseline(train: Split, split: Split) -> float:
    """Accuracy on `split` of always answering the most frequent label of `train`."""
    return float((split.labels == np.bincount(train.labels).argmax()).mean())
