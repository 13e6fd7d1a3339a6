"""Lower-level operations with free leading dimensions."""

from yoso_jax.kernels.codes import fast_hash as fast_hash
from yoso_jax.kernels.cumulation import lsh_cumulation as lsh_cumulation
from yoso_jax.kernels.cumulation import (
    lsh_weighted_cumulation as lsh_weighted_cumulation,
)
