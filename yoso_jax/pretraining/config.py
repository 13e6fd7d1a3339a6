"""The configuration of a pretraining run."""

import dataclasses
from typing import ClassVar, get_args

from yoso_jax.conversion.positions import PositionExtension
from yoso_jax.data.mlm import MLMConfig
from yoso_jax.run_config import RunConfig
from yoso_jax.starting import ModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """One masked language model; every number a run depends on.

    The folder of the run also gets model/; that of the data, of the corpora, gets what is made of
    them. A sequence has at least 2 tokens, with the order of segments 4.
    """

    kind: ClassVar[str] = "pretrain"

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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("sequence_length", 4 if self.data.sentence_order else 2)
        if self.length_buckets is not None:
            self._fail("length_buckets", "None: sequences are packed, so all have one length")
        self._check_choice("position_extension", (None, *get_args(PositionExtension)))
