"""Which gradients of query and key a sampled forward pass has, and from how many hashes.

What the caller leaves open depends on shapes and the device only, never on data.
"""

import dataclasses
from typing import Literal

type Backward = Literal["sampled", "expectation", "bucketed"]

BACKWARDS = ("sampled", "expectation", "bucketed")

# Tokens a bucket should have at least, on average. Of the same number of pairs, fewer hashes of
# larger buckets are less noisy, have less to sort and to sum up, and their tiles are fuller.
_BUCKET_TOKENS = 256
# With 8 a masked language model and Text of 4,096 tokens train as with the expectation; with 3 the
# language model is 9 % behind in perplexity (docs/gradients.md).
_HASHES = 8


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Where the buckets of 8 hashes begin to take clearly less time than the expectation.

    Attributes:
      num_tokens: the larger of the numbers of queries and of keys from which on they do.
      provenance: how that is known.
    """

    num_tokens: int
    provenance: str


# By JAX's name of the platform.
CROSSOVERS = {
    "cpu": Crossover(
        8192,
        "2 cores of an AMD EPYC, jax 0.11.2, float32, H = 64, normalised rows, forward and "
        "backward pass: the expectation's time is 0.95 to 0.97 times the buckets' up to 4,096, "
        "where these take all pairs, too, 1.6 at 8,192, 3.5 at 16,384 "
        "(benchmarks/results/backward_cpu.json); 'sampled' is never the fastest",
    ),
    "gpu": Crossover(
        8192,
        "H200, jax 0.11.2, bfloat16, H = 64, normalised rows, forward and backward pass by "
        "mosaic_gpu: the expectation's time is 0.92 times the buckets' at 4,096, where these take "
        "all pairs, too, 1.4 at 8,192, 2.4 at 16,384; 1.5 and 4.7 times that of 3 hashes at 4,096 "
        "and 16,384 (benchmarks/results/expectation_backward.json, mixed_8192.json, "
        "bucketed_8_hashes.json, bucketed_3_hashes.json)",
    ),
    # Not measured: to be replaced when it is.
    "tpu": Crossover(8192, "a cautious guess"),
}


@dataclasses.dataclass(frozen=True)
class BackwardPlan:
    """What a backward pass does, with nothing left open.

    Attributes:
      kind: which gradients.
      num_hashes: hashes whose buckets are used.
      bucket_bits: bits of a bucket; at least 1 if it is "bucketed", and 0 for "expectation".
    """

    kind: Backward
    num_hashes: int
    bucket_bits: int


def plan(
    backward: Backward | None,
    num_backward_hashes: int | None,
    bucket_bits: int | None,
    *,
    num_hashes: int,
    hash_code_len: int,
    num_tokens: int,
    is_biased: bool,
    platform: str,
) -> BackwardPlan:
    """Fills in what is None.

    Args:
      backward: the kind; None for the fastest.
      num_backward_hashes: None for at most 8 of them.
      bucket_bits: None for buckets of 256 to 511 tokens, where they are even.
      num_hashes: hashes of the forward pass.
      hash_code_len: bits of a hash.
      num_tokens: the number of queries or of keys, whichever is larger.
      is_biased: whether the bits of a hash depend on each other.
      platform: of the device.

    Raises:
      ValueError: "bucketed" is asked for although the hashes are biased.
    """
    if num_backward_hashes is None:
        num_backward_hashes = min(num_hashes, _HASHES)
    if backward is None:
        backward = _choose(num_tokens, num_backward_hashes, is_biased, platform)
    elif backward == "bucketed" and is_biased:
        raise ValueError(
            "backward='bucketed' needs hashes whose bits are independent: bit_layout must be "
            "'spread' with hash_fn='fast', got 'block'."
        )
    if backward == "expectation":
        bucket_bits = 0  # there is one bucket, whatever the hash
    elif bucket_bits is None:
        filled = (num_tokens // _BUCKET_TOKENS).bit_length() - 1
        bucket_bits = max(0, min(filled, hash_code_len))
    if backward == "bucketed" and bucket_bits == 0:
        backward = "expectation"
    return BackwardPlan(backward, num_backward_hashes, bucket_bits)


def _choose(num_tokens: int, num_backward_hashes: int, is_biased: bool, platform: str) -> Backward:
    if is_biased:
        return "sampled"  # as published, like the hashes
    crossover = CROSSOVERS.get(platform, CROSSOVERS["gpu"])
    # Buckets take time in proportion to hashes and tokens, the expectation to tokens squared.
    start = crossover.num_tokens * num_backward_hashes / _HASHES
    return "bucketed" if num_tokens >= start else "expectation"
