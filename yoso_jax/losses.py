"""The losses of the heads, pure functions in float32.

Each is a mean over the labels that count, and 0 where none does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Bool, Float, Integer, Real

from yoso_jax.config import ProblemType

IGNORED = -100
"""The label that counts for nothing."""


def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    ignored: int = IGNORED,
) -> Float[Array, ""]:
    """Mean of -log softmax(logits)[label] in nats.

    Args:
        logits: unnormalised scores.
        labels: classes in [0, classes), or `ignored`.
        where: True where the label counts, besides not being `ignored`; None for everywhere.
        ignored: the label left out of the mean.

    Returns:
        A float32 scalar, 0 if no label counts.

    Raises:
        ValueError: a label that counts is out of range; unnoticed under jit, where it gives NaN.
    """
    labels = labels.astype(jnp.int32)  # narrower ones would wrap at -100
    counted = labels != ignored
    if where is not None:
        counted &= where
    labels = jnp.where(counted, labels, 0)
    _check_labels(labels, logits.shape[-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    total = jnp.sum(losses, where=counted)
    return total / jnp.maximum(jnp.sum(counted), 1)


def sequence_classification_loss(
    logits: Float[Array, "batch classes"],
    labels: Real[Array, "batch"] | Real[Array, "batch columns"],
    problem_type: ProblemType | None = None,
) -> Float[Array, ""]:
    """Loss of a whole sequence's labels.

    Args:
        logits: the head's output.
        labels: for single_label_classification classes [batch] or [batch, 1], -100 where ignored;
            for regression numbers [batch, classes], or [batch] if there is one class; for
            multi_label_classification 0..1 [batch, classes].
        problem_type: None infers it: one class is regression (mean squared error), integer labels
            are single_label_classification (cross entropy), others multi_label_classification
            (binary cross entropy of each class).

    Returns:
        A float32 scalar.

    Raises:
        ValueError: labels of a wrong shape or type for the problem.
    """
    classes = logits.shape[-1]
    is_integer = jnp.issubdtype(labels.dtype, jnp.integer)
    if problem_type is None:
        if classes == 1:
            problem_type = "regression"
        elif is_integer:
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"
    if problem_type == "single_label_classification":
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if not is_integer or labels.ndim != 1:
            raise ValueError(
                f"labels must be integers [batch] for {problem_type}, "
                f"got {labels.dtype} {labels.shape}"
            )
        return cross_entropy(logits, labels)
    if problem_type == "regression" and classes == 1:
        labels = labels.reshape(-1, 1)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels must have the shape {logits.shape} of the logits for {problem_type}, "
            f"got {labels.shape}"
        )
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    if problem_type == "regression":
        return jnp.mean(jnp.square(logits - labels))
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))


def question_answering_loss(
    start_logits: Float[Array, "batch tokens"],
    end_logits: Float[Array, "batch tokens"],
    start_positions: Integer[Array, "batch"],
    end_positions: Integer[Array, "batch"],
) -> Float[Array, ""]:
    """Mean of the cross entropies of an answer's first and last token.

    Positions are clamped to [0, tokens]; `tokens` (an answer outside the window) is ignored.

    Returns:
        A float32 scalar.
    """
    tokens = start_logits.shape[-1]

    def one_end(logits: Array, positions: Array) -> Array:
        positions = positions.astype(jnp.int32)  # narrower ones would wrap at `tokens`
        return cross_entropy(logits, jnp.clip(positions, 0, tokens), ignored=tokens)

    return (one_end(start_logits, start_positions) + one_end(end_logits, end_positions)) / 2


def _check_labels(labels: Array, classes: int) -> None:
    if isinstance(labels, jax.core.Tracer) or labels.size == 0:
        return
    low, high = np.min(labels), np.max(labels)
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels must be in [0, {classes}) or {IGNORED} where ignored, got {low}..{high}"
        )
