"""Fine-tuning from end to end: from a folder of examples to one with a model and predictions."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from finetune_helpers import VOCABULARY, save_tokenizer
from flax import nnx
from run_helpers import fast_compilations, quiet_console

from yoso_jax import YosoConfig, YosoForMaskedLM, load_pretrained
from yoso_jax.errors import CheckpointError, ConfigError
from yoso_jax.finetuning.choices import ChoicesConfig
from yoso_jax.finetuning.config import FinetuneConfig
from yoso_jax.finetuning.conll import WordsConfig
from yoso_jax.finetuning.glue import GlueConfig
from yoso_jax.finetuning.objective import FinetuneObjective
from yoso_jax.finetuning.prepare import prepare
from yoso_jax.finetuning.squad import QuestionsConfig
from yoso_jax.metrics import read_metrics
from yoso_jax.optim import OptimizerConfig
from yoso_jax.saving import save_model
from yoso_jax.starting import ModelOptions
from yoso_jax.trainer import train
from yoso_jax.training import make_keys

LENGTH = 64


@pytest.fixture(autouse=True, scope="module")
def compilations() -> Iterator[None]:
    with fast_compilations():
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), data_dir / "finetune")


@pytest.fixture(scope="module")
def pretrained(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model, with its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = YosoConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        num_hash=4,
        hash_code_len=3,
        hidden_dropout_prob=0.0,
        initializer_range=0.3,
    )
    save_model(YosoForMaskedLM(config, rngs=nnx.Rngs(0)), tokenizer, folder)
    return folder


@pytest.fixture
def make_config(tmp_path: Path, data_dir: Path, pretrained: Path) -> Any:
    def make_config(data: Any, folder: str, **changes: Any) -> FinetuneConfig:
        config = FinetuneConfig(
            run_dir=str(tmp_path / "run"),
            data_dir=str(data_dir / "finetune" / folder),
            steps=40,
            sequence_length=LENGTH,
            data=data,
            init_from=str(pretrained),
            batch_size=4,
            eval_batch_size=4,
        )
        return dataclasses.replace(config, **changes)

    return make_config


def fine_tune(config: FinetuneConfig) -> tuple[Any, dict[str, Any], list[Path]]:
    """Trains, and looks at what is left behind; returns what was prepared, metrics, files."""
    config = dataclasses.replace(
        config,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        evaluate_every=config.steps // 2,
        log_every=config.steps // 2,
    )
    console, text = quiet_console()
    results = train(config, console=console)
    assert results is not None
    run_dir = Path(config.run_dir)
    assert json.loads((run_dir / "results.json").read_text()) == results
    losses = [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if r["split"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    prepared = prepare(config)
    assert all(note in text.getvalue() for note in prepared.notes)
    # The model is loaded from its folder as what it is, with the tokenizer beside it.
    loaded = load_pretrained(run_dir / "model")
    assert type(loaded) is prepared.task.model_class
    again = prepare(dataclasses.replace(config, init_from=str(run_dir / "model")))
    assert not [note for note in again.start.notes if "afresh" in note]
    objective = FinetuneObjective(config, prepared)
    _, _, key = make_keys(config.seed)
    evaluation = objective.make_evaluation(key)
    params = nnx.state(loaded, nnx.Param)
    metrics = {split: evaluation(params, split) for split in objective.labelled_splits}
    for split, found in metrics.items():
        for name, value in found.items():
            assert results[f"{split}_{name}"] == pytest.approx(value)
    return prepared, metrics, sorted((run_dir / "predictions").iterdir())


def test_sequence_classification(make_config: Any) -> None:
    config = make_config(GlueConfig("sst2"), "glue/SST-2", length_buckets=(16, 32, LENGTH))
    prepared, metrics, files = fine_tune(config)
    assert any("initialised afresh: classifier" in note for note in prepared.notes)
    assert any("not in this model: cls" in note for note in prepared.notes)
    assert list(metrics) == ["valid"]
    assert list(metrics["valid"]) == ["loss", "accuracy"]
    rows = [line.split("\t") for line in files[0].read_text().splitlines()]
    assert rows[0] == ["index", "prediction"]
    assert [row[0] for row in rows[1:]] == ["0", "1", "2"]
    assert {row[1] for row in rows[1:]} <= {"0", "1"}


def test_regression_from_scratch(make_config: Any, tokenizer: Path) -> None:
    sizes = ModelOptions(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = make_config(
        GlueConfig("stsb"), "glue/STS-B", init_from=None, model=sizes, tokenizer=str(tokenizer)
    )
    prepared = prepare(config)
    assert prepared.start.config.vocab_size == VOCABULARY
    assert prepared.start.config.num_labels == 1
    assert prepared.notes[0] == "all parameters are drawn anew"
    assert prepared.pad_id == 1
    with pytest.raises(ValueError, match="tokenizer must be a folder or file if init_from is"):
        dataclasses.replace(config, tokenizer=None)


def test_token_classification(make_config: Any) -> None:
    _, metrics, files = fine_tune(make_config(WordsConfig(), "conll"))
    assert list(metrics) == ["valid", "test"]
    assert list(metrics["test"]) == ["loss", "f1", "precision", "recall", "accuracy"]
    words = [line.split("\t")[0] for line in files[0].read_text().splitlines()]
    assert words == ["Bela", "lives", "in", "Old", "Brimley", ".", ""]


def test_question_answering(make_config: Any) -> None:
    data = QuestionsConfig(
        "train-v2.0.json", "dev-v2.0.json", "test.json", null_answers=True, doc_stride=8
    )
    prepared, metrics, files = fine_tune(make_config(data, "squad"))
    assert any(" examples from " in x and " in " in x and " windows" in x for x in prepared.notes)
    assert list(metrics) == ["valid"]
    assert {"f1", "exact_match", "no_answer_f1"} < metrics["valid"].keys()
    assert list(json.loads(files[0].read_text())) == ["p2", "p1"]


def test_multiple_choice(make_config: Any) -> None:
    data = ChoicesConfig("train.jsonl", "valid.jsonl", "test.jsonl", id="id")
    _, metrics, files = fine_tune(make_config(data, "choices"))
    assert list(metrics["valid"]) == ["loss", "accuracy"]
    entries = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert [entry["id"] for entry in entries] == ["q7", "q5"]


def test_head_of_another_task(make_config: Any, pretrained: Path, tmp_path: Path) -> None:
    config = make_config(GlueConfig("mnli"), "glue/MNLI")
    first = prepare(config)
    save_model(first.start.build("float32", nnx.Rngs(3)), pretrained, tmp_path / "mnli")
    config = make_config(GlueConfig("rte"), "glue/RTE", init_from=str(tmp_path / "mnli"))
    with pytest.raises(CheckpointError, match=r"of a wrong shape: classifier.*fresh_head"):
        prepare(config)
    start = prepare(dataclasses.replace(config, fresh_head=True)).start
    assert "the head is drawn anew" in start.notes
    model = start.build("float32", nnx.Rngs(0))
    assert model.classifier.out_proj.kernel.shape[-1] == 2
    encoder = load_pretrained(tmp_path / "mnli").yoso
    for found, expected in zip(
        jax.tree.leaves(nnx.state(model.yoso)), jax.tree.leaves(nnx.state(encoder)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_examples_that_are_cut_off_are_reported(make_config: Any) -> None:
    config = make_config(
        GlueConfig("qqp", bad_rows="skip"),
        "glue/QQP",
        sequence_length=16,
        truncation="longest_first",
    )
    (note,) = [note for note in prepare(config).notes if note.startswith("train: ")]
    assert note.startswith("train: 2 examples from ")
    assert note.endswith(", 2 cut off at sequence_length, 1 bad rows left out")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init_from": "/nowhere"}, CheckpointError, "there is no checkpoint /nowhere"),
        ({"sequence_length": 65}, ConfigError, "sequence_length must be at most 64"),
        (
            {"model": ModelOptions(hidden_size=24)},
            CheckpointError,
            "cannot start from .* of a wrong shape",
        ),
        ({"init_from": None, "model": ModelOptions(hidden_size=7)}, ConfigError, "model.hidden_si"),
        ({"init_from": None, "model": ModelOptions(vocab_size=9)}, ConfigError, "has 400 tokens"),
    ],
    ids=["checkpoint", "positions", "shape", "field", "vocabulary"],
)
def test_mistakes(
    make_config: Any, tokenizer: Path, changes: Any, error: type[Exception], message: str
) -> None:
    config = make_config(GlueConfig("sst2"), "glue/SST-2", tokenizer=str(tokenizer), **changes)
    with pytest.raises(error, match=message):
        prepare(config)


def test_a_run_that_ended_needs_its_start_no_more(
    make_config: Any, pretrained: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(pretrained, start)
    config = make_config(GlueConfig("sst2"), "glue/SST-2", init_from=str(start), steps=2)
    train(config, console=quiet_console()[0])
    vocabulary = prepare(config).tokenizer.get_vocab()
    shutil.rmtree(start)
    assert prepare(config).tokenizer.get_vocab() == vocabulary
    results = train(dataclasses.replace(config, steps=4), resume=True, console=quiet_console()[0])
    assert results is not None
    assert results["step"] == 4
    assert prepare(config).tokenizer.get_vocab() == vocabulary


def test_a_missing_checkpoint_is_not_taken_for_a_missing_tokenizer(make_config: Any) -> None:
    config = make_config(GlueConfig("sst2"), "glue/SST-2", init_from="/nowhere/model")
    with pytest.raises(CheckpointError, match="init_from: there is no checkpoint /nowhere/model"):
        prepare(config)
