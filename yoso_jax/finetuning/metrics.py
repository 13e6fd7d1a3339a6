"""Metrics of predictions, by scikit-learn, SciPy and seqeval; all are fractions, but for mse."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Integer

try:
    from scipy import stats
    from seqeval.metrics import f1_score as entity_f1
    from seqeval.metrics import precision_score as entity_precision
    from seqeval.metrics import recall_score as entity_recall
    from sklearn import metrics as sk
except ImportError as error:
    raise ImportError(
        "fine-tuning needs scikit-learn, SciPy, seqeval and tokenizers: "
        "pip install 'yoso-jax[finetune]'"
    ) from error

MetricName = Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "mse"]

CLASS_METRICS: tuple[MetricName, ...] = ("accuracy", "f1", "macro_f1", "matthews")
SCORE_METRICS: tuple[MetricName, ...] = ("pearson", "spearman", "mse")


def class_metrics(
    names: Sequence[MetricName],
    predicted: Integer[np.ndarray, " examples"],
    labels: Integer[np.ndarray, " examples"],
) -> dict[str, float]:
    """Metrics of predicted classes.

    Args:
        names: of `CLASS_METRICS`. `f1` is that of class 1, `macro_f1` the mean over the classes
            that occur.
        predicted: classes.
        labels: the right ones.

    Returns:
        The value of each; 0 where it is not defined, as Matthews' correlation if all predictions
        are the same class.
    """
    compute: dict[str, Callable[[Any, Any], Any]] = {
        "accuracy": sk.accuracy_score,
        "f1": lambda y, x: sk.f1_score(y == 1, x == 1, zero_division=0),
        "macro_f1": lambda y, x: sk.f1_score(y, x, average="macro", zero_division=0),
        "matthews": sk.matthews_corrcoef,
    }
    return {name: float(compute[name](labels, predicted)) for name in names}


def score_metrics(
    names: Sequence[MetricName],
    predicted: Float[np.ndarray, " examples"],
    scores: Float[np.ndarray, " examples"],
) -> dict[str, float]:
    """Metrics of predicted numbers.

    Args:
        names: of `SCORE_METRICS`.
        predicted: numbers.
        scores: the right ones.

    Returns:
        The value of each; a correlation is 0 where it is not defined, as when all predictions are
        equal or there are fewer than two.
    """
    defined = len(scores) > 1 and np.ptp(predicted) > 0 and np.ptp(scores) > 0
    compute: dict[str, Callable[[], float]] = {
        "pearson": lambda: stats.pearsonr(predicted, scores).statistic if defined else 0.0,
        "spearman": lambda: stats.spearmanr(predicted, scores).statistic if defined else 0.0,
        "mse": lambda: sk.mean_squared_error(scores, predicted),
    }
    return {name: float(compute[name]()) for name in names}


# Other letters for the last, a middle and the only word of an entity, in those seqeval knows.
_PREFIXES = str.maketrans("LMU", "EIS")


def are_entities(tags: Sequence[str]) -> bool:
    """Whether tags mark entities: `O`, and others that begin with B-, I-, E- or L-, S- or U-."""
    return set(tags) != {"O"} and all(
        tag == "O" or (tag[1:2] == "-" and tag[0] in "BIELMSU") for tag in tags
    )


def tag_metrics(
    predicted: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], *, entities: bool
) -> dict[str, float]:
    """Metrics of the predicted tags of sentences.

    Args:
        predicted: a tag for each word of each sentence.
        tags: the right ones.
        entities: also compare entities, as the script conlleval does: one is right if its first
            and last word and its kind are.

    Returns:
        `accuracy` over words, and with `entities` first their `f1`, `precision` and `recall`; 0
        where one is not defined.
    """
    flat = [[tag for sentence in side for tag in sentence] for side in (tags, predicted)]
    accuracy = float(np.mean([right == found for right, found in zip(*flat, strict=True)]))
    if not entities:
        return {"accuracy": accuracy}
    sides = [
        [[tag[:1].translate(_PREFIXES) + tag[1:] for tag in sentence] for sentence in side]
        for side in (tags, predicted)
    ]
    # seqeval's own annotation of zero_division is wrong.
    compute: dict[str, Callable[..., Any]] = {
        "f1": entity_f1,
        "precision": entity_precision,
        "recall": entity_recall,
    }
    found = {name: float(metric(*sides, zero_division=0)) for name, metric in compute.items()}
    return {**found, "accuracy": accuracy}
