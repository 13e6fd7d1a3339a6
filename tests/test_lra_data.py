"""The tasks of Long Range Arena as configurations and as runs."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import fast_compilations, quiet_console, tiny_config

from yoso_jax import trainer
from yoso_jax.config_files import dump_config, load_config, resume_conflicts
from yoso_jax.data.images import ImageConfig
from yoso_jax.data.pathfinder import PathfinderConfig
from yoso_jax.data.retrieval import RetrievalConfig
from yoso_jax.data.splits import split_by_fraction
from yoso_jax.data.tasks import TASKS
from yoso_jax.data.text import TextConfig
from yoso_jax.errors import ConfigError, DataError

SMALL = PathfinderConfig(
    num_train=40, num_valid=10, num_test=6, window=16, contour_length=4, num_distractors=2
)


def test_parts_are_whole_disjoint_and_seeded() -> None:
    parts = split_by_fraction(100, [0.1, 0.2], 3)
    assert [len(part) for part in parts] == [70, 10, 20]
    assert sorted(np.concatenate(parts)) == list(range(100))
    again, other = split_by_fraction(100, [0.1, 0.2], 3), split_by_fraction(100, [0.1, 0.2], 4)
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(again))
    assert set(parts[1]) != set(other[1])
    with pytest.raises(ValueError, match="2 are too few to divide into 3 parts"):
        split_by_fraction(2, [0.1, 0.2], 0)


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (TextConfig(), "source", "web", "source must be one of 'imdb', 'mail', got 'web'"),
        (TextConfig(), "valid_fraction", 0.5, r"valid_fraction must be a finite number in \(0, 0"),
        (TextConfig(), "seed", -1, "seed must be an integer >= 0, got -1"),
        (RetrievalConfig(), "source", "imdb", "source must be one of 'lra', 'mail', got 'imdb'"),
        (RetrievalConfig(), "test_fraction", 0.0, "test_fraction must be a finite number"),
        (ImageConfig(), "source", "mnist", "source must be one of 'cifar10', 'fashion_mnist', "),
        (ImageConfig(), "valid_fraction", 1, "valid_fraction must be a finite number"),
        (SMALL, "num_test", 0, "num_test must be an integer >= 1, got 0"),
        (SMALL, "window", 7, r"window must be an integer in 8\.\.128, got 7"),
        (SMALL, "contour_length", 1, "contour_length must be an integer >= 2, got 1"),
        (SMALL, "thickness", 16.0, r"thickness must be a finite number > 0 and below window"),
        (
            SMALL,
            "seed_distance",
            2.0,
            r"seed_distance must be above marker_radius \+ thickness \(2",
        ),
        (SMALL, "max_turn", 90.0, r"max_turn must be a finite number in \(0, 90\)"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_configs_name_the_bad_field(config: Any, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **{field: value})


# Runs


def task_config(folder: Path, data: Any, length: int, **changes: Any) -> Any:
    """Two steps on a task, its model as small as it may be."""
    config = tiny_config(folder)
    task = TASKS[data.task]
    model = dataclasses.replace(
        config.model,
        vocab_size=task.vocab_size,
        num_labels=task.num_labels,
        dual=task.dual,
        max_position_embeddings=length,
    )
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
    values: dict[str, Any] = {
        "data": data,
        "model": model,
        "optimizer": optimizer,
        "sequence_length": length,
        "steps": 2,
        "log_every": 1,
        "evaluate_every": 2,
    }
    return dataclasses.replace(config, **values | changes)


def test_two_steps_of_retrieval(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in ("train", "eval", "test"):
        lines = "1\tA\tB\tfirst\tsecond\n0\tA\tC\tfirst\tthe third of them\n"
        (folder / f"new_aan_pairs.{name}.tsv").write_text(lines)
    config = task_config(tmp_path, RetrievalConfig(), 16, data_dir=str(folder))
    with fast_compilations():
        results = trainer.train(config, console=quiet_console()[0])
    assert results is not None
    assert results["majority_baseline"] == 0.5
    assert load_config(Path(config.run_dir) / "config.yaml") == config


def test_two_steps_of_pathfinder(tmp_path: Path) -> None:
    data = dataclasses.replace(SMALL, window=9, contour_length=2, seed_distance=4.0)
    config = task_config(tmp_path, data, 81)
    with fast_compilations():
        results = trainer.train(config, console=quiet_console()[0])
    assert results is not None
    assert results["step"] == 2
    assert results["majority_baseline"] == 0.5


def test_missing_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for data in (TextConfig(), RetrievalConfig(), ImageConfig()):
        length = TASKS[data.task].longest(data) or 64
        config = task_config(tmp_path, data, length, data_dir=str(tmp_path / "none"))
        with pytest.raises(DataError, match="there is no"):
            trainer.train(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (
            SMALL,
            {"sequence_length": 255},
            "sequence_length must be at least 256, the longest examp",
        ),
        (ImageConfig(), {"sequence_length": 1023}, "sequence_length must be at least 1024"),
        (TextConfig(), {"tsv_dir": "x"}, "tsv_dir must be null for text"),
        (
            TextConfig(),
            {"vocab_size": 256},
            "model.vocab_size must be at least 257 for text, got 2",
        ),
        (ImageConfig(), {"num_labels": 9}, "model.num_labels must be at least 10 for image, got 9"),
        (TextConfig(), {"dual": True}, "model.dual must be false for text, got true"),
        (RetrievalConfig(), {"dual": False}, "model.dual must be true for retrieval, got false"),
    ],
)
def test_the_model_must_fit_the_task(
    tmp_path: Path, data: Any, changes: dict[str, Any], message: str
) -> None:
    config = task_config(tmp_path, data, TASKS[data.task].longest(data) or 64)
    of_model = {k: v for k, v in changes.items() if hasattr(config.model, k)}
    of_run = {k: v for k, v in changes.items() if k not in of_model}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, model=dataclasses.replace(config.model, **of_model), **of_run)


def test_the_task_is_a_field_of_data_in_yaml(tmp_path: Path) -> None:
    config = task_config(tmp_path, SMALL, 256)
    text = dump_config(config)
    assert "data:\n  task: pathfinder\n  num_train: 40\n" in text
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert load_config(path) == config
    # Runs saved before there were other tasks do not say it.
    listops = tiny_config(tmp_path)
    path.write_text(dump_config(listops).replace("  task: listops\n", ""))
    assert load_config(path) == listops
    accepted = "'listops' or 'pathfinder' or 'image' or 'text' or 'retrieval' or 'recall'"
    for bad in ("chess", "[text]", "3"):
        path.write_text(text.replace("task: pathfinder", f"task: {bad}"))
        with pytest.raises(ConfigError, match=f"field 'data.task' must be {accepted}, got"):
            load_config(path)
    path.write_text(text.replace("task: pathfinder", "task: text"))
    with pytest.raises(ConfigError, match=r"unknown field 'data.num_train'; accepted here: source"):
        load_config(path)


def test_a_resumed_run_keeps_its_task(tmp_path: Path) -> None:
    text, pairs = (
        task_config(tmp_path, TextConfig(), 64),
        task_config(tmp_path, RetrievalConfig(), 64),
    )
    assert resume_conflicts(text, pairs) == ["data.task: 'text' in the run, 'retrieval' asked for"]
    other = dataclasses.replace(text, data=TextConfig(seed=1))
    assert resume_conflicts(text, other) == ["data.seed: 0 in the run, 1 asked for"]
