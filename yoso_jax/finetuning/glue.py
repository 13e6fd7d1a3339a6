"""The nine tasks of GLUE: the layouts of their files, their labels and metrics."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from yoso_jax.finetuning.examples import BadRows, Examples, TextExample
from yoso_jax.finetuning.metrics import MetricName
from yoso_jax.finetuning.tables import Row, get_name, get_text, read_table
from yoso_jax.finetuning.texts import parse_label
from yoso_jax.validation import Validated

GlueName = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]


@dataclasses.dataclass(frozen=True)
class GlueConfig(Validated):
    """A task of GLUE, in the files of its archive in `data_dir`.

    Attributes:
      name: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli. Read are train.tsv, dev.tsv and
        test.tsv, for mnli dev_matched.tsv, dev_mismatched.tsv, test_matched.tsv and
        test_mismatched.tsv; those of tests need not be there.
      bad_rows: `error`, or `skip` to leave out rows of the training and validation files that
        cannot be used, as qqp has some; their number is reported.

    Raises:
      ValueError: a field has another value; the message names it.
    """

    task: ClassVar[str] = "glue"

    name: GlueName
    bad_rows: BadRows = "error"

    def __post_init__(self) -> None:
        self._check_choice("name", tuple(GLUE))
        self._check_choice("bad_rows", ("error", "skip"))


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """Layout, labels and metrics of a task.

    Attributes:
      archive: name of the task in the archive's folder and in a submission.
      text: column of the text, or of the two of a pair.
      label: column of the label.
      labels: classes, in the order of their numbers; None for regression.
      metrics: what GLUE reports; the first chooses the best checkpoint.
      header: names of the columns of training and validation files that do not have them.
    """

    archive: str
    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...] | None
    metrics: tuple[MetricName, ...]
    header: Sequence[str] | None = None


_SENTENCES = ("sentence1", "sentence2")
_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        "label",
        _BINARY,
        ("matthews",),
        header=("source", "label", "original_label", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label", _BINARY, ("accuracy",)),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, ("f1", "accuracy")),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", _BINARY, ("f1", "accuracy")),
    "stsb": GlueTask("STS-B", _SENTENCES, "score", None, ("pearson", "spearman")),
    "mnli": GlueTask(
        "MNLI",
        _SENTENCES,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
    "rte": GlueTask("RTE", _SENTENCES, "label", _ENTAILMENT, ("accuracy",)),
    "wnli": GlueTask("WNLI", _SENTENCES, "label", _BINARY, ("accuracy",)),
}
"""By the name in a configuration; classes are numbered as transformers numbers them."""


def glue_files(name: str) -> dict[str, str]:
    """The files of a task by split: train, valid, test, and for mnli those mismatched."""
    if name != "mnli":
        return {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}
    return {
        "train": "train.tsv",
        "valid": "dev_matched.tsv",
        "valid_mismatched": "dev_mismatched.tsv",
        "test": "test_matched.tsv",
        "test_mismatched": "test_mismatched.tsv",
    }


def read_glue(name: str, path: Path, split: str, bad_rows: BadRows) -> Examples[TextExample]:
    """Reads a file of a task as its archive has it.

    Args:
        name: of the task, see `GLUE`.
        path: the file.
        split: a key of `glue_files`. Test files have an `index` and no label, which becomes None.
        bad_rows: see `GlueConfig`.

    Raises:
        DataError: the file is missing, or has another layout or a bad row.
    """
    task = GLUE[name]
    is_test = split.startswith("test")
    rows = 0

    def parse(place: str, row: Row) -> TextExample:
        nonlocal rows
        text, pair = (*(get_text(row, column) for column in task.text), None)[:2]
        label = None
        if not is_test or task.label in row:
            label = parse_label(get_name(row, task.label), task.label, task.labels)
        identity = row.get("index", row.get("id", str(rows)))
        rows += 1
        return TextExample(place, identity, text, pair, label)

    return read_table(path, parse, bad_rows, None if is_test else task.header)
