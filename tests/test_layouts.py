"""Several devices and processes: the losses of one device, and checkpoints that move between."""

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_helpers import numbers, tiny_config

from yoso_jax.config_files import dump_config
from yoso_jax.optim import OptimizerConfig
from yoso_jax.train_config import TrainConfig

ROOT = Path(__file__).parents[1]

Train = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def train(folder: Path) -> Train:
    """Runs scripts/train.py on so many virtual devices, divided among so many processes."""

    def train(config: TrainConfig, devices: int, processes: int = 1, resume: bool = False) -> None:
        path = Path(f"{config.run_dir}.yaml")
        path.write_text(dump_config(config))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        running = []
        try:
            for index in range(processes):
                environment = os.environ | {
                    "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                    "PYTHONPATH": str(ROOT),
                }
                if processes > 1:
                    environment |= {
                        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                        "JAX_NUM_PROCESSES": str(processes),
                        "JAX_PROCESS_ID": str(index),
                    }
                running.append(
                    subprocess.Popen(
                        [sys.executable, str(ROOT / "scripts" / "train.py"), str(path)]
                        + ["--resume"] * resume,
                        env=environment,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
            outputs = [process.communicate(timeout=300) for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        for process, (_, err) in zip(running, outputs, strict=True):
            assert process.returncode == 0, err
        assert all("step" not in out for out, _ in outputs[1:])

    return train


@pytest.fixture(scope="module")
def one_device(folder: Path, train: Train) -> TrainConfig:
    # A schedule that does not depend on the end, so that a run that is extended is a longer one.
    config = tiny_config(
        folder,
        "one",
        steps=12,
        eval_batch_size=8,
        log_every=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, end_factor=1.0),
    )
    train(config, devices=1)
    return config


def check_equal(config: TrainConfig, expected: TrainConfig) -> None:
    records = [r for r in numbers(expected.run_dir) if r["step"] <= config.steps]
    for record, other in zip(numbers(config.run_dir), records, strict=True):
        assert (record["step"], record["split"]) == (other["step"], other["split"])
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert record["accuracy"] == pytest.approx(other["accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "processes", "fsdp"),
    [(4, 1, 1), (4, 1, 4), (4, 2, 2)],
    ids=["data", "fsdp", "processes"],
)
def test_losses_are_those_of_one_device(
    folder: Path,
    train: Train,
    one_device: TrainConfig,
    devices: int,
    processes: int,
    fsdp: int,
) -> None:
    name = f"{devices}-{processes}-{fsdp}"
    config = dataclasses.replace(one_device, run_dir=str(folder / name), fsdp=fsdp)
    train(config, devices, processes)
    check_equal(config, one_device)


@pytest.mark.slow
def test_checkpoints_move_between_layouts(
    folder: Path, train: Train, one_device: TrainConfig
) -> None:
    name = str(folder / "moved")
    for steps, devices, processes, fsdp in ((4, 4, 2, 2), (8, 4, 1, 4), (12, 1, 1, 1)):
        config = dataclasses.replace(one_device, run_dir=name, steps=steps, fsdp=fsdp)
        train(config, devices, processes, resume=steps > 4)
        check_equal(config, one_device)


ATTENTION_SCRIPT = """
import dataclasses, functools, sys
from pathlib import Path

import jax, jax.extend, numpy as np, optax
from jax.sharding import AxisType
from run_helpers import tiny_config

from yoso_jax.batch_sharding import BATCH_AXES
from yoso_jax.kernels.mosaic_gpu import hopper
from yoso_jax.lra_objective import LRAObjective
from yoso_jax.sharding import Layout, make_layout
from yoso_jax.training import (
    abstract_state, init_state, make_keys, make_train_step, with_attention
)

config, tx = tiny_config(Path(sys.argv[1]), batch_size=8, accumulation_steps=2), optax.sgd(0.1)
model = config.model.replace(scan_layers=True, remat=True)
config = dataclasses.replace(config, model=model, dtype="bfloat16")
layout, key = make_layout(), make_keys(0)[1]
tokens = np.random.default_rng(0).integers(1, 16, (8, 16), np.int32)
batch = {
    "input_ids": tokens,
    "attention_mask": np.arange(16) < np.arange(9, 17)[:, None],
    "labels": tokens[:, 0] % 10,
}


def count(jaxpr, name, outside=None):
    # How often a primitive occurs, perhaps outside of another one.
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        if equation.primitive.name != outside:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                total += count(inner, name, outside)
    return total


# Kernels run inside shard_map alone. XLA would gather the batch for others.
hopper.check = lambda: None  # so that they are lowered where another GPU is the default, too
model = config.model.replace(attention_implementation="mosaic_gpu")
for mode in ("sampled", "expectation"):
    objective = LRAObjective(with_attention(dataclasses.replace(config, model=model), mode))
    state = layout.abstract(abstract_state(objective, tx))
    traced = make_train_step(objective, tx, layout).trace(state, layout.put(batch), key)
    assert count(traced.jaxpr.jaxpr, "mosaic_gpu_only")
    assert not count(traced.jaxpr.jaxpr, "mosaic_gpu_only", outside="shard_map")
    assert "@mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()

# In expectation; the runs above are sampled. Divided over `data`, nothing needs to be gathered.
config = with_attention(dataclasses.replace(config, dtype="float32"), "expectation")
objective = LRAObjective(config)
one = Layout(jax.make_mesh((1, 1), BATCH_AXES, (AxisType.Auto,) * 2, devices=jax.devices()[:1]))
state, found = jax.device_get(init_state(objective, tx, one)), []
for each in (one, layout):
    args = jax.device_put(state, each.of(state)), each.put(batch), key
    step = make_train_step(objective, tx, each).lower(*args).compile()
    found.append(jax.device_get(step(*args)))
assert "all-reduce" in step.as_text() and "all-gather" not in step.as_text()
jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *found)
print("divided")
"""


def test_devices_attend_to_their_own_rows(tmp_path: Path) -> None:
    """Both modes, with accumulation, and layers scanned and computed again: nothing is gathered."""
    result = subprocess.run(
        [sys.executable, "-c", ATTENTION_SCRIPT, str(tmp_path)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "divided\n", result.stderr
