"""Codes of queries and keys as the kernels want them, by the kernel that hashes or by XLA."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

from yoso_jax.kernels import effects, xla
from yoso_jax.kernels.codes import hash_codes
from yoso_jax.kernels.mosaic_gpu import hashing, layout
from yoso_jax.kernels.mosaic_gpu.varying import vary_like
from yoso_jax.kernels.numbering import number_bits, number_codes


@dataclasses.dataclass(frozen=True)
class Hashes:
    """What the signs of a projection say."""

    projection: Array
    hash_code_len: int

    @property
    def number(self) -> int:
        """How many they are."""
        return self.projection.shape[-1] // self.hash_code_len

    def first(self, number: int, num_bits: int) -> "Hashes":
        """As `effects.first_projection` says."""
        options = dict(hash_code_len=self.hash_code_len, num_hashes=number, num_bits=num_bits)
        return Hashes(effects.first_projection(self.projection, **options), num_bits)

    def others(self, number: int, num_bits: int) -> "Hashes":
        """As `effects.other_projection` says."""
        options = dict(hash_code_len=self.hash_code_len, num_hashes=number, num_bits=num_bits)
        return Hashes(effects.other_projection(self.projection, **options), num_bits)

    def table_bits(self, query: Float[Array, "B T N H"], key: Float[Array, "B S N H"]) -> int:
        """Bits of the codes that `both` returns: of numbers for codes that are too long."""
        if self.hash_code_len <= layout.MAX_CODE_LEN:
            return self.hash_code_len
        return number_bits(query.shape[1] + key.shape[1])

    def both(
        self, query: Float[Array, "B T N H"], key: Float[Array, "B S N H"]
    ) -> tuple[UInt16[Array, "heads groups T 8"], UInt16[Array, "heads groups S 8"]]:
        """Codes as `layout.arrange_codes` returns them.

        Masked tokens have codes, too: what is in their rows does not matter, since they neither add
        to a table nor read from one. Nor does the length of a token matter.
        """
        if self.hash_code_len <= layout.MAX_CODE_LEN:
            return self._codes(query, filler=0), self._codes(key, filler=1)
        numbers = number_codes(
            *(
                plain_codes_by_xla(x, self.projection, hash_code_len=self.hash_code_len)
                for x in (query, key)
            )
        )
        bits = self.table_bits(query, key)
        query_codes, key_codes = (
            layout.arrange_codes(each, hash_code_len=bits, filler=filler)
            for filler, each in enumerate(numbers)
        )
        return query_codes, key_codes

    def _codes(self, x: Array, *, filler: int) -> Array:
        hash_fn = hash_tokens_by_xla if x.dtype == jnp.float32 else hashing.hash_tokens
        options = dict(hash_code_len=self.hash_code_len, filler=filler)
        return vary_like(hash_fn(x, self.projection, **options), x, self.projection)


def hash_tokens_by_xla(
    x: Float[Array, "B T N H"],
    projection: Float[Array, "B N H columns"],
    *,
    hash_code_len: int,
    filler: int,
) -> UInt16[Array, "heads groups T 8"]:
    """As `hashing.hash_tokens`, whose tensor cores would round float32."""
    codes = plain_codes_by_xla(x, projection, hash_code_len=hash_code_len)
    return layout.arrange_codes(codes, hash_code_len=hash_code_len, filler=filler)


def plain_codes_by_xla(
    x: Float[Array, "B T N H"], projection: Float[Array, "B N H columns"], *, hash_code_len: int
) -> Int[Array, "heads T m"]:
    """Codes as they are."""
    x, projection = xla.heads_first(x, None), xla.widen(projection)
    codes = hash_codes(x, projection, hash_code_len=hash_code_len)
    return codes.reshape(-1, *codes.shape[2:])


def plain_codes(
    arranged: UInt16[Array, "heads groups tokens 8"], *, num_hashes: int, hash_code_len: int
) -> Int[Array, "heads tokens {num_hashes}"]:
    """The inverse of `layout.arrange_codes`, of the first hashes."""
    groups = -(-num_hashes // layout.HASHES)
    arranged = arranged[:, :groups]
    heads, _, tokens, _ = arranged.shape
    codes = arranged.astype(jnp.int32) // (layout.code_scale(hash_code_len) * layout.HASHES)
    token = jnp.arange(tokens)[:, None]
    for distance in (1, 2, 4):
        pairs = codes.reshape(heads, groups, tokens, -1, 2, distance)
        swapped = pairs[..., ::-1, :].reshape(codes.shape)
        codes = jnp.where(token & distance != 0, swapped, codes)
    return jnp.swapaxes(codes, 1, 2).reshape(heads, tokens, -1)[..., :num_hashes]
