"""Dense twins of the operations: the shortest code that defines each result, quadratic in memory.

Every implementation is tested against these. Nothing here is differentiable by design: the
gradients of YOSO are estimators with definitions of their own, given below as functions.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


def expectation_weights(
    query: Float[Array, "*batch T H"],
    key: Float[Array, "*batch S H"],
    *,
    hash_code_len: int,
) -> Float[Array, "*batch T S"]:
    """Probability that unit vectors collide in a `hash_code_len`-bit sign hash (paper, eq. 3)."""
    cosine = jnp.einsum("...th,...sh->...ts", query, key, precision="highest")
    return (1 - jnp.arccos(jnp.clip(cosine, -1, 1)) / jnp.pi) ** hash_code_len


def collision_weights(
    query_codes: Integer[Array, "*batch T m"], key_codes: Integer[Array, "*batch S m"]
) -> Float[Array, "*batch T S"]:
    """Fraction of the m hashes in which the codes of a query and of a key agree."""
    return (query_codes[..., :, None, :] == key_codes[..., None, :, :]).mean(-1, dtype=float)


def bucketed_weights(
    query_codes: Integer[Array, "*batch T m"],
    key_codes: Integer[Array, "*batch S m"],
    query: Float[Array, "*batch T H"],
    key: Float[Array, "*batch S H"],
    *,
    hash_code_len: int,
    bucket_bits: int,
) -> Float[Array, "*batch T S"]:
    """An estimate of `expectation_weights` that is zero for pairs without a common bucket.

    The fraction of the hashes whose lowest `bucket_bits` bits agree, which happens with probability
    `p ** bucket_bits`, times `p ** (hash_code_len - bucket_bits)`.
    """
    buckets = (codes & (2**bucket_bits - 1) for codes in (query_codes, key_codes))
    missing = expectation_weights(query, key, hash_code_len=hash_code_len - bucket_bits)
    return collision_weights(*buckets) * missing


def lsh_cumulation(
    query_codes: Integer[Array, "*batch T m"],
    key_codes: Integer[Array, "*batch S m"],
    value: Float[Array, "*batch S D"],
) -> Float[Array, "*batch T D"]:
    """`B v` with the collision fractions B."""
    weights = collision_weights(query_codes, key_codes).astype(value.dtype)
    return jnp.einsum("...ts,...sd->...td", weights, value, precision="highest")


def lsh_weighted_cumulation(
    query_codes: Integer[Array, "*batch T m"],
    key_codes: Integer[Array, "*batch S m"],
    query_weight: Float[Array, "*batch T W"],
    key_weight: Float[Array, "*batch S W"],
    value: Float[Array, "*batch S D"],
) -> Float[Array, "*batch T D"]:
    """`(B * (query_weight key_weight^T)) v` with the collision fractions B."""
    weights = collision_weights(query_codes, key_codes).astype(value.dtype)
    weights *= jnp.einsum("...tw,...sw->...ts", query_weight, key_weight, precision="highest")
    return jnp.einsum("...ts,...sd->...td", weights, value, precision="highest")


def surrogate_gradients(
    weights: Float[Array, "*batch T S"],
    query: Float[Array, "*batch T H"],
    key: Float[Array, "*batch S H"],
    value: Float[Array, "*batch S D"],
    grad_out: Float[Array, "*batch T D"],
    *,
    hash_code_len: int,
) -> tuple[Float[Array, "*batch T H"], Float[Array, "*batch S H"], Float[Array, "*batch S D"]]:
    """Gradients of `weights @ value` for unit query, unit key and value (paper, section 3.3).

    The derivative of a weight with respect to the cosine is replaced by
    `hash_code_len / 2 * weight`, which has no pole where query and key are parallel.
    """
    pair = jnp.einsum("...td,...sd->...ts", grad_out, value, precision="highest") * weights
    grad_query = jnp.einsum("...ts,...sh->...th", pair, key, precision="highest")
    grad_key = jnp.einsum("...ts,...th->...sh", pair, query, precision="highest")
    grad_value = jnp.einsum("...ts,...td->...sd", weights, grad_out, precision="highest")
    return hash_code_len / 2 * grad_query, hash_code_len / 2 * grad_key, grad_value
