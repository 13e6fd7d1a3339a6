"""Attention on several devices, each with the rows of the batch that it has.

XLA divides what it compiles, but not the kernels of Pallas: before one it gathers the whole batch
on every device. Rows of a batch attend to themselves alone, so `jax.shard_map` may run attention on
the rows of each device, as long as what is random was drawn for all rows before.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH_AXES = ("data", "fsdp")
"""The axes of a mesh that models divide batches over."""


def ambient_batch_axes(batch: int) -> tuple[str, ...]:
    """Those of `BATCH_AXES` to divide a batch over.

    They are the axes of type Auto of the ambient mesh, which `jax.set_mesh` or the trainer set.

    Args:
        batch: rows, >= 0.

    Returns:
        The axes, or none if they are of one device or do not divide the batch, or if the caller is
        inside a `jax.shard_map` already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in mesh.axis_types:
        return ()
    axes = tuple(name for name in BATCH_AXES if name in _auto_axes(mesh))
    devices = math.prod(mesh.shape[name] for name in axes)
    return axes if devices > 1 and batch % devices == 0 else ()


def map_batch[Results](
    function: Callable[..., Results], axes: Sequence[str], *operands: Any
) -> Results:
    """`function(*operands)`, computed on the rows of each device apart.

    Args:
        function: of pytrees of arrays; rows of its results depend on the same rows of the operands
            only.
        axes: of the ambient mesh, of type Auto; without any, the function is only called.
        operands: each with a number of rows for each element of the batch, the first with one.

    Raises:
        ValueError: the ambient mesh has no such axes, or they do not divide the batch.
    """
    if not axes:
        return function(*operands)
    mesh = jax.sharding.get_abstract_mesh()
    batch = jax.tree.leaves(operands)[0].shape[0]
    if not set(axes) <= _auto_axes(mesh) or batch % math.prod(mesh.shape[name] for name in axes):
        raise ValueError(
            f"batch_axes must name axes of type Auto of the ambient mesh (see jax.set_mesh) that "
            f"divide the batch of {batch}, got {tuple(axes)} with {mesh}."
        )
    spec = PartitionSpec(tuple(axes))
    return jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names=set(axes))(*operands)


def _auto_axes(mesh: jax.sharding.AbstractMesh) -> set[str]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in types if kind == AxisType.Auto}
