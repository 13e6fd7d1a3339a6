"""Pathfinder: its pictures, their labels, and how they are kept."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from yoso_jax.data import pathfinder
from yoso_jax.data.pathfinder import PathfinderConfig, generate_pictures, prepare_pathfinder
from yoso_jax.errors import DataError

SMALL = PathfinderConfig(
    num_train=40, num_valid=10, num_test=6, window=16, contour_length=4, num_distractors=2
)


def components(lit: np.ndarray) -> np.ndarray:
    """Numbers the 8-connected regions of a picture."""
    number = np.where(lit, np.arange(1, lit.size + 1).reshape(lit.shape), 0)
    while True:
        padded = np.pad(number, 1)
        shifts = [
            padded[1 + i : 1 + i + lit.shape[0], 1 + j : 1 + j + lit.shape[1]]
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]
        spread = np.where(lit, np.max(shifts, axis=0), 0)
        if (spread == number).all():
            return number
        number = spread


def test_labels_say_whether_the_marked_ends_are_joined() -> None:
    """With no gaps and no crowd, regions of lit pixels show it."""
    config = PathfinderConfig(
        38, 1, 1, paddle_gap=0.1, num_distractors=0, contour_length=6, marker_radius=2.5
    )
    examples = generate_pictures(config)
    joined = []
    for picture in examples.tokens.reshape(-1, 32, 32):
        regions = components(picture > 0)
        # Inside a marker all is white, which no paddle is.
        white = components(picture == 255)
        marked = {regions[white == number][0] for number in np.unique(white[white > 0])}
        assert len(np.unique(white)) == 3
        joined.append(len(marked) == 1)
    np.testing.assert_array_equal(joined, examples.labels == 1)


def test_pictures_are_balanced_different_and_seeded() -> None:
    examples = generate_pictures(SMALL)
    assert examples.tokens.dtype == np.uint8
    assert examples.labels.sum() == 28
    pictures = examples.tokens.reshape(56, 256)
    assert len({picture.tobytes() for picture in pictures}) == 56
    assert (pictures == 255).any(axis=1).all()
    again, other = generate_pictures(SMALL), generate_pictures(dataclasses.replace(SMALL, seed=1))
    np.testing.assert_array_equal(again.tokens, examples.tokens)
    assert (other.tokens != examples.tokens).any()
    # Pinned: a data set must not change with numpy's release or the machine. If this fails because
    # the generator was changed on purpose, bump its _VERSION too.
    digest = hashlib.sha256(examples.tokens.tobytes()).hexdigest()
    assert digest[:16] == "69e8eda6cdc3dfc7"


def test_the_distance_of_the_markers_hardly_tells_the_label() -> None:
    scenes = pathfinder._draw_scenes(PathfinderConfig(), np.random.default_rng(0))
    same = np.linalg.norm(scenes.first[:, 0, 0] - scenes.first[:, -1, 1], axis=1)
    other = np.linalg.norm(scenes.first[:, 0, 0] - scenes.second[:, -1, 1], axis=1)
    assert 0.38 < (same[:, None] > other).mean() < 0.62
    # Most of a thousand attempts succeed, and the distractors find room.
    assert len(same) > 400
    assert np.isfinite(scenes.others).mean() > 0.8


def test_pathfinder_is_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare_pathfinder(SMALL, tmp_path)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [40, 10, 6]
    assert [int(split.labels.sum()) for split in (data.train, data.valid, data.test)] == [20, 5, 3]
    assert data.folder.name.startswith("pathfinder-")
    monkeypatch.setattr(pathfinder, "generate_pictures", None)
    again = prepare_pathfinder(SMALL, tmp_path)
    np.testing.assert_array_equal(again.train.tokens, data.train.tokens)
    (data.folder / "train_tokens.npy").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"train_tokens\.npy: damaged, 0 bytes .* delete the folder"
    ):
        prepare_pathfinder(SMALL, tmp_path)


def test_contours_that_do_not_fit_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder, "_CHUNK", 8)
    monkeypatch.setattr(pathfinder, "_PATIENCE", 3)
    with pytest.raises(DataError, match="contour_length 40 hardly ever fit into window 8"):
        prepare_pathfinder(PathfinderConfig(window=8, contour_length=40), tmp_path)
    assert list(tmp_path.iterdir()) == []
