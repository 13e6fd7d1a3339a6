"""Configurations of runs as YAML, in and out, and their comparison."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from yoso_jax.errors import ConfigError
from yoso_jax.kinds import KINDS, config_class
from yoso_jax.run_config import FREE_ON_RESUME, RunConfig

CONFIG_FILE = "config.yaml"


class _Loader(yaml.SafeLoader):
    """Refuses a field that is there twice, of which YAML's own would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the field {twice[0]!r} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def load_config(path: str | Path) -> RunConfig:
    """Reads a YAML file; its field `kind` (lra by default) says of what configuration.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, missing, of a wrong type or
            out of range; the message names the file, the field and what is accepted.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: the top level must be a mapping of fields, got {values!r}")
    kind = values.get("kind", KINDS[0])
    if kind not in KINDS:
        accepted = " or ".join(map(repr, KINDS))
        raise ConfigError(f"{path}: field 'kind' must be {accepted}, got {kind!r}")
    fields = {name: value for name, value in values.items() if name != "kind"}
    return _build(config_class(kind), fields, str(path), "")


def dump_config(config: RunConfig) -> str:
    """Every field, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(_to_values(config), sort_keys=False)


def resume_conflicts(saved: RunConfig, requested: RunConfig) -> list[str]:
    """One line per field that a resumed run may not change; empty if it can go on."""
    old, new = (
        _flatten(_to_values(saved)),
        _flatten(_to_values(requested)),
    )
    for name in ("kind", "data.task"):
        if old[name] != new[name]:
            return [f"{name}: {old[name]!r} in the run, {new[name]!r} asked for"]
    conflicts = [
        f"{name}: {old[name]!r} in the run, {new[name]!r} asked for"
        for name in old
        if old[name] != new[name] and name not in ("steps", *FREE_ON_RESUME)
    ]
    if requested.steps < saved.steps:
        conflicts.append(f"steps: {saved.steps} in the run, cannot be lowered to {requested.steps}")
    return conflicts


def _to_values(config: RunConfig) -> dict[str, Any]:
    values = _plain(dataclasses.asdict(config))
    return {"kind": config.kind, **values, "data": {"task": config.data.task, **values["data"]}}


def _plain(value: Any) -> Any:
    """Lists for tuples, which YAML does not know."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


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
    if dataclasses.is_dataclass(hint) and not hasattr(hint, "task"):
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
        elif typing.get_origin(option) is tuple:
            if isinstance(value, list):
                element = typing.get_args(option)[0]
                return tuple(
                    _convert(element, each, file, f"{name}[{number}]")
                    for number, each in enumerate(value)
                )
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
    if typing.get_origin(hint) is tuple:
        return "a list"
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a string",
    }
    return names.get(hint, "null")
