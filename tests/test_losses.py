"""The losses against their definitions."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yoso_jax.losses import cross_entropy, question_answering_loss, sequence_classification_loss

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 3)).astype(np.float32)


def nll(logits: np.ndarray, label: int) -> float:
    return float(np.log(np.sum(np.exp(logits.astype(np.float64)))) - logits[label])


def test_cross_entropy_is_the_mean_over_what_counts() -> None:
    labels = np.array([2, -100, 0, 1])
    where = np.array([True, True, True, False])
    loss = cross_entropy(jnp.array(LOGITS), jnp.array(labels), where=jnp.array(where))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, (nll(LOGITS[0], 2) + nll(LOGITS[2], 0)) / 2, rtol=1e-6)


def test_cross_entropy_is_zero_with_zero_gradient_if_nothing_counts() -> None:
    loss, gradient = jax.value_and_grad(cross_entropy)(jnp.array(LOGITS), jnp.full(4, -100))
    assert loss == 0
    assert not np.any(gradient)


def test_cross_entropy_of_half_precision_is_computed_in_float32() -> None:
    logits = jnp.array(LOGITS).astype(jnp.bfloat16)
    labels = jnp.array([0, 1, 2, 0])
    exact = cross_entropy(logits.astype(jnp.float32), labels)
    assert cross_entropy(logits, labels) == exact


def test_labels_out_of_range_are_refused_or_give_nan() -> None:
    labels = jnp.array([0, 1, 3, 0])
    with pytest.raises(ValueError, match=re.escape("labels must be in [0, 3) or -100")):
        cross_entropy(jnp.array(LOGITS), labels)
    assert jnp.isnan(jax.jit(cross_entropy)(jnp.array(LOGITS), labels))


def test_problem_type_is_inferred_from_each_call() -> None:
    logits = jnp.array(LOGITS)
    classes = jnp.array([0, 2, 1, -100])
    expected = np.mean([nll(LOGITS[i], int(classes[i])) for i in range(3)])
    np.testing.assert_allclose(sequence_classification_loss(logits, classes), expected, rtol=1e-6)

    several = jnp.array(RNG.integers(0, 2, (4, 3)), jnp.float32)
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    expected = -np.mean(np.where(several == 1, np.log(p), np.log1p(-p)))
    np.testing.assert_allclose(sequence_classification_loss(logits, several), expected, rtol=1e-6)

    numbers = jnp.array([0.5, -1.0, 2.0, 0.0])
    expected = np.mean((LOGITS[:, 0] - numbers) ** 2)
    for labels in (numbers, numbers[:, None]):
        loss = sequence_classification_loss(logits[:, :1], labels)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_problem_type_given() -> None:
    logits, several = jnp.array(LOGITS), jnp.array(RNG.integers(0, 2, (4, 3)))
    loss = sequence_classification_loss(logits, several, "regression")
    np.testing.assert_allclose(loss, np.mean((LOGITS - several) ** 2), rtol=1e-6)
    assert sequence_classification_loss(
        logits, several, "multi_label_classification"
    ) == sequence_classification_loss(logits, several.astype(jnp.float32))


@pytest.mark.parametrize(
    ("labels", "problem_type", "message"),
    [
        (jnp.zeros(4), "single_label_classification", "labels must be integers [batch]"),
        (jnp.zeros((4, 3), int), None, "labels must be integers [batch]"),
        (jnp.zeros(4), None, "labels must have the shape (4, 3)"),
        (jnp.zeros(4), "regression", "labels must have the shape (4, 3)"),
    ],
)
def test_labels_that_do_not_fit_the_problem_are_refused(
    labels: jax.Array, problem_type: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sequence_classification_loss(jnp.array(LOGITS), labels, problem_type)


def test_question_answering_clamps_and_ignores_positions() -> None:
    start, end = jnp.array(LOGITS), jnp.array(LOGITS[::-1])
    # -7 becomes 0; 3 and 9 are behind the last token.
    loss = question_answering_loss(start, end, jnp.array([1, -7, 3, 9]), jnp.array([2, 9, 9, 9]))
    expected = (nll(LOGITS[0], 1) + nll(LOGITS[1], 0)) / 2 / 2 + nll(LOGITS[3], 2) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    outside = jnp.full(4, 3)
    assert question_answering_loss(start, end, outside, outside) == 0


def test_narrow_integers_do_not_wrap() -> None:
    """In uint8, -100 would be 156, and a position of 300 tokens would not exist."""
    logits = jnp.linspace(0, 5, 600).reshape(2, 300)
    narrow = jnp.array([156, 44], jnp.uint8)
    wide = narrow.astype(jnp.int32)
    np.testing.assert_allclose(cross_entropy(logits, narrow), cross_entropy(logits, wide))
    np.testing.assert_allclose(
        question_answering_loss(logits, logits, narrow, narrow),
        question_answering_loss(logits, logits, wide, wide),
    )


def test_labels_may_be_a_column() -> None:
    logits, labels = jnp.eye(3), jnp.array([0, 2, -100])
    expected = sequence_classification_loss(logits, labels)
    np.testing.assert_allclose(sequence_classification_loss(logits, labels[:, None]), expected)
