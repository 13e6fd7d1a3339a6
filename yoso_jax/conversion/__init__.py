"""Checkpoints in and out: Hugging Face's, PyTorch's and the YOSO authors' files, and Orbax."""

from yoso_jax.conversion.files import read_tensors as read_tensors
from yoso_jax.conversion.names import to_state_dict as to_state_dict
from yoso_jax.conversion.torch_files import TorchFileError as TorchFileError
from yoso_jax.conversion.torch_files import read_torch_file as read_torch_file
from yoso_jax.conversion.torch_files import read_torch_tensors as read_torch_tensors
