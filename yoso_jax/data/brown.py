"""The Brown corpus: its texts, and tasks made of its words and tags for each head that needs one.

No package manager ships CoNLL 2003, SQuAD or SWAG; these stand in for them, in their formats. They
say how a model compares with another one, not with what is published for those.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yoso_jax.data.archives import read_files
from yoso_jax.data.fetch import write_file
from yoso_jax.errors import DataError

# Of ten texts, in order of their names, eight are trained on.
_VALID, _TEST = 8, 9
# Sentences of a passage that questions are asked about, at least.
_PASSAGE = 10
# Words of a sentence that endings are made of.
_SHORTEST, _LONGEST = 8, 40
_BLANK = "_____"


@dataclasses.dataclass(frozen=True)
class Word:
    """A word or a mark, and its part of speech.

    Attributes:
      text: as it is written.
      tag: the corpus' own: a part of speech, `-tl` if the word belongs to a title, `-hl` if it is
        in a headline.
    """

    text: str
    tag: str

    @property
    def part_of_speech(self) -> str:
        """The tag without what says where the word is."""
        return re.sub(r"(-(tl|hl|nc))+$", "", self.tag)

    @property
    def is_title(self) -> bool:
        """Whether it belongs to a title, as all words of `City of Atlanta`."""
        return "tl" in self.tag.split("-")[1:]

    @property
    def is_name(self) -> bool:
        """Whether it is a proper noun or belongs to a title."""
        return self.is_title or re.match(r"(fw-)?nps?(?![a-z])", self.tag) is not None

    @property
    def is_possessive(self) -> bool:
        """Whether it is, e.g. `Atlanta's`."""
        return "$" in self.tag


type Sentence = Sequence[Word]


@dataclasses.dataclass(frozen=True)
class Name:
    """A name in a sentence, as `Fulton County Grand Jury` or `Ivan Allen Jr.`.

    Attributes:
      start: number of its first word.
      end: number of the word after its last.
      kind: `TITLE` if words other than proper nouns belong to it, else `NAME`.
      text: its words, without a possessive's ending.
    """

    start: int
    end: int
    kind: str
    text: str


def convert_brown(archives: Sequence[Path], folder: Path) -> None:
    """Writes each of the 500 texts without its tags, one line a paragraph."""
    for name, text in _read(archives[0]):
        write_file(folder / f"{name}.txt", untag(text).encode())


def convert_names(archives: Sequence[Path], folder: Path) -> None:
    """Writes eng.train, eng.testa and eng.testb: word, part of speech, and tag of names.

    A tag is `B-` or `I-` with the kind of `Name`, or `O`.
    """
    files = ("eng.train", "eng.testa", "eng.testb")
    lines: dict[str, list[str]] = {file: [] for file in files}
    for file, (_, text) in zip(_turns(files), _read(archives[0]), strict=False):
        for sentence in (each for paragraph in parse(text) for each in paragraph):
            tags = ["O"] * len(sentence)
            for name in find_names(sentence):
                rest = [f"I-{name.kind}"] * (name.end - name.start - 1)
                tags[name.start : name.end] = [f"B-{name.kind}", *rest]
            words = zip(sentence, tags, strict=True)
            lines[file] += [f"{word.text} {word.part_of_speech} {tag}" for word, tag in words]
            lines[file].append("")
    for file, found in lines.items():
        write_file(folder / file, "\n".join(found).encode())


def convert_endings(archives: Sequence[Path], folder: Path) -> None:
    """Writes train.jsonl, valid.jsonl and test.jsonl: how does the next sentence go on?

    An object has a sentence (`context`), the first half of the next one (`question`), four second
    halves (`choices`), and which of these is its own (`label`). The other three are of other texts.
    """
    splits = ("train", "valid", "test")
    rows: dict[str, list[tuple[str, dict[str, str]]]] = {split: [] for split in splits}
    for split, (name, text) in zip(_turns(splits), _read(archives[0]), strict=False):
        for paragraph in parse(text):
            for first, second in itertools.pairwise(paragraph):
                if all(_SHORTEST <= len(each) <= _LONGEST for each in (first, second)):
                    middle = len(second) // 2
                    row = {
                        "id": f"{name}-{len(rows[split])}",
                        "context": write(first),
                        "question": write(second[:middle]),
                        "ending": write(second[middle:]),
                    }
                    rows[split].append((name, row))
    rng = np.random.default_rng(0)
    for split, found in rows.items():
        if len({name for name, _ in found}) == 1:
            raise DataError(f"{archives[0].name} has a single text for {split}, of two or more")
        lines = []
        for name, row in found:
            choices: list[str] = []
            while len(choices) < 3:
                other, another = found[int(rng.integers(len(found)))]
                if other != name:
                    choices.append(another["ending"])
            label = int(rng.integers(4))
            choices.insert(label, row["ending"])
            given = {field: row[field] for field in ("id", "context", "question")}
            lines.append(json.dumps({**given, "choices": choices, "label": label}) + "\n")
        write_file(folder / f"{split}.jsonl", "".join(lines).encode())


def convert_cloze(archives: Sequence[Path], folder: Path) -> None:
    """Writes train-v1.1.json, dev-v1.1.json and test-v1.1.json: which name has been left out?

    A question is a sentence with a blank for a name, its context the passage around it, in which
    that name is found, too (Dhingra et al., Simple and Effective Semi-Supervised Question
    Answering, NAACL 2018, arXiv:1804.00720).
    """
    files = ("train-v1.1.json", "dev-v1.1.json", "test-v1.1.json")
    articles: dict[str, list[Any]] = {file: [] for file in files}
    for file, (name, text) in zip(_turns(files), _read(archives[0]), strict=False):
        paragraphs = [
            question
            for number, passage in enumerate(_passages(text))
            for question in _ask(passage, f"{name}-{number}")
        ]
        articles[file].append({"title": name, "paragraphs": paragraphs})
    for file, data in articles.items():
        contents = json.dumps({"version": "brown-cloze", "data": data})
        write_file(folder / file, contents.encode())


def untag(text: str) -> str:
    r"""Turns `The/at jury/nn said/vbd ,/, ``/`` No/rb ''/'' ./.` into `The jury said, "No".`.

    Args:
      text: of the Brown corpus in form C: a sentence a line, empty lines between paragraphs.

    Returns:
      The words as they are commonly written, one line a paragraph.
    """
    paragraphs = (
        write([word for sentence in paragraph for word in sentence]) for paragraph in parse(text)
    )
    return "".join(paragraph + "\n" for paragraph in paragraphs)


def parse(text: str) -> list[list[Sentence]]:
    """The sentences of each paragraph; `text` is as of `untag`."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        sentences = [_split(line) for line in paragraph.split("\n") if line.strip()]
        if sentences:
            paragraphs.append(sentences)
    return paragraphs


def write(words: Sequence[Word]) -> str:
    """Words and marks as they are commonly written."""
    text = " ".join(word.text for word in words)
    # Form C writes some marks twice; a stop after an abbreviation's is no other.
    text = re.sub(r"([?!;.]) \1(?!\S)", r"\1", text)
    text = text.replace("`` ", '"').replace(" ''", '"')
    text = re.sub(r' ([,.;:?!)\]]+)(?=[\s"]|$)', r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text)


def find_names(sentence: Sentence) -> list[Name]:
    """The names in a sentence: words that follow each other, but for those after a possessive."""
    names, start = [], None
    for i in range(len(sentence) + 1):
        is_name = i < len(sentence) and sentence[i].is_name
        if start is not None and (not is_name or sentence[i - 1].is_possessive):
            words = sentence[start:i]
            kind = "TITLE" if any(word.is_title for word in words) else "NAME"
            text = " ".join(word.text for word in words)
            names.append(Name(start, i, kind, re.sub(r"('s|')$", "", text)))
            start = None
        if is_name and start is None:
            start = i
    return names


def _passages(text: str) -> Iterator[list[Sentence]]:
    """Paragraphs that follow each other, with enough sentences together; none of the last few."""
    passage: list[Sentence] = []
    for paragraph in parse(text):
        passage += paragraph
        if len(passage) >= _PASSAGE:
            yield passage
            passage = []


def _ask(passage: Sequence[Sentence], identity: str) -> Iterator[Mapping[str, Any]]:
    """For each sentence a question about the first name that is elsewhere in the passage, too."""
    for number, sentence in enumerate(passage):
        context = " ".join(write(each) for i, each in enumerate(passage) if i != number)
        for name in find_names(sentence):
            blank = Word(_BLANK + ("'s" if sentence[name.end - 1].is_possessive else ""), "np")
            question = write([*sentence[: name.start], blank, *sentence[name.end :]])
            pattern = rf"(?<!\w){re.escape(name.text)}(?!\w)"
            places = [match.start() for match in re.finditer(pattern, context)]
            if places and not re.search(pattern, question):
                answers = [{"text": name.text, "answer_start": place} for place in places]
                entry = {"id": f"{identity}-{number}", "question": question, "answers": answers}
                yield {"context": context, "qas": [entry]}
                break


def _split(line: str) -> Sentence:
    return [Word(*token.rpartition("/")[::2]) for token in line.split()]


def _read(archive: Path) -> Iterator[tuple[str, str]]:
    """Names and contents of the texts, by name."""
    files = read_files(archive, r"package/(c[a-r]\d\d)")
    found = {match[1]: contents.decode("ascii") for match, contents in files}
    yield from sorted(found.items())


def _turns(files: tuple[str, str, str]) -> Iterator[str]:
    """The files for one text after another: train, valid and test."""
    while True:
        for i in range(10):
            yield files[{_VALID: 1, _TEST: 2}.get(i, 0)]
