"""Saves models: Hugging Face's folder, an Orbax directory, or one flat safetensors file.

Everything is written in full beside its place before it gets there.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from yoso_jax.config import CONFIG_FILE, EncoderConfig, YosoConfig
from yoso_jax.conversion.files import (
    CONFIG_KEY,
    INDEX_FILE,
    WEIGHTS_FILE,
)
from yoso_jax.conversion.names import to_state_dict
from yoso_jax.conversion.orbax_files import write_params

FileFormat = Literal["hf", "orbax", "safetensors"]
"""A Hugging Face folder, an Orbax directory, or one file."""

_BIAS = "cls.predictions.bias"
_DECODER_BIAS = "cls.predictions.decoder.bias"


def save(model: Any, folder: str | os.PathLike[str], *, max_shard_size: int | str) -> None:
    """See `PretrainedModel.save_pretrained`."""
    folder, shard_bytes = Path(folder), _parse_size(max_shard_size)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder to save a model in")
    tensors = _file_tensors(model)
    config, entries = _config_to_save(model, tensors)
    is_new = not folder.exists()
    with _staging(folder, beside=is_new) as staging:
        _write_tensors(staging, tensors, shard_bytes)
        config.save_pretrained(staging, **entries)
        for path in staging.iterdir():
            # safetensors makes files that only their owner may read.
            shutil.copymode(staging / CONFIG_FILE, path)
        if is_new:
            staging.rename(folder)
        else:
            _replace_files(staging, folder)


def save_orbax(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes config.json, and the parameters' tree by Orbax in `params`, to a new folder.

    The tree has the names and layouts of the model's own state, of plain dicts with string keys:
    `orbax.checkpoint.v1.load(folder / "params")` reads it.

    Raises:
        FileExistsError: there is something at `folder`.
    """
    folder = _new(folder)
    config, entries = _config_to_save(model, _file_tensors(model))
    with _staging(folder, beside=True) as staging:
        config.save_pretrained(staging, **entries)
        write_params(staging.absolute(), model)
        staging.rename(folder)


def save_safetensors(model: Any, file: str | os.PathLike[str]) -> None:
    """Writes one safetensors file, the configuration in its metadata.

    Raises:
        FileExistsError: there is something at `file`.
    """
    file = _new(file)
    tensors = _file_tensors(model)
    config, entries = _config_to_save(model, tensors)
    with _staging(file, beside=True) as staging:
        path = staging / file.name
        metadata = {"format": "pt", CONFIG_KEY: config.to_json_string(**entries)}
        save_file(tensors, path, metadata=metadata)
        (staging / CONFIG_FILE).touch()
        shutil.copymode(staging / CONFIG_FILE, path)
        path.rename(file)


def _new(path: str | os.PathLike[str]) -> Path:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already")
    return Path(path)


@contextlib.contextmanager
def _staging(target: Path, *, beside: bool) -> Iterator[Path]:
    """An empty folder of the target's name, on its disk, removed with what is left in it."""
    parent = target.parent if beside else target
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.saving-", dir=parent) as scratch:
        staging = Path(scratch) / target.name
        staging.mkdir()
        yield staging


def _file_tensors(model: Any) -> dict[str, np.ndarray]:
    tensors = {
        # safetensors writes the buffer as it lies in memory, so views must be copied.
        key: np.ascontiguousarray(value)
        for key, value in to_state_dict(model, model.layout).items()
    }
    if _DECODER_BIAS in tensors:
        # Dead in an untied model, but transformers expects the key.
        tensors[_BIAS] = tensors[_DECODER_BIAS]
    return tensors


def _config_to_save(
    model: Any, tensors: Mapping[str, np.ndarray]
) -> tuple[EncoderConfig, dict[str, Any]]:
    """The configuration, and what a config.json says beside it."""
    config = model.config
    if isinstance(config, YosoConfig):
        extra = {key: value for key, value in config.extra.items() if key != "torch_dtype"}
        config = config.replace(extra=extra)
    dtype = next(iter(tensors.values())).dtype.name
    return config, {"architectures": [type(model).__name__], "dtype": dtype}


def _write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    shards: list[dict[str, np.ndarray]] = []
    room = 0
    for key, value in sorted(tensors.items()):
        if not shards or value.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = value
        room -= value.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS_FILE, metadata=metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, metadata=metadata)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _replace_files(staging: Path, folder: Path) -> None:
    new = {path.name for path in staging.iterdir()}
    stale = {
        path.name
        for path in folder.iterdir()
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name)
    }
    for name in sorted(new, key=CONFIG_FILE.__eq__):
        (staging / name).replace(folder / name)
    for name in stale - new:
        (folder / name).unlink()


def _parse_size(size: int | str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    if isinstance(size, str) and (match := re.fullmatch(r"(\d+) ?(KB|MB|GB)", size.upper())):
        size = int(match[1]) * units[match[2]]
    if not isinstance(size, int) or size < 1:
        raise ValueError(
            f"max_shard_size must be a number of bytes or a string such as '5GB', got {size!r}"
        )
    return size
