"""The processes of one run: `torchrun` starts them, torch.distributed carries what they tell each other.

A run of one process goes through the same calls, which then do nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(hours=12)
"""How long a process waits for the others: rank 0 may write for long while they wait."""


class Ranks:
    """Who takes part, and which of them this process is.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of `count` things this process has: consecutive ones, so that all of them in rank order are in order."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def tensor_from(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite `tensor` by that of process `source`, which has the same shape and dtype, and return it."""
        if self.size > 1:
            dist.broadcast(tensor, src=source)
        return tensor

    def json_from(self, value: Any, source: int) -> Any:
        """Return plain data as process `source` has it; it travels as JSON, so that nothing that arrives is ever executed."""
        return self.gather_json(value)[source] if self.size > 1 else value

    def gather_json(self, value: Any) -> list[Any]:
        """Return the plain data of all processes, in their order."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, padded)
        return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def assign(costs: Sequence[float], size: int) -> list[int]:
    """Return which process does which of several jobs: the largest first, each to who has least to do (ties: the lower)."""
    load = [0.0] * size
    owner = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        owner[job] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owner[job]] += costs[job]
    return owner


def join_ranks(device: str = "cpu") -> Ranks:
    """Return the processes that `torchrun` started (RANK, WORLD_SIZE …), joined; one process where it did not."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave_ranks() -> None:
    """Part from the others, where there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
