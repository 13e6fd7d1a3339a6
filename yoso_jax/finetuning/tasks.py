"""All that can be fine-tuned, by the name of the task in a configuration."""

from pathlib import Path

from yoso_jax.finetuning.choices import ChoicesConfig
from yoso_jax.finetuning.choices_task import ChoicesTask
from yoso_jax.finetuning.conll import WordsConfig
from yoso_jax.finetuning.glue import GlueConfig, glue_files
from yoso_jax.finetuning.questions_task import QuestionsTask
from yoso_jax.finetuning.squad import QuestionsConfig
from yoso_jax.finetuning.task import Task
from yoso_jax.finetuning.text_tasks import GlueTask, TextsTask
from yoso_jax.finetuning.texts import TextsConfig
from yoso_jax.finetuning.words_task import WordsTask

TASKS: dict[str, type[Task]] = {
    GlueConfig.task: GlueTask,
    TextsConfig.task: TextsTask,
    WordsConfig.task: WordsTask,
    QuestionsConfig.task: QuestionsTask,
    ChoicesConfig.task: ChoicesTask,
}
"""By the `task` of their configurations."""

DataConfig = GlueConfig | TextsConfig | WordsConfig | QuestionsConfig | ChoicesConfig


def split_files(config: DataConfig, folder: Path) -> dict[str, Path]:
    """The files of the splits that are to be read; those of GLUE's tests only if they are there."""
    if isinstance(config, GlueConfig):
        files = {split: folder / name for split, name in glue_files(config.name).items()}
        return {
            split: file
            for split, file in files.items()
            if not split.startswith("test") or file.exists()
        }
    names = {"train": config.train, "valid": config.valid, "test": config.test}
    return {split: folder / name for split, name in names.items() if name is not None}
