"""What the trainer asks of pretraining."""

import dataclasses
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
from yoso_jax.errors import DataError, is_disk_full
from yoso_jax.modeling.layers import Policy
from yoso_jax.modeling.pretraining import PretrainingModel
from yoso_jax.objective import Batch, Evaluation, Objective, Put, sum_up
from yoso_jax.pretraining.config import PretrainConfig
from yoso_jax.pretraining.losses import pretraining_loss, pretraining_metrics, pretraining_sums
from yoso_jax.pretraining.prepare import Prepared, prepare
from yoso_jax.saving import MODEL_FOLDER, save_model
from yoso_jax.sharding import fetch, with_ambient_mesh


class PretrainObjective(Objective[PretrainConfig]):
    """Trains a masked language model, perhaps with the order of segments.

    Args:
        config: the run.
        prepared: see `prepare`.
    """

    train_metrics = ("accuracy",)

    def __init__(self, config: PretrainConfig, prepared: Prepared) -> None:
        self.config, self.data, self.notes = config, prepared.data, prepared.notes
        self._start = prepared.start
        self.reads_parameters = prepared.start.reads_parameters
        self._dtype = jnp.dtype(config.dtype)

    @classmethod
    def create(cls, config: PretrainConfig) -> "PretrainObjective":
        """See `prepare`."""
        try:
            return cls(config, prepare(config))
        except OSError as error:
            if is_disk_full(error):
                raise
            raise DataError(f"cannot read or prepare the data: {error}") from error

    def make_model(self, key: Key[Array, ""]) -> PretrainingModel:
        """The model to start from, its parameters float32; `key` draws those it lacks."""
        return self._with_order(lambda rngs: self._start.build(self._dtype, rngs), nnx.Rngs(key))

    def make_abstract_model(self) -> PretrainingModel:
        """The same with shapes for arrays, also of a model that is loaded."""
        start, dtype = self._start, self._dtype

        def build() -> PretrainingModel:
            return self._with_order(
                lambda rngs: start.model_class(start.config, dtype=dtype, rngs=rngs), nnx.Rngs(0)
            )

        return nnx.eval_shape(build)

    def make_iterator(self, start: int = 0) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Batches of the training documents, see `yoso_jax.data.mlm.train_batches`."""
        maker = self._make_maker(self.config.seed)
        if self.config.data.masking == "dynamic":
            epoch_length = len(Blocks(self.data.train, maker.block_length))
            maker = dataclasses.replace(maker, epoch_length=epoch_length)
        return train_batches(
            self.data.train,
            maker,
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
            start=start,
        )

    def loss(
        self, model: PretrainingModel, batch: Batch, rngs: nnx.Rngs
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See `pretraining_loss`, and the accuracy of tokens."""
        sums = _sums(model, batch, deterministic=False, rngs=rngs)
        accuracy = sums["correct"] / jnp.maximum(sums["count"], 1)
        return pretraining_loss(sums), {"accuracy": accuracy}

    def make_evaluation(self, key: Key[Array, ""], put: Put = dict) -> Evaluation:
        """See `pretraining_metrics`.

        The masks depend on `config.data.seed` alone, so runs of other seeds are compared on the
        same.
        """
        graphdef = self.make_graphdef()

        @jax.jit
        @with_ambient_mesh
        def step(params: PyTree, batch: Batch, key: Key[Array, ""]) -> Mapping[str, Array]:
            model = nnx.merge(graphdef, params)
            return _sums(model, batch, deterministic=True, rngs=nnx.Rngs(hash=key))

        def evaluation(params: PyTree, split: str) -> dict[str, float]:
            batches = eval_batches(
                getattr(self.data, split),
                self._make_maker(self.config.data.seed),
                batch_size=self.config.eval_batch_size,
            )
            return pretraining_metrics(
                sum_up(
                    step(params, put(batch), jax.random.fold_in(key, number))
                    for number, batch in enumerate(batches)
                )
            )

        return evaluation

    def finish(
        self, params: PyTree, evaluation: Evaluation, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Evaluates both splits; the masked language model goes to model/, with its tokenizer."""
        results = {}
        for split in self.labelled_splits:
            metrics = evaluation(params, split)
            say(f"{split} {self.describe(split, metrics)}")
            results |= {f"{split}_{name}": value for name, value in metrics.items()}
        params = fetch(params)
        if jax.process_index() == 0:
            model = nnx.merge(self.make_graphdef(), params)
            folder = Path(self.config.run_dir) / MODEL_FOLDER
            save_model(model.masked_lm, self.data.tokenizer, folder)
        return results

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
