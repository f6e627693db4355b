"""Choosing kernels by their measured times: which layout a weight gets, and which kernel how many rows.

A weight has one layout, for one row as for a thousand. Of each layout the fastest kernels for 1, 4, 16 and 512 rows say how much
longer it takes than the fastest kernels there are. The layout with the least geometric mean of these ratios is taken, weighted
8 : 4 : 2 : 1, since decoding asks for a row or a few. Within it each number of rows gets the kernel that was the fastest at the
nearest measured number, on a scale of ratios: 1 and 2 rows that of 1, up to 8 that of 4, up to 90 that of 16.

Times have noise. An earlier kernel of the table keeps its place unless another is faster by more than `MARGIN`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, isqrt, log

from llmq.ops.schema import Case, Kernel

ROWS = (1, 4, 16, 512)
"""Numbers of rows that are timed."""
MARGIN = 1.05
"""Times that differ by less are taken for equal."""
_WEIGHTS = (8, 4, 2, 1)
_MEASURED = f"measured for {ROWS[0]} and {ROWS[-1]} rows:"

Times = Mapping[str, Sequence[float]]
"""Seconds of a call by name of the kernel, for each of `ROWS`."""
Timer = Callable[[Case, Sequence[Kernel]], Times]
"""Measures kernels on one case, or remembers what was measured."""


@dataclass(frozen=True)
class Plan:
    """Which kernels one case gets.

    Attributes:
        layout: of the weight.
        kernels: names, each of which reads `layout`.
        until: the last number of rows of each kernel, None for the last; empty: the kernels' own limits say.
        why: what the choice rests on, as a clause.
        rejected: for every other kernel, why it was not taken.
    """

    layout: str
    kernels: tuple[str, ...]
    until: tuple[int | None, ...] = ()
    why: str = ""
    rejected: dict[str, str] = field(default_factory=dict)


def fastest_plan(kernels: Sequence[Kernel], times: Times) -> Plan:
    """Choose among kernels that can all compute a case.

    Args:
        kernels: in the table's order.
        times: of each of them.

    Returns:
        the plan; `rejected` has the kernels that were timed and not taken.
    """
    fastest = [min(times[kernel.name][index] for kernel in kernels) for index in range(len(ROWS))]
    layouts = list(dict.fromkeys(kernel.layout for kernel in kernels))
    of_layout = {layout: [kernel.name for kernel in kernels if kernel.layout == layout] for layout in layouts}
    cost = {
        layout: _mean([min(times[name][index] for name in names) / fastest[index] for index in range(len(ROWS))])
        for layout, names in of_layout.items()
    }
    layout = _first_best(layouts, cost)
    mine = of_layout[layout]
    winners = [_first_best(mine, {name: times[name][index] for name in mine}) for index in range(len(ROWS))]
    used, until = _ranges(winners)
    taken = [times[winner][index] for index, winner in enumerate(winners)]
    rejected = {
        kernel.name: f"{_MEASURED} {_described(times[kernel.name])}, against {_described(taken)}"
        for kernel in kernels
        if kernel.name not in used
    }
    return Plan(layout, used, until, f"{_MEASURED} {_described(taken)}{_against(rejected, times)}", rejected)


def _against(rejected: Mapping[str, str], times: Times) -> str:
    """Name the fastest for one row of those that were not taken."""
    nearest = min(rejected, key=lambda name: times[name][0], default=None)
    return "" if nearest is None else f", against {_described(times[nearest])} of {nearest}"


def _described(seconds: Sequence[float]) -> str:
    """Return '41.3 us and 1.25 ms'."""
    return f"{_time(seconds[0])} and {_time(seconds[-1])}"


def _mean(ratios: Sequence[float]) -> float:
    """Return the weighted geometric mean."""
    return exp(sum(weight * log(ratio) for weight, ratio in zip(_WEIGHTS, ratios, strict=True)) / sum(_WEIGHTS))


def _first_best(names: Sequence[str], cost: Mapping[str, float]) -> str:
    """Return the first whose cost is the least, as far as can be told."""
    least = min(cost[name] for name in names)
    return next(name for name in names if cost[name] <= least * MARGIN)


def _ranges(winners: Sequence[str]) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Turn the best kernel at each of `ROWS` into kernels and the last number of rows of each."""
    used: list[str] = []
    until: list[int | None] = []
    for index, winner in enumerate(winners):
        last = isqrt(ROWS[index] * ROWS[index + 1]) if index + 1 < len(ROWS) else None
        if used and used[-1] == winner:
            until[-1] = last
        else:
            used.append(winner)
            until.append(last)
    return tuple(used), tuple(until) if len(used) > 1 else ()


def _time(seconds: float) -> str:
    """Return '41.3 us' or '1.25 ms'."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
