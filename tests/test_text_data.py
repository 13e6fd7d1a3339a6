"""Text and Retrieval: every format read from files made here."""

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yoso_jax.data.pipeline import eval_batches, make_iterator
from yoso_jax.data.retrieval import RetrievalConfig, load_retrieval, normalise_subject
from yoso_jax.data.text import TextConfig, load_text
from yoso_jax.errors import DataError


def decode(input_ids: np.ndarray) -> bytes:
    assert input_ids.dtype == np.int32
    assert input_ids.min() > 0
    return (input_ids - 1).astype(np.uint8).tobytes()


def contents(split: Any) -> list[tuple[bytes, int]]:
    return [(decode(split[i]["input_ids"]), split[i]["labels"]) for i in range(len(split))]


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return folder


# Text


@pytest.fixture
def imdb(tmp_path: Path) -> Path:
    return write_files(
        tmp_path / "imdb",
        {
            f"{part}/{name}/{i}_7.txt": f"{part} {name} {i} \xe9 \xff".encode("latin1")
            for part in ("train", "test")
            for name in ("pos", "neg")
            for i in range(10)
        },
    )


def test_imdb(imdb: Path) -> None:
    config = TextConfig(valid_fraction=0.2)
    data = load_text(config, imdb, 100)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [16, 4, 20]
    seen = contents(data.train) + contents(data.valid)
    assert all(text.startswith(b"train") and text.endswith(b" \xe9 \xff") for text, _ in seen)
    assert len(set(seen)) == 20
    for text, label in seen + contents(data.test):
        assert (b" pos " in text) == (label == 1)
    assert contents(load_text(config, imdb, 100).valid) == contents(data.valid)
    other = dataclasses.replace(config, seed=1)
    assert contents(load_text(other, imdb, 100).valid) != contents(data.valid)
    assert max(load_text(config, imdb, 7).train.lengths) == 7


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "test" / "neg").rename(folder / "away"), "no folder .*test/neg"),
        (lambda folder: (folder / "train/pos/3_7.txt").write_bytes(b""), "train/pos/3_7.txt is e"),
        (lambda folder: [f.unlink() for f in (folder / "test/pos").iterdir()], "no file in .*pos"),
    ],
    ids=["missing", "empty file", "empty folder"],
)
def test_imdb_errors(imdb: Path, damage: Any, message: str) -> None:
    damage(imdb)
    with pytest.raises(DataError, match=message):
        load_text(TextConfig(), imdb, 100)


def test_unreadable_file(imdb: Path) -> None:
    (imdb / "train/pos/3_7.txt").chmod(0)
    if os.access(imdb / "train/pos/3_7.txt", os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises(DataError, match=r"cannot read .*3_7.txt"):
        load_text(TextConfig(), imdb, 100)


def test_mail_without_copies(tmp_path: Path) -> None:
    files = {f"ham/easy/{i}.txt": b"To: %d\r\n\r\nham %d\n" % (i, i % 12) for i in range(15)}
    files |= {f"spam/{i}": b"From: x\n\nspam %d" % i for i in range(8)}
    files |= {"spam/.hidden": b"x", "spam/headers": b"From: y\n\n\n"}
    data = load_text(TextConfig(source="mail"), write_files(tmp_path, files), 100)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [14, 2, 4]
    seen = contents(data.train) + contents(data.valid) + contents(data.test)
    assert len(set(seen)) == 20
    assert all(text.startswith(b"spam") == bool(label) for text, label in seen)
    write_files(tmp_path / "few", {"ham/a": b"\n\na", "spam/a": b"\n\nb"})
    with pytest.raises(DataError, match="few: 2 are too few"):
        load_text(TextConfig(source="mail"), tmp_path / "few", 100)


# Retrieval


def write_tsv(folder: Path, rows: dict[str, list[str]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("train", "eval", "test"):
        lines = rows.get(name, ["1.0\tA\tB\tfirst\tsecond", "0\tA\tC\tfirst\tthird one"])
        text = "".join(line + "\n" for line in lines)
        (folder / f"new_aan_pairs.{name}.tsv").write_text(text)
    return folder


def test_pairs_of_the_release(tmp_path: Path) -> None:
    data = load_retrieval(RetrievalConfig(), write_tsv(tmp_path, {}), 7)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [2, 2, 2]
    example = data.valid[1]
    assert [decode(each) for each in example["input_ids"]] == [b"first", b"third o"]
    assert [data.valid[i]["labels"] for i in range(2)] == [1, 0]
    assert data.train.lengths.tolist() == [6, 7]
    assert len(data.train.offsets) == 4  # the document in both pairs is kept once
    with pytest.raises(IndexError, match=r"0\.\.1, got 2"):
        data.train[2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1.0\tA\tB\tfirst", "expected label, id1, id2, text1 and text2 separated by tabs, got 4"),
        ("label\tid1\tid2\ttext1\ttext2", "the label must be 0 or 1, got 'label'"),
        ("1\tA\tB\t\tsecond", "a text is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, row: str, message: str) -> None:
    write_tsv(tmp_path, {"eval": ["1\tA\tB\tx\ty", row]})
    with pytest.raises(DataError, match=rf"new_aan_pairs\.eval\.tsv, line 2: {message}"):
        load_retrieval(RetrievalConfig(), tmp_path, 7)


def test_files_of_the_release_must_be_there_and_hold_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*train\.tsv, .*eval\.tsv, .*test\.tsv"):
        load_retrieval(RetrievalConfig(), tmp_path, 7)
    with pytest.raises(DataError, match=r"test\.tsv: no pairs"):
        load_retrieval(RetrievalConfig(), write_tsv(tmp_path, {"test": []}), 7)


@pytest.mark.parametrize(
    "subject",
    [
        "Hello  World",
        "Re: hello world",
        "RE[2]: [List] Fwd:  Hello\n World",
        "[a][b] re : hello world",
    ],
)
def test_subjects_of_one_thread_are_equal(subject: str) -> None:
    assert normalise_subject(subject) == "hello world"


@pytest.fixture
def mails(tmp_path: Path) -> Path:
    """Thirty threads of 2 to 6 mails, single mails, and mails that are in no thread."""
    files = {}
    for thread in range(30):
        for i in range(2 + thread % 5):
            subject = ("Re: " if i else "") + f"[list] Topic {thread}"
            name = f"{'spam' if thread % 3 == 0 else 'ham'}/{i}/{thread}.txt"
            head = f"From: someone\r\nSubject: {subject}\r\nX: \xe9\r\n\r\n"
            files[name] = (head + f"thread {thread} mail {i}").encode("latin1")
    files["ham/single"] = b"Subject: alone\n\nbody"
    files["ham/no_subject"] = files["ham/no_subject_2"] = b"From: x\n\nbody 2"
    files["ham/no_body"] = b"Subject: Topic 1\n\n \n"
    files["ham/copy"] = b"Subject: Topic 2\n\nthread 2 mail 0"
    return write_files(tmp_path / "mails", files)


def test_pairs_of_mails(mails: Path) -> None:
    config = RetrievalConfig(source="mail", valid_fraction=0.2, test_fraction=0.2)
    data = load_retrieval(config, mails, 100)
    threads = []
    for split in (data.train, data.valid, data.test):
        used, sides = set(), Counter()
        for i in range(len(split)):
            first, second = (decode(each).split() for each in split[i]["input_ids"])
            assert first != second
            assert (first[1] == second[1]) == bool(split[i]["labels"])
            assert first[0] == second[0] == b"thread"
            used |= {first[1], second[1]}
            for mail in (first, second):
                sides[tuple(mail), split[i]["labels"]] += 1
        assert 2 * split.labels.sum() == len(split)
        # No mail is more often in pairs of one kind.
        assert all(count == sides[mail, 1 - label] for (mail, label), count in sides.items())
        threads.append(used)
    assert [len(used) for used in threads] == [18, 6, 6]
    assert len(set.union(*threads)) == 30
    again = load_retrieval(config, mails, 100)
    np.testing.assert_array_equal(again.train.pairs, data.train.pairs)
    other = load_retrieval(dataclasses.replace(config, seed=1), mails, 100)
    assert contents_of_pairs(other.test) != contents_of_pairs(data.test)


def contents_of_pairs(split: Any) -> list[tuple[bytes, ...]]:
    return [tuple(decode(each) for each in split[i]["input_ids"]) for i in range(len(split))]


def test_too_few_threads(tmp_path: Path) -> None:
    files = {
        f"{name}/{i}": f"Subject: a\n\n{name} {i}".encode()
        for name in ("ham", "spam")
        for i in range(9)
    }
    write_files(tmp_path, files)
    config = RetrievalConfig(source="mail")
    with pytest.raises(DataError, match=r"the threads of two or more mails in .* 1 are too few"):
        load_retrieval(config, tmp_path, 100)
    for i in range(9):
        write_files(
            tmp_path, {f"ham/b{j}/{i}": f"Subject: b{j}\n\n{i} {j}".encode() for j in (1, 2)}
        )
    with pytest.raises(DataError, match="too few or too unequal to draw pairs across them"):
        load_retrieval(config, tmp_path, 100)


def test_pairs_are_padded_and_masked_and_resume_exactly(tmp_path: Path) -> None:
    data = load_retrieval(RetrievalConfig(), write_tsv(tmp_path, {}), 8)
    (batch,) = eval_batches(data.train, batch_size=3, max_length=9)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 2, 9)
    assert batch["weight"].tolist() == [1, 1, 0]
    np.testing.assert_array_equal(batch["attention_mask"].sum(-1), [[5, 6], [5, 8], [0, 0]])
    np.testing.assert_array_equal(batch["attention_mask"], batch["input_ids"] > 0)

    def iterator() -> Any:
        options: dict[str, Any] = {"batch_size": 3, "max_length": 9, "seed": 1, "shuffle": True}
        return make_iterator(data.train, **options)

    whole = iterator()
    next(whole)
    state = whole.get_state()
    resumed = iterator()
    resumed.set_state(state)
    for _ in range(4):
        np.testing.assert_array_equal(next(whole)["input_ids"], next(resumed)["input_ids"])


class OneTriple:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": (np.ones(3, int),) * 3, "labels": 0}


def test_three_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one or two sequences, got 3"):
        eval_batches(OneTriple(), batch_size=1, max_length=4)
