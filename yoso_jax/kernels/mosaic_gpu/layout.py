"""The arrangement of codes and values that the cumulation kernels read.

Eight hashes make a group. A table of a group has a row a bucket with a slot a hash, and a slot
holds the sums of a slice of value columns, so that one access reads or adds a slot. Token i visits
the slots in the order `p ^ (i & 7)` for p = 0..7: neighbouring threads, which have neighbouring
tokens, then always touch different slots and with them different banks of shared memory, whatever
the codes are (unless rows are shorter than the 128 bytes of all banks, above 10 bits).
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped, UInt16

from yoso_jax.kernels.mosaic_gpu.lane import I32, Lane

HASHES = 8
"""Hashes of a group."""

MAX_CODE_LEN = 12
_MAX_SLOT_BYTES = 16


def num_groups(num_hashes: int) -> int:
    """Groups of eight that hold `num_hashes` hashes."""
    return -(-num_hashes // HASHES)


def slot_bytes(hash_code_len: int) -> int:
    """Bytes of a slot, the most with which a group's table fits into shared memory (128 KiB)."""
    return min(_MAX_SLOT_BYTES, 2 ** (14 - hash_code_len))


def code_scale(hash_code_len: int) -> int:
    """What a stored code is multiplied by: the slot's bytes, as far as that fits into 16 bits."""
    return min(_MAX_SLOT_BYTES, 2 ** (13 - hash_code_len))


def arrange_codes(
    codes: Int[Array, "heads tokens m"], *, hash_code_len: int, filler: int
) -> UInt16[Array, "heads groups tokens 8"]:
    """Codes in the order in which the kernels visit them.

    Args:
      codes: in `[0, 2**hash_code_len)`.
      hash_code_len: bits of a code, 1 to 12.
      filler: code of the hashes that fill up the last group, 0 or 1. Different ones for queries
        and keys keep those hashes from colliding.

    Returns:
      Element `[h, g, i, p]` is `(code * 8 + slot) * code_scale` of hash `g * 8 + slot` of token i,
      with `slot = p ^ (i & 7)`.
    """
    heads, tokens, num_hashes = codes.shape
    groups = num_groups(num_hashes)
    fill = [(0, 0), (0, 0), (0, groups * HASHES - num_hashes)]
    codes = jnp.pad(codes, fill, constant_values=filler).reshape(heads, tokens, groups, HASHES)
    codes = (codes * HASHES + jnp.arange(HASHES)) * code_scale(hash_code_len)
    # A permutation p ^ (i & 7) is a swap of neighbours at each distance that is a bit of i.
    token = jnp.arange(tokens)[:, None, None]
    for distance in (1, 2, 4):
        pairs = codes.reshape(heads, tokens, groups, -1, 2, distance)
        swapped = pairs[..., ::-1, :].reshape(codes.shape)
        codes = jnp.where(token & distance != 0, swapped, codes)
    return jnp.swapaxes(codes, 1, 2).astype(jnp.uint16)


def offsets(lane: Lane, word: I32, *, stride: int, scale: int) -> list[I32]:
    """The byte offsets, `stride` bytes a slot, of the two codes in a word, stored times `scale`."""
    codes = [word & 0xFFFF, lane.shift_right_logical(word, 16)]
    bits = stride.bit_length() - scale.bit_length()
    if bits < 0:
        return [lane.shift_right_logical(code, -bits) for code in codes]
    return [code << bits if bits else code for code in codes]


def split_columns(
    x: Shaped[Array, "heads tokens D"], width: int
) -> Shaped[Array, "heads slices tokens {width}"]:
    """Slices of `width` columns, the last one filled up with zeros."""
    heads, tokens, columns = x.shape
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -columns % width)])
    return jnp.swapaxes(x.reshape(heads, tokens, -1, width), 1, 2)


def merge_columns(
    x: Shaped[Array, "heads slices tokens width"], columns: int
) -> Shaped[Array, "heads tokens {columns}"]:
    """The inverse of `split_columns`."""
    heads, _, tokens, _ = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(heads, tokens, -1)[..., :columns]
