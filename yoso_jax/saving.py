"""Saves a fine-tuned model with its tokenizer, so that both are loaded from one folder."""

import shutil
from pathlib import Path
from typing import Any

MODEL_FOLDER = "model"
"""Where a run keeps its model, in its folder."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def save_model(model: Any, tokenizer: Path, folder: Path) -> None:
    """Writes config.json and model.safetensors, and copies the tokenizer.

    Args:
        model: see `PretrainedModel.save_pretrained`.
        tokenizer: folder or file that it was read from, see `load_tokenizer`; perhaps `folder`.
        folder: made if there is none.
    """
    model.save_pretrained(folder)
    if tokenizer.is_dir():
        names = {name: name for name in _TOKENIZER_FILES if (tokenizer / name).is_file()}
    elif tokenizer.name in ("vocab.json", "merges.txt"):
        names = {name: name for name in ("vocab.json", "merges.txt")}
    else:
        names = {tokenizer.name: "vocab.txt" if tokenizer.suffix == ".txt" else "tokenizer.json"}
    source = tokenizer if tokenizer.is_dir() else tokenizer.parent
    if source.samefile(folder):
        return
    for name, copy in names.items():
        shutil.copyfile(source / name, folder / copy)
