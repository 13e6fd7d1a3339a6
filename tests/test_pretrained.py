"""Loading and saving folders in Hugging Face's layout."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from yoso_jax.config import YosoConfig
from yoso_jax.conversion import save, to_state_dict
from yoso_jax.modeling import (
    YosoForMaskedLM,
    YosoForMultipleChoice,
    YosoForQuestionAnswering,
    YosoForSequenceClassification,
    YosoForTokenClassification,
    YosoModel,
)

DATA = Path(__file__).parent / "data" / "hf"
MASKED_LM = DATA / "mlm_h64_gelu_conv33_grads"
HEADS = {
    "base_h32_d8_gelu": YosoModel,
    "mlm_h64_gelu_conv33_grads": YosoForMaskedLM,
    "seqcls_single_h32": YosoForSequenceClassification,
    "mc_h32": YosoForMultipleChoice,
    "tokcls_h32_grads": YosoForTokenClassification,
}
DECODER = "cls.predictions.decoder.weight"
DECODER_BIAS = "cls.predictions.decoder.bias"
BIAS = "cls.predictions.bias"
WORDS = "yoso.embeddings.word_embeddings.weight"


def assert_same(actual: Any, expected: Any) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(actual[key], value, err_msg=key)


@pytest.fixture
def edit(tmp_path: Path) -> Callable[..., Path]:
    """Copies a folder and changes its tensors and configuration."""

    def copy(
        source: Path, change: Callable[[dict[str, np.ndarray]], Any] | None = None, **config: Any
    ) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(source, folder)
        tensors = load_file(source / "model.safetensors")
        if change is not None:
            change(tensors)
        save_file(tensors, folder / "model.safetensors")
        values = json.loads((source / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return copy


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_round_trip(name: str, scan_layers: bool, tmp_path: Path) -> None:
    cls = HEADS[name]
    model = cls.from_pretrained(DATA / name, scan_layers=scan_layers)
    model.save_pretrained(tmp_path / "saved")
    original = load_file(DATA / name / "model.safetensors")
    assert_same(load_file(tmp_path / "saved" / "model.safetensors"), original)
    with safe_open(tmp_path / "saved" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config.pop("scan_layers", False) == scan_layers
    assert config == json.loads((DATA / name / "config.json").read_text())
    again = cls.from_pretrained(tmp_path / "saved", scan_layers=not scan_layers)
    assert_same(to_state_dict(again), original)


def test_shards(tmp_path: Path) -> None:
    model = YosoForMaskedLM.from_pretrained(MASKED_LM)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "config.json",
        *(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = to_state_dict(model)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name in set(index["weight_map"].values()):
        shard = load_file(tmp_path / name)
        assert sum(x.nbytes for x in shard.values()) <= 100_000
        assert all(index["weight_map"][key] == name for key in shard)
    assert_same(to_state_dict(YosoForMaskedLM.from_pretrained(tmp_path)), tensors)


def test_types(tmp_path: Path) -> None:
    model = YosoModel.from_pretrained(DATA / "base_h32_d8_gelu", param_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = YosoModel.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(again))} == {jnp.dtype(jnp.float32)}
    assert_same(
        to_state_dict(again),
        {key: x.astype(jnp.float32) for key, x in to_state_dict(model).items()},
    )
    assert again(np.ones((1, 3), int)).last_hidden_state.dtype == jnp.bfloat16


def test_overrides_change_the_configuration() -> None:
    model = YosoModel.from_pretrained(DATA / "base_h32_d8_gelu", use_expectation=False, num_hash=3)
    assert (model.config.use_expectation, model.config.num_hash) == (False, 3)


def test_prefixes_old_names_and_buffers(edit: Callable[..., Path]) -> None:
    def age(tensors: dict[str, np.ndarray]) -> None:
        for key in list(tensors):
            old = key.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = "yoso." + old.replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(key)
        tensors["yoso.embeddings.position_ids"] = np.arange(64)[None]
        tensors["yoso.embeddings.token_type_ids"] = np.zeros((1, 64), int)

    source = DATA / "base_h32_d8_gelu"
    model = YosoModel.from_pretrained(edit(source, age))
    assert_same(to_state_dict(model), load_file(source / "model.safetensors"))


def test_a_base_model_is_loaded_into_a_head(edit: Callable[..., Path]) -> None:
    source = DATA / "base_h32_d8_gelu"
    with pytest.warns(UserWarning, match="absent from the file, initialised afresh") as warned:
        model = YosoForTokenClassification.from_pretrained(source, num_labels=5)
    assert len(warned) == 1
    assert "classifier.bias, classifier.weight" in str(warned[0].message)
    tensors = to_state_dict(model)
    assert_same(
        {key.removeprefix("yoso."): x for key, x in tensors.items() if key.startswith("yoso.")},
        load_file(source / "model.safetensors"),
    )
    assert tensors["classifier.weight"].shape == (5, 32)
    assert np.any(tensors["classifier.weight"])
    with pytest.warns(UserWarning, match="initialised afresh"):
        other = YosoForTokenClassification.from_pretrained(
            source, num_labels=5, rngs=nnx.Rngs(1), scan_layers=True
        )
    assert not np.array_equal(
        to_state_dict(other)["classifier.weight"], tensors["classifier.weight"]
    )


def test_a_head_is_swapped_for_another() -> None:
    with pytest.warns(UserWarning, match="initialised afresh") as warned:
        model = YosoForSequenceClassification.from_pretrained(MASKED_LM)
    assert len(warned) == 1
    message = str(warned[0].message)
    assert "classifier.out_proj.weight; in the file, not in this model: cls.predictions" in message
    assert_same(
        {key: x for key, x in to_state_dict(model).items() if key.startswith("yoso.")},
        {
            key: x
            for key, x in load_file(MASKED_LM / "model.safetensors").items()
            if key.startswith("yoso.")
        },
    )
    with pytest.warns(UserWarning, match="in the file, not in this model: cls.predictions"):
        YosoModel.from_pretrained(MASKED_LM)
    with pytest.warns(UserWarning, match="qa_outputs.weight; .*classifier.dense.weight"):
        YosoForQuestionAnswering.from_pretrained(DATA / "seqcls_single_h32")


def test_all_mismatches_are_reported_at_once(edit: Callable[..., Path]) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        del tensors["yoso.encoder.layer.1.output.dense.bias"]
        del tensors["cls.predictions.transform.dense.bias"]
        tensors["yoso.encoder.layer.2.output.dense.bias"] = np.zeros(64)
        tensors["pooler.dense.bias"] = np.zeros(64)
        tensors[WORDS] = tensors[WORDS][1:]

    with pytest.raises(ValueError, match="do not fit YosoForMaskedLM") as error:
        YosoForMaskedLM.from_pretrained(edit(MASKED_LM, damage))
    assert str(error.value).endswith(
        "do not fit YosoForMaskedLM. "
        "missing: cls.predictions.transform.dense.bias, yoso.encoder.layer.1.output.dense.bias; "
        "unexpected: pooler.dense.bias, yoso.encoder.layer.2.output.dense.bias; "
        "of a wrong shape: yoso.embeddings.word_embeddings.weight (96, 64) instead of (97, 64)"
    )


def test_equal_decoders_are_tied(edit: Callable[..., Path]) -> None:
    def add_decoder(tensors: dict[str, np.ndarray]) -> None:
        tensors[DECODER], tensors[DECODER_BIAS] = tensors[WORDS], tensors[BIAS]

    model = YosoForMaskedLM.from_pretrained(edit(MASKED_LM, add_decoder))
    assert_same(to_state_dict(model), load_file(MASKED_LM / "model.safetensors"))


def test_a_different_decoder_is_not_tied(edit: Callable[..., Path], tmp_path: Path) -> None:
    decoder = np.random.default_rng(0).normal(size=(97, 64)).astype(np.float32)
    with pytest.warns(UserWarning, match="differs from the word embeddings, so it is not tied"):
        model = YosoForMaskedLM.from_pretrained(
            edit(MASKED_LM, lambda tensors: tensors.update({DECODER: decoder}))
        )
    assert not model.config.tie_word_embeddings
    tensors = to_state_dict(model)
    original = load_file(MASKED_LM / "model.safetensors")
    np.testing.assert_array_equal(tensors[DECODER], decoder)
    np.testing.assert_array_equal(tensors[DECODER_BIAS], original[BIAS])
    np.testing.assert_array_equal(tensors[WORDS], original[WORDS])
    model.save_pretrained(tmp_path / "untied")
    saved = load_file(tmp_path / "untied" / "model.safetensors")
    np.testing.assert_array_equal(saved[BIAS], original[BIAS])
    assert_same(to_state_dict(YosoForMaskedLM.from_pretrained(tmp_path / "untied")), tensors)


def test_a_different_decoder_bias_is_used(edit: Callable[..., Path]) -> None:
    bias = np.arange(97, dtype=np.float32)
    with pytest.warns(UserWarning, match=f"{re.escape(DECODER_BIAS)} differs from"):
        model = YosoForMaskedLM.from_pretrained(
            edit(MASKED_LM, lambda tensors: tensors.update({DECODER_BIAS: bias}))
        )
    assert model.config.tie_word_embeddings
    np.testing.assert_array_equal(to_state_dict(model)[BIAS], bias)


def test_an_untied_configuration_uses_the_decoder_bias(edit: Callable[..., Path]) -> None:
    bias = np.arange(97, dtype=np.float32)

    def untie(tensors: dict[str, np.ndarray]) -> None:
        tensors[DECODER], tensors[DECODER_BIAS] = tensors[WORDS].copy(), bias

    model = YosoForMaskedLM.from_pretrained(edit(MASKED_LM, untie, tie_word_embeddings=False))
    tensors = to_state_dict(model)
    np.testing.assert_array_equal(tensors[DECODER_BIAS], bias)
    assert BIAS not in tensors


def test_saving_replaces_an_older_model_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    first = YosoForMaskedLM.from_pretrained(MASKED_LM)
    first.save_pretrained(tmp_path, max_shard_size=100_000)
    second = YosoModel.from_pretrained(DATA / "base_h32_d8_gelu")
    second.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "vocab.json"]
    assert_same(to_state_dict(YosoModel.from_pretrained(tmp_path)), to_state_dict(second))
    first.save_pretrained(tmp_path, max_shard_size=100_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(to_state_dict(YosoForMaskedLM.from_pretrained(tmp_path)), to_state_dict(first))


def test_saved_files_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        YosoModel.from_pretrained(DATA / "base_h32_d8_gelu").save_pretrained(tmp_path / "new")
    finally:
        os.umask(old)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o644}


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_save_leaves_the_folder_as_it_was(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = YosoModel.from_pretrained(DATA / "base_h32_d8_gelu")
    folder = tmp_path / "model"
    if exists:
        model.save_pretrained(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fill_disk(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "save_file", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        YosoForMaskedLM(YosoConfig(vocab_size=9, hidden_size=12), rngs=nnx.Rngs(0)).save_pretrained(
            folder
        )
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert folder.exists() == exists


def test_a_pytorch_file_of_2022_is_read_without_pytorch(tmp_path: Path) -> None:
    """With position buffers and a stored, equal decoder; whole, then as shards."""
    source = DATA.parent / "bin_old" / "mlm_zip"
    case = load_file(source / "case.safetensors")
    inputs = [jnp.asarray(case[f"full/in/{name}"]) for name in ("input_ids", "token_type_ids")]

    def check(folder: Path) -> None:
        model = YosoForMaskedLM.from_pretrained(folder)
        logits = jax.jit(lambda model, ids, types: model(ids, None, types).logits)(model, *inputs)
        expected = case["full/out/logits"]
        assert np.abs(logits - expected).max() < 1e-5 * max(1, np.abs(expected).max())

    check(source)
    shards = tmp_path / "shards"
    shutil.copytree(source, shards)
    (shards / "pytorch_model.bin").rename(shards / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {WORDS: "pytorch_model-00001-of-00001.bin"}}
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check(shards)
    index = {"weight_map": {WORDS: "../shards/pytorch_model-00001-of-00001.bin"}}
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names files outside its folder"):
        YosoForMaskedLM.from_pretrained(shards)


def test_what_a_killed_save_left_does_not_stop_the_next(tmp_path: Path) -> None:
    model = YosoModel(YosoConfig.from_pretrained(DATA / "base_h32_d8_gelu"), rngs=nnx.Rngs(0))
    (tmp_path / f".model.saving-{os.getpid()}").mkdir()
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_integer_weights_are_refused(edit: Callable[..., Path]) -> None:
    folder = edit(MASKED_LM, lambda tensors: tensors.update({BIAS: tensors[BIAS].astype("int32")}))
    with pytest.raises(ValueError, match=r"not floating point: cls\.predictions\.bias int32"):
        YosoForMaskedLM.from_pretrained(folder)


def test_save_refuses(tmp_path: Path) -> None:
    model = YosoModel.from_pretrained(DATA / "base_h32_d8_gelu")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
        model.save_pretrained(tmp_path / "file")
    for size in (0, "5", "5 TB", "-1GB"):
        with pytest.raises(ValueError, match="max_shard_size must be a number of bytes"):
            model.save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


def test_load_refuses_damaged_folders(tmp_path: Path) -> None:
    source = DATA / "base_h32_d8_gelu"
    with pytest.raises(FileNotFoundError, match=re.escape("config.json")):
        YosoModel.from_pretrained(tmp_path)
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=re.escape("holds none of model.safetensors")):
        YosoModel.from_pretrained(tmp_path)

    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("{", "index.json is not valid JSON"),
        ("[" * 100_000, "index.json is not valid JSON"),
        ("[]", "index.json must hold a JSON object, got list"),
        ("{}", "is not a JSON index with a weight_map"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            YosoModel.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=re.escape("lacks the shards shard.safetensors")):
        YosoModel.from_pretrained(tmp_path)
    shutil.copyfile(source / "model.safetensors", tmp_path / "shard.safetensors")
    with pytest.raises(ValueError, match="lists tensors that no shard holds: a"):
        YosoModel.from_pretrained(tmp_path)

    data = (source / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        YosoModel.from_pretrained(tmp_path)
