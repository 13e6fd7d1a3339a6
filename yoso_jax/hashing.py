"""Random projections for sign hashing: what a key draws, independent of who computes the codes."""

import math
from typing import Literal

import jax
from jaxtyping import Array, Float

from yoso_jax.kernels.codes import BitLayout, fast_hash_projection, num_fast_hash_parts

type HashFn = Literal["gaussian", "fast"]


def sample_signs(
    rng: Array,
    batch_shape: tuple[int, ...],
    head_dim: int,
    *,
    num_hashes: int,
    hash_code_len: int,
    bit_layout: BitLayout = "spread",
) -> Float[Array, "*batch 3 P H"]:
    """Draws the signs of `kernels.fast_hash`.

    Args:
      rng: a key.
      batch_shape: leading dimensions, each with signs of its own.
      head_dim: dimensions of a token; the transform's length H is the next power of two, at
        least 32.
      num_hashes: number of hashes.
      hash_code_len: bits of a code.
      bit_layout: "spread" or "block".

    Returns:
      +1 and -1, float32 `[*batch_shape, 3, P, H]`.
    """
    size = max(32, 1 << (head_dim - 1).bit_length())
    parts = num_fast_hash_parts(
        size, num_hashes=num_hashes, hash_code_len=hash_code_len, bit_layout=bit_layout
    )
    shape = (*batch_shape, 3, parts, size)
    return jax.random.rademacher(rng, (math.prod(shape),), "float32").reshape(shape)


def sample_projection(
    rng: Array,
    batch_shape: tuple[int, ...],
    head_dim: int,
    *,
    num_hashes: int,
    hash_code_len: int,
    hash_fn: HashFn = "gaussian",
    bit_layout: BitLayout = "spread",
) -> Float[Array, "*batch H columns"]:
    """Draws the projection whose signs are the hashes' bits (paper, section 3.2).

    Queries and keys share it; batch rows and heads have their own.

    Args:
      rng: a key.
      batch_shape: leading dimensions, each with a projection of its own.
      head_dim: dimensions of a token.
      num_hashes: number of hashes.
      hash_code_len: bits of a code.
      hash_fn: "gaussian" draws independent normal columns, "fast" multiplies out the random signs
        and Hadamard transforms of `kernels.fast_hash`.
      bit_layout: which columns of "fast" form a hash, see `kernels.fast_hash`.

    Returns:
      float32 `[*batch_shape, head_dim, num_hashes * hash_code_len]`; column `h * hash_code_len + i`
      is bit i of hash h.
    """
    if hash_fn == "gaussian":
        # Drawn flat: XLA needs seconds to compile a draw of four odd dimensions for a CPU.
        shape = (*batch_shape, head_dim, num_hashes * hash_code_len)
        return jax.random.normal(rng, (math.prod(shape),)).reshape(shape)
    signs = sample_signs(
        rng,
        batch_shape,
        head_dim,
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
        bit_layout=bit_layout,
    )
    return fast_hash_projection(
        signs,
        head_dim=head_dim,
        num_hashes=num_hashes,
        hash_code_len=hash_code_len,
        bit_layout=bit_layout,
    )
