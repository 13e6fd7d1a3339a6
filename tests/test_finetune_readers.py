"""Readers of examples to fine-tune on: each layout from a small file, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from yoso_jax.errors import DataError
from yoso_jax.finetuning.choices import ChoicesConfig, read_choices
from yoso_jax.finetuning.conll import WordsConfig, collect_tags, read_conll
from yoso_jax.finetuning.examples import Answer
from yoso_jax.finetuning.glue import GLUE, glue_files, read_glue
from yoso_jax.finetuning.squad import QuestionsConfig, read_squad
from yoso_jax.finetuning.texts import TextsConfig, collect_labels, read_texts


@pytest.fixture(scope="module")
def folder(data_dir: Path) -> Path:
    return data_dir / "finetune"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


# GLUE


@pytest.mark.parametrize("name", GLUE)
def test_every_task_of_glue(folder: Path, name: str) -> None:
    task = GLUE[name]
    files = glue_files(name)
    splits = {
        split: read_glue(name, folder / "glue" / task.archive / file, split, "skip")
        for split, file in files.items()
    }
    for split, examples in splits.items():
        for example in examples.items:
            assert (example.pair is None) == (len(task.text) == 1)
            if split.startswith("test"):
                assert example.label is None
            elif task.labels is None:
                assert 0 <= example.label <= 5
            else:
                assert example.label in task.labels
        assert examples.skipped == (name == "qqp" and split == "train")
    assert [example.id for example in splits["test"].items] == ["0", "1", "2"][
        : len(splits["test"])
    ]
    if task.labels is not None:
        assert {example.label for example in splits["train"].items} == {*task.labels}


def test_columns_of_glue(folder: Path) -> None:
    def first(name: str, file: str, split: str = "train") -> tuple[Any, ...]:
        path = folder / "glue" / GLUE[name].archive / file
        return tuple(read_glue(name, path, split, "error").items[0])

    assert first("cola", "train.tsv") == ("line 1", "0", "The miller sold the flour.", None, "1")
    assert first("cola", "test.tsv", "test") == ("line 2", "0", "The mill is old.", None, None)
    # A quotation mark that is never closed belongs to the sentence.
    assert first("mrpc", "train.tsv")[2:] == (
        '"The bridge is open, the mayor said.',
        "The mayor said that the bridge is open.",
        "1",
    )
    assert first("stsb", "dev.tsv", "valid")[3:] == ("The mill is very old.", 4.0)
    # The label that counts is the last, not the first of five.
    matched = first("mnli", "dev_matched.tsv", "valid")
    assert matched[2:] == ("The mill burned down.", "The mill is gone.", "entailment")
    assert first("mnli", "dev_mismatched.tsv", "valid")[2] == "The ship burned down."
    assert first("qnli", "train.tsv")[2] == "Who owns the mill?"


def test_rows_that_cannot_be_used_are_named_or_counted(folder: Path, tmp_path: Path) -> None:
    path = folder / "glue" / "QQP" / "train.tsv"
    with pytest.raises(DataError, match=r"QQP/train\.tsv, line 3: expected 6 fields .*got 4.*skip"):
        read_glue("qqp", path, "train", "error")
    bad = write(tmp_path / "dev.tsv", "sentence\tlabel\na walk\t1\na ride\t2\n")
    with pytest.raises(DataError, match=r"line 3: column 'label' must be one of 0, 1, got '2'"):
        read_glue("sst2", bad, "valid", "error")
    bad = write(tmp_path / "stsb.tsv", "sentence1\tsentence2\tscore\na\tb\tnan\n")
    with pytest.raises(DataError, match=r"line 2: column 'score' must be a finite number"):
        read_glue("stsb", bad, "valid", "error")
    with pytest.raises(DataError, match=r"stsb\.tsv: no examples"):
        read_glue("stsb", bad, "valid", "skip")
    with pytest.raises(DataError, match=r"there is no column 'sentence'; there are 'sentence1'"):
        read_glue("sst2", bad, "valid", "error")
    with pytest.raises(DataError, match=r"cannot read .*none\.tsv: No such file"):
        read_glue("sst2", tmp_path / "none.tsv", "valid", "error")


# Texts


def test_columns_of_csv(folder: Path) -> None:
    config = TextsConfig("train.csv", "valid.csv", text="title", text_pair="body", label="topic")
    train = read_texts(config, folder / "texts/train.csv", "train")
    assert [tuple(example) for example in train.items[:3]] == [
        ("line 2", "0", "Bread", "Flour, water\nand salt.", "food"),
        ("line 4", "1", "Oars", 'She said "row".', "boats"),
        ("line 5", "2", "Soup", "Warm it slowly.", "food"),
    ]
    assert train.items[3].pair == ""
    assert collect_labels(train) == ("boats", "food")
    (example,) = read_texts(config, folder / "texts/test.csv", "test").items
    assert example.label is None


def test_numbers_in_json_lines(folder: Path) -> None:
    config = TextsConfig("a", "b", label="score", regression=True)
    examples = read_texts(config, folder / "texts/scores.jsonl", "train")
    assert [example.label for example in examples.items] == [4.5, 1.0, 3.25]
    assert examples.items[1].text == "A cold loaf \u2028 here"


def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in (10, "9", 2)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    examples = read_texts(TextsConfig("a", "b"), path, "train")
    assert collect_labels(examples) == ("2", "9", "10")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"a\.txt: the name must end in one of \.tsv, \.csv, \.jsonl"),
        ("a.csv", "", "the first line must name the columns"),
        ("a.csv", "text,text\n", "two columns have the same name: text, text"),
        ("a.csv", 'text,label\n"x,1\n', "line 2: not valid CSV"),
        ("a.csv", "text,label\nx\n", "line 2: expected 2 fields"),
        ("a.csv", "text,label\nx,\n", "line 2: column 'label', the label, is empty"),
        ("a.csv", "text,label\n", "no examples"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', "line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "column 'text' must be a text, got 3"),
        ("a.jsonl", '{"text": "x", "label": [1]}', "must be a name or a number"),
        ("a.tsv", "text\tlabel\n\xe9", "line 2: expected 2 fields"),
    ],
)
def test_bad_tables(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_texts(TextsConfig("a", "b"), write(tmp_path / name, text), "train")


def test_files_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff,1\n")
    with pytest.raises(DataError, match=r"a\.csv is not UTF-8"):
        read_texts(TextsConfig("a", "b"), tmp_path / "a.csv", "train")


def test_fields_may_be_long_and_hold_carriage_returns(tmp_path: Path) -> None:
    long = "word " * 40_000
    path = write(tmp_path / "a.csv", f'\ufefftext,label\r\n"{long}",1\r\n"b",0\r\n')
    assert [x.text for x in read_texts(TextsConfig("a", "b"), path, "train").items] == [long, "b"]
    path = write(tmp_path / "a.tsv", "text\tlabel\r\na\rb\t1\r\n")
    assert [x.text for x in read_texts(TextsConfig("a", "b"), path, "train").items] == ["a\rb"]


# Words


def test_conll_2003(folder: Path) -> None:
    train = read_conll(WordsConfig(), folder / "conll/eng.train", "train")
    assert len(train) == 8
    assert train.items[0].words == ("Ada", "Miller", "lives", "in", "Tarnwick", ".")
    assert train.items[0].tags == ("B-PER", "I-PER", "O", "O", "B-LOC", "O")
    assert train.items[4].place == "line 35"
    assert collect_tags(train) == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    chunks = read_conll(WordsConfig(tag_column=2), folder / "conll/eng.train", "train")
    assert chunks.items[0].tags == ("B-NP", "I-NP", "B-VP", "B-PP", "B-NP", "O")


def test_words_with_spaces_and_without_tags(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "B-X\t1 000\r\nO\tb\r\n\r\n\r\nO\tc")
    config = WordsConfig(word_column=1, tag_column=0, separator="tab")
    examples = read_conll(config, path, "train").items
    assert [tuple(x)[1:] for x in examples] == [(("1 000", "b"), ("B-X", "O")), (("c",), ("O",))]
    path = write(tmp_path / "b", "one\ntwo\n")
    (example,) = read_conll(WordsConfig(), path, "test").items
    assert example.tags is None


def test_bad_lines_of_conll(tmp_path: Path) -> None:
    path = write(tmp_path / "a", "one O\ntwo\n\nthree O\n")
    with pytest.raises(DataError, match="line 1: line 2 has no column -1, the tag"):
        read_conll(WordsConfig(), path, "train")
    with pytest.raises(DataError, match="only 1 of 2 words have a tag"):
        read_conll(WordsConfig(), path, "test")
    kept = read_conll(WordsConfig(bad_rows="skip"), path, "train")
    assert ([x.words for x in kept.items], kept.skipped) == ([("three",)], 1)
    with pytest.raises(DataError, match="line 1 has no column 3, the word"):
        read_conll(WordsConfig(word_column=3), path, "train")
    with pytest.raises(ValueError, match="tag_column must be another than word_column"):
        WordsConfig(tag_column=0)


# Questions


def test_squad(folder: Path) -> None:
    train = read_squad(QuestionsConfig(), folder / "squad/train-v1.1.json", "train")
    assert [x.id for x in train.items] == ["t1", "t2", "t3", "t4", "t5"]
    assert train.items[1].answers == (Answer("1612", 48), Answer("in 1612", 45))
    test = read_squad(QuestionsConfig(), folder / "squad/test.json", "test")
    assert [(x.id, x.answers) for x in test.items] == [("p2", None), ("p1", None)]
    path = folder / "squad/train-v2.0.json"
    with pytest.raises(DataError, match=r"paragraph 0, question 3: .* set data\.null_answers"):
        read_squad(QuestionsConfig(), path, "train")
    assert read_squad(QuestionsConfig(bad_rows="skip"), path, "train").skipped == 1
    assert read_squad(QuestionsConfig(null_answers=True), path, "train").items[3].answers == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not in the format of SQuAD"),
        ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "is not in the format of SQuAD"),
        ('{"data": []}', "no examples"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 3}]}]}]}', "id must be of str"),
    ],
)
def test_files_that_are_no_squad(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_squad(QuestionsConfig(), write(tmp_path / "a.json", text), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": [{"text": "mill", "answer_start": 3}]}, "'mill' is not at 3 in its context"),
        ({"answers": [{"text": "mill"}]}, "answer_start must be of int, got None"),
        ({"answers": None}, "answers must be of list"),
        ({"id": "t2"}, "the id 't2' was used before"),
    ],
    ids=["place", "start", "none", "id"],
)
def test_bad_questions(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = json.loads((folder / "squad/train-v1.1.json").read_text())
    values["data"][0]["paragraphs"][0]["qas"][2] |= change
    path = write(tmp_path / "a.json", json.dumps(values))
    with pytest.raises(DataError, match=f"article 0, paragraph 0, question 2: .*{message}"):
        read_squad(QuestionsConfig(), path, "train")


# Choices


def test_choices(folder: Path) -> None:
    config = ChoicesConfig("a", "b")
    train = read_choices(config, folder / "choices/train.jsonl", "train").items
    assert [x.label for x in train] == [0, 1, 2, 0]
    assert train[1].context == "Cora rowed across the river."
    assert train[1].choices[1] == "What did she sit in? a boat"
    test = read_choices(ChoicesConfig("a", "b", id="id"), folder / "choices/test.jsonl", "test")
    assert [(x.id, x.label) for x in test.items] == [("q7", None), ("q5", None)]
    config = ChoicesConfig("a", "b", context=None)
    question = read_choices(config, folder / "choices/train.jsonl", "train").items[1]
    assert question[2:4] == ("What did she sit in?", ("an oven", "a boat", "a loaf"))


def test_columns_of_swag(folder: Path) -> None:
    columns = tuple(f"ending{i}" for i in range(4))
    config = ChoicesConfig("a", "b", context="sent1", question="sent2", choices=columns)
    first, second = read_choices(config, folder / "choices/swag.csv", "train").items
    assert first.context == "Ada opens the door, slowly."
    assert first.choices[0] == 'She says "hello".'
    assert (first.label, second.label, len(second.choices)) == (0, 1, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["x"]}, "column 'choices' must hold at least two texts"),
        ({"choices": ["x", 3]}, "column 'choices' must hold at least two texts"),
        ({"choices": ["x", "y", "z"]}, "expected 2 choices as in the first row, got 3"),
        ({"label": 2}, r"column 'label' must be a number in 0\.\.1 or a letter of AB, got '2'"),
        ({"label": None}, "column 'label' .* got None"),
        ({"context": None}, "column 'context' must be a text, got None"),
    ],
    ids=["one", "number", "more", "label", "no label", "context"],
)
def test_bad_choices(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {"context": "c", "question": "q", "choices": ["x", "y"], "label": "B"}
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [row, row | change])))
    with pytest.raises(DataError, match=f"line 2: {message}"):
        read_choices(ChoicesConfig("a", "b"), path, "train")
    with pytest.raises(ValueError, match="question must be a column if context is none"):
        ChoicesConfig("a", "b", context=None, question=None)
