"""The YOSO models (Flax NNX)."""

from yoso_jax.modeling.heads import (
    YosoForMaskedLM,
    YosoForMultipleChoice,
    YosoForQuestionAnswering,
    YosoForSequenceClassification,
    YosoForTokenClassification,
)
from yoso_jax.modeling.model import YosoModel
from yoso_jax.modeling.outputs import BaseModelOutput, LogitsOutput, QuestionAnsweringOutput

__all__ = [
    "BaseModelOutput",
    "LogitsOutput",
    "QuestionAnsweringOutput",
    "YosoForMaskedLM",
    "YosoForMultipleChoice",
    "YosoForQuestionAnswering",
    "YosoForSequenceClassification",
    "YosoForTokenClassification",
    "YosoModel",
]
