"""A tokenizer of the examples in tests/data/finetune, and a model small enough to train on them."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

VOCABULARY = 400


def save_tokenizer(folder: Path, data: Path) -> Path:
    """Trains RoBERTa's kind of tokenizer on all examples; writes vocab.json and merges.txt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = sorted(str(file) for file in data.rglob("*") if file.suffix in (".tsv", ".jsonl"))
    tokenizer.train(files, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    return folder
