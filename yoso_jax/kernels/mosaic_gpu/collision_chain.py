"""Collision probabilities without arccosines: chains of multiply-adds of the distance.

For unit vectors, with `u = sqrt(1 - cosine)` in 0..sqrt(2) (their distance divided by sqrt(2)),
`p = 1 - arccos(cosine) / pi` falls steadily from 1 to 0. A power of it is close to the last of a
few terms, each the product of the one before with that or an earlier one, plus a constant:

    x_0 = slope u + start        x_(i + 1) = x_i x_j + constant, j <= i

This is a polynomial of u, and of a higher degree than Horner's rule reaches in as many steps; and
but for the first, a step reads two registers instead of three. Where rounding puts a cosine beyond
1, the absolute value below the root takes it for as much less than 1.

Multiples of 4 are smooth in u. Other powers are singular at cosine -1, the more so the smaller they
are; there the chain is the continuation of what fits cosines of at least -0.7.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from yoso_jax.kernels.checks import check_integer
from yoso_jax.kernels.mosaic_gpu.collision_coefficients import TABLE

MAX_EXPONENT = max(TABLE)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A power of p as a function of `u = sqrt(|1 - cosine|)`.

    Attributes:
      slope: of u in the first term; a float32 number like all of them.
      start: the first term where u is 0.
      steps: of each further term, which earlier one (0 is the first) is multiplied with the one
        before, and what is added.
      max_error: the largest distance from `E = p ** exponent`, for cosines in [-1, 1].
      max_relative_error: the largest distance divided by `E + 1e-6`, for cosines in [-0.7, 1].
    """

    slope: float
    start: float
    steps: tuple[tuple[int, float], ...]
    max_error: float
    max_relative_error: float


def collision_chain(exponent: int) -> Chain:
    """The chain that ends in `(1 - arccos(cosine) / pi) ** exponent`.

    Args:
      exponent: 0 to 16. Exponent 0 is the constant 1.

    Raises:
      ValueError: exponent is not an integer in this range.
    """
    check_integer("exponent", exponent, 0, MAX_EXPONENT)
    return Chain(*TABLE[exponent]) if exponent else Chain(0.0, 1.0, (), 0.0, 0.0)


def evaluate(chain: Chain, cosine: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The chain's end in float32, step by step as kernels do it.

    Args:
      chain: of a power of p.
      cosine: of any float dtype, in [-1, 1] but for rounding.
    """
    u = jnp.sqrt(jnp.abs(1 - cosine.astype(jnp.float32)))
    terms = [u * jnp.float32(chain.slope) + jnp.float32(chain.start)]
    for factor, constant in chain.steps:
        terms.append(terms[-1] * terms[factor] + jnp.float32(constant))
    return terms[-1]
