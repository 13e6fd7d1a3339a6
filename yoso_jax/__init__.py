"""YOSO attention for JAX: linear-cost self-attention by Bernoulli sampling with LSH.

Zeng et al., You Only Sample (Almost) Once, ICML 2021, arXiv 2111.09714.
"""

from yoso_jax import kernels as kernels
from yoso_jax.attention import yoso_attention as yoso_attention
from yoso_jax.auto import load_pretrained as load_pretrained
from yoso_jax.config import YosoConfig as YosoConfig
from yoso_jax.lra import LRAClassifier as LRAClassifier
from yoso_jax.lra import LRAConfig as LRAConfig
from yoso_jax.modeling import YosoForMaskedLM as YosoForMaskedLM
from yoso_jax.modeling import YosoForMultipleChoice as YosoForMultipleChoice
from yoso_jax.modeling import YosoForQuestionAnswering as YosoForQuestionAnswering
from yoso_jax.modeling import YosoForSequenceClassification as YosoForSequenceClassification
from yoso_jax.modeling import YosoForTokenClassification as YosoForTokenClassification
from yoso_jax.modeling import YosoModel as YosoModel

__version__ = "0.1.0"
