"""What the models return: frozen pytrees with Hugging Face's field names.

A field that was not asked for is None. Shapes: B batch, T tokens, L layers. Shapes and types are
not checked at run time: `jax.eval_shape` and `jax.tree.map` put other things here than arrays.
"""

import dataclasses
from typing import no_type_check

import jax
from jax import Array
from jaxtyping import Float


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModelOutput:
    """Output of an encoder without a head."""

    last_hidden_state: Float[Array, "B T hidden"]
    hidden_states: tuple[Float[Array, "B T hidden"], ...] | None = None
    """L + 1 arrays: after the embeddings and after each layer."""
    attentions: tuple[Float[Array, "B T hidden"], ...] | None = None
    """L arrays: each layer's context, heads merged. There are no attention weights to return."""


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsOutput:
    """Output of a head with one set of scores."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "..."]
    hidden_states: tuple[Float[Array, "B T hidden"], ...] | None = None
    attentions: tuple[Float[Array, "B T hidden"], ...] | None = None


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnsweringOutput:
    """Output of the extractive question answering head."""

    loss: Float[Array, ""] | None = None
    start_logits: Float[Array, "B T"]
    end_logits: Float[Array, "B T"]
    hidden_states: tuple[Float[Array, "B T hidden"], ...] | None = None
    attentions: tuple[Float[Array, "B T hidden"], ...] | None = None
