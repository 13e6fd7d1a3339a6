"""Tokenizers that are trained, corpora and their cache, blocks."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlm_helpers import make_stream, random_documents, write_corpus

from yoso_jax.data import corpus
from yoso_jax.data.corpus import find_documents, load_mlm, tokenize
from yoso_jax.data.mlm import MLMConfig
from yoso_jax.data.packing import Blocks
from yoso_jax.data.tokenizer import load_tokenizer, read_vocabulary, train_byte_level_bpe
from yoso_jax.errors import DataError

CONFIG = MLMConfig(corpora=("texts",), vocab_size=300, valid_fraction=0.2, test_fraction=0.2)
TEXTS = [
    "The cat's <mask> sat on the mat.\n\nThe cat sat!\n",
    "\tNaïve cats, 12 of them; s'il vous plaît </s>",
]


# Tokenizers


def test_trained_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_byte_level_bpe(TEXTS * 3, 300)
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.id_to_token(299) == "<mask>"
    assert tokenizer.get_vocab_size() == 300
    again = train_byte_level_bpe(iter(TEXTS * 3), 300)
    assert again.to_str() == tokenizer.to_str()
    # More merges than the texts have: the mask is the last all the same.
    few = train_byte_level_bpe(["ab ab"], 1000)
    assert few.token_to_id("<mask>") == few.get_vocab_size() - 1 < 300

    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    loaded = load_tokenizer(path)
    for text in TEXTS:
        ids = loaded.encode(text, add_special_tokens=False).ids
        assert loaded.decode(ids, skip_special_tokens=False) == text.replace(" <mask>", "<mask>")
    ids = loaded.encode("The <mask> sat").ids
    assert (ids[0], ids[-1]) == (0, 2)
    assert 299 in ids


def test_vocabulary() -> None:
    tokenizer = train_byte_level_bpe(['He said "no." (Why?) Etc.'] * 3, 290)
    vocabulary = read_vocabulary(tokenizer)
    mask = tokenizer.get_vocab_size() - 1
    assert (vocabulary.bos, vocabulary.pad, vocabulary.eos) == (0, 1, 2)
    assert (vocabulary.mask, vocabulary.size) == (mask, mask + 1)
    np.testing.assert_array_equal(vocabulary.ordinary, np.arange(4, mask))
    ends = {tokenizer.id_to_token(i) for i in np.flatnonzero(vocabulary.sentence_ends)}
    assert {".", "!", "?"} <= ends
    assert all(any(mark in token for mark in ".!?") for token in ends)


def test_word_pieces_have_a_vocabulary(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = read_vocabulary(tokenizer)
    assert (vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.mask) == (2, 3, 0, 4)
    assert vocabulary.ordinary.tolist() == [5, 6, 7, 8]
    (tmp_path / "a.txt").write_text("The cats. [SEP]")
    ids, starts = tokenize(find_documents([tmp_path])[:1], tokenizer, vocabulary)
    assert [tokenizer.id_to_token(i) for i in ids] == [
        *("the", "cat", "##s", ".", "[UNK]", "[UNK]", "[UNK]", "[SEP]")
    ]
    assert starts.tolist() == [True, True, False, True, True, True, True, True]


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "texts", 5)
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "</s>": 1, "<mask>": 2, "a": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = MLMConfig(corpora=("texts",), tokenizer=str(tmp_path))
    with pytest.raises(DataError, match=r"vocabulary has neither <pad> nor \[PAD\]"):
        load_mlm(config, tmp_path)


# Corpora


def test_documents(tmp_path: Path) -> None:
    texts = {
        "b.txt": "b",
        "a/z.txt": "z",
        "a/copy.txt": "b",
        "blank.txt": " \n",
        "empty.txt": "",
        ".hidden.txt": "h",
        ".cache/c.txt": "c",
        "source.json": "{}",
    }
    for name, text in texts.items():
        path = tmp_path / "one" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "z.txt").write_text("z")
    (tmp_path / "two" / "d.txt").write_bytes(b"d\r\ne")
    found = find_documents([tmp_path / "one", tmp_path / "two"])
    names = [document.path.relative_to(tmp_path).as_posix() for document in found]
    assert names == ["one/a/copy.txt", "one/a/z.txt", "two/d.txt"]
    assert [document.read() for document in found] == ["b", "z", "d\ne"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: [f.unlink() for f in folder.iterdir()], "there is no .txt file in .*texts"),
        (lambda folder: folder.rename(folder.parent / "away"), "there is no folder .*texts"),
        (lambda folder: [f.unlink() for f in folder.glob("*[1-9].txt")], "too few to divide"),
        (lambda folder: (folder / "000.txt").write_bytes(b"\xff"), "000.txt is not UTF-8"),
    ],
    ids=["empty", "missing", "too few", "bytes"],
)
def test_corpus_errors(tmp_path: Path, damage: Any, message: str) -> None:
    damage(write_corpus(tmp_path / "texts", 8))
    with pytest.raises(DataError, match=message):
        load_mlm(CONFIG, tmp_path)
    assert not list(tmp_path.glob("mlm-*"))


def test_corpus(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "texts", 20)
    data = load_mlm(CONFIG, tmp_path)
    tokenizer = load_tokenizer(data.tokenizer)
    assert data.tokenizer.parent == tmp_path
    found, sizes = [], []
    for stream in (data.train, data.valid, data.test):
        ends = np.flatnonzero(stream.tokens == 2)
        assert ends[-1] == len(stream) - 1
        parts = np.split(stream.tokens, ends + 1)[:-1]
        texts = [tokenizer.decode(part[:-1].tolist()) for part in parts]
        sizes.append(len(texts))
        found += texts
        begins = {tokenizer.id_to_token(i)[0] for i in stream.tokens[stream.word_starts]}
        assert begins <= {"T", "Ġ", ".", "Ċ", "<"}  # "The", " cat", "." and ends
    assert sizes == [12, 4, 4]
    everything = sorted(path.read_text() for path in folder.iterdir())
    assert sorted(found) == everything

    (cache,) = tmp_path.glob("mlm-*")
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["documents"] == {"train": 12, "valid": 4, "test": 4}
    assert manifest["tokens"]["train"] == len(data.train)


def test_tokens_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_corpus(tmp_path / "texts", 10)
    data = load_mlm(CONFIG, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "tokenize", None)
        patch.setattr(corpus, "train_byte_level_bpe", None)
        again = load_mlm(CONFIG, tmp_path)
        # How tokens are masked changes nothing about them.
        load_mlm(MLMConfig(**{**vars(CONFIG), "mask_rate": 0.3, "whole_words": True}), tmp_path)
    np.testing.assert_array_equal(again.train.tokens, data.train.tokens)
    assert pickle.loads(pickle.dumps(data.train)).folder == data.train.folder
    assert len(pickle.dumps(data.train)) < 1000

    # Naming the trained tokenizer gives the same tokens.
    named = MLMConfig(**{**vars(CONFIG), "tokenizer": str(data.tokenizer)})
    assert load_mlm(named, tmp_path).train.folder == data.train.folder
    for changes in ({"seed": 1}, {"vocab_size": 290}, {"test_fraction": 0.3}):
        other = load_mlm(MLMConfig(**{**vars(CONFIG), **changes}), tmp_path)
        assert other.train.folder != data.train.folder
    (folder / "000.txt").write_text("The text has changed.")
    assert load_mlm(named, tmp_path).train.folder != data.train.folder


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "texts", 10)
    file = load_mlm(CONFIG, tmp_path).train.folder / "valid_tokens.npy"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    with pytest.raises(DataError, match=r"valid_tokens.npy: damaged, its SHA-256 .*; delete the"):
        load_mlm(CONFIG, tmp_path)


def test_an_interrupted_preparation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "texts", 10)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    for name in ("train_byte_level_bpe", "tokenize"):
        with monkeypatch.context() as patch:
            patch.setattr(corpus, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                load_mlm(CONFIG, tmp_path)
    names = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert names == ["texts", "tokenizer"]


def test_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_corpus(tmp_path / "texts", 6)
    (folder / "long.txt").write_text("word" * 100)
    documents = find_documents([folder])
    tokenizer = train_byte_level_bpe((document.read() for document in documents), 300)
    vocabulary = read_vocabulary(tokenizer)
    whole = tokenize(documents, tokenizer, vocabulary)
    monkeypatch.setattr(corpus, "_CHARACTERS_AT_ONCE", 64)
    done = []
    parts = tokenize(documents, tokenizer, vocabulary, done.append)
    assert done[-1] == 7
    assert (parts[0] == 2).sum() == 7
    assert tokenizer.decode(parts[0].tolist()) == tokenizer.decode(whole[0].tolist())
    # Cut at the ends of lines, it is tokenised as the whole; a line that is too long is not.
    before = np.flatnonzero(whole[0] == 2)[5]
    np.testing.assert_array_equal(parts[0][:before], whole[0][:before])


def test_special_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    tokenizer = train_byte_level_bpe(TEXTS, 300)
    vocabulary = read_vocabulary(tokenizer)
    ids, _ = tokenize(find_documents([tmp_path]), tokenizer, vocabulary)
    assert ids.dtype == np.uint16
    assert vocabulary.mask not in ids
    assert np.flatnonzero(ids == vocabulary.eos).size == 2
    assert tokenizer.decode(ids.tolist()) == "".join(TEXTS)


# Blocks


@pytest.mark.parametrize("length", [1, 2, 7, 64, 5000])
def test_every_token_is_in_one_block(tmp_path: Path, length: int) -> None:
    stream = make_stream(tmp_path, random_documents(20))
    blocks = Blocks(stream, length)
    every = [blocks[i] for i in range(len(blocks))]
    assert [block.index for block in every] == list(range(len(blocks)))
    assert all(block.tokens.size == length for block in every[:-1])
    assert 1 <= every[-1].tokens.size <= length
    for kind in ("tokens", "word_starts"):
        joined = np.concatenate([getattr(block, kind) for block in every])
        np.testing.assert_array_equal(joined, getattr(stream, kind))
    with pytest.raises(IndexError, match="index must be in"):
        blocks[len(blocks)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("corpora", (), "corpora must be one or more names"),
        ("corpora", "brown", "corpora must be one or more names"),
        ("tokenizer", 3, "tokenizer must be a path or None"),
        ("vocab_size", 260, "vocab_size must be an integer >= 261, got 260"),
        ("valid_fraction", 0.5, r"valid_fraction must be a finite number in \(0, 0.5\)"),
        ("seed", -1, "seed must be an integer >= 0"),
        ("masking", "bert", "masking must be one of 'dynamic', 'static', got 'bert'"),
        ("mask_rate", 0, r"mask_rate must be a finite number in \(0, 1\), got 0"),
        ("mask_share", 1.5, r"mask_share must be a finite number in \[0, 1\]"),
        ("random_share", 0.3, r"random_share must be a finite number in \[0, 1 - mask_share\]"),
        ("whole_words", 1, "whole_words must be True or False, got 1"),
        ("sentence_order", None, "sentence_order must be True or False, got None"),
    ],
)
def test_fields_are_checked_by_name(
    field: str, value: Any, message: str, unchecked_shapes: None
) -> None:
    with pytest.raises(ValueError, match=message):
        MLMConfig(**{field: value})
