"""What measuring linears one by one needs: a model that goes on from one of its parts, with one weight in another's place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llmq.calibration.stages import Stage


def linears_of(stage: Stage, wanted: Collection[str]) -> dict[str, nn.Linear]:
    """Return the linears of a stage whose fully qualified names are `wanted`, by their name inside it."""
    prefix = f"{stage.prefix}." if stage.prefix else ""
    found = {decision.fqn.removeprefix(prefix): decision.linear for decision in stage.decisions if decision.fqn in wanted}
    return {name: linear for name, linear in found.items() if linear is not None}


def fqn_of(stage: Stage, name: str) -> str:
    """Return the fully qualified name of what is called `name` inside a stage."""
    return f"{stage.prefix}.{name}".lstrip(".")


def run_from(stages: Sequence[Stage], index: int, h: Tensor, context: Any) -> Tensor:
    """Return the hidden states after the last block, for `h` [B, T, hidden] before stage `index`; the head does not run."""
    for stage in stages[index:]:
        if not stage.is_head:
            h = stage.forward(stage.module, h, context)
    return h


@contextmanager
def changed(linear: nn.Linear, weight: nn.Parameter) -> Iterator[None]:
    """Let a linear have another weight for a while."""
    original = linear.weight
    linear.weight = weight
    try:
        yield
    finally:
        linear.weight = original
