"""Image: CIFAR-10 and Fashion-MNIST read from files made here."""

import gzip
import os
import pickle
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yoso_jax.data import images
from yoso_jax.data.images import ImageConfig, load_images
from yoso_jax.errors import DataError


def python_2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """What Python 2 wrote: byte strings, and numpy's modules by their old names."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    shape = b"".join(b"J" + struct.pack("<i", size) for size in data.shape)
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    return b"".join(
        (
            b"\x80\x02}q\x01(",
            text(b"batch_label") + text(b"testing batch 1 of 1") + text(b"labels"),
            b"](" + numbers + b"e" + text(b"data"),
            b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87R",
            b"(K\x01" + shape + b"\x86",
            b"cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff",
            b"K\x00tb\x89" + text(data.tobytes()) + b"tbu.",
        )
    )


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(1, 6):
        data = rng.integers(0, 256, (4, 3072), np.uint8)
        (folder / f"data_batch_{i}").write_bytes(python_2_pickle(data, [0, 9, i, 3]))
    (folder / "test_batch").write_bytes(
        pickle.dumps({b"data": np.full((3, 3072), 200, np.uint8), b"labels": [1, 2, 3]}, 3)
    )
    return folder.parent


def test_cifar(cifar: Path) -> None:
    data = load_images(ImageConfig(valid_fraction=0.2), cifar)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [16, 4, 3]
    assert Counter([*data.train.labels, *data.valid.labels])[9] == 5
    assert data.test[2]["labels"] == 3
    np.testing.assert_array_equal(data.test[0]["input_ids"], np.full(1024, 200))
    inner = load_images(ImageConfig(valid_fraction=0.2), cifar / "cifar-10-batches-py")
    np.testing.assert_array_equal(inner.train.tokens, data.train.tokens)
    raw = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    first = images.to_grey(raw)[0]
    assert any((first == data.train[i]["input_ids"]).all() for i in range(16)) or any(
        (first == data.valid[i]["input_ids"]).all() for i in range(4)
    )


def test_protocol_2_of_python_3_is_read(cifar: Path) -> None:
    content = {b"data": np.full((3, 3072), 7, np.uint8), b"labels": [1, 2, 3]}
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content, 2))
    assert load_images(ImageConfig(), cifar).test[1]["input_ids"].tolist() == [7] * 1024


def test_grey_is_rounded_luma() -> None:
    colours = np.array([[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]])
    pictures = np.repeat(colours.astype(np.uint8), 1024, axis=1)
    exact = colours @ [0.299, 0.587, 0.114]
    assert images.to_grey(pictures)[:, 5].tolist() == np.floor(exact + 0.5).tolist()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil()), "it names posix.mkdir, which CIFAR-10's do not"),
        (b"garbage", "not a file of CIFAR-10"),
        (b"", "not a file of CIFAR-10"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "LONG_BINPUT 2147483647 is beyond the file's size"),
        (pickle.dumps([1]), "expected b'data', uint8"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}, 3), "expected b'data', uint8"),
        (python_2_pickle(np.zeros((2, 3072), np.uint8), [1]), "as many integers"),
        (python_2_pickle(np.zeros((1, 3072), np.uint8), [10]), "integers 0..9"),
        (python_2_pickle(np.zeros((1, 3071), np.uint8), [1]), "expected b'data', uint8"),
        (
            pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}, 3),
            "expected b'data', uint8",
        ),
        (python_2_pickle(np.zeros((1, 3072), np.uint8), [1])[:-9], "not a file of CIFAR-10"),
    ],
)
def test_other_pickles_are_refused_and_run_nothing(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (cifar / "cifar-10-batches-py" / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match="data_batch_2: .*" + message):
        load_images(ImageConfig(), cifar)
    assert not Path("evil").exists()


def test_missing_cifar(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*data_batch_1"):
        load_images(ImageConfig(), tmp_path)


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    folder = tmp_path / "fashion"
    folder.mkdir()
    for name, size in (("train", 20), ("t10k", 5)):
        pictures = np.arange(size)[:, None, None] * np.ones((28, 28), int)
        data = idx(pictures)
        if name == "t10k":
            (folder / f"{name}-images-idx3-ubyte").write_bytes(data)
        else:
            (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(data))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(size) % 10))
    return folder


def test_fashion_mnist(fashion: Path) -> None:
    config = ImageConfig(source="fashion_mnist")
    data = load_images(config, fashion)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [18, 2, 5]
    for split in (data.train, data.valid, data.test):
        for i in range(len(split)):
            assert set(split[i]["input_ids"] % 10) == {split[i]["labels"]}
            assert len(split[i]["input_ids"]) == 784
    np.testing.assert_array_equal(load_images(config, fashion).valid.tokens, data.valid.tokens)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-labels-idx1-ubyte",
            b"\0\0\x08\x03",
            "not an idx file of unsigned bytes with 1 dim",
        ),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(4)), "5 pictures but 4 labels of the part 't10k'"),
        ("t10k-labels-idx1-ubyte", idx(np.full(5, 10)), "labels must be 0..9"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((5, 28, 28)))[:-1], "3919 values instead of 3920"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((5, 9, 28))), r"\['n', 28, 28\], got \[5, 9, 28\]"),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8bgarbage", "cannot read .*images-idx3-ubyte.gz"),
        ("train-images-idx3-ubyte.gz", None, "there is no .*train-images-idx3-ubyte"),
    ],
)
def test_fashion_mnist_errors(
    fashion: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is None:
        (fashion / name).unlink()
    else:
        (fashion / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_images(ImageConfig(source="fashion_mnist"), fashion)
