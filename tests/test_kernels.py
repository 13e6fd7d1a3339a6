"""Lower-level operations against the reference vectors and their dense twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import draw_codes, normal
from safetensors.numpy import load_file

from yoso_jax import kernels
from yoso_jax.hashing import sample_projection, sample_signs
from yoso_jax.kernels import collisions, reference
from yoso_jax.kernels.codes import fast_hash_projection, hadamard_transform, hash_codes
from yoso_jax.kernels.numbering import number_bits, number_codes


def relative_error(result, expected):
    return np.abs(result - expected).max() / max(1, np.abs(expected).max())


@pytest.fixture(scope="module")
def hash_vectors(data_dir):
    return load_file(data_dir / "ops" / "fast_hash.safetensors")


@pytest.fixture(scope="module")
def lsh_vectors(data_dir):
    vectors = load_file(data_dir / "ops" / "lsh_cumulation_and_backward.safetensors")
    return {name.removeprefix("n33x50/"): array for name, array in vectors.items()}


@pytest.mark.parametrize(
    ("case", "tokens", "hash_code_len"),
    [
        ("d32_tau8_m16", "q", 8),
        ("d32_tau8_m16", "k", 8),
        ("d64_tau9_m32", "q", 9),
        ("d64_tau9_m32", "k", 9),
        ("ties", "q", 9),
    ],
)
def test_block_layout_is_bit_exact(hash_vectors, case, tokens, hash_code_len):
    expected = hash_vectors[f"{case}/{tokens}_code"]
    options = dict(num_hashes=expected.shape[-1], hash_code_len=hash_code_len, bit_layout="block")
    x, signs = (jnp.asarray(hash_vectors[f"{case}/{name}"]) for name in (tokens, "D"))
    codes = jax.jit(functools.partial(kernels.fast_hash, **options))(x, signs)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, expected)
    projection = fast_hash_projection(signs, head_dim=x.shape[-1], **options)
    composed = hash_codes(x, projection, hash_code_len=hash_code_len)
    np.testing.assert_array_equal(composed, expected)


def test_dense_hashing_matches_the_vectors(data_dir):
    vectors = load_file(data_dir / "ops" / "hashing_dense.safetensors")
    for tokens in "qk":
        codes = hash_codes(
            jnp.asarray(vectors[f"a/{tokens}"]),
            jnp.asarray(vectors["a/rmat"]),
            hash_code_len=int(vectors["a/tau"]),
        )
        np.testing.assert_array_equal(codes, vectors[f"a/{tokens}_code"])


def test_hadamard_transform_is_sylvesters():
    sylvester = np.ones((1, 1))
    for _ in range(5):
        sylvester = np.kron([[1, 1], [1, -1]], sylvester)
    np.testing.assert_array_equal(hadamard_transform(jnp.eye(32)), sylvester)


@pytest.mark.parametrize(
    ("head_dim", "num_hashes", "hash_code_len"), [(1, 1, 1), (24, 40, 9), (64, 33, 16)]
)
@pytest.mark.parametrize("bit_layout", ["spread", "block"])
def test_composed_projection_gives_the_codes_of_the_transform(
    head_dim, num_hashes, hash_code_len, bit_layout
):
    options = dict(num_hashes=num_hashes, hash_code_len=hash_code_len, bit_layout=bit_layout)
    signs = sample_signs(jax.random.key(0), (2,), head_dim, **options)
    # Small integers: every projection is exact, so ties at zero must agree, too.
    x = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (2, 7, head_dim)), jnp.float32)
    codes = jax.jit(functools.partial(kernels.fast_hash, **options))(x, signs)
    projection = jax.jit(functools.partial(fast_hash_projection, head_dim=head_dim, **options))(
        signs
    )
    assert projection.shape == (2, head_dim, num_hashes * hash_code_len)
    np.testing.assert_array_equal(codes, hash_codes(x, projection, hash_code_len=hash_code_len))
    assert codes.min() >= 0
    assert codes.max() < 2**hash_code_len


def test_spread_layout_takes_each_bit_from_its_own_part():
    options = dict(num_hashes=40, hash_code_len=3)
    signs = sample_signs(jax.random.key(0), (), 32, **options)
    (x,) = normal((5, 32))
    codes = kernels.fast_hash(x, signs, **options)
    for index, bit in [(0, 0), (31, 2), (32, 0), (39, 1)]:
        part = index // 32 * 3 + bit
        y = x
        for i in range(3):
            y = hadamard_transform(y * signs[i, part])
        np.testing.assert_array_equal(codes[:, index] >> bit & 1, y[:, index % 32] > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_hashes=0), "num_hashes must be at least 1"),
        (dict(hash_code_len=17), r"hash_code_len must be in 1\.\.16"),
        (dict(bit_layout="rows"), "bit_layout must be 'spread' or 'block'"),
        (dict(num_hashes=64), r"signs must have shape \(2, 3, 4, 32\)"),
    ],
)
def test_fast_hash_refuses(unchecked_shapes, change, message):
    options = dict(num_hashes=32, hash_code_len=2, bit_layout="spread") | change
    with pytest.raises(ValueError, match=message):
        kernels.fast_hash(jnp.ones((2, 5, 32)), jnp.ones((2, 3, 2, 32)), **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairs", [True, False])
def test_cumulation_matches_the_vectors(lsh_vectors, monkeypatch, masked, pairs):
    if not pairs:  # the tables that long sequences use
        monkeypatch.setattr(collisions, "_PAIRS_PER_TOKEN", 0)
    v = {
        name: jnp.asarray(array, jnp.float32 if array.dtype == np.float64 else None)
        for name, array in lsh_vectors.items()
    }
    masks = {}
    if masked:
        masks = dict(query_mask=v["q_mask"] > 0, key_mask=v["k_mask"] > 0)
    expected = {
        name.split("/")[1]: array
        for name, array in lsh_vectors.items()
        if name.startswith("masked/" if masked else "ones/")
    }
    tau = int(v["tau"])
    codes = v["q_code"], v["k_code"]

    out, vjp = jax.vjp(
        lambda value: kernels.lsh_cumulation(*codes, value, hash_code_len=tau, **masks), v["v"]
    )
    assert relative_error(out, expected["lsh_cumulation"]) < 1e-5
    assert relative_error(vjp(v["grad_out"])[0], expected["v1_grad_v"]) < 1e-5
    out = kernels.lsh_weighted_cumulation(
        *codes, v["grad_out"], v["v"], v["k"], hash_code_len=tau, **masks
    )
    assert relative_error(out, expected["lsh_weighted_cumulation"]) < 1e-5
    assert relative_error(tau / 2 * out, expected["v1_grad_q"]) < 1e-5


@pytest.mark.parametrize("pairs", [True, False])
def test_sampled_gradients_match_the_vectors(lsh_vectors, monkeypatch, pairs):
    if not pairs:
        monkeypatch.setattr(collisions, "_PAIRS_PER_TOKEN", 0)
    v, tau = lsh_vectors, int(lsh_vectors["tau"])
    codes = jnp.asarray(v["q_code"]), jnp.asarray(v["k_code"])
    args = [jnp.asarray(v[name], jnp.float32) for name in ("q", "k", "v", "grad_out")]
    grads = jax.jit(functools.partial(collisions.collision_gradients, hash_code_len=tau))(
        *codes, *args
    )
    weights = reference.collision_weights(*codes)
    twins = reference.surrogate_gradients(weights, *args, hash_code_len=tau)
    for grad, twin, name in zip(grads, twins, "qkv", strict=True):
        assert relative_error(grad, v[f"ones/v1_grad_{name}"]) < 1e-5
        assert relative_error(twin, v[f"ones/v1_grad_{name}"]) < 1e-5


@pytest.mark.parametrize("case", ["a", "c"])
def test_expectation_gradients_match_the_vectors(data_dir, case):
    vectors = load_file(data_dir / "ops" / "expectation.safetensors")
    v = {n.removeprefix(f"{case}/"): a for n, a in vectors.items() if n.startswith(f"{case}/")}
    tau = int(v["tau"])
    args = [jnp.asarray(v[name], jnp.float32) for name in ("q", "k", "v", "grad_out")]
    grads = collisions.expectation_gradients(*args, hash_code_len=tau)
    weights = reference.expectation_weights(*args[:2], hash_code_len=tau)
    twins = reference.surrogate_gradients(weights, *args, hash_code_len=tau)
    for grad, twin, name in zip(grads, twins, "qkv", strict=True):
        # Pairs of cosine exactly 1: float32 cosines lose half their digits there.
        assert relative_error(grad, v[f"ones/hf_grad_{name}"]) < 2e-3
        assert relative_error(twin, v[f"ones/hf_grad_{name}"]) < 2e-3


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (9, 600), (530, 3)])
def test_weighted_cumulation_and_its_gradients_are_the_dense_twins(
    monkeypatch, pairs, num_queries, num_keys
):
    if not pairs:
        monkeypatch.setattr(collisions, "_PAIRS_PER_TOKEN", 0)
    query_codes, key_codes = draw_codes((2, 1, num_queries, 5), (2, 1, num_keys, 5), num_codes=8)
    sizes = (num_queries, 3), (num_keys, 3), (num_keys, 4), (num_queries, 4)
    *args, grad_out = normal(*((2, 1, *size) for size in sizes))

    def weighted(*args):
        return kernels.lsh_weighted_cumulation(query_codes, key_codes, *args, hash_code_len=3)

    def definition(*args):
        return reference.lsh_weighted_cumulation(query_codes, key_codes, *args)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(f, args):
        out, vjp = jax.vjp(f, *args)
        return out, *vjp(grad_out)

    results = [value_and_gradients(f, args) for f in (weighted, definition)]
    for result, expected in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("num_hashes", "hash_code_len"), [(13, 1), (1, 9), (2, 16)])
def test_one_hot_tables_equal_scattered_ones(monkeypatch, hash_code_len, num_hashes):
    shapes = (3, 21, num_hashes), (3, 34, num_hashes)
    query_codes, key_codes = draw_codes(*shapes, num_codes=2**hash_code_len)
    (value,) = normal((3, 34, 6))

    def cumulation():
        f = functools.partial(collisions.lsh_cumulation, hash_code_len=hash_code_len)
        return jax.jit(f)(query_codes, key_codes, value)

    expected = reference.lsh_cumulation(query_codes, key_codes, value)
    np.testing.assert_allclose(cumulation(), expected, atol=1e-5)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    np.testing.assert_allclose(cumulation(), expected, atol=1e-5)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (37, 5), (3000, 1096)])
def test_numbers_are_equal_where_codes_are(num_queries, num_keys):
    codes = draw_codes((2, num_queries, 3), (2, num_keys, 3), num_codes=2**16)
    codes = [x.at[:, :, 0].set(x[:, :, 0] % 7) for x in codes]
    numbers = jax.jit(number_codes)(*codes)
    bits = number_bits(num_queries + num_keys)
    codes, numbers = (
        np.concatenate([np.asarray(x) for x in pair], axis=1) for pair in (codes, numbers)
    )
    assert (numbers < 2**bits).all()
    for head in range(2):
        for m in range(3):
            pairs = set(zip(codes[head, :, m].tolist(), numbers[head, :, m].tolist(), strict=True))
            assert len({code for code, _ in pairs}) == len(pairs)
            assert len({number for _, number in pairs}) == len(pairs)


@pytest.mark.parametrize("hash_code_len", [1, 9, 16])
def test_collision_probability_is_as_accurate_as_float32(hash_code_len):
    cosine = np.linspace(-1, 1, 100_001, dtype=np.float32)
    expected = (1 - np.arccos(cosine.astype(np.float64)) / np.pi) ** hash_code_len
    result = collisions.collision_probability(jnp.asarray(cosine), hash_code_len)
    assert np.abs(result - expected).max() < 2e-6
    assert collisions.collision_probability(jnp.float32(1.0000002), hash_code_len) == 1


def test_codes_do_not_depend_on_length_and_projections_differ_between_heads():
    projection = sample_projection(jax.random.key(0), (2, 3), 16, num_hashes=8, hash_code_len=7)
    (x,) = normal((2, 3, 10, 16))
    codes = hash_codes(x, projection, hash_code_len=7)
    np.testing.assert_array_equal(codes, hash_codes(7.5 * x, projection, hash_code_len=7))
    same = jnp.broadcast_to(x[:1, :1], x.shape)
    codes = hash_codes(same, projection, hash_code_len=7)
    assert (codes[0, 0] == codes[1, 2]).mean() < 0.1


@pytest.mark.parametrize(("dtype", "hash_code_len"), [("uint8", 8), ("int16", 9), ("uint16", 16)])
def test_codes_of_any_integer_type(dtype, hash_code_len):
    (codes,) = draw_codes((70, 3, 2), num_codes=2**hash_code_len)
    codes = codes.astype(dtype)
    (value,) = normal((70, 3, 4))
    out = kernels.lsh_cumulation(codes, codes, value, hash_code_len=hash_code_len)
    np.testing.assert_allclose(out, reference.lsh_cumulation(codes, codes, value), atol=1e-5)


def test_numpy_arrays_are_taken(unchecked_shapes, lsh_vectors):
    v = lsh_vectors
    masks = dict(query_mask=v["q_mask"] > 0, key_mask=v["k_mask"] > 0)
    out = kernels.lsh_cumulation(
        v["q_code"], v["k_code"], v["v"], hash_code_len=int(v["tau"]), **masks
    )
    assert out.dtype == jnp.float32  # without 64-bit types, as everywhere in JAX
    assert relative_error(out, v["masked/lsh_cumulation"]) < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hash_code_len=0), ValueError, r"hash_code_len must be in 1\.\.16 .* got 0"),
        (dict(query_codes=jnp.full((4, 2), 8)), ValueError, r"query_codes must be in 0\.\.7"),
        (dict(key_codes=jnp.zeros((5, 2))), TypeError, "key_codes must be integers"),
        (dict(key_codes=jnp.zeros((5, 3), int)), ValueError, "equally many hashes"),
        (dict(value=jnp.zeros((6, 3))), ValueError, "must agree"),
        (dict(value=jnp.zeros((5, 3), int)), TypeError, "value must be floating point"),
        (dict(key_mask=jnp.ones(5)), TypeError, "key_mask must be bool"),
        (dict(query_mask=jnp.ones(5, bool)), ValueError, r"query_mask must have shape \(4,\)"),
        (
            dict(implementation="cuda"),
            ValueError,
            "implementation must be None, one of 'mosaic_gpu', 'xla'",
        ),
        (dict(implementation=()), ValueError, "implementation must be"),
    ],
)
def test_cumulation_refuses(unchecked_shapes, change, error, message):
    args = dict(
        query_codes=jnp.zeros((4, 2), int),
        key_codes=jnp.zeros((5, 2), int),
        value=jnp.zeros((5, 3)),
        hash_code_len=3,
    )
    with pytest.raises(error, match=message):
        kernels.lsh_cumulation(**(args | change))
