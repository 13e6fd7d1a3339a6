"""Makes tests/data/authors: checkpoints of the YOSO authors' code, and what it computes from them.

Not part of the test suite: it needs a clone of their repository (mlpen/YOSO on GitHub), none of
which is kept, and torch. Today's torch writes other optimizer and scheduler states than theirs, so
use one of their time: Python 3.8 with torch==1.7.1, numpy<1.24 and safetensors. Run:

    python tests/interop/make_authors_files.py CLONE tests/data/authors
"""

import importlib
import json
import math
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.utils.cpp_extension
from safetensors.numpy import save_file

SIZES = {
    "mixed_precision": False,
    "shared_weight": False,
    "vocab_size": 50,
    "max_seq_len": 20,
    "embedding_dim": 32,
    "dim": 32,
    "hidden_dim": 48,
    "num_layers": 2,
    "dropout_prob": 0.1,
    "num_head": 2,
    "head_dim": 16,
    "attn_type": "yoso-v1-e",
    "hash_code_len": 8,
}
ROBERTA = {**SIZES, "num_sen_type": 1, "model_type": "efficient_attention"}
BERT = {**SIZES, "num_sen_type": 2, "model_type": "efficient_attention", "num_classes": 4}
LRA = {**SIZES, "vocab_size": 40, "num_classes": 3}
PRETRAINING = {"learning_rate": 0.01, "warmup": 0.25, "batches_per_epoch": 4, "epoch": 2}
BATCH, LENGTH = 3, 15
MASKED_LM_OUTPUTS = {"last_hidden_state": "model", "mlm_logits": "mlm"}
BERT_OUTPUTS = {
    "last_hidden_state": "model.backbone",
    "mlm_logits": "mlm",
    "sent_scores": "sen_class",
}


class Case(NamedTuple):
    model_class: str  # folder and class
    file: str  # the name their scripts give it
    config: dict  # config.json
    outputs: dict  # name: module whose output it is; None: an item of what the model returns
    legacy: bool = False  # the format of PyTorch before 1.6


CASES = {
    "roberta_shared": Case(
        "RoBERTa ModelForMaskedLM",
        "cp-0249.model",
        {"model": {**ROBERTA, "shared_weight": True, "conv_window": 5}},
        MASKED_LM_OUTPUTS,
    ),
    "roberta_cp": Case(
        "RoBERTa ModelForMaskedLM",
        "cp-0000.cp",
        {
            "model": {**ROBERTA, "embedding_dim": 16, "dim": 16, "hidden_dim": 24, "head_dim": 8},
            "pretraining_setting": PRETRAINING,
        },
        MASKED_LM_OUTPUTS,
    ),
    "roberta_qa": Case(
        "RoBERTa ModelForQA",
        "cp-0249.model",
        {"model": ROBERTA},
        {**MASKED_LM_OUTPUTS, "start_logits": None, "end_logits": None},
    ),
    "roberta_classifier": Case(
        "RoBERTa ModelForSequenceClassification",
        "cp-0249.model",
        {"model": {**ROBERTA, "num_classes": 3, "conv_window": 3}},
        {**MASKED_LM_OUTPUTS, "sent_scores": "sen_classifer"},
    ),
    "bert_plain": Case(
        "BERT ModelWrapper", "cp-0249.model", {"model": BERT}, BERT_OUTPUTS, legacy=True
    ),
    "bert_factorised": Case(
        "BERT ModelWrapper",
        "cp-0249.model",
        {
            "model": {
                **BERT,
                **{"embedding_dim": 16, "dim": 48, "hidden_dim": 16},
                **{"num_head": 3, "conv_window": 3},
            }
        },
        BERT_OUTPUTS,
    ),
    "lra_cls": Case(
        "LRA ModelForSC",
        "listops_output.model",
        {"listops": {"model": {**LRA, "pooling_mode": "CLS", "conv_window": 5}}},
        {"logits": "seq_classifer"},
    ),
    "lra_dual": Case(
        "LRA ModelForSCDual",
        "retrieval_output.model",
        {
            "text": {"model": {**LRA, "pooling_mode": "CLS", "vocab_size": 512}},
            "retrieval": {
                "model": {**LRA, "pooling_mode": "MEAN", "hidden_dim": 40, "shared_weight": True}
            },
        },
        {"logits": "seq_classifer"},
    ),
}


def import_class(clone: Path, name: str) -> Any:
    folder, class_name = name.split()
    for module in ("model", "model_wrapper"):  # each folder has its own
        sys.modules.pop(module, None)
    sys.path.insert(0, str(clone / folder))
    module = importlib.import_module("model" if folder == "BERT" else "model_wrapper")
    sys.path.remove(str(clone / folder))
    return getattr(module, class_name)


def scramble(model: torch.nn.Module) -> None:
    """Weights with which mistakes show; none is what a new model has."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if "_embeddings." in name:
                weight.copy_(0.5 * noise)
            elif weight.ndim > 1:
                weight.copy_(1.5 * noise / math.sqrt(weight[0].numel()))
            else:
                weight.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))


def make_inputs(case: Case, vocab_size: int) -> dict:
    """The arguments of the model, as their data sets make them."""
    ids = torch.randint(4, vocab_size - 1, (BATCH, LENGTH))
    valid = torch.arange(LENGTH) < torch.tensor([[LENGTH], [9], [4]])
    if case.model_class == "RoBERTa ModelForMaskedLM":
        return {"input_ids": ids, "labels": ids}
    if case.model_class == "RoBERTa ModelForSequenceClassification":
        # The mask weighs the reported accuracy; the encoder does not get it.
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case.model_class == "RoBERTa ModelForQA":
        return {"input_ids": ids.masked_fill(~valid, 1), "attention_mask": valid.long()}
    if case.model_class == "BERT ModelWrapper":
        positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
        return {
            "masked_sentence": ids * valid,
            "pos_ids": positions * valid,
            "segment_ids": (positions > 2) * valid.long(),
            "sentence_mask": valid.long(),
            "mask_pos_ids": positions,
            "mask_label": ids,
            "label_mask": valid.long(),
        }
    inputs = {
        "input_ids_0": ids * valid,
        "mask_0": valid.float(),
        "label": ids[:, 0] % 3,
    }
    if case.model_class == "LRA ModelForSCDual":
        inputs["input_ids_1"] = ids.flip(0) * valid.flip(0)
        inputs["mask_1"] = valid.flip(0).float()
    return inputs


def train(model: torch.nn.Module, inputs: dict, settings: dict) -> dict:
    """A step of their pre-training; returns what a .cp holds beside the parameters."""
    rate = settings["learning_rate"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer=optimizer,
        max_lr=rate,
        pct_start=settings["warmup"],
        anneal_strategy="linear",
        epochs=settings["epoch"],
        steps_per_epoch=settings["batches_per_epoch"],
    )
    model(**inputs)["loss"].mean().backward()
    optimizer.step()
    scheduler.step()
    return {
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler_state_dict": scheduler.state_dict(),
        "epoch": 0,
        "inst_pass": BATCH,
    }


def compute(model: torch.nn.Module, inputs: dict, outputs: dict) -> dict:
    """The outputs in float64, rounded to float32."""
    result = {}

    def record(name: str) -> Any:
        return lambda module, args, output: result.update({name: output})

    modules = dict(model.double().eval().named_modules())
    for name, module in outputs.items():
        if module is not None:
            modules[module].register_forward_hook(record(name))
    # Their attention asks for float32.
    with torch.no_grad(), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        returned = model(inputs) if "masked_sentence" in inputs else model(**inputs)
    result.update({name: returned[name] for name, module in outputs.items() if module is None})
    assert all(x.dtype == torch.float64 and bool(x.isfinite().all()) for x in result.values())
    return {name: x.float().numpy() for name, x in result.items()}


def make(case: Case, clone: Path, folder: Path) -> None:
    torch.manual_seed(0)
    task = case.file.split("_")[0]
    config = dict(case.config.get(task, case.config)["model"])
    if task in case.config:  # as run_tasks.py: the table has more rows than max_seq_len says
        config["max_seq_len"] = 2 ** math.ceil(math.log2(config["max_seq_len"]))
    model = import_class(clone, case.model_class)(config)
    scramble(model)
    inputs = make_inputs(case, config["vocab_size"])
    states = {}
    if case.file.endswith(".cp"):
        states = train(model, inputs, case.config["pretraining_setting"])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"model_state_dict": model.state_dict(), **states},
        folder / case.file,
        _use_new_zipfile_serialization=not case.legacy,
    )
    (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
    unused = ("label", "labels", "mask_label", "label_mask", "mask_pos_ids")
    tensors = {f"in/{name}": x.numpy() for name, x in inputs.items() if name not in unused}
    outputs = compute(model, inputs, case.outputs)
    tensors.update({f"out/{name}": x for name, x in outputs.items()})
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(tensors, folder / "case.safetensors")


def main() -> None:
    clone, out = (Path(argument).resolve() for argument in sys.argv[1:])
    sys.dont_write_bytecode = True
    # Importing their attention compiles CUDA kernels, which the expectation does not use.
    torch.utils.cpp_extension.load = lambda *args, **options: None
    sys.modules["fast_lsh_cumulation"] = types.ModuleType("fast_lsh_cumulation")
    for name, case in CASES.items():
        make(case, clone, out / name)
        print(name)


if __name__ == "__main__":
    main()
