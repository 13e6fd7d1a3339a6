"""Documents laid end to end and cut into blocks of equal length."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt16, UInt32

Tokens = UInt16[np.ndarray, " length"] | UInt32[np.ndarray, " length"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenStream:
    """All documents of a split, each followed by the id that ends a document.

    Mapped from the two files `NAME_tokens.npy` and `NAME_word_starts.npy`, and pickled as their
    place on disk, so data workers share them.

    Attributes:
      folder: of the files.
      name: of the split.
    """

    folder: Path
    name: str
    tokens: Tokens = dataclasses.field(init=False)
    """Ids."""
    word_starts: Bool[np.ndarray, " length"] = dataclasses.field(init=False)
    """True on the first token of each word."""

    def __post_init__(self) -> None:
        for kind in ("tokens", "word_starts"):
            array = np.load(self.folder / f"{self.name}_{kind}.npy", mmap_mode="r")
            object.__setattr__(self, kind, np.asarray(array))  # a plain view is faster

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStream, (self.folder, self.name)

    def __len__(self) -> int:
        return len(self.tokens)


class Block(NamedTuple):
    """A piece of a stream."""

    index: int
    tokens: Tokens
    word_starts: Bool[np.ndarray, " length"]


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A stream cut every `length` tokens, by index.

    A block may hold the end of a document and the beginning of the next, as RoBERTa's "full
    sentences" (arXiv 1907.11692, section 4.2), but is cut anywhere. Every token of the stream is in
    exactly one block; all have `length` tokens but the last, which has what remains, 1..length.

    Attributes:
      stream: what is cut.
      length: >= 1.
    """

    stream: TokenStream
    length: int

    def __len__(self) -> int:
        return -(-len(self.stream) // self.length)

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        part = slice(index * self.length, (index + 1) * self.length)
        return Block(index, self.stream.tokens[part], self.stream.word_starts[part])
