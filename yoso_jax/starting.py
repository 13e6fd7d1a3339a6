"""The model that fine-tuning starts from: a checkpoint, or one drawn anew."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from yoso_jax.config import RematPolicy, YosoConfig
from yoso_jax.conversion.load import make_plan
from yoso_jax.conversion.plan import Plan
from yoso_jax.conversion.positions import PositionExtension
from yoso_jax.errors import CheckpointError, ConfigError
from yoso_jax.modeling import YosoModel
from yoso_jax.saving import MODEL_FOLDER


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Fields of `YosoConfig` to set; none: as in the checkpoint, or the default of `YosoConfig`.

    Without a checkpoint, `vocab_size` is by default that of the tokenizer, and
    `max_position_embeddings` the run's `sequence_length`.
    """

    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int | None = None
    hidden_dropout_prob: float | None = None
    initializer_range: float | None = None
    attention: Literal["yoso", "softmax"] | None = None
    use_expectation: bool | None = None
    hash_code_len: int | None = None
    num_hash: int | None = None
    use_fast_hash: bool | None = None
    lsh_backward: bool | None = None
    attention_backward: Literal["auto", "sampled", "expectation", "bucketed"] | None = None
    num_backward_hashes: int | None = None
    bucket_bits: int | None = None
    conv_window: int | None = None
    remat: bool | None = None
    remat_policy: RematPolicy | None = None
    attention_implementation: str | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: x for name, x in dataclasses.asdict(self).items() if x is not None}


@dataclasses.dataclass(frozen=True)
class Start:
    """A model to make.

    Attributes:
      model_class: its class.
      config: its configuration.
      notes: what the user should know of it, a line each.
    """

    model_class: Any
    config: YosoConfig
    notes: tuple[str, ...]
    _plan: Plan | None = None
    _only_encoder: bool = False

    @property
    def reads_parameters(self) -> bool:
        """Whether some are read from a checkpoint."""
        return self._plan is not None

    def build(self, dtype: DTypeLike, rngs: nnx.Rngs) -> Any:
        """The model with float32 parameters; `rngs` draws those that are in no checkpoint."""
        options: Any = {"dtype": dtype, "param_dtype": jnp.float32, "rngs": rngs}
        if self._plan is not None and not self._only_encoder:
            return self._plan.load(**options)
        model = self.model_class(self.config, **options)
        if self._plan is not None:
            model.yoso = self._plan.load(**options)
        return model


def find_start(init_from: str | None, run_dir: str) -> Path | None:
    """The checkpoint to start from, none if `init_from` is, or where it was moved the run's own.

    A run that has ended keeps its model, with a tokenizer, and its parameters are in its own
    checkpoints: it can be evaluated, and go on, without what it once started from.

    Raises:
        CheckpointError: there is neither.
    """
    if init_from is None:
        return None
    path, own = Path(init_from), Path(run_dir) / MODEL_FOLDER
    if not path.exists() and not own.is_dir():
        raise CheckpointError(f"init_from: there is no checkpoint {path}")
    return path if path.exists() else own


def from_scratch(
    model_class: Any,
    tokenizer: Tokenizer,
    sequence_length: int,
    options: ModelOptions,
    fields: Mapping[str, Any],
) -> Start:
    """A model whose parameters are drawn.

    Args:
        model_class: its class.
        tokenizer: says how many words there are, and which of them pads.
        sequence_length: tokens that the model must be able to read.
        options: fields of its configuration.
        fields: more of them, that follow from the examples.

    Raises:
        ConfigError: a field is out of range, or does not suit tokenizer or length.
    """
    defaults: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": sequence_length,
        "pad_token_id": _find(tokenizer, "<pad>", "[PAD]"),
        "bos_token_id": _find(tokenizer, "<s>", "[CLS]"),
        "eos_token_id": _find(tokenizer, "</s>", "[SEP]"),
    }
    try:
        config = YosoConfig(**{**defaults, **options.given(), **fields})
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    _check(config, tokenizer, sequence_length)
    return Start(model_class, config, ("all parameters are drawn anew",))


def from_checkpoint(
    model_class: Any,
    tokenizer: Tokenizer,
    sequence_length: int,
    options: ModelOptions,
    fields: Mapping[str, Any],
    *,
    path: Path,
    config: Path | None = None,
    position_extension: PositionExtension | None = None,
    fresh_head: bool = False,
) -> Start:
    """A model whose parameters are those of a checkpoint, as far as it has them.

    Args:
        model_class: as in `from_scratch`, like what is not named here.
        tokenizer: as in `from_scratch`.
        sequence_length: as in `from_scratch`.
        options: as in `from_scratch`.
        fields: as in `from_scratch`.
        path: of the checkpoint, see `PretrainedModel.from_pretrained`.
        config: JSON file with its configuration, if that is not where it is looked for.
        position_extension: how to make more positions than the checkpoint has.
        fresh_head: do not use the head of the checkpoint, which may be of another task.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the model cannot be made of it.
        ConfigError: a field does not suit tokenizer or length.
    """
    overrides = {**options.given(), **fields}
    loaded = YosoModel if fresh_head else model_class
    try:
        plan = make_plan([loaded], path, config, position_extension, **overrides)
        plan.check()
    except (OSError, ValueError) as error:
        hint = ""
        if "of a wrong shape: classifier." in str(error):
            hint = "; fresh_head: true draws the head anew"
        raise CheckpointError(f"cannot start from {path}: {error}{hint}") from error
    _check(plan.config, tokenizer, sequence_length)
    notes = plan.notes
    if fresh_head:
        notes = (*notes, "the head is drawn anew")
    return Start(model_class, plan.config, notes, plan, fresh_head)


def read_config(path: Path, config: Path | None) -> YosoConfig:
    """The configuration of a checkpoint, before it is known what becomes of it.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        return make_plan([YosoModel], path, config).config
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot start from {path}: {error}") from error


def _find(tokenizer: Tokenizer, *tokens: str) -> int | None:
    ids = (tokenizer.token_to_id(token) for token in tokens)
    return next((index for index in ids if index is not None), None)


def _check(config: YosoConfig, tokenizer: Tokenizer, sequence_length: int) -> None:
    largest = max(tokenizer.get_vocab().values()) + 1
    if largest > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {largest} tokens, the model only {config.vocab_size}: it is not "
            "the model's; name that one with tokenizer"
        )
    if sequence_length > config.max_position_embeddings:
        raise ConfigError(
            f"sequence_length must be at most {config.max_position_embeddings}, the positions of "
            f"the model, got {sequence_length}; model.max_position_embeddings and "
            "position_extension make more"
        )
