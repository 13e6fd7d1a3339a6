"""YosoConfig: transformers' names and defaults, config.json, validation."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from yoso_jax.config import EncoderConfig, YosoConfig

DATA = Path(__file__).parent / "data" / "hf"


def test_defaults_are_those_of_transformers() -> None:
    written = YosoConfig().to_dict()
    assert written == {
        "model_type": "yoso",
        "vocab_size": 50265,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 4096,
        "type_vocab_size": 1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "use_expectation": True,
        "hash_code_len": 9,
        "num_hash": 64,
        "conv_window": None,
        "use_fast_hash": True,
        "lsh_backward": True,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }


@pytest.mark.parametrize("folder", sorted(DATA.glob("*/")), ids=lambda folder: folder.name)
def test_files_of_transformers_are_written_back_as_they_were(folder: Path) -> None:
    config = YosoConfig.from_pretrained(folder)
    assert config.to_dict() == json.loads((folder / "config.json").read_text()) | {
        # JSON has no integer keys.
        key: getattr(config, key)
        for key in ("id2label",)
        if "id2label" in config.to_dict()
    }
    assert json.loads(config.to_json_string()) == json.loads((folder / "config.json").read_text())


def test_unknown_entries_are_kept(tmp_path: Path) -> None:
    unknown = {
        "transformers_version": "4.16.2",
        "gradient_checkpointing": False,
        "task_specific_params": {"a": [1, {"b": None}]},
    }
    config = YosoConfig.from_dict({"hidden_size": 24, **unknown})
    assert config.hidden_size == 24
    assert config.to_dict().items() >= unknown.items()
    config.save_pretrained(tmp_path / "new")
    assert YosoConfig.from_pretrained(tmp_path / "new") == config


def test_own_fields_survive_a_round_trip() -> None:
    config = YosoConfig(
        attention="softmax",
        bit_layout="block",
        attention_backward="auto",
        num_backward_hashes=4,
        bucket_bits=0,
        hf_mask_compat=True,
        scan_layers=True,
        remat=True,
        remat_policy="dots_saveable",
        attention_implementation="xla",
        architectures=("YosoModel",),
        eos_token_id=(2, 3),
        problem_type="regression",
    )
    read = YosoConfig.from_dict(json.loads(config.to_json_string()))
    assert read == config
    assert hash(read) == hash(config)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        YosoConfig().hidden_size = 4  # type: ignore[misc]


def test_integers_of_json_are_read_as_numbers() -> None:
    config = YosoConfig.from_dict({"hidden_dropout_prob": 0, "layer_norm_eps": 1})
    assert (config.hidden_dropout_prob, config.layer_norm_eps) == (0.0, 1.0)


def test_labels() -> None:
    assert YosoConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert "id2label" not in YosoConfig().to_dict()
    three = YosoConfig(num_labels=3)
    assert three.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert three.to_dict()["id2label"] == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = YosoConfig.from_dict({"id2label": {"0": "no", "1": "yes"}})
    assert (named.num_labels, named.label2id) == (2, {"no": 0, "yes": 1})
    assert named.replace(num_labels=1).id2label == {0: "LABEL_0"}
    assert three.replace(id2label={0: "x"}).num_labels == 1
    assert three.replace(hidden_act="relu").num_labels == 3


def test_names_of_classes_win_over_their_number_in_a_file() -> None:
    with pytest.warns(UserWarning, match="num_labels=3 is ignored"):
        config = YosoConfig.from_dict({"id2label": {"0": "a", "1": "b"}, "num_labels": 3})
    assert config.num_labels == 2


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("vocab_size", 0, "an integer >= 1"),
        ("hidden_size", 770, "a multiple of num_attention_heads=12"),
        ("num_hidden_layers", True, "an integer >= 1"),
        ("num_attention_heads", 2.0, "an integer >= 1"),
        ("hash_code_len", 17, "an integer in 1..16"),
        ("num_backward_hashes", 0, "an integer >= 1 or None"),
        ("bucket_bits", 10, "an integer in 0..9 or None"),
        ("attention_backward", "buckets", "one of None, 'auto', 'sampled', "),
        ("conv_window", 8, "an odd integer >= 1 or None"),
        ("conv_window", -1, "an integer >= 1 or None"),
        ("hidden_act", "gelu_gelu", "one of 'gelu', "),
        ("hidden_act", ["gelu"], "one of 'gelu', "),
        ("layer_norm_eps", float("inf"), "a finite number > 0"),
        ("bos_token_id", "x", "an integer >= 0 or None"),
        ("eos_token_id", 1.5, "an integer >= 0 or None"),
        ("eos_token_id", (1, "x"), "an integer, integers or None"),
        ("architectures", "YosoModel", "names of architectures or None"),
        ("attention_implementation", "cuda", "one of None, 'mosaic_gpu', 'xla'"),
        ("id2label", {0: 1, 1: 2}, "a mapping with at least one entry, of names"),
        ("label2id", {"a": "b"}, "a mapping of names to classes"),
        ("extra", None, "a mapping of config.json's other entries"),
        ("hidden_dropout_prob", 1.0, "a finite number in [0, 1)"),
        ("hidden_dropout_prob", float("nan"), "a finite number in [0, 1)"),
        ("attention_probs_dropout_prob", False, "a finite number in [0, 1)"),
        ("layer_norm_eps", 0.0, "a finite number > 0"),
        ("initializer_range", "0.02", "a finite number >= 0"),
        ("use_expectation", 1, "True or False"),
        ("attention", "linear", "one of 'yoso', 'softmax'"),
        ("bit_layout", "wide", "one of 'spread', 'block'"),
        ("attention_implementation", 3, "one of None, 'mosaic_gpu', 'xla'"),
        ("pad_token_id", 50265, "less than vocab_size=50265 or None"),
        ("problem_type", "ranking", "one of None, 'regression', "),
        ("num_labels", 0, "an integer >= 1 or None"),
        ("id2label", {0: "a", 2: "b"}, "a mapping of 0, 1, 2, ... to names"),
        ("id2label", {}, "a mapping with at least one entry"),
        ("id2label", ["a"], "a mapping of 0, 1, 2, ... to names"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_refuses(field: str, value: Any, accepted: str) -> None:
    message = f"{field} must be {accepted}"
    with pytest.raises(ValueError, match=re.escape(message) + ".*, got "):
        YosoConfig(**{field: value})


def test_refuses_contradictions() -> None:
    with pytest.raises(ValueError, match="num_labels must be None or the 1 of id2label, got 2"):
        YosoConfig(num_labels=2, id2label={0: "a"})
    with pytest.raises(ValueError, match="problem_type must be 'regression' or None"):
        YosoConfig(num_labels=1, problem_type="single_label_classification")
    with pytest.raises(ValueError, match="extra must hold no fields"):
        YosoConfig(extra={"hidden_size": 3})
    accepted = "attention_implementation must be one of None, 'xla', 'cudnn', got 'mosaic_gpu'"
    with pytest.raises(ValueError, match=accepted):
        YosoConfig(attention="softmax", attention_implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="bit_layout must be 'spread' where attention_backward is"):
        YosoConfig(attention_backward="bucketed", bit_layout="block")
    with pytest.raises(TypeError, match="hiden_size"):
        YosoConfig(hiden_size=3)  # type: ignore[call-arg]


def test_refuses_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        YosoConfig.from_pretrained(tmp_path)
    for text, message in (
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"model_type": "bert"}', "model_type must be 'yoso', got 'bert'"),
        ('{"conv_window": 2}', "conv_window must be an odd integer"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
            YosoConfig.from_pretrained(tmp_path)


def test_the_encoder_of_a_subclass_is_validated_too() -> None:
    with pytest.raises(ValueError, match="num_hash must be an integer >= 1, got 0"):
        EncoderConfig(num_hash=0)
    assert EncoderConfig().head_dim == 64


def test_only_yoso_samples() -> None:
    sampled = EncoderConfig(use_expectation=False)
    assert sampled.is_sampled
    assert not sampled.replace(attention="softmax").is_sampled
    assert not EncoderConfig().is_sampled


def test_the_backward_pass_is_what_the_own_field_or_that_of_transformers_says() -> None:
    assert YosoConfig().backward == "sampled"
    assert YosoConfig(lsh_backward=False).backward == "expectation"
    assert YosoConfig(lsh_backward=False, attention_backward="bucketed").backward == "bucketed"
    assert YosoConfig(attention_backward="auto").backward is None
    YosoConfig(attention_backward="bucketed", bit_layout="block", use_fast_hash=False)
