"""Loads a checkpoint as the model it is."""

import os
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from yoso_jax.config import EncoderConfig
from yoso_jax.conversion.load import load
from yoso_jax.conversion.positions import PositionExtension
from yoso_jax.lra import LRAClassifier
from yoso_jax.modeling import (
    YosoForMaskedLM,
    YosoForMultipleChoice,
    YosoForQuestionAnswering,
    YosoForSequenceClassification,
    YosoForTokenClassification,
    YosoModel,
)
from yoso_jax.modeling.base import PretrainedModel

ARCHITECTURES = (
    YosoModel,
    YosoForMaskedLM,
    YosoForSequenceClassification,
    YosoForTokenClassification,
    YosoForMultipleChoice,
    YosoForQuestionAnswering,
    LRAClassifier,
)


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    config: EncoderConfig | str | os.PathLike[str] | None = None,
    position_extension: PositionExtension | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs | None = None,
    **overrides: Any,
) -> PretrainedModel:
    """Loads a model of the class that a checkpoint's configuration or else its keys name.

    The arguments, errors and warnings are those of `PretrainedModel.from_pretrained`.

    Returns:
        One of the classes of `ARCHITECTURES`.

    Raises:
        ValueError: also if the configuration names another architecture.
    """
    return load(
        ARCHITECTURES,
        path,
        config=config,
        position_extension=position_extension,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        **overrides,
    )
