"""Names and layouts of parameters in files: one table for each family of models.

A parameter is found by its path in the model, e.g. `encoder.layers.0.attention.query.kernel`.
A `Layout` names its module as the files do, `_LEAVES` its last part and the layout there. The same
tables serve to load, save and compare.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from yoso_jax.conversion.tensors import Tensor

_LAYER = r"encoder\.layers\.(\d+)\."


@dataclasses.dataclass(frozen=True)
class Layout:
    """How files name the modules of a family of models: patterns of ours, templates of theirs."""

    modules: tuple[tuple[str, str], ...]
    prefix: str = ""
    """Stands before the encoder's names in files of models with a head, as it does here."""


HF = Layout(
    (
        (_LAYER + r"attention\.(query|key|value|conv)", r"encoder.layer.\1.attention.self.\2"),
        (_LAYER + r"attention_output", r"encoder.layer.\1.attention.output.dense"),
        (_LAYER + r"attention_norm", r"encoder.layer.\1.attention.output.LayerNorm"),
        (_LAYER + r"intermediate", r"encoder.layer.\1.intermediate.dense"),
        (_LAYER + r"output", r"encoder.layer.\1.output.dense"),
        (_LAYER + r"output_norm", r"encoder.layer.\1.output.LayerNorm"),
        (r"embeddings\.norm", "embeddings.LayerNorm"),
        (r"embeddings\.(\w+_embeddings)", r"embeddings.\1"),
        (r"head", "cls.predictions"),
        (r"head\.dense", "cls.predictions.transform.dense"),
        (r"head\.norm", "cls.predictions.transform.LayerNorm"),
        (r"head\.decoder", "cls.predictions.decoder"),
        (r"(classifier|classifier\.dense|classifier\.out_proj)", r"\1"),
        (r"(pre_classifier|qa_outputs)", r"\1"),
    ),
    prefix="yoso.",
)
"""Hugging Face's `YosoModel` and its heads."""

LRA = Layout(
    (
        (_LAYER + r"attention\.(q|k|v)\w+", r"model.encoders.\1.mha.W_\2"),
        (_LAYER + r"attention\.conv", r"model.encoders.\1.mha.attn.conv"),
        (_LAYER + r"attention_output", r"model.encoders.\1.mha.ff"),
        (_LAYER + r"attention_norm", r"model.encoders.\1.norm1"),
        (_LAYER + r"intermediate", r"model.encoders.\1.mlpblock.0"),
        (_LAYER + r"output", r"model.encoders.\1.mlpblock.3"),
        (_LAYER + r"output_norm", r"model.encoders.\1.norm2"),
        (r"(\w+_embeddings)", r"model.embeddings.\1"),
        (r"norm", "model.norm"),
        (r"dense", "seq_classifer.mlpblock.0"),
        (r"out_proj", "seq_classifer.mlpblock.2"),
    )
)
"""The YOSO authors' Long Range Arena classifiers, in their spelling."""


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """The last part of a key in a file, and the layout there."""

    name: str
    to_file: Callable[[Any], Any]
    from_file: Callable[[Any], Any]


def _same(x: Any) -> Any:
    return x


def _transpose(x: Any) -> Any:
    return x.T


_LEAVES: Mapping[str, _Leaf] = {
    "kernel": _Leaf("weight", _transpose, _transpose),
    "embedding": _Leaf("weight", _same, _same),
    "scale": _Leaf("weight", _same, _same),
    "bias": _Leaf("bias", _same, _same),
    # [window, heads] here, a [heads, 1, window, 1] convolution there.
    "filters": _Leaf("weight", lambda x: x.T[:, None, :, None], lambda x: x[:, 0, :, 0].T),
}


class _Names(NamedTuple):
    """The tensors of a file that a parameter holds: one, or one a layer if it is stacked."""

    keys: tuple[str, ...]
    stacked: bool
    leaf: _Leaf


def to_state_dict(params: PyTree, layout: Layout = HF) -> dict[str, Any]:
    """Names parameters, or their gradients, as files do and lays them out so.

    Args:
        params: a model of the layout's family, its state, or a gradient of the same structure;
            looped or scanned layers.
        layout: the family's names.

    Returns:
        Arrays by key, of the parameters' types.
    """
    tensors = {}
    for path, variable in _flatten(params).items():
        value, names = variable.get_value(), _names(path, variable.shape, layout)
        for i, key in enumerate(names.keys):
            tensors[key] = names.leaf.to_file(value[i] if names.stacked else value)
    return tensors


def from_state_dict(
    params: PyTree, tensors: Mapping[str, Tensor], dtype: DTypeLike, layout: Layout = HF
) -> PyTree:
    """The inverse of `to_state_dict`.

    Args:
        params: what the result is to be like; abstract values do.
        tensors: all of its tensors, of the right shapes, by key; read here, one at a time.
        dtype: of the result.
        layout: the family's names.

    Returns:
        The state to `nnx.update` or `nnx.merge` a model with.
    """
    variables: dict[tuple[Any, ...], nnx.Variable] = {}
    # The largest first: what it needs beside the result is then not on top of all the others.
    flat = sorted(_flatten(params).items(), key=lambda item: -np.prod(item[1].shape, dtype=float))
    for path, variable in flat:
        names = _names(path, variable.shape, layout)
        values = [names.leaf.from_file(tensors[key].read()) for key in names.keys]
        value = jnp.asarray(np.stack(values) if names.stacked else values[0], dtype)
        variables[path] = variable.replace(value)
    return nnx.from_flat_state(variables)


def file_shapes(params: PyTree, layout: Layout = HF) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of `to_state_dict`; abstract values do."""
    state = nnx.state(params, nnx.Param)
    shapes = jax.eval_shape(lambda state: to_state_dict(state, layout), state)
    return {key: x.shape for key, x in shapes.items()}


def _flatten(params: PyTree) -> dict[tuple[Any, ...], nnx.Variable]:
    state = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
    return dict(nnx.to_flat_state(state))


def _names(path: tuple[Any, ...], shape: tuple[int, ...], layout: Layout) -> _Names:
    leaf = _LEAVES[str(path[-1])]
    module = ".".join(map(str, path[:-1]))
    before, layers, after = module.partition("encoder.layers.")
    stacked = bool(layers) and not after[0].isdecimal()
    modules = [f"{before}{layers}{i}.{after}" for i in range(shape[0])] if stacked else [module]
    keys = tuple(f"{_file_module(name, layout)}.{leaf.name}" for name in modules)
    return _Names(keys, stacked, leaf)


def _file_module(name: str, layout: Layout) -> str:
    prefix = layout.prefix if name.startswith(layout.prefix) else ""
    for pattern, template in layout.modules:
        if match := re.fullmatch(pattern, name.removeprefix(prefix)):
            return prefix + match.expand(template)
    raise KeyError(f"no name for {name}")
