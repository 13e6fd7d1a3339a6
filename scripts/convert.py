"""Converts a checkpoint: `python scripts/convert.py SRC DST --verify`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from yoso_jax import cli
from yoso_jax.auto import ARCHITECTURES
from yoso_jax.conversion.convert import convert
from yoso_jax.conversion.load import make_plan
from yoso_jax.conversion.positions import PositionExtension
from yoso_jax.conversion.report import print_report
from yoso_jax.conversion.save import FileFormat
from yoso_jax.errors import CheckpointError, ConfigError, DiskFullError, is_disk_full


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to convert, into what."""

    source: tyro.conf.Positional[Path]
    """Folder of Hugging Face or Orbax, or file of safetensors or torch.save (.bin, .model, .cp)."""
    destination: tyro.conf.Positional[Path]
    """New folder, or new file that ends in .safetensors; appears whole or not at all."""
    format: FileFormat | None = None
    """Of the destination; by default safetensors if it is named so, else a Hugging Face folder."""
    architecture: str | None = None
    """Class of the model, e.g. YosoModel; by default what config.json or else the keys name."""
    config: Path | None = None
    """Configuration, Hugging Face's or the authors'; by default config.json in or beside SRC."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the parameters written."""
    max_position: int | None = None
    """Positions of the new model, more than the source has; needs --position-extension."""
    position_extension: PositionExtension | None = None
    """How to make the new positions: repeat the old ones, or stretch them."""
    verify: bool = False
    """Read the result back and compare every tensor with the source before it appears."""


def main() -> None:
    """Prints what becomes of every tensor, then writes the result."""
    arguments = tyro.cli(Arguments, description=f"Converts a checkpoint. {cli.EXIT_CODES}")
    file_format = arguments.format
    if file_format is None:
        file_format = "safetensors" if arguments.destination.suffix == ".safetensors" else "hf"
    overrides = {}
    if arguments.max_position is not None:
        overrides["max_position_embeddings"] = arguments.max_position
    elif arguments.position_extension is not None:
        raise ConfigError("--position-extension needs --max-position")
    classes = [x for x in ARCHITECTURES if arguments.architecture in (None, x.__name__)]
    if not classes:
        names = ", ".join(cls.__name__ for cls in ARCHITECTURES)
        raise ConfigError(f"--architecture must be one of {names}, got {arguments.architecture}")
    try:
        plan = make_plan(
            classes, arguments.source, arguments.config, arguments.position_extension, **overrides
        )
        print_report(plan, arguments.dtype)
        compared = convert(
            plan,
            arguments.destination,
            file_format=file_format,
            dtype=arguments.dtype,
            verify=arguments.verify,
        )
    except (ValueError, OSError) as error:
        kind = DiskFullError if is_disk_full(error) else CheckpointError
        raise kind(str(error)) from error
    checked = f"; verified: {compared} tensors are the source's" if arguments.verify else ""
    print(f"wrote {arguments.destination} ({file_format}){checked}")


if __name__ == "__main__":
    cli.run(main)
