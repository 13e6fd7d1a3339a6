"""Where a run's state and batches are: a mesh of all devices, an axis for each way to divide.

Batches are divided over all devices. Parameters and what the optimiser keeps of them are divided
over the axis `fsdp`, along the longest of their axes that it divides; XLA gathers them where they
are used. Attention runs on the rows of each device apart, see `yoso_jax.batch_sharding`. With one
device all of this comes to nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from yoso_jax.batch_sharding import BATCH_AXES
from yoso_jax.errors import ConfigError
from yoso_jax.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays are divided over devices."""

    mesh: Mesh

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """Divided along the first axis."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def of(self, state: PyTree) -> PyTree:
        """The shardings of a state's leaves, arrays or shapes."""
        size = self.mesh.shape["fsdp"]

        def sharding(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
            axes = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
            longest = max(axes, key=lambda axis: leaf.shape[axis], default=None)
            if size == 1 or longest is None or leaf.shape[longest] == 0:
                return self.replicated
            names = [None] * longest + ["fsdp"]
            return NamedSharding(self.mesh, PartitionSpec(*names))

        return jax.tree.map(sharding, state)

    def abstract(self, state: PyTree) -> PyTree:
        """Shapes, types and shardings of a state's leaves, for restoring."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            self.of(state),
        )

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch that every process has whole, divided over the devices if they divide it."""
        return {
            name: jax.make_array_from_callback(
                array.shape,
                self.replicated if array.shape[0] % self.mesh.size else self.batch,
                array.__getitem__,
            )
            for name, array in batch.items()
        }


def with_ambient_mesh[**Arguments, Result](
    function: Callable[Arguments, Result],
) -> Callable[Arguments, Result]:
    """A function that finds the mesh of its arguments as the ambient one, to compile by `jax.jit`.

    It is only set while the function is traced: what runs beside it, as the collectives of
    `fetch`, may use other meshes.
    """

    @functools.wraps(function)
    def traced(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves((args, kwargs))]
        mesh = max(meshes, key=lambda mesh: mesh.size)  # arguments on no mesh have an empty one
        with jax.sharding.use_abstract_mesh(mesh):
            return function(*args, **kwargs)

    return traced


def fetch(tree: PyTree) -> PyTree:
    """Arrays as NumPy has them, whole on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def make_layout(fsdp: int = 1) -> Layout:
    """A layout over all devices of all processes.

    Args:
        fsdp: devices that each parameter is divided over.

    Raises:
        ConfigError: that does not divide the number of devices.
    """
    devices = jax.device_count()
    if devices % fsdp:
        raise ConfigError(f"fsdp must divide the number of devices ({devices}), got {fsdp}")
    shape = (devices // fsdp, fsdp)
    return Layout(jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2))


def make_train_layout(config: RunConfig) -> Layout:
    """The layout of a training run.

    Raises:
        ConfigError: the devices cannot share its batches, or the parts they are processed in.
    """
    layout, devices = make_layout(config.fsdp), jax.device_count()
    if (config.batch_size // config.accumulation_steps) % devices:
        raise ConfigError(
            f"batch_size / accumulation_steps must be a multiple of the number of devices "
            f"({devices}), got {config.batch_size} / {config.accumulation_steps}"
        )
    return layout
