"""Orbax directories: config.json, and the tree of parameters in `params`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from yoso_jax.conversion.files import PARAMS_FOLDER
from yoso_jax.conversion.names import Layout, to_state_dict
from yoso_jax.conversion.tensors import Tensor


def read_params(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """The parameters by the keys of `layout`'s files; they are read whole.

    Raises:
        ValueError: Orbax cannot read the directory.
    """
    from orbax.checkpoint import v1 as ocp  # takes long to import

    params = folder / PARAMS_FOLDER
    try:
        tree: Any = ocp.metadata(str(params)).metadata
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)
        arrays: Any = ocp.load(str(params), abstract)
        flat = dict(nnx.traversals.flatten_mapping(arrays))
        state = nnx.from_flat_state({path: nnx.Param(x) for path, x in flat.items()})
        return {
            key: Tensor.of(key, np.asarray(x)) for key, x in to_state_dict(state, layout).items()
        }
    except Exception as error:  # a damaged directory surfaces as almost any type
        raise ValueError(f"{params} cannot be read by Orbax: {error}") from error
    return {key: Tensor.of(key, np.asarray(x)) for key, x in tensors.items()}


def write_params(folder: Path, model: nnx.Module) -> None:
    """Writes the parameters as a tree of plain dicts, with this project's names and layouts."""
    from orbax.checkpoint import v1 as ocp

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    ocp.save(str(folder / PARAMS_FOLDER), _with_string_keys(params))


def _with_string_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(key): _with_string_keys(value) for key, value in tree.items()}
