"""What the configurations of all kinds of training runs have in common."""

import dataclasses
from typing import Any, ClassVar, Literal

from yoso_jax.optim import OptimizerConfig
from yoso_jax.validation import Validated


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Validated):
    """Every number a run depends on, whatever it trains."""

    kind: ClassVar[str]
    """What is trained, the field `kind` in YAML: see `yoso_jax.kinds`."""

    run_dir: str
    """Folder the run writes: config.yaml, checkpoints/, metrics.jsonl, results.json, curves.png."""
    steps: int
    """Updates in all, >= 1. A resumed run may raise it."""
    sequence_length: int
    """Tokens an example is padded to, >= 1 and at most the positions of the model."""
    data_dir: str
    """Folder of the data."""
    data: Any
    """What is trained on; its `task` names its kind."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimiser and its schedule."""
    seed: int = 0
    """Seed of the parameters that are drawn, the order of the data, dropout and hashing, >= 0."""
    batch_size: int = 32
    """Examples an update, >= 1."""
    length_buckets: tuple[int, ...] | None = None
    """Lengths to pad to, ascending up to `sequence_length`: a training batch then has examples of
    about one length, and a step is compiled for each. None: all are padded to `sequence_length`."""
    accumulation_steps: int = 1
    """Parts a batch is processed in, one after the other, to save memory; it divides
    `batch_size`. Their gradients are averaged."""
    eval_batch_size: int = 64
    """Examples a step of evaluation, >= 1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the activations; parameters and the optimiser stay float32."""
    ema_decay: float | None = None
    """Decay, in (0, 1), of a moving average of the parameters, which is what is evaluated then and
    kept; at step t it is at most (1 + t) / (10 + t). None: there is no average."""
    fsdp: int = 1
    """Devices that each parameter and its optimiser are divided over; it divides the number of
    devices. Batches are divided over all devices in any case."""
    num_workers: int = 0
    """Processes that prepare batches; 0 prepares them in threads. Batches do not depend on it."""
    log_every: int = 50
    """Steps averaged in a line of metrics, >= 1."""
    evaluate_every: int = 500
    """Steps between validations, each followed by a checkpoint, >= 1."""
    keep_latest: int = 2
    """Checkpoints kept besides the best by validation, >= 1."""
    patience: int | None = None
    """Validations in a row without a new best after which the run ends, >= 1; None: it does not."""
    max_loss: float | None = None
    """Mean training loss of a line of metrics above which the run ends as diverged, > 0; None: it
    only ends where the loss or its gradient is not finite."""
    final_checkpoint: Literal["latest", "best"] = "latest"
    """The parameters that are tested and kept in the end: the newest, or the best by validation,
    of equal ones the last."""
    tensorboard: bool = False
    """Whether metrics go to events for TensorBoard, in run_dir/tensorboard, too."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "sequence_length",
            "batch_size",
            "accumulation_steps",
            "eval_batch_size",
            "fsdp",
            "log_every",
            "evaluate_every",
            "keep_latest",
        ):
            self._check_integer(name)
        self._check_integer("seed", 0, 2**31 - 1)
        self._check_integer("num_workers", 0)
        self._check_integer("patience", optional=True)
        self._check_choice("dtype", ("float32", "bfloat16", "float16"))
        self._check_choice("final_checkpoint", ("latest", "best"))
        self._check_bool("tensorboard")
        if self.ema_decay is not None:
            self._check_number("ema_decay", "in (0, 1), or None", lambda value: 0 < value < 1)
        if self.max_loss is not None:
            self._check_number("max_loss", "> 0, or None", lambda value: value > 0)
        for name in ("run_dir", "data_dir"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                self._fail(name, "the name of a folder")
        if self.length_buckets is not None:
            steps = zip((0, *self.length_buckets), self.length_buckets, strict=False)
            if not self.length_buckets or any(low >= high for low, high in steps):
                self._fail("length_buckets", "ascending lengths >= 1, or None")
            if self.length_buckets[-1] != self.sequence_length:
                self._fail("length_buckets", f"up to sequence_length ({self.sequence_length})")
        if self.batch_size % self.accumulation_steps:
            self._fail("accumulation_steps", f"a divisor of batch_size ({self.batch_size})")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps must be at most steps ({self.steps}), "
                f"got {self.optimizer.warmup_steps}"
            )


FREE_ON_RESUME = (
    "run_dir",
    "data_dir",
    "fsdp",
    "num_workers",
    "log_every",
    "evaluate_every",
    "keep_latest",
    "patience",
    "max_loss",
    "final_checkpoint",
    "tensorboard",
)
"""What may change when a run is resumed: where things are, how often we look, who does the work."""
