"""Examples of masked language modelling, each determined by a seed, its epoch and its block."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32

from yoso_jax.data.masking import Masking, choose_positions, mask_tokens
from yoso_jax.data.packing import Block
from yoso_jax.data.vocabulary import Vocabulary
from yoso_jax.losses import IGNORED

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
    """Makes an example of a block of text.

    The sequence is `<s>` and the tokens of the block, padded at the end. For the order of segments
    it is `<s> A </s> B </s>`: the block is A and B, or, in half of the examples, B and A. It is cut
    inside a document at the beginning of a sentence, drawn from those in the middle half of the
    block; if there is none, of a word there; else of any word. Where there is not even that, B is
    empty and the order is not asked for.

    Attributes:
      vocabulary: of the tokens.
      masking: what is to be predicted, and what is seen there.
      sequence_length: T.
      seed: >= 0. All that is random depends on it, the number of the block and that of the epoch.
      epoch_length: blocks in an epoch; None: each is seen the same in every epoch.
      with_order: ask for the order of two segments, too.
    """

    vocabulary: Vocabulary
    masking: Masking
    sequence_length: int
    seed: int
    epoch_length: int | None = None
    with_order: bool = False

    @property
    def block_length(self) -> int:
        """Tokens of a block; special ones take up what remains of a sequence."""
        return self.sequence_length - (3 if self.with_order else 1)

    @property
    def num_predicted(self) -> int:
        """P, the most tokens of an example that are predicted."""
        return self.masking.count(self.block_length)

    def __call__(self, index: int, block: Block) -> Example:
        """Makes an example.

        Args:
          index: its place in the training: epoch `index // epoch_length`.
          block: `block_length` tokens, or fewer at the end of a split.

        Returns:
          `input_ids` int32 [T]; `attention_mask` bool [T], True on all but padding; `positions`
          int32 [P], the tokens to predict, ascending, then 0; and `labels` int32 [P], what they
          were, then -100. With the order also `token_type_ids` int32 [T], 1 on `B </s>`; and
          `order_labels`, int32: 0, 1 if the segments were swapped, -100 if not asked for.
        """
        epoch = 0 if self.epoch_length is None else index // self.epoch_length
        rng = np.random.default_rng([self.seed, epoch, block.index])
        vocabulary = self.vocabulary
        tokens, word_starts = block.tokens.astype(np.int32), block.word_starts
        special, before = [vocabulary.bos], [0]  # ids, and which tokens they stand before
        order: Example = {}
        if self.with_order:
            first, cut = tokens.size, find_cut(tokens, word_starts, vocabulary, rng)
            label = IGNORED
            if cut is not None:
                label = int(rng.random() < 0.5)
                first = tokens.size - cut if label else cut
                if label:
                    tokens, word_starts = np.roll(tokens, -cut), np.roll(word_starts, -cut)
            special += [vocabulary.eos] * 2
            before += [first, tokens.size]
            types = np.arange(self.sequence_length)
            types = (types >= first + 2) & (types < tokens.size + 3)
            order = {
                "order_labels": np.array(label, np.int32),
                "token_type_ids": types.astype(np.int32),
            }
        insert = _Insertion(tokens.size, before)
        ids = insert(tokens, special)
        positions = choose_positions(
            insert(tokens != vocabulary.eos, False),
            insert(word_starts, True),
            self.masking,
            rng,
        )
        shown = mask_tokens(ids, positions, self.masking, vocabulary, rng)
        return {
            "input_ids": _pad(shown, self.sequence_length, vocabulary.pad),
            "attention_mask": np.arange(self.sequence_length) < ids.size,
            "positions": _pad(positions, self.num_predicted, 0),
            "labels": _pad(ids[positions], self.num_predicted, IGNORED),
            **order,
        }


def find_cut(
    tokens: Int32[np.ndarray, " length"],
    word_starts: Bool[np.ndarray, " length"],
    vocabulary: Vocabulary,
    rng: np.random.Generator,
) -> int | None:
    """Draws where to cut a block in two, as `ExampleMaker` says; the token there begins B."""
    cuts = np.arange(1, tokens.size)
    before, after = tokens[:-1], tokens[1:]
    is_word = word_starts[1:] & (before != vocabulary.eos) & (after != vocabulary.eos)
    is_middle = (4 * cuts >= tokens.size) & (4 * cuts <= 3 * tokens.size)
    for accepted in (
        is_word & is_middle & vocabulary.sentence_ends[before],
        is_word & is_middle,
        is_word,
    ):
        if accepted.any():
            return int(rng.choice(cuts[accepted]))
    return None


class _Insertion:
    """Puts values before some of others, as `np.insert` does in ten times the time.

    Args:
      size: of those that there are.
      before: which of them, ascending; `size` stands for the end.
    """

    def __init__(self, size: int, before: list[int]) -> None:
        self._places = np.asarray(before) + np.arange(len(before))
        self._stay = np.ones(size + len(before), np.bool_)
        self._stay[self._places] = False

    def __call__(self, values: np.ndarray, inserted: list[int] | bool) -> np.ndarray:
        result = np.empty(self._stay.size, values.dtype)
        result[self._stay] = values
        result[self._places] = inserted
        return result


def _pad(values: np.ndarray, length: int, fill: int) -> Int32[np.ndarray, " length"]:
    padded = np.full(length, fill, np.int32)
    padded[: values.size] = values
    return padded
