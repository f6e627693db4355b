"""Every symbol of `kernels/cpu/llmq_cpu.h` for ctypes, in the order of the header; a test parses the header and compares."""

from __future__ import annotations

import ctypes

ABI_VERSION = 3
"""LLMQ_ABI_VERSION this package was written for."""

_I32, _I64, _F32, _PTR, _STR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_char_p
_I64_OUT = ctypes.POINTER(ctypes.c_int64)

SIGNATURES: tuple[tuple[str, type, tuple[type, ...]], ...] = (
    ("llmq_abi_version", _I32, ()),
    ("llmq_status_message", _STR, (_I32,)),
    ("llmq_threading", _STR, ()),
    ("llmq_isa_count", _I32, ()),
    ("llmq_isa_name", _STR, (_I32,)),
    ("llmq_isa_available", _I32, (_I32,)),
    ("llmq_isa_best", _I32, ()),
    ("llmq_linear_layout", _STR, (_I32, _I32)),
    ("llmq_linear_packed_bytes", _I32, (_I32, _PTR, _I64_OUT)),
    ("llmq_linear_pack", _I32, (_I32, *[_PTR] * 5, _I32)),
    ("llmq_linear_unpack", _I32, (_I32, *[_PTR] * 5, _I32)),
    ("llmq_linear_workspace_bytes", _I32, (_I32, _PTR, _I64, _I64_OUT)),
    ("llmq_linear", _I32, (_I32, *[_PTR] * 4, _I64, _I64, _I32, _I32)),
    ("llmq_quantize_per_token", _I32, (_I32, _PTR, _PTR, _PTR, _I64, _I64, _I64, _I32, _F32, _I32)),
    ("llmq_llama_workspace_bytes", _I32, (_I32, _PTR, _I64, _I64, _I64, _I32, _I64_OUT)),
    ("llmq_llama_forward", _I32, (_I32, _PTR, _PTR, _PTR, _I64, _I64, _I64, _I32, _PTR, _PTR, _I32)),
    ("llmq_llama_head_workspace_bytes", _I32, (_I32, _PTR, _I64, _I32, _I64_OUT)),
    ("llmq_llama_head", _I32, (_I32, _PTR, _PTR, _PTR, _PTR, _I64, _I32)),
    ("llmq_exp", _I32, (_I32, _PTR, _PTR, _I64)),
)
"""Symbol, result and arguments, in the order of the header."""
