"""What XLA is told when it compiles a step of training."""


def compiler_options(platform: str) -> dict[str, bool | int | float | str]:
    """Options of `jax.jit` for a model whose layers are scanned.

    XLA for GPUs lets a kernel write what the backward pass needs of a layer into the array of all
    layers. If the layer also goes on with that result, the kernel runs twice: attention and
    products of matrices did, which took 8 % of a step of a base model.

    Args:
      platform: JAX's name of the devices' platform.
    """
    return {"xla_gpu_enable_dynamic_slice_fusion": False} if platform == "gpu" else {}
