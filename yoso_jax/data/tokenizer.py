"""Reads or trains a tokenizer, with the library `tokenizers` of the extra `text`."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from yoso_jax.data.vocabulary import Vocabulary
from yoso_jax.errors import DataError

try:
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
except ImportError as error:
    raise ImportError(
        "reading text needs the package tokenizers: pip install 'yoso-jax[text]'"
    ) from error

# Where YosoConfig, like RoBERTa, has them by default: <s> is 0, <pad> 1 and </s> 2.
_FIRST_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
_KINDS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer that neither pads nor truncates.

    Args:
        path: a folder with tokenizer.json, or vocab.json and merges.txt (RoBERTa's byte-level BPE),
            or vocab.txt (BERT's WordPiece), the first of these that is there; or such a file. Text
            is lower-cased for a vocab.txt without capital letters.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    file = path
    if path.is_dir():
        kinds = [names for names in _KINDS if all((path / name).is_file() for name in names)]
        if not kinds:
            raise DataError(
                f"there is no tokenizer in {path}: it is tokenizer.json, or vocab.json and "
                "merges.txt, or vocab.txt"
            )
        file = path / kinds[0][0]
    try:
        if file.name in ("vocab.json", "merges.txt"):
            tokenizer = _read_byte_level_bpe(file.parent)
        elif file.suffix == ".txt":
            tokenizer = _read_word_piece(file)
        else:
            tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"cannot read the tokenizer {file}: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def find_mask_token(tokenizer: Tokenizer) -> tuple[str, int]:
    """The token that stands for a masked word, and its id.

    Raises:
        DataError: the vocabulary has none of the usual ones.
    """
    for token in ("<mask>", "[MASK]"):
        index = tokenizer.token_to_id(token)
        if index is not None:
            return token, index
    raise DataError("the tokenizer's vocabulary has neither <mask> nor [MASK]")


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains RoBERTa's kind of tokenizer; the same texts always give the same one.

    Args:
        texts: to learn from. Pairs of tokens seen only once are never merged.
        vocab_size: ids in all, at least 261: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, the 256
            bytes, merged tokens, and last `<mask>`. There are fewer if the texts run out of pairs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        special_tokens=list(_FIRST_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_byte_level(tokenizer)


def read_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """What the ids of a tokenizer stand for.

    Raises:
        DataError: it lacks a token that marks the begin or end of a text, pads or masks.
    """
    tokens = tokenizer.get_vocab()
    special = {
        "bos": ("<s>", "[CLS]"),
        "eos": ("</s>", "[SEP]"),
        "pad": ("<pad>", "[PAD]"),
        "mask": ("<mask>", "[MASK]"),
    }
    ids: dict[str, int] = {}
    for name, accepted in special.items():
        found = [tokens[token] for token in accepted if token in tokens]
        if not found:
            raise DataError(f"the tokenizer's vocabulary has neither {' nor '.join(accepted)}")
        ids[name] = found[0]
    added = tokenizer.get_added_tokens_decoder()
    excluded = {*ids.values(), *(index for index, token in added.items() if token.special)}
    size = max(tokens.values()) + 1
    ends = np.zeros(size, np.bool_)
    for token, index in tokens.items():
        ends[index] = index not in excluded and token.rstrip("\"')]").endswith((".", "!", "?"))
    ordinary = np.array(sorted(set(tokens.values()) - excluded), np.int32)
    return Vocabulary(**ids, size=size, ordinary=ordinary, sentence_ends=ends)


def _read_byte_level_bpe(folder: Path) -> Tokenizer:
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    _require(tokenizer, "<s>", "</s>", "<mask>")
    return _as_byte_level(tokenizer)


def _as_byte_level(tokenizer: Tokenizer) -> Tokenizer:
    """Sets up what RoBERTa's tokenizers have besides their vocabulary."""
    # The word that a mask stands for begins with the space before the mask.
    mask = AddedToken("<mask>", lstrip=True, special=True)
    present = [token for token in _FIRST_TOKENS if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([mask, *present])
    ids = tokenizer.get_vocab()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=False
    )
    return tokenizer


def _read_word_piece(file: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece.from_file(str(file), unk_token="[UNK]"))
    special = ("[CLS]", "[SEP]", "[MASK]", "[UNK]")
    ids = _require(tokenizer, *special)
    is_cased = any(re.match("[^[]*[A-Z]", token) for token in ids)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not is_cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _require(tokenizer: Tokenizer, *tokens: str) -> dict[str, int]:
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        raise ValueError(f"its vocabulary lacks {', '.join(missing)}")
    return vocabulary
