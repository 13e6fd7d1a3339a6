"""LRA Retrieval: whether two documents, read as bytes, belong together."""

import dataclasses
import email
import email.policy
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from yoso_jax.data.splits import PairSplit, TaskData, lay_end_to_end, split_by_fraction
from yoso_jax.data.text import encode_bytes, read_files, split_mail
from yoso_jax.errors import DataError
from yoso_jax.validation import Validated

Pair = tuple[bytes, bytes, int]

_LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
# A mail is paired with this many later ones of its thread, so that long threads do not outweigh all
# others.
_MAX_PARTNERS = 8
_ATTEMPTS = 100
# What mail programs and mailing lists put before a subject.
_PREFIX = re.compile(
    r"^\s*((re|fwd?|aw|sv|antw)\s*(\[\d+\]|\(\d+\))?\s*:|\[[^\]]*\])", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(Validated):
    """Pairs of documents to read from `data_dir`, or to make of the mails there.

    Attributes:
      source: `lra`, the files `new_aan_pairs.{train,eval,test}.tsv` of the Long Range Arena release
        (label, id1, id2, text1, text2, no header); or `mail`, the folders `ham` and `spam`, a
        stand-in of our own: two mails belong together if they have the same subject, and a model
        sees their bodies only. Half of the pairs do, and no thread is in two splits. Figures
        reached on it cannot be compared with published ones.
      valid_fraction, test_fraction: of the threads, for `mail`, in (0, 0.5).
      seed: >= 0; divides the threads and draws the pairs.

    Raises:
      ValueError: a field is out of range; the message names it.
    """

    task: ClassVar[str] = "retrieval"

    source: Literal["lra", "mail"] = "lra"
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choice("source", ("lra", "mail"))
        for name in ("valid_fraction", "test_fraction"):
            self._check_number(name, "in (0, 0.5)", lambda value: 0 < value < 0.5)
        self._check_integer("seed", 0)


def load_retrieval(config: RetrievalConfig, folder: Path, max_length: int) -> TaskData:
    """Reads or makes the pairs; label 1 is a pair that belongs together.

    Args:
      config: what to read.
      folder: see `RetrievalConfig.source`.
      max_length: bytes of a document to keep; the rest is cut off.

    Raises:
      DataError: a file or a folder is missing, a line is not as described (the message names the
        file and the line), or there are too few threads.
    """
    if config.source == "lra":
        files = [folder / f"new_aan_pairs.{name}.tsv" for name in ("train", "eval", "test")]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise DataError(f"there is no {', '.join(missing)}")
        splits = [_make_split(_read_tsv(file, max_length), str(file)) for file in files]
        return TaskData(*splits, folder=folder)
    threads = _read_threads(folder, max_length)
    fractions = (config.valid_fraction, config.test_fraction)
    try:
        parts = split_by_fraction(len(threads), fractions, config.seed)
    except ValueError as error:
        raise DataError(f"the threads of two or more mails in {folder}: {error}") from None
    splits = [
        _make_split(
            _pair_up([threads[i] for i in part], [config.seed, number], folder), str(folder)
        )
        for number, part in enumerate(parts)
    ]
    return TaskData(*splits, folder=folder)


def normalise_subject(subject: str) -> str:
    """The subject of a thread: without `Re:`, `Fwd:` and `[list]` before it, case and spacing."""
    previous = None
    while previous != subject:
        previous, subject = subject, _PREFIX.sub("", subject)
    return " ".join(subject.lower().split())


def _read_tsv(path: Path, max_length: int) -> Iterable[Pair]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            place = f"{path}, line {number}"
            if len(fields) != 5:
                raise DataError(
                    f"{place}: expected label, id1, id2, text1 and text2 separated by tabs, "
                    f"got {len(fields)} fields"
                )
            label, _, _, first, second = fields
            if label not in _LABELS:
                shown = label[:20].decode(errors="replace")
                raise DataError(f"{place}: the label must be 0 or 1, got {shown!r}")
            if not first or not second:
                raise DataError(f"{place}: a text is empty")
            yield first[:max_length], second[:max_length], _LABELS[label]


def _read_threads(folder: Path, max_length: int) -> list[list[bytes]]:
    """The bodies of all threads of two different mails or more."""
    threads: defaultdict[str, list[bytes]] = defaultdict(list)
    for name in ("ham", "spam"):
        for mail in read_files(folder / name).values():
            head, body = split_mail(mail)
            # The older parser of two: it takes any header for what it is worth.
            header = email.message_from_bytes(head, policy=email.policy.compat32)
            subject = normalise_subject(str(header.get("Subject", "")))
            if subject and body:
                threads[subject].append(body[:max_length])
    distinct = (list(dict.fromkeys(bodies)) for bodies in threads.values())
    return [bodies for bodies in distinct if len(bodies) > 1]


def _pair_up(threads: list[list[bytes]], seed: list[int], folder: Path) -> list[Pair]:
    """All near pairs of every thread, and as many of the same mails across threads, shuffled."""
    mails = [(thread, body) for thread, bodies in enumerate(threads) for body in bodies]
    partners = [
        (i, j)
        for i in range(len(mails))
        for j in range(i + 1, min(i + 1 + _MAX_PARTNERS, len(mails)))
        if mails[i][0] == mails[j][0]
    ]
    rng = np.random.default_rng([2, *seed])
    together = rng.permuted(np.array(partners), axis=1)
    # Every mail is as often in pairs of either kind, so that no mail gives the answer away.
    first, second = together[:, 0], rng.permutation(together[:, 1])
    thread_of = np.array([thread for thread, _ in mails])
    for _ in range(_ATTEMPTS):
        (same,) = np.nonzero(thread_of[first] == thread_of[second])
        if not len(same):
            break
        for i in same:
            j = rng.integers(len(second))
            second[i], second[j] = second[j], second[i]
    else:
        raise DataError(
            f"the threads in {folder} are too few or too unequal to draw pairs across them"
        )
    apart = np.stack([first, second], axis=1)
    pairs = np.concatenate([together, apart])
    labels = np.repeat([1, 0], len(together))
    return [
        (mails[pairs[k, 0]][1], mails[pairs[k, 1]][1], int(labels[k]))
        for k in rng.permutation(len(pairs))
    ]


def _make_split(examples: Iterable[Pair], origin: str) -> PairSplit:
    numbers: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    labels: list[int] = []
    for first, second, label in examples:
        pairs.append(
            (
                numbers.setdefault(first, len(numbers)),
                numbers.setdefault(second, len(numbers)),
            )
        )
        labels.append(label)
    if not labels:
        raise DataError(f"{origin}: no pairs")
    tokens, offsets = lay_end_to_end([encode_bytes(text) for text in numbers])
    return PairSplit(tokens, offsets, np.array(pairs, np.int32), np.array(labels, np.uint8))
