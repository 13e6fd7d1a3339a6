"""LRA Image: classify a small picture from its grey pixels, read row by row."""

import dataclasses
import gzip
import io
import pickle
import pickletools
import zlib
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import UInt8

from yoso_jax.data.splits import TaskData, TokenSplit, split_by_fraction
from yoso_jax.errors import DataError
from yoso_jax.validation import Validated

NUM_PIXELS = {"cifar10": 1024, "fashion_mnist": 784}
"""Tokens of a picture: 32 x 32 and 28 x 28."""

_CIFAR_FOLDER = "cifar-10-batches-py"
# The largest of the files is 31 MB.
_MAX_FILE_BYTES = 1 << 27

Pictures = UInt8[np.ndarray, "num_examples num_pixels"]
Labels = UInt8[np.ndarray, " num_examples"]


@dataclasses.dataclass(frozen=True)
class ImageConfig(Validated):
    """Pictures of ten classes to read from `data_dir`.

    Attributes:
      source: `cifar10`, the folder `cifar-10-batches-py` (or it itself) in grey; or
        `fashion_mnist`, the files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
        `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, each as it is or with `.gz`.
      valid_fraction: of the training pictures to validate on, in (0, 0.5).
      seed: >= 0; draws the pictures to validate on.

    Raises:
      ValueError: a field is out of range; the message names it.
    """

    task: ClassVar[str] = "image"

    source: Literal["cifar10", "fashion_mnist"] = "cifar10"
    valid_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choice("source", tuple(NUM_PIXELS))
        self._check_number("valid_fraction", "in (0, 0.5)", lambda value: 0 < value < 0.5)
        self._check_integer("seed", 0)


def load_images(config: ImageConfig, folder: Path) -> TaskData:
    """Reads the pictures as tokens 0..255, the grey levels.

    Raises:
      DataError: a file is missing or is not what it should be; the message names it.
    """
    if config.source == "cifar10":
        inner = folder / _CIFAR_FOLDER
        inner = inner if inner.is_dir() else folder
        batches = [_read_cifar(inner / f"data_batch_{i}") for i in range(1, 6)]
        pictures = np.concatenate([each for each, _ in batches])
        labels = np.concatenate([each for _, each in batches])
        test = _read_cifar(inner / "test_batch")
    else:
        pictures, labels = _read_mnist(folder, "train")
        test = _read_mnist(folder, "t10k")
    try:
        parts = split_by_fraction(len(labels), [config.valid_fraction], config.seed)
    except ValueError as error:
        raise DataError(f"the pictures in {folder}: {error}") from None
    train, valid = (_make_split(pictures[part], labels[part]) for part in parts)
    return TaskData(train=train, valid=valid, test=_make_split(*test), folder=folder)


def to_grey(pictures: UInt8[np.ndarray, "num_examples 3072"]) -> Pictures:
    """Luma (ITU-R BT.601) of pictures kept as 1,024 red, 1,024 green and 1,024 blue values.

    `0.299 R + 0.587 G + 0.114 B`, computed in integers and rounded to the nearest, a half up.
    """
    red, green, blue = (pictures[:, i * 1024 : (i + 1) * 1024].astype(np.uint32) for i in range(3))
    return ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)


def _make_split(pictures: Pictures, labels: Labels) -> TokenSplit:
    offsets = np.arange(len(labels) + 1) * pictures.shape[1]
    return TokenSplit(pictures.reshape(-1), offsets, labels)


# CIFAR-10


class _Dtype:
    """Stands for `numpy.dtype` in a pickle; remembers its name."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, _: object) -> None:
        """The order of bytes, which one byte does not have."""


class _Array:
    """Stands for `numpy.ndarray` in a pickle; remembers what it would be made of."""

    state: object = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state


def _encode(text: object, encoding: object) -> bytes:
    # What Python 3 writes for bytes in the protocols of Python 2.
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


class _CifarUnpickler(pickle.Unpickler):
    """Knows what the files of CIFAR-10 name and nothing else; no name is looked up or imported."""

    def find_class(self, module: str, name: str) -> Any:
        """Gives a stand-in."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        known = {
            "numpy.ndarray": _Array,
            "numpy.dtype": _Dtype,
            "_codecs.encode": _encode,
        }
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR-10's do not")
        return known[f"{module}.{name}"]


def _read_cifar(path: Path) -> tuple[Pictures, Labels]:
    data = _read_bytes(path)
    try:
        _check_memo(data)
        content = _CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(f"{path}: not a file of CIFAR-10 for Python: {error}") from error
    pictures, labels = _cifar_content(content)
    if pictures is None or labels is None or len(labels) != len(pictures):
        raise DataError(
            f"{path}: expected b'data', uint8 [pictures, 3072], and b'labels', "
            "as many integers 0..9"
        )
    return to_grey(pictures), labels


def _check_memo(data: bytes) -> None:
    # The unpickler allocates whatever size such an index names.
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"{opcode.name} {argument} is beyond the file's size")


def _cifar_content(content: object) -> tuple[np.ndarray | None, np.ndarray | None]:
    if not isinstance(content, dict):
        return None, None
    array, labels = content.get(b"data"), content.get(b"labels")
    pictures = None
    if isinstance(array, _Array) and isinstance(array.state, tuple) and len(array.state) == 5:
        _, shape, dtype, is_fortran, values = array.state
        is_whole = (
            isinstance(dtype, _Dtype)
            and dtype.name in (b"u1", "u1")
            and is_fortran in (False, 0)
            and isinstance(values, bytes)
            and isinstance(shape, tuple)
            and len(shape) == 2
            and shape[1] == 3072
            and len(values) == shape[0] * 3072 > 0
        )
        if is_whole:
            pictures = np.frombuffer(values, np.uint8).reshape(-1, 3072)
    is_classes = isinstance(labels, list) and all(
        type(label) is int and 0 <= label < 10 for label in labels
    )
    return pictures, np.array(labels, np.uint8) if is_classes else None


# MNIST and its like


def _read_mnist(folder: Path, name: str) -> tuple[Pictures, Labels]:
    pictures = _read_idx(folder / f"{name}-images-idx3-ubyte", (28, 28))
    labels = _read_idx(folder / f"{name}-labels-idx1-ubyte", ())
    if len(pictures) != len(labels):
        raise DataError(
            f"{folder}: {len(pictures)} pictures but {len(labels)} labels of the part {name!r}"
        )
    if labels.max() > 9:
        raise DataError(f"{folder / name}-labels-idx1-ubyte: labels must be 0..9")
    return pictures.reshape(len(pictures), -1), labels


def _read_idx(path: Path, inner_shape: tuple[int, ...]) -> np.ndarray:
    """Reads unsigned bytes: a magic number with the rank, big-endian sizes, the values."""
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and packed.is_file():
        path = packed
    data = _read_bytes(path)
    rank = 1 + len(inner_shape)
    start = 4 + 4 * rank
    if len(data) < start or data[:4] != bytes([0, 0, 8, rank]):
        raise DataError(f"{path}: not an idx file of unsigned bytes with {rank} dimensions")
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
    if shape[0] < 1 or shape[1:] != inner_shape:
        raise DataError(f"{path}: expected the shape {['n', *inner_shape]}, got {list(shape)}")
    values = np.frombuffer(data, np.uint8, offset=start)
    if values.size != np.prod(shape):
        raise DataError(f"{path}: damaged, {values.size} values instead of {np.prod(shape)}")
    return values.reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise DataError(f"{path}: larger than any file of this data set")
    return data
