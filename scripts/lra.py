"""Compares attentions on a task: `python scripts/lra.py --task listops --variants softmax,yoso_32`.

Trains the classifier of `configs/lra/TASK.yaml` once for each variant and seed, tests the best
checkpoint of each run and prints a table. Every field of the configuration can be overridden by an
option as of `scripts/train.py`, e.g. `--steps 100 --model.num-hidden-layers 1`; `--run-dir` is the
folder of all the runs, and `--seed` the first seed. The JSON file is a report as
`yoso_jax.benchmarking.report` describes it, its rows are those of `yoso_jax.comparison`.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from yoso_jax import cli
from yoso_jax.benchmarking.report import describe_environment, write_report
from yoso_jax.comparison import Row, check_folders, compare, draw, plan_runs, tabulate
from yoso_jax.config_files import load_config
from yoso_jax.data.tasks import TASKS
from yoso_jax.errors import ConfigError, DiskFullError, is_disk_full
from yoso_jax.metrics import write_atomically
from yoso_jax.train_config import TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs" / "lra"
RUN_DIR = "runs/lra"
DESCRIPTION = f"""Compares attentions on a task of Long Range Arena. Fields of its configuration are
options too, see train.py configs/lra/TASK.yaml --help; --run-dir ({RUN_DIR} by default) is the
folder of all the runs, --seed the first seed. {cli.EXIT_CODES}"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compare, and where to write it."""

    task: str
    """listops, text, retrieval, image or pathfinder."""
    variants: str = "softmax,yoso_e,yoso_32,yoso_c_16"
    """Attentions, with commas between: softmax, yoso_e, yoso_M, yoso_c_M, with M hashes."""
    seeds: int = 1
    """Runs of each variant."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with runs that were interrupted; finished ones are only read."""
    json: Path | None = None
    """Report, renewed after each run."""
    markdown: Path | None = None
    """The table; by default beside the JSON file."""
    plot: Path | None = None
    """Picture of validation accuracy against steps."""


def main() -> None:
    """Trains one run after another and prints a table; the report is renewed after each."""
    arguments, options = tyro.cli(Arguments, description=DESCRIPTION, return_unknown_args=True)
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install '.[plot]'")
    config = read_config(arguments.task, options)
    runs = plan_runs(config, arguments.variants.split(","), arguments.seeds)
    check_folders(runs, arguments.resume)

    markdown = arguments.markdown
    if markdown is None and arguments.json is not None:
        markdown = arguments.json.with_suffix(".md")
    environment = describe_environment()
    device = environment["device"]["kind"]
    rows: list[Row] = []
    report = {
        "benchmark": "lra",
        **environment,
        "arguments": {
            "task": arguments.task,
            "variants": arguments.variants,
            "seeds": arguments.seeds,
            "config": dataclasses.asdict(config),
        },
        "rows": rows,
    }
    title = f"{arguments.task}, {config.steps:,} steps, on {device}"
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        for path in filter(None, (arguments.json, markdown, arguments.plot)):
            path.parent.mkdir(parents=True, exist_ok=True)  # before hours are spent
        for row in compare(runs, console):
            rows.append(row)
            if arguments.json is not None:
                write_report(arguments.json, report)
            if markdown is not None:
                write_atomically(markdown, to_markdown(title, rows))
        if arguments.plot is not None:
            draw(arguments.plot, title, rows)
    except OSError as error:
        raise (DiskFullError if is_disk_full(error) else ConfigError)(str(error)) from error
    print_table(console, title, rows)


def read_config(task: str, options: list[str]) -> TrainConfig:
    """The configuration of a task, with options as train.py takes them."""
    names = [name for name in TASKS if (CONFIGS / f"{name}.yaml").exists()]
    if task not in names:
        raise ConfigError(f"--task must be one of {', '.join(names)}, got {task!r}")
    config = load_config(CONFIGS / f"{task}.yaml")
    assert isinstance(config, TrainConfig)
    default = dataclasses.replace(config, run_dir=RUN_DIR)
    try:
        return tyro.cli(TrainConfig, args=options, default=default, prog="lra.py")
    except ValueError as error:  # tyro reports those of the nested sections only
        raise ConfigError(str(error)) from error


def print_table(console: Console, title: str, rows: list[Row]) -> None:
    """Prints what the variants reached."""
    headings, lines = tabulate(rows)
    table = Table(title=title, caption=legend(rows), highlight=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for cells in lines:
        table.add_row(*cells)
    console.print(table)


def to_markdown(title: str, rows: list[Row]) -> str:
    """The same table in Markdown."""
    headings, lines = tabulate(rows)
    rules = ["---", *["---:"] * (len(headings) - 1)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rules, *lines))
    return f"{table}\n\n{title}. {legend(rows)}\n"


def legend(rows: list[Row]) -> str:
    """What the numbers mean."""
    text = (
        "Test accuracy of the best checkpoint by validation, mean ± standard deviation over seeds"
    )
    if rows:
        text += f"; the most frequent label gives {rows[0]['majority_baseline']:.2%}"
    return f"{text}. Memory as XLA plans a training step."


if __name__ == "__main__":
    cli.run(main)
