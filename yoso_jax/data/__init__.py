"""Data sets and the batches made of them."""

from yoso_jax.data.images import ImageConfig
from yoso_jax.data.listops import (
    evaluate,
    from_text,
    load_listops_tsv,
    prepare_listops,
    to_text,
)
from yoso_jax.data.listops_generator import VOCAB, ListOpsConfig
from yoso_jax.data.pathfinder import PathfinderConfig, prepare_pathfinder
from yoso_jax.data.pipeline import eval_batches, make_iterator
from yoso_jax.data.retrieval import RetrievalConfig
from yoso_jax.data.splits import PairSplit, TaskData, TokenSplit
from yoso_jax.data.tasks import TASKS, DataConfig, Task, load_task
from yoso_jax.data.text import TextConfig

__all__ = [
    "TASKS",
    "VOCAB",
    "DataConfig",
    "ImageConfig",
    "ListOpsConfig",
    "PairSplit",
    "PathfinderConfig",
    "RetrievalConfig",
    "Task",
    "TaskData",
    "TextConfig",
    "TokenSplit",
    "eval_batches",
    "evaluate",
    "from_text",
    "load_listops_tsv",
    "load_task",
    "make_iterator",
    "prepare_listops",
    "prepare_pathfinder",
    "to_text",
]
