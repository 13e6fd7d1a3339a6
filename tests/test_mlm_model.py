"""What is pretrained agrees with the masked language model that is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mlm_helpers import VOCABULARY, make_stream, random_documents
from run_helpers import fast_compilations

from yoso_jax import YosoConfig, YosoForMaskedLM
from yoso_jax.data.masking import Masking
from yoso_jax.data.mlm import eval_batches
from yoso_jax.data.mlm_examples import ExampleMaker
from yoso_jax.modeling.layers import Policy
from yoso_jax.modeling.pretraining import PretrainingModel
from yoso_jax.pretraining.losses import pretraining_sums

CONFIG = YosoConfig(
    vocab_size=VOCABULARY.size,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    type_vocab_size=2,
)


@pytest.fixture(autouse=True, scope="module")
def compilations():
    with fast_compilations():
        yield


@pytest.fixture(scope="module")
def masked_lm(compilations):
    return YosoForMaskedLM(CONFIG, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("with_order", [False, True], ids=["masks", "order"])
def test_loss_is_that_of_the_masked_language_model(tmp_path, masked_lm, with_order):
    stream = make_stream(tmp_path, random_documents(6))
    maker = ExampleMaker(VOCABULARY, Masking(), 32, seed=0, with_order=with_order)
    *_, batch = eval_batches(stream, maker, batch_size=4)
    batch = jax.tree.map(jnp.asarray, batch)
    policy = Policy(jnp.float32, jnp.float32)
    model = PretrainingModel(masked_lm, policy, with_order=with_order, rngs=nnx.Rngs(1))
    assert 0 < batch["weight"].sum() < 4  # some rows only fill up

    types = batch.get("token_type_ids")
    inputs = batch["input_ids"], batch["attention_mask"]
    logits, order_logits = jax.jit(model)(*inputs, batch["positions"], types)
    sums = pretraining_sums(logits, order_logits, batch)

    labels = np.full((4, 32), -100, np.int32)
    for row in np.flatnonzero(batch["weight"]):
        count = int((batch["labels"][row] >= 0).sum())
        labels[row, batch["positions"][row, :count]] = batch["labels"][row, :count]
    expected = jax.jit(masked_lm)(*inputs, types, labels=labels)
    assert sums["count"] == (labels >= 0).sum() > 0
    np.testing.assert_allclose(sums["loss"] / sums["count"], expected.loss, rtol=1e-5)
    hits = (expected.logits.argmax(-1) == labels).sum()
    assert sums["correct"] == hits

    assert ("order_loss" in sums) == (order_logits is not None) == with_order
    if with_order:
        asked = (batch["weight"] > 0) & (batch["order_labels"] >= 0)
        rows = np.flatnonzero(asked)
        losses = -jax.nn.log_softmax(order_logits)[rows, batch["order_labels"][rows]]
        assert sums["order_count"] == rows.size > 0
        np.testing.assert_allclose(sums["order_loss"], losses.sum(), rtol=1e-5)


def test_the_kept_model_is_not_changed_by_the_order(masked_lm):
    before = jax.tree.map(np.asarray, nnx.state(masked_lm, nnx.Param))
    policy = Policy(jnp.float32, jnp.float32)
    model = PretrainingModel(masked_lm, policy, with_order=True, rngs=nnx.Rngs(1))
    after = nnx.state(model.masked_lm, nnx.Param)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_nothing_to_predict():
    batch = {"labels": jnp.full((2, 3), -100), "order_labels": jnp.full(2, -100)}
    sums = pretraining_sums(jnp.zeros((2, 3, 5)), jnp.zeros((2, 2)), batch)
    assert all(value == 0 for value in sums.values())
