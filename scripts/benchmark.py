"""Times attention and its parts: `python scripts/benchmark.py attention --n 4096 --m 32`.

- `attention`: `tokens` = B * N * n tokens of all heads and sequences of n. The implementations are
  - `cudnn`: `jax.nn.dot_product_attention(implementation="cudnn")`;
  - `mosaic_gpu` and `xla`: hash of queries and keys, then cumulation, and whatever else runs for
    them, from a projection drawn beforehand (`yoso_jax.attention.sampled_attention`);
  - `mosaic_gpu_op` and `xla_op`: `yoso_attention` as users call it, which also draws the projection
    and normalises the result;
  - `mosaic_gpu_mixed`, `mosaic_gpu_bucketed`, `xla_mixed` and `xla_bucketed`: as `mosaic_gpu` and
    `xla`, but with `backward="expectation"` or `backward="bucketed"` for `--backward`, and with
    the result normalised, which these gradients depend on;
  - `mosaic_gpu_expectation` and `xla_expectation`: `yoso_attention(num_hashes=None)`.

  `speed_device` and `speed_wall` are the times of `cudnn` at the same n divided by the row's.
- `hash`: the codes of one of queries and keys. `flops` counts the matrix product, `bytes` inputs
  and outputs, each once.
- `cumulation`: `yoso_jax.kernels.lsh_cumulation` for given codes, and (`grad_value`) its gradient.
  `floor_ms` is the time in which shared memory passes what packed tables must: a row of D columns
  of 2 bytes for each token that is added or that reads, and each hash,
  `B * N * (T + S) * m * D * 2 bytes / 31 TB/s` on an H100. `floor_fraction` is that divided by the
  device time, `kernel_floor_fraction` divided by the time of the kernel `lsh_cumulation` alone.
- `model`: loss and gradients of all parameters of a `YosoForMaskedLM` of base size, without
  dropout, its layers scanned; bfloat16 with float32 parameters. `softmax` has cuDNN's attention on
  a GPU; `sampled`, `sampled_mixed` and `sampled_bucketed` are sampled with the three gradients.
  `transformers_roberta` (SDPA) and `transformers_yoso` (in expectation) are the models of the same
  size in PyTorch, all bfloat16, each in a process of its own, where that is installed: let JAX
  leave memory for them by `XLA_PYTHON_CLIENT_PREALLOCATE=false`. `speed_wall` is the time of
  `softmax` at the same n divided by the row's.

Times are of compiled functions, see `yoso_jax.benchmarking.measure`; the JSON file is described in
`yoso_jax.benchmarking.report`. What an implementation cannot do becomes a row with a `reason`.
"""

import dataclasses
import sys
from typing import Annotated

import tyro

from yoso_jax import cli
from yoso_jax.benchmarking.base import Benchmark, run_case
from yoso_jax.benchmarking.model import Model
from yoso_jax.benchmarking.operations import Attention, Cumulation, Hash
from yoso_jax.benchmarking.report import (
    Row,
    describe_environment,
    draw,
    label,
    print_table,
    write_report,
)
from yoso_jax.errors import ConfigError, DiskFullError, is_disk_full


def main() -> None:
    """Times one after another and prints a table; the report is renewed after each."""
    options: Benchmark = tyro.cli(
        Annotated[Attention, tyro.conf.subcommand("attention")]
        | Annotated[Hash, tyro.conf.subcommand("hash")]
        | Annotated[Cumulation, tyro.conf.subcommand("cumulation")]
        | Annotated[Model, tyro.conf.subcommand("model")],
        description=f"Times attention and its parts. {cli.EXIT_CODES}",
    )
    if options.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ConfigError("--plot needs matplotlib: pip install '.[plot]'") from error
    options = options.resolve()
    name = type(options).__name__.lower()
    arguments = {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in ("json", "plot")
    }
    rows: list[Row] = []
    environment = describe_environment()
    report = {"benchmark": name, **environment, "arguments": arguments, "rows": rows}
    try:
        for path in filter(None, (options.json, options.plot)):
            path.parent.mkdir(parents=True, exist_ok=True)  # before minutes are spent
        for case in options.cases():
            row = run_case(case, options.seconds)
            rows.append(row)
            result = row.get("reason") or f"{row['wall_ms']:.4f} ms"
            print(f"{label(row)}: {result}", file=sys.stderr, flush=True)
            if options.json is not None:
                write_report(options.json, report)
        if options.plot is not None:
            draw(options.plot, name, rows)
    except OSError as error:
        raise (DiskFullError if is_disk_full(error) else ConfigError)(str(error)) from error
    device = environment["device"]
    print_table(f"{name} on {device['kind']} ({device['platform']})", rows)


if __name__ == "__main__":
    cli.run(main)
