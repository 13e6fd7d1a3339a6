"""The training loop: data in, checkpoints, metrics and results out, and how a run may end."""

import json
import math
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from yoso_jax.checkpointing import Checkpoints
from yoso_jax.data.listops import read_published
from yoso_jax.data.pipeline import eval_batches, make_iterator
from yoso_jax.data.splits import Split, TaskData
from yoso_jax.data.tasks import load_task
from yoso_jax.errors import (
    ConfigError,
    DataError,
    DiskFullError,
    Interrupted,
    NonFiniteError,
    is_disk_full,
    root_cause,
)
from yoso_jax.metrics import MetricsWriter, Throughput, plot_curves, write_atomically
from yoso_jax.optim import make_optimizer, make_schedule
from yoso_jax.progress import TrainingProgress
from yoso_jax.signals import StopSignals
from yoso_jax.train_config import (
    CONFIG_FILE,
    TrainConfig,
    dump_config,
    load_config,
    resume_conflicts,
)
from yoso_jax.training import (
    State,
    abstract_like,
    evaluate,
    init_state,
    make_eval_step,
    make_graphdef,
    make_keys,
    make_train_step,
    window_means,
)

RESULTS_FILE = "results.json"


def train(
    config: TrainConfig, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any] | None:
    """Trains, validates and saves as configured, then evaluates on the test split.

    Writes to `config.run_dir`: `config.yaml`, `checkpoints/`, `metrics.jsonl`, `results.json` and
    `curves.png`. On Ctrl-C or SIGTERM the step under way is finished and saved.

    Args:
        config: the run.
        resume: continue the run in `config.run_dir` from its newest checkpoint that can be read.
            On a CPU the continued run equals an uninterrupted one bit for bit.
        console: where progress is shown; standard output by default.

    Returns:
        What `results.json` holds; None if SIGTERM stopped the run.

    Raises:
        ConfigError: the run folder is taken, or holds a run that this configuration cannot resume.
        DataError: see `load_data`.
        CheckpointError: no checkpoint can be read.
        NonFiniteError: the loss or its gradient is not finite; that state is not saved.
        DiskFullError: the last complete checkpoint can still be used.
        Interrupted: Ctrl-C; the state was saved.
    """
    checkpoints = Checkpoints(config.run_dir, config.keep_latest)
    try:
        with checkpoints:
            return _train(config, resume, checkpoints, console)
    except Exception as error:
        if not is_disk_full(error):
            raise
        reason = textwrap.shorten(str(root_cause(error)), 200, placeholder="...")
        raise DiskFullError(
            f"the disk is full ({reason}); {_last_checkpoint(checkpoints)}"
        ) from error


def load_data(config: TrainConfig) -> TaskData:
    """The three splits, read from `tsv_dir` or `data_dir`, or generated (and kept) in `data_dir`.

    Raises:
        DataError: the files are missing or damaged, or cannot be made.
        ConfigError: an example is longer than `sequence_length`.
    """
    try:
        if config.tsv_dir is None:
            data = load_task(config.data, config.data_dir, config.sequence_length)
        else:
            data = read_published(config.tsv_dir)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise DataError(f"cannot read or prepare the data: {error}") from error
    longest = max(int(split.lengths.max()) for split in (data.train, data.valid, data.test))
    if longest > config.sequence_length:
        raise ConfigError(
            f"sequence_length must be at least {longest}, the longest example in {data.folder}, "
            f"got {config.sequence_length}"
        )
    return data


def make_evaluation(config: TrainConfig) -> Callable[[PyTree, Split], dict[str, float]]:
    """A function from parameters and a split to loss and accuracy, hashed by the run's seed."""
    _, _, eval_key = make_keys(config.seed)
    eval_step = make_eval_step(make_graphdef(config))

    def evaluation(params: PyTree, split: Split) -> dict[str, float]:
        batches = eval_batches(
            split, batch_size=config.eval_batch_size, max_length=config.sequence_length
        )
        return evaluate(eval_step, params, batches, eval_key)

    return evaluation


def majority_baseline(train: Split, split: Split) -> float:
    """Accuracy on `split` of always answering the most frequent label of `train`."""
    return float((split.labels == np.bincount(train.labels).argmax()).mean())


def describe_accuracy(config: TrainConfig, accuracy: float, baseline: float) -> str:
    """E.g. `60.1% (sampled attention), majority baseline 20.0%, +40.1 points`."""
    mode = "sampled" if config.model.is_sampled else "expectation"
    if config.model.attention == "softmax":
        mode = "softmax"
    return (
        f"{accuracy:.1%} ({mode} attention), majority baseline {baseline:.1%}, "
        f"{100 * (accuracy - baseline):+.1f} points"
    )


def _train(
    config: TrainConfig, resume: bool, checkpoints: Checkpoints, console: Console | None
) -> dict[str, Any] | None:
    run_dir = Path(config.run_dir)
    _check_run_dir(run_dir, config, resume)
    data = load_data(config)
    iterator = make_iterator(
        data.train,
        batch_size=config.batch_size,
        max_length=config.sequence_length,
        seed=config.seed,
        shuffle=True,
    )
    _, train_key, _ = make_keys(config.seed)
    tx = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    train_step = make_train_step(make_graphdef(config), tx, config.log_every)
    evaluation = make_evaluation(config)

    state = init_state(config, tx)
    notes: list[str] = []
    if resume and checkpoints.steps():
        _, restored, notes = checkpoints.restore_latest(
            {**_to_checkpoint(abstract_like(state)), "data": iterator}
        )
        state = _from_checkpoint(restored)
    start = int(state["step"])
    _write_config(run_dir, config)

    with (
        StopSignals() as signals,
        MetricsWriter(run_dir, start) as metrics,
        TrainingProgress(config.steps, start, console) as progress,
    ):
        for note in notes:
            progress.say(note)
        if resume:
            progress.say(f"resuming {run_dir} from step {start}")
        throughput = Throughput()
        for step in range(start + 1, config.steps + 1):
            batch = next(iterator)
            state = train_step(state, batch, train_key)
            throughput.add(int(batch["attention_mask"].sum()))
            if step == start + 1:
                jax.block_until_ready(state)
                throughput.restart()  # the first step, which compiles, is not counted
            progress.step(step)

            last = step == config.steps
            log = last or step % config.log_every == 0
            validate = last or step % config.evaluate_every == 0
            stop = signals.received
            if log or validate or stop:
                _check_finite(int(state["window"]["bad_step"]), checkpoints)
            if log:
                record = {
                    "step": step,
                    "split": "train",
                    **window_means(state["window"]),
                    "learning_rate": float(np.asarray(schedule(step - 1))),
                    **throughput.read(),
                    "time": time.time(),
                }
                metrics.write(record)
                progress.train(record)
            accuracy = None
            if validate:
                with throughput.paused():
                    result = evaluation(state["params"], data.valid)
                _check_finite(0 if math.isfinite(result["loss"]) else step, checkpoints)
                record = {"step": step, "split": "valid", **result, "time": time.time()}
                metrics.write(record)
                progress.valid(record)
                accuracy = result["accuracy"]
            if validate or stop:
                checkpoints.save(step, {**_to_checkpoint(state), "data": iterator}, accuracy)
            if stop:
                progress.stop()
                checkpoints.wait()
                message = f"stopped after step {step} and saved it; --resume goes on from there"
                if stop == signal.SIGINT:
                    raise Interrupted(message)
                progress.say(message)
                return None
        checkpoints.wait()
        progress.stop()
        return _finish(config, data, evaluation(state["params"], data.test), progress)


def _finish(
    config: TrainConfig, data: TaskData, test: dict[str, float], progress: TrainingProgress
) -> dict[str, Any]:
    run_dir = Path(config.run_dir)
    baseline = majority_baseline(data.train, data.test)
    results = {
        "step": config.steps,
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "majority_baseline": baseline,
        "use_expectation": config.model.use_expectation,
    }
    write_atomically(run_dir / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    progress.say(f"test accuracy {describe_accuracy(config, test['accuracy'], baseline)}")
    if plot_curves(run_dir) is None:
        progress.say("curves.png was not drawn: matplotlib is not installed")
    return results


def _to_checkpoint(state: State) -> dict[str, Any]:
    # Parameters apart, so that an evaluation need not read the optimiser.
    training = {name: value for name, value in state.items() if name != "params"}
    return {"params": state["params"], "training": training}


def _from_checkpoint(restored: dict[str, Any]) -> State:
    return {"params": restored["params"], **restored["training"]}


def _check_run_dir(run_dir: Path, config: TrainConfig, resume: bool) -> None:
    saved = run_dir / CONFIG_FILE
    if not resume:
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise ConfigError(
                f"run_dir {run_dir} is not empty, and nothing in it is overwritten: "
                "continue that run with --resume, or choose another --run-dir"
            )
        return
    if not saved.exists():
        raise ConfigError(f"--resume: there is no run in {run_dir} (no {CONFIG_FILE})")
    if conflicts := resume_conflicts(load_config(saved), config):
        raise ConfigError(
            f"--resume: the run in {run_dir} has another configuration; these fields differ:\n  "
            + "\n  ".join(conflicts)
        )


def _write_config(run_dir: Path, config: TrainConfig) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / CONFIG_FILE, dump_config(config))
    except OSError as error:
        if is_disk_full(error):
            raise
        raise ConfigError(f"cannot write to run_dir {run_dir}: {error.strerror}") from error


def _check_finite(bad_step: int, checkpoints: Checkpoints) -> None:
    if bad_step:
        checkpoints.wait()
        raise NonFiniteError(
            f"the loss or its gradient is not finite at step {bad_step}; "
            f"{_last_checkpoint(checkpoints)}. "
            "A lower optimizer.learning_rate or optimizer.clip_norm may help"
        )


def _last_checkpoint(checkpoints: Checkpoints) -> str:
    if checkpoints.last_complete is None:
        return "no checkpoint was saved before"
    return f"the last checkpoint is of step {checkpoints.last_complete}"
