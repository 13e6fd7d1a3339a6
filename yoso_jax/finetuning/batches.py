"""Batches of one shape from features of many lengths."""

import functools
from collections.abc import Iterable, Sequence

import grain
import numpy as np
from jaxtyping import Int

from yoso_jax.data.length_batches import LengthBatches
from yoso_jax.data.pipeline import READ_OPTIONS, Batch, iterate, shuffle_seed
from yoso_jax.finetuning.features import Features, Row
from yoso_jax.losses import IGNORED


def train_batches(
    features: Features,
    *,
    batch_size: int,
    max_length: int,
    pad_id: int,
    seed: int,
    num_workers: int = 0,
    start: int = 0,
    length_buckets: Sequence[int] | None = None,
) -> grain.DatasetIterator[Batch]:
    """Makes a resumable iterator of batches, without end, each epoch in its own random order.

    Args:
        features: what is in them.
        batch_size: B, >= 1.
        max_length: T, at least the length of every row.
        pad_id: fills rows up.
        seed: >= 0; orders the rows.
        num_workers: processes that prepare batches; 0 prepares them in a thread of this one.
        start: number of the first batch.
        length_buckets: lengths to pad to instead, ascending up to `max_length`; batches are then
            those of `yoso_jax.data.length_batches`.

    Returns:
        Batches of what a model is called with, see `pad_row`.
    """
    make = functools.partial(_make_batch, features, pad_id)
    if length_buckets is not None:
        batches = LengthBatches(make, features.lengths, length_buckets, batch_size, seed)
        return iterate(grain.MapDataset.source(batches), num_workers, start)
    # Grain takes numbers one by one, not rows, which takes longer than to pad them.
    numbers = grain.MapDataset.range(len(features)).shuffle(shuffle_seed(seed)).repeat(None)
    batches = numbers.batch(batch_size, drop_remainder=True)
    make_full = functools.partial(make, max_length=max_length)
    return iterate(batches.map(make_full), num_workers, start)


def ordered_batches(
    features: Features, *, batch_size: int, max_length: int, pad_id: int
) -> Iterable[Batch]:
    """Makes batches that hold every row once, in order, as `train_batches` has them.

    The last is filled up with rows that are all padding, so that all shapes are equal.
    """
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return (
        grain.MapDataset.source(features)
        .map(functools.partial(pad_row, max_length=max_length, pad_id=pad_id))
        .batch(batch_size, batch_fn=fill)
        .to_iter_dataset(READ_OPTIONS)
    )


def _make_batch(
    features: Features, pad_id: int, rows: Int[np.ndarray, " B"], max_length: int
) -> Batch:
    examples = [pad_row(features[int(row)], max_length, pad_id) for row in rows]
    return {name: np.stack([each[name] for each in examples]) for name in examples[0]}


def pad_row(row: Row, max_length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Pads a row of `Features` to T = `max_length`.

    Returns:
        `input_ids`, with `pad_id` on padding, and perhaps `token_type_ids`, int32 [T]; and
        `attention_mask`, bool [T], True on tokens; for multiple choice [C, T]. Labels: `labels`
        of words int32 [T], -100 on padding; others as in the row.
    """
    padded = {}
    for name, value in row.items():
        fill = {"input_ids": pad_id, "labels": IGNORED}.get(name, 0)
        if isinstance(value, tuple):
            padded[name] = np.stack([_pad(each, max_length, fill) for each in value])
        else:
            padded[name] = _pad(value, max_length, fill) if np.ndim(value) else np.asarray(value)
    ids = row["input_ids"]
    lengths = [each.size for each in ids] if isinstance(ids, tuple) else ids.size
    padded["attention_mask"] = np.arange(max_length) < np.expand_dims(lengths, -1)
    return padded


def _pad(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    padded = np.full(length, fill, values.dtype)
    padded[: values.size] = values
    return padded
