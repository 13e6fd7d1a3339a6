"""Learning-rate schedule, weight-decay mask and optimiser."""

import dataclasses
import math
from typing import Literal

import jax
import optax
from jaxtyping import PyTree


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, decay to the last step and clipping by the global norm.

    The learning rate goes linearly from `start_factor * learning_rate` to `learning_rate` in
    `warmup_steps`, then to `end_factor * learning_rate` at the last step of the run. PyTorch's
    linear one-cycle schedule, used by the authors for LRA, is `decay="linear"` with
    `start_factor=1/25` and `end_factor=1/25e4`.
    """

    learning_rate: float = 1e-3
    """Peak learning rate, > 0."""
    warmup_steps: int = 0
    """Steps of linear warm-up, >= 0 and at most the steps of the run."""
    decay: Literal["linear", "cosine"] = "linear"
    """Shape of the decay after the warm-up."""
    start_factor: float = 0.0
    """Learning rate at step 0 over the peak, in [0, 1]."""
    end_factor: float = 0.0
    """Learning rate at the last step over the peak, in [0, 1]."""
    b1: float = 0.9
    """Decay of the mean of the gradient, in [0, 1)."""
    b2: float = 0.999
    """Decay of the mean of its square, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment, > 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices (see `weight_decay_mask`), >= 0."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient, > 0; none: no clipping."""

    def __post_init__(self) -> None:
        accepted = {
            "learning_rate": (0 < self.learning_rate < math.inf, "> 0 and finite"),
            "warmup_steps": (self.warmup_steps >= 0, ">= 0"),
            "decay": (self.decay in ("linear", "cosine"), "'linear' or 'cosine'"),
            "start_factor": (0 <= self.start_factor <= 1, "in [0, 1]"),
            "end_factor": (0 <= self.end_factor <= 1, "in [0, 1]"),
            "b1": (0 <= self.b1 < 1, "in [0, 1)"),
            "b2": (0 <= self.b2 < 1, "in [0, 1)"),
            "eps": (self.eps > 0, "> 0"),
            "weight_decay": (self.weight_decay >= 0, ">= 0"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "> 0 or none"),
        }
        for name, (valid, values) in accepted.items():
            if not valid:
                raise ValueError(f"{name} must be {values}, got {getattr(self, name)!r}")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates already made, in [0, steps]."""
    peak = config.learning_rate
    start, end = config.start_factor * peak, config.end_factor * peak
    decay_steps = steps - config.warmup_steps
    warmup = optax.linear_schedule(start, peak, max(config.warmup_steps, 1))
    if decay_steps == 0:
        return warmup
    if config.decay == "linear":
        decay = optax.linear_schedule(peak, end, decay_steps)
    else:
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.end_factor)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def weight_decay_mask(params: PyTree) -> PyTree:
    """Booleans in the structure of `params`: False for biases and LayerNorm scales, else True.

    Embedding tables, like every other matrix, are decayed, as is usual for BERT. The parameter's
    name decides, not its rank, because stacked layers give a bias two axes.
    """

    def decays(path: jax.tree_util.KeyPath, _: object) -> bool:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        return names[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=weight_decay_mask,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
