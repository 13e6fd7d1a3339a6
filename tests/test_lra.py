"""The Long Range Arena classifier."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from yoso_jax.losses import cross_entropy
from yoso_jax.lra import LRAClassifier, LRAConfig
from yoso_jax.modeling import LogitsOutput

DATA = Path(__file__).parent / "data" / "orig" / "lra_sc_mean"
IDS = np.random.default_rng(0).integers(0, 7, (3, 10))
MASK = np.arange(10) < np.array([[10], [6], [1]])
PAIRS = np.stack([IDS, IDS[::-1]], axis=1)
PAIRS_MASK = np.stack([MASK, MASK[::-1]], axis=1)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """These models run once or twice, so that optimising them costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# The paper's, as configurations.
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {"attention": "softmax", "use_expectation": False},
    "yoso_e": {"use_expectation": True},
    "yoso_m": {"use_expectation": False},
    "yoso_c_m": {"use_expectation": False, "conv_window": 3},
}


@jax.jit
def run(model: LRAClassifier, *args: Any) -> LogitsOutput:
    return model(*args)


def make(**changes: Any) -> LRAClassifier:
    defaults: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "num_hash": 4,
        "hash_code_len": 4,
        "num_labels": 3,
        "num_hidden_layers": 1,
    }
    return LRAClassifier(LRAConfig(**defaults | changes), rngs=nnx.Rngs(0))


# The authors' module of each of ours.
AUTHORS_MODULES = (
    (r"(word|position)_embeddings", r"model.embeddings.\1_embeddings"),
    (r"encoder\.layers\.(\d)\.attention\.(q|k|v)\w+", r"model.encoders.\1.mha.W_\2"),
    (r"encoder\.layers\.(\d)\.attention\.conv", r"model.encoders.\1.mha.attn.conv"),
    (r"encoder\.layers\.(\d)\.attention_output", r"model.encoders.\1.mha.ff"),
    (r"encoder\.layers\.(\d)\.attention_norm", r"model.encoders.\1.norm1"),
    (r"encoder\.layers\.(\d)\.output_norm", r"model.encoders.\1.norm2"),
    (r"encoder\.layers\.(\d)\.intermediate", r"model.encoders.\1.mlpblock.0"),
    (r"encoder\.layers\.(\d)\.output", r"model.encoders.\1.mlpblock.3"),
    (r"norm", "model.norm"),
    (r"dense", "seq_classifer.mlpblock.0"),
    (r"out_proj", "seq_classifer.mlpblock.2"),
)


def load_authors_parameters(model: LRAClassifier, tensors: dict[str, np.ndarray]) -> LRAClassifier:
    unused = set(tensors)
    state = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        module, leaf = ".".join(map(str, path[:-1])), path[-1]
        (name,) = (
            match.expand(template)
            for pattern, template in AUTHORS_MODULES
            if (match := re.fullmatch(pattern, module))
        )
        key = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
        value = tensors[key]
        if leaf == "kernel":
            value = value.T
        elif leaf == "filters":
            value = value[:, 0, :, 0].T
        assert value.shape == variable.shape
        state[path] = variable.replace(jnp.asarray(value))
        unused.remove(key)
    assert not unused
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(state))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_equals_the_authors_code(scan_layers: bool) -> None:
    published = json.loads((DATA / "config.json").read_text())["model"]
    config = LRAConfig(
        vocab_size=published["vocab_size"],
        hidden_size=published["dim"],
        num_hidden_layers=published["num_layers"],
        num_attention_heads=published["num_head"],
        intermediate_size=published["hidden_dim"],
        max_position_embeddings=published["max_seq_len"],
        hash_code_len=published["hash_code_len"],
        conv_window=published["conv_window"],
        num_labels=published["num_classes"],
    )
    model = LRAClassifier(config, rngs=nnx.Rngs(0))
    model = load_authors_parameters(model, load_file(DATA / "model_state_dict.safetensors"))
    if scan_layers:
        model = stack_layers(model, config.replace(scan_layers=True))
    case = load_file(DATA / "case.safetensors")
    outputs = run(model, case["in/input_ids_0"], case["in/mask_0"], case["in/label"])
    np.testing.assert_allclose(outputs.logits, case["out/seq_scores"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(outputs.loss, np.mean(case["out/loss"]), rtol=1e-5)


def stack_layers(model: LRAClassifier, config: LRAConfig) -> LRAClassifier:
    stacked = LRAClassifier(config, rngs=nnx.Rngs(0))
    layers = [nnx.state(layer) for layer in model.encoder.layers]
    nnx.update(stacked.encoder.layers, jax.tree.map(lambda *xs: jnp.stack(xs), *layers))
    for name in ("word_embeddings", "position_embeddings", "norm", "dense", "out_proj"):
        nnx.update(getattr(stacked, name), nnx.state(getattr(model, name)))
    return stacked


@pytest.mark.parametrize("attention", ["yoso", "softmax"])
def test_padding_is_ignored(attention: str) -> None:
    model = make(mean_over="valid", conv_window=3, attention=attention)
    padded = np.where(MASK, IDS, 5)
    logits = run(model, padded, MASK).logits
    np.testing.assert_allclose(run(model, IDS, MASK).logits, logits, atol=1e-6)
    np.testing.assert_allclose(run(model, padded[1:2, :6]).logits, logits[1:2], atol=1e-6)


def test_the_published_mean_counts_padding() -> None:
    model = make(mean_over="valid")
    published = make()
    mask = jnp.ones((1, 6), bool)
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    longer = jnp.pad(x, ((0, 0), (0, 6), (0, 0)))
    longer_mask = jnp.pad(mask, ((0, 0), (0, 6)))
    np.testing.assert_allclose(
        published._pool(x, mask), 2 * published._pool(longer, longer_mask), rtol=1e-5
    )
    np.testing.assert_allclose(model._pool(x, mask), model._pool(longer, longer_mask), rtol=1e-5)


def test_cls_pooling_reads_a_symbol_put_first() -> None:
    model = make(pooling="cls")
    shifted = jnp.concatenate([jnp.full((3, 1), 7), IDS[:, :-1]], axis=1)
    changed_end = IDS.copy()
    changed_end[:, -1] = 0
    logits = run(model, IDS).logits
    np.testing.assert_array_equal(run(model, changed_end).logits, logits)
    x = model.word_embeddings(shifted) + model.position_embeddings(jnp.arange(10))
    x = model.encoder(x, None, deterministic=True, rngs=None).last_hidden_state
    expected = model.out_proj(nnx.relu(model.dense(model.norm(x)[:, 0])))
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_post_norm_differs_from_pre_norm() -> None:
    assert not np.allclose(run(make(norm="post"), IDS).logits, run(make(), IDS).logits, atol=1e-4)


def test_dual_compares_the_pooled_vectors_of_a_pair() -> None:
    model = make(dual=True, mean_over="valid")
    single = make(mean_over="valid", num_labels=16, intermediate_size=32)
    for name in ("word_embeddings", "position_embeddings", "encoder", "norm"):
        setattr(single, name, getattr(model, name))
    # relu(x) - relu(-x) is x: the logits of `single` are its pooled vectors.
    single.dense.kernel[...] = jnp.concatenate([jnp.eye(16), -jnp.eye(16)], axis=1)
    single.out_proj.kernel[...] = single.dense.kernel[...].T
    a, b = (np.asarray(run(single, PAIRS[:, i], PAIRS_MASK[:, i]).logits) for i in (0, 1))
    weights = [np.asarray(model.dense.kernel[...]), np.asarray(model.out_proj.kernel[...])]
    expected = np.maximum(np.hstack([a, b, a * b, a - b]) @ weights[0], 0) @ weights[1]
    logits = run(model, PAIRS, PAIRS_MASK).logits
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    swapped = run(model, PAIRS[:, ::-1], PAIRS_MASK[:, ::-1]).logits
    assert not np.allclose(swapped, expected, atol=1e-5)


@pytest.mark.parametrize("dual", [False, True])
def test_sampled_training_step(dual: bool) -> None:
    model = make(use_expectation=False, dual=dual, pooling="cls" if dual else "mean")
    ids, mask = (PAIRS, PAIRS_MASK) if dual else (IDS, MASK)
    labels = np.array([0, 2, -100])

    @jax.jit
    def loss_and_gradients(model: LRAClassifier, key: jax.Array) -> tuple[jax.Array, LRAClassifier]:
        def loss(model: LRAClassifier) -> Any:
            rngs = nnx.Rngs(hash=key, dropout=jax.random.fold_in(key, 1))
            return model(ids, mask, labels, deterministic=False, rngs=rngs).loss

        return jax.value_and_grad(loss)(model)

    loss, gradients = loss_and_gradients(model, jax.random.key(0))
    again, _ = loss_and_gradients(model, jax.random.key(0))
    other, _ = loss_and_gradients(model, jax.random.key(1))
    assert loss == again != other
    for path, gradient in nnx.to_flat_state(nnx.state(gradients)):
        assert np.all(np.isfinite(gradient[...])), path
        assert np.any(gradient[...]) or path[-1] == "bias", path


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train(variant: str) -> None:
    model = make(**VARIANTS[variant], scan_layers=True, remat=True)
    streams = ("hash", "dropout") if model.config.is_sampled else ("dropout",)

    @jax.jit
    def loss_and_gradients(model: LRAClassifier) -> tuple[jax.Array, LRAClassifier]:
        def loss(model: LRAClassifier) -> Any:
            rngs = nnx.Rngs(**dict.fromkeys(streams, 0))
            return model(IDS, MASK, np.array([0, 2, 1]), deterministic=False, rngs=rngs).loss

        return jax.value_and_grad(loss)(model)

    loss, gradients = loss_and_gradients(model)
    for path, gradient in nnx.to_flat_state(nnx.state(gradients)):
        assert np.all(np.isfinite(gradient[...])), path
        assert np.any(gradient[...]) or path[-1] == "bias", path
    updated = jax.tree.map(lambda x, gradient: x - 0.1 * gradient, model, gradients)
    assert loss_and_gradients(updated)[0] < loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_survive_saving(variant: str, tmp_path: Path) -> None:
    model = make(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded = LRAClassifier.from_pretrained(tmp_path)
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert ("model.encoders.0.mha.attn.conv.weight" in keys) == (variant == "yoso_c_m")


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    outputs = run(make(), IDS, MASK, np.array([0, 1, 2]))
    expected = cross_entropy(outputs.logits, jnp.array([0, 1, 2]))
    np.testing.assert_allclose(outputs.loss, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS + 2}, "input_ids must be in [0, 8), got 2..8"),
        ({"input_ids": IDS[0]}, "input_ids must be [batch, tokens], got shape (10,)"),
        ({"input_ids": np.zeros((1, 17), int)}, "at most max_position_embeddings=16 tokens"),
        ({"input_ids": IDS, "attention_mask": MASK[:2]}, "attention_mask must have shape (3, 10)"),
        ({"input_ids": IDS, "labels": np.zeros((3, 1), int)}, "labels must be integers (3,)"),
        ({"input_ids": IDS, "labels": np.array([0, 1, 3])}, "labels must be in [0, 3) or -100"),
        ({"input_ids": IDS, "deterministic": False}, "pass rngs=nnx.Rngs(dropout="),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS}, "input_ids must be [batch, 2, tokens], got shape (3, 10)"),
        ({"input_ids": IDS[None]}, "input_ids must be [batch, 2, tokens], got shape (1, 3, 10)"),
        ({"input_ids": PAIRS + 2}, "input_ids must be in [0, 8), got 2..8"),
        ({"input_ids": np.zeros((1, 2, 17), int)}, "at most max_position_embeddings=16 tokens"),
        (
            {"input_ids": PAIRS, "attention_mask": MASK},
            "attention_mask must have shape (3, 2, 10), got (3, 10)",
        ),
    ],
)
def test_dual_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(dual=True)(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "sandwich"}, "norm must be one of 'pre', 'post'"),
        ({"pooling": "max"}, "pooling must be one of 'mean', 'cls'"),
        ({"mean_over": 3}, "mean_over must be one of 'all', 'valid'"),
        ({"num_labels": 0}, "num_labels must be an integer >= 1"),
        ({"dual": 1}, "dual must be True or False"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LRAConfig(**changes)
