"""ListOps: the generated distribution, the cache, published TSV files."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import pickle
import random
import re
import time

import numpy as np
import pytest

from yoso_jax.data import listops
from yoso_jax.data.listops import (
    evaluate,
    from_text,
    load_listops_tsv,
    prepare_listops,
    to_text,
)
from yoso_jax.data.listops_generator import VOCAB, ListOpsConfig, generate_examples
from yoso_jax.errors import DataError

SMALL = ListOpsConfig(num_train=300, num_valid=50, num_test=50, min_length=8, max_length=64)


# An independent statement of the published distribution: one recursive draw per node.
def grow(rng, depth, config):
    if depth == config.max_depth or rng.random() >= config.operator_probability:
        return str(rng.randrange(10))
    num_args = rng.randint(config.min_args, config.max_args)
    return [
        rng.choice(["[MIN", "[MAX", "[MED", "[SM"]),
        *(grow(rng, depth + 1, config) for _ in range(num_args)),
    ]


def length_of(tree):
    return 1 if isinstance(tree, str) else 2 + sum(length_of(child) for child in tree[1:])


def depth_of(tree):
    return 1 if isinstance(tree, str) else 1 + max(depth_of(child) for child in tree[1:])


def value_of(tree):
    if isinstance(tree, str):
        return int(tree)
    args = [value_of(child) for child in tree[1:]]
    return {
        "[MIN": lambda: min(args),
        "[MAX": lambda: max(args),
        "[MED": lambda: int(np.median(args)),
        "[SM": lambda: sum(args) % 10,
    }[tree[0]]()


def parse(words):
    word = words.pop(0)
    if word.isdigit():
        return word
    tree = [word]
    while words[0] != "]":
        tree.append(parse(words))
    words.pop(0)
    return tree


def published_text(tree):
    """The nested pairs in which the published files are written."""
    if isinstance(tree, str):
        return tree
    text = tree[0]
    for child in tree[1:]:
        text = f"( {text} {published_text(child)} )"
    return f"( {text} ] )"


def texts_of(examples):
    return [
        to_text(examples.tokens[start:end])
        for start, end in zip(examples.offsets[:-1], examples.offsets[1:], strict=True)
    ]


def chi_square_excess(first, second):
    """Standard deviations by which two histograms' chi-square exceeds that of equal sources."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    used = first + second > 10
    first, second, degrees = first[used], second[used], max(used.sum() - 1, 1)
    scale = np.sqrt(second.sum() / first.sum())
    chi_square = ((first * scale - second / scale) ** 2 / (first + second)).sum()
    return (chi_square - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("config", "num_examples"),
    [
        (ListOpsConfig(), 300),
        (ListOpsConfig(min_length=5, max_length=64, max_depth=4), 3_000),
        (ListOpsConfig(min_length=20, max_length=200, max_args=5, operator_probability=0.4), 800),
    ],
    ids=["lra", "short", "other"],
)
def test_distribution_is_the_published_one(config, num_examples):
    config = ListOpsConfig(
        **{**vars(config), "num_train": num_examples - 2, "num_valid": 1, "num_test": 1}
    )
    rng = random.Random(1)
    reference = {}
    while len(reference) < num_examples:
        tree = grow(rng, 1, config)
        if config.min_length < length_of(tree) < config.max_length:
            reference[str(tree)] = tree
    reference = list(reference.values())

    examples = generate_examples(config)
    trees = [parse(text.split()) for text in texts_of(examples)]

    # Only statistics of whole trees: the nodes of one tree depend on each other.
    statistics = {
        "value": (value_of, np.arange(11)),
        "length": (length_of, np.linspace(config.min_length, config.max_length, 12)),
        "depth": (depth_of, np.arange(1, config.max_depth + 2)),
        "root operator": (lambda tree: VOCAB.index(tree[0]), np.arange(11, 16)),
        "root arguments": (lambda tree: len(tree) - 1, np.arange(1, config.max_args + 2)),
    }
    for name, (statistic, bins) in statistics.items():
        ours = np.histogram([statistic(tree) for tree in trees], bins)[0]
        theirs = np.histogram([statistic(tree) for tree in reference], bins)[0]
        assert chi_square_excess(ours, theirs) < 5, (name, ours, theirs)

    counts = np.bincount(examples.tokens, minlength=16)
    np.testing.assert_allclose(counts[1:11] / counts[1:11].sum(), 0.1, atol=0.01)
    np.testing.assert_allclose(counts[11:15] / counts[11:15].sum(), 0.25, atol=0.015)
    assert max(depth_of(tree) for tree in trees) == config.max_depth


def exact_length_distribution(config):
    """P(length) of an unconditioned tree, from the recursion over depths."""
    size = config.max_length
    subtree = np.eye(1, size, 1)[0]
    for _ in range(config.max_depth - 1):
        total, sums = np.zeros(size), np.eye(1, size, 0)[0]
        for num_args in range(1, config.max_args + 1):
            sums = np.convolve(sums, subtree)[:size]
            total += sums * (num_args >= config.min_args)
        total *= config.operator_probability / (config.max_args - config.min_args + 1)
        subtree = np.concatenate([[0, 1 - config.operator_probability], total[:-2]])
    return subtree


def test_lengths_follow_the_exact_distribution():
    # Above 20 tokens repetitions are too rare for deduplication to show.
    config = ListOpsConfig(30_000, 1, 1, min_length=20, max_length=320)
    lengths = np.diff(generate_examples(config).offsets)
    expected = exact_length_distribution(config)
    expected[: config.min_length + 1] = 0
    edges = np.arange(config.min_length + 1, config.max_length, 10)
    expected = np.add.reduceat(expected, edges) / expected.sum() * len(lengths)
    found = np.histogram(lengths, [*edges, config.max_length])[0]
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < len(edges) + 4 * np.sqrt(2 * len(edges))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        ListOpsConfig(num_train=200, num_valid=20, num_test=20),
        ListOpsConfig(300, 1, 1, min_length=0, max_length=40, min_args=1, max_args=33),
        ListOpsConfig(
            300, 1, 1, min_length=0, max_length=200, operator_probability=1.0, max_depth=3
        ),
    ],
)
def test_examples_are_well_formed_distinct_and_correctly_labelled(config):
    examples = generate_examples(config)
    lengths = np.diff(examples.offsets)
    assert (lengths > config.min_length).all()
    assert (lengths < config.max_length).all()
    assert len(examples.labels) == config.num_examples == len(set(texts_of(examples)))
    for text, label in zip(texts_of(examples), examples.labels, strict=True):
        assert evaluate(text) == label
        tree = parse(text.split())
        assert value_of(tree) == label
        assert depth_of(tree) <= config.max_depth


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5),
        ("[MED 1 2 ]", 1),
        ("[MED 3 8 0 9 ]", 5),
        ("[MED 9 9 8 0 ]", 8),
        ("[SM 9 9 ]", 8),
        ("( ( ( [SM 9 ) ( ( [MIN 4 ) ] ) ) ] )", 3),
    ],
)
def test_evaluate(text, value):
    assert evaluate(text) == value
    assert evaluate(from_text(text)) == value
    assert evaluate([0, *from_text(text).tolist(), 0, 0]) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one expression, got 0"),
        ("3 4", "one expression, got 2"),
        ("[MAX 1 2", "1 operators lack"),
        ("[MAX ]", "at least one argument"),
        ("3 ]", "without an operator"),
        ("[SUM 1 2 ]", re.escape("'[SUM'")),
    ],
)
def test_evaluate_refuses_malformed_expressions(text, message):
    with pytest.raises(ValueError, match=message):
        evaluate(text)


def test_text_round_trip():
    assert len(VOCAB) == 16
    assert VOCAB[0] == "<pad>"
    text = "[SM 0 1 [MIN 2 3 ] [MAX 4 5 6 ] [MED 7 8 9 ] ]"
    tokens = from_text(text)
    assert tokens.dtype == np.uint8
    assert set(tokens) == set(range(1, 16))
    assert to_text([*tokens.tolist(), 0, 0]) == text


def test_generation_is_deterministic():
    first, again = generate_examples(SMALL), generate_examples(SMALL)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    other = generate_examples(ListOpsConfig(**{**vars(SMALL), "seed": 1}))
    assert len(set(texts_of(first)) & set(texts_of(other))) < len(first.labels) / 2
    # Pinned: a data set must not change with numpy's release or the machine. If this fails because
    # the generator was changed on purpose, bump GENERATOR_VERSION too.
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in first))
    assert digest.hexdigest()[:16] == "49d51cb0e4857392"


def test_generation_is_fast_enough_for_100k_examples_in_3_minutes():
    start = time.perf_counter()
    generate_examples(ListOpsConfig(num_train=2_998, num_valid=1, num_test=1))
    assert time.perf_counter() - start < 180 * 3_000 / 100_000


def test_progress_ends_at_the_total():
    seen = []
    generate_examples(SMALL, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == SMALL.num_examples


@pytest.mark.parametrize(
    "config",
    [
        # 410 expressions exist.
        ListOpsConfig(400, 10, 1, min_length=0, max_length=5),
        # Every tree has 122 tokens.
        ListOpsConfig(
            10,
            1,
            1,
            min_length=5,
            max_length=12,
            max_depth=3,
            min_args=10,
            operator_probability=1.0,
        ),
        # Possible, but one in millions of trees.
        ListOpsConfig(100, 1, 1, min_length=500, max_length=600, operator_probability=0.05),
    ],
    ids=["exhausted", "unreachable", "too rare"],
)
def test_a_request_that_cannot_be_met_ends(config):
    with pytest.raises(DataError, match=r"distinct examples, but \d+ random trees gave only"):
        generate_examples(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_train", 0, "num_train must be >= 1"),
        ("num_test", -1, "num_test must be >= 1"),
        ("min_length", -1, "min_length must be >= 0"),
        ("min_length", 1_999, "max_length must be >= 2001, got 2000"),
        ("max_depth", 0, "max_depth must be >= 1"),
        ("max_depth", 3, "min_length must be below 122, the longest expression"),
        ("min_args", 0, "min_args must be >= 1"),
        ("max_args", 1, "max_args must be >= 2"),
        ("operator_probability", 0.0, r"operator_probability must be in \(0, 1\]"),
        ("operator_probability", 1.5, r"operator_probability must be in \(0, 1\]"),
        ("seed", -1, "seed must be >= 0"),
        ("seed", True, "seed must be an integer"),
    ],
)
def test_config_names_the_bad_field(field, value, message):
    with pytest.raises(ValueError, match=message):
        ListOpsConfig(**{field: value})


def test_cache_is_written_once_and_describes_itself(tmp_path, monkeypatch, capfd):
    data = prepare_listops(SMALL, tmp_path / "new" / "cache")
    assert capfd.readouterr() == ("", "")  # no progress bar: stderr is not a terminal
    assert [len(s) for s in (data.train, data.valid, data.test)] == [300, 50, 50]
    example = data.train[7]
    assert example["input_ids"].dtype == np.int32
    assert type(example["input_ids"]) is np.ndarray
    assert type(example["labels"]) is int
    assert evaluate(example["input_ids"]) == example["labels"]
    assert data.train.num_examples == 300
    assert data.train.lengths[7] == len(example["input_ids"])
    for index in (-1, 300):
        with pytest.raises(IndexError, match=r"0\.\.299"):
            data.train[index]
    splits = [
        {to_text(s[i]["input_ids"]) for i in range(len(s))}
        for s in vars(data).values()
        if s != data.folder
    ]
    assert len(set.union(*splits)) == 400

    manifest = json.loads((data.folder / "manifest.json").read_text())
    assert manifest["config"] == vars(SMALL)
    assert manifest["splits"]["train"]["label_histogram"] == np.bincount(data.train.labels).tolist()
    assert manifest["splits"]["test"]["num_examples"] == 50
    assert manifest["splits"]["valid"]["length"]["max"] == data.valid.lengths.max()

    monkeypatch.setattr(listops, "generate_examples", None)
    again = prepare_listops(SMALL, tmp_path / "new" / "cache")
    np.testing.assert_array_equal(again.train.tokens, data.train.tokens)
    assert isinstance(again.train.tokens, np.memmap)
    monkeypatch.undo()
    other = prepare_listops(ListOpsConfig(**{**vars(SMALL), "seed": 1}), tmp_path / "new" / "cache")
    assert other.folder != data.folder


def test_a_mapped_split_pickles_as_its_place(tmp_path):
    split = prepare_listops(SMALL, tmp_path).train
    pickled = pickle.dumps(split)
    assert len(pickled) < 1_000 < split.tokens.nbytes
    np.testing.assert_array_equal(pickle.loads(pickled)[3]["input_ids"], split[3]["input_ids"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch, error):
    def interrupt(self, data):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", interrupt)
        with pytest.raises((KeyboardInterrupt, OSError)):
            prepare_listops(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(prepare_listops(SMALL, tmp_path).train) == 300


def flip_a_byte(folder):
    data = bytearray((folder / "valid_tokens.npy").read_bytes())
    data[-1] ^= 1
    (folder / "valid_tokens.npy").write_bytes(data)


def cut_short(folder):
    (folder / "train_labels.npy").write_bytes(b"\x93NUMPY")


def remove(folder):
    (folder / "test_offsets.npy").unlink()


def break_manifest(folder):
    (folder / "manifest.json").write_text("{")


def empty_manifest(folder):
    (folder / "manifest.json").write_text("{}")


def age(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["generator_version"] = 0
    manifest["config"]["max_depth"] = 9
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"valid_tokens\.npy: damaged, its SHA-256 differs"),
        (cut_short, r"train_labels\.npy: damaged, 6 bytes instead of 428"),
        (remove, r"test_offsets\.npy: missing"),
        (break_manifest, r"manifest\.json: not a readable ListOps manifest"),
        (empty_manifest, r"manifest\.json: not a readable ListOps manifest"),
        (age, r"manifest\.json: made with another generator_version, max_depth"),
    ],
)
def test_a_damaged_cache_is_refused_by_name(tmp_path, damage, message):
    folder = prepare_listops(SMALL, tmp_path).folder
    damage(folder)
    with pytest.raises(DataError, match=message) as error:
        prepare_listops(SMALL, tmp_path)
    assert f"delete the folder {folder}" in str(error.value)


def test_two_preparations_at_once(tmp_path, monkeypatch):
    generate = listops.generate_examples

    def lose_the_race(config, progress):
        monkeypatch.setattr(listops, "generate_examples", generate)
        prepare_listops(config, tmp_path)
        return generate(config, progress)

    monkeypatch.setattr(listops, "generate_examples", lose_the_race)
    assert len(prepare_listops(SMALL, tmp_path).train) == 300
    assert len(list(tmp_path.iterdir())) == 1


def test_two_processes_prepare_at_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        first, second = pool.map(prepare_listops, [SMALL, SMALL], [tmp_path, tmp_path])
    assert first.folder == second.folder
    assert list(tmp_path.iterdir()) == [first.folder]


def test_a_cache_that_cannot_be_written_fails_before_generating(tmp_path, monkeypatch):
    monkeypatch.setattr(listops, "generate_examples", None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        prepare_listops(SMALL, tmp_path / "file")


def write_tsv(path, *rows, header="Source\tTarget"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_tsv_in_the_published_format(tmp_path):
    examples = generate_examples(SMALL)
    texts = texts_of(examples)
    rows = [
        f"{published_text(parse(text.split()))}\t{label}"
        for text, label in zip(texts, examples.labels, strict=True)
    ]
    split = load_listops_tsv(write_tsv(tmp_path / "basic_train.tsv", *rows))
    for ours, read in zip(examples, (split.tokens, split.offsets, split.labels), strict=True):
        np.testing.assert_array_equal(ours, read)
    assert split[0]["input_ids"].dtype == np.int32


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("( ( ( [MAX 2 ) 9 ) ] ) 9", "separated by a tab"),
        ("( ( ( [MAX 2 ) 9 ) ] )\t10", "Target must be a digit 0..9, got '10'"),
        ("( ( ( [MAX 2 ) 9 ) ] )\t", "Target must be a digit"),
        ("\t3", "Source is empty"),
        ("( ( [MAX 2 ) 12 ) ]\t9", "unknown ListOps token '12'"),
        ("( ( [MAX 2 ) 9 )\t9", "no closing brackets .* cannot be solved"),
        ("( ( [MAX 2 ) [MIN 9 ) ]\t9", "brackets do not match"),
        ("[MAX 2 ] [MIN 9 ]\t9", "brackets do not match"),
        ("[MAX 2 [MIN ] ]\t9", "brackets do not match"),
        ("2 ] [MIN\t9", "brackets do not match"),
    ],
)
def test_tsv_errors_name_file_and_line(tmp_path, row, message):
    path = write_tsv(tmp_path / "basic_val.tsv", "( ( [SM 1 ) ] )\t1", row)
    with pytest.raises(DataError, match=r"basic_val\.tsv, line 3: .*" + message):
        load_listops_tsv(path)


def test_tsv_without_header_or_examples(tmp_path):
    with pytest.raises(DataError, match="line 1: expected the columns Source and Target"):
        load_listops_tsv(write_tsv(tmp_path / "a.tsv", header="( ( [SM 1 ) ] )\t1"))
    with pytest.raises(DataError, match="no examples after the header"):
        load_listops_tsv(write_tsv(tmp_path / "a.tsv"))
    (tmp_path / "a.tsv").write_bytes(b"Source\tTarget\n\xff\xfe\t1\n")
    with pytest.raises(DataError, match="line 2: unknown ListOps token"):
        load_listops_tsv(tmp_path / "a.tsv")
