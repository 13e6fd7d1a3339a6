"""Batches of padded token sequences through Grain."""

import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from yoso_jax.data.length_batches import LengthBatches

Source = grain.sources.RandomAccessDataSource
Batch = dict[str, np.ndarray]

# Examples are small and already in memory or mapped, and what is left to do is Python: a second
# thread would wait for the first one, and both take half as long again. A short queue keeps batches
# ready without holding hundreds of them.
READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)


def make_iterator(
    source: Source,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    shuffle: bool,
    num_epochs: int | None = None,
    drop_remainder: bool = True,
    num_workers: int = 0,
    start: int = 0,
    length_buckets: Sequence[int] | None = None,
) -> grain.DatasetIterator[Batch]:
    """Makes a resumable iterator of training batches.

    A batch is `{"input_ids": int32 [B, T], "attention_mask": bool [B, T], "labels": int32 [B]}`
    with T = `max_length`, and [B, 2, T] for a source of pairs; ids are padded with 0, the mask is
    True on tokens. Batches depend on `seed` alone, not on `num_workers`. Epochs follow each other
    without a gap: a batch may hold the end of one and the start of the next.

    The position is exact: `start`, the batches already drawn, is all there is to it, so it holds
    for any `num_workers`. It can also be saved with `get_state` and `set_state`, or by Orbax with
    the iterator as a checkpointable, for an iterator made with the same arguments.

    Args:
      source: random access to `{"input_ids": integer [length], "labels": integer}`; for pairs
        `input_ids` is a tuple of two such arrays.
      batch_size: B, >= 1.
      max_length: T, at least the length of every example. Nothing is ever truncated.
      seed: >= 0; orders the examples when `shuffle` is set.
      shuffle: draw each epoch in its own random order.
      num_epochs: how often to go through `source`; None repeats it for ever.
      drop_remainder: drop a last batch that is not full, so that all shapes are equal.
      num_workers: processes that prepare batches; 0 prepares them in a thread of this one.
      start: number of the first batch, >= 0; those before it are not prepared.
      length_buckets: lengths to pad to instead of `max_length`, ascending up to it; batches without
        end, shuffled, are then those of `yoso_jax.data.length_batches`. The source must have
        `lengths`.

    Raises:
      ValueError: an argument or an example is out of range; the message names it. An example of a
        source without a `lengths` attribute is checked when it is drawn.
    """
    _check_source(source, max_length)
    _check_integer("batch_size", batch_size, minimum=1)
    _check_integer("seed", seed, minimum=0)
    _check_integer("num_workers", num_workers, minimum=0)
    _check_integer("start", start, minimum=0)
    if num_epochs is not None:
        _check_integer("num_epochs", num_epochs, minimum=1)
        num_examples = num_epochs * len(source)
        if drop_remainder and num_examples < batch_size:
            raise ValueError(
                f"batch_size must be at most {num_examples}, the examples in num_epochs="
                f"{num_epochs}, when drop_remainder is set; got {batch_size}"
            )
    if length_buckets is not None:
        if not shuffle or num_epochs is not None or tuple(length_buckets)[-1] != max_length:
            raise ValueError(
                "length_buckets must end with max_length, and needs shuffle and num_epochs=None"
            )
        lengths: Any = getattr(source, "lengths")  # noqa: B009 (only of some sources)
        make = functools.partial(_make_batch, source)
        batches = LengthBatches(make, lengths, length_buckets, batch_size, seed)
        return iterate(grain.MapDataset.source(batches), num_workers, start)
    rows = grain.MapDataset.range(len(source))
    if shuffle:
        rows = rows.shuffle(shuffle_seed(seed))
    # Grain takes numbers one by one, not examples: those of a batch are padded and put together
    # at once, which takes a tenth of the time.
    make = functools.partial(_make_batch, source, max_length=max_length)
    batches = rows.repeat(num_epochs).batch(batch_size, drop_remainder=drop_remainder).map(make)
    return iterate(batches, num_workers, start)


def shuffle_seed(seed: int) -> int:
    """What to give Grain to shuffle with, for a seed >= 0.

    Grain shuffles epoch e with seed + e; a hash keeps seeds 0, 1, 2 from sharing each other's
    orders.
    """
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def iterate(
    dataset: grain.MapDataset[Batch], num_workers: int, start: int
) -> grain.DatasetIterator[Batch]:
    """A resumable iterator of batches from number `start` on.

    They are prepared by processes, or by a thread if there are none.
    """
    if num_workers and not flags.FLAGS.is_parsed():
        # Grain's workers read absl flags, which only an absl.app program parses.
        flags.FLAGS.mark_as_parsed()
    return iter(
        dataset[start:]
        .to_iter_dataset(READ_OPTIONS)
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    )


def eval_batches(source: Source, *, batch_size: int, max_length: int) -> grain.IterDataset[Batch]:
    """Makes batches that hold every example exactly once, in order.

    A batch is one of `make_iterator` with `"weight": float32 [B]`, 1 for an example. The last batch
    is filled up to B with rows of weight 0, all padding, so that all shapes are equal.

    Args:
      source: as in `make_iterator`.
      batch_size: B, >= 1.
      max_length: T, at least the length of every example.

    Returns:
      An iterable of `ceil(len(source) / batch_size)` batches; it may be iterated repeatedly.

    Raises:
      ValueError: as in `make_iterator`.
    """
    _check_source(source, max_length)
    _check_integer("batch_size", batch_size, minimum=1)
    num_examples = len(source)

    def make(number: int) -> Batch:
        start = number * batch_size
        rows = np.arange(start, min(start + batch_size, num_examples))
        batch = _make_batch(source, rows, max_length)
        batch["weight"] = np.ones(len(rows), np.float32)
        missing = batch_size - len(rows)
        return {
            name: np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) for name, x in batch.items()
        }

    num_batches = -(-num_examples // batch_size)
    return grain.MapDataset.range(num_batches).map(make).to_iter_dataset(READ_OPTIONS)


def _make_batch(source: Source, rows: Int[np.ndarray, " B"], max_length: int) -> Batch:
    """The examples of these numbers, as `make_iterator` describes a batch."""
    examples = [source[row] for row in rows.tolist()]
    sequences = [_check_example(example, max_length) for example in examples]
    lengths = np.array([[sequence.size for sequence in each] for each in sequences])
    padded = np.zeros((*lengths.shape, max_length), np.int32)
    for pair, each in zip(padded, sequences, strict=True):
        for row, sequence in zip(pair, each, strict=True):
            row[: sequence.size] = sequence
    mask = np.arange(max_length) < lengths[..., None]
    is_pair = isinstance(examples[0]["input_ids"], tuple)
    return {
        "input_ids": padded if is_pair else padded[:, 0],
        "attention_mask": mask if is_pair else mask[:, 0],
        "labels": np.array([example["labels"] for example in examples], np.int32),
    }


def _check_integer(name: str, value: Any, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")


def _check_source(source: Source, max_length: int) -> None:
    """Finds what can be found before the first batch: the kind and the lengths of examples."""
    _check_integer("max_length", max_length, minimum=1)
    if len(source) == 0:
        raise ValueError("source must hold at least one example, it is empty")
    _check_example(source[0], max_length)
    lengths = getattr(source, "lengths", None)
    if lengths is not None:
        _check_length(int(np.max(lengths)), max_length)


def _check_example(element: Any, max_length: int) -> list[np.ndarray]:
    """Returns the sequences of an example, one or two, that can be padded to `max_length`."""
    if not isinstance(element, dict) or not {"input_ids", "labels"} <= element.keys():
        found = sorted(element) if isinstance(element, dict) else type(element).__name__
        raise ValueError(f"source must give dicts with 'input_ids' and 'labels', got {found}")
    input_ids, label = element["input_ids"], np.asarray(element["labels"])
    if isinstance(input_ids, tuple) and len(input_ids) != 2:
        raise ValueError(f"source's 'input_ids' must be one or two sequences, got {len(input_ids)}")
    sequences = [
        np.asarray(each) for each in (input_ids if isinstance(input_ids, tuple) else [input_ids])
    ]
    for sequence in sequences:
        if sequence.ndim != 1 or sequence.dtype.kind not in "iu" or sequence.size == 0:
            raise ValueError(
                "source's 'input_ids' must be integers of shape [length], length >= 1, got "
                f"{sequence.dtype} {list(sequence.shape)}"
            )
        _check_length(sequence.size, max_length)
    if label.ndim != 0 or label.dtype.kind not in "iu":
        raise ValueError(
            f"source's 'labels' must be one integer, got {label.dtype} {list(label.shape)}"
        )
    return sequences


def _check_length(length: int, max_length: int) -> None:
    if length > max_length:
        raise ValueError(
            f"max_length must be at least {length}, the length of an example in source, got "
            f"{max_length}: examples are never truncated"
        )
