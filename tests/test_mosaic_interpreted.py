"""The expectation kernels in Pallas' interpreter: tiles and their edges, masks, barriers, races."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_mosaic_cumulation import quick_compilation  # noqa: F401
from test_mosaic_expectation import expected, expected_means, normal, relative_error

from yoso_jax.kernels.mosaic_gpu import expectation, expectation_backward


def scattered(shape):
    """Here and there, and nowhere in the second tile."""
    mask = np.random.default_rng(0).random(shape) < 0.7
    mask[:, 64:128] = False
    mask[:, 0] = True
    return mask


def prefix(shape):
    """Lengths; of each batch row another."""
    return np.arange(shape[1]) < shape[1] // (1 + np.arange(shape[0])[:, None])


def first_row(shape):
    """Nothing in the other batch rows."""
    return np.ones(shape, bool) & (np.arange(shape[0])[:, None] == 0)


def split(case, **defaults):
    """What `inputs` takes, and options of the kernel."""
    return (
        {name: value for name, value in case.items() if name not in defaults},
        {name: case.get(name, default) for name, default in defaults.items()},
    )


def inputs(bits, shape, num_keys, value_dim, dtype=jnp.bfloat16, query_mask=None, key_mask=None):
    """Query, key, value and cotangent, NaN where they are masked; the masks; bits of a hash."""
    args = normal(shape, num_keys, value_dim, dtype)
    masks = [
        mask if mask is None else jnp.asarray(mask((shape[0], n)))
        for mask, n in ((query_mask, shape[1]), (key_mask, num_keys))
    ]
    for i, mask in enumerate((masks[0], masks[1], masks[1], masks[0])):
        if mask is not None:
            args[i] = jnp.where(mask[..., None, None], args[i], jnp.nan)
    return args, masks, bits


def assert_no_races(capsys):
    for race in capsys.readouterr().out.split("RACE DETECTED")[1:]:
        # A GPU adds atomically.
        assert race.count("(Interpreted.add)") == 2, race


def assert_masked_rows_are_zero(rows, mask):
    if mask is not None:
        assert not np.any(np.asarray(rows)[~np.asarray(mask)])


FORWARD = {
    "3-warpgroups": dict(
        bits=9, shape=(2, 200, 2, 16), num_keys=77, value_dim=32, query_mask=scattered
    ),
    "3-warpgroups-many-tiles": dict(
        bits=3, normalize=False, shape=(1, 70, 1, 7), num_keys=645, value_dim=64
    ),
    "2-warpgroups": dict(
        bits=5,
        shape=(2, 130, 1, 128),
        num_keys=500,
        value_dim=40,
        dtype=jnp.float16,
        query_mask=prefix,
        key_mask=prefix,
    ),
    "2-warpgroups-narrow-tiles": dict(
        bits=13,
        normalize=False,
        shape=(1, 1, 1, 48),
        num_keys=330,
        value_dim=160,
        dtype=jnp.float16,
        key_mask=scattered,
    ),
    "1-warpgroup": dict(
        bits=16, shape=(1, 70, 1, 256), num_keys=150, value_dim=240, key_mask=prefix
    ),
    "no-keys": dict(bits=8, shape=(2, 5, 1, 64), num_keys=3, value_dim=64, key_mask=first_row),
    "no-queries": dict(
        bits=2, shape=(2, 200, 1, 64), num_keys=3, value_dim=64, query_mask=first_row
    ),
    # More work than blocks: whole pieces of heads, then shorter ones, with rows of any lengths.
    "1-block": dict(
        blocks=1, bits=9, shape=(3, 250, 1, 16), num_keys=300, value_dim=16, key_mask=prefix
    ),
    "2-blocks": dict(
        blocks=2,
        bits=4,
        shape=(2, 330, 2, 32),
        num_keys=200,
        value_dim=32,
        query_mask=prefix,
        key_mask=prefix,
    ),
    "2-blocks-2-warpgroups": dict(
        blocks=2, bits=6, shape=(1, 450, 2, 128), num_keys=130, value_dim=64, query_mask=scattered
    ),
}


@pytest.mark.parametrize("case", FORWARD)
def test_forward(capsys, monkeypatch, case):
    given, options = split(FORWARD[case], normalize=True, blocks=None)
    blocks = options.pop("blocks")
    if blocks is not None:
        monkeypatch.setattr(expectation, "_MULTIPROCESSORS", blocks)
    args, masks, bits = inputs(**given)
    out, norm = expectation.attend(*args[:3], *masks, hash_code_len=bits, interpret=True, **options)
    wanted, *_ = expected(args, masks, bits)
    if norm is not None:
        wanted_norm = np.linalg.norm(wanted, axis=-1)
        assert relative_error(norm, wanted_norm) < 3e-3
        assert_masked_rows_are_zero(norm, masks[0])
        wanted = wanted / np.maximum(wanted_norm, 1e-12)[..., None]
    assert (norm is not None) == options["normalize"]
    assert out.dtype == args[2].dtype
    assert relative_error(out, wanted) < 3e-3
    assert_masked_rows_are_zero(out, masks[0])
    assert_no_races(capsys)


@pytest.mark.parametrize(
    "case", ["3-warpgroups", "2-warpgroups-narrow-tiles", "1-warpgroup", "no-keys", "2-blocks"]
)
def test_means(capsys, monkeypatch, unchecked_shapes, case):
    given, options = split(FORWARD[case], normalize=True, blocks=None)
    if options["blocks"] is not None:
        monkeypatch.setattr(expectation, "_MULTIPROCESSORS", options["blocks"])
    args, masks, bits = inputs(**given)
    # Rows, unlike a cotangent, with something in common with values.
    args[3] += 1
    args[2] += 1
    mean, count = expectation.means(*args[:3], *masks, args[3], hash_code_len=bits, interpret=True)
    wanted_mean, wanted_count = expected_means(args, masks, bits)
    assert relative_error(mean, wanted_mean) < 3e-3
    assert relative_error(count, wanted_count) < 1e-3
    for numbers in (mean, count):
        assert_masked_rows_are_zero(numbers, masks[0])
    assert_no_races(capsys)


BACKWARD = {
    "2-warpgroups": dict(
        bits=5,
        shape=(2, 300, 1, 64),
        num_keys=200,
        value_dim=24,
        dtype=jnp.float16,
        query_mask=prefix,
        key_mask=prefix,
        shifted=True,
    ),
    "2-warpgroups-same-bits": dict(
        bits=9,
        shape=(1, 700, 1, 16),
        num_keys=77,
        value_dim=64,
        query_mask=scattered,
        key_mask=scattered,
        deterministic=True,
    ),
    "1-warpgroup": dict(
        bits=3, shape=(1, 300, 2, 80), num_keys=100, value_dim=40, key_mask=scattered
    ),
    "1-warpgroup-same-bits": dict(
        bits=12,
        shape=(1, 70, 1, 33),
        num_keys=130,
        value_dim=100,
        dtype=jnp.float16,
        query_mask=scattered,
        key_mask=scattered,
        deterministic=True,
        with_value=False,
        shifted=True,
    ),
    "no-queries": dict(
        bits=16,
        shape=(2, 5, 1, 64),
        num_keys=3,
        value_dim=64,
        query_mask=first_row,
        with_value=False,
        shifted=True,
    ),
    "no-keys": dict(bits=8, shape=(2, 3, 1, 64), num_keys=5, value_dim=64, key_mask=first_row),
    # More keys than blocks, which take one after another, some of them masked.
    "1-block": dict(
        blocks=1,
        bits=9,
        shape=(3, 150, 1, 16),
        num_keys=300,
        value_dim=16,
        query_mask=first_row,
        key_mask=prefix,
    ),
    "2-blocks-same-bits": dict(
        blocks=2, bits=4, shape=(1, 140, 2, 80), num_keys=200, value_dim=32, deterministic=True
    ),
}


@pytest.mark.parametrize("case", BACKWARD)
def test_backward(capsys, monkeypatch, unchecked_shapes, case):
    given, options = split(
        BACKWARD[case], deterministic=False, with_value=True, blocks=None, shifted=False
    )
    blocks, shifted = options.pop("blocks"), options.pop("shifted")
    if blocks is not None:
        monkeypatch.setattr(expectation_backward, "_MULTIPROCESSORS", blocks)
    args, masks, bits = inputs(**given)
    shift = None
    if shifted:
        # What masked queries have is not used.
        shift = 3 * normal(given["shape"], 1, 1, jnp.float32)[0][..., 0]
        if masks[0] is not None:
            shift = jnp.where(masks[0][..., None], shift, jnp.nan)
    grads = expectation_backward.gradients(
        *args[:3], *masks, args[3], shift, hash_code_len=bits, interpret=True, **options
    )
    _, *wanted = expected(args, masks, bits, 0 if shift is None else jnp.nan_to_num(shift))
    assert (grads[2] is not None) == options["with_value"]
    for grad, each, mask in zip(grads, wanted, (*masks, masks[1]), strict=True):
        if grad is not None:
            assert grad.dtype == args[2].dtype
            assert relative_error(grad, each) < 6e-3
            assert_masked_rows_are_zero(grad, mask)
    assert_no_races(capsys)
