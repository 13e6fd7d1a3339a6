"""Pretraining from end to end: from a folder of text to one with a model and its tokenizer."""

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mlm_helpers import write_corpus
from run_helpers import fast_compilations, numbers, quiet_console

from yoso_jax import YosoForMaskedLM
from yoso_jax.config_files import load_config
from yoso_jax.data.mlm import MLMConfig
from yoso_jax.data.tokenizer import load_tokenizer
from yoso_jax.errors import CheckpointError, ConfigError
from yoso_jax.optim import OptimizerConfig
from yoso_jax.pretraining.config import PretrainConfig
from yoso_jax.pretraining.losses import pretraining_metrics
from yoso_jax.pretraining.objective import PretrainObjective
from yoso_jax.pretraining.prepare import prepare
from yoso_jax.progress import TrainingProgress
from yoso_jax.saving import save_model
from yoso_jax.sharding import make_layout
from yoso_jax.starting import ModelOptions
from yoso_jax.trainer import train
from yoso_jax.training import restore_params

CONFIGS = Path(__file__).parents[1] / "configs" / "mlm"


@pytest.fixture(autouse=True, scope="module")
def compilations() -> Iterator[None]:
    with fast_compilations():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "texts", 40)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        run_dir=str(tmp_path / "run"),
        data_dir=str(folder),
        steps=60,
        sequence_length=32,
        batch_size=8,
        eval_batch_size=8,
        log_every=7,
        evaluate_every=5,
        optimizer=OptimizerConfig(learning_rate=1e-2, end_factor=1.0),
        data=MLMConfig(
            corpora=("texts",),
            vocab_size=310,
            valid_fraction=0.2,  # enough predictions for a perplexity to mean something
            test_fraction=0.1,
            sentence_order=True,
        ),
        model=ModelOptions(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout_prob=0.1,
            use_expectation=False,
            num_hash=4,
            hash_code_len=3,
        ),
    )


def test_pretraining(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped in the middle of an epoch and goes on."""
    plain = TrainingProgress.step

    def stop(self: TrainingProgress, step: int) -> None:
        if step == 55:
            signal.raise_signal(signal.SIGTERM)
        plain(self, step)

    console, text = quiet_console()
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "step", stop)
        assert train(config, console=console) is None
    results = train(config, resume=True, console=console)
    assert "all parameters are drawn anew" in text.getvalue()
    assert results is not None
    whole = dataclasses.replace(config, run_dir=f"{config.run_dir}-whole")
    assert train(whole, console=console) == results
    run_dir = Path(config.run_dir)
    assert numbers(run_dir) == numbers(whole.run_dir)
    assert json.loads((run_dir / "results.json").read_text()) == results
    first, *_, last = [r for r in numbers(run_dir) if r["split"] == "valid"]
    names = ["loss", "accuracy", "order_loss", "order_accuracy", "perplexity"]
    assert list(last) == ["step", "split", *names]
    assert last["loss"] < 0.8 * first["loss"]
    # Of what is most frequent a model predicts as much after five steps as after sixty.
    assert last["perplexity"] < first["perplexity"] / 2
    valid = {name: last[name] for name in names}
    assert {name: results[f"valid_{name}"] for name in names} == valid
    assert valid["perplexity"] == pytest.approx(np.exp(valid["loss"]))

    # What is kept is a masked language model with its tokenizer, which a run can start from.
    prepared = prepare(config)
    assert [note.split(":")[0] for note in prepared.notes[2:]] == ["train", "valid", "test"]
    folder = run_dir / "model"
    model = YosoForMaskedLM.from_pretrained(folder)
    objective = PretrainObjective(config, prepared)
    _, params, _ = restore_params(objective, "latest", make_layout())
    kept = nnx.merge(objective.make_graphdef(), params).masked_lm
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(model, nnx.Param), nnx.state(kept, nnx.Param)
    )
    assert load_tokenizer(folder).to_str() == load_tokenizer(prepared.data.tokenizer).to_str()
    check_longer(dataclasses.replace(config, init_from=str(folder)), model, valid)


def check_longer(config: PretrainConfig, model: Any, metrics: dict[str, float]) -> None:
    """Goes on with 64 positions instead of 32."""
    with pytest.raises(CheckpointError, match="pass position_extension='tile' or"):
        prepare(dataclasses.replace(config, model=ModelOptions(max_position_embeddings=64)))
    with pytest.raises(ConfigError, match="sequence_length must be at most 32"):
        prepare(dataclasses.replace(config, sequence_length=64, model=ModelOptions()))
    longer = dataclasses.replace(
        config,
        sequence_length=64,
        model=ModelOptions(max_position_embeddings=64),
        position_extension="tile",
    )
    objective = PretrainObjective(longer, prepare(longer))
    graphdef, params = nnx.split(objective.make_model(jax.random.key(2)), nnx.Param)
    assert graphdef == objective.make_graphdef()
    tables = [
        each.yoso.embeddings.position_embeddings.embedding[...]
        for each in (model, nnx.merge(graphdef, params).masked_lm)
    ]
    np.testing.assert_array_equal(tables[1], jnp.concatenate([tables[0], tables[0][2:]]))
    found = objective.make_evaluation(jax.random.key(1))(params, "valid")
    assert found["loss"] == pytest.approx(metrics["loss"], abs=0.7)
    assert next(objective.make_iterator())["input_ids"].shape == (8, 64)


def test_order_with_one_token_type(config: PretrainConfig, tmp_path: Path) -> None:
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, sentence_order=False))
    prepared = prepare(plain)
    assert prepared.start.config.type_vocab_size == 1
    model = PretrainObjective(plain, prepared).make_model(jax.random.key(0))
    assert model.order is None
    save_model(model.masked_lm, prepared.data.tokenizer, tmp_path)
    with_order = dataclasses.replace(config, init_from=str(tmp_path))
    prepared = prepare(with_order)
    assert prepared.notes[-1].startswith("the checkpoint has one token type")
    objective = PretrainObjective(with_order, prepared)
    model, batch = objective.make_model(jax.random.key(0)), next(objective.make_iterator())
    loss = jax.eval_shape(lambda: objective.loss(model, batch, nnx.Rngs(hash=0, dropout=1)))[0]
    assert loss.shape == ()


def test_mistakes(config: PretrainConfig, tmp_path: Path, unchecked_shapes: None) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint /nowhere"):
        prepare(dataclasses.replace(config, init_from="/nowhere"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    other = dataclasses.replace(config.data, tokenizer=str(tmp_path))
    assert prepare(dataclasses.replace(config, data=other)).start.config.pad_token_id == 0
    for changes, message in (
        ({"sequence_length": 3}, "sequence_length must be an integer >= 4, got 3"),
        ({"run_dir": ""}, "run_dir must be the name of a folder"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"optimizer": OptimizerConfig(warmup_steps=61)}, "warmup_steps must be at most steps"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)


def test_perplexity_of_a_loss_that_is_too_large() -> None:
    metrics = pretraining_metrics({"count": 0.0, "loss": 0.0, "correct": 0.0})
    assert metrics == {"loss": 0.0, "accuracy": 0.0, "perplexity": 1.0}
    metrics = pretraining_metrics({"count": 2.0, "loss": 1e9, "correct": 1.0})
    assert np.isfinite(metrics["perplexity"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, PretrainConfig)
    assert config.run_dir == f"runs/mlm/{path.stem}"
    assert config.sequence_length == config.model.max_position_embeddings
    assert config.sequence_length == int(path.stem.split("_")[1])
