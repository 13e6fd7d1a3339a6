"""What a fine-tuned model leaves behind: metrics, predictions, and itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yoso_jax.finetuning.task import Outputs, Task
from yoso_jax.metrics import write_atomically

METRICS_FILE = "metrics.json"
PREDICTIONS_FOLDER = "predictions"
MODEL_FOLDER = "model"


def evaluate(task: Task, split: str, outputs: Outputs) -> dict[str, float]:
    """Loss and metrics of a split with labels; the first after the loss ranks checkpoints."""
    return {"loss": task.loss(split, outputs), **task.metrics(split, outputs)}


def write_results(
    task: Task, predict: Callable[[str], Outputs], run_dir: Path
) -> tuple[dict[str, Any], list[Path]]:
    """Evaluates all splits but `train`, and predicts the tests, or what there is instead.

    Args:
        task: what was fine-tuned.
        predict: the outputs of a split.
        run_dir: gets `metrics.json`, an object of metrics by split, and in `predictions/` the files
            of `Task.write_predictions`: of the tests, or of the validation splits if there are
            none.

    Returns:
        The metrics by split, and the files of predictions.
    """
    metrics, files = {}, []
    names = [name for name in task.splits if name != "train"]
    tests = [name for name in names if name.startswith("test")]
    for name in names:
        outputs = predict(name)
        if task.splits[name].has_labels:
            metrics[name] = evaluate(task, name, outputs)
        if name in (tests or names):
            files += task.write_predictions(name, outputs, run_dir / PREDICTIONS_FOLDER)
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    write_atomically(run_dir / METRICS_FILE, text)
    return metrics, files
