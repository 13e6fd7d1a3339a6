"""Converts a checkpoint to another format, and checks that nothing changed on the way."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from yoso_jax.config import EncoderConfig
from yoso_jax.conversion.load import make_plan
from yoso_jax.conversion.plan import Plan
from yoso_jax.conversion.save import FileFormat, save_orbax, save_safetensors
from yoso_jax.errors import CheckpointError, ConfigError, DiskFullError

# What a tokenizer consists of, copied along: a folder is then complete.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
)
_SPARE_BYTES = 1 << 20  # for the configuration, names and Orbax's own files


def convert(
    plan: Plan,
    destination: str | os.PathLike[str],
    *,
    file_format: FileFormat,
    dtype: str,
    verify: bool,
) -> int:
    """Writes what `plan` describes to a new place, which appears whole or not at all.

    Args:
        plan: of `make_plan`.
        destination: a folder, or for "safetensors" a file, that does not exist.
        file_format: "hf", "orbax" or "safetensors".
        dtype: of the parameters written, a floating point type.
        verify: read the result back and compare it with the source before it appears.

    Returns:
        The number of tensors compared.

    Raises:
        CheckpointError: the checkpoint does not fit its architecture or lacks a part of it, or the
            result differs from it.
        ConfigError: `destination` exists.
        DiskFullError: there is not enough room.
        OSError: a file cannot be read or written.
    """
    destination = Path(destination)
    if os.path.lexists(destination):
        raise ConfigError(f"{destination} exists already")
    if not destination.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {destination.absolute().parent} to write in")
    _check_complete(plan)
    _check_space(plan, dtype, destination.absolute().parent)
    model = plan.load(dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory(
        prefix=f".{destination.name}.converting-", dir=destination.absolute().parent
    ) as scratch:
        staging = Path(scratch) / destination.name
        _write(model, plan.path, staging, file_format)
        compared = _verify(plan, model, staging, dtype) if verify else 0
        staging.rename(destination)
    return compared


def _check_complete(plan: Plan) -> None:
    try:
        plan.check()
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if made_up := [x.target for x in plan.entries if x.status == "initialised"]:
        raise CheckpointError(
            f"{plan.path} lacks {', '.join(map(str, made_up))} of {plan.model_class.__name__}: "
            "name an architecture that it holds"
        )


def _check_space(plan: Plan, dtype: str, parent: Path) -> None:
    elements = sum(tensor.size for tensor in plan.tensors.values())
    needed = elements * jnp.dtype(dtype).itemsize + _SPARE_BYTES
    if (free := shutil.disk_usage(parent).free) < needed:
        raise DiskFullError(
            f"writing needs {needed / 1e6:.0f} MB, the disk of {parent} has {free / 1e6:.0f} MB"
        )


def _write(model: Any, source: Path, target: Path, file_format: FileFormat) -> None:
    if file_format == "safetensors":
        save_safetensors(model, target)
        return
    if file_format == "orbax":
        save_orbax(model, target)
    else:
        model.save_pretrained(target)
    folder = source if source.is_dir() else source.parent
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _verify(plan: Plan, model: Any, written: Path, dtype: str) -> int:
    """Compares what was written, read anew, with the source, read anew."""
    again = make_plan([plan.model_class], written)
    again.check()
    if _comparable(again.config) != _comparable(model.config):
        raise CheckpointError(f"the configuration as written differs from that of {plan.path}")
    for key, tensor in plan.tensors.items():
        expected = tensor.read().astype(jnp.dtype(dtype)).astype(np.float32)
        actual = again.tensors[key].read().astype(np.float32)
        if not np.array_equal(actual, expected, equal_nan=True):
            raise CheckpointError(f"{key} as written differs from {tensor.source} in {plan.path}")
    return len(plan.tensors)


def _comparable(config: EncoderConfig) -> dict[str, Any]:
    """What a configuration says, but for what saving adds."""
    added = ("architectures", "dtype", "torch_dtype")
    return {key: value for key, value in config.to_dict().items() if key not in added}
