"""Batches through Grain: contents, order, exact resumption, errors."""

import json
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from yoso_jax.data.listops import prepare_listops
from yoso_jax.data.listops_generator import ListOpsConfig
from yoso_jax.data.pipeline import eval_batches, make_iterator


class Source:
    """Example i holds the ids i + 1, length 1 + i % 5, label i."""

    def __init__(self, size=23):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"input_ids": np.full(1 + index % 5, index + 1, np.int32), "labels": index}


class OneExample:
    def __init__(self, example, lengths=None):
        self.example = example
        if lengths is not None:
            self.lengths = lengths

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.example


@pytest.fixture(scope="module")
def listops(tmp_path_factory):
    config = ListOpsConfig(107, 1, 1, min_length=5, max_length=40)
    return prepare_listops(config, tmp_path_factory.mktemp("cache")).train


OPTIONS: dict[str, Any] = {"batch_size": 4, "max_length": 8, "seed": 0, "shuffle": True}


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def labels_of(batches):
    return np.concatenate([batch["labels"] for batch in batches]).tolist()


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_a_batch_is_padded_and_typed():
    batch = next(make_iterator(Source(), **OPTIONS | {"shuffle": False}))
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "input_ids": (np.int32, (4, 8)),
        "attention_mask": (np.bool_, (4, 8)),
        "labels": (np.int32, (4,)),
    }
    np.testing.assert_array_equal(batch["labels"], [0, 1, 2, 3])
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), [1, 2, 3, 4])
    np.testing.assert_array_equal(batch["input_ids"][2], [3, 3, 3, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["input_ids"] > 0, batch["attention_mask"])


def test_every_epoch_is_a_new_order_of_all_examples():
    labels = labels_of(make_iterator(Source(24), **OPTIONS, num_epochs=3))
    epochs = [labels[start : start + 24] for start in (0, 24, 48)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(24))]}) == 4


def test_order_depends_on_the_seed_alone():
    first = take(make_iterator(Source(), **OPTIONS), 20)
    assert_equal_batches(first, take(make_iterator(Source(), **OPTIONS), 20))
    epochs = set()
    for seed in range(4):
        labels = labels_of(make_iterator(Source(24), **OPTIONS | {"seed": seed}, num_epochs=4))
        epochs |= {tuple(labels[start : start + 24]) for start in range(0, 96, 24)}
    assert len(epochs) == 16  # neighbouring seeds share no epoch


def test_batches_do_not_depend_on_workers(listops):
    # 27 batches: the two workers do not get equally many.
    options = OPTIONS | {"max_length": 40, "num_epochs": 1, "drop_remainder": False}
    expected = list(make_iterator(listops, **options))
    assert len(expected) == 27
    iterator = make_iterator(listops, **options, num_workers=2)
    assert_equal_batches(take(iterator, 5), expected[:5])
    state = json.loads(json.dumps(iterator.get_state()))
    assert_equal_batches(take(iterator, 3), expected[5:8])
    iterator.set_state(state)
    assert_equal_batches(list(iterator), expected[5:])
    iterator.close()


def test_remainder():
    options = OPTIONS | {"shuffle": False, "num_epochs": 1}
    assert labels_of(make_iterator(Source(), **options)) == list(range(20))
    batches = list(make_iterator(Source(), **options, drop_remainder=False))
    assert labels_of(batches) == list(range(23))
    assert batches[-1]["input_ids"].shape == (3, 8)


@pytest.mark.parametrize("position", [0, 1, 5, 6, 17])
def test_state_resumes_exactly(position):
    iterator = make_iterator(Source(), **OPTIONS)
    take(iterator, position)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 12)
    fresh = make_iterator(Source(), **OPTIONS)
    fresh.set_state(state)
    assert_equal_batches(take(fresh, 12), expected)
    iterator.set_state(state)  # also backwards, in the same iterator
    assert_equal_batches(take(iterator, 12), expected)


def test_orbax_resumes_exactly(tmp_path, listops):
    options = OPTIONS | {"max_length": 40}
    iterator = make_iterator(listops, **options)
    take(iterator, 30)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save_checkpointables(30, {"data": iterator})
    expected = take(iterator, 30)

    fresh = make_iterator(listops, **options)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.load_checkpointables(checkpointer.latest.step, {"data": fresh})
    assert_equal_batches(take(fresh, 30), expected)


@pytest.mark.parametrize("size", [1, 3, 4, 23])
def test_evaluation_sees_every_example_once_in_order(size):
    batches = eval_batches(Source(size), batch_size=4, max_length=8)
    for _ in range(2):  # it can be iterated again
        seen, count = [], 0
        for batch in batches:
            count += 1
            assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 8)
            assert batch["labels"].shape == batch["weight"].shape == (4,)
            assert (batch["labels"].dtype, batch["weight"].dtype) == (np.int32, np.float32)
            real = batch["weight"] == 1
            assert (batch["weight"][~real] == 0).all()
            assert not batch["attention_mask"][~real].any()
            assert not batch["input_ids"][~real].any()
            assert batch["attention_mask"][real, 0].all()
            seen += batch["labels"][real].tolist()
        assert seen == list(range(size))
        assert count == -(-size // 4)


def test_training_and_evaluation_pad_alike():
    train = next(make_iterator(Source(), **OPTIONS | {"shuffle": False}))
    test = next(iter(eval_batches(Source(), batch_size=4, max_length=8)))
    assert_equal_batches([train | {"weight": np.ones(4, np.float32)}], [test])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 0, "batch_size must be an integer >= 1, got 0"),
        ("max_length", 0, "max_length must be an integer >= 1, got 0"),
        ("seed", -1, "seed must be an integer >= 0, got -1"),
        ("num_epochs", 0, "num_epochs must be an integer >= 1, got 0"),
        ("num_workers", -1, "num_workers must be an integer >= 0, got -1"),
    ],
)
def test_arguments_are_checked_by_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        make_iterator(Source(), **OPTIONS | {name: value})


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"batch_size must be at most 23, .* got 24"):
        make_iterator(Source(), **OPTIONS | {"batch_size": 24}, num_epochs=1)
    assert len(labels_of(take(make_iterator(Source(), **OPTIONS | {"batch_size": 24}), 1))) == 24


def make_train(source):
    return make_iterator(source, **OPTIONS)


def make_eval(source):
    return eval_batches(source, batch_size=4, max_length=8)


@pytest.mark.parametrize("make", [make_train, make_eval])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(0), "source must hold at least one example"),
        (OneExample([1, 2]), "source must give dicts with 'input_ids' and 'labels', got list"),
        (OneExample({"input_ids": np.ones(2, int)}), r"got \['input_ids'\]"),
        (
            OneExample({"input_ids": np.ones(2), "labels": 0}),
            r"'input_ids' must be integers of shape \[length\], .* got float64 \[2\]",
        ),
        (OneExample({"input_ids": np.ones((2, 2), int), "labels": 0}), r"got int64 \[2, 2\]"),
        (OneExample({"input_ids": np.ones(0, int), "labels": 0}), r"length >= 1, got int64 \[0\]"),
        (
            OneExample({"input_ids": np.ones(2, int), "labels": 0.5}),
            r"'labels' must be one integer, got float64",
        ),
        (
            OneExample({"input_ids": np.ones(9, int), "labels": 0}),
            "max_length must be at least 9, .* got 8: examples are never truncated",
        ),
        (
            OneExample({"input_ids": np.ones(2, int), "labels": 0}, lengths=np.array([2, 11])),
            "max_length must be at least 11",
        ),
    ],
)
def test_bad_sources_are_refused_at_once(make, source, message):
    with pytest.raises(ValueError, match=message):
        make(source)


def test_a_long_example_met_later_is_refused_too():
    iterator = make_iterator(Source(), **OPTIONS | {"max_length": 4, "shuffle": False})
    next(iterator)
    with pytest.raises(ValueError, match="max_length must be at least 5"):
        next(iterator)
