"""The configuration of a fine-tuning run."""

import dataclasses
from typing import Annotated, ClassVar, get_args

import tyro

from yoso_jax.conversion.positions import PositionExtension
from yoso_jax.finetuning.encoding import Truncation
from yoso_jax.finetuning.tasks import DataConfig
from yoso_jax.run_config import RunConfig
from yoso_jax.starting import ModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """One model fine-tuned on a task; every number a run depends on.

    The folder of the run also gets predictions/ and model/. Of questions, examples are windows.
    """

    kind: ClassVar[str] = "finetune"

    data: Annotated[DataConfig, tyro.conf.AvoidSubcommands]
    """The task and its examples. In YAML the field `task` (glue, texts, words, questions or
    choices; glue by default) says which of the configurations the others are fields of."""
    init_from: str | None = None
    """Checkpoint to start from, as `YosoModel.from_pretrained` reads them; none draws all
    parameters. What it lacks, as a rule the head, is drawn."""
    init_config: str | None = None
    """JSON file with the configuration of `init_from`, if it is not beside it."""
    fresh_head: bool = False
    """Draw the head even if `init_from` has one, of another task."""
    position_extension: PositionExtension | None = None
    """How to make more positions than `init_from` has: "tile" or "interpolate"."""
    tokenizer: str | None = None
    """Folder or file of the tokenizer: tokenizer.json, vocab.json beside merges.txt, or vocab.txt;
    none: that beside `init_from`."""
    truncation: Truncation = "error"
    """What to do with examples longer than `sequence_length`: "error", or cut the end of the longer
    text ("longest_first") or of the second ("only_second"), which is counted and reported. Texts
    with questions are not cut but read in windows."""
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    """What to change in the model's configuration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("truncation", get_args(Truncation))
        self._check_choice("position_extension", (None, *get_args(PositionExtension)))
        if self.init_from is None and self.tokenizer is None:
            self._fail("tokenizer", "a folder or file if init_from is none")
