"""What all models share: files they are loaded from, and folders they are saved to."""

import os
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from yoso_jax.config import EncoderConfig, YosoConfig
from yoso_jax.conversion.load import load
from yoso_jax.conversion.names import HF, Layout
from yoso_jax.conversion.positions import PositionExtension
from yoso_jax.conversion.save import save
from yoso_jax.modeling.layers import Policy


class PretrainedModel(nnx.Module):
    """A model with a configuration.

    Args:
        config: the architecture.
        dtype: type computed in (LayerNorm, attention and losses use float32 inside).
        param_dtype: type the parameters are kept in.
        rngs: initialises the parameters from its `params` stream; not kept.
    """

    config_class: ClassVar[type[EncoderConfig]] = YosoConfig
    layout: ClassVar[Layout] = HF
    """Names of the parameters in files."""

    def __init__(
        self,
        config: Any,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self._build(config, Policy(dtype, param_dtype), rngs)

    def _build(self, config: Any, policy: Policy, rngs: nnx.Rngs) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained[M: "PretrainedModel"](
        cls: type[M],
        path: str | os.PathLike[str],
        *,
        config: EncoderConfig | str | os.PathLike[str] | None = None,
        position_extension: PositionExtension | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
        **overrides: Any,
    ) -> M:
        """Loads a model from a local checkpoint. `yoso_jax.load_pretrained` finds the class, too.

        PyTorch is not needed, and nothing in a file is executed.

        Args:
            path: a folder with config.json and model.safetensors or pytorch_model.bin, whole or in
                shards with their index; an Orbax directory of `scripts/convert.py`; or a single
                file of safetensors or `torch.save`, among them the YOSO authors' .model and .cp.
            config: the configuration, or the path of a JSON file with one (Hugging Face's or the
                authors'). None takes config.json in the folder, or beside a file.
            position_extension: "tile" or "interpolate" the file's position embeddings when
                `max_position_embeddings=` is given and larger.
            dtype: type computed in.
            param_dtype: type the parameters are kept in.
            rngs: initialises a head that the file lacks; None seeds with 0.
            **overrides: fields of the configuration to set to other values than the file's.

        Raises:
            FileNotFoundError: the configuration or the weights are not there.
            ValueError: the configuration or a file is damaged, or parameters are missing,
                unexpected or of a wrong shape: one message lists all of them.
            OSError: a file cannot be read.

        Warns:
            UserWarning: a whole head is absent from the file (initialised afresh) or in the file
                but not in the model, a decoder is not tied, or positions were added; one warning
                names all of them.
        """
        return load(
            [cls],
            path,
            config=config,
            position_extension=position_extension,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **overrides,
        )

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
        save(self, folder, max_shard_size=max_shard_size)
