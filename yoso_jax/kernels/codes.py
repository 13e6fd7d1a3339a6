"""Hash codes: signs of projections packed into integers, bit 0 first.

A bit is set where its projection is greater than zero, so a zero vector has code 0.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from yoso_jax.kernels import blocked
from yoso_jax.kernels.checks import check_integer

type BitLayout = Literal["spread", "block"]

# Columns of a projection that are multiplied at once: bounds the memory of the projected tokens.
_COLUMNS = 512


def _pack(bits: Array) -> Array:
    """Packs the last axis into int32, first element in bit 0."""
    shifts = jnp.arange(bits.shape[-1], dtype=jnp.int32)
    return jnp.sum(bits.astype(jnp.int32) << shifts, -1)


def hash_codes(
    x: Float[Array, "*batch T H"],
    projection: Float[Array, "*batch H columns"],
    *,
    hash_code_len: int,
) -> Int[Array, "*batch T m"]:
    """Codes of `x @ projection`, whose column `h * hash_code_len + i` gives bit i of hash h."""
    num_hashes = projection.shape[-1] // hash_code_len
    by_hash = projection.reshape(*projection.shape[:-1], num_hashes, hash_code_len)
    codes = lax.map(
        lambda columns: _pack(blocked.matmul("...th,...hb->...tb", x, columns) > 0),
        jnp.moveaxis(by_hash, -2, 0),
        batch_size=min(num_hashes, max(1, _COLUMNS // hash_code_len)),
    )
    return jnp.moveaxis(codes, 0, -1)


def hadamard_transform(x: Num[Array, "*batch H"]) -> Num[Array, "*batch H"]:
    """Unnormalised Walsh-Hadamard transform of the last axis, in natural (Sylvester) order."""
    shape, size = x.shape, x.shape[-1]
    stride = 1
    while stride < size:
        x = x.reshape(*shape[:-1], -1, 2, stride)
        low, high = x[..., 0, :], x[..., 1, :]
        x = jnp.stack([low + high, low - high], -2)
        stride *= 2
    return x.reshape(shape)


def num_fast_hash_parts(
    head_dim: int, *, num_hashes: int, hash_code_len: int, bit_layout: BitLayout
) -> int:
    """Number of parts P, each of three diagonals of signs, that `num_hashes` hashes need.

    Args:
      head_dim: length of the transform, a power of two.
      num_hashes: number of hashes, at least 1.
      hash_code_len: bits of a code.
      bit_layout: "spread" or "block".
    """
    if bit_layout == "spread":
        return hash_code_len * -(-num_hashes // head_dim)
    return -(-num_hashes // (head_dim // hash_code_len))


def fast_hash(
    x: Float[Array, "*batch T _"],
    signs: Num[Array, "*batch 3 P H"],
    *,
    num_hashes: int,
    hash_code_len: int,
    bit_layout: BitLayout = "spread",
) -> Int[Array, "*batch T {num_hashes}"]:
    """Sign hashes by three rounds of random signs and Hadamard transforms (paper, section 3.2).

    Part p projects a token to `y = Had(D[2, p] * Had(D[1, p] * Had(D[0, p] * x)))`.

    - "spread": bit i of hash j is the sign of dimension `j % H` of part
      `j // H * hash_code_len + i`. The bits of a hash come from different parts, which makes its
      collision probability that of independent projections.
    - "block": hash `p * (H // hash_code_len) + l` takes dimensions `l * hash_code_len` and
      following of part p, bit for bit as the published CUDA kernels do. Those bits come from one
      orthogonal block, so dissimilar tokens collide too rarely.

    Args:
      x: tokens, `[..., T, H]` or with a shorter last axis, which is zero-padded to H.
      signs: +1 and -1, `[..., 3, P, H]`, H a power of two and P from `num_fast_hash_parts`.
      num_hashes: number of hashes, at least 1.
      hash_code_len: bits of a code, 1 to 16.
      bit_layout: "spread" or "block".

    Returns:
      Codes in `[0, 2**hash_code_len)`, int32 `[..., T, num_hashes]`.

    Raises:
      ValueError: an argument is out of range, or shapes do not agree.
    """
    x, signs = jnp.asarray(x), jnp.asarray(signs)
    size = signs.shape[-1]
    check_integer("num_hashes", num_hashes, 1)
    check_integer("hash_code_len", hash_code_len, 1, 16)
    if bit_layout not in ("spread", "block"):
        raise ValueError(f"bit_layout must be 'spread' or 'block', got {bit_layout!r}.")
    if size & (size - 1) or size < hash_code_len:
        raise ValueError(
            f"signs must have a last axis that is a power of two and at least hash_code_len="
            f"{hash_code_len} long, got shape {signs.shape}."
        )
    parts = num_fast_hash_parts(
        size, num_hashes=num_hashes, hash_code_len=hash_code_len, bit_layout=bit_layout
    )
    if signs.shape[-3:] != (3, parts, size) or signs.shape[:-3] != x.shape[:-2]:
        raise ValueError(
            f"signs must have shape {(*x.shape[:-2], 3, parts, size)} for x of shape {x.shape}, "
            f"got {signs.shape}."
        )
    if x.shape[-1] > size:
        raise ValueError(f"x has {x.shape[-1]} dimensions, but signs only {size}.")

    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])

    def project(signs: Array) -> Array:
        y = x
        for i in range(3):
            y = hadamard_transform(y * signs[..., i, None, :])
        return y

    by_part = jnp.moveaxis(signs.astype(x.dtype), -2, 0)
    if bit_layout == "block":
        hashes = size // hash_code_len

        def codes_of_part(signs: Array) -> Array:
            used = project(signs)[..., : hashes * hash_code_len]
            return _pack(used.reshape(*used.shape[:-1], hashes, hash_code_len) > 0)

        codes = lax.map(codes_of_part, by_part)
    else:

        def codes_of_group(signs: Array) -> Array:
            def add_bit(codes: Array, bit: tuple[Array, Array]) -> tuple[Array, None]:
                i, signs = bit
                return codes | ((project(signs) > 0).astype(jnp.int32) << i), None

            bits = jnp.arange(hash_code_len, dtype=jnp.int32), signs
            return lax.scan(add_bit, blocked.zeros(x.shape, jnp.int32, x, signs), bits)[0]

        codes = lax.map(codes_of_group, by_part.reshape(-1, hash_code_len, *by_part.shape[1:]))
    codes = jnp.moveaxis(codes, 0, -2)
    return codes.reshape(*codes.shape[:-2], -1)[..., :num_hashes]


def fast_hash_projection(
    signs: Num[Array, "*batch 3 P size"],
    *,
    head_dim: int,
    num_hashes: int,
    hash_code_len: int,
    bit_layout: BitLayout = "spread",
) -> Float[Array, "*batch {head_dim} columns"]:
    """The matrix whose `hash_codes` are the codes of `fast_hash`.

    The transforms multiplied out, for the columns in use only: one matrix product then replaces
    3 P transforms a token. Projections within rounding of zero may differ in sign.
    """
    size = signs.shape[-1]
    # Indices are of NumPy, so that nothing of them is left to compute.
    hash_index, bit = np.divmod(np.arange(num_hashes * hash_code_len), hash_code_len)
    if bit_layout == "spread":
        part, dim = hash_index // size * hash_code_len + bit, hash_index % size
    else:
        hashes = size // hash_code_len
        part, dim = hash_index // hashes, hash_index % hashes * hash_code_len + bit
    # Hadamard matrices are symmetric: a column of the product is its transpose applied to a unit
    # vector.
    signs = jnp.take(signs.astype(jnp.float32), part, axis=-2, mode="clip")
    # What is multiplied are integers of up to `size`, which are exact in bfloat16 up to 256.
    precision = lax.Precision.DEFAULT if size <= 256 else lax.Precision.HIGHEST
    columns = _hadamard_rows(jnp.asarray(dim), size)
    for i in (2, 1):
        transform = _hadamard_rows(jnp.arange(size), size)
        columns = jnp.matmul(signs[..., i, :, :] * columns, transform, precision=precision)
    columns = signs[..., 0, :, :] * columns
    return jnp.swapaxes(columns[..., :head_dim], -1, -2)


def _hadamard_rows(rows: Int[Array, " n"], size: int) -> Float[Array, "n {size}"]:
    """Rows of the Hadamard matrix of `hadamard_transform`, which XLA fuses into their use."""
    odd = lax.population_count(rows[:, None] & jnp.arange(size)) & 1
    return (1 - 2 * odd).astype(jnp.float32)
