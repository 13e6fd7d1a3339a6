"""Data sets and the batches made of them."""

from yoso_jax.data.listops import (
    ListOpsData,
    ListOpsSplit,
    evaluate,
    from_text,
    load_listops_tsv,
    prepare_listops,
    to_text,
)
from yoso_jax.data.listops_generator import VOCAB, ListOpsConfig
from yoso_jax.data.pipeline import eval_batches, make_iterator

__all__ = [
    "VOCAB",
    "ListOpsConfig",
    "ListOpsData",
    "ListOpsSplit",
    "eval_batches",
    "evaluate",
    "from_text",
    "load_listops_tsv",
    "make_iterator",
    "prepare_listops",
    "to_text",
]
