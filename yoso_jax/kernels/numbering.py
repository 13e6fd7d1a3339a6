"""Numbers for codes of more bits than there are tokens for: of few tokens, few codes occur.

That two tokens share a bucket is all that matters of their codes. Tables have a row a bucket; where
most of them would be empty, the codes of a hash are numbered in their order, and the numbers take
their place.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def number_bits(num_tokens: int) -> int:
    """Bits of the numbers of the codes of so many queries and keys together."""
    return max(1, (num_tokens - 1).bit_length())


def number_codes(
    query_codes: Int[Array, "*batch T m"], key_codes: Int[Array, "*batch S m"]
) -> tuple[Int[Array, "*batch T m"], Int[Array, "*batch S m"]]:
    """Numbers below T + S, of which two of a head and hash are equal where the codes are.

    Args:
      query_codes: in [0, 2**16).
      key_codes: likewise; T + S is at most 2**16.
    """
    num_queries = query_codes.shape[-2]
    codes = jnp.swapaxes(jnp.concatenate([query_codes, key_codes], axis=-2), -1, -2)
    num_tokens = codes.shape[-1]
    # A code and the place it is from are one word, and words are sorted faster than pairs.
    factor = 2 ** number_bits(num_tokens)
    place = jnp.arange(num_tokens, dtype=jnp.uint32)
    words = lax.sort(codes.astype(jnp.uint32) * factor + place, is_stable=False)
    code, place = words // factor, (words % factor).astype(jnp.int32)
    is_new = (code[..., 1:] != code[..., :-1]).astype(jnp.int32)
    numbers = jnp.pad(jnp.cumsum(is_new, axis=-1), [(0, 0)] * (codes.ndim - 1) + [(1, 0)])
    row = jnp.arange(codes.size // num_tokens, dtype=jnp.int32)[:, None]
    place = row * num_tokens + place.reshape(-1, num_tokens)
    numbers = (
        jnp.zeros(codes.size, jnp.int32)
        .at[place.reshape(-1)]
        .set(numbers.reshape(-1), unique_indices=True)
    )
    numbers = jnp.swapaxes(numbers.reshape(codes.shape), -1, -2)
    return numbers[..., :num_queries, :], numbers[..., num_queries:, :]
