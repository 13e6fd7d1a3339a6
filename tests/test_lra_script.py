"""The comparison of attentions: a whole one, interrupted and continued, and mistakes."""

import dataclasses
import json
import os
import runpy
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from run_helpers import fast_compilations, numbers, tiny_config

import yoso_jax.comparison as comparison
from yoso_jax.comparison import with_variant
from yoso_jax.config_files import load_config
from yoso_jax.errors import ConfigError
from yoso_jax.lra_objective import LRAObjective
from yoso_jax.optim import make_optimizer
from yoso_jax.progress import TrainingProgress
from yoso_jax.training import abstract_state

SCRIPT = Path(__file__).parents[1] / "scripts" / "lra.py"
RUNS = ["listops-yoso_c_2-0", "listops-softmax-0", "listops-yoso_c_2-1", "listops-softmax-1"]

Compare = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lra")


@pytest.fixture(scope="module", autouse=True)
def compilations() -> Iterator[None]:
    with fast_compilations():
        yield


@pytest.fixture
def compare(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Compare:
    """Runs the script on the data and the model of `tiny_config`: exit code, output, errors."""
    tiny = tiny_config(folder)
    sections: dict[str, Any] = {
        "": {
            name: getattr(tiny, name)
            for name in ("data_dir", "steps", "sequence_length", "batch_size", "evaluate_every")
        },
        "data.": dataclasses.asdict(tiny.data),
        "model.": {
            name: getattr(tiny.model, name)
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "hash_code_len")
        },
        "optimizer.": {"warmup_steps": 2},
    }
    options = [
        text
        for section, values in sections.items()
        for name, value in values.items()
        if value is not None
        for text in (f"--{section}{name.replace('_', '-')}", str(value))
    ]

    def compare(*arguments: object) -> tuple[int, str, str]:
        command = [str(SCRIPT), "--log-every", "3", *options, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        # The script's to set, as it owns its process.
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return compare


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Sends this process SIGTERM during a step, counted over all runs."""
    plain, seen = TrainingProgress.step, iter(range(1, 1000))

    def step(self: TrainingProgress, current: int) -> None:
        if next(seen) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(self, current)

    monkeypatch.setattr(TrainingProgress, "step", step)


@pytest.mark.slow
def test_comparison_stops_goes_on_and_is_read_again(
    compare: Compare, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ("--task", "listops", "--variants", "yoso_c_2,softmax", "--seeds", 2)
    files = ("--json", folder / "out" / "lra.json", "--plot", folder / "out" / "lra.png")
    arguments = (*task, *files, "--run-dir", folder / "runs")

    # Stopped in the second run, after its first checkpoint.
    with monkeypatch.context() as patch:
        stop_at(patch, 10 + 6)
        code, out, err = compare(*arguments)
    assert code == 0, err
    assert "stopped after step 6" in out
    report = folder / "out" / "lra.json"
    assert [row["variant"] for row in json.loads(report.read_text())["rows"]] == ["yoso_c_2"]

    before = sorted(folder.rglob("*"))
    code, out, err = compare(*arguments)
    assert (code, out) == (2, "")
    assert err.count("listops-") == 2
    assert "go on with --resume" in err
    code, out, err = compare(*arguments, "--resume", "--model.hidden-size", 4)
    assert (code, out) == (2, "")
    assert "model.hidden_size: 8 in the run, 4 asked for" in err
    assert sorted(folder.rglob("*")) == before

    code, out, err = compare(*arguments, "--resume")
    assert code == 0, err
    assert "yoso_c_2, seed 0 (1 of 4): finished before" in out
    assert "resuming" in out
    result = json.loads(report.read_text())
    rows = result["rows"]
    assert [Path(row["run_dir"]).name for row in rows] == RUNS
    assert [row["seed"] for row in rows] == [0, 0, 1, 1]
    assert result["arguments"]["config"]["model"]["hidden_size"] == 8
    assert result["device"]["platform"] == "cpu"
    for row in rows:
        check_row(row)
    assert load_config(folder / "runs" / RUNS[0] / "config.yaml").model.conv_window == 33

    accuracies = [100 * row["test_accuracy"] for row in rows[1::2]]
    cell = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
    assert cell in out
    table = (folder / "out" / "lra.md").read_text()
    assert f"| softmax | 2 | {cell} | " in table
    assert table.startswith("| variant | seeds | test accuracy, % | steps/s | MiB a step |\n")
    assert (folder / "out" / "lra.png").read_bytes().startswith(b"\x89PNG")

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "train", None)
        code, out, err = compare(*arguments, "--resume", "--markdown", folder / "again.md")
    assert code == 0, err
    assert out.count("finished before") == 4
    assert json.loads(report.read_text())["rows"] == rows
    assert (folder / "again.md").read_text() == table


def check_row(row: dict[str, Any]) -> None:
    """What is said of a run agrees with what the run wrote."""
    run_dir = Path(row["run_dir"])
    valid = {r["step"]: r["accuracy"] for r in numbers(run_dir) if r["split"] == "valid"}
    assert row["best_step"] == max(valid, key=lambda step: (valid[step], step))
    assert row["valid_accuracy"] == valid[row["best_step"]]
    assert row["steps"] == 10
    assert row["steps_per_s"] > 0
    config = load_config(run_dir / "config.yaml")
    tx = make_optimizer(config.optimizer, config.steps)
    state = abstract_state(LRAObjective(config), tx)
    state_bytes = sum(4 * leaf.size for leaf in jax.tree.leaves(state))
    assert state_bytes < row["step_bytes"] < 100 * state_bytes
    results = json.loads((run_dir / "results.json").read_text())
    assert row["majority_baseline"] == results["majority_baseline"]
    if row["best_step"] == row["steps"]:
        assert row["test_accuracy"] == results["test_accuracy"]
        assert row["test_loss"] == results["test_loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task"),
        (
            ["--task", "lisp"],
            "--task must be one of listops, pathfinder, image, text, retrieval, got",
        ),
        (["--task", "listops", "--variants", "softmax,yoso"], "a variant must be softmax, yoso_e"),
        (["--task", "listops", "--variants", "yoso_0"], "got 'yoso_0'"),
        (["--task", "listops", "--variants", "yoso_c_e"], "got 'yoso_c_e'"),
        (["--task", "listops", "--variants", "yoso_e,yoso_e"], "yoso_e more than once"),
        (["--task", "listops", "--seeds", "0"], "seeds must be >= 1, got 0"),
        (["--task", "listops", "--steps", "0"], "steps must be an integer >= 1, got 0"),
        (["--task", "listops", "--stepz", "1"], "--stepz"),
        (["--task", "listops", "--model.attention-implementation", "mosaic_gpu"], "softmax: model"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_mistakes_end_with_one_message(
    compare: Compare, folder: Path, arguments: list[str], message: str
) -> None:
    before = sorted(folder.rglob("*"))
    code, out, err = compare(*arguments, "--run-dir", folder / "none")
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


def test_variants_are_those_of_the_paper(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    softmax, expected, sampled, convolved = (
        with_variant(config, name).model for name in ("softmax", "yoso_e", "yoso_32", "yoso_c_16")
    )
    assert softmax == config.model.replace(attention="softmax")
    assert expected == config.model.replace(use_expectation=True)
    assert sampled == config.model.replace(num_hash=32)
    assert convolved == config.model.replace(num_hash=16, conv_window=33)


def test_convolution_is_as_configured_and_only_where_asked_for(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config = dataclasses.replace(config, model=config.model.replace(conv_window=5))
    assert with_variant(config, "yoso_c_16").model.conv_window == 5
    assert with_variant(config, "yoso_16").model.conv_window is None
    with pytest.raises(ConfigError, match="a variant must be softmax, "):
        with_variant(config, "yoso_c")
