"""Which option for which item, so that the sum of losses is least under a budget: the multiple-choice knapsack problem.

Of each item (a linear) exactly one option (a scheme) is taken; option j of item i costs c_ij (bits) and loses l_ij (nats):

    minimise  sum_i l_i,j(i)   subject to   sum_i c_i,j(i) <= B.

It is solved exactly, in two steps (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979;
Dyer, Kayal and Walker, "A branch and bound algorithm for solving the multiple choice knapsack problem", 1984):

1. The Lagrangian relaxation. For a price p of a unit of cost, L(p) = sum_i min_j (l_ij + p c_ij) - p B is below every
   allocation's loss, and largest at the slope where the lower convex hulls of all items' options, joined, reach the budget.
   Going along those hulls gives an allocation as well, whose loss is an upper bound.
2. Dynamic programming over the items, on the frontier of (cost, loss) pairs that no other pair beats in both. A partial
   allocation is dropped when it cannot end under the budget, or when its Lagrangian bound is above the upper bound: what
   remains is a narrow band, because the two bounds are at most one option apart.

Should the frontier outgrow `max_states` all the same, it is thinned; the result is then still under the budget, and its `bound`
says how far it can be from the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmq.errors import UsageError

MAX_STATES = 1 << 20
_SLACK = 1e-9
"""Relative width by which bounds are widened before they drop anything: sums of floats in another order differ by less."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What is taken of each item.

    Attributes:
        choices: index of the option, by item.
        cost: sum of the options' costs; not above the budget.
        loss: sum of the options' losses.
        bound: no allocation under the budget loses less than this; `loss` itself where that was proven.
    """

    choices: tuple[int, ...]
    cost: int
    loss: float
    bound: float

    @property
    def proven(self) -> bool:
        """Whether no allocation under the budget loses less."""
        return self.bound >= self.loss


@dataclass(frozen=True)
class _Item:
    """The options of one item that no other one beats: costs rise, losses fall.

    `index` is that of the option as the caller counts.
    """

    costs: NDArray[np.int64]
    losses: NDArray[np.float64]
    index: NDArray[np.int64]


def allocate(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int, *, max_states: int = MAX_STATES
) -> Allocation:
    """Take one option of every item, with the least sum of losses under the budget.

    Args:
        costs: of each item's options, integers in any unit; not negative.
        losses: of the same options; any finite numbers.
        budget: what the costs may sum to, in their unit.
        max_states: partial allocations to keep at once, at most.

    Returns:
        The allocation; of several that lose the same, always the same one.

    Raises:
        UsageError: there is nothing to choose from, a number cannot be, or the cheapest options cost more than the budget.
    """
    items = [_item(index, *each) for index, each in enumerate(zip(costs, losses, strict=True))]
    if not items:
        raise UsageError("there is nothing to allocate: no item was given.")
    least = sum(int(item.costs[0]) for item in items)
    if least > budget:
        raise UsageError(f"the cheapest options cost {least} together, which is more than the budget of {budget}; raise it.")
    chosen, price = _along_hulls(items, budget)
    upper = sum(float(item.losses[choice]) for item, choice in zip(items, chosen, strict=True))
    lower = sum(float((item.losses + price * item.costs).min()) for item in items) - price * budget
    exact = True
    if upper > lower:
        better, exact = _dynamic(items, budget, (price, lower, upper), max_states)
        chosen = better or chosen
    loss = sum(float(item.losses[choice]) for item, choice in zip(items, chosen, strict=True))
    return Allocation(
        choices=tuple(int(item.index[choice]) for item, choice in zip(items, chosen, strict=True)),
        cost=sum(int(item.costs[choice]) for item, choice in zip(items, chosen, strict=True)),
        loss=loss,
        bound=loss if exact else min(lower, loss),
    )


def _item(number: int, costs: Sequence[int], losses: Sequence[float]) -> _Item:
    if len(costs) != len(losses) or not costs:
        raise UsageError(f"item {number} has {len(costs)} costs and {len(losses)} losses; it needs as many, and at least one.")
    if min(costs) < 0 or not np.isfinite(losses).all():
        raise UsageError(f"item {number} has a cost below 0 or a loss that is not finite; measure it again.")
    order = sorted(range(len(costs)), key=lambda option: (costs[option], losses[option], option))
    kept = [order[0]]
    for option in order[1:]:
        if losses[option] < losses[kept[-1]]:
            kept.append(option)
    return _Item(
        np.array([costs[option] for option in kept], dtype=np.int64),
        np.array([losses[option] for option in kept], dtype=np.float64),
        np.array(kept, dtype=np.int64),
    )


def _along_hulls(items: list[_Item], budget: int) -> tuple[list[int], float]:
    """Buy steps along the convex hulls, the steepest first.

    Returns:
        An allocation under the budget, and the price of the first step that was too dear (0: everything was affordable).
    """
    steps = []
    for number, item in enumerate(items):
        at = 0
        for nxt in _hull(item)[1:]:
            gain = float(item.losses[at] - item.losses[nxt])
            steps.append((-gain / float(item.costs[nxt] - item.costs[at]), number, at, nxt))
            at = nxt
    chosen = [0] * len(items)
    spent = sum(int(item.costs[0]) for item in items)
    price: float | None = None
    for slope, number, at, nxt in sorted(steps):
        extra = int(items[number].costs[nxt] - items[number].costs[at])
        if chosen[number] == at and spent + extra <= budget:
            chosen[number], spent = nxt, spent + extra
        elif price is None:
            price = -slope
    return chosen, price or 0.0


def _hull(item: _Item) -> list[int]:
    """Return the options on the lower convex hull, by rising cost (Andrew's monotone chain)."""
    hull: list[int] = []
    costs, losses = item.costs.tolist(), item.losses.tolist()
    for option in range(len(costs)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (losses[b] - losses[a]) * (costs[option] - costs[a]) < (losses[option] - losses[a]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(option)
    return hull


def _dynamic(
    items: list[_Item], budget: int, bounds: tuple[float, float, float], max_states: int
) -> tuple[list[int] | None, bool]:
    """Search the band between the bounds.

    Args:
        items: the items.
        budget: of the costs.
        bounds: the price, the Lagrangian bound at it, and the loss of a known allocation.
        max_states: length of the frontier at most.

    Returns:
        The best allocation, None where nothing is better than the known one; and whether that is proven.
    """
    price, lower, upper = bounds
    band = (upper - lower) * (1 + _SLACK) + _SLACK * abs(upper)
    reduced = [item.losses + price * item.costs for item in items]
    reduced = [each - each.min() for each in reduced]
    kept = [np.flatnonzero(each <= band) for each in reduced]
    cheapest = np.array([int(item.costs[options].min()) for item, options in zip(items, kept, strict=True)])
    dearest = np.array([int(item.costs[options].max()) for item, options in zip(items, kept, strict=True)])
    rest_least = np.append(np.cumsum(cheapest[::-1])[::-1], 0)
    rest_most = np.append(np.cumsum(dearest[::-1])[::-1], 0)

    cost, loss, above = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    exact = True
    for number, (item, options) in enumerate(zip(items, kept, strict=True)):
        states = len(cost)
        cost = np.concatenate([cost + item.costs[option] for option in options])
        loss = np.concatenate([loss + item.losses[option] for option in options])
        above = np.concatenate([above + reduced[number][option] for option in options])
        parent = np.tile(np.arange(states, dtype=np.int32), len(options))
        choice = np.repeat(options.astype(np.int16), states)
        unspent = np.maximum(budget - cost - rest_most[number + 1], 0)  # whatever the rest takes
        possible = (cost + rest_least[number + 1] <= budget) & (above + price * unspent <= band)
        order = np.flatnonzero(possible)
        order = order[np.lexsort((loss[order], cost[order]))]
        if not len(order):
            return None, True
        falling = np.minimum.accumulate(loss[order])
        best = np.append(True, loss[order][1:] < falling[:-1])
        order = order[best]
        if len(order) > max_states:
            exact = False
            order = order[np.linspace(0, len(order) - 1, max_states).round().astype(np.int64)]
        cost, loss, above = cost[order], loss[order], above[order]
        trail.append((parent[order], choice[order]))
    state = len(cost) - 1  # losses fall along the frontier: the last one loses least
    if loss[state] >= upper:
        return None, exact
    found: list[int] = []
    for parent, choice in reversed(trail):
        found.append(int(choice[state]))
        state = int(parent[state])
    return found[::-1], exact
