"""LRA ListOps: read the sum of a nested list expression as a ten-way classification.

`prepare_listops` generates the data set once and keeps it on disk; `load_listops_tsv` reads a
published copy. Both give random-access splits for `yoso_jax.data.pipeline`.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from yoso_jax.data.cache import Recipe, load_or_generate
from yoso_jax.data.listops_generator import (
    CLOSE,
    FIRST_DIGIT,
    FIRST_OPERATOR,
    GENERATOR_VERSION,
    NUM_OPERATORS,
    VOCAB,
    ListOpsConfig,
    generate_examples,
)
from yoso_jax.data.splits import TaskData, TokenSplit
from yoso_jax.errors import DataError

Tokens = Integer[np.ndarray, " length"] | Iterable[int]

_ID = {token: i for i, token in enumerate(VOCAB) if i > 0}


def to_text(tokens: Tokens) -> str:
    """Spells token ids as text, e.g. `"[MAX 2 9 [MIN 4 7 ] 0 ]"`; padding is left out."""
    return " ".join(VOCAB[token] for token in tokens if token)


def from_text(text: str) -> UInt8[np.ndarray, " length"]:
    """Reads tokens separated by spaces; the published copies' parentheses are dropped.

    Raises:
      ValueError: a token that is not in `VOCAB`.
    """
    try:
        words = text.replace("(", " ").replace(")", " ").split()
        return np.array([_ID[word] for word in words], np.uint8)
    except KeyError as error:
        raise ValueError(
            f"unknown ListOps token {error.args[0]!r}; accepted: {' '.join(_ID)} ( )"
        ) from None


def evaluate(expression: str | Tokens) -> int:
    """Evaluates one expression, the slow and obvious way.

    MED of an even number of arguments is the mean of the middle two, rounded down; SM is the sum
    modulo 10.

    Args:
      expression: text, or token ids (padding is ignored).

    Returns:
      The value, 0..9.

    Raises:
      ValueError: the expression is not well formed.
    """
    tokens = from_text(expression) if isinstance(expression, str) else expression
    stack: list[list[Any]] = [[None]]
    for token in tokens:
        word = VOCAB[token]
        if word.isdigit():
            stack[-1].append(int(word))
        elif word.startswith("["):
            stack.append([word])
        elif word == "]":
            if len(stack) == 1 or len(stack[-1]) == 1:
                raise ValueError("']' without an operator and at least one argument before it")
            operator, *arguments = stack.pop()
            stack[-1].append(_apply(operator, arguments))
    if len(stack) > 1:
        raise ValueError(f"{len(stack) - 1} operators lack their closing ']'")
    if len(stack[0]) != 2:
        raise ValueError(f"expected one expression, got {len(stack[0]) - 1}")
    return stack[0][1]


def _apply(operator: str, arguments: list[int]) -> int:
    if operator == "[MIN":
        return min(arguments)
    if operator == "[MAX":
        return max(arguments)
    if operator == "[SM":
        return sum(arguments) % 10
    ordered, middle = sorted(arguments), len(arguments) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def prepare_listops(config: ListOpsConfig, cache_dir: str | os.PathLike[str]) -> TaskData:
    """Loads the data set from `cache_dir`, generating it on first use.

    Args:
      config: what to generate.
      cache_dir: created if missing; see `yoso_jax.data.cache`. The LRA data set takes 105 MB there.

    Raises:
      DataError: the cache is damaged (the message names the file), or `config` asks for
        more distinct examples than can be found.
      OSError: `cache_dir` cannot be written.
    """
    recipe = Recipe(
        name="ListOps",
        generator_version=GENERATOR_VERSION,
        config=dataclasses.asdict(config),
        num_labels=10,
        notes={"vocab": VOCAB},
    )
    return load_or_generate(recipe, lambda progress: generate_examples(config, progress), cache_dir)


def read_published(folder: str | os.PathLike[str]) -> TaskData:
    """Reads `basic_train.tsv`, `basic_val.tsv` and `basic_test.tsv`; see `load_listops_tsv`."""
    train, valid, test = (
        load_listops_tsv(Path(folder) / f"basic_{name}.tsv") for name in ("train", "val", "test")
    )
    return TaskData(train=train, valid=valid, test=test, folder=Path(folder))


def load_listops_tsv(path: str | os.PathLike[str]) -> TokenSplit:
    """Reads one split in the published LRA format, a TSV with columns Source and Target.

    Args:
      path: e.g. `basic_train.tsv`. Sources look like `( ( ( [MAX 2 ) 9 ) ] )`; the parentheses,
        which only record how the file was written, are dropped.

    Returns:
      The split, in memory.

    Raises:
      DataError: the message names the file and the line. Copies that lost their closing brackets
        are refused: without them an expression has many readings, so no model can solve the task.
    """
    path = Path(path)
    texts: list[bytes] = []
    labels: list[int] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline().rstrip("\r\n").split("\t")
        if header != ["Source", "Target"]:
            raise DataError(f"{path}, line 1: expected the columns Source and Target, got {header}")
        for number, line in enumerate(file, start=2):
            try:
                tokens, label = _parse_row(line.rstrip("\r\n"))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
            texts.append(tokens.tobytes())
            labels.append(label)
    if not labels:
        raise DataError(f"{path}: no examples after the header")
    return TokenSplit(
        tokens=np.frombuffer(b"".join(texts), np.uint8),
        offsets=np.concatenate([[0], np.cumsum([len(text) for text in texts])]),
        labels=np.array(labels, np.uint8),
    )


def _parse_row(line: str) -> tuple[UInt8[np.ndarray, " length"], int]:
    source, separator, target = line.partition("\t")
    if not separator:
        raise ValueError("expected Source and Target separated by a tab")
    if target not in VOCAB[FIRST_DIGIT:FIRST_OPERATOR]:
        raise ValueError(f"Target must be a digit 0..9, got {target!r}")
    tokens = from_text(source)
    if not tokens.size:
        raise ValueError("Source is empty")
    opens = (tokens >= FIRST_OPERATOR) & (tokens < FIRST_OPERATOR + NUM_OPERATORS)
    closes = tokens == CLOSE
    if opens.any() and not closes.any():
        raise ValueError(
            "Source has no closing brackets ']': this copy of the data lost them, and without them "
            "the expressions are ambiguous and the task cannot be solved; get a copy that has them"
        )
    # Brackets close exactly at the last token in one well-formed expression. Values are not
    # recomputed: that would take a minute on the published training file.
    depth = np.cumsum(opens.astype(np.int64) - closes)
    if depth[-1] != 0 or (depth[:-1] <= 0).any() or (opens[:-1] & closes[1:]).any():
        raise ValueError("Source is not one well-formed expression: its brackets do not match")
    return tokens, int(target)
