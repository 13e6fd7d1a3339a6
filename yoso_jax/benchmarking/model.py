"""Benchmark of a whole model."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from yoso_jax.benchmarking.base import Benchmark, Case
from yoso_jax.benchmarking.report import Row
from yoso_jax.config import YosoConfig
from yoso_jax.errors import ConfigError
from yoso_jax.modeling.heads import YosoForMaskedLM


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

    def build(self, m: int | None) -> YosoForMaskedLM:
        """A model with sampled attention, or with attention in expectation where m is None."""
        try:
            config = YosoConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                intermediate_size=4 * self.hidden_size,
                max_position_embeddings=max(self.n),
                use_expectation=m is None,
                num_hash=m or 1,
                hash_code_len=self.hash_code_len,
                scan_layers=True,
                attention_implementation=self.implementation,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return YosoForMaskedLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0))

    def cases(self) -> Iterator[Case]:
        """Each n, sampled with each m and in expectation."""
        params = jax.jit(lambda: nnx.state(self.build(None)))()  # the same for all
        for n in self.n:
            assert self.tokens is not None
            shape = (self.tokens // n, n)
            for m in (*self.m, None):
                graphdef = nnx.graphdef(nnx.eval_shape(functools.partial(self.build, m)))
                name = "sampled" if m else "expectation"
                yield Case(
                    {"implementation": name, "n": n, "m": m, "batch": shape[0]},
                    functools.partial(_loss_and_gradients, graphdef),
                    functools.partial(self.make_inputs, params, shape),
                    _add_rate,
                )

    def make_inputs(self, params: Any, shape: tuple[int, int], number: int) -> tuple:
        """The parameters, ids that change with the number, and a key for the hashes."""
        key = jax.random.key(number)
        return params, jax.random.randint(key, shape, 0, self.vocab_size), key


def _loss_and_gradients(graphdef: nnx.GraphDef, params: Any, ids: Array, key: Array) -> Any:
    def loss(params: Any) -> Array:
        return nnx.merge(graphdef, params)(ids, labels=ids, rngs=nnx.Rngs(hash=key)).loss

    return jax.value_and_grad(loss)(params)


def _add_rate(row: Row) -> Row:
    return {"tokens_per_s": 1e3 * row["batch"] * row["n"] / row["wall_ms"]}
