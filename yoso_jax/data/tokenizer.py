"""Reads the tokenizer of a model, with the library `tokenizers` of the extra `text`."""

import re
from pathlib import Path

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
    )
except ImportError as error:
    raise ImportError(
        "reading text needs the package tokenizers: pip install 'yoso-jax[text]'"
    ) from error

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


def _read_byte_level_bpe(folder: Path) -> Tokenizer:
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    ids = _require(tokenizer, "<s>", "</s>", "<mask>")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=False
    )
    # The word that a mask stands for begins with the space before the mask.
    mask = AddedToken("<mask>", lstrip=True, special=True)
    optional = [token for token in ("<pad>", "<unk>") if token in ids]
    tokenizer.add_special_tokens(["<s>", "</s>", mask, *optional])
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
