"""Benchmark of a whole model."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from yoso_jax.benchmarking.base import Benchmark, Case, Rival
from yoso_jax.benchmarking.report import Row
from yoso_jax.benchmarking.torch_models import MODELS, Options, run
from yoso_jax.config import YosoConfig
from yoso_jax.errors import ConfigError
from yoso_jax.modeling.heads import YosoForMaskedLM

# Gradients of queries and keys, by the name of the row.
_BACKWARDS = {"sampled": "sampled", "sampled_mixed": "expectation", "sampled_bucketed": "bucketed"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Benchmark):
    """A training step of a masked language model, without the update."""

    large_n = (4096,)
    small_n = (256,)
    large_tokens = 2**13
    small_tokens = 2**9

    layers: int = 12
    """Layers of the encoder."""
    hidden_size: int = 768
    """Width of the encoder; the feed-forward blocks' is four times that."""
    heads: int = 12
    """Heads of a layer."""
    vocab_size: int = 50265
    """Words the model knows."""
    implementation: str | None = None
    """Of the attention; by default the best that applies."""
    num_backward_hashes: int | None = None
    """Hashes whose buckets give the gradients; by default what the model takes."""
    implementations: tuple[
        Literal[
            "softmax",
            "expectation",
            "sampled",
            "sampled_mixed",
            "sampled_bucketed",
            "transformers_roberta",
            "transformers_yoso",
        ],
        ...,
    ] = (
        "softmax",
        "expectation",
        "sampled",
        "sampled_mixed",
        "sampled_bucketed",
        "transformers_roberta",
        "transformers_yoso",
    )
    """What to time; speeds are those beside `softmax`, if it is among them."""

    def build(self, name: str, m: int | None) -> YosoForMaskedLM:
        """A model of this package by the name of its row."""
        backward: Any = _BACKWARDS.get(name)
        is_softmax = name == "softmax"
        implementation = self.implementation
        if is_softmax:
            implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
        try:
            config = YosoConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                intermediate_size=4 * self.hidden_size,
                max_position_embeddings=max(self.n),
                attention="softmax" if is_softmax else "yoso",
                use_expectation=m is None,
                num_hash=m or 1,
                hash_code_len=self.hash_code_len,
                attention_backward=backward,
                num_backward_hashes=self.num_backward_hashes,
                scan_layers=True,
                attention_implementation=implementation,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return YosoForMaskedLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0))

    def cases(self) -> Iterator[Case | Rival]:
        """Each n: softmax, in expectation, sampled with each m and gradient, and the rivals."""
        params = jax.jit(lambda: nnx.state(self.build("expectation", None)))()  # the same for all
        variants = [("softmax", None), ("expectation", None)]
        variants += [(name, m) for m in self.m for name in _BACKWARDS]
        for n in self.n:
            assert self.tokens is not None
            shape = (self.tokens // n, n)
            derive = functools.partial(_derive, {})
            for name, m in variants:
                if name not in self.implementations:
                    continue
                graphdef = nnx.graphdef(nnx.eval_shape(functools.partial(self.build, name, m)))
                yield Case(
                    {"implementation": name, "n": n, "m": m, "batch": shape[0]},
                    functools.partial(_loss_and_gradients, graphdef),
                    functools.partial(self.make_inputs, params, shape),
                    derive,
                )
            for name in MODELS:
                if name not in self.implementations:
                    continue
                yield Rival(
                    {"implementation": name, "n": n, "m": None, "batch": shape[0]},
                    functools.partial(self.run_rival, name, shape),
                    derive,
                )

    def run_rival(self, name: str, shape: tuple[int, int], seconds: float) -> Row:
        """Times a model of transformers."""
        sizes = (self.layers, self.hidden_size, self.heads, self.vocab_size, self.hash_code_len)
        return run(Options(name, *shape, *sizes, seconds))

    def make_inputs(self, params: Any, shape: tuple[int, int], number: int) -> tuple:
        """The parameters, ids that change with the number, and a key for the hashes."""
        key = jax.random.key(number)
        return params, jax.random.randint(key, shape, 0, self.vocab_size), key


def _loss_and_gradients(graphdef: nnx.GraphDef, params: Any, ids: Array, key: Array) -> Any:
    def loss(params: Any) -> Array:
        return nnx.merge(graphdef, params)(ids, labels=ids, rngs=nnx.Rngs(hash=key)).loss

    return jax.value_and_grad(loss)(params)


def _derive(softmax: Row, row: Row) -> Row:
    """Tokens a second, and the speed beside `softmax`, which is kept when it comes by."""
    if row["implementation"] == "softmax":
        softmax.update(row)
    rate = {"tokens_per_s": 1e3 * row["batch"] * row["n"] / row["wall_ms"]}
    return rate | ({"speed_wall": softmax["wall_ms"] / row["wall_ms"]} if softmax else {})
