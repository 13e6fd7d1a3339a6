"""What every task's data becomes: three splits of labelled token sequences, by index."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8, UInt16

Tokens = UInt8[np.ndarray, " total"] | UInt16[np.ndarray, " total"]


class Examples(NamedTuple):
    """Sequences laid end to end: example i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: UInt8[np.ndarray, " total"]
    offsets: Int[np.ndarray, " num_offsets"]
    labels: UInt8[np.ndarray, " num_examples"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenSplit:
    """Examples by index: `split[i]` is `{"input_ids": int32 [length], "labels": int}`.

    Attributes:
      tokens: ids of all examples, end to end.
      offsets: example i is `tokens[offsets[i]:offsets[i + 1]]`.
      labels: classes, from 0.
    """

    tokens: Tokens
    offsets: Int[np.ndarray, " num_offsets"]
    labels: UInt8[np.ndarray, " num_examples"]

    @property
    def num_examples(self) -> int:
        """The number of examples."""
        return len(self.labels)

    @property
    def lengths(self) -> Int[np.ndarray, " num_examples"]:
        """The number of tokens of each example."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _check_index(index, len(self))
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        return {"input_ids": np.array(tokens, np.int32), "labels": int(self.labels[index])}

    def __repr__(self) -> str:
        return f"TokenSplit(num_examples={len(self)})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PairSplit:
    """Pairs by index: `split[i]` is `{"input_ids": (first, second), "labels": int}`.

    The two are int32 [length]. A document is kept once however many pairs it is in.

    Attributes:
      tokens: ids of all documents, end to end.
      offsets: document j is `tokens[offsets[j]:offsets[j + 1]]`.
      pairs: numbers of the two documents of each pair.
      labels: classes, from 0.
    """

    tokens: Tokens
    offsets: Int[np.ndarray, " num_offsets"]
    pairs: Int[np.ndarray, "num_examples 2"]
    labels: UInt8[np.ndarray, " num_examples"]

    @property
    def num_examples(self) -> int:
        """The number of pairs."""
        return len(self.labels)

    @property
    def lengths(self) -> Int[np.ndarray, " num_examples"]:
        """The number of tokens of the longer document of each pair."""
        return np.diff(self.offsets)[self.pairs].max(axis=1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _check_index(index, len(self))
        first, second = (
            np.array(self.tokens[self.offsets[document] : self.offsets[document + 1]], np.int32)
            for document in self.pairs[index]
        )
        return {"input_ids": (first, second), "labels": int(self.labels[index])}

    def __repr__(self) -> str:
        return f"PairSplit(num_examples={len(self)})"


Split = TokenSplit | PairSplit


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The three splits and the folder they were read from."""

    train: Split
    valid: Split
    test: Split
    folder: Path


def lay_end_to_end(
    sequences: Sequence[UInt16[np.ndarray, " _"]],
) -> tuple[UInt16[np.ndarray, " total"], Int[np.ndarray, " num_offsets"]]:
    """Concatenates sequences; the second result is where each begins, and where the last ends."""
    offsets = np.cumsum([0, *map(len, sequences)])
    return np.concatenate(sequences), offsets


def split_by_fraction(
    num_items: int, fractions: Sequence[float], seed: int
) -> list[Int[np.ndarray, " _"]]:
    """Divides 0..num_items-1 at random.

    Returns:
      What remains, then a part for each fraction, of at least one item; each part in ascending
      order. The same arguments always give the same parts.

    Raises:
      ValueError: there are too few items to leave none of the parts empty.
    """
    sizes = [max(1, round(fraction * num_items)) for fraction in fractions]
    rest = num_items - sum(sizes)
    if rest < 1:
        raise ValueError(f"{num_items} are too few to divide into {len(sizes) + 1} parts")
    order = np.random.default_rng([1, seed]).permutation(num_items)
    return [np.sort(part) for part in np.split(order, np.cumsum([rest, *sizes])[:-1])]


def _check_index(index: int, size: int) -> None:
    if not 0 <= index < size:
        raise IndexError(f"index must be in 0..{size - 1}, got {index}")
