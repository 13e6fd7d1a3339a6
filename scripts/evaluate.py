"""Evaluates a trained model: `python scripts/evaluate.py RUN_DIR [--mode expectation]`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from yoso_jax import cli
from yoso_jax.config_files import CONFIG_FILE, load_config
from yoso_jax.errors import CheckpointError, ConfigError
from yoso_jax.kinds import make_objective
from yoso_jax.sharding import make_layout
from yoso_jax.training import make_keys, restore_params, with_attention


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which checkpoint, on which data, with which attention."""

    run_dir: tyro.conf.Positional[Path]
    """Folder that train.py wrote."""
    mode: Literal["expectation", "sampled"] | None = None
    """Attention in expectation or sampled; by default as in training."""
    split: str | None = None
    """Data to evaluate on: valid or test, of MNLI valid_mismatched too; by default the test, or the
    first validation if the test has no labels."""
    step: Literal["latest", "best"] | int = "latest"
    """Checkpoint: the newest, the one that is best by validation, or of this step."""


def main() -> None:
    """Loads the checkpoint and prints its loss and metrics."""
    arguments = tyro.cli(Arguments, description=f"Evaluates a run. {cli.EXIT_CODES}")
    run_dir = arguments.run_dir
    if not (run_dir / CONFIG_FILE).is_file():
        raise CheckpointError(f"there is no run in {run_dir} (no {CONFIG_FILE})")
    config = dataclasses.replace(load_config(run_dir / CONFIG_FILE), run_dir=str(run_dir))
    if arguments.mode is not None:
        config = with_attention(config, arguments.mode)
    objective, layout = make_objective(config), make_layout()
    splits = objective.labelled_splits
    split = arguments.split or ("test" if "test" in splits else splits[0])
    if split not in splits:
        raise ConfigError(f"--split must be {' or '.join(splits)}, got {split!r}")
    step, params, notes = restore_params(objective, arguments.step, layout)
    for note in notes:
        print(note)
    _, _, eval_key = make_keys(config.seed)
    result = objective.make_evaluation(eval_key, layout.put)(params, split)
    print(f"step {step}: {split} {objective.describe(split, result)}")


if __name__ == "__main__":
    cli.run(main)
