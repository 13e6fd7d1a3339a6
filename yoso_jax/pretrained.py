"""Loads and saves models in Hugging Face's folder layout."""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from yoso_jax.config import CONFIG_FILE, YosoConfig
from yoso_jax.conversion import from_hf_state_dict, hf_shapes, to_hf_state_dict
from yoso_jax.torch_files import read_torch_tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"

_HEADS = ("cls", "classifier", "pre_classifier", "qa_outputs")
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
_WORDS = "embeddings.word_embeddings.weight"
_BIAS = "cls.predictions.bias"
_DECODER_WEIGHT = "cls.predictions.decoder.weight"
_DECODER_BIAS = "cls.predictions.decoder.bias"


def load[Model: nnx.Module](
    build: Callable[[YosoConfig, nnx.Rngs], Model],
    folder: str | os.PathLike[str],
    *,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
    **overrides: Any,
) -> Model:
    """See `PretrainedModel.from_pretrained`; `build` makes a model as it starts."""
    folder = Path(folder)
    config = YosoConfig.from_pretrained(folder, **overrides)
    tensors = {_canonical(key): value for key, value in _read_tensors(folder).items()}
    for buffer in _BUFFERS:
        tensors.pop(buffer, None)
    notes = []
    abstract = nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))
    if _heads(map(_canonical, hf_shapes(abstract))) == {"cls"}:
        config, tensors = _resolve_decoder(config, tensors, notes)
        abstract = nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))

    shapes = {_canonical(key): shape for key, shape in hf_shapes(abstract).items()}
    absent = _heads(shapes) - _heads(shapes.keys() & tensors.keys())
    unused = _heads(tensors.keys() - shapes.keys()) - (_heads(shapes) - absent)
    fresh = {key for key in shapes if _head(key) in absent}
    ignored = {key for key in tensors.keys() - shapes.keys() if _head(key) in unused}
    _refuse_mismatches(folder, shapes, fresh, tensors, ignored)
    if fresh:
        notes.append("absent from the file, initialised afresh: " + ", ".join(sorted(fresh)))
        initial = to_hf_state_dict(build(config, rngs))
        tensors |= {key: np.asarray(initial[key]) for key in fresh}
    if ignored:
        notes.append("in the file, not in this model: " + ", ".join(sorted(ignored)))
    if notes:
        warnings.warn(f"{folder}: {'; '.join(notes)}", stacklevel=3)

    named = {key: tensors[_canonical(key)] for key in hf_shapes(abstract)}
    return nnx.merge(nnx.graphdef(abstract), from_hf_state_dict(abstract, named, param_dtype))


def save(
    model: nnx.Module,
    config: YosoConfig,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str,
) -> None:
    """See `PretrainedModel.save_pretrained`."""
    folder, shard_bytes = Path(folder), _parse_size(max_shard_size)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder to save a model in")
    tensors = {
        # safetensors writes the buffer as it lies in memory, so views must be copied.
        key: np.ascontiguousarray(value)
        for key, value in to_hf_state_dict(model).items()
    }
    if _DECODER_BIAS in tensors:
        # Dead in an untied model, but transformers expects the key.
        tensors[_BIAS] = tensors[_DECODER_BIAS]
    extra = {key: value for key, value in config.extra.items() if key != "torch_dtype"}
    extra["dtype"] = next(iter(tensors.values())).dtype.name
    config = config.replace(architectures=(type(model).__name__,), extra=extra)

    is_new = not folder.exists()
    parent = folder.parent if is_new else folder
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.saving-", dir=parent) as scratch:
        staging = Path(scratch) / folder.name
        staging.mkdir()
        _write_tensors(staging, tensors, shard_bytes)
        config.save_pretrained(staging)
        for path in staging.iterdir():
            # safetensors makes files that only their owner may read.
            shutil.copymode(staging / CONFIG_FILE, path)
        if is_new:
            staging.rename(folder)
        else:
            _replace_files(staging, folder)


def _canonical(key: str) -> str:
    """The name without the encoder's prefix, and with today's LayerNorm names."""
    key = key.removeprefix("yoso.")
    return re.sub(
        r"\bLayerNorm\.(gamma|beta)$",
        lambda match: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]],
        key,
    )


def _head(key: str) -> str | None:
    head = key.split(".")[0]
    return head if head in _HEADS else None


def _heads(keys: Iterable[str]) -> set[str]:
    return {head for key in keys if (head := _head(key))}


def _resolve_decoder(
    config: YosoConfig, tensors: Mapping[str, np.ndarray], notes: list[str]
) -> tuple[YosoConfig, dict[str, np.ndarray]]:
    """Chooses between a file's decoder and the word embeddings it is to be tied to."""
    tensors = dict(tensors)
    if not config.tie_word_embeddings:
        tensors.pop(_BIAS, None)
        return config, tensors
    weight, bias = tensors.pop(_DECODER_WEIGHT, None), tensors.pop(_DECODER_BIAS, None)
    if bias is not None:
        if _BIAS in tensors and not np.array_equal(bias, tensors[_BIAS]):
            notes.append(f"{_DECODER_BIAS} differs from {_BIAS} and is used in its place")
        tensors[_BIAS] = bias
    if weight is None or np.array_equal(weight, tensors.get(_WORDS, weight)):
        return config, tensors
    notes.append(f"{_DECODER_WEIGHT} differs from the word embeddings, so it is not tied to them")
    tensors[_DECODER_WEIGHT] = weight
    if _BIAS in tensors:
        tensors[_DECODER_BIAS] = tensors.pop(_BIAS)
    return config.replace(tie_word_embeddings=False), tensors


def _refuse_mismatches(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    fresh: set[str],
    tensors: Mapping[str, np.ndarray],
    ignored: set[str],
) -> None:
    missing = sorted(shapes.keys() - tensors.keys() - fresh)
    unexpected = sorted(tensors.keys() - shapes.keys() - ignored)
    misshapen = [
        f"{key} {tensors[key].shape} instead of {shapes[key]}"
        for key in sorted(shapes.keys() & tensors.keys())
        if tensors[key].shape != shapes[key]
    ]
    not_floats = [
        f"{key} {tensors[key].dtype}"
        for key in sorted(shapes.keys() & tensors.keys())
        if not jnp.issubdtype(tensors[key].dtype, jnp.floating)
    ]
    problems = [
        f"{name}: {', '.join(keys)}"
        for name, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of a wrong shape", misshapen),
            ("not floating point", not_floats),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"the parameters in {folder} do not fit the model. " + "; ".join(problems))


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    names = (WEIGHTS_FILE, INDEX_FILE, TORCH_FILE, TORCH_INDEX_FILE)
    present = [name for name in names if (folder / name).exists()]
    if not present:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}")
    if present[0] in (WEIGHTS_FILE, TORCH_FILE):
        return _read_file(folder / present[0])
    index = folder / present[0]
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not a JSON index with a weight_map: {error!r}") from error
    files = sorted(set(map(str, weight_map.values())))
    if outside := [file for file in files if Path(file).name != file]:
        raise ValueError(f"{index} names files outside its folder: {', '.join(outside)}")
    if absent := [file for file in files if not (folder / file).exists()]:
        raise FileNotFoundError(f"{folder} lacks the shards {', '.join(absent)}")
    tensors = {key: value for file in files for key, value in _read_file(folder / file).items()}
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise ValueError(f"{index} lists tensors that no shard holds: {', '.join(absent)}")
    return tensors


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".bin":
        return read_torch_tensors(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


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
