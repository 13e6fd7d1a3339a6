"""Collision probabilities and collisions of codes in plain JAX: weighted sums and gradients.

For every backend, in memory linear in the number of tokens. Arrays are float32 (or float64) and
have any leading dimensions. Validation and differentiation are the callers'.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from yoso_jax.kernels import blocked
from yoso_jax.kernels.numbering import number_bits, number_codes

# Hashes whose comparisons are fused into one pass over a block of pairs.
_FUSED_HASHES = 8
# Weighted cumulation visits T * S pairs, or fills W tables for each of T + S tokens and each hash.
# Pairs are matrix products and win until sequences are long: with 32 hashes and head dimension 64,
# up to 16,384 tokens on an H100 (what the ratio below says), up to about 5,000 on a CPU.
_PAIRS_PER_TOKEN = 8192
# Codes are numbered where tables then have a quarter of the rows, or less. On a CPU that takes 0.06
# to 0.67 times as long (64 to 4,096 tokens, codes of 9 to 16 bits); half of the rows are no gain.
_SPARE_BITS = 2
# Elements of a one-hot block on TPUs.
_ONE_HOT_ELEMENTS = 2**22

# Abramowitz and Stegun 4.4.46, arccos(x) = sqrt(1 - x) * polynomial(x) + e, |e| < 2e-8, x in [0, 1]
_ARCCOS = (
    1.5707963050,
    -0.2145988016,
    0.0889789874,
    -0.0501743046,
    0.0308918810,
    -0.0170881256,
    0.0066700901,
    -0.0012624911,
)


def collision_probability(
    cosine: Float[Array, "*shape"], hash_code_len: int
) -> Float[Array, "*shape"]:
    """`(1 - arccos(cosine) / pi) ** hash_code_len`; cosines beyond +-1 by rounding are clipped.

    In float32 the arccosine is a polynomial, as accurate as the library's and 40 times faster on a
    CPU.
    """
    if cosine.dtype == jnp.float64:
        probability = 1 - jnp.arccos(jnp.clip(cosine, -1, 1)) / jnp.pi
    else:
        magnitude = jnp.minimum(jnp.abs(cosine), 1)
        polynomial = functools.reduce(lambda acc, c: acc * magnitude + c, reversed(_ARCCOS), 0.0)
        angle = polynomial * jnp.sqrt(1 - magnitude) / jnp.pi
        probability = jnp.where(cosine >= 0, 1 - angle, angle)
    return lax.integer_pow(probability, hash_code_len)


def probability_fn(hash_code_len: int) -> blocked.WeightFn:
    """Collision probabilities of a block of unit vectors."""

    def weights(query: Array, key: Array) -> Array:
        cosine = blocked.matmul("...th,...sh->...ts", query, key)
        return collision_probability(cosine, hash_code_len)

    return weights


def bucket_sum(codes: Int[Array, "*batch S"], value: Array, num_buckets: int) -> Array:
    """Sums the rows of value by code: `[..., S], [..., S, D] -> [..., num_buckets, D]`."""

    def scatter(codes: Array, value: Array) -> Array:
        rows = value.reshape(-1, value.shape[-1])
        index = codes.reshape(-1, codes.shape[-1])
        index += num_buckets * jnp.arange(index.shape[0], dtype=index.dtype)[:, None]
        table = jnp.zeros((index.shape[0] * num_buckets, rows.shape[-1]), rows.dtype)
        table = table.at[index.reshape(-1)].add(rows, mode="drop")
        return table.reshape(*codes.shape[:-1], num_buckets, rows.shape[-1])

    def one_hot(codes: Array, value: Array) -> Array:
        def add_block(table: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
            codes, value = block
            hot = jax.nn.one_hot(codes[..., 0], num_buckets, dtype=value.dtype)
            return table + blocked.matmul("...sb,...sd->...bd", hot, value), None

        size = _one_hot_block(codes.shape, num_buckets)
        blocks = blocked.split(codes[..., None], size), blocked.split(value, size)
        shape = (*codes.shape[:-1], num_buckets, value.shape[-1])
        table = blocked.zeros(shape, value.dtype, codes, value)
        return lax.scan(add_block, table, blocks)[0]

    # TPUs scatter row by row, but multiply matrices fast.
    return lax.platform_dependent(codes, value, tpu=one_hot, default=scatter)


def _bucket_read(codes: Int[Array, "*batch T"], table: Array) -> Array:
    """Reads a row a token: `[..., T], [..., num_buckets, D] -> [..., T, D]`."""

    def gather(codes: Array, table: Array) -> Array:
        num_buckets, width = table.shape[-2:]
        index = codes.reshape(-1, codes.shape[-1])
        index += num_buckets * jnp.arange(index.shape[0], dtype=index.dtype)[:, None]
        rows = table.reshape(-1, width).at[index.reshape(-1)].get(mode="fill", fill_value=0)
        return rows.reshape(*codes.shape, width)

    def one_hot(codes: Array, table: Array) -> Array:
        def one_block(codes: Array) -> Array:
            hot = jax.nn.one_hot(codes[..., 0], table.shape[-2], dtype=table.dtype)
            return blocked.matmul("...tb,...bd->...td", hot, table)

        size = _one_hot_block(codes.shape, table.shape[-2])
        rows = lax.map(one_block, blocked.split(codes[..., None], size))
        return blocked.merge(rows, codes.shape[-1])

    return lax.platform_dependent(codes, table, tpu=one_hot, default=gather)


def _one_hot_block(codes_shape: tuple[int, ...], num_buckets: int) -> int:
    heads = max(1, functools.reduce(int.__mul__, codes_shape[:-1], 1))
    return min(codes_shape[-1], max(8, _ONE_HOT_ELEMENTS // (heads * num_buckets)))


def lsh_cumulation(
    query_codes: Int[Array, "*batch T m"],
    key_codes: Int[Array, "*batch S m"],
    value: Float[Array, "*batch S D"],
    *,
    hash_code_len: int,
) -> Float[Array, "*batch T D"]:
    """`B v`: for each hash, value rows are added into a table of buckets and read back."""
    bits = number_bits(query_codes.shape[-2] + key_codes.shape[-2])
    if bits + _SPARE_BITS <= hash_code_len:
        query_codes, key_codes = number_codes(query_codes, key_codes)
        hash_code_len = bits

    def add_hash(out: Array, codes: tuple[Array, Array]) -> tuple[Array, None]:
        query_codes, key_codes = codes
        table = bucket_sum(key_codes, value, 2**hash_code_len)
        return out + _bucket_read(query_codes, table), None

    shape = (*query_codes.shape[:-1], value.shape[-1])
    out = blocked.zeros(shape, value.dtype, query_codes, key_codes, value)
    codes = jnp.moveaxis(query_codes, -1, 0), jnp.moveaxis(key_codes, -1, 0)
    return lax.scan(add_hash, out, codes)[0] / query_codes.shape[-1]


def _collision_fractions(
    query_codes: Array, key_codes: Array, num_hashes: int, dtype: jnp.dtype
) -> Array:
    """Fraction of equal codes for a block of pairs, from 16-bit codes of `_narrow`."""
    counter = jnp.int16 if num_hashes < 2**15 else jnp.int32

    def by_group(codes: Array) -> Array:
        codes = jnp.moveaxis(codes, -1, 0)
        return codes.reshape(-1, _FUSED_HASHES, *codes.shape[1:])

    def add_group(count: Array, codes: tuple[Array, Array]) -> tuple[Array, None]:
        equal = codes[0][..., :, None] == codes[1][..., None, :]
        for i in range(_FUSED_HASHES):  # unrolled: XLA then fuses the eight into one pass
            count += equal[i].astype(counter)
        return count, None

    shape = (*query_codes.shape[:-1], key_codes.shape[-2])
    groups = by_group(query_codes), by_group(key_codes)
    count = lax.scan(add_group, blocked.zeros(shape, counter, groups), groups)[0]
    return count.astype(dtype) / num_hashes


def _narrow(codes: Array, filler: int) -> Array:
    """16-bit codes (fast to compare), with hashes of value `filler` up to a multiple of eight."""
    pad = -codes.shape[-1] % _FUSED_HASHES
    widths = [(0, 0)] * (codes.ndim - 1) + [(0, pad)]
    return jnp.pad(codes.astype(jnp.uint16), widths, constant_values=filler)


def _takes_pairs(num_queries: int, num_keys: int) -> bool:
    return num_queries * num_keys <= _PAIRS_PER_TOKEN * (num_queries + num_keys)


def lsh_weighted_cumulation(
    query_codes: Int[Array, "*batch T m"],
    key_codes: Int[Array, "*batch S m"],
    query_weight: Float[Array, "*batch T W"],
    key_weight: Float[Array, "*batch S W"],
    value: Float[Array, "*batch S D"],
    *,
    hash_code_len: int,
) -> Float[Array, "*batch T D"]:
    """`(B * (query_weight key_weight^T)) v`, over pairs or, for long sequences, W tables a hash."""
    if _takes_pairs(query_codes.shape[-2], key_codes.shape[-2]):
        num_hashes = query_codes.shape[-1]

        def weights(query: tuple[Array, Array], key: tuple[Array, Array]) -> Array:
            product = blocked.matmul("...tw,...sw->...ts", query[1], key[1])
            return product * _collision_fractions(query[0], key[0], num_hashes, value.dtype)

        query = _narrow(query_codes, 0), query_weight
        return blocked.attend(weights, query, (_narrow(key_codes, 1), key_weight), value)

    def add_column(out: Array, weight: tuple[Array, Array]) -> tuple[Array, None]:
        query_weight, key_weight = weight
        scaled = value * key_weight[..., None]
        total = lsh_cumulation(query_codes, key_codes, scaled, hash_code_len=hash_code_len)
        return out + query_weight[..., None] * total, None

    shape = (*query_codes.shape[:-1], value.shape[-1])
    inputs = query_codes, key_codes, query_weight, key_weight, value
    out = blocked.zeros(shape, value.dtype, inputs)
    columns = jnp.moveaxis(query_weight, -1, 0), jnp.moveaxis(key_weight, -1, 0)
    return lax.scan(add_column, out, columns)[0]


def collision_gradients(
    query_codes: Int[Array, "*batch T m"],
    key_codes: Int[Array, "*batch S m"],
    query: Float[Array, "*batch T H"],
    key: Float[Array, "*batch S H"],
    value: Float[Array, "*batch S D"],
    grad_out: Float[Array, "*batch T D"],
    *,
    hash_code_len: int,
    with_value: bool = True,
) -> tuple[
    Float[Array, "*batch T H"], Float[Array, "*batch S H"], Float[Array, "*batch S D"] | None
]:
    """`reference.surrogate_gradients` for collision fractions, unit query and key.

    The gradient of value is None unless `with_value`.
    """
    grad_value = None
    if _takes_pairs(query.shape[-2], key.shape[-2]):
        num_hashes = query_codes.shape[-1]
        grad_query, grad_key, grad_value = blocked.attend_backward(
            lambda q, k: _collision_fractions(q, k, num_hashes, value.dtype),
            _narrow(query_codes, 0),
            _narrow(key_codes, 1),
            query,
            key,
            value,
            grad_out,
            with_value=with_value,
        )
    else:
        weighted = functools.partial(lsh_weighted_cumulation, hash_code_len=hash_code_len)
        grad_query = weighted(query_codes, key_codes, grad_out, value, key)
        grad_key = weighted(key_codes, query_codes, value, grad_out, query)
        if with_value:
            grad_value = lsh_cumulation(
                key_codes, query_codes, grad_out, hash_code_len=hash_code_len
            )
    return hash_code_len / 2 * grad_query, hash_code_len / 2 * grad_key, grad_value


def expectation_gradients(
    query: Float[Array, "*batch T H"],
    key: Float[Array, "*batch S H"],
    value: Float[Array, "*batch S D"],
    grad_out: Float[Array, "*batch T D"],
    *,
    hash_code_len: int,
    with_value: bool = True,
) -> tuple[
    Float[Array, "*batch T H"], Float[Array, "*batch S H"], Float[Array, "*batch S D"] | None
]:
    """`reference.surrogate_gradients` for collision probabilities, unit query and key.

    The gradient of value is None unless `with_value`.
    """
    grad_query, grad_key, grad_value = blocked.attend_backward(
        probability_fn(hash_code_len),
        query,
        key,
        query,
        key,
        value,
        grad_out,
        with_value=with_value,
    )
    return hash_code_len / 2 * grad_query, hash_code_len / 2 * grad_key, grad_value
