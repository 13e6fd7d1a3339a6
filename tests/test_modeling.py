"""How the models behave; the numbers are in test_modeling_vectors.py."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from yoso_jax.config import YosoConfig
from yoso_jax.conversion import to_state_dict
from yoso_jax.losses import cross_entropy, question_answering_loss, sequence_classification_loss
from yoso_jax.modeling import (
    YosoForMaskedLM,
    YosoForMultipleChoice,
    YosoForQuestionAnswering,
    YosoForSequenceClassification,
    YosoForTokenClassification,
    YosoModel,
    layers,
)
from yoso_jax.modeling.inputs import check_mask
from yoso_jax.modeling.layers import DepthwiseConv, Policy, SelfAttention

CONFIG = YosoConfig(
    vocab_size=23,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    type_vocab_size=2,
    hash_code_len=4,
    num_hash=4,
    conv_window=3,
    num_labels=3,
    initializer_range=0.5,
)
SAMPLED = CONFIG.replace(use_expectation=False)
SOFTMAX = CONFIG.replace(attention="softmax")
# For what does not depend on the number of layers.
SHALLOW = CONFIG.replace(num_hidden_layers=1)
IDS = np.random.default_rng(0).integers(2, 23, (3, 9))
MASK = np.arange(9) < np.array([[9], [5], [0]])


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """These models run once or twice, so that optimising them costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.partial(jax.jit, static_argnames=("deterministic", "output_all"))
def run(model: Any, *args: Any, output_all: bool = False, **options: Any) -> Any:
    seeds = options.pop("seeds", {})
    rngs = nnx.Rngs(**{stream: jax.random.key(seed) for stream, seed in seeds.items()})
    return model(
        *args, rngs=rngs, output_hidden_states=output_all, output_attentions=output_all, **options
    )


def make(cls: Any = YosoModel, config: YosoConfig = CONFIG, **options: Any) -> Any:
    return cls(config, rngs=nnx.Rngs(0), **options)


def loss_and_gradients(model: Any, seed: int = 0) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Of a masked LM in training."""

    @jax.jit
    def compute(model: Any) -> tuple[jax.Array, Any]:
        def loss(model: Any) -> jax.Array:
            rngs = nnx.Rngs(hash=seed, dropout=seed + 1)
            return model(IDS, MASK, labels=IDS, deterministic=False, rngs=rngs).loss

        return jax.value_and_grad(loss)(model)

    value, gradients = compute(model)
    return value, to_state_dict(gradients)


@pytest.fixture(scope="module")
def looped() -> tuple[jax.Array, dict[str, jax.Array]]:
    return loss_and_gradients(make(YosoForMaskedLM, SAMPLED))


def test_every_parameter_is_trained(looped: Any) -> None:
    for key, gradient in looped[1].items():
        assert np.all(np.isfinite(gradient)), key
        assert np.any(gradient), key


@pytest.mark.parametrize("scan_layers", [False, True])
def test_scanned_and_recomputed_layers_change_nothing(looped: Any, scan_layers: bool) -> None:
    policy = "dots_saveable" if scan_layers else "nothing_saveable"
    config = SAMPLED.replace(scan_layers=scan_layers, remat=True, remat_policy=policy)
    loss, gradients = loss_and_gradients(make(YosoForMaskedLM, config))
    np.testing.assert_allclose(loss, looped[0], rtol=1e-5)
    assert gradients.keys() == looped[1].keys()
    for key, gradient in gradients.items():
        np.testing.assert_allclose(gradient, looped[1][key], atol=1e-5, err_msg=key)


@pytest.mark.parametrize("config", [CONFIG, SOFTMAX], ids=lambda config: config.attention)
def test_scanned_layers_return_the_same_states(config: YosoConfig) -> None:
    looped, scanned = (
        run(make(config=config.replace(scan_layers=scan)), IDS, MASK, output_all=True)
        for scan in (False, True)
    )
    assert len(looped.hidden_states) == 3
    assert len(looped.attentions) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), looped, scanned)
    np.testing.assert_array_equal(looped.hidden_states[-1], looped.last_hidden_state)


def test_dropout_and_hashes_follow_the_seed() -> None:
    model = make(config=SAMPLED.replace(num_hidden_layers=1))

    def evaluate(deterministic: bool, **seeds: int) -> np.ndarray:
        return np.asarray(
            run(model, IDS, MASK, seeds=seeds, deterministic=deterministic).last_hidden_state
        )

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        # To rounding: a GPU adds the rows of a bucket in any order.
        return np.allclose(a, b, atol=1e-5)

    first = evaluate(True, hash=1, dropout=1)
    assert same(evaluate(True, hash=1, dropout=2), first)
    assert not same(evaluate(True, hash=2, dropout=1), first)
    dropped = evaluate(False, hash=1, dropout=1)
    assert not same(dropped, first)
    assert same(evaluate(False, hash=1, dropout=1), dropped)
    assert not same(evaluate(False, hash=1, dropout=2), dropped)


def test_each_layer_draws_its_own_hashes() -> None:
    # Two identical layers that pass their input on: only the hashes can tell their contexts apart.
    model = make(config=SAMPLED.replace(conv_window=None, layer_norm_eps=1e-12))
    first, second = model.encoder.layers
    for layer in (first, second):
        for part in (layer.attention_output, layer.output):
            nnx.update(part, jax.tree.map(jnp.zeros_like, nnx.state(part)))
    nnx.update(second, nnx.state(first))
    outputs = run(model, IDS, seeds={"hash": 0}, output_all=True)
    before_first, before_second, _ = outputs.hidden_states
    np.testing.assert_allclose(before_first, before_second, atol=1e-5)
    assert not np.allclose(*outputs.attentions, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"num_hashes": None, "hash_code_len": 4, "hash_fn": "fast", "backward": "sampled"}),
        ({"use_expectation": False, "num_hash": 7}, {"num_hashes": 7, "bit_layout": "spread"}),
        ({"use_fast_hash": False, "bit_layout": "block"}, {"hash_fn": "gaussian"}),
        ({"lsh_backward": False}, {"backward": "expectation", "implementation": None}),
        ({"attention_implementation": "xla", "bit_layout": "block"}, {"implementation": "xla"}),
        ({"attention_backward": "auto"}, {"backward": None, "num_backward_hashes": None}),
        (
            {"attention_backward": "bucketed", "num_backward_hashes": 9, "bucket_bits": 2}
            | {"num_hash": 7},
            {"backward": "bucketed", "num_backward_hashes": 7, "bucket_bits": 2},
        ),
    ],
)
def test_the_configuration_reaches_the_op(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    seen = {}

    def attention(query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen.update(options)
        return value

    monkeypatch.setattr(layers, "yoso_attention", attention)
    make(config=SHALLOW.replace(**changes))(IDS, rngs=nnx.Rngs(0))
    assert seen.items() >= expected.items()


def test_sampling_approaches_the_expectation() -> None:
    exact = run(make(config=SHALLOW), IDS, MASK).last_hidden_state

    def error(num_hash: int) -> float:
        model = make(config=SHALLOW.replace(use_expectation=False, num_hash=num_hash))
        sampled = run(model, IDS, MASK, seeds={"hash": 0}).last_hidden_state
        return float(jnp.mean(jnp.abs((sampled - exact)[MASK])))

    assert error(2048) < 0.2 * error(8)


@pytest.mark.parametrize("attention", ["yoso", "softmax"])
def test_padding_does_not_move_valid_tokens(attention: Any) -> None:
    config = SHALLOW.replace(attention=attention)
    model = make(config=config)
    short = run(model, IDS[:1, :5]).last_hidden_state
    noise = IDS.copy()
    noise[:, 5:] = 7
    mask = np.arange(9) < 5
    long = run(model, noise[:1], mask[None]).last_hidden_state
    np.testing.assert_allclose(long[:, :5], short, atol=1e-5)
    compat = make(config=config.replace(hf_mask_compat=True))
    assert not np.allclose(run(compat, noise[:1], mask[None]).last_hidden_state[:, :5], short)


@pytest.mark.parametrize("conv_window", [None, 3])
def test_softmax_attention(conv_window: int | None) -> None:
    config = SOFTMAX.replace(conv_window=conv_window, use_expectation=False)
    attention = SelfAttention(config, Policy(jnp.float32, jnp.float32), rngs=nnx.Rngs(0))
    mask = MASK & (np.arange(9) != 2)
    inputs = jax.random.normal(jax.random.key(0), (*MASK.shape, 16))

    def expected(attention: SelfAttention, x: jax.Array) -> jax.Array:
        query, key, value = (
            module(x).reshape(3, 9, 2, 8)
            for module in (attention.query, attention.key, attention.value)
        )
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8)
        scores = jnp.where(mask[:, None, None, :], scores, -1e30)
        context = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)
        context = jnp.where(mask[:, :, None, None], context, 0)
        if attention.conv is not None:
            context += attention.conv(jnp.where(mask[:, :, None, None], value, 0))
        return context.reshape(x.shape)

    def actual(attention: SelfAttention, x: jax.Array) -> jax.Array:
        return attention(x, jnp.asarray(mask), None)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function: Any, attention: SelfAttention, x: jax.Array) -> Any:
        def loss(attention: SelfAttention, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            context = function(attention, x)
            return jnp.sum(jnp.sin(context)), context

        return jax.grad(loss, (0, 1), has_aux=True)(attention, x)

    results = (with_gradients(function, attention, inputs) for function in (actual, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *results)


def test_masks_may_be_integers_floats_or_booleans() -> None:
    for dtype in (np.int32, np.int64, np.float32):
        np.testing.assert_array_equal(check_mask(MASK.astype(dtype), MASK.shape), MASK)


def test_defaults_are_zeros_ones_and_positions_from_two() -> None:
    model = make(config=SHALLOW)
    spelled_out = run(model, IDS, np.ones_like(IDS), np.zeros_like(IDS), np.arange(2, 11)[None])
    defaults = run(model, IDS)
    np.testing.assert_allclose(defaults.last_hidden_state, spelled_out.last_hidden_state, atol=1e-6)


def test_initialisation() -> None:
    model = make(YosoForMaskedLM, CONFIG.replace(hidden_size=64, initializer_range=0.1))
    for key, value in to_state_dict(model).items():
        if "LayerNorm.weight" in key:
            assert np.all(value == 1), key
        elif key.endswith("bias"):
            assert not np.any(value), key
        elif value.size > 500:
            assert abs(np.std(value) - 0.1) < 0.01, key
    assert not np.any(model.yoso.embeddings.word_embeddings.embedding[CONFIG.pad_token_id])


def test_dtypes() -> None:
    model = make(YosoForMaskedLM, SHALLOW, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    outputs = run(model, IDS, MASK, labels=IDS)
    assert outputs.logits.dtype == jnp.bfloat16
    assert outputs.loss.dtype == jnp.float32
    exact = run(make(YosoForMaskedLM, SHALLOW), IDS, MASK, labels=IDS).logits
    atol = 0.05 * np.max(np.abs(exact))
    np.testing.assert_allclose(outputs.logits.astype(jnp.float32), exact, atol=atol)
    halved = make(YosoForMaskedLM, SHALLOW, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(halved))} == {jnp.dtype(jnp.bfloat16)}
    assert run(halved, IDS, MASK).logits.dtype == jnp.bfloat16


@pytest.mark.usefixtures("unchecked_shapes")
def test_ids_of_any_integer_type_and_lists() -> None:
    """A pad id beyond uint8 must not make its remainder a padding id."""
    config = SHALLOW.replace(vocab_size=300, pad_token_id=257)
    ids = np.array([[1, 5, 1]], np.uint8)

    def gradient(ids: np.ndarray) -> Any:
        def loss(model: Any) -> jax.Array:
            return jnp.sum(model(ids).last_hidden_state[..., 0])

        return jax.jit(jax.grad(loss))(make(config=config)).embeddings.word_embeddings.embedding

    narrow = gradient(ids)[...]
    assert np.any(narrow[1])
    np.testing.assert_allclose(narrow, gradient(ids.astype(np.int64))[...], atol=1e-6)
    model = make(YosoForQuestionAnswering, config)
    positions = {"start_positions": np.array([[1]]), "end_positions": np.array([[2]])}
    listed = model(ids.tolist(), position_ids=[[2, 3, 4]], **positions)
    expected = model(ids, start_positions=np.array([1]), end_positions=np.array([2]))
    np.testing.assert_allclose(listed.loss, expected.loss, rtol=1e-6)
    with pytest.raises(ValueError, match="input_ids must fit in 32 bits"):
        model(ids.astype(np.int64) + 2**32)
    with pytest.raises(ValueError, match=r"needs random keys: pass rngs=nnx\.Rngs"):
        make(config=SAMPLED)(IDS, rngs=jax.random.key(0))


def test_models_hold_no_random_state() -> None:
    model = make(YosoForSequenceClassification, SAMPLED)
    leaves = nnx.to_flat_state(nnx.state(model))
    assert all(isinstance(variable, nnx.Param) for _, variable in leaves)


def test_abstract_construction_and_split_step() -> None:
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), abstract)
    outputs = jax.jit(lambda params: nnx.merge(graphdef, params)(IDS))(params)
    assert outputs.last_hidden_state.shape == (3, 9, 16)


def test_convolution_is_a_cross_correlation_of_each_head() -> None:
    conv = DepthwiseConv(
        CONFIG.replace(conv_window=5), Policy(jnp.float32, jnp.float32), rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).normal(size=(2, 7, 2, 8)).astype(np.float32)
    expected = np.zeros_like(x)
    for t in range(7):
        for i in range(5):
            if 0 <= t + i - 2 < 7:
                expected[:, t] += x[:, t + i - 2] * np.asarray(conv.filters[i])[:, None]
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, atol=1e-5)


def test_masked_lm_head() -> None:
    outputs = run(make(YosoForMaskedLM, SHALLOW), IDS, MASK, labels=IDS)
    assert outputs.logits.shape == (3, 9, 23)
    np.testing.assert_allclose(outputs.loss, cross_entropy(outputs.logits, jnp.asarray(IDS)))


def test_untied_decoder_does_not_use_the_word_embeddings() -> None:
    model = make(YosoForMaskedLM, SHALLOW.replace(tie_word_embeddings=False))
    assert model.head.decoder.kernel.shape == (16, 23)
    x = jnp.ones((1, 1, 16))
    words = model.yoso.embeddings.word_embeddings
    before = model.head(x, words)
    words.embedding[...] = words.embedding[...] * 2
    np.testing.assert_array_equal(model.head(x, words), before)


@pytest.mark.parametrize(
    "labels", [np.array([0, 1, 2]), np.array([[1.0, 0.0, 1.0]] * 3, np.float32)]
)
def test_sequence_classification_head(labels: np.ndarray) -> None:
    outputs = run(make(YosoForSequenceClassification, SHALLOW), IDS, MASK, labels=labels)
    assert outputs.logits.shape == (3, 3)
    expected = sequence_classification_loss(outputs.logits, jnp.asarray(labels))
    np.testing.assert_allclose(outputs.loss, expected, rtol=1e-6)


def test_token_classification_ignores_the_labels_of_padding() -> None:
    labels = jnp.asarray(IDS % 3)
    outputs = run(make(YosoForTokenClassification, SHALLOW), IDS, MASK, labels=labels)
    assert outputs.logits.shape == (3, 9, 3)
    expected = cross_entropy(outputs.logits, labels, where=jnp.asarray(MASK))
    np.testing.assert_allclose(outputs.loss, expected, rtol=1e-6)


def test_question_answering_head() -> None:
    starts, ends = jnp.array([0, 3, 9]), jnp.array([2, 4, 12])
    model = make(YosoForQuestionAnswering, SHALLOW)
    outputs = run(model, IDS, MASK, start_positions=starts, end_positions=ends)
    assert outputs.start_logits.shape == outputs.end_logits.shape == (3, 9)
    x = model.yoso(IDS, MASK).last_hidden_state
    start, end = jnp.unstack(model.qa_outputs(x), axis=-1)
    np.testing.assert_allclose(outputs.start_logits, start, atol=1e-5)
    np.testing.assert_allclose(outputs.end_logits, end, atol=1e-5)
    expected = question_answering_loss(start, end, starts, ends)
    np.testing.assert_allclose(outputs.loss, expected, rtol=1e-5)


def test_multiple_choice_head() -> None:
    ids = np.stack([IDS, IDS[::-1]])
    model = make(YosoForMultipleChoice, SHALLOW)
    outputs = run(model, ids, labels=np.array([0, 2]), output_all=True)
    assert outputs.logits.shape == (2, 3)
    assert outputs.hidden_states[0].shape == (6, 9, 16)
    expected = cross_entropy(outputs.logits, jnp.array([0, 2]))
    np.testing.assert_allclose(outputs.loss, expected, rtol=1e-6)
    np.testing.assert_allclose(outputs.logits[0], outputs.logits[1, ::-1], atol=1e-5)


def test_outputs_are_frozen_pytrees() -> None:
    outputs = run(make(YosoForMaskedLM, SHALLOW), IDS)
    assert outputs.loss is outputs.hidden_states is outputs.attentions is None
    assert len(jax.tree.leaves(outputs)) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        outputs.loss = 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds must be given, got neither"),
        ({"input_ids": IDS, "inputs_embeds": np.zeros((3, 9, 16))}, "must be given, got both"),
        ({"input_ids": IDS + 5}, "input_ids must be in [0, 23), got 7..27"),
        ({"input_ids": IDS - 5}, "input_ids must be in [0, 23), got -3"),
        ({"input_ids": IDS[0]}, "input_ids must be [batch, tokens], got shape (9,)"),
        ({"input_ids": IDS * 1.0}, "input_ids must be integers (3, 9), got float"),
        ({"input_ids": np.ones((1, 13), int)}, "at most max_position_embeddings=12 tokens, got 13"),
        (
            {"inputs_embeds": np.zeros((3, 9, 8))},
            "inputs_embeds must be floats [batch, tokens, 16]",
        ),
        ({"inputs_embeds": np.zeros((9, 16))}, "inputs_embeds must be [batch, tokens, 16]"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, :8]},
            "attention_mask must have shape (3, 9), got (3, 8)",
        ),
        (
            {"input_ids": IDS, "attention_mask": np.where(MASK, 0.0, -10000.0)},
            "attention_mask must hold 0 (padding) and 1 (real token) or booleans",
        ),
        ({"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids must be in [0, 2)"),
        ({"input_ids": IDS, "token_type_ids": MASK}, "token_type_ids must be integers (3, 9)"),
        (
            {"input_ids": IDS, "position_ids": np.arange(6, 15)[None]},
            "position_ids must be in [0, 14), got 6..14",
        ),
        ({"input_ids": IDS, "position_ids": np.arange(9)}, "position_ids must be integers (3, 9)"),
        ({"input_ids": IDS, "deterministic": False}, "dropout (deterministic=False) needs random"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(config=SHALLOW)(**arguments)


def test_refuses_sampling_without_keys() -> None:
    for rngs in (None, nnx.Rngs(dropout=0)):
        with pytest.raises(ValueError, match=re.escape("pass rngs=nnx.Rngs(hash=seed_or_key)")):
            make(config=SAMPLED)(IDS, rngs=rngs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make(YosoForMaskedLM, SHALLOW)(IDS, labels=IDS[:, :3]),
            "labels must be integers (3, 9), got int64 (3, 3)",
        ),
        (
            lambda: make(YosoForMaskedLM, SHALLOW)(IDS, labels=IDS + 9),
            "labels must be in [0, 23) or -100",
        ),
        (
            lambda: make(YosoForQuestionAnswering, SHALLOW)(IDS, start_positions=np.zeros(3, int)),
            "start_positions and end_positions must be given together",
        ),
        (lambda: make(YosoForMultipleChoice)(IDS), "input_ids must be [batch, choices, tokens]"),
        (
            lambda: make(YosoForMultipleChoice)(IDS[None], MASK[None].repeat(2, 1)),
            "all inputs must have the same batch and choice axes",
        ),
    ],
)
def test_heads_refuse(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message).replace("int64", r"int\d+")):
        call()


def test_token_types_start_at_zero():
    config = YosoConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    embeddings = YosoModel(config, rngs=nnx.Rngs(0)).embeddings
    assert not embeddings.token_type_embeddings.embedding[...].any()
    assert embeddings.position_embeddings.embedding[...].std() > 0.01
