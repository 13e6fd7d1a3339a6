"""Which implementation of an operation runs.

An implementation is a module with some of the operations of `xla`, by the same names and
signatures. It raises NotImplementedError for a device, shape or dtype that it does not support.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from yoso_jax.kernels import xla

type Implementation = str | Sequence[str] | None

_IMPLEMENTATIONS: dict[str, ModuleType] = {"xla": xla}


def implementations() -> tuple[str, ...]:
    """The names of all implementations, the preferred ones first."""
    return tuple(_IMPLEMENTATIONS)


def resolve(implementation: Implementation) -> tuple[str, ...]:
    """The names to try, in order: all that exist for None.

    Raises:
      ValueError: a name that does not exist, or no name at all.
    """
    if implementation is None:
        return implementations()
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in _IMPLEMENTATIONS]
    if unknown or not names:
        accepted = ", ".join(map(repr, _IMPLEMENTATIONS))
        raise ValueError(
            f"implementation must be None, one of {accepted}, or a sequence of these, "
            f"got {implementation!r}."
        )
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
            return getattr(_IMPLEMENTATIONS[name], operation)(*args, **kwargs)
        except NotImplementedError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise ExceptionGroup(
        f"No implementation of {operation} among {names} supports this call", errors
    )
