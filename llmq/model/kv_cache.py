"""KVCache: the keys and values of every token so far, in memory that is allocated once.

A cache holds what its dtype says:

    float32, bfloat16, float16    keys and values, rounded to that dtype; attention computes in it
    int8                          codes and one fp32 scale for each token and head; attention computes in the model's dtype

The int8 grid is symmetric. For the D numbers x of one token's key (or value) in one head, in the model's dtype (a key after its
rotation), computed in fp32:

    scale = max(max|x| / 127, 1e-8)        code = clamp(round(x * (1 / scale)), -127, 127)        meaning: code * scale

Attention reads the quantized keys and values of all tokens, those of the call itself included, so that a prompt that is read at
once and one that is read in pieces give the same cache and the same answer. A token takes 2 H_kv (D + 4) bytes a layer: for
D = 64 little more than half of what bfloat16 takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

from llmq.errors import UsageError, suggest
from llmq.model.config import LlamaConfig
from llmq.model.rope import inverse_frequencies, rotation_table
from llmq.numerics.affine import (
    MappingType,
    ZeroPointDomain,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

AUTO = "auto"
"""The name that stands for the model's own dtype."""
KV_DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
"""Every dtype of a cache by the name that options and records use."""
INT8_MAX = 127
"""Largest code; the smallest is its negative, and -128 is not used."""
INT8_LEAST_SCALE = 1e-8
"""Scale of a token whose numbers are all 0, and the least of any other."""


class KVCache:
    """Keys and values of all layers for `batch_size` sequences of at most `max_length` tokens.

    The cache does not know how much of it is filled: each call of the model says where it writes (`start`), and reads no
    further than what it has just written. Sequences of a batch are therefore equally long. The rotary tables of all
    positions live here too, because they are needed exactly where a cache is.

    Attributes:
        dtype: what `keys` and `values` are stored as: float32, bfloat16, float16, or int8.
        keys: one tensor [B, H_kv, max_length, D] a layer; already rotated.
        values: one tensor [B, H_kv, max_length, D] a layer.
        key_scales: for int8 one tensor float32 [B, H_kv, max_length] a layer, else None.
        value_scales: for int8 one tensor float32 [B, H_kv, max_length] a layer, else None.
        cosines: float32 [max_length, 1, D].
        sines: float32 [max_length, 1, D]; see `rope.rotation_table`.

    Raises:
        UsageError: `max_length` is beyond the model's context, a size is not positive, or no cache is of this dtype.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if batch_size < 1 or max_length < 1:
            raise UsageError(f"a KV cache needs a positive batch size and length, got {batch_size} and {max_length}.")
        check_context(max_length, config)
        kv_name(dtype)  # refuses a dtype that is no cache's
        self.config = config
        self.batch_size = batch_size
        self.dtype = dtype
        # zeros, not empty: a masked position still meets its value in 0 * value, which NaN would survive
        shape = (batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.key_scales: list[Tensor] | None = None
        self.value_scales: list[Tensor] | None = None
        if dtype == torch.int8:
            self.key_scales = [torch.zeros(shape[:-1], device=device) for _ in range(config.num_layers)]
            self.value_scales = [torch.zeros(shape[:-1], device=device) for _ in range(config.num_layers)]
        positions = torch.arange(max_length, device=device)
        self.cosines, self.sines = rotation_table(inverse_frequencies(config).to(device), positions)

    @property
    def max_length(self) -> int:
        """How many tokens of a sequence it holds; read off a tensor, so that one compiled graph can serve any length."""
        return self.keys[0].shape[2]

    def check(self, batch_size: int, start: int, length: int) -> None:
        """Raise UsageError when `length` tokens of `batch_size` sequences cannot stand at `start`."""
        if self.batch_size != batch_size:
            raise UsageError(f"the KV cache is for {self.batch_size} sequences, got {batch_size}; make one of that batch size.")
        if start < 0 or start + length > self.max_length:
            raise UsageError(
                f"{length} tokens at position {start} do not fit into a KV cache of {self.max_length} tokens; make it at least "
                f"{start + length} long (the model's context allows {self.config.max_position_embeddings})."
            )

    def write(self, layer: int, keys: Tensor, values: Tensor, where: slice | Tensor) -> None:
        """Store keys and values of one layer.

        Args:
            layer: which.
            keys: rotated, [B, H_kv, T, D]; may have more digits than the model's dtype.
            values: [B, H_kv, T, D], in the model's dtype.
            where: the positions in the cache: a slice, or int64 [T].
        """
        if self.key_scales is None or self.value_scales is None:
            stored = [(self.keys[layer], keys), (self.values[layer], values)]
        else:
            # the key is rounded as a cache in the model's dtype would round it, so that int8 is all that differs from one
            codes, scales = quantize_int8(torch.stack((keys.to(values.dtype), values)))
            stored = [(self.keys[layer], codes[0]), (self.values[layer], codes[1])]
            stored += [(self.key_scales[layer], scales[0]), (self.value_scales[layer], scales[1])]
        for target, source in stored:
            if isinstance(where, slice):
                target[:, :, where] = source
            else:
                target.index_copy_(2, where, source.to(target.dtype))

    def read(self, layer: int, visible: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H_kv, visible, D] of one layer, in the dtype in which attention computes.

        Args:
            layer: which.
            visible: which positions.
            dtype: the model's; see `attention_dtype`.
        """
        keys, values = self.keys[layer][:, :, visible], self.values[layer][:, :, visible]
        if self.key_scales is None or self.value_scales is None:
            return keys, values
        return (
            dequantize_int8(keys, self.key_scales[layer][:, :, visible]).to(dtype),
            dequantize_int8(values, self.value_scales[layer][:, :, visible]).to(dtype),
        )

    def stored(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return all positions of one layer as they are stored: keys, values, and the scales of both where it is quantized."""
        if self.key_scales is None or self.value_scales is None:
            return self.keys[layer], self.values[layer], None, None
        return self.keys[layer], self.values[layer], self.key_scales[layer], self.value_scales[layer]

    def first(self, length: int) -> KVCache:
        """Return the first `length` positions as a cache, in the same memory: what is written to one is in the other."""
        part = copy(self)
        part.keys = [tensor[:, :, :length] for tensor in self.keys]
        part.values = [tensor[:, :, :length] for tensor in self.values]
        if self.key_scales is not None and self.value_scales is not None:
            part.key_scales = [tensor[:, :, :length] for tensor in self.key_scales]
            part.value_scales = [tensor[:, :, :length] for tensor in self.value_scales]
        part.cosines, part.sines = self.cosines[:length], self.sines[:length]
        return part

    def attention_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which attention computes when the model's is `dtype`: the cache's own unless it is quantized."""
        return dtype if self.key_scales is not None else self.dtype

    def reset(self) -> None:
        """Forget everything. Only a cache that may hold NaN needs it: what lies beyond `start` is never read."""
        for tensor in self.tensors:
            tensor.zero_()

    @property
    def tensors(self) -> list[Tensor]:
        """All that the cache stores: keys, values and, where it is quantized, their scales."""
        return [*self.keys, *self.values, *(self.key_scales or []), *(self.value_scales or [])]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, scales included."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def nbytes_read(self, context: int) -> int:
        """Return the bytes of keys and values that one decode step reads when `context` tokens are visible to it.

        Scales are included. A sliding layer reads no more than its window. The whole batch is counted.
        """
        per_layer = self.batch_size * kv_bytes_per_token(self.config, self.dtype) // self.config.num_layers
        windows = (self.config.window(layer) for layer in range(self.config.num_layers))
        return per_layer * sum(context if window is None else min(context, window) for window in windows)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round `x` [..., D], of any floating dtype, to the int8 grid of the cache.

    Returns:
        codes int8 [..., D], and scales float32 [...].
    """
    x = x.float()
    block = (1,) * (x.ndim - 1) + (x.shape[-1],)
    scale, _ = choose_qparams_affine(
        x,
        MappingType.SYMMETRIC_NO_CLIPPING_ERR,
        block,
        quant_min=-INT8_MAX,
        quant_max=INT8_MAX,
        eps=INT8_LEAST_SCALE,
        zero_point_domain=ZeroPointDomain.NONE,
    )
    codes = quantize_affine(
        x,
        block,
        scale,
        None,
        output_dtype=torch.int8,
        quant_min=-INT8_MAX,
        quant_max=INT8_MAX,
        zero_point_domain=ZeroPointDomain.NONE,
    )
    return codes, scale[..., 0]


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """Return float32 [..., D]: what `codes` int8 [..., D] with `scales` float32 [...] mean."""
    block = (1,) * (codes.ndim - 1) + (codes.shape[-1],)
    return dequantize_affine(
        codes,
        block,
        scales[..., None],
        None,
        quant_min=-INT8_MAX,
        quant_max=INT8_MAX,
        zero_point_domain=ZeroPointDomain.NONE,
    )


def kv_bytes_per_token(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Return the bytes that one token of one sequence takes in a cache of this dtype: all layers, scales included."""
    kv_name(dtype)  # refuses a dtype that is no cache's
    scale = torch.float32.itemsize if dtype == torch.int8 else 0
    return 2 * config.num_layers * config.num_kv_heads * (config.head_dim * dtype.itemsize + scale)


def kv_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the cache that is called `name`: `AUTO`, the model's own, or one of `KV_DTYPES`.

    Raises:
        UsageError: no cache is called so.
    """
    if name == AUTO:
        return model_dtype
    if name not in KV_DTYPES:
        raise UsageError(f"unknown KV cache {name!r}.{suggest(name, [AUTO, *KV_DTYPES])}")
    return KV_DTYPES[name]


def kv_name(dtype: torch.dtype) -> str:
    """Return how a cache of this dtype is called.

    Raises:
        UsageError: no cache is of this dtype.
    """
    for name, known in KV_DTYPES.items():
        if known == dtype:
            return name
    raise UsageError(f"a KV cache holds {', '.join(KV_DTYPES)}, got {dtype}; choose one of them.")


def check_context(length: int, config: LlamaConfig) -> None:
    """Raise UsageError when `length` tokens are more than the model's context."""
    if length > config.max_position_embeddings:
        raise UsageError(
            f"{length} tokens are beyond the model's context of {config.max_position_embeddings} tokens "
            f"(max_position_embeddings); ask for at most {config.max_position_embeddings}."
        )
