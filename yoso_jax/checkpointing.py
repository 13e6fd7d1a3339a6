"""Checkpoints of a run: Orbax, the newest and the best kept, damaged ones passed over."""

import contextlib
import json
import textwrap
import types
from pathlib import Path
from typing import Any, Literal

from orbax.checkpoint import v1 as ocp

from yoso_jax.errors import CheckpointError, root_cause

CHECKPOINT_DIR = "checkpoints"


class Checkpoints:
    """The checkpoints of one run, in `run_dir/checkpoints/<step>`.

    A checkpoint is a mapping of names to trees of arrays or to Grain iterators. Orbax writes it
    under a temporary name and renames it when it is complete, so a run killed while it saves
    leaves the previous checkpoints as they were.

    Args:
        run_dir: folder of the run; created by the first save.
        keep_latest: newest checkpoints to keep, besides the one with the highest score.
    """

    def __init__(self, run_dir: str | Path, keep_latest: int = 2) -> None:
        self.directory = (Path(run_dir) / CHECKPOINT_DIR).absolute()
        self._keep_latest = keep_latest
        self._orbax: ocp.training.Checkpointer | None = None
        self._pending: tuple[int, ocp.AsyncResponse[bool]] | None = None
        self.last_complete: int | None = None
        """Step of the newest checkpoint known to be complete."""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except Exception:
            # The error on its way out says more than the unfinished save it left behind.
            if error is None:
                raise
        finally:
            self._close()

    def save(self, step: int, checkpointables: dict[str, Any], score: float | None = None) -> None:
        """Starts a save and returns when the arrays may be changed again.

        An error of the previous save is raised here. `score`, of a validation, ranks the
        checkpoint; without it the checkpoint is kept only while it is among the newest.
        """
        self.wait()
        metrics: dict[str, Any] | None = None if score is None else {"score": score}
        response = self._open().save_checkpointables_async(
            step, checkpointables, force=True, metrics=metrics
        )
        assert response is not None  # force=True leaves Orbax no choice
        self._pending = (step, response)

    def wait(self) -> None:
        """Waits until the save under way is complete; raises its error, if any."""
        if self._pending is not None:
            (step, response), self._pending = self._pending, None
            response.result()
            self.last_complete = step

    def restore_latest(self, abstract: dict[str, Any]) -> tuple[int, dict[str, Any], list[str]]:
        """Loads the newest checkpoint that can be read, to continue the run from it.

        Args:
            abstract: for every name, the tree of `jax.ShapeDtypeStruct` or the Grain iterator
                (which is moved to the saved position).

        Returns:
            The step, the checkpoint, and one line for every damaged checkpoint that was passed
            over. Those are moved to `run_dir/checkpoints/damaged`, out of the way of the new ones.

        Raises:
            CheckpointError: there is no checkpoint, or none can be read.
        """
        found: tuple[int, dict[str, Any]] | None = None
        damaged: dict[int, CheckpointError] = {}
        for step in reversed(self.steps()):
            try:
                # Older ones too: Orbax refuses the whole folder for one damaged metric.
                self._score(step)
                if found is None:
                    found = step, self._load(step, abstract)
            except CheckpointError as error:
                damaged[step] = error
        if found is None:
            # Nothing is moved: what stops all of them may not be damage at all.
            lines = [*map(str, damaged.values()), f"no checkpoint in {self.directory} can be used"]
            raise CheckpointError("\n".join(lines))
        notes = [f"{error}; moved to {self._set_aside(step)}" for step, error in damaged.items()]
        self.last_complete = found[0]
        return *found, notes

    def restore(
        self, step: int | Literal["latest", "best"], abstract: dict[str, Any]
    ) -> tuple[int, dict[str, Any], list[str]]:
        """Loads one checkpoint to look at it; changes nothing on disk.

        Args:
            step: a step, `"latest"` (the newest that can be read) or `"best"` (the one with the
                highest score, of equal ones the last).
            abstract: as in `restore_latest`; names left out are not loaded.

        Returns:
            The step, the checkpoint, and one line for every damaged checkpoint passed over.

        Raises:
            CheckpointError: there is no such checkpoint, or it cannot be read.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        if step == "best":
            steps = [self._best(steps)]
        elif step != "latest":
            if step not in steps:
                raise CheckpointError(
                    f"no checkpoint of step {step} in {self.directory}; there are {steps}"
                )
            steps = [step]
        damaged = []
        for candidate in reversed(steps):
            try:
                return candidate, self._load(candidate, abstract), damaged
            except CheckpointError as error:
                damaged.append(str(error))
        raise CheckpointError("\n".join(damaged))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints on disk, ascending; damaged ones included."""
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if entry.name.isdigit())

    def _open(self) -> ocp.training.Checkpointer:
        if self._orbax is None:
            policies = ocp.training.preservation_policies
            best = policies.BestN(
                n=1,
                get_metric_fn=lambda metrics: metrics["score"],
                keep_checkpoints_without_metrics=False,
            )
            # Any: Orbax 0.12 annotates its policies with another type of checkpoint than it wants.
            kept: Any = policies.AnyPreservationPolicy([policies.LatestN(self._keep_latest), best])
            self._orbax = ocp.training.Checkpointer(
                str(self.directory),
                preservation_policy=kept,
                cleanup_tmp_directories=True,
            )
        return self._orbax

    def _close(self) -> None:
        if self._orbax is not None:
            orbax, self._orbax = self._orbax, None
            # Orbax raises the error of a failed save, which `wait` has raised, once more.
            with contextlib.suppress(Exception):
                orbax.close()

    def _load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        try:
            # One at a time: when one of several fails, Orbax leaves the others unawaited, and
            # Python warns of each.
            folder = str(self.directory / str(step))
            return {
                name: ocp.load_checkpointables(folder, {name: tree})[name]
                for name, tree in abstract.items()
            }
        except Exception as error:  # a damaged file surfaces as almost any type
            raise self._unreadable(step, error) from error

    def _score(self, step: int) -> float | None:
        file = self.directory / str(step) / "metrics" / "metrics"
        try:
            score = json.loads(file.read_bytes())["score"] if file.exists() else None
            return None if score is None else float(score)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(step, error) from error

    def _best(self, steps: list[int]) -> int:
        scores = [(self._score(step), step) for step in steps]
        ranked = [(score, step) for score, step in scores if score is not None]
        if not ranked:
            raise CheckpointError(f"no checkpoint of a validation in {self.directory}")
        return max(ranked)[1]

    def _unreadable(self, step: int, error: BaseException) -> CheckpointError:
        cause = root_cause(error)
        # An error may say nothing but a number, or nothing at all.
        text = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
        reason = textwrap.shorten(text, 100, placeholder="...")
        return CheckpointError(
            f"the checkpoint of step {step} in {self.directory} cannot be read ({reason})"
        )

    def _set_aside(self, step: int) -> Path:
        damaged = self.directory / "damaged"
        damaged.mkdir(exist_ok=True)
        target = damaged / str(step)
        number = 1
        while target.exists():
            number += 1
            target = damaged / f"{step}-{number}"
        return (self.directory / str(step)).rename(target)
