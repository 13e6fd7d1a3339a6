"""Batches by length: every example, little padding, the same whoever prepares them."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import fast_compilations, numbers, quiet_console, tiny_config

import yoso_jax.trainer as trainer
from yoso_jax.data.length_batches import LengthBatches
from yoso_jax.lra_objective import LRAObjective
from yoso_jax.train_config import TrainConfig

LENGTHS = np.random.default_rng(0).integers(1, 17, 83)


def make(seed: int = 0) -> LengthBatches:
    def pad(rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        assert (length >= LENGTHS[rows]).all()
        return _pad(rows, length)

    return LengthBatches(pad, LENGTHS, (4, 8, 16), 10, seed)


def epoch(batches: LengthBatches, number: int) -> list[dict[str, Any]]:
    return [batches[i] for i in range(9 * number, 9 * number + 9)]


def test_an_epoch_has_every_example() -> None:
    batches = make()
    for number in (0, 1, 70):
        found = epoch(batches, number)
        ids = np.concatenate([batch["id"] for batch in found])
        assert set(ids) == set(range(83))
        assert len(ids) == 90
        shapes = [batch["row"].shape for batch in found]
        assert set(shapes) == {(10, 4), (10, 8), (10, 16)}
        padding = sum(rows * length for rows, length in shapes) - LENGTHS[ids].sum()
        assert padding < 0.6 * (90 * 16 - LENGTHS[ids].sum())
    orders = [
        [batch["id"].tolist() for batch in epoch(each, n)]
        for each, n in ((batches, 0), (make(), 0), (batches, 1), (make(1), 0))
    ]
    assert orders[0] == orders[1]
    assert orders[2] not in (orders[0], orders[3])
    assert orders[3] != orders[0]


def test_workers_get_the_same_batches() -> None:
    plain = LengthBatches(_pad, np.array([1, 2, 3]), (2, 4), 2, 0)
    copied = pickle.loads(pickle.dumps(plain))
    for number in range(9):
        np.testing.assert_equal(copied[number], plain[number])
    assert len(copied) > 10**9


def _pad(rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
    return {"id": rows, "row": np.zeros((len(rows), length))}


def test_fewer_examples_than_a_batch_are_repeated() -> None:
    batches = LengthBatches(_pad, np.array([1, 2, 3]), (2, 4), 8, 0)
    assert sorted(set(batches[0]["id"].tolist())) == [0, 1, 2]
    assert batches[5]["id"].shape == (8,)


def config_with_buckets(folder: Path, name: str, **changes: Any) -> TrainConfig:
    plain = tiny_config(folder, name)
    model = plain.model.replace(mean_over="valid", use_expectation=True, hidden_dropout_prob=0.0)
    return dataclasses.replace(plain, model=model, length_buckets=(8, 12, 16), **changes)


def test_run_with_buckets_goes_on_where_it_was(tmp_path: Path) -> None:
    config = config_with_buckets(tmp_path, "whole")
    with fast_compilations():
        trainer.train(config, console=quiet_console()[0])
        objective = LRAObjective.create(config)
        iterator = objective.make_iterator()
        batches = [next(iterator) for _ in range(10)]
        assert len({batch["input_ids"].shape for batch in batches}) >= 2
        for batch in batches:
            longest, length = batch["attention_mask"].sum(1).max(), batch["input_ids"].shape[1]
            assert longest <= length
        np.testing.assert_equal(next(objective.make_iterator(7)), batches[7])
        assert {r["split"] for r in numbers(config.run_dir)} == {"train", "valid"}


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ((), "length_buckets must be ascending lengths"),
        ((8, 8, 16), "length_buckets must be ascending lengths"),
        ((8, 12), r"length_buckets must be up to sequence_length \(16\)"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_buckets_that_cannot_be(tmp_path: Path, buckets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, length_buckets=buckets)


def test_mean_over_padding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.mean_over must be valid with length_buckets"):
        tiny_config(tmp_path, length_buckets=(8, 16))
