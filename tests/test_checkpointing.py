"""What is kept, what is read back, and what happens to damaged checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yoso_jax.checkpointing import Checkpoints
from yoso_jax.errors import CheckpointError
from yoso_jax.sharding import make_layout

ACCURACIES = {10: 0.1, 20: 0.5, 30: 0.2, 40: 0.3}


def state_at(step: int) -> dict[str, Any]:
    return {"step": jnp.int32(step), "kernel": jnp.full((3, 2), step / 7, jnp.float32)}


def abstract() -> dict[str, Any]:
    return {"state": make_layout().abstract(state_at(0))}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    with Checkpoints(tmp_path, keep_latest=2) as checkpoints:
        for step, accuracy in ACCURACIES.items():
            checkpoints.save(step, {"state": state_at(step)}, accuracy)
    return tmp_path


def tear(run_dir: Path, step: int, how: str) -> None:
    folder = run_dir / "checkpoints" / str(step)
    if how == "missing":
        shutil.rmtree(folder / "state")
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "accuracy":
        (folder / "metrics" / "metrics").write_text("{")
    else:
        for file in (folder / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_latest_and_best_are_kept_and_read_back(run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir)
    assert checkpoints.steps() == [20, 30, 40]
    for wanted, step in (("latest", 40), ("best", 20), (30, 30)):
        found, restored, notes = checkpoints.restore(wanted, abstract())
        assert (found, notes) == (step, [])
        jax.tree.map(np.testing.assert_array_equal, restored["state"], state_at(step))


def test_checkpoint_without_accuracy_is_not_the_best(run_dir: Path) -> None:
    with Checkpoints(run_dir, keep_latest=2) as checkpoints:
        checkpoints.restore_latest(abstract())
        checkpoints.save(45, {"state": state_at(45)})
        checkpoints.save(50, {"state": state_at(50)}, 0.4)
        checkpoints.save(60, {"state": state_at(60)}, 0.4)
    assert checkpoints.steps() == [20, 50, 60]


def test_state_may_change_while_it_is_being_saved(tmp_path: Path) -> None:
    """The next, donating step must not reach into the save under way."""

    def add(state: dict[str, Any]) -> dict[str, Any]:
        return jax.tree.map(lambda leaf: leaf + 1, state)

    step = jax.jit(add, donate_argnums=0)
    state = jax.jit(lambda: state_at(0) | {"large": jnp.zeros((512, 512))})()
    with Checkpoints(tmp_path, keep_latest=9) as checkpoints:
        for number in range(1, 41):
            state = step(state)
            if number % 10 == 0:
                checkpoints.save(number, {"state": state})
    for number in (10, 20, 30, 40):
        _, restored, _ = checkpoints.restore(number, {"state": make_layout().abstract(state)})
        assert int(restored["state"]["step"]) == number
        assert float(restored["state"]["large"].min()) == number
        assert float(restored["state"]["large"].max()) == number


def test_data_position_is_restored(tmp_path: Path) -> None:
    def iterator() -> grain.DatasetIterator[Any]:
        return iter(grain.MapDataset.range(100).shuffle(seed=3).repeat().to_iter_dataset())

    data = iterator()
    for _ in range(120):
        next(data)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"state": state_at(1), "data": data})
        upcoming = [next(data) for _ in range(5)]
        again = iterator()
        checkpoints.wait()
        checkpoints.restore_latest({**abstract(), "data": again})
    assert [next(again) for _ in range(5)] == upcoming


@pytest.mark.parametrize("how", ["missing", "empty", "accuracy", "truncated"])
def test_damaged_newest_checkpoint_is_passed_over(run_dir: Path, how: str) -> None:
    tear(run_dir, 40, how)
    with Checkpoints(run_dir, keep_latest=2) as checkpoints:
        step, restored, notes = checkpoints.restore_latest(abstract())
        assert step == checkpoints.last_complete == 30
        jax.tree.map(np.testing.assert_array_equal, restored["state"], state_at(30))
        assert "checkpoint of step 40" in notes[0]
        assert (run_dir / "checkpoints" / "damaged" / "40").is_dir()
        checkpoints.save(40, {"state": state_at(40)}, 0.1)
    assert Checkpoints(run_dir).steps() == [20, 30, 40]
    assert Checkpoints(run_dir).restore("latest", abstract())[0] == 40


def test_damaged_older_accuracy_does_not_block_the_run(run_dir: Path) -> None:
    tear(run_dir, 20, "accuracy")
    with Checkpoints(run_dir, keep_latest=2) as checkpoints:
        step, _, notes = checkpoints.restore_latest(abstract())
        assert step == 40
        assert "checkpoint of step 20" in notes[0]
        checkpoints.save(50, {"state": state_at(50)}, 0.1)


def test_looking_changes_nothing(run_dir: Path) -> None:
    tear(run_dir, 40, "missing")
    before = sorted(run_dir.rglob("*"))
    step, _, notes = Checkpoints(run_dir).restore("latest", abstract())
    assert step == 30
    assert "checkpoint of step 40" in notes[0]
    with pytest.raises(CheckpointError, match=r"step 40 .* cannot be read"):
        Checkpoints(run_dir).restore(40, abstract())
    assert sorted(run_dir.rglob("*")) == before


def test_unfinished_save_is_not_a_checkpoint(run_dir: Path) -> None:
    """What a process killed while saving leaves behind."""
    folder = run_dir / "checkpoints"
    (folder / "40").rename(folder / "40.orbax-checkpoint-tmp")
    with Checkpoints(run_dir, keep_latest=2) as checkpoints:
        assert checkpoints.restore_latest(abstract())[0] == 30
        checkpoints.save(40, {"state": state_at(40)}, 0.3)
    assert Checkpoints(run_dir).steps() == [20, 30, 40]
    assert not (folder / "40.orbax-checkpoint-tmp").exists()


def test_missing_checkpoints_are_named(run_dir: Path, tmp_path_factory: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 25 .* \[20, 30, 40\]"):
        Checkpoints(run_dir).restore(25, abstract())
    empty = Checkpoints(tmp_path_factory.mktemp("empty"))
    for restore in (lambda: empty.restore("latest", abstract()), lambda: empty.restore_latest({})):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            restore()
    assert not empty.directory.exists()
