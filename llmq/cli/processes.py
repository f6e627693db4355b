"""The command line in one of several processes that `torchrun` started. Nothing here imports torch before it is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llmq.errors import UsageError


def size() -> int:
    """Return how many processes take part in this run."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


def speaks() -> bool:
    """Return whether this is the process that prints: the first."""
    return size() == 1 or os.environ.get("RANK", "0") == "0"


def name() -> str:
    """Return what a process calls itself in a message that only it knows of; empty where it is alone."""
    return f"process {os.environ.get('RANK', '?')} of {size()}: " if size() > 1 else ""


def refuse_several() -> None:
    """Raise UsageError in one of several processes."""
    if size() > 1:
        raise UsageError(
            f"only `llmq quantize` and `llmq eval perplexity` share their work between processes, and {size()} were started; "
            "run this one without torchrun."
        )


@contextmanager
def shared() -> Iterator[None]:
    """Part from the other processes at the end of a command, however it ends."""
    try:
        yield
    finally:
        if "torch" in sys.modules:
            from llmq.ranks import leave_ranks

            leave_ranks()
