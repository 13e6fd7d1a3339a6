"""What configurations have in common: every field is checked when one is built."""

import math
import numbers
import operator
from collections.abc import Collection
from typing import Any

import numpy as np


class Validated:
    """Base of frozen dataclasses that check their fields in `__post_init__`."""

    def _fail(self, name: str, accepted: str) -> None:
        raise ValueError(f"{name} must be {accepted}, got {getattr(self, name)!r}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_integer(
        self,
        name: str,
        minimum: int = 1,
        maximum: int | None = None,
        optional: bool = False,
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        within = f" in {minimum}..{maximum}" if maximum else f" >= {minimum}"
        accepted = f"an integer{within}{' or None' if optional else ''}"
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            self._fail(name, accepted)
        self._set(name, operator.index(value))
        if value < minimum or (maximum is not None and value > maximum):
            self._fail(name, accepted)

    def _check_number(self, name: str, accepted: str, is_accepted: Any) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, numbers.Real | np.floating) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not is_accepted(value):
            self._fail(name, f"a finite number {accepted}")
        self._set(name, float(value))

    def _check_bool(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            self._fail(name, "True or False")

    def _check_choice(self, name: str, choices: Collection[str | None]) -> None:
        # A tuple: unlike a mapping it can be asked for what has no hash.
        if getattr(self, name) not in tuple(choices):
            self._fail(name, "one of " + ", ".join(map(repr, choices)))
