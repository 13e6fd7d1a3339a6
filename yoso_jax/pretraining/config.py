"""The configuration of a pretraining run."""

import dataclasses
from typing import Literal, get_args

from yoso_jax.conversion.positions import PositionExtension
from yoso_jax.data.mlm import MLMConfig
from yoso_jax.finetuning.start import ModelOptions
from yoso_jax.optim import OptimizerConfig
from yoso_jax.validation import Validated


@dataclasses.dataclass(frozen=True)
class PretrainConfig(Validated):
    """One masked language model; every number a run depends on."""

    run_dir: str
    """Folder the run writes: besides what every run does, model/."""
    data_dir: str
    """Folder of the corpora; what is made of them is kept in it, too."""
    steps: int
    """Updates in all, >= 1. A resumed run may raise it."""
    sequence_length: int
    """Tokens of a sequence, >= 2 (with the order of segments, >= 4) and at most the positions of
    the model."""
    data: MLMConfig = dataclasses.field(default_factory=MLMConfig)
    """The corpora, and what is to be predicted."""
    init_from: str | None = None
    """Checkpoint to start from, as `YosoForMaskedLM.from_pretrained` reads them, with its tokenizer
    beside it unless `data.tokenizer` names one; none draws all parameters."""
    init_config: str | None = None
    """JSON file with the configuration of `init_from`, if it is not beside it."""
    position_extension: PositionExtension | None = None
    """How to make more positions than `init_from` has, up to `model.max_position_embeddings`:
    "tile" or "interpolate"."""
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    """The model, or what to change in that of `init_from`."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser and its schedule."""
    seed: int = 0
    """Seed of the parameters that are drawn, the order of the data, masks, dropout and hashing,
    >= 0."""
    batch_size: int = 32
    """Sequences an update, >= 1."""
    eval_batch_size: int = 64
    """Sequences a step of evaluation, >= 1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the activations; parameters and the optimiser stay float32."""
    log_every: int = 50
    """Steps averaged in a line of metrics, >= 1."""
    evaluate_every: int = 500
    """Steps between validations, each followed by a checkpoint, >= 1."""
    keep_latest: int = 2
    """Checkpoints kept besides the best (by accuracy), >= 1."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "eval_batch_size",
            "log_every",
            "evaluate_every",
            "keep_latest",
        ):
            self._check_integer(name)
        self._check_integer("sequence_length", 4 if self.data.sentence_order else 2)
        self._check_integer("seed", 0, 2**31 - 1)
        self._check_choice("position_extension", (None, *get_args(PositionExtension)))
        self._check_choice("dtype", ("float32", "bfloat16", "float16"))
        for name in ("run_dir", "data_dir"):
            if not getattr(self, name):
                self._fail(name, "the name of a folder")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps must be at most steps ({self.steps}), "
                f"got {self.optimizer.warmup_steps}"
            )
