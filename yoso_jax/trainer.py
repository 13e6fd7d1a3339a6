"""The training loop: data in, checkpoints, metrics and results out, and how a run may end."""

import json
import math
import signal
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from rich.console import Console

from yoso_jax.checkpointing import Checkpoints
from yoso_jax.config_files import CONFIG_FILE, dump_config, load_config, resume_conflicts
from yoso_jax.errors import (
    ConfigError,
    DiskFullError,
    Interrupted,
    NonFiniteError,
    is_disk_full,
    root_cause,
)
from yoso_jax.kinds import make_objective
from yoso_jax.metrics import (
    METRICS_FILE,
    MetricsWriter,
    Throughput,
    check_tensorboard,
    plot_curves,
    read_metrics,
    score,
    write_atomically,
)
from yoso_jax.objective import Evaluation, Objective
from yoso_jax.optim import make_optimizer, make_schedule
from yoso_jax.profiling import FIRST_STEP, Profiler
from yoso_jax.progress import TrainingProgress
from yoso_jax.run_config import RunConfig
from yoso_jax.sharding import Layout, make_train_layout
from yoso_jax.signals import StopSignals, sigterm_exits
from yoso_jax.training import (
    State,
    abstract_state,
    evaluated_params,
    from_checkpoint,
    init_state,
    make_keys,
    make_train_step,
    restore_params,
    to_checkpoint,
    window_means,
)

RESULTS_FILE = "results.json"
BAD_BATCH_FILE = "bad_batch.npz"
PROFILE_FOLDER = "profile"


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    profile: bool = False,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Trains, validates and saves as configured, then tests.

    Writes to `config.run_dir`: `config.yaml`, `checkpoints/`, `metrics.jsonl`, `results.json`,
    `curves.png`, and what the kind of run keeps. On Ctrl-C or SIGTERM the step under way is
    finished and saved. Everything is written by the first process, if there are several.

    Args:
        config: the run.
        resume: continue the run in `config.run_dir` from its newest checkpoint that can be read.
            On a CPU the continued run equals an uninterrupted one bit for bit.
        profile: trace a few steps with JAX's profiler to `run_dir/profile`.
        console: where progress is shown; standard output by default.

    Returns:
        What `results.json` holds; None if SIGTERM stopped the run.

    Raises:
        ConfigError: the run folder is taken, or holds a run that this configuration cannot resume;
            see also `yoso_jax.kinds.make_objective`.
        DataError: see `yoso_jax.kinds.make_objective`.
        CheckpointError: no checkpoint can be read, or that to start from.
        NonFiniteError: the loss or its gradient is not finite, or above `max_loss`; that state is
            not saved.
        DiskFullError: the last complete checkpoint can still be used.
        Interrupted: Ctrl-C; the state was saved.
    """
    checkpoints = Checkpoints(config.run_dir, config.keep_latest)
    try:
        _check_run_dir(Path(config.run_dir), config, resume)
        if config.tensorboard:
            check_tensorboard()
        layout = make_train_layout(config)
        with sigterm_exits():
            objective = make_objective(config)
        with checkpoints:
            return _train(objective, layout, checkpoints, resume, profile, console)
    except Exception as error:
        if not is_disk_full(error):
            raise
        reason = textwrap.shorten(str(root_cause(error)), 200, placeholder="...")
        raise DiskFullError(
            f"the disk is full ({reason}); {_last_checkpoint(checkpoints)}"
        ) from error


def _train(
    objective: Objective,
    layout: Layout,
    checkpoints: Checkpoints,
    resume: bool,
    profile: bool,
    console: Console | None,
) -> dict[str, Any] | None:
    config, run_dir = objective.config, Path(objective.config.run_dir)
    _, train_key, eval_key = make_keys(config.seed)
    tx = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    train_step = make_train_step(objective, tx, layout)
    evaluation = objective.make_evaluation(eval_key, layout.put)

    state, notes = _first_state(objective, tx, layout, checkpoints, resume)
    start = int(state["step"])
    iterator = objective.make_iterator(start)
    is_first = jax.process_index() == 0
    if is_first:
        _write_config(run_dir, config)

    with (
        StopSignals() as signals,
        MetricsWriter(run_dir if is_first else None, start, config.tensorboard) as metrics,
        TrainingProgress(
            config.steps,
            start,
            console if is_first else Console(quiet=True),
            objective.train_metrics,
        ) as progress,
        Profiler(run_dir / PROFILE_FOLDER if profile else None) as profiler,
    ):
        for note in (*objective.notes, *notes):
            progress.say(note)
        if resume:
            progress.say(f"resuming {run_dir} from step {start}")
        scores = _scores(run_dir, objective.valid_splits[0], start)
        if is_first and start < config.steps and not _is_over(scores, config.patience):
            _set_results_aside(run_dir)
        throughput = Throughput()
        step = start
        while step < config.steps and not _is_over(scores, config.patience):
            step += 1
            with throughput.waiting():
                batch = next(iterator)
            with profiler.step(step - start):
                # Both return before the device is done: it is never waited for here, and the next
                # batch is copied while it computes.
                state = train_step(state, layout.put(batch), train_key)
            throughput.add(int(np.sum(batch["attention_mask"])))
            if step == start + 1:
                jax.block_until_ready(state)
                throughput.restart()  # the first step, which compiles, is not counted
            progress.step(step)

            last = step == config.steps
            log = last or step % config.log_every == 0
            validate = last or step % config.evaluate_every == 0
            stop = _agree(signals.received, log)
            if log or validate or stop:
                _check_finite(int(state["window"]["bad_step"]), objective, checkpoints)
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
                if config.max_loss is not None and record["loss"] > config.max_loss:
                    checkpoints.wait()
                    raise NonFiniteError(
                        f"the loss, {record['loss']:.4g}, is above max_loss ({config.max_loss:g}) "
                        f"at step {step}; {_last_checkpoint(checkpoints)}"
                    )
            if validate:
                with throughput.paused():
                    results = _validate(objective, evaluation, evaluated_params(state))
                bad = any(not math.isfinite(found["loss"]) for found in results.values())
                _check_finite(step if bad else 0, objective, checkpoints)
                for split, found in results.items():
                    record = {"step": step, "split": split, **found, "time": time.time()}
                    metrics.write(record)
                    progress.valid(record)
                first = results[objective.valid_splits[0]]
                scores.append(score(first))
            if validate or stop:
                checkpoints.save(step, to_checkpoint(state), scores[-1] if validate else None)
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
        if profile and not profiler.has_traced:
            progress.say(f"nothing was traced: that starts with step {FIRST_STEP} of a run")
        if step < config.steps:
            progress.say(f"ended at step {step}: no new best in {config.patience} validations")
        return _finish(objective, layout, evaluation, step, evaluated_params(state), progress)


def _first_state(
    objective: Objective,
    tx: optax.GradientTransformation,
    layout: Layout,
    checkpoints: Checkpoints,
    resume: bool,
) -> tuple[State, list[str]]:
    """That of the newest checkpoint to resume from, or a new one; and what to tell of it."""
    if not (resume and checkpoints.steps()):
        return init_state(objective, tx, layout), []
    abstract = layout.abstract(abstract_state(objective, tx))
    _, restored, notes = checkpoints.restore_latest(to_checkpoint(abstract))
    return from_checkpoint(restored), notes


def _validate(
    objective: Objective, evaluation: Evaluation, params: PyTree
) -> dict[str, dict[str, float]]:
    return {split: evaluation(params, split) for split in objective.valid_splits}


def _scores(run_dir: Path, split: str, step: int) -> list[float]:
    """What validations up to a step gave, for a run to know when to end after it was resumed."""
    return [
        score(record)
        for record in read_metrics(run_dir / METRICS_FILE)
        if record["split"] == split and record["step"] <= step
    ]


def _is_over(scores: list[float], patience: int | None) -> bool:
    """Whether the best score is `patience` validations old."""
    if patience is None or not scores:
        return False
    return len(scores) - 1 - scores.index(max(scores)) >= patience


def _agree(stop: signal.Signals | None, log: bool) -> signal.Signals | None:
    """The signal to stop at, the same for all processes, which ask each other when they log."""
    if jax.process_count() == 1:
        return stop
    if not log:
        return None
    number = int(np.max(multihost_utils.process_allgather(np.int32(stop or 0))))
    return signal.Signals(number) if number else None


def _finish(
    objective: Objective,
    layout: Layout,
    evaluation: Evaluation,
    step: int,
    params: PyTree,
    progress: TrainingProgress,
) -> dict[str, Any]:
    run_dir = Path(objective.config.run_dir)
    if objective.config.final_checkpoint == "best":
        step, params, notes = restore_params(objective, "best", layout)
        for note in (*notes, f"testing the best checkpoint, of step {step}"):
            progress.say(note)
    results = {"step": step, **objective.finish(params, evaluation, progress.say)}
    if jax.process_index() == 0:
        write_atomically(run_dir / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
        if plot_curves(run_dir) is None:
            progress.say("curves.png was not drawn: matplotlib is not installed")
    return results


def _set_results_aside(run_dir: Path) -> None:
    """Renames what tests of an earlier end of the run gave, which goes on."""
    file = run_dir / RESULTS_FILE
    if file.exists():
        try:
            name = f"results-{json.loads(file.read_bytes())['step']}.json"
        except (ValueError, KeyError, TypeError):
            name = "results-damaged.json"
        file.replace(run_dir / name)


def _check_run_dir(run_dir: Path, config: RunConfig, resume: bool) -> None:
    saved = run_dir / CONFIG_FILE
    if not resume:
        # A run killed while it wrote its configuration is none yet.
        begun = {CONFIG_FILE + ".tmp"}
        if run_dir.exists() and not run_dir.is_dir():
            raise ConfigError(f"run_dir must be a folder, {run_dir} is none")
        if run_dir.exists() and {path.name for path in run_dir.iterdir()} - begun:
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


def _write_config(run_dir: Path, config: RunConfig) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / CONFIG_FILE, dump_config(config))
    except OSError as error:
        if is_disk_full(error):
            raise
        raise ConfigError(f"cannot write to run_dir {run_dir}: {error.strerror}") from error


def _check_finite(bad_step: int, objective: Objective, checkpoints: Checkpoints) -> None:
    if bad_step:
        checkpoints.wait()
        raise NonFiniteError(
            f"the loss or its gradient is not finite at step {bad_step}; "
            f"{_last_checkpoint(checkpoints)}. Its batch is in {_save_batch(objective, bad_step)}. "
            "In another run_dir a lower optimizer.learning_rate or optimizer.clip_norm may help"
        )


def _save_batch(objective: Objective, step: int) -> Path:
    """Writes the batch of a step, made once more."""
    path = Path(objective.config.run_dir) / BAD_BATCH_FILE
    if jax.process_index() == 0:
        arrays: dict[str, Any] = dict(next(objective.make_iterator(step - 1)))
        np.savez(path, **arrays)
    return path


def _last_checkpoint(checkpoints: Checkpoints) -> str:
    if checkpoints.last_complete is None:
        return "no checkpoint was saved before"
    return f"the last checkpoint is of step {checkpoints.last_complete}"
