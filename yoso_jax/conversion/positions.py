"""Position embeddings: the two unused rows in front, and more positions than a file has."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from yoso_jax.conversion.tensors import Tensor

PositionExtension = Literal["tile", "interpolate"]
"""Repeat a file's positions from the first on, or stretch them by linear interpolation."""

_HF_KEY = "embeddings.position_embeddings.weight"
_LRA_KEY = "model.embeddings.position_embeddings.weight"
_UNUSED_ROWS = 2  # in front, in Hugging Face's architecture as in RoBERTa


def check_extension(extension: str | None) -> None:
    """Raises ValueError unless it is a `PositionExtension` or None."""
    accepted = (None, *get_args(PositionExtension))
    if extension not in accepted:
        names = ", ".join(map(repr, accepted))
        raise ValueError(f"position_extension must be one of {names}, got {extension!r}")


def fit_positions(
    config: Any,
    tensors: Mapping[str, Tensor],
    wanted: int,
    extension: PositionExtension | None,
    notes: list[str],
) -> dict[str, Tensor]:
    """Gives a checkpoint's position table the rows that a model with `wanted` positions has.

    Files of the authors' BERT lack the unused rows; they get two of zeros.

    Args:
        config: of the file, with its `max_position_embeddings`.
        tensors: by key, without prefix.
        wanted: the model's `max_position_embeddings`.
        extension: how to make more positions.
        notes: gets a line for the user if the table changes unasked.

    Raises:
        ValueError: there are fewer positions than wanted and `extension` is None, or more.
    """
    key = _HF_KEY if _HF_KEY in tensors else _LRA_KEY
    if key not in tensors or len(tensors[key].shape) != 2:
        return dict(tensors)
    table, unused = tensors[key], _UNUSED_ROWS if key == _HF_KEY else 0
    if unused and table.shape[0] == config.max_position_embeddings:
        notes.append(f"{table.source} starts at position 0: two unused rows are put before it")
        table = _change_rows(
            table,
            "two rows put before it",
            table.shape[0] + unused,
            lambda x: np.pad(x, ((unused, 0), (0, 0))),
        )
    present = table.shape[0] - unused
    if present > wanted > 0:
        raise ValueError(
            f"max_position_embeddings is {wanted}, but {table.source} has {present} positions: "
            "they can be extended, not cut"
        )
    if present < wanted:
        if extension is None or present < 1:
            raise ValueError(
                f"max_position_embeddings is {wanted}, but {table.source} has {present} positions: "
                "pass position_extension='tile' or 'interpolate' to extend them"
            )

        def extend(x: np.ndarray) -> np.ndarray:
            grow = _tile if extension == "tile" else _interpolate
            return np.concatenate([x[:unused], grow(x[unused:], wanted)])

        how = "tiled" if extension == "tile" else "interpolated"
        table = _change_rows(table, f"{how} from {present} positions", wanted + unused, extend)
    return {**tensors, key: table}


def _change_rows(table: Tensor, transform: str, rows: int, function: Any) -> Tensor:
    return table.apply(transform, function, (rows, table.shape[1]))


def _tile(x: np.ndarray, rows: int) -> np.ndarray:
    return x[np.arange(rows) % len(x)]


def _interpolate(x: np.ndarray, rows: int) -> np.ndarray:
    """Linear, with the first and the last row where they were: the ends stay ends."""
    at = np.linspace(0, len(x) - 1, rows)
    below = np.minimum(at.astype(int), len(x) - 1)
    above = np.minimum(below + 1, len(x) - 1)
    share = (at - below)[:, None]
    return ((1 - share) * x[below] + share * x[above]).astype(x.dtype)
