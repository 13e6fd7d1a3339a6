"""Checkpoints of every kind become the same model, and nothing of them is lost in silence."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from yoso_jax import (
    LRAClassifier,
    LRAConfig,
    YosoConfig,
    YosoForMaskedLM,
    YosoForQuestionAnswering,
    YosoForSequenceClassification,
    YosoModel,
    cli,
    load_pretrained,
)
from yoso_jax.auto import ARCHITECTURES
from yoso_jax.conversion import convert as convert_module
from yoso_jax.conversion import read_tensors, to_state_dict
from yoso_jax.conversion.load import make_plan

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
AUTHORS = DATA / "authors"
OLD_LAYOUT = DATA / "orig" / "roberta_yoso_v1_e" / "cp-old-layout.model"
MASKED_LM = DATA / "hf" / "mlm_h64_gelu_conv33_grads"
BASE = DATA / "hf" / "base_h32_d8_gelu"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """These models run once, so that optimising them costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_script", ROOT / "scripts/convert.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs scripts/convert.py: exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        code = 0
        try:
            cli.run(script.main)
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return call


def assert_close(actual: Any, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    error = float(np.max(np.abs(actual - expected)))
    assert error <= 1e-5 * max(1.0, float(np.max(np.abs(expected))))


def case_of(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and outputs of a folder's case."""
    tensors = load_file((path if path.is_dir() else path.parent) / "case.safetensors")
    inputs = {key[3:]: x for key, x in tensors.items() if key.startswith("in/")}
    return inputs, {key[4:]: x for key, x in tensors.items() if key.startswith("out/")}


@jax.jit
def evaluate(model: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(model, LRAClassifier):
        return model(*args, **kwargs)
    return model(*args, **kwargs, output_hidden_states=True)


def assert_same_parameters(actual: Any, expected: Any) -> None:
    a, b = to_state_dict(actual, actual.layout), to_state_dict(expected, expected.layout)
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize(
    ("folder", "architecture", "said"),
    [
        ("roberta_shared", YosoForMaskedLM, None),
        ("roberta_cp", YosoForMaskedLM, None),
        ("roberta_classifier", YosoForMaskedLM, "no counterpart.*sen_classifer.dense.weight"),
        ("roberta_qa", YosoForQuestionAnswering, "not in this model: .*mlm.mlm_class.bias"),
    ],
)
def test_the_authors_roberta(folder: str, architecture: type, said: str | None) -> None:
    expects = contextlib.nullcontext() if said is None else pytest.warns(UserWarning, match=said)
    with expects:
        model = load_pretrained(AUTHORS / folder)
    assert type(model) is architecture
    inputs, expected = case_of(AUTHORS / folder)
    # Their masked LM and sequence classifier never mask.
    mask = inputs.get("attention_mask") if folder == "roberta_qa" else None
    outputs = evaluate(model, inputs["input_ids"], mask)
    assert_close(outputs.hidden_states[-1], expected["last_hidden_state"])
    if architecture is YosoForMaskedLM:
        assert_close(outputs.logits, expected["mlm_logits"])
    else:
        assert_close(outputs.start_logits, expected["start_logits"])
        assert_close(outputs.end_logits, expected["end_logits"])
    assert model.config.layer_norm_eps == 1e-5


@pytest.mark.parametrize("folder", ["bert_plain", "bert_factorised"])
def test_the_authors_bert(folder: str) -> None:
    """Positions from 0, heads without counterpart; narrow embeddings are multiplied out."""
    with pytest.warns(UserWarning, match="no counterpart in this architecture") as warned:
        model = YosoForMaskedLM.from_pretrained(AUTHORS / folder)
    message = str(warned[0].message)
    assert all(name in message for name in ("model.pooler.weight", "sen_class.bias", "two unused"))
    assert ("embeddings.dense is multiplied" in message) == (folder == "bert_factorised")
    assert model.config.pad_token_id == 0
    inputs, expected = case_of(AUTHORS / folder)
    outputs = evaluate(
        model,
        inputs["masked_sentence"],
        inputs["sentence_mask"] != 0,
        token_type_ids=inputs["segment_ids"],
        position_ids=inputs["pos_ids"] + 2,
    )
    assert_close(outputs.hidden_states[-1], expected["last_hidden_state"])
    assert_close(outputs.logits, expected["mlm_logits"])


def test_a_factorised_head_that_fits_no_width_is_left_out(tmp_path: Path) -> None:
    tensors = {key: x.read() for key, x in read_tensors(AUTHORS / "bert_factorised").items()}
    narrow = {
        "model.embeddings.word_embeddings.weight": 1,
        "model.embeddings.position_embeddings.weight": 1,
        "model.embeddings.token_type_embeddings.weight": 1,
        "model.embeddings.dense.weight": 1,
        "mlm.dense.weight": 0,
        "mlm.dense.bias": 0,
        "mlm.norm.weight": 0,
        "mlm.norm.bias": 0,
        "mlm.mlm_class.weight": 1,
    }
    for key, axis in narrow.items():
        width = tensors[key].shape[axis] - 1
        tensors[key] = np.ascontiguousarray(tensors[key].take(range(width), axis))
    shutil.copyfile(AUTHORS / "bert_factorised" / "config.json", tmp_path / "config.json")
    save_file(tensors, tmp_path / "narrow.safetensors")
    plan = make_plan(ARCHITECTURES, tmp_path / "narrow.safetensors")
    assert plan.model_class is YosoModel
    assert any("a head of width 15 in a model of width" in note for note in plan.notes)
    plan.check()


def test_the_authors_older_layout() -> None:
    inputs, expected = case_of(OLD_LAYOUT)
    model = YosoForMaskedLM.from_pretrained(OLD_LAYOUT)
    outputs = evaluate(model, inputs["input_ids"])
    assert_close(outputs.hidden_states[-1], expected["token_out"])
    assert_close(outputs.logits, expected["mlm_scores"])
    masked = evaluate(model, inputs["input_ids"], inputs["sentence_mask"] != 0)
    valid = inputs["sentence_mask"] != 0
    assert_close(masked.logits[valid], expected["mlm_scores_masked"][valid])
    given = OLD_LAYOUT.parent / "hf_config.json"
    assert_same_parameters(YosoForMaskedLM.from_pretrained(OLD_LAYOUT, config=given), model)
    config = YosoConfig.from_json_file(given)
    assert_same_parameters(YosoForMaskedLM.from_pretrained(OLD_LAYOUT, config=config), model)


@pytest.mark.parametrize("folder", ["lra_cls", "lra_dual"])
def test_the_authors_lra_classifiers(folder: str, tmp_path: Path) -> None:
    inputs, expected = case_of(AUTHORS / folder)
    model = load_pretrained(AUTHORS / folder)
    assert isinstance(model, LRAClassifier)
    assert model.config.dual == (folder == "lra_dual")
    ids, mask = inputs["input_ids_0"], inputs["mask_0"]
    if model.config.dual:
        ids = np.stack([ids, inputs["input_ids_1"]], axis=1)
        mask = np.stack([mask, inputs["mask_1"]], axis=1)
    assert_close(evaluate(model, ids, mask != 0).logits, expected["logits"])
    model.save_pretrained(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved", scan_layers=True)
    assert again.config == model.config.replace(scan_layers=True)
    assert_same_parameters(again, model)


def test_the_authors_lra_file_of_the_published_kind() -> None:
    source = DATA / "orig" / "lra_sc_mean"
    inputs, expected = case_of(source)
    model = LRAClassifier.from_pretrained(source / "model_state_dict.safetensors")
    logits = evaluate(model, inputs["input_ids_0"], inputs["mask_0"] != 0).logits
    assert_close(logits, expected["seq_scores"])


@pytest.mark.parametrize("names", [[], ["architectures"]])
def test_the_class_is_inferred(names: list[str], tmp_path: Path) -> None:
    """From `architectures`, and without them from the keys."""
    for name in ("base_h32_d8_gelu", "mc_h32", "seqcls_single_h32", "tokcls_h32_grads"):
        shutil.copytree(DATA / "hf" / name, tmp_path / name)
        values = json.loads((tmp_path / name / "config.json").read_text())
        expected = values["architectures"][0]
        if not names:
            del values["architectures"]
        (tmp_path / name / "config.json").write_text(json.dumps(values))
        assert make_plan(ARCHITECTURES, tmp_path / name).model_class.__name__ == expected


def test_class_and_file_must_agree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a Long Range Arena classifier; YosoModel cannot"):
        YosoModel.from_pretrained(AUTHORS / "lra_cls")
    with pytest.raises(ValueError, match="holds no Long Range Arena classifier"):
        LRAClassifier.from_pretrained(BASE)
    with pytest.raises(ValueError, match="config must be of YosoConfig, got one of LRAConfig"):
        YosoModel.from_pretrained(BASE, config=LRAConfig())
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder)
    values = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"architectures": ["BertForMaskedLM"]}, "must be one of YosoModel.*'BertForMaskedLM'"),
        ({"model_type": "bert"}, "model_type must be 'yoso', got 'bert'"),
        ({"num_hidden_layers": 10**9}, "too few for num_hidden_layers=1000000000"),
        ({"model": {"dim": 8}}, "the authors' configuration lacks hash_code_len, hidden_dim"),
    ):
        (folder / "config.json").write_text(json.dumps(values | changes))
        with pytest.raises(ValueError, match=message):
            load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_type": "softmax"}, "attn_type must be 'yoso-v1-e', 'yoso-v1' or 'yoso-v2'"),
        ({"head_dim": 7}, "num_head [*] head_dim must be dim=48, got 3 [*] 7"),
        ({"conv_window": 4}, "conv_window must be an odd integer"),
        ({"dim": "48"}, "hidden_size must be an integer"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_the_authors_configuration_is_checked(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = json.loads((OLD_LAYOUT.parent / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model": values["model"] | changes}))
    shutil.copyfile(OLD_LAYOUT, tmp_path / "cp.model")
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_configuration_of_several_tasks(tmp_path: Path) -> None:
    shutil.copytree(AUTHORS / "lra_dual", tmp_path / "lra")
    (tmp_path / "lra" / "retrieval_output.model").rename(tmp_path / "lra" / "some.model")
    with pytest.raises(ValueError, match="the checkpoint's name must hold one of them"):
        load_pretrained(tmp_path / "lra" / "some.model")


def test_where_a_configuration_is_looked_for(tmp_path: Path) -> None:
    """Beside a file, or one folder up as in the authors' tree."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    file = tmp_path / "run" / "model" / "cp-0001.model"
    shutil.copyfile(OLD_LAYOUT, file)
    with pytest.raises(FileNotFoundError, match=r"no config\.json beside .*pass config="):
        load_pretrained(file)
    shutil.copyfile(OLD_LAYOUT.parent / "config.json", tmp_path / "run" / "config.json")
    make_plan(ARCHITECTURES, file).check()
    shutil.copyfile(OLD_LAYOUT, file.with_name("cp-0002.model"))
    shutil.copyfile(OLD_LAYOUT.parent / "config.json", file.with_name("config.json"))
    with pytest.raises(FileNotFoundError, match=r"pass the path of one of cp-0001\.model, cp-0002"):
        load_pretrained(file.parent)
    with pytest.raises(FileNotFoundError, match=r"no file or folder uw/yoso .only local paths"):
        load_pretrained("uw/yoso")


def test_positions_are_extended() -> None:
    table = load_file(BASE / "model.safetensors")["embeddings.position_embeddings.weight"]
    present = len(table) - 2

    def extended(wanted: int, how: Any) -> np.ndarray:
        model = YosoModel.from_pretrained(
            BASE, max_position_embeddings=wanted, position_extension=how
        )
        assert model.config.max_position_embeddings == wanted
        return np.asarray(model.embeddings.position_embeddings.embedding)

    tiled = extended(2 * present + 3, "tile")
    np.testing.assert_array_equal(tiled[:2], table[:2])
    np.testing.assert_array_equal(tiled[2 : 2 + present], table[2:])
    np.testing.assert_array_equal(tiled[2 + present : 2 + 2 * present], table[2:])
    np.testing.assert_array_equal(tiled[-3:], table[2:5])
    stretched = extended(2 * present - 1, "interpolate")
    np.testing.assert_array_equal(stretched[:2], table[:2])
    np.testing.assert_array_equal(stretched[2::2], table[2:])
    np.testing.assert_allclose(stretched[3::2], (table[2:-1] + table[3:]) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_position_embeddings": 10_000}, "pass position_extension='tile' or 'interpolate'"),
        ({"max_position_embeddings": 3}, "they can be extended, not cut"),
        ({"position_extension": "repeat"}, "position_extension must be one of None, 'tile', 'int"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_positions_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        YosoModel.from_pretrained(BASE, **options)


@pytest.mark.parametrize("file_format", ["hf", "orbax", "safetensors"])
def test_convert(file_format: str, run: Run, tmp_path: Path) -> None:
    """Each format holds the same model, alone in its place."""
    target = tmp_path / ("model.safetensors" if file_format == "safetensors" else "model")
    source = AUTHORS / "roberta_shared"
    code, out, err = run(source, target, "--format", file_format, "--verify")
    assert code == 0, err
    assert "copied to 2 layers" in out
    assert "tensors are the source's" in out
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    model = load_pretrained(target)
    assert type(model) is YosoForMaskedLM
    assert_same_parameters(model, load_pretrained(source))
    if file_format == "orbax":
        from orbax.checkpoint import v1 as ocp

        known: Any = ocp.metadata(str(target / "params")).metadata
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), known)
        tree: Any = ocp.load(str(target / "params"), abstract)
        kernel = tree["yoso"]["encoder"]["layers"]["0"]["attention"]["query"]["kernel"]
        np.testing.assert_array_equal(kernel, model.yoso.encoder.layers[0].attention.query.kernel)


def test_convert_accounts_for_every_key(run: Run, tmp_path: Path) -> None:
    source = DATA / "bin_old" / "mlm_zip"
    (tmp_path / "in").mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, tmp_path / "in" / path.name)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "in" / name).write_text(name)
    code, out, err = run(
        *(tmp_path / "in", tmp_path / "out", "--verify", "--dtype", "bfloat16"),
        *("--max-position", 64, "--position-extension", "tile"),
    )
    assert code == 0, err
    for key in read_tensors(source):
        assert key in out
    assert "a buffer, not a parameter" in out
    assert "equal to yoso.embeddings.word_embeddings.weight" in out
    assert "float32 to bfloat16" in out
    assert "tiled from 40" in out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["max_position_embeddings"]) == ("bfloat16", 64)
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"


def test_convert_refuses_and_writes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    truncated = tmp_path / "cut.safetensors"
    truncated.write_bytes((BASE / "model.safetensors").read_bytes()[:-5])
    shutil.copyfile(BASE / "config.json", tmp_path / "config.json")
    (tmp_path / "exists").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments, code, message in (
        ((BASE, tmp_path / "exists"), 2, "exists already"),
        ((BASE, tmp_path / "no" / "out"), 2, "there is no folder"),
        ((BASE, target, "--architecture", "Bert"), 2, "--architecture must be one of YosoModel"),
        ((BASE, target, "--position-extension", "tile"), 2, "needs --max-position"),
        ((tmp_path / "nothing", target), 4, "there is no file or folder"),
        ((truncated, target), 4, "is not a whole safetensors file"),
        ((tmp_path / "config.json", target), 4, "is not a checkpoint"),
        ((BASE, target, "--architecture", "YosoForMaskedLM"), 4, "name an architecture that it"),
        ((BASE, target, "--max-position", 9999), 4, "pass position_extension="),
    ):
        result, _, err = run(*arguments)
        assert result == code, err
        assert message in err
        assert len(err.splitlines()) == 1
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    result, _, err = run(BASE, target)
    assert result == 6
    assert "writing needs 1 MB, the disk of" in err
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_result_that_differs_does_not_appear(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = convert_module._write

    def damage(model: Any, source: Path, target: Path, file_format: Any) -> None:
        model.embeddings.norm.bias[...] += 1
        write(model, source, target, file_format)

    monkeypatch.setattr(convert_module, "_write", damage)
    code, _, err = run(BASE, tmp_path / "out", "--verify")
    assert code == 4
    assert "embeddings.LayerNorm.bias as written differs" in err
    assert list(tmp_path.iterdir()) == []


def test_parameters_do_not_change_with_the_file(tmp_path: Path) -> None:
    """torch.save truncates a file in place; a model must not be a view of it."""
    shutil.copytree(DATA / "bin_old" / "mlm_zip", tmp_path / "model")
    model = YosoForMaskedLM.from_pretrained(tmp_path / "model")
    before = jax.tree.map(np.array, to_state_dict(model))
    file = tmp_path / "model" / "pytorch_model.bin"
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    for key, value in to_state_dict(model).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


@pytest.mark.slow
def test_loading_takes_the_memory_of_the_checkpoint(tmp_path: Path) -> None:
    """Peak memory, in a process of its own, of a model of 25 million parameters."""
    config = YosoConfig(
        vocab_size=30_000,
        hidden_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=512,
    )
    YosoModel(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    code = f"""
import resource, jax
from yoso_jax import YosoModel
jax.block_until_ready(jax.numpy.ones(3) + 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = YosoModel.from_pretrained({str(tmp_path)!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert int(result.stdout) * 1024 < 1.25 * size + 20e6


def test_a_head_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of a wrong shape: classifier.out_proj.bias \(3,\)"):
        YosoForSequenceClassification.from_pretrained(
            DATA / "hf" / "seqcls_single_h32", num_labels=5
        )


def test_half_precision_is_read_exactly(tmp_path: Path) -> None:
    tensors = load_file(BASE / "model.safetensors")
    for dtype in ("float16", jnp.bfloat16, "float64"):
        folder = tmp_path / np.dtype(dtype).name
        folder.mkdir()
        shutil.copyfile(BASE / "config.json", folder / "config.json")
        cast = {key: x.astype(dtype) for key, x in tensors.items()}
        save_file(cast, folder / "model.safetensors")
        model = YosoModel.from_pretrained(folder)
        for key, value in to_state_dict(model).items():
            np.testing.assert_array_equal(value, cast[key].astype(np.float32), err_msg=key)


def test_pytorch_is_not_used() -> None:
    code = (
        "import sys, warnings; sys.modules.update(torch=None, transformers=None)\n"
        "warnings.simplefilter('ignore')\n"
        "from yoso_jax import load_pretrained\n"
        f"print(type(load_pretrained({str(AUTHORS / 'bert_plain')!r})).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "YosoForMaskedLM"
