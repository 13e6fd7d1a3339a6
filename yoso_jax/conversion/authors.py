"""The YOSO authors' checkpoints, renamed to Hugging Face's names; and their configurations.

Their masked LM (RoBERTa and BERT) is the Hugging Face architecture under other names. Their Long
Range Arena classifiers are an architecture of their own (`yoso_jax.lra`), whose names this project
keeps; here their older names and shared blocks are brought to the published ones.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from yoso_jax.conversion.tensors import Tensor

SHARED = "*"
"""Stands for the number of the layer in the names of a block that all layers share."""

_LAYER_NORM_EPS = 1e-5  # PyTorch's default, which their models use
_BLOCK = r"model\.(?:backbone\.)*(?:encoders\.(\d+)|transformer_(\d+)|encoder|transformer)\."
_BLOCK_MODULES = (
    (r"mha\.W_q", "attention.self.query"),
    (r"mha\.W_k", "attention.self.key"),
    (r"mha\.W_v", "attention.self.value"),
    (r"mha\.attn\.conv", "attention.self.conv"),
    (r"mha\.ff", "attention.output.dense"),
    (r"norm1", "attention.output.LayerNorm"),
    (r"ff\.0|ff1", "intermediate.dense"),
    (r"ff\.2|ff2", "output.dense"),
    (r"norm2", "output.LayerNorm"),
)
_MODULES = (
    (r"model\.embeddings\.(word|position|token_type)_embeddings", r"embeddings.\1_embeddings"),
    (r"model\.embeddings\.norm", "embeddings.LayerNorm"),
    (r"model\.embeddings\.dense", "embeddings.dense"),
    (r"mlm\.dense", "cls.predictions.transform.dense"),
    (r"mlm\.norm", "cls.predictions.transform.LayerNorm"),
    (r"mlm\.mlm_class", "cls.predictions.decoder"),
    (r"qahead", "qa_outputs"),
)
_WITHOUT_COUNTERPART = r"(model\.pooler|sen_classifer|sen_class)\..*"
_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_head": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "hash_code_len": "hash_code_len",
}
_OPTIONAL_FIELDS = {
    "dropout_prob": "hidden_dropout_prob",
    "num_hash": "num_hash",
    "conv_window": "conv_window",
    "use_fast_hash": "use_fast_hash",
}


def is_masked_lm(keys: Iterable[str]) -> bool:
    """Whether a checkpoint has the names of the authors' RoBERTa or BERT."""
    return any(".mha.W_q." in key for key in keys) and not is_lra(keys)


def is_lra(keys: Iterable[str]) -> bool:
    """Whether a checkpoint has the names of the authors' LRA classifiers."""
    return any(key.startswith("seq_classifer.") or ".mlpblock." in key for key in keys)


def hf_name(key: str, shape: tuple[int, ...]) -> str | None:
    """Hugging Face's name of a tensor of the authors' masked LM.

    A block that all layers share is layer `SHARED`. None: the architecture has no counterpart.
    What is unknown keeps its name.
    """
    is_wikihop_head = key.startswith("qahead.") and shape[0] != 2
    if is_wikihop_head or re.fullmatch(_WITHOUT_COUNTERPART, key):
        return None
    module, _, leaf = key.rpartition(".")
    prefix, modules = "", _MODULES
    if block := re.match(_BLOCK, module):
        prefix, modules = f"encoder.layer.{_layer(block)}.", _BLOCK_MODULES
        module = module[block.end() :]
    for pattern, template in modules:
        if match := re.fullmatch(pattern, module):
            return f"{prefix}{match.expand(template)}.{leaf}"
    return key


def lra_name(key: str) -> str:
    """The published name of a tensor of an LRA classifier; a shared block is layer `SHARED`."""
    return re.sub("^" + _BLOCK, lambda block: f"model.encoders.{_layer(block)}.", key)


def spread_shared(tensors: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Copies the block that all layers share to each of them."""
    result = {}
    for key, tensor in tensors.items():
        if f".{SHARED}." in key:
            copied = tensor.apply(f"copied to {num_layers} layers", lambda x: x)
            for i in range(num_layers):
                result[key.replace(SHARED, str(i), 1)] = copied
        else:
            result[key] = tensor
    return result


def unfold_embeddings(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Brings factorised embeddings, narrower than the model, to the Hugging Face architecture.

    `embeddings.dense` is linear, so that it is multiplied into the three tables. The masked LM head
    then normalises over the narrow width E: repeating its features hidden/E times leaves mean and
    variance as they are, and the decoder reads the first copy only. Both are exact.

    Args:
        tensors: by Hugging Face's name, with `embeddings.dense.*` among them.

    Returns:
        The tensors; and the reason why they lack those of the head, or "".
    """
    tensors = dict(tensors)
    weight, bias = tensors.pop("embeddings.dense.weight"), tensors.pop("embeddings.dense.bias")
    hidden, narrow = weight.shape

    def project(x: np.ndarray) -> np.ndarray:
        return (x.astype(np.float64) @ weight.read().astype(np.float64).T).astype(x.dtype)

    def project_and_add(x: np.ndarray) -> np.ndarray:
        return project(x) + bias.read()

    for name in ("word", "position", "token_type"):
        key = f"embeddings.{name}_embeddings.weight"
        # Every token has one type: its table can carry the bias.
        function = project_and_add if name == "token_type" else project
        tensors[key] = tensors[key].apply(
            "times embeddings.dense", function, (tensors[key].shape[0], hidden)
        )
    head = [key for key in tensors if key.startswith("cls.")]
    if hidden % narrow:
        reason = f"a head of width {narrow} in a model of width {hidden} has no counterpart"
        return {key: tensor for key, tensor in tensors.items() if key not in head}, reason

    times = hidden // narrow

    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, hidden - narrow)))

    def repeat(x: np.ndarray) -> np.ndarray:
        return np.tile(x, (times,) + (1,) * (x.ndim - 1))

    for key in head:
        tensor = tensors[key]
        if key == "cls.predictions.decoder.weight":
            shape = (tensor.shape[0], hidden)
            tensors[key] = tensor.apply("padded with zeros", pad, shape)
        elif key.startswith("cls.predictions.transform."):
            shape = (tensor.shape[0] * times, *tensor.shape[1:])
            tensors[key] = tensor.apply(f"repeated {times} times", repeat, shape)
    return tensors, ""


def is_config(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object is one of the authors' configurations."""
    return "model" in values or any(
        isinstance(value, Mapping) and "model" in value for value in values.values()
    )


def config_fields(
    values: Mapping[str, Any], file_stem: str, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The fields of a `YosoConfig` or `LRAConfig` from one of the authors' configurations.

    Args:
        values: `{"model": {...}}`, or one such object for each LRA task.
        file_stem: the checkpoint's name, which holds that of the task if there are several.
        tensors: of the checkpoint, which says what the configuration does not.

    Raises:
        ValueError: an entry is missing or not YOSO's; the message names it and what is accepted.
    """
    if "model" not in values:
        values = values[_choose_task(values, file_stem)]
    model = values["model"]
    if not isinstance(model, Mapping):
        raise ValueError(f"model must be a JSON object, got {type(model).__name__}")
    if absent := sorted(_FIELDS.keys() - model.keys()):
        raise ValueError(f"the authors' configuration lacks {', '.join(absent)}")
    attention = model.get("attn_type")
    if attention not in ("yoso-v1-e", "yoso-v1", "yoso-v2"):
        raise ValueError(
            f"attn_type must be 'yoso-v1-e', 'yoso-v1' or 'yoso-v2', got {attention!r:.100}"
        )
    match model:
        case {"num_head": int(heads), "head_dim": int(head_dim), "dim": int(dim)}:
            if heads * head_dim != dim:
                raise ValueError(f"num_head * head_dim must be dim={dim}, got {heads} * {head_dim}")
    names = _FIELDS | {name: x for name, x in _OPTIONAL_FIELDS.items() if name in model}
    fields = {ours: model[theirs] for theirs, ours in names.items()} | {
        "layer_norm_eps": _LAYER_NORM_EPS,
        "use_expectation": attention.endswith("-e"),
        "lsh_backward": not model.get("n2_backward", False),
    }
    if is_lra(tensors):
        head = tensors.get("seq_classifer.mlpblock.0.weight")
        return fields | {
            "num_labels": model.get("num_classes"),
            "pooling": str(model.get("pooling_mode")).lower(),
            "max_position_embeddings": _rounded_up(model["max_seq_len"], tensors),
            "dual": head is not None and head.shape[1:] == (4 * tensors["model.norm.weight"].size,),
        }
    fields["type_vocab_size"] = model.get("num_sen_type", 1)
    table = tensors.get("embeddings.position_embeddings.weight")
    if table is not None and table.shape[:1] == (model["max_seq_len"],):
        # BERT, whose positions start at 0, pads with 0; its other tokens are not known.
        fields |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if "dropout_prob" in model:
        fields["attention_probs_dropout_prob"] = model["dropout_prob"]
    return fields


def _rounded_up(max_seq_len: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The number of positions: their LRA script rounds it up to a power of two, or did once."""
    table = tensors.get("model.embeddings.position_embeddings.weight")
    rows = table.shape[0] if table is not None and table.shape else None
    is_rounded = isinstance(max_seq_len, int) and rows == 1 << (max_seq_len - 1).bit_length()
    return rows if is_rounded else max_seq_len


def _layer(block: re.Match[str]) -> str:
    return block[1] or block[2] or SHARED


def _choose_task(values: Mapping[str, Any], file_stem: str) -> str:
    tasks = [name for name, x in values.items() if isinstance(x, Mapping) and "model" in x]
    named = [name for name in tasks if name in file_stem] if len(tasks) > 1 else tasks
    if len(named) != 1:
        raise ValueError(
            f"the configuration has the tasks {', '.join(tasks)}: the checkpoint's name must hold "
            "one of them, or pass config="
        )
    return named[0]
