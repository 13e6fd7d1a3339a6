"""A corpus small enough to tokenise in no time."""

import random
from pathlib import Path

import numpy as np

from yoso_jax.data.packing import TokenStream
from yoso_jax.data.vocabulary import Vocabulary

NOUNS = ("cat", "dog", "tree", "house", "river", "stone", "child", "teacher", "garden")
VERBS = ("sees", "finds", "likes", "follows", "paints", "carries")
BOS, PAD, EOS, UNK, MASK = 0, 1, 2, 3, 29

# Ids 4..28 are ordinary; those of 25 and above end a sentence.
VOCABULARY = Vocabulary(
    bos=BOS,
    eos=EOS,
    pad=PAD,
    mask=MASK,
    size=30,
    ordinary=np.arange(4, MASK, dtype=np.int32),
    sentence_ends=(np.arange(30) >= 25) & (np.arange(30) < MASK),
)


def write_corpus(folder: Path, num_documents: int, seed: int = 0) -> Path:
    """Documents of a few simple sentences, two on a line."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(num_documents):
        sentences = [
            f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}."
            for _ in range(rng.randrange(4, 12))
        ]
        lines = [" ".join(sentences[i : i + 2]) for i in range(0, len(sentences), 2)]
        (folder / f"{number:03}.txt").write_text("\n".join(lines) + "\n")
    return folder


def make_stream(folder: Path, documents: list[list[int]], name: str = "train") -> TokenStream:
    """A stream of given documents; even ids begin a word."""
    tokens = np.array([token for each in documents for token in [*each, EOS]], np.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}_tokens.npy", tokens)
    np.save(folder / f"{name}_word_starts.npy", (tokens % 2 == 0) | (tokens == EOS))
    return TokenStream(folder, name)


def random_documents(num_documents: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [
        rng.choice(VOCABULARY.ordinary, rng.integers(1, 60)).tolist() for _ in range(num_documents)
    ]
