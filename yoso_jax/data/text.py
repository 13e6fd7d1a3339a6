"""LRA Text: classify a document from its bytes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import UInt16

from yoso_jax.data.splits import TaskData, TokenSplit, lay_end_to_end, split_by_fraction
from yoso_jax.errors import DataError
from yoso_jax.validation import Validated

BYTE_VOCAB_SIZE = 257
"""Byte b has id b + 1: 0 is padding."""


@dataclasses.dataclass(frozen=True)
class TextConfig(Validated):
    """Documents to read from `data_dir`.

    Attributes:
      source: `imdb`, the folders `train/pos`, `train/neg`, `test/pos` and `test/neg` of the Large
        Movie Review Dataset; or `mail`, the folders `ham` and `spam`. Every file below a folder is
        one document. Of a mail it is the body: headers say where it was collected. Empty ones and
        second copies are left out, and the splits are drawn.
      valid_fraction: of the training documents (of all, for `mail`) to validate on, in (0, 0.5).
      test_fraction: of all documents to test on, for `mail`, in (0, 0.5).
      seed: >= 0; draws the splits.

    Raises:
      ValueError: a field is out of range; the message names it.
    """

    task: ClassVar[str] = "text"

    source: Literal["imdb", "mail"] = "imdb"
    valid_fraction: float = 0.1
    test_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choice("source", ("imdb", "mail"))
        for name in ("valid_fraction", "test_fraction"):
            self._check_number(name, "in (0, 0.5)", lambda value: 0 < value < 0.5)
        self._check_integer("seed", 0)


def load_text(config: TextConfig, folder: Path, max_length: int) -> TaskData:
    """Reads the documents; label 1 is a positive review, or spam.

    Args:
      config: what to read.
      folder: see `TextConfig.source`.
      max_length: bytes of a document to keep; the rest is cut off.

    Raises:
      DataError: a folder is missing, or a file is empty or cannot be read; the message names it.
    """
    if config.source == "imdb":
        train_texts, train_labels = _read_classes(folder / "train", ("neg", "pos"), max_length)
        test = _make_split(*_read_classes(folder / "test", ("neg", "pos"), max_length))
        fractions = [config.valid_fraction]
    else:
        # Copies of a mail would otherwise be in two splits.
        labels: dict[bytes, int] = {}
        for label, name in enumerate(("ham", "spam")):
            for mail in read_files(folder / name).values():
                _, body = split_mail(mail)
                if body:
                    labels.setdefault(body[:max_length], label)
        train_texts, train_labels = list(labels), list(labels.values())
        test = None
        fractions = [config.valid_fraction, config.test_fraction]
    try:
        parts = split_by_fraction(len(train_texts), fractions, config.seed)
    except ValueError as error:
        raise DataError(f"the documents in {folder}: {error}") from None
    splits = [
        _make_split([train_texts[i] for i in part], [train_labels[i] for i in part])
        for part in parts
    ]
    if test is not None:
        splits.append(test)
    return TaskData(*splits, folder=folder)


def split_mail(mail: bytes) -> tuple[bytes, bytes]:
    """The headers and the body of a mail, with Unix line ends."""
    head, _, body = mail.replace(b"\r\n", b"\n").partition(b"\n\n")
    return head, body.strip()


def encode_bytes(text: bytes) -> UInt16[np.ndarray, " length"]:
    """The ids of a text, 1..256."""
    return np.frombuffer(text, np.uint8).astype(np.uint16) + np.uint16(1)


def read_files(folder: Path, max_length: int | None = None) -> dict[str, bytes]:
    """Reads all files below a folder, by their path in it, in the order of the paths.

    Args:
      folder: hidden files in it are passed over.
      max_length: bytes of a file to read; None for all.

    Raises:
      DataError: the folder is missing or holds no file, or a file cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    if not paths:
        raise DataError(f"there is no file in {folder}")
    texts = {}
    for name in sorted(paths):
        try:
            with paths[name].open("rb") as file:
                texts[name] = file.read(-1 if max_length is None else max_length)
        except OSError as error:
            raise DataError(f"cannot read {paths[name]}: {error.strerror}") from error
    return texts


def _read_classes(
    folder: Path, names: Sequence[str], max_length: int
) -> tuple[list[bytes], list[int]]:
    texts: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = read_files(folder / name, max_length)
        for file, text in files.items():
            if not text:
                raise DataError(f"{folder / name / file} is empty")
        texts += files.values()
        labels += [label] * len(files)
    return texts, labels


def _make_split(texts: Sequence[bytes], labels: Sequence[int]) -> TokenSplit:
    tokens, offsets = lay_end_to_end([encode_bytes(text) for text in texts])
    return TokenSplit(tokens, offsets, np.array(labels, np.uint8))
