"""Files of torch.save: what is read, what is refused, and that nothing in them runs."""

import io
import os
import pickle
import pickletools
import re
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from yoso_jax.conversion.torch_files import TorchFileError, read_torch_file, read_torch_tensors

FILES = ("zip.pt", "zip_protocol4.pt", "legacy.pt")
DTYPES = [
    "float64",
    "float32",
    "float16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "uint16",
    "uint32",
    "uint64",
    "bfloat16",
]
LEGACY_HEADER = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
LITTLE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


@pytest.fixture(scope="module")
def folder(data_dir: Path) -> Path:
    return data_dir / "torch"


class Name(str):
    """``module/name``, pickled as the name of something this process need not have."""


class Call(NamedTuple):
    """Pickled as a call."""

    name: str
    args: tuple[Any, ...]


class Identity(tuple):
    """Pickled as what a storage is referred to by."""


def dumps(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


def opcodes(value: Any) -> bytes:
    match value:
        case Name():
            return b"c" + value.replace("/", "\n").encode() + b"\n"
        case Call(name, args):
            return opcodes(Name(name)) + opcodes(args) + b"R"
        case Identity():
            return opcodes(tuple(value)) + b"Q"
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case dict():
            return b"}" + b"".join(opcodes(k) + opcodes(v) + b"s" for k, v in value.items())
        case _:
            return pickle.dumps(value, 2)[2:-1]


def storage(numel: Any = 6, kind: str = "torch/FloatStorage", key: str = "0") -> Identity:
    return Identity(("storage", Name(kind), key, "cpu", numel))


def tensor(
    offset: Any = 0, size: Any = (2, 3), stride: Any = (3, 1), **storage_changes: Any
) -> Call:
    hooks = Call("collections/OrderedDict", ())
    args = (storage(**storage_changes), offset, size, stride, False, hooks)
    return Call("torch._utils/_rebuild_tensor_v2", args)


def zip_bytes(
    pickled: bytes,
    storages: dict[str, bytes] | None = None,
    byteorder: bytes | None = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        if byteorder is not None:
            archive.writestr("archive/byteorder", byteorder)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return stream.getvalue()


def legacy_bytes(pickled: bytes, system: Any = LITTLE, storages: bytes = b"") -> bytes:
    return LEGACY_HEADER + pickle.dumps(system, 2) + pickled + pickle.dumps([], 2) + storages


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes], str]:
    """The message with which bytes are refused."""

    def read(content: bytes) -> str:
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        with pytest.raises(TorchFileError) as caught:
            read_torch_file(path)
        assert str(caught.value).startswith(str(path))
        return str(caught.value)

    return read


@pytest.mark.parametrize("name", FILES)
def test_reads_what_torch_writes(folder: Path, name: str) -> None:
    tree = read_torch_file(folder / name)
    for dtype in DTYPES:
        array = tree["dtypes"][dtype]
        want = np.array([[0, 1, 2], [3, 4, 5]]).astype(
            ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        )
        assert array.dtype == want.dtype
        np.testing.assert_array_equal(array, want)
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(tree["base"], base)
    np.testing.assert_array_equal(tree["transposed"], base.T)
    np.testing.assert_array_equal(tree["strided"], base[1:, ::2])
    np.testing.assert_array_equal(tree["expanded"], np.broadcast_to(base[0, :3], (5, 3)))
    assert tree["expanded"].strides == (0, 4)
    assert tree["scalar"].shape == ()
    assert tree["scalar"] == 2.5
    assert tree["empty"].shape == (0, 7)
    assert tree["empty"].dtype == np.int32
    np.testing.assert_array_equal(tree["parameter"], np.float32([1, -1]))
    assert tree["size"] == (4, 6)
    assert list(tree["ordered"].items()) == [("b", 1), ("a", 2)]
    assert tree["plain"] == [
        *(None, True, -1, 2**40, 0.5, "naïve", (1, (2,)), {0: "integer key"}),
    ]


@pytest.mark.parametrize("name", FILES)
def test_tensors_of_one_storage_share_memory_and_are_read_only(folder: Path, name: str) -> None:
    tree = read_torch_file(folder / name)
    for view in ("transposed", "strided", "expanded"):
        assert np.shares_memory(tree["base"], tree[view])
    assert not np.shares_memory(tree["base"], tree["parameter"])
    assert not tree["base"].flags.writeable


@pytest.mark.parametrize("name", FILES)
def test_finds_the_state_dict(folder: Path, name: str) -> None:
    tensors = read_torch_tensors(folder / name)
    assert list(tensors) == ["weight", "bias"]
    np.testing.assert_array_equal(tensors["weight"], np.float32([[0, 1, 2], [3, 4, 5]]))


def test_reads_a_checkpoint_of_the_authors(folder: Path, data_dir: Path) -> None:
    tensors = read_torch_tensors(folder / "lra_sc_mean.model")
    want = load_file(data_dir / "orig" / "lra_sc_mean" / "model_state_dict.safetensors")
    assert set(tensors) == set(want)
    for name, array in want.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)


def test_a_training_state_beside_the_state_dict_is_passed_over(data_dir: Path) -> None:
    """Its pickle holds an AdamW and a OneCycleLR of PyTorch 1.7, and getattr of the latter."""
    path = data_dir / "authors" / "roberta_cp" / "cp-0000.cp"
    assert all("exp_avg" not in name for name in read_torch_tensors(path))
    with pytest.raises(TorchFileError, match=r"holds .*, which is not read"):
        read_torch_file(path)


def test_placeholders_of_a_training_state_do_nothing(tmp_path: Path) -> None:
    """A dict that is called, or a method of an optimiser, is neither a dict nor a tensor."""
    path = tmp_path / "file.pt"
    adam = b"ctorch.optim.adam\nAdam\n"
    method = b"cbuiltins\ngetattr\n(" + adam + b"X\x04\x00\x00\x00steptR"
    for value, message in (
        (b"cbuiltins\ndict\n)R", r"holds 'builtins\.dict' itself"),
        (method, r"holds 'builtins\.getattr' itself"),
        (b"ctorch\nSize\n)\x81", r"its pickle makes a torch\.Size"),
    ):
        path.write_bytes(zip_bytes(b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."))
        with pytest.raises(TorchFileError, match=message):
            read_torch_tensors(path)


def test_a_state_dict_holds_only_tensors(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(zip_bytes(dumps({"weight": tensor(), "epoch": 3}), {"0": bytes(24)}))
    assert read_torch_file(path)["epoch"] == 3
    with pytest.raises(TorchFileError, match="'epoch' is a int, expected a tensor"):
        read_torch_tensors(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "missing.pt")
    with pytest.raises(IsADirectoryError):
        read_torch_file(tmp_path)


def test_refuses_complex_tensors_by_name(folder: Path) -> None:
    with pytest.raises(TorchFileError, match=r"torch\.ComplexFloatStorage"):
        read_torch_file(folder / "complex.pt")


def test_refuses_big_endian_files(refused: Callable[[bytes], str]) -> None:
    assert "big-endian" in refused(zip_bytes(dumps({}), byteorder=b"big"))
    assert "big-endian" in refused(legacy_bytes(dumps({}), LITTLE | {"little_endian": False}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"not a checkpoint", "neither a zip archive nor a pickle"),
        (pickle.dumps({"a": 1}, 2), "without PyTorch's magic number"),
        (zip_bytes(dumps([1])), "holds a list, expected a dict"),
        (zip_bytes(dumps({1: 2})), "string keys"),
        (zip_bytes(dumps({}), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (zip_bytes(dumps({"a": tensor()})), "no record 'data/0'"),
        (zip_bytes(dumps({"a": tensor()}), {"0": bytes(23)}), "23 bytes, expected 24"),
        (zip_bytes(dumps({"a": storage()}), {"0": bytes(24)}), "itself"),
        (zip_bytes(dumps({"a": tensor(key="../../etc/passwd")})), "no record"),
        (zip_bytes(dumps({"a": b"bytes"})), r"'_codecs\.encode'"),
        (zip_bytes(b"(" * (2**22 + 1)), "more than"),
        (legacy_bytes(dumps({"a": tensor()})), "damaged"),
    ],
)
def test_says_what_is_wrong(refused: Callable[[bytes], str], content: bytes, message: str) -> None:
    assert re.search(message, refused(content))


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": None},
        {"size": (2, 4)},
        {"size": (10**12, 10**12), "stride": (1, 1)},
        {"size": (2, -3)},
        {"size": (2.0, 3)},
        {"size": [2, 3]},
        {"size": (2,)},
        {"size": (1,) * 70, "stride": (1,) * 70},
        {"size": (0, 2**62, 2**62), "stride": (1, 1, 1)},
        {"stride": (4, 1)},
        {"stride": (2**70, 1)},
        {"stride": (-3, 1)},
        {"numel": 2**62},
        {"numel": -6},
        {"kind": "torch/DoubleStorage"},
        {"kind": "torch/Size"},
    ],
)
def test_a_tensor_must_lie_in_its_storage(
    refused: Callable[[bytes], str], changes: dict[str, Any]
) -> None:
    refused(zip_bytes(dumps({"a": tensor(**changes)}), {"0": bytes(24)}))


def payloads(canary: Path) -> dict[str, Any]:
    code = f"open({str(canary)!r}, 'w')"
    return {
        "posix.system": Call("posix/system", (f"touch {canary}",)),
        "builtins.eval": Call("builtins/eval", (code,)),
        "__builtin__.exec": Call("__builtin__/exec", (code,)),
        "builtins.getattr": Call("builtins/getattr", ("", "join")),
        "absent.Planted": Name("absent/Planted"),
        "torch.load": Name("torch/load"),
        "torch._utils._rebuild_tensor_v2.__globals__": Name(
            "torch._utils/_rebuild_tensor_v2.__globals__"
        ),
    }


@pytest.mark.parametrize("name", payloads(Path()))
@pytest.mark.parametrize("wrap", [zip_bytes, legacy_bytes, bytes], ids=["zip", "legacy", "bare"])
def test_refuses_other_names_and_runs_nothing(
    refused: Callable[[bytes], str], tmp_path: Path, name: str, wrap: Callable[[bytes], bytes]
) -> None:
    canary = tmp_path / "canary"
    assert f"refuses {name!r}" in refused(wrap(dumps({"a": payloads(canary)[name]})))
    assert not canary.exists()


class Planted:
    """What Python's own pickler writes for a class of the attacker."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("planted",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_class_with_reduce_leaves_no_trace(
    refused: Callable[[bytes], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps({"a": Planted()}, protocol)
    for wrap in (zip_bytes, legacy_bytes, bytes):
        assert f"refuses '{os.name}.mkdir'" in refused(wrap(pickled))
    assert not (tmp_path / "planted").exists()
    pickle.loads(pickled)
    assert (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"(S'touch canary'\nios\nsystem\n.",  # INST
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02ctorch\nSize\n)\x81.",  # NEWOBJ
        b"\x80\x02ctorch\nSize\n(K\x01K\x02\x86t\x85R}b.",  # BUILD on a tuple
        b"\x80\x02K\x01)R.",  # a number is called
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # a storage type is called
        b"\x80\x02\x8d" + struct.pack("<Q", 2**62) + b"a.",  # a string of 2**62 bytes
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.",
        b"\x80\x02}(]]]K\x01u.",  # a list as a key
        b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",  # a key slow to hash
        b"\x80\x02" + b")" + b"q\x00h\x00\x86" * 60 + b"Q.",  # an identity long to print
        b"\x80\x02" + b")" + b"q\x00h\x00\x86" * 60 + b")R.",
        b"\x80\x02" + b")" + b"q\x00h\x00\x86" * 200 + b".",
        b"\x80\x02]q\x00h\x00a.",  # a list within itself
        b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",  # deep nesting
        b"\x80\x02" + b"(" * 10**5 + b".",
        b"\x80\x02cos\\K\nsystem\n.",  # a name that is no valid string literal
        b"\x80\x02.",
        b"\x80\x02h\x07.",
        b"\x80\x02}K\x01K\x02",
    ],
    ids=range(22),
)
def test_hostile_pickles_cost_little(refused: Callable[[bytes], str], pickled: bytes) -> None:
    start = time.monotonic()
    refused(zip_bytes(pickled))
    refused(legacy_bytes(pickled))
    assert time.monotonic() - start < 20


def test_a_huge_memo_index_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(zip_bytes(b"\x80\x02}r\xff\xff\xff\xff."))
    assert read_torch_file(path) == {}


def test_a_shared_container_is_resolved_once(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    doubled = b"]" + b"q\x00h\x00\x86" * 90
    path.write_bytes(zip_bytes(b"\x80\x02}X\x01\x00\x00\x00a" + doubled + b"s."))
    node = read_torch_file(path)["a"]
    assert node[0] is node[1]


def test_values_are_read_when_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    numel = 110_000_000
    header = dumps({"a": tensor(numel=numel, size=(numel,), stride=(1,))})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", header)
        with archive.open("archive/data/0", "w", force_zip64=True) as record:
            for _ in range(110):
                record.write(bytes(4_000_000))
    tracemalloc.start()
    start = time.monotonic()
    array = read_torch_tensors(path)["a"]
    seconds = time.monotonic() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert array.nbytes == 440_000_000
    assert array[-1] == 0
    assert seconds < 2
    assert peak < 1_000_000


# Kind, place, byte or opcode, length: what damage and malice do to a file.
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "cut", "splice", "drop", "opcode", "payload"]),
        st.integers(0, 2**16),
        st.integers(0, 255),
        st.integers(1, 64),
    ),
    min_size=1,
    max_size=4,
)
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


def mutate(content: bytes, mutations: list[tuple[str, int, int, int]], payload: bytes) -> bytes:
    for kind, place, number, length in mutations:
        at = place % (len(content) + 1)
        before, after = content[:at], content[at:]
        match kind:
            case "flip":
                content = before + bytes([number]) + after[1:]
            case "cut":
                content = before
            case "splice":
                start = number * 256 % (len(content) + 1)
                content = before + content[start : start + length] + after
            case "drop":
                content = before + after[length:]
            case "opcode":
                content = before + OPCODES[number % len(OPCODES)] + after
            case _:
                content = before + payload + after
    return content


@pytest.mark.parametrize("part", ["zip", "zip pickle", "legacy"])
def test_mutated_files_are_read_or_refused(folder: Path, tmp_path: Path, part: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "file.pt"
    planted = list(map(opcodes, payloads(canary).values()))
    original = (folder / ("legacy.pt" if part == "legacy" else "zip.pt")).read_bytes()
    with zipfile.ZipFile(folder / "zip.pt") as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    storages = {
        name.removeprefix("data/"): content
        for name, content in records.items()
        if name.startswith("data/")
    }
    outcomes = {"read": 0, "refused": 0}

    @settings(max_examples=800, database=None)
    @given(mutations=MUTATIONS, planting=st.integers(0, len(planted) - 1))
    def fuzz(mutations: list[tuple[str, int, int, int]], planting: int) -> None:
        if part == "zip pickle":  # past the checksum
            content = zip_bytes(mutate(records["data.pkl"], mutations, planted[planting]), storages)
        else:
            content = mutate(original, mutations, planted[planting])
        path.write_bytes(content)
        try:
            read_torch_file(path)
            outcomes["read"] += 1
        except TorchFileError:
            outcomes["refused"] += 1

    fuzz()
    assert sum(outcomes.values()) >= 800
    assert min(outcomes.values()) > 0
    assert not canary.exists()
