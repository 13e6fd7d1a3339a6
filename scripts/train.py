"""Trains a model: `python scripts/train.py CONFIG.yaml [--field value ...] [--resume]`."""

import dataclasses
import sys
from typing import Annotated

import tyro

from yoso_jax import cli
from yoso_jax.errors import ConfigError
from yoso_jax.train_config import TrainConfig, load_config
from yoso_jax.trainer import train

USAGE = "train.py CONFIG.yaml [--field value ...] [--resume]"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The fields of the YAML file, each of which an option may override, and what to do."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the run in run_dir from its newest checkpoint."""


def main() -> None:
    """Reads the YAML file, then the options, and trains."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ConfigError(f"usage: {USAGE}\n(train.py CONFIG.yaml --help lists the fields)")
    path, options = sys.argv[1], sys.argv[2:]
    default = Arguments(load_config(path))
    try:
        arguments = tyro.cli(
            Arguments,
            args=options,
            default=default,
            prog=f"train.py {path}",
            description=f"Trains a model as {path} says. {cli.EXIT_CODES}",
        )
    except ValueError as error:  # tyro reports those of the nested sections only
        raise ConfigError(str(error)) from error
    train(arguments.config, resume=arguments.resume)


if __name__ == "__main__":
    cli.run(main)
