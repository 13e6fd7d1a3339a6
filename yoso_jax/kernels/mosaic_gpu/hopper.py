"""The GPUs that the kernels are for."""

import os
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Shaped

_NEEDS = "mosaic_gpu needs an NVIDIA GPU of compute capability 9.0 (Hopper)"


def default_device() -> jax.Device:
    """The device on which JAX puts what is not committed to another one."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def refusal() -> str | None:
    """Why the kernels do not run on JAX's default device, or None where they do."""
    device = default_device()
    capability = getattr(device, "compute_capability", None)
    if capability == "9.0":
        return None
    kind = device.device_kind
    if capability is not None:
        kind += f" of compute capability {capability}"
    return f"{_NEEDS}, but the default device is {kind}."


def check() -> None:
    """Refuses a default device that is another GPU.

    Other devices may be where a computation for a GPU is lowered; `only` refuses to run there.

    Raises:
      NotImplementedError: the message names the device.
    """
    if default_device().platform == "gpu" and (reason := refusal()):
        raise NotImplementedError(reason)


def wants_same_bits() -> bool:
    """Whether XLA's flags ask for results that are the same in every run."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    names = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    return any(flag in flags or f"{flag}=true" in flags for flag in names)


def only(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, in computations that can only be lowered for an NVIDIA GPU.

    Lowering for other platforms raises NotImplementedError. For what platform a computation is, is
    not known before.
    """
    return _only_p.bind(x)


def _lower(ctx: Any, x: Any) -> list[Any]:
    platforms = ctx.platforms or ctx.module_context.platforms
    if set(platforms) != {"cuda"}:
        raise NotImplementedError(
            f"{_NEEDS}, but the computation is lowered for {', '.join(platforms)}. Other "
            f"implementations run there."
        )
    return [x]


_only_p = Primitive("mosaic_gpu_only")
_only_p.def_impl(lambda x: jax.jit(_only_p.bind)(x))
_only_p.def_abstract_eval(lambda x: x)
batching.defvectorized(_only_p)
mlir.register_lowering(_only_p, _lower)
