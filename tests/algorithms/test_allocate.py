"""The allocation of schemes under a budget, against every possible allocation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.algorithms.allocate import Allocation, allocate
from llmq.errors import UsageError


def brute_force(costs: list[list[int]], losses: list[list[float]], budget: int) -> float:
    """The least loss over all allocations."""
    best = math.inf
    for choice in itertools.product(*(range(len(each)) for each in costs)):
        if sum(costs[i][j] for i, j in enumerate(choice)) <= budget:
            best = min(best, math.fsum(losses[i][j] for i, j in enumerate(choice)))
    return best


def check(found: Allocation, costs: list[list[int]], losses: list[list[float]], budget: int) -> None:
    """What an allocation says of itself is so."""
    assert found.cost == sum(costs[i][j] for i, j in enumerate(found.choices)) <= budget
    assert found.loss == pytest.approx(math.fsum(losses[i][j] for i, j in enumerate(found.choices)), rel=1e-12, abs=1e-300)
    assert found.bound <= found.loss


options = st.lists(st.tuples(st.integers(0, 40), st.floats(-3, 3, allow_subnormal=False)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(options, min_size=1, max_size=6), st.floats(0, 1))
def test_it_is_the_best_of_all_allocations(items: list[list[tuple[int, float]]], share: float) -> None:
    costs, losses = [[c for c, _ in item] for item in items], [[loss for _, loss in item] for item in items]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + round(share * (most - least))
    found = allocate(costs, losses, budget)
    check(found, costs, losses, budget)
    assert found.proven
    best = brute_force(costs, losses, budget)
    assert found.loss == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert allocate(costs, losses, budget) == found


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_losses_as_schemes_have_them(seed: int) -> None:
    """Losses that fall fourfold a bit, as those of quantization do; every cost is a multiple of few sizes."""
    generator = np.random.default_rng(seed)
    bits = [3.25, 3.5, 4.25, 4.5, 5.0, 8.0625]
    sizes = generator.choice([65536, 131072, 196608], 7)
    scale = 10 ** generator.uniform(-5, -3, 7)
    costs = [[round(float(b) * int(n)) for b in bits] for n in sizes]
    losses = [[float(s * 4.0 ** (4 - b) * generator.uniform(0.8, 1.25)) for b in bits] for s in scale]
    budget = int(4.55 * sizes.sum())
    found = allocate(costs, losses, budget)
    check(found, costs, losses, budget)
    assert found.loss == pytest.approx(brute_force(costs, losses, budget), rel=1e-12)


def large(count: int) -> tuple[list[list[int]], list[list[float]], int]:
    generator = np.random.default_rng(5)
    bits = [3.25, 3.5, 4.0, 4.25, 4.5, 5.0, 8.0625]
    sizes = generator.choice([4096 * 4096, 4096 * 11008, 4096 * 1024], count)
    scale = 10 ** generator.uniform(-5, -3, count)
    costs = [[round(b * int(n)) for b in bits] for n in sizes]
    losses = [[float(s * 4.0 ** (4 - b) * generator.uniform(0.8, 1.25)) for b in bits] for s in scale]
    return costs, losses, int(4.55 * sizes.sum())


def test_a_large_model_is_solved_close_to_its_budget() -> None:
    costs, losses, budget = large(400)
    found = allocate(costs, losses, budget)
    check(found, costs, losses, budget)
    assert found.proven
    assert found.cost > 0.995 * budget
    # a Lagrangian bound at any price is below it: here at many
    lowest = max(
        sum(min(loss + price * cost for cost, loss in zip(*item, strict=True)) for item in zip(costs, losses, strict=True))
        - price * budget
        for price in np.geomspace(1e-15, 1e-9, 200)
    )
    assert lowest <= found.loss <= lowest * 1.01


def test_a_thinned_search_says_how_far_it_may_be_off() -> None:
    # every step is worth the same price, so no bound drops anything: a sum of subsets
    worth = [int(each) for each in np.random.default_rng(0).integers(10**6, 10**7, 14)]
    costs, losses = [[0, each] for each in worth], [[float(each), 0.0] for each in worth]
    budget = sum(worth) // 2
    exact, thinned = allocate(costs, losses, budget), allocate(costs, losses, budget, max_states=50)
    check(thinned, costs, losses, budget)
    assert exact.proven
    assert not thinned.proven
    assert thinned.bound <= exact.loss <= thinned.loss


def test_more_budget_never_loses_more() -> None:
    costs, losses, budget = large(12)
    found = [allocate(costs, losses, int(budget * factor)).loss for factor in (0.8, 0.9, 1.0, 1.2, 1.5, 2.0)]
    assert found == sorted(found, reverse=True)
    free = allocate(costs, losses, sum(map(max, costs)))
    assert free.loss == pytest.approx(sum(map(min, losses)))


def test_options_that_cost_more_and_lose_more_are_not_taken() -> None:
    found = allocate([[10, 20, 30], [10, 20, 30]], [[1.0, 2.0, 0.5], [1.0, 1.0, 1.0]], 60)
    assert found.choices == (2, 0)
    assert found.cost == 40  # what is left buys nothing


@pytest.mark.parametrize(
    ("costs", "losses", "said"),
    [
        ([], [], "nothing to allocate"),
        ([[]], [[]], "at least one"),
        ([[1, 2]], [[1.0]], "2 costs and 1 losses"),
        ([[-1]], [[1.0]], "cost below 0"),
        ([[1]], [[math.nan]], "not finite"),
        ([[9, 8], [7]], [[1.0, 2.0], [1.0]], "cost 15 together, which is more than the budget of 10"),
    ],
)
def test_problems_that_cannot_be(costs: list[list[int]], losses: list[list[float]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        allocate(costs, losses, 10)
