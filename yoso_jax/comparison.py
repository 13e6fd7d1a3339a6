"""The paper's comparison on a task of Long Range Arena: kinds of attention, several seeds of each.

Every run has a folder of its own, as `yoso_jax.trainer.train` writes it, with the row of the report
in `comparison.json` once the best checkpoint is tested. A row has

- `variant`, `seed`, `run_dir`, `device` (its kind) and `steps`;
- `best_step`, `valid_accuracy`, `test_loss`, `test_accuracy`: of the checkpoint with the best
  validation accuracy;
- `majority_baseline`: test accuracy of the most frequent label;
- `steps_per_s`: median over the log of training, validations not counted;
- `step_bytes`: memory of a training step as compiled, see `step_bytes`.
"""

import dataclasses
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from yoso_jax.config import EncoderConfig
from yoso_jax.config_files import CONFIG_FILE, load_config, resume_conflicts
from yoso_jax.errors import ConfigError
from yoso_jax.lra_objective import LRAObjective, majority_baseline
from yoso_jax.metrics import METRICS_FILE, read_metrics, write_atomically
from yoso_jax.optim import make_optimizer
from yoso_jax.sharding import make_layout
from yoso_jax.train_config import TrainConfig
from yoso_jax.trainer import train
from yoso_jax.training import init_state, make_keys, make_train_step, restore_params

type Row = dict[str, Any]

ROW_FILE = "comparison.json"
VARIANTS = (
    "softmax, yoso_e (YOSO in expectation), yoso_M (YOSO with M hashes, as in yoso_32) or yoso_c_M "
    "(that with a convolution)"
)
CONV_WINDOW = 33
"""Of `yoso_c_M` where the configuration has none: the authors published none for these tasks."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One of the runs to compare."""

    variant: str
    seed: int
    config: TrainConfig


def with_variant(config: TrainConfig, variant: str) -> TrainConfig:
    """The same run with another attention.

    Args:
        config: the run; its `model.conv_window`, if any, is that of `yoso_c_M`.
        variant: one of `VARIANTS`.

    Raises:
        ConfigError: there is no such variant, or the model cannot have it.
    """
    sampled = re.fullmatch(r"yoso_(c_)?([1-9]\d*)", variant)
    changes: dict[str, Any] = {"conv_window": None}
    if variant == "softmax":
        changes |= {"attention": "softmax"}
    elif variant == "yoso_e":
        changes |= {"attention": "yoso", "use_expectation": True}
    elif sampled:
        changes |= {"attention": "yoso", "use_expectation": False, "num_hash": int(sampled[2])}
        if sampled[1]:
            changes["conv_window"] = config.model.conv_window or CONV_WINDOW
    else:
        raise ConfigError(f"a variant must be {VARIANTS}, got {variant!r}")
    try:
        return dataclasses.replace(config, model=config.model.replace(**changes))
    except ValueError as error:
        raise ConfigError(f"{variant}: model.{error}") from error


def variant_of(model: EncoderConfig) -> str:
    """The name of a model's attention, one of `VARIANTS`.

    Of softmax and YOSO in expectation that have a convolution, which are none of them, it is
    `softmax_c` and `yoso_c_e`.
    """
    if model.attention == "softmax":
        return "softmax" if model.conv_window is None else "softmax_c"
    middle = "" if model.conv_window is None else "c_"
    return f"yoso_{middle}{model.num_hash if model.is_sampled else 'e'}"


def plan_runs(config: TrainConfig, variants: Sequence[str], seeds: int) -> list[Run]:
    """All variants with the first seed, then with the next, in folders `TASK-VARIANT-SEED`.

    Args:
        config: what the runs share; its `run_dir` holds their folders, its `seed` is the first.
        variants: see `VARIANTS`.
        seeds: how many seeds, >= 1.

    Raises:
        ConfigError: an argument is out of range.
    """
    if seeds < 1:
        raise ConfigError(f"seeds must be >= 1, got {seeds}")
    if repeated := sorted({name for name in variants if variants.count(name) > 1}):
        raise ConfigError(f"variants must differ, got {', '.join(repeated)} more than once")
    runs = []
    for seed in range(config.seed, config.seed + seeds):
        for variant in variants:
            folder = Path(config.run_dir) / f"{config.data.task}-{variant}-{seed}"
            each = dataclasses.replace(
                with_variant(config, variant), seed=seed, run_dir=str(folder)
            )
            runs.append(Run(variant, seed, each))
    return runs


def check_folders(runs: Sequence[Run], resume: bool) -> None:
    """Refuses what would fail after hours of other runs.

    Raises:
        ConfigError: without `resume` a folder exists; with it, a folder holds a run of another
            configuration.
    """
    existing = [run for run in runs if Path(run.config.run_dir).exists()]
    if existing and not resume:
        raise ConfigError(
            f"nothing is overwritten: {', '.join(run.config.run_dir for run in existing)} exist; "
            "go on with --resume, or choose another --run-dir"
        )
    for run in existing:
        if (file := Path(run.config.run_dir) / CONFIG_FILE).exists() and (
            conflicts := resume_conflicts(load_config(file), run.config)
        ):
            raise ConfigError(
                f"--resume: the run in {run.config.run_dir} has another configuration; these "
                "fields differ:\n  " + "\n  ".join(conflicts)
            )


def compare(runs: Sequence[Run], console: Console | None = None) -> Iterator[Row]:
    """Trains what is not finished, tests the best checkpoint of each run and yields its row.

    Ends early, after the row of the last complete run, if SIGTERM stopped one.

    Args:
        runs: see `plan_runs` and `check_folders`. One that was interrupted goes on.
        console: where progress is shown; standard output by default.

    Raises:
        RunError: see `yoso_jax.trainer.train`.
    """
    console = console or Console()
    memory: dict[str, int] = {}
    for number, run in enumerate(runs, 1):
        title = f"{run.variant}, seed {run.seed} ({number} of {len(runs)})"
        row = _finished(run)
        console.print(f"{title}: finished before" if row else title, highlight=False)
        if row is None:
            resume = (Path(run.config.run_dir) / CONFIG_FILE).exists()
            if train(run.config, resume=resume, console=console) is None:
                return
            # All seeds of a variant compile to the same.
            planned = memory.get(run.variant) or step_bytes(run.config)
            row = {**_test(run), "step_bytes": planned}
            file = Path(run.config.run_dir) / ROW_FILE
            write_atomically(file, json.dumps(row, indent=1, allow_nan=False) + "\n")
        memory[run.variant] = row["step_bytes"]
        yield row


def step_bytes(config: TrainConfig) -> int:
    """Memory that XLA plans for a training step: state, batch and temporaries, in bytes.

    The peak that a device reports is that of the whole process, so it would hide a variant behind
    one that took more before.
    """
    tx = make_optimizer(config.optimizer, config.steps)
    objective, layout = LRAObjective(config), make_layout()
    shape = (config.batch_size, *((2,) if config.model.dual else ()), config.sequence_length)
    batch = {
        "input_ids": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.batch),
        "attention_mask": jax.ShapeDtypeStruct(shape, jnp.bool, sharding=layout.batch),
        "labels": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=layout.batch),
    }
    step: Any = make_train_step(objective, tx, layout)
    # A real state, so that a compilation cache finds the very program that was trained with.
    lowered = step.lower(init_state(objective, tx, layout), batch, make_keys(config.seed)[1])
    memory = lowered.compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def tabulate(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and, for each variant, cells; the spread is the standard deviation over seeds."""
    lines = []
    for variant, group in _by_variant(rows).items():
        accuracies = [100 * row["test_accuracy"] for row in group]
        accuracy = f"{statistics.mean(accuracies):.2f}"
        if len(group) > 1:
            accuracy += f" ± {statistics.stdev(accuracies):.2f}"
        speed = statistics.mean(row["steps_per_s"] for row in group)
        memory = max(row["step_bytes"] for row in group) / 2**20
        lines.append([variant, str(len(group)), accuracy, f"{speed:.2f}", f"{memory:,.1f}"])
    return ["variant", "seeds", "test accuracy, %", "steps/s", "MiB a step"], lines


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draws validation accuracy against steps, a line a run; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.subplots()
    for number, (variant, group) in enumerate(_by_variant(rows).items()):
        for row in group:
            records = read_metrics(Path(row["run_dir"]) / METRICS_FILE)
            points = [(r["step"], 100 * r["accuracy"]) for r in records if r["split"] == "valid"]
            label = variant if row is group[0] else None
            axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="validation accuracy, %", title=title)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend()
    figure.savefig(path, dpi=120)


def _by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    variants = dict.fromkeys(row["variant"] for row in rows)
    return {name: [row for row in rows if row["variant"] == name] for name in variants}


def _finished(run: Run) -> Row | None:
    """The row of a run that needs no more training: not one that is now to take more steps."""
    file = Path(run.config.run_dir) / ROW_FILE
    try:
        row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except ValueError:  # damaged, and made once more
        row = None
    if not isinstance(row, dict) or row.get("steps") != run.config.steps:
        return None
    return {**row, "run_dir": run.config.run_dir}  # it may have been moved


def _test(run: Run) -> Row:
    config = run.config
    objective, layout = LRAObjective.create(config), make_layout()
    best_step, params, _ = restore_params(objective, "best", layout)
    _, _, eval_key = make_keys(config.seed)
    test = objective.make_evaluation(eval_key, layout.put)(params, "test")
    records = read_metrics(Path(config.run_dir) / METRICS_FILE)
    valid = {r["step"]: r["accuracy"] for r in records if r["split"] == "valid"}
    return {
        "variant": run.variant,
        "seed": run.seed,
        "run_dir": config.run_dir,
        "device": jax.devices()[0].device_kind,
        "steps": config.steps,
        "best_step": best_step,
        "valid_accuracy": valid[best_step],
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "majority_baseline": majority_baseline(objective.data.train, objective.data.test),
        # None are of one step, which compiles.
        "steps_per_s": statistics.median(
            [record["steps_per_s"] for record in records if "steps_per_s" in record] or [0.0]
        ),
    }
