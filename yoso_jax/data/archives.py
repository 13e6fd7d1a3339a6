"""Reads files out of .tar.gz, .tar.xz and .deb archives without unpacking them."""

import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yoso_jax.errors import DataError

# Several times what the largest archive used here holds (linux-doc: 190 MB in 16,000 members).
_MAX_BYTES = 1 << 30
_MAX_MEMBERS = 100_000

_BROKEN = (tarfile.TarError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, ValueError)


def read_files(archive: Path | bytes, wanted: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yields the regular files whose path in the archive matches as a whole.

    Nothing is written to disk, so it is the caller who decides where contents go.

    Args:
      archive: file, or the bytes of one.
      wanted: regular expression for paths without a leading `./`.

    Yields:
      The match and the contents of each file, in the archive's order.

    Raises:
      DataError: the archive is damaged; it has a member that tarfile's filter `data` refuses (a
        device, a path or link that leaves the folder); it unpacks to more than 1 GiB or 100,000
        members; no file matches, or two of the same path do.
      OSError: the file cannot be read.
    """
    name = archive.name if isinstance(archive, Path) else "the archive within"
    seen = set()
    stream = archive.open("rb") if isinstance(archive, Path) else io.BytesIO(archive)
    try:
        with stream, tarfile.open(fileobj=_Bounded(_decompress(stream)), mode="r|") as tar:
            for count, member in enumerate(tar):
                if count == _MAX_MEMBERS:
                    raise tarfile.TarError(f"it has more than {_MAX_MEMBERS:,} members")
                tarfile.data_filter(member, "/unpacked")
                match = re.fullmatch(wanted, member.name.removeprefix("./"))
                if match is None or not member.isreg():
                    continue
                if match.group() in seen:
                    raise tarfile.TarError(f"it has two files {match.group()}")
                seen.add(match.group())
                contents = tar.extractfile(member)
                assert contents is not None  # of a regular file
                yield match, contents.read()
    except _BROKEN as error:
        raise DataError(f"{name} is damaged or unsafe, it was not unpacked: {error}") from error
    if not seen:
        raise DataError(f"{name} has no file {wanted}: it is not the archive expected here")


def _decompress(stream: io.BufferedReader | io.BytesIO) -> io.BufferedIOBase:
    start = stream.read(8)
    if start == b"!<arch>\n":
        return _decompress(_open_deb(stream))
    stream.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=stream)
    if start.startswith(b"\xfd7zXZ"):
        return lzma.LZMAFile(stream)
    raise tarfile.ReadError("it is neither .tar.gz, .tar.xz nor a .deb made of them")


def _open_deb(stream: io.BufferedReader | io.BytesIO) -> io.BytesIO:
    """Finds the file tree of a Debian package, an ar archive; see deb(5)."""
    while header := stream.read(60):
        if len(header) < 60 or header[58:] != b"`\n":
            break
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return io.BytesIO(stream.read(size))
        stream.seek(size + size % 2, io.SEEK_CUR)
    raise tarfile.ReadError("it is no Debian package: it has no member data.tar")


class _Bounded(io.RawIOBase):
    """Counts what is read, so that a small archive cannot unpack without end."""

    def __init__(self, stream: io.BufferedIOBase):
        self._stream = stream
        self._left = _MAX_BYTES

    def read(self, size: int = -1, /) -> Any:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.TarError(f"it unpacks to more than {_MAX_BYTES >> 20} MiB")
        return data
