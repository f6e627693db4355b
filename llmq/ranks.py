"""The processes of one run: `torchrun` starts them, torch.distributed carries what they tell each other.

A run of one process goes through the same calls, which then do nothing. What travels is tensors and JSON, never pickles.
A step that may fail in one process alone runs inside `Ranks.together`: then it fails in all, with the same sentence, and nobody
waits for one who has left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmq import errors
from llmq.errors import LlmqError, PeerError, UsageError

TIMEOUT = timedelta(hours=12)
"""How long a process waits for the others: rank 0 may write for long while they wait."""


class Ranks:
    """Who takes part, and which of them this process is.

    Every method but `share` has to be called by all processes, in the same order. All of them raise PeerError when another
    process has ended.

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
        return self.share_of(self.rank, count)

    def share_of(self, rank: int, count: int) -> range:
        """Return which of `count` things another process has."""
        return range(rank * count // self.size, (rank + 1) * count // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, and return it; all of them get the same bits."""
        if self.size > 1:
            with _peers():
                dist.all_reduce(tensor)
        return tensor

    def tensor_from(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite `tensor` by that of process `source`, which has the same shape and dtype, and return it."""
        if self.size > 1:
            with _peers():
                dist.broadcast(tensor, src=source)
        return tensor

    def json_from(self, value: Any, source: int) -> Any:
        """Return plain data as process `source` has it; it travels as JSON, so that nothing that arrives is ever executed."""
        return self.gather_json(value if self.rank == source else None)[source] if self.size > 1 else value

    def gather_json(self, value: Any) -> list[Any]:
        """Return the plain data of all processes, in their order."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with _peers():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(mine)]))
            longest = max(int(length) for length in lengths)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(mine)] = mine
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, padded)
        return [json.loads(text[: int(length)].numpy().tobytes()) for text, length in zip(texts, lengths, strict=True)]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            with _peers():
                dist.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a step in which the processes tell each other nothing; what fails in one of them fails in all.

        Raises:
            LlmqError: what the first process that failed has raised.
        """
        failure: LlmqError | None = None
        try:
            yield
        except LlmqError as error:
            if self.size == 1:
                raise
            failure = error
        told = None if failure is None else {"kind": type(failure).__name__, "message": str(failure)}
        for rank, other in enumerate(self.gather_json(told) if self.size > 1 else []):
            if other is not None:
                shared = failure if rank == self.rank and failure is not None else _kind(other["kind"])(other["message"])
                shared.everywhere = True
                raise shared

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Compare plain data that has to be the same in all processes.

        Raises:
            UsageError: it is not; names the first process that differs from the first, and in what.
        """
        found = self.gather_json(dict(facts))
        for rank, other in enumerate(found):
            different = [key for key in {**found[0], **other} if found[0].get(key) != other.get(key)]
            if different:
                what = "; ".join(f"{key} is {found[0].get(key)!r} in process 0, {other.get(key)!r} there" for key in different)
                error = UsageError(
                    f"process {rank} of {self.size} differs: {what}. Give every process the same files, options and versions."
                )
                error.everywhere = True
                raise error


def assign(costs: Sequence[float], size: int) -> list[int]:
    """Return which process does which of several jobs: the largest first, each to who has least to do (ties: the lower)."""
    load = [0.0] * size
    owner = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        owner[job] = min(range(size), key=lambda rank: (load[rank], rank))
        load[owner[job]] += costs[job]
    return owner


def default_threads() -> int:
    """Return how many threads this process may use: the cores that it may run on, shared with the others on this machine."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _world_size() > 1 else 1
    return max(1, len(os.sched_getaffinity(0)) // local)


def join_ranks(device: str = "cpu") -> Ranks:
    """Return the processes that `torchrun` started (RANK, WORLD_SIZE …), joined; one process where it did not.

    Raises:
        UsageError: there are more processes on this machine than GPUs, or what torchrun tells its processes is not complete.
    """
    size = _world_size()
    if size == 1 or not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UsageError(
                f"WORLD_SIZE is {size} and {', '.join(missing)} not set; start several processes with "
                "`torchrun --nproc-per-node N -m llmq …`, or unset WORLD_SIZE."
            )
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise UsageError(
                    f"this machine has {torch.cuda.device_count()} GPUs and more than {local} processes; start one a GPU."
                )
            torch.cuda.set_device(local)
        with _peers():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave_ranks() -> None:
    """Part from the others, where there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _kind(name: str) -> type[LlmqError]:
    """Return an error's class by its name; what is none of ours comes as a PeerError."""
    kind = getattr(errors, name, PeerError)
    return kind if isinstance(kind, type) and issubclass(kind, LlmqError) else PeerError


@contextmanager
def _peers() -> Iterator[None]:
    """Say in one sentence that another process has gone: the libraries below tell of sockets."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"another process of this run ended, or cannot be reached ({str(error).splitlines()[0][:120]}); see its own message. "
            "What is finished is kept: the same command goes on from there."
        ) from error
