"""From a configuration to a corpus and a model to start from."""

import dataclasses
from pathlib import Path

from yoso_jax.data.corpus import load_mlm
from yoso_jax.data.mlm import MLMData
from yoso_jax.data.tokenizer import load_tokenizer
from yoso_jax.errors import ConfigError
from yoso_jax.modeling import YosoForMaskedLM
from yoso_jax.pretraining.config import PretrainConfig
from yoso_jax.starting import Start, find_start, from_checkpoint, from_scratch


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that a run is made of.

    Attributes:
      data: its corpus.
      start: the masked language model it starts from.
      notes: what the user should know, a line each.
    """

    data: MLMData
    start: Start
    notes: tuple[str, ...]


def prepare(config: PretrainConfig) -> Prepared:
    """Reads the corpus, see `load_mlm`, and, without its parameters, the checkpoint.

    Raises:
        ConfigError: fields do not suit each other, the tokenizer or the checkpoint.
        CheckpointError: the checkpoint is missing, or the model cannot be made of it.
        DataError: a folder, a document or the tokenizer is missing or cannot be used.
        OSError: `data_dir` cannot be written.
    """
    path = find_start(config.init_from, config.run_dir)
    text = config.data
    if path is not None and text.tokenizer is None:
        beside = path if path.is_dir() else path.parent
        text = dataclasses.replace(text, tokenizer=str(beside))
    data = load_mlm(text, Path(config.data_dir))
    tokenizer = load_tokenizer(data.tokenizer)
    arguments = (YosoForMaskedLM, tokenizer, config.sequence_length, config.model)
    if path is None:
        start = from_scratch(*arguments, {"type_vocab_size": 2 if text.sentence_order else 1})
    else:
        start = from_checkpoint(
            *arguments,
            {},
            path=path,
            config=None if config.init_config is None else Path(config.init_config),
            position_extension=config.position_extension,
        )
    if start.config.pad_token_id not in (None, data.vocabulary.pad):
        raise ConfigError(
            f"the tokenizer pads with {data.vocabulary.pad}, the model with "
            f"{start.config.pad_token_id}: it is not the model's; name that one with data.tokenizer"
        )
    sizes = [
        f"{name}: {len(stream):,} tokens"
        for name, stream in (("train", data.train), ("valid", data.valid), ("test", data.test))
    ]
    notes = [*start.notes, f"the tokenizer is {data.tokenizer}", *sizes]
    if text.sentence_order and start.config.type_vocab_size == 1:
        notes.append("the checkpoint has one token type: segments are told apart by </s> alone")
    return Prepared(data, start, tuple(notes))
