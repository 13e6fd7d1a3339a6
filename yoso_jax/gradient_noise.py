"""How far estimates of the gradients of queries and keys are from the expectation's, in a model.

What is compared are gradients of one attention layer for the same queries, keys, values and the
same gradient of its sums, as they are in a step of training: see `capture`. A row of a result has

- `run`, `step`: of the checkpoint;
- `n`: tokens of a sequence, of all of them padding too;
- `estimator`: `sampled` or `bucketed`, with `num_hashes` of the estimate;
- `bucket_bits` and `bucket_tokens`, `n / 2**bucket_bits`, of buckets;
- `noise_query`, `noise_key`: the root of the mean square of the difference over that of the
  expectation's gradient;
- `cosine_query`, `cosine_key`: mean cosine of the angle between the two.

Means are over layers, sequences and draws of the hashes. There is no noise where `bucketed` takes
all pairs, because they are less work than the buckets of all hashes (docs/gradients.md).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, PyTree

from yoso_jax.attention import l2_normalize, yoso_attention
from yoso_jax.errors import ConfigError
from yoso_jax.hashing import HashFn
from yoso_jax.kernels.codes import BitLayout
from yoso_jax.modeling import layers
from yoso_jax.objective import Batch, HostBatch, Objective

type Row = dict[str, Any]

_OPTIONS = ("hash_code_len", "num_hashes", "hash_fn", "bit_layout")


@dataclasses.dataclass(frozen=True)
class Captured:
    """What one attention layer saw, [B, T, N, H], and what came back.

    Attributes:
      query: queries.
      key: keys.
      value: values.
      mask: True for tokens; None if there is no padding.
      gradient: of the loss by the layer's sums, before they are normalised.
      hash_code_len: bits of its hashes.
      num_hashes: of the forward pass.
      hash_fn: kind of its hashes.
      bit_layout: of those.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T N H"]
    value: Float[Array, "B T N D"]
    mask: Bool[Array, "B T"] | None
    gradient: Float[Array, "B T N D"]
    hash_code_len: int
    num_hashes: int
    hash_fn: HashFn
    bit_layout: BitLayout


def capture(
    objective: Objective, params: PyTree, batch: HostBatch, key: Key[Array, ""]
) -> list[Captured]:
    """Takes a training step apart.

    Args:
        objective: gives model and loss.
        params: the parameters.
        batch: what to train on.
        key: root of dropout and hashes.

    Returns:
        What each layer saw, from the first to the last.

    Raises:
        ConfigError: the model has no sampled attention, or scans or rematerialises its layers.
    """
    calls: list[tuple[Any, ...]] = []

    def loss(
        perturbations: list[Array], params: PyTree, batch: Batch, key: Array
    ) -> tuple[Array, list[tuple[Any, ...]]]:
        calls.clear()
        model = nnx.merge(objective.make_graphdef(), params)
        hash_key, dropout_key = jax.random.split(key)
        with _replace_attention(calls, perturbations):
            rngs = nnx.Rngs(hash=hash_key, dropout=dropout_key)
            return objective.loss(model, batch, rngs)[0], [call[:4] for call in calls]

    args = params, batch, key
    jax.eval_shape(lambda *args: loss([], *args)[0], *args)  # tells the shapes
    if not calls:
        raise ConfigError("gradient noise is that of sampled attention, which the run has none of")
    try:
        zeros = [jnp.zeros(value.shape, value.dtype) for _, _, value, *_ in calls]
        gradients, seen = jax.jit(jax.grad(loss, has_aux=True))(zeros, *args)
    except jax.errors.UnexpectedTracerError as error:
        raise ConfigError("layers must be looped over: scan_layers and remat off") from error
    return [
        Captured(*arrays, gradient=gradient, **{name: options[name] for name in _OPTIONS})
        for arrays, gradient, (*_, options) in zip(seen, gradients, calls, strict=True)
    ]


@contextlib.contextmanager
def _replace_attention(
    calls: list[tuple[Any, ...]], perturbations: Sequence[Array]
) -> Iterator[None]:
    """While entered, attention notes its arguments, and adds to its sums what is given to it."""

    def attention(query: Array, key: Array, value: Array, mask: Any, **options: Any) -> Array:
        sums = yoso_attention(query, key, value, mask, **options, normalize=False)
        if perturbations:
            sums = sums + perturbations[len(calls)]
        if options["num_hashes"] is not None:
            calls.append((query, key, value, mask, options))
        return l2_normalize(sums)

    with mock.patch.object(layers, "yoso_attention", attention):
        yield


@functools.partial(jax.jit, static_argnames="options")
def _gradients(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    gradient: Array,
    rng: Array,
    options: tuple[tuple[str, Any], ...],
) -> tuple[Array, Array]:
    def attend(query: Array, key: Array) -> Array:
        return yoso_attention(
            query,
            key,
            value,
            mask,
            rng=rng,
            normalize=False,
            **dict(options),
        )

    found = jax.vjp(attend, query, key)[1](gradient)
    return found[0].astype(jnp.float32), found[1].astype(jnp.float32)


def measure(
    captured: Sequence[Captured],
    num_backward_hashes: Sequence[int],
    bucket_tokens: Sequence[int],
    samples: int,
    key: Key[Array, ""],
) -> list[Row]:
    """Compares estimates with the expectation.

    Args:
        captured: see `capture`.
        num_backward_hashes: of buckets, each at most the hashes of the forward pass.
        bucket_tokens: tokens of a bucket on average; rounded to what a number of bits gives.
        samples: draws of the hashes, >= 1.
        key: of the hashes.

    Returns:
        A row of what the module's documentation names, but for the run, for each estimate.
    """
    first = captured[0]
    n = first.query.shape[1]
    estimates: list[tuple[Row, dict[str, Any]]] = [
        ({"estimator": "sampled", "num_hashes": first.num_hashes}, {"backward": "sampled"})
    ]
    for tokens in bucket_tokens:
        bits = min(max(round(np.log2(n / tokens)), 0), first.hash_code_len)
        for number in num_backward_hashes:
            estimates.append(
                (
                    {
                        "estimator": "bucketed",
                        "num_hashes": number,
                        "bucket_bits": bits,
                        "bucket_tokens": n / 2**bits,
                    },
                    {
                        "backward": "bucketed",
                        "num_backward_hashes": number,
                        "bucket_bits": bits,
                    },
                )
            )
    rows = []
    for row, options in estimates:
        errors = [_compare(each, options, samples, key) for each in captured]
        names = ("query", "key")
        noise = {
            f"noise_{name}": float(np.sqrt(np.mean([each[i][0] for each in errors])))
            for i, name in enumerate(names)
        }
        cosine = {
            f"cosine_{name}": float(np.mean([each[i][1] for each in errors]))
            for i, name in enumerate(names)
        }
        rows.append({"n": n, **row, **noise, **cosine})
    return rows


def _compare(
    layer: Captured, options: dict[str, Any], samples: int, key: Key[Array, ""]
) -> list[tuple[float, float]]:
    """Of query and key: squared relative error and cosine, over sequences and draws."""
    found: list[list[tuple[float, float]]] = [[], []]
    for row in range(layer.query.shape[0]):
        arrays = tuple(
            None if array is None else array[row : row + 1]
            for array in (layer.query, layer.key, layer.value, layer.mask, layer.gradient)
        )
        same = {name: getattr(layer, name) for name in _OPTIONS}
        exact = _gradients(*arrays, key, tuple({**same, "backward": "expectation"}.items()))
        for sample in range(samples):
            rng = jax.random.fold_in(jax.random.fold_in(key, row), sample)
            estimate = _gradients(*arrays, rng, tuple({**same, **options}.items()))
            for results, a, b in zip(found, estimate, exact, strict=True):
                size = float(jnp.linalg.norm(b))
                if size > 0:
                    error = float(jnp.linalg.norm(a - b)) / size
                    cosine = float(jnp.vdot(a, b) / jnp.maximum(jnp.linalg.norm(a) * size, 1e-30))
                    results.append((error**2, cosine))
    return [tuple(np.mean(results, axis=0)) for results in found]
