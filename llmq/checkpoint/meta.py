"""Meta's names, gpt-fast's variant of them, and the configuration that Meta keeps in params.json.

Meta splits large models over files ("model parallel"): each matrix is cut along one dimension, norms are in every file.
gpt-fast keeps one file, in which q, k and v are the rows of one matrix `wqkv`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmq.checkpoint.source import EMBEDDING, HEAD, Piece, TensorInfo, TensorSource, WeightFile
from llmq.errors import CheckpointError
from llmq.model.config import LlamaConfig, RopeScaling

PARAMS_KEYS = ("dim", "n_layers", "n_heads")
"""Keys by which a JSON file is known as Meta's params.json."""

IGNORED = ("rope.freqs",)
"""Stored by old checkpoints, and computed by llmq."""

_TOP = MappingProxyType({"tok_embeddings.weight": EMBEDDING, "norm.weight": "model.norm.weight", "output.weight": HEAD})
_LAYER = MappingProxyType(
    {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
)
_NAME = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_ROW_PARALLEL = ("attention.wo", "feed_forward.w2")  # cut along the inputs, dimension 1; other matrices along dimension 0

# Llama 3.1's RoPE scaling, which params.json only switches on; the numbers are in Meta's code (llama-models).
_SCALED_ROPE = MappingProxyType(
    {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
)
_DEFAULT_ROPE_THETA = 10000.0  # Meta's code, where params.json has none (Llama 1 and 2)


def hf_name(name: str) -> str | None:
    """Return Hugging Face's name of a tensor in Meta's spelling; None: it has none."""
    if name in _TOP:
        return _TOP[name]
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        return None
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def meta_sources(files: list[WeightFile], config: LlamaConfig) -> dict[str, TensorSource]:
    """Return parameter name -> source for the files of one model in Meta's names, in the order of their ranks.

    Names that llmq does not know are kept as they are: the caller refuses them.

    Raises:
        CheckpointError: the files do not hold the same tensors.
    """
    for file in files[1:]:
        for name in files[0].entries.keys() ^ file.entries.keys():
            has, lacks = (files[0], file) if name in files[0].entries else (file, files[0])
            raise CheckpointError(
                f"tensor {name} is in {has.path} and not in {lacks.path}; the files of one Meta checkpoint hold the same tensors."
            )
    sources = {}
    for name, info in files[0].entries.items():
        target = hf_name(name) or name
        pieces = tuple(Piece(file, name) for file in files)
        join = _joined_dimension(name, info, config) if len(files) > 1 else None
        sources[target] = TensorSource(pieces, join, _heads(target, config))
    return sources


def gpt_fast_sources(file: WeightFile, config: LlamaConfig) -> dict[str, TensorSource]:
    """Return parameter name -> source for gpt-fast's names: as Meta's, with `wqkv` cut into its rows."""
    sources = {}
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for name, info in file.entries.items():
        if not name.endswith("attention.wqkv.weight"):
            target = hf_name(name) or name
            sources[target] = TensorSource((Piece(file, name),), None, _heads(target, config))
            continue
        if info.shape[0] != query + 2 * key:
            raise CheckpointError(
                f"tensor {name} in {file.path} has {info.shape[0]} rows, {config.num_heads} query and {config.num_kv_heads} "
                f"key-value heads of {config.head_dim} need {query + 2 * key}; the configuration beside it is another model's."
            )
        for part, start, stop in (("wq", 0, query), ("wk", query, query + key), ("wv", query + key, query + 2 * key)):
            target = hf_name(name.replace("wqkv", part)) or name
            sources[target] = TensorSource((Piece(file, name, (start, stop)),), None, _heads(target, config))
    return sources


def _joined_dimension(name: str, info: TensorInfo, config: LlamaConfig) -> int | None:
    if len(info.shape) == 1:
        return None
    if name == "tok_embeddings.weight":  # cut along the vocabulary since Llama 3, along the width before
        return 0 if info.shape[1] == config.hidden_size else 1
    return 1 if name.removesuffix(".weight").endswith(_ROW_PARALLEL) else 0


def _heads(target: str, config: LlamaConfig) -> int | None:
    if target.endswith("self_attn.q_proj.weight"):
        return config.num_heads
    return config.num_kv_heads if target.endswith("self_attn.k_proj.weight") else None


def meta_config(
    path: Path, params: Mapping[str, Any], files: Iterable[WeightFile], *, tied: bool
) -> tuple[LlamaConfig, list[str]]:
    """Return the configuration that params.json and the tensors' shapes give, and what had to be assumed.

    Args:
        path: the JSON file, for messages.
        params: its content.
        files: the files of weights, which know the vocabulary and the width of the MLP.
        tied: the head is the embedding.

    Raises:
        CheckpointError: a value is missing or of the wrong type.
    """
    read = _Params(path, params)
    dim, heads = read.integer("dim"), read.integer("n_heads")
    if heads < 1 or dim % heads:
        raise CheckpointError(f"{path} has dim {dim} and n_heads {heads}: the first must be a multiple of the second.")
    files = list(files)
    theta = read.number("rope_theta", _DEFAULT_ROPE_THETA)
    scaling, notes = _rope_scaling(read)
    length = read.optional_integer("max_seq_len") or read.optional_integer("max_position_embeddings")
    if length is None:
        length = _context_length(theta, scaled=scaling is not None)
        notes.append(f"{path.name} does not say the context length; taken as {length} (write max_seq_len into it to change that)")
    vocab_size = _extent("tok_embeddings.weight", 0, files, whole=dim)
    said = read.optional_integer("vocab_size")
    if said is not None and said > 0 and said != vocab_size:  # Llama 2 says -1: as many as the tokenizer has
        raise CheckpointError(f"{path} says vocab_size {said}, tok_embeddings.weight in {files[0].path} has {vocab_size} rows.")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=sum(_shape("layers.0.feed_forward.w1.weight", file)[0] for file in files),
        num_layers=read.integer("n_layers"),
        num_heads=heads,
        num_kv_heads=read.optional_integer("n_kv_heads") or heads,
        head_dim=read.optional_integer("head_dim") or dim // heads,
        max_position_embeddings=length,
        rms_norm_eps=read.number("norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
    )
    return config, notes


def _rope_scaling(read: _Params) -> tuple[RopeScaling | None, list[str]]:
    if not read.data.get("use_scaled_rope"):
        return None, []
    factor = next((key for key in ("rope_scaling_factor", "rope_scale_factor") if key in read.data), None)
    notes = []
    if factor is None:
        notes.append(
            f"{read.path.name} does not say the RoPE scaling factor; taken as {_SCALED_ROPE['factor']:g}, Llama 3.1's "
            "(Llama 3.2 has 32: write rope_scaling_factor into it)"
        )
    original = _SCALED_ROPE["original_max_position_embeddings"]
    scaling = RopeScaling(
        "llama3",
        _SCALED_ROPE["factor"] if factor is None else read.number(factor),
        read.number("low_freq_factor", _SCALED_ROPE["low_freq_factor"]),
        read.number("high_freq_factor", _SCALED_ROPE["high_freq_factor"]),
        read.optional_integer("original_max_position_embeddings") or int(original),
    )
    return scaling, notes


def _context_length(theta: float, *, scaled: bool) -> int:
    """Return what the releases of Meta were trained for: Llama 3.1 and later, Code Llama, Llama 3, Llama 2."""
    if scaled:
        return 131072
    return {1e6: 16384, 5e5: 8192}.get(theta, 4096)


def _shape(name: str, file: WeightFile) -> tuple[int, ...]:
    if name not in file.entries:
        raise CheckpointError(f"tensor {name} is missing in {file.path}; the checkpoint is not complete.")
    return file.entries[name].shape


def _extent(name: str, dimension: int, files: list[WeightFile], *, whole: int) -> int:
    """Return the size of `name` along `dimension`; its files are joined there unless the other dimension is cut."""
    shapes = [_shape(name, file) for file in files]
    if len(shapes[0]) != 2:
        raise CheckpointError(f"tensor {name} in {files[0].path} has shape {list(shapes[0])}; a matrix is needed.")
    cut = shapes[0][1 - dimension] == whole
    return sum(shape[dimension] for shape in shapes) if cut else shapes[0][dimension]


class _Params:
    """params.json with each value's type checked."""

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path, self.data = path, data

    def optional_integer(self, key: str) -> int | None:
        value = self.data.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise CheckpointError(f"{key} in {self.path} must be an integer, got {value!r}.")
        return value

    def integer(self, key: str) -> int:
        value = self.optional_integer(key)
        if value is None:
            raise CheckpointError(f"{key} is missing in {self.path}; it must be an integer.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.data.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            problem = "is missing" if value is None else f"is {value!r}"
            raise CheckpointError(f"{key} {problem} in {self.path}; it must be a number.")
        return float(value)
