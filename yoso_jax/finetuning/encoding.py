"""Texts and pairs of texts to token ids of a bounded number; what is cut off is counted."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from yoso_jax.errors import ConfigError, DataError
from yoso_jax.finetuning.examples import Examples

Truncation = Literal["error", "longest_first", "only_second"]
"""What to do with an example that is too long: stop, cut the end of the longer text until it fits,
or cut the end of the second text."""

# Encodings are large: what is needed of them is kept, a chunk at a time.
_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A tokenizer, and how long its output may be.

    Attributes:
      tokenizer: puts special tokens around texts, as `<s> a </s></s> b </s>`.
      max_length: tokens of an example, special ones included.
      truncation: see `Truncation`.
      token_types: give the model the numbers that tell the texts of a pair apart, too.
    """

    tokenizer: Tokenizer
    max_length: int
    truncation: Truncation = "error"
    token_types: bool = False

    def encode(
        self, examples: Examples, inputs: Sequence[str | tuple[str, str]]
    ) -> Iterator[Encoding]:
        """Encodes the texts of examples; `overflowing` of a result is empty if it is whole.

        Args:
            examples: named in messages.
            inputs: for each of them a text or a pair.

        Raises:
            DataError: an example is too long and not to be cut, or, with `only_second`, its first
                text alone is too long; the message names it.
            ConfigError: `only_second`, and the inputs are no pairs.
        """
        if self.truncation == "error":
            for example, encoding in zip(examples.items, self._encode(inputs), strict=True):
                if len(encoding) > self.max_length:
                    raise DataError(
                        f"{examples.path}, {example.place}: {len(encoding)} tokens do not fit in "
                        f"sequence_length={self.max_length}; raise it, or say with truncation: "
                        "longest_first or only_second what to cut off"
                    )
                yield encoding
            return
        if self.truncation == "only_second":
            self._check_firsts(examples, inputs)
        yield from self._encode(inputs, strategy=self.truncation, stride=0)

    def encode_windows(
        self, examples: Examples, inputs: Sequence[tuple[str, str]], stride: int
    ) -> Iterator[list[Encoding]]:
        """Encodes pairs whose second text is spread over as many windows as it needs.

        Args:
            examples: named in messages.
            inputs: for each of them a pair; the first text is in all windows.
            stride: tokens that a window shares with the one before it.

        Raises:
            DataError: the first text leaves no more than `stride` tokens for the second; the
                message names the example.
        """
        self._check_firsts(examples, inputs, stride)
        for encoding in self._encode(inputs, strategy="only_second", stride=stride):
            yield [encoding, *encoding.overflowing]

    def _encode(
        self, inputs: Sequence[str | tuple[str, str]], **truncation: str | int
    ) -> Iterator[Encoding]:
        # A copy, for how to truncate is kept in it.
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        if truncation:
            tokenizer.enable_truncation(self.max_length, **truncation)
        for start in range(0, len(inputs), _CHUNK):
            yield from tokenizer.encode_batch(list(inputs[start : start + _CHUNK]))

    def _check_firsts(
        self, examples: Examples, inputs: Sequence[str | tuple[str, str]], stride: int = 0
    ) -> None:
        """The library's own errors name no example, or end the process."""
        special = self.tokenizer.num_special_tokens_to_add(is_pair=True)
        room = self.max_length - special - stride
        firsts = []
        for texts in inputs:
            if isinstance(texts, str):
                raise ConfigError("truncation: only_second needs pairs of texts, these are none")
            firsts.append(texts[0])
        alone = self.tokenizer.num_special_tokens_to_add(is_pair=False)
        for example, encoding in zip(examples.items, self._encode(firsts), strict=True):
            if (length := len(encoding) - alone) >= room:
                shared = f" and doc_stride={stride}" if stride else ""
                raise DataError(
                    f"{examples.path}, {example.place}: its first text of {length} tokens leaves "
                    f"none for the second within sequence_length={self.max_length}{shared}"
                )

    def to_inputs(self, encoding: Encoding) -> dict[str, np.ndarray]:
        """What the model is called with, int32 [length] each."""
        arrays = {"input_ids": np.array(encoding.ids, np.int32)}
        if self.token_types:
            arrays["token_type_ids"] = np.array(encoding.type_ids, np.int32)
        return arrays
