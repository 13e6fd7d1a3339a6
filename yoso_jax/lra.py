"""The classifier of the Long Range Arena experiments: a pre-norm encoder over raw symbols.

As the YOSO authors trained it; the encoder's layers are those of the Hugging Face architectures.
The paper's variants are configurations: softmax is `attention="softmax"`, YOSO-E
`use_expectation=True`, YOSO-m `use_expectation=False` with `num_hash=m`, and YOSO-C-m that
with a `conv_window`.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from yoso_jax.config import EncoderConfig
from yoso_jax.conversion.names import LRA
from yoso_jax.losses import cross_entropy
from yoso_jax.modeling.base import PretrainedModel
from yoso_jax.modeling.inputs import (
    ArrayInput,
    check_ids,
    check_integers,
    check_length,
    check_mask,
    require_rank,
)
from yoso_jax.modeling.layers import (
    Dropout,
    Embed,
    Encoder,
    LayerNorm,
    Linear,
    NormPosition,
    Policy,
    draw_dropout_key,
)
from yoso_jax.modeling.outputs import LogitsOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRAConfig(EncoderConfig):
    """The published size by default: 2 layers, width 64, 2 heads of 32, 32 hashes.

    Raises:
        ValueError: a field has a value of a wrong type or out of range; the message names the field
            and what is accepted.
    """

    model_type: ClassVar[str] = "yoso_lra"

    vocab_size: int = 32
    """Symbols, >= 1. With `pooling="cls"` the last one stands for the whole sequence."""
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 128
    """Width inside the feed-forward blocks and the classifier, >= 1."""
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    num_hash: int = 32

    num_labels: int = 10
    """Classes, >= 1."""
    norm: NormPosition = "pre"
    """Normalise before ("pre", as published) or after ("post") each half of a layer."""
    pooling: Literal["mean", "cls"] = "mean"
    """Classify the mean over tokens, or a symbol put before the sequence (whose last is cut)."""
    mean_over: Literal["all", "valid"] = "all"
    """Tokens the mean divides by: padding too, as published, or valid ones only."""
    dual: bool = False
    """Classify pairs of sequences, as the Retrieval task does: the classifier sees
    [a, b, a*b, a-b] of their pooled vectors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("num_labels")
        self._check_choice("norm", ("pre", "post"))
        self._check_choice("pooling", ("mean", "cls"))
        self._check_choice("mean_over", ("all", "valid"))
        self._check_bool("dual")


class LRAClassifier(PretrainedModel):
    """Embeddings, encoder, LayerNorm, pooling, and a two-layer classifier.

    With `config.dual` both sequences of a pair go through the same encoder, and are padded to the
    same length.

    Args:
        config: the architecture.
        dtype: type computed in (LayerNorm, attention and losses use float32 inside).
        param_dtype: type the parameters are kept in.
        rngs: initialises the parameters from its `params` stream; not kept.

    References:
        Zeng et al., You Only Sample (Almost) Once, ICML 2021, arXiv:2111.09714, section 4.2.
        Tay et al., Long Range Arena, ICLR 2021, arXiv:2011.04006.
    """

    config_class = LRAConfig
    layout = LRA

    def _build(self, config: LRAConfig, policy: Policy, rngs: nnx.Rngs) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.word_embeddings = Embed(config, config.vocab_size, policy, rngs=rngs)
        self.position_embeddings = Embed(config, config.max_position_embeddings, policy, rngs=rngs)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.encoder = Encoder(config, policy, norm=config.norm, rngs=rngs)
        self.norm = LayerNorm(config, policy, rngs=rngs)
        pooled = 4 * hidden if config.dual else hidden
        self.dense = Linear(config, pooled, inner, policy, rngs=rngs)
        self.out_proj = Linear(config, inner, config.num_labels, policy, rngs=rngs)

    def __call__(
        self,
        input_ids: ArrayInput,
        attention_mask: ArrayInput | None = None,
        labels: ArrayInput | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> LogitsOutput:
        """Classifies B sequences, or pairs, of T symbols, T <= max_position_embeddings.

        Args:
            input_ids: [B, T] integers in [0, vocab_size); with `config.dual` [B, 2, T], the first
                and the second of each pair.
            attention_mask: of the same shape, 1 or True for symbols, 0 or False for padding; None
                for none.
            labels: [B] integers in [0, num_labels), -100 where ignored.
            deterministic: False drops out.
            rngs: its `hash` stream is used where `config.is_sampled`, its `dropout` stream when not
                deterministic.

        Returns:
            Logits [B, num_labels], and with labels the mean cross entropy, 0 if all are ignored.

        Raises:
            ValueError: an argument has a wrong shape, type or range (ranges are only known outside
                jit), or a random stream is missing.
        """
        config = self.config
        if config.dual:
            input_ids, attention_mask = _flatten_pairs(input_ids, attention_mask)
        shape = require_rank("input_ids", input_ids, "[batch, tokens]")
        ids = check_ids("input_ids", input_ids, shape, config.vocab_size)
        check_length(shape[1], config.max_position_embeddings)
        mask = jnp.ones(shape, bool)
        if attention_mask is not None:
            mask = check_mask(attention_mask, shape)
        if config.pooling == "cls":
            ids = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=config.vocab_size - 1)
            mask = jnp.pad(mask[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        x = self.word_embeddings(ids) + self.position_embeddings(jnp.arange(shape[1]))
        x = self.dropout(x, draw_dropout_key(config, deterministic, rngs))
        # Attention is faster without a mask.
        attended = None if attention_mask is None else mask
        x = self.encoder(x, attended, deterministic=deterministic, rngs=rngs).last_hidden_state
        x = jnp.where(mask[:, :, None], self.norm(x), 0)
        pooled = self._pool(x, mask)
        if config.dual:
            a, b = pooled[0::2], pooled[1::2]
            pooled = jnp.concatenate([a, b, a * b, a - b], axis=1)
        logits = self.out_proj(nnx.relu(self.dense(pooled)))
        if labels is None:
            return LogitsOutput(logits=logits)
        labels = check_integers("labels", labels, logits.shape[:1])
        return LogitsOutput(loss=cross_entropy(logits, labels), logits=logits)

    def _pool(self, x: Float[Array, "B T hidden"], mask: Array) -> Float[Array, "B hidden"]:
        if self.config.pooling == "cls":
            return x[:, 0]
        total = jnp.sum(x, axis=1, dtype=jnp.float32)
        if self.config.mean_over == "all":
            return (total / x.shape[1]).astype(x.dtype)
        return (total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)).astype(x.dtype)


def _flatten_pairs(
    input_ids: ArrayInput, attention_mask: ArrayInput | None
) -> tuple[ArrayInput, ArrayInput | None]:
    """[B, 2, T] to [2 B, T], in which the sequences of a pair follow each other."""
    batch, documents, tokens = require_rank("input_ids", input_ids, "[batch, 2, tokens]")
    if documents != 2:
        raise ValueError(f"input_ids must be [batch, 2, tokens], got shape {input_ids.shape}")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have shape {input_ids.shape}, got {attention_mask.shape}"
            )
        attention_mask = attention_mask.reshape(2 * batch, tokens)
    return input_ids.reshape(2 * batch, tokens), attention_mask
