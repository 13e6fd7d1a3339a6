"""Checks that several operations share."""

import operator
from typing import Any


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Refuses what is not an integer in `minimum..maximum`.

    Raises:
      ValueError: the message names the argument and the range.
    """
    accepted = f"at least {minimum}" if maximum is None else f"in {minimum}..{maximum}"
    try:
        integer = operator.index(value)
    except TypeError:
        integer = None
    if (
        integer is None
        or isinstance(value, bool)
        or integer < minimum
        or (maximum is not None and integer > maximum)
    ):
        raise ValueError(f"{name} must be {accepted} (an integer), got {value!r}.")
