"""Gradient noise in a model: what is captured, and what is measured of it."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import always_buckets
from flax import nnx
from run_helpers import fast_compilations, quiet_console, tiny_config

import yoso_jax.trainer as trainer
from yoso_jax.attention import yoso_attention
from yoso_jax.errors import ConfigError
from yoso_jax.gradient_noise import capture, measure
from yoso_jax.lra_objective import LRAObjective
from yoso_jax.training import with_attention

SCRIPT = Path(__file__).parents[1] / "scripts" / "gradient_noise.py"


@pytest.fixture(scope="module", autouse=True)
def compilations() -> Iterator[None]:
    with fast_compilations():
        yield


@pytest.fixture(scope="module")
def objective(tmp_path_factory: pytest.TempPathFactory) -> LRAObjective:
    config = tiny_config(tmp_path_factory.mktemp("runs"), steps=4)
    trainer.train(config, console=quiet_console()[0])
    return LRAObjective.create(config)


@pytest.fixture(scope="module")
def captured(objective: LRAObjective) -> Any:
    params = objective.init_params(jax.random.key(0))
    batch = next(objective.make_iterator())
    return capture(objective, params, batch, jax.random.key(1))


def test_captured_gradient_gives_that_of_the_parameters(objective: LRAObjective) -> None:
    """The gradient of the projection of values, from what was captured and from the whole loss."""
    params = objective.init_params(jax.random.key(0))
    batch, key = next(objective.make_iterator()), jax.random.key(1)
    hash_key, dropout_key = jax.random.split(key)

    def loss(params: Any) -> Any:
        model = nnx.merge(objective.make_graphdef(), params)
        return objective.loss(model, batch, nnx.Rngs(hash=hash_key, dropout=dropout_key))[0]

    gradients = jax.jit(jax.grad(loss))(params)
    expected = gradients["encoder"]["layers"][0]["attention"]["value"]["bias"][...]
    (layer,) = capture(objective, params, batch, key)
    assert layer.query.shape == (4, 16, 2, 4)
    assert (layer.num_hashes, layer.hash_code_len) == (4, 3)
    layer_key = jax.random.split(nnx.Rngs(hash=hash_key).hash(), 1)[0]

    def attend(value: Any) -> Any:
        return yoso_attention(
            layer.query,
            layer.key,
            value,
            layer.mask,
            rng=layer_key,
            num_hashes=4,
            hash_code_len=3,
            hash_fn=layer.hash_fn,
            normalize=False,
        )

    (found,) = jax.jit(lambda x: jax.vjp(attend, x)[1](layer.gradient))(layer.value)
    np.testing.assert_allclose(found.sum((0, 1)).ravel(), expected, rtol=1e-4, atol=1e-7)
    assert float(jnp.abs(expected).max()) > 0


def test_noise_falls_with_hashes_and_is_none_for_one_bucket(captured: Any) -> None:
    with always_buckets():
        rows = measure(captured, (1, 4), (4, 16), 8, jax.random.key(2))
    names = [(row["estimator"], row["num_hashes"], row.get("bucket_bits")) for row in rows]
    assert names == [
        ("sampled", 4, None),
        ("bucketed", 1, 2),
        ("bucketed", 4, 2),
        ("bucketed", 1, 0),
        ("bucketed", 4, 0),
    ]
    _, one, four, *exact = rows
    for name in ("query", "key"):
        assert four[f"noise_{name}"] < 0.75 * one[f"noise_{name}"]
        assert four[f"cosine_{name}"] > one[f"cosine_{name}"]
        for row in exact:
            assert row[f"noise_{name}"] < 1e-4
            assert row[f"cosine_{name}"] == pytest.approx(1, abs=1e-5)


def test_script_writes_report_and_picture(
    objective: LRAObjective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    report, plot = tmp_path / "noise.json", tmp_path / "noise.png"
    options = ["--mb", "2", "--buckets", "4", "8", "--samples", "1", "--sequences", "2"]
    command = [objective.config.run_dir, *options, "--json", str(report), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = json.loads(report.read_text())["rows"]
    assert [row.get("bucket_tokens") for row in rows] == [None, 4.0, 8.0]
    assert {row["step"] for row in rows} == {4}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "noise_query" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command, "--mb", "9"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "--mb must be at most 4, got 9" in capsys.readouterr().err


def test_attention_without_samples_is_refused(objective: LRAObjective) -> None:
    other = LRAObjective(with_attention(objective.config, "expectation"), objective.data)
    params = other.init_params(jax.random.key(0))
    with pytest.raises(ConfigError, match="sampled attention"):
        capture(other, params, next(other.make_iterator()), jax.random.key(1))
