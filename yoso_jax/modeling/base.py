"""What all Hugging Face architectures share: folders they are loaded from and saved to."""

import os
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from yoso_jax import pretrained
from yoso_jax.config import YosoConfig
from yoso_jax.modeling.layers import Policy


class PretrainedModel(nnx.Module):
    """A model of a Hugging Face architecture.

    Args:
        config: the architecture.
        dtype: type computed in (LayerNorm, attention and losses use float32 inside).
        param_dtype: type the parameters are kept in.
        rngs: initialises the parameters from its `params` stream; not kept.
    """

    def __init__(
        self,
        config: YosoConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self._build(config, Policy(dtype, param_dtype), rngs)

    def _build(self, config: YosoConfig, policy: Policy, rngs: nnx.Rngs) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained[M: "PretrainedModel"](
        cls: type[M],
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
        **overrides: Any,
    ) -> M:
        """Loads a model from a folder in Hugging Face's layout.

        Args:
            folder: holds config.json and model.safetensors, or pytorch_model.bin (read without
                PyTorch; nothing in it is executed), or shards of either with their index.
            dtype: type computed in.
            param_dtype: type the parameters are kept in.
            rngs: initialises a head that the file lacks; None seeds with 0.
            **overrides: fields of the configuration to set to other values than the file's.

        Raises:
            FileNotFoundError: config.json or the weights are not there.
            ValueError: the configuration or a file is damaged, or parameters are missing,
                unexpected or of a wrong shape: one message lists all of them.

        Warns:
            UserWarning: a whole head is absent from the file (initialised afresh) or in the file
                but not in the model, or a decoder is not tied; one warning names all of them.
        """

        def build(config: YosoConfig, rngs: nnx.Rngs) -> M:
            return cls(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        rngs = nnx.Rngs(0) if rngs is None else rngs
        return pretrained.load(build, folder, param_dtype=param_dtype, rngs=rngs, **overrides)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "50GB"
    ) -> None:
        """Saves config.json and model.safetensors, as transformers reads them.

        Files are written in full beside the old ones before they replace them, so a failed save
        leaves the folder as it was. Other files in the folder are left alone.

        Args:
            folder: made if there is none; weights and config.json in it are replaced.
            max_shard_size: bytes, or a string such as "200MB" or "5GB" (powers of ten); larger
                weights are split into shards with a model.safetensors.index.json.

        Raises:
            NotADirectoryError: `folder` is a file.
            ValueError: `max_shard_size` is no size.
        """
        pretrained.save(self, self.config, folder, max_shard_size=max_shard_size)
