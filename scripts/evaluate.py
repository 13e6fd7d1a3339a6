"""Evaluates a trained model: `python scripts/evaluate.py RUN_DIR [--mode expectation]`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from yoso_jax import cli
from yoso_jax.errors import CheckpointError
from yoso_jax.train_config import CONFIG_FILE, load_config
from yoso_jax.trainer import describe_accuracy, load_data, majority_baseline, make_evaluation
from yoso_jax.training import restore_params, with_attention


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which checkpoint, on which data, with which attention."""

    run_dir: tyro.conf.Positional[Path]
    """Folder that train.py wrote."""
    mode: Literal["expectation", "sampled"] | None = None
    """Attention in expectation or sampled; by default as in training."""
    split: Literal["test", "valid"] = "test"
    """Data to evaluate on."""
    step: Literal["latest", "best"] | int = "latest"
    """Checkpoint: the newest, the one with the best validation accuracy, or of this step."""


def main() -> None:
    """Loads the checkpoint and prints its accuracy beside the majority baseline."""
    arguments = tyro.cli(Arguments, description=f"Evaluates a run. {cli.EXIT_CODES}")
    run_dir = arguments.run_dir
    if not (run_dir / CONFIG_FILE).is_file():
        raise CheckpointError(f"there is no run in {run_dir} (no {CONFIG_FILE})")
    config = dataclasses.replace(load_config(run_dir / CONFIG_FILE), run_dir=str(run_dir))
    if arguments.mode is not None:
        config = with_attention(config, arguments.mode)
    step, params, notes = restore_params(config, arguments.step)
    for note in notes:
        print(note)
    data = load_data(config)
    split = getattr(data, arguments.split)
    result = make_evaluation(config)(params, split)
    baseline = majority_baseline(data.train, split)
    print(
        f"step {step}: {arguments.split} loss {result['loss']:.3f}, "
        f"accuracy {describe_accuracy(config, result['accuracy'], baseline)}"
    )


if __name__ == "__main__":
    cli.run(main)
