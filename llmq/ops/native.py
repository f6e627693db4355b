"""The native CPU kernels: where the library is, what it offers here, and the torch operators made of it.

`kernels/cpu/llmq_cpu.h` defines every symbol and the arithmetic; `SIGNATURES` repeats the symbols for ctypes, `native_abi` the
structs, and tests keep them equal. The library is loaded at the first call that needs it, never at import. torch is imported
before it, so that its OpenMP is torch's own copy.

Operators, for CPU tensors, with fakes, usable in compiled and exported graphs:

    llmq::quantize_per_token(x [M, K], eps) -> (codes int8 [M, K], scale fp32 [M])
    llmq::native_linear(x [M, K], packed, bias [N]?, format, eps, input_scale fp32 [1]?) -> [M, N] of x's dtype

`format` is n, k, group, weight, zero, scale, activation: the numbers of the header's LlmqLinear.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import llmq
from llmq.errors import KernelError
from llmq.files import use_huge_pages
from llmq.ops.native_abi import DTYPE_BF16, DTYPE_F32, LlmqLinear
from llmq.ops.native_signatures import ABI_VERSION, SIGNATURES

LARGEST_K = 131072
"""LLMQ_MAX_K of llmq_cpu.h."""

_IDLE_SCALE = 1.0
"""Where activations are not static nobody reads it; sizes do not depend on it."""

Format = tuple[int, int, int, int, int, int, int]
"""n, k, group, weight, zero, scale, activation of an LlmqLinear."""


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
class Kernels:
    """The functions of one instruction set. Tensors are on the CPU; everything is checked before native code runs."""

    library: ctypes.CDLL
    isa: int
    name: str

    def layout(self, weight: int) -> str:
        """Return the name of the layout of a kind of weight (native_abi.WEIGHT_*)."""
        name: bytes = self.library.llmq_linear_layout(self.isa, weight)
        return name.decode()

    def pack(self, weight: Tensor, scale: Tensor | None, zero: Tensor | None, linear: LlmqLinear) -> Tensor:
        """Lay a weight out for this instruction set.

        Args:
            weight: [N, K]: int8 codes, uint8 codes 0..15, bfloat16 or float32.
            scale: [N, K / group], or None for float weights.
            zero: [N, K / group] of numbers or integers, or None.
            linear: says which of these; `packed` and `bias` are not looked at.

        Returns:
            uint8, flat.

        Raises:
            KernelError: when the format is none that the library knows.
        """
        packed = torch.empty(_size(self, "llmq_linear_packed_bytes", format_numbers(linear), linear.eps), dtype=torch.uint8)
        use_huge_pages(packed.data_ptr(), packed.nbytes)
        source = weight.contiguous()
        numbers = [None if tensor is None else tensor.float().contiguous() for tensor in (scale, zero)]
        self.call(
            "llmq_linear_pack",
            ctypes.byref(linear),
            source.data_ptr(),
            *(None if tensor is None else tensor.data_ptr() for tensor in numbers),
            packed.data_ptr(),
            torch.get_num_threads(),
        )
        return packed

    def unpack(self, packed: Tensor, weight: Tensor, scale: Tensor | None, zero: Tensor | None, linear: LlmqLinear) -> None:
        """Inverse of `pack`, bit for bit: fills `weight`, and fp32 `scale` and `zero` where there are some."""
        self._check_packed(packed, format_numbers(linear), linear.eps)
        self.call(
            "llmq_linear_unpack",
            ctypes.byref(linear),
            packed.data_ptr(),
            weight.data_ptr(),
            *(None if tensor is None else tensor.data_ptr() for tensor in (scale, zero)),
            torch.get_num_threads(),
        )

    def linear(
        self, x: Tensor, packed: Tensor, bias: Tensor | None, numbers: Format, eps: float, input_scale: Tensor | None = None
    ) -> Tensor:
        """Multiply: x W^T + bias as the header defines it.

        Args:
            x: [M, K] of float32, bfloat16 or float16 (computed as float32).
            packed: what `pack` returned.
            bias: N elements of a floating dtype, or None; used as fp32.
            numbers: the format.
            eps: smallest scale of a row of quantized activations; a normal positive number.
            input_scale: one fp32 number, the scale of static activations, also normal and positive; None for others.

        Returns:
            [M, N] of x's dtype.

        Raises:
            KernelError: when the tensors do not belong together.
        """
        out_dtype = x.dtype
        x = _readable(x)
        n, k = numbers[:2]
        m = x.shape[0]
        if x.shape[1] != k:
            raise KernelError(f"x must have K = {k} columns, got {list(x.shape)}.")
        self._check_packed(packed, numbers, eps)
        offset = None if bias is None else _vector("bias", bias, n)
        step = _IDLE_SCALE if input_scale is None else input_scale.item()
        linear = LlmqLinear(*numbers, eps, step, packed.data_ptr(), None if offset is None else offset.data_ptr())
        workspace = torch.empty(_size(self, "llmq_linear_workspace_bytes", numbers, eps, m), dtype=torch.uint8)
        y = torch.empty(m, n, dtype=x.dtype)
        self.call(
            "llmq_linear",
            ctypes.byref(linear),
            x.data_ptr(),
            y.data_ptr(),
            workspace.data_ptr(),
            m,
            _row_stride(x),
            DTYPE_BF16 if x.dtype is torch.bfloat16 else DTYPE_F32,
            torch.get_num_threads(),
        )
        return y if out_dtype == y.dtype else y.to(out_dtype)

    def quantize(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Quantize the rows of x [M, K] (float32, bfloat16, float16): codes int8 [M, K] and scale fp32 [M]."""
        x = _readable(x)
        m, k = x.shape
        codes, scale = torch.empty(m, k, dtype=torch.int8), torch.empty(m)
        self.call(
            "llmq_quantize_per_token",
            x.data_ptr(),
            codes.data_ptr(),
            scale.data_ptr(),
            m,
            k,
            _row_stride(x),
            DTYPE_BF16 if x.dtype is torch.bfloat16 else DTYPE_F32,
            eps,
            torch.get_num_threads(),
        )
        return codes, scale

    def _check_packed(self, packed: Tensor, numbers: Format, eps: float) -> None:
        expected = _size(self, "llmq_linear_packed_bytes", numbers, eps)
        if packed.dtype is not torch.uint8 or packed.numel() != expected or not packed.is_contiguous() or not packed.is_cpu:
            raise KernelError(
                f"a weight [{numbers[0]}, {numbers[1]}] packed for {self.name} is {expected} contiguous bytes, got "
                f"{list(packed.shape)} of {packed.dtype} on {packed.device}; pack it here."
            )

    def call(self, symbol: str, *arguments: object) -> None:
        """Call a function that returns a status; the instruction set is its first argument.

        Raises:
            KernelError: when it refuses.
        """
        status = getattr(self.library, symbol)(self.isa, *arguments)
        if status:
            message = self.library.llmq_status_message(status).decode()
            raise KernelError(f"{symbol} on {self.name} refused its arguments: {message}.")


def format_numbers(linear: LlmqLinear) -> Format:
    """Return the format of a linear as plain numbers."""
    return (linear.n, linear.k, linear.group, linear.weight, linear.zero, linear.scale, linear.activation)


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


@functools.cache
def kernels(isa: str | None = None) -> Kernels:
    """Return the functions of an instruction set.

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
def _loaded() -> tuple[Available, tuple[Kernels, ...]] | Unavailable:
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
        Kernels(library, isa, library.llmq_isa_name(isa).decode())
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
def _size(table: Kernels, symbol: str, numbers: Format, eps: float, *arguments: int) -> int:
    """Ask the library for a size; the answers are kept because asking takes longer than a small linear."""
    size = ctypes.c_int64()
    linear = LlmqLinear(*numbers, eps, _IDLE_SCALE)
    table.call(symbol, ctypes.byref(linear), *arguments, ctypes.byref(size))
    return size.value


def _readable(x: Tensor) -> Tensor:
    """Return x as native code reads it: float32 or bfloat16, unit stride in a row, no overlap."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dim() != 2 or not x.is_cpu:
        raise KernelError(
            f"the native kernels take x [M, K] of float32, bfloat16 or float16 on the CPU, got {list(x.shape)} of {x.dtype} "
            f"on {x.device}."
        )
    if x.dtype is torch.float16:
        x = x.float()
    if not x.is_contiguous() and (x.stride(1) != 1 or x.stride(0) < x.shape[1]):
        x = x.contiguous()
    return x


def _row_stride(x: Tensor) -> int:
    """Elements from a row to the next; a single row may carry any stride, which nobody reads."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def _vector(name: str, tensor: Tensor, n: int) -> Tensor:
    """Return N floats as contiguous fp32."""
    if tensor.numel() != n or not tensor.is_floating_point() or not tensor.is_cpu:
        raise KernelError(f"{name} must be {n} floats on the CPU, got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}.")
    return tensor if tensor.dtype is torch.float32 and tensor.is_contiguous() else tensor.to(torch.float32).contiguous()


def _numbers(numbers: Sequence[int]) -> Format:
    n, k, group, weight, zero, scale, activation = numbers
    return (n, k, group, weight, zero, scale, activation)


def _quantize_per_token(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return kernels().quantize(x, eps)


def _quantize_per_token_fake(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _native_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    numbers: Sequence[int],
    eps: float,
    input_scale: Tensor | None = None,
) -> Tensor:
    return kernels().linear(x, packed, bias, _numbers(numbers), eps, input_scale)


def _native_linear_fake(
    x: Tensor,
    packed: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    numbers: Sequence[int],
    eps: float,  # noqa: ARG001
    input_scale: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape[0], numbers[0])


_LIBRARY = torch.library.Library("llmq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("quantize_per_token(Tensor x, float eps) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "native_linear(Tensor x, Tensor packed, Tensor? bias, int[] format, float eps, Tensor? input_scale=None) -> Tensor"
)
_LIBRARY.impl("quantize_per_token", _quantize_per_token, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("native_linear", _native_linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("llmq::quantize_per_token", _quantize_per_token_fake, lib=_LIBRARY)
torch.library.register_fake("llmq::native_linear", _native_linear_fake, lib=_LIBRARY)
