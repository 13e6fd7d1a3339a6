"""Masked language modelling: what is asked of a model, and batches of it."""

import dataclasses
import functools
from pathlib import Path
from typing import ClassVar, Literal

import grain
import numpy as np
from jaxtyping import Int

from yoso_jax.data.masking import Masking
from yoso_jax.data.mlm_examples import ExampleMaker
from yoso_jax.data.packing import Blocks, TokenStream
from yoso_jax.data.pipeline import READ_OPTIONS, Batch, iterate, shuffle_seed
from yoso_jax.data.vocabulary import Vocabulary
from yoso_jax.validation import Validated


@dataclasses.dataclass(frozen=True)
class MLMConfig(Validated):
    """Text to predict tokens of, from folders in `data_dir`.

    Attributes:
      corpora: folders in `data_dir`; every `.txt` file below one, in UTF-8, is a document. Empty
        ones and second copies are left out.
      tokenizer: folder or file as `load_tokenizer` reads it; none trains a byte-level BPE on the
        training documents and keeps it in `data_dir`.
      vocab_size: ids of the one to train, >= 261.
      valid_fraction: of the documents, to validate on, in (0, 0.5).
      test_fraction: of the documents, to test on, in (0, 0.5).
      seed: >= 0; divides the documents.
      masking: `dynamic` (RoBERTa) draws what is masked anew in each epoch; `static` (BERT) keeps
        it, but for the order in which a block is seen.
      mask_rate: share of the tokens to predict, in (0, 1).
      mask_share: share of those that become the mask token, in [0, 1].
      random_share: share of those that become any token; the rest is kept.
      whole_words: predict all tokens of a word, or none.
      sentence_order: also predict whether the two segments of a block are in order (ALBERT).

    Raises:
      ValueError: a field is out of range; the message names it.
    """

    task: ClassVar[str] = "mlm"

    corpora: tuple[str, ...] = ("brown", "docs")
    tokenizer: str | None = None
    vocab_size: int = 8192
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 0
    masking: Literal["dynamic", "static"] = "dynamic"
    mask_rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_words: bool = False
    sentence_order: bool = False

    def __post_init__(self) -> None:
        names = self.corpora
        if not (
            isinstance(names, tuple) and names and all(isinstance(name, str) for name in names)
        ):
            self._fail("corpora", "one or more names of folders")
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            self._fail("tokenizer", "a path or None")
        self._check_integer("vocab_size", 261)
        for name in ("valid_fraction", "test_fraction"):
            self._check_number(name, "in (0, 0.5)", lambda value: 0 < value < 0.5)
        self._check_integer("seed", 0)
        self._check_choice("masking", ("dynamic", "static"))
        self._check_number("mask_rate", "in (0, 1)", lambda value: 0 < value < 1)
        self._check_number("mask_share", "in [0, 1]", lambda value: 0 <= value <= 1)
        rest = 1 - self.mask_share
        self._check_number(
            "random_share",
            "in [0, 1 - mask_share]",
            lambda value: 0 <= value <= rest + 1e-9,
        )
        self._check_bool("whole_words")
        self._check_bool("sentence_order")

    @property
    def masks(self) -> Masking:
        """Which tokens are predicted, and what is seen there."""
        return Masking(self.mask_rate, self.mask_share, self.random_share, self.whole_words)


@dataclasses.dataclass(frozen=True)
class MLMData:
    """The three splits of a corpus.

    Attributes:
      train: to train on.
      valid: to validate on.
      test: to test on.
      vocabulary: of the tokens.
      tokenizer: file or folder of the tokenizer they were made with.
      folder: of the corpus.
    """

    train: TokenStream
    valid: TokenStream
    test: TokenStream
    vocabulary: Vocabulary
    tokenizer: Path
    folder: Path


def train_batches(
    stream: TokenStream,
    maker: ExampleMaker,
    *,
    batch_size: int,
    num_epochs: int | None = None,
    num_workers: int = 0,
    start: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Makes a resumable iterator of batches, of the blocks of a stream in random order.

    Batches depend on `maker.seed` alone, not on `num_workers`. Epochs, each in its own order,
    follow each other without a gap: a batch may hold the end of one and the start of the next. The
    position is saved and restored as that of `yoso_jax.data.pipeline.make_iterator`.

    Args:
      stream: cut into blocks of `maker.block_length`.
      maker: makes an example of a block.
      batch_size: B, >= 1.
      num_epochs: how often to go through the stream, after which a batch that is not full is
        dropped; None repeats it for ever.
      num_workers: processes that prepare batches; 0 prepares them in a thread of this one.
      start: number of the first batch.

    Returns:
      Batches of examples, stacked; see `ExampleMaker.__call__`.
    """
    blocks = Blocks(stream, maker.block_length)
    # Grain takes numbers one by one, not examples, which would double the time.
    numbers = grain.MapDataset.range(len(blocks)).shuffle(shuffle_seed(maker.seed))
    batches = numbers.repeat(num_epochs).batch(batch_size, drop_remainder=True)
    make = functools.partial(_make_batch, blocks, maker)
    return iterate(batches.map_with_index(make), num_workers, start)


def _make_batch(
    blocks: Blocks, maker: ExampleMaker, index: int, numbers: Int[np.ndarray, " B"]
) -> Batch:
    """Batch `index`, of the blocks of these numbers."""
    first = index * len(numbers)
    examples = [maker(first + i, blocks[int(number)]) for i, number in enumerate(numbers)]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def eval_batches(
    stream: TokenStream, maker: ExampleMaker, *, batch_size: int
) -> grain.IterDataset[Batch]:
    """Makes batches that hold every block exactly once, in order, and always the same.

    A batch also has `"weight": float32 [B]`, 1 for an example. The last batch is filled up to B
    with rows of weight 0, zeros in all fields, so that all shapes are equal.

    Returns:
      An iterable of batches; it may be iterated repeatedly.
    """
    batch = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return (
        grain.MapDataset.source(Blocks(stream, maker.block_length))
        .map_with_index(maker)
        .map(lambda example: example | {"weight": np.float32(1)})
        .batch(batch_size, batch_fn=batch)
        .to_iter_dataset(READ_OPTIONS)
    )
