"""Tasks made of the Brown corpus' words and tags, and that fine-tuning reads them."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from yoso_jax.data.brown import (
    convert_cloze,
    convert_endings,
    convert_names,
    find_names,
    parse,
    untag,
    write,
)
from yoso_jax.errors import DataError
from yoso_jax.finetuning.choices import ChoicesConfig, read_choices
from yoso_jax.finetuning.conll import WordsConfig, read_conll
from yoso_jax.finetuning.squad import QuestionsConfig, read_squad

SENTENCES = """
\tThe/at Fulton/np-tl County/nn-tl Jury/nn-tl saw/vbd Ivan/np Allen's/np$ Mayor/nn-tl ./.


\t``/`` So/rb it/pps did/dod what/wdt we/ppss all/abn wanted/vbd ''/'' ,/, he/pps said/vbd ./.
Allen/np went/vbd to/in the/at mayor/nn of/in his/pp$ city/nn ,/, number/nn {0}/cd ./.
"""

Convert = Callable[[Sequence[Path], Path], None]


def convert(function: Convert, folder: Path, texts: int = 20, contents: str = SENTENCES) -> Path:
    """What a conversion makes of an archive of texts, in each of which is its number."""
    archive = folder / "brown.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        # Not in the order of their names.
        for i in reversed(range(texts)):
            data = contents.format(i).encode()
            member = tarfile.TarInfo(f"package/ca{i:02}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    out = folder / "out"
    out.mkdir()
    function([archive], out)
    return out


def test_names_in_a_sentence() -> None:
    (((first,), (second, third))) = parse(SENTENCES.format(1))
    names = [(name.text, name.kind, name.start, name.end) for name in find_names(first)]
    # A possessive ends a name.
    assert names == [
        ("Fulton County Jury", "TITLE", 1, 4),
        ("Ivan Allen", "NAME", 5, 7),
        ("Mayor", "TITLE", 7, 8),
    ]
    assert not find_names(second)
    assert write(second) == '"So it did what we all wanted", he said.'
    assert [name.text for name in find_names(third)] == ["Allen"]


@pytest.mark.parametrize(
    ("token", "part_of_speech", "is_name"),
    [
        ("Times/nns-tl-hl", "nns", True),
        ("Mr./np", "np", True),
        ("Jones'/nps$", "nps$", True),
        ("Paul's/np+bez", "np+bez", True),
        ("Roma/fw-np", "fw-np", True),
        ("of/in-tl", "in", True),
        ("no/fw-nn-nc", "fw-nn", False),
        ("--/--", "--", False),
        ("1/2/cd-hl", "cd", False),
        ("not/*", "*", False),
    ],
)
def test_tags(token: str, part_of_speech: str, is_name: bool) -> None:
    (((word,),),) = parse(token)
    assert (word.part_of_speech, word.is_name) == (part_of_speech, is_name)
    assert f"{word.text}/{word.tag}" == token


def test_names_are_tagged(tmp_path: Path) -> None:
    out = convert(convert_names, tmp_path)
    config = WordsConfig()
    found = {
        file: read_conll(config, out / file, split).items
        for file, split in zip(("eng.train", "eng.testa", "eng.testb"), SPLITS, strict=True)
    }
    assert [len(items) for items in found.values()] == [48, 6, 6]
    first, _, third = found["eng.testa"][:3]
    assert first.words == (
        "The",
        "Fulton",
        "County",
        "Jury",
        "saw",
        "Ivan",
        "Allen's",
        "Mayor",
        ".",
    )
    assert first.tags == (
        *("O", "B-TITLE", "I-TITLE", "I-TITLE", "O", "B-NAME", "I-NAME", "B-TITLE", "O"),
    )
    assert third.words[-2] == "8"  # the ninth text, by name
    assert found["eng.testb"][2].words[-2] == "9"
    config = WordsConfig(tag_column=1)
    assert read_conll(config, out / "eng.train", "train").items[0].tags == (
        *("at", "np", "nn", "nn", "vbd", "np", "np$", "nn", "."),
    )


SPLITS = ("train", "valid", "test")


def test_endings_are_of_the_next_sentence_or_of_other_texts(tmp_path: Path) -> None:
    out = convert(convert_endings, tmp_path)
    config = ChoicesConfig(train="train.jsonl", valid="valid.jsonl", id="id")
    numbers = {"train": {*range(8), *range(10, 18)}, "valid": {8, 18}, "test": {9, 19}}
    for split, texts in numbers.items():
        items = read_choices(config, out / f"{split}.jsonl", split).items
        assert len(items) == len(texts)
        for number, item in zip(sorted(texts), items, strict=True):
            assert item.id.startswith(f"ca{number:02}-")
            assert item.context == '"So it did what we all wanted", he said.'
            endings = [
                f"Allen went to the mayor of his city, number {i}." for i in sorted(numbers[split])
            ]
            assert item.label is not None
            right = item.choices[item.label]
            assert right == f"Allen went to the mayor of his city, number {number}."
            assert len(item.choices) == 4
            assert set(item.choices) <= set(endings)
            assert item.choices.count(right) == 1
    row = json.loads((out / "train.jsonl").read_text().splitlines()[0])
    assert row["question"] == "Allen went to the mayor of"
    labels = {read_label(line) for line in (out / "train.jsonl").read_text().splitlines()}
    assert len(labels) > 1


def read_label(line: str) -> int:
    return json.loads(line)["label"]


def test_endings_need_other_texts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"brown\.tgz has a single text for valid"):
        convert(convert_endings, tmp_path, texts=9)


def test_blanks_stand_for_names_that_the_passage_has(tmp_path: Path) -> None:
    filler = "\n\n".join(["It/pps rained/vbd ./."] * 8)
    out = convert(convert_cloze, tmp_path, contents=SENTENCES + "\n" + filler)
    config = QuestionsConfig()
    numbers = [read_squad(config, out / file, "train").items for file in FILES]
    assert [len(items) for items in numbers] == [16, 2, 2]
    (item, _) = numbers[1]
    assert item.id == "ca08-0-2"
    assert item.question == "_____ went to the mayor of his city, number 8."
    assert item.context.startswith("The Fulton County Jury saw Ivan Allen's Mayor. \"So it did")
    assert "went" not in item.context
    assert item.answers is not None
    assert [answer.text for answer in item.answers] == ["Allen"]


FILES = ("train-v1.1.json", "dev-v1.1.json", "test-v1.1.json")


def test_a_name_that_a_question_gives_away_is_not_asked_for(tmp_path: Path) -> None:
    twice = "Allen/np saw/vbd Allen's/np$ city/nn ./.\n"
    contents = twice + "Allen's/np$ city/nn slept/vbd ./.\n" + "It/pps rained/vbd ./.\n" * 8
    out = convert(convert_cloze, tmp_path, contents=contents)
    data: list[Any] = json.loads((out / FILES[0]).read_text())["data"]
    questions = [
        entry["question"]
        for article in data
        for paragraph in article["paragraphs"]
        for entry in paragraph["qas"]
    ]
    assert questions == ["_____'s city slept."] * 16


@pytest.mark.parametrize(
    ("tagged", "text"),
    [
        ("``/`` No/rb ''/'' ,/, he/pps said/vbd ./.\n\n\n\tYes/rb ./.", '"No", he said.\nYes.\n'),
        ("(/( a/at 1/2/cd inch/nn )/) :/:", "(a 1/2 inch):\n"),
        ("Ivan/np Allen/np Jr./np ./. So/rb ;/. ;/. a/at .22/cd", "Ivan Allen Jr. So; a .22\n"),
        ("\n\n", ""),
    ],
)
def test_untag(tagged: str, text: str) -> None:
    assert untag(tagged) == text
