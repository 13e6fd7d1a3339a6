"""Which implementation of an operation runs.

An implementation is a module with some of the operations of `xla`, by the same names and
signatures. It raises NotImplementedError for a device, shape or dtype that it does not support.
"""

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from yoso_jax.kernels.mosaic_gpu import hopper

type Implementation = str | Sequence[str] | None

_MODULES = {
    "mosaic_gpu": "yoso_jax.kernels.mosaic_gpu.operations",
    "xla": "yoso_jax.kernels.xla",
}


def implementations() -> tuple[str, ...]:
    """The names of all implementations, the preferred ones first."""
    return tuple(_MODULES)


def resolve(implementation: Implementation) -> tuple[str, ...]:
    """The names to try, in order.

    None stands for all names. Of several names, those remain that are for the kind of JAX's default
    device; a single name stays, so that its computation can be lowered for another machine.

    Raises:
      ValueError: a name that does not exist, or no name at all.
    """
    if implementation is None:
        names = implementations()
    else:
        names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in _MODULES]
    if unknown or not names:
        accepted = ", ".join(map(repr, _MODULES))
        raise ValueError(
            f"implementation must be None, one of {accepted}, or a sequence of these, "
            f"got {implementation!r}."
        )
    if len(names) > 1 and "mosaic_gpu" in names and (refusal := hopper.refusal()):
        if hopper.default_device().platform == "gpu":
            _say_once(refusal)
        names = tuple(name for name in names if name != "mosaic_gpu") or ("mosaic_gpu",)
    return names


def call(operation: str, names: tuple[str, ...], /, *args: Any, **kwargs: Any) -> Any:
    """Runs the operation by the first implementation that supports it.

    Raises:
      NotImplementedError: the only one named does not support it.
      ExceptionGroup: none of those named does.
    """
    errors = []
    for name in names:
        try:
            result = _operation(name, operation)(*args, **kwargs)
        except NotImplementedError as error:
            errors.append(error)
        else:
            for error in errors:
                _say_once(f"{operation} runs by {name}: {error}")
            return result
    if len(errors) == 1:
        raise errors[0]
    raise ExceptionGroup(
        f"No implementation of {operation} among {names} supports this call", errors
    )


def _operation(name: str, operation: str) -> Any:
    # Imported when first used: kernels may be slow to load.
    module: ModuleType = importlib.import_module(_MODULES[name])
    if not hasattr(module, operation):
        raise NotImplementedError(f"{name} does not implement {operation}.")
    return getattr(module, operation)


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger(__name__).info(message)
