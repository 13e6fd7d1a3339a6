"""Optimiser, step and evaluation, and how a run goes, stops and continues."""

import dataclasses
import errno
import json
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from run_helpers import fast_compilations, numbers, quiet_console, tiny_config

import yoso_jax.trainer as trainer
from yoso_jax.config_files import load_config
from yoso_jax.data.pipeline import eval_batches
from yoso_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskFullError,
    Interrupted,
    NonFiniteError,
)
from yoso_jax.lra import LRAClassifier
from yoso_jax.lra_objective import LRAObjective, load_data, majority_baseline
from yoso_jax.metrics import MetricsWriter, read_metrics
from yoso_jax.optim import OptimizerConfig, make_optimizer, make_schedule, weight_decay_mask
from yoso_jax.progress import TrainingProgress
from yoso_jax.sharding import make_layout
from yoso_jax.signals import StopSignals
from yoso_jax.train_config import TrainConfig
from yoso_jax.training import (
    State,
    abstract_state,
    init_state,
    make_train_step,
    window_means,
    with_attention,
)
from yoso_jax.training import restore_params as restore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", autouse=True)
def compilations() -> Iterator[None]:
    with fast_compilations():
        yield


def restore_params(config: TrainConfig, step: Any) -> tuple[int, Any, list[str]]:
    return restore(LRAObjective(config), step, make_layout())


def first_state(config: TrainConfig) -> State:
    return init_state(LRAObjective(config), optax.identity(), make_layout())


@pytest.fixture(scope="module")
def reference(folder: Path) -> TrainConfig:
    """A run that nothing disturbed."""
    config = tiny_config(folder, "reference")
    trainer.train(config, console=quiet_console()[0])
    return config


def copy_run(reference: TrainConfig, name: str) -> TrainConfig:
    run_dir = Path(reference.run_dir).with_name(name)
    shutil.copytree(reference.run_dir, run_dir)
    return dataclasses.replace(reference, run_dir=str(run_dir))


def raise_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Sends this process a signal during a step."""
    plain = TrainingProgress.step

    def noisy(self: TrainingProgress, current: int) -> None:
        if current == step:
            signal.raise_signal(number)
        plain(self, current)

    monkeypatch.setattr(TrainingProgress, "step", noisy)


# Optimiser


def test_linear_schedule_values() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, start_factor=0.2, end_factor=0.1)
    schedule = make_schedule(config, steps=14)
    np.testing.assert_allclose(
        [schedule(step) for step in (0, 2, 4, 9, 14, 20)],
        [0.2, 0.6, 1.0, 0.55, 0.1, 0.1],
        rtol=1e-6,
    )


def test_cosine_schedule_values() -> None:
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, decay="cosine"), steps=10)
    np.testing.assert_allclose(
        [schedule(step) for step in (0, 5, 10)], [2.0, 1.0, 0.0], rtol=1e-6, atol=1e-7
    )


def test_schedule_may_be_all_warmup() -> None:
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4), steps=4)
    np.testing.assert_allclose([schedule(step) for step in (0, 2, 4)], [0, 0.5, 1], rtol=1e-6)


def test_weight_decay_leaves_biases_and_layer_norms_alone(folder: Path) -> None:
    config = tiny_config(folder)
    params = first_state(config)["params"]
    mask = weight_decay_mask(params)
    seen = set()
    for path, decays in jax.tree_util.tree_flatten_with_path(mask)[0]:
        text = jax.tree_util.keystr(path)
        name = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)][-1]
        seen.add(name)
        assert decays == (name not in ("bias", "scale")), text
    assert {"kernel", "bias", "scale", "embedding"} <= seen


def test_weight_decay_shrinks_only_masked_parameters() -> None:
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), steps=10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["dense"]["bias"], 0)


def test_gradients_are_clipped_by_their_global_norm() -> None:
    params = {"a": {"kernel": jnp.zeros(2)}, "b": {"kernel": jnp.zeros(2)}}
    grads = {"a": {"kernel": jnp.array([3.0, 0])}, "b": {"kernel": jnp.array([0, 4.0])}}
    tx = make_optimizer(OptimizerConfig(clip_norm=1.0, b1=0.9), steps=10)
    _, opt_state = tx.update(grads, tx.init(params), params)
    mean = optax.tree_utils.tree_get(opt_state, "mu")
    np.testing.assert_allclose(mean["a"]["kernel"], [0.06, 0], rtol=1e-5)
    np.testing.assert_allclose(mean["b"]["kernel"], [0, 0.08], rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("warmup_steps", -1),
        ("decay", "step"),
        ("end_factor", 1.5),
        ("b2", 1.0),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_optimizer_refuses_values_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        OptimizerConfig(**{field: value})


# Step and evaluation


def test_step_learns_a_batch_and_sums_its_metrics(folder: Path) -> None:
    config = tiny_config(folder)
    tx = make_optimizer(config.optimizer, config.steps)
    objective, layout = LRAObjective(config), make_layout()
    state = init_state(objective, tx, layout)
    train_step = make_train_step(objective, tx, layout)
    data = load_data(config)
    batch = next(iter(eval_batches(data.train, batch_size=4, max_length=16)))
    del batch["weight"]
    means = []
    for step in range(1, 10):
        state = train_step(state, batch, jax.random.key(0))
        window = state["window"]
        assert int(state["step"]) == step
        assert int(window["steps"]) == (step - 1) % config.log_every + 1
        assert int(window["bad_step"]) == 0
        if step % config.log_every == 0:
            means.append(window_means(window)["loss"])
    assert means[2] < 0.97 * means[0]


def test_evaluation_counts_each_example_once_and_is_reproducible(folder: Path) -> None:
    config = tiny_config(folder)
    data = load_data(config)
    params = first_state(config)["params"]
    expectation = with_attention(config, "expectation")

    def result(batch_size: int) -> dict[str, float]:
        changed = dataclasses.replace(expectation, eval_batch_size=batch_size)
        return LRAObjective(changed, data).make_evaluation(jax.random.key(1))(params, "valid")

    assert result(7)["accuracy"] == result(20)["accuracy"]
    assert result(7)["loss"] == pytest.approx(result(20)["loss"], rel=1e-5)

    again = [
        LRAObjective(config, data).make_evaluation(jax.random.key(seed))(params, "valid")
        for seed in (1, 1, 2)
    ]
    assert again[0] == again[1] != again[2]


def test_majority_baseline_takes_the_label_from_the_train_split(folder: Path) -> None:
    data = load_data(tiny_config(folder))
    label = np.bincount(data.train.labels).argmax()
    assert majority_baseline(data.train, data.test) == (data.test.labels == label).mean()


# A run


def test_run_leaves_metrics_results_checkpoint_and_curves(reference: TrainConfig) -> None:
    run_dir = Path(reference.run_dir)
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [(r["step"], r["split"]) for r in records] == [
        (3, "train"),
        (4, "valid"),
        (6, "train"),
        (8, "valid"),
        (9, "train"),
        (10, "train"),
        (10, "valid"),
    ]
    fields = {"step", "split", "loss", "accuracy", "time"}
    extra = {"learning_rate", "grad_norm", "steps_per_s", "tokens_per_s", "input_wait"}
    for record in records:
        assert set(record) == (fields | extra if record["split"] == "train" else fields)
        assert all(math.isfinite(v) for k, v in record.items() if k != "split")
    schedule = make_schedule(reference.optimizer, reference.steps)
    assert records[0]["learning_rate"] == float(schedule(2))
    results = json.loads((run_dir / "results.json").read_text())
    assert results["step"] == 10
    assert 0 <= results["test_accuracy"] <= 1
    assert 0 < results["majority_baseline"] < 1
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())


def test_another_seed_gives_another_run(folder: Path, reference: TrainConfig) -> None:
    other = dataclasses.replace(reference, run_dir=str(folder / "other"), seed=1)
    trainer.train(other, console=quiet_console()[0])
    assert [r["loss"] for r in numbers(other.run_dir)] != [
        r["loss"] for r in numbers(reference.run_dir)
    ]


@pytest.mark.parametrize("step", [5, 8])
def test_interrupted_and_resumed_run_is_the_uninterrupted_one(
    folder: Path, reference: TrainConfig, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Stopped inside a window of metrics, and at a validation."""
    config = dataclasses.replace(reference, run_dir=str(folder / f"resumed{step}"))
    console, text = quiet_console()
    with monkeypatch.context() as patch:
        raise_at(patch, step, signal.SIGTERM)
        assert trainer.train(config, console=console) is None
    assert f"stopped after step {step}" in text.getvalue()
    results = trainer.train(config, resume=True, console=console)
    assert numbers(config.run_dir) == numbers(reference.run_dir)
    assert results == json.loads((Path(reference.run_dir) / "results.json").read_text())
    params, expected = (restore_params(c, "latest")[1] for c in (config, reference))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_metrics_after_the_checkpoint_are_dropped_on_resume(
    folder: Path, reference: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run has logged steps that are not in its last checkpoint, the last line torn."""
    config = dataclasses.replace(reference, run_dir=str(folder / "killed"))

    def die(self: TrainingProgress, step: int) -> None:
        if step == 7:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "step", die)
        with pytest.raises(SystemExit):
            trainer.train(config, console=quiet_console()[0])
    with (Path(config.run_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "spl')
    trainer.train(config, resume=True, console=quiet_console()[0])
    assert numbers(config.run_dir) == numbers(reference.run_dir)


def test_resume_of_a_finished_run_can_extend_it(reference: TrainConfig) -> None:
    longer = dataclasses.replace(copy_run(reference, "longer"), steps=12)
    results = trainer.train(longer, resume=True, console=quiet_console()[0])
    assert results is not None
    assert results["step"] == 12
    records = numbers(longer.run_dir)
    assert records[:-2] == numbers(reference.run_dir)
    assert [(r["step"], r["split"]) for r in records[-2:]] == [(12, "train"), (12, "valid")]
    assert load_config(Path(longer.run_dir) / "config.yaml") == longer
    # A run that goes on has not ended: what tests gave before is kept aside.
    before = Path(reference.run_dir, "results.json").read_bytes()
    assert Path(longer.run_dir, "results-10.json").read_bytes() == before


def test_run_killed_before_its_first_checkpoint_starts_again(
    folder: Path, reference: TrainConfig
) -> None:
    config = dataclasses.replace(reference, run_dir=str(folder / "early"))
    Path(config.run_dir).mkdir()
    shutil.copy(Path(reference.run_dir) / "config.yaml", config.run_dir)
    trainer.train(config, resume=True, console=quiet_console()[0])
    assert numbers(config.run_dir) == numbers(reference.run_dir)


# Refusals


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_a_run_is_refused_and_left_alone(reference: TrainConfig) -> None:
    before = contents(Path(reference.run_dir))
    with pytest.raises(ConfigError, match=r"not empty.*--resume"):
        trainer.train(reference)
    assert contents(Path(reference.run_dir)) == before


def test_resume_with_another_configuration_names_the_fields(reference: TrainConfig) -> None:
    before = contents(Path(reference.run_dir))
    changed = dataclasses.replace(
        reference,
        steps=9,
        batch_size=5,
        log_every=1,
        model=dataclasses.replace(reference.model, num_hash=5),
    )
    with pytest.raises(ConfigError) as error:
        trainer.train(changed, resume=True)
    assert "batch_size: 4 in the run, 5 asked for" in str(error.value)
    assert "model.num_hash: 4 in the run, 5 asked for" in str(error.value)
    assert "steps: 10 in the run, cannot be lowered to 9" in str(error.value)
    assert "log_every" not in str(error.value)
    assert contents(Path(reference.run_dir)) == before


def test_resume_without_a_run_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run in"):
        trainer.train(tiny_config(folder, "nowhere"), resume=True)
    assert not (folder / "nowhere").exists()


def test_damaged_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    labels = load_data(config).folder / "train_labels.npy"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train_labels\.npy"):
        trainer.train(config)
    assert not Path(config.run_dir).exists()


def test_missing_tsv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"basic_train\.tsv"):
        trainer.train(tiny_config(tmp_path, tsv_dir=str(tmp_path)))


def test_published_copy_is_read_from_tsv(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        text = "Source\tTarget\n" + "( ( ( [MAX 2 ) 9 ) ] )\t9\n[MIN 3 1 4 ]\t1\n"
        (tmp_path / f"basic_{name}.tsv").write_text(text)
    config = tiny_config(tmp_path, tsv_dir=str(tmp_path))
    assert load_data(config).valid.labels.tolist() == [9, 1]
    with pytest.raises(ConfigError, match="sequence_length must be at least 5"):
        load_data(dataclasses.replace(config, sequence_length=4))


def test_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run_dir"):
        trainer.train(tiny_config(tmp_path, "file/run"))


# Trouble on the way


def test_ctrl_c_saves_and_says_130(
    folder: Path, reference: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(reference, run_dir=str(folder / "ctrl-c"))
    raise_at(monkeypatch, 5, signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 5 and saved it") as error:
        trainer.train(config, console=quiet_console()[0])
    assert error.value.exit_code == 130
    assert restore_params(config, "latest")[0] == 5


def test_second_signal_ends_the_process_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "once more" in capfd.readouterr().err


def test_non_finite_loss_stops_names_the_step_and_is_not_saved(
    folder: Path, reference: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(reference, run_dir=str(folder / "nan"))

    def poisoned(*args: object) -> object:
        train_step = make_train_step(*args)

        def step(state: dict, *args: object) -> dict:
            if int(state["step"]) == 6:
                state["params"] = jax.tree.map(lambda leaf: leaf * jnp.nan, state["params"])
            return train_step(state, *args)

        return step

    monkeypatch.setattr(trainer, "make_train_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"not finite at step 7; the last checkpoint .*step 4"):
        trainer.train(config, console=quiet_console()[0])
    step, params, _ = restore_params(config, "latest")
    assert step == 4
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    assert [r["step"] for r in numbers(config.run_dir)] == [3, 4, 6]


@pytest.mark.parametrize("where", ["metrics", "save", "save in the background"])
def test_full_disk_stops_with_a_usable_checkpoint(
    folder: Path, reference: TrainConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config = dataclasses.replace(reference, run_dir=str(folder / f"full {where}"))
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail_at_9(self: MetricsWriter, record: dict) -> None:
        if record["step"] == 9:
            raise full
        write(self, record)

    class Broken:
        def result(self) -> None:
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")

    def fail_at_8(self: object, step: int, *args: object, **kwargs: object) -> object:
        if step < 8:
            return save(self, step, *args, **kwargs)
        if where == "save":
            raise full
        return Broken()

    write = MetricsWriter.write
    checkpointer = ocp.training.Checkpointer
    save = checkpointer.save_checkpointables_async
    with monkeypatch.context() as patch:
        if where == "metrics":
            patch.setattr(MetricsWriter, "write", fail_at_9)
        else:
            patch.setattr(checkpointer, "save_checkpointables_async", fail_at_8)
        with pytest.raises(DiskFullError, match=r"disk is full .*No space left.* of step [48]"):
            trainer.train(config, console=quiet_console()[0])
    assert restore_params(config, "latest")[0] == (8 if where == "metrics" else 4)


def test_torn_checkpoint_is_passed_over(reference: TrainConfig) -> None:
    config = copy_run(reference, "torn")
    console, text = quiet_console()
    for path in (Path(config.run_dir) / "checkpoints" / "10" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    trainer.train(config, resume=True, console=console)
    assert "the checkpoint of step 10" in text.getvalue()
    assert "from step 8" in text.getvalue()
    assert numbers(config.run_dir) == numbers(reference.run_dir)


def test_no_readable_checkpoint_is_an_error(reference: TrainConfig) -> None:
    config = copy_run(reference, "all torn")
    for path in (Path(config.run_dir) / "checkpoints").glob("*/params"):
        shutil.rmtree(path)
    before = contents(Path(config.run_dir))
    with pytest.raises(CheckpointError, match=r"step 10 .* cannot be read(.|\n)*no checkpoint"):
        trainer.train(config, resume=True)
    assert contents(Path(config.run_dir)) == before


def test_missing_matplotlib_is_a_note(
    reference: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_run(reference, "no matplotlib")
    (Path(config.run_dir) / "curves.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    console, text = quiet_console()
    assert trainer.train(config, resume=True, console=console) is not None
    assert "matplotlib is not installed" in text.getvalue()
    assert not (Path(config.run_dir) / "curves.png").exists()


def test_parameters_and_optimiser_stay_float32_in_bfloat16(folder: Path) -> None:
    config = tiny_config(folder, dtype="bfloat16")
    tx = make_optimizer(config.optimizer, config.steps)
    batch = {
        "input_ids": jax.ShapeDtypeStruct((4, 16), jnp.int32),
        "attention_mask": jax.ShapeDtypeStruct((4, 16), jnp.bool),
        "labels": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    objective, layout = LRAObjective(config), make_layout()
    before = layout.abstract(abstract_state(objective, tx))
    after = jax.eval_shape(
        make_train_step(objective, tx, layout),
        before,
        batch,
        jax.random.key(0),
    )
    assert after == before
    floats = {x.dtype for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype("float32")}


def test_graphdef_fits_parameters_of_either_attention(folder: Path) -> None:
    config = tiny_config(folder)
    params = first_state(config)["params"]
    for mode in ("expectation", "sampled"):
        nnx.merge(LRAObjective(with_attention(config, mode)).make_graphdef(), params)


def test_run_starts_from_the_model_of_a_shorter_one(tmp_path):
    config = tiny_config(tmp_path, "short")
    longer = config.model.replace(max_position_embeddings=32)
    longer = dataclasses.replace(
        config, run_dir=str(tmp_path / "long"), init_from=f"{config.run_dir}/model", model=longer
    )
    with fast_compilations():
        trainer.train(config, console=quiet_console()[0])
        for changes, message in (
            ({}, "pass position_extension='tile'"),
            ({"init_from": "/nowhere"}, "no file or folder /nowhere"),
            ({"model": config.model.replace(num_labels=11)}, "of a wrong shape"),
        ):
            with pytest.raises(CheckpointError, match=rf"cannot start from [\s\S]*{message}"):
                trainer.train(dataclasses.replace(longer, **changes), console=quiet_console()[0])
            assert not Path(longer.run_dir).exists()
        longer = dataclasses.replace(longer, position_extension="tile")
        trainer.train(longer, console=quiet_console()[0])
    old = LRAClassifier.from_pretrained(f"{config.run_dir}/model")
    start = LRAObjective(longer).make_model(jax.random.key(5))
    positions = old.position_embeddings.embedding[...]
    np.testing.assert_array_equal(
        start.position_embeddings.embedding[...], np.concatenate([positions, positions])
    )
    np.testing.assert_array_equal(start.dense.kernel[...], old.dense.kernel[...])
    assert not np.array_equal(
        LRAClassifier.from_pretrained(f"{longer.run_dir}/model").dense.kernel[...],
        old.dense.kernel[...],
    )
