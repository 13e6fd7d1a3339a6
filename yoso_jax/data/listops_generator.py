"""Seeded, vectorised generator of LRA ListOps expressions.

The distribution is the published one (Long Range Arena, arXiv 2011.04006, section 2.2): a node
above the maximum depth is an operator with probability 0.25, otherwise a digit; an operator has
2 to 10 arguments; trees whose length falls outside the window are thrown away.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from jaxtyping import Int, UInt8

from yoso_jax.data.splits import Examples
from yoso_jax.errors import DataError

VOCAB = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""The 16 tokens; a token's id is its index. Id 0 is padding, digit d has id d + 1."""

FIRST_DIGIT = VOCAB.index("0")
FIRST_OPERATOR = VOCAB.index("[MIN")
NUM_OPERATORS = 4
CLOSE = VOCAB.index("]")

# Bump when the same config would give other examples: it is part of the cache's name.
GENERATOR_VERSION = 1

# A request is refused when this many trees in a row gave fewer new examples than the minimum:
# at such a rate 100,000 examples would take more than an hour.
_PATIENCE_TREES = 2**19
_PATIENCE_EXAMPLES = 50


@dataclasses.dataclass(frozen=True)
class ListOpsConfig:
    """What to generate; the defaults are the LRA benchmark.

    Attributes:
      num_train, num_valid, num_test: examples per split, each >= 1; no example occurs twice, in
        one split or across splits.
      min_length, max_length: keep `min_length < length < max_length`. A digit counts 1, an
        operator 2 (its closing bracket) plus its arguments: the length is the number of tokens.
      max_depth: nodes at this depth are digits; the root has depth 1.
      min_args, max_args: an operator has a uniform number of arguments in this range.
      operator_probability: that a node above `max_depth` is an operator, in (0, 1].
      seed: >= 0. The same config always gives the same examples.

    Raises:
      ValueError: a field is out of range; the message names it.
    """

    task: ClassVar[str] = "listops"

    num_train: int = 96_000
    num_valid: int = 2_000
    num_test: int = 2_000
    min_length: int = 500
    max_length: int = 2_000
    max_depth: int = 10
    min_args: int = 2
    max_args: int = 10
    operator_probability: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{field.name} must be an integer, got {value!r}")
        minima = {
            "num_train": 1,
            "num_valid": 1,
            "num_test": 1,
            "min_length": 0,
            "max_length": self.min_length + 2,
            "max_depth": 1,
            "min_args": 1,
            "max_args": self.min_args,
            "seed": 0,
        }
        for name, minimum in minima.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be >= {minimum}, got {getattr(self, name)}")
        probability = self.operator_probability
        if not isinstance(probability, int | float) or not 0 < probability <= 1:
            raise ValueError(f"operator_probability must be in (0, 1], got {probability!r}")
        longest = _longest_subtrees(self)[0]
        if longest <= self.min_length:
            raise ValueError(
                f"min_length must be below {longest}, the longest expression that max_depth="
                f"{self.max_depth} and max_args={self.max_args} allow, got {self.min_length}"
            )

    @property
    def num_examples(self) -> int:
        """Examples in all splits together."""
        return self.num_train + self.num_valid + self.num_test


def generate_examples(
    config: ListOpsConfig, progress: Callable[[int], None] = lambda done: None
) -> Examples:
    """Generates `config.num_examples` distinct examples in random order.

    Args:
      config: what to generate.
      progress: called now and then with the number of examples found so far.

    Raises:
      DataError: distinct examples in the length window are too rare, or too few exist.
    """
    # A tree never holds more than max_length nodes, so this bounds a chunk's memory.
    chunk_trees = int(np.clip(2**24 // config.max_length, 64, 8192))
    seen: set[bytes] = set()
    texts: list[bytes] = []
    labels: list[int] = []
    trees_grown = trees_checked = examples_checked = 0
    while len(texts) < config.num_examples:
        rng = np.random.default_rng([0, trees_grown, config.seed])
        chunk = _generate_chunk(config, rng, chunk_trees)
        trees_grown += chunk_trees
        data = chunk.tokens.tobytes()
        for start, end, label in zip(
            chunk.offsets[:-1].tolist(),
            chunk.offsets[1:].tolist(),
            chunk.labels.tolist(),
            strict=True,
        ):
            text = data[start:end]
            digest = hashlib.blake2b(text, digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                texts.append(text)
                labels.append(label)
        progress(min(len(texts), config.num_examples))
        if trees_grown - trees_checked >= _PATIENCE_TREES:
            if len(texts) - examples_checked < min(_PATIENCE_EXAMPLES, config.num_examples):
                raise DataError(
                    f"num_train + num_valid + num_test asks for {config.num_examples} distinct "
                    f"examples, but {trees_grown} random trees gave only {len(texts)}: widen "
                    f"min_length={config.min_length} .. max_length={config.max_length}, raise "
                    f"max_depth={config.max_depth} or max_args={config.max_args}, or ask for fewer"
                )
            trees_checked, examples_checked = trees_grown, len(texts)

    # Frequent (short) expressions are found first, so splits are cut from a random order.
    rng = np.random.default_rng([1, 0, config.seed])
    order = rng.permutation(config.num_examples)
    lengths = [len(texts[i]) for i in order]
    return Examples(
        tokens=np.frombuffer(b"".join(texts[i] for i in order), np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.array(labels, np.uint8)[order],
    )


def _longest_subtrees(config: ListOpsConfig) -> list[int]:
    """The most tokens a subtree rooted at depth 1, 2, ..., max_depth can have.

    Capped at max_length, beyond which it makes no difference.
    """
    longest = [1]
    for _ in range(config.max_depth - 1):
        longest.append(min(2 + config.max_args * longest[-1], config.max_length))
    return longest[::-1]


def _generate_chunk(config: ListOpsConfig, rng: np.random.Generator, num_trees: int) -> Examples:
    levels = _grow_trees(config, rng, num_trees)
    symbols = [
        np.where(
            num_args > 0,
            rng.integers(NUM_OPERATORS, size=num_args.size, dtype=np.uint8),
            rng.integers(10, size=num_args.size, dtype=np.uint8),
        )
        for num_args in levels
    ]
    sizes, labels = _evaluate_trees(levels, symbols)
    offsets = np.concatenate([[0], np.cumsum(sizes[0])])
    return Examples(_lay_out_tokens(levels, symbols, sizes, offsets), offsets, labels)


def _grow_trees(
    config: ListOpsConfig, rng: np.random.Generator, num_trees: int
) -> list[Int[np.ndarray, " _"]]:
    """Grows random trees level by level; returns those whose length falls in the window.

    Returns:
      For each depth the number of arguments of every node (0 for a digit), tree after tree; the
      children of one level's operators, in order, are the next level's nodes.
    """
    longest = _longest_subtrees(config)
    levels = []
    tree = np.arange(num_trees)
    length = np.zeros(num_trees, np.int64)
    wanted = np.ones(num_trees, bool)
    for depth in range(1, config.max_depth + 1):
        num_args = np.zeros(tree.size, np.int64)
        if depth < config.max_depth:
            draws = rng.random(tree.size, dtype=np.float32)
            operators = np.flatnonzero(draws < config.operator_probability)
            num_args[operators] = rng.integers(
                config.min_args, config.max_args + 1, size=operators.size
            )
        else:
            operators = np.empty(0, np.int64)
        levels.append((tree, num_args))

        length += np.bincount(tree, minlength=num_trees)
        length += np.bincount(tree[operators], minlength=num_trees)
        children = np.zeros(num_trees, np.int64)
        np.add.at(children, tree[operators], num_args[operators])
        # Each child adds between 1 token and the longest subtree: trees that cannot end in the
        # window are not worth growing.
        child_longest = longest[depth] if depth < config.max_depth else 0
        wanted &= length + children < config.max_length
        wanted &= length + children * child_longest > config.min_length
        growing = operators[wanted[tree[operators]]]
        if not growing.size:
            break
        tree = np.repeat(tree[growing], num_args[growing])

    return [num_args[wanted[tree]] for tree, num_args in levels]


def _evaluate_trees(
    levels: list[Int[np.ndarray, " _"]], symbols: list[UInt8[np.ndarray, " _"]]
) -> tuple[list[Int[np.ndarray, " _"]], UInt8[np.ndarray, " num_trees"]]:
    """Returns every subtree's number of tokens, by level, and every root's value."""
    sizes = []
    child_sizes, child_values = np.empty(0, np.int64), np.empty(0, np.uint8)
    for num_args, symbol in zip(reversed(levels), reversed(symbols), strict=True):
        operators = np.flatnonzero(num_args)
        size, value = np.ones(num_args.size, np.int64), symbol.copy()
        if operators.size:
            count = num_args[operators]
            start = np.cumsum(count) - count
            size[operators] = 2 + np.add.reduceat(child_sizes, start)
            value[operators] = _apply_operators(symbol[operators], child_values, start, count)
        sizes.append(size)
        child_sizes, child_values = size, value
    return sizes[::-1], child_values


def _apply_operators(
    operator: UInt8[np.ndarray, " n"],
    values: UInt8[np.ndarray, " num_values"],
    start: Int[np.ndarray, " n"],
    count: Int[np.ndarray, " n"],
) -> UInt8[np.ndarray, " n"]:
    """Applies operator i to `values[start[i] : start[i] + count[i]]`."""
    column = np.arange(count.max())
    index = np.minimum(start[:, None] + column, values.size - 1)
    # 10 sorts after every digit, so row i's first count[i] entries are its sorted arguments.
    argument = np.sort(np.where(column < count[:, None], values[index], np.uint8(10)), axis=1)
    row = np.arange(count.size)
    minimum, maximum = argument[:, 0], argument[row, count - 1]
    median = (argument[row, (count - 1) // 2] + argument[row, count // 2]) // 2
    total = np.add.reduceat(values, start, dtype=np.int64) % 10
    return np.choose(operator, [minimum, maximum, median, total]).astype(np.uint8)


def _lay_out_tokens(
    levels: list[Int[np.ndarray, " _"]],
    symbols: list[UInt8[np.ndarray, " _"]],
    sizes: list[Int[np.ndarray, " _"]],
    offsets: Int[np.ndarray, " num_offsets"],
) -> UInt8[np.ndarray, " total"]:
    """Writes the trees in prefix order, each from its offset on."""
    tokens = np.empty(offsets[-1], np.uint8)
    position = offsets[:-1]
    for level, (num_args, symbol, size) in enumerate(zip(levels, symbols, sizes, strict=True)):
        operators = np.flatnonzero(num_args)
        tokens[position] = symbol + np.where(num_args > 0, FIRST_OPERATOR, FIRST_DIGIT)
        tokens[position[operators] + size[operators] - 1] = CLOSE
        if level + 1 < len(levels):
            count = num_args[operators]
            before = np.cumsum(sizes[level + 1]) - sizes[level + 1]
            shift = position[operators] + 1 - before[np.cumsum(count) - count]
            position = before + np.repeat(shift, count)
    return tokens
