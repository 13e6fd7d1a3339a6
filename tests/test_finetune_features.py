"""Examples to model inputs: special tokens, alignment, windows, and what is cut off."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from finetune_helpers import save_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from yoso_jax.data.tokenizer import load_tokenizer
from yoso_jax.errors import ConfigError, DataError
from yoso_jax.finetuning.encoding import TextEncoder
from yoso_jax.finetuning.examples import (
    Answer,
    ChoiceExample,
    Examples,
    QuestionExample,
    TextExample,
    WordsExample,
)
from yoso_jax.finetuning.features import (
    choice_features,
    question_features,
    text_features,
    words_features,
)

S, PAD, END = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Tokenizer:
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), data_dir / "finetune")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def word_piece() -> Tokenizer:
    """A tokenizer of BERT, which drops control characters."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, "a", "boat", "mill", "is", "on", "the", "river", "##s"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def texts(*items: tuple[str, str | None, str | float | None]) -> Examples[TextExample]:
    rows = [TextExample(f"line {i}", str(i), *item) for i, item in enumerate(items)]
    return Examples(Path("train.tsv"), rows)


def test_texts_and_pairs(tokenizer: Tokenizer) -> None:
    encoder = TextEncoder(tokenizer, 64)
    examples = texts(("a mill", None, "no"), ("a mill", "the river", "yes"), ("", None, None))
    features = text_features(examples, ("no", "yes"), encoder)
    plain = [
        tokenizer.encode(text, add_special_tokens=False).ids for text in ("a mill", "the river")
    ]
    assert features[0]["input_ids"].tolist() == [S, *plain[0], END]
    assert features[1]["input_ids"].tolist() == [S, *plain[0], END, END, *plain[1], END]
    assert features[2]["input_ids"].tolist() == [S, END]
    assert [row["labels"] for row in features.rows] == [0, 1, -100]
    assert features[0]["input_ids"].dtype == features[0]["labels"].dtype == np.int32
    scores = text_features(texts(("a", None, 2.5), ("a", None, None)), None, encoder)
    assert [row["labels"] for row in scores.rows] == [2.5, 0]
    assert scores[0]["labels"].dtype == np.float32
    with pytest.raises(
        DataError, match=r"train\.tsv, line 1: the label 'yes' is none of no, maybe"
    ):
        text_features(examples, ("no", "maybe"), encoder)


def test_nothing_is_cut_off_unasked(tokenizer: Tokenizer) -> None:
    long = "a mill on the river . " * 9
    examples = texts(("a mill", "a river", "x"), ("a mill", long, "x"), (long, "a river", "x"))
    message = r"train\.tsv, line 1: \d+ tokens do not fit in sequence_length=24"
    with pytest.raises(DataError, match=message):
        text_features(examples, ("x", "y"), TextEncoder(tokenizer, 24))
    whole = text_features(examples, ("x", "y"), TextEncoder(tokenizer, 512))
    cut = text_features(examples, ("x", "y"), TextEncoder(tokenizer, 24, "longest_first"))
    assert (whole.truncated, cut.truncated) == (0, 2)
    assert [row["input_ids"].size for row in cut.rows[1:]] == [24, 24]
    assert cut[0]["input_ids"].tolist() == whole[0]["input_ids"].tolist()
    first = tokenizer.encode("a mill").ids
    assert cut[1]["input_ids"].tolist()[: len(first)] == first
    assert cut[2]["input_ids"][-1] == END
    second = TextEncoder(tokenizer, 24, "only_second")
    with pytest.raises(DataError, match=r"line 2: its first text of \d+ tokens leaves none"):
        text_features(examples, ("x", "y"), second)
    assert text_features(texts(*[x[2:] for x in examples.items[:2]]), "xy", second).truncated == 1
    with pytest.raises(ConfigError, match="only_second needs pairs"):
        text_features(texts(("a", None, "x")), ("x", "y"), second)


def test_texts_of_a_pair_may_have_types(word_piece: Tokenizer) -> None:
    encoder = TextEncoder(word_piece, 16, token_types=True)
    row = text_features(texts(("a boat", "the river", "x")), ("x", "y"), encoder)[0]
    assert row["input_ids"].tolist() == [2, 4, 5, 3, 9, 10, 3]
    assert row["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]


def words(*sentence: str, tags: str | None = None) -> Examples[WordsExample]:
    example = WordsExample("line 1", sentence, None if tags is None else tuple(tags))
    return Examples(Path("a"), [example])


def test_a_word_is_labelled_at_its_first_token(tokenizer: Tokenizer) -> None:
    sentence = ("Ada", "Feldauburg", "\N{SNOWMAN}", "-", "mill")
    examples = words(*sentence, tags="ABABA")
    features, (first,) = words_features(examples, ("A", "B"), TextEncoder(tokenizer, 64))
    # The same tokens as those of running text, in which a word begins with the blank before it.
    encoding = tokenizer.encode(" ".join(sentence))
    assert features[0]["input_ids"].tolist() == encoding.ids
    starts = [encoding.offsets[position][0] for position in first]
    assert starts == [0, 4, 15, 17, 19]
    labels = features[0]["labels"]
    assert labels[first].tolist() == [0, 1, 0, 1, 0]
    assert (np.delete(labels, first) == -100).all()
    assert labels.size > len(sentence) + 2
    assert (features.truncated, features.unseen) == (0, 0)
    unknown, _ = words_features(words(*sentence), ("A", "B"), TextEncoder(tokenizer, 64))
    assert (unknown[0]["labels"] == -100).all()


def test_offsets_may_include_the_blank_before_a_word(tokenizer: Tokenizer) -> None:
    untrimmed = Tokenizer.from_str(tokenizer.to_str())
    untrimmed.post_processor = processors.RobertaProcessing(
        ("</s>", END), ("<s>", S), trim_offsets=False, add_prefix_space=False
    )
    assert untrimmed.encode("a mill").offsets[2][0] == 1
    examples = words("Ada", "Feldauburg", "-", "mill", tags="ABBA")
    expected, positions = words_features(examples, "AB", TextEncoder(tokenizer, 64))
    found, other = words_features(examples, "AB", TextEncoder(untrimmed, 64))
    np.testing.assert_array_equal(found[0]["labels"], expected[0]["labels"])
    np.testing.assert_array_equal(other[0], positions[0])
    context = "Ada sold the mill in 1612."
    question = examples_of(context, "the mill")
    expected, _ = question_features(question, TextEncoder(tokenizer, 64), 0)
    found, _ = question_features(question, TextEncoder(untrimmed, 64), 0)
    assert found[0]["start_positions"] == expected[0]["start_positions"] > 0
    assert found[0]["end_positions"] == expected[0]["end_positions"]


def test_words_without_tokens_are_counted(word_piece: Tokenizer) -> None:
    examples = words("a", "\x00", "boats", "mill", tags="ABBA")
    features, (first,) = words_features(examples, "AB", TextEncoder(word_piece, 16))
    assert first.tolist() == [1, -1, 2, 4]
    assert features[0]["labels"].tolist() == [-100, 0, 1, -100, 0, -100]
    assert features.unseen == 1
    cut, (first,) = words_features(examples, "AB", TextEncoder(word_piece, 5, "longest_first"))
    assert first.tolist() == [1, -1, 2, -1]
    assert (cut.truncated, cut.unseen) == (1, 2)
    with pytest.raises(DataError, match="a, line 1: the label 'B' is none of A, C"):
        words_features(examples, "AC", TextEncoder(word_piece, 16))


def examples_of(context: str, *answers: str) -> Examples[QuestionExample]:
    found = tuple(Answer(text, context.index(text)) for text in answers)
    return Examples(Path("a"), [QuestionExample("question q", "q", "  who?", context, found)])


def test_windows_cover_the_context_and_share_tokens(tokenizer: Tokenizer) -> None:
    context = "Ada sold the mill of Tarnwick in 1612 to a baker. It rained."
    examples = examples_of(context, "a baker", "Ada")
    whole, (only,) = question_features(examples, TextEncoder(tokenizer, 64), 8)
    question = tokenizer.encode("who?", add_special_tokens=False).ids
    inside = tokenizer.encode(context, add_special_tokens=False).ids
    assert whole[0]["input_ids"].tolist() == [S, *question, END, END, *inside, END]
    assert only.first == len(question) + 3
    start, end = (int(whole[0][f"{name}_positions"]) - only.first for name in ("start", "end"))
    assert context[only.spans[start, 0] : only.spans[end, 1]] == "a baker"

    features, windows = question_features(examples, TextEncoder(tokenizer, 16), 3)
    assert len(features) == len(windows) > 2
    assert all(row["input_ids"].size <= 16 for row in features.rows)
    for before, after in itertools.pairwise(windows):
        np.testing.assert_array_equal(before.spans[-3:], after.spans[:3])
    spans = np.concatenate([windows[0].spans, *(window.spans[3:] for window in windows[1:])])
    np.testing.assert_array_equal(spans, only.spans)
    answered = 0
    for row, window in zip(features.rows, windows, strict=True):
        start, end = int(row["start_positions"]), int(row["end_positions"])
        if start:
            first, last = start - window.first, end - window.first
            assert context[window.spans[first, 0] : window.spans[last, 1]] == "a baker"
            answered += 1
        else:
            assert end == 0
    assert 1 <= answered < len(windows)


def test_questions_without_answer_and_too_long_ones(tokenizer: Tokenizer) -> None:
    encoder = TextEncoder(tokenizer, 16)
    (row,) = question_features(examples_of("the mill"), encoder, 3)[0].rows
    assert row["start_positions"] == row["end_positions"] == 0
    (window,) = question_features(examples_of(""), encoder, 3)[1]
    assert window.spans.shape == (0, 2)
    message = "question q: its first text of .* tokens leaves none .* and doc_stride=10"
    with pytest.raises(DataError, match=message):
        question_features(examples_of("the mill"), encoder, 10)


def test_choices(tokenizer: Tokenizer) -> None:
    rows = [
        ChoiceExample("line 1", "0", "Ada sang", ("a song", "a boat"), 1),
        ChoiceExample("line 2", "1", "Ada sang", ("a song " * 9, "a boat"), None),
    ]
    examples = Examples(Path("a"), rows)
    features = choice_features(examples, TextEncoder(tokenizer, 64))
    for choice, ids in zip(rows[0].choices, features[0]["input_ids"], strict=True):
        assert ids.tolist() == tokenizer.encode("Ada sang", choice).ids
    assert [row["labels"] for row in features.rows] == [1, -100]
    assert choice_features(examples, TextEncoder(tokenizer, 20, "only_second")).truncated == 1
    with pytest.raises(DataError, match=r"a, line 2: \d+ tokens do not fit"):
        choice_features(examples, TextEncoder(tokenizer, 20))
