"""The configuration of a classifier trained on a task of Long Range Arena."""

import dataclasses
from typing import Annotated, ClassVar, get_args

import tyro

from yoso_jax.conversion.positions import PositionExtension
from yoso_jax.data.tasks import TASKS, DataConfig
from yoso_jax.lra import LRAConfig
from yoso_jax.run_config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """One classifier trained on a task of Long Range Arena; every number a run depends on.

    The folder of the run also gets model/. Of `sequence_length`: Text and Retrieval are cut off
    there; examples of the other tasks may not be longer.
    """

    kind: ClassVar[str] = "lra"

    data: Annotated[DataConfig, tyro.conf.AvoidSubcommands]
    """The task and its examples. In YAML the field `task` (listops, pathfinder, image, text,
    retrieval or recall; listops by default) says which of the configurations the others are fields
    of."""
    model: LRAConfig
    """The classifier."""
    data_dir: str = "data/listops"
    """Folder that holds the files of the task; ListOps, Pathfinder and recall are generated."""
    tsv_dir: str | None = None
    """Folder of a published copy of ListOps (basic_train.tsv, basic_val.tsv, basic_test.tsv) to
    read instead of generating `data`."""
    init_from: str | None = None
    """Checkpoint to start from, as `LRAClassifier.from_pretrained` reads them, of a model with the
    shapes of `model`; none draws all parameters."""
    position_extension: PositionExtension | None = None
    """How to make more positions than `init_from` has: "tile" or "interpolate"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length must be at most model.max_position_embeddings "
                f"({self.model.max_position_embeddings}), got {self.sequence_length}"
            )
        self._check_choice("position_extension", (None, *get_args(PositionExtension)))
        if self.length_buckets is not None and (self.model.pooling, self.model.mean_over) == (
            "mean",
            "all",
        ):
            raise ValueError(
                "model.mean_over must be valid with length_buckets: a mean over padding, too, "
                "depends on how much there is"
            )
        self._check_task()

    def _check_task(self) -> None:
        name, task = self.data.task, TASKS[self.data.task]
        if self.tsv_dir is not None and name != "listops":
            raise ValueError(f"tsv_dir must be null for {name}: only listops has a published copy")
        longest = None if self.tsv_dir is not None else task.longest(self.data)
        if longest is not None and self.sequence_length < longest:
            raise ValueError(
                f"sequence_length must be at least {longest}, the longest example of {name} that "
                f"data allows, got {self.sequence_length}"
            )
        for field in ("vocab_size", "num_labels"):
            least, value = getattr(task, field), getattr(self.model, field)
            if value < least:
                raise ValueError(f"model.{field} must be at least {least} for {name}, got {value}")
        if self.model.dual != task.dual:
            accepted, found = (str(value).lower() for value in (task.dual, self.model.dual))
            raise ValueError(f"model.dual must be {accepted} for {name}, got {found}")
