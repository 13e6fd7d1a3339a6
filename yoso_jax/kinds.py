"""The kinds of runs: by name, the configuration of each and what trains it."""

import importlib
from typing import Any, NamedTuple

from yoso_jax.errors import ConfigError
from yoso_jax.objective import Objective
from yoso_jax.run_config import RunConfig


class _Kind(NamedTuple):
    config: tuple[str, str]
    objective: tuple[str, str]
    extra: str


# By name: modules that need libraries of an extra are imported when a run is of their kind.
_KINDS = {
    "lra": _Kind(
        ("yoso_jax.train_config", "TrainConfig"), ("yoso_jax.lra_objective", "LRAObjective"), ""
    ),
    "pretrain": _Kind(
        ("yoso_jax.pretraining.config", "PretrainConfig"),
        ("yoso_jax.pretraining.objective", "PretrainObjective"),
        "text",
    ),
    "finetune": _Kind(
        ("yoso_jax.finetuning.config", "FinetuneConfig"),
        ("yoso_jax.finetuning.objective", "FinetuneObjective"),
        "finetune",
    ),
}
KINDS = tuple(_KINDS)
"""Their names: a task of Long Range Arena, pretraining and fine-tuning."""


def config_class(kind: str) -> type[RunConfig]:
    """The configuration of a kind.

    Raises:
        ConfigError: a library it needs is not installed.
    """
    return _find(_KINDS[kind].config, kind)


def make_objective(config: RunConfig) -> Objective:
    """Reads, or makes, the data of a run, and what is needed to build its model.

    Raises:
        ConfigError: fields do not suit each other or the data, or a library is not installed.
        DataError: files are missing or damaged, or the data cannot be made.
        CheckpointError: the checkpoint to start from is missing or does not fit.
    """
    return _find(_KINDS[config.kind].objective, config.kind).create(config)


def _find(place: tuple[str, str], kind: str) -> Any:
    module, name = place
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"kind {kind} needs {error.name}: pip install 'yoso-jax[{_KINDS[kind].extra}]'"
        ) from error
