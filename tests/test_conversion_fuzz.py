"""Damaged checkpoints and configurations: errors of the documented types, and no others."""

import collections
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from yoso_jax import LRAConfig, YosoConfig
from yoso_jax.auto import ARCHITECTURES
from yoso_jax.config import read_json_object
from yoso_jax.conversion import authors, read_tensors
from yoso_jax.conversion.load import make_plan

DATA = Path(__file__).parent / "data"
BASE = DATA / "hf" / "base_h32_d8_gelu"
DOCUMENTED = (ValueError, OSError)

# Where, what byte, how long: what is done is told by the name.
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "repeat", "digit", "splice"]),
        st.integers(0, 1 << 16),
        st.integers(0, 255),
        st.integers(1, 64),
    ),
    min_size=1,
    max_size=4,
)
# What a JSON value may become.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), -0.5]),
    st.text(max_size=3),
    st.sampled_from(["yoso", "cls", "yoso-v1", "../x", "gelu_new"]),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(["0", "model", "dim"]), st.integers(0, 3), max_size=2),
)


def mutate(content: bytes, mutations: list[tuple[str, int, int, int]]) -> bytes:
    for kind, place, number, length in mutations:
        at = place % (len(content) + 1)
        before, after = content[:at], content[at:]
        match kind:
            case "flip":
                content = before + bytes([number]) + after[1:]
            case "cut":
                content = before
            case "drop":
                content = before + after[length:]
            case "repeat":
                content = before + after[:length] * 2 + after[length:]
            case "digit":
                content = before + b"%d" % (number % 10) + after
            case "splice":
                content = before + content[number : number + length] + after
    return content


def outcome(function: Callable[[], object]) -> str:
    try:
        function()
    except DOCUMENTED:
        return "refused"
    return "read"


def read_all(path: Path) -> None:
    for tensor in read_tensors(path).values():
        assert tensor.read().shape == tensor.shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small shards with an index."""
    folder = tmp_path_factory.mktemp("shards")
    shards: dict[str, dict[str, Any]] = {
        "model-1.safetensors": {"a.weight": np.ones((2, 3), np.float32), "b": np.ones(3, np.int8)},
        "model-2.safetensors": {"c.bias": np.zeros((), np.float64)},
    }
    weight_map = {}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt", "config": "{}"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 35}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["model-1.safetensors", "model.safetensors.index.json"])
def test_safetensors_and_indexes(name: str, folder: Path, tmp_path: Path) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    shutil.copytree(folder, tmp_path / "shards")
    original = (folder / name).read_bytes()
    read_all(tmp_path / "shards")

    @settings(max_examples=600, database=None)
    @given(mutations=MUTATIONS)
    def fuzz(mutations: list[tuple[str, int, int, int]]) -> None:
        (tmp_path / "shards" / name).write_bytes(mutate(original, mutations))
        outcomes[outcome(lambda: read_all(tmp_path / "shards"))] += 1

    fuzz()
    assert min(outcomes["read"], outcomes["refused"]) > 5, outcomes


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "source", [BASE, DATA / "authors" / "lra_dual", DATA / "authors" / "bert_plain"]
)
def test_configurations(source: Path, tmp_path: Path) -> None:
    """Entries are replaced, then bytes."""
    tensors = read_tensors(source)
    original = json.loads((source / "config.json").read_text())
    inner = original.get("retrieval", original).get("model", original)
    outcomes: collections.Counter[str] = collections.Counter()
    path = tmp_path / "config.json"

    def read() -> None:
        values = read_json_object(path)
        kind = LRAConfig if "lra" in source.name else YosoConfig
        if authors.is_config(values):
            values = authors.config_fields(values, "retrieval", tensors)
        kind.from_dict(values)

    @settings(max_examples=250, database=None)
    @given(
        name=st.sampled_from(sorted(inner)),
        value=VALUES,
        mutations=st.one_of(st.just([]), MUTATIONS),
    )
    def fuzz(name: str, value: Any, mutations: list[tuple[str, int, int, int]]) -> None:
        old = inner[name]
        inner[name] = value
        path.write_bytes(mutate(json.dumps(original).encode(), mutations))
        inner[name] = old
        outcomes[outcome(read)] += 1

    fuzz()
    assert min(outcomes["read"], outcomes["refused"]) > 5, outcomes


@pytest.mark.usefixtures("unchecked_shapes")
def test_whole_checkpoints(tmp_path: Path) -> None:
    """Configuration and tensors together, up to the comparison with the model."""
    shutil.copytree(BASE, tmp_path / "model")
    original = (BASE / "config.json").read_bytes()
    outcomes: collections.Counter[str] = collections.Counter()

    @settings(max_examples=40, database=None)
    @given(mutations=MUTATIONS)
    def fuzz(mutations: list[tuple[str, int, int, int]]) -> None:
        (tmp_path / "model" / "config.json").write_bytes(mutate(original, mutations))
        plan = lambda: make_plan(ARCHITECTURES, tmp_path / "model").check()  # noqa: E731
        outcomes[outcome(plan)] += 1

    fuzz()
    assert outcomes["refused"] > 5, outcomes
    assert sorted(os.listdir(tmp_path)) == ["model"]
