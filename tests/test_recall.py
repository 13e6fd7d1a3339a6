"""Associative recall: what examples are, and that the trainer takes them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from run_helpers import fast_compilations, quiet_console, tiny_config

import yoso_jax.trainer as trainer
from yoso_jax.data.recall import (
    FIRST_FILLER,
    FIRST_PAIR,
    FIRST_QUERY,
    NUM_KEYS,
    NUM_VALUES,
    RECALL_VOCAB_SIZE,
    RecallConfig,
    generate,
    prepare_recall,
)

SMALL = RecallConfig(num_train=1500, num_valid=20, num_test=30, length=21, num_pairs=5)


def test_labels_are_the_values_of_the_keys_asked_for() -> None:
    examples = generate(SMALL)
    assert len(examples.labels) == 1550
    places = set()
    for number, label in enumerate(examples.labels):
        tokens = examples.tokens[examples.offsets[number] : examples.offsets[number + 1]].tolist()
        assert len(tokens) == 21
        (query,) = set(tokens[::2])
        assert FIRST_QUERY <= query < FIRST_PAIR
        assert all(FIRST_PAIR <= token < RECALL_VOCAB_SIZE for token in tokens[1::2])
        pairs = [
            divmod(token - FIRST_PAIR, NUM_VALUES) for token in tokens[1::2] if token < FIRST_FILLER
        ]
        assert len(pairs) == len(dict(pairs)) == 5
        assert all(key < NUM_KEYS for key, _ in pairs)
        assert dict(pairs)[query - FIRST_QUERY] == label
        places |= {i for i, token in enumerate(tokens) if FIRST_PAIR <= token < FIRST_FILLER}
    assert places == set(range(1, 21, 2))
    counts = np.bincount(examples.labels, minlength=NUM_VALUES)
    assert len(counts) == NUM_VALUES
    assert np.abs(counts / 1550 - 1 / NUM_VALUES).max() < 0.05


def test_examples_depend_on_the_configuration_alone(tmp_path: Path) -> None:
    first, again = generate(SMALL), generate(SMALL)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    other = generate(dataclasses.replace(SMALL, seed=1))
    assert (first.tokens != other.tokens).mean() > 0.3
    data = prepare_recall(SMALL, tmp_path)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [1500, 20, 30]
    np.testing.assert_array_equal(data.train[3]["input_ids"], first.tokens[63:84])


def test_examples_to_train_on_may_be_shorter() -> None:
    config = dataclasses.replace(SMALL, length=80, min_length=20, num_train=1000)
    examples = generate(config)
    lengths = np.diff(examples.offsets)
    assert set(lengths[1000:]) == {80}
    assert (lengths[:1000].min(), lengths[:1000].max()) == (20, 80)
    assert 0.45 < (lengths[:1000] < 40).mean() < 0.55
    for start, length in zip(examples.offsets, lengths, strict=False):
        between = examples.tokens[start : start + length][1::2]
        assert ((between >= FIRST_PAIR) & (between < FIRST_FILLER)).sum() == 5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_train", 0, "num_train must be an integer >= 1"),
        ("num_pairs", 17, r"num_pairs must be an integer in 1\.\.16"),
        ("length", 9, "length must be an integer >= 10"),
        ("min_length", 22, r"min_length must be an integer in 10\.\.21 or None"),
        ("seed", -1, "seed must be an integer >= 0"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_values_out_of_range(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{field: value})


def test_two_steps_of_training(tmp_path: Path) -> None:
    tiny = tiny_config(tmp_path)
    model = tiny.model.replace(
        vocab_size=RECALL_VOCAB_SIZE, num_labels=NUM_VALUES, max_position_embeddings=21
    )
    config = dataclasses.replace(
        tiny, data=SMALL, model=model, sequence_length=21, steps=2, log_every=1
    )
    with fast_compilations():
        results = trainer.train(config, console=quiet_console()[0])
    assert results is not None
    assert results["step"] == 2
