"""Numbers for codes of more bits than a table has rows: of few tokens, few codes occur.

That two tokens share a bucket is all that matters of their codes. A table has 4,096 rows; up to so
many queries and keys together the codes of a hash are numbered in their order, and the numbers
take their place.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from yoso_jax.kernels.mosaic_gpu.layout import MAX_CODE_LEN

MAX_TOKENS = 2**MAX_CODE_LEN
"""Queries and keys together, whose codes have numbers of at most 12 bits."""


def number_bits(num_tokens: int) -> int:
    """Bits of the numbers of the codes of so many queries and keys together."""
    return max(1, (num_tokens - 1).bit_length())


def number_codes(
    query_codes: Int[Array, "heads T m"], key_codes: Int[Array, "heads S m"]
) -> tuple[Int[Array, "heads T m"], Int[Array, "heads S m"]]:
    """Numbers below T + S, of which two of a head and hash are equal where the codes are.

    Args:
      query_codes: in [0, 2**16).
      key_codes: likewise; T + S is at most `MAX_TOKENS`.
    """
    num_queries = query_codes.shape[1]
    codes = jnp.swapaxes(jnp.concatenate([query_codes, key_codes], axis=1), 1, 2)
    heads, num_hashes, num_tokens = codes.shape
    # A code and the place it is from are one word, and words are sorted faster than pairs.
    place = jnp.arange(num_tokens, dtype=jnp.uint32)
    words = lax.sort(codes.astype(jnp.uint32) * MAX_TOKENS + place, is_stable=False)
    code, place = words // MAX_TOKENS, (words % MAX_TOKENS).astype(jnp.int32)
    is_new = (code[..., 1:] != code[..., :-1]).astype(jnp.int32)
    numbers = jnp.pad(jnp.cumsum(is_new, axis=-1), [(0, 0), (0, 0), (1, 0)])
    row = jnp.arange(heads * num_hashes, dtype=jnp.int32).reshape(heads, num_hashes, 1)
    numbers = (
        jnp.zeros(codes.size, jnp.int32)
        .at[(row * num_tokens + place).reshape(-1)]
        .set(numbers.reshape(-1), unique_indices=True)
    )
    numbers = jnp.swapaxes(numbers.reshape(codes.shape), 1, 2)
    return numbers[:, :num_queries], numbers[:, num_queries:]
