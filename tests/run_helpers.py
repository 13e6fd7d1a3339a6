"""A run small enough to train in a second or two."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from yoso_jax.data.listops import ListOpsConfig
from yoso_jax.lra import LRAConfig
from yoso_jax.optim import OptimizerConfig
from yoso_jax.train_config import TrainConfig

TIMING = ("time", "steps_per_s", "tokens_per_s", "input_wait")


def tiny_config(folder: Path, name: str = "run", **changes: Any) -> TrainConfig:
    """Ten steps, sampled attention and dropout on; a checkpoint at steps 4, 8 and 10."""
    config = TrainConfig(
        run_dir=str(folder / name),
        data_dir=str(folder / "data"),
        steps=10,
        sequence_length=16,
        batch_size=4,
        eval_batch_size=7,
        log_every=3,
        evaluate_every=4,
        data=ListOpsConfig(
            num_train=64,
            num_valid=20,
            num_test=20,
            min_length=3,
            max_length=17,
            max_depth=3,
            max_args=4,
        ),
        model=LRAConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            hidden_dropout_prob=0.1,
            num_labels=10,
            use_expectation=False,
            num_hash=4,
            hash_code_len=3,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    )
    return dataclasses.replace(config, **changes)


@contextlib.contextmanager
def fast_compilations() -> Iterator[None]:
    """Programs are compiled quickly: compiling is most of a tiny run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def quiet_console() -> tuple[Console, io.StringIO]:
    """A console that is no terminal, and what is written to it."""
    text = io.StringIO()
    return Console(file=text), text


def numbers(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without what depends on the clock."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]
