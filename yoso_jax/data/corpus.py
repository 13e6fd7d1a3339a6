"""Folders of text to streams of tokens, kept on disk."""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from yoso_jax.data.cache import SPLITS, Recipe, load_or_make, progress_bar
from yoso_jax.data.mlm import MLMConfig, MLMData
from yoso_jax.data.packing import Tokens, TokenStream
from yoso_jax.data.splits import split_by_fraction
from yoso_jax.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    read_vocabulary,
    train_byte_level_bpe,
)
from yoso_jax.data.vocabulary import Vocabulary
from yoso_jax.errors import DataError

_VERSION = 1
"""Changes when the same documents would become other tokens."""

# The library needs a few hundred bytes for each token it returns.
_CHARACTERS_AT_ONCE = 2**21


@dataclasses.dataclass(frozen=True)
class Document:
    """A file of text, and the SHA-256 of its contents."""

    path: Path
    sha256: str

    def read(self) -> str:
        """The text, with Unix line ends.

        Raises:
            DataError: it cannot be read, or has changed; the message names it.
        """
        contents = _read_bytes(self.path)
        if hashlib.sha256(contents).hexdigest() != self.sha256:
            raise DataError(f"{self.path} has changed while it was read")
        try:
            return contents.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8: {error}") from error


def load_mlm(config: MLMConfig, folder: Path) -> MLMData:
    """Reads a corpus; on first use tokenises it, and trains the tokenizer if none is named.

    Both are kept in `folder`: `tokenizer-*.json`, and a folder `mlm-*` of memory-mapped arrays,
    which appears whole or not at all and is checked each time. The names are fingerprints of all
    that the contents depend on: the documents, how they are divided, and the tokenizer.

    Args:
        config: says which documents, which of them are for what, and the tokenizer.
        folder: has the corpora in it.

    Raises:
        DataError: a folder or file is missing or damaged, there are too few documents, or the
            tokenizer cannot be used.
        OSError: `folder` cannot be written.
    """
    documents = find_documents([folder / name for name in config.corpora])
    fractions = [config.valid_fraction, config.test_fraction]
    try:
        parts = split_by_fraction(len(documents), fractions, config.seed)
    except ValueError as error:
        raise DataError(f"the documents in {folder}: {error}") from None
    splits = {
        name: [documents[number] for number in part]
        for name, part in zip(SPLITS, parts, strict=True)
    }
    path = None if config.tokenizer is None else Path(config.tokenizer)
    if path is None:
        path = _train_tokenizer(splits["train"], config.vocab_size, folder)
    tokenizer = load_tokenizer(path)
    vocabulary = read_vocabulary(tokenizer)
    recipe = Recipe(
        name="MLM",
        generator_version=_VERSION,
        config={
            "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
            **{name: _fingerprint(files) for name, files in splits.items()},
        },
        notes={"documents": {name: len(files) for name, files in splits.items()}},
    )

    def make() -> tuple[dict[str, np.ndarray], dict[str, dict[str, int]]]:
        arrays: dict[str, np.ndarray] = {}
        with progress_bar("Tokenising documents", len(documents)) as update:
            done = 0
            for name, files in splits.items():
                arrays[f"{name}_tokens"], arrays[f"{name}_word_starts"] = tokenize(
                    files, tokenizer, vocabulary, lambda number, done=done: update(done + number)
                )
                done += len(files)
        return arrays, {"tokens": {name: arrays[f"{name}_tokens"].size for name in SPLITS}}

    names = [f"{name}_{kind}" for name in SPLITS for kind in ("tokens", "word_starts")]
    cache = load_or_make(recipe, names, make, folder)
    return MLMData(
        *(TokenStream(cache, name) for name in SPLITS),
        vocabulary=vocabulary,
        tokenizer=path,
        folder=folder,
    )


def find_documents(folders: Sequence[Path]) -> list[Document]:
    """The `.txt` files below folders, in the order of folders and paths.

    Hidden ones, ones without text and second copies, which could be in two splits, are left out.

    Raises:
        DataError: a folder is missing or has no such file, or a file cannot be read.
    """
    found: dict[str, Document] = {}
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}")
        files = [
            path
            for path in folder.rglob("*.txt")
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]
        if not files:
            raise DataError(f"there is no .txt file in {folder}")
        for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
            contents = _read_bytes(path)
            if contents.strip():
                sha256 = hashlib.sha256(contents).hexdigest()
                found.setdefault(sha256, Document(path, sha256))
    return list(found.values())


def tokenize(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    update: Callable[[int], None] = lambda number: None,
) -> tuple[Tokens, Bool[np.ndarray, " total"]]:
    """Lays documents end to end, each followed by the id that ends one.

    Special tokens that are written out in a text, such as `<mask>` in a manual, are text. A
    document of more than 2 million characters is tokenised in pieces that end with a line.

    Args:
        documents: the texts.
        tokenizer: makes the ids; it puts no special tokens around.
        vocabulary: its.
        update: is called with the number of documents done.

    Returns:
        The ids, and True on those that begin a word.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    dtype = np.uint16 if vocabulary.size <= 2**16 else np.uint32
    ids, starts = [], []
    done = 0
    for batch in _batches(documents):
        encodings = tokenizer.encode_batch([text for text, _ in batch], add_special_tokens=False)
        for encoding, (_, is_last) in zip(encodings, batch, strict=True):
            words = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
            ids.append(np.array(encoding.ids, dtype))
            starts.append(np.diff(words, prepend=-2) != 0)
            if is_last:
                ids.append(np.array([vocabulary.eos], dtype))
                starts.append(np.array([True]))
                done += 1
        update(done)
    return np.concatenate(ids), np.concatenate(starts)


def _batches(documents: Sequence[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents, a few million characters at a time, and whether each is a last one."""
    batch, size = [], 0
    for document in documents:
        pieces = list(_divide(document.read()))
        for number, piece in enumerate(pieces, 1):
            batch.append((piece, number == len(pieces)))
            size += len(piece)
            if size >= _CHARACTERS_AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _divide(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _CHARACTERS_AT_ONCE:
        end = text.rfind("\n", start, start + _CHARACTERS_AT_ONCE) + 1
        end = end or start + _CHARACTERS_AT_ONCE  # one endless line
        yield text[start:end]
        start = end
    yield text[start:]


def _train_tokenizer(documents: Sequence[Document], vocab_size: int, folder: Path) -> Path:
    recipe = {"version": _VERSION, "vocab_size": vocab_size, "documents": _fingerprint(documents)}
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"tokenizer-{name}.json"
    if not path.exists():
        with progress_bar("Training the tokenizer", len(documents)) as update:

            def texts() -> Iterator[str]:
                for number, document in enumerate(documents, 1):
                    yield document.read()
                    update(number)

            tokenizer = train_byte_level_bpe(texts(), vocab_size)
        # Aside and renamed, under a name that no other process uses.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=folder) as scratch:
            aside = Path(scratch) / path.name
            aside.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            aside.replace(path)
    return path


def _fingerprint(documents: Sequence[Document]) -> str:
    return hashlib.sha256("".join(each.sha256 for each in documents).encode()).hexdigest()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
