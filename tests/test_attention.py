"""The public operation: values, gradients, masks, dtypes, edges and errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import unit_rows
from run_helpers import fast_compilations
from safetensors.numpy import load_file

from yoso_jax import attention, yoso_attention
from yoso_jax.attention import l2_normalize, sampled_attention
from yoso_jax.hashing import sample_projection
from yoso_jax.kernels import reference
from yoso_jax.kernels.codes import hash_codes
from yoso_jax.kernels.xla import l2_normalize_gradient

RNG = jax.random.key(7)


@pytest.fixture(autouse=True, scope="module")
def compilations():
    with fast_compilations():
        yield


def inputs(shape=(2, 19, 3, 16), num_keys=None, value_dim=None, dtype=jnp.float32):
    """Query, key, value and a cotangent."""
    batch, tokens, heads, head_dim = shape
    num_keys, value_dim = num_keys or tokens, value_dim or head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (batch, n, heads, d), dtype)
        for key, n, d in zip(
            keys,
            (tokens, num_keys, num_keys, tokens),
            (head_dim, head_dim, value_dim, value_dim),
            strict=True,
        )
    ]


def dense(
    query, key, value, *, num_hashes, hash_code_len, backward="sampled", mask=None, query_mask=None
):
    """The definition: dense weights, autodiff of the surrogate."""
    q, k, v = (jnp.swapaxes(x.astype(jnp.float32), 1, 2) for x in (query, key, value))
    unit_q, unit_k = l2_normalize(q), l2_normalize(k)
    expectation = reference.expectation_weights(unit_q, unit_k, hash_code_len=hash_code_len)
    weights = expectation
    if num_hashes is not None:
        projection = sample_projection(
            RNG, q.shape[:2], q.shape[-1], num_hashes=num_hashes, hash_code_len=hash_code_len
        )
        codes = [hash_codes(x, projection, hash_code_len=hash_code_len) for x in (q, k)]
        weights = reference.collision_weights(*codes)
    is_other = num_hashes is not None and backward != "sampled"
    slope = expectation if is_other else weights
    cosine = jnp.einsum("bnth,bnsh->bnts", unit_q, unit_k, precision="highest")
    if mask is not None:
        weights, slope = (jnp.where(mask[:, None, None, :], x, 0) for x in (weights, slope))
    if query_mask is not None:
        weights, slope = (jnp.where(query_mask[:, None, :, None], x, 0) for x in (weights, slope))
    options: dict[str, Any] = dict(hash_code_len=hash_code_len)
    if is_other:
        options |= dict(num_hashes=num_hashes, key_mask=mask)
    return jnp.swapaxes(unit_rows(weights, slope, cosine, v, **options), 1, 2)


MODES = [
    dict(num_hashes=None),
    dict(num_hashes=11, backward="sampled"),
    dict(num_hashes=11, backward="expectation"),
]
mode = pytest.mark.parametrize("mode", MODES, ids=["expectation", "sampled", "sampled-E"])


def value_and_gradients(f, args, cotangent):
    """Compiled as one: eager operations would each be compiled for each shape."""

    @jax.jit
    def compiled(args, cotangent):
        out, vjp = jax.vjp(f, *args)
        return out, vjp(cotangent.astype(out.dtype))

    return compiled(args, cotangent)


def assert_same_function(f, g, args, cotangent, tolerance=2e-5):
    out, grads = value_and_gradients(f, args, cotangent)
    expected, expected_grads = value_and_gradients(g, args, cotangent)
    np.testing.assert_allclose(out, expected, atol=tolerance)
    for grad, expected in zip(grads, expected_grads, strict=True):
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(grad, expected, atol=tolerance * scale + 1e-7)


@mode
@pytest.mark.parametrize(
    ("shape", "num_keys", "value_dim"),
    [
        ((2, 19, 3, 16), None, None),
        ((1, 7, 2, 64), 23, 5),
        ((1, 1, 1, 1), 1, 256),
        ((1, 3, 1, 256), 1, 1),
        ((1, 1030, 1, 4), 515, 3),  # several blocks a side, the last ones ragged
    ],
)
def test_equals_the_definition(mode, shape, num_keys, value_dim):
    *args, cotangent = inputs(shape, num_keys, value_dim)
    assert_same_function(
        lambda *args: yoso_attention(*args, rng=RNG, hash_code_len=5, **mode),
        lambda *args: dense(*args, hash_code_len=5, **mode),
        args,
        cotangent,
    )


@mode
@pytest.mark.parametrize("hash_code_len", [1, 16])
def test_hash_code_lengths(mode, hash_code_len):
    *args, cotangent = inputs()
    args[1] = args[0] + 0.3 * args[1]  # long codes rarely collide: keep some pairs close
    assert_same_function(
        lambda *args: yoso_attention(*args, rng=RNG, hash_code_len=hash_code_len, **mode),
        lambda *args: dense(*args, hash_code_len=hash_code_len, **mode),
        args,
        cotangent,
    )


@pytest.mark.parametrize("num_hashes", [1, 8, 129])
def test_numbers_of_hashes(num_hashes):
    *args, cotangent = inputs()
    options = dict(num_hashes=num_hashes, hash_code_len=4)
    assert_same_function(
        lambda *args: yoso_attention(*args, rng=RNG, **options),
        lambda *args: dense(*args, **options),
        args,
        cotangent,
    )


@pytest.mark.parametrize("case", ["a", "c"])
@pytest.mark.parametrize("masked", [False, True])
def test_expectation_matches_the_vectors(data_dir, case, masked):
    vectors = load_file(data_dir / "ops" / "expectation.safetensors")
    v = {n.split("/", 1)[1]: a for n, a in vectors.items() if n.startswith(f"{case}/")}
    variant = "masked" if masked else "ones"
    query, key, value = (jnp.asarray(v[name], jnp.float32)[:, :, None] for name in "qkv")
    masks = (
        dict(mask=jnp.asarray(v["k_mask"] > 0), query_mask=jnp.asarray(v["q_mask"] > 0))
        if masked
        else {}
    )
    out = yoso_attention(
        query,
        key,
        value,
        num_hashes=None,
        hash_code_len=int(v["tau"]),
        normalize=False,
        **masks,
    )
    # The vectors hold pairs of cosine exactly 1, where float32 cosines lose half their digits.
    expected = v[f"{variant}/out"]
    assert np.abs(out[:, :, 0] - expected).max() < 2e-3 * max(1, np.abs(expected).max())


def test_float64_is_kept_where_it_is_enabled(data_dir):
    v = load_file(data_dir / "ops" / "expectation.safetensors")
    with jax.enable_x64(True):
        args = [jnp.asarray(v[f"a/{name}"])[:, :, None] for name in "qkv"]
        out = yoso_attention(*args, num_hashes=None, hash_code_len=int(v["a/tau"]), normalize=False)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out[:, :, 0], v["a/ones/out"], atol=1e-7)


@mode
def test_masks_and_lengths(mode):
    *args, cotangent = inputs(num_keys=13)
    query_mask = jnp.asarray([[True] * 12 + [False] * 7, [True, False] * 9 + [True]])
    mask = jnp.asarray([[False] * 2 + [True] * 11, [True] * 6 + [False] * 7])
    options = dict(hash_code_len=3, **mode)
    assert_same_function(
        lambda *args: yoso_attention(*args, mask, query_mask=query_mask, rng=RNG, **options),
        lambda *args: dense(*args, mask=mask, query_mask=query_mask, **options),
        args,
        cotangent,
    )
    lengths = jnp.asarray([12, 0])
    key_lengths = jnp.asarray([13, 1])
    attend = jax.jit(functools.partial(yoso_attention, rng=RNG, **options))
    np.testing.assert_allclose(
        attend(*args, mask, query_seq_lengths=lengths, key_value_seq_lengths=key_lengths),
        attend(
            *args,
            mask & (jnp.arange(13) < key_lengths[:, None]),
            query_mask=jnp.arange(19) < lengths[:, None],
        ),
        atol=1e-6,
    )


@mode
def test_padding_changes_nothing(mode):
    """Whatever stands in masked rows, even NaN, reaches neither outputs nor gradients."""
    *args, cotangent = inputs()
    padded = [jnp.pad(x, [(0, 0), (0, 5), (0, 0), (0, 0)], constant_values=jnp.nan) for x in args]
    mask = jnp.broadcast_to(jnp.arange(24) < 19, (2, 24))
    options = dict(rng=RNG, hash_code_len=4, **mode)
    out, grads = value_and_gradients(
        lambda *args: yoso_attention(*args, mask, **options),
        padded,
        jnp.pad(cotangent, [(0, 0), (0, 5), (0, 0), (0, 0)], constant_values=3.0),
    )
    expected, expected_grads = value_and_gradients(
        lambda *args: yoso_attention(*args, **options), args, cotangent
    )
    np.testing.assert_allclose(out[:, :19], expected, atol=1e-6)
    np.testing.assert_array_equal(out[:, 19:], 0)
    for grad, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad[:, :19], expected, atol=1e-5)
        np.testing.assert_array_equal(grad[:, 19:], 0)


@mode
def test_degenerate_rows_are_finite(mode):
    query, key, value, cotangent = inputs((1, 6, 1, 8))
    query = query.at[0, 0].set(0)
    key = key.at[0, 1].set(0).at[0, 2].set(query[0, 2]).at[0, 3].set(-query[0, 3])
    value = value.at[0, 4].set(0)
    nothing = jnp.zeros((1, 6), bool)
    for mask in (None, nothing):
        out, grads = value_and_gradients(
            lambda *args, mask=mask: yoso_attention(*args, mask, rng=RNG, **mode),
            (query, key, value),
            cotangent,
        )
        assert all(np.isfinite(x).all() for x in (out, *grads))
        if mask is not None:
            assert not any(np.any(x) for x in (out, *grads))


@mode
def test_equal_queries_and_keys_are_finite(mode):
    query, _, value, cotangent = inputs((2, 64, 2, 32))
    _, grads = value_and_gradients(
        lambda query, value: yoso_attention(query, query, value, rng=RNG, **mode),
        (query, value),
        cotangent,
    )
    assert all(np.isfinite(x).all() for x in grads)


@mode
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_only_inputs_and_output(monkeypatch, mode, dtype):
    def rounded_projection(*args, **kwargs):
        return sample_projection(*args, **kwargs).astype(dtype).astype(jnp.float32)

    # The projection is an input, too.
    monkeypatch.setattr(attention, "sample_projection", rounded_projection)
    args = [x.astype(dtype) for x in inputs()]
    *args, cotangent = args
    options = dict(rng=RNG, hash_code_len=4, **mode)

    def f(*args):
        return yoso_attention(*args, **options)

    out, grads = value_and_gradients(f, args, cotangent)
    wide = [x.astype(jnp.float32) for x in args]
    expected, expected_grads = value_and_gradients(f, wide, cotangent)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype("f"), expected.astype(dtype).astype("f"), rtol=1e-2)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        np.testing.assert_allclose(grad.astype("f"), expected, rtol=1e-2, atol=1e-3)


def test_outputs_have_unit_length_unless_asked_otherwise():
    *args, _ = inputs()
    out = yoso_attention(*args, num_hashes=None)
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), 1, atol=1e-6)
    raw = yoso_attention(*args, num_hashes=None, normalize=False)
    np.testing.assert_allclose(l2_normalize(raw), out, atol=1e-6)


def test_normalisation_matches_the_vectors(data_dir):
    v = load_file(data_dir / "ops" / "normalize.safetensors")
    y, vjp = jax.vjp(l2_normalize, jnp.asarray(v["x"], jnp.float32))
    np.testing.assert_allclose(y, v["y"], rtol=1e-5, atol=1e-7)
    grad = vjp(jnp.asarray(v["grad_out"], jnp.float32))[0]
    # Rows 1 and 2 are shorter than eps: PyTorch returns the cotangent times 1e12 there.
    np.testing.assert_array_equal(grad[1:3], 0)
    # And from what was normalised, as sampled attention finds it.
    norm = jnp.linalg.norm(jnp.asarray(v["x"], jnp.float32), axis=-1)
    again = l2_normalize_gradient(y, norm, jnp.asarray(v["grad_out"], jnp.float32))
    for row in (0, 3, 4, 5):
        expected = v["torch_grad_x"][row]
        np.testing.assert_allclose(grad[row], expected, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(again[row], expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(again[1:3], 0)


def test_the_key_determines_the_sample():
    *args, _ = inputs()
    first = yoso_attention(*args, rng=jax.random.key(1))
    # To rounding: a GPU adds the rows of a bucket in any order.
    for same in (jax.random.key(1), jax.random.PRNGKey(1)):
        np.testing.assert_allclose(yoso_attention(*args, rng=same), first, atol=1e-6)
    assert np.abs(first - yoso_attention(*args, rng=jax.random.key(2))).max() > 0.01


def test_numpy_arrays_are_taken(unchecked_shapes):
    *args, _ = map(np.asarray, inputs())
    mask, lengths = np.ones((2, 19), bool), np.array([19, 7])
    out = yoso_attention(*args, mask, num_hashes=None, key_value_seq_lengths=lengths)
    expected = yoso_attention(
        *map(jnp.asarray, (*args, mask)),
        num_hashes=None,
        key_value_seq_lengths=jnp.asarray(lengths),
    )
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("backward", "normalize"), [("sampled", False), ("expectation", True)])
def test_sampled_attention_is_what_follows_the_draw(backward, normalize):
    *args, cotangent = inputs(num_keys=13)
    options = dict(hash_code_len=5, backward=backward, normalize=normalize)
    projection = sample_projection(RNG, (2, 3), 16, num_hashes=11, hash_code_len=5)
    masks = jnp.arange(19) < jnp.asarray([[19], [7]]), jnp.arange(13) < jnp.asarray([[4], [13]])
    assert_same_function(
        lambda *args: sampled_attention(*args, projection, *masks, **options),
        lambda *args: yoso_attention(
            *args,
            masks[1],
            query_mask=masks[0],
            rng=RNG,
            num_hashes=11,
            **options,
        ),
        args,
        cotangent,
    )


@pytest.mark.parametrize(
    ("hash_fn", "bit_layout"), [("gaussian", "spread"), ("fast", "spread"), ("fast", "block")]
)
@pytest.mark.parametrize(("head_dim", "num_hashes"), [(1, 40), (33, 1)])
def test_hash_functions_run_with_any_head_dim(hash_fn, bit_layout, head_dim, num_hashes):
    *args, _ = inputs((1, 5, 2, head_dim))
    attend = functools.partial(
        yoso_attention, num_hashes=num_hashes, hash_fn=hash_fn, bit_layout=bit_layout
    )
    assert np.isfinite(jax.jit(attend)(*args, rng=RNG)).all()


Q = jnp.ones((2, 4, 3, 8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(query=Q[0]), ValueError, r"query must have 4 dimensions \[B, T, N, H\]"),
        (dict(key=Q[:, :, :2]), ValueError, r"key must have shape \[B=2, S, N=3, H=8\]"),
        (dict(value=Q[:, :3]), ValueError, r"value must have shape \[B, S, N, D\]"),
        (dict(value=Q[:, :0]), ValueError, "value must not be empty"),
        (dict(query=Q.astype(int)), TypeError, "query must be float32, bfloat16 or float16"),
        (dict(key=Q.astype("bfloat16")), TypeError, "key must have the dtype of query"),
        (dict(rng=None), ValueError, "rng is required unless num_hashes is None"),
        (dict(num_hashes=0), ValueError, "num_hashes, unless it is None, must be at least 1"),
        (dict(num_hashes=32.0), ValueError, "num_hashes.* must be at least 1 .an integer., got 32"),
        (dict(num_hashes=True), ValueError, "num_hashes.* must be at least 1 .an integer., got Tr"),
        (dict(hash_code_len=17), ValueError, r"hash_code_len must be in 1\.\.16 .* got 17"),
        (dict(hash_code_len=9.0), ValueError, r"hash_code_len must be in 1\.\.16 .* got 9\.0"),
        (dict(hash_fn="md5"), ValueError, "hash_fn must be 'gaussian' or 'fast', got 'md5'"),
        (dict(bit_layout="x"), ValueError, "bit_layout must be 'spread' or 'block'"),
        (
            dict(backward="x"),
            ValueError,
            "backward must be 'sampled', 'expectation', 'bucketed' or",
        ),
        (
            dict(implementation="x"),
            ValueError,
            "implementation must be None, one of 'mosaic_gpu', 'xla'",
        ),
        (dict(mask=jnp.ones((2, 3, 4, 4), bool)), ValueError, "Masks of single pairs"),
        (dict(mask=jnp.ones((2, 4))), TypeError, "mask must be bool"),
        (dict(mask=jnp.ones((2, 5), bool)), ValueError, r"mask must have shape \(2, 4\)"),
        (dict(query_mask=jnp.ones((1, 4), bool)), ValueError, "query_mask must have shape"),
        (dict(query_seq_lengths=jnp.ones(2)), ValueError, "query_seq_lengths must be integers"),
        (
            dict(key_value_seq_lengths=jnp.ones(3, int)),
            ValueError,
            r"key_value_seq_lengths must be integers of shape \(2,\)",
        ),
    ],
)
def test_refuses(unchecked_shapes, change, error, message):
    with pytest.raises(error, match=message):
        yoso_attention(**(dict(query=Q, key=Q, value=Q, rng=RNG) | change))


PROJECTION = jnp.ones((2, 3, 8, 10))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(query=Q[0]), ValueError, r"query must have 4 dimensions \[B, T, N, H\]"),
        (dict(hash_code_len=0), ValueError, r"hash_code_len must be in 1\.\.16"),
        (
            dict(backward="x"),
            ValueError,
            "backward must be 'sampled', 'expectation', 'bucketed' or",
        ),
        (dict(projection=PROJECTION[..., :9]), ValueError, r"N=3, H=8, num_hashes \* 5\], got"),
        (dict(projection=PROJECTION[:1]), ValueError, r"projection must be .* of shape \[B=2, N"),
        (dict(projection=PROJECTION > 0), ValueError, "projection must be floating point"),
        (dict(query_mask=jnp.ones((1, 4), bool)), ValueError, "query_mask must have shape"),
        (dict(key_mask=jnp.ones((2, 4))), TypeError, "key_mask must be bool"),
        (dict(implementation="x"), ValueError, "implementation must be None, one of"),
    ],
)
def test_sampled_attention_refuses(unchecked_shapes, change, error, message):
    args = dict(query=Q, key=Q, value=Q, projection=PROJECTION, hash_code_len=5)
    with pytest.raises(error, match=message):
        sampled_attention(**(args | change))
