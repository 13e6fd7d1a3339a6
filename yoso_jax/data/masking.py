"""Which tokens of a masked language model's input are to be predicted, and what it sees there."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32, Int64

from yoso_jax.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Masking:
    """BERT's masking (arXiv 1810.04805, section 3.1).

    Attributes:
      rate: share of the ordinary tokens to predict, in (0, 1).
      mask_share: share of those that become the mask token, in [0, 1].
      random_share: share of those that become a token drawn from the whole vocabulary; what
        remains is kept as it is.
      whole_words: choose all tokens of a word, or none.
    """

    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_words: bool = False

    def count(self, num_tokens: int) -> int:
        """How many of so many ordinary tokens are predicted: `rate`, rounded, and at least one."""
        return max(1, int(self.rate * num_tokens + 0.5)) if num_tokens else 0


def choose_positions(
    is_ordinary: Bool[np.ndarray, " T"],
    is_word_start: Bool[np.ndarray, " T"],
    masking: Masking,
    rng: np.random.Generator,
) -> Int64[np.ndarray, " chosen"]:
    """Draws the tokens to predict.

    Args:
      is_ordinary: False for special tokens, which are never chosen.
      is_word_start: True on the first token of a word. A special token ends a word, too, and what
        is left of a word that was cut off is a word.
      masking: how many, and whether words are whole.
      rng: is drawn from.

    Returns:
      Ascending positions, `masking.count` of them. With whole words there are fewer where the next
      words in the random order are longer than what is missing; these are passed over.
    """
    candidates = np.flatnonzero(is_ordinary)
    count = masking.count(candidates.size)
    if not masking.whole_words:
        return np.sort(rng.choice(candidates, count, replace=False))
    starts = is_word_start | ~is_ordinary
    starts[1:] |= ~is_ordinary[:-1]
    words = np.cumsum(starts)
    sizes = np.bincount(words[candidates])
    is_chosen = np.zeros(sizes.size, np.bool_)
    for word in rng.permutation(np.flatnonzero(sizes)):
        if sizes[word] <= count:
            is_chosen[word] = True
            count -= sizes[word]
        if not count:
            break
    return candidates[is_chosen[words[candidates]]]


def mask_tokens(
    ids: Int32[np.ndarray, " T"],
    positions: Int64[np.ndarray, " chosen"],
    masking: Masking,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
) -> Int32[np.ndarray, " T"]:
    """A copy of `ids` in which each chosen token is masked, replaced or kept, at random."""
    shown = ids.copy()
    draws = rng.random(positions.size)
    drawn = rng.choice(vocabulary.ordinary, positions.size)
    is_random = draws < masking.mask_share + masking.random_share
    shown[positions] = np.where(is_random, drawn, ids[positions])
    shown[positions[draws < masking.mask_share]] = vocabulary.mask
    return shown
