"""Reports of runs: of finished ones, of ones that just began, and of none."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from yoso_jax.reports import differences, label_runs, markdown_table, read_run, summarize

SCRIPT = Path(__file__).parents[1] / "scripts" / "report.py"


def write_run(folder: Path, steps: int, *, seed: int = 0, ended: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"kind: lra\nrun_dir: {folder}\nsteps: 4\nseed: {seed}\noptimizer:\n  b1: 0.9\n"
    )
    lines = []
    for step in range(1, steps + 1):
        rates = {"steps_per_s": 10.0 * step, "tokens_per_s": 2000.0, "input_wait": 0.01}
        train = {"step": step, "split": "train", "loss": 2.0 / step, **rates, "time": 3600.0 * step}
        lines.append(json.dumps(train))
        if step % 2 == 0:
            valid = {"step": step, "split": "valid", "loss": 1.0, "f1": 0.9 - step / 10}
            lines.append(json.dumps(valid))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"step": 9, "')
    if ended:
        (folder / "results.json").write_text('{"step": 4, "test_f1": 0.25, "valid_f1": 0.5}')
    return folder


@pytest.fixture
def report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def report(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return report


def test_summary(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "whole", 4)),
        read_run(write_run(tmp_path / "begun", 1, seed=3, ended=False)),
    ]
    headings, (whole, begun) = summarize(runs)
    found = dict(zip(headings, whole, strict=True))
    assert found == {
        "run": "whole",
        "steps": "4 of 4",
        "valid loss": "1",
        "valid f1": "0.5",
        "best valid f1": "0.7 at 2",
        "test f1": "0.25",
        "steps/s": "25",
        "tokens/s": "2,000",
        "input wait": "1.0%",
        "hours": "3.00",
    }
    assert begun[headings.index("steps")] == "1 of 4"
    assert begun[headings.index("best valid f1")] == "-"
    assert differences(runs) == (["field", "whole", "begun"], [["seed", "0", "3"]])


def test_script(tmp_path: Path, report: Callable[..., tuple[int, str, str]]) -> None:
    folders = [write_run(tmp_path / "a", 4), write_run(tmp_path / "b", 3, seed=1, ended=False)]
    code, out, err = report(*folders, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "4 of 4" in out
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# a, b\n\n| run | steps | ")
    assert "| seed | 0 | 1 |" in text
    assert "![curves](report.png)" in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report(folders[0])[0] == 0
    assert "What differs" not in (folders[0] / "report.md").read_text()


def test_run_without_records(tmp_path: Path, report: Callable[..., tuple[int, str, str]]) -> None:
    folder = write_run(tmp_path / "new", 0, ended=False)
    code, out, _ = report(folder)
    assert code == 0
    assert "no picture was drawn" in out
    assert "0 of 4" in (folder / "report.md").read_text()


def test_mistakes(tmp_path: Path, report: Callable[..., tuple[int, str, str]]) -> None:
    assert report() == (2, "", "error: RUN_DIR: name one or more runs\n")
    code, _, err = report(tmp_path / "none")
    assert (code, "there is no run in" in err) == (4, True)
    folders = [write_run(tmp_path / name, 1) for name in "ab"]
    (folders[0] / "results.json").write_text('{"step": 4, ')
    code, _, err = report(folders[0])
    assert (code, "results.json is not valid JSON" in err) == (4, True)
    for content in ("", "- steps", "steps: null\n"):
        (folders[0] / "config.yaml").write_text(content)
        code, _, err = report(folders[0])
        assert (code, "it says no `steps`" in err) == (4, True)
    folders[0] = write_run(tmp_path / "c", 1)
    code, _, err = report(*folders)
    assert (code, "--out: name a folder" in err) == (2, True)
    (tmp_path / "file").write_text("")
    assert report(*folders, "--out", tmp_path / "file")[0] == 2


@pytest.mark.parametrize("name", ["report.md", "report.png"])
def test_files_of_others_stay(
    tmp_path: Path, report: Callable[..., tuple[int, str, str]], name: str
) -> None:
    folder = write_run(tmp_path / "run", 2)
    (folder / name).write_text("mine")
    code, _, err = report(folder)
    assert (code, f"{name} is " in err) == (2, True)
    assert (folder / name).read_text() == "mine"
    assert len(list(folder.glob("report.*"))) == 1


def test_runs_of_one_name(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name / "run", 2, seed=i)) for i, name in enumerate("ab")]
    assert label_runs(runs) == [str(tmp_path / name / "run") for name in "ab"]
    assert label_runs(runs[:1]) == ["run"]


def test_every_validation_and_vertical_bars(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 2, "split": "valid_other", "loss": 3.0, "time": 1.0}\n[1]\n')
    headings, (cells,) = summarize([read_run(folder)])
    assert cells[headings.index("valid_other loss")] == "3"
    assert not any("valid_other" in name and "loss" not in name for name in headings)
    assert markdown_table(["a"], [["b|c"]]).endswith("| b\\|c |")


def test_json_is_made_and_added_to(
    tmp_path: Path, report: Callable[..., tuple[int, str, str]]
) -> None:
    file = tmp_path / "results" / "training.json"
    sampled, exact, begun = (
        write_run(tmp_path / name, 2, seed=seed, ended=name != "begun")
        for seed, name in enumerate(("sampled", "exact", "begun"))
    )
    with (sampled / "config.yaml").open("a") as config:
        config.write("model: {use_expectation: false, num_hash: 8, attention_backward: bucketed}\n")
        config.write("data: {task: text, sources: [/root/mails, b]}\ndata_dir: /root/data\n")
        config.write("sequence_length: 2048\n")
    (sampled / "comparison.json").write_text('{"device": "NVIDIA H100"}')
    code, out, err = report(sampled, "--json", file, "--device", "TPU")
    assert (code, err) == (0, "")
    assert f"{file}: 1 rows\n" in out
    assert not (sampled / "report.md").exists()
    (row,) = json.loads(file.read_text())["rows"]
    expected = {"label": "sampled", "kind": "lra", "task": "text", "attention": "yoso_8"}
    expected |= {"num_hash": 8, "attention_backward": "bucketed", "seed": 0, "steps": 4}
    expected |= {"hash_code_len": 9}
    expected |= {"initializer_range": 0.02, "data": {"sources": ["mails", "b"], "data_dir": "data"}}
    expected |= {"tested_step": 4, "test_f1": 0.25, "validation": [[2, 1.0, 0.7]]}
    expected |= {"steps_per_s": 15.0, "input_wait": 0.01, "device": "NVIDIA H100"}
    assert expected.items() <= row.items()
    assert (row["n"], row["num_backward_hashes"], row["bucket_bits"]) == (2048, 8, 3)
    assert row["date"] == "1970-01-01T02:00:00+00:00"

    (sampled / "results.json").write_text('{"step": 4, "test_f1": 0.5}')
    report_so_far = json.loads(file.read_text()) | {"arguments": {"notes": "kept"}}
    report_so_far["rows"][0]["in_table"] = False
    file.write_text(json.dumps(report_so_far))
    code, out, _ = report(exact, sampled, "--json", file, "--device", "TPU")
    assert (code, "2 rows, of sampled in place of" in out) == (0, True)
    merged = json.loads(file.read_text())
    assert merged["arguments"] == {"notes": "kept"}
    assert [(x["label"], x["test_f1"], x["device"]) for x in merged["rows"]] == [
        ("sampled", 0.5, "NVIDIA H100"),
        ("exact", 0.25, "TPU"),
    ]
    assert merged["rows"][0]["in_table"] is False
    assert merged["rows"][1]["attention"] == "yoso_e"

    before, out_folder = file.read_bytes(), tmp_path / "out"
    arguments = ("--json", file, "--out", out_folder)
    other_seed = write_run(tmp_path / "other" / "exact", 2, seed=7)
    other_bits = write_run(tmp_path / "other" / "sampled", 2)
    config = (sampled / "config.yaml").read_text()
    (other_bits / "config.yaml").write_text(
        config.replace("num_hash: 8", "num_hash: 8, bucket_bits: 1")
    )
    for runs, message in (
        ([other_bits], "label sampled, of different bucket_bits:"),
        ([begun], "all runs must have ended"),
        ([other_seed], "label exact, of different seed"),
        ([exact, other_seed], "folders must have different names, got exact"),
    ):
        code, _, err = report(*runs, *arguments)
        assert (code, message in err) == (2, True), err
    assert file.read_bytes() == before
    for content, status, message in (
        (json.dumps(merged | {"benchmark": "hash"}), 2, "must be a report of 'training'"),
        (json.dumps(merged | {"rows": [{"task": "text"}]}), 2, "each row with a `label`"),
        ("mine", 3, "cannot read the report"),
    ):
        file.write_text(content)
        code, _, err = report(exact, *arguments)
        assert (code, message in err) == (status, True), err
        assert file.read_text() == content
    assert not out_folder.exists()
    assert report(exact, "--device", "TPU")[0] == 2
