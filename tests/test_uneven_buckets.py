"""Where all pairs of tokens are less work than those of buckets, they are taken, once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import normal
from run_helpers import fast_compilations

from yoso_jax import yoso_attention
from yoso_jax.kernels import buckets, reference

RNG = jax.random.key(5)
TOKENS = 1024


@pytest.fixture(autouse=True, scope="module")
def compilations():
    with fast_compilations():
        yield


@functools.partial(jax.jit, static_argnames=("backward", "normalize"))
def gradients(query, key, value, backward, normalize=True):
    def loss(*args):
        out = yoso_attention(
            *args,
            rng=RNG,
            num_hashes=8,
            hash_code_len=6,
            num_backward_hashes=1,
            bucket_bits=3,
            backward=backward,
            normalize=normalize,
        )
        return jnp.sum(out * jnp.arange(out.shape[-1]))

    return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)


def differences(result, expected):
    return [
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for a, b in zip(result, expected, strict=True)
    ]


def draw():
    query, value = normal((1, TOKENS, 2, 8), (1, TOKENS, 2, 8))
    return query, query[:, :1] + query / 256, value


@pytest.mark.parametrize("normalize", [True, False])
def test_tokens_in_one_bucket_have_the_gradients_over_all_pairs(normalize):
    _, alike, value = draw()
    run = functools.partial(gradients, alike, alike, value, normalize=normalize)
    # The arccosine is steep where the cosine is 1.
    assert max(differences(run("bucketed"), run("expectation"))) < 1e-3


def test_tokens_in_even_buckets_do_not():
    query, _, value = draw()
    run = functools.partial(gradients, query, query[:, ::-1], value)
    assert min(differences(run("bucketed"), run("expectation"))[:2]) > 0.1


def test_all_heads_of_a_vmap_decide_together():
    """As those of one call: a choice for each of them would compute both."""
    query, alike, value = draw()
    args = [jnp.concatenate([x, y]) for x, y in ((alike, query), (alike, query[:, ::-1]))]
    args.append(jnp.concatenate([value, value]))
    for is_all in (True, False):
        options = dict(hash_code_len=6, bucket_bits=3)
        units = [jnp.swapaxes(x, 1, 2) for x in args]
        units[:2] = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in units[:2]]
        codes = [jnp.zeros((2, 2, TOKENS, 1), jnp.int32)] * 2
        if not is_all:  # of 32 tokens each
            codes = [x + jnp.arange(TOKENS)[:, None] * 8 // TOKENS for x in codes]
        run = functools.partial(buckets.bucketed_gradients, **options)
        inputs = *codes, *units, units[2]
        together = jax.jit(lambda *x, run=run: run(*x, None, None))(*inputs)
        mapped = jax.jit(jax.vmap(lambda *x, run=run: run(*x, None, None)))(*inputs)
        for a, b in zip(mapped, together, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_masked_tokens_do_not_matter():
    """Whatever stands in their rows, even NaN; also a head without queries or without keys."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        query, key, value, rows = (
            jnp.asarray(rng.normal(size=(3, n, 8))) for n in (90, 70, 70, 90)
        )
        query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
        masks = [rng.random((3, n)) < 0.7 for n in (90, 70)]
        masks[0][1], masks[1][2] = False, False
        masks = [jnp.asarray(x) for x in masks]
        weights = reference.expectation_weights(query, key, hash_code_len=6)
        weights = jnp.where(masks[0][..., None] & masks[1][..., None, :], weights, 0)
        expected = reference.surrogate_gradients(weights, query, key, value, rows, hash_code_len=6)[
            :2
        ]
        count = weights.sum(-1)
        total = jnp.sum(weights * (rows @ np.swapaxes(value, 1, 2)), -1)
        expected += total / jnp.where(count > 0, count, 1), count
        sides = masks[0], masks[1], masks[1], masks[0]
        args = [
            jnp.where(mask[..., None], x, jnp.nan)
            for mask, x in zip(sides, (query, key, value, rows), strict=True)
        ]
        codes = [jnp.zeros((3, n, 8), jnp.int32) for n in (90, 70)]
        options = dict(hash_code_len=6, bucket_bits=3)
        result = buckets.bucketed_gradients(*codes, *args, *masks, **options)
        result += buckets.bucket_means(*codes, *args, *masks, **options)
        for found, wanted in zip(result, expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_what_is_less_work():
    """A pair of tiles of buckets counts as two of all pairs."""
    choose = functools.partial(buckets.takes_all_pairs, num_heads=3, num_queries=65, num_keys=200)
    assert not choose(jnp.float32(12))
    assert choose(jnp.float32(13))


def test_masked_tokens_are_in_no_bucket():
    codes = [jnp.arange(n)[None, :, None] % 4 for n in (300, 200)]
    masks = jnp.arange(300)[None] < 100, jnp.arange(200)[None] % 4 == 1
    assert buckets._count_tile_pairs(tuple(codes), (None, None), 2) == 4 * 2 * 1
    assert buckets._count_tile_pairs(tuple(codes), masks, 2) == 1
