"""Prepared data sets on disk: whole or not at all, every file checked by its hash."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from yoso_jax.data.splits import Examples, TaskData, TokenSplit
from yoso_jax.errors import DataError

SPLITS = ("train", "valid", "test")
"""In the order in which a data set has them."""

_MANIFEST = "manifest.json"
_ARRAYS = ("tokens", "offsets", "labels")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a prepared data set depends on, and so what names its folder.

    Attributes:
      name: of the task, e.g. `ListOps`.
      generator_version: changes when the same configuration would give other examples.
      config: fields of the configuration, and whatever else the data depends on; for
        `load_or_generate`, `num_train`, `num_valid` and `num_test` are among them.
      num_labels: classes of `load_or_generate`'s examples.
      notes: more to write into the manifest.
    """

    name: str
    generator_version: int
    config: Mapping[str, Any]
    num_labels: int = 0
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a folder to be used."""
        return {"generator_version": self.generator_version, **self.config}

    @property
    def folder_name(self) -> str:
        """E.g. `listops-0123456789abcdef`."""
        text = json.dumps(self.identity, sort_keys=True)
        return f"{self.name.lower()}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def load_or_generate(
    recipe: Recipe,
    generate: Callable[[Callable[[int], None]], Examples],
    cache_dir: str | os.PathLike[str],
) -> TaskData:
    """Loads a data set of labelled examples, generating it on first use; see `load_or_make`.

    Progress is shown when stderr is a terminal.

    Args:
      recipe: what to generate.
      generate: makes the examples of all splits; it is given a function to call now and then with
        the number of examples made so far.
      cache_dir: created if missing.

    Raises:
      DataError: the cache is damaged (the message names the file), or `generate` raises it.
      OSError: `cache_dir` cannot be written.
    """

    def make() -> tuple[Mapping[str, np.ndarray], Mapping[str, Any]]:
        total = sum(recipe.config[f"num_{name}"] for name in SPLITS)
        with progress_bar(f"Generating {recipe.name}", total) as update:
            return _divide(recipe, generate(update))

    names = [f"{split}_{kind}" for split in SPLITS for kind in _ARRAYS]
    folder = load_or_make(recipe, names, make, cache_dir)
    return TaskData(*(_open_split(folder, split) for split in SPLITS), folder=folder)


def load_or_make(
    recipe: Recipe,
    names: Sequence[str],
    make: Callable[[], tuple[Mapping[str, np.ndarray], Mapping[str, Any]]],
    cache_dir: str | os.PathLike[str],
) -> Path:
    """Finds the folder of a data set in `cache_dir`, making it on first use.

    The cache is one folder per recipe, complete or absent: it is written aside and renamed, so an
    interrupted run leaves nothing behind and two processes may prepare at once. Every file's hash
    is checked each time.

    Args:
      recipe: what to make.
      names: of its arrays; array `x` is in `x.npy`.
      make: returns the arrays by name, and notes for the manifest.
      cache_dir: created if missing.

    Raises:
      DataError: the cache is damaged (the message names the file), or `make` raises it.
      OSError: `cache_dir` cannot be written.
    """
    folder = Path(cache_dir) / recipe.folder_name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Made before the data, so that a folder that cannot be written fails at once.
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as scratch:
            aside = Path(scratch) / folder.name
            aside.mkdir()
            _write(recipe, *make(), aside)
            try:
                aside.rename(folder)
            except OSError:
                # Another process was faster; its files are the same.
                if not (folder / _MANIFEST).exists():
                    raise
    _check(recipe, names, folder)
    return folder


@contextlib.contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; yields a function to call with what is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _MappedSplit(TokenSplit):
    """A split mapped from the cache. Pickled as its place on disk, so data workers share it."""

    folder: Path
    name: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_split, (self.folder, self.name)


def _open_split(folder: Path, name: str) -> _MappedSplit:
    tokens, offsets, labels = (
        np.load(folder / f"{name}_{kind}.npy", mmap_mode="r") for kind in _ARRAYS
    )
    return _MappedSplit(tokens, offsets, labels, folder, name)


def _divide(recipe: Recipe, examples: Examples) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of each split, and what the manifest says of them."""
    arrays: dict[str, np.ndarray] = {}
    splits: dict[str, Any] = {}
    first = 0
    for name in SPLITS:
        size = recipe.config[f"num_{name}"]
        offsets = examples.offsets[first : first + size + 1]
        labels = examples.labels[first : first + size]
        arrays[f"{name}_tokens"] = examples.tokens[offsets[0] : offsets[-1]]
        arrays[f"{name}_offsets"] = offsets - offsets[0]
        arrays[f"{name}_labels"] = labels
        lengths = np.diff(offsets)
        splits[name] = {
            "num_examples": size,
            "label_histogram": np.bincount(labels, minlength=recipe.num_labels).tolist(),
            "length": {
                "min": int(lengths.min()),
                "mean": float(lengths.mean()),
                "max": int(lengths.max()),
            },
        }
        first += size
    return arrays, {"splits": splits}


def _write(
    recipe: Recipe, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any], folder: Path
) -> None:
    files: dict[str, Any] = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        data = buffer.getbuffer()
        (folder / f"{name}.npy").write_bytes(data)
        files[f"{name}.npy"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {
        "generator_version": recipe.generator_version,
        "config": recipe.config,
        **recipe.notes,
        **notes,
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _check(recipe: Recipe, names: Sequence[str], folder: Path) -> None:
    path = folder / _MANIFEST
    remedy = f"delete the folder {folder} to generate it again"
    try:
        manifest = json.loads(path.read_text())
        files = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
        found = {"generator_version": manifest["generator_version"], **manifest["config"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a readable {recipe.name} manifest ({error!r}); {remedy}"
        ) from error
    wanted = recipe.identity
    differing = sorted(key for key in wanted | found if wanted.get(key) != found.get(key))
    if differing:
        raise DataError(f"{path}: made with another {', '.join(differing)}; {remedy}")

    for name in (f"{name}.npy" for name in names):
        file = folder / name
        if name not in files or not file.exists():
            raise DataError(f"{file}: missing from the {recipe.name} cache; {remedy}")
        num_bytes, sha256 = files[name]
        if file.stat().st_size != num_bytes:
            raise DataError(
                f"{file}: damaged, {file.stat().st_size} bytes instead of {num_bytes}; {remedy}"
            )
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                raise DataError(f"{file}: damaged, its SHA-256 differs from {path}'s; {remedy}")
