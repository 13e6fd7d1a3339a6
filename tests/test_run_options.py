"""What a run may do besides: parts of batches, averages, early ends, workers, traces."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from run_helpers import fast_compilations, numbers, quiet_console, tiny_config

import yoso_jax.trainer as trainer
from yoso_jax.errors import ConfigError, NonFiniteError
from yoso_jax.lra_objective import LRAObjective
from yoso_jax.metrics import read_metrics
from yoso_jax.optim import OptimizerConfig, make_optimizer
from yoso_jax.sharding import make_layout
from yoso_jax.train_config import TrainConfig
from yoso_jax.training import (
    evaluated_params,
    init_state,
    make_keys,
    make_train_step,
    restore_params,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", autouse=True)
def compilations() -> Iterator[None]:
    with fast_compilations():
        yield


def exact(config: TrainConfig) -> TrainConfig:
    """The same without anything random in a step."""
    model = config.model.replace(use_expectation=True, hidden_dropout_prob=0.0)
    return dataclasses.replace(config, model=model)


def run(config: TrainConfig, **options: Any) -> tuple[dict[str, Any] | None, str]:
    console, text = quiet_console()
    return trainer.train(config, console=console, **options), text.getvalue()


def test_parts_of_a_batch_add_up_to_it(folder: Path) -> None:
    whole = exact(tiny_config(folder, "whole"))
    run(whole)
    parts = dataclasses.replace(whole, run_dir=str(folder / "parts"), accumulation_steps=2)
    run(parts)
    for found, expected in zip(numbers(parts.run_dir), numbers(whole.run_dir), strict=True):
        assert found.pop("split") == expected["split"]
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-4)


def test_parts_of_a_batch_are_hashed_and_dropped_out_apart(folder: Path) -> None:
    config = tiny_config(folder, accumulation_steps=2)
    objective, layout = LRAObjective.create(config), make_layout()
    tx = make_optimizer(config.optimizer, config.steps)
    batch = dict(next(objective.make_iterator()))
    twice = {name: np.repeat(array[:2], 2, axis=0) for name, array in batch.items()}
    losses = []
    for parts, rows in ((2, twice), (1, {name: array[::2] for name, array in twice.items()})):
        each = dataclasses.replace(config, accumulation_steps=parts, batch_size=2 * parts)
        step = make_train_step(LRAObjective(each), tx, layout)
        state = step(init_state(objective, tx, layout), rows, jax.random.key(0))
        losses.append(float(state["window"]["loss"]))
    # The two parts have the same rows; were their keys the same, so would be the losses.
    assert losses[0] != losses[1]


def test_average_of_the_parameters_is_evaluated_saved_and_resumed(folder: Path) -> None:
    config = tiny_config(folder, "average", ema_decay=0.5)
    run(config)
    objective, layout = LRAObjective.create(config), make_layout()
    tx = make_optimizer(config.optimizer, config.steps)
    state = init_state(objective, tx, layout)
    average = jax.device_get(state["params"])
    step, iterator = make_train_step(objective, tx, layout), objective.make_iterator()
    _, train_key, eval_key = make_keys(config.seed)
    for number in range(1, config.steps + 1):
        state = step(state, layout.put(next(iterator)), train_key)
        decay = min(0.5, (1 + number) / (10 + number))
        average = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new), average, state["params"]
        )
    _, params, _ = restore_params(objective, "latest", layout)
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, params, evaluated_params(state))
    found = objective.make_evaluation(eval_key)(params, "valid")
    assert numbers(config.run_dir)[-1]["loss"] == found["loss"]

    half = dataclasses.replace(config, run_dir=str(folder / "half"), steps=8)
    run(half)
    with pytest.raises(ConfigError, match=r"ema_decay: 0\.5 in the run, None asked for"):
        run(dataclasses.replace(half, ema_decay=None), resume=True)
    # As many as above: the schedule, and so the number of steps, is part of what is compiled.
    resumed = dataclasses.replace(half, steps=config.steps)
    run(resumed, resume=True)
    assert restore_params(LRAObjective(resumed), "latest", layout)[0] == config.steps


def test_run_ends_when_there_is_no_new_best_and_tests_the_best(folder: Path) -> None:
    config = tiny_config(
        folder,
        "patient",
        steps=40,
        evaluate_every=2,
        patience=3,
        keep_latest=1,
        final_checkpoint="best",
        optimizer=OptimizerConfig(learning_rate=1e-12),
    )
    results, text = run(config)
    assert results is not None
    # All validations are as good as the first, at step 2; of equals the newest is tested.
    assert results["step"] == 8
    assert "ended at step 8: no new best in 3 validations" in text
    assert "testing the best checkpoint, of step 8" in text
    again, text = run(config, resume=True)
    assert again == results
    assert "ended at step 8" in text
    longer = dataclasses.replace(config, patience=4)
    _, text = run(longer, resume=True)
    assert "ended at step 10: no new best in 4 validations" in text


@pytest.mark.slow
def test_workers_change_nothing_nor_does_changing_their_number(folder: Path) -> None:
    plain = tiny_config(folder, "threads")
    run(plain)
    config = tiny_config(folder, "workers", num_workers=2, steps=10)
    run(config)
    assert numbers(config.run_dir) == numbers(plain.run_dir)
    longer = [
        dataclasses.replace(each, steps=16, num_workers=workers)
        for each, workers in ((plain, 0), (config, 1))
    ]
    for each in longer:
        run(each, resume=True)
    assert numbers(plain.run_dir) == numbers(config.run_dir)


def test_events_and_a_trace_are_written(folder: Path) -> None:
    config = tiny_config(folder, "watched", steps=16, tensorboard=True)
    run(config, profile=True)
    (events,) = Path(config.run_dir, "tensorboard").iterdir()
    assert b"valid/accuracy" in events.read_bytes()
    assert list(Path(config.run_dir, "profile").rglob("*.xplane.pb"))


def test_a_run_too_short_for_a_trace_says_so_and_has_no_speed_of_what_compiles(
    folder: Path,
) -> None:
    console, text = quiet_console()
    config = tiny_config(folder, "short", steps=2, log_every=1)
    trainer.train(config, profile=True, console=console)
    assert "nothing was traced" in text.getvalue()
    records = read_metrics(Path(config.run_dir, "metrics.jsonl"))
    rates = ["steps_per_s" in record for record in records if record["split"] == "train"]
    assert rates == [False, True]


def test_missing_tensorboard_is_refused_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = tiny_config(folder, "unwatched", tensorboard=True)
    with pytest.raises(ConfigError, match="needs tensorboardX"):
        run(config)
    assert not Path(config.run_dir).exists()


def test_batch_of_a_loss_that_is_not_finite_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LRAObjective.make_iterator

    def poisoned(self: LRAObjective, start: int = 0) -> Any:
        for number, batch in enumerate(plain(self, start), start + 1):
            # An id that is out of range is embedded as NaN.
            yield batch | ({"input_ids": batch["input_ids"] + 99} if number == 7 else {})

    monkeypatch.setattr(LRAObjective, "make_iterator", poisoned)
    config = tiny_config(folder, "poisoned", log_every=5)
    with pytest.raises(NonFiniteError, match=r"step 7; .* of step 4\. Its batch is in .*bad_batch"):
        run(config)
    batch = np.load(Path(config.run_dir) / trainer.BAD_BATCH_FILE)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert batch["input_ids"].min() == 99


def test_loss_that_is_too_large_ends_the_run(folder: Path) -> None:
    config = tiny_config(folder, "diverged", evaluate_every=2, max_loss=0.1)
    with pytest.raises(NonFiniteError, match=r"above max_loss \(0\.1\) at step 3; .* of step 2"):
        run(config)
    assert [r["step"] for r in numbers(config.run_dir)] == [2, 3]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("accumulation_steps", 3, "accumulation_steps must be a divisor of batch_size"),
        ("ema_decay", 1.0, "ema_decay must be a finite number in"),
        ("patience", 0, "patience must be an integer >= 1 or None"),
        ("final_checkpoint", "first", "final_checkpoint must be one of 'latest', 'best'"),
        ("max_loss", 0.0, "max_loss must be a finite number > 0, or None"),
        ("num_workers", -1, "num_workers must be an integer >= 0"),
        ("fsdp", 0, "fsdp must be an integer >= 1"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_options_out_of_range(folder: Path, field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(folder, **{field: value})


def test_devices_that_cannot_share_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="fsdp must divide the number of devices"):
        run(tiny_config(folder, "undivided", fsdp=2))
    assert not (folder / "undivided").exists()
