"""The arrangement of codes and values in memory.

Eight hashes make a group. A table of a group has a row a bucket with a slot a hash, and a slot
holds the sums of a slice of value columns, so that one access reads or adds a slot. Token i visits
the slots in the order `p ^ (i & 7)` for p = 0..7: neighbouring threads, which have neighbouring
tokens, then always touch different slots and with them different banks of shared memory, whatever
the codes are (unless rows are shorter than the 128 bytes of all banks, above 10 bits).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt16

from yoso_jax.kernels.mosaic_gpu.lane import I32, GlobalPointer, Lane

HASHES = 8
"""Hashes of a group."""

MAX_CODE_LEN = 12
MAX_TOKENS = 2**MAX_CODE_LEN
"""Queries and keys together whose codes have numbers of so many bits, whatever bits they have."""

_MAX_SLOT_BYTES = 16


def num_groups(num_hashes: int) -> int:
    """Groups of eight that hold `num_hashes` hashes."""
    return -(-num_hashes // HASHES)


def slot_bytes(hash_code_len: int) -> int:
    """Bytes of a slot, the most with which a group's table fits into shared memory (128 KiB)."""
    return min(_MAX_SLOT_BYTES, 2 ** (14 - hash_code_len))


def slice_width(hash_code_len: int) -> int:
    """Columns of a slice of values: two for each word of a slot."""
    return slot_bytes(hash_code_len) // 2


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


@dataclasses.dataclass(frozen=True)
class Rows:
    """An array `[batch, tokens, heads, columns]` in which a head of a batch row is a sequence.

    Heads are numbered `b * heads + n`.
    """

    batch: int
    tokens: int
    heads: int
    columns: int
    dtype: np.dtype

    @property
    def num_heads(self) -> int:
        """Heads of all batch rows."""
        return self.batch * self.heads

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.columns * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes from a row to that of the next token of the same head."""
        return self.heads * self.row_bytes

    @property
    def shape(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype."""
        shape = (self.batch, self.tokens, self.heads, self.columns)
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def of_head(self, array: GlobalPointer, head: I32) -> GlobalPointer:
        """The row of a head's first token."""
        batch_row = array.at(head // self.heads, self.tokens * self.token_bytes)
        return batch_row.at(head % self.heads, self.row_bytes)


def load_words(pointer: GlobalPointer, num_words: int) -> list[I32]:
    """Neighbouring words, up to four an access, at an address that is a multiple of those."""
    size = math.gcd(num_words, 4)
    return [x for i in range(0, num_words, size) for x in pointer.load(size, 4 * i)]


def store_words(pointer: GlobalPointer, words: list[I32]) -> None:
    """Writes neighbouring words, as `load_words` reads them."""
    size = math.gcd(len(words), 4)
    for i in range(0, len(words), size):
        pointer.store(words[i : i + size], 4 * i)
