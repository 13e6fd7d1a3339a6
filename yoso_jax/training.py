"""Train state, compiled step and evaluation; `yoso_jax.trainer` has the loop."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Key, PyTree

from yoso_jax.checkpointing import Checkpoints
from yoso_jax.lra import LRAClassifier
from yoso_jax.optim import make_optimizer
from yoso_jax.train_config import TrainConfig

State = dict[str, Any]
"""`step` (int32, updates made), `params`, `opt_state`, and `window`: sums of the metrics over the
last `steps` steps, and `bad_step`, the first of them that was not finite (0 for none). The window
is part of the state so that a resumed run logs the same means."""

Batch = Mapping[str, Array | np.ndarray]
"""What `yoso_jax.data.pipeline` yields."""

TrainStep = Callable[[State, Batch, Key[Array, ""]], State]
EvalStep = Callable[[PyTree, Batch, Key[Array, ""]], dict[str, Array]]


def make_keys(seed: int) -> tuple[Key[Array, ""], Key[Array, ""], Key[Array, ""]]:
    """The keys of a run's initial parameters, of its training and of its evaluations."""
    init_key, train_key, eval_key = jax.random.split(jax.random.key(seed), 3)
    return init_key, train_key, eval_key


def make_model(config: TrainConfig, key: Key[Array, ""]) -> LRAClassifier:
    """The classifier of a run, with float32 parameters drawn from `key`."""
    return LRAClassifier(
        config.model, dtype=jnp.dtype(config.dtype), param_dtype=jnp.float32, rngs=nnx.Rngs(key)
    )


def make_graphdef(config: TrainConfig) -> nnx.GraphDef:
    """The structure of the model, to `nnx.merge` with parameters; allocates nothing."""
    return nnx.graphdef(nnx.eval_shape(lambda: make_model(config, jax.random.key(0))))


def init_state(config: TrainConfig, tx: optax.GradientTransformation) -> State:
    """A new state, float32, determined by `config.seed`."""
    init_key, _, _ = make_keys(config.seed)

    @jax.jit
    def init() -> State:
        params = nnx.state(make_model(config, init_key), nnx.Param)
        return {
            "step": jnp.int32(0),
            "params": params,
            "opt_state": tx.init(params),
            "window": {
                "steps": jnp.int32(0),
                "bad_step": jnp.int32(0),
                "loss": jnp.float32(0),
                "accuracy": jnp.float32(0),
                "grad_norm": jnp.float32(0),
            },
        }

    # Bound to a device, as a restored state is, so that both run the same compiled step.
    return jax.device_put(init(), jax.devices()[0])


def window_means(window: dict[str, Array]) -> dict[str, float]:
    """Mean loss, accuracy and gradient norm over the steps of a window."""
    steps = int(window["steps"])
    return {name: float(window[name]) / steps for name in ("loss", "accuracy", "grad_norm")}


def make_train_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, log_every: int
) -> TrainStep:
    """Compiles one update, `(state, batch, key) -> state`; it takes over (donates) the state.

    The key, the root of dropout and hashing, is the same at every step: it is folded with the
    number of the step, so no random state is saved.

    Args:
        graphdef: see `make_graphdef`.
        tx: see `yoso_jax.optim.make_optimizer`.
        log_every: a new window begins after every step that is a multiple of it.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: State, batch: Batch, key: Key[Array, ""]) -> State:
        dropout_key, hash_key = jax.random.split(jax.random.fold_in(key, state["step"]))

        def loss_fn(params: PyTree) -> tuple[Array, Array]:
            output = nnx.merge(graphdef, params)(
                batch["input_ids"],
                batch["attention_mask"],
                labels=batch["labels"],
                deterministic=False,
                rngs=nnx.Rngs(dropout=dropout_key, hash=hash_key),
            )
            return output.loss, output.logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        step, grad_norm = state["step"] + 1, optax.tree.norm(grads)
        logged = state["step"] % log_every == 0
        window = jax.tree.map(lambda total: jnp.where(logged, 0, total), state["window"])
        first_bad = (window["bad_step"] == 0) & ~jnp.isfinite(loss + grad_norm)
        return {
            "step": step,
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
            "window": {
                "steps": window["steps"] + 1,
                "bad_step": jnp.where(first_bad, step, window["bad_step"]),
                "loss": window["loss"] + loss,
                "accuracy": window["accuracy"] + (logits.argmax(-1) == batch["labels"]).mean(),
                "grad_norm": window["grad_norm"] + grad_norm,
            },
        }

    return train_step


def make_eval_step(graphdef: nnx.GraphDef) -> EvalStep:
    """Compiles sums over a batch: `(params, batch, hash key) -> {loss, correct, weight}`."""

    @jax.jit
    def eval_step(params: PyTree, batch: Batch, key: Key[Array, ""]) -> dict[str, Array]:
        model = nnx.merge(graphdef, params)
        output = model(batch["input_ids"], batch["attention_mask"], rngs=nnx.Rngs(hash=key))
        logits, labels, weight = output.logits, batch["labels"], batch["weight"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return {
            "loss": (losses * weight).sum(),
            "correct": ((logits.argmax(-1) == labels) * weight).sum(),
            "weight": weight.sum(),
        }

    return eval_step


def evaluate(
    eval_step: EvalStep, params: PyTree, batches: Iterable[Batch], key: Key[Array, ""]
) -> dict[str, float]:
    """Mean loss and accuracy over all examples.

    Args:
        eval_step: see `make_eval_step`.
        params: the parameters.
        batches: see `yoso_jax.data.pipeline.eval_batches`.
        key: root of the hashes, folded with the number of the batch: the same key gives the same
            result.
    """
    sums = [
        eval_step(params, batch, jax.random.fold_in(key, number))
        for number, batch in enumerate(batches)
    ]
    loss, correct, weight = (
        float(np.sum([each[name] for each in sums], dtype=np.float64))
        for name in ("loss", "correct", "weight")
    )
    return {"loss": loss / weight, "accuracy": correct / weight}


def with_attention(config: TrainConfig, mode: Literal["expectation", "sampled"]) -> TrainConfig:
    """The same run with attention in expectation (YOSO-E) or sampled; the parameters fit both."""
    model = dataclasses.replace(config.model, use_expectation=mode == "expectation")
    return dataclasses.replace(config, model=model)


def abstract_like(tree: PyTree) -> PyTree:
    """Shapes and types of a tree's leaves, placed on the first device, for restoring."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def restore_params(
    config: TrainConfig, step: int | Literal["latest", "best"]
) -> tuple[int, PyTree, list[str]]:
    """Reads the parameters from a checkpoint of the run; see `Checkpoints.restore`."""
    tx = make_optimizer(config.optimizer, config.steps)
    abstract = abstract_like(jax.eval_shape(lambda: init_state(config, tx))["params"])
    with Checkpoints(config.run_dir) as checkpoints:
        found, restored, notes = checkpoints.restore(step, {"params": abstract})
    return found, restored["params"], notes
