"""LRA Pathfinder: are the two marked ends those of one dashed contour?

Our own seeded generator of the kind of pictures described in Linsley et al., Learning long-range
spatial dependencies with horizontal gated recurrent units, NeurIPS 2018 (arXiv:1805.08315), with
the sizes of Long Range Arena (arXiv:2011.04006). Pictures are not those of the published release.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, UInt8

from yoso_jax.data.cache import Recipe, load_or_generate
from yoso_jax.data.splits import Examples, TaskData
from yoso_jax.errors import DataError
from yoso_jax.validation import Validated

# Bump when the same configuration would give other pictures: it is part of the cache's name.
_VERSION = 1

_CHUNK = 1024  # pictures grown side by side
_CANDIDATES = 12  # directions tried for a paddle
_STARTS = 12  # places tried for the first end of a contour
_ATTEMPTS = 4  # contours tried in a picture
_CELLS = 2  # cells of the map of taken places, a pixel and direction
_PATIENCE = 50  # chunks in a row that may give nothing

_Points = Float[np.ndarray, "B 2"]
_Heading = Float[np.ndarray, "B 2"]


@dataclasses.dataclass(frozen=True)
class PathfinderConfig(Validated):
    """What to generate; the defaults are Pathfinder-32. Lengths are in pixels.

    Attributes:
      num_train, num_valid, num_test: pictures per split, each >= 1. Half of each has label 1.
      window: width and height, in 8..128; a picture has window**2 tokens.
      contour_length: paddles (dashes) of each of the two target contours, >= 2.
      distractor_length: paddles of the other contours, >= 1.
      num_distractors: how many of those to place, >= 0; fewer where there is no room.
      paddle_length, paddle_gap: of a paddle, and from one to the next, > 0.
      thickness: of a paddle, > 0.
      marker_radius: of the disc at a marked end, > 0.
      seed_distance: between the first ends of the two target contours, > marker_radius + thickness.
      max_turn: largest change of direction from a paddle to the next, in degrees, in (0, 90).
      seed: >= 0. The same configuration always gives the same pictures.

    Raises:
      ValueError: a field is out of range; the message names it.
    """

    task: ClassVar[str] = "pathfinder"

    num_train: int = 160_000
    num_valid: int = 20_000
    num_test: int = 20_000
    window: int = 32
    contour_length: int = 14
    distractor_length: int = 4
    num_distractors: int = 6
    paddle_length: float = 2.0
    paddle_gap: float = 1.0
    thickness: float = 0.5
    marker_radius: float = 1.5
    seed_distance: float = 7.0
    max_turn: float = 40.0
    seed: int = 0

    def __post_init__(self) -> None:
        minima = {
            **dict.fromkeys(("num_train", "num_valid", "num_test", "distractor_length"), 1),
            "contour_length": 2,
            "num_distractors": 0,
            "seed": 0,
        }
        for name, minimum in minima.items():
            self._check_integer(name, minimum)
        self._check_integer("window", 8, 128)
        lengths = ("paddle_length", "paddle_gap", "thickness", "marker_radius", "seed_distance")
        for name in lengths:
            accepted = f"> 0 and below window ({self.window})"
            self._check_number(name, accepted, lambda value: 0 < value < self.window)
        if self.seed_distance <= self.clearance:
            self._fail("seed_distance", f"above marker_radius + thickness ({self.clearance})")
        self._check_number("max_turn", "in (0, 90)", lambda value: 0 < value < 90)

    @property
    def num_examples(self) -> int:
        """Pictures in all splits together."""
        return self.num_train + self.num_valid + self.num_test

    @property
    def clearance(self) -> float:
        """Least distance between points of different paddles, so that no marker touches another."""
        return self.marker_radius + self.thickness


def prepare_pathfinder(config: PathfinderConfig, cache_dir: str | os.PathLike[str]) -> TaskData:
    """Loads the data set from `cache_dir`, generating it on first use.

    Args:
      config: what to generate.
      cache_dir: created if missing; see `yoso_jax.data.cache`. Pathfinder-32 takes 205 MB there.

    Raises:
      DataError: the cache is damaged (the message names the file), or the contours that `config`
        asks for do not fit into the window.
      OSError: `cache_dir` cannot be written.
    """
    recipe = Recipe("Pathfinder", _VERSION, dataclasses.asdict(config), num_labels=2)
    return load_or_generate(recipe, lambda progress: generate_pictures(config, progress), cache_dir)


def generate_pictures(
    config: PathfinderConfig, progress: Callable[[int], None] = lambda done: None
) -> Examples:
    """Generates `config.num_examples` pictures: tokens are grey levels 0..255, row by row.

    Args:
      config: what to generate.
      progress: called now and then with the number of pictures made so far.

    Raises:
      DataError: target contours hardly ever fit.
    """
    total, size = config.num_examples, config.window**2
    tokens = np.empty(total * size, np.uint8)
    # Labels alternate, so that every split is balanced; training shuffles.
    labels = (np.arange(total) % 2).astype(np.uint8)
    done = number = idle = 0
    while done < total:
        rng = np.random.default_rng([3, number, config.seed])
        scenes = _draw_scenes(config, rng)
        number += 1
        count = min(len(scenes.first), total - done)
        idle = 0 if count else idle + 1
        if idle == _PATIENCE:
            raise DataError(
                f"two contours of contour_length {config.contour_length} hardly ever fit into "
                f"window {config.window}: {idle * _CHUNK} attempts in a row failed"
            )
        scenes = scenes.take(np.arange(count))
        pictures = _render(config, scenes, labels[done : done + count])
        tokens[done * size : (done + count) * size] = pictures.reshape(-1)
        done += count
        progress(done)
    return Examples(tokens, np.arange(total + 1) * size, labels)


@dataclasses.dataclass(frozen=True)
class _Scenes:
    """Paddles as pairs of ends; NaN where a distractor was not placed."""

    first: Float[np.ndarray, "B contour 2 2"]
    second: Float[np.ndarray, "B contour 2 2"]
    others: Float[np.ndarray, "B distractors 2 2"]

    def take(self, rows: np.ndarray) -> "_Scenes":
        return _Scenes(self.first[rows], self.second[rows], self.others[rows])


def _draw_scenes(config: PathfinderConfig, rng: np.random.Generator) -> _Scenes:
    """Draws pictures side by side, and keeps those into which two target contours fit."""
    taken = _Taken(config, _CHUNK)
    low, high = taken.inside

    def anywhere(batch: int) -> np.ndarray:
        return rng.uniform(low, high, (batch, _STARTS, 2))

    first, grown = _place(config, rng, taken, config.contour_length, anywhere)
    (rows,) = np.nonzero(grown)
    first, taken = first[rows], taken.take(rows)

    def beside(batch: int) -> np.ndarray:
        apart = config.seed_distance * _directions(rng, (batch, _STARTS))
        return first[:, 0, :1] + apart

    second, grown = _place(config, rng, taken, config.contour_length, beside)
    (rows,) = np.nonzero(grown)
    first, second, taken = first[rows], second[rows], taken.take(rows)
    # The one grown later had less room: neither is always the one that is marked twice.
    swap = (rng.random(len(rows)) < 0.5)[:, None, None, None]
    first, second = np.where(swap, second, first), np.where(swap, first, second)
    others = [np.empty((len(rows), 0, 2, 2))]
    for _ in range(config.num_distractors):
        paddles, grown = _place(config, rng, taken, config.distractor_length, anywhere)
        others.append(np.where(grown[:, None, None, None], paddles, np.nan))
    return _Scenes(first, second, np.concatenate(others, axis=1))


def _place(
    config: PathfinderConfig,
    rng: np.random.Generator,
    taken: "_Taken",
    length: int,
    draw_places: Callable[[int], np.ndarray],
) -> tuple[Float[np.ndarray, "B length 2 2"], Bool[np.ndarray, " B"]]:
    """Adds a contour to each picture, in several attempts; the second result is where one fitted.

    `draw_places` gives places for its first end, [B, K, 2], of which the first free one is taken.
    """
    batch = len(taken.cells)
    paddles, placed = np.zeros((batch, length, 2, 2)), np.zeros(batch, bool)
    for _ in range(_ATTEMPTS):
        (rows,) = np.nonzero(~placed)
        if not len(rows):
            break
        places = draw_places(batch)[rows]
        attempt = taken.take(rows)
        free = attempt.is_free(places)
        start = places[np.arange(len(rows)), free.argmax(1)]
        grown, success = _grow(config, rng, attempt, start, length)
        success &= free.any(1)
        done = rows[success]
        paddles[done], placed[done] = grown[success], True
        taken.cells[done] = attempt.cells[success]
    return paddles, placed


class _Taken:
    """Which places of each picture are too near to a paddle, on a grid of cells."""

    def __init__(self, config: PathfinderConfig, batch: int) -> None:
        self.config = config
        self.inside = (config.marker_radius, config.window - config.marker_radius)
        cells = config.window * _CELLS
        self.cells = np.zeros((batch, cells, cells), bool)
        reach = math.ceil(config.clearance * _CELLS)
        offsets = _square(reach)
        near = (offsets**2).sum(1) <= (config.clearance * _CELLS) ** 2
        self._disc = offsets[near]

    def take(self, rows: np.ndarray) -> "_Taken":
        other = _Taken(self.config, 0)
        other.cells = self.cells[rows]
        return other

    def is_free(self, points: Float[np.ndarray, "B K 2"]) -> Bool[np.ndarray, "B K"]:
        low, high = self.inside
        inside = ((points >= low) & (points <= high)).all(-1)
        cell = (np.where(inside[..., None], points, low) * _CELLS).astype(np.int64)
        rows = np.arange(len(points))[:, None]
        return inside & ~self.cells[rows, cell[..., 0], cell[..., 1]]

    def add(self, points: Float[np.ndarray, "B K 2"]) -> None:
        """Takes the places around points, which are inside."""
        cell = (points * _CELLS).astype(np.int64)[:, :, None] + self._disc
        cell = np.clip(cell, 0, self.cells.shape[1] - 1)
        rows = np.arange(len(points))[:, None, None]
        self.cells[rows, cell[..., 0], cell[..., 1]] = True


def _grow(
    config: PathfinderConfig,
    rng: np.random.Generator,
    taken: _Taken,
    start: _Points,
    length: int,
) -> tuple[Float[np.ndarray, "B length 2 2"], Bool[np.ndarray, " B"]]:
    """Grows a contour from `start` in each picture; the second result is where it succeeded."""
    batch = len(start)
    alive = np.ones(batch, bool)
    paddles = np.empty((batch, length, 2, 2))
    begin, heading = start, _directions(rng, (batch,))
    # Three points of a paddle, and two further on, where there should be room for the next ones.
    steps = config.paddle_length * np.array([0, 0.5, 1, 2, 3])
    # A paddle is nearer to those just before it than to others it may come.
    num_near = 1 + int(config.clearance / (config.paddle_length + config.paddle_gap))
    near: collections.deque[np.ndarray] = collections.deque()
    for k in range(length):
        if k == 0:
            turned = _directions(rng, (batch, _CANDIDATES))
            origin = np.broadcast_to(begin[:, None], turned.shape)
        else:
            turned = _turn(config, rng, heading)
            # Half of the gap goes on ahead, half in the new direction.
            ahead = begin + heading * (config.paddle_gap / 2)
            origin = ahead[:, None] + turned * (config.paddle_gap / 2)
        points = origin[:, :, None] + turned[:, :, None] * steps[:, None]
        free = taken.is_free(points.reshape(batch, _CANDIDATES * 5, 2))
        free = free.reshape(batch, _CANDIDATES, 5)
        fits = free[..., :3].all(-1)
        chosen = (fits * (1 + free[..., 3] + free[..., 3:].all(-1))).argmax(1)
        alive &= fits.any(1)
        rows = np.arange(batch)
        heading, placed = turned[rows, chosen], points[rows, chosen, :3]
        # A picture that failed goes on in a place that does no harm.
        placed = np.where(alive[:, None, None], placed, taken.inside[0])
        paddles[:, k] = placed[:, [0, -1]]
        begin = placed[:, -1]
        near.append(placed)
        if len(near) > num_near:
            taken.add(near.popleft())
    for placed in near:
        taken.add(placed)
    return paddles, alive


def _square(reach: int) -> np.ndarray:
    """All [x, y] with integers in -reach..reach."""
    return np.indices((2 * reach + 1, 2 * reach + 1)).reshape(2, -1).T - reach


def _directions(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    vectors = rng.standard_normal((*shape, 2))
    return vectors / np.sqrt((vectors**2).sum(-1, keepdims=True))


def _turn(
    config: PathfinderConfig, rng: np.random.Generator, heading: _Heading
) -> Float[np.ndarray, "B K 2"]:
    """Candidates for the next direction. By tangents: no machine's sine enters a data set."""
    bound = math.tan(math.radians(config.max_turn) / 2)
    tangent = rng.uniform(-bound, bound, (len(heading), _CANDIDATES))
    cos, sin = (1 - tangent**2) / (1 + tangent**2), 2 * tangent / (1 + tangent**2)
    x, y = heading[:, :1], heading[:, 1:]
    return np.stack([cos * x - sin * y, sin * x + cos * y], -1)


def _render(
    config: PathfinderConfig, scenes: _Scenes, labels: UInt8[np.ndarray, " B"]
) -> UInt8[np.ndarray, "B height width"]:
    batch, window = len(labels), config.window
    pictures = np.zeros((batch, window, window), np.float32)
    paddles = np.concatenate([scenes.first, scenes.second, scenes.others], axis=1)
    radius = config.thickness / 2
    for k in range(paddles.shape[1]):
        (rows,) = np.nonzero(np.isfinite(paddles[:, k, 0, 0]))
        _draw(pictures, rows, paddles[rows, k], radius, config.paddle_length)
    # Marked are the first end of the first contour, and the last end of the same or of the other.
    last = np.where(labels[:, None] == 1, scenes.first[:, -1, 1], scenes.second[:, -1, 1])
    for point in (scenes.first[:, 0, 0], last):
        ends = np.stack([point, point], axis=1)
        _draw(pictures, np.arange(batch), ends, config.marker_radius, 0.0)
    return np.rint(pictures * 255).astype(np.uint8)


def _draw(
    pictures: np.ndarray,
    rows: np.ndarray,
    ends: Float[np.ndarray, "N 2 2"],
    radius: float,
    length: float,
) -> None:
    """Draws a stroke with round ends in each picture of `rows`, a pixel by its share covered."""
    reach = math.ceil(length / 2 + radius + 1)
    offsets = _square(reach)
    first, along = ends[:, 0], ends[:, 1] - ends[:, 0]
    pixels = np.floor(ends.mean(1)).astype(np.int64)[:, None] + offsets
    from_first = pixels + 0.5 - first[:, None]
    squared = np.maximum((along**2).sum(-1), 1e-12)[:, None]
    share = np.clip((from_first * along[:, None]).sum(-1) / squared, 0, 1)
    distance = np.sqrt(((from_first - share[..., None] * along[:, None]) ** 2).sum(-1))
    # Of a pixel at this distance from the middle of a stroke, seen as one of width 1 across it.
    covered = np.clip(radius + 0.5 - distance, 0, min(1, 2 * radius)).astype(np.float32)
    covered[((pixels < 0) | (pixels >= pictures.shape[1])).any(-1)] = 0
    row, column = np.clip(pixels, 0, pictures.shape[1] - 1).transpose(2, 0, 1)
    index = (rows[:, None], row, column)
    # A stroke covers no pixel twice but where pixels outside were moved to the edge, with 0.
    np.maximum.at(pictures, index, covered)
