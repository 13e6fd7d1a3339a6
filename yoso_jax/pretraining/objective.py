"""What a trainer asks of pretraining: a model, batches, a loss, an evaluation, and an end."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from yoso_jax.data.mlm import eval_batches, train_batches
from yoso_jax.data.mlm_examples import ExampleMaker
from yoso_jax.data.packing import Blocks
from yoso_jax.data.pipeline import Batch as HostBatch
from yoso_jax.finetuning.finish import METRICS_FILE, MODEL_FOLDER
from yoso_jax.finetuning.save import save_model
from yoso_jax.metrics import write_atomically
from yoso_jax.modeling.layers import Policy
from yoso_jax.modeling.pretraining import PretrainingModel
from yoso_jax.pretraining.config import PretrainConfig
from yoso_jax.pretraining.losses import pretraining_loss, pretraining_metrics, pretraining_sums
from yoso_jax.pretraining.prepare import Prepared
from yoso_jax.training import Batch


class PretrainObjective:
    """One pretraining run, but for its loop.

    Args:
        config: the run.
        prepared: see `prepare`.
    """

    def __init__(self, config: PretrainConfig, prepared: Prepared) -> None:
        self.config, self.data = config, prepared.data
        self.notes = prepared.notes
        """What the user should know before it starts, a line each."""
        self._start = prepared.start
        self._dtype = jnp.dtype(config.dtype)

    def make_model(self, key: Key[Array, ""]) -> PretrainingModel:
        """The model to start from, its parameters float32; `key` draws those it lacks."""
        return self._with_order(lambda rngs: self._start.build(self._dtype, rngs), nnx.Rngs(key))

    def make_graphdef(self) -> nnx.GraphDef:
        """The structure of the model, to `nnx.merge` with parameters; reads and allocates nothing.

        It is that of a model that was loaded, too.
        """
        start, dtype = self._start, self._dtype

        def build() -> PretrainingModel:
            return self._with_order(
                lambda rngs: start.model_class(start.config, dtype=dtype, rngs=rngs), nnx.Rngs(0)
            )

        return nnx.graphdef(nnx.eval_shape(build))

    def make_iterator(self) -> grain.DatasetIterator[HostBatch]:
        """A resumable iterator of training batches, without end."""
        maker = self._make_maker(self.config.seed)
        if self.config.data.masking == "dynamic":
            epoch_length = len(Blocks(self.data.train, maker.block_length))
            maker = dataclasses.replace(maker, epoch_length=epoch_length)
        return train_batches(self.data.train, maker, batch_size=self.config.batch_size)

    def loss(self, model: PretrainingModel, batch: Batch, rngs: nnx.Rngs) -> Float[Array, ""]:
        """Loss of a batch, with dropout; `rngs` has the streams `dropout` and `hash`."""
        return pretraining_loss(_sums(model, batch, deterministic=False, rngs=rngs))

    def make_evaluation(self, key: Key[Array, ""]) -> Callable[[PyTree, str], dict[str, float]]:
        """A function from parameters and the name of a split to its `pretraining_metrics`.

        The metric after the loss is the one that chooses the best checkpoint; more is better. The
        masks depend on `config.data.seed` alone, so runs of other seeds are compared on the same.
        """
        graphdef = self.make_graphdef()

        @jax.jit
        def step(params: PyTree, batch: Batch, key: Key[Array, ""]) -> Mapping[str, Array]:
            model = nnx.merge(graphdef, params)
            return _sums(model, batch, deterministic=True, rngs=nnx.Rngs(hash=key))

        def evaluation(params: PyTree, split: str) -> dict[str, float]:
            batches = eval_batches(
                getattr(self.data, split),
                self._make_maker(self.config.data.seed),
                batch_size=self.config.eval_batch_size,
            )
            sums = [
                step(params, batch, jax.random.fold_in(key, number))
                for number, batch in enumerate(batches)
            ]
            return pretraining_metrics(
                {
                    name: float(np.sum([each[name] for each in sums], dtype=np.float64))
                    for name in sums[0]
                }
            )

        return evaluation

    def finish(self, params: PyTree, key: Key[Array, ""]) -> tuple[dict[str, Any], list[Path]]:
        """Writes metrics and the masked language model with its tokenizer to `run_dir`.

        Returns:
            The metrics by split, and no files of predictions.
        """
        run_dir = Path(self.config.run_dir)
        model = nnx.merge(self.make_graphdef(), jax.device_get(params))
        save_model(model.masked_lm, self.data.tokenizer, run_dir / MODEL_FOLDER)
        evaluation = self.make_evaluation(key)
        metrics = {split: evaluation(params, split) for split in ("valid", "test")}
        text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
        write_atomically(run_dir / METRICS_FILE, text)
        return metrics, []

    def _with_order(
        self, make_masked_lm: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs
    ) -> PretrainingModel:
        policy = Policy(self._dtype, jnp.float32)
        with_order = self.config.data.sentence_order
        return PretrainingModel(make_masked_lm(rngs), policy, with_order=with_order, rngs=rngs)

    def _make_maker(self, seed: int) -> ExampleMaker:
        text = self.config.data
        return ExampleMaker(
            self.data.vocabulary,
            text.masks,
            self.config.sequence_length,
            seed,
            with_order=text.sentence_order,
        )


def _sums(
    model: PretrainingModel, batch: Batch, *, deterministic: bool, rngs: nnx.Rngs
) -> dict[str, Float[Array, ""]]:
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}
    # A model with one token type tells segments apart by what separates them.
    has_types = model.masked_lm.config.type_vocab_size > 1
    logits, order_logits = model(
        arrays["input_ids"],
        arrays["attention_mask"],
        arrays["positions"],
        arrays.get("token_type_ids") if has_types else None,
        deterministic=deterministic,
        rngs=rngs,
    )
    return pretraining_sums(logits, order_logits, arrays)
