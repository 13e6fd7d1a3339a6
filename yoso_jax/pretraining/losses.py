"""What a batch of pretraining sums up to, and the metrics of such sums."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from yoso_jax.losses import IGNORED


def pretraining_sums(
    logits: Float[Array, "B P vocab"],
    order_logits: Float[Array, "B 2"] | None,
    batch: Mapping[str, Array],
) -> dict[str, Float[Array, ""]]:
    """Sums over what is to be predicted in a batch, float32.

    Args:
        logits: of the tokens at `positions`.
        order_logits: of the order of segments; None if that is not asked for.
        batch: `labels` and `order_labels`, -100 where nothing is to be predicted; rows whose
            `weight`, if there is one, is 0 count for nothing.

    Returns:
        `count`, their number; `loss`, the cross entropies of them in nats; `correct`, how many of
        them have the largest score; and with `order_logits` the same of the pairs of segments, as
        `order_count`, `order_loss` and `order_correct`.
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


def pretraining_loss(sums: Mapping[str, Array]) -> Float[Array, ""]:
    """What is minimised: the mean over tokens, plus that over pairs of segments; 0 for none."""
    means = [
        sums[f"{prefix}loss"] / jnp.maximum(sums[f"{prefix}count"], 1)
        for prefix in ("", "order_")
        if f"{prefix}count" in sums
    ]
    return jnp.sum(jnp.stack(means))


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
