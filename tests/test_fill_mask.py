"""scripts/fill_mask.py and the tokenizers it reads, which are trained here on a few sentences."""

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from yoso_jax import YosoConfig, YosoForMaskedLM, cli
from yoso_jax.data.tokenizer import find_mask_token, load_tokenizer
from yoso_jax.errors import DataError

SCRIPT = Path(__file__).parents[1] / "scripts" / "fill_mask.py"
SENTENCES = ["The cat sat on the mat.", "The dog sat on the rug.", "The cat was playing."] * 3

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def save_model(folder: Path, vocabulary: int, word: int) -> None:
    """A model that leans towards one word."""
    config = YosoConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=0.2,
        num_hash=3,
        hash_code_len=3,
    )
    model = YosoForMaskedLM(config, rngs=nnx.Rngs(0))
    model.head.bias[...] = model.head.bias[...].at[word].set(6.0)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that leans towards " dog", vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.model.save(str(folder))
    save_model(folder, tokenizer.get_vocab_size() + 3, tokenizer.get_vocab()["Ġdog"])
    return folder


@pytest.fixture(scope="module")
def word_piece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that leans towards "##ing", and vocab.txt in lower case."""
    folder = tmp_path_factory.mktemp("word_piece")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] . ( ) [ ] the cat sat on mat play ##ing e ##m"
    (folder / "vocab.txt").write_text("\n".join(words.split()) + "\n")
    save_model(folder, len(words.split()), words.split().index("##ing"))
    return folder


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fill_mask", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs the script in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fill_mask.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        code = 0
        try:
            cli.run(script.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def read_tables(output: str) -> list[list[list[str]]]:
    """The cells of the rows of each table."""
    tables = re.split(r"mask \d of \d", output)[1:]
    return [
        [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines()]
        for table in ("\n".join(re.findall("^│.*$", table, re.MULTILINE)) for table in tables)
    ]


@pytest.mark.parametrize("mode", ["expectation", "sampled"])
def test_shows_the_models_probabilities(mode: str, byte_level: Path, run: Run) -> None:
    text = "The cat  <mask> on the mat<mask>"
    options = ("--num-hashes", 5, "--seed", 3) if mode == "sampled" else ()
    code, output, errors = run(byte_level, text, "--mode", mode, "--top", 3, *options)
    assert (code, errors) == (0, "")

    # A mask takes the spaces before it.
    tokens = ["<s>", "The", "Ġcat", "<mask>", "Ġon", "Ġthe", "Ġmat", "<mask>", "</s>"]
    vocabulary = load_tokenizer(byte_level).get_vocab()
    ids = jnp.array([[vocabulary[token] for token in tokens]])
    model = YosoForMaskedLM.from_pretrained(
        byte_level, use_expectation=mode == "expectation", num_hash=5
    )
    logits = jax.jit(lambda ids, key: model(ids, rngs=nnx.Rngs(hash=key)).logits)(
        ids, jax.random.key(3)
    )
    probabilities = np.asarray(jax.nn.softmax(logits[0]))
    names = {index: token for token, index in vocabulary.items()}
    tables = read_tables(output)
    assert len(tables) == 2
    for table, position in zip(tables, (3, 7), strict=True):
        best = np.argsort(-probabilities[position])[:3]
        expected = [(f"{probabilities[position, i]:.4f}", names.get(i)) for i in best]
        assert [(row[0], row[1]) for row in table] == expected
    assert tables[0][0][1:] == ["Ġdog", "The cat dog on the mat<mask>"]
    assert tables[1][0][1:] == ["Ġdog", "The cat  <mask> on the mat dog"]
    assert ("sampled with 5 hashes, seed 3" if mode == "sampled" else "in expectation") in output


def test_word_piece(word_piece: Path, run: Run) -> None:
    code, output, errors = run(word_piece, "Play [MASK] [on] THE <mask>.", "--dtype", "bfloat16")
    assert (code, errors) == (0, "")
    first, second = (table[0] for table in read_tables(output))
    assert first[1:] == ["##ing", "Playing [on] THE [MASK]."]
    assert second[1:] == ["##ing", "Play [MASK] [on] THEing."]


def test_fill(script: ModuleType) -> None:
    assert script.fill("<mask> is", (0, 6), " Here") == "Here is"
    assert script.fill("un<mask>!", (2, 8), "fair") == "unfair!"
    assert script.fill("a <mask>\nc", (2, 8), "\n") == "a  c"
    long = "a" * 90
    expected = f"…{'a' * 60} b{'a' * 60}…"
    assert script.fill(f"{long} <mask>{long}", (91, 97), " b") == expected


def test_word_piece_lowers_case_unless_the_vocabulary_has_capitals(
    word_piece: Path, tmp_path: Path
) -> None:
    tokens = ["[CLS]", "the", "e", "##m", "[MASK]", "[UNK]", "[SEP]"]
    assert load_tokenizer(word_piece).encode("The ÉM [MASK] x").tokens == tokens
    cased = tmp_path / "cased.txt"
    cased.write_text((word_piece / "vocab.txt").read_text() + "The\n")
    assert load_tokenizer(cased).encode("The THE").tokens == ["[CLS]", "The", "[UNK]", "[SEP]"]


def test_tokenizer_json_is_preferred_and_not_truncated(byte_level: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    ids = tokenizer.encode(SENTENCES[0]).ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("not read")
    assert load_tokenizer(tmp_path).encode(SENTENCES[0]).ids == ids
    assert load_tokenizer(byte_level / "merges.txt").encode(SENTENCES[0]).ids == ids


def test_damaged_tokenizers(word_piece: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer in .*tokenizer\.json, or vocab\.json and"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*tokenizer\.json: "):
        load_tokenizer(tmp_path)
    (tmp_path / "words.txt").write_text("[UNK]\n[CLS]\nthe\n")
    with pytest.raises(DataError, match=r"its vocabulary lacks \[SEP\], \[MASK\]"):
        load_tokenizer(tmp_path / "words.txt")
    with pytest.raises(DataError, match="neither <mask> nor"):
        find_mask_token(Tokenizer(models.WordPiece({"the": 0}, unk_token="the")))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["The cat"], 2, "the text has no mask: write <mask>"),
        (["the " * 20 + "<mask>"], 2, "the text has 23 tokens, and the model reads at most 16"),
        (["<mask>", "--top", "0"], 2, "--top must be >= 1, got 0"),
        (["<mask>", "--seed", "-1"], 2, "--seed must be in [0, 2**31), got -1"),
        (["<mask>", "--num-hashes", "0"], 2, "--num-hashes must be >= 1, got 0"),
        (["<mask>", "--num-hashes", "4"], 2, "in expectation: add --mode sampled"),
        (["<mask>", "--tokenizer", "nowhere"], 3, "cannot read the tokenizer nowhere"),
    ],
)
def test_refuses(arguments: list[str], code: int, message: str, word_piece: Path, run: Run) -> None:
    status, output, errors = run(word_piece, *arguments)
    assert (status, output) == (code, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_refuses_what_does_not_belong_together(
    byte_level: Path, word_piece: Path, tmp_path: Path, run: Run
) -> None:
    code, _, errors = run(word_piece, "<mask>", "--tokenizer", byte_level)
    assert (code, "tokens, the model only 19" in errors) == (2, True)
    code, _, errors = run(tmp_path / "nowhere", "<mask>")
    assert (code, f"there is no checkpoint {tmp_path / 'nowhere'}" in errors) == (4, True)
    shutil.copy(word_piece / "vocab.txt", tmp_path)
    code, _, errors = run(tmp_path, "<mask>")
    assert (code, "config.json" in errors) == (4, True)


def test_says_how_to_install_tokenizers(
    word_piece: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "yoso_jax.data.tokenizer")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, errors = run(word_piece, "<mask>")
    assert (code, "pip install 'yoso-jax[text]'" in errors) == (2, True)
