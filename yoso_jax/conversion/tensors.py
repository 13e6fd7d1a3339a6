"""Tensors of a file, known by shape and type and read when they are used."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a parameter is made of: where it comes from, and what is done to it."""

    source: str
    """Its key in the file."""
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    """Reads and transforms it, each time anew."""
    transforms: tuple[str, ...] = ()
    """What `read` does to the file's tensor, for people."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, source: str, array: np.ndarray) -> "Tensor":
        """A tensor that has been read."""
        return cls(source, array.shape, array.dtype, lambda: array)

    def apply(
        self,
        transform: str,
        function: Callable[[np.ndarray], np.ndarray],
        shape: tuple[int, ...] | None = None,
    ) -> "Tensor":
        """The result of `function`, which `transform` describes and which keeps the dtype.

        Args:
            transform: a few words for people.
            function: called with what `read` returns.
            shape: of the result; None if it is the same.
        """
        read = self.read
        return dataclasses.replace(
            self,
            shape=self.shape if shape is None else shape,
            read=lambda: function(read()),
            transforms=(*self.transforms, transform),
        )

    def equals(self, other: "Tensor") -> bool:
        """Whether both have the same values; reads them."""
        return self.shape == other.shape and np.array_equal(self.read(), other.read())
