"""Associative recall: a sequence has pairs of a key and a value somewhere; one key is asked for.

The task of Ba et al., Using Fast Weights to Attend to the Recent Past, NeurIPS 2016
(arXiv:1610.06258), as a classification of sequences of any length. Every other token, from the
first on, is the key asked for; of those between, a few are pairs, one token each, and the rest
fillers. The label is the value of the pair with that key. So each token that asks has to find one
among n, and its difficulty grows with n alone.

With `min_length` the examples to train on are of all lengths from that to n, as many of 64 to 128
tokens as of 128 to 256: what is to be found is found in short ones first. Those to validate and
test with all have n.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from yoso_jax.data.cache import Recipe, load_or_generate
from yoso_jax.data.splits import Examples, TaskData
from yoso_jax.validation import Validated

# Bump when the same configuration would give other examples: it is part of the cache's name.
_VERSION = 2

NUM_KEYS = 16
NUM_VALUES = 8
NUM_FILLERS = 32
FIRST_QUERY = 1  # 0 pads
FIRST_PAIR = FIRST_QUERY + NUM_KEYS
FIRST_FILLER = FIRST_PAIR + NUM_KEYS * NUM_VALUES
RECALL_VOCAB_SIZE = FIRST_FILLER + NUM_FILLERS

_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class RecallConfig(Validated):
    """What to generate.

    Attributes:
      num_train, num_valid, num_test: examples per split, each >= 1.
      length: tokens of each, >= 2 * num_pairs.
      min_length: the fewest tokens of one to train on, from 2 * num_pairs to `length`; None for
        `length`.
      num_pairs: pairs in each, of different keys, in 1..16.
      seed: >= 0. The same configuration always gives the same examples.

    Raises:
      ValueError: a field is out of range; the message names it.
    """

    task: ClassVar[str] = "recall"

    num_train: int = 50_000
    num_valid: int = 1_000
    num_test: int = 2_000
    length: int = 256
    min_length: int | None = None
    num_pairs: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_train", "num_valid", "num_test"):
            self._check_integer(name)
        self._check_integer("num_pairs", 1, NUM_KEYS)
        self._check_integer("length", 2 * self.num_pairs)
        self._check_integer("min_length", 2 * self.num_pairs, self.length, optional=True)
        self._check_integer("seed", 0)


def prepare_recall(config: RecallConfig, cache_dir: str | os.PathLike[str]) -> TaskData:
    """Loads the data set from `cache_dir`, generating it on first use.

    Raises:
      DataError: the cache is damaged (the message names the file).
      OSError: `cache_dir` cannot be written.
    """
    recipe = Recipe("Recall", _VERSION, dataclasses.asdict(config), num_labels=NUM_VALUES)
    return load_or_generate(recipe, lambda progress: generate(config, progress), cache_dir)


def generate(config: RecallConfig, progress: Callable[[int], None] = lambda done: None) -> Examples:
    """Generates the examples of all splits, one after the other.

    Args:
      config: what to generate.
      progress: called now and then with the number of examples made so far.
    """
    total = config.num_train + config.num_valid + config.num_test
    shortest = config.min_length or config.length
    half = config.length // 2
    tokens, lengths = [], np.full(total, config.length)
    labels = np.empty(total, np.uint8)
    for number, first in enumerate(range(0, total, _CHUNK)):
        rng = np.random.default_rng([4, number, config.seed])
        rows = slice(first, min(first + _CHUNK, total))
        count = rows.stop - first
        shape = (count, config.length)
        chunk = FIRST_FILLER + rng.integers(NUM_FILLERS, size=shape, dtype=np.uint8)
        # Of random numbers the order of a few is a draw without replacement.
        keys = rng.random((count, NUM_KEYS)).argsort(axis=1)[:, : config.num_pairs]
        values = rng.integers(NUM_VALUES, size=keys.shape)
        drawn = np.exp(rng.uniform(np.log(shortest), np.log(config.length), count)).round()
        is_train = np.arange(rows.start, rows.stop) < config.num_train
        lengths[rows] = np.where(is_train, drawn, config.length)
        order = rng.random((count, half))
        order[np.arange(half) >= lengths[rows, None] // 2] = np.inf
        places = 1 + 2 * order.argsort(axis=1)[:, : config.num_pairs]
        np.put_along_axis(chunk, places, (FIRST_PAIR + keys * NUM_VALUES + values), axis=1)
        chunk[:, ::2] = FIRST_QUERY + keys[:, :1]
        tokens.append(chunk[np.arange(config.length) < lengths[rows, None]])
        labels[rows] = values[:, 0]
        progress(rows.stop)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Examples(np.concatenate(tokens), offsets, labels)
