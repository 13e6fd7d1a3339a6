"""What the trainer asks of fine-tuning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from yoso_jax.finetuning.batches import train_batches
from yoso_jax.finetuning.config import FinetuneConfig
from yoso_jax.finetuning.finish import evaluate, write_results
from yoso_jax.finetuning.predict import make_predict_step, predict
from yoso_jax.finetuning.prepare import Prepared, find_tokenizer, prepare
from yoso_jax.finetuning.task import Outputs, Task
from yoso_jax.objective import Batch, Objective, Put
from yoso_jax.saving import MODEL_FOLDER, save_model
from yoso_jax.sharding import fetch


class FinetuneEvaluation:
    """From parameters and the name of a labelled split to its loss and metrics.

    Args:
        task: what is evaluated.
        outputs: from parameters and the name of any split to logits.
    """

    def __init__(self, task: Task, outputs: Callable[[PyTree, str], Outputs]) -> None:
        self._task, self.outputs = task, outputs

    def __call__(self, params: PyTree, split: str) -> dict[str, float]:
        """See `evaluate`."""
        return evaluate(self._task, split, self.outputs(params, split))


class FinetuneObjective(Objective[FinetuneConfig]):
    """Trains a head and its encoder on a task.

    Args:
        config: the run.
        prepared: see `prepare`.
    """

    def __init__(self, config: FinetuneConfig, prepared: Prepared) -> None:
        self.config, self.task, self.notes = config, prepared.task, prepared.notes
        self._start, self._pad_id = prepared.start, prepared.pad_id
        self.reads_parameters = prepared.start.reads_parameters
        self.labelled_splits = [
            name for name, split in self.task.splits.items() if split.has_labels and name != "train"
        ]
        self.valid_splits = [name for name in self.labelled_splits if name.startswith("valid")]

    @classmethod
    def create(cls, config: FinetuneConfig) -> "FinetuneObjective":
        """See `prepare`."""
        return cls(config, prepare(config))

    def make_model(self, key: Key[Array, ""]) -> Any:
        """The model to start from, its parameters float32; `key` draws those it lacks."""
        return self._start.build(jnp.dtype(self.config.dtype), nnx.Rngs(key))

    def make_abstract_model(self) -> Any:
        """The same with shapes for arrays, also of a model that is loaded."""
        start, dtype = self._start, jnp.dtype(self.config.dtype)
        return nnx.eval_shape(
            lambda: start.model_class(start.config, dtype=dtype, rngs=nnx.Rngs(0))
        )

    def make_iterator(self, start: int = 0) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Batches of what the model is called with, see `train_batches`."""
        return train_batches(
            self.task.splits["train"].features,
            batch_size=self.config.batch_size,
            max_length=self.config.sequence_length,
            pad_id=self._pad_id,
            seed=self.config.seed,
            num_workers=self.config.num_workers,
            start=start,
            length_buckets=self.config.length_buckets,
        )

    def loss(
        self, model: Any, batch: Batch, rngs: nnx.Rngs
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The head's loss; metrics are of whole splits, so of a batch there are none."""
        return model(**batch, deterministic=False, rngs=rngs).loss, {}

    def make_evaluation(self, key: Key[Array, ""], put: Put = dict) -> FinetuneEvaluation:
        """Loss, then the metrics of the task."""
        step = make_predict_step(self.make_graphdef())

        def outputs(params: PyTree, split: str) -> Outputs:
            return predict(
                step,
                params,
                self.task.splits[split].features,
                key,
                put,
                batch_size=self.config.eval_batch_size,
                max_length=self.config.sequence_length,
                pad_id=self._pad_id,
            )

        return FinetuneEvaluation(self.task, outputs)

    def finish(
        self, params: PyTree, evaluation: FinetuneEvaluation, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Evaluates; predictions go to predictions/, the model and its tokenizer to model/."""
        run_dir, writes = Path(self.config.run_dir), jax.process_index() == 0
        values = fetch(params)
        if writes:
            model = nnx.merge(self.make_graphdef(), values)
            save_model(model, find_tokenizer(self.config), run_dir / MODEL_FOLDER)
        metrics, files = write_results(
            self.task, lambda split: evaluation.outputs(params, split), run_dir if writes else None
        )
        for split, found in metrics.items():
            say(f"{split} {self.describe(split, found)}")
        for file in files:
            say(f"predictions: {file}")
        return {
            f"{split}_{name}": value
            for split, found in metrics.items()
            for name, value in found.items()
        }
