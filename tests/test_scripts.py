"""The two commands as a user runs them: options, messages, exit codes, signals."""

import dataclasses
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_helpers import fast_compilations, numbers, tiny_config

from yoso_jax.config_files import dump_config, load_config
from yoso_jax.errors import ConfigError
from yoso_jax.signals import sigterm_exits
from yoso_jax.train_config import TrainConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def compilations() -> Iterator[None]:
    with fast_compilations():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def config_file(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(dump_config(tiny_config(folder)))
    return path


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compilations: None
) -> Run:
    """Runs a script in this process: exit code, standard output, standard error."""

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        # Both are the script's to set, as it owns its process.
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts a script in a process of its own, with the option of `fast_compilations`."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_read_and_says_how_to_run_it(path: Path) -> None:
    config = load_config(path)
    header = path.read_text().split("\n\n")[0]
    script = "finetune.py" if config.kind == "finetune" else "train.py"
    assert f"python scripts/{script} {path.relative_to(ROOT)}" in header
    assert f"python scripts/evaluate.py {config.run_dir}" in header


def test_config_is_read_back_as_written(config_file: Path, folder: Path) -> None:
    assert load_config(config_file) == tiny_config(folder)


def edit(config_file: Path, tmp_path: Path, changes: dict[str, Any]) -> Path:
    """A copy of the configuration with `section.field` set, or removed where None."""
    values = yaml.safe_load(config_file.read_text())
    for name, value in changes.items():
        *sections, field = name.split(".")
        target = values
        for section in sections:
            target = target[section]
        if value is None:
            del target[field]
        else:
            target[field] = value
    path = tmp_path / "edited.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_exponents_without_a_point_are_numbers(config_file: Path, tmp_path: Path) -> None:
    path = edit(config_file, tmp_path, {"optimizer.learning_rate": "3e-4"})
    assert load_config(path).optimizer.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "unknown field 'stepz'; accepted here: run_dir, steps, "),
        ({"optimizer.lr": 3}, "unknown field 'optimizer.lr'; accepted here: learning_rate, "),
        ({"steps": None}, "field 'steps' is missing"),
        ({"steps": "many"}, "field 'steps' must be an integer, got 'many'"),
        ({"steps": True}, "field 'steps' must be an integer, got True"),
        ({"steps": 2.5}, "field 'steps' must be an integer, got 2.5"),
        ({"run_dir": 3}, "field 'run_dir' must be a string, got 3"),
        ({"optimizer.learning_rate": "fast"}, "'optimizer.learning_rate' must be a number"),
        ({"optimizer.clip_norm": "none"}, "'optimizer.clip_norm' must be a number or null"),
        ({"optimizer.decay": "step"}, "'optimizer.decay' must be 'linear' or 'cosine', got 'step'"),
        ({"model.use_expectation": "no way"}, "'model.use_expectation' must be true or false"),
        ({"model": 3}, "model must be a mapping of fields, got 3"),
        ({"optimizer.b1": 1}, "optimizer.b1 must be in [0, 1), got 1.0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer in 0..2147483647, got -1"),
        ({"run_dir": ""}, "run_dir must be the name of a folder"),
        ({"sequence_length": 99}, "sequence_length must be at most model.max_position_embeddings"),
        ({"sequence_length": 9}, "sequence_length must be at least 16"),
        ({"model.vocab_size": 15}, "model.vocab_size must be at least 16"),
        ({"model.num_labels": 9}, "model.num_labels must be at least 10"),
        ({"optimizer.warmup_steps": 11}, "optimizer.warmup_steps must be at most steps (10)"),
        ({"model.num_attention_heads": 3}, "model."),
        ({"data.num_train": 0}, "data.num_train must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_config_is_one_message_with_file_and_field(
    config_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = edit(config_file, tmp_path, changes)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1", "3", "", "steps: 1\nsteps: 2"])
def test_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(path)


# Commands


@pytest.fixture(scope="module")
def trained(config_file: Path) -> TrainConfig:
    """A run made by the command, in its own process, with options."""
    options = ["--optimizer.learning-rate", "5e-3", "--run-dir", config_file.parent / "trained"]
    process = start("train.py", config_file, *options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""
    assert "validation loss" in out
    assert "test loss" in out
    assert "majority baseline" in out
    return load_config(config_file.parent / "trained" / "config.yaml")


def test_options_override_the_file(trained: TrainConfig, config_file: Path) -> None:
    expected = load_config(config_file)
    assert trained == dataclasses.replace(
        expected,
        run_dir=trained.run_dir,
        optimizer=dataclasses.replace(expected.optimizer, learning_rate=5e-3),
    )
    assert Path(trained.run_dir).name == "trained"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "batch_size must be an integer >= 1, got 0"),
        (["--optimizer.warmup-steps", "99"], "optimizer.warmup_steps must be at most steps (10)"),
        (["--model.vocab-size", "4"], "model.vocab_size must be at least 16"),
    ],
    ids=str,
)
def test_bad_option_is_one_message(
    config_file: Path, run: Run, options: list[str], message: str
) -> None:
    code, out, err = run("train.py", config_file, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_evaluate_prints_accuracy_beside_the_baseline(trained: TrainConfig, run: Run) -> None:
    results = json.loads((Path(trained.run_dir) / "results.json").read_text())
    code, out, err = run("evaluate.py", trained.run_dir)
    assert (code, err) == (0, "")
    assert out.startswith(f"step 10: test loss {results['test_loss']:.3f}, accuracy ")
    assert f"{results['test_accuracy']:.1%} (sampled attention)" in out
    assert f"majority baseline {results['majority_baseline']:.1%}" in out


def test_evaluate_takes_mode_split_and_step(trained: TrainConfig, run: Run) -> None:
    options = ["--mode", "expectation", "--split", "valid"]
    code, out, _ = run("evaluate.py", trained.run_dir, *options, "--step", 8)
    assert code == 0
    assert out.startswith("step 8: valid loss ")
    assert "(expectation attention)" in out
    valid = {r["step"]: r["accuracy"] for r in numbers(trained.run_dir) if r["split"] == "valid"}
    best = max(valid, key=lambda step: (valid[step], step))
    _, out, _ = run("evaluate.py", trained.run_dir, *options, "--step", "best")
    assert out.startswith(f"step {best}: ")


def test_evaluate_works_on_a_run_that_was_moved(
    trained: TrainConfig, folder: Path, run: Run
) -> None:
    moved = folder / "moved"
    Path(trained.run_dir).rename(moved)
    try:
        assert run("evaluate.py", moved)[0] == 0
    finally:
        moved.rename(trained.run_dir)


@pytest.mark.parametrize(
    ("script", "arguments", "code", "message"),
    [
        ("train.py", [], 2, "usage: train.py CONFIG.yaml"),
        ("train.py", ["{config}", "--optimizer.learning-rate", "inf"], 2, "> 0 and finite"),
        ("train.py", ["{config}", "--run-dir", "{config}"], 2, "run_dir must be a folder"),
        ("train.py", ["missing.yaml"], 2, "cannot read the configuration missing.yaml"),
        ("train.py", ["{config}", "--stepz", "3"], 2, "--stepz"),
        ("train.py", ["{config}", "--steps", "x"], 2, "--steps"),
        ("train.py", ["{config}", "--optimizer.b1", "1"], 2, "b1 must be in [0, 1)"),
        ("train.py", ["{config}", "--run-dir", "{trained}"], 2, "is not empty"),
        ("train.py", ["{config}", "--run-dir", "{folder}/none", "--resume"], 2, "no run in"),
        ("train.py", ["{config}", "--run-dir", "{trained}", "--resume"], 2, "learning_rate: 0.005"),
        ("train.py", ["{config}", "--tsv-dir", "/nonexistent"], 3, "basic_train.tsv"),
        ("evaluate.py", ["{folder}/none"], 4, "there is no run in"),
        ("evaluate.py", ["{trained}", "--step", "7"], 4, "no checkpoint of step 7"),
        ("evaluate.py", ["{trained}", "--step", "soon"], 2, "--step"),
    ],
)
def test_mistakes_end_with_one_message_and_an_exit_code(
    run: Run,
    trained: TrainConfig,
    config_file: Path,
    folder: Path,
    script: str,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    names = {"config": config_file, "trained": trained.run_dir, "folder": folder}
    before = sorted(folder.rglob("*"))
    found, out, err = run(script, *(argument.format(**names) for argument in arguments))
    assert found == code
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
    assert sorted(folder.rglob("*")) == before


def test_help_without_a_configuration(run: Run) -> None:
    code, out, err = run("train.py", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: train.py CONFIG.yaml")


def test_sigterm_before_the_first_step_exits_with_0(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit) as exit_,
        sigterm_exits(),
        tempfile.TemporaryDirectory(dir=tmp_path),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert exit_.value.code == 0
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_damaged_checkpoints_end_with_one_message(trained: TrainConfig, folder: Path) -> None:
    """In its own process, for Orbax' threads would complain at length."""
    damaged = folder / "damaged"
    subprocess.run(["cp", "-r", trained.run_dir, damaged], check=True)
    for manifest in damaged.rglob("manifest.ocdbt"):
        manifest.unlink()
    process = start("evaluate.py", damaged)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (4, "")
    lines = err.splitlines()
    assert lines[0].startswith("error: the checkpoint of step 10 in ")
    assert all("cannot be read" in line for line in lines)


@pytest.mark.slow
def test_sigterm_saves_exits_0_and_resume_goes_on_bit_for_bit(folder: Path) -> None:
    path = folder / "long.yaml"
    config = tiny_config(folder, "long", steps=400, evaluate_every=200, log_every=7)
    path.write_text(dump_config(config))
    interrupted = start("train.py", path)
    metrics = Path(config.run_dir) / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert interrupted.poll() is None, interrupted.communicate()[1]
        time.sleep(0.01)
    interrupted.send_signal(signal.SIGTERM)
    out, err = interrupted.communicate(timeout=300)
    assert interrupted.returncode == 0, err
    assert "stopped after step" in out
    assert "stopping after this step" in err
    assert not (Path(config.run_dir) / "results.json").exists()

    whole = folder / "whole"
    processes = [
        start("train.py", path, "--resume"),
        start("train.py", path, "--run-dir", whole),
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
    assert numbers(config.run_dir) == numbers(whole)
    assert len(numbers(whole)) == 400 // 7 + 1 + 2


@pytest.mark.slow
def test_killed_at_any_instant_a_run_goes_on_bit_for_bit(folder: Path) -> None:
    path, whole = folder / "killed.yaml", folder / "unharmed"
    config = tiny_config(folder, "killed", steps=300, evaluate_every=10, log_every=7)
    path.write_text(dump_config(config))
    run_dir, rng = Path(config.run_dir), random.Random(0)
    metrics = run_dir / "metrics.jsonl"
    for number in range(10):
        # The first before there is a configuration, others while steps are made and saved.
        seen = metrics.read_bytes() if metrics.exists() else b""
        resume = ["--resume"] if (run_dir / "config.yaml").exists() else []
        process = start("train.py", path, *resume)
        while number and (
            not metrics.exists()
            or (
                metrics.read_bytes().startswith(seen)
                and len(metrics.read_bytes()) < len(seen) + 200
            )
        ):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    processes = [
        start("train.py", path, "--resume"),
        start("train.py", path, "--run-dir", whole),
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
    assert numbers(run_dir) == numbers(whole)
