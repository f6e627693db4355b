"""The structs of `kernels/cpu/llmq_cpu.h` as ctypes sees them, and the numbers that go into them.

Fields, their order and their types are the header's; a test reads the header and compares. A struct holds addresses only: whoever
fills one keeps the tensors alive for as long as native code may read it.
"""

from __future__ import annotations

import ctypes

WEIGHT_INT8, WEIGHT_INT4, WEIGHT_BF16, WEIGHT_F32 = 1, 2, 3, 4
"""LLMQ_WEIGHT_*."""
ZERO_NONE, ZERO_INT, ZERO_FLOAT = 0, 1, 2
"""LLMQ_ZERO_*."""
SCALE_NONE, SCALE_F32, SCALE_BF16 = 0, 1, 2
"""LLMQ_SCALE_*."""
ACTIVATION_FLOAT, ACTIVATION_INT8, ACTIVATION_UINT8, ACTIVATION_STATIC = 0, 1, 2, 3
"""LLMQ_ACTIVATION_*."""
DTYPE_F32, DTYPE_BF16 = 0, 1
"""LLMQ_DTYPE_*."""


class LlmqLinear(ctypes.Structure):
    """One linear, y = x W^T + bias; see the header's section `linear`."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("weight", ctypes.c_int32),
        ("zero", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("input_scale", ctypes.c_float),
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


CACHE_F32, CACHE_BF16, CACHE_INT8 = 0, 1, 2
"""LLMQ_CACHE_*."""
OUTPUT_HIDDEN, OUTPUT_LAST, OUTPUT_ALL = 0, 1, 2
"""LLMQ_OUTPUT_*."""


class LlmqBlock(ctypes.Structure):
    """One block of a model; see the header's section `llama`."""

    _fields_ = (
        ("q", LlmqLinear),
        ("k", LlmqLinear),
        ("v", LlmqLinear),
        ("o", LlmqLinear),
        ("gate", LlmqLinear),
        ("up", LlmqLinear),
        ("down", LlmqLinear),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    )


class LlmqLlama(ctypes.Structure):
    """A whole model; see the header's section `llama`."""

    _fields_ = (
        ("vocab", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("embedding", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("head", LlmqLinear),
    )


class LlmqKVCache(ctypes.Structure):
    """The keys and values of a call's sequences; see the header's section `llama`."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
    )


STRUCTS: tuple[type[ctypes.Structure], ...] = (LlmqLinear, LlmqBlock, LlmqLlama, LlmqKVCache)
"""Every struct of the header, in its order."""
