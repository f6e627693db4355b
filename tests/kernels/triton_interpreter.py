"""bfloat16 in Triton's interpreter as GPUs compute it.

The interpreter keeps bfloat16 as its 16 bits and, as of Triton 3.7, truncates where a GPU rounds to nearest, multiplies the bits
themselves in `tl.dot`, and does not know bfloat16 constants. `repair` mends that; everything else is Triton's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

ARITHMETIC = ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_maximumf", "create_minimumf")
CONVERSIONS = ("create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui", "create_fp_ext", "create_fp_trunc")


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits, uint16, as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: np.ndarray) -> np.ndarray:
    """fp32 rounded to bfloat16, ties to even, as bits."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    return torch.from_numpy(numbers).to(torch.bfloat16).view(torch.uint16).numpy()


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend the interpreter for as long as the patches last."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def values(tensor: Any) -> np.ndarray:
        return widen(tensor.data) if tensor.dtype.scalar == tl.bfloat16 else tensor.data

    def convert(own: Callable[..., Any]) -> Callable[..., Any]:
        def converted(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
            kinds = {src.dtype.scalar, dst_type.scalar}
            if tl.bfloat16 not in kinds or any(kind.is_fp8() for kind in kinds):
                return own(self, src, dst_type, *rest)
            if dst_type.scalar == tl.bfloat16:
                return handle(src.data if len(kinds) == 1 else narrow(values(src)), tl.bfloat16)
            return handle(values(src).astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)

        return converted

    def compute(own: Callable[..., Any]) -> Callable[..., Any]:
        def computed(self: Any, lhs: Any, rhs: Any) -> Any:
            if lhs.dtype.scalar != tl.bfloat16:
                return own(self, lhs, rhs)
            wide = (handle(values(side), tl.float32) for side in (lhs, rhs))
            return handle(narrow(own(self, *wide).data), tl.bfloat16)

        return computed

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        sides = [handle(values(side), tl.float32) if side.dtype.scalar == tl.bfloat16 else side for side in (a, b)]
        return own_dot(self, *sides, d, input_precision, max_num_imprecise_acc)

    own_dot = builder.create_dot
    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "get_bf16", lambda self, value: handle(narrow(np.array([value])), tl.bfloat16), raising=False)
    for name in (*CONVERSIONS, "create_fp_to_fp"):
        monkeypatch.setattr(builder, name, convert(getattr(builder, name)))
    for name in ARITHMETIC:
        monkeypatch.setattr(builder, name, compute(getattr(builder, name)))
