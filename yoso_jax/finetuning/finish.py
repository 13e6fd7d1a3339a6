"""The metrics of a fine-tuned model, and its predictions."""

from collections.abc import Callable
from pathlib import Path

from yoso_jax.finetuning.task import Outputs, Task

PREDICTIONS_FOLDER = "predictions"


def evaluate(task: Task, split: str, outputs: Outputs) -> dict[str, float]:
    """Loss and metrics of a split with labels; the first after the loss ranks checkpoints."""
    return {"loss": task.loss(split, outputs), **task.metrics(split, outputs)}


def write_results(
    task: Task, predict: Callable[[str], Outputs], run_dir: Path | None
) -> tuple[dict[str, dict[str, float]], list[Path]]:
    """Evaluates all splits but `train`, and predicts the tests, or what there is instead.

    Args:
        task: what was fine-tuned.
        predict: the outputs of a split.
        run_dir: gets in `predictions/` the files of `Task.write_predictions`: of the tests, or of
            the validation splits if there are none. None: nothing is written.

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
        if run_dir is not None and name in (tests or names):
            files += task.write_predictions(name, outputs, run_dir / PREDICTIONS_FOLDER)
    return metrics, files
