"""From a configuration to a task, a tokenizer and a model to start from."""

import dataclasses
from pathlib import Path

from tokenizers import Tokenizer

from yoso_jax.data.tokenizer import load_tokenizer
from yoso_jax.finetuning.config import FinetuneConfig
from yoso_jax.finetuning.encoding import TextEncoder
from yoso_jax.finetuning.task import Task
from yoso_jax.finetuning.tasks import TASKS, split_files
from yoso_jax.starting import Start, find_start, from_checkpoint, from_scratch, read_config


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that a run is made of.

    Attributes:
      task: its examples.
      start: the model it starts from.
      tokenizer: what made the inputs.
      pad_id: fills inputs up.
      notes: what the user should know, a line each: sizes of the splits, what was cut off or left
        out, which parameters are drawn.
    """

    task: Task
    start: Start
    tokenizer: Tokenizer
    pad_id: int
    notes: tuple[str, ...]


def prepare(config: FinetuneConfig) -> Prepared:
    """Reads tokenizer, examples and, without its parameters, the checkpoint.

    Raises:
        ConfigError: fields do not suit each other or the data.
        DataError: the tokenizer or a file of examples is missing, or has something in it that
            cannot be used.
        CheckpointError: the checkpoint is missing, or the model cannot be made of it.
    """
    path = find_start(config.init_from, config.run_dir)
    checkpoint_config = None if config.init_config is None else Path(config.init_config)
    tokenizer = load_tokenizer(find_tokenizer(config))
    known: tuple[str, ...] = ()
    has_types = False
    if path is not None:
        found = read_config(path, checkpoint_config)
        known = tuple((found.id2label or {}).values())
        has_types = found.type_vocab_size > 1
    encoder = TextEncoder(tokenizer, config.sequence_length, config.truncation, has_types)
    files = split_files(config.data, Path(config.data_dir))
    task = TASKS[config.data.task](config.data, files, encoder, known)
    arguments = (task.model_class, tokenizer, config.sequence_length, config.model)
    if path is None:
        start = from_scratch(*arguments, task.model_fields)
    else:
        start = from_checkpoint(
            *arguments,
            task.model_fields,
            path=path,
            config=checkpoint_config,
            position_extension=config.position_extension,
            fresh_head=config.fresh_head,
        )
    pad_id = start.config.pad_token_id
    return Prepared(
        task,
        start,
        tokenizer,
        0 if pad_id is None else pad_id,
        (*start.notes, *describe(task)),
    )


def describe(task: Task) -> list[str]:
    """A line for each split: how much there is of it, and what of it does not reach the model."""
    lines = []
    for name, split in task.splits.items():
        examples, features = split.examples, split.features
        line = f"{name}: {len(examples)} examples from {examples.path}"
        if len(features) != len(examples):
            line += f" in {len(features)} windows"
        counts = {
            "cut off at sequence_length": features.truncated,
            "words without a token": features.unseen,
            "bad rows left out": examples.skipped,
        }
        line += "".join(f", {count} {what}" for what, count in counts.items() if count)
        lines.append(line)
    return lines


def find_tokenizer(config: FinetuneConfig) -> Path:
    """The folder or file of the run's tokenizer: its own, or that beside the checkpoint."""
    if config.tokenizer is not None:
        return Path(config.tokenizer)
    path = find_start(config.init_from, config.run_dir)
    assert path is not None  # one of them is given
    return path if path.is_dir() else path.parent
