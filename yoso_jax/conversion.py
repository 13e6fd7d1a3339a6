"""Names and layouts of Hugging Face parameters, in one table used to load, save and compare.

A parameter is found by its path in the model, e.g. `encoder.layers.0.attention.query.kernel`.
`_MODULES` names its module as Hugging Face does, `_LEAVES` its last part and the layout there.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import PyTree

_LAYER = r"encoder\.layers\.(\d+)\."
_MODULES: tuple[tuple[str, str], ...] = (
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
    (r"(classifier|classifier\.dense|classifier\.out_proj|pre_classifier|qa_outputs)", r"\1"),
)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """The last part of a Hugging Face key, and the layout there."""

    name: str
    to_hf: Callable[[Any], Any]
    from_hf: Callable[[Any], Any]


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
    """The Hugging Face tensors a parameter holds: one, or one a layer if it is stacked."""

    keys: tuple[str, ...]
    stacked: bool
    leaf: _Leaf


def to_hf_state_dict(params: PyTree) -> dict[str, Array]:
    """Names parameters, or their gradients, as Hugging Face does and lays them out so.

    Args:
        params: one of this project's Hugging Face architectures, its state, or a gradient of the
            same structure; looped or scanned layers.

    Returns:
        Tensors by Hugging Face key, of the parameters' dtypes.
    """
    tensors = {}
    for path, variable in _flatten(params).items():
        value, names = variable.get_value(), _names(path, variable.shape)
        for i, key in enumerate(names.keys):
            tensors[key] = names.leaf.to_hf(value[i] if names.stacked else value)
    return tensors


def from_hf_state_dict(
    params: PyTree, tensors: Mapping[str, np.ndarray], dtype: DTypeLike
) -> PyTree:
    """The inverse of `to_hf_state_dict`.

    Args:
        params: what the result is to be like; abstract values do.
        tensors: all of its tensors, of the right shapes, by Hugging Face key.
        dtype: of the result.

    Returns:
        The state to `nnx.update` or `nnx.merge` a model with.
    """
    variables: dict[tuple[Any, ...], nnx.Variable] = {}
    for path, variable in _flatten(params).items():
        names = _names(path, variable.shape)
        values = [names.leaf.from_hf(tensors[key]) for key in names.keys]
        value = jnp.asarray(np.stack(values) if names.stacked else values[0], dtype)
        variables[path] = variable.replace(value)
    return nnx.from_flat_state(variables)


def hf_shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of `to_hf_state_dict`; abstract values do."""
    state = nnx.state(params, nnx.Param)
    return {key: x.shape for key, x in jax.eval_shape(to_hf_state_dict, state).items()}


def _flatten(params: PyTree) -> dict[tuple[Any, ...], nnx.Variable]:
    state = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
    return dict(nnx.to_flat_state(state))


def _names(path: tuple[Any, ...], shape: tuple[int, ...]) -> _Names:
    leaf = _LEAVES[str(path[-1])]
    module = ".".join(map(str, path[:-1]))
    before, layers, after = module.partition("encoder.layers.")
    stacked = bool(layers) and not after[0].isdecimal()
    modules = [f"{before}{layers}{i}.{after}" for i in range(shape[0])] if stacked else [module]
    keys = tuple(f"{_hf_module(name)}.{leaf.name}" for name in modules)
    return _Names(keys, stacked, leaf)


def _hf_module(name: str) -> str:
    prefix = "yoso." if name.startswith("yoso.") else ""
    for pattern, template in _MODULES:
        if match := re.fullmatch(pattern, name.removeprefix(prefix)):
            return prefix + match.expand(template)
    raise KeyError(f"no Hugging Face name for {name}")
