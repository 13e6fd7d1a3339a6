"""Which axes batches are divided over; what comes of it is tested with the trainer's layouts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from yoso_jax import yoso_attention
from yoso_jax.batch_sharding import ambient_batch_axes


def mesh(**axes: tuple[int, AxisType]) -> AbstractMesh:
    sizes, types = zip(*axes.values(), strict=True)
    return AbstractMesh(sizes, tuple(axes), axis_types=types)


AUTO = AxisType.Auto
TRAINER = mesh(data=(2, AUTO), fsdp=(2, AUTO))


@pytest.mark.parametrize(
    ("ambient", "batch", "axes"),
    [
        (TRAINER, 8, ("data", "fsdp")),
        (TRAINER, 6, ()),
        (mesh(data=(1, AUTO), fsdp=(1, AUTO)), 8, ()),
        (mesh(model=(2, AUTO), data=(3, AUTO)), 6, ("data",)),
        (mesh(model=(2, AUTO)), 8, ()),
        (mesh(data=(2, AxisType.Explicit), fsdp=(4, AUTO)), 8, ("fsdp",)),
        (mesh(data=(2, AxisType.Manual), fsdp=(2, AUTO)), 8, ()),
        (AbstractMesh((), ()), 8, ()),
    ],
)
def test_axes(ambient: AbstractMesh, batch: int, axes: tuple[str, ...]) -> None:
    with use_abstract_mesh(ambient):
        assert ambient_batch_axes(batch) == axes


def test_nothing_is_divided_twice() -> None:
    def check(x: jax.Array) -> jax.Array:
        assert ambient_batch_axes(x.shape[0]) == ()
        return x

    spec = PartitionSpec("data")
    for axes in ({"data"}, {"data", "fsdp"}):
        mapped = jax.shard_map(check, mesh=TRAINER, in_specs=spec, out_specs=spec, axis_names=axes)
        jax.eval_shape(mapped, jnp.zeros((16, 3)))


@pytest.mark.parametrize(
    ("ambient", "axes"),
    [
        (TRAINER, ("model",)),
        (TRAINER, ("data", "fsdp")),
        (mesh(data=(2, AxisType.Explicit)), ("data",)),
        (AbstractMesh((), ()), ("data",)),
    ],
)
def test_refuses_axes(ambient: AbstractMesh, axes: tuple[str, ...]) -> None:
    x = jax.ShapeDtypeStruct((2, 4, 2, 8), jnp.float32)
    message = r"batch_axes must name axes of type Auto of the ambient mesh .* batch of 2, got \('"

    def attend(x: jax.Array) -> jax.Array:
        with use_abstract_mesh(ambient):
            return yoso_attention(x, x, x, num_hashes=None, batch_axes=axes)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(attend, x)
