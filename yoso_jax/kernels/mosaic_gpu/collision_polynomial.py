"""Collision probabilities without arccosines: squares of polynomials of the distance.

For unit vectors, with `u = sqrt(1 - cosine)` in 0..sqrt(2) (their distance divided by sqrt(2)),
`p = 1 - arccos(cosine) / pi` falls steadily from 1 to 0, and `p ** exponent` is close to `h(u)**2`
with h of degree 3 to 7: a square root, as many fused multiply-adds, and a product. Where rounding
puts a cosine beyond 1, the absolute value below the root takes it for as much less than 1.

Multiples of 4 are smooth in u. Other powers are singular at cosine -1, the more so the smaller they
are; there h is the continuation of what fits cosines of at least -0.7.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from yoso_jax.kernels.checks import check_integer
from yoso_jax.kernels.mosaic_gpu.collision_coefficients import COARSE_TABLE, TABLE

MAX_EXPONENT = max(TABLE)


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """A polynomial h of `u = sqrt(|1 - cosine|)`, whose square is a power of p.

    Attributes:
      coefficients: of 1, u, u**2 and so on; float32 numbers, up to 8.
      max_error: the largest `|h**2 - E|`, with `E = p ** exponent`, for cosines in [-1, 1].
      max_relative_error: the largest `|h**2 - E| / (E + 1e-6)` for cosines in [-0.7, 1].
    """

    coefficients: tuple[float, ...]
    max_error: float
    max_relative_error: float


def collision_polynomial(exponent: int, *, coarse: bool = False) -> Polynomial:
    """The polynomial whose square is `(1 - arccos(cosine) / pi) ** exponent`.

    Args:
      exponent: 0 to 16. Exponent 0 is the constant 1.
      coarse: of a lower degree if there is one with an error of at most 0.2 %, not 0.05 %.

    Raises:
      ValueError: exponent is not an integer in this range.
    """
    check_integer("exponent", exponent, 0, MAX_EXPONENT)
    table = COARSE_TABLE if coarse else TABLE
    return Polynomial(*table[exponent]) if exponent else Polynomial((1.0,), 0.0, 0.0)


def evaluate(polynomial: Polynomial, cosine: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """`h(u)**2` in float32, step by step as kernels do it.

    Args:
      polynomial: h.
      cosine: of any float dtype, in [-1, 1] but for rounding.
    """
    u = jnp.sqrt(jnp.abs(1 - cosine.astype(jnp.float32)))
    h = jnp.full_like(u, polynomial.coefficients[-1])
    for coefficient in polynomial.coefficients[-2::-1]:
        h = h * u + coefficient
    return h * h
