"""The configuration of a training run: dataclasses, YAML in and out, comparison."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from yoso_jax.data.tasks import TASKS, DataConfig
from yoso_jax.errors import ConfigError
from yoso_jax.lra import LRAConfig
from yoso_jax.optim import OptimizerConfig

CONFIG_FILE = "config.yaml"
# What may change when a run is resumed: where things are and how often we look, and a later end.
_FREE_ON_RESUME = (
    "run_dir",
    "data_dir",
    "log_every",
    "evaluate_every",
    "keep_latest",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One classifier trained on a task of Long Range Arena; every number a run depends on."""

    run_dir: str
    """Folder the run writes: config.yaml, checkpoints/, metrics.jsonl, results.json, curves.png."""
    steps: int
    """Updates in all, >= 1. A resumed run may raise it."""
    sequence_length: int
    """Tokens an example is padded to, in 1..model.max_position_embeddings. Text and Retrieval are
    cut off there; examples of the other tasks may not be longer."""
    data: Annotated[DataConfig, tyro.conf.AvoidSubcommands]
    """The task and its examples. In YAML the field `task` (listops, pathfinder, image, text or
    retrieval; listops by default) says which of the configurations the others are fields of."""
    model: LRAConfig
    """The classifier."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser and its schedule."""
    data_dir: str = "data/listops"
    """Folder that holds the files of the task; ListOps and Pathfinder are generated into it."""
    tsv_dir: str | None = None
    """Folder of a published copy of ListOps (basic_train.tsv, basic_val.tsv, basic_test.tsv) to
    read instead of generating `data`."""
    seed: int = 0
    """Seed of the initial parameters, the order of the data, dropout and hashing, >= 0."""
    batch_size: int = 32
    """Examples an update, >= 1."""
    eval_batch_size: int = 64
    """Examples a step of evaluation, >= 1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the activations; parameters and the optimiser stay float32."""
    log_every: int = 50
    """Steps averaged in a line of metrics, >= 1."""
    evaluate_every: int = 500
    """Steps between validations, each followed by a checkpoint, >= 1."""
    keep_latest: int = 2
    """Checkpoints kept besides the best (by validation accuracy), >= 1."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "sequence_length",
            "batch_size",
            "eval_batch_size",
            "log_every",
            "evaluate_every",
            "keep_latest",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2**31), got {self.seed}")
        if self.dtype not in (names := ("float32", "bfloat16", "float16")):
            raise ValueError(f"dtype must be one of {names}, got {self.dtype!r}")
        if not self.run_dir:
            raise ValueError("run_dir must name a folder, got an empty string")
        if self.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length must be at most model.max_position_embeddings "
                f"({self.model.max_position_embeddings}), got {self.sequence_length}"
            )
        self._check_task()
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps must be at most steps ({self.steps}), "
                f"got {self.optimizer.warmup_steps}"
            )

    def _check_task(self) -> None:
        name, task = self.data.task, TASKS[self.data.task]
        if self.tsv_dir is not None and name != "listops":
            raise ValueError(f"tsv_dir must be null for {name}: only listops has a published copy")
        longest = None if self.tsv_dir is not None else task.longest(self.data)
        if longest is not None and self.sequence_length < longest:
            raise ValueError(
                f"sequence_length must be at least {longest}, the longest example of {name} that "
                f"data allows, got {self.sequence_length}"
            )
        for field in ("vocab_size", "num_labels"):
            least, value = getattr(task, field), getattr(self.model, field)
            if value < least:
                raise ValueError(f"model.{field} must be at least {least} for {name}, got {value}")
        if self.model.dual != task.dual:
            accepted, found = (str(value).lower() for value in (task.dual, self.model.dual))
            raise ValueError(f"model.dual must be {accepted} for {name}, got {found}")


def load_config(path: str | Path) -> TrainConfig:
    """Reads a YAML file.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, missing, of a wrong type or
            out of range; the message names the file, the field and what is accepted.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return _build(TrainConfig, values, str(path), "")


def dump_config(config: TrainConfig) -> str:
    """Every field, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(_to_values(config), sort_keys=False)


def resume_conflicts(saved: TrainConfig, requested: TrainConfig) -> list[str]:
    """One line per field that a resumed run may not change; empty if it can go on."""
    old, new = (
        _flatten(_to_values(saved)),
        _flatten(_to_values(requested)),
    )
    if saved.data.task != requested.data.task:
        return [f"data.task: {saved.data.task!r} in the run, {requested.data.task!r} asked for"]
    conflicts = [
        f"{name}: {old[name]!r} in the run, {new[name]!r} asked for"
        for name in old
        if old[name] != new[name] and name not in ("steps", *_FREE_ON_RESUME)
    ]
    if requested.steps < saved.steps:
        conflicts.append(f"steps: {saved.steps} in the run, cannot be lowered to {requested.steps}")
    return conflicts


def _to_values(config: TrainConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return values | {"data": {"task": config.data.task, **values["data"]}}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _build(cls: type, values: object, file: str, prefix: str) -> Any:
    section = prefix.removesuffix(".") or "the top level"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{file}: {section} must be a mapping of fields, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            accepted = ", ".join(fields)
            raise ConfigError(f"{file}: unknown field '{prefix}{name}'; accepted here: {accepted}")
    for name, field in fields.items():
        unset = field.default is field.default_factory is dataclasses.MISSING
        if unset and name not in values:
            raise ConfigError(f"{file}: field '{prefix}{name}' is missing")
    hints = typing.get_type_hints(cls)
    arguments = {
        name: _convert(hints[name], value, file, prefix + name) for name, value in values.items()
    }
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"{file}: {prefix}{error}") from error


def _build_task(options: tuple[Any, ...], values: object, file: str, name: str) -> Any:
    """Builds the dataclass that the field `task` names, the first if there is none."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{file}: {name} must be a mapping of fields, got {values!r}")
    by_task = {option.task: option for option in options}
    task = values.get("task", options[0].task)
    if not isinstance(task, str) or task not in by_task:
        accepted = " or ".join(map(repr, by_task))
        raise ConfigError(f"{file}: field '{name}.task' must be {accepted}, got {task!r}")
    fields = {field: value for field, value in values.items() if field != "task"}
    return _build(by_task[task], fields, file, name + ".")


def _convert(hint: Any, value: object, file: str, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, file, name + ".")
    # Of a Literal and None, `|` makes a typing.Union.
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if is_union else (hint,)
    if dataclasses.is_dataclass(options[0]):
        return _build_task(options, value, file, name)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is float:
            # YAML 1.1 reads 3e-4 as a string.
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                try:
                    return float(value)
                except ValueError:
                    continue
        elif isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    accepted = " or ".join(map(_describe, options))
    raise ConfigError(f"{file}: field '{name}' must be {accepted}, got {value!r}")


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(value) for value in typing.get_args(hint))
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a string",
    }
    return names.get(hint, "null")
