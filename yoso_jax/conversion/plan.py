"""What each tensor of a checkpoint becomes in a model: every key is accounted for."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from yoso_jax.conversion.names import file_shapes, from_state_dict, to_state_dict
from yoso_jax.conversion.tensors import Tensor

# In the order of the report.
Status = Literal[
    "loaded",
    "tied",
    "ignored",
    "initialised",
    "missing",
    "unexpected",
    "misshapen",
    "no float",
]

_HEADS = ("cls", "classifier", "pre_classifier", "qa_outputs")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What becomes of one tensor."""

    status: Status
    source: str | None
    """Key in the file; None if the model's parameter is not there."""
    target: str | None
    """Key in the files this project writes; None if it is left out."""
    shape: tuple[int, ...]
    """Of the target, else of the source."""
    dtype: str
    """In the file."""
    remark: str = ""
    """What is done to it, or why it is left out."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model is loaded from."""

    path: Path
    model_class: Any
    config: Any
    tensors: Mapping[str, Tensor]
    """The model's parameters by key, without those to be initialised."""
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    """What the user should know, a line each."""

    def check(self) -> None:
        """Refuses a checkpoint that does not fit.

        Raises:
            ValueError: parameters are missing, unexpected, or of a wrong shape or type; one message
                lists all of them.
        """
        problems = {
            "missing": [x.target for x in self.entries if x.status == "missing"],
            "unexpected": [x.source for x in self.entries if x.status == "unexpected"],
            "of a wrong shape": [x.remark for x in self.entries if x.status == "misshapen"],
            "not floating point": [x.remark for x in self.entries if x.status == "no float"],
        }
        lines = [
            f"{name}: {', '.join(sorted(map(str, keys)))}"
            for name, keys in problems.items()
            if keys
        ]
        if lines:
            raise ValueError(
                f"the parameters in {self.path} do not fit {self.model_class.__name__}. "
                + "; ".join(lines)
            )

    def load(self, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> Any:
        """Reads the values and makes the model; what is not in the file starts from `rngs`."""
        self.check()

        def build(rngs: nnx.Rngs) -> Any:
            return self.model_class(self.config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        layout, tensors = self.model_class.layout, dict(self.tensors)
        abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        if any(entry.status == "initialised" for entry in self.entries):
            initial = to_state_dict(build(rngs), layout)
            fresh = {key: Tensor.of(key, np.asarray(x)) for key, x in initial.items()}
            tensors = fresh | tensors
        state = from_state_dict(abstract, tensors, param_dtype, layout)
        return nnx.merge(nnx.graphdef(abstract), state)


def match(
    path: Path,
    model_class: Any,
    config: Any,
    tensors: Mapping[str, Tensor],
    entries: list[Entry],
    notes: list[str],
) -> Plan:
    """Compares the tensors with those of the model."""
    layout = model_class.layout
    abstract = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    shapes = file_shapes(abstract, layout)
    short = {key: key.removeprefix(layout.prefix) if layout.prefix else key for key in shapes}
    absent = heads(short.values()) - heads(tensors.keys() & set(short.values()))
    unused = heads(tensors.keys() - set(short.values())) - (heads(short.values()) - absent)
    found: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        tensor = tensors.get(short[key])
        if tensor is not None:
            found[key] = tensor
            status, remark = "loaded", ", ".join(tensor.transforms)
            if tensor.shape != shape:
                status, remark = "misshapen", f"{key} {tensor.shape} instead of {shape}"
            elif not jnp.issubdtype(tensor.dtype, jnp.floating):
                status, remark = "no float", f"{key} {tensor.dtype}"
            entries.append(Entry(status, tensor.source, key, shape, tensor.dtype.name, remark))
        elif _head(short[key]) in absent:
            remark = f"the file has no {_head(short[key])}"
            entries.append(Entry("initialised", None, key, shape, "", remark))
        else:
            entries.append(Entry("missing", None, key, shape, "", ""))
    left = {key: tensors[key] for key in sorted(tensors.keys() - set(short.values()))}
    for key, tensor in left.items():
        is_unused = _head(key) in unused
        remark = f"{model_class.__name__} has no {_head(key)}" if is_unused else ""
        entries.append(left_out(tensor, remark, "ignored" if is_unused else "unexpected"))
    fresh = [short[key] for key in shapes if _head(short[key]) in absent]
    if fresh:
        notes.append("absent from the file, initialised afresh: " + ", ".join(sorted(fresh)))
    if ignored := [tensor.source for key, tensor in left.items() if _head(key) in unused]:
        notes.append("in the file, not in this model: " + ", ".join(ignored))
    order = {status: i for i, status in enumerate(get_args(Status))}
    ordered = tuple(sorted(entries, key=lambda entry: order[entry.status]))
    return Plan(path, model_class, config, found, ordered, tuple(notes))


def left_out(tensor: Tensor, remark: str, status: Status = "ignored") -> Entry:
    """The entry of a tensor that is no parameter of the model, and why."""
    return Entry(status, tensor.source, None, tensor.shape, tensor.dtype.name, remark)


def _head(key: str) -> str | None:
    head = key.split(".")[0]
    return head if head in _HEADS else None


def heads(keys: Iterable[str]) -> set[str]:
    """The heads, by the first parts of their keys, that are among `keys`."""
    return {head for key in keys if (head := _head(key))}
