"""quantize_: swap the weights of a module's linears, in place, all or none. Works on any nn.Module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llmq.algorithms.statistics import Statistics
from llmq.errors import SchemeError, ShapeError, UsageError, suggest
from llmq.numerics.grid import GROUP_SIZES, FloatGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight, float_grid
from llmq.ops.tensor import QuantizedTensor
from llmq.results.coverage import Coverage
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.cover import Decision, coverage
from llmq.schemes.registry import resolve

LinearFilter = Callable[[str, nn.Linear], bool]
"""Given a linear's fqn and module, whether the scheme is for it."""

NO_OVERRIDES: Mapping[str, ResolvedScheme] = MappingProxyType({})

_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_(  # noqa: PLR0913 - the library's one call: what to apply, where, and how
    module: nn.Module,
    scheme: str | ResolvedScheme,
    *,
    options: Mapping[str, Any] | None = None,
    filter: LinearFilter | None = None,  # noqa: A002 - the name torchao's users know
    skip: Sequence[str] = (),
    skip_unfit: bool = False,
    dtype: torch.dtype | None = None,
    statistics: Mapping[str, Tensor | Statistics] | None = None,
    overrides: Mapping[str, ResolvedScheme] | None = None,
) -> Coverage:
    """Quantize the linears of a module in place. Everything is checked first: on an error nothing has changed.

    Linears that are skipped get a QuantizedTensor too, on the grid of their float dtype, so that one mechanism chooses their
    kernel and counts their bytes; linears that `filter` refuses are left as they are.

    Args:
        module: any module. Weights that are nn.Linear's are swapped for QuantizedTensors in the canonical layout.
        scheme: a scheme's name, or a resolved scheme.
        options: of the scheme, when it is given by name.
        filter: takes a linear's fqn and the linear; False leaves it as it is. None: every linear.
        skip: shell patterns of fqns (`lm_head`, `*.down_proj`) that are left unquantized. A baseline quantizes nothing, so
            there it has no effect.
        skip_unfit: leave linears whose shape does not fit the grid unquantized, instead of refusing all.
        dtype: compute dtype: what activations are, and what everything that is not quantized is cast to. None: each
            weight's own, and nothing is cast. A baseline casts to its own.
        statistics: for schemes that need calibration: what is known of each linear, by fqn; a tensor is the Hessian [K, K] of
            its inputs.
        overrides: schemes of single linears, by fqn, instead of `scheme`.

    Returns:
        What was done to every parameter, and why not.

    Raises:
        ShapeError: linears do not fit; names all of them, and the group sizes that would fit.
        SchemeError: statistics are missing, a weight is quantized already, or not there (on the meta device).
        UsageError: the scheme, an option or a pattern is unknown.
    """
    resolved = resolve(scheme, options) if isinstance(scheme, str) else scheme
    if options and not isinstance(scheme, str):
        raise UsageError("options belong to a scheme that is given by name; this one is resolved already.")
    decisions = decide(module, resolved, filter=filter, skip=skip, skip_unfit=skip_unfit, dtype=dtype, overrides=overrides or {})
    needy = [decision for decision in decisions if decision.scheme is not None and decision.scheme.needs_calibration]
    missing = [decision for decision in needy if decision.fqn not in (statistics or {})]
    if missing:
        assert missing[0].scheme is not None
        fqns = [decision.fqn for decision in missing]
        raise SchemeError(
            f"scheme {missing[0].scheme.name} needs statistics of the inputs of {_listed(fqns)}; quantize with calibration text "
            "(llmq.calibration.quantize_sequential, `llmq quantize --calibration`), or pass a Hessian a linear in statistics."
        )
    absent = [decision.fqn for decision in decisions if decision.format and decision.parameter.is_meta]
    if absent:
        raise SchemeError(f"the weights of {_listed(absent)} are on the meta device, without values; load the checkpoint first.")
    dtypes = {decision.fqn: decision.parameter.dtype for decision in decisions}
    noise: dict[str, float | None] = {}
    swapped: dict[int, nn.Parameter] = {}  # one weight may serve two linears
    compute = resolved.baseline_dtype or dtype
    for decision in decisions:
        if decision.linear is None or decision.format is None:
            continue
        key = id(decision.parameter)
        if decision.scheme is not None and decision.format.quantized:
            if key not in swapped:
                weight = plain_weight(decision.parameter)
                known = (statistics or {}).get(decision.fqn) if decision.scheme.needs_calibration else None
                known = Statistics(known) if isinstance(known, Tensor) else known
                quantized, report = decision.scheme.quantize_weight(weight, known, decision.fqn)
                swapped[key] = quantized_parameter(quantized, decision.format, compute or weight.dtype)
                noise[decision.fqn] = report.sqnr_db
            decision.linear.weight = swapped[key]
    if compute is not None:
        cast_(module, compute)
    wrap_floats_([decision for decision in decisions if decision.linear is not None and decision.format is not None])
    return coverage(resolved.name, decisions, dtypes=dtypes, noise=noise, compute=compute)


def plan(
    module: nn.Module,
    resolved: ResolvedScheme,
    *,
    filter: LinearFilter | None = None,  # noqa: A002
    skip: Sequence[str] = (),
    skip_unfit: bool = False,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, ResolvedScheme] | None = None,
) -> Coverage:
    """Say what `quantize_` would do, without doing it; the module may be on the meta device. Raises what `decide` raises."""
    decisions = decide(module, resolved, filter=filter, skip=skip, skip_unfit=skip_unfit, dtype=dtype, overrides=overrides or {})
    dtypes = {decision.fqn: decision.parameter.dtype for decision in decisions}
    return coverage(resolved.name, decisions, dtypes=dtypes, noise={}, compute=resolved.baseline_dtype or dtype)


def decide(
    module: nn.Module,
    resolved: ResolvedScheme,
    *,
    filter: LinearFilter | None = None,  # noqa: A002
    skip: Sequence[str] = (),
    skip_unfit: bool = False,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, ResolvedScheme] = NO_OVERRIDES,
) -> list[Decision]:
    """Decide what `quantize_` will do with every parameter; changes nothing, and works on the meta device.

    Raises:
        ShapeError: linears do not fit.
        SchemeError: a weight is quantized already.
        UsageError: a pattern matches no linear.
    """
    compute = resolved.baseline_dtype or dtype
    if compute is not None and compute not in _COMPUTE_DTYPES:
        raise UsageError(f"compute dtypes are float32, bfloat16 and float16, got {compute}.")
    linears = {fqn: m for fqn, m in module.named_modules() if isinstance(m, nn.Linear)}
    _check_patterns(skip, list(linears))
    decisions, unfit = [], []
    for fqn, owner, parameter in _parameters(module):
        linear = linears.get(fqn)
        if linear is None:
            decisions.append(Decision(fqn, None, parameter, None, f"not a linear ({type(owner).__name__})"))
            continue
        if isinstance(parameter, QuantizedTensor) and parameter.format.quantized:
            raise SchemeError(f"{fqn or 'the linear'} is quantized already; start from the original weights.")
        decision = _decide_linear(fqn, linear, overrides.get(fqn, resolved), compute, filter=filter, skip=skip)
        if decision.covered and decision.format and (misfit := decision.format.weight.misfit(*parameter.shape)):
            unfit.append((fqn, linear, misfit))
            decision = Decision(fqn, linear, parameter, _kept(parameter, compute), f"does not fit: {misfit}")
        decisions.append(decision)
    if unfit and not skip_unfit:
        wanted = [m.weight.shape[1] for _, m, _ in unfit] + [d.parameter.shape[1] for d in decisions if d.covered]
        raise ShapeError(_unfit_message(resolved.name, unfit, wanted))
    return decisions


def _decide_linear(
    fqn: str,
    linear: nn.Linear,
    resolved: ResolvedScheme,
    compute: torch.dtype | None,
    *,
    filter: LinearFilter | None,  # noqa: A002
    skip: Sequence[str],
) -> Decision:
    weight = linear.weight
    if filter is not None and not filter(fqn, linear):
        return Decision(fqn, linear, weight, None, "refused by the filter")
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return Decision(fqn, linear, weight, None, "its weight is read by the module around it, not by a linear")
    if weight.dtype not in (*_COMPUTE_DTYPES, torch.float64):
        return Decision(fqn, linear, weight, None, f"its weight is {weight.dtype}")
    if compute is None and weight.dtype not in _COMPUTE_DTYPES:
        return Decision(fqn, linear, weight, None, f"{weight.dtype} is no compute dtype, and no other was asked for")
    if resolved.baseline_dtype is None and any(fnmatchcase(fqn, pattern) for pattern in skip):
        return Decision(fqn, linear, weight, _kept(weight, compute), "skipped as asked")
    return Decision(fqn, linear, weight, resolved.format, scheme=resolved)


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every parameter but biases, under its module's fqn where it is called `weight`."""
    for fqn, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if name == "weight":
                yield fqn, owner, parameter
            elif name != "bias":
                yield f"{fqn}.{name}".lstrip("."), owner, parameter


def _kept(weight: Tensor, compute: torch.dtype | None) -> LinearFormat:
    """The format of a linear that is not quantized."""
    return LinearFormat(float_grid(compute or weight.dtype))


def _check_patterns(patterns: Sequence[str], fqns: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(fqn, pattern) for fqn in fqns):
            kinds = sorted({fqn.rsplit(".", 1)[-1] for fqn in fqns})
            raise UsageError(
                f"--skip pattern {pattern!r} matches no linear; patterns are matched against whole names such as "
                f"{fqns[0] if fqns else 'model.layers.0.self_attn.q_proj'!r}.{suggest(pattern, kinds)}"
            )


def _unfit_message(name: str, unfit: list[tuple[str, nn.Linear, str]], wanted: list[int]) -> str:
    by_shape: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for fqn, linear, misfit in unfit:
        by_shape.setdefault((tuple(linear.weight.shape), misfit), []).append(fqn)
    layers = "; ".join(f"{', '.join(fqns)} {list(shape)} because {misfit}" for (shape, misfit), fqns in by_shape.items())
    common = [str(size) for size in GROUP_SIZES if all(k % size == 0 for k in wanted)]
    advice = f"use group_size {' or '.join(common)}, which fits every linear, or " if common else ""
    return f"scheme {name} does not fit {layers}; {advice}leave those out with --skip or --skip-unfit."


def _listed(fqns: list[str]) -> str:
    shown = ", ".join(fqn or "the linear" for fqn in fqns[:4])
    return shown if len(fqns) <= 4 else f"{shown} and {len(fqns) - 4} more"


def plain_weight(parameter: Tensor) -> Tensor:
    """Return a linear's weight [N, K] as an ordinary tensor, out of a QuantizedTensor on a float grid if it is one."""
    if isinstance(parameter, QuantizedTensor):
        return parameter.weight.qdata
    return parameter.detach()


def quantized_parameter(weight: QuantizedWeight, form: LinearFormat, dtype: torch.dtype) -> nn.Parameter:
    """Return what takes the place of a linear's weight, in the canonical layout; `dtype` is the compute dtype."""
    return nn.Parameter(QuantizedTensor.from_weight(weight, form, dtype), requires_grad=False)


def cast_(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast every floating parameter and buffer that is not quantized to `dtype`, in place; tied ones stay tied."""
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            if isinstance(parameter, QuantizedTensor):
                continue
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(owner, name, buffer.to(dtype))


def wrap_floats_(decisions: Sequence[Decision]) -> None:
    """Wrap the weights of linears that stay float in QuantizedTensors that share their memory (cast them first)."""
    wrapped: dict[int, nn.Parameter] = {}
    for decision in decisions:
        linear, form = decision.linear, decision.format
        if linear is None or form is None or not isinstance(form.weight, FloatGrid):
            continue
        key = id(linear.weight)
        if key not in wrapped:
            weight = plain_weight(linear.weight).to(getattr(torch, form.weight.dtype))
            wrapped[key] = quantized_parameter(QuantizedWeight.from_float(weight), form, weight.dtype)
        linear.weight = wrapped[key]
