"""Choosing kernels: for one case, for every weight of a module, and the table of them all.

A weight is stored in one layout. The fastest kernel that supports its case decides which, and kernels of the same layout share
the rows among themselves. The order of `table.KERNELS` says which are fast, or times that were measured here (`choices`).

A kernel that says it supports a case is believed only after it has reproduced the exact result here: once a process for each
format, dtype and device.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmq.errors import KernelError, LlmqError
from llmq.files import page_out
from llmq.numerics.affine import MappingType, ZeroPointDomain, choose_qparams_affine, quantize_affine
from llmq.numerics.float8 import float8_scale, round_to_float8
from llmq.numerics.grid import Float8Grid, FloatGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight, same_bits, torch_dtype
from llmq.ops.check import exact_for, worst_element
from llmq.ops.choices import Plan, Timer, fastest_plan
from llmq.ops.schema import CANONICAL, SUPPORTED, Case, Kernel, Support, unsupported
from llmq.ops.table import KERNELS, REFERENCE, describe_rows, kernel_named, row_ranges
from llmq.ops.tensor import QuantizedTensor
from llmq.ops.usage import Usage, record_usage

__all__ = [
    "KERNELS",
    "Case",
    "Kernel",
    "KernelChoice",
    "KernelRow",
    "Support",
    "Usage",
    "candidates",
    "kernel_table",
    "prepare",
    "record_usage",
    "unprepare",
]

FIXED = "the first that fits"
_TEST_ROWS = (1, 2, 17)
_TEST_OUTPUTS = 64


@dataclass(frozen=True)
class KernelChoice:
    """What `prepare` chose for one weight."""

    fqn: str
    layout: str
    kernels: str
    """'1-63 rows: aten-int8pack; 64+ rows: dequant-gemm'."""
    rejected: dict[str, str]
    """Kernel -> why it was not taken."""
    why: str = FIXED
    """What the choice rests on: '`FIXED`', or 'measured for 1 and 512 rows: 41 us and 1.2 ms, against …'."""


@dataclass(frozen=True)
class KernelRow:
    """One line of `llmq kernels`."""

    name: str
    available: bool
    reason: str
    layout: str
    rows: str
    formats: str


def candidates(case: Case) -> list[tuple[Kernel, Support]]:
    """Return every kernel, fastest first, with whether it can compute `case` here, and why not."""
    return [(kernel, _support(kernel, case)) for kernel in KERNELS]


def prepare(module: nn.Module, *, prefer: str | None = None, timer: Timer | None = None) -> list[KernelChoice]:
    """Lay every quantized weight of `module` out for the fastest kernels that can run it here.

    Args:
        module: changed in place: its QuantizedTensor parameters are replaced.
        prefer: name of the kernel to use, for any number of rows, wherever it can run; the others get what they would have got.
        timer: measures, so that the fastest are taken; None: the first of the table that fits.

    Returns:
        One choice a weight, in the module's order; a weight that two modules share appears under both names.

    Raises:
        KernelError: when `prefer` is unknown, or can run none of the weights; nothing is changed then.
    """
    weights = [(fqn, owner, name, id(weight), weight.spec.case) for fqn, owner, name, weight in _weights(module)]
    plans = {case: _plan(case, prefer, timer) for case in dict.fromkeys(case for *_, case in weights)}
    if prefer is not None and weights and not any(prefer in plan.kernels for plan in plans.values()):
        kernel_named(prefer)
        reasons = "; ".join(sorted({plan.rejected[prefer] for plan in plans.values()}))
        raise KernelError(f"kernel {prefer!r} can run none of the {len(weights)} quantized weights: {reasons}.")
    last = {key: index for index, (_, _, _, key, _) in enumerate(weights)}
    choices, done = [], dict[int, nn.Parameter]()
    for index, (fqn, owner, name, key, case) in enumerate(weights):
        plan = plans[case]
        weight = getattr(owner, name)
        if key not in done:
            done[key] = nn.Parameter(weight.with_kernels(plan.layout, plan.kernels, plan.until), requires_grad=False)
        setattr(owner, name, done[key])
        if index == last[key]:  # nothing else holds the old one, so that never more than one weight is there twice
            _put_away(weight, done[key])
            del weight
        choices.append(KernelChoice(fqn, plan.layout, describe_rows(plan.kernels, plan.until), plan.rejected, plan.why))
    return choices


def unprepare(module: nn.Module) -> None:
    """Put every quantized weight of `module` back into the canonical layout, on the reference kernel."""
    done = dict[int, nn.Parameter]()
    for _, owner, name, weight in list(_weights(module)):
        if id(weight) not in done:
            done[id(weight)] = nn.Parameter(weight.with_kernels(CANONICAL, (REFERENCE,)), requires_grad=False)
        setattr(owner, name, done[id(weight)])


def kernel_table() -> list[KernelRow]:
    """Return every kernel, fastest first, with whether this machine can run it at all."""
    rows = []
    for kernel in KERNELS:
        answer = kernel.available()
        span = f"{kernel.min_rows}+" if kernel.max_rows is None else f"{kernel.min_rows}-{kernel.max_rows}"
        rows.append(KernelRow(kernel.name, answer.ok, answer.reason, kernel.layout, span, kernel.formats))
    return rows


def _put_away(old: QuantizedTensor, new: Tensor) -> None:
    """Let the system take back the pages of the tensors that a new layout has replaced, if they are a file's."""
    assert isinstance(new, QuantizedTensor)
    kept = {tensor.data_ptr() for tensor in new.stored}
    for tensor in old.stored:
        if tensor.device.type == "cpu" and tensor.data_ptr() not in kept:
            page_out(tensor.data_ptr(), tensor.nbytes)


def _weights(module: nn.Module) -> list[tuple[str, nn.Module, str, QuantizedTensor]]:
    """Every quantized parameter: fqn, owner, name in the owner, tensor."""
    return [
        (f"{path}.{name}" if path else name, owner, name, parameter)
        for path, owner in module.named_modules()
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if isinstance(parameter, QuantizedTensor)
    ]


def _plan(case: Case, prefer: str | None, timer: Timer | None) -> Plan:
    """Choose kernels for one case: only those that some number of rows gets."""
    answers = candidates(case)
    rejected = {kernel.name: answer.reason for kernel, answer in answers if not answer.ok}
    fit = [kernel for kernel, answer in answers if answer.ok]
    if any(kernel.name == prefer for kernel in fit):
        assert prefer is not None
        rejected |= {kernel.name: f"{prefer} was asked for" for kernel in fit if kernel.name != prefer}
        return Plan(kernel_named(prefer).layout, (prefer,), why="it was asked for", rejected=rejected)
    timed = [kernel for kernel in fit if kernel.name != REFERENCE]
    if timer is not None and len(timed) > 1 and case.device != "meta":
        plan = fastest_plan(timed, timer(case, timed))
        return replace(plan, rejected=rejected | plan.rejected | {REFERENCE: "it defines the result, and is not timed"})
    layout = fit[0].layout
    used = _serving(tuple(kernel.name for kernel in fit if kernel.layout == layout))
    rejected |= {kernel.name: f"a faster one serves, in layout {layout}" for kernel in fit if kernel.name not in used}
    return Plan(layout, used, why=FIXED, rejected=rejected)


def _serving(names: tuple[str, ...]) -> tuple[str, ...]:
    """Drop the kernels that no number of rows gets."""
    served = {kernel.name for _, kernel in row_ranges(names)}
    return tuple(name for name in names if name in served)


def _support(kernel: Kernel, case: Case) -> Support:
    answer = kernel.supports(case)
    if not answer.ok or kernel.name == REFERENCE or case.device == "meta":
        return answer
    return _self_test(kernel.name, case.format, case.dtype, case.device)


@functools.cache
def _self_test(name: str, format: LinearFormat, dtype: torch.dtype, device: str) -> Support:  # noqa: A002
    """Run the kernel on a small weight and compare with the exact result; a failure, or an error, disqualifies it."""
    kernel = kernel_named(name)
    group = format.weight.group_size if isinstance(format.weight, IntGrid) else None
    case = Case(format, _TEST_OUTPUTS, 3 * math.lcm(group or 64, 128), dtype, device)
    if not kernel.supports(case).ok:
        return unsupported(f"its start-up test [{case.n}, {case.k}] is not within its limits: {kernel.supports(case).reason}")
    generator = torch.Generator().manual_seed(0)
    weight = _test_weight(case, generator)
    bias = torch.randn(case.n, generator=generator).to(dtype)
    try:
        packed = kernel.prepack(weight.to(device))
        restored = kernel.unpack(packed, case).to("cpu")
        if not all(same_bits(a, b) for a, b in zip(weight.tensors, restored.tensors, strict=True)):
            return unsupported("its start-up test failed: unpacking does not give back what was packed")
        for rows in _TEST_ROWS:
            x = torch.randn(rows, case.k, generator=generator).to(dtype)
            y = kernel.linear(x.to(device), packed, bias.to(device), case).cpu()
            worst = worst_element(y, exact_for(kernel, x, weight, bias, replace(case, device="cpu")))
            if worst:
                return unsupported(f"its start-up test failed: {worst}")
    except (RuntimeError, LlmqError) as error:
        return unsupported(f"its start-up test raised {type(error).__name__}: {str(error).splitlines()[0]}")
    return SUPPORTED


def _test_weight(case: Case, generator: torch.Generator) -> QuantizedWeight:
    """A weight [N, K] with random codes over the whole grid, except a row of zeros."""
    numbers = torch.randn(case.n, case.k, generator=generator)
    numbers[1] = 0
    grid = case.format.weight
    if isinstance(grid, FloatGrid):
        return QuantizedWeight.from_float(numbers.to(torch_dtype(grid.dtype)))
    if isinstance(grid, Float8Grid):
        steps = float8_scale(numbers.abs().amax(dim=1, keepdim=True), 1e-4).to(torch_dtype(grid.scale_dtype))
        return QuantizedWeight.from_codes(grid, round_to_float8(numbers, steps), steps)
    block = (1, grid.group_size or case.k)
    mapping = MappingType.SYMMETRIC if grid.symmetric else MappingType.ASYMMETRIC
    domain = ZeroPointDomain(grid.zero_point)
    scale_dtype = torch_dtype(grid.scale_dtype)
    scale, zero_point = choose_qparams_affine(
        numbers,
        mapping,
        block,
        quant_min=grid.qmin,
        quant_max=grid.qmax,
        eps=1e-4,
        scale_dtype=scale_dtype,
        zero_point_dtype=torch.uint8 if grid.zero_point == "int" else scale_dtype,
        zero_point_domain=domain,
        preserve_zero=grid.zero_point != "float",
    )
    codes = quantize_affine(
        numbers,
        block,
        scale.float(),
        None if zero_point is None else zero_point.float(),
        output_dtype=torch.int8 if grid.symmetric else torch.uint8,
        quant_min=grid.qmin,
        quant_max=grid.qmax,
        zero_point_domain=domain,
    )
    weight = QuantizedWeight.from_codes(grid, codes, scale, zero_point)
    # so small that the largest inputs are clamped
    return replace(weight, input_scale=torch.full((1,), 2.0 / 127)) if case.format.has_input_scale else weight
