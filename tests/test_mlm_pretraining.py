"""Pretraining from end to end: from a folder of text to one with a model and its tokenizer."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx
from mlm_helpers import write_corpus
from run_helpers import fast_compilations

from yoso_jax import YosoForMaskedLM
from yoso_jax.data.mlm import MLMConfig
from yoso_jax.data.tokenizer import load_tokenizer
from yoso_jax.errors import CheckpointError, ConfigError
from yoso_jax.finetuning.save import save_model
from yoso_jax.finetuning.start import ModelOptions
from yoso_jax.optim import OptimizerConfig
from yoso_jax.pretraining.config import PretrainConfig
from yoso_jax.pretraining.losses import pretraining_metrics
from yoso_jax.pretraining.objective import PretrainObjective
from yoso_jax.pretraining.prepare import prepare

CONFIGS = Path(__file__).parents[1] / "configs" / "mlm"


@pytest.fixture(autouse=True, scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with fast_compilations(tmp_path_factory.mktemp("compilations")):
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
        data=MLMConfig(corpora=("texts",), vocab_size=310, test_fraction=0.1, sentence_order=True),
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


def make_step(objective: PretrainObjective) -> tuple[Any, Any]:
    """A step of Adam, and a new state."""
    graphdef, params = nnx.split(objective.make_model(jax.random.key(0)), nnx.Param)
    assert graphdef == objective.make_graphdef()
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            rngs = nnx.Rngs(hash=key, dropout=key)
            return objective.loss(nnx.merge(graphdef, params), batch, rngs)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    return step, (params, tx.init(params))


def test_pretraining(config: PretrainConfig) -> None:
    prepared = prepare(config)
    assert prepared.notes[0] == "all parameters are drawn anew"
    assert [note.split(":")[0] for note in prepared.notes[2:]] == ["train", "valid", "test"]
    objective = PretrainObjective(config, prepared)
    step, (params, opt_state) = make_step(objective)
    evaluation = objective.make_evaluation(jax.random.key(1))
    before = evaluation(params, "valid")
    assert list(before) == ["loss", "accuracy", "order_loss", "order_accuracy", "perplexity"]
    assert before["perplexity"] == pytest.approx(np.exp(before["loss"]))
    assert before["loss"] == pytest.approx(np.log(prepared.data.vocabulary.size), abs=1)

    iterator = objective.make_iterator()
    for number in range(config.steps):
        if number == config.steps - 5:
            position, middle = iterator.get_state(), (params, opt_state)
        params, opt_state, _ = step(params, opt_state, next(iterator), jax.random.key(number))
    after = evaluation(params, "valid")
    assert after["loss"] < 0.7 * before["loss"]
    assert after["accuracy"] > before["accuracy"]
    assert after == evaluation(params, "valid")

    # Resumed from the middle, in the middle of an epoch, it ends the same bit for bit.
    resumed, state = objective.make_iterator(), middle
    resumed.set_state(json.loads(json.dumps(position)))
    for number in range(config.steps - 5, config.steps):
        *state, _ = step(*state, next(resumed), jax.random.key(number))
    jax.tree.map(np.testing.assert_array_equal, state[0], params)

    # What is kept is a masked language model with its tokenizer, which a run can start from.
    metrics, files = objective.finish(params, jax.random.key(1))
    run_dir = Path(config.run_dir)
    assert (metrics["valid"], files) == (after, [])
    assert json.loads((run_dir / "metrics.json").read_text()) == metrics
    folder = run_dir / "model"
    model = YosoForMaskedLM.from_pretrained(folder)
    kept = nnx.merge(objective.make_graphdef(), params).masked_lm
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(model, nnx.Param), nnx.state(kept, nnx.Param)
    )
    assert load_tokenizer(folder).to_str() == load_tokenizer(prepared.data.tokenizer).to_str()
    check_longer(dataclasses.replace(config, init_from=str(folder)), model, after)


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
    loss = jax.eval_shape(lambda: objective.loss(model, batch, nnx.Rngs(hash=0, dropout=1)))
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
    values = yaml.safe_load(path.read_text())
    sections = {"data": MLMConfig, "model": ModelOptions, "optimizer": OptimizerConfig}
    assert values["data"].pop("task") == MLMConfig.task
    values["data"]["corpora"] = tuple(values["data"]["corpora"])
    for name in ("learning_rate", "eps"):  # YAML reads 1e-6 as text
        values["optimizer"][name] = float(values["optimizer"][name])
    for name, section in sections.items():
        values[name] = section(**values[name])
    config = PretrainConfig(**values)
    assert config.run_dir == f"runs/mlm/{path.stem}"
    assert config.sequence_length == config.model.max_position_embeddings
    assert config.sequence_length == int(path.stem.split("_")[1])
    assert f"python scripts/train.py configs/mlm/{path.name}" in path.read_text()
