"""What a scheme decides for every parameter of a module, and the coverage report made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmq.algorithms.report import LayerReport
from llmq.numerics.grid import Activation, Float8Activation, Float8Grid, FloatGrid, Grid, LinearFormat, format_from_json
from llmq.ops.tensor import QuantizedTensor
from llmq.results.coverage import Coverage, CoverageRow
from llmq.schemes.base import ResolvedScheme


@dataclass(frozen=True)
class Decision:
    """What is to become of one parameter.

    Attributes:
        fqn: of the module when the parameter is its `weight`, else of the parameter.
        linear: the module whose weight may be swapped; None for what is not a linear.
        parameter: as it is now.
        format: what a linear becomes (a scheme's format, or the float grid of a linear that is left alone); None: untouched.
        reason: why the scheme leaves it alone; empty where it does not.
        scheme: what chooses the codes of a linear that is covered; None for what is left alone.
    """

    fqn: str
    linear: nn.Linear | None
    parameter: Tensor
    format: LinearFormat | None
    reason: str = ""
    scheme: ResolvedScheme | None = None

    @property
    def covered(self) -> bool:
        """Whether the scheme is for it."""
        return not self.reason


def as_done(decisions: Sequence[Decision], reports: Sequence[LayerReport]) -> list[Decision]:
    """Return the decisions with the formats that linears really got, where a scheme gave one another than its own."""
    formats = {report.fqn: format_from_json(report.format) for report in reports if report.format is not None}
    return [replace(each, format=formats[each.fqn]) if each.fqn in formats else each for each in decisions]


def coverage(
    scheme: str,
    decisions: Sequence[Decision],
    *,
    dtypes: Mapping[str, torch.dtype],
    noise: Mapping[str, float | None],
    compute: torch.dtype | None,
) -> Coverage:
    """Say what became, or is to become, of every parameter.

    Args:
        scheme: its name.
        decisions: as they were taken.
        dtypes: of every parameter before, by the decision's fqn.
        noise: SQNR in dB, by fqn, of what was quantized.
        compute: what floating parameters that are no linear's are cast to; None: they are not.
    """
    rows: list[CoverageRow] = []
    owners: dict[object, str] = {}
    for decision in decisions:
        now: Tensor = decision.linear.weight if decision.linear is not None else decision.parameter
        form = decision.format
        dtype = compute if compute is not None and now.is_floating_point() and decision.linear is None else now.dtype
        stored = describe_format(form) if form is not None else _name(dtype)
        key = _memory(now, decision)
        tied = owners.get(key) if key is not None else None
        if key is not None:
            owners.setdefault(key, decision.fqn)
        rows.append(
            CoverageRow(
                fqn=decision.fqn,
                shape=tuple(now.shape),
                source=_name(dtypes[decision.fqn]),
                target=stored if decision.covered else None,
                dtype=stored,
                reason=decision.reason,
                nbytes=0 if tied is not None else _stored_bytes(now, form, dtype),
                tied_to=tied,
                sqnr_db=noise.get(decision.fqn),
            )
        )
    return Coverage(scheme, tuple(rows))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory(now: Tensor, decision: Decision) -> object:
    """What parameters that share memory have in common; None for one without memory."""
    if decision.format is not None and decision.format.quantized:
        # codes are no other parameter's memory, but for two linears of one weight
        return "codes", id(decision.parameter)
    data = now.weight.qdata if isinstance(now, QuantizedTensor) else now
    if data.is_meta:
        return "meta", id(decision.parameter)
    return ("data", data.data_ptr()) if data.numel() else None


def _stored_bytes(now: Tensor, form: LinearFormat | None, dtype: torch.dtype) -> int:
    if form is None:
        return now.numel() * dtype.itemsize
    n, k = now.shape
    return form.nbytes(n, k)


def describe_format(form: LinearFormat) -> str:
    """Return a format in a few words, such as 'int4 g128 float zero' or 'bfloat16'."""
    words = [_describe_grid(form.weight)]
    if form.activation is not None:
        words.append(_describe_activation(form.activation))
    return ", ".join(words)


def _describe_activation(activation: Activation) -> str:
    if isinstance(activation, Float8Activation):
        return f"float8 activations {'per token' if activation.granularity == 'row' else 'per tensor'}"
    kind = "static" if activation.static else "symmetric" if activation.symmetric else "asymmetric"
    return f"int8 {kind} activations"


def _describe_grid(grid: Grid) -> str:
    if isinstance(grid, FloatGrid):
        return grid.dtype
    if isinstance(grid, Float8Grid):
        return "float8 per channel"
    group = "per channel" if grid.group_size is None else f"g{grid.group_size}"
    return f"int{grid.bits} {group} {'symmetric' if grid.symmetric else f'{grid.zero_point} zero'}"
