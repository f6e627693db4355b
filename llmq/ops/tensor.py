"""QuantizedTensor: a linear's weight that is a torch.Tensor, so that `nn.Linear` stays `nn.Linear`.

It looks like the weight [N, K] in the dtype the linear computes in, and holds the stored tensors of a `QuantizedWeight`, either
canonical or in one kernel's layout. `F.linear`, `matmul`, `mm` and `addmm` with it (or its transpose) go to the kernel that the
number of rows asks for; what else a weight must bear (detach, clone, to, copy_, deepcopy, save, load, compile, export) works on
the stored tensors. Anything else raises: nothing is dequantized behind the user's back.

Two ways lead to a kernel. In eager mode `__torch_function__` calls it, which costs a few microseconds. While a graph is traced
the call becomes the operator `llmq::linear`, and `__torch_dispatch__` replaces that by the kernel's own operators.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing

from llmq.errors import ShapeError, UsageError
from llmq.numerics.grid import LinearFormat, format_from_json
from llmq.numerics.weight import QuantizedWeight, check_input_scale
from llmq.ops.schema import CANONICAL, Case, Kernel, canonical_weight
from llmq.ops.table import REFERENCE, describe_rows, kernel_named, row_ranges
from llmq.ops.usage import current_usage

_REAL = (Tensor, torch.nn.Parameter)
_PARTS = ("part0", "part1", "part2", "part3")

_LIBRARY = torch.library.Library("llmq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything about a QuantizedTensor that is not a tensor: what a compiled graph is specialised for."""

    case: Case
    layout: str
    kernels: tuple[str, ...]
    transposed: bool = False
    until: tuple[int | None, ...] = ()
    """The last number of rows of each kernel, where that was measured; see `row_ranges`."""


class QuantizedTensor(Tensor):
    """A quantized (or unquantized, see `FloatGrid`) weight of a linear; see the module."""

    spec: Spec
    stored: tuple[Tensor, ...]

    @staticmethod
    def __new__(cls, stored: tuple[Tensor, ...], spec: Spec) -> QuantizedTensor:  # noqa: D102
        case = spec.case
        shape = (case.k, case.n) if spec.transposed else (case.n, case.k)
        strides = (1, case.k) if spec.transposed else (case.k, 1)
        wrapper: QuantizedTensor = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, shape, strides=strides, dtype=case.dtype, device=stored[0].device, requires_grad=False
        )
        return wrapper

    def __init__(self, stored: tuple[Tensor, ...], spec: Spec) -> None:
        self.spec = spec
        self.stored = stored
        for name, tensor in zip(_PARTS, stored, strict=False):  # where traced code looks for them
            setattr(self, name, tensor)

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        format: LinearFormat,  # noqa: A002
        dtype: torch.dtype = torch.bfloat16,
    ) -> QuantizedTensor:
        """Wrap a weight in the canonical layout; it runs on the reference kernel until `select.prepare` finds a better one.

        Args:
            weight: [N, K], on the format's weight grid; its memory is shared.
            format: what the linear computes.
            dtype: dtype of the activations and of the result.

        Raises:
            UsageError: when the weight is on another grid than the format's, or has an input scale where the format has none, or
                the other way round, or one that is no normal positive number.
        """
        if weight.grid != format.weight:
            raise UsageError(f"the weight is on {weight.grid}, and the format asks for {format.weight}.")
        check_input_scale(format.activation, weight.input_scale)
        if weight.input_scale is not None and not weight.input_scale.is_meta:
            step = float(weight.input_scale)
            if not torch.finfo(torch.float32).smallest_normal <= step < float("inf"):
                raise UsageError(f"the scale of an input is a normal positive fp32 number, got {step}; calibrate it again.")
        case = Case(format, *weight.shape, dtype, weight.qdata.device.type)
        return cls(weight.tensors, Spec(case, CANONICAL, (REFERENCE,)))

    @property
    def format(self) -> LinearFormat:
        """What the linear computes."""
        return self.spec.case.format

    @property
    def kernel_layout(self) -> str:
        """Name of the layout the stored tensors are in (`Tensor.layout` is torch's, and another thing)."""
        return self.spec.layout

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that run it, in the order of preference."""
        return self.spec.kernels

    @property
    def weight(self) -> QuantizedWeight:
        """The canonical weight; unpacked when it is in a kernel's layout."""
        if self.spec.layout == CANONICAL:
            return canonical_weight(self.stored, self.spec.case)
        return kernel_named(self.spec.kernels[0]).unpack(self.stored, self.spec.case)

    @property
    def nbytes_stored(self) -> int:
        """Bytes of all stored tensors, scales and zero points included: what one decode step reads."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the numbers it means, a plain tensor of its shape; see `QuantizedWeight.dequantize`."""
        numbers = self.weight.dequantize(dtype)
        return numbers.T if self.spec.transposed else numbers

    def with_kernels(self, layout: str, kernels: tuple[str, ...], until: tuple[int | None, ...] = ()) -> QuantizedTensor:
        """Return the weight laid out for kernels, which must all read `layout`; `select.prepare` chooses them and their rows."""
        if layout == self.spec.layout:
            stored = self.stored
        else:
            weight = self.weight
            stored = weight.tensors if layout == CANONICAL else kernel_named(kernels[0]).prepack(weight)
        return QuantizedTensor(stored, replace(self.spec, layout=layout, kernels=kernels, until=until))

    def pick(self, rows: int | torch.SymInt) -> Kernel:
        """Return the kernel for `rows` rows of x; an exported graph of any number of rows gets the one without a limit."""
        ranges = row_ranges(self.spec.kernels, self.spec.until)
        if len(ranges) == 1 or (isinstance(rows, torch.SymInt) and torch.compiler.is_exporting()):
            return ranges[-1][1]
        for last, kernel in ranges:
            if last is None or rows <= last:
                return kernel
        raise AssertionError("the last range has no end")

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        case = self.spec.case
        return (
            f"QuantizedTensor([{case.n}, {case.k}], {case.format}, dtype={case.dtype}, device={case.device!r}, "
            f"layout={self.spec.layout!r}, kernels={self.spec.kernels})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], Spec]:
        return list(_PARTS[: len(self.stored)]), self.spec

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor],
        spec: Spec,
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> QuantizedTensor:
        return QuantizedTensor(tuple(inner[name] for name in _PARTS if name in inner), spec)

    def _stable_hash_for_caching(self) -> str:
        """Key of torch's compile cache: everything a compiled graph is specialised for."""
        tensors = [(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type) for tensor in self.stored]
        return hashlib.sha256(repr((self.spec, tensors)).encode()).hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        copied: Tensor = self.map(torch.clone)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, proto: object) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """Pickle the canonical tensors: a kernel's layout is right on one kind of machine only."""
        case = self.spec.case
        state = {
            "format": case.format.to_json(),
            "n": case.n,
            "k": case.k,
            "dtype": case.dtype,
            "transposed": self.spec.transposed,
            "parameter": isinstance(self, torch.nn.Parameter),
        }
        return _rebuild, (state, self.weight.tensors)

    def map(self, function: Callable[[Tensor], Tensor], **changes: Any) -> QuantizedTensor:
        """Return a tensor of the same kind with `function` applied to the stored tensors, and fields of the spec changed."""
        return QuantizedTensor(tuple(function(tensor) for tensor in self.stored), replace(self.spec, **changes))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func in _MATMULS and len(args) == 2:
            return _matmul(*args)
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            raise UsageError(
                f"{func} is not defined for a quantized weight, which can only be multiplied by, moved, copied and saved; "
                "take .dequantize() for a plain tensor."
            )
        return handler(*args, **(kwargs or {}))


def multiply(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias with the kernel for that many rows.

    Args:
        x: [..., K] of the weight's dtype.
        weight: [N, K], or its transpose [K, N], which multiplies the same.
        bias: [N] or None.

    Returns:
        [..., N] of the weight's dtype.

    Raises:
        UsageError: for another dtype, or an x that needs a gradient.
        ShapeError: when x has not K columns.
    """
    spec = weight.spec
    case = spec.case
    if x.dtype != case.dtype:
        raise UsageError(f"the input is {x.dtype} and the weight computes in {case.dtype}; cast one of them with .to().")
    if x.dim() == 0 or x.shape[-1] != case.k:
        raise ShapeError(f"the weight [{case.n}, {case.k}] takes inputs [..., {case.k}], got {list(x.shape)}.")
    if x.requires_grad and torch.is_grad_enabled():
        raise UsageError("a quantized weight has no gradient; call the model under torch.no_grad() or torch.inference_mode().")
    flat = x if x.dim() == 2 else x.reshape(-1, case.k)
    kernel = weight.pick(flat.shape[0])
    y = kernel.linear(flat, weight.stored, bias, case)
    usage = current_usage()
    if usage is not None and type(x) in _REAL:  # tracing a graph is not running it
        usage.add(kernel.name, id(weight.stored[0]))
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], case.n)


def _run(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.llmq.linear(x, weight, bias)  # type: ignore[no-any-return]
    return multiply(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, `aten.linear`."""
    if not isinstance(weight, QuantizedTensor) or weight.spec.transposed:
        raise UsageError("a quantized weight [N, K] can only be the second operand of F.linear; got it elsewhere, or transposed.")
    return _run(x, weight, bias)


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in its many spellings."""
    if not isinstance(weight, QuantizedTensor) or not weight.spec.transposed:
        raise UsageError("a quantized weight can only be the second operand of a matrix product, transposed: x @ weight.T.")
    return _run(x, weight)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`aten.addmm`: what F.linear with a bias becomes below autograd."""
    if not isinstance(weight, QuantizedTensor) or not weight.spec.transposed:
        raise UsageError("a quantized weight can only be the last operand of addmm, transposed: addmm(bias, x, weight.T).")
    if beta != 1 or alpha != 1 or bias.dim() != 1:
        raise UsageError(
            f"addmm with a quantized weight adds a bias [N] with beta = alpha = 1, got shape {list(bias.shape)}, "
            f"beta={beta}, alpha={alpha}."
        )
    return _run(x, weight, bias)


def _transpose(weight: QuantizedTensor) -> QuantizedTensor:
    return weight.map(lambda tensor: tensor, transposed=not weight.spec.transposed)


def _transpose_dims(weight: QuantizedTensor, first: int, second: int) -> QuantizedTensor:
    return weight.map(lambda tensor: tensor) if first % 2 == second % 2 else _transpose(weight)


def _permute(weight: QuantizedTensor, dims: Sequence[int]) -> QuantizedTensor:
    return _transpose_dims(weight, 0, dims[0])


def _detach(weight: QuantizedTensor) -> QuantizedTensor:
    return weight.map(torch.detach)


def _clone(weight: QuantizedTensor, *, memory_format: torch.memory_format | None = None) -> QuantizedTensor:  # noqa: ARG001
    return weight.map(torch.clone)


def _to_copy(
    weight: QuantizedTensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> QuantizedTensor:
    """Change where it is and what it computes in; the stored numbers never change with the dtype."""
    spec = weight.spec
    case = replace(
        spec.case, dtype=dtype or spec.case.dtype, device=spec.case.device if device is None else torch.device(device).type
    )
    if case != spec.case and (spec.layout != CANONICAL or spec.kernels != (REFERENCE,)):
        raise UsageError(
            f"the weight is prepared for {spec.case.dtype} on {spec.case.device} ({describe_rows(spec.kernels, spec.until)}); "
            f"call unprepare() before moving it to {case.dtype} on {case.device}, and prepare() afterwards."
        )
    return weight.map(lambda tensor: tensor.to(device=device, copy=True), case=case)


def _copy(target: QuantizedTensor, source: Tensor, non_blocking: bool = False) -> QuantizedTensor:  # noqa: FBT001, FBT002
    """`copy_`, which load_state_dict calls: the numbers are replaced, format, layout and kernels stay."""
    if not isinstance(source, QuantizedTensor):
        raise UsageError("a quantized weight cannot be filled from a plain tensor; quantize it first, or load with assign=True.")
    mine, its = target.spec, source.spec
    if (mine.case.format, mine.case.n, mine.case.k, mine.transposed) != (its.case.format, its.case.n, its.case.k, its.transposed):
        raise UsageError(
            f"a weight [{its.case.n}, {its.case.k}] of {its.case.format} cannot fill one of [{mine.case.n}, {mine.case.k}] of "
            f"{mine.case.format}; load with assign=True."
        )
    for tensor, new in zip(target.stored, source.with_kernels(mine.layout, mine.kernels, mine.until).stored, strict=True):
        tensor.copy_(new, non_blocking)
    return target


def _aliasing(function: Callable[..., QuantizedTensor], overload: Any) -> Callable[..., QuantizedTensor]:
    """Tell torch which results share memory with which arguments, as the overload's schema says."""

    def handler(*args: Any, **kwargs: Any) -> QuantizedTensor:
        result: QuantizedTensor = return_and_correct_aliasing(  # type: ignore[no-untyped-call]
            overload, args, kwargs, function(*args, **kwargs)
        )
        return result

    return handler


_ATEN = torch.ops.aten
_COPIES: tuple[tuple[Any, Callable[..., QuantizedTensor]], ...] = (
    (_ATEN.t.default, _transpose),
    (_ATEN.transpose.int, _transpose_dims),
    (_ATEN.permute.default, _permute),
    (_ATEN.numpy_T.default, _transpose),
    (_ATEN.detach.default, _detach),
    (_ATEN.alias.default, _detach),
    (_ATEN.clone.default, _clone),
    (_ATEN._to_copy.default, _to_copy),  # noqa: SLF001
    (_ATEN.copy_.default, _copy),
)
_HANDLERS: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        torch.ops.llmq.linear.default: multiply,
        _ATEN.linear.default: _linear,
        _ATEN.matmul.default: _matmul,
        _ATEN.mm.default: _matmul,
        _ATEN.addmm.default: _addmm,
        **{overload: _aliasing(function, overload) for overload, function in _COPIES},
    }
)
_MATMULS = frozenset({torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__})


def _rebuild(state: dict[str, Any], tensors: tuple[Tensor, ...]) -> Tensor:
    """What unpickling calls with what `__reduce_ex__` returned."""
    case = Case(format_from_json(state["format"]), state["n"], state["k"], state["dtype"], tensors[0].device.type)
    canonical_weight(tensors, case)  # checks shapes and dtypes
    tensor = QuantizedTensor(tensors, Spec(case, CANONICAL, (REFERENCE,), state["transposed"]))
    return torch.nn.Parameter(tensor, requires_grad=False) if state["parameter"] else tensor


torch.serialization.add_safe_globals([_rebuild])
