"""What is pretrained: a masked language model, perhaps with a head for the order of segments."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from yoso_jax.config import YosoConfig
from yoso_jax.modeling.heads import YosoForMaskedLM
from yoso_jax.modeling.layers import Linear, Policy


class SegmentOrderHead(nnx.Module):
    """Says of two segments whether they were swapped, as ALBERT does (arXiv 1909.11942).

    BERT's pooler and classifier: dense and tanh of the first token, and two scores.
    """

    def __init__(self, config: YosoConfig, policy: Policy, *, rngs: nnx.Rngs) -> None:
        hidden = config.hidden_size
        self.dense = Linear(config, hidden, hidden, policy, rngs=rngs)
        self.classifier = Linear(config, hidden, 2, policy, rngs=rngs)

    def __call__(self, x: Float[Array, "B T hidden"]) -> Float[Array, "B 2"]:
        """Scores of the order as it was, and of the swapped one."""
        return self.classifier(jnp.tanh(self.dense(x[:, 0])))


class PretrainingModel(nnx.Module):
    """A masked language model that decodes only the tokens to predict.

    Attributes:
      masked_lm: the model to keep; what `order` learns is in no file of it.
      order: the head for the order of segments, or None.
    """

    def __init__(
        self, masked_lm: YosoForMaskedLM, policy: Policy, *, with_order: bool, rngs: nnx.Rngs
    ) -> None:
        self.masked_lm = masked_lm
        self.order = SegmentOrderHead(masked_lm.config, policy, rngs=rngs) if with_order else None

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        positions: Int[Array, "B P"],
        token_type_ids: Int[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B P vocab"], Float[Array, "B 2"] | None]:
        """Scores of all words at `positions`, as `masked_lm` gives them, and those of the order.

        Args:
            input_ids: as `YosoModel`, like what is not named here.
            attention_mask: as `YosoModel`.
            positions: of the tokens to predict, in [0, T).
            token_type_ids: as `YosoModel`.
            deterministic: as `YosoModel`.
            rngs: as `YosoModel`.
        """
        encoder = self.masked_lm.yoso
        x = encoder(
            input_ids, attention_mask, token_type_ids, deterministic=deterministic, rngs=rngs
        ).last_hidden_state
        predicted = jnp.take_along_axis(x, positions[:, :, None], axis=1)
        logits = self.masked_lm.head(predicted, encoder.embeddings.word_embeddings)
        return logits, None if self.order is None else self.order(x)
