"""The models against what transformers and the authors' code compute in float64."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import yoso_jax.modeling
from yoso_jax.conversion import to_state_dict
from yoso_jax.modeling.base import PretrainedModel

DATA = Path(__file__).parent / "data" / "hf"
# Cases whose every parameter's gradient is known, of all variants that have one.
WITH_GRADIENTS = ["mc_h32", "mlm_h64_gelu_conv33_grads", "seqcls_single_h32", "tokcls_h32_grads"]
WITHOUT_GRADIENTS = ["base_h32_d8_gelu", "base_h64_d32_gelunew_conv9", "seqcls_reg1_h32"]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """These models run once, so that optimising them costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Case:
    """A folder of tests/data/hf."""

    def __init__(self, name: str) -> None:
        self.folder = DATA / name
        with safe_open(self.folder / "case.safetensors", "np") as file:
            self.model_class = getattr(yoso_jax.modeling, file.metadata()["model_class"])
            self._tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def load(self, **overrides: object) -> PretrainedModel:
        return self.model_class.from_pretrained(self.folder, **overrides)

    def get(self, variant: str, kind: str) -> dict[str, np.ndarray]:
        prefix = f"{variant}/{kind}/"
        return {
            key.removeprefix(prefix): value
            for key, value in self._tensors.items()
            if key.startswith(prefix)
        }


def evaluate(model: PretrainedModel, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    named = {}
    for name, value in vars(outputs).items():
        if isinstance(value, tuple):
            named |= {f"{name}.{i}": entry for i, entry in enumerate(value)}
        elif value is not None:
            named[name] = value
    return named


@jax.jit
def evaluate_with_gradients(
    model: PretrainedModel, inputs: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    def loss(model: PretrainedModel) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs = evaluate(model, inputs)
        return outputs["loss"], outputs

    gradients, outputs = jax.grad(loss, has_aux=True)(model)
    return outputs | {f"grad.{key}": g for key, g in to_state_dict(gradients).items()}


def spell_out_defaults(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gives all variants of a case the same arguments, so that they share a compilation."""
    shape = inputs["input_ids"].shape
    return {
        "attention_mask": np.ones(shape, np.int32),
        "token_type_ids": np.zeros(shape, np.int32),
        "position_ids": np.broadcast_to(np.arange(2, shape[-1] + 2, dtype=np.int32), shape),
    } | inputs


def assert_all_close(
    actual: dict[str, jax.Array], expected: dict[str, np.ndarray], tolerance: float = 1e-5
) -> None:
    assert expected
    for name, value in expected.items():
        got = np.asarray(actual[name], np.float64)
        scale = np.max(np.abs(value), initial=0)
        is_gradient = name.startswith("grad.")
        limit = 2e-5 * scale + 1e-7 if is_gradient else tolerance * max(1, scale)
        assert got.shape == value.shape, name
        assert np.max(np.abs(got - value)) <= limit, name


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_outputs_and_gradients(name: str) -> None:
    case = Case(name)
    model = case.load()
    for variant, kind in (
        ("full", "out"),
        ("ids_only", "out"),
        ("position_ids", "out"),
        ("masked", "out_correct"),
    ):
        inputs = spell_out_defaults(case.get(variant, "in"))
        assert_all_close(evaluate_with_gradients(model, inputs), case.get(variant, kind))


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
@pytest.mark.parametrize("variant", ["full", "ids_only", "position_ids", "masked"])
def test_outputs(name: str, variant: str) -> None:
    case = Case(name)
    outputs = jax.jit(evaluate)(case.load(), case.get(variant, "in"))
    assert_all_close(outputs, case.get(variant, "out") or case.get(variant, "out_correct"))


@pytest.mark.parametrize("name", WITH_GRADIENTS + WITHOUT_GRADIENTS)
def test_inputs_embeds(name: str) -> None:
    case = Case(name)
    outputs = jax.jit(evaluate)(case.load(), case.get("inputs_embeds", "in"))
    assert_all_close(outputs, case.get("inputs_embeds", "out"))


@pytest.mark.parametrize("name", WITH_GRADIENTS + WITHOUT_GRADIENTS)
def test_mask_as_in_transformers(name: str) -> None:
    case = Case(name)
    expected = case.get("masked", "out_hf_bug")
    has_gradients = any(key.startswith("grad.") for key in expected)
    run = evaluate_with_gradients if has_gradients else jax.jit(evaluate)
    inputs = case.get("masked", "in")
    assert_all_close(run(case.load(hf_mask_compat=True), inputs), expected)
    if has_gradients or name.startswith("base_h64"):
        correct = case.get("masked", "out_correct")
        assert any(np.max(np.abs(expected[key] - correct[key])) > 0.1 for key in correct)


def test_equal_queries_and_keys() -> None:
    case = Case("base_qk_equal_nan")
    outputs = jax.jit(evaluate)(case.load(), case.get("full", "in"))
    assert_all_close(outputs, case.get("full", "out_correct"), tolerance=2e-3)


def test_the_pad_row_gets_its_gradient_from_the_tied_decoder_only() -> None:
    case = Case("mlm_h64_gelu_conv33_grads")
    name = "yoso.embeddings.word_embeddings.weight"
    model = case.load()
    pad = model.config.pad_token_id
    assert np.any(case.get("full", "out")[f"grad.{name}"][pad])

    def embed(model: PretrainedModel) -> jax.Array:
        ids = jnp.full((1, 4), pad)
        positions = jnp.arange(2, 6)[None]
        return jnp.sum(model.yoso.embeddings(ids, jnp.zeros_like(ids), positions, None) ** 3)

    gradients = to_state_dict(jax.jit(jax.grad(embed))(model))
    assert not np.any(gradients[name])
    assert np.any(gradients["yoso.embeddings.position_embeddings.weight"])
