"""Reads the files torch.save writes, zip (PyTorch 1.6 and later) and legacy, without PyTorch.

A pickle is a program. This one is interpreted here, not by :mod:`pickle`: a few opcodes, a fixed
list of names, no attribute of any object, so that nothing in a file can run, and nothing costs
more than its size. (``pickle.Unpickler`` restricted by ``find_class`` would still hash nested
tuples for hours and allocate whatever size a memo index names.)
"""

import errno
import io
import os
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_MAX_PICKLE_BYTES = 1 << 22  # some 30,000 tensors; their values are stored beside the pickle
_MAX_DEPTH = 100
_ZIP_HEADER = b"PK\x03\x04"
_PROTO = 0x80  # what every pickle of protocol 2 or later starts with
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_BIG_ENDIAN = "the file is big-endian; save it again on a little-endian machine"

_STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}
# Those that PyTorch has no typed storage for.
_DTYPES = {f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")}
_CALLS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}
# Training states beside a state dict hold these. They are read as `_Inert`: nothing is looked up,
# called or built, and what holds one cannot be asked for.
_INERT = {
    "__builtin__.dict",
    "__builtin__.getattr",
    "builtins.dict",
    "builtins.getattr",
    "collections.defaultdict",
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
    "torch.optim.lr_scheduler.OneCycleLR",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
_STRINGS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_BAD_CONTENT = (
    *(ValueError, OverflowError, MemoryError),
    *(struct.error, zipfile.BadZipFile, NotImplementedError),
)


class TorchFileError(ValueError):
    """The file is not one of torch.save, is damaged, or holds what is not read. It says which."""


class _Global(NamedTuple):
    """An allowed name; it stands for itself and cannot be called."""

    name: str


class _Inert(NamedTuple):
    """Stands for an object of a training state: takes what is put into it, keeps nothing."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: np.dtype
    view: list[Any]  # offset, size, stride as the pickle has them, not yet checked


def read_torch_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a file of torch.save whose outermost object is a dict with string keys.

    Tensors and parameters become read-only numpy arrays that view the memory-mapped file: a value
    is read from disk when it is used, and tensors that share a storage share memory. Expanded
    tensors (stride 0) are views too and may stand for many more bytes than the file has. The
    file must not be changed while its arrays are in use. Values, unlike the zip format's pickle,
    are not compared with their checksums.

    A training state may name an optimiser and a scheduler of PyTorch: `read_torch_tensors` then
    reads the state dict beside it, this function refuses.

    ``OrderedDict`` becomes ``dict`` (without its attributes, such as ``_metadata``) and
    ``torch.Size`` a tuple. Numbers, strings, None, lists, tuples and dicts stay what they are.

    Args:
        path: a file of ``torch.save``, little-endian, pickle protocol 2 or later. Dtypes:
            float64, float32, float16, bfloat16, int8 to int64, uint8 to uint64, bool.

    Raises:
        TorchFileError: the content cannot be read, or names anything outside the short list of
            what a state dict needs, such as a function, a class or a complex storage.
        OSError: the file cannot be opened or read.
    """
    return _read_dict(path, lambda tree: tree)


def read_torch_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The state dict in a file of torch.save, as parameter name to array.

    The state dict is the outermost object, or its item ``model_state_dict`` or ``state_dict``.

    Args:
        path: as for :func:`read_torch_file`, which says what the arrays are.

    Raises:
        TorchFileError: as :func:`read_torch_file`, or an item of the state dict is no tensor.
        OSError: the file cannot be opened or read.
    """
    tree = _read_dict(path, _state_dict)
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise TorchFileError(
                f"{path} is not a state dict, nor has one under 'model_state_dict' or "
                f"'state_dict': {name!r:.200} is a {type(value).__name__}, expected a tensor"
            )
    return tree


def _state_dict(tree: dict[str, Any]) -> dict[str, Any]:
    for key in ("model_state_dict", "state_dict"):
        if isinstance(tree.get(key), dict):
            return tree[key]
    return tree


def _read_dict(
    path: str | os.PathLike[str], select: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Reads the part of a file that `select` takes from its outermost dict."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            # pickletools decodes names, and warns of backslashes, before they can be refused.
            warnings.simplefilter("ignore", DeprecationWarning)
            tree, contents = _read(file)
            if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
                return _resolve(select(tree), contents, {}, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a damaged zip directory: a seek before the start
            raise
        raise TorchFileError(f"{path}: the zip directory is damaged") from error
    except LookupError as error:
        raise TorchFileError(f"{path} is damaged: it refers to what it does not hold") from error
    except _BAD_CONTENT as error:
        raise TorchFileError(f"{path} cannot be read: {error}") from error
    kind = type(tree).__name__
    raise TorchFileError(f"{path} holds a {kind}, expected a dict with string keys")


def _read(file: io.BufferedReader) -> tuple[object, dict[str, np.ndarray]]:
    if os.fstat(file.fileno()).st_size == 0:
        raise ValueError("the file is empty")
    data = np.memmap(file, np.uint8, "r").view(np.ndarray)
    if data[:4].tobytes() == _ZIP_HEADER:
        return _read_zip(file, data)
    if data[0] == _PROTO:
        return _read_legacy(data)
    raise ValueError("not a file of torch.save: neither a zip archive nor a pickle")


def _read_zip(file: io.BufferedReader, data: np.ndarray) -> tuple[object, dict[str, np.ndarray]]:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
    folder = next(iter(records), "").partition("/")[0]

    def read(name: str) -> np.ndarray:
        info = records.get(f"{folder}/{name}")
        if info is None:
            raise ValueError(f"the archive has no record {name!r:.200}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"record {name!r:.200} is compressed or encrypted")
        start = info.header_offset
        header = data[start : start + 30].tobytes() if start >= 0 else b""
        if len(header) < 30 or not header.startswith(_ZIP_HEADER):
            raise ValueError(f"record {name!r:.200} has no valid header")
        start += 30 + sum(struct.unpack("<HH", header[26:30]))
        if info.file_size != info.compress_size or start + info.file_size > data.size:
            raise ValueError(f"record {name!r:.200} does not fit in the file")
        return data[start : start + info.file_size]

    if f"{folder}/byteorder" in records and read("byteorder").tobytes() != b"little":
        raise ValueError(_BIG_ENDIAN)
    pickled = read("data.pkl")
    if pickled.size > _MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has more than {_MAX_PICKLE_BYTES} bytes")
    if zlib.crc32(pickled) != records[f"{folder}/data.pkl"].CRC:
        raise ValueError("record 'data.pkl' does not match its checksum")
    storages: dict[str, _Storage] = {}
    tree = _interpret(io.BytesIO(pickled.tobytes()), storages)
    contents = {key: read(f"data/{key}") for key in storages}
    for key, storage in storages.items():
        if (size := contents[key].size) != storage.nbytes:
            raise ValueError(f"storage {key!r:.200} has {size} bytes, expected {storage.nbytes}")
    return tree, contents


def _read_legacy(data: np.ndarray) -> tuple[object, dict[str, np.ndarray]]:
    stream = io.BytesIO(data[:_MAX_PICKLE_BYTES].tobytes())
    storages: dict[str, _Storage] = {}
    if _interpret(stream, storages) != _LEGACY_MAGIC:
        raise ValueError("not a file of torch.save: a pickle without PyTorch's magic number")
    version, system, tree, keys = (_interpret(stream, storages) for _ in range(4))
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise ValueError("the legacy header is damaged")
    if system.get("little_endian") is not True:
        raise ValueError(_BIG_ENDIAN)
    contents: dict[str, np.ndarray] = {}
    start = stream.tell()
    for key in _check_is(keys, list):
        storage = storages[_check_is(key, str)]
        end = start + 8 + storage.nbytes
        numel = int.from_bytes(data[start : start + 8].tobytes(), "little")
        if numel != storage.numel or end > data.size:
            raise ValueError(f"storage {key!r:.200} is damaged or cut off")
        contents[key] = data[start + 8 : end]
        start = end
    return tree, contents


def _interpret(stream: io.BytesIO, storages: dict[str, _Storage]) -> Any:
    """Runs one pickle of plain values and adds the storages it refers to."""
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each open mark
    memo: dict[Any, Any] = {}
    for opcode, arg, _ in pickletools.genops(stream):
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case name if name in _NUMBERS or name in _STRINGS:
                stack.append(arg)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, outer.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode.name[-1]))]
                stack.append(tuple(reversed(items)))
            case "APPEND":
                items = [stack.pop()]
                _check_is(stack[-1], list).extend(items)
            case "APPENDS":
                items, stack = stack, outer.pop()
                _check_is(stack[-1], list).extend(items)
            case "POP":
                stack.pop()
            case "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                if not isinstance(function, _Inert):
                    raise ValueError(f"its pickle makes a {getattr(function, 'name', 'value')}")
                stack.append(function)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key], [value])
            case "SETITEMS":
                items, stack = stack, outer.pop()
                _set_items(stack[-1], items[::2], items[1::2])
            case "BUILD":  # sets attributes of an OrderedDict
                stack.pop()
                if not isinstance(stack[-1], _Inert):
                    _check_is(stack[-1], dict)
            case "GLOBAL":
                stack.append(_allowed(*str(arg).split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = _check_is(stack.pop(), str), _check_is(stack.pop(), str)
                stack.append(_allowed(module, name))
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_call(function, args))
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"storage {storage.key!r:.200} is declared in two ways")
                stack.append(storage)
            case name:
                raise ValueError(f"its pickle uses {name} {arg!r:.200}, which is refused")
    (result,) = stack
    return result


def _check_is(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"its pickle treats a {type(value).__name__} as a {kind.__name__}")
    return value


def _set_items(target: object, keys: list[Any], values: list[Any]) -> None:
    if isinstance(target, _Inert):
        return
    for key, value in zip(keys, values, strict=True):
        # Hashing a nested tuple can take for ever.
        if not isinstance(key, str | int | float | None):
            raise ValueError(f"a dict key is a {type(key).__name__}, expected a string or number")
        _check_is(target, dict)[key] = value


def _allowed(module: str, name: str) -> _Global | _Inert:
    path = f"{module}.{name}"
    if path in _INERT:
        return _Inert(path)
    if path in _STORAGES or path in _DTYPES or path in _CALLS:
        return _Global(path)
    raise _refusal(path)


def _refusal(path: str) -> ValueError:
    return ValueError(
        f"refuses {path!r:.200}: only tensors of real numbers, OrderedDict, torch.Size, "
        "plain containers, numbers and strings are read"
    )


# No message below shows a container: its text can be exponentially longer than the pickle.
def _storage(identity: object) -> _Storage:
    match identity:
        case ("storage", _Global(name=kind), str(key), _, int(numel), *view):
            if kind in _STORAGES and numel >= 0 and view in ([], [None]):
                return _Storage(key, _STORAGES[kind], numel)
    raise ValueError("its pickle refers to something other than a storage")


def _call(function: object, args: Any) -> object:
    if isinstance(function, _Inert):
        # A scheduler's pickle takes its method with getattr; there is no other use of it.
        match function.name.rpartition(".")[2], args:
            case "getattr", (_Inert(), str()):
                return function
            case "getattr", _:
                raise _refusal(function.name)
        return function
    if not isinstance(function, _Global):
        raise ValueError(f"its pickle calls a {type(function).__name__}")
    match function.name.rpartition(".")[2], args:
        case "OrderedDict", ():
            return {}
        case "Size", (tuple(size),):
            return size
        case "_rebuild_parameter", (_Tensor() as tensor, _, _):
            return tensor
        case "_rebuild_tensor_v2", (_Storage() as storage, *view, _, _):
            return _Tensor(storage, storage.dtype, view)
        case "_rebuild_tensor_v3", (_Storage() as storage, *view, _, _, _Global(name=dtype)):
            if dtype in _DTYPES:
                return _Tensor(storage, _DTYPES[dtype], view)
    raise ValueError(f"its pickle calls {function.name!r} with arguments that are not read")


def _resolve(node: Any, contents: dict[str, np.ndarray], done: dict[int, Any], depth: int) -> Any:
    """Puts arrays in place of tensors. What occurs twice is resolved once."""
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if id(node) in done:
        return done[id(node)]
    if depth > _MAX_DEPTH:
        raise ValueError(f"its containers hold themselves or nest deeper than {_MAX_DEPTH}")

    below = (contents, done, depth + 1)
    match node:
        case _Tensor():
            result = _view(node, contents[node.storage.key])
        case _Global() | _Storage() | _Inert():
            raise ValueError(f"holds {node[0]!r:.200} itself, which is not read")
        case dict():
            result = {key: _resolve(value, *below) for key, value in node.items()}
        case list():
            result = [_resolve(child, *below) for child in node]
        case _:
            result = tuple(_resolve(child, *below) for child in node)
    done[id(node)] = result
    return result


def _view(tensor: _Tensor, content: np.ndarray) -> np.ndarray:
    offset, size, stride = tensor.view
    counts = [offset, *_check_is(size, tuple), *_check_is(stride, tuple)]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a tensor has a damaged offset, size or stride")
    if 0 in size:
        return np.empty(size, tensor.dtype)
    itemsize = tensor.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (last + 1) * itemsize > content.size:
        raise ValueError(f"a tensor reaches beyond its storage {tensor.storage.key!r:.200}")
    strides = [step * itemsize for step in stride]
    return np.ndarray(size, tensor.dtype, content, offset * itemsize, strides)
