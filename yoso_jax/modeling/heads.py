"""The encoder with the heads of the Hugging Face architectures."""

import dataclasses
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from yoso_jax.activations import ACTIVATIONS
from yoso_jax.config import YosoConfig
from yoso_jax.losses import cross_entropy, question_answering_loss, sequence_classification_loss
from yoso_jax.modeling.base import PretrainedModel
from yoso_jax.modeling.inputs import ArrayInput, check_integers, check_mask
from yoso_jax.modeling.layers import Dropout, LayerNorm, Linear, Policy, draw_dropout_key
from yoso_jax.modeling.model import YosoModel
from yoso_jax.modeling.outputs import LogitsOutput, QuestionAnsweringOutput


class _HeadModel(PretrainedModel):
    """An encoder, and a head that turns its hidden states into logits."""

    def _build(self, config: YosoConfig, policy: Policy, rngs: nnx.Rngs) -> None:
        dtype, param_dtype = policy.dtype, policy.param_dtype
        self.yoso = YosoModel(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self._build_head(config, policy, rngs)

    def _build_head(self, config: YosoConfig, policy: Policy, rngs: nnx.Rngs) -> None:
        raise NotImplementedError

    def _score(self, x: Array, deterministic: bool, rngs: nnx.Rngs | None) -> Array:
        raise NotImplementedError

    def _forward(
        self, *, deterministic: bool, rngs: nnx.Rngs | None, **arguments: Any
    ) -> LogitsOutput:
        outputs = self.yoso(deterministic=deterministic, rngs=rngs, **arguments)
        return LogitsOutput(
            logits=self._score(outputs.last_hidden_state, deterministic, rngs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class _LabelledModel(_HeadModel):
    """A head with one set of labels."""

    def __call__(
        self,
        input_ids: ArrayInput | None = None,
        attention_mask: ArrayInput | None = None,
        token_type_ids: ArrayInput | None = None,
        position_ids: ArrayInput | None = None,
        inputs_embeds: ArrayInput | None = None,
        labels: ArrayInput | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> LogitsOutput:
        """As `YosoModel.__call__`, and `labels` as the class says.

        Returns:
            Logits, and with labels the loss: a float32 scalar, 0 if all labels are ignored.
        """
        outputs = self._forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            deterministic=deterministic,
            rngs=rngs,
        )
        if labels is None:
            return outputs
        loss = self._loss(outputs.logits, jnp.asarray(labels), attention_mask)
        return dataclasses.replace(outputs, loss=loss)

    def _loss(self, logits: Array, labels: Array, attention_mask: ArrayInput | None) -> Array:
        raise NotImplementedError


class MaskedLMHead(nnx.Module):
    """Dense, activation, LayerNorm, and a decoder that may be the word embeddings themselves."""

    def __init__(self, config: YosoConfig, policy: Policy, *, rngs: nnx.Rngs) -> None:
        hidden, vocab = config.hidden_size, config.vocab_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dense = Linear(config, hidden, hidden, policy, rngs=rngs)
        self.norm = LayerNorm(config, policy, rngs=rngs)
        if config.tie_word_embeddings:
            self.decoder = None
            self.bias = nnx.Param(jnp.zeros(vocab, policy.param_dtype))
        else:
            self.decoder = Linear(config, hidden, vocab, policy, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T hidden"], word_embeddings: nnx.Embed
    ) -> Float[Array, "B T vocab"]:
        """Returns the logits of all words; `word_embeddings` decode unless untied."""
        x = self.norm(self.activation(self.dense(x)))
        if self.decoder is not None:
            return self.decoder(x)
        return word_embeddings.attend(x) + self.bias[...].astype(x.dtype)


class YosoForMaskedLM(_LabelledModel):
    """Predicts masked words: logits [B, T, vocab_size].

    Labels: words [B, T], -100 where ignored; the loss is the mean cross entropy.
    """

    def _build_head(self, config: YosoConfig, policy: Policy, rngs: nnx.Rngs) -> None:
        self.head = MaskedLMHead(config, policy, rngs=rngs)

    def _score(self, x: Array, deterministic: bool, rngs: nnx.Rngs | None) -> Array:
        return self.head(x, self.yoso.embeddings.word_embeddings)

    def _loss(self, logits: Array, labels: Array, attention_mask: ArrayInput | None) -> Array:
        return cross_entropy(logits, check_integers("labels", labels, logits.shape[:-1]))


class SequenceClassificationHead(nnx.Module):
    """Dense, activation, projection; dropout before each matrix is the caller's."""

    def __init__(self, config: YosoConfig, policy: Policy, *, rngs: nnx.Rngs) -> None:
        hidden = config.hidden_size
        self.dense = Linear(config, hidden, hidden, policy, rngs=rngs)
        self.out_proj = Linear(config, hidden, _num_labels(config), policy, rngs=rngs)


class YosoForSequenceClassification(_LabelledModel):
    """Classifies sequences by their first token: logits [B, num_labels].

    Labels and loss follow `config.problem_type`, see `losses.sequence_classification_loss`.
    """

    def _build_head(self, config: YosoConfig, policy: Policy, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = SequenceClassificationHead(config, policy, rngs=rngs)

    def _score(self, x: Array, deterministic: bool, rngs: nnx.Rngs | None) -> Array:
        x = self.dropout(x[:, 0], draw_dropout_key(self.config, deterministic, rngs))
        x = self.activation(self.classifier.dense(x))
        x = self.dropout(x, draw_dropout_key(self.config, deterministic, rngs))
        return self.classifier.out_proj(x)

    def _loss(self, logits: Array, labels: Array, attention_mask: ArrayInput | None) -> Array:
        return sequence_classification_loss(logits, labels, self.config.problem_type)


class YosoForMultipleChoice(_LabelledModel):
    """Picks one of C continuations by their first tokens: logits [B, C].

    Inputs have a choice axis, [B, C, T] (`inputs_embeds` [B, C, T, hidden]); hidden states and
    attentions come flattened to [B * C, T, hidden]. Labels: the right choice [B], -100 where
    ignored; the loss is the mean cross entropy over the choices.
    """

    def _build_head(self, config: YosoConfig, policy: Policy, rngs: nnx.Rngs) -> None:
        hidden = config.hidden_size
        self.pre_classifier = Linear(config, hidden, hidden, policy, rngs=rngs)
        self.classifier = Linear(config, hidden, 1, policy, rngs=rngs)

    def _score(self, x: Array, deterministic: bool, rngs: nnx.Rngs | None) -> Array:
        return self.classifier(nnx.relu(self.pre_classifier(x[:, 0])))

    def _forward(
        self, *, deterministic: bool, rngs: nnx.Rngs | None, **arguments: Any
    ) -> LogitsOutput:
        arrays = {
            name: value if value is None or isinstance(value, Array) else np.asarray(value)
            for name, value in arguments.items()
            if not isinstance(value, bool)
        }
        choices = _leading_axes(arrays)
        flat = {
            name: None if value is None else value.reshape(-1, *value.shape[2:])
            for name, value in arrays.items()
        }
        outputs = super()._forward(deterministic=deterministic, rngs=rngs, **arguments | flat)
        return dataclasses.replace(outputs, logits=outputs.logits.reshape(choices))

    def _loss(self, logits: Array, labels: Array, attention_mask: ArrayInput | None) -> Array:
        return cross_entropy(logits, check_integers("labels", labels, logits.shape[:1]))


class YosoForTokenClassification(_LabelledModel):
    """Classifies tokens: logits [B, T, num_labels].

    Labels: classes [B, T], ignored where they are -100 or the attention mask is 0; the loss is the
    mean cross entropy.
    """

    def _build_head(self, config: YosoConfig, policy: Policy, rngs: nnx.Rngs) -> None:
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = Linear(config, config.hidden_size, _num_labels(config), policy, rngs=rngs)

    def _score(self, x: Array, deterministic: bool, rngs: nnx.Rngs | None) -> Array:
        return self.classifier(self.dropout(x, draw_dropout_key(self.config, deterministic, rngs)))

    def _loss(self, logits: Array, labels: Array, attention_mask: ArrayInput | None) -> Array:
        labels = check_integers("labels", labels, logits.shape[:-1])
        where = None if attention_mask is None else check_mask(attention_mask, labels.shape)
        return cross_entropy(logits, labels, where=where)


class YosoForQuestionAnswering(_HeadModel):
    """Finds the first and last token of an answer; `config.num_labels` plays no part."""

    def _build_head(self, config: YosoConfig, policy: Policy, rngs: nnx.Rngs) -> None:
        self.qa_outputs = Linear(config, config.hidden_size, 2, policy, rngs=rngs)

    def _score(self, x: Array, deterministic: bool, rngs: nnx.Rngs | None) -> Array:
        return self.qa_outputs(x)

    def __call__(
        self,
        input_ids: ArrayInput | None = None,
        attention_mask: ArrayInput | None = None,
        token_type_ids: ArrayInput | None = None,
        position_ids: ArrayInput | None = None,
        inputs_embeds: ArrayInput | None = None,
        start_positions: ArrayInput | None = None,
        end_positions: ArrayInput | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> QuestionAnsweringOutput:
        """As `YosoModel.__call__`, and the answers' ends.

        Args:
            input_ids: as `YosoModel`, like what is not named here.
            attention_mask: as `YosoModel`.
            token_type_ids: as `YosoModel`.
            position_ids: as `YosoModel`.
            inputs_embeds: as `YosoModel`.
            start_positions: integers [B] or [B, 1], clamped to [0, T]; T or more is ignored.
            end_positions: likewise.
            output_hidden_states: as `YosoModel`.
            output_attentions: as `YosoModel`.
            deterministic: as `YosoModel`.
            rngs: as `YosoModel`.

        Returns:
            Start and end logits [B, T], and with both positions the mean of their cross entropies.

        Raises:
            ValueError: as `YosoModel.__call__`, or only one of the positions is given.
        """
        outputs = self._forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            deterministic=deterministic,
            rngs=rngs,
        )
        start_logits, end_logits = jnp.unstack(outputs.logits, axis=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            batch = start_logits.shape[:1]
            loss = question_answering_loss(
                start_logits,
                end_logits,
                check_integers("start_positions", _flat(start_positions), batch),
                check_integers("end_positions", _flat(end_positions), batch),
            )
        elif start_positions is not None or end_positions is not None:
            raise ValueError("start_positions and end_positions must be given together")
        return QuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _num_labels(config: YosoConfig) -> int:
    return cast(int, config.num_labels)  # set when the configuration was built


def _flat(positions: ArrayInput) -> ArrayInput:
    """`[B, 1]`, as transformers also takes them, to `[B]`."""
    is_column = np.ndim(positions) == 2 and np.shape(positions)[1] == 1
    return positions[:, 0] if is_column else positions


def _leading_axes(arrays: dict[str, ArrayInput | None]) -> tuple[int, ...]:
    """The batch and choice axes of multiple choice inputs, which must agree."""
    ranks = {name: 4 if name == "inputs_embeds" else 3 for name in arrays}
    for name, array in arrays.items():
        if array is not None and array.ndim != ranks[name]:
            raise ValueError(
                f"{name} must be [batch, choices, tokens"
                f"{', hidden' if ranks[name] == 4 else ''}], got shape {array.shape}"
            )
    leading = {name: array.shape[:2] for name, array in arrays.items() if array is not None}
    if len(set(leading.values())) > 1:
        raise ValueError(f"all inputs must have the same batch and choice axes, got {leading}")
    return next(iter(leading.values()), (0, 0))
