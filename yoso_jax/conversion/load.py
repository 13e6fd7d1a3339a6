"""Loads models: finds the configuration and the class, and brings a file's tensors to the model's.

`make_plan` reads names, shapes and the configuration, and accounts for every key; `Plan.load` reads
the values.
"""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from yoso_jax.config import EncoderConfig, YosoConfig, read_json_object
from yoso_jax.conversion import authors
from yoso_jax.conversion.files import find_config, is_orbax_folder, locate, read_tensors
from yoso_jax.conversion.names import HF, LRA
from yoso_jax.conversion.orbax_files import read_params
from yoso_jax.conversion.plan import Entry, Plan, heads, left_out, match
from yoso_jax.conversion.positions import PositionExtension, check_extension, fit_positions
from yoso_jax.conversion.tensors import Tensor

_BUFFERS = r"embeddings\.(position_ids|token_type_ids)"
_NO_COUNTERPART = "no counterpart in this architecture"
_WORDS = "embeddings.word_embeddings.weight"
_BIAS = "cls.predictions.bias"
_DECODER_WEIGHT = "cls.predictions.decoder.weight"
_DECODER_BIAS = "cls.predictions.decoder.bias"
# The first that a file has names its architecture; fine-tuned files keep the head they began with.
_ARCHITECTURES = {
    r"seq_classifer\..*": "LRAClassifier",
    r"qa_outputs\..*": "YosoForQuestionAnswering",
    r"pre_classifier\..*": "YosoForMultipleChoice",
    r"classifier\.dense\..*": "YosoForSequenceClassification",
    r"classifier\.weight": "YosoForTokenClassification",
    r"cls\..*": "YosoForMaskedLM",
    r".*": "YosoModel",
}

# A configuration, or the content of a JSON file it is to be made from, and that file.
_Config = EncoderConfig | tuple[Mapping[str, Any], Path]


def load[M](
    model_classes: Sequence[type[M]],
    path: str | os.PathLike[str],
    *,
    config: EncoderConfig | str | os.PathLike[str] | None,
    position_extension: PositionExtension | None,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs | None,
    **overrides: Any,
) -> M:
    """See `PretrainedModel.from_pretrained`; of several classes the one the file names is built."""
    plan = make_plan(model_classes, path, config, position_extension, **overrides)
    plan.check()
    if plan.notes:
        warnings.warn(f"{path}: {'; '.join(plan.notes)}", stacklevel=3)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    return plan.load(dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def make_plan(
    model_classes: Sequence[Any],
    path: str | os.PathLike[str],
    config: EncoderConfig | str | os.PathLike[str] | None = None,
    position_extension: PositionExtension | None = None,
    **overrides: Any,
) -> Plan:
    """Finds out what each tensor of a checkpoint becomes; reads no more than comparing needs.

    Args:
        model_classes: the class of the model; of several, the one that `architectures` of the
            configuration or, without that, the keys name.
        path: as `read_tensors`, or an Orbax directory of this project.
        config: a configuration, the path of one, or None to find it, see `find_config`.
        position_extension: how to make more positions than the file has, if `overrides` sets a
            larger `max_position_embeddings`.
        **overrides: fields of the configuration to set to other values than the file's.

    Raises:
        FileNotFoundError: there is no checkpoint or configuration.
        ValueError: either is damaged, or the model cannot be of `model_classes`.
        OSError: a file cannot be read.
    """
    check_extension(position_extension)
    path, notes, entries = Path(path), list[str](), list[Entry]()
    values = _read_config(path, config)
    path = locate(path)
    tensors = _rename(_read(path, values), entries, notes)
    if "embeddings.dense.weight" in tensors:
        tensors = _unfold(tensors, entries, notes)
    model_class = _choose(model_classes, values, tensors, path)
    base = _make_config(model_class, values, tensors, path, overrides)
    tensors = authors.spread_shared(tensors, base.num_hidden_layers)
    if "cls" in heads(tensors) and model_class.__name__ == "YosoForMaskedLM":
        base, tensors = _resolve_decoder(base, tensors, entries, notes)
    wanted = overrides.get("max_position_embeddings", base.max_position_embeddings)
    tensors = fit_positions(base, tensors, wanted, position_extension, notes)
    fitted = base.replace(max_position_embeddings=wanted)
    return match(path, model_class, fitted, tensors, entries, notes)


def _read_config(path: Path, config: EncoderConfig | str | os.PathLike[str] | None) -> _Config:
    """A configuration, or the content of the file it is to be made from."""
    if isinstance(config, EncoderConfig):
        return config
    if config is None:
        return find_config(path)
    return read_json_object(config), Path(config)


def _read(path: Path, config: _Config) -> dict[str, Tensor]:
    if not is_orbax_folder(path):
        return read_tensors(path)
    model_type = (
        config.model_type if isinstance(config, EncoderConfig) else config[0].get("model_type")
    )
    return read_params(path, LRA if model_type == "yoso_lra" else HF)


def _rename(
    tensors: Mapping[str, Tensor], entries: list[Entry], notes: list[str]
) -> dict[str, Tensor]:
    """Names tensors as the files this project writes, without the encoder's prefix."""
    tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    if authors.is_lra(tensors):
        names = {key: authors.lra_name(key) for key in tensors}
    elif authors.is_masked_lm(tensors):
        names = {key: authors.hf_name(key, tensor.shape) for key, tensor in tensors.items()}
    else:
        names = {key: _today(key) for key in tensors}
    result: dict[str, Tensor] = {}
    unmatched = []
    for key, name in names.items():
        if name is None:
            unmatched.append(key)
            entries.append(left_out(tensors[key], _NO_COUNTERPART))
        elif re.fullmatch(_BUFFERS, name):
            entries.append(left_out(tensors[key], "a buffer, not a parameter"))
        elif name in result:
            raise ValueError(f"{result[name].source} and {tensors[key].source} are both {name}")
        else:
            result[name] = tensors[key]
    if unmatched:
        notes.append(f"{_NO_COUNTERPART}: {', '.join(sorted(unmatched))}")
    return result


def _today(key: str) -> str:
    """A Hugging Face name without prefix, and with today's names in a LayerNorm."""
    key = re.sub(r"\bLayerNorm\.gamma$", "LayerNorm.weight", key.removeprefix(HF.prefix))
    return re.sub(r"\bLayerNorm\.beta$", "LayerNorm.bias", key)


def _choose(
    model_classes: Sequence[Any],
    config: _Config,
    tensors: Mapping[str, Tensor],
    path: Path,
) -> Any:
    is_lra = authors.is_lra(tensors)
    by_name = {cls.__name__: cls for cls in model_classes if (cls.layout is LRA) == is_lra}
    if not by_name:
        kind = "a Long Range Arena classifier" if is_lra else "no Long Range Arena classifier"
        raise ValueError(f"{path} holds {kind}; {model_classes[0].__name__} cannot be loaded")
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    named = config.architectures if isinstance(config, YosoConfig) else _architectures(config)
    name = named[0] if named else _infer(tensors)
    if name not in by_name:
        raise ValueError(
            f"{path}: the architecture must be one of {', '.join(by_name)}, got {name!r:.100}"
        )
    return by_name[name]


def _architectures(config: Any) -> Sequence[Any]:
    names = config[0].get("architectures") if isinstance(config, tuple) else None
    return names if isinstance(names, list) else ()


def _infer(keys: Iterable[str]) -> str:
    return next(
        name
        for pattern, name in _ARCHITECTURES.items()
        if any(re.fullmatch(pattern, key) for key in keys)
    )


def _make_config(
    model_class: Any,
    config: _Config,
    tensors: Mapping[str, Tensor],
    path: Path,
    overrides: Mapping[str, Any],
) -> Any:
    """The configuration with the file's number of positions, however many are wanted."""
    others = {key: x for key, x in overrides.items() if key != "max_position_embeddings"}
    kind = model_class.config_class
    if isinstance(config, EncoderConfig):
        if not isinstance(config, kind):
            raise ValueError(
                f"config must be of {kind.__name__}, got one of {type(config).__name__}"
            )
        result = config.replace(**others)
    else:
        values, origin = config
        try:
            if authors.is_config(values):
                values = authors.config_fields(values, path.stem, tensors)
            result = kind.from_dict(values, **others)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
    # Names and shapes of a model that the file cannot hold may be too many to be compared.
    largest = sum(tensor.size for tensor in tensors.values())
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
        if getattr(result, name) > largest:
            raise ValueError(
                f"{path} has {largest} parameters, too few for {name}={getattr(result, name)}"
            )
    return result


def _unfold(
    tensors: Mapping[str, Tensor], entries: list[Entry], notes: list[str]
) -> dict[str, Tensor]:
    unfolded, reason = authors.unfold_embeddings(tensors)
    notes.append("embeddings.dense is multiplied into the embeddings")
    head = []
    for key in sorted(tensors.keys() - unfolded.keys()):
        if key.startswith("embeddings.dense."):
            entries.append(left_out(tensors[key], "multiplied into the embeddings", "loaded"))
        else:
            head.append(key)
            entries.append(left_out(tensors[key], reason))
    if head:
        notes.append(f"left out, since {reason}: {', '.join(head)}")
    return unfolded


def _resolve_decoder(
    config: Any, tensors: Mapping[str, Tensor], entries: list[Entry], notes: list[str]
) -> tuple[Any, dict[str, Tensor]]:
    """Chooses between a file's decoder and the word embeddings it is to be tied to."""
    tensors = dict(tensors)
    if not config.tie_word_embeddings:
        if dead := tensors.pop(_BIAS, None):
            entries.append(left_out(dead, f"dead: {_DECODER_BIAS} is used"))
        return config, tensors
    weight, bias = tensors.pop(_DECODER_WEIGHT, None), tensors.pop(_DECODER_BIAS, None)
    if bias is not None:
        other = tensors.get(_BIAS)
        if other is None:
            tensors[_BIAS] = bias
        elif bias.equals(other):
            entries.append(left_out(bias, f"equal to {other.source}", "tied"))
        else:
            notes.append(f"{_DECODER_BIAS} differs from {_BIAS} and is used in its place")
            entries.append(left_out(other, f"dead: {bias.source} differs and is used"))
            tensors[_BIAS] = bias
    if weight is None:
        return config, tensors
    if _WORDS in tensors and weight.equals(tensors[_WORDS]):
        entries.append(left_out(weight, f"equal to {tensors[_WORDS].source}", "tied"))
        return config, tensors
    notes.append(f"{_DECODER_WEIGHT} differs from the word embeddings, so it is not tied to them")
    tensors[_DECODER_WEIGHT] = weight
    if _BIAS in tensors:
        tensors[_DECODER_BIAS] = tensors.pop(_BIAS)
    return config.replace(tie_word_embeddings=False), tensors
