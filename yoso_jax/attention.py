"""YOSO attention: exact collision probabilities, or Bernoulli samples of them by hashing."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.attention_inputs import (
    check_arrays,
    check_backward,
    check_choices,
    check_mask,
    make_masks,
)
from yoso_jax.batch_sharding import map_batch
from yoso_jax.hashing import HashFn, sample_projection
from yoso_jax.kernels import dispatch
from yoso_jax.kernels.backward_choice import Backward, BackwardPlan, plan
from yoso_jax.kernels.checks import check_integer
from yoso_jax.kernels.codes import BitLayout
from yoso_jax.kernels.dispatch import Implementation
from yoso_jax.kernels.mosaic_gpu import hopper
from yoso_jax.kernels.xla import l2_normalize as l2_normalize


def yoso_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    mask: Bool[Array, "B S"] | None = None,
    *,
    rng: Array | None = None,
    num_hashes: int | None = 32,
    hash_code_len: int = 9,
    query_mask: Bool[Array, "B T"] | None = None,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    hash_fn: HashFn = "gaussian",
    bit_layout: BitLayout = "spread",
    backward: Backward | None = "sampled",
    num_backward_hashes: int | None = None,
    bucket_bits: int | None = None,
    normalize: bool = True,
    implementation: Implementation = None,
    batch_axes: Sequence[str] = (),
) -> Float[Array, "B T N D"]:
    """Attention by collisions of sign hashes (YOSO, arXiv 2111.09714).

    A query attends to a key with the probability that their `hash_code_len`-bit hashes collide,
    `E = (1 - arccos(q.k / |q||k|) / pi) ** hash_code_len` (paper, eq. 3). With `num_hashes=None`
    the result is `E v` exactly (YOSO-E), in quadratic time and linear memory. Otherwise E is
    replaced by the fraction of `num_hashes` random hashes that collide (YOSO-m, paper, section
    3.1), in linear time. Then each row is divided by its l2 norm.

    Gradients of query and key are the paper's surrogate (section 3.3), which replaces `dE/dcos` by
    `hash_code_len / 2 * E` and is finite for parallel vectors; the gradient of value is exact.

    Args:
      query: `[B, T, N, H]`, float32, bfloat16, float16 (or float64). Its length does not matter.
      key: `[B, S, N, H]`, same dtype.
      value: `[B, S, N, D]`, same dtype.
      mask: bool `[B, S]`, True for the keys to attend to. When T == S and `query_mask` is not
        given, it masks the queries also, as self-attention over padded rows needs.
      rng: key of the hashes; required unless `num_hashes` is None. The same key gives the same
        hashes in every implementation and sharding, for arrays of the same dtype: projections are
        rounded to it. Batch rows and heads have their own.
      num_hashes: number of hashes, at least 1, or None for the expectation.
      hash_code_len: bits of a hash, 1 to 16; more bits concentrate attention.
      query_mask: bool `[B, T]`, True for the queries that attend. Other rows of the result are
        zero.
      query_seq_lengths: integers `[B]`; queries from this position on are masked.
      key_value_seq_lengths: integers `[B]`; keys from this position on are masked.
      hash_fn: "gaussian" projections, or "fast" ones of random signs and Hadamard transforms.
      bit_layout: "spread" (unbiased) or "block" (as published), with `hash_fn="fast"`.
      backward: gradients of query and key of a sampled forward pass. "sampled": over the pairs
        that collide in the same hashes. "expectation": over all pairs, in quadratic time, with the
        least noise. "bucketed": over the pairs that collide in the first bits of some hashes, each
        weighted by the probability that the other bits agree; in linear time. None: the fastest
        for the shapes and JAX's default device, as measured; of two about as fast the less noisy.
      num_backward_hashes: hashes that "bucketed" uses, 1 to `num_hashes`; None for at most 8.
        More hashes, less noise and more time. They are the first of the forward pass; for
        normalised rows others, since the cotangents of these know the noise of their own.
      bucket_bits: bits that "bucketed" compares, 0 to `hash_code_len`; None for buckets of 256 to
        511 of the T queries or S keys, whichever are more. Fewer bits, more pairs: more time and
        less noise; 0 is the expectation.
      normalize: divide each row of the result by its l2 norm.
      implementation: "mosaic_gpu", kernels for NVIDIA's Hopper GPUs; "xla", plain JAX for every
        device; a sequence of names to try in order; or None for the best that applies. With None
        and sequences, JAX's default device decides whether "mosaic_gpu" applies: name the
        implementation to compile for another one. float32 sums of "mosaic_gpu" have about six
        digits, and it rounds gradients of its sums to the dtype of `query`.
      batch_axes: axes of type Auto of the ambient mesh (`jax.set_mesh`) that divide the batch: each
        device computes the attention of its rows, under `jax.shard_map`. Without them XLA gathers
        the batch on every device for the kernels of "mosaic_gpu". The result is the same.

    Returns:
      `[B, T, N, D]` in the dtype of `query`. Rows that attend to nothing are zero.

    Raises:
      ValueError: a shape, range or choice is not accepted, or `rng` is missing.
      TypeError: a dtype is not accepted.
      NotImplementedError: the implementation named does not support the device, a shape, the dtype
        or `num_hashes=None`. A device other than a GPU is refused when the computation is lowered,
        so that it can be lowered for a GPU elsewhere.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    check_arrays(query, key, value)
    names = dispatch.resolve(implementation)
    check_choices(num_hashes, hash_code_len, hash_fn, bit_layout)
    check_backward(backward, num_backward_hashes, bucket_bits, num_hashes, hash_code_len)
    query_mask, key_mask = make_masks(
        query, key, mask, query_mask, query_seq_lengths, key_value_seq_lengths
    )
    if num_hashes is None:
        options = _Options(hash_code_len, None, normalize, names)
        attend = functools.partial(_expectation, options)
        out = map_batch(attend, batch_axes, query, key, value, query_mask, key_mask)
    else:
        if rng is None:
            raise ValueError("rng is required unless num_hashes is None: pass a jax.random.key.")
        draw = _Draw(
            (query.shape[0], query.shape[2]),
            query.shape[-1],
            num_hashes,
            hash_code_len,
            hash_fn,
            bit_layout,
            query.dtype.name,
        )
        chosen = plan(
            backward,
            num_backward_hashes,
            bucket_bits,
            num_hashes=num_hashes,
            hash_code_len=hash_code_len,
            num_tokens=max(query.shape[1], key.shape[1]),
            is_biased=hash_fn == "fast" and bit_layout == "block",
            platform=hopper.default_device().platform,
        )
        options = _Options(hash_code_len, chosen, normalize, names, draw, tuple(batch_axes))
        out = _sampled(options, rng, query, key, value, query_mask, key_mask)
    return out.astype(query.dtype)


def sampled_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    projection: Float[Array, "B N H columns"],
    query_mask: Bool[Array, "B T"] | None = None,
    key_mask: Bool[Array, "B S"] | None = None,
    *,
    hash_code_len: int,
    backward: Backward | None = "sampled",
    num_backward_hashes: int | None = None,
    bucket_bits: int | None = None,
    normalize: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B T N D"]:
    """What `yoso_attention` computes once its hashes are drawn.

    Args:
      query: `[B, T, N, H]`, float32, bfloat16, float16 (or float64).
      key: `[B, S, N, H]`, same dtype.
      value: `[B, S, N, D]`, same dtype.
      projection: from `hashing.sample_projection`, rounded to the dtype of `query`; a constant to
        differentiation. Column `h * hash_code_len + i` is bit i of hash h.
      query_mask: bool `[B, T]`, True for the queries that attend. Other rows of the result are
        zero.
      key_mask: bool `[B, S]`, True for the keys to attend to.
      hash_code_len: bits of a hash, 1 to 16.
      backward: as in `yoso_attention`; "bucketed" needs a projection whose bits are independent.
      num_backward_hashes: as in `yoso_attention`.
      bucket_bits: as in `yoso_attention`.
      normalize: divide each row of the result by its l2 norm.
      implementation: as in `yoso_attention`.

    Returns:
      `[B, T, N, D]` in the dtype of `query`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `yoso_attention`.
    """
    query, key, value, projection = map(jnp.asarray, (query, key, value, projection))
    check_arrays(query, key, value)
    names = dispatch.resolve(implementation)
    check_integer("hash_code_len", hash_code_len, 1, 16)
    batch, _, heads, head_dim = query.shape
    columns = projection.shape[-1] if projection.ndim else 0
    if (
        projection.shape[:-1] != (batch, heads, head_dim)
        or columns == 0
        or columns % hash_code_len
        or not jnp.issubdtype(projection.dtype, jnp.floating)
    ):
        raise ValueError(
            f"projection must be floating point of shape [B={batch}, N={heads}, H={head_dim}, "
            f"num_hashes * {hash_code_len}], got {projection.dtype} of shape {projection.shape}."
        )
    num_hashes = columns // hash_code_len
    check_backward(backward, num_backward_hashes, bucket_bits, num_hashes, hash_code_len)
    query_mask = check_mask("query_mask", query_mask, query)
    key_mask = check_mask("key_mask", key_mask, key)
    chosen = plan(
        backward,
        num_backward_hashes,
        bucket_bits,
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
        num_tokens=max(query.shape[1], key.shape[1]),
        is_biased=False,
        platform=hopper.default_device().platform,
    )
    options = _Options(hash_code_len, chosen, normalize, names)
    projection = _round(projection, query.dtype)
    out = _sampled(options, projection, query, key, value, query_mask, key_mask)
    return out.astype(query.dtype)


@dataclasses.dataclass(frozen=True)
class _Draw:
    """How a key becomes a projection."""

    batch_shape: tuple[int, int]
    head_dim: int
    num_hashes: int
    hash_code_len: int
    hash_fn: HashFn
    bit_layout: BitLayout
    dtype: str

    def __call__(self, rng: Array) -> Float[Array, "B N H columns"]:
        projection = sample_projection(
            rng,
            self.batch_shape,
            self.head_dim,
            num_hashes=self.num_hashes,
            hash_code_len=self.hash_code_len,
            hash_fn=self.hash_fn,
            bit_layout=self.bit_layout,
        )
        return _round(projection, jnp.dtype(self.dtype))


def _round(projection: Array, dtype: jnp.dtype) -> Array:
    """In another dtype, to its precision: XLA would leave a conversion out that is undone later."""
    finfo = jnp.finfo(dtype)
    if finfo.nmant < jnp.finfo(projection.dtype).nmant:
        projection = lax.reduce_precision(projection, finfo.nexp, finfo.nmant)
    return projection.astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Options:
    hash_code_len: int
    backward: BackwardPlan | None
    normalize: bool
    implementations: tuple[str, ...]
    draw: _Draw | None = None
    batch_axes: tuple[str, ...] = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expectation(options: _Options, *args: Any) -> Array:
    """`E v` of query, key, value and their masks, its rows normalised if so chosen.

    At least float32, or in the dtype of `value`.
    """
    return _expect(options, *args)[0]


def _expect(options: _Options, *args: Any) -> tuple[Array, Array | None]:
    return dispatch.call(
        "expectation",
        options.implementations,
        *args,
        hash_code_len=options.hash_code_len,
        normalize=options.normalize,
    )


def _expectation_fwd(options: _Options, *args: Any) -> tuple:
    out, norm = _run_once(_expect(options, *args))
    return out, (out if options.normalize else None, norm, *args)


def _expectation_bwd(options: _Options, residuals: tuple, grad_out: Array) -> tuple:
    unit, norm, *args = residuals
    grads = dispatch.call(
        "expectation_backward",
        options.implementations,
        *args,
        grad_out,
        unit,
        norm,
        hash_code_len=options.hash_code_len,
    )
    return *grads, None, None


_expectation.defvjp(_expectation_fwd, _expectation_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sampled(options: _Options, source: Array, *args: Any) -> Array:
    """`B v` of query, key, value and their masks, its rows normalised if so chosen.

    `source` is a projection, or with `options.draw` the key that it is drawn with, once for each
    pass: a key is all there is to keep in between. It is drawn for the whole batch, whatever
    devices that is on. Dtypes are those of `_expectation`.
    """
    return _sample(options, source, *args)[0]


def _sample(options: _Options, source: Array, *args: Any) -> tuple[Array, Array | None, Any]:
    sample = functools.partial(
        dispatch.call,
        "sampled",
        options.implementations,
        hash_code_len=options.hash_code_len,
        normalize=options.normalize,
        # For the time of short sequences; the memory of long ones, whose gradients are of hashes.
        keep_codes=options.backward is not None and options.backward.kind == "expectation",
    )
    projection = source if options.draw is None else options.draw(source)
    query, key, value, *masks = args
    return map_batch(sample, options.batch_axes, query, key, value, projection, *masks)


def _sampled_fwd(options: _Options, source: Array, *args: Any) -> tuple:
    out, norm, codes = _run_once(_sample(options, source, *args))
    return out, (source, *args, codes, out if options.normalize else None, norm)


def _sampled_bwd(options: _Options, residuals: tuple, grad_out: Array) -> tuple:
    source, query, key, value, *others = residuals
    assert options.backward is not None
    backward = functools.partial(
        dispatch.call,
        "sampled_backward",
        options.implementations,
        hash_code_len=options.hash_code_len,
        backward=options.backward.kind,
        num_backward_hashes=options.backward.num_hashes,
        bucket_bits=options.backward.bucket_bits,
    )
    if options.draw is None:
        projection = source
    else:
        # Or else XLA would find that the forward pass drew the same, and keep it.
        source, grad_out = lax.optimization_barrier((source, grad_out))
        projection = options.draw(source)
    args = query, key, value, projection, *others, grad_out
    grads = map_batch(backward, options.batch_axes, *args)
    return None, *grads, None, None


_sampled.defvjp(_sampled_fwd, _sampled_bwd)


def _run_once[Results](results: Results) -> Results:
    """The same.

    In a loop over layers XLA for GPUs lets a kernel write what the backward pass needs into the
    array of all layers, and runs it a second time for what the layer goes on with
    (`yoso_jax.compiling` says how to turn that off). It does not find kernels behind a barrier.
    """
    return lax.optimization_barrier(results)
