"""LlamaConfig: the shape of one member of the Llama family, and how Hugging Face's config.json spells it.

Three of transformers' architectures are one architecture with different switches, and those switches are fields here:

    llama     optional biases (attention_bias on q, k, v and o; mlp_bias), Llama 3.1's RoPE scaling
    mistral   no bias, every layer may look back only `sliding_window` tokens
    qwen2     bias on q, k and v, some layers may look back only `sliding_window` tokens

This module imports no torch: a checkpoint can be explained without loading it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from llmq.errors import CheckpointError, suggest

RopeType = Literal["llama3", "linear"]

_SLIDING, _FULL = "sliding_attention", "full_attention"
_FAMILY_ARCHITECTURES = MappingProxyType(
    {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
)
# What transformers assumes for a key that config.json leaves out. Where the families differ, each has its own line.
_COMMON_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "head_dim": None}
)
_FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2}
        | {"sliding_window": 4096},
        "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None}
        | {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    }
)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies were stretched to reach a longer context than the model was first trained on.

    `linear` (kaiokendev 2023; Chen et al., arXiv:2306.15595) divides every frequency by `factor`. `llama3` (the Llama 3
    Herd, arXiv:2407.21783, and Meta's reference code) does so only to wavelengths longer than
    `original_max_position_embeddings / low_freq_factor`, leaves those shorter than
    `original_max_position_embeddings / high_freq_factor` alone, and blends in between.

    Raises:
        CheckpointError: the rule is unknown, a parameter of it is missing, or a value is out of range.
    """

    rope_type: RopeType
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ("llama3", "linear"):
            raise CheckpointError(f"RoPE scaling {self.rope_type!r} is not supported; allowed are 'llama3' and 'linear'.")
        if self.factor <= 0:
            raise CheckpointError(f"RoPE scaling needs a positive factor, got {self.factor}.")
        if self.rope_type == "linear":
            return
        low, high, original = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        if low is None or high is None or original is None:
            raise CheckpointError(
                "RoPE scaling 'llama3' needs low_freq_factor, high_freq_factor and original_max_position_embeddings, got "
                f"{low}, {high} and {original}."
            )
        if not 0 < low < high or original < 1:
            raise CheckpointError(
                "RoPE scaling 'llama3' needs 0 < low_freq_factor < high_freq_factor and a positive "
                f"original_max_position_embeddings, got {low}, {high} and {original}."
            )


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shape of a model of the Llama family. Every weight's shape follows from it.

    Attributes:
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_layers: number of blocks.
        num_heads: query heads, H.
        num_kv_heads: key and value heads, H_kv; divides `num_heads`.
        head_dim: width of one head, D; even. `num_heads * head_dim` need not be `hidden_size`.
        max_position_embeddings: the context limit, in tokens.
        rms_norm_eps: added to the mean square inside RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how those frequencies are stretched; None: they are not.
        tie_word_embeddings: the head's weight is the embedding's.
        attention_bias: q_proj, k_proj and v_proj have a bias.
        attention_output_bias: o_proj has a bias.
        mlp_bias: gate_proj, up_proj and down_proj have a bias.
        sliding_window: a token of a sliding layer sees itself and the `sliding_window - 1` tokens before it; None: there
            is no such layer.
        sliding_layers: the indices of the sliding layers, ascending; empty exactly when `sliding_window` is None.
        bos_token_id: the token that begins a text; None: there is none.
        eos_token_ids: the tokens that end a text.

    Raises:
        CheckpointError: the values contradict each other, or no model can have them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positive = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
            *("max_position_embeddings", "rms_norm_eps", "rope_theta"),
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise CheckpointError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"the number of query heads must be a multiple of that of key-value heads, got {self.num_heads} and "
                f"{self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim must be even, because RoPE turns pairs, got {self.head_dim}.")
        if (self.sliding_window is None) != (not self.sliding_layers):
            raise CheckpointError(
                "sliding_window and sliding_layers come together or not at all, got "
                f"{self.sliding_window} and {self.sliding_layers}."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise CheckpointError(f"sliding_window must be positive or absent, got {self.sliding_window}.")
        if tuple(sorted({*self.sliding_layers} & {*range(self.num_layers)})) != self.sliding_layers:
            raise CheckpointError(f"sliding_layers must be ascending indices below {self.num_layers}, got {self.sliding_layers}.")

    def window(self, layer: int) -> int | None:
        """Return how many tokens, itself included, a token sees in `layer`; None: all before it."""
        return self.sliding_window if layer in self.sliding_layers else None

    @staticmethod
    def from_hf(data: Mapping[str, Any]) -> LlamaConfig:
        """Read the content of a Hugging Face config.json, as transformers 4 or 5 writes it.

        A key that is absent means what it means to transformers.

        Raises:
            CheckpointError: the architecture, activation or RoPE scaling is not supported, a key is missing, or a value is
                of the wrong type or contradicts another.
        """
        return _read_hf(data)

    def to_hf(self) -> dict[str, Any]:
        """Return what `from_hf` reads back as this configuration, in the keys that transformers 4 and 5 both read.

        Raises:
            CheckpointError: transformers has no architecture with this combination of biases and sliding window.
        """
        family = self._family()
        ends = list(self.eos_token_ids)
        data: dict[str, Any] = {
            "architectures": [_FAMILY_ARCHITECTURES[family]],
            "model_type": family,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": ends[0] if len(ends) == 1 else (ends or None),
        }
        if self.rope_scaling is not None:
            keys = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            values = {key: getattr(self.rope_scaling, key) for key in keys}
            data["rope_scaling"] = {key: value for key, value in values.items() if value is not None}
        if family == "llama":
            data |= {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        elif family == "mistral":
            data["sliding_window"] = self.sliding_window
        else:
            data |= {"use_sliding_window": self.sliding_window is not None, "sliding_window": self.sliding_window}
            data["layer_types"] = [_SLIDING if self.window(layer) else _FULL for layer in range(self.num_layers)]
        return data

    def _family(self) -> str:
        biases = (self.attention_bias, self.attention_output_bias, self.mlp_bias)
        if self.sliding_window is None and self.attention_bias == self.attention_output_bias:
            return "llama"
        if biases == (False, False, False) and len(self.sliding_layers) == self.num_layers:
            return "mistral"
        if biases == (True, False, False):
            return "qwen2"
        raise CheckpointError(
            f"Hugging Face has no architecture with bias on (q k v, o, mlp) = {biases} and {len(self.sliding_layers)} sliding "
            f"layers of {self.num_layers}; allowed are llama, mistral and qwen2."
        )


class _Reader:
    """config.json with each key's type checked, and the family's defaults for keys that are absent."""

    def __init__(self, data: Mapping[str, Any], family: str) -> None:
        self._data: dict[str, Any] = {**_COMMON_DEFAULTS, **_FAMILY_DEFAULTS[family], **data}

    def raw(self, key: str) -> Any:
        return self._data.get(key)

    def integer(self, key: str) -> int:
        value = self.optional_integer(key)
        if value is None:
            raise CheckpointError(f"the model's configuration lacks {key!r}; give it an integer.")
        return value

    def optional_integer(self, key: str) -> int | None:
        value = self._data.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise CheckpointError(f"{key!r} of the model's configuration must be an integer, got {value!r}.")
        return value

    def number(self, key: str) -> float:
        return _number(key, self._data.get(key))

    def flag(self, key: str) -> bool:
        value = self._data.get(key, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"{key!r} of the model's configuration must be true or false, got {value!r}.")
        return value


def _number(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{key!r} of the model's configuration must be a number, got {value!r}.")
    return float(value)


def _read_hf(data: Mapping[str, Any]) -> LlamaConfig:
    family = _hf_family(data)
    read = _Reader(data, family)
    if read.raw("hidden_act") not in ("silu", "swish"):  # two names of one function
        raise CheckpointError(f"hidden_act {read.raw('hidden_act')!r} is not supported; allowed is 'silu'.")
    hidden_size, num_heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    head_dim = read.optional_integer("head_dim")
    if head_dim is None:
        if num_heads < 1 or hidden_size % num_heads:
            raise CheckpointError(
                f"without head_dim, hidden_size must be a multiple of num_attention_heads, got {hidden_size} and {num_heads}."
            )
        head_dim = hidden_size // num_heads
    num_kv_heads = read.optional_integer("num_key_value_heads")
    num_layers = read.integer("num_hidden_layers")
    window, sliding_layers = _sliding(read, family, num_layers)
    # mistral and qwen2 fix their biases in code: transformers does not read these two keys for them, so neither does llmq.
    attention_bias = read.flag("attention_bias") if family == "llama" else family == "qwen2"
    return LlamaConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=read.integer("max_position_embeddings"),
        rms_norm_eps=read.number("rms_norm_eps"),
        rope_theta=_rope_theta(read),
        rope_scaling=_rope_scaling(read),
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        attention_bias=attention_bias,
        attention_output_bias=attention_bias and family == "llama",
        mlp_bias=family == "llama" and read.flag("mlp_bias"),
        sliding_window=window,
        sliding_layers=sliding_layers,
        bos_token_id=read.optional_integer("bos_token_id"),
        eos_token_ids=_token_ids(read.raw("eos_token_id")),
    )


def _hf_family(data: Mapping[str, Any]) -> str:
    """Return the family of a config.json; a file without `model_type` may still name the class in `architectures`."""
    named = data.get("model_type")
    if named is None:
        classes = data.get("architectures") or []
        named = next((family for family, name in _FAMILY_ARCHITECTURES.items() if name in classes), None)
        if named is None:
            raise CheckpointError(
                f"the model's configuration names no supported architecture (model_type absent, architectures {classes}); "
                f"allowed are {', '.join(_FAMILY_ARCHITECTURES)}."
            )
    if named not in _FAMILY_ARCHITECTURES:
        raise CheckpointError(f"model_type {named!r} is not supported.{suggest(str(named), [*_FAMILY_ARCHITECTURES])}")
    return str(named)


def _rope(read: _Reader) -> Mapping[str, Any]:
    """Return the RoPE parameters: `rope_scaling` of transformers 4, `rope_parameters` of transformers 5, or none."""
    parameters = read.raw("rope_scaling") or read.raw("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        raise CheckpointError(f"the RoPE parameters must be one flat table for all layers, got {parameters!r}.")
    rotated = parameters.get("partial_rotary_factor", read.raw("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        raise CheckpointError(f"partial_rotary_factor {rotated} is not supported; allowed is 1 (every dimension is turned).")
    return parameters


def _rope_theta(read: _Reader) -> float:
    theta = _rope(read).get("rope_theta")
    return read.number("rope_theta") if theta is None else _number("rope_theta", theta)


def _rope_scaling(read: _Reader) -> RopeScaling | None:
    parameters = _rope(read)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type not in ("llama3", "linear"):
        raise CheckpointError(f"RoPE scaling {rope_type!r} is not supported; allowed are 'default', 'llama3' and 'linear'.")
    factor = _number("factor", parameters.get("factor"))
    if rope_type == "linear":
        return RopeScaling("linear", factor)
    original = parameters.get("original_max_position_embeddings", read.integer("max_position_embeddings"))
    return RopeScaling(
        "llama3",
        factor,
        low_freq_factor=_number("low_freq_factor", parameters.get("low_freq_factor")),
        high_freq_factor=_number("high_freq_factor", parameters.get("high_freq_factor")),
        original_max_position_embeddings=int(_number("original_max_position_embeddings", original)),
    )


def _sliding(read: _Reader, family: str, num_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the sliding window and the layers that have it."""
    window = read.optional_integer("sliding_window")
    if family == "llama" or window is None or (family == "qwen2" and not read.flag("use_sliding_window")):
        return None, ()  # transformers' llama has no sliding attention, whatever its config.json says
    types = read.raw("layer_types")
    if types is None:
        first = read.integer("max_window_layers") if family == "qwen2" else 0
        layers = tuple(range(first, num_layers))
    else:
        if len(types) != num_layers or not {*types} <= {_SLIDING, _FULL}:
            raise CheckpointError(f"layer_types must say {_SLIDING!r} or {_FULL!r} for each of {num_layers} layers, got {types}.")
        if family == "mistral" and _FULL in types:  # transformers gives every layer of a mistral the window all the same
            raise CheckpointError(f"layer_types of a mistral must all be {_SLIDING!r}, got {types}.")
        layers = tuple(layer for layer, kind in enumerate(types) if kind == _SLIDING)
    return (window, layers) if layers else (None, ())


def _token_ids(value: object) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"'eos_token_id' of the model's configuration must be an integer or a list of them, got {value!r}.")
    return tuple(ids)
