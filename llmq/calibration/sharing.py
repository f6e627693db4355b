"""The linears of one part, quantized by the processes of a run: each takes some of them, and all get every result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmq.algorithms.report import LayerReport
from llmq.calibration.gather import Moments
from llmq.errors import SchemeError, UsageError
from llmq.files import trim_heap
from llmq.numerics.grid import FloatGrid
from llmq.numerics.weight import QuantizedWeight
from llmq.ranks import Ranks, assign
from llmq.schemes.apply import plain_weight
from llmq.schemes.cover import Decision

Quantize = Callable[[Decision, Tensor, Tensor | None, Tensor | None], tuple[QuantizedWeight, LayerReport]]
"""Makes the codes of a weight [N, K] from the Hessian and the upstream moment [K, K] of its inputs, or from neither."""


def quantize_linears(
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Sequence[str]],
    targets: Mapping[str, Decision],
    moments: dict[str, Moments],
    quantize: Quantize,
    ranks: Ranks,
) -> tuple[dict[str, QuantizedWeight], dict[str, LayerReport]]:
    """Quantize linears, each in one of the processes, so that all have about as much to do.

    Args:
        linears: by name.
        groups: names of linears that read the same input.
        targets: what is to become of each.
        moments: of this process's windows, by the name of each group's first linear; they are summed over the processes, and
            taken out.
        quantize: makes the codes of one.
        ranks: the processes.

    Returns:
        Weights and reports by name, in the order of `groups`; the same ones in all processes.

    Raises:
        SchemeError: an input is not finite.
    """
    names = [name for group in groups for name in group]
    seen = {name: group[0] in moments for group in groups for name in group}
    costs = [_cost(linears[name].weight.shape, seen=seen[name]) for name in names]
    owners = dict(zip(names, assign(costs, ranks.size), strict=True))
    sums: dict[str, tuple[Tensor, Tensor | None]] = {}
    broken: list[str] = []
    for group in groups:
        if group[0] in moments:
            hessian, upstream = moments.pop(group[0]).reduce(ranks)
            if not torch.isfinite(hessian.diagonal()).all():
                broken = broken or [targets[name].fqn for name in group]
            if any(owners[name] == ranks.rank for name in group):
                sums[group[0]] = hessian, upstream
    weights: dict[str, QuantizedWeight] = {}
    reports: dict[str, LayerReport] = {}
    with ranks.together():
        if broken:
            raise SchemeError(
                f"the inputs of {', '.join(broken)} are not finite during calibration; the model is broken already."
            )
        for group in groups:
            pair = sums.pop(group[0], (None, None))
            for name in group:
                if owners[name] == ranks.rank:
                    weights[name], reports[name] = quantize(targets[name], plain_weight(linears[name].weight), *pair)
                    trim_heap()
    if ranks.size > 1:
        told = ranks.gather_json(
            {name: (report.to_json(), report.seconds, weights[name].input_scale is not None) for name, report in reports.items()}
        )
        for name in names:
            device = linears[name].weight.device
            data, seconds, has_input_scale = told[owners[name]][name]
            reports[name] = LayerReport.from_json(data, seconds=seconds)
            weight = (
                weights[name] if owners[name] == ranks.rank else _room(targets[name], device, has_input_scale=has_input_scale)
            )
            for tensor in weight.tensors:
                ranks.tensor_from(tensor.view(-1).view(torch.uint8), owners[name])
            weights[name] = weight
    return {name: weights[name] for name in names}, {name: reports[name] for name in names}


def refuse_shared(decisions: Iterable[Decision], ranks: Ranks) -> None:
    """Refuse several processes for schemes that look at windows themselves: each process has only some of the windows.

    Raises:
        UsageError: names the schemes.
    """
    schemes = [decision.scheme for decision in decisions if decision.scheme is not None]
    alone = sorted({scheme.name for scheme in schemes if scheme.prepares or scheme.tunes})
    if alone and ranks.size > 1:
        raise UsageError(
            f"{', '.join(alone)} with these options change or learn a block as a whole, which one process does with all windows; "
            f"start one instead of {ranks.size}, or choose other options (`llmq schemes` lists them)."
        )


def _cost(shape: Sequence[int], *, seen: bool) -> float:
    """About how many multiplications a weight [N, K] costs: with statistics, K^3 to factorize them and N K^2 to propagate."""
    n, k = (float(size) for size in shape)
    return k * k * (n + k) if seen else n * k


def _room(decision: Decision, device: torch.device, *, has_input_scale: bool) -> QuantizedWeight:
    """Make room for a weight that another process has made."""
    assert decision.format is not None
    grid = decision.format.weight
    assert not isinstance(grid, FloatGrid)
    n, k = decision.parameter.shape
    weight = QuantizedWeight.empty(grid, n, k)
    return (replace(weight, input_scale=torch.empty(1)) if has_input_scale else weight).to(device)
