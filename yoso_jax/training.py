"""Train state, compiled step and parameters of a checkpoint; `yoso_jax.trainer` has the loop."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Key, PyTree

from yoso_jax.checkpointing import Checkpoints
from yoso_jax.compiling import compiler_options
from yoso_jax.objective import Batch, Objective
from yoso_jax.sharding import Layout, with_ambient_mesh

State = dict[str, Any]
"""`step` (int32, updates made), `params`, `ema` (their moving average, or None), `opt_state`, and
`window`: sums of the metrics over the last `steps` steps, and `bad_step`, the first of them that
was not finite (0 for none). The window is part of the state so that a resumed run logs the same
means."""

TrainStep = Callable[[State, Batch, Key[Array, ""]], State]


def make_keys(seed: int) -> tuple[Key[Array, ""], Key[Array, ""], Key[Array, ""]]:
    """The keys of a run's initial parameters, of its training and of its evaluations."""
    init_key, train_key, eval_key = jax.random.split(jax.random.key(seed), 3)
    return init_key, train_key, eval_key


def abstract_state(objective: Objective, tx: optax.GradientTransformation) -> State:
    """Shapes and types of the state."""
    params = nnx.state(objective.make_abstract_model(), nnx.Param)
    return jax.eval_shape(lambda params: _new_state(objective, tx, params), params)


def init_state(objective: Objective, tx: optax.GradientTransformation, layout: Layout) -> State:
    """A new state, float32, determined by the run's seed."""
    init_key, _, _ = make_keys(objective.config.seed)
    shardings = layout.of(abstract_state(objective, tx))
    if objective.reads_parameters:
        params = jax.device_put(objective.init_params(init_key), shardings["params"])
        make = jax.jit(lambda params: _new_state(objective, tx, params), out_shardings=shardings)
        return make(params)

    def init() -> State:
        params = nnx.state(objective.make_model(init_key), nnx.Param)
        return _new_state(objective, tx, params)

    return jax.jit(init, out_shardings=shardings)()


def _new_state(objective: Objective, tx: optax.GradientTransformation, params: PyTree) -> State:
    names = ("loss", *objective.train_metrics, "grad_norm")
    return {
        "step": jnp.int32(0),
        "params": params,
        # Copied, for the step takes over the buffers of both.
        "ema": None if objective.config.ema_decay is None else jax.tree.map(jnp.copy, params),
        "opt_state": tx.init(params),
        "window": {
            "steps": jnp.int32(0),
            "bad_step": jnp.int32(0),
            **{name: jnp.float32(0) for name in names},
        },
    }


def evaluated_params(state: State) -> PyTree:
    """The parameters that are evaluated: their moving average, if there is one."""
    return state["params"] if state["ema"] is None else state["ema"]


def window_means(window: dict[str, Array]) -> dict[str, float]:
    """Means of loss, metrics and gradient norm over the steps of a window."""
    steps = int(window["steps"])
    return {
        name: float(total) / steps
        for name, total in window.items()
        if name not in ("steps", "bad_step")
    }


def make_train_step(
    objective: Objective, tx: optax.GradientTransformation, layout: Layout
) -> TrainStep:
    """Compiles one update, `(state, batch, key) -> state`; it takes over (donates) the state.

    The key, the root of dropout and hashing, is the same at every step: it is folded with the
    number of the step, so no random state is saved.

    Args:
        objective: gives loss, metrics and configuration. A new window begins after every step that
            is a multiple of `log_every`.
        tx: see `yoso_jax.optim.make_optimizer`.
        layout: of the state.
    """
    config, graphdef = objective.config, objective.make_graphdef()

    def loss_fn(
        params: PyTree, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Array, dict[str, Array]]:
        dropout_key, hash_key = jax.random.split(key)
        rngs = nnx.Rngs(dropout=dropout_key, hash=hash_key)
        return objective.loss(nnx.merge(graphdef, params), batch, rngs)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulate(params: PyTree, batch: Batch, key: Key[Array, ""]) -> Any:
        # Part i has the rows i, i + parts, ...: as many of one device as of another.
        parts = config.accumulation_steps
        rows = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), dict(batch)
        )

        def add(total: PyTree, part: tuple[Array, Batch]) -> tuple[PyTree, None]:
            number, batch = part
            found = gradient(params, batch, jax.random.fold_in(key, number))
            return jax.tree.map(lambda a, b: a + b / parts, total, found), None

        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], rows), key)
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zero, (jnp.arange(parts), rows))[0]

    @with_ambient_mesh
    def train_step(state: State, batch: Batch, key: Key[Array, ""]) -> State:
        key = jax.random.fold_in(key, state["step"])
        compute = gradient if config.accumulation_steps == 1 else accumulate
        (loss, metrics), grads = compute(state["params"], batch, key)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        step, grad_norm = state["step"] + 1, optax.tree.norm(grads)
        params = optax.apply_updates(state["params"], updates)
        logged = state["step"] % config.log_every == 0
        window = jax.tree.map(lambda total: jnp.where(logged, 0, total), state["window"])
        first_bad = (window["bad_step"] == 0) & ~jnp.isfinite(loss + grad_norm)
        ema = state["ema"]
        if config.ema_decay is not None:
            decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
            ema = optax.incremental_update(params, ema, 1 - decay)
        added = {"loss": loss, **metrics, "grad_norm": grad_norm}
        return {
            "step": step,
            "params": params,
            "ema": ema,
            "opt_state": opt_state,
            "window": {
                "steps": window["steps"] + 1,
                "bad_step": jnp.where(first_bad, step, window["bad_step"]),
                **{name: window[name] + value for name, value in added.items()},
            },
        }

    shardings = layout.of(abstract_state(objective, tx))
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=shardings,
        compiler_options=compiler_options(layout.mesh.devices.flat[0].platform),
    )


def with_attention[Config: Any](config: Config, mode: Literal["expectation", "sampled"]) -> Config:
    """The same run with attention in expectation (YOSO-E) or sampled; the parameters fit both."""
    model = dataclasses.replace(config.model, use_expectation=mode == "expectation")
    return dataclasses.replace(config, model=model)


def to_checkpoint(state: State) -> dict[str, Any]:
    """The state by parts: what is evaluated apart, so that an evaluation need not read the rest."""
    training = {name: state[name] for name in ("step", "opt_state", "window")}
    if state["ema"] is not None:
        training["raw_params"] = state["params"]
    return {"params": evaluated_params(state), "training": training}


def from_checkpoint(restored: dict[str, Any]) -> State:
    """The state of the parts that `to_checkpoint` made."""
    training, params = dict(restored["training"]), restored["params"]
    raw = training.pop("raw_params", None)
    return {
        **training,
        "params": params if raw is None else raw,
        "ema": None if raw is None else params,
    }


def restore_params(
    objective: Objective, step: int | Literal["latest", "best"], layout: Layout
) -> tuple[int, PyTree, list[str]]:
    """Reads the parameters to evaluate from a checkpoint of the run; see `Checkpoints.restore`."""
    params = nnx.state(objective.make_abstract_model(), nnx.Param)
    with Checkpoints(objective.config.run_dir) as checkpoints:
        found, restored, notes = checkpoints.restore(step, {"params": layout.abstract(params)})
    return found, restored["params"], notes
