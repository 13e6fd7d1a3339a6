"""What can be classified: what each task asks of a model, and where its data comes from.

The tasks of Long Range Arena, and associative recall.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yoso_jax.data.images import NUM_PIXELS, ImageConfig, load_images
from yoso_jax.data.listops import prepare_listops
from yoso_jax.data.listops_generator import VOCAB, ListOpsConfig
from yoso_jax.data.pathfinder import PathfinderConfig, prepare_pathfinder
from yoso_jax.data.recall import NUM_VALUES, RECALL_VOCAB_SIZE, RecallConfig, prepare_recall
from yoso_jax.data.retrieval import RetrievalConfig, load_retrieval
from yoso_jax.data.splits import TaskData
from yoso_jax.data.text import BYTE_VOCAB_SIZE, TextConfig, load_text

DataConfig = (
    ListOpsConfig | PathfinderConfig | ImageConfig | TextConfig | RetrievalConfig | RecallConfig
)


@dataclasses.dataclass(frozen=True)
class Task:
    """What holds for all data of a task.

    Attributes:
      vocab_size: ids are below it.
      num_labels: classes.
      dual: whether an example is a pair of sequences.
      longest: tokens of the longest example of a configuration; None where examples are cut off at
        the length asked for.
      load: reads or generates the data: from a configuration, a folder, and the most tokens an
        example may have.
    """

    vocab_size: int
    num_labels: int
    dual: bool
    longest: Callable[[Any], int | None]
    load: Callable[[Any, Path, int], TaskData]


TASKS = {
    ListOpsConfig.task: Task(
        vocab_size=len(VOCAB),
        num_labels=10,
        dual=False,
        longest=lambda config: config.max_length - 1,
        load=lambda config, folder, max_length: prepare_listops(config, folder),
    ),
    PathfinderConfig.task: Task(
        vocab_size=256,
        num_labels=2,
        dual=False,
        longest=lambda config: config.window**2,
        load=lambda config, folder, max_length: prepare_pathfinder(config, folder),
    ),
    ImageConfig.task: Task(
        vocab_size=256,
        num_labels=10,
        dual=False,
        longest=lambda config: NUM_PIXELS[config.source],
        load=lambda config, folder, max_length: load_images(config, folder),
    ),
    TextConfig.task: Task(
        vocab_size=BYTE_VOCAB_SIZE,
        num_labels=2,
        dual=False,
        longest=lambda config: None,
        load=load_text,
    ),
    RetrievalConfig.task: Task(
        vocab_size=BYTE_VOCAB_SIZE,
        num_labels=2,
        dual=True,
        longest=lambda config: None,
        load=load_retrieval,
    ),
    RecallConfig.task: Task(
        vocab_size=RECALL_VOCAB_SIZE,
        num_labels=NUM_VALUES,
        dual=False,
        longest=lambda config: config.length,
        load=lambda config, folder, max_length: prepare_recall(config, folder),
    ),
}
"""By the name of each, which is the `task` of its configuration."""


def load_task(config: DataConfig, data_dir: str | Path, max_length: int) -> TaskData:
    """Reads, or generates on first use, the data of a task.

    Args:
      config: which.
      data_dir: folder that holds it, or in which generated data is kept.
      max_length: most tokens of an example; Text and Retrieval are cut off there.

    Raises:
      DataError: files are missing or damaged, or the data cannot be made.
      OSError: `data_dir` cannot be written.
    """
    return TASKS[config.task].load(config, Path(data_dir), max_length)
