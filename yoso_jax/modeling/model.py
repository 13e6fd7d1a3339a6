"""The YOSO encoder with its embeddings."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int, PRNGKeyArray

from yoso_jax.config import YosoConfig
from yoso_jax.modeling.base import PretrainedModel
from yoso_jax.modeling.inputs import ArrayInput, check_ids, check_length, check_mask, require_rank
from yoso_jax.modeling.layers import Dropout, Embed, Encoder, LayerNorm, Policy, draw_dropout_key
from yoso_jax.modeling.outputs import BaseModelOutput

# The first two rows of the published position embeddings are unused, as in RoBERTa.
POSITION_OFFSET = 2


class Embeddings(nnx.Module):
    """LayerNorm(word + token type + position), then dropout."""

    def __init__(self, config: YosoConfig, policy: Policy, *, rngs: nnx.Rngs) -> None:
        self.pad_token_id = config.pad_token_id
        positions = config.max_position_embeddings + POSITION_OFFSET
        self.word_embeddings = Embed(config, config.vocab_size, policy, rngs=rngs)
        self.position_embeddings = Embed(config, positions, policy, rngs=rngs)
        self.token_type_embeddings = Embed(config, config.type_vocab_size, policy, rngs=rngs)
        # What all tokens share leaves less to tell them apart by: with the type in a third of their
        # variance cosines of a query differ by a fifth less, hashes fill few buckets, and a model
        # learns later where to look. Softmax does not see what all keys share.
        types = self.token_type_embeddings.embedding
        types[...] = jnp.zeros_like(types[...])
        if self.pad_token_id is not None:
            words = self.word_embeddings.embedding
            words[...] = words[...].at[self.pad_token_id].set(0)
        self.norm = LayerNorm(config, policy, rngs=rngs)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        words: Int[Array, "B T"] | Float[Array, "B T hidden"],
        token_type_ids: Int[Array, "B T"],
        position_ids: Int[Array, "#B T"],
        dropout_key: PRNGKeyArray | None,
    ) -> Float[Array, "B T hidden"]:
        """`words` are ids or vectors in the place of the word embeddings."""
        if words.ndim == 2:
            words = self._look_up(words)
        x = words.astype(self.word_embeddings.dtype)
        x = x + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.norm(x), dropout_key)

    def _look_up(self, ids: Int[Array, "B T"]) -> Float[Array, "B T hidden"]:
        x = self.word_embeddings(ids)
        if self.pad_token_id is None:
            return x
        is_pad = (ids == self.pad_token_id)[:, :, None]
        return jnp.where(is_pad, lax.stop_gradient(x), x)


class YosoModel(PretrainedModel):
    """The encoder: token ids to hidden states.

    References:
        Zeng et al., You Only Sample (Almost) Once, ICML 2021, arXiv:2111.09714.
    """

    def _build(self, config: YosoConfig, policy: Policy, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(config, policy, rngs=rngs)
        self.encoder = Encoder(config, policy, rngs=rngs)

    def __call__(
        self,
        input_ids: ArrayInput | None = None,
        attention_mask: ArrayInput | None = None,
        token_type_ids: ArrayInput | None = None,
        position_ids: ArrayInput | None = None,
        inputs_embeds: ArrayInput | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> BaseModelOutput:
        """Encodes a batch of B sequences of T tokens, T <= max_position_embeddings.

        Args:
            input_ids: [B, T] integers in [0, vocab_size).
            attention_mask: [B, T], 1 or True for real tokens, 0 or False for padding, which neither
                attends nor is attended to; None for no padding.
            token_type_ids: [B, T] integers in [0, type_vocab_size); None for zeros.
            position_ids: [B, T] or [1, T] integers in [0, max_position_embeddings + 2), rows of the
                position embeddings; None for 2, 3, ...
            inputs_embeds: [B, T, hidden_size] in the place of `input_ids`.
            output_hidden_states: return the hidden states of all layers.
            output_attentions: return the context of all layers.
            deterministic: False drops out.
            rngs: its `hash` stream is used when sampling (`use_expectation=False`), its `dropout`
                stream when not deterministic.

        Returns:
            Hidden states [B, T, hidden_size], of the type computed in.

        Raises:
            ValueError: an argument has a wrong shape, type or range (ranges are only known outside
                jit), or a random stream is missing.
        """
        config = self.config
        words = self._check_words(input_ids, inputs_embeds)
        batch, tokens = words.shape[:2]
        check_length(tokens, config.max_position_embeddings)
        mask = None if attention_mask is None else check_mask(attention_mask, (batch, tokens))
        if token_type_ids is None:
            token_type_ids = jnp.zeros((batch, tokens), jnp.int32)
        else:
            token_type_ids = check_ids(
                "token_type_ids", token_type_ids, (batch, tokens), config.type_vocab_size
            )
        if position_ids is None:
            position_ids = jnp.arange(POSITION_OFFSET, tokens + POSITION_OFFSET)[None]
        else:
            rows = 1 if np.shape(position_ids) == (1, tokens) else batch
            size = config.max_position_embeddings + POSITION_OFFSET
            position_ids = check_ids("position_ids", position_ids, (rows, tokens), size)
        dropout_key = draw_dropout_key(config, deterministic, rngs)
        x = self.embeddings(words, token_type_ids, position_ids, dropout_key)
        return self.encoder(
            x,
            mask,
            deterministic=deterministic,
            rngs=rngs,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    def _check_words(self, input_ids: ArrayInput | None, inputs_embeds: ArrayInput | None) -> Array:
        if input_ids is not None and inputs_embeds is None:
            shape = require_rank("input_ids", input_ids, "[batch, tokens]")
            return check_ids("input_ids", input_ids, shape, self.config.vocab_size)
        if inputs_embeds is not None and input_ids is None:
            hidden = self.config.hidden_size
            shape = require_rank("inputs_embeds", inputs_embeds, f"[batch, tokens, {hidden}]")
            words = jnp.asarray(inputs_embeds)
            if shape[-1] != hidden or not jnp.issubdtype(words.dtype, jnp.floating):
                raise ValueError(
                    f"inputs_embeds must be floats [batch, tokens, {hidden}], "
                    f"got {words.dtype} {shape}"
                )
            return words
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {given}")
