"""The operations that have kernels for Hopper, in the form that `dispatch` calls."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from yoso_jax.kernels import effects, xla
from yoso_jax.kernels.mosaic_gpu import buckets, cumulation, hashing, hopper, layout
from yoso_jax.kernels.mosaic_gpu.expectation import attend, means
from yoso_jax.kernels.mosaic_gpu.expectation_backward import gradients
from yoso_jax.kernels.mosaic_gpu.expectation_tiles import MAX_DIM
from yoso_jax.kernels.mosaic_gpu.hashes import Hashes, plain_codes
from yoso_jax.kernels.mosaic_gpu.tangents import COLUMNS, tangents
from yoso_jax.kernels.mosaic_gpu.varying import vary_like
from yoso_jax.kernels.numbering import number_bits, number_codes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Kept:
    """What `sampled` keeps for its backward pass: arranged codes of queries and of keys, or None.

    Codes take two bytes a token and hash, and a hundredth of a training step of a model to compute
    again.
    """

    codes: tuple[Array, Array] | None


def sampled(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    projection: Float[Array, "B N H columns"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    *,
    hash_code_len: int,
    normalize: bool,
    keep_codes: bool,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None, Kept]:
    """As `xla.sampled`, with the rows in the dtype of `value`; norms are float32.

    Raises:
      NotImplementedError: there are no kernels for the device, a shape or the dtype.
    """
    hashes = Hashes(projection, hash_code_len)
    _check(value, hashes.number, hash_code_len, query.shape[1] + key.shape[1])
    _check_size("the last dimension of query", query.shape[-1], hashing.MAX_HEAD_DIM)
    codes = hashes.both(hopper.only(query), hopper.only(key))
    out = _cumulate(
        *codes,
        value,
        query_mask,
        key_mask,
        num_hashes=hashes.number,
        hash_code_len=hashes.table_bits(query, key),
        normalize=normalize,
    )
    out, norm = out if normalize else (out, None)
    return out, norm, Kept(codes if keep_codes else None)


def sampled_backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    projection: Float[Array, "B N H columns"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    kept: object,
    unit: Float[Array, "B T N D"] | None,
    norm: Float[Array, "B T N"] | None,
    grad_out: Float[Array, "B T N D"],
    *,
    hash_code_len: int,
    backward: str,
    num_backward_hashes: int,
    bucket_bits: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"], Float[Array, "B S N D"]]:
    """As `xla.sampled_backward`, with a kernel for the gradient of value.

    The others are by `xla` if they are of all hashes, in float32, or of shapes without a kernel.

    Raises:
      NotImplementedError: the forward pass was that of another implementation.
    """
    if not isinstance(kept, Kept):
        raise NotImplementedError(f"mosaic_gpu kept no {type(kept).__name__}.")
    hashes = Hashes(projection, hash_code_len)
    args = query, key, value, query_mask, key_mask
    codes = kept.codes or hashes.both(query, key)
    batch, _, heads, _ = query.shape
    table_bits = hashes.table_bits(query, key)

    def plain(codes: tuple[Array, Array], num_hashes: int, code_len: int) -> list[Array]:
        options = dict(num_hashes=num_hashes, hash_code_len=code_len)
        return [plain_codes(x, **options).reshape(batch, heads, -1, num_hashes) for x in codes]

    if backward == "sampled":
        if unit is not None and norm is not None:
            (grad_out,) = _before_normalizing(grad_out, unit, norm)
        args = *args, grad_out
        grads = xla.surrogate_gradients(
            xla.Codes(*plain(codes, hashes.number, table_bits)),
            *args,
            hash_code_len=hash_code_len,
        )[:2]
    else:
        rows, balance, options = grad_out, None, dict(num_hashes=hashes.number)
        # Without bits there is one bucket, whatever the hash.
        number = num_backward_hashes if bucket_bits else 1
        near_codes, near_bits, others = codes, table_bits, None
        if unit is not None and norm is not None:
            scale = effects.collision_scales(unit, norm, value, key_mask, **options)
            grad_out, rows = _before_normalizing(grad_out, unit, norm, 1 / scale)
            balance = functools.partial(
                effects.balance, norm=norm, value=value, key_mask=key_mask, **options
            )
            if bucket_bits:
                others = hashes.others(number, bucket_bits)
        elif bucket_bits and hash_code_len > layout.MAX_CODE_LEN:
            # Numbers of codes have not their first bits.
            others = hashes.first(number, bucket_bits)
        if others is not None:
            near_codes, near_bits = others.both(query, key), others.table_bits(query, key)
        near = _Near(
            plain(near_codes, number, near_bits),
            (*args, rows.astype(value.dtype)),
            balance,
            hash_code_len,
            bucket_bits,
        )
        grads = near.gradients()
    grad_value = _cumulate(
        *codes[::-1],
        grad_out,
        key_mask,
        query_mask,
        num_hashes=hashes.number,
        hash_code_len=table_bits,
    )
    return *grads, grad_value


def expectation(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    *,
    hash_code_len: int,
    normalize: bool,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T N"] | None]:
    """As `xla.expectation`, with the rows in the dtype of `value`.

    Raises:
      NotImplementedError: there is no kernel for the device, a shape or the dtype.
    """
    _check_expectation(query, value)
    args = hopper.only(query), key, value, query_mask, key_mask
    out = attend(*args, hash_code_len=hash_code_len, normalize=normalize)
    return jax.tree.map(lambda x: vary_like(x, *args), out)


def expectation_backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N D"],
    query_mask: Bool[Array, "B T"] | None,
    key_mask: Bool[Array, "B S"] | None,
    grad_out: Float[Array, "B T N D"],
    unit: Float[Array, "B T N D"] | None,
    norm: Float[Array, "B T N"] | None,
    *,
    hash_code_len: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"], Float[Array, "B S N D"]]:
    """As `xla.expectation_backward`.

    Raises:
      NotImplementedError: there is no kernel for the device, a shape or the dtype.
    """
    _check_expectation(query, value)
    if unit is not None and norm is not None:
        (grad_out,) = _before_normalizing(grad_out, unit, norm)
    grad_out = grad_out.astype(value.dtype)
    args = hopper.only(query), key, value, query_mask, key_mask, grad_out, None
    return _gradients(*args, hash_code_len=hash_code_len)


def _before_normalizing(grad_unit: Array, unit: Array, *norms: Array) -> list[Array]:
    """Gradients of rows before they were normalised, for each of some norms."""
    # `tangents` takes no others.
    if unit.dtype == jnp.float32 or unit.shape[-1] % COLUMNS:
        return [xla.l2_normalize_gradient(unit, norm, grad_unit) for norm in norms]
    grads = tangents(grad_unit.astype(unit.dtype)[None], unit, None, norms=norms)
    return [vary_like(grad, grad_unit, unit, *norms) for grad in grads]


def _gradients(*args: Any, **options: Any) -> Any:
    out = gradients(*args, deterministic=hopper.wants_same_bits(), **options)
    return jax.tree.map(lambda x: vary_like(x, *args), out)


def _expected_gradients(*args: Any, hash_code_len: int) -> tuple[Array, Array]:
    """As `xla.expected_gradients`, for what there are kernels for."""
    *inputs, rows, shift = args
    options = dict(hash_code_len=hash_code_len, with_value=False)
    return _gradients(*inputs, rows.astype(inputs[2].dtype), shift, **options)[:2]


@dataclasses.dataclass(frozen=True)
class _Near:
    """What is in the same buckets, by kernels or, where there are none, by `xla`.

    Attributes:
      codes: of queries and of keys.
      args: query, key, value, their masks, and rows in the dtype of `value`.
      balance: makes the shift of `xla.expected_gradients` from means and counts; or None.
      hash_code_len: bits of a hash.
      bucket_bits: bits of a bucket.
    """

    codes: Sequence[Array]
    args: tuple[Any, ...]
    balance: Callable[[Array, Array], Array] | None
    hash_code_len: int
    bucket_bits: int

    def gradients(self) -> tuple[Array, Array]:
        """As `xla.bucketed_gradients`; where there is one bucket, `xla.expected_gradients`."""
        query, key, value, *_ = self.args
        options = dict(hash_code_len=self.hash_code_len)
        if self.bucket_bits == 0:
            all_args: Any = *self.args, self._shift(None)
            if value.dtype == jnp.float32:
                return xla.expected_gradients(*all_args, **options)
            return _expected_gradients(*all_args, **options)
        found = self._find()
        if found is None:
            args: Any = *self.codes, *self.args, self._shift(None)
            return xla.bucketed_gradients(*args, **options, bucket_bits=self.bucket_bits)

        def of_buckets() -> tuple[Array, Array]:
            grads = buckets.gradients(found, query, key, self._shift(found), **options)
            return self._vary(grads)

        def of_all_pairs() -> tuple[Array, Array]:
            codes = [x[..., :1] for x in self.codes]
            return self._vary(dataclasses.replace(self, codes=codes, bucket_bits=0).gradients())

        return lax.cond(self._vary(buckets.are_uneven(found)), of_all_pairs, of_buckets)

    def _find(self) -> buckets.Buckets | None:
        query, _, value, *_ = self.args
        if not buckets.is_supported(query, value, self.bucket_bits):
            return None
        options = dict(hash_code_len=self.hash_code_len, bucket_bits=self.bucket_bits)
        return buckets.find(*self.codes, *self.args, **options)

    def _shift(self, found: buckets.Buckets | None) -> Array | None:
        if self.balance is None:
            return None
        if found is not None:
            return self.balance(*self._vary(buckets.means(found)))
        options = dict(hash_code_len=self.hash_code_len)
        if self.bucket_bits == 0 and self.args[2].dtype != jnp.float32:
            return self.balance(*self._vary(means(*self.args, **options)))
        args: Any = *self.codes, *self.args
        return self.balance(*xla.bucket_means(*args, **options, bucket_bits=self.bucket_bits))

    def _vary[Arrays](self, arrays: Arrays) -> Arrays:
        return jax.tree.map(lambda x: vary_like(x, *self.args, *self.codes), arrays)


def _check_expectation(query: Array, value: Array) -> None:
    hopper.check()
    if value.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"mosaic_gpu needs bfloat16 or float16 arrays for the expectation, got {value.dtype}."
        )
    for name, x in (("query", query), ("value", value)):
        _check_size(f"the last dimension of {name}", x.shape[-1], MAX_DIM)


def lsh_cumulation(
    query_codes: Int[Array, "*batch T m"],
    key_codes: Int[Array, "*batch S m"],
    value: Float[Array, "*batch S D"],
    query_mask: Bool[Array, "*batch T"] | None,
    key_mask: Bool[Array, "*batch S"] | None,
    *,
    hash_code_len: int,
) -> Float[Array, "*batch T D"]:
    """As `xla.lsh_cumulation`.

    Raises:
      NotImplementedError: there is no kernel for the device, a shape or the dtype.
    """
    num_queries, num_hashes = query_codes.shape[-2:]
    *batch, num_keys, value_dim = value.shape
    _check(value, num_hashes, hash_code_len, num_queries + num_keys)
    if 0 in (*batch, num_queries, num_keys):
        raise NotImplementedError("mosaic_gpu needs at least one query and one key.")
    heads = math.prod(batch)
    query_codes = query_codes.reshape(heads, num_queries, num_hashes)
    key_codes = key_codes.reshape(heads, num_keys, num_hashes)
    if hash_code_len > layout.MAX_CODE_LEN:
        query_codes, key_codes = number_codes(query_codes, key_codes)
        hash_code_len = number_bits(num_queries + num_keys)
    arrange = functools.partial(layout.arrange_codes, hash_code_len=hash_code_len)
    query_mask, key_mask = (
        None if mask is None else mask.reshape(heads, mask.shape[-1])
        for mask in (query_mask, key_mask)
    )
    out = _cumulate(
        arrange(query_codes, filler=0),
        arrange(key_codes, filler=1),
        hopper.only(value).reshape(heads, num_keys, 1, value_dim),
        query_mask,
        key_mask,
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
    )
    return out.reshape(*batch, num_queries, value_dim)


def _cumulate(*args: Any, **options: Any) -> Any:
    out = cumulation.cumulate(*args, **options)
    return jax.tree.map(lambda x: vary_like(x, *args), out)


def _check(value: Array, num_hashes: int, hash_code_len: int, num_tokens: int) -> None:
    """To be called before anything is computed: another implementation may have to."""
    hopper.check()
    if value.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"mosaic_gpu needs float32, bfloat16 or float16 arrays, got {value.dtype}."
        )
    _check_size("num_hashes", num_hashes, cumulation.MAX_HASHES)
    if hash_code_len > layout.MAX_CODE_LEN and num_tokens > layout.MAX_TOKENS:
        raise NotImplementedError(
            f"mosaic_gpu needs hash_code_len in 1..{layout.MAX_CODE_LEN} for more than "
            f"{layout.MAX_TOKENS} queries and keys together, got {hash_code_len} for {num_tokens}."
        )
    _check_size("the last dimension of value", value.shape[-1], cumulation.MAX_VALUE_DIM)


def _check_size(name: str, size: int, most: int) -> None:
    if not 1 <= size <= most:
        raise NotImplementedError(f"mosaic_gpu needs {name} in 1..{most}, got {size}.")
