"""Reads tensors and configurations from the files and folders that checkpoints come in.

What a file is, its first bytes say; its name plays no part.
"""

import functools
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open

from yoso_jax.config import CONFIG_FILE, read_json_object
from yoso_jax.conversion.tensors import Tensor
from yoso_jax.conversion.torch_files import read_torch_tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
PARAMS_FOLDER = "params"
"""Where an Orbax directory keeps the parameters, beside config.json."""

CONFIG_KEY = "config"
"""Metadata entry of a flat safetensors file that holds the text of its config.json."""

_NAMES = (WEIGHTS_FILE, INDEX_FILE, TORCH_FILE, TORCH_INDEX_FILE)
_AUTHORS_SUFFIXES = (".model", ".cp")
_TORCH_STARTS = (b"PK\x03\x04", b"\x80")
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def is_orbax_folder(path: Path) -> bool:
    """Whether `path` is an Orbax directory that this project wrote."""
    return (path / PARAMS_FOLDER).is_dir() and (path / CONFIG_FILE).is_file()


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by key; values are read when they are used.

    Args:
        path: a folder with model.safetensors or pytorch_model.bin, or the index of shards of
            either, or a single file of the authors (.model, .cp); or a file: safetensors, or of
            `torch.save` (a state dict, or one under "model_state_dict" or "state_dict").

    Raises:
        FileNotFoundError: there is nothing at `path`, or nothing of these in the folder.
        ValueError: a file is damaged, of another kind, or an index leads out of its folder.
        OSError: a file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path} (only local paths are read)")
    path = locate(path)
    if not path.is_dir():
        return _read_file(path)
    present = next(name for name in _NAMES if (path / name).exists())
    if present in (WEIGHTS_FILE, TORCH_FILE):
        return _read_file(path / present)
    return _read_shards(path / present)


def locate(path: Path) -> Path:
    """The path itself, or the authors' file that a folder holds instead of anything else."""
    if not path.is_dir() or is_orbax_folder(path) or any((path / x).exists() for x in _NAMES):
        return path
    found = sorted(x for x in path.iterdir() if x.suffix in _AUTHORS_SUFFIXES and x.is_file())
    if len(found) == 1:
        return found[0]
    hint = f"; pass the path of one of {', '.join(x.name for x in found)}" if found else ""
    raise FileNotFoundError(f"{path} holds none of {', '.join(_NAMES)}{hint}")


def find_config(path: Path) -> tuple[dict[str, Any], Path]:
    """The JSON object that configures a checkpoint, and the file it is from.

    It is config.json in the folder; for a file it is in the metadata of a safetensors file that
    this project wrote, else config.json beside the file or, as the authors have it, one folder up.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path} (only local paths are read)")
    if path.is_dir():
        file = path / CONFIG_FILE
        return read_json_object(file), file
    if (text := _metadata(path).get(CONFIG_KEY)) is not None:
        return read_json_object(path, text), path
    for folder in (path.parent, path.absolute().parent.parent):
        if (folder / CONFIG_FILE).is_file():
            return read_json_object(folder / CONFIG_FILE), folder / CONFIG_FILE
    raise FileNotFoundError(
        f"there is no {CONFIG_FILE} beside {path}: pass config=, a configuration or the path of one"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    folder = index.parent
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is not a JSON index with a weight_map")
    files = sorted(set(map(str, weight_map.values())))
    if outside := [file for file in files if Path(file).name != file or "\\" in file]:
        raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}")
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder} lacks the shards {', '.join(absent)}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        shard = _read_file(folder / file)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{folder / file} repeats tensors of another shard: {_some(twice)}")
        tensors |= shard
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise ValueError(f"{index} lists tensors that no shard holds: {_some(absent)}")
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(_TORCH_STARTS) and start[8:] != b"{":
        return {
            key: Tensor(key, x.shape, x.dtype, functools.partial(_copy_and_release, x))
            for key, x in read_torch_tensors(path).items()
        }
    if start[8:] == b"{":
        return _read_safetensors(path)
    raise ValueError(
        f"{path} is not a checkpoint: neither safetensors nor a file of torch.save"
        + (" (it is empty)" if not start else "")
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        safe_open(path, "np")  # checks that the header is valid and the file has its size
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if (dtype := _DTYPES.get(entry["dtype"])) is None:
            raise ValueError(f"{path}: {key} is of type {entry['dtype']}, which is not read")
        shape, start = tuple(entry["shape"]), 8 + header_size + entry["data_offsets"][0]
        read = functools.partial(_read_array, path, start, shape, dtype)
        tensors[key] = Tensor(key, shape, dtype, read)
    return tensors


def _read_array(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # Not through a memory map: its pages would count as the process's memory beside the copy.
    count = math.prod(shape) * dtype.itemsize
    return np.fromfile(path, np.uint8, count, offset=start).view(dtype).reshape(shape)


def _copy_and_release(view: np.ndarray) -> np.ndarray:
    """A copy of a view of a mapped file, whose pages are given back.

    JAX may use an array's memory as it is, and parameters must not change with the file.
    """
    copy = np.array(view, order="C")
    base: Any = view
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base if isinstance(base, np.ndarray) else None
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):  # not everywhere
        base.madvise(mmap.MADV_DONTNEED)
    return copy


def _metadata(path: Path) -> Mapping[str, str]:
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except SafetensorError:  # another kind of file
        return {}


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
