"""LRA ListOps: read the sum of a nested list expression as a ten-way classification.

`prepare_listops` generates the data set once and keeps it on disk; `load_listops_tsv` reads a
published copy. Both give random-access splits for `yoso_jax.data.pipeline`.
"""

import dataclasses
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from yoso_jax.data.listops_generator import (
    CLOSE,
    FIRST_DIGIT,
    FIRST_OPERATOR,
    GENERATOR_VERSION,
    NUM_OPERATORS,
    VOCAB,
    Examples,
    ListOpsConfig,
    generate_examples,
)
from yoso_jax.errors import DataError

Tokens = Integer[np.ndarray, " length"] | Iterable[int]

_ID = {token: i for i, token in enumerate(VOCAB) if i > 0}
_MANIFEST = "manifest.json"
_SPLITS = ("train", "valid", "test")
_ARRAYS = ("tokens", "offsets", "labels")


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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ListOpsSplit:
    """Examples by index: `split[i]` is `{"input_ids": int32 [length], "labels": int}`.

    Attributes:
      tokens: ids of all examples, end to end.
      offsets: example i is `tokens[offsets[i]:offsets[i + 1]]`.
      labels: values, 0..9.
    """

    tokens: UInt8[np.ndarray, " total"]
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
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        return {"input_ids": np.array(tokens, np.int32), "labels": int(self.labels[index])}

    def __repr__(self) -> str:
        return f"ListOpsSplit(num_examples={len(self)})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _MappedSplit(ListOpsSplit):
    """A split mapped from the cache. Pickled as its place on disk, so data workers share it."""

    folder: Path
    name: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_split, (self.folder, self.name)


def _open_split(folder: Path, name: str) -> _MappedSplit:
    tokens, offsets, labels = (
        np.load(folder / f"{name}_{kind}.npy", mmap_mode="r") for kind in _ARRAYS
    )
    return _MappedSplit(tokens, offsets, labels, folder, name)


@dataclasses.dataclass(frozen=True)
class ListOpsData:
    """The three splits and the cache folder they are mapped from."""

    train: ListOpsSplit
    valid: ListOpsSplit
    test: ListOpsSplit
    folder: Path


def prepare_listops(config: ListOpsConfig, cache_dir: str | os.PathLike[str]) -> ListOpsData:
    """Loads the data set from `cache_dir`, generating it on first use.

    The cache is one folder per config, complete or absent: it is written aside and renamed, so an
    interrupted run leaves nothing behind and two processes may prepare at once. Every file's hash
    is checked on load. Progress is shown when stderr is a terminal.

    Args:
      config: what to generate.
      cache_dir: created if missing. The LRA data set takes 105 MB there.

    Raises:
      DataError: the cache is damaged (the message names the file), or `config` asks for
        more distinct examples than can be found.
      OSError: `cache_dir` cannot be written.
    """
    folder = Path(cache_dir) / f"listops-{_config_hash(config)}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Made before generating, so that a folder that cannot be written fails at once.
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as scratch:
            aside = Path(scratch) / folder.name
            aside.mkdir()
            _write_cache(config, _generate_with_progress(config), aside)
            try:
                aside.rename(folder)
            except OSError:
                # Another process was faster; its files are the same.
                if not (folder / _MANIFEST).exists():
                    raise
    return _read_cache(config, folder)


def load_listops_tsv(path: str | os.PathLike[str]) -> ListOpsSplit:
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
    return ListOpsSplit(
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


def _config_hash(config: ListOpsConfig) -> str:
    identity = {"generator_version": GENERATOR_VERSION, **dataclasses.asdict(config)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _generate_with_progress(config: ListOpsConfig) -> Examples:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task("Generating ListOps", total=config.num_examples)
        return generate_examples(config, lambda done: bar.update(task, completed=done))


def _write_cache(config: ListOpsConfig, examples: Examples, folder: Path) -> None:
    splits: dict[str, Any] = {}
    files: dict[str, Any] = {}
    first = 0
    for name in _SPLITS:
        size = getattr(config, f"num_{name}")
        offsets = examples.offsets[first : first + size + 1]
        labels = examples.labels[first : first + size]
        tokens = examples.tokens[offsets[0] : offsets[-1]]
        for kind, array in zip(_ARRAYS, (tokens, offsets - offsets[0], labels), strict=True):
            buffer = io.BytesIO()
            np.save(buffer, array)
            data = buffer.getbuffer()
            (folder / f"{name}_{kind}.npy").write_bytes(data)
            files[f"{name}_{kind}.npy"] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        lengths = np.diff(offsets)
        splits[name] = {
            "num_examples": size,
            "label_histogram": np.bincount(labels, minlength=10).tolist(),
            "length": {
                "min": int(lengths.min()),
                "mean": float(lengths.mean()),
                "max": int(lengths.max()),
            },
        }
        first += size
    manifest = {
        "generator_version": GENERATOR_VERSION,
        "config": dataclasses.asdict(config),
        "vocab": VOCAB,
        "splits": splits,
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _read_cache(config: ListOpsConfig, folder: Path) -> ListOpsData:
    path = folder / _MANIFEST
    remedy = f"delete the folder {folder} to generate it again"
    try:
        manifest = json.loads(path.read_text())
        files = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
        found = {"generator_version": manifest["generator_version"], **manifest["config"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable ListOps manifest ({error!r}); {remedy}") from error
    wanted = {"generator_version": GENERATOR_VERSION, **dataclasses.asdict(config)}
    differing = sorted(key for key in wanted | found if wanted.get(key) != found.get(key))
    if differing:
        raise DataError(f"{path}: made with another {', '.join(differing)}; {remedy}")

    for name in (f"{split}_{kind}.npy" for split in _SPLITS for kind in _ARRAYS):
        file = folder / name
        if name not in files or not file.exists():
            raise DataError(f"{file}: missing from the ListOps cache; {remedy}")
        num_bytes, sha256 = files[name]
        if file.stat().st_size != num_bytes:
            raise DataError(
                f"{file}: damaged, {file.stat().st_size} bytes instead of {num_bytes}; {remedy}"
            )
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                raise DataError(f"{file}: damaged, its SHA-256 differs from {path}'s; {remedy}")
    return ListOpsData(*(_open_split(folder, split) for split in _SPLITS), folder=folder)
