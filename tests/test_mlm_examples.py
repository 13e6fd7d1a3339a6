"""Masks, segments and batches: what they are, and that they depend on the seed alone."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlm_helpers import BOS, EOS, MASK, PAD, VOCABULARY, make_stream, random_documents

from yoso_jax.data.masking import Masking, choose_positions, mask_tokens
from yoso_jax.data.mlm import eval_batches, train_batches
from yoso_jax.data.mlm_examples import ExampleMaker, find_cut
from yoso_jax.data.packing import Blocks, TokenStream

MAKER = ExampleMaker(VOCABULARY, Masking(), sequence_length=32, seed=0, epoch_length=1000)
WITH_ORDER = dataclasses.replace(MAKER, with_order=True)


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    return make_stream(tmp_path, random_documents(40))


def unmask(example: dict[str, np.ndarray]) -> np.ndarray:
    """The sequence as it was, without padding."""
    ids, count = example["input_ids"].copy(), int((example["labels"] >= 0).sum())
    ids[example["positions"][:count]] = example["labels"][:count]
    return ids[example["attention_mask"]]


def assert_equal(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        assert first[name].dtype == second[name].dtype


def are_equal(first: Any, second: Any) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in first)


# Masks


@pytest.mark.parametrize("whole_words", [False, True], ids=["tokens", "words"])
def test_chosen_positions(whole_words: bool) -> None:
    rng = np.random.default_rng(0)
    chosen = Counter()
    missing = 0
    for _ in range(300):
        masking = Masking(rate=rng.uniform(0.05, 0.9), whole_words=whole_words)
        length = int(rng.integers(10, 50))
        ordinary, starts = rng.random(length) < 0.9, rng.random(length) < 0.6
        positions = choose_positions(ordinary, starts, masking, rng)
        assert ordinary[positions].all()
        assert (np.diff(positions) > 0).all()
        count = masking.count(int(ordinary.sum()))
        if not whole_words:
            assert positions.size == count
        else:
            assert positions.size <= count
            missing += count - positions.size
            is_chosen = np.isin(np.arange(length), positions)
            for i in range(1, length):  # within a word all are chosen or none
                if ordinary[i - 1] and ordinary[i] and not starts[i]:
                    assert is_chosen[i - 1] == is_chosen[i]
        chosen.update(positions[positions < 10].tolist())
    assert missing < 150  # half a token an example
    assert min(chosen.values()) > 0.7 * max(chosen.values())  # no place is preferred


def test_counts() -> None:
    assert [Masking(0.15).count(n) for n in (0, 1, 10, 100, 511)] == [0, 1, 2, 15, 77]


def test_a_word_longer_than_allowed_is_passed_over() -> None:
    every, rng = np.ones(20, np.bool_), np.random.default_rng(0)
    one_word = np.arange(20) == 0
    masking = Masking(0.5, whole_words=True)
    assert choose_positions(every, one_word, masking, rng).size == 0
    assert choose_positions(~every, one_word, masking, rng).size == 0


@pytest.mark.parametrize(("mask", "random"), [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_shares(mask: float, random: float) -> None:
    rng = np.random.default_rng(0)
    ids, positions = np.full(20_000, 7, np.int32), np.arange(0, 20_000, 2)
    shown = mask_tokens(ids, positions, Masking(0.15, mask, random), VOCABULARY, rng)
    assert (shown[1::2] == 7).all()
    assert (ids == 7).all()
    found = Counter(shown[::2].tolist())
    assert found[MASK] / 10_000 == pytest.approx(mask, abs=0.02)
    others = [found[i] for i in VOCABULARY.ordinary if i != 7]
    assert sum(others) / 10_000 == pytest.approx(random * 24 / 25, abs=0.02)
    assert max(others) - min(others) <= 8 * (1 + random * 400) ** 0.5
    assert set(found) <= {MASK, *VOCABULARY.ordinary.tolist()}


# Examples


@pytest.mark.parametrize("maker", [MAKER, WITH_ORDER], ids=["masks", "order"])
def test_examples(stream: TokenStream, maker: ExampleMaker) -> None:
    blocks = Blocks(stream, maker.block_length)
    length, special = maker.sequence_length, maker.sequence_length - maker.block_length
    swapped = []
    for block in map(blocks.__getitem__, range(len(blocks))):
        example = maker(0, block)
        ids = unmask(example)
        assert ids.size == block.tokens.size + special
        assert ids[0] == BOS
        assert (example["input_ids"][ids.size :] == PAD).all()
        np.testing.assert_array_equal(example["attention_mask"], np.arange(length) < ids.size)
        count = maker.masking.count(int((block.tokens != EOS).sum()))
        labels, positions = example["labels"], example["positions"]
        assert labels.shape == positions.shape == (maker.num_predicted,)
        assert (labels[:count] >= 4).all()
        assert (labels[count:] == -100).all()
        assert (positions[count:] == 0).all()
        assert (np.diff(positions[:count]) > 0).all()
        assert all(array.dtype in (np.int32, np.bool_) for array in example.values())
        if maker.with_order:
            swapped.append(check_order(block.tokens, ids, example))
        else:
            np.testing.assert_array_equal(ids[1:], block.tokens)
            assert example.keys() == {"input_ids", "attention_mask", "positions", "labels"}
    if maker.with_order:
        assert len(swapped) > 30
        assert 0.3 < np.mean([label == 1 for label in swapped]) < 0.7


def check_order(tokens: np.ndarray, ids: np.ndarray, example: dict[str, np.ndarray]) -> int:
    types, label = example["token_type_ids"], int(example["order_labels"])
    assert (types[ids.size :] == 0).all()
    types = types[: ids.size]
    assert (np.diff(types) >= 0).all()
    first, second = ids[types == 0][1:], ids[types == 1]
    assert first[-1] == second[-1] == EOS
    first, second = first[:-1], second[:-1]
    if label == 1:
        first, second = second, first
    np.testing.assert_array_equal(np.concatenate([first, second]), tokens)
    if label != -100:
        assert first.size
        assert second.size
        assert EOS not in (first[-1], second[0])  # cut inside a document
        assert second[0] % 2 == 0  # where a word begins
    return label


def test_cuts() -> None:
    rng = np.random.default_rng(0)

    def cuts(tokens: list[int]) -> set[int | None]:
        ids = np.array(tokens, np.int32)
        starts = (ids % 2 == 0) | (ids == EOS)
        return {find_cut(ids, starts, VOCABULARY, rng) for _ in range(100)}

    # Ids of 25 and more end a sentence, even ones begin a word.
    assert cuts([4, 5, 26, 6, 7, 8, 28, 4]) == {3}
    assert cuts([26, 4, 5, 26, 6, 26, 7, 8, 8]) == {4}  # 7 begins no word
    assert cuts([26, 6, 8, 10, 12, 14, 16, 18]) == {2, 3, 4, 5, 6}  # the only end is too early
    assert cuts([4, 6, 5, 5, 5, 5, 5, 5, 5]) == {1}
    assert cuts([4, EOS, 6, EOS, 8]) == {None}
    assert cuts([4]) == {None}
    assert cuts([EOS]) == {None}


def test_what_cannot_be_cut_has_no_order(tmp_path: Path) -> None:
    block = Blocks(make_stream(tmp_path, [[5], [7], [9]]), 10)[0]
    example = WITH_ORDER(0, block)
    assert example["order_labels"] == -100
    assert unmask(example).tolist() == [BOS, 5, EOS, 7, EOS, 9, EOS, EOS, EOS]
    assert example["token_type_ids"].nonzero()[0].tolist() == [8]


@pytest.mark.parametrize("maker", [MAKER, WITH_ORDER], ids=["masks", "order"])
def test_masks_depend_on_seed_epoch_and_block(stream: TokenStream, maker: ExampleMaker) -> None:
    blocks = Blocks(stream, maker.block_length)
    first = maker(3, blocks[5])
    assert_equal(first, maker(999, blocks[5]))
    assert not are_equal(first, maker(1000, blocks[5]))
    assert not are_equal(first, dataclasses.replace(maker, seed=1)(3, blocks[5]))
    assert not np.array_equal(first["positions"], maker(3, blocks[6])["positions"])
    static = dataclasses.replace(maker, epoch_length=None)
    assert_equal(static(0, blocks[5]), static(10**6, blocks[5]))


# Batches


def take(iterator: Any, count: int) -> list[Any]:
    return [next(iterator) for _ in range(count)]


def test_batches_resume_and_do_not_depend_on_workers(stream: TokenStream) -> None:
    length = len(Blocks(stream, WITH_ORDER.block_length))
    maker = dataclasses.replace(WITH_ORDER, epoch_length=length)

    def open_iterator(num_workers: int = 0) -> Any:
        return train_batches(stream, maker, batch_size=4, num_epochs=2, num_workers=num_workers)

    expected = list(open_iterator())
    assert len(expected) == 2 * length // 4
    with_workers = open_iterator(2)
    # Workers are slow to start: the same iterator goes back. The other is made again.
    for first, second in ((open_iterator(), open_iterator()), (with_workers, with_workers)):
        found = take(first, 5)
        state = json.loads(json.dumps(first.get_state()))
        take(first, 3)
        second.set_state(state)
        found += second
        assert len(found) == len(expected)
        for batch, wanted in zip(found, expected, strict=True):
            assert_equal(batch, wanted)
    with_workers.close()


def test_every_epoch_has_every_block_once(stream: TokenStream) -> None:
    blocks = Blocks(stream, MAKER.block_length)
    maker = dataclasses.replace(MAKER, epoch_length=len(blocks))
    batches = list(train_batches(stream, maker, batch_size=1, num_epochs=3))
    rows = [unmask({name: array[0] for name, array in batch.items()}) for batch in batches]
    assert len(rows) == 3 * len(blocks)
    epochs = [rows[i : i + len(blocks)] for i in range(0, len(rows), len(blocks))]
    expected = sorted(
        block.tokens.tolist() for block in map(blocks.__getitem__, range(len(blocks)))
    )
    for epoch in epochs:
        assert sorted(row[1:].tolist() for row in epoch) == expected
    orders = {tuple(tuple(row) for row in epoch) for epoch in epochs}
    assert len(orders) == 3
    other = next(train_batches(stream, dataclasses.replace(maker, seed=1), batch_size=4))
    assert not are_equal(other, next(train_batches(stream, maker, batch_size=4)))


def test_static_masks_stay_in_every_epoch(stream: TokenStream) -> None:
    def seen(maker: ExampleMaker) -> Counter[bytes]:
        batches = train_batches(stream, maker, batch_size=1, num_epochs=2)
        return Counter(batch["input_ids"].tobytes() for batch in batches)

    assert set(seen(dataclasses.replace(MAKER, epoch_length=None)).values()) == {2}
    length = len(Blocks(stream, MAKER.block_length))
    changing = seen(dataclasses.replace(MAKER, epoch_length=length))
    assert len(changing) > 1.9 * length


def test_evaluation_sees_every_block_once(stream: TokenStream) -> None:
    static = dataclasses.replace(WITH_ORDER, epoch_length=None)
    blocks = Blocks(stream, static.block_length)
    batches = eval_batches(stream, static, batch_size=5)
    found = list(batches)
    assert len(found) == -(-len(blocks) // 5)
    weights = np.concatenate([batch["weight"] for batch in found])
    assert weights.sum() == weights[: len(blocks)].sum() == len(blocks)
    for number in range(len(blocks)):
        batch = found[number // 5]
        row = {name: array[number % 5] for name, array in batch.items() if name != "weight"}
        assert_equal(row, static(0, blocks[number]))
    assert len(blocks) % 5
    assert not found[-1]["attention_mask"][len(blocks) % 5 :].any()
    for first, second in zip(found, batches, strict=True):
        assert_equal(first, second)
