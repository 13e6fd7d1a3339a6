"""Logits of a split, whole."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key, PyTree

from yoso_jax.finetuning.batches import ordered_batches
from yoso_jax.finetuning.features import Features
from yoso_jax.finetuning.task import Outputs
from yoso_jax.objective import Batch, Put
from yoso_jax.sharding import fetch, with_ambient_mesh

PredictStep = Callable[[PyTree, Batch, Key[Array, ""]], Mapping[str, Array]]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUTS = ("logits", "start_logits", "end_logits")


def make_predict_step(graphdef: nnx.GraphDef) -> PredictStep:
    """Compiles `(params, batch, hash key) -> {name: logits}`, float32."""

    @jax.jit
    @with_ambient_mesh
    def predict_step(params: PyTree, batch: Batch, key: Key[Array, ""]) -> dict[str, Array]:
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        output = nnx.merge(graphdef, params)(**inputs, rngs=nnx.Rngs(hash=key))
        names = (name for name in _OUTPUTS if hasattr(output, name))
        return {name: getattr(output, name).astype(jnp.float32) for name in names}

    return predict_step


def predict(
    step: PredictStep,
    params: PyTree,
    features: Features,
    key: Key[Array, ""],
    put: Put = dict,
    *,
    batch_size: int,
    max_length: int,
    pad_id: int,
) -> Outputs:
    """Logits of all rows.

    Args:
        step: see `make_predict_step`.
        params: the parameters.
        features: what to predict.
        key: root of the hashes, folded with the number of the batch: the same key gives the same
            result.
        put: brings a batch to the devices.
        batch_size: rows a step.
        max_length: as in `ordered_batches`.
        pad_id: as in `ordered_batches`.
    """
    batches = ordered_batches(features, batch_size=batch_size, max_length=max_length, pad_id=pad_id)
    found = [
        fetch(step(params, put(batch), jax.random.fold_in(key, number)))
        for number, batch in enumerate(batches)
    ]
    return {
        name: np.concatenate([each[name] for each in found])[: len(features)] for name in found[0]
    }
