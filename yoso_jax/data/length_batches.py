"""Batches of examples of about the same length, so that little of them is padding."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

_ENDLESS = 2**62


class LengthBatches:
    """Training batches by number, without end; random access, so their position is a number.

    Each epoch has its own random order. Examples are divided by the shortest of `bounds` that holds
    them; each part is cut into batches, what is left of it joins the part of the next bound, and
    the last batch of all is filled up from the beginning of the epoch. So an epoch has every
    example, and at most `batch_size - 1` of them twice. The batches then follow in random order.

    Args:
        make: makes a batch of the examples of these numbers, padded to a length.
        lengths: of each example.
        bounds: lengths to pad to, ascending; the last holds every example.
        batch_size: B, >= 1.
        seed: >= 0.
    """

    def __init__(
        self,
        make: Callable[[Int[np.ndarray, " B"], int], dict[str, np.ndarray]],
        lengths: Int[np.ndarray, " examples"],
        bounds: Sequence[int],
        batch_size: int,
        seed: int,
    ) -> None:
        self._make = make
        self._bucket = np.searchsorted(np.asarray(bounds), lengths)
        self._bounds, self._batch_size, self._seed = tuple(bounds), batch_size, seed
        self._num_batches = -(-len(lengths) // batch_size)
        # Of the instance, not of the class, so that it ends with it.
        self._plan = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(int(index), self._num_batches)
        rows, bucket = self._plan(epoch)[place]
        return self._make(rows, self._bounds[bucket])

    def __repr__(self) -> str:
        return f"LengthBatches(bounds={self._bounds}, batch_size={self._batch_size})"

    def __getstate__(self) -> dict[str, Any]:
        # Workers plan for themselves.
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plan = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def _plan_epoch(self, epoch: int) -> list[tuple[np.ndarray, int]]:
        """The examples of each batch, and its bucket."""
        rng = np.random.default_rng([5, self._seed, epoch])
        order = rng.permutation(len(self._bucket))
        batches: list[tuple[np.ndarray, int]] = []
        left = order[:0]
        last = len(self._bounds) - 1
        for bucket in range(last + 1):
            rows = np.concatenate([left, order[self._bucket[order] == bucket]])
            whole = len(rows) - len(rows) % self._batch_size
            batches += [(part, bucket) for part in rows[:whole].reshape(-1, self._batch_size)]
            left = rows[whole:]
        if len(left):
            batches.append((np.resize(np.concatenate([left, order]), self._batch_size), last))
        return [batches[place] for place in rng.permutation(len(batches))]
