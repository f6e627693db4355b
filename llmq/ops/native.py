"""The native CPU kernels: where the library is, what it offers here, and the torch operators made of it.

`kernels/cpu/llmq_cpu.h` defines every symbol; `SIGNATURES` repeats it for ctypes, and a test keeps the two equal. The library is
loaded at the first call that needs it, never at import. torch is imported before it, so that its OpenMP is torch's own copy.

Operators, for CPU tensors, with fakes, usable in compiled and exported graphs:

    llmq::quantize_per_token(x [M, K], eps) -> (codes int8 [M, K], scale fp32 [M])
    llmq::int8_dynamic_linear(x [M, K], packed, scale fp32 [N], bias [N]?, n, eps) -> [M, n] of x's dtype

Arithmetic, in fp32 and in this order, whatever the instruction set and the number of threads:

    xs = max(absmax(x) / 127, eps);  xq = clamp(rint(x * (1 / xs)), -127, 127)
    y  = float(sum_k xq * wq) * xs * ws + bias, rounded once to x's dtype; the sum is exact

A row with a NaN or an infinity has codes 0 and a scale that is not finite, so that its outputs are NaN.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

import llmq
from llmq.errors import KernelError

ABI_VERSION = 1
"""LLMQ_ABI_VERSION this module was written for."""

_I32, _I64, _F32, _PTR, _STR = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_char_p
_I64_OUT = ctypes.POINTER(ctypes.c_int64)
_QUANTIZE = (_I32, _PTR, _PTR, _PTR, _I64, _I64, _I64, _F32, _I32)
_LINEAR = (_I32, *[_PTR] * 6, *[_I64] * 4, _F32, _I32)
_PACK = (_I32, _PTR, _PTR, _I64, _I64, _I32)

_SUFFIXES = MappingProxyType({torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f32"})
"""Suffix of the functions that take a dtype; float16 is widened first, exactly."""

SIGNATURES: tuple[tuple[str, type, tuple[type, ...]], ...] = (
    ("llmq_abi_version", _I32, ()),
    ("llmq_status_message", _STR, (_I32,)),
    ("llmq_threading", _STR, ()),
    ("llmq_isa_count", _I32, ()),
    ("llmq_isa_name", _STR, (_I32,)),
    ("llmq_isa_available", _I32, (_I32,)),
    ("llmq_isa_best", _I32, ()),
    ("llmq_int8_layout", _STR, (_I32,)),
    ("llmq_int8_packed_bytes", _I32, (_I32, _I64, _I64, _I64_OUT)),
    ("llmq_int8_pack", _I32, _PACK),
    ("llmq_int8_unpack", _I32, _PACK),
    ("llmq_quantize_per_token_f32", _I32, _QUANTIZE),
    ("llmq_quantize_per_token_bf16", _I32, _QUANTIZE),
    ("llmq_int8_dynamic_linear_workspace_bytes", _I32, (_I32, _I64, _I64, _I64_OUT)),
    ("llmq_int8_dynamic_linear_f32", _I32, _LINEAR),
    ("llmq_int8_dynamic_linear_bf16", _I32, _LINEAR),
)
"""Symbol, result and arguments, in the order of the header."""


@dataclass(frozen=True)
class Available:
    """The library is loaded."""

    path: str
    isa: str
    """Instruction set in use: the fastest that runs here."""
    features: tuple[str, ...]
    """Every instruction set of the library that runs here, slowest first."""
    threading: str
    """'openmp', or 'serial' when it was built without OpenMP."""


@dataclass(frozen=True)
class Unavailable:
    """The library cannot be used; `reason` is a sentence."""

    reason: str


@dataclass(frozen=True, eq=False)
class Int8Kernels:
    """The int8 functions of one instruction set. Tensors are on the CPU; everything is checked before native code runs."""

    library: ctypes.CDLL
    isa: int
    name: str
    layout: str
    """Tag of the packed layout."""

    def pack(self, codes: Tensor) -> Tensor:
        """Lay codes int8 [N, K] out for this instruction set: uint8, flat."""
        _expect("codes", codes, torch.int8, 2)
        n, k = codes.shape
        packed = torch.empty(self.packed_bytes(n, k), dtype=torch.uint8)
        source = codes.contiguous()
        self.call("llmq_int8_pack", source.data_ptr(), packed.data_ptr(), n, k, torch.get_num_threads())
        return packed

    def unpack(self, packed: Tensor, n: int, k: int) -> Tensor:
        """Inverse of `pack`, bit for bit: int8 [N, K]."""
        self._check_packed(packed, n, k)
        codes = torch.empty(n, k, dtype=torch.int8)
        self.call("llmq_int8_unpack", packed.data_ptr(), codes.data_ptr(), n, k, torch.get_num_threads())
        return codes

    def packed_bytes(self, n: int, k: int) -> int:
        """Return the size of packed [N, K]."""
        return _size(self, "llmq_int8_packed_bytes", n, k)

    def quantize(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Quantize the rows of x [M, K] (float32, bfloat16, float16): codes int8 [M, K] and scale fp32 [M]."""
        x, suffix = _readable(x)
        m, k = x.shape
        codes, scale = torch.empty(m, k, dtype=torch.int8), torch.empty(m)
        self.call(
            f"llmq_quantize_per_token_{suffix}",
            x.data_ptr(),
            codes.data_ptr(),
            scale.data_ptr(),
            m,
            k,
            _row_stride(x),
            eps,
            torch.get_num_threads(),
        )
        return codes, scale

    def linear(self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """Multiply; see the module.

        Args:
            x: [M, K] of float32, bfloat16 or float16 (computed as float32).
            packed: what `pack` returned for [N, K].
            scale: fp32, N elements.
            bias: N elements of a floating dtype, or None; used as fp32.
            eps: smallest scale of a row of x; a normal positive number.

        Returns:
            [M, N] of x's dtype.

        Raises:
            KernelError: when the tensors do not belong together, or K is above 131072.
        """
        out_dtype = x.dtype
        x, suffix = _readable(x)
        m, k = x.shape
        n = scale.numel()
        self._check_packed(packed, n, k)
        weight_scale = _vector("scale", scale, n)
        offset = None if bias is None else _vector("bias", bias, n)
        workspace = torch.empty(_size(self, "llmq_int8_dynamic_linear_workspace_bytes", m, k), dtype=torch.uint8)
        y = torch.empty(m, n, dtype=x.dtype)
        self.call(
            f"llmq_int8_dynamic_linear_{suffix}",
            x.data_ptr(),
            packed.data_ptr(),
            weight_scale.data_ptr(),
            None if offset is None else offset.data_ptr(),
            y.data_ptr(),
            workspace.data_ptr(),
            m,
            n,
            k,
            _row_stride(x),
            eps,
            torch.get_num_threads(),
        )
        return y if out_dtype == y.dtype else y.to(out_dtype)

    def _check_packed(self, packed: Tensor, n: int, k: int) -> None:
        _expect("packed", packed, torch.uint8, 1)
        expected = self.packed_bytes(n, k)
        if packed.numel() != expected or not packed.is_contiguous():
            raise KernelError(
                f"a weight [{n}, {k}] packed for {self.name} is {expected} contiguous bytes, got {packed.numel()}; pack it here."
            )

    def call(self, symbol: str, *arguments: object) -> None:
        """Call a function that returns a status; the instruction set is its first argument."""
        status = getattr(self.library, symbol)(self.isa, *arguments)
        if status:
            message = self.library.llmq_status_message(status).decode()
            raise KernelError(f"{symbol} on {self.name} refused its arguments: {message}.")


def status() -> Available | Unavailable:
    """Say whether the native kernels can be used.

    Raises:
        KernelError: when they cannot and the environment variable LLMQ_REQUIRE_NATIVE is 1.
    """
    loaded = _loaded()
    if isinstance(loaded, Unavailable):
        if os.environ.get("LLMQ_REQUIRE_NATIVE") == "1":
            raise KernelError(f"LLMQ_REQUIRE_NATIVE is 1, and the native kernels cannot be used: {loaded.reason}")
        return loaded
    return loaded[0]


def int8_kernels(isa: str | None = None) -> Int8Kernels:
    """Return the int8 functions of an instruction set.

    Args:
        isa: a name of `Available.features`; None for the fastest.

    Raises:
        KernelError: when the library is unavailable, or the machine does not run that instruction set.
    """
    loaded = _loaded()
    if isinstance(loaded, Unavailable):
        raise KernelError(f"the native kernels cannot be used: {loaded.reason}")
    facts, tables = loaded
    for table in tables:
        if table.name == (isa or facts.isa):
            return table
    raise KernelError(f"this machine does not run the native kernels' {isa!r}; it runs {', '.join(facts.features)}.")


@functools.cache
def _loaded() -> tuple[Available, tuple[Int8Kernels, ...]] | Unavailable:
    """Load the library, once a process."""
    path = _library_path()
    if path is None:
        return Unavailable(
            "libllmq_cpu.so was not built when llmq was installed; install a C++ compiler (g++ 8 or newer), then reinstall llmq."
        )
    try:
        library = ctypes.CDLL(str(path))
        bind(library)
    except (OSError, AttributeError) as error:
        return Unavailable(f"{path} cannot be loaded ({error}); reinstall llmq.")
    found = library.llmq_abi_version()
    if found != ABI_VERSION:
        return Unavailable(f"{path} has ABI version {found} and this llmq needs {ABI_VERSION}; reinstall llmq.")
    tables = tuple(
        Int8Kernels(library, isa, library.llmq_isa_name(isa).decode(), library.llmq_int8_layout(isa).decode())
        for isa in range(library.llmq_isa_count())
        if library.llmq_isa_available(isa)
    )
    best = library.llmq_isa_name(library.llmq_isa_best()).decode()
    facts = Available(str(path), best, tuple(table.name for table in tables), library.llmq_threading().decode())
    return facts, tables


def bind(library: ctypes.CDLL) -> None:
    """Set the argument and result types of every symbol.

    Raises:
        AttributeError: when the library lacks one.
    """
    for symbol, result, arguments in SIGNATURES:
        function = getattr(library, symbol)
        function.restype = result
        function.argtypes = arguments


def _library_path() -> Path | None:
    """Find the library beside the package: an editable install has several roots."""
    candidates = (Path(root) / "lib" / "libllmq_cpu.so" for root in llmq.__path__)
    return next((path for path in candidates if path.is_file()), None)


@functools.lru_cache(maxsize=4096)
def _size(kernels: Int8Kernels, symbol: str, first: int, second: int) -> int:
    """Ask the library for a size; the answers are kept because asking takes longer than a small linear."""
    size = ctypes.c_int64()
    kernels.call(symbol, first, second, ctypes.byref(size))
    return size.value


def _readable(x: Tensor) -> tuple[Tensor, str]:
    """Return x as native code reads it (unit stride in a row, no overlap) and the suffix of its functions."""
    suffix = _SUFFIXES.get(x.dtype)
    if suffix is None or x.dim() != 2 or not x.is_cpu:
        raise KernelError(
            f"the native kernels take x [M, K] of float32, bfloat16 or float16 on the CPU, got {list(x.shape)} of {x.dtype} "
            f"on {x.device}."
        )
    if x.dtype is torch.float16:
        x = x.float()
    if not x.is_contiguous() and (x.stride(1) != 1 or x.stride(0) < x.shape[1]):
        x = x.contiguous()
    return x, suffix


def _row_stride(x: Tensor) -> int:
    """Elements from a row to the next; a single row may carry any stride, which nobody reads."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def _vector(name: str, tensor: Tensor, n: int) -> Tensor:
    """Return N floats as contiguous fp32."""
    if tensor.numel() != n or not tensor.is_floating_point() or not tensor.is_cpu:
        raise KernelError(f"{name} must be {n} floats on the CPU, got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}.")
    return tensor if tensor.dtype is torch.float32 and tensor.is_contiguous() else tensor.to(torch.float32).contiguous()


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, dim: int) -> None:
    if tensor.dtype is not dtype or tensor.dim() != dim or not tensor.is_cpu:
        raise KernelError(
            f"{name} must be a {dim}-dimensional {dtype} tensor on the CPU, got {list(tensor.shape)} of {tensor.dtype} "
            f"on {tensor.device}."
        )


def _quantize_per_token(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return int8_kernels().quantize(x, eps)


def _quantize_per_token_fake(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _int8_dynamic_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, n: int, eps: float) -> Tensor:
    if scale.numel() != n:
        raise KernelError(f"scale must have one element an output, n = {n}, got {scale.numel()}.")
    return int8_kernels().linear(x, packed, scale, bias, eps)


def _int8_dynamic_linear_fake(
    x: Tensor,
    packed: Tensor,  # noqa: ARG001
    scale: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    n: int,
    eps: float,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape[0], n)


_LIBRARY = torch.library.Library("llmq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("quantize_per_token(Tensor x, float eps) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "int8_dynamic_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int n, float eps) -> Tensor"
)
_LIBRARY.impl("quantize_per_token", _quantize_per_token, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("int8_dynamic_linear", _int8_dynamic_linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("llmq::quantize_per_token", _quantize_per_token_fake, lib=_LIBRARY)
torch.library.register_fake("llmq::int8_dynamic_linear", _int8_dynamic_linear_fake, lib=_LIBRARY)
