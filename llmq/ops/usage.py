"""Which kernels really ran, counted where they are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Usage:
    """What ran inside one `record_usage` block: kernel name -> calls, and -> the weights it ran for."""

    calls: dict[str, int] = field(default_factory=dict)
    weights: dict[str, set[int]] = field(default_factory=dict)

    def add(self, kernel: str, weight: int) -> None:
        """Count one call of `kernel` for the weight of identity `weight`."""
        self.calls[kernel] = self.calls.get(kernel, 0) + 1
        self.weights.setdefault(kernel, set()).add(weight)

    def include(self, other: Usage) -> None:
        """Count what another block counted once more: a recording that runs again."""
        for kernel, calls in other.calls.items():
            self.calls[kernel] = self.calls.get(kernel, 0) + calls
            self.weights.setdefault(kernel, set()).update(other.weights[kernel])

    def linears(self) -> dict[str, int]:
        """Kernel name -> number of different linears it ran for: `ResultRecord.kernels`."""
        return {name: len(weights) for name, weights in self.weights.items()}


_CURRENT: ContextVar[Usage | None] = ContextVar("llmq_usage", default=None)


@contextmanager
def record_usage() -> Iterator[Usage]:
    """Count the kernels that run in this block, in this thread, in eager mode.

    A compiled graph does not come back to Python: what it runs is the plan that `prepare` returned.
    """
    usage = Usage()
    token = _CURRENT.set(usage)
    try:
        yield usage
    finally:
        _CURRENT.reset(token)


def current_usage() -> Usage | None:
    """Return the innermost block's counts, None outside."""
    return _CURRENT.get()
