"""Processes of one run as threads, so that what is summed over them can be tested in milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from llmq.ranks import Ranks

Result = TypeVar("Result")


class ThreadRanks(Ranks):
    """One of `size` threads that sum their tensors, in the order of their numbers."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Tensor]) -> None:
        super().__init__(rank, size)
        self._barrier, self._slots = barrier, slots

    def sum_(self, tensor: Tensor) -> Tensor:
        """See `Ranks.sum_`."""
        self._slots[self.rank] = tensor.clone()
        self._barrier.wait(timeout=30)
        tensor.copy_(sum(self._slots[1:], start=self._slots[0].clone()))
        self._barrier.wait(timeout=30)
        return tensor


def on_threads(size: int, run: Callable[[Ranks], Result]) -> list[Result]:
    """Call `run` in `size` threads, each with its ranks; return what each returned."""
    barrier, slots = threading.Barrier(size), [Tensor() for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(run, ThreadRanks(rank, size, barrier, slots)) for rank in range(size)]
        return [job.result(timeout=60) for job in jobs]
