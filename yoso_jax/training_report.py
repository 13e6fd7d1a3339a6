"""What training runs reached, as a JSON report; `yoso_jax.training_table` is its table.

A report is one of `yoso_jax.benchmarking.report` with the benchmark "training". Its `date`,
`device`, `versions` and `commit` are of when and where it was last written, its `arguments` may
hold notes, which stay when runs are added. Each row is of a run and has

- `label`: the name of its folder, different in every row;
- `kind`, `task` and `n`: what was trained, on sequences of how many tokens;
- `attention`: as of `yoso_jax.comparison.variant_of`; of one that samples also `num_hash`,
  `attention_backward`, and of buckets `num_backward_hashes` and `bucket_bits`;
- `seed`, `steps`, `learning_rate`, `batch_size`, `dtype`, `final_checkpoint`, `data` (its other
  fields, and the folder's name), and of the model `hidden_size`,
  `num_hidden_layers`, `initializer_range`; `init_from` and `mean_over` where the run has them;
- `tested_step` and `test_*`: of results.json;
- `validation`, and the like of other validation splits: a list of [step, loss, score];
- `steps_per_s` and `input_wait`: medians of the lines of training;
- `device`, `date` of the last record, and `commit` of the code that wrote the row.

By hand may be added `note`, in what a run differs from others with the same fields, which then have
a column of their own, and `in_table`, false for rows that tables leave out.
"""

import datetime
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from yoso_jax.benchmarking.report import Row, describe_environment, read_report
from yoso_jax.comparison import ROW_FILE, variant_of
from yoso_jax.config import CONFIG_FILE, EncoderConfig, YosoConfig
from yoso_jax.errors import CheckpointError, ConfigError
from yoso_jax.kernels.backward_choice import plan
from yoso_jax.lra import LRAConfig
from yoso_jax.metrics import score_name
from yoso_jax.reports import RunRecord
from yoso_jax.saving import MODEL_FOLDER
from yoso_jax.trainer import RESULTS_FILE
from yoso_jax.training_table import BENCHMARK

_MODEL = ("hidden_size", "num_hidden_layers", "initializer_range")
# What else of a model's configuration is read: attention, and what that must suit.
_ATTENTION = (
    "attention",
    "use_expectation",
    "num_attention_heads",
    "hash_code_len",
    "num_hash",
    "conv_window",
    "use_fast_hash",
    "bit_layout",
    "lsh_backward",
    "attention_backward",
    "num_backward_hashes",
    "bucket_bits",
)
# Fields that not all rows have: of the configuration, and those added by hand.
_OPTIONAL = (
    "hash_code_len",
    "num_hash",
    "attention_backward",
    "num_backward_hashes",
    "bucket_bits",
    "init_from",
    "mean_over",
)
_BY_HAND = ("note", "in_table")


def add_runs(
    path: Path, runs: Sequence[RunRecord], device: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The report of a file with the rows of runs, each in the place of that of the same label.

    A row is only replaced by one of the same configuration, and what was added to it by hand stays.

    Returns the report, which is not written, and the labels that it had before.

    Args:
        path: the report; need not exist.
        runs: that have ended, in folders of different names.
        device: what ran those that do not say so; None: the device of this process.

    Raises:
        ConfigError: two runs have the same name, one has not ended or has the label of a row with
            another configuration, or the file is a report of something else.
        DataError: the file is no report.
        CheckpointError: the configuration of a model is damaged, or was that of a checkpoint and
            is not in the run's folder.
    """
    if repeated := [name for name, n in Counter(run.name for run in runs).items() if n > 1]:
        raise ConfigError(
            f"RUN_DIR: in a report folders must have different names, got {', '.join(repeated)} "
            "more than once"
        )
    if unfinished := [str(run.folder) for run in runs if not run.results]:
        raise ConfigError(
            f"RUN_DIR: in a report all runs must have ended, with a {RESULTS_FILE}; not so "
            f"{', '.join(unfinished)}"
        )
    report: dict[str, Any] = {"benchmark": BENCHMARK, "arguments": {}, "rows": []}
    if path.exists():
        report = read_report(path)
        if report["benchmark"] != BENCHMARK:
            raise ConfigError(
                f"{path} must be a report of {BENCHMARK!r}, is one of {report['benchmark']!r}"
            )
        if not all(isinstance(row, dict) and "label" in row for row in report["rows"]):
            raise ConfigError(f"{path} must be a report of runs, each row with a `label`")
    environment = describe_environment()
    rows = {row["label"]: row for row in report["rows"]}
    replaced = []
    for run in runs:
        described, by_hand = _describe(run), {}
        if (old := rows.get(run.name)) is not None:
            names = dict.fromkeys((*described, *_OPTIONAL))
            if changed := [x for x in names if old.get(x) != described.get(x)]:
                raise ConfigError(
                    f"{path} has another run with the label {run.name}, of different "
                    f"{', '.join(changed)}: rename the folder {run.folder} to keep both"
                )
            replaced.append(run.name)
            by_hand = {name: old[name] for name in _BY_HAND if name in old}
        measured = _measured(run, device) | {"commit": environment["commit"]}
        rows[run.name] = described | measured | by_hand
    return {**report, **environment, "rows": list(rows.values())}, replaced


def _describe(run: RunRecord) -> Row:
    """The fields of a row that follow from the configuration."""
    config, model = run.config, _read_model(run)
    n: int | None = config.get("sequence_length")
    row = {"label": run.name, "kind": config.get("kind", "lra"), "task": config.get("data.task")}
    row |= {"n": n, "attention": variant_of(model)}
    if model.attention == "yoso":
        row["hash_code_len"] = model.hash_code_len
    if model.is_sampled:
        row |= {"num_hash": model.num_hash, "attention_backward": model.backward or "auto"}
    if row.get("attention_backward") == "bucketed" and n is not None:
        # As they were chosen: defaults change.
        chosen = plan(
            "bucketed",
            model.num_backward_hashes,
            model.bucket_bits,
            num_hashes=model.num_hash,
            hash_code_len=model.hash_code_len,
            num_tokens=n,
            is_biased=False,
            platform="",
        )
        row |= {"num_backward_hashes": chosen.num_hashes, "bucket_bits": chosen.bucket_bits}
    row |= {"seed": config.get("seed"), "steps": config["steps"]}
    row["learning_rate"] = config.get("optimizer.learning_rate")
    row |= {name: config.get(name) for name in ("batch_size", "dtype", "final_checkpoint")}
    row |= {name: getattr(model, name) for name in _MODEL}
    for name, value in (
        ("init_from", config.get("init_from")),
        ("mean_over", config.get("model.mean_over")),
    ):
        if value is not None:
            row[name] = _without_folders(value)
    row["data"] = {
        name.removeprefix("data."): _without_folders(value)
        for name, value in config.items()
        if name.startswith("data.") and name != "data.task" and value is not None
    }
    for name in ("data_dir", "tsv_dir"):
        if config.get(name) is not None:
            row["data"][name] = Path(config[name]).name
    return row


def _measured(run: RunRecord, device: str | None) -> Row:
    """The other fields of the row of a run that has ended, but for `commit`."""
    row: Row = {"tested_step": run.results.get("step")}
    row |= {name: value for name, value in run.results.items() if name.startswith("test_")}
    for split in run.valid_splits:
        row[split.replace("valid", "validation", 1)] = [
            [record["step"], record["loss"], record.get(score_name(record) or "")]
            for record in run.split(split)
            if "loss" in record
        ]
    for name in ("steps_per_s", "input_wait"):
        if (value := run.median(name)) is not None:
            row[name] = value
    row["device"] = _recorded_device(run) or device or jax.devices()[0].device_kind
    if times := [record["time"] for record in run.records if "time" in record]:
        last = datetime.datetime.fromtimestamp(max(times), datetime.UTC)
        row["date"] = last.isoformat(timespec="seconds")
    return row


def _read_model(run: RunRecord) -> EncoderConfig:
    """The configuration of a model: from its folder, or what config.yaml sets of the defaults."""
    names = (*_MODEL, *_ATTENTION)
    given = {name: run.config.get(f"model.{name}") for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    folder = run.folder / MODEL_FOLDER
    try:
        if run.config.get("kind", "lra") == "lra":
            return LRAConfig().replace(**given)
        if (folder / CONFIG_FILE).exists():
            return YosoConfig.from_pretrained(folder)
        if run.config.get("init_from") is None:
            return YosoConfig().replace(**given)
    except ValueError as error:
        raise CheckpointError(f"{run.folder}: the model is damaged: {error}") from error
    raise CheckpointError(
        f"{folder / CONFIG_FILE} is missing: the run started from a checkpoint, whose "
        "configuration only that file has"
    )


def _recorded_device(run: RunRecord) -> str | None:
    """What `yoso_jax.comparison` noted, which made some of the runs."""
    try:
        return json.loads((run.folder / ROW_FILE).read_text(encoding="utf-8"))["device"]
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{run.folder / ROW_FILE} is damaged: {error!r}") from error


def _without_folders(value: Any) -> Any:
    """The same without the folders of one machine."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    is_absolute = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_absolute else value
