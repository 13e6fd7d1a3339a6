"""The encoder: attention, feed-forward blocks, and their stack.

Every layer is called with explicit keys. A None `dropout_key` means no dropout; a None `hash_key`
is only possible where `config.is_sampled` is false.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from yoso_jax.activations import ACTIVATIONS
from yoso_jax.attention import yoso_attention
from yoso_jax.batch_sharding import ambient_batch_axes
from yoso_jax.config import EncoderConfig
from yoso_jax.modeling.inputs import draw_key
from yoso_jax.modeling.lookup import look_up
from yoso_jax.modeling.outputs import BaseModelOutput

NormPosition = Literal["pre", "post"]


@dataclasses.dataclass(frozen=True)
class Policy:
    """The types a module computes in and keeps its parameters in."""

    dtype: DTypeLike
    param_dtype: DTypeLike


class Linear(nnx.Linear):
    """Kernel [in, out] ~ N(0, initializer_range), zero bias."""

    def __init__(
        self,
        config: EncoderConfig,
        in_features: int,
        out_features: int,
        policy: Policy,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            dtype=policy.dtype,
            param_dtype=policy.param_dtype,
            rngs=rngs,
        )


class Embed(nnx.Embed):
    """A table [rows, hidden] ~ N(0, initializer_range)."""

    def __init__(self, config: EncoderConfig, rows: int, policy: Policy, *, rngs: nnx.Rngs) -> None:
        super().__init__(
            rows,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            dtype=policy.dtype,
            param_dtype=policy.param_dtype,
            rngs=rngs,
        )

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        """Rows of the table, see `look_up`."""
        return look_up(self.dtype, self.embedding[...], ids)


class LayerNorm(nnx.LayerNorm):
    """A LayerNorm over the hidden axis, computed in float32."""

    def __init__(self, config: EncoderConfig, policy: Policy, *, rngs: nnx.Rngs) -> None:
        super().__init__(
            config.hidden_size,
            epsilon=config.layer_norm_eps,
            dtype=jnp.float32,
            param_dtype=policy.param_dtype,
            # E[x^2] - E[x]^2 loses the digits that an epsilon of 1e-12 counts on.
            use_fast_variance=False,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """Returns the input's dtype."""
        return super().__call__(x).astype(x.dtype)


class Dropout(nnx.Dropout):
    """A dropout that keeps no random state."""

    def __call__(self, x: Float[Array, "..."], key: PRNGKeyArray | None) -> Float[Array, "..."]:
        """Drops with `key`, or nothing if that is None."""
        return super().__call__(x, deterministic=key is None, rngs=key)


class DepthwiseConv(nnx.Module):
    """Cross-correlation along the sequence, one filter a head, zero padded, without bias.

    Filters [window, heads] ~ N(0, initializer_range), shared by a head's channels.
    """

    def __init__(self, config: EncoderConfig, policy: Policy, *, rngs: nnx.Rngs) -> None:
        initializer = nnx.initializers.normal(config.initializer_range)
        shape = (config.conv_window, config.num_attention_heads)
        self.filters = nnx.Param(initializer(rngs.params(), shape, policy.param_dtype))

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Sums in float32; returns the input's dtype."""
        filters = self.filters[...].astype(jnp.float32)
        window, tokens = filters.shape[0], x.shape[1]
        margin = window // 2
        padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (margin, margin), (0, 0), (0, 0)))
        # One fused elementwise sum: XLA's grouped convolutions are far slower, above all backwards.
        total = jnp.zeros(x.shape, jnp.float32)
        for i in range(window):
            total += padded[:, i : i + tokens] * filters[i, :, None]
        return total.astype(x.dtype)


class SelfAttention(nnx.Module):
    """Multi-head attention up to the merged context: YOSO (paper, section 3) or softmax."""

    def __init__(self, config: EncoderConfig, policy: Policy, *, rngs: nnx.Rngs) -> None:
        self.config = config
        size = config.hidden_size
        self.query = Linear(config, size, size, policy, rngs=rngs)
        self.key = Linear(config, size, size, policy, rngs=rngs)
        self.value = Linear(config, size, size, policy, rngs=rngs)
        has_conv = config.conv_window is not None
        self.conv = DepthwiseConv(config, policy, rngs=rngs) if has_conv else None

    def __call__(
        self,
        x: Float[Array, "B T hidden"],
        mask: Bool[Array, "B T"] | None,
        hash_key: PRNGKeyArray | None,
    ) -> Float[Array, "B T hidden"]:
        """Masked tokens neither attend nor are attended to, nor enter the convolution."""
        config = self.config
        heads = (*x.shape[:2], config.num_attention_heads, config.head_dim)
        query, key, value = (
            project(x).reshape(heads) for project in (self.query, self.key, self.value)
        )
        attention_mask = None if config.hf_mask_compat else mask
        if config.attention == "softmax":
            context = _softmax_attention(config, query, key, value, attention_mask)
        else:
            num_backward_hashes = config.num_backward_hashes
            if num_backward_hashes is not None:
                num_backward_hashes = min(num_backward_hashes, config.num_hash)
            context = yoso_attention(
                query,
                key,
                value,
                attention_mask,
                rng=hash_key,
                num_hashes=config.num_hash if config.is_sampled else None,
                hash_code_len=config.hash_code_len,
                hash_fn="fast" if config.use_fast_hash else "gaussian",
                bit_layout=config.bit_layout,
                backward=config.backward,
                num_backward_hashes=num_backward_hashes,
                bucket_bits=config.bucket_bits,
                implementation=config.attention_implementation,
                batch_axes=ambient_batch_axes(x.shape[0]),
            )
        if self.conv is not None:
            if mask is not None:
                value = jnp.where(mask[:, :, None, None], value, 0)
            context += self.conv(value)
        return context.reshape(x.shape)


def _softmax_attention(
    config: EncoderConfig,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    mask: Bool[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """Scaled dot product attention; rows of masked tokens are zero, as YOSO's are."""
    pairs = None
    if mask is not None:
        # cuDNN wants a row of the mask for each query.
        batch, tokens = mask.shape
        pairs = jnp.broadcast_to(mask[:, None, None, :], (batch, 1, tokens, tokens))
    implementation: Any = config.attention_implementation
    context = jax.nn.dot_product_attention(
        query, key, value, mask=pairs, implementation=implementation
    )
    return context if mask is None else jnp.where(mask[:, :, None, None], context, 0)


class Block(nnx.Module):
    """A transformer layer: attention and a feed-forward block, each with a residual connection.

    "post" normalises after adding to the residual stream (BERT), "pre" before each half (LRA).
    """

    def __init__(
        self, config: EncoderConfig, policy: Policy, *, norm: NormPosition, rngs: nnx.Rngs
    ) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.norm = norm
        self.activation = ACTIVATIONS[config.hidden_act]
        self.attention = SelfAttention(config, policy, rngs=rngs)
        self.attention_output = Linear(config, hidden, hidden, policy, rngs=rngs)
        self.attention_norm = LayerNorm(config, policy, rngs=rngs)
        self.intermediate = Linear(config, hidden, inner, policy, rngs=rngs)
        self.output = Linear(config, inner, hidden, policy, rngs=rngs)
        self.output_norm = LayerNorm(config, policy, rngs=rngs)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        x: Float[Array, "B T hidden"],
        mask: Bool[Array, "B T"] | None,
        hash_key: PRNGKeyArray | None,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T hidden"], Float[Array, "B T hidden"]]:
        """Returns the layer's output and the attention's merged context."""
        keys = (None, None) if dropout_key is None else tuple(jax.random.split(dropout_key))
        context = self.attention(self._before(self.attention_norm, x), mask, hash_key)
        x = x + self.dropout(self.attention_output(context), keys[0])
        x = self._after(self.attention_norm, x)
        inner = self.activation(self.intermediate(self._before(self.output_norm, x)))
        x = x + self.dropout(self.output(inner), keys[1])
        return self._after(self.output_norm, x), context

    def _before(self, norm: LayerNorm, x: Array) -> Array:
        return norm(x) if self.norm == "pre" else x

    def _after(self, norm: LayerNorm, x: Array) -> Array:
        return norm(x) if self.norm == "post" else x


class Encoder(nnx.Module):
    """A stack of `Block`s, looped over or (`config.scan_layers`) scanned.

    Both start from the same parameters for the same `rngs` and draw the same hashes and dropout.
    """

    def __init__(
        self, config: EncoderConfig, policy: Policy, *, norm: NormPosition = "post", rngs: nnx.Rngs
    ) -> None:
        self.config = config

        def make(key: PRNGKeyArray) -> Block:
            return Block(config, policy, norm=norm, rngs=nnx.Rngs(params=key))

        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.layers: Any = nnx.vmap(make)(keys) if config.scan_layers else nnx.List(map(make, keys))

    def __call__(
        self,
        x: Float[Array, "B T hidden"],
        mask: Bool[Array, "B T"] | None,
        *,
        deterministic: bool,
        rngs: nnx.Rngs | None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """Draws one key a pass from the `hash` and `dropout` streams, if they are needed.

        Raises:
            ValueError: a needed stream is missing.
        """
        hash_key = None
        if self.config.is_sampled:
            hash_key = draw_key(rngs, "hash", "sampled attention (use_expectation=False)")
        dropout_key = draw_dropout_key(self.config, deterministic, rngs)
        depth = self.config.num_hidden_layers
        keys = jax.tree.map(lambda key: jax.random.split(key, depth), (hash_key, dropout_key))

        def step(x: Array, layer: Block, keys: Any) -> tuple[Array, Any]:
            y, context = layer(x, mask, *keys)
            return y, (x if output_hidden_states else None, context if output_attentions else None)

        if self.config.remat:
            policy = getattr(jax.checkpoint_policies, self.config.remat_policy)
            step = jax.checkpoint(step, policy=policy)
        if self.config.scan_layers:
            x, (inputs, contexts) = lax.scan(lambda x, xs: step(x, *xs), x, (self.layers, keys))
        else:
            inputs, contexts = [], []
            for i in range(depth):
                layer_keys = jax.tree.map(lambda key, i=i: key[i], keys)
                x, (layer_input, context) = step(x, self.layers[i], layer_keys)
                inputs.append(layer_input)
                contexts.append(context)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(contexts) if output_attentions else None,
        )


def draw_dropout_key(
    config: EncoderConfig, deterministic: bool, rngs: nnx.Rngs | None
) -> PRNGKeyArray | None:
    """A key for dropout, None where nothing is dropped.

    Raises:
        ValueError: the dropout stream is missing.
    """
    if deterministic or config.hidden_dropout_prob == 0:
        return None
    return draw_key(rngs, "dropout", "dropout (deterministic=False)")
