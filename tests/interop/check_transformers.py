"""Checks that transformers loads what this project saves, and computes the same from it.

Not part of the test suite: it needs torch and transformers, which this project does not. Run each
half in an environment that has its library (and numpy and safetensors):

    python tests/interop/check_transformers.py export FOLDER   # yoso_jax
    python tests/interop/check_transformers.py compare FOLDER  # torch, transformers
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
    "initializer_range": 0.2,
}
# Name: architecture, configuration, arguments of save_pretrained.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "base": ("YosoModel", {"conv_window": 5}, {}),
    "scanned": ("YosoModel", {"scan_layers": True}, {}),
    "sharded": ("YosoForMaskedLM", {"hash_code_len": 5}, {"max_shard_size": "50KB"}),
    "untied": ("YosoForMaskedLM", {"tie_word_embeddings": False}, {}),
    "classes": ("YosoForSequenceClassification", {"num_labels": 3, "hidden_act": "relu"}, {}),
    "multi_label": ("YosoForSequenceClassification", {"num_labels": 4}, {}),
    "regression": ("YosoForSequenceClassification", {"num_labels": 1, "hidden_act": "tanh"}, {}),
    "choices": ("YosoForMultipleChoice", {"hidden_act": "gelu_new"}, {}),
    "tokens": ("YosoForTokenClassification", {"num_labels": 5, "conv_window": 3}, {}),
    "answers": ("YosoForQuestionAnswering", {"hidden_act": "silu"}, {}),
}
# Checkpoints of others, read by this project and saved again.
CONVERTED = {
    "pytorch_2022": "bin_old/mlm_zip",
    "authors_shared": "authors/roberta_shared",
    "authors_answers": "authors/roberta_qa",
    "authors_bert": "authors/bert_plain",
    "authors_factorised": "authors/bert_factorised",
    "authors_older": "orig/roberta_yoso_v1_e",
}
OUTPUTS = ("loss", "logits", "start_logits", "end_logits", "last_hidden_state")


def make_inputs(name: str, vocabulary: int, types: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (2, 4, 13) if name == "choices" else (4, 13)
    inputs = {
        "input_ids": rng.integers(0, vocabulary, shape),
        "token_type_ids": rng.integers(0, types, shape),
        "attention_mask": (rng.random(shape) < 0.8).astype(np.int64),
    }
    match name:
        case "sharded" | "untied":
            inputs["labels"] = np.where(rng.random(shape) < 0.5, inputs["input_ids"], -100)
        case "classes" | "choices":
            inputs["labels"] = rng.integers(0, 3, shape[0])
        case "multi_label":
            inputs["labels"] = rng.integers(0, 2, (4, 4)).astype(np.float32)
        case "regression":
            inputs["labels"] = rng.normal(size=4).astype(np.float32)
        case "tokens":
            inputs["labels"] = rng.integers(0, 5, shape)
        case "answers":
            inputs["start_positions"] = np.array([0, 5, 13, 2])
            inputs["end_positions"] = np.array([3, 20, 7, 12])
    return inputs


def export(folder: Path) -> None:
    import jax
    from flax import nnx

    import yoso_jax.modeling
    from yoso_jax import YosoConfig, load_pretrained

    def save(name: str, model: Any, **options: Any) -> None:
        model.save_pretrained(folder / name, **options)
        inputs = make_inputs(name, model.config.vocab_size, model.config.type_vocab_size)
        outputs = vars(model(**inputs))
        expected = {
            key: np.asarray(outputs[key]) for key in OUTPUTS if outputs.get(key) is not None
        }
        save_file(inputs, folder / f"{name}_inputs.safetensors")
        save_file(expected, folder / f"{name}_outputs.safetensors")
        print(f"{name}: saved {sorted(expected)}")

    for name, (architecture, changes, options) in CASES.items():
        config = YosoConfig.from_dict({**SIZES, **changes, "hf_mask_compat": True})
        model = getattr(yoso_jax.modeling, architecture)(config, rngs=nnx.Rngs(0))
        # Biases and LayerNorms that do nothing would not be compared.
        leaves, structure = jax.tree.flatten(model)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noise = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        model = jax.tree.unflatten(structure, [x + n for x, n in zip(leaves, noise, strict=True)])
        save(name, model, **options)
    data = Path(__file__).parents[1] / "data"
    for name, source in CONVERTED.items():
        save(name, load_pretrained(data / source, hf_mask_compat=True))


def compare(folder: Path) -> None:
    import torch  # pyrefly: ignore[missing-import]
    import transformers  # pyrefly: ignore[missing-import]

    worst = 0.0
    for name in (*CASES, *CONVERTED):
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        (architecture,) = config["architectures"]
        model, loading = getattr(transformers, architecture).from_pretrained(
            folder / name, output_loading_info=True
        )
        if problems := {key: value for key, value in loading.items() if value}:
            raise SystemExit(f"{name}: transformers reports {problems}")
        inputs = load_file(folder / f"{name}_inputs.safetensors")
        with torch.no_grad():
            tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
            outputs = model.eval()(**tensors)
        for key, expected in load_file(folder / f"{name}_outputs.safetensors").items():
            scale = max(1.0, float(np.max(np.abs(expected))))
            error = float(np.max(np.abs(outputs[key].numpy() - expected))) / scale
            print(f"{name}: {key} {error:.1e}")
            worst = max(worst, error)
    print(f"transformers {transformers.__version__}: worst error {worst:.1e}")
    if worst > 1e-5:
        raise SystemExit("the outputs differ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["export", "compare"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"export": export, "compare": compare}[arguments.step](arguments.folder)
