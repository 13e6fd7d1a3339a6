"""Fills in masked words: `python scripts/fill_mask.py MODEL "The <mask> sat on the mat."`."""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table
from rich.text import Text

from yoso_jax import YosoForMaskedLM, cli
from yoso_jax.errors import CheckpointError, ConfigError

_CONTEXT = 60
"""Characters shown before and after a filled mask."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which model, on which text."""

    model: tyro.conf.Positional[Path]
    """Checkpoint of a masked language model."""
    text: tyro.conf.Positional[str]
    """Text with one or more <mask>."""
    tokenizer: Path | None = None
    """Tokenizer, a folder or file (tokenizer.json, vocab.json beside merges.txt, or vocab.txt); by
    default in the model's folder."""
    top: int = 5
    """Predictions shown for each mask."""
    mode: Literal["expectation", "sampled"] | None = None
    """Attention in expectation or sampled; by default as the model's configuration says."""
    num_hashes: int | None = None
    """Hashes when sampled; by default as the model's configuration says."""
    seed: int = 0
    """Of the hashes when sampled."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type computed in."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"--top must be >= 1, got {self.top}")
        if self.num_hashes is not None and self.num_hashes < 1:
            raise ConfigError(f"--num-hashes must be >= 1, got {self.num_hashes}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"--seed must be in [0, 2**31), got {self.seed}")


def main() -> None:
    """Prints a table of the most probable words for each mask."""
    arguments = tyro.cli(Arguments, description=f"Fills in masked words. {cli.EXIT_CODES}")
    try:
        from yoso_jax.data.tokenizer import find_mask_token, load_tokenizer
    except ImportError as error:
        raise ConfigError(str(error)) from error
    if not arguments.model.exists():
        raise CheckpointError(f"there is no checkpoint {arguments.model}")
    folder = arguments.model if arguments.model.is_dir() else arguments.model.parent
    tokenizer = load_tokenizer(arguments.tokenizer or folder)
    mask, mask_id = find_mask_token(tokenizer)
    text = arguments.text.replace("<mask>", mask)
    encoding = tokenizer.encode(text)
    positions = [i for i, index in enumerate(encoding.ids) if index == mask_id]
    if not positions:
        raise ConfigError("the text has no mask: write <mask> where a word is to be filled in")

    model = load_model(arguments)
    config = model.config
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    if vocabulary > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocabulary} tokens, the model only {config.vocab_size}: it is not "
            "the model's; name that one with --tokenizer"
        )
    if len(encoding.ids) > config.max_position_embeddings:
        raise ConfigError(
            f"the text has {len(encoding.ids)} tokens, and the model reads at most "
            f"{config.max_position_embeddings}"
        )
    probabilities, words = predict(
        model,
        jnp.array(encoding.ids),
        jnp.array(positions),
        jax.random.key(arguments.seed),
        min(arguments.top, config.vocab_size),
    )

    attention = "attention in expectation"
    if config.attention == "softmax":
        attention = "softmax attention"
    elif config.is_sampled:
        attention = f"attention sampled with {config.num_hash} hashes, seed {arguments.seed}"
    console = Console(width=None if sys.stdout.isatty() else 2 * _CONTEXT + 80)
    for i, position in enumerate(positions):
        table = Table("probability", "token", "text", highlight=False)
        table.title = f"mask {i + 1} of {len(positions)}, {attention}"
        for probability, word in zip(probabilities[i].tolist(), words[i].tolist(), strict=True):
            # After a mask, a word is decoded with the space before it.
            pair = tokenizer.decode([mask_id, word], skip_special_tokens=False)
            filled = fill(text, encoding.offsets[position], pair.removeprefix(mask))
            token = tokenizer.id_to_token(word) or f"(no token {word})"
            table.add_row(f"{probability:.4f}", Text(token), Text(filled))
        console.print(table)


def load_model(arguments: Arguments) -> YosoForMaskedLM:
    """Loads the model with the attention asked for; what was odd about it goes to stderr."""
    overrides: dict[str, Any] = {}
    if arguments.mode is not None:
        overrides["use_expectation"] = arguments.mode == "expectation"
    if arguments.num_hashes is not None:
        overrides["num_hash"] = arguments.num_hashes
    try:
        with warnings.catch_warnings(record=True) as notes:
            model = YosoForMaskedLM.from_pretrained(
                arguments.model, dtype=jnp.dtype(arguments.dtype), **overrides
            )
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    for note in notes:
        print(f"note: {note.message}", file=sys.stderr)
    if arguments.num_hashes is not None and not model.config.is_sampled:
        raise ConfigError("--num-hashes changes nothing in expectation: add --mode sampled")
    return model


@jax.jit(static_argnames="top")
def predict(
    model: YosoForMaskedLM, ids: Array, positions: Array, key: Array, top: int
) -> tuple[Array, Array]:
    """The probabilities and ids [positions, top] of the most probable words at some positions."""
    logits = model(ids[None], rngs=nnx.Rngs(hash=key)).logits[0, positions]
    return jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), top)


def fill(text: str, span: tuple[int, int], word: str) -> str:
    """The text around a mask in one line, with a word in its place that brings its own space."""
    before, after = text[: span[0]].rstrip(), text[span[1] :]
    if not before:
        word = word.lstrip()
    start = "…" if len(before) > _CONTEXT else ""
    end = "…" if len(after) > _CONTEXT else ""
    return " ".join(f"{start}{before[-_CONTEXT:]}{word}{after[:_CONTEXT]}{end}".splitlines())


if __name__ == "__main__":
    cli.run(main)
