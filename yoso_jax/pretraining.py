"""Pretraining a masked language model, perhaps also on the order of segments."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import grain
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from yoso_jax.conversion.positions import PositionExtension
from yoso_jax.data.corpus import load_mlm
from yoso_jax.data.mlm import MLMConfig, MLMData, eval_batches, train_batches
from yoso_jax.data.mlm_examples import ExampleMaker
from yoso_jax.data.packing import Blocks, TokenStream
from yoso_jax.data.pipeline import Batch
from yoso_jax.data.tokenizer import load_tokenizer
from yoso_jax.errors import ConfigError
from yoso_jax.finetuning.start import ModelOptions, Start, from_checkpoint, from_scratch
from yoso_jax.losses import IGNORED
from yoso_jax.metrics import write_atomically
from yoso_jax.modeling import YosoForMaskedLM
from yoso_jax.modeling.layers import Policy
from yoso_jax.modeling.pretraining import PretrainingModel


@dataclasses.dataclass(frozen=True, eq=False)
class Pretraining:
    """What a run needs of its task; see `prepare_pretraining`.

    Attributes:
      config: what to predict.
      data: the splits.
      start: the model to start from.
      sequence_length: T.
      seed: of the order of the data, and of masks.
      dtype: of activations.
    """

    config: MLMConfig
    data: MLMData
    start: Start
    sequence_length: int
    seed: int
    dtype: DTypeLike

    def make_model(self, rngs: nnx.Rngs) -> PretrainingModel:
        """The model with float32 parameters, all of them drawn."""
        masked_lm = YosoForMaskedLM(self.start.config, dtype=self.dtype, rngs=rngs)
        return self._with_order(masked_lm, rngs)

    def make_initial_model(self, rngs: nnx.Rngs) -> PretrainingModel:
        """The same with the parameters that training starts from; not to be called under jit."""
        return self._with_order(self.start.build(self.dtype, rngs), rngs)

    def _with_order(self, masked_lm: YosoForMaskedLM, rngs: nnx.Rngs) -> PretrainingModel:
        policy = Policy(self.dtype, jnp.float32)
        return PretrainingModel(masked_lm, policy, with_order=self.config.sentence_order, rngs=rngs)

    def train_batches(self, batch_size: int) -> grain.DatasetIterator[Batch]:
        """Batches to train on, without end; see `yoso_jax.data.mlm.train_batches`."""
        maker = self._maker(self.seed, static=self.config.masking == "static")
        return train_batches(self.data.train, maker, batch_size=batch_size)

    def eval_batches(self, stream: TokenStream, batch_size: int) -> grain.IterDataset[Batch]:
        """All batches of a split; its masks are the same in every run of the same data."""
        return eval_batches(
            stream, self._maker(self.config.seed, static=True), batch_size=batch_size
        )

    def _maker(self, seed: int, *, static: bool) -> ExampleMaker:
        maker = ExampleMaker(
            self.data.vocabulary,
            self.config.masks,
            self.sequence_length,
            seed,
            with_order=self.config.sentence_order,
        )
        if static:
            return maker
        epoch_length = len(Blocks(self.data.train, maker.block_length))
        return dataclasses.replace(maker, epoch_length=epoch_length)

    def sums(
        self,
        model: PretrainingModel,
        batch: Mapping[str, Array],
        *,
        deterministic: bool,
        rngs: nnx.Rngs,
    ) -> dict[str, Float[Array, ""]]:
        """`pretraining_sums` of a batch."""
        # A model with one type tells segments apart by what separates them.
        has_types = model.masked_lm.config.type_vocab_size > 1
        logits, order_logits = model(
            batch["input_ids"],
            batch["attention_mask"],
            batch["positions"],
            batch.get("token_type_ids") if has_types else None,
            deterministic=deterministic,
            rngs=rngs,
        )
        return pretraining_sums(logits, order_logits, batch)

    def save(self, model: PretrainingModel, folder: Path) -> None:
        """Writes the masked language model and its tokenizer as `from_pretrained` reads them."""
        tokenizer = load_tokenizer(self.data.tokenizer)
        model.masked_lm.save_pretrained(folder)
        write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True))


def prepare_pretraining(
    config: MLMConfig,
    folder: Path,
    options: ModelOptions,
    *,
    sequence_length: int,
    seed: int,
    dtype: DTypeLike,
    init_from: Path | None = None,
    position_extension: PositionExtension | None = None,
) -> Pretraining:
    """Reads the corpus (see `load_mlm`) and finds out what the model starts from.

    Args:
        config: what to predict.
        folder: has the corpora in it.
        options: fields of the model's configuration.
        sequence_length: T.
        seed: of the order of the data, and of masks.
        dtype: of activations.
        init_from: a checkpoint to start from, see `PretrainedModel.from_pretrained`; without
            `config.tokenizer`, the tokenizer is the one beside it. None draws all parameters.
        position_extension: how to make more positions than the checkpoint has.

    Raises:
        ConfigError: a field does not suit the tokenizer or the length.
        CheckpointError: the checkpoint cannot be read, or the model cannot be made of it.
        DataError: see `load_mlm`.
        OSError: `folder` cannot be written.
    """
    least = 4 if config.sentence_order else 2
    if sequence_length < least:
        raise ConfigError(
            f"sequence_length must be at least {least} for mlm, got {sequence_length}"
        )
    if init_from is not None and config.tokenizer is None:
        beside = init_from if init_from.is_dir() else init_from.parent
        config = dataclasses.replace(config, tokenizer=str(beside))
    data = load_mlm(config, folder)
    tokenizer = load_tokenizer(data.tokenizer)
    if init_from is None:
        types = {"type_vocab_size": 2 if config.sentence_order else 1}
        start = from_scratch(YosoForMaskedLM, tokenizer, sequence_length, options, types)
    else:
        start = from_checkpoint(
            YosoForMaskedLM,
            tokenizer,
            sequence_length,
            options,
            {},
            path=init_from,
            position_extension=position_extension,
        )
    if start.config.pad_token_id not in (None, data.vocabulary.pad):
        raise ConfigError(
            f"the tokenizer pads with {data.vocabulary.pad}, the model with "
            f"{start.config.pad_token_id}: it is not the model's; name that one with data.tokenizer"
        )
    return Pretraining(config, data, start, sequence_length, seed, dtype)


def pretraining_sums(
    logits: Float[Array, "B P vocab"],
    order_logits: Float[Array, "B 2"] | None,
    batch: Mapping[str, Array | np.ndarray],
) -> dict[str, Float[Array, ""]]:
    """Sums over what is to be predicted in a batch, float32.

    Args:
        logits: of the tokens at `positions`.
        order_logits: of the order of segments; None if that is not asked for.
        batch: `labels` and `order_labels`, -100 where nothing is to be predicted; rows whose
            `weight`, if there is one, is 0 count for nothing.

    Returns:
        `tokens`, their number; `loss`, the cross entropies of them in nats; `correct`, how many of
        them have the largest score; and with `order_logits` the same of the segments, `order_...`.
    """
    tasks = {"": (logits, batch["labels"])}
    if order_logits is not None:
        tasks["order_"] = (order_logits, batch["order_labels"])
    sums = {}
    for prefix, (scores, labels) in tasks.items():
        counted = labels != IGNORED
        if "weight" in batch:
            weight = jnp.reshape(batch["weight"], (-1, *[1] * (counted.ndim - 1)))
            counted &= weight > 0
        labels = jnp.where(counted, labels, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores.astype(jnp.float32), labels)
        sums |= {
            f"{prefix}count": jnp.sum(counted, dtype=jnp.float32),
            f"{prefix}loss": jnp.sum(losses, where=counted),
            f"{prefix}correct": jnp.sum(
                scores.argmax(-1) == labels, where=counted, dtype=jnp.float32
            ),
        }
    return sums


def pretraining_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over all that was predicted: `loss` (in nats), `accuracy` and `perplexity` of tokens.

    With the order of segments also `order_loss` and `order_accuracy`.
    """
    metrics = {}
    for prefix in ("", "order_"):
        if f"{prefix}count" in sums:
            count = max(sums[f"{prefix}count"], 1)
            metrics[f"{prefix}loss"] = sums[f"{prefix}loss"] / count
            metrics[f"{prefix}accuracy"] = sums[f"{prefix}correct"] / count
    # Of larger losses it is no float any more.
    metrics["perplexity"] = math.exp(min(metrics["loss"], 700))
    return metrics
