"""The command that trains, from a YAML file and options."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import jax
import tyro

from yoso_jax import cli
from yoso_jax.config_files import load_config
from yoso_jax.errors import ConfigError
from yoso_jax.kinds import KINDS
from yoso_jax.run_config import RunConfig
from yoso_jax.trainer import train


@dataclasses.dataclass(frozen=True)
class _Arguments[Config: RunConfig]:
    """The fields of the YAML file, each of which an option may override, and what to do."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the run in run_dir from its newest checkpoint."""
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Trace a few steps to run_dir/profile, for XProf or Perfetto."""


def main(script: str, kinds: Sequence[str] = KINDS) -> None:
    """Reads the YAML file and the options of the command line, and trains.

    Args:
        script: name of the command.
        kinds: those it takes, see `yoso_jax.kinds`.
    """
    usage = (
        f"usage: {script} CONFIG.yaml [--field value ...] [--resume]\n"
        f"({script} CONFIG.yaml --help lists the fields)"
    )
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(usage)
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ConfigError(usage)
    path, options = sys.argv[1], sys.argv[2:]
    config = load_config(path)
    if config.kind not in kinds:
        raise ConfigError(f"{path}: kind must be {' or '.join(kinds)}, got {config.kind!r}")
    kind: type = type(config)
    try:
        arguments = tyro.cli(
            _Arguments[kind],
            args=options,
            default=_Arguments(config),
            prog=f"{script} {path}",
            description=f"Trains a model as {path} says. {cli.EXIT_CODES}",
        )
    except ValueError as error:  # tyro reports those of the nested sections only
        raise ConfigError(str(error)) from error
    _join_processes()
    train(arguments.config, resume=arguments.resume, profile=arguments.profile)


def _join_processes() -> None:
    """Makes the processes that were started together one, where the environment tells of any."""
    environment = os.environ
    is_told = "JAX_COORDINATOR_ADDRESS" in environment
    tasks = (environment.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    is_pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    if is_told or is_pod or any(int(number) > 1 for number in tasks):
        count, index = (environment.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if index is None else int(index),
        )
