"""The configuration of a fine-tuning run."""

import dataclasses
from typing import Annotated, Literal, get_args

import tyro

from yoso_jax.conversion.positions import PositionExtension
from yoso_jax.finetuning.encoding import Truncation
from yoso_jax.finetuning.start import ModelOptions
from yoso_jax.finetuning.tasks import DataConfig
from yoso_jax.optim import OptimizerConfig
from yoso_jax.validation import Validated


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Validated):
    """One model fine-tuned on a task; every number a run depends on."""

    run_dir: str
    """Folder the run writes: besides what every run does, predictions/ and model/."""
    data_dir: str
    """Folder of the files that `data` names."""
    steps: int
    """Updates in all, >= 1. A resumed run may raise it."""
    sequence_length: int
    """Tokens an example is padded to, >= 1 and at most the positions of the model."""
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
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser and its schedule."""
    seed: int = 0
    """Seed of the parameters that are drawn, the order of the data, dropout and hashing, >= 0."""
    batch_size: int = 32
    """Examples (of questions: windows) an update, >= 1."""
    eval_batch_size: int = 64
    """Examples a step of evaluation, >= 1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the activations; parameters and the optimiser stay float32."""
    log_every: int = 50
    """Steps averaged in a line of metrics, >= 1."""
    evaluate_every: int = 500
    """Steps between validations, each followed by a checkpoint, >= 1."""
    keep_latest: int = 2
    """Checkpoints kept besides the best, >= 1."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "sequence_length",
            "batch_size",
            "eval_batch_size",
            "log_every",
            "evaluate_every",
            "keep_latest",
        ):
            self._check_integer(name)
        self._check_integer("seed", 0, 2**31 - 1)
        self._check_choice("truncation", get_args(Truncation))
        self._check_choice("position_extension", (None, *get_args(PositionExtension)))
        self._check_choice("dtype", ("float32", "bfloat16", "float16"))
        for name in ("run_dir", "data_dir"):
            if not getattr(self, name):
                self._fail(name, "the name of a folder")
        if self.init_from is None and self.tokenizer is None:
            self._fail("tokenizer", "a folder or file if init_from is none")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps must be at most steps ({self.steps}), "
                f"got {self.optimizer.warmup_steps}"
            )
