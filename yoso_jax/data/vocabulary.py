"""What masked language modelling knows of a vocabulary, without its tokenizer."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids and what they stand for.

    Attributes:
      bos: begins a sequence.
      eos: ends a document, and separates segments.
      pad: fills up a sequence.
      mask: stands for a token to predict.
      size: ids are below it.
      ordinary: ids that are not special, ascending; a token to predict may be replaced by one.
      sentence_ends: by id, whether the token ends in a full stop, or an exclamation or question
        mark, if need be before a quotation mark or bracket.
    """

    bos: int
    eos: int
    pad: int
    mask: int
    size: int
    ordinary: Int32[np.ndarray, " num_ordinary"]
    sentence_ends: Bool[np.ndarray, " size"]
