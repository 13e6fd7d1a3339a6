"""Model configurations: frozen, hashable, validated when built.

`YosoConfig` has the field names and defaults of the configuration of the same name in Hugging Face
transformers, and reads and writes its `config.json`.
"""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from flax.core import FrozenDict

from yoso_jax.activations import ACTIVATIONS
from yoso_jax.kernels.backward_choice import BACKWARDS, Backward
from yoso_jax.kernels.dispatch import implementations
from yoso_jax.validation import Validated

CONFIG_FILE = "config.json"

RematPolicy = Literal["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Validated):
    """What every YOSO encoder is built from.

    Raises:
        ValueError: a field has a value of a wrong type or out of range; the message names the field
            and what is accepted.
    """

    model_type: ClassVar[str]
    """Says in a config.json which family of models it is of."""

    vocab_size: int = 50265
    """Rows of the word embeddings, >= 1."""
    hidden_size: int = 768
    """Width of the residual stream, a multiple of `num_attention_heads`."""
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    """Width inside the feed-forward block, >= 1."""
    hidden_act: str = "gelu"
    """A name of `yoso_jax.activations.ACTIVATIONS`."""
    hidden_dropout_prob: float = 0.1
    """Dropout after the embeddings, both halves of a layer, and in the heads; in [0, 1)."""
    max_position_embeddings: int = 4096
    """The longest sequence, >= 1."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights, >= 0; biases and token types start at zero."""
    layer_norm_eps: float = 1e-12
    """Epsilon of every LayerNorm, > 0."""

    use_expectation: bool = True
    """YOSO-E. False samples: YOSO-m with m = `num_hash`."""
    hash_code_len: int = 9
    """Bits of a hash, tau in the paper; 1..16."""
    num_hash: int = 64
    """Hashes drawn when sampling, >= 1."""
    conv_window: int | None = None
    """Odd length of the depthwise convolution beside attention; None for none."""
    use_fast_hash: bool = True
    """Project by fast Hadamard transforms; False by Gaussian matrices."""
    lsh_backward: bool = True
    """When sampling, estimate the gradient from the same hashes; False from the expectation."""

    # This project's own, unknown to transformers.
    attention: Literal["yoso", "softmax"] = "yoso"
    """What attends: YOSO, or softmax as the baseline to compare it with. With "softmax",
    `use_expectation`, `hash_code_len`, `num_hash`, `use_fast_hash`, `bit_layout` and what is about
    the backward pass do nothing; `conv_window` adds the same convolution. Parameters fit either,
    and transformers, which does not read this field, attends by YOSO."""
    bit_layout: Literal["spread", "block"] = "spread"
    """Which projections make up a fast hash; "block" is the published, biased layout."""
    attention_backward: Literal["auto", "sampled", "expectation", "bucketed"] | None = None
    """`backward` of `yoso_attention` when sampling; None for what `lsh_backward` says, "auto" for
    what is fastest. "bucketed" needs unbiased hashes, so no fast ones of layout "block"."""
    num_backward_hashes: int | None = None
    """Hashes that "bucketed" uses, >= 1 and at most `num_hash` of them; None for up to 8."""
    bucket_bits: int | None = None
    """Bits of a hash that "bucketed" compares, 0..`hash_code_len`; None for what the length of the
    sequence asks for."""
    hf_mask_compat: bool = False
    """Let the attention mask act on the convolution only, as transformers 5.24 does by mistake."""
    scan_layers: bool = False
    """Stack the layers' parameters and scan over them: one layer is compiled instead of all."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    remat_policy: RematPolicy = "nothing_saveable"
    """What `remat` keeps all the same, one of `jax.checkpoint_policies`: nothing, all matrix
    products, or those without a batch dimension, i.e. with parameters."""
    attention_implementation: str | None = None
    """`implementation` of `yoso_attention`, or of `jax.nn.dot_product_attention` ("xla" or "cudnn")
    if `attention` is "softmax"; None lets it choose."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "num_hash",
        ):
            self._check_integer(name)
        self._check_integer("hash_code_len", maximum=16)
        self._check_integer("conv_window", optional=True)
        self._check_number("hidden_dropout_prob", "in [0, 1)", lambda value: 0 <= value < 1)
        self._check_number("initializer_range", ">= 0", lambda value: value >= 0)
        self._check_number("layer_norm_eps", "> 0", lambda value: value > 0)
        for name in (
            "use_expectation",
            "use_fast_hash",
            "lsh_backward",
            "hf_mask_compat",
            "scan_layers",
            "remat",
        ):
            self._check_bool(name)
        self._check_choice("hidden_act", ACTIVATIONS)
        self._check_choice("remat_policy", get_args(RematPolicy))
        self._check_choice("bit_layout", ("spread", "block"))
        self._check_choice("attention_backward", (None, "auto", *BACKWARDS))
        self._check_integer("num_backward_hashes", optional=True)
        self._check_integer("bucket_bits", minimum=0, maximum=self.hash_code_len, optional=True)
        biased = self.use_fast_hash and self.bit_layout == "block"
        if self.attention_backward == "bucketed" and biased:
            self._fail("bit_layout", "'spread' where attention_backward is 'bucketed'")
        self._check_choice("attention", ("yoso", "softmax"))
        accepted = implementations() if self.attention == "yoso" else ("xla", "cudnn")
        self._check_choice("attention_implementation", (None, *accepted))
        if self.hidden_size % self.num_attention_heads:
            self._fail(
                "hidden_size",
                f"a multiple of num_attention_heads={self.num_attention_heads}",
            )
        if self.conv_window is not None and self.conv_window % 2 == 0:
            self._fail("conv_window", "an odd integer >= 1 or None")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def backward(self) -> Backward | None:
        """`backward` of `yoso_attention`."""
        if self.attention_backward is None:
            return "sampled" if self.lsh_backward else "expectation"
        return None if self.attention_backward == "auto" else self.attention_backward

    @property
    def is_sampled(self) -> bool:
        """Whether attention draws hashes, so that calls need a `hash` stream."""
        return self.attention == "yoso" and not self.use_expectation

    def replace[C: "EncoderConfig"](self: C, **changes: Any) -> C:
        """A copy with these fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict[C: "EncoderConfig"](
        cls: type[C], values: Mapping[str, Any], **overrides: Any
    ) -> C:
        """Reads the content of a config.json.

        Args:
            values: as `json.load` returns it.
            **overrides: fields to set to other values than the file's.

        Raises:
            ValueError: another `model_type`, or a field unknown or out of range.
        """
        values = cls._check_model_type(values)
        for name in ("architectures", "dtype"):
            values.pop(name, None)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - fields.keys()):
            raise ValueError(f"no fields of {cls.__name__}: {', '.join(unknown)}")
        return cls(**{name: _to_field(fields[name], x) for name, x in (values | overrides).items()})

    @classmethod
    def from_json_file[C: "EncoderConfig"](
        cls: type[C], path: str | os.PathLike[str], **overrides: Any
    ) -> C:
        """Reads a config.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a JSON object, or a field is out of range; the message names it.
        """
        values = read_json_object(path)
        try:
            return cls.from_dict(values, **overrides)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained[C: "EncoderConfig"](
        cls: type[C], folder: str | os.PathLike[str], **overrides: Any
    ) -> C:
        """Reads `folder`/config.json; raises as `from_json_file`."""
        return cls.from_json_file(Path(folder) / CONFIG_FILE, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that `from_dict` reads back to an equal configuration."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    def to_json_string(self, **entries: Any) -> str:
        """The text of a config.json, with `entries` beside the fields."""
        return json.dumps(self.to_dict() | entries, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str], **entries: Any) -> None:
        """Writes `folder`/config.json, with `entries` beside the fields; makes the folder."""
        path = Path(folder) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.to_json_string(**entries), encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def _check_model_type(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(values)
        model_type = values.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type must be {cls.model_type!r}, got {model_type!r:.100}")
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class YosoConfig(EncoderConfig):
    """Configuration of the Hugging Face architectures; defaults are transformers 5.24's.

    `attention_probs_dropout_prob`, `add_cross_attention` and `chunk_size_feed_forward` change no
    number: they are kept because Hugging Face files have them.

    Raises:
        ValueError: a field has a value of a wrong type or out of range; the message names the field
            and what is accepted.
    """

    model_type: ClassVar[str] = "yoso"

    type_vocab_size: int = 1
    """Rows of the token type embeddings, >= 1."""
    attention_probs_dropout_prob: float = 0.1
    add_cross_attention: bool = False
    chunk_size_feed_forward: int = 0
    pad_token_id: int | None = 1
    """Word embedding row that starts at 0 and gets no gradient from the lookup; None for none."""
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    tie_word_embeddings: bool = True
    """Let the masked LM decoder use the word embeddings."""
    architectures: tuple[str, ...] | None = None
    problem_type: ProblemType | None = None
    """Loss of sequence classification; None infers it from the labels of each call."""
    num_labels: int | None = None
    """Classes of the classification heads; None means those of `id2label`, or 2."""
    id2label: Mapping[int, str] | None = None
    """Name of each class; None means LABEL_0, LABEL_1, ..."""
    label2id: Mapping[str, int] | None = None
    """Class of each name; None means the inverse of `id2label`."""
    extra: Mapping[str, Any] = FrozenDict()
    """Entries of a config.json that are no fields here; written back as they were."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("type_vocab_size")
        self._check_integer("chunk_size_feed_forward", minimum=0)
        self._check_integer("pad_token_id", minimum=0, optional=True)
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            self._fail("pad_token_id", f"less than vocab_size={self.vocab_size} or None")
        self._check_number(
            "attention_probs_dropout_prob", "in [0, 1)", lambda value: 0 <= value < 1
        )
        for name in ("add_cross_attention", "tie_word_embeddings"):
            self._check_bool(name)
        if not isinstance(self.extra, Mapping):
            self._fail("extra", "a mapping of config.json's other entries")
        for name in ("eos_token_id", "architectures", "extra"):
            self._set(name, _freeze(getattr(self, name)))
        self._check_integer("bos_token_id", minimum=0, optional=True)
        if isinstance(self.eos_token_id, tuple):
            if not all(_is_integer(token) for token in self.eos_token_id):
                self._fail("eos_token_id", "an integer, integers or None")
        else:
            self._check_integer("eos_token_id", minimum=0, optional=True)
        names = self.architectures
        if names is not None and not (
            isinstance(names, tuple) and all(isinstance(name, str) for name in names)
        ):
            self._fail("architectures", "names of architectures or None")
        self._set_labels()
        self._check_choice(
            "problem_type",
            (
                None,
                "regression",
                "single_label_classification",
                "multi_label_classification",
            ),
        )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            self._fail("problem_type", "'regression' or None when num_labels is 1")
        known = {field.name for field in dataclasses.fields(self)}
        if overlap := known & self.extra.keys():
            raise ValueError(f"extra must hold no fields of {type(self).__name__}, got {overlap}")

    def _set_labels(self) -> None:
        self._check_integer("num_labels", optional=True)
        if self.id2label is None:
            size = 2 if self.num_labels is None else self.num_labels
            id2label = _default_labels(size)
        else:
            id2label = self.id2label
            if not isinstance(id2label, Mapping) or set(id2label) != set(range(len(id2label))):
                self._fail("id2label", "a mapping of 0, 1, 2, ... to names")
            if not id2label or not all(isinstance(name, str) for name in id2label.values()):
                self._fail("id2label", "a mapping with at least one entry, of names")
            if self.num_labels not in (None, len(id2label)):
                self._fail("num_labels", f"None or the {len(id2label)} of id2label")
        self._set("num_labels", len(id2label))
        self._set("id2label", FrozenDict(id2label))
        label2id = self.label2id
        if label2id is None:
            label2id = {name: index for index, name in id2label.items()}
        elif not isinstance(label2id, Mapping) or not all(map(_is_integer, label2id.values())):
            self._fail("label2id", "a mapping of names to classes")
        self._set("label2id", FrozenDict(label2id))

    def replace[C: "YosoConfig"](self: C, **changes: Any) -> C:
        """A copy with these fields changed, validated again.

        A new `num_labels` renames the classes, a new `id2label` sets their number.
        """
        if changes.keys() & {"num_labels", "id2label"}:
            changes = {"num_labels": None, "id2label": None, "label2id": None} | changes
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict[C: "YosoConfig"](cls: type[C], values: Mapping[str, Any], **overrides: Any) -> C:
        """Reads the content of a config.json; entries that are no fields go to `extra`.

        Args:
            values: as `json.load` returns it.
            **overrides: fields to set to other values than the file's.

        Raises:
            ValueError: another `model_type`, or a field out of range.
        """
        values = cls._check_model_type(values)
        if isinstance(values.get("id2label"), Mapping) and "num_labels" in values:
            size = values.pop("num_labels")
            if size != len(values["id2label"]):
                warnings.warn(
                    f"num_labels={size} is ignored: id2label names {len(values['id2label'])}",
                    stacklevel=2,
                )
        fields = {field.name: field for field in dataclasses.fields(cls) if field.name != "extra"}
        extra = {name: values.pop(name) for name in values.keys() - fields.keys()}
        for name, value in values.items():
            if name == "id2label" and isinstance(value, Mapping):
                # JSON has string keys only.
                value = {int(i) if str(i).isdecimal() else i: v for i, v in value.items()}
            values[name] = _to_field(fields[name], value)
        config = cls(**values, extra=extra)
        return config.replace(**overrides) if overrides else config

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that `from_dict` reads back to an equal configuration.

        Fields that transformers leaves out at their default, and this project's own, appear only
        when they differ from it.
        """
        defaults = type(self)()
        values = {"model_type": self.model_type, **_thaw(self.extra)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("extra", "num_labels"):
                continue
            if field.name in _WRITTEN_IF_CHANGED and value == getattr(defaults, field.name):
                continue
            values[field.name] = _thaw(value)
        return values


_WRITTEN_IF_CHANGED = frozenset(
    {
        "attention",
        "bit_layout",
        "attention_backward",
        "num_backward_hashes",
        "bucket_bits",
        "hf_mask_compat",
        "scan_layers",
        "remat",
        "remat_policy",
        "attention_implementation",
        "chunk_size_feed_forward",
        "architectures",
        "problem_type",
        "id2label",
        "label2id",
    }
)


def read_json_object(path: str | os.PathLike[str], text: str | None = None) -> dict[str, Any]:
    """Reads a file, or a `text` that is from it, which must hold a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8") if text is None else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _default_labels(size: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(size)}


def _to_field(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value from JSON, which has no tuples and knows few floats, for a field."""
    if field.type is not float or not _is_integer(value):
        return _freeze(value)
    try:
        return float(value)
    except OverflowError:
        return math.inf  # refused as any other that is not finite


def _freeze(value: Any) -> Any:
    """Makes what JSON holds hashable."""
    if isinstance(value, Mapping):
        return FrozenDict({key: _freeze(entry) for key, entry in value.items()})
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    return value


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_thaw(entry) for entry in value]
    return value
