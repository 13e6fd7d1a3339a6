"""Benchmarks of attention and of its parts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from yoso_jax import kernels
from yoso_jax.attention import sampled_attention, yoso_attention
from yoso_jax.benchmarking.base import Benchmark, Case
from yoso_jax.benchmarking.report import Row
from yoso_jax.errors import ConfigError
from yoso_jax.hashing import sample_projection
from yoso_jax.kernels.backward_choice import Backward
from yoso_jax.kernels.codes import hash_codes
from yoso_jax.kernels.mosaic_gpu import hopper
from yoso_jax.kernels.mosaic_gpu.hashing import hash_tokens

SHARED_MEMORY_BYTES_PER_SECOND = 31e12
"""Of all multiprocessors of an H100 together, measured."""

# Pairs of tokens beyond which the expectation, in quadratic time, is not timed: seconds a call.
_MOST_PAIRS_GPU, _MOST_PAIRS_CPU = 2**34, 2**28


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsBenchmark(Benchmark):
    """A benchmark of one operation on the heads of some sequences."""

    head_dim: int = 64
    """Dimensions of a head."""
    heads_per_sequence: int = 8
    """Heads N; fewer where all sequences together have fewer."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of queries, keys and values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (
            ("head-dim", self.head_dim),
            ("heads-per-sequence", self.heads_per_sequence),
        ):
            if value < 1:
                raise ConfigError(f"--{name} must be >= 1, got {value}")

    def sizes(self, n: int) -> dict[str, int]:
        """Batch rows and heads that make up about `tokens`."""
        assert self.tokens is not None
        heads = min(self.heads_per_sequence, self.tokens // n)
        return {"batch": self.tokens // n // heads, "heads": heads}

    def draw(self, n: int, number: int, count: int) -> list[Array]:
        """`[B, n, N, H]` from a normal distribution, other ones for each number of a set."""
        sizes = self.sizes(n)
        shape = (sizes["batch"], n, sizes["heads"], self.head_dim)
        # Drawn flat, so that every n shares a compiled program.
        return [
            jax.random.normal(key, (math.prod(shape),)).astype(self.dtype).reshape(shape)
            for key in jax.random.split(jax.random.key(number), count)
        ]

    def draw_projection(self, n: int, m: int, number: int) -> Array:
        """`[B, N, H, m * hash_code_len]`."""
        sizes = self.sizes(n)
        return sample_projection(
            jax.random.fold_in(jax.random.key(number), m),
            (sizes["batch"], sizes["heads"]),
            self.head_dim,
            num_hashes=m,
            hash_code_len=self.hash_code_len,
        ).astype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(HeadsBenchmark):
    """Attention as a whole, beside cuDNN's."""

    implementations: tuple[
        Literal[
            "cudnn",
            "mosaic_gpu",
            "mosaic_gpu_op",
            "mosaic_gpu_mixed",
            "mosaic_gpu_bucketed",
            "mosaic_gpu_expectation",
            "xla",
            "xla_op",
            "xla_mixed",
            "xla_bucketed",
            "xla_expectation",
        ],
        ...,
    ] = ("cudnn", "mosaic_gpu", "mosaic_gpu_op", "xla", "xla_expectation")
    """What to time; `mixed` is sampled with the gradients of the expectation, `bucketed` with those
    of buckets."""
    backward: bool = False
    """Time forward and backward pass together."""
    mask_fraction: float = 0.0
    """Part of each sequence that is padding."""
    num_backward_hashes: int | None = None
    """Hashes whose buckets give the gradients; by default what the operation takes."""
    bucket_bits: int | None = None
    """Bits of these buckets, 1 to `hash_code_len`; by default what the operation takes."""
    normalize: bool = True
    """Normalise the results of `mixed` and `bucketed`, as models do; it takes longer."""
    alike: bool = False
    """Give all queries and keys of a head about the same direction: they share a bucket."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_fraction < 1:
            raise ConfigError(f"--mask-fraction must be in [0, 1), got {self.mask_fraction}")
        if self.num_backward_hashes is not None and self.num_backward_hashes < 1:
            raise ConfigError(f"--num-backward-hashes must be >= 1, got {self.num_backward_hashes}")
        if self.bucket_bits is not None and not 1 <= self.bucket_bits <= self.hash_code_len:
            raise ConfigError(
                f"--bucket-bits must be in 1..{self.hash_code_len} (--hash-code-len), "
                f"got {self.bucket_bits}"
            )

    def cases(self) -> Iterator[Case]:
        """Each n, implementation and, where there are hashes, m."""
        for n in self.n:
            cudnn: Row = {}
            for name in self.implementations:
                unhashed = name == "cudnn" or name.endswith("_expectation")
                hashes = (None,) if unhashed else self.m
                for m in hashes:
                    yield Case(
                        {"implementation": name, "n": n, "m": m, **self.sizes(n)},
                        self.function(name, n, m),
                        functools.partial(self.make_inputs, name, n, m),
                        functools.partial(_compare, cudnn),
                    )

    def function(self, name: str, n: int, m: int | None) -> Callable[..., Any]:
        """What is timed, of query, key and value and what else `make_inputs` adds."""
        batch, heads = self.sizes(n).values()
        lengths, mask = None, None
        if self.mask_fraction:
            length = max(1, round(n * (1 - self.mask_fraction)))
            lengths = jnp.full(batch, length, jnp.int32)
            mask = jnp.broadcast_to(jnp.arange(n) < length, (batch, n))
        implementation = "mosaic_gpu" if name.startswith("mosaic_gpu") else "xla"

        if name == "cudnn":
            attend = functools.partial(
                jax.nn.dot_product_attention,
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths,
                implementation="cudnn",
            )
        elif name.endswith("_expectation"):
            limit = _MOST_PAIRS_GPU if jax.default_backend() == "gpu" else _MOST_PAIRS_CPU

            def attend(query: Array, key: Array, value: Array) -> Array:
                if batch * heads * n**2 > limit:
                    raise NotImplementedError(f"more than {limit:,} pairs of tokens")
                return yoso_attention(
                    query,
                    key,
                    value,
                    mask,
                    num_hashes=None,
                    hash_code_len=self.hash_code_len,
                    implementation=implementation,
                )
        elif name.endswith("_op"):

            def attend(query: Array, key: Array, value: Array, rng: Array) -> Array:
                return yoso_attention(
                    query,
                    key,
                    value,
                    mask,
                    rng=rng,
                    num_hashes=m,
                    hash_code_len=self.hash_code_len,
                    implementation=implementation,
                )
        else:

            def attend(query: Array, key: Array, value: Array, projection: Array) -> Array:
                return sampled_attention(
                    query,
                    key,
                    value,
                    projection,
                    mask,
                    mask,
                    hash_code_len=self.hash_code_len,
                    backward=_backward(name),
                    num_backward_hashes=(
                        self.num_backward_hashes if name.endswith("_bucketed") else None
                    ),
                    bucket_bits=self.bucket_bits if name.endswith("_bucketed") else None,
                    normalize=self.normalize and name.endswith(("_mixed", "_bucketed")),
                    implementation=implementation,
                )

        return _with_gradients(attend) if self.backward else attend

    def make_inputs(self, name: str, n: int, m: int | None, number: int) -> tuple:
        """Query, key, value, with `--backward` a cotangent, and what hashes are made from."""
        inputs = self.draw(n, number, 4 if self.backward else 3)
        if self.alike:
            inputs[:2] = [inputs[0][:, :1] + x / 256 for x in inputs[:2]]
        if name.endswith("_op"):
            inputs.append(jax.random.key(number))
        elif m is not None:
            inputs.append(self.draw_projection(n, m, number))
        return tuple(inputs)


def _with_gradients(attend: Callable[..., Array]) -> Callable[..., Any]:
    def run(query: Array, key: Array, value: Array, cotangent: Array, *rest: Array) -> Any:
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, *rest), query, key, value)
        return out, pullback(cotangent)

    return run


def _backward(name: str) -> Backward:
    if name.endswith("_bucketed"):
        return "bucketed"
    return "expectation" if name.endswith("_mixed") else "sampled"


def _compare(cudnn: Row, row: Row) -> Row:
    """The speed beside `cudnn`, which is kept when it comes by."""
    if row["implementation"] == "cudnn":
        cudnn.update(row)
    if not cudnn:
        return {}
    speed = {"speed_wall": cudnn["wall_ms"] / row["wall_ms"]}
    if row["device_ms"]:
        speed["speed_device"] = cudnn["device_ms"] / row["device_ms"]
    return speed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hash(HeadsBenchmark):
    """The codes of the tokens of all heads."""

    def cases(self) -> Iterator[Case]:
        """Each n, m and implementation."""
        for n in self.n:
            for m in self.m:
                for name, function in (("mosaic_gpu", self.hash_mosaic), ("xla", self.hash_xla)):
                    row = {"implementation": name, "n": n, "m": m, **self.sizes(n)}
                    make_inputs = functools.partial(self.make_inputs, n, m)
                    yield Case(row, function, make_inputs, self.derive)

    def make_inputs(self, n: int, m: int, number: int) -> tuple:
        """Tokens `[B, n, N, H]` and a projection."""
        return *self.draw(n, number, 1), self.draw_projection(n, m, number)

    def hash_mosaic(self, x: Array, projection: Array) -> Array:
        """The codes in the arrangement of the kernels."""
        code_len = self.hash_code_len
        return hash_tokens(hopper.only(x), projection, hash_code_len=code_len, filler=0)

    def hash_xla(self, x: Array, projection: Array) -> Array:
        """The codes `[B, N, n, m]`."""
        wide = (a.astype(jnp.float32) for a in (jnp.swapaxes(x, 1, 2), projection))
        return hash_codes(*wide, hash_code_len=self.hash_code_len)

    def derive(self, row: Row) -> Row:
        """Rates, of the device time where there is one."""
        seconds = 1e-3 * (row["device_ms"] or row["wall_ms"])
        vectors = row["batch"] * row["heads"] * row["n"]
        flops = 2 * vectors * self.head_dim * row["m"] * self.hash_code_len
        size = row["argument_bytes"] + row["output_bytes"]
        return {
            "flops": flops,
            "bytes": size,
            "tflop_per_s": flops / seconds / 1e12,
            "gb_per_s": size / seconds / 1e9,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cumulation(HeadsBenchmark):
    """The cumulation of values by given codes, and its gradient."""

    def cases(self) -> Iterator[Case]:
        """Each n, m, implementation and direction."""
        for n in self.n:
            for m in self.m:
                for name in ("mosaic_gpu", "xla"):
                    for direction in ("forward", "grad_value"):
                        row = {"implementation": name, "direction": direction, "n": n, "m": m}
                        yield Case(
                            row | self.sizes(n),
                            functools.partial(self.cumulate, name, direction),
                            functools.partial(self.make_inputs, n, m),
                            self.derive,
                        )

    def make_inputs(self, n: int, m: int, number: int) -> tuple:
        """Codes of queries and keys `[B, N, n, m]`, and values or cotangents `[B, N, n, D]`."""
        sizes = self.sizes(n)
        shape = (sizes["batch"], sizes["heads"], n, m)
        codes = (
            jax.random.randint(key, (math.prod(shape),), 0, 2**self.hash_code_len).reshape(shape)
            for key in jax.random.split(jax.random.key(number))
        )
        (value,) = self.draw(n, number, 1)
        return *codes, value.reshape(*shape[:3], self.head_dim)

    def cumulate(
        self, name: str, direction: str, query_codes: Array, key_codes: Array, value: Array
    ) -> Array:
        """`B v`, or its pullback of a cotangent `value`."""

        def apply(value: Array) -> Array:
            return kernels.lsh_cumulation(
                query_codes,
                key_codes,
                value,
                hash_code_len=self.hash_code_len,
                implementation=name,
            )

        if direction == "forward":
            return apply(value)
        # Linear in the value: the forward pass falls away.
        return jax.vjp(apply, jnp.zeros_like(value))[1](value)[0]

    def derive(self, row: Row) -> Row:
        """The floor of shared memory, and how near the device time comes to it."""
        rows = row["batch"] * row["heads"] * 2 * row["n"] * row["m"]
        floor = 1e3 * rows * self.head_dim * 2 / SHARED_MEMORY_BYTES_PER_SECOND
        derived = {"floor_ms": floor}
        if row["device_ms"]:
            derived["floor_fraction"] = floor / row["device_ms"]
            kernel = sum(ms for name, ms in row["kernels"].items() if "lsh_cumulation" in name)
            if kernel:
                derived["kernel_floor_fraction"] = floor / kernel
        return derived
