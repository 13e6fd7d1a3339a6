"""What a trainer asks of fine-tuning: a model, batches, a loss, an evaluation, and an end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from yoso_jax.data.pipeline import Batch as HostBatch
from yoso_jax.finetuning.batches import train_batches
from yoso_jax.finetuning.config import FinetuneConfig
from yoso_jax.finetuning.finish import MODEL_FOLDER, evaluate, write_results
from yoso_jax.finetuning.predict import make_predict_step, predict
from yoso_jax.finetuning.prepare import Prepared, find_tokenizer
from yoso_jax.finetuning.save import save_model
from yoso_jax.finetuning.task import Outputs
from yoso_jax.training import Batch


class FinetuneObjective:
    """One fine-tuning run, but for its loop.

    Args:
        config: the run.
        prepared: see `prepare`.
    """

    def __init__(self, config: FinetuneConfig, prepared: Prepared) -> None:
        self.config, self.task = config, prepared.task
        self.notes = prepared.notes
        """What the user should know before it starts, a line each."""
        self._start, self._pad_id = prepared.start, prepared.pad_id

    def make_model(self, key: Key[Array, ""]) -> Any:
        """The model to start from, its parameters float32; `key` draws those it lacks."""
        return self._start.build(jnp.dtype(self.config.dtype), nnx.Rngs(key))

    def make_graphdef(self) -> nnx.GraphDef:
        """The structure of the model, to `nnx.merge` with parameters; reads and allocates nothing.

        It is that of a model that was loaded, too.
        """
        start, dtype = self._start, jnp.dtype(self.config.dtype)

        def build() -> Any:
            return start.model_class(start.config, dtype=dtype, rngs=nnx.Rngs(0))

        return nnx.graphdef(nnx.eval_shape(build))

    def make_iterator(self) -> grain.DatasetIterator[HostBatch]:
        """A resumable iterator of training batches: what the model is called with."""
        return train_batches(
            self.task.splits["train"].features,
            batch_size=self.config.batch_size,
            max_length=self.config.sequence_length,
            pad_id=self._pad_id,
            seed=self.config.seed,
        )

    def loss(self, model: Any, batch: Batch, rngs: nnx.Rngs) -> Float[Array, ""]:
        """Mean loss of a batch, with dropout; `rngs` has the streams `dropout` and `hash`."""
        return model(**batch, deterministic=False, rngs=rngs).loss

    def make_predictor(self, key: Key[Array, ""]) -> Callable[[PyTree, str], Outputs]:
        """A function from parameters and the name of a split to logits, hashed by `key`."""
        step = make_predict_step(self.make_graphdef())

        def outputs(params: PyTree, split: str) -> Outputs:
            return predict(
                step,
                params,
                self.task.splits[split].features,
                key,
                batch_size=self.config.eval_batch_size,
                max_length=self.config.sequence_length,
                pad_id=self._pad_id,
            )

        return outputs

    def make_evaluation(self, key: Key[Array, ""]) -> Callable[[PyTree, str], dict[str, float]]:
        """A function from parameters and the name of a labelled split to its loss and metrics.

        The metric after the loss is the one that chooses the best checkpoint; more is better.
        """
        outputs = self.make_predictor(key)
        return lambda params, split: evaluate(self.task, split, outputs(params, split))

    def finish(self, params: PyTree, key: Key[Array, ""]) -> tuple[dict[str, Any], list[Path]]:
        """Writes metrics, predictions and the model with its tokenizer to `run_dir`.

        Returns:
            The metrics by split, and the files of predictions.
        """
        outputs = self.make_predictor(key)
        run_dir = Path(self.config.run_dir)
        model = nnx.merge(self.make_graphdef(), jax.device_get(params))
        save_model(model, find_tokenizer(self.config), run_dir / MODEL_FOLDER)
        return write_results(self.task, lambda split: outputs(params, split), run_dir)
